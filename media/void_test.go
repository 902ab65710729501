package media

import (
	"context"
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
