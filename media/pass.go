package media

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"hash"
	"hash/maphash"
	"iter"
	"slices"
	"sync/atomic"
	"time"
)

const (
	// mostBuffers bounds what is between the source, the hash and the disk: all
	// writes that may be in flight and some that are read and hashed meanwhile.
	mostBuffers = mostInFlight + 4

	// mostReads in flight are what a device needs to give all it has.
	mostReads = 4

	// compareStep bytes of what the disk holds are read at a time; from one that
	// holds something else only firstLook bytes.
	compareStep = 256 << 10
	firstLook   = 64 << 10

	// A disk that can't be read in so many places is no good, and each takes it
	// seconds to find out.
	mostUnreadable = 8

	// tick is how often a pass looks at the time.
	tick = 100 * time.Millisecond
)

// piece is a chunk of an extent, or the head with the number -1.
type piece struct {
	number int // counted from 0 over all that lie behind the head
	extent int
	offset int64 // on the disk, in bytes
	length int
	err    error // why it is bad; nil: it came back different
}

func length(pieces []piece) (n int64) {
	for _, p := range pieces {
		n += int64(p.length)
	}
	return n
}

// pieces cuts what of the extents lies behind the head.
func (w *writer) pieces() iter.Seq[piece] {
	return func(yield func(piece) bool) {
		number := 0
		for i, e := range w.im.Extents {
			for off := max(e.Offset, int64(len(w.head))); off < e.End(); number++ {
				end := min(e.End(), (off/chunkSize+1)*chunkSize)
				if !yield(piece{number: number, extent: i, offset: off, length: int(end - off)}) {
					return
				}
				off = end
			}
		}
	}
}

// source fills p with the image's bytes of a piece behind the head.
func (w *writer) source(c piece, p []byte) error {
	e := w.im.Extents[c.extent]
	if err := e.read(p[:c.length], c.offset-e.Offset); err != nil {
		return at(c.extent, c.offset, err)
	}
	return nil
}

// load is a piece on its way, with its bytes.
type load struct {
	piece
	data []byte
	hash []byte // what of data the image's digest is made of
	zero bool
	sum  uint64       // of data
	uses atomic.Int32 // by the hash and by the disk; then the buffer is free

	// What came of writing it.
	began, ended                        time.Time
	written, zeroed, skipped, rewritten int64
	compared                            int64 // bytes; negative: was not
}

func (w *writer) release(l *load) {
	if l.uses.Add(-1) == 0 {
		w.buffers <- l.data[:chunkSize]
	}
}

// hashing hashes loads in the order in which they are sent, until the channel is closed.
func (w *writer) hashing(h hash.Hash) (in chan<- *load, ended <-chan struct{}) {
	loads, done := make(chan *load, mostBuffers), make(chan struct{})
	go func() {
		defer close(done)
		for l := range loads {
			h.Write(l.hash)
			w.release(l)
		}
	}()
	return loads, done
}

// filling reads the image's source, piece by piece, and gives each to the hash and
// to the disk. It ends with the image, an error or ctx.
func (w *writer) filling(ctx context.Context, toHash chan<- *load) (toDisk <-chan *load, ended <-chan error) {
	loads, result := make(chan *load), make(chan error, 1)
	go func() {
		var err error
		defer func() {
			close(toHash)
			result <- err
			close(loads)
		}()
		buffer := func() ([]byte, error) {
			select {
			case buf := <-w.buffers:
				return buf, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		give := func(c piece, buf []byte) error {
			l := &load{piece: c, data: buf[:c.length]}
			l.hash = l.data[:w.counted(c)]
			l.sum = maphash.Bytes(w.seed, l.data)
			w.sums = append(w.sums, l.sum)
			l.zero = allZero(l.data)
			l.uses.Store(2)
			toHash <- l // there is room for every buffer
			select {
			case loads <- l:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if w.stream != nil {
			err = w.streamPieces(buffer, give)
			return
		}
		for c := range w.pieces() {
			buf, why := buffer()
			if why == nil {
				why = w.source(c, buf)
			}
			if why == nil {
				why = give(c, buf)
			}
			if err = why; err != nil {
				return
			}
		}
	}()
	return loads, result
}

// counted is how many bytes of the piece are in the image's digest: all, but for
// what follows the end of a stream.
func (w *writer) counted(c piece) int {
	if w.stream == nil {
		return c.length
	}
	return int(max(0, min(int64(c.length), w.stream.length-c.offset)))
}

// flushed is the end of a flush.
type flushed struct {
	landed int64 // what had reached the disk when it began
	took   time.Duration
	err    error
}

// writing is the state of writeRest. One goroutine has it, and decides and counts;
// others read, hash and write.
type writing struct {
	*writer
	pace  pace
	delta delta

	loads   <-chan *load // nil: none comes any more
	put     chan *load
	flushes chan flushed

	active          int   // loads on their way to the disk
	flushing        bool  // a flush is
	landed, durable int64 // bytes, of Written and Zeroed
	flushedAt       time.Time
	pause           time.Duration // from one flush to the next
	noZeroing       atomic.Bool
	failed          error
	failedAt        int64 // where, if it is the error of a load
}

// writeRest writes what lies behind the head, hashes it, and flushes the disk.
func (w *writer) writeRest(ctx context.Context, h hash.Hash) error {
	// What has begun when something fails is brought to its end, so that the first
	// place that fails is known; what is left alone then begins nothing more.
	storing, stop := context.WithCancel(ctx)
	defer stop()
	source, stopSource := context.WithCancel(ctx)
	defer stopSource()
	toHash, hashed := w.hashing(h)
	loads, filled := w.filling(source, toHash)
	p := &writing{writer: w, pace: newPace(), loads: loads, put: make(chan *load, mostInFlight), flushes: make(chan flushed, 1),
		flushedAt: time.Now(), pause: leastFlushGap}
	watch := time.NewTicker(tick)
	defer watch.Stop()
	looked := time.Now()
	p.tell()
	for over := false; !over && p.failed == nil; {
		in := p.loads
		if p.active >= p.pace.limit {
			in = nil
		}
		select {
		case l, more := <-in:
			if more {
				p.start(storing, l)
			} else {
				p.loads = nil
				p.failed = <-filled
			}
		case l := <-p.put:
			p.arrived(l)
			w.release(l)
		case f := <-p.flushes:
			p.flushed(f)
			over = p.idle() && p.durable == p.landed
		case now := <-watch.C:
			if p.landed > p.durable && now.Sub(p.flushedAt) >= p.pause {
				p.flush()
			}
			if now.Sub(looked) >= presenceInterval {
				p.failed, looked = w.dev.gone(), now
			}
		case <-ctx.Done():
			p.failed = ctx.Err()
		}
		if p.idle() && !over && p.failed == nil {
			p.flush()
		}
	}
	if p.failed != nil {
		stopSource()
		return p.settle()
	}
	<-hashed
	return ctx.Err()
}

// idle tells whether all that there is was given to the disk.
func (p *writing) idle() bool { return p.loads == nil && p.active == 0 }

func (p *writing) tell() {
	done := p.durable + p.res.Skipped
	if p.stream != nil && p.loads != nil { // its length is not known yet
		total := p.stream.expected()
		if total > 0 {
			total = max(done, total-int64(len(p.head)))
		}
		p.progress(PhaseWrite, done, total)
		return
	}
	p.progress(PhaseWrite, done, p.rest)
}

func (p *writing) start(ctx context.Context, l *load) {
	p.active++
	l.compared = -1
	if !p.blank && p.delta.next() {
		l.compared = 0
	}
	go func() {
		p.store(ctx, l, &p.noZeroing)
		p.put <- l
	}()
}

// arrived takes in what came of a load.
func (p *writing) arrived(l *load) {
	p.active--
	p.res.Written += l.written
	p.res.Zeroed += l.zeroed
	p.res.Skipped += l.skipped
	p.res.Compared += max(0, l.compared)
	p.res.Rewritten += l.rewritten
	p.landed += l.written + l.zeroed
	if l.written > 0 {
		p.pace.wrote(l.began, l.ended)
	}
	if l.compared >= 0 {
		p.delta.saw(l.skipped > 0)
	}
	// The first place that failed is the one to tell.
	if l.err != nil && (p.failed == nil || l.offset < p.failedAt && FaultOf(l.err) == FaultOf(p.failed)) {
		p.failed, p.failedAt = at(l.extent, l.offset, l.err), l.offset
	}
	if l.skipped > 0 {
		p.tell()
	}
}

// flush begins a flush, unless one is under way.
func (p *writing) flush() {
	if p.flushing {
		return
	}
	p.flushing = true
	landed, began := p.landed, time.Now()
	go func() {
		err := p.dev.flush()
		p.flushes <- flushed{landed, time.Since(began), err}
	}()
}

func (p *writing) flushed(f flushed) {
	p.flushing = false
	if p.failed = f.err; f.err != nil {
		return
	}
	p.durable, p.flushedAt, p.pause = f.landed, time.Now(), flushGap(f.took)
	p.tell()
}

// settle waits for what is in flight after a failure, so that nothing of it
// comes after what is written next; but not for ever. It returns the failure.
func (p *writing) settle() error {
	patient := time.After(patience)
	for p.active > 0 || p.flushing {
		select {
		case l := <-p.put:
			p.arrived(l)
		case <-p.flushes:
			p.flushing = false
		case <-patient:
			return stalled(p.failed)
		}
	}
	for p.loads != nil { // the source may still be read, which writes nothing
		select {
		case _, more := <-p.loads:
			if !more {
				p.loads = nil
			}
		case <-patient:
			return p.failed
		}
	}
	return p.failed
}

// store makes the disk hold the load, by the least that does it. It begins nothing
// new once ctx is over.
func (w *writer) store(ctx context.Context, l *load, noZeroing *atomic.Bool) {
	n := int64(l.length)
	if l.zero && w.blank {
		l.skipped = n
		return
	}
	if l.compared >= 0 {
		var same bool
		if same, l.compared = w.holds(ctx, l); same {
			l.skipped = n
			return
		}
	}
	if l.err = ctx.Err(); l.err != nil {
		return
	}
	if z, ok := w.dev.Disk.(zeroer); ok && l.zero && !noZeroing.Load() {
		done, err := z.ZeroRange(l.offset, n)
		if done && err == nil {
			l.zeroed = n
			return
		}
		// It can't, or it failed: then writing tells what is wrong.
		noZeroing.Store(true)
	}
	l.began = time.Now()
	l.err = w.dev.write(l.data, l.offset)
	if FaultOf(l.err) == FaultWrite && ctx.Err() == nil {
		l.rewritten = n
		l.err = w.dev.write(l.data, l.offset)
	}
	l.ended = time.Now()
	if l.err == nil {
		l.written = n
	}
}

// holds tells whether the disk has the load's bytes already, and how many were
// read for that. What can't be read is to be written: that may mend it.
func (w *writer) holds(ctx context.Context, l *load) (same bool, looked int64) {
	had := <-w.scratch
	defer func() { w.scratch <- had }()
	step := firstLook
	for off := 0; off < l.length; step = compareStep {
		p := had[:min(step, l.length-off)]
		if ctx.Err() != nil || w.dev.read(p, l.offset+int64(off)) != nil {
			return false, looked
		}
		looked += int64(len(p))
		if !bytes.Equal(p, l.data[off:off+len(p)]) {
			return false, looked
		}
		off += len(p)
	}
	return true, looked
}

// errDiffers says that a piece came back other than it was written.
var errDiffers = errors.New("other bytes came back")

// readRest reads what lies behind the head, hashes it in its order, and returns
// the pieces that came back wrong, sorted. With more of them than can be mended it ends
// early.
func (w *writer) readRest(ctx context.Context, h hash.Hash) (bad []piece, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	toHash, hashed := w.hashing(h)
	defer func() { close(toHash); <-hashed }()
	next, end := iter.Pull(w.pieces())
	defer end()

	got := make(chan *load, mostReads)
	early := map[int]*load{} // read before their turn to be hashed
	turn, active, unreadable := 0, 0, 0
	watch := time.NewTicker(presenceInterval)
	defer watch.Stop()
	c, more := next()
	for (more || active > 0) && err == nil {
		buffers := w.buffers
		if active == mostReads || !more {
			buffers = nil
		}
		select {
		case buf := <-buffers:
			l := &load{piece: c, data: buf[:c.length], hash: buf[:w.counted(c)]}
			l.uses.Store(1)
			active++
			go func() {
				if l.err = w.dev.read(l.data, l.offset); l.err == nil {
					l.sum = maphash.Bytes(w.seed, l.data)
				}
				got <- l
			}()
			c, more = next()
		case l := <-got:
			active--
			switch {
			case l.err == nil && l.sum == w.sums[l.number]:
				w.done += int64(l.length)
				w.progress(PhaseReadBack, w.done, w.total)
			case l.err == nil:
				l.err = errDiffers
			case FaultOf(l.err) == FaultRead:
				unreadable++
			default:
				err = at(l.extent, l.offset, l.err)
			}
			if l.err != nil {
				bad = append(bad, l.piece)
				more = more && unreadable < mostUnreadable && length(bad) <= mostRepaired
			}
			for early[l.number] = l; early[turn] != nil; turn++ {
				toHash <- early[turn] // there is room for every buffer
				delete(early, turn)
			}
		case <-watch.C:
			err = w.dev.gone()
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	for patient := time.After(patience); active > 0; {
		select {
		case <-got:
			active--
		case <-patient:
			return nil, stalled(err)
		}
	}
	slices.SortFunc(bad, func(a, b piece) int { return cmp.Compare(a.number, b.number) })
	return bad, err
}

func allZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}
