package media

import (
	"bytes"
	"fmt"
	"io"
	"testing"
	"testing/iotest"
)

func TestEraseSignatures(t *testing.T) {
	content := func(n int64) *bytes.Reader { return bytes.NewReader(bytes.Repeat([]byte{1}, int(n))) }
	for _, sector := range []int{512, 4096} {
		for _, size := range []int64{64 << 10, 3 * mib, 5*mib + 4096, 66 * mib, 300 << 30} {
			t.Run(fmt.Sprintf("%d of %d", size, sector), func(t *testing.T) {
				im := &Image{Size: size + 2*mib, SectorSize: sector}
				for _, e := range [][2]int64{{mib, 4096}, {2*mib - 4096, 8192}, {mib + size - 8192, 4096}} {
					if e[0]+e[1] <= mib+size && (len(im.Extents) == 0 || e[0] >= im.Extents[len(im.Extents)-1].End()) {
						im.Extents = append(im.Extents, Extent{e[0], e[1], content(e[1])})
					}
				}
				ours := append([]Extent(nil), im.Extents...)
				im.EraseSignatures(mib, size)
				if err := im.Validate(); err != nil {
					t.Fatal(err)
				}
				for _, e := range ours {
					if im.extentAt(e.Offset).Content != e.Content {
						t.Errorf("the data at %d is not there any more", e.Offset)
					}
				}
				// Where libblkid looks, seen by strace.
				for _, at := range []int64{0, 512, 4096, 65536, 512 << 10, mib, 2 * mib, 4 * mib, 64 * mib,
					-512, -1024, -4096, -11 * 512, -64 << 10, -128 << 10, -257 * 512, -512 << 10, -991 * 512, -768 << 10, -mib, -3087 * 512} {
					if at < 0 {
						at += size
					}
					if at >= 0 && at < size && im.extentAt(mib+at).Content == nil {
						t.Errorf("nothing is written at %d", at)
					}
				}
				if n := im.DataBytes(); n > 5*mib/2 {
					t.Errorf("%d bytes in all", n)
				}
				for _, e := range im.Extents {
					if e.Offset < mib || e.End() > mib+size {
						t.Errorf("%d bytes at %d are outside", e.Length, e.Offset)
					}
				}
				extents := len(im.Extents)
				if im.EraseSignatures(mib, size); len(im.Extents) != extents {
					t.Errorf("again: %d extents, %d before", len(im.Extents), extents)
				}
			})
		}
	}
}

func (im *Image) extentAt(off int64) Extent {
	for _, e := range im.Extents {
		if e.Offset <= off && off < e.End() {
			return e
		}
	}
	return Extent{}
}

func TestZeros(t *testing.T) {

	if err := iotest.TestReader(io.NewSectionReader(zeros(8192), 0, 8192), make([]byte, 8192)); err != nil {
		t.Error(err)
	}
}
