package collect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/memlinux/memlinux/cli/collect/elfdeps"
)

// program is one that is in the tree, and whose needs are to be found.
type program struct {
	elfdeps.Place        // of the file itself, behind all symlinks
	name          string // as the system knows it, without a slash in front
	source        string
	object        *elfdeps.Object // nil for a script
}

// origin says of what is put into the tree why it is there.
type origin struct {
	why, source, with, as string
}

// program puts a program of the recipe into the tree.
func (c *collector) program(p Program) (program, bool) {
	host, err := filepath.Abs(p.From)
	if err != nil {
		c.problem("%s: %s: %v", p.Line, p.From, err)
		return program{}, false
	}
	to := p.To
	if to == "" {
		to = host
	}
	if _, err := target(to); err != nil {
		c.problem("%s: to: %v", p.Line, err)
		return program{}, false
	}
	o := origin{why: "program of the recipe (" + p.From + ")", source: fmt.Sprintf("%s (%s)", p.Line, p.From)}
	return c.bring(elfdeps.Place{Host: host, Target: path.Clean(to)}, p.Mode, o, p.Line)
}

// bring puts a program into the tree: the symlinks on the way to it, and it.
func (c *collector) bring(at elfdeps.Place, mode *fs.FileMode, o origin, line string) (program, bool) {
	final, err := c.place(at, mode, o)
	if err != nil {
		c.problem("%s: %v", line, err)
		return program{}, false
	}
	found := program{Place: final, name: strings.TrimPrefix(at.Target, "/"), source: line}
	found.object, err = c.loader.Open(final)
	if errors.Is(err, elfdeps.ErrNotELF) {
		err = nil
		if interpreter, argument, ok := shebangOf(final.Host); !ok {
			err = errors.New("is no program: it is neither an ELF file nor a script with #! and an interpreter")
		} else if strings.HasSuffix(interpreter+argument, "\r") {
			err = errors.New("is a script whose lines end in CR LF, which no interpreter takes: make them LF (sed -i 's/\\r$//')")
		}
	}
	var other *elfdeps.ArchError
	var pathErr *fs.PathError
	switch {
	case errors.As(err, &pathErr):
		c.problem("%s: %v", line, reading(final.Host, err))
		return program{}, false
	case errors.As(err, &other):
		c.problem("%s: %s %v: take a build for amd64", line, at.Host, err)
		return program{}, false
	case err != nil:
		c.problem("%s: %s %v", line, at.Host, err)
		return program{}, false
	}
	n := c.nodes[strings.TrimPrefix(final.Target, "/")]
	library := found.object != nil && found.object.Interp == "" && found.object.Soname != ""
	if n != nil && n.mode&0o111 == 0 && !library {
		c.problem("%s: %s is not executable: chmod +x it, or give it a mode", line, at.Host)
	}
	return found, true
}

// place puts what is at p into the tree: each symlink as it is, and the file behind
// them, whose place it returns. A file behind a relative link stays where it is
// relative to the link.
func (c *collector) place(p elfdeps.Place, mode *fs.FileMode, o origin) (elfdeps.Place, error) {
	for range maxLinks {
		// Not by filepath.Dir: a ".." behind a symlink is for the kernel.
		slash := strings.LastIndexByte(p.Host, '/')
		dir, err := filepath.EvalSymlinks(p.Host[:slash+1])
		if err != nil {
			return p, reading(p.Host, err)
		}
		host := filepath.Join(dir, p.Host[slash+1:])
		info, err := os.Lstat(host)
		if err != nil {
			return p, reading(host, err)
		}
		n := &node{path: strings.TrimPrefix(path.Clean(p.Target), "/"), why: o.why, source: o.source, with: o.with, as: o.as, share: true}
		if info.Mode()&fs.ModeSymlink == 0 {
			if err := n.fromHost(host); err != nil {
				return p, err
			}
			// Whose rights a program takes on is part of what it is; of
			// everything else the system has but one owner.
			if s, ok := info.Sys().(*syscall.Stat_t); ok {
				if n.mode&fs.ModeSetuid != 0 {
					n.uid = int(s.Uid)
				}
				if n.mode&fs.ModeSetgid != 0 {
					n.gid = int(s.Gid)
				}
			}
			if mode != nil {
				n.mode = *mode & kept
			}
			c.put(n)
			return elfdeps.Place{Host: host, Target: "/" + n.path}, nil
		}
		if n.link, err = os.Readlink(host); err != nil {
			return p, reading(host, err)
		}
		n.mode = fs.ModeSymlink | 0o777
		c.put(n)
		if path.IsAbs(n.link) {
			p = elfdeps.Place{Host: n.link, Target: path.Clean(n.link)}
		} else {
			p = elfdeps.Place{Host: dir + "/" + n.link, Target: path.Join(path.Dir("/"+n.path), n.link)}
		}
	}
	return p, fmt.Errorf("%s: more than %d symlinks one behind the other", p.Host, maxLinks)
}

// needs puts into the tree what a program needs.
func (c *collector) needs(p program, depth int) {
	if c.done[p.Target] {
		return
	}
	c.done[p.Target] = true
	if p.object == nil {
		c.script(p, depth)
		return
	}
	closure, err := c.loader.Closure(p.Place)
	if err != nil {
		c.problem("%s: %v", p.source, err)
		return
	}
	for _, m := range closure.Missing {
		c.problem("%s: %s", p.source, missing(m))
	}
	c.libraries(p, closure, "")
	c.standardLibrary(p)
}

func missing(m elfdeps.Missing) string {
	return fmt.Sprintf("%s: install the package that has it (apt-file search %s), or bring it by a [[program]] or an [[overlay]]", m, path.Base(m.Name))
}

// libraries puts in what the loader found; as says what it is of, if it is more
// than what the program itself needs.
func (c *collector) libraries(p program, closure *elfdeps.Closure, as string) {
	libc := ""
	for _, lib := range closure.Libraries {
		if lib.Name == "libc.so.6" && lib.Searched {
			libc = path.Dir(lib.Target)
		}
	}
	for _, lib := range closure.Libraries {
		by := strings.TrimPrefix(lib.By, "/")
		o := origin{why: "library that " + by + " needs", with: p.name, as: "libraries"}
		if lib.Opened {
			o.why = "library that " + by + " opens when a thread ends"
		}
		if lib.Loader {
			o.why, o.as = "loader that "+by+" needs", "loader"
		}
		if as != "" {
			o.as = as
		}
		o.source = fmt.Sprintf("%s (%s, which %s needs)", p.source, lib.Target, by)
		if !lib.Provided {
			if _, err := c.place(lib.Place, nil, o); err != nil {
				c.problem("%s: %s, which %s needs: %v", p.source, lib.Name, by, err)
			}
		}
		c.reach(lib, libc, o)
		if strings.HasPrefix(lib.Name, "libtinfo") || strings.HasPrefix(lib.Name, "libncurses") {
			o.why, o.as = "terminal description that "+strings.TrimPrefix(lib.Target, "/")+" reads", "terminal descriptions"
			c.terminals(o)
		}
	}
	for _, folder := range closure.Folders {
		name := strings.TrimPrefix(folder, "/")
		if c.nodes[name] == nil {
			c.nodes[name] = &node{path: name, mode: fs.ModeDir | 0o755, why: "folder in a search path of " + p.name, source: p.source}
		}
	}
}

// reach links a library into the folder of the C library, if it is in another one
// of the machine's ld.so.conf. In the system is no ld.so.cache, and without that
// the loader knows but the folders that it was built with; the C library is in one
// of those.
func (c *collector) reach(lib elfdeps.Library, libc string, o origin) {
	dir := path.Dir(lib.Target)
	if !lib.Searched || libc == "" || strings.TrimPrefix(dir, "/usr") == strings.TrimPrefix(libc, "/usr") {
		return
	}
	o.why += ", where its loader looks"
	name := strings.TrimPrefix(path.Join(libc, lib.Name), "/")
	c.put(&node{path: name, mode: fs.ModeSymlink | 0o777, link: lib.Target, why: o.why, source: o.source, with: o.with, as: o.as})
}

// terminfo are the folders of terminal descriptions in ncurses' order, and
// terminals those that a console, a serial line or a login from elsewhere has.
var (
	terminfo  = []string{"/etc/terminfo", "/lib/terminfo", "/usr/share/terminfo"}
	terminals = []string{"ansi", "dumb", "linux", "screen", "vt100", "vt102", "vt220", "xterm", "xterm-256color"}
)

// terminals brings the descriptions without which no program of ncurses starts.
func (c *collector) terminals(o origin) {
	for _, name := range terminals {
		for _, dir := range terminfo {
			at := path.Join(dir, name[:1], name)
			if _, ok := c.file(at); ok {
				break
			}
			if _, err := os.Stat(at); err != nil {
				continue
			}
			if _, err := c.place(elfdeps.Place{Host: at, Target: at}, nil, o); err != nil {
				c.problem("%s: %v", o.source, err)
			}
			break
		}
	}
}

var (
	isPython = regexp.MustCompile(`^python3\.[0-9]+t?$`)
	isPerl   = regexp.MustCompile(`^perl(5[.0-9]*)?$`)
)

// standardLibrary brings what an interpreter can't start without.
func (c *collector) standardLibrary(p program) {
	name := path.Base(p.Host)
	switch {
	case isPython.MatchString(name):
		// Where Python itself looks for its landmark, os.py.
		for _, lib := range []string{"lib", "lib64"} {
			at := elfdeps.Place{
				Host:   filepath.Join(filepath.Dir(filepath.Dir(p.Host)), lib, name),
				Target: path.Join(path.Dir(path.Dir(p.Target)), lib, name),
			}
			if _, err := os.Stat(at.Host + "/os.py"); err == nil {
				c.folder(p, at)
				c.note("%s comes with its standard library alone: bring other modules by an [[overlay]]", p.name)
				return
			}
		}
		c.note("%s comes without its standard library, which was not found beside it: bring that by an [[overlay]]", p.name)
	case isPerl.MatchString(name):
		const base = "/usr/lib/x86_64-linux-gnu/perl-base" // of Debian's perl-base
		if _, err := os.Stat(base); err == nil {
			c.folder(p, elfdeps.Place{Host: base, Target: base})
			c.note("%s comes with the modules of perl-base alone: bring others by an [[overlay]]", p.name)
			return
		}
		c.note("%s comes without modules: bring them by an [[overlay]]", p.name)
	}
}

// leftOut are the folders of a standard library that nothing needs to run.
var leftOut = map[string]bool{
	"__pycache__": true, "test": true, "tests": true, "idlelib": true, "turtledemo": true, "ensurepip": true, "lib2to3": true,
	"dist-packages": true, "site-packages": true,
}

// tests are the extension modules that only Python's own tests use.
var tests = regexp.MustCompile(`^(_test|_ctypes_test|_xxtest|xxlimited|_xxsubinterpreters)`)

// folder brings a standard library: its files, and what its extension modules need.
// Of those one that lacks a library is left out, as nothing else needs it.
func (c *collector) folder(p program, at elfdeps.Place) {
	o := origin{why: "standard library of " + p.name, source: fmt.Sprintf("%s (the standard library %s)", p.source, at.Host), with: p.name, as: "standard library"}
	err := filepath.WalkDir(at.Host, func(host string, d fs.DirEntry, err error) error {
		switch {
		case c.ctx.Err() != nil:
			return c.ctx.Err()
		case err != nil:
			c.problem("%s: %v", p.source, reading(host, err))
			return nil
		case d.IsDir():
			if leftOut[d.Name()] || strings.HasPrefix(d.Name(), "config-") {
				return fs.SkipDir
			}
			return nil
		}
		below, err := filepath.Rel(at.Host, host)
		if err != nil {
			return err
		}
		file := elfdeps.Place{Host: host, Target: path.Join(at.Target, below)}
		switch ext := path.Ext(host); {
		case tests.MatchString(d.Name()), ext == ".a", ext == ".exe", d.Name() == "LICENSE.txt":
			return nil
		case ext == ".so":
			closure, err := c.loader.Closure(p.Place, file)
			if err != nil {
				c.note("%s was left out: %v", host, err)
				return nil
			}
			// What the interpreter itself lacks is said already.
			for _, m := range closure.Missing {
				for _, by := range m.By {
					if by != p.Target {
						c.note("%s was left out: %s", host, m)
						return nil
					}
				}
			}
			c.libraries(p, closure, o.as)
		}
		info, err := os.Stat(host)
		if err != nil || !info.Mode().IsRegular() {
			c.note("%s was left out: it is no file", host)
			return nil
		}
		if _, err := c.place(file, nil, o); err != nil {
			c.problem("%s: %v", p.source, err)
		}
		return nil
	})
	if err != nil && c.ctx.Err() == nil {
		c.problem("%s: read %s: %v", p.source, at.Host, err)
	}
}
