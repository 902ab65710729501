package media

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// Disk is what an Image is written to: a block device or a file.
//
// WriteAt and ReadAt are called with whole sectors, from several goroutines at
// once, in any order. After Sync all that was written before is on the device,
// and ReadAt then reads from the device and not from memory.
//
// A Disk may also have one of these:
//
//	Size() int64; SectorSize() int                  // both in bytes: the image must fit
//	ZeroRange(off, n int64) (done bool, err error)  // zeros whole sectors without their bytes going over; not done: can't
//	Present() error                                 // why the device is no longer there; must not block
//	Blank() bool                                    // reads as zeros everywhere; asked before the first write
type Disk interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

type geometry interface {
	Size() int64
	SectorSize() int
}

type zeroer interface {
	ZeroRange(off, n int64) (done bool, err error)
}

type presence interface{ Present() error }

type blank interface{ Blank() bool }

// patience is how long a call to the disk is waited for once nobody wants it any
// more. The kernel can't be made to give it back. Tests have less.
var patience = 3 * time.Second

// presenceInterval is how often a disk that lets us wait is asked whether it is
// still there. Tests have less.
var presenceInterval = time.Second

// device is a Disk whose calls can't hold up the caller for ever: each runs in a
// goroutine of its own. When ctx ends, or the device is gone, it is waited for
// patience long; then it is left alone with its memory, and a *DeviceError of
// FaultStalled or FaultGone is returned. What it still writes can only be what it was
// told to.
type device struct{ Disk }

// do makes one call.
func (d device) do(ctx context.Context, call func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- call() }()
	watch := time.NewTicker(presenceInterval)
	defer watch.Stop()
	var why error
	for why == nil {
		select {
		case err := <-ended:
			return err
		case <-watch.C:
			why = d.gone()
		case <-ctx.Done():
			why = ctx.Err()
		}
	}
	select {
	case err := <-ended:
		if err == nil && FaultOf(why) == "" {
			return nil // what was asked for is done; the caller looks at ctx
		}
		return why
	case <-time.After(patience):
		return stalled(why)
	}
}

// stalled is the error of a call that was left alone, why it was.
func stalled(why error) error {
	if FaultOf(why) != "" {
		return why
	}
	return fmt.Errorf("%w: %w", why, &DeviceError{Fault: FaultStalled})
}

// gone returns a *DeviceError when the device is known to be no longer there.
func (d device) gone() error {
	if p, ok := d.Disk.(presence); ok {
		if err := p.Present(); err != nil {
			return &DeviceError{Fault: FaultGone, Err: err}
		}
	}
	return nil
}

// fault makes an error of reading or writing n bytes at off a *DeviceError.
func (d device) fault(otherwise Fault, off, n int64, err error) error {
	if err == nil || FaultOf(err) != "" {
		return err
	}
	f := otherwise
	switch {
	case isAny(err, unix.ENODEV, unix.ENXIO, unix.ENOMEDIUM) || d.gone() != nil:
		f = FaultGone
	case isAny(err, unix.EROFS, unix.EPERM):
		f = FaultReadOnly
	case isAny(err, unix.ENOSPC, io.ErrUnexpectedEOF):
		f = FaultShort
	}
	return &DeviceError{Fault: f, Offset: off, Length: n, Err: err}
}

func isAny(err error, targets ...error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}

// read fills p from the disk.
func (d device) read(p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		off, err = off+int64(n), io.ErrUnexpectedEOF
	}
	return d.fault(FaultRead, off, int64(len(p)), err)
}

// write writes all of p.
func (d device) write(p []byte, off int64) error {
	n, err := d.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if errors.Is(err, unix.ENOSPC) {
		off += int64(n)
	}
	return d.fault(FaultWrite, off, int64(len(p)), err)
}

func (d device) flush() error {
	if err := d.Sync(); err != nil {
		return fmt.Errorf("flush the disk: %w", d.fault(FaultWrite, 0, 0, err))
	}
	return nil
}
