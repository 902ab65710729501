package collect

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/cli/collect/elfdeps"
)

// collector gathers a payload.
type collector struct {
	tree
	ctx    context.Context
	loader *elfdeps.Loader
	done   map[string]bool // targets of programs that are analysed
}

func newCollector(ctx context.Context) *collector {
	c := &collector{tree: tree{nodes: map[string]*node{}}, ctx: ctx, loader: elfdeps.New("/"), done: map[string]bool{}}
	// What the recipe puts into the system counts as being there.
	c.loader.Provided = func(target string) (string, bool) {
		if n, ok := c.file(target); ok && n.host != "" {
			return n.host, true
		}
		return "", false
	}
	return c
}

// collect fills the tree. Files and overlays come first, then all programs, then
// what these need: so nothing is searched on this machine, or missed, that the
// recipe itself brings.
func (c *collector) collect(s Set) error {
	for _, o := range s.Overlays {
		if err := c.overlay(o); err != nil {
			return err
		}
	}
	for _, f := range s.Files {
		c.oneFile(f)
	}
	var programs []program
	for _, p := range s.Programs {
		if found, ok := c.program(p); ok {
			programs = append(programs, found)
		}
	}
	for _, p := range programs {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		c.needs(p, 0)
	}
	c.inFolders()
	if len(c.problems) > 0 {
		return &ProblemsError{c.problems}
	}
	return c.ctx.Err()
}

// target is an absolute path of the system as the tree has it.
func target(to string) (string, error) {
	clean := path.Clean(to)
	switch {
	case !path.IsAbs(to):
		return "", fmt.Errorf("%q is no absolute path", to)
	case clean == "/":
		return "", fmt.Errorf("%q is the root folder", to)
	case slices.Contains(strings.Split(to, "/"), ".."), strings.ContainsRune(to, 0):
		return "", fmt.Errorf("%q is not usable as a path in the system", to)
	}
	return clean[1:], nil
}

func (c *collector) oneFile(f File) {
	name, err := target(f.To)
	if err != nil {
		c.problem("%s: to: %v", f.Line, err)
		return
	}
	n := &node{path: name, mode: 0o644, uid: f.UID, gid: f.GID, why: "file of the recipe (" + f.Line + ")", source: f.Line}
	if f.Text != nil {
		n.text, n.size = []byte(*f.Text), int64(len(*f.Text))
	} else {
		host, err := filepath.EvalSymlinks(f.From)
		if err != nil {
			c.problem("%s: %v", f.Line, reading(f.From, err))
			return
		}
		if err := n.fromHost(host); err != nil {
			c.problem("%s: %v", f.Line, err)
			return
		}
		n.source = fmt.Sprintf("%s (%s)", f.Line, f.From)
	}
	if f.Mode != nil {
		n.mode = *f.Mode & kept
	}
	c.put(n)
}

// fromHost fills in what a file has on this machine, except its owner.
func (n *node) fromHost(host string) error {
	info, err := os.Lstat(host)
	if err != nil {
		return reading(host, err)
	}
	switch {
	case info.IsDir():
		return fmt.Errorf("%s is a folder: name it as an [[overlay]]", host)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is neither a file nor a folder", host)
	}
	n.host, n.size, n.id, n.mode = host, info.Size(), idOf(info), info.Mode()&kept
	n.caps, err = capsOf(host)
	return err
}

// overlay puts in what is in a folder. It fails on a cancel alone.
func (c *collector) overlay(o Overlay) error {
	base := ""
	if o.To != "" && path.Clean(o.To) != "/" {
		var err error
		if base, err = target(o.To); err != nil {
			c.problem("%s: to: %v", o.Line, err)
			return nil
		}
	}
	from, err := filepath.EvalSymlinks(o.From)
	if err == nil {
		var info fs.FileInfo
		if info, err = os.Stat(from); err == nil && !info.IsDir() {
			c.problem("%s: %s is no folder: name it as a [[file]]", o.Line, o.From)
			return nil
		}
	}
	if err != nil {
		c.problem("%s: %v", o.Line, reading(o.From, err))
		return nil
	}
	return filepath.WalkDir(from, func(host string, _ fs.DirEntry, err error) error {
		if c.ctx.Err() != nil {
			return c.ctx.Err()
		}
		var info fs.FileInfo
		if err == nil {
			info, err = os.Lstat(host)
		}
		if err != nil {
			c.problem("%s: %v", o.Line, reading(host, err))
			return nil
		}
		below, err := filepath.Rel(from, host)
		if err != nil {
			return err
		}
		name := path.Join(base, below)
		if name == "." || name == "" {
			return nil // the root folder is not the overlay's
		}
		n := &node{
			path: name, mode: info.Mode() & (kept | fs.ModeType), share: true,
			why: "overlay of the recipe (" + o.From + ")", source: fmt.Sprintf("%s (%s)", o.Line, host),
		}
		switch {
		case info.IsDir():
		case info.Mode()&fs.ModeSymlink != 0:
			n.mode = fs.ModeSymlink | 0o777
			if n.link, err = os.Readlink(host); err != nil {
				c.problem("%s: %v", o.Line, reading(host, err))
				return nil
			}
		case info.Mode()&fs.ModeNamedPipe != 0:
		case info.Mode().IsRegular():
			if err := n.fromHost(host); err != nil {
				c.problem("%s: %v", o.Line, err)
				return nil
			}
		default:
			c.note("%s is a socket or a device, and was left out", host)
			return nil
		}
		c.put(n)
		return nil
	})
}

// write sends the tree.
func (c *collector) write(ctx context.Context, w io.Writer, progress Progress) (Summary, error) {
	var total, done int64
	names := c.sorted()
	type linked struct {
		fileID
		mode     fs.FileMode
		uid, gid int
	}
	first := map[linked]string{}
	links := map[string]string{}
	for _, name := range names {
		n := c.nodes[name]
		key := linked{n.id, n.mode, n.uid, n.gid}
		if to, ok := first[key]; ok && n.share && n.host != "" {
			links[name] = to
			continue
		}
		if n.share && n.host != "" {
			first[key] = name
		}
		total += n.size
	}
	buffer := bufio.NewWriterSize(w, 256<<10)
	out := tar.NewWriter(buffer)
	sum := Summary{Entries: len(names), Bytes: total, Notes: c.notes}
	brought := map[Brought]Brought{}
	for _, name := range names {
		n := c.nodes[name]
		link := links[name]
		if err := ctx.Err(); err != nil {
			return Summary{}, err
		}
		if err := out.WriteHeader(n.header(link)); err != nil {
			return Summary{}, fmt.Errorf("send /%s: %w", name, err)
		}
		if n.mode.IsRegular() && link == "" {
			r, err := n.open()
			if err != nil {
				return Summary{}, err
			}
			err = copyExactly(ctx, out, r, n.size, n.host, func(k int64) {
				if done += k; progress != nil {
					progress(done, total)
				}
			})
			r.Close()
			if err != nil {
				return Summary{}, err
			}
		}
		if n.mode.IsRegular() && (n.mode&(fs.ModeSetuid|fs.ModeSetgid) != 0 || n.caps != nil) {
			sum.Special = append(sum.Special, Special{Path: name, Mode: n.mode, UID: n.uid, GID: n.gid, Caps: n.caps})
		}
		if n.with != "" && n.mode.IsRegular() && link == "" {
			key := Brought{For: n.with, What: n.as}
			b := brought[key]
			brought[key] = Brought{For: n.with, What: n.as, Files: b.Files + 1, Bytes: b.Bytes + n.size}
		}
	}
	for _, b := range brought {
		sum.Brought = append(sum.Brought, b)
	}
	slices.SortFunc(sum.Brought, func(a, b Brought) int {
		return cmp.Or(strings.Compare(a.For, b.For), strings.Compare(a.What, b.What))
	})
	if err := out.Close(); err != nil {
		return Summary{}, fmt.Errorf("send the end of the payload: %w", err)
	}
	if err := buffer.Flush(); err != nil {
		return Summary{}, fmt.Errorf("send the end of the payload: %w", err)
	}
	return sum, nil
}

// header is the entry in the tar; hardLink is the path that has its content.
func (n *node) header(hardLink string) *tar.Header {
	h := &tar.Header{
		Format: tar.FormatPAX, Name: n.path, Mode: tarMode(n.mode), Uid: n.uid, Gid: n.gid,
		PAXRecords: map[string]string{WhyRecord: n.why},
	}
	switch {
	case hardLink != "":
		h.Typeflag, h.Linkname = tar.TypeLink, hardLink
	case n.mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, n.path+"/"
	case n.mode&fs.ModeSymlink != 0:
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.link
	case n.mode&fs.ModeNamedPipe != 0:
		h.Typeflag = tar.TypeFifo
	default:
		h.Typeflag, h.Size = tar.TypeReg, n.size
	}
	if n.caps != nil {
		h.PAXRecords[CapsRecord] = string(n.caps)
	}
	return h
}
