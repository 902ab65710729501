package media

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const mib = 1 << 20

// errDisk is what a failing test disk says.
var errDisk = errors.New("input/output error")

func TestMain(m *testing.M) {
	if path := os.Getenv(killedChild); path != "" {
		writeUntilKilled(path)
	}
	patience, presenceInterval = 300*time.Millisecond, 50*time.Millisecond
	os.Exit(m.Run())
}

// memDisk is a disk in memory that records each write and fails as told.
type memDisk struct {
	mu    sync.Mutex
	data  []byte
	dirty []op // written since the last sync
	log   []op

	failWrite int                       // the n-th write fails, from 1; 0: none
	failSync  int                       // likewise
	failRead  int                       // likewise
	broken    bool                      // once failed, every later write fails too
	flip      int64                     // a byte that reads back with one bit flipped, -1: none
	dropFrom  int64                     // writes behind it are lost, -1: none
	wrapAt    int64                     // the real size, at which offsets wrap, 0: none
	onWrite   func(n int)               // called before the n-th write
	onCall    func(c call) (int, error) // fails a call after so many bytes

	writes, syncs, reads int
	failed               bool
}

type op struct {
	sync     bool
	off, len int64
	zero     bool
}

// call is one call of a disk.
type call struct {
	kind   string // read, write, sync
	off, n int64
}

func (c call) touches(off int64) bool { return c.kind != "sync" && off >= c.off && off < c.off+c.n }

func newMemDisk(size int64) *memDisk {
	old := bytes.Repeat([]byte{0xA5}, int(size)) // what was there before
	return &memDisk{data: old, flip: -1, dropFrom: -1}
}

func (d *memDisk) WriteAt(p []byte, off int64) (int, error) {
	if d.onCall != nil {
		if n, err := d.onCall(call{"write", off, int64(len(p))}); err != nil {
			return n, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.writes++
	if d.onWrite != nil {
		d.onWrite(d.writes)
	}
	if d.writes == d.failWrite || d.failed && d.broken {
		d.failed = true
		return 0, errDisk
	}
	o := op{off: off, len: int64(len(p)), zero: allZero(p)}
	d.dirty = append(d.dirty, o)
	d.log = append(d.log, o)
	for i := 0; i < len(p); {
		at, n := off+int64(i), len(p)-i
		if d.dropFrom >= 0 {
			if at >= d.dropFrom {
				break
			}
			n = int(min(int64(n), d.dropFrom-at))
		}
		if d.wrapAt > 0 {
			at %= d.wrapAt
			n = int(min(int64(n), d.wrapAt-at))
		}
		i += copy(d.data[at:], p[i:i+n])
	}
	return len(p), nil
}

func (d *memDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.onCall != nil {
		if n, err := d.onCall(call{"read", off, int64(len(p))}); err != nil {
			return n, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reads++; d.reads == d.failRead {
		return 0, errDisk
	}
	for _, o := range d.dirty {
		if off < o.off+o.len && o.off < off+int64(len(p)) {
			return 0, errors.New("test: read before sync")
		}
	}
	if off >= int64(len(d.data)) {
		return 0, io.EOF
	}
	n := 0
	for n < len(p) && off+int64(n) < int64(len(d.data)) {
		at, end := off+int64(n), int64(len(d.data))
		if d.wrapAt > 0 {
			at, end = at%d.wrapAt, d.wrapAt
		}
		n += copy(p[n:], d.data[at:end])
	}
	if d.flip >= off && d.flip < off+int64(n) {
		p[d.flip-off] ^= 4
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *memDisk) Sync() error {
	if d.onCall != nil {
		if _, err := d.onCall(call{kind: "sync"}); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.syncs++
	if d.syncs == d.failSync {
		return errDisk
	}
	d.dirty = nil
	d.log = append(d.log, op{sync: true})
	return nil
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

// behindHead is how many bytes of data im has behind the first MiB.
func behindHead(im *Image) (n int64) {
	for _, e := range im.Extents {
		n += max(0, e.End()-max(e.Offset, mib))
	}
	return n
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
			rest := behindHead(im)
			compared := res.Compared
			res.Compared = 0
			if res != (Result{Bytes: im.DataBytes(), DigestWritten: want, DigestRead: want, Begun: true, Written: rest, Head: im.DataBytes() - rest}) {
				t.Errorf("result %+v, want %d bytes of %s", res, im.DataBytes(), want)
			}
			if compared > rest {
				t.Errorf("%d bytes compared", compared)
			}
			if last[PhaseWrite] != rest || totals[PhaseWrite] != rest || last[PhaseReadBack] != im.DataBytes() || totals[PhaseReadBack] != im.DataBytes() {
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

// firstDifference is the index of the first byte in which a and b, of the same
// length, differ, or -1.
func firstDifference(a, b []byte) int {
	_, first := differingBits(a, b)
	return int(first)
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

func hasSync(log []op) bool { return slices.ContainsFunc(log, func(o op) bool { return o.sync }) }

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

// Each write, each sync and each read fails once, in every layout: what can be
// done again is, anything else is an error that leaves the disk void.
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
					res, err := Write(t.Context(), d, im, nil)
					if err == nil && kind != "sync" {
						if kind == "write" && res.Rewritten == 0 {
							t.Errorf("write %d fails: no error, and nothing rewritten", n)
						}
						checkContent(t, d, im)
						continue
					}
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
	for n := 1; n <= 10; n++ {
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
			if n >= 9 {
				if err != nil {
					t.Fatal(err)
				}
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

func TestWriteErrors(t *testing.T) {
	im := testImage(16*mib, 512, 0, mib, mib, 512, 2*mib, 512, 3*mib, mib)

	d := newMemDisk(im.Size)
	d.onCall = func(c call) (int, error) {
		if c.kind == "write" && c.touches(3*mib) {
			return 0, errDisk
		}
		return 0, nil
	}
	_, err := Write(t.Context(), d, im, nil)
	if want := "write: extent 3 at 3 MiB: the disk can't write 1048576 bytes at byte 3145728: it is faulty, use another one: input/output error"; err == nil || err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
	checkVoid(t, d, im)

	// From the head on everything fails.
	d = newMemDisk(im.Size)
	d.failWrite, d.broken = 5, true
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

// zeroDisk zeroes by itself where it can.
type zeroDisk struct {
	*memDisk
	can   bool
	calls int
}

func (d *zeroDisk) ZeroRange(off, n int64) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls++
	if !d.can {
		return false, nil
	}
	clear(d.data[off : off+n])
	return true, nil
}

// withZeros is an image of which one extent is zeros for 5 MiB.
func withZeros() *Image {
	im := testImage(16*mib, 512, 0, mib, mib, mib)
	return im.with(Extent{3 * mib, 5 * mib, bytes.NewReader(make([]byte, 5*mib))})
}

func (im *Image) with(e Extent) *Image {
	im.Extents = append(im.Extents, e)
	return im
}

func TestZeroRanges(t *testing.T) {
	for _, can := range []bool{true, false} {
		im := withZeros()
		d := &zeroDisk{memDisk: newMemDisk(im.Size), can: can}
		res, err := Write(t.Context(), d, im, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkContent(t, d.memDisk, im)
		if can && (res.Zeroed != 5*mib || res.Written != mib) {
			t.Errorf("the disk zeroes: %+v", res)
		}
		if !can && (res.Zeroed != 0 || res.Written != 6*mib || d.calls > mostInFlight) {
			t.Errorf("the disk does not zero, after %d calls: %+v", d.calls, res)
		}
	}
}

func TestZerosOnALyingDisk(t *testing.T) {
	im := withZeros()
	d := &lyingZeros{newMemDisk(im.Size)}
	res, err := Write(t.Context(), d, im, nil)
	if err != nil || res.Rewritten != 5*mib {
		t.Errorf("zeros that are none are not mended: %+v, %v", res, err)
	}
	checkContent(t, d.memDisk, im)
}

type lyingZeros struct{ *memDisk }

func (lyingZeros) ZeroRange(int64, int64) (bool, error) { return true, nil }

// A rewrite of the same image writes no data; one of another image next to
// that reads next to nothing.
func TestDeltaRewrite(t *testing.T) {
	im := testImage(64*mib, 512, 0, mib, mib, 60*mib, 63*mib, mib)
	d := newMemDisk(im.Size)
	first, err := Write(t.Context(), d, im, nil)
	if err != nil {
		t.Fatal(err)
	}
	if first.Written != 61*mib || first.Compared > mib {
		t.Errorf("on another disk: %+v", first)
	}
	again, err := Write(t.Context(), d, im, nil)
	if err != nil {
		t.Fatal(err)
	}
	if again.Written != 0 || again.Skipped != 61*mib || again.Compared != 61*mib || again.Head != mib || again.DigestRead != first.DigestRead {
		t.Errorf("the same again: %+v", again)
	}
	d.data[30*mib+777] ^= 1
	clear(d.data[:mib]) // as after a crash
	changed, err := Write(t.Context(), d, im, nil)
	if err != nil {
		t.Fatal(err)
	}
	if changed.Written != mib || changed.Skipped != 60*mib {
		t.Errorf("one byte changed: %+v", changed)
	}
	checkContent(t, d, im)
}

// hungDisk does not give calls back until it is let go.
type hungDisk struct {
	*memDisk
	letGo chan struct{}
	gone  bool
}

func (d *hungDisk) Present() error {
	if d.gone {
		return unix.ENODEV
	}
	return nil
}

// A disk that does not answer holds up nobody, and what comes late does no harm.
func TestWriteOnADiskThatHangs(t *testing.T) {
	im := testImage(16*mib, 512, 0, mib, mib, 5*mib, 9*mib, 2*mib)
	for _, c := range []struct {
		name  string
		hangs func(c call, seen int) bool
	}{
		{"the void", func(c call, _ int) bool { return c.kind == "write" && c.off == 0 }},
		{"a write", func(c call, _ int) bool { return c.kind == "write" && c.touches(3*mib) }},
		{"all writes", func(c call, _ int) bool { return c.kind == "write" && c.off >= mib }},
		{"the last flush of data", func(c call, seen int) bool { return c.kind == "sync" && seen > 6 }},
		{"a comparing read", func(c call, _ int) bool { return c.kind == "read" && c.n == firstLook && c.touches(mib) }},
		{"the read-back", func(c call, _ int) bool { return c.kind == "read" && c.n == chunkSize && c.touches(5*mib) }},
		{"a write of the head", func(c call, seen int) bool { return c.kind == "write" && c.off == 512 }},
	} {
		for _, gone := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, unplugged %v", c.name, gone), func(t *testing.T) {
				t.Parallel()
				d := &hungDisk{memDisk: newMemDisk(im.Size), letGo: make(chan struct{}), gone: gone}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var mu sync.Mutex
				seen := 0
				var late atomic.Int64
				hung := make(chan struct{})
				once := sync.OnceFunc(func() { close(hung) })
				d.onCall = func(k call) (int, error) {
					mu.Lock()
					hang := c.hangs(k, seen)
					seen++
					mu.Unlock()
					if hang {
						late.Add(1)
						defer late.Add(-1)
						once()
						<-d.letGo
					}
					return 0, nil
				}
				if !gone {
					go func() { <-hung; cancel() }()
				}
				began := time.Now()
				_, err := Write(ctx, d, im, nil)
				took := time.Since(began)
				if took > 5*time.Second {
					t.Errorf("took %v", took)
				}
				want := FaultStalled
				if gone {
					want = FaultGone
				} else if !errors.Is(err, context.Canceled) {
					t.Errorf("error %v is no cancel", err)
				}
				if FaultOf(err) != want {
					t.Errorf("error %v", err)
				}
				// What is let go late must neither be followed by more nor make the disk boot.
				d.mu.Lock()
				writes := d.writes
				d.mu.Unlock()
				mu.Lock()
				calls := seen
				mu.Unlock()
				close(d.letGo)
				for late.Load() > 0 {
					time.Sleep(time.Millisecond)
				}
				time.Sleep(20 * time.Millisecond)
				mu.Lock()
				if seen != calls {
					t.Errorf("%d calls after the end", seen-calls)
				}
				mu.Unlock()
				d.mu.Lock()
				defer d.mu.Unlock()
				if d.writes > writes+mostInFlight {
					t.Errorf("%d writes after the end", d.writes-writes)
				}
				// The void is under way at least; a head that was waited for lacks its first sector.
				if c.name != "the void" && !allZero(d.data[:512]) {
					t.Error("the first sector is not void")
				}
			})
		}
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

// Random images on random old contents: the disk holds the image afterwards,
// and a second write finds all of it there.
func FuzzWrite(f *testing.F) {
	f.Add(uint64(1), uint8(5), uint8(0))
	f.Add(uint64(2), uint8(1), uint8(255))
	f.Add(uint64(3), uint8(30), uint8(0x5a))
	f.Fuzz(func(t *testing.T, seed uint64, extents, kind uint8) {
		r := rand.New(rand.NewPCG(seed, 3))
		sector := []int{512, 4096}[kind&1]
		size := (1 + r.Int64N(7*mib/int64(sector))) * int64(sector)
		im := &Image{Size: size, SectorSize: sector}
		for off := int64(0); len(im.Extents) < int(extents%40) && off < size; {
			off += r.Int64N(1+min(size-off, mib)/int64(sector)) * int64(sector)
			n := r.Int64N(1+min(size-off, 5*mib/2)/int64(sector)) * int64(sector)
			if n == 0 {
				continue
			}
			p := make([]byte, n)
			switch r.IntN(4) {
			case 0: // zeros
			case 1: // zeros but for a byte
				p[r.IntN(len(p))] = 1
			default:
				fillMark(p, r.Uint64())
			}
			im.Extents = append(im.Extents, Extent{off, n, bytes.NewReader(p)})
			off += n
		}
		d := &zeroDisk{memDisk: newMemDisk(size), can: kind&2 != 0}
		switch kind >> 2 & 3 {
		case 0:
			clear(d.data)
		case 1:
			fillMark(d.data, seed)
		case 2: // the image itself, with holes
			_, _ = im.ReadAt(d.data, 0)
			for range 5 {
				at := r.Int64N(size)
				clear(d.data[at:min(size, at+r.Int64N(mib))])
			}
		}
		want := bytes.Clone(d.data)
		clear(want[:min(mib, size)])
		for _, e := range im.Extents {
			_, _ = e.Content.ReadAt(want[e.Offset:e.End()], 0)
		}
		rest := behindHead(im)
		res, err := Write(t.Context(), d, im, nil)
		if err != nil {
			t.Fatal(err)
		}
		if i := firstDifference(d.data, want); i >= 0 {
			t.Fatalf("the disk is wrong at %d", i)
		}
		if res.Written+res.Zeroed+res.Skipped != rest || res.Rewritten != 0 || res.DigestRead != res.DigestWritten {
			t.Errorf("result %+v of %d", res, rest)
		}
		again, err := Write(t.Context(), d, im, nil)
		if err != nil || again.Skipped != rest {
			t.Errorf("again: %+v of %d, %v", again, rest, err)
		}
	})
}
