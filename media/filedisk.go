package media

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// FileDisk is a Disk in a regular file that somebody else opened, as a client
// of the daemon does. It stays the caller's to close.
type FileDisk struct {
	f     *os.File
	size  int64
	dirty int64 // bytes written since the last sync
}

// dirtyLimit bounds what WriteAt leaves to the page cache.
const dirtyLimit = 16 << 20

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
	return &FileDisk{f: f, size: im.Size}, nil
}

// ReadAt reads from the file; after Sync, from the device below it.
func (d *FileDisk) ReadAt(p []byte, off int64) (int, error) { return d.f.ReadAt(p, off) }

// WriteAt writes, and makes durable what gathered in the page cache once that
// is 16 MiB. It refuses to make the file longer.
func (d *FileDisk) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > d.size-off {
		return 0, fmt.Errorf("write %d bytes at %d: %w", len(p), off, unix.ENOSPC)
	}
	n, err := d.f.WriteAt(p, off)
	d.dirty += int64(n)
	if err == nil && d.dirty >= dirtyLimit {
		err = d.datasync()
	}
	return n, err
}

// Sync makes the file durable and drops it from the page cache.
func (d *FileDisk) Sync() error {
	if err := d.datasync(); err != nil {
		return err
	}
	return d.control(func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
}

func (d *FileDisk) datasync() error {
	d.dirty = 0
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
