package initramfs

import (
	"io"
	"math/bits"
)

// blockSize is in bytes what the compressor is handed at once. zstd's blocks
// have as many, so that what it puts out then is of these bytes alone.
const blockSize = 128 << 10

// block collects the archive, which comes in tiny pieces, and hands it on in
// blocks. Who owns which bytes goes to the meter.
type block struct {
	w     io.Writer // the compressor
	meter *meter
	buf   []byte
}

// room is memory that content may be read into before it is written: then it is
// there already. It is never empty.
func (b *block) room() ([]byte, error) {
	if b.buf == nil {
		b.buf = make([]byte, 0, blockSize)
	}
	if len(b.buf) == cap(b.buf) {
		if err := b.flush(); err != nil {
			return nil, err
		}
	}
	return b.buf[len(b.buf):cap(b.buf)], nil
}

func (b *block) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		room, err := b.room()
		if err != nil {
			return n, err
		}
		k := copy(room, p[n:])
		b.buf = b.buf[:len(b.buf)+k]
		b.meter.in(k)
		n += k
	}
	return n, nil
}

func (b *block) flush() error {
	b.meter.compressing()
	_, err := b.w.Write(b.buf)
	b.buf = b.buf[:0]
	return err
}

// meter finds out what each entry costs. A compressor does not tell which of
// its output is of which input; but all that comes out was made of what went in
// since it last put something out, and in that every byte counts the same.
type meter struct {
	owner   int // the entry of the bytes to come
	raw     int64
	costs   []Cost
	waiting []span // of the block that is being filled
	spans   []span // what went into the compressor since the last settling
	out     int64  // bytes that came out of it since
}

type span struct {
	owner int
	size  int64
}

// in takes note of n more bytes of the archive.
func (m *meter) in(n int) {
	m.raw += int64(n)
	m.costs[m.owner].Raw += int64(n)
	if last := len(m.waiting) - 1; last >= 0 && m.waiting[last].owner == m.owner {
		m.waiting[last].size += int64(n)
		return
	}
	m.waiting = append(m.waiting, span{m.owner, int64(n)})
}

// compressing is called before a block goes into the compressor.
func (m *meter) compressing() {
	m.settle()
	m.spans = append(m.spans, m.waiting...)
	m.waiting = m.waiting[:0]
}

// settle divides what came out among what went in. Each end of a span is
// rounded, not each share, so that the shares sum up to the whole.
func (m *meter) settle() {
	total := uint64(0)
	for _, s := range m.spans {
		total += uint64(s.size)
	}
	if m.out == 0 || total == 0 {
		return
	}
	in, before := uint64(0), int64(0)
	for _, s := range m.spans {
		in += uint64(s.size)
		high, low := bits.Mul64(uint64(m.out), in)
		until, _ := bits.Div64(high, low, total)
		m.costs[s.owner].Compressed += int64(until) - before
		before = int64(until)
	}
	m.spans, m.out = m.spans[:0], 0
}

// output is where the compressor writes.
type output struct {
	w     io.Writer
	meter *meter
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	o.meter.out += int64(n)
	return n, err
}
