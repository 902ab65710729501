package media

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FileDisk is a Disk in a regular file that somebody else opened, as a client
// of the daemon does. It stays the caller's to close. Where the file system can,
// reads and writes go past the page cache.
type FileDisk struct {
	f      *os.File
	direct *os.File // the same file, opened for direct I/O; nil: not to be had
	size   int64
	dirty  atomic.Int64 // bytes written to the page cache since the last sync
	used   atomic.Bool  // something was written
}

const (
	// dirtyLimit bounds what WriteAt leaves to the page cache.
	dirtyLimit = 16 << 20

	// directUnit is what offsets, lengths and addresses of direct I/O are
	// multiples of on every file system of today.
	directUnit = 4096
)

// ErrUnfitFile says that a file can't be the target of a write, whatever its
// content; the error around it says why.
var ErrUnfitFile = errors.New("the file can't take an image")

// NewFileDisk makes f ready to take im: it must be a regular file, open for
// reading and writing and not for appending (else ErrUnfitFile), and its file
// system must have room for im's data (else a *NoSpaceError). Its old content
// is dropped, and what im leaves out is a hole that reads as zeros. On an
// error f is as it was, but for an error of the truncation itself.
func NewFileDisk(f *os.File, im *Image) (*FileDisk, error) {
	if err := im.Validate(); err != nil {
		return nil, err
	}
	fd := int(f.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("look at the target file: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%w: it is not a regular file", ErrUnfitFile)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, fmt.Errorf("look at the target file: %w", err)
	}
	if flags&unix.O_ACCMODE != unix.O_RDWR || flags&unix.O_PATH != 0 {
		return nil, fmt.Errorf("%w: open it for reading and writing", ErrUnfitFile)
	}
	if flags&unix.O_APPEND != 0 {
		return nil, fmt.Errorf("%w: it is open for appending, which would put every byte at its end", ErrUnfitFile)
	}

	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, fmt.Errorf("look at the target's file system: %w", err)
	}
	// The blocks that the old content holds are free once it is dropped.
	have := int64(fs.Bavail)*fs.Bsize + st.Blocks*512
	if need := im.DataBytes(); need > have {
		return nil, &NoSpaceError{Where: "the target's file system", Need: need, Have: have}
	}

	if err := f.Truncate(0); err != nil {
		return nil, fmt.Errorf("drop the target file's old content: %w", err)
	}
	if err := f.Truncate(im.Size); err != nil {
		return nil, fmt.Errorf("make the target file %d MiB long: %w", im.Size>>20, err)
	}
	d := &FileDisk{f: f, size: im.Size}
	// A second opening, since the flag would change the caller's too. It is closed
	// when d is collected.
	if direct, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDWR|unix.O_DIRECT, 0); err == nil {
		d.direct = direct
	}
	return d, nil
}

// Blank tells whether there are nothing but holes: nothing was written yet.
func (d *FileDisk) Blank() bool { return !d.used.Load() }

// straight is how many of the first bytes of p can go past the page cache.
func (d *FileDisk) straight(p []byte, off int64) int {
	if d.direct == nil || off%directUnit != 0 || address(p)%directUnit != 0 {
		return 0
	}
	return len(p) / directUnit * directUnit
}

// ReadAt reads from the file; after Sync, from the device below it.
func (d *FileDisk) ReadAt(p []byte, off int64) (int, error) {
	n := d.straight(p, off)
	if n > 0 {
		got, err := d.direct.ReadAt(p[:n], off)
		if errors.Is(err, unix.EINVAL) {
			n = 0 // direct I/O is not for this file system after all
		} else if err != nil {
			return got, err
		}
	}
	if n == len(p) {
		return n, nil
	}
	got, err := d.f.ReadAt(p[n:], off+int64(n))
	return n + got, err
}

// WriteAt writes, and makes durable what gathered in the page cache once that
// is 16 MiB. It refuses to make the file longer.
func (d *FileDisk) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > d.size-off {
		return 0, fmt.Errorf("write %d bytes at %d: %w", len(p), off, unix.ENOSPC)
	}
	d.used.Store(true)
	n := d.straight(p, off)
	if n > 0 {
		put, err := d.direct.WriteAt(p[:n], off)
		if errors.Is(err, unix.EINVAL) {
			n = 0 // direct I/O is not for this file system after all
		} else if err != nil {
			return put, err
		}
	}
	if n == len(p) {
		return n, nil
	}
	put, err := d.f.WriteAt(p[n:], off+int64(n))
	if d.dirty.Add(int64(put)) >= dirtyLimit && err == nil {
		err = d.datasync()
	}
	return n + put, err
}

// Sync makes the file durable and drops it from the page cache.
func (d *FileDisk) Sync() error {
	if err := d.datasync(); err != nil {
		return err
	}
	return d.control(func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
}

func (d *FileDisk) datasync() error {
	d.dirty.Store(0)
	return d.control(unix.Fdatasync)
}

func (d *FileDisk) control(do func(fd int) error) error {
	conn, err := d.f.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	if err := conn.Control(func(fd uintptr) {
		for {
			if opErr = do(int(fd)); !errors.Is(opErr, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	return opErr
}
