package media

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"
)

// streamBytes is the image as the one who downloads it has it.
func streamBytes(t *testing.T, im *Image, n int64) []byte {
	t.Helper()
	return mustRead(t, im, 0, int(n))
}

// checkStream holds the disk against the stream: its bytes, holes over what was there
// before included, then what was there before, but for signatures.
func checkStream(t *testing.T, d *memDisk, p []byte, sector int) {
	t.Helper()
	if i := firstDifference(d.data[:len(p)], p); i >= 0 {
		t.Errorf("the disk differs from the image at %d", i)
	}
	size := int64(len(d.data))
	padded := (int64(len(p)) + int64(sector) - 1) / int64(sector) * int64(sector)
	if !allZero(d.data[len(p):padded]) {
		t.Error("the last sector is not filled up with zeros")
	}
	im := &Image{Size: size, SectorSize: sector, Extents: []Extent{{Length: max(padded, min(size, mib)), Content: zeros(size)}}}
	im.EraseSignatures(0, size)
	for _, e := range im.Extents[1:] {
		if !allZero(d.data[e.Offset:e.End()]) {
			t.Errorf("an old signature may be left in %d to %d", e.Offset, e.End())
		}
	}
}

func TestWriteStream(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		full := testImage(12*mib, sector, 0, 2*mib, 3*mib+8192, 4096, 6*mib, 2*mib+4096, 11*mib, mib)
		for _, n := range []int64{1, 511, 512, 4097, mib - 1, mib, mib + 1, 2*mib + 5, 3 * mib, 7*mib + 100, 10*mib + 4096, 12*mib - 1, 12 * mib} {
			t.Run(fmt.Sprintf("%d bytes, %d", n, sector), func(t *testing.T) {
				p := streamBytes(t, full, n)
				d := newMemDisk(12 * mib)
				var phases []string
				last, totals := map[string]int64{}, map[string]int64{}
				res, err := WriteStream(t.Context(), sizedDisk{d, sector}, Stream{Reader: iotest.HalfReader(bytes.NewReader(p)), Expected: func() int64 { return n }}, func(phase string, done, total int64) {
					if done < last[phase] || done > total {
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
				sum := sha256.Sum256(p)
				want := hex.EncodeToString(sum[:])
				if res.DigestWritten != want || res.DigestRead != want || res.Length != n || !res.Begun || res.Head != mib || res.Bytes != mib+res.Written+res.Zeroed+res.Skipped || res.Rewritten != 0 {
					t.Errorf("%+v, want %s of %d", res, want, n)
				}
				if fmt.Sprint(phases) != fmt.Sprint([]string{PhaseWrite, PhaseReadBack}) || last[PhaseWrite] != totals[PhaseWrite] || last[PhaseReadBack] != totals[PhaseReadBack] {
					t.Errorf("phases %v, %v of %v", phases, last, totals)
				}
				checkStream(t, d, p, sector)
				checkOrder(t, d, &Image{Size: 12 * mib, SectorSize: sector, Extents: []Extent{{Length: mib}}})

				// Once more: all is there already but the head.
				again, err := WriteStream(t.Context(), sizedDisk{d, sector}, Stream{Reader: bytes.NewReader(p)}, nil)
				if err != nil || again.Written != 0 || again.DigestRead != want {
					t.Errorf("once more: %+v, %v", again, err)
				}
				checkStream(t, d, p, sector)
			})
		}
	}
}

// A disk that can make zeros makes those of a foreign image.
func TestStreamZeroesByTheDisk(t *testing.T) {
	p := streamBytes(t, faultImage(512), 16*mib)
	d := newMemDisk(16 * mib)
	res, err := WriteStream(t.Context(), zeroingDisk{sizedDisk{d, 512}}, Stream{Reader: bytes.NewReader(p)}, nil)
	if err != nil || res.Zeroed < 9*mib {
		t.Errorf("%+v, %v", res, err)
	}
	checkStream(t, d, p, 512)
}

type zeroingDisk struct{ sizedDisk }

func (d zeroingDisk) ZeroRange(off, n int64) (bool, error) {
	_, err := d.WriteAt(make([]byte, n), off)
	return true, err
}

// Every fault of the matrix, of an image that can't be read again: it is named
// rightly all the same, and the disk does not boot.
func TestStreamFaultMatrix(t *testing.T) {
	type place struct {
		name string
		at   int64
	}
	places := []place{{"first", 0}, {"middle", 3 * mib}, {"last", 15*mib + 512<<10}}
	type want struct {
		fault    Fault
		offset   int64 // -1: any
		capacity int64
		live     bool // the head can't be made void
	}
	fails := func(kind string, off int64, err error) func(call) (int, error) {
		return func(c call) (int, error) {
			if c.kind == kind && c.touches(off) {
				return 0, err
			}
			return 0, nil
		}
	}
	for _, fault := range []struct {
		name  string
		apply func(d *memDisk, at int64, cancel func()) want
	}{
		{"flip", func(d *memDisk, at int64, _ func()) want {
			d.flip = at + 5
			return want{fault: FaultFlipped, offset: at + 5}
		}},
		{"drop", func(d *memDisk, at int64, _ func()) want {
			d.dropFrom = at
			w := want{fault: FaultDropped, offset: at, live: at == 0}
			if at == 3*mib {
				w.capacity = at
			}
			return w
		}},
		{"wrap", func(d *memDisk, at int64, _ func()) want {
			d.wrapAt = map[int64]int64{0: 8 * mib, 3 * mib: 6 * mib, 15*mib + 512<<10: 12 * mib}[at]
			return want{fault: FaultWraps, offset: -1, capacity: d.wrapAt}
		}},
		{"wrap between chunks", func(d *memDisk, at int64, _ func()) want {
			d.wrapAt = map[int64]int64{0: 8*mib - 4096, 3 * mib: 6*mib + 12288, 15*mib + 512<<10: 12*mib + 8192}[at]
			return want{fault: FaultWraps, offset: -1, capacity: d.wrapAt}
		}},
		{"EIO read", func(d *memDisk, at int64, _ func()) want {
			d.onCall = fails("read", at+4096, unix.EIO)
			w := want{fault: FaultRead, offset: at + 4096}
			if at == 0 {
				w.offset = 0 // the head is one piece
			}
			return w
		}},
		{"EIO write", func(d *memDisk, at int64, _ func()) want {
			d.onCall = fails("write", at, unix.EIO)
			return want{fault: FaultWrite, offset: at / mib * mib, live: at == 0}
		}},
		{"short", func(d *memDisk, at int64, _ func()) want {
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
			return want{fault: FaultShort, offset: end, live: at == 0}
		}},
		{"gone", func(d *memDisk, at int64, _ func()) want {
			var gone atomic.Bool
			d.onCall = func(c call) (int, error) {
				if gone.Load() || c.kind == "write" && c.touches(at) {
					gone.Store(true)
					return 0, unix.ENODEV
				}
				return 0, nil
			}
			return want{fault: FaultGone, offset: -1, live: at == 0}
		}},
		{"cancel", func(d *memDisk, at int64, cancel func()) want {
			d.onCall = func(c call) (int, error) {
				if c.kind == "write" && c.touches(at) {
					cancel()
				}
				return 0, nil
			}
			return want{}
		}},
	} {
		for _, p := range places {
			for _, sector := range []int{512, 4096} {
				t.Run(fmt.Sprintf("%s, %s, %d", fault.name, p.name, sector), func(t *testing.T) {
					t.Parallel()
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					im := faultImage(sector)
					d := newMemDisk(im.Size)
					want := fault.apply(d, p.at, cancel)
					res, err := WriteStream(ctx, sizedDisk{d, sector}, Stream{Reader: bytes.NewReader(streamBytes(t, im, im.Size))}, nil)
					if want.fault == "" {
						if !errors.Is(err, context.Canceled) {
							t.Errorf("error %v", err)
						}
					} else if FaultOf(err) != want.fault {
						t.Fatalf("error %v, want %s", err, want.fault)
					}
					var mismatch *MismatchError
					var device *DeviceError
					switch {
					case errors.As(err, &mismatch):
						if mismatch.Offset != want.offset && want.offset >= 0 || mismatch.Capacity != want.capacity {
							t.Errorf("%+v, want %+v", mismatch, want)
						}
					case errors.As(err, &device):
						if device.Offset != want.offset && want.offset >= 0 {
							t.Errorf("%+v, want %+v", device, want)
						}
					}
					if res.DigestRead != "" || res.Length != 0 {
						t.Errorf("proven: %+v", res)
					}
					if !want.live && !allZero(d.data[:mib]) {
						t.Error("the first MiB is not void")
					}
					if bytes.Equal(d.data[:sector], mustRead(t, im, 0, sector)) {
						t.Error("the first sector is the image's")
					}
				})
			}
		}
	}
}

// What goes wrong once is told, since it can't be mended.
func TestStreamIsNotMended(t *testing.T) {
	im := faultImage(512)
	d := newMemDisk(im.Size)
	var once atomic.Bool
	d.onCall = func(c call) (int, error) {
		if c.kind == "read" && c.n > compareStep && c.touches(4*mib) && once.CompareAndSwap(false, true) {
			d.mu.Lock()
			d.data[4*mib+9] ^= 1
			d.mu.Unlock()
		}
		return 0, nil
	}
	res, err := WriteStream(t.Context(), sizedDisk{d, 512}, Stream{Reader: bytes.NewReader(streamBytes(t, im, im.Size))}, nil)
	if FaultOf(err) != FaultUnstable || res.Rewritten != 0 {
		t.Errorf("%+v, %v", res, err)
	}
	checkVoid(t, d, im)
}

// A stream that fails, at any place, leaves the disk void, or as it was where the
// first MiB was not there yet.
func TestStreamThatFails(t *testing.T) {
	broken := errors.New("the sum is another")
	im := faultImage(512)
	all := streamBytes(t, im, im.Size)
	for _, n := range []int{0, 100, mib - 1, mib, mib + 1, 3 * mib, 16*mib - 1, 16 * mib} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			d := newMemDisk(im.Size)
			res, err := WriteStream(t.Context(), sizedDisk{d, 512}, Stream{Reader: io.MultiReader(bytes.NewReader(all[:n]), iotest.ErrReader(broken))}, nil)
			if !errors.Is(err, broken) || res.DigestRead != "" {
				t.Fatalf("%+v, %v", res, err)
			}
			if res.Begun != (n >= mib) {
				t.Errorf("begun: %v", res.Begun)
			}
			if n < mib {
				if len(d.log) != 0 || !strings.Contains(err.Error(), "nothing was written") {
					t.Errorf("%v, and %d writes", err, len(d.log))
				}
				return
			}
			checkVoid(t, d, im)
		})
	}
	t.Run("empty", func(t *testing.T) {
		d := newMemDisk(im.Size)
		_, err := WriteStream(t.Context(), sizedDisk{d, 512}, Stream{Reader: bytes.NewReader(nil)}, nil)
		if err == nil || !strings.Contains(err.Error(), "empty") || len(d.log) != 0 {
			t.Errorf("%v, %d writes", err, len(d.log))
		}
	})
	t.Run("longer than the disk", func(t *testing.T) {
		d := newMemDisk(im.Size)
		_, err := WriteStream(t.Context(), sizedDisk{d, 512}, Stream{Reader: bytes.NewReader(append(all[:len(all):len(all)], 0))}, nil)
		var full *NoSpaceError
		if !errors.As(err, &full) || full.Have != im.Size {
			t.Errorf("error %v", err)
		}
		checkVoid(t, d, im)
	})
}

// A pipe that gives nothing more can be cancelled; nothing is read or written after.
func TestStreamThatStalls(t *testing.T) {
	im := faultImage(512)
	all := streamBytes(t, im, im.Size)
	for _, n := range []int{0, 1000, mib, 5*mib + 7} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			r, w := io.Pipe()
			defer context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })()
			go func() {
				_, _ = w.Write(all[:n])
				time.Sleep(50 * time.Millisecond)
				cancel()
			}()
			d := newMemDisk(im.Size)
			_, err := WriteStream(ctx, sizedDisk{d, 512}, Stream{Reader: r}, nil)
			if !errors.Is(err, context.Canceled) {
				t.Fatal(err)
			}
			if n >= mib {
				checkVoid(t, d, im)
			} else if len(d.log) != 0 {
				t.Error("the disk was touched")
			}
		})
	}
}
