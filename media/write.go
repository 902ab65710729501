package media

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"hash/maphash"
	"io"
	"unsafe"
)

// Disk is what an Image is written to: a block device or a file.
//
// WriteAt is called with whole sectors at rising offsets; when it returns, all
// but the last few MiB written must be on the device, so that progress is
// honest. After Sync everything is, and ReadAt then reads from the device and
// not from memory.
type Disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// geometry is a Disk that knows its own size and sector size in bytes, as a
// block device does.
type geometry interface {
	Size() int64
	SectorSize() int
}

// Progress is told how far a phase is, in bytes. It is called from one
// goroutine at a time.
type Progress func(phase string, done, total int64)

// The phases that Write reports, one after the other. The first MiB, which is
// written after the rest was read back, counts in PhaseReadBack only.
const (
	PhaseWrite    = "write"
	PhaseReadBack = "read back"
)

// Result is what a write proved.
type Result struct {
	Bytes         int64  // written, and the same number read back
	DigestWritten string // Image.Digest of the bytes handed to the disk
	DigestRead    string // Image.Digest of the bytes the disk gave back
}

// MismatchError says that the disk gave back other bytes than were written.
type MismatchError struct {
	Offset int64 // of the first byte that differs, in bytes from the disk's start
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("the disk gave back other bytes than were written, first at byte %d: it is faulty or smaller than it says, use another one", e.Offset)
}

// NoSpaceError says that something is too small for what is to go into it.
type NoSpaceError struct {
	Where      string // "the file system of the target", "the disk"
	Need, Have int64  // bytes
}

func (e *NoSpaceError) Error() string {
	const mib = 1 << 20
	return fmt.Sprintf("%s is too small: needs %d MiB, has %d MiB", e.Where, (e.Need+mib-1)/mib, e.Have/mib)
}

const (
	// headSize is the part of a disk that makes it boot: boot sector and
	// partition table. It is void while the rest is written and is
	// written last, from memory.
	headSize = 1 << 20

	// Each chunk ends at a multiple of chunkSize on the disk, so that a flash
	// translation layer gets whole erase blocks; with three of them the source
	// is read and hashed while the disk is busy.
	chunkSize = 2 << 20
	chunks    = 3
)

// Write puts im on d, reads it back and compares.
//
// The order makes an interrupted write harmless: the first MiB is zeroed, then
// everything behind it is written, flushed, read back and compared; then
// the first MiB follows, and its first sector, the protective MBR, is the very
// last write. If anything fails, ctx's end included, the first MiB is zeroed
// again, so that no half-written disk boots.
//
// Errors name the extent and its place. A *MismatchError is in the chain if
// the disk gave back other bytes, a *NoSpaceError if im does not fit; then
// nothing was written.
func Write(ctx context.Context, d Disk, im *Image, progress Progress) (Result, error) {
	if err := im.Validate(); err != nil {
		return Result{}, err
	}
	if g, ok := d.(geometry); ok {
		if g.SectorSize() != im.SectorSize {
			return Result{}, fmt.Errorf("write: the image is made for sectors of %d bytes, the disk has %d", im.SectorSize, g.SectorSize())
		}
		if g.Size() < im.Size {
			return Result{}, &NoSpaceError{Where: "the disk", Need: im.Size, Have: g.Size()}
		}
	}
	w := &writer{d: d, im: im, progress: progress, seed: maphash.MakeSeed()}
	if err := w.readHead(ctx); err != nil {
		return Result{}, fmt.Errorf("write: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("write: nothing was written: %w", err)
	}
	res, err := w.run(ctx)
	if err != nil {
		if voidErr := w.void(); voidErr != nil {
			err = fmt.Errorf("%w (and the disk's first MiB could not be erased: %w; it may hold a part of a system, do not boot it)", err, voidErr)
		}
		return res, err
	}
	return res, nil
}

// writer is one run of Write.
type writer struct {
	d        Disk
	im       *Image
	progress Progress

	head  []byte // the image's first MiB, zeros between extents
	spans []span // the parts of head that extents cover

	// sums holds a seeded 64-bit hash of each chunk behind the head: enough
	// to find a chunk that came back different, at 8 bytes for 2 MiB.
	seed maphash.Seed
	sums []uint64
}

type span struct {
	extent   int
	from, to int64
}

// readHead loads what of the image lies in the first MiB.
func (w *writer) readHead(ctx context.Context) error {
	w.head = alignedBuffer(int(min(headSize, w.im.Size)))
	for i, e := range w.im.Extents {
		if e.Offset >= int64(len(w.head)) {
			break
		}
		to := min(e.End(), int64(len(w.head)))
		w.spans = append(w.spans, span{i, e.Offset, to})
		if err := ctx.Err(); err != nil {
			return at(i, e.Offset, err)
		}
		if err := e.read(w.head[e.Offset:to], 0); err != nil {
			return at(i, e.Offset, err)
		}
	}
	return nil
}

func (w *writer) run(ctx context.Context) (Result, error) {
	var res Result
	all := w.im.DataBytes()
	rest := all
	for _, s := range w.spans {
		rest -= s.to - s.from
	}
	report := func(phase string, done, total int64) {
		if w.progress != nil {
			w.progress(phase, done, total)
		}
	}

	if err := w.void(); err != nil {
		return res, fmt.Errorf("write: erase the disk's first MiB: %w", err)
	}

	// The image's digest runs over the extents in their order, so the head,
	// which is written last, is hashed first.
	written := w.headDigest()
	report(PhaseWrite, 0, rest)
	err := stream(ctx, w.im.Extents, int64(len(w.head)),
		func(c chunk) error {
			e := w.im.Extents[c.extent]
			if err := e.read(c.data, c.offset-e.Offset); err != nil {
				return err
			}
			written.Write(c.data)
			w.sums = append(w.sums, maphash.Bytes(w.seed, c.data))
			return nil
		},
		func(c chunk) error {
			if err := writeFull(w.d, c.data, c.offset); err != nil {
				return err
			}
			res.Bytes += int64(len(c.data))
			report(PhaseWrite, res.Bytes, rest)
			return nil
		})
	if err != nil {
		return res, fmt.Errorf("write: %w", err)
	}
	if err := w.d.Sync(); err != nil {
		return res, fmt.Errorf("write: flush the disk: %w", err)
	}
	res.DigestWritten = sum(written)

	// A disk that wraps at its real capacity would have put data from behind
	// into the first MiB, which the head would then cover up.
	if err := w.checkVoid(); err != nil {
		return res, fmt.Errorf("read back: %w", err)
	}

	// The head is hashed from memory here; it is compared byte for byte when it
	// is read back below, or no digest is returned at all.
	read := w.headDigest()
	var done int64
	report(PhaseReadBack, 0, all)
	err = stream(ctx, w.im.Extents, int64(len(w.head)),
		func(c chunk) error { return readDisk(w.d, c.data, c.offset) },
		func(c chunk) error {
			if maphash.Bytes(w.seed, c.data) != w.sums[c.number] {
				return w.mismatch(c)
			}
			read.Write(c.data)
			done += int64(len(c.data))
			report(PhaseReadBack, done, all)
			return nil
		})
	if err != nil {
		return res, fmt.Errorf("read back: %w", err)
	}

	// From here on the disk becomes bootable: nothing may interrupt it but an
	// error.
	if err := ctx.Err(); err != nil {
		return res, fmt.Errorf("write: %w", err)
	}
	n, err := w.writeHead()
	res.Bytes += n
	if err != nil {
		return res, fmt.Errorf("write: %w", err)
	}
	if err := w.compareHead(); err != nil {
		return res, fmt.Errorf("read back: %w", err)
	}
	report(PhaseReadBack, all, all)
	res.DigestRead = sum(read)
	return res, nil
}

// void zeroes the head on the disk, durably.
func (w *writer) void() error {
	zeros := alignedBuffer(len(w.head))
	if err := writeFull(w.d, zeros, 0); err != nil {
		// The whole did not go: the first sector alone keeps the disk from booting.
		if writeFull(w.d, zeros[:w.im.SectorSize], 0) == nil {
			_ = w.d.Sync() // the first error is what the caller has to hear
		}
		return err
	}
	return w.d.Sync()
}

func (w *writer) checkVoid() error {
	got := alignedBuffer(len(w.head))
	if err := readDisk(w.d, got, 0); err != nil {
		return fmt.Errorf("the disk's first MiB: %w", err)
	}
	for i, b := range got {
		if b != 0 {
			return &MismatchError{Offset: int64(i)}
		}
	}
	return nil
}

// writeHead writes the extents in the head, the first sector after all others,
// and returns the number of bytes.
func (w *writer) writeHead() (n int64, err error) {
	sector := int64(w.im.SectorSize)
	put := func(extent int, from, to int64) error {
		if from >= to {
			return nil
		}
		if err := writeFull(w.d, w.head[from:to], from); err != nil {
			return at(extent, from, err)
		}
		n += to - from
		return nil
	}
	for _, s := range w.spans {
		if err := put(s.extent, max(s.from, sector), s.to); err != nil {
			return n, err
		}
	}
	if err := w.d.Sync(); err != nil {
		return n, fmt.Errorf("flush the disk: %w", err)
	}
	for _, s := range w.spans {
		if err := put(s.extent, s.from, min(s.to, sector)); err != nil {
			return n, err
		}
	}
	if err := w.d.Sync(); err != nil {
		return n, fmt.Errorf("flush the disk: %w", err)
	}
	return n, nil
}

func (w *writer) compareHead() error {
	got := alignedBuffer(len(w.head))
	for _, s := range w.spans {
		p := got[s.from:s.to]
		if err := readDisk(w.d, p, s.from); err != nil {
			return at(s.extent, s.from, err)
		}
		if i := firstDifference(p, w.head[s.from:s.to]); i >= 0 {
			return at(s.extent, s.from, &MismatchError{Offset: s.from + int64(i)})
		}
	}
	return nil
}

func (w *writer) headDigest() hash.Hash {
	h := newDigest(w.im)
	for _, s := range w.spans {
		h.Write(w.head[s.from:s.to])
	}
	return h
}

// mismatch finds the first wrong byte of a chunk whose hash is wrong.
func (w *writer) mismatch(c chunk) error {
	e := w.im.Extents[c.extent]
	want := make([]byte, len(c.data))
	offset := c.offset
	if e.read(want, c.offset-e.Offset) == nil {
		if i := firstDifference(c.data, want); i >= 0 {
			offset += int64(i)
		}
	}
	return &MismatchError{Offset: offset}
}

// chunk is a piece of an extent on its way.
type chunk struct {
	number int // counted from 0 over all chunks of a stream
	extent int
	offset int64 // on the disk, in bytes
	data   []byte
}

// stream cuts what of extents lies at or behind from into chunks and takes
// each through fill and then use, in order. fill of a later chunk runs while
// use of an earlier one does. It returns the first error, with the place, after
// both have ended.
func stream(ctx context.Context, extents []Extent, from int64, fill, use func(chunk) error) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	free := make(chan []byte, chunks)
	for range chunks {
		free <- alignedBuffer(chunkSize)
	}
	filled := make(chan chunk)
	var fillErr error // read after filled is closed
	go func() {
		defer close(filled)
		number := 0
		for i, e := range extents {
			for off := max(e.Offset, from); off < e.End(); {
				var buf []byte
				select {
				case buf = <-free:
				case <-ctx.Done():
				}
				// With both ready, select may have taken the buffer.
				if err := ctx.Err(); err != nil {
					fillErr = at(i, off, err)
					return
				}
				end := min(e.End(), (off/chunkSize+1)*chunkSize)
				c := chunk{number, i, off, buf[:end-off]}
				if err := fill(c); err != nil {
					fillErr = at(i, off, err)
					return
				}
				filled <- c
				off = end
				number++
			}
		}
	}()
	var useErr error
	for c := range filled {
		if useErr == nil && ctx.Err() == nil {
			if err := use(c); err != nil {
				useErr = at(c.extent, c.offset, err)
				stop()
			}
		}
		free <- c.data[:chunkSize]
	}
	if useErr != nil {
		return useErr
	}
	if fillErr == nil && ctx.Err() != nil {
		// The last chunk was filled when ctx ended and was not used.
		return ctx.Err()
	}
	return fillErr
}

// at says where an error was met.
func at(extent int, offset int64, err error) error {
	where := fmt.Sprintf("byte %d", offset)
	if offset%(1<<20) == 0 {
		where = fmt.Sprintf("%d MiB", offset>>20)
	}
	return fmt.Errorf("extent %d at %s: %w", extent, where, err)
}

// readDisk fills p from the disk.
func readDisk(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("the disk ends here: %w", io.ErrUnexpectedEOF)
	}
	return err
}

func writeFull(w io.WriterAt, p []byte, off int64) error {
	n, err := w.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}

// firstDifference is the index of the first byte in which a and b, of the same
// length, differ, or -1.
func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// alignedBuffer returns n zeros at an address that direct I/O takes for every
// sector size up to 4096.
func alignedBuffer(n int) []byte {
	const align = 4096
	b := make([]byte, n+align)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (align - 1)) //nolint:gosec // only the address is looked at
	return b[skip : skip+n : skip+n]
}
