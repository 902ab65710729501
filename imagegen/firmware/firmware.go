// Package firmware finds the files in lib/firmware that kernel modules ask for.
//
// It looks where the kernel's firmware loader looks, in its order (Linux
// drivers/base/firmware_loader/main.c, fw_path and
// Documentation/driver-api/firmware/fw_search_path.rst), and hands out plain
// files below lib/firmware, which every kernel can load: one without
// CONFIG_FW_LOADER_COMPRESS knows no other. The same folder gives the same
// entries.
package firmware

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/memlinux/memlinux/imagegen/firmware/compressed"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/modules"
)

// MaxSize is the largest file that is taken, in bytes, decompressed; the largest
// of linux-firmware, NVIDIA's GSP, has 72 MiB.
const MaxSize = 128 << 20

// Wanted says of each file below lib/firmware, which may be a pattern as of
// path.Match, the names of the modules that ask for it, sorted.
type Wanted map[string][]string

// WantedBy is what the modules of s ask for.
func WantedBy(s *modules.Selection) Wanted {
	w := Wanted{}
	for _, m := range s.Modules {
		for _, name := range m.Firmware {
			w[name] = append(w[name], m.Name())
		}
	}
	for name, by := range w {
		slices.Sort(by)
		w[name] = slices.Compact(by)
	}
	return w
}

// Found is what Find found. The entries are read as long as the Library is open.
type Found struct {
	Entries []initramfs.Entry // files and symbolic links below lib/firmware, sorted by path; without their folders
	Missing []string          // what of the wanted there is nothing of; sorted
}

// Library is the firmware of a root folder.
type Library struct {
	root *os.Root
	base string   // what lib/firmware really is, as in "usr/lib/firmware"; "" if it is not there
	dirs []string // where files are looked for, by precedence; below root

	mu   sync.Mutex
	have string // the file that loaded is of
	// loaded is the last file that was decompressed: one read to its end costs
	// the memory of one.
	loaded []byte
}

// Open opens the firmware in lib/firmware, else usr/lib/firmware, of root, for
// the kernel release: what is for another release is not looked at. Where root
// has no such folder everything is missing.
func Open(root, release string) (*Library, error) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, fmt.Errorf("open the firmware: %w", err)
	}
	l := &Library{root: r}
	for _, name := range []string{"lib/firmware", "usr/lib/firmware"} {
		if l.base, err = l.resolve(name); err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			_ = r.Close()
			return nil, fmt.Errorf("open the firmware: %s: %w", name, err)
		}
	}
	if l.base == "" {
		return l, nil
	}
	subs := []string{"updates", "."}
	if fs.ValidPath(release) {
		subs = []string{"updates/" + release, "updates", release, "."}
	}
	for _, sub := range subs {
		// Most have neither of the first three.
		if dir, err := l.resolve(path.Join(l.base, sub)); err == nil {
			l.dirs = append(l.dirs, dir)
		}
	}
	return l, nil
}

// Close ends the reading.
func (l *Library) Close() error { return l.root.Close() }

// maxLinks is how many symbolic links Linux follows for one path.
const maxLinks = 40

// resolve is name without symbolic links, as a process would have it whose / is
// the library's root: links may be absolute there.
func (l *Library) resolve(name string) (string, error) {
	todo, done := strings.Split(name, "/"), ""
	for links := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if done = path.Dir(done); done == "." {
				done = ""
			}
			continue
		}
		next := path.Join(done, part)
		st, err := l.root.Lstat(next)
		if err != nil {
			return "", err
		}
		if st.Mode()&fs.ModeSymlink == 0 {
			done = next
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("%s: too many symbolic links: %w", name, fs.ErrNotExist)
		}
		target, err := l.root.Readlink(next)
		if err != nil {
			return "", err
		}
		if path.IsAbs(target) {
			done = ""
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return done, nil
}

// source is a file that was found.
type source struct {
	file   string // below root, without symbolic links
	suffix string // of its compression, that its name has before links are followed
	linked bool   // links lead there
}

// lookup finds the file that the kernel would load for name, or fails with
// fs.ErrNotExist. As in the kernel any plain file comes before any compressed
// one.
func (l *Library) lookup(name string) (source, error) {
	for _, suffix := range compressed.Suffixes {
		for _, dir := range l.dirs {
			file, err := l.resolve(dir + "/" + name + suffix)
			if err == nil {
				var st fs.FileInfo
				if st, err = l.root.Lstat(file); err == nil && st.Mode().IsRegular() {
					return source{file, suffix, file != dir+"/"+name+suffix}, nil
				}
			}
			// A file where a folder should be is no error to the kernel.
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
				return source{}, fmt.Errorf("look for the firmware %s: %w", name, err)
			}
		}
	}
	return source{}, fs.ErrNotExist
}

// Find takes what is wanted. What is missing is no error: of the many files that
// a driver names for all its devices nobody has all.
func (l *Library) Find(ctx context.Context, w Wanted) (Found, error) {
	var found Found
	entries := map[string]initramfs.Entry{}
	for _, name := range slices.Sorted(maps.Keys(w)) {
		names, err := l.expand(name)
		if err != nil {
			return Found{}, err
		}
		there := false
		for _, n := range names {
			if err := ctx.Err(); err != nil {
				return Found{}, err
			}
			err := l.add(entries, n, w[name])
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return Found{}, err
			}
			there = true
		}
		if !there {
			found.Missing = append(found.Missing, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		found.Entries = append(found.Entries, entries[name])
	}
	return found, nil
}

// expand is the names that a wanted one means: those that a pattern matches,
// sorted, else itself.
func (l *Library) expand(name string) ([]string, error) {
	if !fs.ValidPath(name) || name == "." || strings.ContainsRune(name, 0) {
		return nil, nil // the kernel loads no such file either
	}
	if !strings.ContainsAny(name, `*?[\`) {
		return []string{name}, nil
	}
	set := map[string]bool{}
	for _, dir := range l.dirs {
		sub, err := fs.Sub(l.root.FS(), dir)
		if err != nil {
			return nil, fmt.Errorf("look for the firmware %s: %w", name, err)
		}
		for _, suffix := range compressed.Suffixes {
			matches, err := fs.Glob(sub, name+suffix)
			if err != nil {
				// What is no pattern is a name.
				return []string{name}, nil //nolint:nilerr // it is no error here
			}
			for _, m := range matches {
				set[compressed.Trim(m)] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(set)), nil
}

// add adds the entries for the file name, or fails with fs.ErrNotExist.
func (l *Library) add(entries map[string]initramfs.Entry, name string, by []string) error {
	place := "lib/firmware/" + name
	if old, ok := entries[place]; ok && old.Mode&fs.ModeSymlink == 0 {
		return nil // under another pattern, or as what a link leads to
	}
	src, err := l.lookup(name)
	if err != nil {
		return err
	}
	why := reason(by)
	if target := l.linkTarget(src); target != "" {
		entries[place] = initramfs.Entry{Path: place, Mode: fs.ModeSymlink | 0o777, Link: relative(name, target), Why: why}
		place, why = "lib/firmware/"+target, "what "+place+" is a link to: "+why
		if _, ok := entries[place]; ok {
			return nil
		}
	}
	e := initramfs.Entry{Path: place, Mode: 0o644, Why: why}
	if src.suffix == "" {
		st, err := l.root.Lstat(src.file)
		if err != nil {
			return fmt.Errorf("read the firmware %s: %w", src.file, err)
		}
		if e.Size = st.Size(); e.Size > MaxSize {
			return fmt.Errorf("the firmware %s has %d MiB, and no more than %d are taken; leave out the module %s", src.file, e.Size>>20, MaxSize>>20, by[0])
		}
		e.Content = plainFile{l, src}
	} else {
		b, err := l.read(src)
		if err != nil {
			return fmt.Errorf("%w; install its package again, or leave out the module %s", err, by[0])
		}
		sum := sha256.Sum256(b)
		e.Size, e.SHA256, e.Content = int64(len(b)), hex.EncodeToString(sum[:]), packedFile{l, src}
	}
	entries[place] = e
	return nil
}

// linkTarget is the name below lib/firmware that links lead to, or "" where the
// file can't be had by that name: only a name that always means the same file
// may have its content in the image.
func (l *Library) linkTarget(src source) string {
	target, inside := strings.CutPrefix(src.file, l.base+"/")
	target, packed := strings.CutSuffix(target, src.suffix)
	if !src.linked || !inside || !packed {
		return ""
	}
	if other, err := l.lookup(target); err != nil || other.file != src.file || other.suffix != src.suffix {
		return ""
	}
	return target
}

// relative is the link text by which the file from leads to the file to.
func relative(from, to string) string {
	a, b := strings.Split(from, "/"), strings.Split(to, "/")
	for len(a) > 1 && len(b) > 1 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	return strings.Repeat("../", len(a)-1) + strings.Join(b, "/")
}

// reason says why the modules' firmware is in the image.
func reason(by []string) string {
	const most = 3
	names := strings.Join(by[:min(len(by), most)], ", ")
	switch {
	case len(by) > most:
		return fmt.Sprintf("firmware that the modules %s and %d more ask for", names, len(by)-most)
	case len(by) > 1:
		return "firmware that the modules " + names + " ask for"
	}
	return "firmware that the module " + names + " asks for"
}

// plainFile is opened for each piece: hundreds of files need no descriptor each
// while they wait.
type plainFile struct {
	l   *Library
	src source
}

func (p plainFile) ReadAt(b []byte, off int64) (int, error) {
	f, err := p.l.root.Open(p.src.file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.ReadAt(b, off)
}

type packedFile struct {
	l   *Library
	src source
}

func (p packedFile) ReadAt(b []byte, off int64) (int, error) {
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	if p.l.have != p.src.file {
		p.l.have = ""
		var err error
		if p.l.loaded, err = p.l.read(p.src); err != nil {
			return 0, err
		}
		p.l.have = p.src.file
	}
	if off >= int64(len(p.l.loaded)) {
		return 0, io.EOF
	}
	n := copy(b, p.l.loaded[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

// read reads and decompresses a file.
func (l *Library) read(src source) ([]byte, error) {
	f, err := l.root.Open(src.file)
	if err != nil {
		return nil, fmt.Errorf("read the firmware: %w", err)
	}
	defer f.Close()
	b, err := compressed.ReadAll(src.suffix, f, MaxSize)
	if err != nil {
		return nil, fmt.Errorf("read the firmware %s: %w", src.file, err)
	}
	return b, nil
}
