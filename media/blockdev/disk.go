package blockdev

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Token pins the disk: device number, disk sequence number, serial, size,
// sector size and the hash of the sectors where partition tables lie, the first
// and the last 34; these sectors only while no file system on the whole disk is
// mounted, which writes there. r reads the disk. Opening for writing asks for the
// same token, so that what a person agreed to erase is what is erased.
func (d Device) Token(r io.ReaderAt) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "memlinux disk\n%s", d.identity())
	if d.mounted {
		fmt.Fprintln(h, "mounted")
		return hex.EncodeToString(h.Sum(nil)), nil
	}
	n := min(34*int64(d.LogicalBlockSize), d.Size)
	for _, off := range []int64{0, d.Size - n} {
		if _, err := io.Copy(h, io.NewSectionReader(r, off, n)); err != nil {
			return "", fmt.Errorf("read the partition table of %s: %w", d.Name, err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// identity is all of a token that does not lie on the disk.
func (d Device) identity() string {
	return fmt.Sprintf("%d:%d\n%d\n%q\n%d\n%d\n", d.Major, d.Minor, d.DiskSeq, d.Serial, d.Size, d.LogicalBlockSize)
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
		return nil, Device{}, &RefusedError{name, []Reason{{Code: ReasonPartition, Text: fmt.Sprintf("%s is a partition: give the whole disk, %s", name, n.disk)}}}
	}
	if v.isSilent(n) { // whoever opened it would wait with the others
		return nil, Device{}, &RefusedError{name, []Reason{v.silence(n)}}
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
		return nil, &RefusedError{n.Name, []Reason{{Code: ReasonEmpty, Text: "no medium is in " + n.Name}}}
	case errors.Is(err, unix.EROFS):
		return nil, &RefusedError{n.Name, []Reason{{Code: ReasonReadOnly, Text: n.Name + " is read-only: look for a switch on it"}}}
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
	lock   *os.File // holds udev's lock; not f, so that it is held while others' mounts still keep f from being opened
	f      *os.File

	mu      sync.Mutex // guards bounce
	bounce  []byte     // for memory that the device can't take directly
	written atomic.Bool
	calls   atomic.Int32 // that the kernel has not given back
}

// Terms is what a person, or the work to be done, lays down beyond the disk
// itself. The zero value lifts nothing.
type Terms struct {
	// Serial is what a person typed. If it is the disk's own, byte for byte, the
	// soft reasons are lifted, if there are no others. A disk without a serial
	// has nothing that could be typed.
	Serial string
	// Unmount lists mount points (Mount.Point) that a person agreed to have
	// unmounted. What of the disk is mounted elsewhere still refuses it, and the
	// running system's mount points are never unmounted.
	Unmount []string
	// Source is the open file or device that the data will come from, nil if none:
	// a disk is never overwritten with what is read from it.
	Source *os.File
}

// Open is OpenOn without terms.
func (s System) Open(ctx context.Context, name, token string) (*Disk, error) {
	return s.OpenOn(ctx, name, token, Terms{})
}

// OpenOn opens a disk for writing if nothing speaks against it that the terms do
// not lift and it is still the disk that token was made of. udev's lock (flock,
// https://systemd.io/BLOCK_DEVICE_LOCKING) is taken first and the kernel's
// exclusive claim (O_EXCL) last; both are held until Close. What the terms let
// unmount is unmounted under the lock, so that no automounter hears of the disk
// in between, and only when nothing else speaks against the disk. All checks are
// made once more when it is open.
//
// Errors: *RefusedError with every reason, *ChangedError, ErrNoDevice. After
// one, some of Terms.Unmount can be unmounted.
func (s System) OpenOn(ctx context.Context, name, token string, terms Terms) (_ *Disk, err error) {
	if _, err := s.admit(ctx, name, terms, terms.Unmount); err != nil {
		return nil, err
	}
	d := &Disk{bounce: alignedBuffer(bounceSize)}
	defer func() {
		if err != nil {
			_ = d.release() // nothing was written
		}
	}()
	if d.lock, err = s.lock(ctx, name); err != nil {
		return nil, err
	}
	if d.device, err = s.admit(ctx, name, terms, terms.Unmount); err != nil {
		return nil, err
	}
	locked := d.device
	unmounted := false
	if len(terms.Unmount) > 0 {
		// The token is looked at before, since unmounting writes where it is made of,
		// and since another disk's mounts are none of ours.
		if err := d.compare(d.lock); err != nil {
			return nil, err
		}
		if err := d.match(d.lock, token); err != nil {
			return nil, err
		}
		if unmounted, err = s.unmount(ctx, name, terms.Unmount); err != nil {
			return nil, err
		}
	}
	if d.f, err = s.claim(ctx, name); err != nil {
		// Mounted in this moment: that says more than that it is claimed.
		var refused *RefusedError
		if _, now := s.admit(ctx, name, terms, nil); errors.As(now, &refused) {
			err = now
		}
		return nil, err
	}

	// From here on nobody else can claim the disk: what is true now stays true.
	if d.device, err = s.admit(ctx, name, terms, nil); err != nil {
		return nil, err
	}
	if err := d.compare(d.f); err != nil {
		return nil, err
	}
	if err := d.notBackedBy(terms.Source); err != nil {
		return nil, err
	}
	if d.device.identity() != locked.identity() {
		return nil, &ChangedError{name, "identity"}
	}
	if !unmounted {
		if err := d.match(d, token); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// match makes sure that r, the disk, still has the token.
func (d *Disk) match(r io.ReaderAt, token string) error {
	now, err := d.device.Token(r)
	if err != nil {
		return err
	}
	if now != token {
		return &ChangedError{d.device.Name, "partition table or identity"}
	}
	return nil
}

// admit gives the device if nothing speaks against it but what the terms lift
// and what is mounted at the points.
func (s System) admit(ctx context.Context, name string, terms Terms, unmounted []string) (Device, error) {
	v, n, err := s.lookAt(ctx, name)
	if err != nil {
		return Device{}, err
	}
	return v.admit(n, terms, unmounted)
}

func (v *survey) admit(n *node, terms Terms, unmounted []string) (Device, error) {
	mounted := len(v.mounts[n.Name]) > 0
	v.forget(n, unmounted)
	d := v.device(n)
	d.mounted = mounted
	if terms.Source != nil {
		r, err := v.source(n, terms.Source)
		if err != nil {
			return Device{}, err
		}
		d.Reasons = append(r, d.Reasons...)
	}
	hard := slices.ContainsFunc(d.Reasons, func(r Reason) bool { return !r.Soft })
	typed := terms.Serial != "" && terms.Serial == d.Serial
	if len(d.Reasons) > 0 && (hard || !typed) {
		return Device{}, &RefusedError{n.Name, d.Reasons}
	}
	return d, nil
}

// source is the reason against a disk that f is read from.
func (v *survey) source(n *node, f *os.File) ([]Reason, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_TYPE|unix.STATX_MNT_ID, &st); err != nil {
		return nil, fmt.Errorf("look at what is to be written: %w", err)
	}
	var on []*node
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		on = append(on, v.byNum[devNum{st.Rdev_major, st.Rdev_minor}])
	} else {
		on = append(on, v.byNum[devNum{st.Dev_major, st.Dev_minor}])
		for _, space := range v.spaces {
			for _, m := range space {
				if m.id == st.Mnt_id && st.Mask&unix.STATX_MNT_ID != 0 {
					on = append(on, v.mounted(m)...)
				}
			}
		}
	}
	for _, o := range on {
		if o != nil && slices.Contains(standing(n.Name, v.above, v.files), o.Name) {
			return []Reason{{Code: ReasonSource, Text: fmt.Sprintf("what is to be written is read from %s: copy it elsewhere first", v.describe(n.Name, o.Name))}}, nil
		}
	}
	return nil, nil
}

// patience is how long a disk is waited for that a program uses: those that
// only probe it, as udev does, are done by then. Tests have less.
var patience = 3 * time.Second

type wait struct{ until time.Time }

func newWait() wait { return wait{time.Now().Add(patience)} }

// again waits a moment; it is false when patience is at its end.
func (w wait) again(ctx context.Context) (bool, error) {
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	if !time.Now().Before(w.until) {
		return false, nil
	}
	select {
	case <-time.After(50 * time.Millisecond):
		return true, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

func busy(name, format string, args ...any) error {
	return &RefusedError{name, []Reason{{Code: ReasonBusy, Text: fmt.Sprintf(format, args...)}}}
}

// lock takes udev's lock of the disk, which works on what is mounted, too.
func (s System) lock(ctx context.Context, name string) (*os.File, error) {
	_, n, err := s.lookAt(ctx, name)
	if err != nil {
		return nil, err
	}
	f, err := s.open(n, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	w := newWait()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		again := errors.Is(err, unix.EINTR)
		if errors.Is(err, unix.EWOULDBLOCK) {
			if again, err = w.again(ctx); err == nil && !again {
				err = busy(name, "another program has locked %s%s: close it and try again", name, openBy(s.openers(n.numbers(nil), false)))
			}
		}
		if !again {
			_ = f.Close() // nothing was written
			return nil, err
		}
	}
}

// claim opens the disk for us alone, and sees to it that no other program has it
// open for writing: two that write one stick are both served badly.
func (s System) claim(ctx context.Context, name string) (*os.File, error) {
	v, n, err := s.lookAt(ctx, name)
	if err != nil {
		return nil, err
	}
	devices := n.numbers(v)
	w := newWait()
	for {
		f, err := s.open(n, unix.O_RDWR|unix.O_EXCL|unix.O_DIRECT)
		var writers []process
		if err == nil {
			if writers = s.openers(devices, true); len(writers) == 0 {
				return f, nil
			}
			_ = f.Close() // nothing was written
		} else if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
		again, err := w.again(ctx)
		switch {
		case err != nil:
			return nil, err
		case again:
			continue
		case len(writers) > 0:
			return nil, busy(name, "%s is written by %s: wait for that to end", name, several(writers))
		}
		if who := s.sees(devices); len(who) > 0 {
			return nil, busy(name, "%s is mounted where only others see it, as %s does: unmount it there", name, several(who))
		}
		return nil, busy(name, "%s is claimed by the kernel or by a program%s, perhaps mounted where we can't see it: close whatever uses it and try again",
			name, openBy(s.openers(devices, false)))
	}
}

// openBy puts processes into a sentence.
func openBy(who []process) string {
	if len(who) == 0 {
		return ""
	}
	return ", of those that have it open: " + several(who)
}

// numbers are the device numbers of a disk and, in v, of its partitions.
func (n *node) numbers(v *survey) map[devNum]bool {
	all := map[devNum]bool{{n.Major, n.Minor}: true}
	if v != nil {
		for _, up := range v.above[n.Name] {
			if u := v.nodes[up]; u != nil && u.disk == n.Name {
				all[devNum{u.Major, u.Minor}] = true
			}
		}
	}
	return all
}

// compare holds what sysfs told against what the open device says itself.
func (d *Disk) compare(f *os.File) error {
	size, err := ioctl64(f, unix.BLKGETSIZE64)
	if err != nil {
		return fmt.Errorf("ask %s for its size: %w", d.device.Name, err)
	}
	if size != uint64(d.device.Size) {
		return &ChangedError{d.device.Name, "size"}
	}
	sector, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("ask %s for its sector size: %w", d.device.Name, err)
	}
	if sector != d.device.LogicalBlockSize {
		return &ChangedError{d.device.Name, "sector size"}
	}
	if d.device.Transport == "loop" {
		// A loop device tells the path by which its file was opened. That the path
		// was of a device shows only here: for a file, Rdevice is 0, or Device in older
		// kernels (drivers/block/loop.c).
		info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
		if err != nil {
			return fmt.Errorf("ask %s for its file: %w", d.device.Name, err)
		}
		if info.Rdevice != 0 && info.Rdevice != info.Device {
			return &RefusedError{d.device.Name, []Reason{{Code: ReasonIndirect, Text: fmt.Sprintf("%s is only another name for the device %s: give that disk", d.device.Name, d.device.Backing)}}}
		}
	}
	seq, err := ioctl64(f, unix.BLKGETDISKSEQ)
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

// notBackedBy makes sure that the disk is no loop device on the file source.
func (d *Disk) notBackedBy(source *os.File) error {
	if source == nil || d.device.Transport != "loop" {
		return nil
	}
	info, err := unix.IoctlLoopGetStatus64(int(d.f.Fd()))
	if err != nil {
		return fmt.Errorf("ask %s for its file: %w", d.device.Name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(source.Fd()), &st); err != nil {
		return fmt.Errorf("look at what is to be written: %w", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG && info.Inode == st.Ino && info.Device == st.Dev {
		return &RefusedError{d.device.Name, []Reason{{Code: ReasonSource, Text: "what is to be written is the file that " + d.device.Name + " is made of"}}}
	}
	return nil
}

func ioctl64(f *os.File, request uintptr) (v uint64, err error) {
	err = with(f, func(fd int) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&v))); errno != 0 { //nolint:gosec // the ioctl fills in v
			return errno
		}
		return nil
	})
	return v, err
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
	d.calls.Add(1)
	defer d.calls.Add(-1)
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
	d.written.Store(true)
	d.calls.Add(1)
	defer d.calls.Add(-1)
	if d.direct(p, off) {
		return writeAt(d.f, p, off)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for n < len(p) {
		m, err := writeAt(d.f, d.bounce[:copy(d.bounce, p[n:])], off+int64(n))
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// writeAt is [os.File.WriteAt], which does not say how much was written before an
// error: with that, where a disk ends is known.
func writeAt(f *os.File, p []byte, off int64) (n int, err error) {
	err = with(f, func(fd int) error {
		for n < len(p) {
			m, err := unix.Pwrite(fd, p[n:], off+int64(n))
			switch n += max(m, 0); {
			case errors.Is(err, unix.EINTR):
			case err != nil:
				return &fs.PathError{Op: "write", Path: f.Name(), Err: err}
			case m == 0:
				return io.ErrShortWrite
			}
		}
		return nil
	})
	return n, err
}

// with calls do with the file's descriptor, which stays that file's meanwhile,
// even if it is closed: a device that does not answer gives calls back when nobody
// waits for them any more. Several may be made at once.
func with(f *os.File, do func(fd int) error) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var why error
	if err := raw.Control(func(fd uintptr) { why = do(int(fd)) }); err != nil {
		return err
	}
	return why
}

// Sync flushes the device's own cache.
func (d *Disk) Sync() error {
	d.calls.Add(1)
	defer d.calls.Add(-1)
	return d.f.Sync()
}

// Present is nil while the disk is plugged in, else an error that is
// [unix.ENODEV]. It does not wait for the disk.
func (d *Disk) Present() error {
	size, err := ioctl64(d.f, unix.BLKGETSIZE64)
	if err == nil && size > 0 {
		_, err = os.Stat(fmt.Sprintf("/sys/dev/block/%d:%d", d.device.Major, d.device.Minor))
	}
	if err != nil || size == 0 {
		return fmt.Errorf("%s is gone: %w", d.device.Name, unix.ENODEV)
	}
	return nil
}

// Close lets the kernel read the new partition table, if anything was written,
// and gives the disk free. An error does not take back what was synced. A disk that
// holds up a call is left as it is: it would hold up Close, too.
func (d *Disk) Close() error {
	var err error
	if d.written.Load() && d.calls.Load() == 0 {
		err = d.rereadTable()
	}
	return errors.Join(err, d.release())
}

// release gives the lock free before the claim: closing what was open for writing
// is what makes udev look at the disk, and it must not find it locked then.
func (d *Disk) release() error {
	var err error
	for _, f := range []*os.File{d.lock, d.f} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
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
