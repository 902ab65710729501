package media

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// faultImage has data in the head, in the middle and at the disk's end.
func faultImage(sector int) *Image {
	return testImage(16*mib, sector, 0, mib, 2*mib, 3*mib, 8*mib, mib, 15*mib, mib)
}

// Every fault at every place: it is found, named, told with what to do, and the disk does
// not boot.
func TestFaultMatrix(t *testing.T) {
	type place struct {
		name string
		at   int64 // bytes
	}
	places := []place{{"first", 0}, {"middle", 3 * mib}, {"last", 15*mib + 512<<10}}
	fails := func(kind string, off int64, err error) func(call) (int, error) {
		return func(c call) (int, error) {
			if c.kind == kind && c.touches(off) {
				return 0, err
			}
			return 0, nil
		}
	}
	type want struct {
		fault    Fault
		offset   int64
		capacity int64 // of a mismatch
		says     string
		live     bool // the head can't be made void: says so, or was not touched
	}
	for _, fault := range []struct {
		name  string
		apply func(d *memDisk, at int64) want
	}{
		{"flip", func(d *memDisk, at int64) want {
			d.flip = at + 5
			return want{fault: FaultFlipped, offset: at + 5, says: "1 flipped bits"}
		}},
		{"drop", func(d *memDisk, at int64) want {
			d.dropFrom = at
			w := want{fault: FaultDropped, offset: at, says: "use another one", live: at == 0}
			if at == 3*mib { // several pieces, up to the end
				w.capacity = at
				w.says = "it holds 3 MiB"
			}
			return w
		}},
		{"wrap", func(d *memDisk, at int64) want {
			d.wrapAt = map[int64]int64{0: 8 * mib, 3 * mib: 6 * mib, 15*mib + 512<<10: 12 * mib}[at]
			off := map[int64]int64{0: 0, 3 * mib: 2 * mib, 15*mib + 512<<10: 3 * mib}[at]
			return want{fault: FaultWraps, offset: off, capacity: d.wrapAt, says: "capacity is faked"}
		}},
		{"EIO read", func(d *memDisk, at int64) want {
			d.onCall = fails("read", at+4096, unix.EIO)
			w := want{fault: FaultRead, offset: at + 4096, says: "can't read"}
			if at == 0 {
				w.offset = 0 // the head is one piece
			}
			return w
		}},
		{"EIO write", func(d *memDisk, at int64) want {
			d.onCall = fails("write", at, unix.EIO)
			return want{fault: FaultWrite, offset: at / mib * mib, says: "can't write", live: at == 0}
		}},
		{"short", func(d *memDisk, at int64) want {
			end := at + 8192
			d.onCall = func(c call) (int, error) {
				switch n := max(0, end-c.off); {
				case c.kind == "sync" || n >= c.n:
					return 0, nil
				case c.kind == "write":
					return int(n), unix.ENOSPC
				default:
					return int(n), nil
				}
			}
			return want{fault: FaultShort, offset: end, says: fmt.Sprintf("ends at byte %d", end), live: at == 0}
		}},
		{"read-only", func(d *memDisk, at int64) want {
			var turned atomic.Bool
			d.onCall = func(c call) (int, error) {
				if c.kind == "write" && (turned.Load() || c.touches(at)) {
					turned.Store(true)
					return 0, unix.EROFS
				}
				return 0, nil
			}
			return want{fault: FaultReadOnly, offset: -1, says: "lock switch", live: at == 0}
		}},
		{"slow", func(d *memDisk, at int64) want {
			d.onCall = func(c call) (int, error) {
				if c.touches(at) {
					time.Sleep(30 * time.Millisecond)
				}
				return 0, nil
			}
			return want{}
		}},
		{"gone during the write", func(d *memDisk, at int64) want {
			var gone atomic.Bool
			d.onCall = func(c call) (int, error) {
				if gone.Load() || c.kind == "write" && c.touches(at) {
					gone.Store(true)
					return 0, unix.ENODEV
				}
				return 0, nil
			}
			return want{fault: FaultGone, offset: -1, says: "plug it in again", live: at == 0}
		}},
		{"gone during the read-back", func(d *memDisk, at int64) want {
			var gone atomic.Bool
			d.onCall = func(c call) (int, error) {
				if gone.Load() || c.kind == "read" && (c.n > compareStep || at == 0) && c.touches(at) {
					gone.Store(true)
					return 0, unix.ENXIO
				}
				return 0, nil
			}
			return want{fault: FaultGone, offset: -1, says: "plug it in again"}
		}},
	} {
		for _, p := range places {
			for _, sector := range []int{512, 4096} {
				t.Run(fmt.Sprintf("%s, %s, %d", fault.name, p.name, sector), func(t *testing.T) {
					t.Parallel()
					im := faultImage(sector)
					d := newMemDisk(im.Size)
					want := fault.apply(d, p.at)
					if (want.fault == FaultRead) && sector == 4096 {
						want.offset = want.offset / 4096 * 4096
					}
					res, err := Write(t.Context(), d, im, nil)
					if want.fault == "" {
						if err != nil || res.Bytes != im.DataBytes() {
							t.Errorf("%+v, %v", res, err)
						}
						checkContent(t, d, im)
						return
					}
					if FaultOf(err) != want.fault || !strings.Contains(err.Error(), want.says) {
						t.Fatalf("error %v, want %s, %q", err, want.fault, want.says)
					}
					var mismatch *MismatchError
					var device *DeviceError
					switch {
					case errors.As(err, &mismatch):
						if mismatch.Fault == FaultWraps { // which of the two was written last is not said
							if low := min(mismatch.Offset, mismatch.From); low != want.offset || max(mismatch.Offset, mismatch.From) != low+want.capacity || mismatch.Capacity != want.capacity {
								t.Errorf("%+v, want %+v", mismatch, want)
							}
						} else if mismatch.Offset != want.offset || mismatch.Capacity != want.capacity {
							t.Errorf("%+v, want %+v", mismatch, want)
						}
					case errors.As(err, &device):
						if device.Offset != want.offset && want.offset >= 0 {
							t.Errorf("%+v, want %+v", device, want)
						}
					}
					if res.DigestRead != "" {
						t.Errorf("proven: %+v", res)
					}
					if !want.live && !allZero(d.data[:mib]) {
						t.Error("the first MiB is not void")
					}
					if bytes.Equal(d.data[:sector], mustRead(t, im, 0, sector)) {
						t.Error("the first sector is ours")
					}
				})
			}
		}
	}
}

func mustRead(t *testing.T, im *Image, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := im.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	return p
}

// What fails once is done once more, and the result says so.
func TestFailsOnce(t *testing.T) {
	for name, broken := range map[string]func(d *memDisk, c call) error{
		"a write that fails": func(_ *memDisk, c call) error {
			if c.kind == "write" && c.touches(3*mib) {
				return unix.EIO
			}
			return nil
		},
		"a place that can't be read until it is written": func(_ *memDisk, c call) error {
			if c.kind == "read" && c.n > compareStep && c.touches(4*mib) {
				return unix.EIO
			}
			return nil
		},
		"a bit that flips on the way": func(d *memDisk, c call) error {
			if c.kind == "read" && c.n > compareStep && c.touches(4*mib) {
				d.mu.Lock()
				d.data[4*mib+9] ^= 1
				d.mu.Unlock()
				return errMended
			}
			return nil
		},
		"a flip in the void": func(d *memDisk, c call) error {
			if c.kind == "read" && c.touches(0) {
				d.mu.Lock()
				d.data[77] ^= 1
				d.mu.Unlock()
				return errMended
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			im := faultImage(512)
			d := newMemDisk(im.Size)
			var once atomic.Bool
			d.onCall = func(c call) (int, error) {
				if once.Load() {
					return 0, nil
				}
				err := broken(d, c)
				if err != nil {
					once.Store(true)
				}
				if errors.Is(err, errMended) {
					err = nil
				}
				return 0, err
			}
			var last, top int64
			res, err := Write(t.Context(), d, im, func(_ string, done, total int64) { last, top = done, total })
			if err != nil {
				t.Fatal(err)
			}
			if res.Rewritten != mib || res.DigestRead != res.DigestWritten || last != top {
				t.Errorf("result %+v, progress %d of %d", res, last, top)
			}
			checkContent(t, d, im)
		})
	}
}

var errMended = errors.New("only once")

// A stick whose missing part is large is not written a second time.
func TestMuchMissing(t *testing.T) {
	im := testImage(128*mib, 512, 0, 100*mib)
	d := newMemDisk(im.Size)
	d.dropFrom = 20*mib + 4096
	res, err := Write(t.Context(), d, im, nil)
	var m *MismatchError
	if !errors.As(err, &m) || m.Fault != FaultDropped || m.Capacity != 20*mib+4096 || res.Rewritten != 0 {
		t.Errorf("%+v, %v", res, err)
	}
}

// What a stick held before is an older image of ours: dropped writes bring that
// back, which is no wrap.
func TestDroppedOntoAnOlderImage(t *testing.T) {
	im := faultImage(512)
	d := newMemDisk(im.Size)
	older := testImage(16*mib, 512, 0, mib, mib+4096, 3*mib, 9*mib, mib, 14*mib, mib)
	for i, e := range im.Extents {
		older.Extents[i].Content = e.Content
	}
	if _, err := older.ReadAt(d.data, 0); err != nil {
		t.Fatal(err)
	}
	d.dropFrom = 3 * mib
	_, err := Write(t.Context(), d, im, nil)
	if FaultOf(err) != FaultDropped {
		t.Errorf("error %v", err)
	}
}

func TestUnstable(t *testing.T) {
	im := faultImage(512)
	d := newMemDisk(im.Size)
	var n atomic.Int64
	d.onCall = func(c call) (int, error) {
		// The first two readings of the piece after the write are wrong, the third is not.
		if c.kind == "read" && c.n > compareStep && c.touches(4*mib) {
			d.mu.Lock()
			d.data[4*mib+9] = byte(n.Add(1))
			if n.Load() > 2 {
				d.data[4*mib+9] = mustByte(im, 4*mib+9)
			}
			d.mu.Unlock()
		}
		return 0, nil
	}
	_, err := Write(t.Context(), d, im, nil)
	if FaultOf(err) != FaultUnstable {
		t.Errorf("error %v", err)
	}
	checkVoid(t, d, im)
}

func mustByte(im *Image, off int64) byte {
	p := make([]byte, 1)
	_, _ = im.ReadAt(p, off)
	return p[0]
}

func TestPace(t *testing.T) {
	t0 := time.Unix(0, 0)
	at := func(s float64) time.Time { return t0.Add(time.Duration(s * float64(time.Second))) }
	type w struct{ began, ended float64 }
	quick := func(from float64, n int) (ws []w) {
		for range n {
			ws = append(ws, w{from, from + 0.01})
		}
		return ws
	}
	for _, c := range []struct {
		name   string
		writes []w
		want   int
	}{
		{"few at first", nil, firstInFlight},
		{"each quick one brings one more", quick(0, 3), firstInFlight + 3},
		{"up to the most", quick(0, 100), mostInFlight},
		{"those of half a second bring none", []w{{0, 0.6}, {0, 0.7}, {0, 0.6}}, firstInFlight},
		{"one that takes seconds halves them", append(quick(0, 100), w{1, 4}), mostInFlight / 2},
		{"those of the same stall count once", append(quick(0, 100), []w{{1, 4}, {1, 4.1}, {2, 5}, {3.9, 6}}...), mostInFlight / 2},
		{"a slow one that began later counts again", append(quick(0, 100), []w{{1, 4}, {4, 7}}...), mostInFlight / 4},
		{"never less than one", []w{{0, 3}, {3, 6}, {6, 9}, {9, 12}, {12, 15}}, 1},
		{"after that, quick ones in a row bring one back", append([]w{{0, 3}}, quick(4, quickInRow)...), 2},
		{"not while some take half a second", append(append([]w{{0, 3}}, quick(4, quickInRow-1)...), append([]w{{5, 5.7}}, quick(6, quickInRow-1)...)...), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPace()
			for _, w := range c.writes {
				p.wrote(at(w.began), at(w.ended))
			}
			if p.limit != c.want {
				t.Errorf("%d in flight, want %d", p.limit, c.want)
			}
		})
	}
}

// A slow device holds few writes when a cancel comes.
func TestPaceOfASlowDevice(t *testing.T) {
	p, now := newPace(), time.Unix(0, 0)
	for range 40 { // a chunk a second, whatever is in flight
		took := time.Duration(p.limit) * time.Second
		p.wrote(now, now.Add(took))
		now = now.Add(took)
	}
	if p.limit != 1 {
		t.Errorf("%d in flight at 1 MiB/s", p.limit)
	}
}

func TestDelta(t *testing.T) {
	run := func(chunks int, same func(i int) bool) (compared int) {
		var d delta
		for i := range chunks {
			if d.next() {
				compared++
				d.saw(same(i))
			}
		}
		return compared
	}
	for _, c := range []struct {
		name        string
		same        func(int) bool
		least, most int // of 10000
	}{
		{"all is there: all is compared", func(int) bool { return true }, 10000, 10000},
		{"nothing is there: next to nothing is", func(int) bool { return false }, 20, 180},
		{"every second is there: all is compared", func(i int) bool { return i%2 == 0 }, 10000, 10000},
		{"the second half is there: it is found", func(i int) bool { return i >= 5000 }, 5000 - 2*mostSkipped, 5200},
		{"one change", func(i int) bool { return i != 5000 }, 10000, 10000},
	} {
		t.Run(c.name, func(t *testing.T) {
			if n := run(10000, c.same); n < c.least || n > c.most {
				t.Errorf("%d compared, want %d to %d", n, c.least, c.most)
			}
		})
	}
}

func TestFlushGap(t *testing.T) {
	for took, want := range map[time.Duration]time.Duration{0: leastFlushGap, 10 * time.Millisecond: leastFlushGap, time.Second: 9 * time.Second} {
		if got := flushGap(took); got != want {
			t.Errorf("after %v: %v, want %v", took, got, want)
		}
	}
}

// Progress counts what is flushed, comes often, and has nothing left for the end.
func TestProgressIsDurable(t *testing.T) {
	im := testImage(48*mib, 512, 0, 48*mib)
	d := newMemDisk(im.Size)
	var landed, durable atomic.Int64
	d.onCall = func(c call) (int, error) {
		switch c.kind {
		case "write":
			time.Sleep(200 * time.Millisecond) // 40 MiB/s with 8 in flight
			if c.off >= mib {
				landed.Add(c.n)
			}
		case "sync":
			durable.Store(landed.Load())
		}
		return 0, nil
	}
	steps, before := 0, int64(0)
	_, err := Write(context.Background(), d, im, func(phase string, done, _ int64) {
		if phase != PhaseWrite {
			return
		}
		if done > durable.Load() {
			t.Errorf("%d bytes told, %d durable", done, durable.Load())
		}
		if done-before > 24*mib {
			t.Errorf("a jump from %d to %d", before, done)
		}
		if done > before {
			steps++
		}
		before = done
	})
	if err != nil {
		t.Fatal(err)
	}
	if steps < 3 {
		t.Errorf("%d steps", steps)
	}
}
