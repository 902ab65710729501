// Package initramfs makes the archive that the kernel unpacks into memory: a
// small tree with busybox and /init, in the newc format, compressed.
//
// The same tree and epoch give the same bytes on every machine.
package initramfs

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Entry is a folder or a regular file.
type Entry struct {
	Path    string      // slash-separated, without a slash at either end
	Mode    fs.FileMode // fs.ModeDir or none; permissions, fs.ModeSticky
	Content io.ReaderAt // of a file; nil for a folder
	Size    int64       // of Content, bytes
}

// Tree is the entries of an initramfs, sorted by path. All belong to root.
type Tree []Entry

//go:embed init etc
var static embed.FS

// Applets lists the busybox applets without which /init can't do its work.
var Applets = []string{
	"busybox", "cat", "dmesg", "findfs", "grep", "hostname", "init", "killall", "mdev", "mkdir", "mknod", "mount", "poweroff",
	"readlink", "reboot", "sed", "sh", "sleep", "switch_root", "sync", "tty", "umount",
}

// ModuleApplets lists those that it needs besides where there are modules.
var ModuleApplets = []string{"find", "ln", "modprobe", "sort", "tr", "xargs"}

// Base is the tree of a system that has nothing but busybox, whose binary is
// the size bytes of busybox. Applet links and device nodes are not in it: /init
// makes them at boot.
func Base(busybox io.ReaderAt, size int64) Tree {
	t := Tree{{Path: "bin/busybox", Mode: 0o755, Content: busybox, Size: size}}
	for _, dir := range []string{"bin", "dev", "etc", "newroot", "proc", "run", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/log"} {
		t = append(t, Entry{Path: dir, Mode: fs.ModeDir | 0o755})
	}
	t = append(t,
		Entry{Path: "root", Mode: fs.ModeDir | 0o700},
		Entry{Path: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777})
	// Walking and reading what is compiled in can't fail.
	_ = fs.WalkDir(static, ".", func(name string, d fs.DirEntry, _ error) error {
		if d.IsDir() {
			return nil
		}
		b, _ := static.ReadFile(name)
		e := Entry{Path: name, Mode: 0o644, Content: bytes.NewReader(b), Size: int64(len(b))}
		if name == "init" {
			e.Mode = 0o755
		}
		t = append(t, e)
		return nil
	})
	slices.SortFunc(t, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	return t
}

// With is t with more entries and the folders that these are in.
func (t Tree) With(more ...Entry) Tree {
	all := slices.Concat(t, more)
	have := map[string]bool{}
	for _, e := range all {
		have[e.Path] = true
	}
	for _, e := range more {
		for dir := path.Dir(e.Path); dir != "." && !have[dir]; dir = path.Dir(dir) {
			have[dir] = true
			all = append(all, Entry{Path: dir, Mode: fs.ModeDir | 0o755})
		}
	}
	slices.SortFunc(all, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	return all
}

// Limits of the newc format and of the library that writes it.
const (
	maxFile = 1<<32 - 1 // bytes
	maxPath = 4095      // bytes
)

// Validate checks what Pack relies on: sorted unique paths, each behind its
// parent folder, and sizes that the format can hold.
func (t Tree) Validate() error {
	dirs := map[string]bool{"": true}
	last := ""
	for _, e := range t {
		switch {
		case !fs.ValidPath(e.Path) || e.Path == "." || strings.ContainsRune(e.Path, 0) || len(e.Path) > maxPath:
			return fmt.Errorf("initramfs: %q is not a usable path", e.Path)
		case e.Path == "TRAILER!!!":
			return errors.New("initramfs: TRAILER!!! would end the archive")
		case e.Path <= last:
			return fmt.Errorf("initramfs: %s does not come behind %s", e.Path, last)
		case !dirs[e.Path[:max(0, strings.LastIndexByte(e.Path, '/'))]]:
			return fmt.Errorf("initramfs: %s is in no folder of the tree", e.Path)
		case e.Mode&^(fs.ModeDir|fs.ModeSticky|fs.ModePerm) != 0:
			return fmt.Errorf("initramfs: %s is neither a folder nor a plain file", e.Path)
		case e.Mode.IsDir() && (e.Content != nil || e.Size != 0):
			return fmt.Errorf("initramfs: the folder %s has content", e.Path)
		case !e.Mode.IsDir() && e.Content == nil:
			return fmt.Errorf("initramfs: the file %s has no content", e.Path)
		case e.Size < 0 || e.Size > maxFile:
			return fmt.Errorf("initramfs: %s has %d bytes, and the newc format ends at 4 GiB - 1", e.Path, e.Size)
		}
		if e.Mode.IsDir() {
			dirs[e.Path] = true
		}
		last = e.Path
	}
	return nil
}
