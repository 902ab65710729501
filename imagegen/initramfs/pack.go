package initramfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"slices"
	"time"

	"github.com/cavaliergopher/cpio"
)

// Packed says what Pack wrote.
type Packed struct {
	Unpacked int64    // bytes of the archive before compression
	Digests  []string // SHA-256 (hex) of each file of the tree, of a hard link that of its file; "" for all else
	Costs    []Cost   // of each entry of the tree, and at the end that of the archive's own end mark
}

// Cost is what an entry takes in the archive. Over all entries and the end mark
// Raw sums up to the size before compression, and Compressed to that behind it.
type Cost struct {
	Raw        int64 // bytes: header, name, content and padding
	Compressed int64 // bytes, its share of those that compression made of it and its neighbours
}

// Pack writes t to w as one newc archive (Linux
// Documentation/driver-api/early-userspace/buffer-format.rst): first what has
// the order -1, then all else by path, then what has +1. Everything in it is
// from the moment epoch, which lies in 1970 to 2106. A file whose content has
// not the digest that its entry promises is an error. report, which may be nil,
// is called with the bytes of content done so far and their total.
func Pack(ctx context.Context, w io.Writer, t Tree, c Compression, epoch time.Time, report func(done, total int64)) (Packed, error) {
	if err := c.Validate(); err != nil {
		return Packed{}, fmt.Errorf("initramfs: %w", err)
	}
	if err := t.Validate(); err != nil {
		return Packed{}, err
	}
	if s := epoch.Unix(); s < 0 || s >= 1<<32 {
		return Packed{}, fmt.Errorf("initramfs: the date %s is not in 1970 to 2106", epoch.UTC().Format(time.DateOnly))
	}
	p, err := writeArchive(ctx, w, t, c, epoch, report)
	if err != nil {
		return Packed{}, fmt.Errorf("write initramfs: %w", err)
	}
	return p, nil
}

func writeArchive(ctx context.Context, w io.Writer, t Tree, c Compression, epoch time.Time, report func(done, total int64)) (Packed, error) {
	m := &meter{costs: make([]Cost, len(t)+1)}
	z, err := c.writer(&output{w: w, meter: m})
	if err != nil {
		return Packed{}, err
	}
	p := packer{ctx: ctx, tree: t, block: block{w: z, meter: m}, digests: make([]string, len(t)), report: report}
	p.cpio = cpio.NewWriter(&p.block)
	for _, e := range t {
		p.total += e.Size
	}
	err = p.addAll(epoch)
	if cerr := z.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return Packed{}, err
	}
	m.settle()
	for i, e := range t {
		if e.HardLink != "" {
			j, _ := t.index(e.HardLink)
			p.digests[i] = p.digests[j]
		}
	}
	return Packed{Unpacked: m.raw, Digests: p.digests, Costs: m.costs}, nil
}

// member is an entry as it stands in the archive.
type member struct {
	header  cpio.Header
	entry   int // its index in the tree
	content int // the index of the entry whose content follows; -1 for none
}

// members puts the entries in order and joins those that are one file. All names of a
// file share an inode number, and the last of them in the archive has the
// content: GNU cpio makes links of the names that it has put off when it comes
// to the content, and the kernel (init/initramfs.c, maybe_link) keeps the file
// that the first name made, without content, and fills it.
func members(t Tree) iter.Seq[member] {
	order := make([]int, len(t))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return t[a].Order - t[b].Order })
	names := map[int]int{}    // of a file that has more than one: how many
	lastName := map[int]int{} // and the entry that comes last
	file := func(i int) int {
		if t[i].HardLink != "" {
			i, _ = t.index(t[i].HardLink)
		}
		return i
	}
	for _, e := range t {
		if e.HardLink != "" {
			i, _ := t.index(e.HardLink)
			names[i]++
		}
	}
	for _, i := range order {
		if f := file(i); names[f] > 0 {
			lastName[f] = i
		}
	}
	return func(yield func(member) bool) {
		for _, i := range order {
			e, f := t[i], file(i)
			m := member{entry: i, content: -1, header: cpio.Header{
				Name: e.Path, Mode: mode(e.Mode), Uid: e.UID, Guid: e.GID, Links: 1 + names[f], Inode: int64(f) + 1,
			}}
			switch {
			case e.Mode.IsDir():
				m.header.Links = 2
			case e.Mode&fs.ModeSymlink != 0:
				m.header.Size = int64(len(e.Link))
			case e.Mode.IsRegular() && (names[f] == 0 || lastName[f] == i):
				m.content, m.header.Size = f, t[f].Size
			}
			if !yield(m) {
				return
			}
		}
	}
}

func mode(m fs.FileMode) cpio.FileMode {
	bits := cpio.FileMode(m.Perm())
	if m&fs.ModeSetuid != 0 {
		bits |= cpio.ModeSetuid
	}
	if m&fs.ModeSetgid != 0 {
		bits |= cpio.ModeSetgid
	}
	if m&fs.ModeSticky != 0 {
		bits |= cpio.ModeSticky
	}
	switch m.Type() {
	case fs.ModeDir:
		return bits | cpio.TypeDir
	case fs.ModeSymlink:
		return bits | cpio.TypeSymlink
	case fs.ModeNamedPipe:
		return bits | cpio.TypeFifo
	}
	return bits | cpio.TypeReg
}

type packer struct {
	ctx         context.Context
	tree        Tree
	cpio        *cpio.Writer
	block       block
	digests     []string
	done, total int64
	report      func(done, total int64)
}

func (p *packer) addAll(epoch time.Time) error {
	for member := range members(p.tree) {
		if err := p.add(member, epoch); err != nil {
			return err
		}
	}
	p.block.meter.owner = len(p.tree) // for the end mark
	if err := p.cpio.Close(); err != nil {
		return err
	}
	return p.block.flush()
}

func (p *packer) add(m member, epoch time.Time) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	e := p.tree[m.entry]
	p.block.meter.owner = m.entry
	m.header.ModTime = epoch
	if err := p.cpio.WriteHeader(&m.header); err != nil {
		return fmt.Errorf("%s: %w", e.Path, err)
	}
	if e.Link != "" {
		if _, err := io.WriteString(p.cpio, e.Link); err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
	}
	if m.content >= 0 {
		if err := p.content(m.content); err != nil {
			return err
		}
	}
	// The padding, which would else count as the next entry's.
	if err := p.cpio.Flush(); err != nil {
		return fmt.Errorf("%s: %w", e.Path, err)
	}
	return nil
}

// content writes the content of the entry i. It counts as that entry's, also
// behind another name of it.
func (p *packer) content(i int) error {
	e := p.tree[i]
	p.block.meter.owner = i
	// To hash all modules once more would take a fifth of the time.
	hashing := e.SHA256 == "" || !e.Checked
	h := sha256.New()
	for off := int64(0); off < e.Size; {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		part, err := p.block.room()
		if err != nil {
			return err
		}
		part = part[:min(int64(len(part)), e.Size-off)]
		if n, err := e.Content.ReadAt(part, off); n < len(part) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read %s: %w", e.Path, err)
		}
		if hashing {
			h.Write(part)
		}
		if _, err := p.cpio.Write(part); err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
		off += int64(len(part))
		p.done += int64(len(part))
		if p.report != nil {
			p.report(p.done, p.total)
		}
	}
	if !hashing {
		p.digests[i] = e.SHA256
		return nil
	}
	p.digests[i] = hex.EncodeToString(h.Sum(nil))
	if e.SHA256 != "" && p.digests[i] != e.SHA256 {
		return fmt.Errorf("%s (%s) is damaged, or was changed meanwhile: its SHA-256 is %s and not %s; empty the cache", e.Path, e.reason(), p.digests[i], e.SHA256)
	}
	return nil
}
