package media

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"hash/maphash"
	"io"
	"math"
)

// Stream is a disk image that is read once, in its order: one that is being
// downloaded, or decompressed.
type Stream struct {
	// Reader gives the image's bytes and then io.EOF. With any other error nothing
	// of the image stays on the disk that boots: so a reader that checks a sum at the
	// end gives that error in place of io.EOF. A Read that is under way when the
	// write's context ends must end, too; it is not waited for longer than some
	// seconds.
	io.Reader

	// Expected is how many bytes the image will have in all, as far as that can be
	// told now, for the progress; 0 or nil: nothing can. It is called from
	// several goroutines.
	Expected func() int64
}

// WholeDisk is a Disk that knows its own size.
type WholeDisk interface {
	Disk
	Size() int64     // bytes
	SectorSize() int // bytes: 512 or 4096
}

// stream is what a writer knows of the Stream that it writes.
type stream struct {
	Stream
	length int64 // bytes; math.MaxInt64 until its end was seen
}

func (s *stream) expected() int64 {
	if s.Expected == nil {
		return 0
	}
	return s.Expected()
}

// headDigest begins the digest with the head.
func (s *stream) headDigest(head []byte) hash.Hash {
	h := sha256.New()
	h.Write(head[:min(int64(len(head)), s.length)])
	return h
}

// fill reads until p is full or the stream ends, which sets its length; off is
// where p belongs. What is left of p is zeroed.
func (s *stream) fill(p []byte, off int64) (n int, err error) {
	n, err = io.ReadFull(s, p)
	clear(p[n:])
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		s.length = off + int64(n)
		return n, nil
	}
	return n, fmt.Errorf("read the image, after %s: %w", amount(off+int64(n)), err)
}

// WriteStream puts s on the whole disk d, as Write does an Image: the first MiB is
// void until all else is written and read back, and void again after an error. So the first MiB
// is read from s before the disk is touched, and kept in memory.
//
// Zeros in s are zeros on the disk; a length that is no whole number of sectors
// is filled up with zeros; and behind the image's end old signatures are erased, as
// by Image.EraseSignatures. Result.Bytes counts all of that. Its
// digests are the SHA-256 of the bytes of s alone, and Length their number.
//
// What is lost while it is streamed can't be read again: unlike Write, it writes a
// place a second time only when the disk said at once that the first time failed.
// What comes back other than it was written is an error, whose *MismatchError is
// found by putting the disk to the test. The *NoSpaceError of a stream that is too long
// comes when the disk is full.
func WriteStream(ctx context.Context, d WholeDisk, s Stream, progress Progress) (Result, error) {
	im := &Image{Size: d.Size(), SectorSize: d.SectorSize()}
	if err := im.Validate(); err != nil {
		return Result{}, err
	}
	w := newWriter(d, im, progress)
	w.stream = &stream{Stream: s, length: math.MaxInt64}
	w.allocate(mostBuffers)
	w.spans = []span{{to: int64(len(w.head))}}
	n, err := w.stream.fill(w.head, 0)
	switch {
	case ctx.Err() != nil:
		return w.res, fmt.Errorf("write: nothing was written: %w", ctx.Err())
	case err != nil:
		return w.res, fmt.Errorf("write: nothing was written: %w", err)
	case n == 0:
		return w.res, errors.New("write: nothing was written: the image is empty")
	}
	if err = w.run(ctx); err != nil {
		err = w.fail(ctx, err)
	} else {
		w.res.Length = w.stream.length
	}
	w.res.Begun = w.state != headOld
	return w.res, err
}

// streamPieces reads what of the stream lies behind the head, piece by piece, and gives
// it and then the zeros that erase old signatures behind its end. When all
// was given, im has the extents that these pieces are of.
func (w *writer) streamPieces(buffer func() ([]byte, error), give func(piece, []byte) error) error {
	end := int64(len(w.head))
	number := 0
	put := func(c piece, buf []byte) error {
		c.number = number
		number++
		w.rest += int64(c.length)
		return give(c, buf)
	}
	sector := int64(w.im.SectorSize)
	for w.stream.length == math.MaxInt64 {
		buf, err := buffer()
		if err != nil {
			return err
		}
		room := min(chunkSize, w.im.Size-end)
		if room == 0 {
			// Is there more? If so, the disk is full.
			n, err := w.stream.fill(buf[:1], end)
			w.buffers <- buf
			if err != nil {
				return err
			}
			if n > 0 {
				return &NoSpaceError{Where: "the disk", Have: w.im.Size}
			}
			continue
		}
		n, err := w.stream.fill(buf[:room], end)
		if err != nil {
			return err
		}
		length := (int64(n) + sector - 1) / sector * sector
		if length == 0 {
			w.buffers <- buf
			continue
		}
		if err := put(piece{offset: end, length: int(length)}, buf); err != nil {
			return err
		}
		end += length
	}
	w.im.Extents = []Extent{{Length: end, Content: spent{}}}
	w.im.EraseSignatures(0, w.im.Size)
	for c := range w.pieces() {
		if c.offset < end {
			continue
		}
		buf, err := buffer()
		if err != nil {
			return err
		}
		clear(buf[:c.length])
		if err := put(c, buf); err != nil {
			return err
		}
	}
	return nil
}

// spent stands for the bytes of a stream, which are gone.
type spent struct{}

// ReadAt implements io.ReaderAt.
func (spent) ReadAt([]byte, int64) (int, error) {
	return 0, errors.New("a streamed image can't be read a second time")
}

// testPlace finds out by marks what is wrong with a piece that came back other than
// it was streamed there, as got. It returns nil if the marks came back right.
func (w *writer) testPlace(ctx context.Context, c piece, got []byte, allToTheEnd bool) (*MismatchError, error) {
	mark, now, err := w.tryMark(ctx, c.offset, c.offset, c.length)
	if err != nil {
		return nil, err
	}
	n, first := differingBits(now, mark)
	if n == 0 {
		return nil, nil
	}
	sector := int64(w.im.SectorSize)
	from := first / sector * sector
	if worst := now[from : from+sector]; string(worst) != string(got[from:from+sector]) {
		if wrong, _ := differingBits(worst, mark[from:from+sector]); wrong <= sector*8/16 {
			return &MismatchError{Fault: FaultFlipped, Offset: c.offset + first, Bits: n}, nil
		}
	}
	m := &MismatchError{Fault: FaultDropped, Offset: c.offset + from}
	if allToTheEnd {
		m.Capacity = m.Offset
	}
	return m, nil
}

// streamVerdict is verdict for pieces behind the head, whose bytes are gone: only their sums
// are known.
func (w *writer) streamVerdict(ctx context.Context, bad []piece, f findings) error {
	if f.suspect == nil {
		if f.unreadable != nil {
			return f.unreadable
		}
		return &MismatchError{Fault: FaultUnstable, Offset: bad[0].offset}
	}
	// First what is written over it comes to light, while it is there.
	m, err := w.wraps(ctx, f, nil)
	if m == nil && err == nil {
		m, err = w.testPlace(ctx, *f.suspect, f.was, len(bad) > 1 && w.reachesEnd(bad))
	}
	if err != nil {
		return err
	}
	if m != nil {
		return m
	}
	// The place takes what it is given: zeros were written over it, or it lost this once.
	if w.im.Size >= leastProbed {
		w.state = headUnknown // marks lie there, too, for a while
		found, err := ProbeCapacity(ctx, w.dev.Disk, w.im.Size)
		if err != nil {
			return err
		}
		if found.Fault == FaultWraps {
			return &MismatchError{Fault: FaultWraps, Offset: f.suspect.offset, From: f.suspect.offset + found.Real, Capacity: found.Real}
		}
	}
	return &MismatchError{Fault: FaultUnstable, Offset: f.suspect.offset}
}

// look takes in a piece of a stream that was read once more, as got.
func (w *writer) look(f *findings, c piece, got []byte) {
	if maphash.Bytes(w.seed, got) == w.sums[c.number] {
		return
	}
	if f.suspect == nil {
		f.suspect, f.was = &c, append([]byte(nil), got...)
	}
	sector := w.im.SectorSize
	step := max(sector, len(got)/4/sector*sector)
	for off := 0; off < len(got) && len(f.samples) < mostSamples; off += step {
		if s := got[off : off+sector]; !constant(s) {
			f.samples = append(f.samples, wrongSector{offset: c.offset + int64(off), got: append([]byte(nil), s...)})
		}
	}
}
