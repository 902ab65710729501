package fat32

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzBuild takes any list of files, one on a line: a size in hexadecimal, a
// space, a path that ends in a slash for a folder. What Build accepts must be a
// right volume with just these files in it.
func FuzzBuild(f *testing.F) {
	for _, files := range trees() {
		var b strings.Builder
		for i, file := range files {
			if i < 40 {
				fmt.Fprintf(&b, "%x %s", file.Size%5000, file.Path)
				if file.Dir {
					b.WriteByte('/')
				}
				b.WriteByte('\n')
			}
		}
		f.Add(b.String(), uint8(0), uint16(0))
	}
	f.Add("1 a\n2 A\n", uint8(0), uint16(1))
	f.Add("1 a/b\n2 a\n", uint8(1), uint16(2))
	f.Add("1 A~1\n2 a b\n3 .a\n4 ..a\n5 a~2\n6 A+B\n7 a+b.c\n", uint8(2), uint16(3))
	f.Add("ffffffff big\n100000000 too big\n", uint8(0), uint16(4))
	f.Add("1 ı~1\n1 i b\n1 ſ\n1 \u212a\n1 ŉ\n1 ß\n", uint8(3), uint16(5))
	f.Fuzz(func(t *testing.T, list string, sectorBits uint8, more uint16) {
		sector := 512 << (sectorBits % 4)
		var files []File
		for line := range strings.Lines(list) {
			var size int64
			text, path, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
			if _, err := fmt.Sscanf(text, "%x", &size); !ok || err != nil {
				continue
			}
			file := patterned(strings.TrimSuffix(path, "/"), size)
			if strings.HasSuffix(path, "/") {
				file.Dir, file.Size = true, 0
			}
			files = append(files, file)
		}
		least, err := MinSize(sector, files)
		if err != nil {
			if !utf8.ValidString(err.Error()) {
				t.Errorf("the error is not UTF-8: %q", err)
			}
			return
		}
		if least > 50*mib*int64(sector/512) {
			return // the checker takes long over so many clusters
		}
		v := Volume{Size: least - int64(sector), SectorSize: sector, ModTime: someTime}
		var full *NoSpaceError
		if _, err := v.Build(files); !errors.As(err, &full) || full.Need != least {
			t.Fatalf("one sector less than MinSize: %v", err)
		}
		v.Size = least + int64(more)*int64(sector)
		extents, err := v.Build(files)
		if err != nil {
			t.Fatalf("%d bytes, MinSize is %d: %v", v.Size, least, err)
		}
		c, err := checkVolume(v, extents)
		if err != nil {
			t.Fatal(err)
		}
		want := withParents(files)
		if len(c.items) != len(want) {
			t.Fatalf("the volume holds %q", sortedKeys(c.items))
		}
		for name, w := range want {
			it, ok := c.items[name]
			if !ok || it.dir != w.Dir || it.size != w.Size {
				t.Fatalf("%q is %+v (%v), want %+v", name, it, ok, w)
			}
			head := min(w.Size, 3000)
			got, wanted := make([]byte, head), make([]byte, head)
			if head > 0 {
				c.content(name).Read(got)
				w.Content.ReadAt(wanted, 0)
			}
			if string(got) != string(wanted) {
				t.Fatalf("%q has other bytes", name)
			}
		}
	})
}
