package media

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"math/bits"
	"math/rand/v2"
)

const (
	// mostExamined pieces that came back wrong are looked at closely.
	mostExamined = 40

	// mostSamples wrong sectors are looked for in the image.
	mostSamples = 16
)

// wrongSector is a sector that did not come back as it was written.
type wrongSector struct {
	offset int64
	got    []byte
	bits   int64 // that differ
}

// findings is what a close look at wrong pieces brings.
type findings struct {
	first      int64 // the first byte that differs, -1: none does any more
	bits       int64 // that differ in all
	worst      wrongSector
	samples    []wrongSector // whose content is not the same byte over and over
	unreadable error         // a *DeviceError

	suspect *piece // of a stream: the first that has come back wrong once more
	was     []byte // and how
}

// diagnose finds out in what way the disk lies about the pieces, which are
// sorted, and returns that as an error. head is what the first MiB should be. The disk is a lost
// cause by now, so it is put to the test by writing on it.
func (w *writer) diagnose(ctx context.Context, bad []piece, head []byte) error {
	err := w.verdict(ctx, bad, head)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if bad[0].number < 0 && bad[0].offset == 0 && bad[0].length == len(w.head) {
		return fmt.Errorf("the disk's first MiB: %w", err)
	}
	return at(bad[0].extent, bad[0].offset, err)
}

func (w *writer) verdict(ctx context.Context, bad []piece, head []byte) error {
	f, err := w.examine(ctx, bad, head)
	switch {
	case err != nil:
		return err
	case f.first < 0 && w.stream != nil:
		return w.streamVerdict(ctx, bad, f)
	case f.first < 0 && f.unreadable != nil:
		return f.unreadable
	case f.first < 0:
		return &MismatchError{Fault: FaultUnstable, Offset: bad[0].offset}
	}
	switch m, err := w.wraps(ctx, f, head); {
	case err != nil:
		return err
	case m != nil:
		return m
	}

	// Does the worst place take anything at all?
	mark, now, err := w.tryMark(ctx, f.worst.offset, f.worst.offset, w.im.SectorSize)
	if err != nil {
		return err
	}
	wrong, _ := differingBits(now, mark)
	sectorBits := int64(w.im.SectorSize) * 8
	switch {
	case bytes.Equal(now, f.worst.got), wrong == 0 && f.worst.bits > sectorBits/16:
		sector := int64(w.im.SectorSize)
		m := &MismatchError{Fault: FaultDropped, Offset: f.first / sector * sector}
		if bad[0].number >= 0 && len(bad) > 1 && bytes.Equal(now, f.worst.got) && w.reachesEnd(bad) {
			m.Capacity = m.Offset
		}
		return m
	default:
		return &MismatchError{Fault: FaultFlipped, Offset: f.first, Bits: f.bits}
	}
}

// reachesEnd tells whether the pieces are all there are from the first one on.
// A pass that ended early has seen enough of them.
func (w *writer) reachesEnd(bad []piece) bool {
	last := bad[len(bad)-1].number
	return last-bad[0].number == len(bad)-1 && (last == len(w.sums)-1 || length(bad) > mostRepaired)
}

// examine reads the pieces once more.
func (w *writer) examine(ctx context.Context, bad []piece, head []byte) (findings, error) {
	f := findings{first: -1}
	sector := w.im.SectorSize
	got, want := alignedBuffer(chunkSize), alignedBuffer(chunkSize)
	for _, c := range bad[:min(len(bad), mostExamined)] {
		if err := ctx.Err(); err != nil {
			return f, err
		}
		if c.number < 0 {
			copy(want, head[c.offset:c.offset+int64(c.length)])
		} else if w.stream != nil {
			want = nil // it is gone
		} else if err := w.dev.do(ctx, func() error { return w.source(c, want) }); err != nil {
			return f, err
		}
		err := w.dev.do(ctx, func() error { return w.dev.read(got[:c.length], c.offset) })
		if FaultOf(err) == FaultRead && ctx.Err() == nil {
			if f.unreadable == nil {
				f.unreadable = w.narrow(ctx, c, got, err)
			}
			continue
		}
		if err != nil {
			return f, err
		}
		if want == nil {
			w.look(&f, c, got[:c.length])
			continue
		}
		for off := 0; off < c.length; off += sector {
			s := got[off : off+sector]
			n, first := differingBits(s, want[off:off+sector])
			if n == 0 {
				continue
			}
			f.bits += n
			if f.first < 0 {
				f.first = c.offset + int64(off) + first
			}
			if n > f.worst.bits {
				f.worst = wrongSector{c.offset + int64(off), append(f.worst.got[:0], s...), n}
			}
			// A few of each piece, so that several pieces are heard.
			if len(f.samples) < mostSamples && !constant(s) && (off/sector)%(chunkSize/sector/4) == 0 {
				f.samples = append(f.samples, wrongSector{c.offset + int64(off), bytes.Clone(s), n})
			}
		}
	}
	if f.worst.got != nil && !constant(f.worst.got) {
		f.samples = append(f.samples, f.worst)
	}
	return f, nil
}

// narrow finds the first sector of the piece that can't be read.
func (w *writer) narrow(ctx context.Context, c piece, p []byte, err error) error {
	sector := int64(w.im.SectorSize)
	for off, n := c.offset, int64(c.length); n > sector; {
		half := (n/sector + 1) / 2 * sector
		first := w.dev.do(ctx, func() error { return w.dev.read(p[:half], off) })
		if first == nil {
			off, n = off+half, n-half
			if first = w.dev.do(ctx, func() error { return w.dev.read(p[:n], off) }); first == nil {
				break // now it can be read
			}
		} else {
			n = half
		}
		err = first
		if ctx.Err() != nil || FaultOf(err) != FaultRead {
			break
		}
	}
	return err
}

// wraps looks whether something of ours came back from where it does not
// belong, and whether that is since two places are one.
func (w *writer) wraps(ctx context.Context, f findings, head []byte) (*MismatchError, error) {
	if len(f.samples) == 0 {
		return nil, nil
	}
	from, err := w.whereElse(ctx, f.samples, head)
	if err != nil {
		return nil, err
	}
	for i, s := range f.samples {
		if from[i] < 0 {
			continue
		}
		low, distance := min(from[i], s.offset), max(from[i]-s.offset, s.offset-from[i])
		one, err := w.coincide(ctx, low, distance)
		if err != nil {
			return nil, err
		}
		if !one {
			continue
		}
		// The distance may be several times the capacity.
		for _, by := range []int64{2, 3, 5, 7} {
			for distance%(by*int64(w.im.SectorSize)) == 0 {
				if one, err = w.coincide(ctx, low, distance/by); err != nil {
					return nil, err
				}
				if !one {
					break
				}
				distance /= by
			}
		}
		return &MismatchError{Fault: FaultWraps, Offset: s.offset, From: from[i], Capacity: distance}, nil
	}
	return nil, nil
}

// coincide tells whether the place at low and the one that far behind it are one.
func (w *writer) coincide(ctx context.Context, low, distance int64) (bool, error) {
	mark, now, err := w.tryMark(ctx, low+distance, low, w.im.SectorSize)
	return err == nil && bytes.Equal(mark, now), err
}

// tryMark writes n bytes, whole sectors, that are nowhere else and reads as many back.
func (w *writer) tryMark(ctx context.Context, writeAt, readAt int64, n int) (mark, now []byte, err error) {
	if min(writeAt, readAt) < int64(len(w.head)) {
		w.state = headUnknown
	}
	mark, now = alignedBuffer(n), alignedBuffer(n)
	fillMark(mark, rand.Uint64()) //nolint:gosec // no secret
	if err := w.dev.do(ctx, func() error { return w.dev.write(mark, writeAt) }); err != nil {
		return nil, nil, err
	}
	if err := w.dev.do(ctx, w.dev.flush); err != nil {
		return nil, nil, err
	}
	return mark, now, w.dev.do(ctx, func() error { return w.dev.read(now, readAt) })
}

// fillMark fills p with bytes that follow from seed and from nothing else.
func fillMark(p []byte, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0x6d656d6c696e7578)) //nolint:gosec // no secret
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64())
	}
}

// whereElse finds for each sector the last other place in the image with its
// content, or -1. What is written last is what a wrapping disk gives back. The bytes of a
// stream are gone: of that, the disk is searched, on which both places are one.
func (w *writer) whereElse(ctx context.Context, sectors []wrongSector, head []byte) ([]int64, error) {
	from := make([]int64, len(sectors))
	byHash := map[uint64][]int{}
	for i, s := range sectors {
		from[i] = -1
		key := maphash.Bytes(w.seed, s.got)
		byHash[key] = append(byHash[key], i)
	}
	sector := w.im.SectorSize
	look := func(p []byte, off int64) {
		for ; len(p) >= sector; p, off = p[sector:], off+int64(sector) {
			for _, i := range byHash[maphash.Bytes(w.seed, p[:sector])] {
				if off != sectors[i].offset && bytes.Equal(p[:sector], sectors[i].got) {
					from[i] = off
				}
			}
		}
	}
	look(head, 0)
	p := alignedBuffer(chunkSize)
	for c := range w.pieces() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		err := w.dev.do(ctx, func() error {
			if w.stream != nil {
				return w.dev.read(p[:c.length], c.offset)
			}
			return w.source(c, p)
		})
		if w.stream != nil && FaultOf(err) == FaultRead {
			continue
		}
		if err != nil {
			return nil, err
		}
		look(p[:c.length], c.offset)
	}
	return from, nil
}

// differingBits counts the bits in which a and b, of the same length, differ,
// and finds the first byte with one. A nil b is zeros.
func differingBits(a, b []byte) (n, first int64) {
	first = -1
	if b == nil && allZero(a) || b != nil && bytes.Equal(a, b) {
		return 0, -1
	}
	for i, x := range a {
		if b != nil {
			x ^= b[i]
		}
		if x != 0 {
			if first < 0 {
				first = int64(i)
			}
			n += int64(bits.OnesCount8(x))
		}
	}
	return n, first
}

func constant(p []byte) bool { return len(p) < 2 || bytes.Equal(p[1:], p[:len(p)-1]) }
