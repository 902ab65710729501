package media

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/media/mediatest"
)

// openReal opens a disk as the daemon does: looked at, with a token, for us alone.
func openReal(t *testing.T, path string) *blockdev.Disk {
	t.Helper()
	name := filepath.Base(path)
	f, device, err := blockdev.System{}.OpenRead(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	token, err := device.Token(f)
	if err != nil {
		t.Fatal(err)
	}
	d, err := blockdev.System{}.OpenOn(t.Context(), name, token, blockdev.Terms{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// The matrix of TestFaultMatrix on real block devices: what the kernel says of
// each fault is named as it is, and what can still be written does not boot.
func TestFaultMatrixOfRealDevices(t *testing.T) {
	type place struct {
		name string
		at   int64 // bytes
	}
	places := []place{{"first", 0}, {"middle", 3 * mib}, {"last", 15*mib + 512<<10}}
	type want struct {
		fault Fault
		says  string
		dead  bool // it takes nothing any more: what is in the head is what was there when it died
	}
	// failing fails all calls of a kind in the chunk with a place.
	failing := func(write bool, at int64) mediatest.Faults {
		return mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
			if c.Write == write && c.Off/chunkSize == at/chunkSize {
				return syscall.EIO
			}
			return 0
		}}
	}
	// once lets something happen before the first call of a kind at a place, which
	// is then answered.
	once := func(write bool, at int64, what func(), answer syscall.Errno) mediatest.Faults {
		var happened atomic.Bool
		return mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
			if c.Write == write && c.Touches(at) && happened.CompareAndSwap(false, true) {
				what()
				return answer
			}
			return 0
		}}
	}
	for _, fault := range []struct {
		name  string
		apply func(d *mediatest.Disk, at int64, cancel func()) want
	}{
		{"nothing", func(*mediatest.Disk, int64, func()) want { return want{} }},
		{"flip", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Break(mediatest.Faults{Flip: at + 5})
			return want{fault: FaultFlipped, says: fmt.Sprintf("1 flipped bits, first at byte %d", at+5)}
		}},
		{"drop", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Break(mediatest.Faults{DropFrom: max(at, 4096)})
			return want{fault: FaultDropped, says: "use another one", dead: at == 0}
		}},
		{"wrap", func(d *mediatest.Disk, at int64, _ func()) want {
			real := map[int64]int64{0: 8 * mib, 3 * mib: 6 * mib, 15*mib + 512<<10: 12 * mib}[at]
			d.Break(mediatest.Faults{WrapAt: real})
			return want{fault: FaultWraps, says: "capacity is faked"}
		}},
		{"EIO read", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Break(failing(false, at+4096))
			return want{fault: FaultRead, says: "can't read"}
		}},
		{"EIO write", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Break(failing(true, at))
			return want{fault: FaultWrite, says: "can't write", dead: at == 0}
		}},
		{"short", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Resize(at + 8192)
			return want{fault: FaultShort, says: fmt.Sprintf("ends at byte %d", at+8192), dead: at == 0}
		}},
		{"read-only", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Break(once(true, at, d.SetReadOnly, 0))
			return want{fault: FaultReadOnly, says: "lock switch"}
		}},
		{"slow", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Break(mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
				if c.Touches(at) {
					time.Sleep(30 * time.Millisecond)
				}
				return 0
			}})
			return want{}
		}},
		{"the medium is taken out during the write", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Break(once(true, at, func() { d.Resize(0) }, syscall.EIO))
			return want{fault: FaultGone, says: "plug it in again", dead: true}
		}},
		{"the medium is taken out during the read-back", func(d *mediatest.Disk, at int64, _ func()) want {
			var written atomic.Bool
			taken := once(false, at, func() { d.Resize(0) }, syscall.EIO)
			d.Break(mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
				if c.Write && c.Touches(16*mib-1) {
					written.Store(true)
				}
				if !written.Load() {
					return 0
				}
				return taken.Fail(c)
			}})
			return want{fault: FaultGone, says: "plug it in again", dead: true}
		}},
		{"what is behind it dies", func(d *mediatest.Disk, at int64, _ func()) want {
			d.Break(once(true, at, d.Die, syscall.EIO))
			return want{fault: FaultWrite, says: "it is faulty", dead: true} // the kernel tells of it with that write, or with the flush
		}},
		{"it does not answer, and is given up", func(d *mediatest.Disk, at int64, cancel func()) want {
			d.Break(once(true, at, func() { cancel(); d.Hold() }, syscall.EIO))
			return want{fault: FaultStalled, says: "unplug it", dead: true}
		}},
	} {
		for _, p := range places {
			for _, sector := range []int{512, 4096} {
				t.Run(fmt.Sprintf("%s, %s, %d", fault.name, p.name, sector), func(t *testing.T) {
					im := faultImage(sector)
					d := mediatest.New(t, im.Size, sector)
					disk := openReal(t, d.Path)
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					before := d.Holds(0, int64(sector))
					want := fault.apply(d, p.at, cancel)
					res, err := Write(ctx, disk, im, nil)
					if FaultOf(err) != want.fault || want.fault == "" && err != nil || err != nil && !strings.Contains(err.Error(), want.says) {
						t.Fatalf("error %v, want %q, %q", err, want.fault, want.says)
					}
					head := d.Holds(0, mib)
					if want.fault == "" {
						if res.Bytes != im.DataBytes() || res.DigestRead != res.DigestWritten {
							t.Errorf("%+v", res)
						}
						for _, e := range im.Extents {
							if !bytes.Equal(d.Holds(e.Offset, e.Length), mustRead(t, im, e.Offset, int(e.Length))) {
								t.Errorf("what is at %d is not the image", e.Offset)
							}
						}
						return
					}
					if res.DigestRead != "" {
						t.Errorf("proven: %+v", res)
					}
					if fault.name == "it does not answer, and is given up" != errors.Is(err, context.Canceled) {
						t.Errorf("cancelled: %v", err)
					}
					switch {
					case bytes.Equal(head[:sector], mustRead(t, im, 0, sector)):
						t.Error("the first sector is ours")
					case want.dead && bytes.Equal(head[:sector], before): // nothing came to pass
					case want.dead && !allZero(head[:sector]), !want.dead && !allZero(head):
						t.Error("the head is not void")
					}
				})
			}
		}
	}
}
