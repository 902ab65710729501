package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/imagegen/initramfs"
)

// tree is the system's tree and what the settings lay over it.
type tree struct {
	lower initramfs.Tree
	// entries are both, by path.
	entries map[string]initramfs.Entry
	upper   map[string]bool
	// guest: the tree's own files are there to be replaced. Else those are what
	// the recipe names, and two of them for one path contradict each other.
	guest bool
}

func open(t initramfs.Tree, guest bool) tree {
	m := tree{lower: t, entries: make(map[string]initramfs.Entry, len(t)), upper: map[string]bool{}, guest: guest}
	for _, e := range t {
		m.entries[e.Path] = e
	}
	return m
}

// merged is the tree with what was put into it.
func (t tree) merged() (initramfs.Tree, error) {
	var upper initramfs.Tree
	for _, p := range slices.Sorted(maps.Keys(t.upper)) {
		upper = append(upper, t.entries[p])
	}
	return initramfs.Overlay(t.lower, upper)
}

// maxLinks is how many symbolic links the kernel follows in a path.
const maxLinks = 40

// find follows the symbolic links in name, as if the tree were /, and returns
// the entry that it leads to, or false.
func (t tree) find(name string) (initramfs.Entry, bool) {
	real, err := t.follow(name)
	if err != nil {
		return initramfs.Entry{}, false
	}
	e, ok := t.entries[real]
	if e.HardLink != "" {
		e, ok = t.entries[e.HardLink]
	}
	return e, ok
}

// follow is name with all symbolic links in it resolved. What is not in the
// tree is no link.
func (t tree) follow(name string) (string, error) {
	todo := strings.Split(name, "/")
	at := ""
	for hops := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			if at == "." {
				at = ""
			}
			continue
		}
		next := path.Join(at, part)
		e := t.entries[next]
		if e.Mode.Type() != fs.ModeSymlink {
			at = next
			continue
		}
		if hops++; hops > maxLinks {
			return "", fmt.Errorf("%s is behind too many symbolic links", name)
		}
		if strings.HasPrefix(e.Link, "/") {
			at = ""
		}
		todo = append(strings.Split(e.Link, "/"), todo...)
	}
	return at, nil
}

// maxText bounds what is read of a text file in the tree.
const maxText = 4 << 20

// read is the content of the file that name leads to; an error that is
// fs.ErrNotExist where there is none.
func (t tree) read(name string) ([]byte, error) {
	e, ok := t.find(name)
	switch {
	case !ok:
		return nil, fs.ErrNotExist
	case !e.Mode.IsRegular():
		return nil, fmt.Errorf("%s is not a file", name)
	case e.Size > maxText:
		return nil, fmt.Errorf("%s has %d MiB, which is too much for it", name, e.Size>>20)
	}
	b, err := io.ReadAll(io.NewSectionReader(e.Content, 0, e.Size))
	if err == nil && int64(len(b)) < e.Size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("read %s of the tree: %w", name, err)
	}
	return b, nil
}

// put lays e over the tree. Links in the path of its folder are followed.
func (t tree) put(e initramfs.Entry) error {
	if old, ok := t.has(e.Path); ok && !t.guest && !isOurs(old) {
		return fmt.Errorf("there are two of %s: %s; and %s", e.Path, old.Why, e.Why)
	}
	return t.replace(e)
}

func (t tree) replace(e initramfs.Entry) error {
	dir, err := t.follow(path.Dir(e.Path))
	if err != nil {
		return err
	}
	e.Path = path.Join(dir, path.Base(e.Path))
	t.entries[e.Path], t.upper[e.Path] = e, true
	return nil
}

// has is the entry at name itself, be it a link.
func (t tree) has(name string) (initramfs.Entry, bool) {
	dir, err := t.follow(path.Dir(name))
	if err != nil {
		return initramfs.Entry{}, false
	}
	e, ok := t.entries[path.Join(dir, path.Base(name))]
	return e, ok
}

// isOurs reports whether e came with initramfs.Base and not with the recipe.
func isOurs(e initramfs.Entry) bool { return strings.HasPrefix(e.Why, "memlinux's own") }

// text is a file of ours.
func text(name string, mode fs.FileMode, content []byte, why string) initramfs.Entry {
	return initramfs.Entry{Path: name, Mode: mode, Content: bytes.NewReader(content), Size: int64(len(content)), Why: why}
}

// edit changes the file that name leads to, or makes it with the given mode.
// change gets its lines without line breaks.
func (t tree) edit(name string, mode fs.FileMode, why string, change func(lines []string) []string) error {
	old, err := t.read(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var lines []string
	if len(old) > 0 {
		lines = strings.Split(strings.TrimSuffix(string(old), "\n"), "\n")
	}
	e := text(name, mode, []byte(strings.Join(change(lines), "\n")+"\n"), why)
	if was, ok := t.find(name); ok {
		e.Path, e.Mode, e.UID, e.GID, e.Order = was.Path, was.Mode, was.UID, was.GID, was.Order
	}
	return t.replace(e)
}
