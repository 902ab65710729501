package elfdeps

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Place is where a file is on this machine and where it will be in the system;
// both are absolute. They differ for a program that moves, and so for the
// libraries that it finds by $ORIGIN.
type Place struct {
	Host, Target string
}

// Library is a file of a closure.
type Library struct {
	Place
	Name     string // by which it is asked for, as in libc.so.6; the path of a loader
	By       string // Target of what asks first
	Loader   bool   // it is the program's loader (PT_INTERP), or the loader's own configuration
	Searched bool   // found in the folders of ld.so.conf or the usual ones, not by the path that an object names
	Opened   bool   // not needed by DT_NEEDED, but known to be opened by By while the program runs
	Provided bool   // Loader.Provided knows it already
}

// Missing is a library or loader that is nowhere.
type Missing struct {
	Name string
	By   []string // Target of each object that needs it
	Hint string   // what was found in its place, a clause; or ""
}

func (m Missing) String() string {
	s := fmt.Sprintf("%s, which %s needs, is nowhere", m.Name, strings.TrimPrefix(m.By[0], "/"))
	if n := len(m.By) - 1; n > 0 {
		s = fmt.Sprintf("%s, which %s and %d more need, is nowhere", m.Name, strings.TrimPrefix(m.By[0], "/"), n)
	}
	if m.Hint != "" {
		s += " (" + m.Hint + ")"
	}
	return s
}

// Closure is all that a program needs to be loaded.
type Closure struct {
	Libraries []Library // each Target once, in the order in which the loader finds them
	Folders   []string  // folders that must exist, since a search path goes through them and back by ".."
	Missing   []Missing
}

// Loader finds libraries as ld.so(8) of glibc, or that of musl, would in the system
// to be made. LD_LIBRARY_PATH and ld.so.cache play no part: neither is in that
// system. Of libraries in several builds (glibc-hwcaps) it takes the base one, which
// runs on every machine. What programs open by dlopen can't be seen, but for the library that glibc itself opens.
type Loader struct {
	// Provided tells the file on this machine that will be at the absolute path
	// target of the system by other means; it comes before what is on this machine
	// at that path. It may be nil.
	Provided func(target string) (host string, ok bool)

	root    string
	folders []string // of glibc's search
	objects map[string]read
}

type read struct {
	object *Object
	id     fileID
	err    error
}

type fileID struct{ dev, ino uint64 }

// usual are the folders that some build of glibc searches of itself.
var usual = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"}

// libs are what $LIB may stand for: Debian's, all others', and that of no multilib.
var libs = []string{"lib/x86_64-linux-gnu", "lib64", "lib"}

// New makes a Loader for the machine whose root folder is root, usually "/".
func New(root string) *Loader {
	l := &Loader{root: root, folders: confFolders(root, "/etc/ld.so.conf"), objects: map[string]read{}}
	for _, folder := range usual {
		if !slices.Contains(l.folders, folder) {
			l.folders = append(l.folders, folder)
		}
	}
	return l
}

// Open reads the object at p, once.
func (l *Loader) Open(p Place) (*Object, error) {
	r := l.open(p.Host)
	return r.object, r.err
}

func (l *Loader) open(name string) read {
	if r, ok := l.objects[name]; ok {
		return r
	}
	r := readFile(name)
	l.objects[name] = r
	return r
}

func readFile(name string) read {
	// Not to wait for whoever writes into a named pipe.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return read{err: err}
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return read{err: err}
	}
	if !info.Mode().IsRegular() {
		return read{err: errors.New("is no file")}
	}
	r := read{}
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		r.id = fileID{s.Dev, s.Ino}
	}
	r.object, r.err = Read(f)
	return r
}

// loaded is an object in the process that the loader builds.
type loaded struct {
	Place
	object *Object
	by     *loaded // what it was first loaded for
}

// search is the state of one Closure.
type search struct {
	*Loader
	musl    string // path of the file with musl's folders; "" for glibc
	folders []Place
	main    *loaded
	names   map[string]*loaded // by the names asked for, and by DT_SONAME
	files   map[fileID]*loaded
	missing map[string]*Missing
	queue   []*loaded
	out     Closure
}

// Closure finds what the program at main needs, whose Host has no symlink in it,
// and then what the plugins need that it opens later. A library alone is a
// program without a loader. It fails when main or a plugin can't be read; what is
// missing is no error, but in the Closure.
func (l *Loader) Closure(main Place, plugins ...Place) (*Closure, error) {
	r := l.open(main.Host)
	if r.err != nil {
		return nil, fmt.Errorf("%s: %w", main.Host, r.err)
	}
	s := &search{
		Loader: l, main: &loaded{Place: main, object: r.object},
		names: map[string]*loaded{}, files: map[fileID]*loaded{}, missing: map[string]*Missing{},
	}
	s.files[r.id] = s.main
	s.setFolders(r.object)
	if r.object.Interp != "" {
		s.loader(r.object.Interp)
	}
	s.queue = append(s.queue, s.main)
	s.run()
	for _, p := range plugins {
		r := l.open(p.Host)
		if r.err != nil {
			return nil, fmt.Errorf("%s: %w", p.Host, r.err)
		}
		if s.files[r.id] == nil {
			s.files[r.id] = &loaded{Place: p, object: r.object, by: s.main}
			s.queue = append(s.queue, s.files[r.id])
			s.run()
		}
	}
	s.unwinder()
	for _, m := range s.missing {
		s.out.Missing = append(s.out.Missing, *m)
	}
	slices.SortFunc(s.out.Missing, func(a, b Missing) int { return strings.Compare(a.Name, b.Name) })
	slices.Sort(s.out.Folders)
	s.out.Folders = slices.Compact(s.out.Folders)
	return &s.out, nil
}

// setFolders chooses between the C libraries by the program's loader; a library
// that has none is musl's if it says so.
func (s *search) setFolders(main *Object) {
	var folders []string
	switch base := path.Base(main.Interp); {
	case strings.HasPrefix(base, "ld-musl-"), slices.Contains(main.Needed, "libc.musl-x86_64.so.1"):
		s.musl = "/etc/ld-musl-x86_64.path"
		folders = []string{"/lib", "/usr/local/lib", "/usr/lib"}
		if b, err := os.ReadFile(filepath.Join(s.root, s.musl)); err == nil {
			folders = strings.FieldsFunc(string(b), func(r rune) bool { return r == ':' || r == '\n' })
			s.add(Library{Place: s.place(s.musl), Name: s.musl, By: s.main.Target, Loader: true})
		}
	default:
		folders = s.Loader.folders
	}
	for _, folder := range folders {
		s.folders = append(s.folders, s.place(folder))
	}
}

// unwinder adds libgcc_s, which glibc opens when a thread is cancelled or ends itself,
// and without which it then aborts the program. It is the one library that glibc
// opens of itself, since 2.34 has the usual name services within libc.
func (s *search) unwinder() {
	const name, libc = "libgcc_s.so.1", "libc.so.6"
	if s.names[libc] == nil || s.names[name] != nil {
		return
	}
	for _, o := range s.files {
		if o != s.names[libc] && o.object.endsThreads {
			if lib, r, _ := s.find(s.names[libc], name); r.object != nil {
				lib.By, lib.Opened = s.names[libc].Target, true
				s.add(lib)
			}
			return
		}
	}
}

// place is an absolute path of the machine, where it stays.
func (s *search) place(target string) Place {
	return Place{Host: s.host(target), Target: path.Clean(target)}
}

// host keeps what is in the path, "..", say, for the kernel to resolve.
func (s *search) host(target string) string {
	return strings.TrimSuffix(s.root, "/") + target
}

func (s *search) add(lib Library) {
	if !slices.ContainsFunc(s.out.Libraries, func(l Library) bool { return l.Target == lib.Target }) {
		s.out.Libraries = append(s.out.Libraries, lib)
	}
}

// loader takes the program's loader, which counts as loaded.
func (s *search) loader(name string) {
	lib := Library{Place: s.place(name), Name: name, By: s.main.Target, Loader: true}
	r, ok := s.look(&lib)
	if !ok || !path.IsAbs(name) {
		m := &Missing{Name: name, By: []string{s.main.Target}}
		if r.err != nil && !errors.Is(r.err, os.ErrNotExist) {
			m.Hint = hint(lib, r.err)
		}
		s.missing[name] = m
		return
	}
	s.add(lib)
	o := &loaded{Place: lib.Place, object: r.object, by: s.main}
	s.names[path.Base(name)], s.files[r.id] = o, o
	if r.object.Soname != "" {
		s.names[r.object.Soname] = o
	}
}

func hint(lib Library, err error) string {
	var other *ArchError
	var pathErr *os.PathError
	switch {
	case errors.As(err, &other):
		return fmt.Sprintf("%s is for %s", lib.Target, other.Arch)
	case errors.As(err, &pathErr):
		return fmt.Sprintf("%s: %v", lib.Target, pathErr.Err)
	}
	return fmt.Sprintf("%s: %v", lib.Target, err)
}

// look reads the library where it should be, or where it is provided from.
func (s *search) look(lib *Library) (read, bool) {
	if s.Provided != nil {
		if host, ok := s.Provided(lib.Target); ok {
			if r := s.open(host); r.err == nil {
				lib.Host, lib.Provided = host, true
				return r, true
			}
		}
	}
	r := s.open(lib.Host)
	return r, r.err == nil
}

// run takes what is in the queue, breadth first as the loader does: that decides
// which of several libraries with one name is loaded.
func (s *search) run() {
	for len(s.queue) > 0 {
		o := s.queue[0]
		s.queue = s.queue[1:]
		for _, name := range o.object.Needed {
			s.need(o, name)
		}
	}
}

// reserved are the libraries that musl's loader is itself.
var reserved = []string{"libc.", "libpthread.", "librt.", "libm.", "libdl.", "libutil.", "libxnet."}

func (s *search) need(by *loaded, name string) {
	if s.names[name] != nil {
		return
	}
	if s.musl != "" && s.main.object.Interp != "" && slices.ContainsFunc(reserved, func(p string) bool { return strings.HasPrefix(name, p) }) {
		return
	}
	lib, r, why := s.find(by, name)
	if r.object == nil {
		m := s.missing[name]
		if m == nil {
			m = &Missing{Name: name, Hint: why}
			s.missing[name] = m
		}
		if !slices.Contains(m.By, by.Target) {
			m.By = append(m.By, by.Target)
		}
		return
	}
	lib.By = by.Target
	s.add(lib)
	o := s.files[r.id]
	if o == nil {
		o = &loaded{Place: lib.Place, object: r.object, by: by}
		s.files[r.id] = o
		s.queue = append(s.queue, o)
	}
	s.names[name] = o
	if r.object.Soname != "" && s.names[r.object.Soname] == nil {
		s.names[r.object.Soname] = o
	}
}

// find searches in the loader's order (ld.so(8)). Where it finds none, it says
// what it passed over.
func (s *search) find(by *loaded, name string) (Library, read, string) {
	var skipped string
	try := func(p Place, searched bool) (Library, read, bool) {
		lib := Library{Place: p, Name: name, Searched: searched}
		r, ok := s.look(&lib)
		if !ok && skipped == "" && !errors.Is(r.err, os.ErrNotExist) && !errors.Is(r.err, syscall.ENOTDIR) {
			skipped = hint(lib, r.err)
		}
		return lib, r, ok
	}
	if strings.Contains(name, "/") {
		for _, p := range s.expand(by, name) {
			if lib, r, ok := try(p.clean(), false); ok {
				s.through(p)
				return lib, r, ""
			}
		}
		if skipped == "" && !strings.HasPrefix(name, "/") && !strings.HasPrefix(name, "$") {
			skipped = "such a path depends on the folder that the program is started in"
		}
		return Library{}, read{}, skipped
	}
	for _, p := range s.named(by) {
		if lib, r, ok := try(p.join(name), false); ok {
			s.through(p)
			return lib, r, ""
		}
	}
	for _, p := range s.folders {
		if lib, r, ok := try(p.join(name), true); ok {
			return lib, r, ""
		}
	}
	return Library{}, read{}, skipped
}

// named lists the folders that by and the objects it was loaded for name.
func (s *search) named(by *loaded) []Place {
	var out []Place
	each := func(o *loaded, paths []string) {
		for _, p := range paths {
			out = append(out, s.expand(o, p)...)
		}
	}
	if s.musl != "" { // makes no difference between the two, and inherits both
		for o := by; o != nil; o = o.by {
			each(o, o.object.RPath)
			each(o, o.object.RunPath)
		}
		return out
	}
	if !by.object.hasRunPath {
		for o := by; o != nil; o = o.by {
			each(o, o.object.RPath)
		}
	}
	each(by, by.object.RunPath)
	return out
}

// expand makes a folder, or a path, of one that o names. Empty and relative ones
// depend on where the program is started, and are none.
func (s *search) expand(o *loaded, name string) []Place {
	var out []Place
	for _, lib := range libs {
		replace := func(origin string) string {
			return strings.NewReplacer("${ORIGIN}", origin, "$ORIGIN", origin, "${LIB}", lib, "$LIB", lib,
				"${PLATFORM}", "x86_64", "$PLATFORM", "x86_64").Replace(name)
		}
		p := Place{Host: replace(path.Dir(o.Host)), Target: replace(path.Dir(o.Target))}
		if !strings.HasPrefix(name, "$ORIGIN") && !strings.HasPrefix(name, "${ORIGIN}") {
			p.Host = s.host(p.Host)
		}
		if path.IsAbs(p.Target) && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

func (p Place) join(name string) Place {
	return Place{Host: p.Host + "/" + name, Target: path.Join(p.Target, name)}
}

func (p Place) clean() Place { return Place{Host: p.Host, Target: path.Clean(p.Target)} }

// through notes the folders in front of each ".." of a path: the kernel looks
// them up, so they must be there.
func (s *search) through(p Place) {
	parts := strings.Split(p.Target, "/")
	for i, part := range parts {
		if part == ".." {
			if folder := path.Clean(strings.Join(parts[:i], "/")); folder != "." && folder != "/" {
				s.out.Folders = append(s.out.Folders, folder)
			}
		}
	}
}
