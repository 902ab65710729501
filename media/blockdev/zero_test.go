package blockdev

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

func TestZeroRange(t *testing.T) {
	for _, sector := range []string{"512", "4096"} {
		t.Run(sector, func(t *testing.T) {
			name := loop(t, 16*mib, sector)
			d, err := System{}.Open(t.Context(), name, token(t, name))
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}()
			want := bytes.Repeat([]byte{0xa5}, 16*mib)
			if _, err := d.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			cached, err := os.Open("/dev/" + name) // through the page cache, which knows the old content
			if err != nil {
				t.Fatal(err)
			}
			defer cached.Close()
			got := make([]byte, len(want))
			if _, err := cached.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("the content to begin with: %v", err)
			}
			size := int64(d.SectorSize())
			for _, r := range []struct{ off, n int64 }{{mib, 5 * mib}, {8*mib + size, size}, {16*mib - size, size}, {0, 0}, {10 * mib, 4*mib - size}} {
				done, err := d.ZeroRange(r.off, r.n)
				if !done || err != nil {
					t.Fatalf("zero %d at %d: %v, %v", r.n, r.off, done, err)
				}
				clear(want[r.off : r.off+r.n])
			}
			if err := d.Sync(); err != nil {
				t.Fatal(err)
			}
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the device holds something else: %v", err)
			}
			if _, err := cached.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("memory holds something else: %v", err)
			}
			for _, r := range []struct{ off, n int64 }{{1, size}, {0, size - 1}, {-size, size}, {0, -size}, {16 * mib, size}, {16*mib - size, 2 * size}, {1 << 62, 1 << 62}} {
				if done, err := d.ZeroRange(r.off, r.n); done || err == nil {
					t.Errorf("zero %d at %d: %v and no error", r.n, r.off, done)
				}
			}
			if _, err := d.ZeroRange(0, 32*mib); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("more than there is: %v", err)
			}
		})
	}
}

// A loop device of a file system that can't punch holes is as most sticks are.
func TestZeroRangeWithoutOffload(t *testing.T) {
	need.Root(t)
	file := filepath.Join(mountAt(t, "ramfs", "ramfs", t.TempDir()), "disk.img")
	content := bytes.Repeat([]byte{0xa5}, 4*mib)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(need.Loop(t, file, "512"))
	if max, err := os.ReadFile("/sys/block/" + name + "/queue/write_zeroes_max_bytes"); err != nil || string(max) != "0\n" {
		t.Fatalf("the device offloads %q: %v", max, err)
	}
	d, err := System{}.Open(t.Context(), name, token(t, name))
	if err != nil {
		t.Fatal(err)
	}
	if done, err := d.ZeroRange(mib, mib); done || err != nil {
		t.Errorf("zeroed: %v, %v", done, err)
	}
	got := make([]byte, len(content))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
		t.Errorf("what could not be zeroed has changed: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
