package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/imagegen/initramfs"
)

// tree is the system's tree while it is changed, by path.
type tree map[string]initramfs.Entry

func open(t initramfs.Tree) tree {
	m := make(tree, len(t))
	for _, e := range t {
		m[e.Path] = e
	}
	return m
}

// sorted is the tree as initramfs takes it.
func (t tree) sorted() initramfs.Tree {
	out := make(initramfs.Tree, 0, len(t))
	for _, e := range t {
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b initramfs.Entry) int { return strings.Compare(a.Path, b.Path) })
	return out
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
	e, ok := t[real]
	if e.HardLink != "" {
		e, ok = t[e.HardLink]
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
		e := t[next]
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

// put lays e into the tree, in the place of whatever has that name there, with
// the folders that it is in. Links in the path of these are followed.
func (t tree) put(e initramfs.Entry) error {
	dir, err := t.follow(path.Dir(e.Path))
	if err != nil {
		return err
	}
	e.Path = path.Join(dir, path.Base(e.Path))
	if old, ok := t[e.Path]; ok && old.Mode.IsDir() {
		return fmt.Errorf("%s is a folder (%s), and the settings need a file there", e.Path, old.Why)
	}
	for d := path.Dir(e.Path); d != "."; d = path.Dir(d) {
		if old, ok := t[d]; ok {
			if !old.Mode.IsDir() {
				return fmt.Errorf("%s is no folder (%s), and the settings need one there", d, old.Why)
			}
			break
		}
		t[d] = initramfs.Entry{Path: d, Mode: fs.ModeDir | 0o755, Why: e.Why}
	}
	t.keepOtherNames(e.Path)
	t[e.Path] = e
	return nil
}

// keepOtherNames makes a file's next name its first one when the first is about
// to go.
func (t tree) keepOtherNames(gone string) {
	old, ok := t[gone]
	if !ok || !old.Mode.IsRegular() || old.HardLink != "" {
		return
	}
	var names []string
	for name, e := range t {
		if e.HardLink == gone {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for i, name := range names {
		e := t[name]
		if i == 0 {
			why := e.Why
			e = old
			e.Path, e.Why = name, why
		} else {
			e.HardLink = names[0]
		}
		t[name] = e
	}
}

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
	return t.put(e)
}
