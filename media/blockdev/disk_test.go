package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/testvm/need"
)

const mib = 1 << 20

func init() { patience = 500 * time.Millisecond }

var _ media.Disk = (*Disk)(nil)

// loop makes a loop device of a new file and returns its name.
func loop(t *testing.T, size int64, sector string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(need.Loop(t, file, sector))
	// An earlier user of the loop device can have left its partitions.
	if left, _ := filepath.Glob("/sys/class/block/" + name + "p*"); len(left) > 0 {
		run(t, need.Tool(t, "partx", "util-linux"), "--delete", "/dev/"+name)
	}
	return name
}

// run runs a command that must succeed.
func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// undo runs a command when the test ends; for some seconds again and again, since
// other tests look at all disks and may just have this one open.
func undo(t *testing.T, name string, args ...string) {
	t.Cleanup(func() {
		for tries := 0; ; tries++ {
			out, err := exec.Command(name, args...).CombinedOutput()
			if err == nil {
				return
			}
			if tries == 50 {
				t.Errorf("%s %v: %v: %s", name, args, err, out)
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
	})
}

// token is the present token of a disk that may be written.
func token(t *testing.T, name string) string {
	t.Helper()
	f, d, err := System{}.OpenRead(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tok, err := d.Token(f)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func wantRefused(t *testing.T, name string, codes ...string) {
	t.Helper()
	d, err := System{}.Device(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	_, err = System{}.Open(t.Context(), name, "")
	var refused *RefusedError
	if !errors.As(err, &refused) {
		t.Fatalf("Open(%s): %v", name, err)
	}
	for _, code := range codes {
		has := slices.ContainsFunc(d.Reasons, func(r Reason) bool { return r.Code == code })
		if !has || !refused.Has(code) {
			t.Errorf("%s is not refused as %s: %v; %v", name, code, d.Reasons, err)
		}
	}
}

func TestOwnDisk(t *testing.T) {
	need.Root(t)
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := parseMountinfo(string(text))
	if err != nil {
		t.Fatal(err)
	}
	devices, err := System{}.Devices(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		if d.Transport != "loop" && !d.Removable && len(d.Reasons) == 0 {
			t.Errorf("%s is built in and not refused", d.Name)
		}
	}
	for _, m := range mounts {
		if m.point != "/" || m.dev.major == 0 {
			continue
		}
		v, err := System{}.look()
		if err != nil {
			t.Fatal(err)
		}
		for name := range v.nodes {
			if slices.Contains(standing(name, v.above), v.byNum[m.dev].Name) {
				t.Logf("/ is on %s", name)
				// Dev has no nodes: to be refused it need not be opened.
				_, err := System{Dev: t.TempDir()}.Open(t.Context(), name, "")
				var refused *RefusedError
				if !errors.As(err, &refused) || !refused.Has(ReasonSystem) {
					t.Errorf("%s, the disk of /: %v", name, err)
				}
			}
		}
	}
}

func TestLoopIsFine(t *testing.T) {
	for _, sector := range []string{"512", "4096"} {
		t.Run(sector, func(t *testing.T) {
			name := loop(t, 16*mib, sector)
			d, err := System{}.Device(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			if len(d.Reasons) != 0 || d.Size != 16*mib || d.Transport != "loop" || fmt.Sprint(d.LogicalBlockSize) != sector ||
				!strings.HasSuffix(d.Backing, "/disk.img") || d.Path != "/dev/"+name {
				t.Errorf("device %+v", d)
			}
			all, err := System{}.Devices(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(all, func(d Device) bool { return d.Name == name }) {
				t.Errorf("%s is not listed", name)
			}
			before := token(t, name)
			disk, err := System{}.Open(t.Context(), name, before)
			if err != nil {
				t.Fatal(err)
			}
			if disk.Size() != d.Size || disk.SectorSize() != d.LogicalBlockSize || disk.Device().Name != name {
				t.Errorf("disk %+v", disk.device)
			}
			checkDisk(t, disk)

			// Nobody else gets it while it is open.
			if _, err := (System{}).Open(t.Context(), name, before); !isRefused(err, ReasonBusy) {
				t.Errorf("second Open: %v", err)
			}
			if _, err := unix.Open("/dev/"+name, unix.O_RDWR|unix.O_EXCL, 0); !errors.Is(err, unix.EBUSY) {
				t.Errorf("second O_EXCL: %v", err)
			}
			if err := disk.Close(); err != nil {
				t.Error(err)
			}

			// The table sectors were written: the old token is of another disk.
			_, err = System{}.Open(t.Context(), name, before)
			var changed *ChangedError
			if !errors.As(err, &changed) {
				t.Errorf("Open with a stale token: %v", err)
			}
			disk, err = System{}.Open(t.Context(), name, token(t, name))
			if err != nil {
				t.Fatal(err)
			}
			if err := disk.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func isRefused(err error, code string) bool {
	var refused *RefusedError
	return errors.As(err, &refused) && refused.Has(code)
}

// checkDisk reads and writes in ways that direct I/O alone can't.
func checkDisk(t *testing.T, d *Disk) {
	t.Helper()
	want := make([]byte, d.Size())
	r := rand.NewChaCha8([32]byte{})
	r.Read(want)
	odd := make([]byte, len(want)+1)[1:] // memory that no device takes directly
	copy(odd, want)
	if n, err := d.WriteAt(odd, 0); n != len(want) || err != nil {
		t.Fatalf("WriteAt: %d, %v", n, err)
	}
	aligned := alignedBuffer(2 * mib)
	copy(aligned, want[4*mib:])
	if _, err := d.WriteAt(aligned, 4*mib); err != nil {
		t.Fatal(err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := iotest.TestReader(io.NewSectionReader(d, 4000, 5000), want[4000:9000]); err != nil {
		t.Error(err)
	}
	for _, c := range []struct{ off, n int64 }{
		{0, 1}, {1, 511}, {511, 2}, {4095, 4098}, {5, bounceSize}, {d.Size() - 1, 1}, {d.Size() - 5000, 5000}, {mib, 2 * mib}, {0, d.Size()},
	} {
		p := make([]byte, c.n)
		if n, err := d.ReadAt(p, c.off); int64(n) != c.n || err != nil || !bytes.Equal(p, want[c.off:c.off+c.n]) {
			t.Errorf("ReadAt %d at %d: %d, %v", c.n, c.off, n, err)
		}
	}
	if n, err := d.ReadAt(make([]byte, 10), d.Size()-4); n != 4 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt across the end: %d, %v", n, err)
	}
	if n, err := d.ReadAt(make([]byte, 10), d.Size()); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt at the end: %d, %v", n, err)
	}
	if _, err := d.ReadAt(make([]byte, 10), -1); err == nil {
		t.Error("ReadAt before the start: no error")
	}
	if _, err := d.WriteAt(make([]byte, 4096), d.Size()); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("WriteAt behind the end: %v", err)
	}
	for _, c := range []struct{ off, n int }{{1, 4096}, {0, 100}, {-4096, 4096}} {
		if _, err := d.WriteAt(make([]byte, c.n), int64(c.off)); err == nil {
			t.Errorf("WriteAt %d at %d: no error", c.n, c.off)
		}
	}
}

func TestImageToLoop(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		name := loop(t, 32*mib, fmt.Sprint(sector))
		content := make([]byte, 9*mib)
		rand.NewChaCha8([32]byte{1}).Read(content)
		im := &media.Image{Size: 32 * mib, SectorSize: sector, Extents: []media.Extent{
			{Offset: 0, Length: mib, Content: bytes.NewReader(content)},
			{Offset: 3*mib + 4096, Length: 9 * mib, Content: bytes.NewReader(content)},
			{Offset: 32*mib - 4096, Length: 4096, Content: bytes.NewReader(content)},
		}}
		d, err := System{}.Open(t.Context(), name, token(t, name))
		if err != nil {
			t.Fatal(err)
		}
		res, err := media.Write(t.Context(), d, im, nil)
		if err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		f, _, err := System{}.OpenRead(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		again := *im
		again.Extents = nil
		for _, e := range im.Extents {
			again.Extents = append(again.Extents, media.Extent{Offset: e.Offset, Length: e.Length, Content: io.NewSectionReader(f, e.Offset, e.Length)})
		}
		digest, err := again.Digest(t.Context())
		if err != nil || digest != res.DigestRead || digest != res.DigestWritten {
			t.Errorf("digest %s, written and read %+v: %v", digest, res, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestOpenWaitsForALock(t *testing.T) {
	name := loop(t, 4*mib, "512")
	tok := token(t, name)
	f, err := os.Open("/dev/" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := (System{}).Open(ctx, name, tok); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled while it waits: %v", err)
	}
	if _, err := (System{}).Open(t.Context(), name, tok); !isRefused(err, ReasonBusy) {
		t.Errorf("locked for long: %v", err)
	}
	unlocked := make(chan error)
	go func() {
		time.Sleep(100 * time.Millisecond)
		unlocked <- unix.Flock(int(f.Fd()), unix.LOCK_UN)
	}()
	d, err := System{}.Open(t.Context(), name, tok)
	if err != nil {
		t.Fatalf("locked for a moment: %v", err)
	}
	if err := <-unlocked; err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestMountedLoop(t *testing.T) {
	mkfs := need.Tool(t, "mkfs.ext4", "e2fsprogs")
	name := loop(t, 16*mib, "512")
	dev := "/dev/" + name
	run(t, mkfs, "-q", "-L", "two words", dev)
	d, err := System{}.Device(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Contents) != 1 || d.Contents[0].Type != "ext4" || d.Contents[0].Label != "two words" || d.Contents[0].UUID == "" || d.Contents[0].Size != 16*mib {
		t.Errorf("contents %+v", d.Contents)
	}
	point := t.TempDir()
	if err := unix.Mount(dev, point, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	unmount := func() {
		if mounted {
			mounted = false
			if err := unix.Unmount(point, 0); err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(unmount)
	wantRefused(t, name, ReasonMounted)

	// A loop device whose file is on it holds it too.
	file := filepath.Join(point, "inner.img")
	if err := os.WriteFile(file, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("under a file's loop device", func(t *testing.T) {
		need.Loop(t, file, "512")
		wantRefused(t, name, ReasonMounted, ReasonHeld)
	})
	unmount()
	if d, err = (System{}).Device(t.Context(), name); err != nil || len(d.Reasons) != 0 {
		t.Errorf("unmounted: %v, %v", d.Reasons, err)
	}
}

func TestSwapOnLoop(t *testing.T) {
	mkswap, swapon, swapoff := need.Tool(t, "mkswap", "util-linux"), need.Tool(t, "swapon", "mount"), need.Tool(t, "swapoff", "mount")
	name := loop(t, 4*mib, "512")
	run(t, mkswap, "/dev/"+name)
	run(t, swapon, "/dev/"+name)
	undo(t, swapoff, "/dev/"+name)
	wantRefused(t, name, ReasonSwap)
}

func TestLoopOnLoop(t *testing.T) {
	lower := loop(t, 4*mib, "512")
	upper := filepath.Base(need.Loop(t, "/dev/"+lower, "512"))
	wantRefused(t, lower, ReasonHeld)
	wantRefused(t, upper, ReasonIndirect)
}

func TestPartitionOfLoop(t *testing.T) {
	sgdisk, partx := need.Tool(t, "sgdisk", "gdisk"), need.Tool(t, "partx", "util-linux")
	name := loop(t, 16*mib, "512")
	dev := "/dev/" + name
	run(t, sgdisk, "-n", "1:2048:8191", "-c", "1:a part", dev)
	run(t, partx, "--add", dev) // also where the kernel reads no partition tables
	undo(t, partx, "--delete", dev)
	part := name + "p1"
	wantRefused(t, part, ReasonPartition)
	if _, _, err := (System{}).OpenRead(t.Context(), part); !isRefused(err, ReasonPartition) {
		t.Errorf("OpenRead: %v", err)
	}
	d, err := System{}.Device(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Reasons) != 0 || len(d.Contents) != 2 || d.Contents[0].Type != "gpt" ||
		d.Contents[1].Name != part || d.Contents[1].PartLabel != "a part" || d.Contents[1].Size != 3*mib {
		t.Errorf("device %+v", d)
	}
	// The disk under it is refused once the partition is mounted.
	mkfs := need.Tool(t, "mkfs.ext4", "e2fsprogs")
	run(t, mkfs, "-q", "/dev/"+part)
	point := t.TempDir()
	if err := unix.Mount("/dev/"+part, point, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(point, 0); err != nil {
			t.Error(err)
		}
	})
	wantRefused(t, name, ReasonMounted)
	wantRefused(t, part, ReasonMounted, ReasonPartition)
}

func TestReadOnlyLoop(t *testing.T) {
	name := loop(t, 4*mib, "512")
	blockdev := need.Tool(t, "blockdev", "util-linux")
	run(t, blockdev, "--setro", "/dev/"+name)
	undo(t, blockdev, "--setrw", "/dev/"+name) // the kernel keeps it for the next user of the loop device
	wantRefused(t, name, ReasonReadOnly)
}

// A device whose node leads to another disk must not be opened as the one
// that sysfs tells of.
func TestNodeOfAnotherDisk(t *testing.T) {
	name, other := loop(t, 4*mib, "512"), loop(t, 4*mib, "512")
	tok := token(t, name)
	dev := t.TempDir()
	if err := os.Symlink("/dev/"+other, filepath.Join(dev, name)); err != nil {
		t.Fatal(err)
	}
	_, err := System{Dev: dev}.Open(t.Context(), name, tok)
	var changed *ChangedError
	if !errors.As(err, &changed) {
		t.Errorf("error %v", err)
	}
	if err := os.Remove(filepath.Join(dev, name)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dev, name)
	if err := os.WriteFile(file, []byte("a file, not a disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (System{Dev: dev}).Open(t.Context(), name, tok); err == nil {
		t.Error("a regular file was opened as a disk")
	}
	if got, _ := os.ReadFile(file); string(got) != "a file, not a disk" {
		t.Errorf("the file now holds %q", got)
	}
}

func TestToken(t *testing.T) {
	table := make([]byte, mib)
	d := Device{Name: "sda", Major: 8, Size: mib, LogicalBlockSize: 512, Serial: "1", DiskSeq: 2}
	seen := map[string]string{}
	for name, change := range map[string]func(*Device, []byte){
		"as it is":             func(*Device, []byte) {},
		"other number":         func(d *Device, _ []byte) { d.Minor = 16 },
		"other sequence":       func(d *Device, _ []byte) { d.DiskSeq++ },
		"other serial":         func(d *Device, _ []byte) { d.Serial = "2" },
		"other size":           func(d *Device, _ []byte) { d.Size -= 512 },
		"other sector size":    func(d *Device, _ []byte) { d.LogicalBlockSize = 4096 },
		"first sector":         func(_ *Device, p []byte) { p[0] = 1 },
		"end of the first 34":  func(_ *Device, p []byte) { p[34*512-1] = 1 },
		"start of the last 34": func(_ *Device, p []byte) { p[mib-34*512] = 1 },
		"last sector":          func(_ *Device, p []byte) { p[mib-1] = 1 },
	} {
		d, p := d, slices.Clone(table)
		change(&d, p)
		tok, err := d.Token(bytes.NewReader(p))
		if err != nil || seen[tok] != "" {
			t.Errorf("%s: %q is the token of %q too; %v", name, tok, seen[tok], err)
		}
		seen[tok] = name
	}
	p := slices.Clone(table)
	p[mib/2] = 1
	if tok, err := d.Token(bytes.NewReader(p)); err != nil || seen[tok] != "as it is" {
		t.Errorf("what is outside of the tables changes the token: %v", err)
	}
	if _, err := d.Token(iotestReaderAt{}); err == nil {
		t.Error("a disk that can't be read: no error")
	}
	d.mounted = true
	if tok, err := d.Token(iotestReaderAt{}); err != nil || seen[tok] != "" {
		t.Errorf("while it is mounted, %q: %v", seen[tok], err)
	}
	small := Device{Name: "sdb", Size: 1024, LogicalBlockSize: 512}
	if _, err := small.Token(bytes.NewReader(make([]byte, 1024))); err != nil {
		t.Errorf("a tiny disk: %v", err)
	}
}

type iotestReaderAt struct{}

func (iotestReaderAt) ReadAt([]byte, int64) (int, error) { return 0, unix.EIO }

func TestWatch(t *testing.T) {
	need.Root(t)
	ctx, cancel := context.WithCancel(t.Context())
	events, err := Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	loop(t, 4*mib, "512")
	select {
	case <-events:
	case <-time.After(5 * time.Second):
		t.Error("a loop device came and nothing was told")
	}
	cancel()
	for deadline := time.After(5 * time.Second); ; {
		select {
		case _, ok := <-events:
			if !ok {
				return
			}
		case <-deadline:
			t.Fatal("the channel stays open after the end")
		}
	}
}

func TestIsBlockEvent(t *testing.T) {
	for msg, want := range map[string]bool{
		"add@/devices/virtual/block/loop0\x00ACTION=add\x00SUBSYSTEM=block\x00SEQNUM=1\x00": true,
		"add@/devices/x\x00ACTION=add\x00SUBSYSTEM=usb\x00SEQNUM=1\x00":                     false,
		"": false,
	} {
		if got := isBlockEvent([]byte(msg)); got != want {
			t.Errorf("%q: %v", msg, got)
		}
	}
}
