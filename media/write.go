package media

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"hash/maphash"
	"io"
	"time"
	"unsafe"
)

// Progress is told how far a phase is, in bytes. It is called from one
// goroutine at a time. The total grows when bytes have to be read once more.
type Progress func(phase string, done, total int64)

// The phases that Write reports, one after the other. PhaseWrite counts bytes
// that are durable on the disk, PhaseReadBack bytes that came back from it
// right. The first MiB, which is written after the rest was read back, counts
// in PhaseReadBack only.
const (
	PhaseWrite    = "write"
	PhaseReadBack = "read back"
)

// Result is what a write did and proved. After an error it tells of what was
// done until then.
type Result struct {
	Bytes         int64  // of the image's data, on the disk and read back
	Length        int64  // of a Stream: its own bytes
	DigestWritten string // Image.Digest of the bytes handed to the disk
	DigestRead    string // Image.Digest of the bytes the disk gave back

	// Where the Bytes behind the head come from: their sum. Head is what was
	// written of the image's first MiB, which is always written anew.
	Written int64 // bytes written
	Zeroed  int64 // bytes that the disk was told to zero
	Skipped int64 // bytes that were there already, or zeros on a blank disk
	Head    int64

	// Begun: something was written. After an error the disk is then no longer what
	// it was, and without Begun it still is.
	Begun bool

	Compared  int64 // bytes read to find out whether they must be written
	Rewritten int64 // bytes that had to be written a second time: the disk is not to be relied on
}

// NoSpaceError says that something is too small for what is to go into it.
type NoSpaceError struct {
	Where      string // "the file system of the target", "the disk"
	Need, Have int64  // bytes; a Need of 0 is more than Have, who knows how much
}

func (e *NoSpaceError) Error() string {
	const mib = 1 << 20
	if e.Need == 0 {
		return fmt.Sprintf("%s is too small: it has %d MiB, and more is needed", e.Where, e.Have/mib)
	}
	return fmt.Sprintf("%s is too small: needs %d MiB, has %d MiB", e.Where, (e.Need+mib-1)/mib, e.Have/mib)
}

const (
	// headSize is the part of a disk that makes it boot: boot sector and
	// partition table. It is void while the rest is written and is
	// written last, from memory.
	headSize = 1 << 20

	// Each chunk ends at a multiple of chunkSize on the disk, so that a flash
	// translation layer gets whole erase blocks or even parts of them.
	chunkSize = 1 << 20

	// More than mostRepaired bytes that came back wrong are not written a second
	// time: such a disk is no good.
	mostRepaired = 32 << 20

	// mostVoidBits that are set in a zeroed head are flips; more are other data.
	mostVoidBits = 256

	// voidTime is how long a failed write tries to erase the head.
	voidTime = 10 * time.Second
)

// Write puts im on d, reads it back and compares.
//
// The order makes an interrupted write harmless: the first MiB is zeroed, then
// everything behind it is written, flushed, read back and compared; then
// the first MiB follows, and its first sector, the protective MBR, is the very
// last write. If anything fails, ctx's end included, the first MiB is zeroed
// again, so that no half-written disk boots.
//
// What the disk holds already is not written again, zeros are made by the disk
// where it can, and several writes are in flight. What failed or came back wrong
// is written once more. Memory in use does not grow with the image but for 8
// bytes a MiB.
//
// Errors name the extent and its place. A *MismatchError is in the chain if
// the disk gave back other bytes, a *DeviceError if it failed, a *NoSpaceError if
// im does not fit; then nothing was written. When ctx ends, Write returns
// within seconds, also if the kernel does not give a call back: that call is then
// left alone, FaultStalled is in the chain, and since the head was void before and
// such a call writes no other place than it was made for, the disk does not boot.
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
	w := newWriter(d, im, progress)
	if err := w.readHead(ctx); err != nil {
		return Result{}, fmt.Errorf("write: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return Result{}, fmt.Errorf("write: nothing was written: %w", err)
	}
	err := w.run(ctx)
	if err != nil {
		err = w.fail(ctx, err)
	}
	w.res.Begun = w.state != headOld
	return w.res, err
}

// writer is one run of Write.
type writer struct {
	dev      device
	im       *Image  // of a stream, what is known of it
	stream   *stream // nil: the image's source can be read as often as needed
	progress Progress
	res      Result

	blank bool   // the disk reads as zeros
	head  []byte // the image's first MiB, zeros between extents
	spans []span // the parts of head that extents cover
	state headState

	rest        int64 // bytes of data behind the head
	done, total int64 // bytes of PhaseReadBack

	// sums holds a seeded 64-bit hash of each chunk: enough to find a chunk that
	// came back different, at 8 bytes for 1 MiB.
	seed maphash.Seed
	sums []uint64

	buffers chan []byte // of chunkSize; as many as there are, is what memory a pass takes
	scratch chan []byte // of compareStep, for what the disk held before
}

type span struct {
	extent   int
	from, to int64
}

// headState is what is known of the first MiB on the disk.
type headState int

const (
	headOld     headState = iota // what was there before
	headUnknown                  // something of it was written
	headVoid                     // durable zeros
)

func newWriter(d Disk, im *Image, progress Progress) *writer {
	w := &writer{dev: device{d}, im: im, progress: progress, seed: maphash.MakeSeed()}
	if w.progress == nil {
		w.progress = func(string, int64, int64) {}
	}
	if b, ok := d.(blank); ok {
		w.blank = b.Blank()
	}
	w.head = alignedBuffer(int(min(headSize, im.Size)))
	pieces := 0
	for c := range w.pieces() {
		w.rest += int64(c.length)
		pieces++
	}
	w.allocate(pieces)
	return w
}

// allocate makes what a pass over so many pieces needs.
func (w *writer) allocate(pieces int) {
	w.buffers = make(chan []byte, mostBuffers)
	for range min(mostBuffers, pieces) {
		w.buffers <- alignedBuffer(chunkSize)
	}
	w.scratch = make(chan []byte, mostInFlight)
	for range min(mostInFlight, pieces) {
		w.scratch <- alignedBuffer(compareStep)
	}
}

// readHead loads what of the image lies in the first MiB.
func (w *writer) readHead(ctx context.Context) error {
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

func (w *writer) run(ctx context.Context) error {
	if err := w.void(ctx); err != nil {
		return fmt.Errorf("write: erase the disk's first MiB: %w", err)
	}
	// The image's digest runs over the extents in their order, so the head,
	// which is written last, is hashed first.
	written := w.headDigest()
	if err := w.writeRest(ctx, written); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	w.res.DigestWritten = sum(written)

	read, err := w.proveRest(ctx)
	if err != nil {
		return fmt.Errorf("read back: %w", err)
	}

	// From here on the disk becomes bootable: nothing may interrupt it but an
	// error, or a disk that does not answer when ctx ends.
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	late, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(patience, stop) })()
	if err := w.commit(late); err != nil {
		return err
	}
	w.res.Bytes = w.im.DataBytes()
	w.res.DigestRead = read
	return nil
}

// proveRest reads back what is behind the head, and returns the digest of what
// came. What came wrong is written again, once, and then all is read once more: only
// what is read after the last write proves anything on a disk where places
// coincide.
func (w *writer) proveRest(ctx context.Context) (digest string, err error) {
	head := w.im.DataBytes() - w.rest
	for try := 0; ; try++ {
		w.total = w.done + w.rest + head
		w.progress(PhaseReadBack, w.done, w.total)
		// A disk that wraps at its real capacity would have put data from behind
		// into the first MiB, which the head would then cover up.
		bits, err := w.voidBits(ctx)
		if err != nil {
			return "", err
		}
		var bad []piece
		if bits > 0 {
			w.state = headUnknown
			bad = append(bad, piece{number: -1, length: len(w.head), err: errDiffers})
		}
		if bits > mostVoidBits {
			// To write it again would cover up what came there, and how.
			return "", w.diagnose(ctx, bad, make([]byte, len(w.head)))
		}
		read := w.headDigest()
		wrong, err := w.readRest(ctx, read)
		if err != nil {
			return "", err
		}
		if bad = append(bad, wrong...); len(bad) == 0 {
			return sum(read), nil
		}
		if try > 0 || length(bad) > mostRepaired || len(bad) >= mostUnreadable && FaultOf(bad[len(bad)-1].err) == FaultRead ||
			w.stream != nil && len(wrong) > 0 { // which can't be read again
			return "", w.diagnose(ctx, bad, make([]byte, len(w.head)))
		}
		if err := w.repair(ctx, bad); err != nil {
			return "", err
		}
	}
}

// repair writes the pieces again, one by one.
func (w *writer) repair(ctx context.Context, bad []piece) error {
	p := alignedBuffer(chunkSize)
	for _, c := range bad {
		if err := ctx.Err(); err != nil {
			return err
		}
		w.res.Rewritten += int64(c.length)
		if c.number < 0 {
			if err := w.void(ctx); err != nil {
				return fmt.Errorf("erase the disk's first MiB: %w", err)
			}
			continue
		}
		if err := w.dev.do(ctx, func() error { return w.source(c, p) }); err != nil {
			return err
		}
		if maphash.Bytes(w.seed, p[:c.length]) != w.sums[c.number] {
			return at(c.extent, c.offset, errors.New("the image's source has changed since it was written: make the image anew"))
		}
		if err := w.dev.do(ctx, func() error { return w.dev.write(p[:c.length], c.offset) }); err != nil {
			return at(c.extent, c.offset, err)
		}
	}
	return w.dev.do(ctx, w.dev.flush)
}

// commit writes the head and compares it, at most twice.
func (w *writer) commit(ctx context.Context) error {
	for try := 0; ; try++ {
		n, err := w.writeHead(ctx)
		w.res.Head += n
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		bad, err := w.compareHead(ctx)
		if err != nil {
			return fmt.Errorf("read back: %w", err)
		}
		if len(bad) == 0 {
			w.progress(PhaseReadBack, w.total, w.total)
			return nil
		}
		if try > 0 {
			return fmt.Errorf("read back: %w", w.diagnose(ctx, bad, w.head))
		}
		w.res.Rewritten += length(bad)
		if err := w.void(ctx); err != nil {
			return fmt.Errorf("write: erase the disk's first MiB: %w", err)
		}
	}
}

// fail makes the disk unbootable after err, where that may be needed and can
// be done.
func (w *writer) fail(ctx context.Context, err error) error {
	why := err
	switch FaultOf(err) {
	case FaultGone, FaultStalled:
		if w.state == headOld {
			return err
		}
	default:
		ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), voidTime)
		defer stop()
		if why = w.void(ctx); why == nil || w.state != headUnknown {
			return err
		}
	}
	if w.state == headVoid {
		return err
	}
	return fmt.Errorf("%w (and the disk's first MiB could not be erased: %w; it may hold a part of a system, do not boot it)", err, why)
}

// void zeroes the head on the disk, durably.
func (w *writer) void(ctx context.Context) error {
	before := w.state
	w.state = headUnknown
	switch done, err := w.punch(ctx); {
	case err != nil:
		return err
	case done:
		w.state = headVoid
		return nil
	}
	zeros := alignedBuffer(len(w.head))
	err := w.dev.do(ctx, func() error { return w.dev.write(zeros, 0) })
	if err == nil {
		err = w.dev.do(ctx, w.dev.flush)
	} else if FaultOf(err) == FaultWrite {
		// The whole did not go: the first sector alone keeps the disk from booting.
		// The first error is what the caller has to hear.
		if w.dev.do(ctx, func() error { return w.dev.write(zeros[:w.im.SectorSize], 0) }) == nil {
			_ = w.dev.do(ctx, w.dev.flush)
		}
	}
	switch {
	case err == nil:
		w.state = headVoid
	case FaultOf(err) == FaultReadOnly, before == headVoid:
		w.state = before // nothing arrived, or zeros over zeros
	}
	return err
}

// Void tells whether the first MiB of a disk of that many bytes reads as zeros,
// as Write leaves it when it is interrupted.
func Void(r io.ReaderAt, size int64) (bool, error) {
	head := alignedBuffer(int(min(headSize, size)))
	if n, err := r.ReadAt(head, 0); n < len(head) {
		return false, fmt.Errorf("read the disk's first MiB: %w", err)
	}
	return allZero(head), nil
}

// punch tells whether the disk zeroed the head by itself. It is not believed
// that, but read. The error is that of a disk that nobody need ask again; what
// else there is to say, writing tells.
func (w *writer) punch(ctx context.Context) (done bool, err error) {
	z, ok := w.dev.Disk.(zeroer)
	if !ok {
		return false, nil
	}
	if err = w.dev.do(ctx, func() (err error) {
		done, err = z.ZeroRange(0, int64(len(w.head)))
		return err
	}); err == nil && done {
		if err = w.dev.do(ctx, w.dev.flush); err == nil {
			var bits int64
			bits, err = w.voidBits(ctx)
			done = bits == 0
		}
	}
	switch FaultOf(err) {
	case FaultGone, FaultStalled:
		return false, err
	}
	return done && err == nil, nil
}

// voidBits counts the bits of the head that do not read as zeros.
func (w *writer) voidBits(ctx context.Context) (bits int64, err error) {
	got := alignedBuffer(min(compareStep, len(w.head)))
	for off := 0; off < len(w.head); off += len(got) {
		p := got[:min(len(got), len(w.head)-off)]
		if err := w.dev.do(ctx, func() error { return w.dev.read(p, int64(off)) }); err != nil {
			return 0, fmt.Errorf("the disk's first MiB: %w", err)
		}
		n, _ := differingBits(p, nil)
		bits += n
	}
	return bits, nil
}

// writeHead writes the extents in the head, the first sector after all others,
// and returns the number of bytes.
func (w *writer) writeHead(ctx context.Context) (n int64, err error) {
	sector := int64(w.im.SectorSize)
	put := func(s span, from, to int64) error {
		if from >= to {
			return nil
		}
		w.state = headUnknown
		if err := w.dev.do(ctx, func() error { return w.dev.write(w.head[from:to], from) }); err != nil {
			return at(s.extent, from, err)
		}
		n += to - from
		return nil
	}
	for _, s := range w.spans {
		if err := put(s, max(s.from, sector), s.to); err != nil {
			return n, err
		}
	}
	if err := w.dev.do(ctx, w.dev.flush); err != nil {
		return n, err
	}
	for _, s := range w.spans {
		if err := put(s, s.from, min(s.to, sector)); err != nil {
			return n, err
		}
	}
	return n, w.dev.do(ctx, w.dev.flush)
}

// compareHead returns what of the head came back wrong.
func (w *writer) compareHead(ctx context.Context) (bad []piece, err error) {
	got := alignedBuffer(len(w.head))
	for _, s := range w.spans {
		p := got[s.from:s.to]
		if err := w.dev.do(ctx, func() error { return w.dev.read(p, s.from) }); err != nil {
			return nil, at(s.extent, s.from, err)
		}
		if !bytes.Equal(p, w.head[s.from:s.to]) {
			bad = append(bad, piece{number: -1, extent: s.extent, offset: s.from, length: len(p)})
		}
	}
	return bad, nil
}

func (w *writer) headDigest() hash.Hash {
	if w.stream != nil {
		return w.stream.headDigest(w.head)
	}
	h := newDigest(w.im)
	for _, s := range w.spans {
		h.Write(w.head[s.from:s.to])
	}
	return h
}

// at says where an error was met.
func at(extent int, offset int64, err error) error {
	where := fmt.Sprintf("byte %d", offset)
	if offset%(1<<20) == 0 {
		where = fmt.Sprintf("%d MiB", offset>>20)
	}
	return fmt.Errorf("extent %d at %s: %w", extent, where, err)
}

// alignedBuffer returns n zeros at an address that direct I/O takes for every
// sector size up to 4096.
func alignedBuffer(n int) []byte {
	const align = 4096
	b := make([]byte, n+align)
	skip := int(-address(b) & (align - 1))
	return b[skip : skip+n : skip+n]
}

func address(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) } //nolint:gosec // only looked at
