package initramfs

import (
	"bytes"
	_ "embed"
	"io"
	"io/fs"
	"slices"
	"strings"
)

// Where busybox is in the tree.
const (
	Busybox      = "bin/busybox"              // in a system of ours
	GuestBusybox = "usr/lib/memlinux/busybox" // in a root tree of another make, which has bin for itself
)

// GuestInit is where /init is in a root tree that has an init in that place of
// its own, as images of containers do. The kernel then needs rdinit=/GuestInit.
const GuestInit = "usr/lib/memlinux/init"

// markPath is the file by which /init knows that the kernel unpacked all of the
// archive: where memory ends, the kernel goes on with what it has.
const markPath = "etc/memlinux/complete"

//go:embed guest-profile.sh
var guestProfile []byte

// Script is a script for a tree that has busybox at the given path: the text
// has /bin/busybox for it.
func Script(text []byte, busybox string) []byte {
	return bytes.ReplaceAll(text, []byte("/"+Busybox), []byte("/"+busybox))
}

// Guest is a root tree of another make with what it takes to start it in
// memory: busybox, /init, mount points, and those of the base's files that it
// has none of. Its own files stay as they are; one where a folder must be is an
// error.
func Guest(root Tree, busybox io.ReaderAt, size int64) (Tree, error) {
	have := map[string]bool{}
	for _, e := range root {
		have[e.Path] = true
	}
	const why = "memlinux's own: for a root tree in memory"
	text := func(path string, mode fs.FileMode, b []byte) Entry {
		return Entry{Path: path, Mode: mode, Content: bytes.NewReader(b), Size: int64(len(b)), Why: why}
	}
	add := []Entry{
		{Path: GuestBusybox, Mode: 0o755, Content: busybox, Size: size, Why: "busybox"},
		text("etc/profile.d/memlinux.sh", 0o644, guestProfile),
	}
	for _, dir := range []string{"dev", "proc", "run", "sys"} {
		add = append(add, Entry{Path: dir, Mode: fs.ModeDir | 0o755, Why: why})
	}
	add = append(add,
		Entry{Path: "root", Mode: fs.ModeDir | 0o700, Why: why},
		Entry{Path: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777, Why: why})
	for _, name := range []string{"etc/group", "etc/hostname", "etc/hosts", "etc/mdev.conf", "etc/passwd", "etc/profile"} {
		b, _ := static.ReadFile(name) // it is compiled in
		if name == "etc/profile" {
			// As those of other makes do.
			b = append(b, "\n. /etc/profile.d/memlinux.sh\n"...)
		}
		add = append(add, text(name, 0o644, b))
	}
	first := "init"
	if have[first] {
		first = GuestInit
	}
	b, _ := static.ReadFile("init")
	add = append(add, text(first, 0o755, Script(b, GuestBusybox)))
	add = slices.DeleteFunc(add, func(e Entry) bool { return have[e.Path] })
	t, err := root.Union(add...)
	if err != nil {
		return nil, err
	}
	return startable(t, GuestBusybox, first), nil
}

// startable puts to the front what /init needs to say that memory was too
// small, and to the end the mark that it was not. t need not be sorted.
func startable(t Tree, busybox, first string) Tree {
	t = t.With(Entry{Path: markPath, Mode: 0o644, Content: strings.NewReader(""), Order: 1,
		Why: "memlinux's own: the mark of the archive's end"})
	early := map[string]bool{"dev": true, "proc": true, "run": true, "sys": true, "etc": true, "etc/memlinux": true}
	for _, path := range []string{busybox, first} {
		for i, c := range path + "/" {
			if c == '/' {
				early[path[:i]] = true
			}
		}
	}
	for i := range t {
		if early[t[i].Path] {
			t[i].Order = -1
		}
	}
	return t
}
