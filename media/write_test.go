package media

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

const mib = 1 << 20

var errDisk = errors.New("input/output error")

// memDisk is a disk in memory that records each write and fails as told.
type memDisk struct {
	data   []byte
	synced bool
	log    []op

	failWrite int          // the n-th write fails, from 1; 0: none
	failSync  int          // likewise
	failRead  int          // likewise
	broken    bool         // once failed, every later write fails too
	flip      int64        // a byte that reads back with one bit flipped, -1: none
	dropFrom  int64        // writes behind it are lost, -1: none
	wrapAt    int64        // the real size, at which offsets wrap, 0: none
	onWrite   func(op int) // called before the n-th write

	writes, syncs, reads int
	failed               bool
}

type op struct {
	sync     bool
	off, len int64
	zero     bool
}

func newMemDisk(size int64) *memDisk {
	old := bytes.Repeat([]byte{0xA5}, int(size)) // what was there before
	return &memDisk{data: old, flip: -1, dropFrom: -1}
}

func (d *memDisk) WriteAt(p []byte, off int64) (int, error) {
	d.writes++
	if d.onWrite != nil {
		d.onWrite(d.writes)
	}
	if d.writes == d.failWrite || d.failed && d.broken {
		d.failed = true
		return 0, errDisk
	}
	d.synced = false
	d.log = append(d.log, op{off: off, len: int64(len(p)), zero: allZero(p)})
	if d.dropFrom < 0 && d.wrapAt == 0 {
		return copy(d.data[off:], p), nil
	}
	for i, b := range p {
		at := off + int64(i)
		if d.dropFrom >= 0 && at >= d.dropFrom {
			continue
		}
		if d.wrapAt > 0 {
			at %= d.wrapAt
		}
		d.data[at] = b
	}
	return len(p), nil
}

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.reads++; d.reads == d.failRead {
		return 0, errDisk
	}
	if !d.synced {
		return 0, errors.New("test: read before sync")
	}
	if off >= int64(len(d.data)) {
		return 0, io.EOF
	}
	if d.wrapAt > 0 {
		for i := range p {
			p[i] = d.data[(off+int64(i))%d.wrapAt]
		}
		return len(p), nil
	}
	n := copy(p, d.data[off:])
	if d.flip >= off && d.flip < off+int64(n) {
		p[d.flip-off] ^= 4
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *memDisk) Sync() error {
	d.syncs++
	if d.syncs == d.failSync {
		return errDisk
	}
	d.synced = true
	d.log = append(d.log, op{sync: true})
	return nil
}

func allZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

// testImage has extents of the given offsets and lengths, alternately, filled with
// random bytes.
func testImage(size int64, sector int, offsetsAndLengths ...int64) *Image {
	r := rand.New(rand.NewPCG(1, 2))
	im := &Image{Size: size, SectorSize: sector}
	for i := 0; i < len(offsetsAndLengths); i += 2 {
		p := make([]byte, offsetsAndLengths[i+1])
		for j := 0; j < len(p); j += 8 {
			// Never zero, so that a void is told apart.
			binary.LittleEndian.PutUint64(p[j:], r.Uint64()|0x0101010101010101)
		}
		im.Extents = append(im.Extents, Extent{offsetsAndLengths[i], int64(len(p)), bytes.NewReader(p)})
	}
	return im
}

// images are the layouts that every write test goes over.
func images() map[string]*Image {
	m := map[string]*Image{}
	for _, s := range []int{512, 4096} {
		n := int64(s)
		for name, im := range map[string]*Image{
			"one sector only":          testImage(4*mib, s, 0, n),
			"smaller than the head":    testImage(8*n, s, 0, n, 3*n, 2*n),
			"nothing in the head":      testImage(6*mib, s, mib, 3*mib+n),
			"extent across the head":   testImage(4*mib, s, 0, 2*mib),
			"as a stick":               testImage(8*mib, s, 0, mib, mib, 3*mib+3*n, 6*mib+n, n, 7*mib, mib),
			"head in pieces":           testImage(4*mib, s, 0, 2*n, 5*n, n, 100*n, 3*n, 3*mib, mib),
			"one byte run per a chunk": testImage(8*mib, s, 2*mib, n, 4*mib, n, 6*mib-n, 2*n, 8*mib-n, n),
		} {
			m[fmt.Sprintf("%s, %d", name, s)] = im
		}
	}
	return m
}

func TestWrite(t *testing.T) {
	for name, im := range images() {
		t.Run(name, func(t *testing.T) {
			d := newMemDisk(im.Size)
			var phases []string
			last, totals := map[string]int64{}, map[string]int64{}
			res, err := Write(t.Context(), d, im, func(phase string, done, total int64) {
				if done > total || done < last[phase] {
					t.Errorf("progress %s %d of %d after %d", phase, done, total, last[phase])
				}
				if len(phases) == 0 || phases[len(phases)-1] != phase {
					phases = append(phases, phase)
				}
				last[phase], totals[phase] = done, total
			})
			if err != nil {
				t.Fatal(err)
			}
			want, err := im.Digest(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if res != (Result{im.DataBytes(), want, want}) {
				t.Errorf("result %+v, want %d bytes of %s", res, im.DataBytes(), want)
			}
			if last[PhaseWrite] != totals[PhaseWrite] || last[PhaseReadBack] != totals[PhaseReadBack] || totals[PhaseReadBack] != im.DataBytes() {
				t.Errorf("progress ends at %v of %v, want %d", last, totals, im.DataBytes())
			}
			if !slices.Equal(phases, []string{PhaseWrite, PhaseReadBack}) {
				t.Errorf("phases %v", phases)
			}
			checkContent(t, d, im)
			checkOrder(t, d, im)
		})
	}
}

// checkContent holds d against im; outside the extents the old content stays
// but in the first MiB.
func checkContent(t *testing.T, d *memDisk, im *Image) {
	t.Helper()
	want := bytes.Repeat([]byte{0xA5}, int(im.Size))
	clear(want[:min(mib, im.Size)])
	for _, e := range im.Extents {
		if _, err := e.Content.ReadAt(want[e.Offset:e.End()], 0); err != nil {
			t.Fatal(err)
		}
	}
	if i := firstDifference(d.data, want); i >= 0 {
		t.Errorf("the disk differs from the image at %d", i)
	}
}

// checkOrder asserts the commit order: the void first and synced, the rest,
// a sync, the head, a sync, the first sector alone and last, a sync.
func checkOrder(t *testing.T, d *memDisk, im *Image) {
	t.Helper()
	head := min(mib, im.Size)
	if first := d.log[0]; first.off != 0 || first.len != head || !first.zero || !d.log[1].sync {
		t.Errorf("the run does not begin with a durable void: %+v", d.log[:2])
	}
	var lastRest, firstHead, lastWrite int
	for i, o := range d.log[2:] {
		switch {
		case o.sync:
			continue
		case o.off >= head:
			lastRest = i + 2
			if o.off/chunkSize != (o.off+o.len-1)/chunkSize {
				t.Errorf("write %+v crosses a chunk's end", o)
			}
		case firstHead == 0:
			firstHead = i + 2
		}
		lastWrite = i + 2
	}
	if firstHead != 0 && firstHead < lastRest {
		t.Error("the head was written before the rest")
	}
	if firstHead != 0 && lastRest != 0 && !hasSync(d.log[lastRest:firstHead]) {
		t.Error("no sync between the rest and the head")
	}
	if im.Extents[0].Offset == 0 {
		o := d.log[lastWrite]
		if o.off != 0 || o.len != int64(im.SectorSize) {
			t.Errorf("the last write is %+v, not the first sector", o)
		}
		if firstHead != lastWrite && !hasSync(d.log[firstHead:lastWrite]) {
			t.Error("no sync before the first sector")
		}
	}
	if !d.log[len(d.log)-1].sync {
		t.Error("the run does not end with a sync")
	}
}

func hasSync(log []op) bool {
	for _, o := range log {
		if o.sync {
			return true
		}
	}
	return false
}

// checkVoid asserts what every failure leaves: no first sector, durably.
func checkVoid(t *testing.T, d *memDisk, im *Image) {
	t.Helper()
	if !allZero(d.data[:min(mib, im.Size)]) {
		t.Error("the first MiB is not void")
	}
	if !d.log[len(d.log)-1].sync {
		t.Error("the void is not synced")
	}
}

// Each write, each sync and each read fails once, in every layout.
func TestWriteFailsAtEveryStep(t *testing.T) {
	for name, im := range images() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plain := newMemDisk(im.Size)
			if _, err := Write(t.Context(), plain, im, nil); err != nil {
				t.Fatal(err)
			}
			for kind, total := range map[string]int{"write": plain.writes, "sync": plain.syncs, "read": plain.reads} {
				for n := 1; n <= total; n++ {
					d := newMemDisk(im.Size)
					switch kind {
					case "write":
						d.failWrite = n
					case "sync":
						d.failSync = n
					case "read":
						d.failRead = n
					}
					_, err := Write(t.Context(), d, im, nil)
					if !errors.Is(err, errDisk) {
						t.Fatalf("%s %d fails: error %v", kind, n, err)
					}
					checkVoid(t, d, im)
				}
			}
		})
	}
}

func TestWriteCancelled(t *testing.T) {
	im := testImage(16*mib, 512, 0, mib, mib, 5*mib, 9*mib, 2*mib)
	for n := 1; n <= 8; n++ {
		t.Run(fmt.Sprintf("during write %d", n), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			d := newMemDisk(im.Size)
			d.onWrite = func(op int) {
				if op == n {
					cancel()
				}
			}
			_, err := Write(ctx, d, im, nil)
			// Once the head is on its way the write is finished instead.
			if err == nil && n >= 7 {
				checkContent(t, d, im)
				return
			}
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("error %v", err)
			}
			checkVoid(t, d, im)
		})
	}
	t.Run("before the first write nothing is touched", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		d := newMemDisk(im.Size)
		if _, err := Write(ctx, d, im, nil); !errors.Is(err, context.Canceled) || d.writes != 0 {
			t.Errorf("error %v after %d writes", err, d.writes)
		}
	})
	t.Run("during the read-back", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		d := newMemDisk(im.Size)
		_, err := Write(ctx, d, im, func(phase string, done, _ int64) {
			if phase == PhaseReadBack && done > 0 {
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("error %v", err)
		}
		checkVoid(t, d, im)
	})
}

func TestWriteFindsALyingDisk(t *testing.T) {
	im := testImage(16*mib, 512, 0, mib, mib, 5*mib, 9*mib, 2*mib)
	for _, c := range []struct {
		name string
		lie  func(*memDisk)
		at   int64
	}{
		{"a bit flips in the first sector", func(d *memDisk) { d.flip = 3 }, 3},
		{"a bit flips in the head", func(d *memDisk) { d.flip = mib - 1 }, mib - 1},
		{"a bit flips in the first chunk", func(d *memDisk) { d.flip = mib + 5 }, mib + 5},
		{"a bit flips in the last byte", func(d *memDisk) { d.flip = 11*mib - 1 }, 11*mib - 1},
		{"writes are dropped from 3 MiB on", func(d *memDisk) { d.dropFrom = 3*mib + 100 }, 3*mib + 100},
		{"all writes are dropped", func(d *memDisk) { d.dropFrom = 0 }, 0},
		{"the capacity wraps at 8 MiB", func(d *memDisk) { d.wrapAt = 8 * mib }, 1 * mib},
		{"the capacity wraps at 9 MiB, onto the head", func(d *memDisk) { d.wrapAt = 9 * mib }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newMemDisk(im.Size)
			c.lie(d)
			_, err := Write(t.Context(), d, im, nil)
			var mismatch *MismatchError
			if !errors.As(err, &mismatch) || mismatch.Offset != c.at {
				t.Fatalf("error %v, want a mismatch at %d", err, c.at)
			}
			if d.dropFrom != 0 {
				checkVoid(t, d, im)
			}
		})
	}
}

func TestWriteErrors(t *testing.T) {
	im := testImage(16*mib, 512, 0, mib, mib, 512, 2*mib, 512, 3*mib, mib)

	d := newMemDisk(im.Size)
	d.failWrite = 4 // the void and two extents come before
	_, err := Write(t.Context(), d, im, nil)
	if want := "write: extent 3 at 3 MiB: input/output error"; err == nil || err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}

	d = newMemDisk(im.Size)
	d.failWrite, d.broken = 4, true
	_, err = Write(t.Context(), d, im, nil)
	if err == nil || !strings.Contains(err.Error(), "do not boot it") {
		t.Errorf("a disk that can't be made void: error %q does not say so", err)
	}

	for _, at := range []int{0, 3} {
		short := *im
		short.Extents = append([]Extent(nil), im.Extents...)
		short.Extents[at].Content = bytes.NewReader(make([]byte, 700))
		d = newMemDisk(im.Size)
		if _, err := Write(t.Context(), d, &short, nil); !errors.Is(err, ErrShortContent) {
			t.Errorf("source of extent %d too short: error %v", at, err)
		} else if at == 0 && d.writes != 0 {
			t.Error("a source too short in the head was found after the disk was touched")
		} else if at != 0 {
			checkVoid(t, d, im)
		}
	}

	bad := &Image{Size: 512, SectorSize: 512, Extents: []Extent{{Offset: 512, Length: 512, Content: bytes.NewReader(nil)}}}
	d = newMemDisk(512)
	if _, err := Write(t.Context(), d, bad, nil); err == nil || d.writes != 0 {
		t.Errorf("invalid image: error %v after %d writes", err, d.writes)
	}
}

type sizedDisk struct {
	*memDisk
	sector int
}

func (d sizedDisk) Size() int64     { return int64(len(d.data)) }
func (d sizedDisk) SectorSize() int { return d.sector }

func TestWriteChecksTheDisk(t *testing.T) {
	im := testImage(8*mib, 512, 0, mib)
	for name, d := range map[string]sizedDisk{
		"too small":         {newMemDisk(8*mib - 512), 512},
		"other sector size": {newMemDisk(8 * mib), 4096},
	} {
		_, err := Write(t.Context(), d, im, nil)
		if err == nil || d.writes != 0 {
			t.Errorf("%s: error %v after %d writes", name, err, d.writes)
		}
		var space *NoSpaceError
		if errors.As(err, &space) != (name == "too small") {
			t.Errorf("%s: error %v", name, err)
		}
	}
	d := sizedDisk{newMemDisk(9 * mib), 512}
	if _, err := Write(t.Context(), d, im, nil); err != nil {
		t.Errorf("larger disk: %v", err)
	}
}

func TestAlignedBuffer(t *testing.T) {
	for _, n := range []int{512, 4096, chunkSize} {
		b := alignedBuffer(n)
		if len(b) != n || cap(b) != n || !allZero(b) {
			t.Errorf("%d: %d bytes, capacity %d", n, len(b), cap(b))
		}
	}
}
