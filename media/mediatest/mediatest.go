// Package mediatest gives tests a disk that fails as they tell it to: memory,
// served as a file by FUSE, below a real loop device. What the kernel makes of
// each failure is real.
package mediatest

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// Call is what the kernel wants of the disk.
type Call struct {
	Write  bool  // else a read
	Off, N int64 // bytes
}

// Touches tells whether the byte at off is among those of the call.
func (c Call) Touches(off int64) bool { return off >= c.Off && off < c.Off+c.N }

// Faults are what is wrong with a disk. Places are in bytes.
type Faults struct {
	Flip     int64 // a byte that reads with one bit flipped; 0: none
	DropFrom int64 // what is written from here on is lost; 0: nothing is
	WrapAt   int64 // the real size, at which places begin anew; 0: the whole
	// Fail gives the answer to a call, if it is not 0; it may wait. The kernel cuts calls
	// up, and takes one whose first parts were written for done (Linux,
	// drivers/block/loop.c, lo_complete_rq): the rest is then dropped without a word.
	Fail func(Call) syscall.Errno
}

// Disk is a block device of a test.
type Disk struct {
	Path string // /dev/loop0

	t       testing.TB
	dir     string     // where the file is mounted
	control sync.Mutex // guards device
	device  *os.File
	release chan struct{} // closed at the end: Hold waits for it

	mu     sync.Mutex
	data   []byte
	size   int64 // of the file
	faults Faults
}

// New makes a disk of size bytes, a multiple of the sector size, that is
// sound and filled with something. It is gone when the test ends.
func New(t testing.TB, size int64, sectorSize int) *Disk {
	t.Helper()
	d := &Disk{t: t, dir: t.TempDir(), release: make(chan struct{}), data: make([]byte, size), size: size}
	for i := range d.data {
		d.data[i] = 0xA5
	}
	connection := need.FUSE(t)
	// The server closes its own.
	fd, err := unix.FcntlInt(connection.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	connection.Close()
	if err != nil {
		t.Fatal(err)
	}
	attributes := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)
	if err := unix.Mount("memlinux-test", d.dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, attributes); err != nil {
		t.Fatalf("mount FUSE at %s: %v", d.dir, err)
	}
	root := &fs.Inode{}
	server, err := fuse.NewServer(fs.NewNodeFS(root, &fs.Options{OnAdd: func(ctx context.Context) {
		root.AddChild("disk", root.NewPersistentInode(ctx, &file{disk: d}, fs.StableAttr{Mode: fuse.S_IFREG}), false)
	}}), fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{MaxWrite: 512 << 10, Logger: log.New(io.Discard, "", 0)})
	if err != nil {
		_ = unix.Unmount(d.dir, unix.MNT_DETACH)
		t.Fatalf("serve FUSE: %v", err)
	}
	go server.Serve()
	// The last to be cleaned up, behind the loop device.
	t.Cleanup(func() {
		if err := unix.Unmount(d.dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", d.dir, err)
		}
		server.Wait()
	})
	d.Path = need.Loop(t, d.file(), fmt.Sprint(sectorSize))
	// Several calls at once, as on a stick.
	if out, err := exec.Command("losetup", "--direct-io=on", d.Path).CombinedOutput(); err != nil {
		t.Fatalf("losetup --direct-io=on %s: %v: %s", d.Path, err, out)
	}
	if d.device, err = os.OpenFile(d.Path, os.O_RDONLY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.readOnly(0) // it outlives the disk
		d.control.Lock()
		defer d.control.Unlock()
		d.device.Close()
	})
	// The first to be cleaned up: what waits holds up all else.
	t.Cleanup(func() { close(d.release) })
	return d
}

func (d *Disk) file() string { return filepath.Join(d.dir, "disk") }

// Break gives the disk its faults.
func (d *Disk) Break(f Faults) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = f
}

// Holds is what is on the disk from off on, whatever it would answer.
func (d *Disk) Holds(off, n int64) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]byte(nil), d.data[off:off+n]...)
}

// Resize makes the kernel see a disk of another, smaller size. With 0 there is
// no medium any more. It may be called out of Faults.Fail.
func (d *Disk) Resize(size int64) {
	d.t.Helper()
	d.mu.Lock()
	d.size = size
	d.mu.Unlock()
	// This has the kernel ask for the file's size.
	if _, err := os.Stat(d.file()); err != nil {
		d.t.Error(err)
	}
	d.control.Lock()
	defer d.control.Unlock()
	if err := unix.IoctlSetInt(int(d.device.Fd()), unix.LOOP_SET_CAPACITY, 0); err != nil {
		d.t.Errorf("give %s another size: %v", d.Path, err)
	}
}

// SetReadOnly has the kernel refuse what is written from now on. It may be called
// out of Faults.Fail.
func (d *Disk) SetReadOnly() { d.readOnly(1) }

func (d *Disk) readOnly(to int) {
	d.control.Lock()
	defer d.control.Unlock()
	if err := unix.IoctlSetPointerInt(int(d.device.Fd()), unix.BLKROSET, to); err != nil {
		d.t.Errorf("make %s read-only (%d): %v", d.Path, to, err)
	}
}

// Hold does not come back before the test's end: for a call out of Faults.Fail
// that is never answered.
func (d *Disk) Hold() { <-d.release }

// Die has every call fail from now on: the server of the file is gone.
func (d *Disk) Die() {
	// To unmount what is in use fails, and by then the connection is cut
	// (Linux, fs/fuse/inode.c, fuse_umount_begin).
	_ = unix.Unmount(d.dir, unix.MNT_FORCE)
}

func (d *Disk) fail(c Call) syscall.Errno {
	d.mu.Lock()
	fail := d.faults.Fail
	d.mu.Unlock()
	if fail == nil {
		return 0
	}
	return fail(c)
}

// each calls do for the pieces of n bytes at off, with where they really lie.
func (d *Disk) each(off, n int64, do func(at, from, to int64)) {
	limit := int64(len(d.data))
	if d.faults.WrapAt > 0 {
		limit = d.faults.WrapAt
	}
	for from := int64(0); from < n; {
		at := (off + from) % limit
		to := min(n, from+limit-at)
		do(at, from, to)
		from = to
	}
}

// file is the file that the kernel sees.
type file struct {
	fs.Inode
	disk *Disk
}

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	out.Mode = unix.S_IFREG | 0o600
	out.Size = uint64(f.disk.size)
	return 0
}

// Open has nothing of the file kept in memory: what is read comes from here.
func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *file) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	d := f.disk
	if errno := d.fail(Call{Off: off, N: int64(len(p))}); errno != 0 {
		return nil, errno
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := max(0, min(int64(len(p)), d.size-off))
	d.each(off, n, func(at, from, to int64) { copy(p[from:to], d.data[at:]) })
	if flip := d.faults.Flip; flip > 0 && flip >= off && flip < off+n {
		p[flip-off] ^= 4
	}
	return fuse.ReadResultData(p[:n]), 0
}

func (f *file) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	d := f.disk
	if errno := d.fail(Call{Write: true, Off: off, N: int64(len(p))}); errno != 0 {
		return 0, errno
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := int64(len(p))
	if d.faults.DropFrom > 0 {
		n = max(0, min(n, d.faults.DropFrom-off))
	}
	d.each(off, n, func(at, from, to int64) { copy(d.data[at:], p[from:to]) })
	return uint32(len(p)), 0
}

func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }
