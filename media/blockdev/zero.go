package blockdev

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ZeroRange makes n bytes from off on read as zeros, without sending them, where
// the device can do that by itself; both are whole sectors. done is false, and
// what the range holds is as it was or zero, where it can't: then zeros must be
// written. Discarding is not enough: it promises nothing about what is read
// afterwards, so discard_max_bytes says nothing here.
//
// The kernel asks the device by fallocate(2) with FALLOC_FL_PUNCH_HOLE, which on
// a block device means "zeroed by the device, or an error" (Linux, block/fops.c);
// it needs queue/write_zeroes_max_bytes above 0. What memory holds of the range
// is dropped.
func (d *Disk) ZeroRange(off, n int64) (done bool, err error) {
	sector := int64(d.SectorSize())
	if off < 0 || n < 0 || off%sector != 0 || n%sector != 0 {
		return false, fmt.Errorf("zero %d bytes at %d: not whole sectors of %d", n, off, sector)
	}
	if n > d.Size()-off {
		return false, fmt.Errorf("zero %d bytes at %d, the disk ends at %d: %w", n, off, d.Size(), unix.ENOSPC)
	}
	if n == 0 {
		return true, nil
	}
	d.written.Store(true)
	d.calls.Add(1)
	defer d.calls.Add(-1)
	for {
		err := with(d.f, func(fd int) error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		})
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY),
			errors.Is(err, unix.EREMOTEIO): // the device said that it can and then refused the command
			return false, nil
		default:
			return false, fmt.Errorf("zero %d bytes of %s at %d: %w", n, d.device.Name, off, err)
		}
	}
}
