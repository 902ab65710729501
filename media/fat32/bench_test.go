package fat32

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// benchTree makes 1000 files of about 4 KiB in ten folders.
func benchTree(b *testing.B) string {
	b.Helper()
	root := b.TempDir()
	for i := range 1000 {
		dir := filepath.Join(root, fmt.Sprintf("folder%d", i/100))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			b.Fatal(err)
		}
		p := make([]byte, 3600+i)
		pattern(i).ReadAt(p, 0)
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file number %d.conf", i)), p, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	return root
}

// BenchmarkBuild makes a 64 MiB image file of a folder of 1000 files. Its peer
// is BenchmarkMkfsMcopy.
func BenchmarkBuild(b *testing.B) {
	root, img := benchTree(b), filepath.Join(b.TempDir(), "img")
	for b.Loop() {
		if err := buildFrom(root, img); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	fsck(b, img, 1011, 129022)
}

func buildFrom(root, img string) error {
	var files []File
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		open = append(open, f)
		files = append(files, File{Path: strings.TrimPrefix(path, root+"/"), Size: info.Size(), Content: f, ModTime: info.ModTime()})
		return nil
	})
	if err != nil {
		return err
	}
	v := Volume{Size: 64 * mib, SectorSize: 512, ID: 1, Label: "BENCH"}
	extents, err := v.Build(files)
	if err != nil {
		return err
	}
	out, err := os.Create(img)
	if err != nil {
		return err
	}
	defer out.Close()
	if err := out.Truncate(v.Size); err != nil {
		return err
	}
	buf := make([]byte, mib)
	for _, e := range extents {
		for at := int64(0); at < e.Length; {
			n, err := e.Content.ReadAt(buf[:min(int64(len(buf)), e.Length-at)], at)
			if err != nil {
				return err
			}
			if _, err := out.WriteAt(buf[:n], e.Offset+at); err != nil {
				return err
			}
			at += int64(n)
		}
	}
	return nil
}

// BenchmarkMkfsMcopy does the same as BenchmarkBuild by the field's own tools.
func BenchmarkMkfsMcopy(b *testing.B) {
	mkfs, mcopy := need.Tool(b, "mkfs.vfat", "dosfstools"), need.Tool(b, "mcopy", "mtools")
	root, img := benchTree(b), filepath.Join(b.TempDir(), "img")
	folders, err := filepath.Glob(root + "/*")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		os.Remove(img)
		if out, err := exec.Command(mkfs, "-F", "32", "-n", "BENCH", "-i", "1", "-C", img, "65536").CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		if out, err := exec.Command(mcopy, append(append([]string{"-s", "-m", "-i", img}, folders...), "::/")...).CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
}

// BenchmarkLayout is the layout alone, without a byte of content.
func BenchmarkLayout(b *testing.B) {
	files := trees()["1000 files in one folder"]
	v := Volume{Size: 64 * mib, SectorSize: 512}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := v.Build(files); err != nil {
			b.Fatal(err)
		}
	}
}
