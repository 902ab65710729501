package media

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"testing"
)

// A write says whether it began to change the disk, and a disk that it left in
// the middle is void.
func TestBegun(t *testing.T) {
	im := testImage(4*mib, 512, 0, mib, mib, 2*mib)
	for _, c := range []struct {
		name        string
		disturb     func(*memDisk, *Image, context.CancelFunc)
		begun, void bool
	}{
		{"nothing", func(*memDisk, *Image, context.CancelFunc) {}, true, false},
		{"cancelled before", func(_ *memDisk, _ *Image, cancel context.CancelFunc) { cancel() }, false, false},
		{"not an image", func(_ *memDisk, im *Image, _ context.CancelFunc) { im.SectorSize = 7 }, false, false},
		{"cancelled in the first write", func(d *memDisk, _ *Image, cancel context.CancelFunc) { d.onWrite = func(int) { cancel() } }, true, true},
		{"a later flush fails", func(d *memDisk, _ *Image, _ context.CancelFunc) { d.failSync = 2 }, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			d, im := newMemDisk(im.Size), *im
			c.disturb(d, &im, cancel)
			res, err := Write(ctx, d, &im, nil)
			if res.Begun != c.begun || (err == nil) != (c.name == "nothing") {
				t.Errorf("begun: %v, %v", res.Begun, err)
			}
			if void, err := Void(d, im.Size); err != nil || void != c.void {
				t.Errorf("void: %v, %v", void, err)
			}
		})
	}
	if void, err := Void(newMemDisk(512), 4*mib); err == nil {
		t.Errorf("a disk that ends before its size is void: %v", void)
	}
}

// journal is a disk that keeps what it is told, in order; a sync is nil bytes.
type journal struct {
	*memDisk
	mu  sync.Mutex
	ops []told
}

type told struct {
	off  int64
	data []byte
}

func (j *journal) WriteAt(p []byte, off int64) (int, error) {
	j.mu.Lock()
	j.ops = append(j.ops, told{off, bytes.Clone(p)})
	j.mu.Unlock()
	return j.memDisk.WriteAt(p, off)
}

func (j *journal) Sync() error {
	j.mu.Lock()
	j.ops = append(j.ops, told{})
	j.mu.Unlock()
	return j.memDisk.Sync()
}

// Whenever the disk is unplugged or the power is cut, it has what was flushed
// until then and any of the sectors that were written since: it then boots the
// old system, which is untouched behind its head, or nothing, or all of the new one.
func TestPowerCut(t *testing.T) {
	for name, im := range images() {
		if im.Extents[0].Offset > 0 {
			continue // nothing on it boots
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			disk := &journal{memDisk: newMemDisk(im.Size)}
			old := bytes.Clone(disk.data)
			if _, err := Write(t.Context(), disk, im, nil); err != nil {
				t.Fatal(err)
			}
			sector, head := im.SectorSize, min(mib, im.Size)
			luck := rand.New(rand.NewPCG(3, 4))
			flushed, since := bytes.Clone(old), []told(nil)
			for n, op := range append(disk.ops, told{}) {
				if op.data != nil {
					since = append(since, op)
				}
				for range 4 {
					now := bytes.Clone(flushed)
					for _, w := range since {
						share := luck.IntN(3)
						for i := 0; i < len(w.data); i += sector {
							if share == 0 || luck.IntN(2) < share {
								copy(now[w.off+int64(i):], w.data[i:i+sector])
							}
						}
					}
					switch first := now[:sector]; {
					case allZero(first):
					case bytes.Equal(first, old[:sector]):
						if !bytes.Equal(now[head:], old[head:]) {
							t.Fatalf("after %d of %d calls the old system's first sector is there, and what is behind its head is not", n, len(disk.ops))
						}
					default:
						for _, e := range im.Extents {
							want := make([]byte, e.Length)
							if err := e.read(want, 0); err != nil {
								t.Fatal(err)
							}
							if i := firstDifference(now[e.Offset:e.End()], want); i >= 0 {
								t.Fatalf("after %d of %d calls the first sector is there, and byte %d is not", n, len(disk.ops), e.Offset+int64(i))
							}
						}
					}
				}
				if op.data == nil {
					for _, w := range since {
						copy(flushed[w.off:], w.data)
					}
					since = nil
				}
			}
		})
	}
}
