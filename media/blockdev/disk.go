package blockdev

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Token pins the disk: device number, disk sequence number, serial, size,
// sector size and the hash of the sectors where partition tables lie, the first
// and the last 34. r reads the disk. Opening for writing asks for the same
// token, so that what a person agreed to erase is what is erased.
func (d Device) Token(r io.ReaderAt) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "memlinux disk\n%d:%d\n%d\n%q\n%d\n%d\n", d.Major, d.Minor, d.DiskSeq, d.Serial, d.Size, d.LogicalBlockSize)
	n := min(34*int64(d.LogicalBlockSize), d.Size)
	for _, off := range []int64{0, d.Size - n} {
		if _, err := io.Copy(h, io.NewSectionReader(r, off, n)); err != nil {
			return "", fmt.Errorf("read the partition table of %s: %w", d.Name, err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// OpenRead opens a whole disk for reading only, whatever speaks against
// writing it, and returns it with what is known of it but its contents. What
// memory holds of the disk is dropped, so that reading reads the device. The
// caller closes the file.
func (s System) OpenRead(ctx context.Context, name string) (*os.File, Device, error) {
	v, n, err := s.lookAt(ctx, name)
	if err != nil {
		return nil, Device{}, err
	}
	if n.partition {
		return nil, Device{}, &RefusedError{name, []Reason{{ReasonPartition, fmt.Sprintf("%s is a partition: give the whole disk, %s", name, n.disk)}}}
	}
	f, err := s.open(n, unix.O_RDONLY)
	if err != nil {
		return nil, Device{}, err
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		_ = f.Close() // nothing was written
		return nil, Device{}, fmt.Errorf("drop %s from memory: %w", name, err)
	}
	return f, v.device(n), nil
}

func (s System) lookAt(ctx context.Context, name string) (*survey, *node, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	v, err := s.look()
	if err != nil {
		return nil, nil, err
	}
	n, err := v.find(name)
	return v, n, err
}

// open opens a node and makes sure that it is the one sysfs told of.
func (s System) open(n *node, flags int) (*os.File, error) {
	path := filepath.Join(s.dev(), n.Name)
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return nil, fmt.Errorf("%s: %w", n.Name, ErrNoDevice)
	case errors.Is(err, unix.ENOMEDIUM):
		return nil, &RefusedError{n.Name, []Reason{{ReasonEmpty, "no medium is in " + n.Name}}}
	case errors.Is(err, unix.EROFS):
		return nil, &RefusedError{n.Name, []Reason{{ReasonReadOnly, n.Name + " is read-only: look for a switch on it"}}}
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = f.Close() // nothing was written
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || unix.Major(st.Rdev) != n.Major || unix.Minor(st.Rdev) != n.Minor {
		_ = f.Close() // nothing was written
		return nil, &ChangedError{n.Name, "device number"}
	}
	return f, nil
}

// Disk is a whole disk open for writing, for us alone. It is a media.Disk:
// reads and writes go past the page cache, so a write that returned is on the
// device and a read comes from there. It must be closed.
type Disk struct {
	device Device
	f      *os.File

	mu      sync.Mutex // guards bounce and written
	bounce  []byte     // for memory that the device can't take directly
	written bool
}

// Open opens a disk for writing if nothing speaks against it and it is still
// the disk that token was made of. The kernel's exclusive claim (O_EXCL) and
// udev's lock (flock, https://systemd.io/BLOCK_DEVICE_LOCKING) are held until
// Close. All checks are made once more when it is open.
//
// Errors: *RefusedError with every reason, *ChangedError, ErrNoDevice.
func (s System) Open(ctx context.Context, name, token string) (_ *Disk, err error) {
	v, n, err := s.lookAt(ctx, name)
	if err != nil {
		return nil, err
	}
	if reasons := v.reasons(n); len(reasons) > 0 {
		return nil, &RefusedError{name, reasons}
	}
	f, err := s.claim(ctx, n)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // nothing was written
		}
	}()

	// From here on nobody else can claim the disk: what is true now stays true.
	v, n, err = s.lookAt(ctx, name)
	if err != nil {
		return nil, err
	}
	if reasons := v.reasons(n); len(reasons) > 0 {
		return nil, &RefusedError{name, reasons}
	}
	d := &Disk{device: v.device(n), f: f, bounce: alignedBuffer(bounceSize)}
	if err := d.compare(); err != nil {
		return nil, err
	}
	now, err := d.device.Token(d)
	if err != nil {
		return nil, err
	}
	if now != token {
		return nil, &ChangedError{name, "partition table or identity"}
	}
	return d, nil
}

// patience is how long a disk is waited for that a program has open: those that
// only probe it, as udev does, are done by then. Tests have less.
var patience = 3 * time.Second

// claim opens the disk for us alone and locks it.
func (s System) claim(ctx context.Context, n *node) (*os.File, error) {
	deadline := time.Now().Add(patience)
	wait := func() (again bool, err error) {
		if !time.Now().Before(deadline) {
			return false, nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
			return true, nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
	busy := func(how string) error {
		return &RefusedError{n.Name, []Reason{{ReasonBusy, fmt.Sprintf("another program %s: close it and try again", how)}}}
	}
	var f *os.File
	for {
		var err error
		f, err = s.open(n, unix.O_RDWR|unix.O_EXCL|unix.O_DIRECT)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
		if again, err := wait(); err != nil {
			return nil, err
		} else if !again {
			return nil, busy(n.Name + " is claimed by the kernel or by a program, perhaps mounted where we can't see it; whatever uses it")
		}
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		again := false
		if errors.Is(err, unix.EWOULDBLOCK) {
			if again, err = wait(); err == nil && !again {
				err = busy("has locked " + n.Name)
			}
		} else if errors.Is(err, unix.EINTR) {
			again = true
		}
		if !again {
			_ = f.Close() // nothing was written
			return nil, err
		}
	}
}

// compare holds what sysfs told against what the open device says itself.
func (d *Disk) compare() error {
	size, err := d.ioctl64(unix.BLKGETSIZE64)
	if err != nil {
		return fmt.Errorf("ask %s for its size: %w", d.device.Name, err)
	}
	if size != uint64(d.device.Size) {
		return &ChangedError{d.device.Name, "size"}
	}
	sector, err := unix.IoctlGetInt(int(d.f.Fd()), unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("ask %s for its sector size: %w", d.device.Name, err)
	}
	if sector != d.device.LogicalBlockSize {
		return &ChangedError{d.device.Name, "sector size"}
	}
	seq, err := d.ioctl64(unix.BLKGETDISKSEQ)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return nil // before Linux 5.15
	}
	if err != nil {
		return fmt.Errorf("ask %s for its sequence number: %w", d.device.Name, err)
	}
	if seq != d.device.DiskSeq {
		return &ChangedError{d.device.Name, "disk sequence number"}
	}
	return nil
}

func (d *Disk) ioctl64(request uintptr) (v uint64, err error) {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.f.Fd(), request, uintptr(unsafe.Pointer(&v))) //nolint:gosec // the ioctl fills in v
	if errno != 0 {
		return 0, errno
	}
	return v, nil
}

// Device is the disk as it was when it was opened, without its contents.
func (d *Disk) Device() Device { return d.device }

// Size is the disk's size in bytes.
func (d *Disk) Size() int64 { return d.device.Size }

// SectorSize is the disk's logical block size in bytes.
func (d *Disk) SectorSize() int { return d.device.LogicalBlockSize }

// bounceSize bounds a transfer through memory that the device can take.
const bounceSize = 128 << 10

// alignedBuffer returns n bytes at an address that direct I/O takes for every
// sector size up to 4096.
func alignedBuffer(n int) []byte {
	b := make([]byte, n+4096)
	skip := int(-address(b) & 4095)
	return b[skip : skip+n : skip+n]
}

func address(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) } //nolint:gosec // only looked at

func (d *Disk) direct(p []byte, off int64) bool {
	sector := d.SectorSize()
	return off%int64(sector) == 0 && len(p)%sector == 0 && address(p)%uintptr(sector) == 0
}

// ReadAt reads from the device, never from memory. Any offset and length will do.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s: negative offset", d.device.Name)
	}
	if d.direct(p, off) {
		return d.f.ReadAt(p, off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	sector := int64(d.SectorSize())
	n := 0
	for n < len(p) {
		if off+int64(n) >= d.Size() {
			return n, io.EOF
		}
		skip := (off + int64(n)) % sector
		want := min((skip+int64(len(p)-n)+sector-1)/sector*sector, bounceSize)
		m, err := d.f.ReadAt(d.bounce[:want], off+int64(n)-skip)
		if int64(m) <= skip {
			return n, err
		}
		n += copy(p[n:], d.bounce[skip:m])
		if err != nil && n < len(p) {
			return n, err
		}
	}
	return n, nil
}

// WriteAt writes whole sectors.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	sector := int64(d.SectorSize())
	if off < 0 || off%sector != 0 || int64(len(p))%sector != 0 {
		return 0, fmt.Errorf("write %d bytes at %d: not whole sectors of %d", len(p), off, sector)
	}
	if int64(len(p)) > d.Size()-off {
		return 0, fmt.Errorf("write %d bytes at %d, the disk ends at %d: %w", len(p), off, d.Size(), unix.ENOSPC)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.written = true
	if d.direct(p, off) {
		return d.f.WriteAt(p, off)
	}
	n := 0
	for n < len(p) {
		m, err := d.f.WriteAt(d.bounce[:copy(d.bounce, p[n:])], off+int64(n))
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// Sync flushes the device's own cache.
func (d *Disk) Sync() error { return d.f.Sync() }

// Close lets the kernel read the new partition table, if anything was written,
// and gives the disk free. An error does not take back what was synced.
func (d *Disk) Close() error {
	var err error
	if d.written {
		err = d.rereadTable()
	}
	return errors.Join(err, d.f.Close())
}

func (d *Disk) rereadTable() error {
	for try := 0; ; try++ {
		_, err := unix.IoctlRetInt(int(d.f.Fd()), unix.BLKRRPART)
		switch {
		case err == nil, errors.Is(err, unix.EINVAL): // EINVAL: a loop device that shows no partitions
			return nil
		case errors.Is(err, unix.EBUSY) && try < 10:
			time.Sleep(100 * time.Millisecond)
		default:
			return fmt.Errorf("the kernel did not read the new partition table of %s, plug it in again: %w", d.device.Name, err)
		}
	}
}
