// Package busybox reads a busybox binary without running it: that it can run
// alone in an initramfs, which version it is and which applets it has.
package busybox

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// MaxSize bounds what is taken for a busybox, in bytes. Real ones have 1 to 3 MiB.
const MaxSize = 64 << 20

// Info is what a busybox binary says about itself.
type Info struct {
	Version string   // "1.35.0 (Debian 1:1.35.0-4+deb12u1+b1)"
	Applets []string // sorted
}

// Inspect reads the busybox in the size bytes of r. One that is dynamically
// linked, or is for another machine than x86-64, or can't install its applets,
// is refused.
func Inspect(r io.ReaderAt, size int64) (Info, error) {
	if size > MaxSize {
		return Info{}, fmt.Errorf("no busybox has %d bytes", size)
	}
	if err := static(r); err != nil {
		return Info{}, err
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, size), b); err != nil {
		return Info{}, fmt.Errorf("read busybox: %w", err)
	}
	return inspect(b)
}

func static(r io.ReaderAt) error {
	f, err := elf.NewFile(r)
	if err != nil {
		return errors.New("not a program (an ELF file)")
	}
	defer f.Close()
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("it is for %s %s, and memlinux makes amd64 systems",
			strings.TrimPrefix(f.Machine.String(), "EM_"), strings.TrimPrefix(f.Class.String(), "ELFCLASS"))
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return errors.New("not a program (an executable ELF file)")
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			interp, _ := io.ReadAll(io.LimitReader(p.Open(), 256))
			return fmt.Errorf("it is dynamically linked (interpreter %s): memlinux needs a static busybox; apt-get install busybox-static",
				strings.TrimRight(string(interp), "\x00"))
		}
	}
	// A static-pie has a dynamic section too, but names no library in it.
	if libs, err := f.ImportedLibraries(); err == nil && len(libs) > 0 {
		return fmt.Errorf("it is dynamically linked (needs %s): memlinux needs a static busybox; apt-get install busybox-static", libs[0])
	}
	return nil
}

func inspect(b []byte) (Info, error) {
	_, banner, found := bytes.Cut(b, []byte("BusyBox v"))
	if !found {
		return Info{}, errors.New("not a busybox: it does not name a version")
	}
	if i := bytes.IndexAny(banner, "\x00\n"); i >= 0 {
		banner = banner[:i]
	}
	version := string(banner[:min(len(banner), 100)])
	applets := appletTable(b)
	if applets == nil {
		return Info{}, errors.New("not a busybox: it has no table of applets")
	}
	if !bytes.Contains(b, []byte("--install")) {
		return Info{}, errors.New("this busybox can't install its applets (CONFIG_FEATURE_INSTALLER)")
	}
	return Info{Version: version, Applets: applets}, nil
}

// appletTable finds the names of the applets. busybox looks a name up by
// bisection (libbb/appletlib.c), so they stand one behind the other, each
// ended by a NUL, in strictly ascending order; the longest such run that has sh or
// "busybox" (an applet only with FEATURE_SH_STANDALONE) is the table. nil if
// there is none.
func appletTable(b []byte) []string {
	var best, run []string
	take := func() {
		if len(run) > len(best) && (slices.Contains(run, "sh") || slices.Contains(run, "busybox")) {
			best = slices.Clone(run)
		}
	}
	for len(b) > 0 {
		end := bytes.IndexByte(b, 0)
		if end < 0 {
			break
		}
		// What stands before the table's first name need not end with a NUL.
		name := b[:end]
		b = b[end+1:]
		if !appletName(name) {
			take()
			run = run[:0]
			for i := range name {
				if appletName(name[i:]) {
					run = append(run, string(name[i:]))
					break
				}
			}
			continue
		}
		if len(run) > 0 && string(name) <= run[len(run)-1] {
			take()
			run = run[:0]
		}
		run = append(run, string(name))
	}
	take()
	if len(best) < 2 {
		return nil
	}
	return best
}

func appletName(s []byte) bool {
	if len(s) == 0 || len(s) > 32 || (s[0] != '[' && (s[0] < 'a' || s[0] > 'z')) {
		return false
	}
	for _, c := range s {
		if c != '[' && c != '_' && c != '-' && c != '.' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return true
}
