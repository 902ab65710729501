package media

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"slices"
	"time"
)

// Capacity is what a probe found out about a disk's size.
type Capacity struct {
	Claimed int64 // bytes that the disk says it has
	Real    int64 // bytes that it holds, to within a MiB; Claimed if Fault is "" or FaultFlipped
	Fault   Fault // FaultWraps, FaultDropped, FaultShort, FaultFlipped or ""
	At      int64 // with a Fault: the lowest place, in bytes, that does not hold what it is given
	Places  int   // that were tried
}

// Genuine tells whether the disk has the size that it says.
func (c Capacity) Genuine() bool { return c.Fault == "" }

const (
	// markSize is what is written in one place: a block of every sector size.
	markSize = 4096

	// markOffset is where in a MiB the marks lie: away from the first sectors of a
	// disk and of most partitions, so that a machine that dies meanwhile leaves
	// them whole.
	markOffset = 768 << 10

	// evenPlaces lie spread over the whole disk, besides those at powers of two.
	evenPlaces = 16

	// leastProbed bytes are too few for a place in each end.
	leastProbed = 4 << 20

	// restoreTime is how long the content is tried to be put back once ctx is over.
	restoreTime = 10 * time.Second
)

// ProbeCapacity finds out in seconds what a disk of size bytes really holds, and
// leaves its content as it was.
//
// Marks that are nowhere else are written at distances of powers of two from
// one place, for a controller that ignores address bits gives those the same place; at
// places spread evenly over the disk; and near its end. They are flushed and read back from the
// device. Where the first does not come back is then narrowed down to a MiB. What was
// in all places, some hundred KiB, is kept in memory and written back, also after an error
// or when ctx ends; a machine that dies meanwhile loses 4 KiB in each place, none of them a
// boot sector or partition table.
//
// A disk whose places coincide at a distance that is neither a power of two nor a
// sixteenth of its size passes, as does one that breaks down only when it is full:
// the read-back of Write finds those. A disk that lies is no error, a
// *DeviceError is one: it could not be tried. The error of a content that could not be
// put back names the place.
func ProbeCapacity(ctx context.Context, d Disk, size int64) (Capacity, error) {
	c := Capacity{Claimed: size, Real: size}
	if size < leastProbed {
		return c, fmt.Errorf("probe the capacity: a disk of %d bytes is too small for that, %d are the least", size, int64(leastProbed))
	}
	p := probe{dev: device{d}, seed: rand.Uint64()} //nolint:gosec // no secret
	err := p.run(ctx, &c)
	c.Places = len(p.saved)
	var lost []int64
	switch FaultOf(err) {
	case FaultGone, FaultStalled:
		// What is left in the device's hands could come after what is put back.
		lost = p.marked()
	default:
		var why error
		if lost, why = p.restore(ctx); err == nil {
			err = why
		}
	}
	if len(lost) > 0 {
		err = fmt.Errorf("%w (and the disk's content could not be put back in %d places, %d bytes each: %v)", err, len(lost), markSize, lost)
	}
	if err != nil {
		return c, fmt.Errorf("probe the capacity: %w", err)
	}
	return c, nil
}

// probe is one run of ProbeCapacity.
type probe struct {
	dev   device
	seed  uint64 // of the marks: those of another run are not mistaken for ours
	saved []saved
}

// saved is what was at a place before.
type saved struct {
	offset  int64
	content []byte
	marked  bool // something else may be there now
}

// probePlaces are the offsets at which a disk of size bytes is tried.
func probePlaces(size int64) []int64 {
	const mib = 1 << 20
	last := (size-markSize)/mib*mib + markOffset // in the last whole MiB
	for last > size-markSize {
		last -= mib
	}
	places := []int64{markOffset, last}
	for distance := int64(mib); markOffset+distance < last; distance *= 2 {
		places = append(places, markOffset+distance)
	}
	// Powers of two again, so that wraps at their multiples show.
	step := int64(1) << max(20, bits.Len64(uint64(size/evenPlaces)))
	for at := markOffset + step; at < last; at += step {
		places = append(places, at)
	}
	// And sixteenths, in whole MiB, for sizes that are none.
	for i := int64(1); i < evenPlaces; i++ {
		if at := markOffset + size*i/evenPlaces/mib*mib; at < last {
			places = append(places, at)
		}
	}
	slices.Sort(places)
	return slices.Compact(places)
}

func (p *probe) run(ctx context.Context, c *Capacity) error {
	// The last bytes must be there at all; they are only read, for a partition
	// table lies there.
	tail := alignedBuffer(markSize)
	err := p.dev.do(ctx, func() error { return p.dev.read(tail, c.Claimed-markSize) })
	if FaultOf(err) == FaultShort {
		c.Fault, c.At = FaultShort, c.Claimed-markSize
	} else if err != nil {
		return err
	}

	places := probePlaces(c.Claimed)
	found, err := p.try(ctx, places)
	if err != nil {
		return err
	}
	bad := slices.IndexFunc(found, func(f finding) bool { return f.fault != "" })
	if bad < 0 {
		if c.Fault == FaultShort {
			c.Real = c.At
		}
		return nil
	}
	c.Fault, c.At = found[bad].fault, places[bad]
	if c.Fault == FaultWraps {
		// Places that are one lie a multiple of the capacity apart.
		c.Real = 0
		for i, f := range found {
			if f.fault == FaultWraps {
				c.Real = gcd(c.Real, max(f.other-places[i], places[i]-f.other))
			}
		}
		return nil
	}

	if c.Fault == FaultFlipped {
		return nil
	}

	// Somewhere between the last good place and the first bad one it ends.
	const mib = 1 << 20
	good := int64(0)
	if bad > 0 {
		good = places[bad-1]
	}
	for c.At-good > mib {
		middle := good + (c.At-good)/2/mib*mib
		if middle == good {
			middle += mib
		}
		middle = middle/mib*mib + markOffset
		if middle >= c.At {
			middle -= mib
		}
		if middle <= good {
			break
		}
		found, err := p.try(ctx, []int64{middle})
		if err != nil {
			return err
		}
		if found[0].fault == "" {
			good = middle
		} else {
			c.At = middle
		}
	}
	c.Real = 0
	if good > 0 {
		c.Real = good + markSize
	}
	return nil
}

type finding struct {
	fault Fault
	other int64 // FaultWraps: the place whose mark is here
}

// try marks the places, in order, and tells of each what came back.
func (p *probe) try(ctx context.Context, places []int64) ([]finding, error) {
	found := make([]finding, len(places))
	first := len(p.saved)
	for i, off := range places {
		s := saved{offset: off, content: alignedBuffer(markSize)}
		err := p.dev.do(ctx, func() error { return p.dev.read(s.content, off) })
		if FaultOf(err) == FaultShort {
			s.content = nil // it will not be written
			found[i].fault = FaultShort
		} else if err != nil {
			return nil, err
		}
		p.saved = append(p.saved, s)
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	mark := alignedBuffer(markSize)
	for i := range places {
		s := &p.saved[first+i]
		if s.content == nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		fillMark(mark, p.seed+uint64(s.offset))
		s.marked = true
		err := p.dev.do(ctx, func() error { return p.dev.write(mark, s.offset) })
		switch {
		case FaultOf(err) == FaultReadOnly:
			s.marked = false
			return nil, err
		case FaultOf(err) == FaultShort:
			found[i].fault = FaultShort
		case err != nil:
			return nil, err
		}
	}
	if err := p.dev.do(ctx, p.dev.flush); err != nil {
		return nil, err
	}
	for i, off := range places {
		if found[i].fault != "" {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		now := alignedBuffer(markSize)
		if err := p.dev.do(ctx, func() error { return p.dev.read(now, off) }); err != nil {
			return nil, err
		}
		found[i] = p.judge(p.saved[first+i], now, mark)
	}
	return found, nil
}

// judge says what it means that now is at a place. It uses mark as scratch.
func (p *probe) judge(s saved, now, mark []byte) finding {
	fillMark(mark, p.seed+uint64(s.offset))
	if bytes.Equal(now, mark) {
		return finding{}
	}
	wrong, _ := differingBits(now, mark)
	if wrong <= markSize/2 {
		return finding{fault: FaultFlipped}
	}
	for _, o := range p.saved {
		fillMark(mark, p.seed+uint64(o.offset))
		if o.offset != s.offset && bytes.Equal(now, mark) {
			return finding{fault: FaultWraps, other: o.offset}
		}
	}
	return finding{fault: FaultDropped}
}

// marked lists the places that may hold a mark.
func (p *probe) marked() (places []int64) {
	for _, s := range p.saved {
		if s.marked {
			places = append(places, s.offset)
		}
	}
	return places
}

// restore puts back what was there, and returns the places where that failed and the
// first error. Places that coincide had the same content, so the order means
// nothing.
func (p *probe) restore(outer context.Context) (lost []int64, err error) {
	ctx, stop := context.WithCancel(context.WithoutCancel(outer))
	defer stop()
	defer context.AfterFunc(outer, func() { time.AfterFunc(restoreTime, stop) })()
	for i := range p.saved {
		s := &p.saved[i]
		if !s.marked {
			continue
		}
		why := p.dev.do(ctx, func() error { return p.dev.write(s.content, s.offset) })
		switch FaultOf(why) {
		case FaultShort: // nothing of ours is there
		case FaultGone, FaultStalled:
			return p.marked(), why
		default:
			if why != nil {
				err = cmp.Or(err, why)
				continue
			}
		}
		s.marked = false
	}
	if why := p.dev.do(ctx, p.dev.flush); why != nil {
		err = cmp.Or(err, why)
	}
	return p.marked(), err
}

func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}
