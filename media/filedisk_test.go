package media

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestFileDisk(t *testing.T) {
	im := testImage(3<<40, 512, 0, mib, mib, 20*mib, 3<<40-mib, mib)
	f, err := os.Create(filepath.Join(t.TempDir(), "stick.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("old content"), 500*mib); err != nil {
		t.Fatal(err)
	}
	d, err := NewFileDisk(f, im)
	if err != nil {
		if errors.Is(err, syscall.EFBIG) {
			t.Skipf("skipped: the file system has no files of 3 TiB: %v", err)
		}
		t.Fatal(err)
	}
	res, err := Write(t.Context(), d, im, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := im.Digest(t.Context()); res.DigestRead != want || res.DigestWritten != want {
		t.Errorf("digests %+v, want %s", res, want)
	}
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() != im.Size {
		t.Errorf("size %d, want %d", st.Size(), im.Size)
	}
	if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used > 24*mib {
		t.Errorf("%d bytes of blocks: the file is not sparse", used)
	}
	old := make([]byte, 11)
	if _, err := f.ReadAt(old, 500*mib); err != nil || !allZero(old) {
		t.Errorf("the old content is still there: %q, %v", old, err)
	}
	if _, err := d.WriteAt(make([]byte, 512), im.Size); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write behind the end: %v", err)
	}
}

func TestFileDiskRefuses(t *testing.T) {
	im := testImage(8*mib, 512, 0, mib)
	huge := testImage(1<<50, 512)
	huge.Extents = []Extent{{0, 1 << 50, im}}
	dir := t.TempDir()
	path := filepath.Join(dir, "target")
	if err := os.WriteFile(path, []byte("keep me"), 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		flag       int
		im         *Image
		want       string
	}{
		{"open for reading", path, os.O_RDONLY, im, "reading and writing"},
		{"open for writing only, can't be read back", path, os.O_WRONLY, im, "reading and writing"},
		{"open for appending", path, os.O_RDWR | os.O_APPEND, im, "appending"},
		{"a folder", dir, os.O_RDONLY, im, "not a regular file"},
		{"a character device", "/dev/null", os.O_RDWR, im, "not a regular file"},
		{"a pipe", fifo, os.O_RDWR, im, "not a regular file"},
		{"more data than the file system has room for", path, os.O_RDWR, huge, "needs 1073741824 MiB, has"},
		{"a wrong image", path, os.O_RDWR, &Image{Size: 1}, "sector size"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, err := os.OpenFile(c.path, c.flag, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, err = NewFileDisk(f, c.im)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			var space *NoSpaceError
			if errors.As(err, &space) != (c.im == huge) {
				t.Errorf("error type %T", err)
			}
			if got, _ := os.ReadFile(path); string(got) != "keep me" {
				t.Errorf("the refused file was changed: %q", got)
			}
		})
	}
}

// A stick's amount of data, written to a file and read back.
func BenchmarkWrite(b *testing.B) {
	im := testImage(512*mib, 512, 0, mib, mib, 59*mib)
	b.SetBytes(im.DataBytes())
	for b.Loop() {
		f, err := os.Create(filepath.Join(b.TempDir(), "stick.img"))
		if err != nil {
			b.Fatal(err)
		}
		d, err := NewFileDisk(f, im)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := Write(b.Context(), d, im, nil); err != nil {
			b.Fatal(err)
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
