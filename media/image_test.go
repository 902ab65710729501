package media

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestValidate(t *testing.T) {
	src := bytes.NewReader(make([]byte, 8192))
	for _, c := range []struct {
		name string
		im   Image
		want string // "" is fine
	}{
		{"no extents", Image{Size: 512, SectorSize: 512}, ""},
		{"extents that touch", Image{4096, 512, []Extent{{0, 512, src}, {512, 512, src}}}, ""},
		{"up to the end", Image{4096, 4096, []Extent{{0, 4096, src}}}, ""},
		{"sector size of a CD", Image{Size: 4096, SectorSize: 2048}, "sector size 2048"},
		{"no size", Image{SectorSize: 512}, "size 0"},
		{"half a sector", Image{Size: 6144, SectorSize: 4096}, "multiple"},
		{"no content", Image{4096, 512, []Extent{{0, 512, nil}}}, "no content"},
		{"an empty extent", Image{4096, 512, []Extent{{0, 0, src}}}, "whole sectors"},
		{"a length that is not whole", Image{4096, 512, []Extent{{0, 700, src}}}, "whole sectors"},
		{"a start inside a sector", Image{4096, 512, []Extent{{100, 512, src}}}, "whole sectors"},
		{"a negative start", Image{4096, 512, []Extent{{-512, 512, src}}}, "overlaps"},
		{"overlap", Image{4096, 512, []Extent{{0, 1024, src}, {512, 512, src}}}, "overlaps"},
		{"wrong order", Image{4096, 512, []Extent{{512, 512, src}, {0, 512, src}}}, "overlaps"},
		{"behind the end", Image{4096, 512, []Extent{{4096, 512, src}}}, "behind the disk's end"},
		{"length that overflows", Image{4096, 512, []Extent{{512, 1<<63 - 512, src}}}, "behind the disk's end"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.im.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func TestImageReadAt(t *testing.T) {
	im := testImage(64<<10, 512, 0, 512, 1024, 2048, 32<<10, 4096, 64<<10-512, 512)
	want := make([]byte, im.Size)
	for _, e := range im.Extents {
		if _, err := e.Content.ReadAt(want[e.Offset:e.End()], 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := iotest.TestReader(io.NewSectionReader(im, 0, im.Size), want); err != nil {
		t.Error(err)
	}
	if n, err := im.ReadAt(make([]byte, 600), im.Size-100); n != 100 || !errors.Is(err, io.EOF) {
		t.Errorf("across the end: %d, %v", n, err)
	}
	if _, err := im.ReadAt(nil, -1); err == nil {
		t.Error("negative offset: no error")
	}
	im.Extents[2].Content = bytes.NewReader(nil)
	if _, err := im.ReadAt(make([]byte, 512), 32<<10); !errors.Is(err, ErrShortContent) {
		t.Errorf("source too short: %v", err)
	}
	if _, err := im.Digest(t.Context()); !errors.Is(err, ErrShortContent) {
		t.Errorf("digest, source too short: %v", err)
	}
}

// The digest must change with everything that makes a disk another disk.
func TestDigest(t *testing.T) {
	base := func() *Image { return testImage(64<<10, 512, 0, 512, 1024, 1024) }
	seen := map[string]string{}
	for name, change := range map[string]func(*Image){
		"as it is":           func(*Image) {},
		"another size":       func(im *Image) { im.Size *= 2 },
		"another sector":     func(im *Image) { im.SectorSize = 4096 },
		"an extent moved":    func(im *Image) { im.Extents[1].Offset += 512 },
		"an extent split":    func(im *Image) { im.Extents = testImage(0, 512, 0, 512, 1024, 512, 1536, 512).Extents },
		"another byte in it": func(im *Image) { im.Extents[0].Content = bytes.NewReader(make([]byte, 512)) },
	} {
		im := base()
		change(im)
		sum, err := im.Digest(t.Context())
		if err != nil || len(sum) != 64 {
			t.Fatalf("%s: %q, %v", name, sum, err)
		}
		if other, ok := seen[sum]; ok {
			t.Errorf("%q and %q have one digest", name, other)
		}
		seen[sum] = name
	}
	again, err := base().Digest(t.Context())
	if err != nil || seen[again] != "as it is" {
		t.Errorf("the same image again: %q, %v", again, err)
	}
}
