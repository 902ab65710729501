package collect

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// layer is a tar that is laid over those below it.
type layer struct {
	name string                        // how an error names it
	open func() (io.ReadCloser, error) // the plain tar, from its beginning
}

// entryID is the number of a layer, and of an entry in it.
type entryID struct{ layer, entry int }

// merged is the tree that layers make, laid one over the other. A tar of a root
// tree is but one layer.
//
// This is not left to go-containerregistry's mutate.Extract, which goes from the
// uppermost layer down: there a hard link comes before its file and, if a later
// layer replaced that, gets the wrong content; an entry below a symlinked folder
// and that symlink are both written; and symlinks that climb above / vanish.
type merged struct {
	root      *branch
	entries   int
	whiteouts bool // .wh. names are those of the OCI image-spec, layer.md
}

// branch is a name in a merged tree.
type branch struct {
	*inode                      // nil for a folder that no entry made
	layer    int                // that has the name
	up       *branch            // nil for the root
	children map[string]*branch // of a folder
}

func (b *branch) isFolder() bool { return b.children != nil }

// maxEntries bounds the memory that a tar may take; Debian's largest installations
// have a million files.
const maxEntries = 8 << 20

// merge reads all entries of layers.
func (w *rootWriter) merge(layers []layer, whiteouts bool) (*merged, error) {
	m := &merged{root: &branch{children: map[string]*branch{}}, whiteouts: whiteouts}
	for number, l := range layers {
		if err := w.each(l, func(entry int, h *tar.Header, _ io.Reader) error {
			return m.apply(entryID{number, entry}, h)
		}); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// each calls do for each entry of a layer, and reads on to its very end, so that
// its digest is checked.
func (w *rootWriter) each(l layer, do func(entry int, h *tar.Header, content io.Reader) error) error {
	r, err := l.open()
	if err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	defer r.Close()
	in := tar.NewReader(r)
	for entry := 0; ; entry++ {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if entry == 0 && (errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF)) {
			return fmt.Errorf("%s %w", l.name, errNoTar)
		}
		if err == nil {
			err = do(entry, h, in)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", l.name, broken(err))
		}
	}
	if _, err := io.Copy(io.Discard, contextReader{w.ctx, r}); err != nil {
		return fmt.Errorf("%s: %w", l.name, broken(err))
	}
	return nil
}

// broken says what the errors mean that compressions and tar have for a damaged
// file.
func broken(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("it is cut off: get it once more (%w)", err)
	}
	return err
}

// clean makes of an entry's name a path below the root; "" is the root itself.
func clean(name string) (string, error) {
	c := path.Clean(strings.TrimLeft(name, "/"))
	switch {
	case c == ".":
		return "", nil
	case c == "..", strings.HasPrefix(c, "../"), strings.ContainsRune(c, 0):
		return "", fmt.Errorf("its entry %q leaves the root tree", name)
	}
	return c, nil
}

func (m *merged) apply(id entryID, h *tar.Header) error {
	if m.entries++; m.entries > maxEntries {
		return fmt.Errorf("it has more than %d entries", maxEntries)
	}
	name, err := clean(h.Name)
	if err != nil || name == "" {
		return err
	}
	i := &inode{
		kind: h.Typeflag, mode: h.Mode & 0o7777, uid: h.Uid, gid: h.Gid, caps: h.PAXRecords[CapsRecord], entry: id,
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont, '\x00':
		i.kind, i.size = tar.TypeReg, h.Size
		if h.Size > MaxFile {
			return tooLarge("/"+name, h.Size)
		}
	case tar.TypeSymlink:
		i.link, i.mode = h.Linkname, 0o777
		if h.Linkname == "" {
			return fmt.Errorf("its symlink /%s has no target", name)
		}
	case tar.TypeDir, tar.TypeFifo, tar.TypeChar, tar.TypeBlock, tar.TypeLink:
	case tar.TypeXGlobalHeader:
		return nil
	default:
		return fmt.Errorf("its entry /%s is of a kind (%q) that no root tree has", name, h.Typeflag)
	}
	dir, err := m.folder(path.Dir(name), true)
	if err != nil {
		return fmt.Errorf("its entry /%s: %w", name, err)
	}
	base := path.Base(name)
	if m.whiteouts && strings.HasPrefix(base, ".wh.") {
		hidden := base[len(".wh."):]
		switch {
		case hidden == ".wh..opq":
			for child := range dir.children {
				dir.hide(child, id.layer)
			}
		case strings.HasPrefix(hidden, ".wh."): // aufs's own
		default:
			dir.hide(hidden, id.layer)
		}
		return nil
	}
	b := &branch{inode: i, layer: id.layer, up: dir}
	old := dir.children[base]
	switch h.Typeflag {
	case tar.TypeDir:
		if old != nil && old.isFolder() {
			old.inode, old.layer = i, id.layer // what is in it stays
			return nil
		}
		b.children = map[string]*branch{}
	case tar.TypeLink:
		to, err := m.linked(h.Linkname)
		if err != nil {
			return fmt.Errorf("its hard link /%s to %q: %w", name, h.Linkname, err)
		}
		b.inode = to
	}
	dir.children[base] = b
	return nil
}

// hide removes what layers below have of a name.
func (b *branch) hide(name string, layer int) {
	child := b.children[name]
	switch {
	case child == nil:
		return
	case child.isFolder():
		for below := range child.children {
			child.hide(below, layer)
		}
		if len(child.children) > 0 || child.inode != nil && child.layer == layer {
			return
		}
	case child.layer == layer:
		return
	}
	delete(b.children, name)
}

// folder goes to a folder, through symlinks, and makes what lacks.
func (m *merged) folder(name string, create bool) (*branch, error) {
	at, parts, links := m.root, strings.Split(name, "/"), 0
	for len(parts) > 0 {
		part := parts[0]
		parts = parts[1:]
		child := at.children[part]
		switch {
		case part == "", part == ".":
		case part == "..":
			if at.up != nil {
				at = at.up
			}
		case child == nil && !create:
			return nil, fmt.Errorf("there is no /%s", name)
		case child == nil:
			child = &branch{up: at, children: map[string]*branch{}}
			at.children[part] = child
			at = child
		case child.isFolder():
			at = child
		case child.kind == tar.TypeSymlink:
			if links++; links > maxLinks {
				return nil, fmt.Errorf("/%s has more than %d symlinks one behind the other", name, maxLinks)
			}
			if path.IsAbs(child.link) {
				at = m.root
			}
			parts = append(strings.Split(child.link, "/"), parts...)
		default:
			return nil, fmt.Errorf("%s in /%s is no folder", part, name)
		}
	}
	return at, nil
}

// linked is the file that a hard link names.
func (m *merged) linked(name string) (*inode, error) {
	name, err := clean(name)
	if err != nil {
		return nil, err
	}
	dir, err := m.folder(path.Dir(name), false)
	if err != nil {
		return nil, err
	}
	b := dir.children[path.Base(name)]
	if b == nil || b.isFolder() {
		return nil, errors.New("there is no such file in front of it")
	}
	return b.inode, nil
}

// layers sends what the layers make: first everything but files, sorted; then the
// files in the order in which the layers have them.
func (w *rootWriter) layers(layers []layer, whiteouts bool) error {
	m, err := w.merge(layers, whiteouts)
	if err != nil {
		return err
	}
	files := map[entryID]*inode{}
	if err := w.send(m.root, "", files); err != nil {
		return err
	}
	for number, l := range layers {
		err := w.each(l, func(entry int, h *tar.Header, content io.Reader) error {
			i, ok := files[entryID{number, entry}]
			if !ok {
				return nil
			}
			if h.Size != i.size {
				return changed(l.name)
			}
			delete(files, i.entry)
			if err := w.header(i.names[0], i, ""); err != nil {
				return err
			}
			if err := w.content(content, i.size, "/"+i.names[0]); err != nil {
				return err
			}
			for _, name := range i.names[1:] {
				if err := w.header(name, i, i.names[0]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if len(files) > 0 {
		return changed(layers[0].name)
	}
	return nil
}

// send sends what is in a folder, but for the files, which it gathers.
func (w *rootWriter) send(b *branch, name string, files map[entryID]*inode) error {
	for _, base := range slices.Sorted(maps.Keys(b.children)) {
		child, full := b.children[base], path.Join(name, base)
		switch {
		case isVirtual(full):
			continue
		case child.isFolder():
			if child.inode != nil {
				if err := w.header(full, child.inode, ""); err != nil {
					return err
				}
			}
			if err := w.send(child, full, files); err != nil {
				return err
			}
		case child.kind == tar.TypeReg:
			if len(child.names) == 0 {
				files[child.entry] = child.inode
				w.total += child.size
			}
			child.names = append(child.names, full)
		case child.kind == tar.TypeChar, child.kind == tar.TypeBlock:
			w.info.Skipped++
		default:
			if err := w.header(full, child.inode, ""); err != nil {
				return err
			}
		}
	}
	return nil
}
