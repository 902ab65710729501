package media

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// oldDisk has content that no probe may change.
func oldDisk(size int64) *memDisk {
	d := newMemDisk(size)
	fillMark(d.data, 7)
	return d
}

func TestProbeCapacity(t *testing.T) {
	for _, size := range []int64{64 * mib, 61*mib + 512, 37 * mib, 4 * mib} {
		for _, c := range []struct {
			name string
			lie  func(d *memDisk)
			want Capacity // without Claimed and Places
		}{
			{"genuine", func(*memDisk) {}, Capacity{Real: size}},
			{"wraps at 2 MiB", func(d *memDisk) { d.wrapAt = 2 * mib }, Capacity{Fault: FaultWraps, Real: 2 * mib}},
			{"wraps at 16 MiB", func(d *memDisk) { d.wrapAt = 16 * mib }, Capacity{Fault: FaultWraps, Real: 16 * mib}},
			{"drops from 2 MiB on", func(d *memDisk) { d.dropFrom = 2 * mib }, Capacity{Fault: FaultDropped, Real: 2 * mib}},
			{"drops from 21 MiB on", func(d *memDisk) { d.dropFrom = 21*mib + 1000 }, Capacity{Fault: FaultDropped, Real: 21 * mib}},
			{"drops the last MiB", func(d *memDisk) { d.dropFrom = size - mib }, Capacity{Fault: FaultDropped, Real: size - mib}},
			{"drops everything", func(d *memDisk) { d.dropFrom = 0 }, Capacity{Fault: FaultDropped}},
			{"a flipped bit", func(d *memDisk) { d.flip = mib + markOffset + 9 }, Capacity{Fault: FaultFlipped, Real: size}},
			{"ends at 30 MiB", func(d *memDisk) { d.onCall = shortAt(30 * mib) }, Capacity{Fault: FaultShort, Real: 30 * mib}},
		} {
			if c.want.Real > size || c.want.Fault != "" && c.want.Fault != FaultFlipped && c.want.Real == size {
				continue
			}
			t.Run(fmt.Sprintf("%d: %s", size, c.name), func(t *testing.T) {
				d := oldDisk(size)
				before := bytes.Clone(d.data)
				c.lie(d)
				got, err := ProbeCapacity(t.Context(), d, size)
				if err != nil {
					t.Fatal(err)
				}
				if got.Claimed != size || got.Fault != c.want.Fault || got.Genuine() != (c.want.Fault == "") || got.Real-c.want.Real > mib || c.want.Real-got.Real > mib {
					t.Errorf("%+v, want %+v", got, c.want)
				}
				if c.want.Fault == FaultWraps && got.Real != c.want.Real {
					t.Errorf("wraps at %d, want %d", got.Real, c.want.Real)
				}
				// What is read wrong can't be kept.
				if i := firstDifference(d.data, before); i >= 0 && int64(i) != d.flip {
					t.Errorf("the content has changed at %d", i)
				}
				if !d.log[len(d.log)-1].sync {
					t.Error("the content is not flushed")
				}
				for _, o := range d.log {
					if !o.sync && o.off < 64<<10 {
						t.Errorf("the first sectors are written: %+v", o)
					}
				}
			})
		}
	}
}

// shortAt ends a disk before its size.
func shortAt(end int64) func(call) (int, error) {
	return func(c call) (int, error) {
		n := max(0, end-c.off)
		switch {
		case c.kind == "sync" || n >= c.n:
			return 0, nil
		case c.kind == "write":
			return int(n), unix.ENOSPC
		default:
			return int(n), io.EOF
		}
	}
}

// Whatever fails and whenever, what can be put back is.
func TestProbeCapacityPutsBack(t *testing.T) {
	const size = 6 * mib
	plain := oldDisk(size)
	calls := 0
	plain.onCall = func(call) (int, error) { calls++; return 0, nil }
	if _, err := ProbeCapacity(t.Context(), plain, size); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= calls; n++ {
		for _, cancelled := range []bool{true, false} {
			d := oldDisk(size)
			before := bytes.Clone(d.data)
			ctx, cancel := context.WithCancel(t.Context())
			var seen atomic.Int64
			d.onCall = func(call) (int, error) {
				if seen.Add(1) != int64(n) {
					return 0, nil
				}
				if cancelled {
					cancel()
					return 0, nil
				}
				return 0, unix.EIO
			}
			_, err := ProbeCapacity(ctx, d, size)
			cancel()
			i := firstDifference(d.data, before)
			switch {
			case cancelled && err != nil && !errors.Is(err, context.Canceled):
				t.Errorf("call %d cancelled: %v", n, err)
			case i >= 0 && err == nil, i >= 0 && cancelled:
				t.Errorf("call %d, cancelled %v: the content has changed at %d, error %v", n, cancelled, i, err)
			case i >= 0 && n <= calls/2:
				t.Errorf("call %d: the content has changed at %d: %v", n, i, err)
			}
		}
	}
}

// A disk that hangs or is pulled out holds up nobody, and what it may have lost is
// named.
func TestProbeCapacityOnADiskThatHangs(t *testing.T) {
	for _, kind := range []string{"read", "write", "sync"} {
		for _, gone := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, unplugged %v", kind, gone), func(t *testing.T) {
				t.Parallel()
				d := &hungDisk{memDisk: oldDisk(8 * mib), letGo: make(chan struct{}), gone: gone}
				defer close(d.letGo)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				d.onCall = func(c call) (int, error) {
					if c.kind == kind {
						if !gone {
							cancel()
						}
						<-d.letGo
					}
					return 0, nil
				}
				began := time.Now()
				_, err := ProbeCapacity(ctx, d, 8*mib)
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("took %v", took)
				}
				if want := map[bool]Fault{true: FaultGone, false: FaultStalled}[gone]; FaultOf(err) != want {
					t.Errorf("error %v", err)
				}
				if named := strings.Contains(err.Error(), "[786432"); named != (kind != "read") {
					t.Errorf("the places that may be lost: error %v", err)
				}
			})
		}
	}
}

func TestProbeCapacityRefuses(t *testing.T) {
	d := oldDisk(mib)
	if _, err := ProbeCapacity(t.Context(), d, mib); err == nil || len(d.log) > 0 {
		t.Errorf("too small: error %v", err)
	}
	d = oldDisk(32 * mib)
	d.onCall = func(c call) (int, error) {
		if c.kind == "write" {
			return 0, unix.EPERM
		}
		return 0, nil
	}
	if _, err := ProbeCapacity(t.Context(), d, 32*mib); FaultOf(err) != FaultReadOnly {
		t.Errorf("read-only: error %v", err)
	}
}

// The places are few, sorted, on the disk, and far from its ends' tables.
func TestProbePlaces(t *testing.T) {
	for _, size := range []int64{leastProbed, 5*mib + 512, 100 * mib, 15_728_640_000, 64 << 30, 2 << 40, 1 << 50} {
		places := probePlaces(size)
		if len(places) > 100 {
			t.Errorf("%d: %d places", size, len(places))
		}
		before := int64(-1)
		for _, p := range places {
			if p <= before || p < markOffset || p > size-markSize || p%markSize != 0 || p%mib != markOffset {
				t.Errorf("%d: a place at %d after %d", size, p, before)
			}
			before = p
		}
		if size-before > 2*mib {
			t.Errorf("%d: the last place is %d", size, before)
		}
	}
}
