// Package initramfs makes the archive that the kernel unpacks into memory: a
// small tree with busybox and /init, in the newc format, compressed.
//
// The same tree and epoch give the same bytes on every machine.
package initramfs

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
)

// Entry is a folder, a file, a symbolic link or a named pipe.
type Entry struct {
	Path     string      // slash-separated, without a slash at either end
	Mode     fs.FileMode // fs.ModeDir, fs.ModeSymlink, fs.ModeNamedPipe or none (a file); permissions, fs.ModeSetuid, fs.ModeSetgid, fs.ModeSticky
	UID, GID int
	Link     string      // of a symbolic link: its target as it is
	HardLink string      // path of the file of the tree that this is a second name of; such an entry has its mode and owner, but neither content nor capabilities
	Content  io.ReaderAt // of a file
	Size     int64       // of Content, bytes
	SHA256   string      // hex, what Content must have; "" where that is not known
	Checked  bool        // Content finds out by itself when it has not SHA256
	Caps     []byte      // security.capability of a file, raw. The newc format can't hold it: see package filecaps
	Why      string      // a clause: why it is in the image and where it comes from
	Order    int         // -1: before all others in the archive, +1: behind them; a folder never comes behind what is in it

	implied bool // a folder that nobody described: any description counts more
}

// Tree is the entries of an initramfs, sorted by path.
type Tree []Entry

//go:embed init etc
var static embed.FS

// Applets lists the busybox applets without which /init can't do its work.
var Applets = []string{
	"cat", "dmesg", "findfs", "grep", "hexdump", "hostname", "init", "killall", "mdev", "mkdir", "mknod", "mount", "poweroff", "printf",
	"readlink", "reboot", "sed", "sh", "sleep", "switch_root", "sync", "tr", "tty", "umount",
}

// ModuleApplets lists those that it needs besides where there are modules.
var ModuleApplets = []string{"find", "modprobe", "sort", "which", "xargs"}

// own says why the files that are compiled in are in the tree.
var own = map[string]string{ //nolint:gosec // etc/passwd is no password
	"init":          "memlinux's own: the first process",
	"etc/group":     "memlinux's own: the groups of users",
	"etc/hostname":  "memlinux's own: the name of the machine",
	"etc/hosts":     "memlinux's own: the names of the machine itself",
	"etc/mdev.conf": "memlinux's own: owners and rights of device nodes",
	"etc/passwd":    "memlinux's own: the users",
	"etc/profile":   "memlinux's own: what a login shell reads first",
}

// Base is the tree of a system that has nothing but busybox, whose binary is
// the size bytes of busybox. Applet links and device nodes are not in it: /init
// makes them at boot.
func Base(busybox io.ReaderAt, size int64) Tree {
	t := Tree{{Path: "bin/busybox", Mode: 0o755, Content: busybox, Size: size, Why: "busybox"}}
	for _, dir := range []string{"bin", "dev", "etc", "newroot", "proc", "run", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/log"} {
		t = append(t, Entry{Path: dir, Mode: fs.ModeDir | 0o755})
	}
	t = append(t,
		Entry{Path: "root", Mode: fs.ModeDir | 0o700},
		Entry{Path: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777})
	for i := 1; i < len(t); i++ {
		t[i].Why = "memlinux's own: a folder that programs expect"
	}
	// Walking and reading what is compiled in can't fail.
	_ = fs.WalkDir(static, ".", func(name string, d fs.DirEntry, _ error) error {
		if d.IsDir() {
			return nil
		}
		b, _ := static.ReadFile(name)
		e := Entry{Path: name, Mode: 0o644, Content: bytes.NewReader(b), Size: int64(len(b)), Why: own[name]}
		if e.Why == "" {
			e.Why = "memlinux's own"
		}
		if name == "init" {
			e.Mode = 0o755
		}
		t = append(t, e)
		return nil
	})
	return startable(t, Busybox, "init")
}

func byPath(a, b Entry) int { return strings.Compare(a.Path, b.Path) }

// With is t with more entries and the folders that these are in. Unlike Union
// it follows no links and lets Validate find what does not go together.
func (t Tree) With(more ...Entry) Tree {
	all := slices.Concat(t, more)
	have := map[string]bool{"": true}
	for _, e := range all {
		have[e.Path] = true
	}
	for i := len(t); i < len(all); i++ { // which grows
		if dir := impliedBy(all[i]); !have[dir.Path] {
			have[dir.Path] = true
			all = append(all, dir)
		}
	}
	slices.SortFunc(all, byPath)
	return all
}

// Limits of the newc format, of the library that writes it and of the kernel
// that reads it.
const (
	maxFile = 1<<32 - 1 // bytes
	maxPath = 4095      // bytes, also of a link's target
	maxID   = 1<<32 - 2 // the one above is no user: chown(2) takes it for "as it is"
)

// Validate checks what Pack relies on: sorted unique paths, each in a folder of
// the tree, hard links to files of the tree, and what the format and the kernel
// can hold.
func (t Tree) Validate() error {
	folders := map[string]int{"": -1} // to their Order
	last := ""
	for _, e := range t {
		order, inFolder := folders[parent(e.Path)]
		switch {
		case !usable(e.Path):
			return fmt.Errorf("initramfs: %q is not a usable path", e.Path)
		case e.Path == "TRAILER!!!":
			return errors.New("initramfs: TRAILER!!! would end the archive")
		case e.Path <= last:
			return fmt.Errorf("initramfs: %s does not come behind %s", e.Path, last)
		case !inFolder:
			return fmt.Errorf("initramfs: %s is in no folder of the tree", e.Path)
		case order > e.Order:
			return fmt.Errorf("initramfs: %s comes before the folder that it is in", e.Path)
		}
		if err := e.validate(); err != nil {
			return fmt.Errorf("initramfs: %s %w", e.Path, err)
		}
		if e.HardLink != "" {
			if err := e.sameAs(t); err != nil {
				return fmt.Errorf("initramfs: %s is a hard link to %s, %w", e.Path, e.HardLink, err)
			}
		}
		if e.Mode.IsDir() {
			folders[e.Path] = e.Order
		}
		last = e.Path
	}
	return nil
}

// usable reports whether p can be the path of an entry. Names need not be
// UTF-8: the kernel has no opinion on that.
func usable(p string) bool {
	if p == "" || len(p) > maxPath || strings.ContainsRune(p, 0) {
		return false
	}
	for name := range strings.SplitSeq(p, "/") {
		if name == "" || name == "." || name == ".." {
			return false
		}
	}
	return true
}

// index is the place of path in t.
func (t Tree) index(path string) (int, bool) {
	return slices.BinarySearchFunc(t, path, func(e Entry, p string) int { return strings.Compare(e.Path, p) })
}

// validate holds an entry against itself. The error goes on where the path ends.
func (e Entry) validate() error {
	const bits = fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	switch kind := e.Mode &^ bits; {
	case kind != 0 && kind != fs.ModeDir && kind != fs.ModeSymlink && kind != fs.ModeNamedPipe:
		return errors.New("is neither a folder, a file, a symbolic link nor a named pipe")
	case e.UID < 0 || e.UID > maxID || e.GID < 0 || e.GID > maxID:
		return fmt.Errorf("belongs to %d:%d, and users and groups go from 0 to %d", e.UID, e.GID, maxID)
	case e.Order < -1 || e.Order > 1:
		return fmt.Errorf("has the order %d, which is not in -1 to 1", e.Order)
	case (e.Link != "") != (kind == fs.ModeSymlink):
		return errors.New("is a symbolic link without a target, or has one and is none")
	case len(e.Link) > maxPath || strings.ContainsRune(e.Link, 0):
		return fmt.Errorf("leads to %q, which is not a usable path", e.Link)
	case e.HardLink != "" && (kind != 0 || e.Content != nil || e.Size != 0 || e.SHA256 != "" || e.Caps != nil):
		return errors.New("is a hard link and has something of its own")
	case kind == 0 && e.HardLink == "" && e.Content == nil:
		return errors.New("has no content")
	case kind != 0 && (e.Content != nil || e.Size != 0 || e.SHA256 != "" || e.Caps != nil):
		return errors.New("has content and is no file")
	case e.Size < 0 || e.Size > maxFile:
		return fmt.Errorf("has %d bytes, and the newc format ends at 4 GiB - 1", e.Size)
	case e.SHA256 != "" && !isDigest(e.SHA256):
		return fmt.Errorf("must have the SHA-256 %q, which is none", e.SHA256)
	}
	return nil
}

// isDigest reports whether s is a SHA-256 as hex.EncodeToString writes it.
func isDigest(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size && s == strings.ToLower(s)
}

// sameAs checks that the hard link e leads to a file that it can be.
func (e Entry) sameAs(t Tree) error {
	i, found := t.index(e.HardLink)
	if !found {
		return errors.New("which is not in the tree")
	}
	switch to := t[i]; {
	case !to.Mode.IsRegular() || to.HardLink != "":
		return errors.New("which is not a file")
	case to.Mode != e.Mode || to.UID != e.UID || to.GID != e.GID:
		return errors.New("which has another mode or owner")
	}
	return nil
}
