// Package media knows disks: what a disk image is, and how it is written to a
// device or file and read back.
//
// An [Image] is a value. Nothing is mounted and no temporary disk file is
// needed to make one; the same Image goes to a stick, a raw file, a pipe or a
// virtual machine, and its digest is known before a byte is written.
package media

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"sort"
)

// Extent is a run of bytes on a disk.
type Extent struct {
	Offset  int64       // where it starts on the disk, in bytes
	Length  int64       // how long it is, in bytes
	Content io.ReaderAt // its bytes, at 0 to Length
}

// End is the first byte behind the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }

// Image is a whole disk: its size and the extents that hold data. What lies
// between them is zero in a file and undefined on a device.
type Image struct {
	Size       int64    // bytes; a multiple of SectorSize
	SectorSize int      // logical sector size in bytes: 512 or 4096
	Extents    []Extent // sorted by Offset, whole sectors, not overlapping
}

// Validate checks what every consumer of an Image relies on: a sane sector
// size, and extents that are sorted, sector-aligned, inside the disk, not
// empty and not overlapping.
func (im *Image) Validate() error {
	if im.SectorSize != 512 && im.SectorSize != 4096 {
		return fmt.Errorf("image: sector size %d is neither 512 nor 4096", im.SectorSize)
	}
	sector := int64(im.SectorSize)
	if im.Size <= 0 || im.Size%sector != 0 {
		return fmt.Errorf("image: size %d is not a positive multiple of %d", im.Size, sector)
	}
	var end int64
	for i, e := range im.Extents {
		switch {
		case e.Content == nil:
			return fmt.Errorf("image: extent %d has no content", i)
		case e.Length <= 0 || e.Offset%sector != 0 || e.Length%sector != 0:
			return fmt.Errorf("image: extent %d (%d bytes at %d) is not made of whole sectors", i, e.Length, e.Offset)
		case e.Offset < end:
			return fmt.Errorf("image: extent %d at %d overlaps the one before it, which ends at %d", i, e.Offset, end)
		case e.Length > im.Size-e.Offset:
			return fmt.Errorf("image: extent %d ends at %d, behind the disk's end at %d", i, e.End(), im.Size)
		}
		end = e.End()
	}
	return nil
}

// DataBytes is the number of bytes in all extents: what a writer has to write.
func (im *Image) DataBytes() int64 {
	var n int64
	for _, e := range im.Extents {
		n += e.Length
	}
	return n
}

// ErrShortContent says that an extent's source ended before the extent did,
// as when a file was truncated after the image was planned.
var ErrShortContent = errors.New("the extent's source is shorter than the extent")

// Digest identifies an image: the SHA-256 of its size, sector size, the list
// of its extents (offset and length, little-endian 64-bit) and their bytes.
func (im *Image) Digest(ctx context.Context) (string, error) {
	h := newDigest(im)
	buf := make([]byte, 1<<20)
	for i, e := range im.Extents {
		if err := eachChunk(ctx, e, buf, func(_ int64, p []byte) error {
			h.Write(p)
			return nil
		}); err != nil {
			return "", fmt.Errorf("digest: extent %d at %d: %w", i, e.Offset, err)
		}
	}
	return sum(h), nil
}

func newDigest(im *Image) hash.Hash {
	h := sha256.New()
	head := binary.LittleEndian.AppendUint64(nil, uint64(im.Size))
	head = binary.LittleEndian.AppendUint64(head, uint64(im.SectorSize))
	for _, e := range im.Extents {
		head = binary.LittleEndian.AppendUint64(head, uint64(e.Offset))
		head = binary.LittleEndian.AppendUint64(head, uint64(e.Length))
	}
	h.Write(head)
	return h
}

func sum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// eachChunk reads e through buf and hands each full piece to f with its offset
// on the disk.
func eachChunk(ctx context.Context, e Extent, buf []byte, f func(offset int64, p []byte) error) error {
	for done := int64(0); done < e.Length; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), e.Length-done)]
		if err := e.read(p, done); err != nil {
			return err
		}
		if err := f(e.Offset+done, p); err != nil {
			return err
		}
		done += int64(len(p))
	}
	return nil
}

// read fills p from the extent's content at off, which counts from the
// extent's start.
func (e Extent) read(p []byte, off int64) error {
	n, err := e.Content.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return ErrShortContent
	}
	return err
}

// ReadAt reads the image as a whole disk, zeros between the extents, so that
// every reader of disks reads an Image too.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("image: negative offset")
	}
	if off >= im.Size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), im.Size-off))
	clear(p[:n])
	first := sort.Search(len(im.Extents), func(i int) bool { return im.Extents[i].End() > off })
	for _, e := range im.Extents[first:] {
		from, to := max(e.Offset, off), min(e.End(), off+int64(n))
		if from >= to {
			break
		}
		if err := e.read(p[from-off:to-off], from-e.Offset); err != nil {
			return int(from - off), fmt.Errorf("image: extent at %d: %w", e.Offset, err)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
