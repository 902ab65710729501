package media

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// What a real kernel says of a device in trouble is named as it is.
func TestRealDevice(t *testing.T) {
	need.Root(t)
	losetup := need.Tool(t, "losetup", "mount")
	backing := func(t *testing.T, dir string) string {
		path := filepath.Join(dir, "disk")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 16*mib); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct {
		name    string
		trouble func(t *testing.T, dev, file string, d rawDisk)
		dir     func(t *testing.T) string
		want    Fault
	}{
		{"nothing", func(*testing.T, string, string, rawDisk) {}, nil, ""},
		{"it is set read-only", func(t *testing.T, _, _ string, d rawDisk) {
			if err := unix.IoctlSetPointerInt(int(d.Fd()), unix.BLKROSET, 1); err != nil {
				t.Fatal(err)
			}
		}, nil, FaultReadOnly},
		{"it shrinks", func(t *testing.T, dev, file string, _ rawDisk) {
			if err := os.Truncate(file, 10*mib+4096); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(losetup, "--set-capacity", dev).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}, nil, FaultShort},
		{"the file behind it has no room", func(*testing.T, string, string, rawDisk) {}, func(t *testing.T) string {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=3m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
			return dir
		}, FaultShort},
	} {
		for _, sector := range []string{"512", "4096"} {
			t.Run(c.name+", "+sector, func(t *testing.T) {
				dir := t.TempDir
				if c.dir != nil {
					dir = func() string { return c.dir(t) }
				}
				file := backing(t, dir())
				dev := need.Loop(t, file, sector)
				d, err := openRaw(dev)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				c.trouble(t, dev, file, d)
				im := faultImage(map[string]int{"512": 512, "4096": 4096}[sector])
				res, err := Write(t.Context(), d, im, nil)
				_ = unix.IoctlSetPointerInt(int(d.Fd()), unix.BLKROSET, 0)
				if c.want == "" {
					if err != nil || res.DigestRead != res.DigestWritten {
						t.Errorf("%+v, %v", res, err)
					}
					return
				}
				if FaultOf(err) != c.want {
					t.Errorf("error %v, want %s", err, c.want)
				}
				first := alignedBuffer(4096)
				if _, err := d.ReadAt(first, 0); err != nil || !allZero(first) {
					t.Errorf("the first sectors are not void: %v", err)
				}
			})
		}
	}
}

// A loop device is genuine, and its content stays, also when the probe is
// interrupted.
func TestProbeCapacityOfARealDevice(t *testing.T) {
	need.Root(t)
	path := filepath.Join(t.TempDir(), "disk")
	content := make([]byte, 24*mib)
	fillMark(content, 9)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := openRaw(need.Loop(t, path, "4096"))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got, err := ProbeCapacity(t.Context(), d, 24*mib)
	if err != nil || !got.Genuine() || got.Real != 24*mib {
		t.Errorf("%+v, %v", got, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Millisecond)
	defer cancel()
	if _, err := ProbeCapacity(ctx, d, 24*mib); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	after := alignedBuffer(24 * mib)
	if _, err := d.ReadAt(after, 0); err != nil {
		t.Fatal(err)
	}
	if i := firstDifference(after, content); i >= 0 {
		t.Errorf("the content has changed at %d", i)
	}
}
