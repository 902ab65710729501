package media

import (
	"errors"
	"fmt"
)

// Fault is what is wrong with a disk.
type Fault string

// What came back differs from what was written; a *MismatchError tells more.
const (
	FaultFlipped  Fault = "flipped"  // a few bits, or bytes in a place, are others
	FaultDropped  Fault = "dropped"  // writes are accepted and lost
	FaultWraps    Fault = "wraps"    // a place beyond the real capacity is an earlier one
	FaultUnstable Fault = "unstable" // it reads one way now and another way then
)

// What the disk does not do; a *DeviceError tells more.
const (
	FaultRead     Fault = "read-error"
	FaultWrite    Fault = "write-error"
	FaultGone     Fault = "unplugged"
	FaultReadOnly Fault = "read-only"
	FaultShort    Fault = "short"   // it ends before its size
	FaultStalled  Fault = "stalled" // it does not answer
)

// FaultOf is the fault that a *MismatchError or *DeviceError in err's chain
// tells of, or "".
func FaultOf(err error) Fault {
	var mismatch *MismatchError
	var device *DeviceError
	switch {
	case errors.As(err, &mismatch):
		return mismatch.Fault
	case errors.As(err, &device):
		return device.Fault
	}
	return ""
}

// MismatchError says that the disk gave back other bytes than were written,
// and in what way.
type MismatchError struct {
	Fault  Fault
	Offset int64 // of the first byte that differs, in bytes from the disk's start

	Bits     int64 // FaultFlipped: how many differ around there
	From     int64 // FaultWraps: where we had written what came back at Offset
	Capacity int64 // FaultWraps, FaultDropped: what the disk really holds, in bytes; 0: not known
}

func (e *MismatchError) Error() string {
	switch e.Fault {
	case FaultFlipped:
		return fmt.Sprintf("the disk gave back %d flipped bits, first at byte %d: it is faulty, use another one", e.Bits, e.Offset)
	case FaultWraps:
		return fmt.Sprintf("the disk's capacity is faked: what was written at byte %d came back at byte %d, so it wraps after %s: use another one", e.From, e.Offset, amount(e.Capacity))
	case FaultUnstable:
		return fmt.Sprintf("the disk gives back other bytes from one reading to the next, first at byte %d: try another port or cable, else use another disk", e.Offset)
	case FaultDropped:
		if e.Capacity > 0 {
			return fmt.Sprintf("the disk drops what is written from byte %d on: it holds %s, whatever it says, use another one", e.Offset, amount(e.Capacity))
		}
		return fmt.Sprintf("the disk dropped what was written at byte %d: it is faulty, use another one", e.Offset)
	}
	return fmt.Sprintf("the disk gave back other bytes than were written, first at byte %d: use another one", e.Offset)
}

// DeviceError says what a disk did not do.
type DeviceError struct {
	Fault  Fault
	Offset int64 // in bytes from the disk's start
	Length int64 // bytes that were to be read or written there; 0: no place
	Err    error // what the kernel said, if it said something
}

func (e *DeviceError) Error() string {
	s := e.sentence()
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *DeviceError) sentence() string {
	switch e.Fault {
	case FaultGone:
		return "the disk was unplugged or fell off its bus: plug it in again, into another port if that happens twice, and repeat the write"
	case FaultReadOnly:
		return "the disk can't be written: look for a lock switch on it; one that has turned read-only by itself is worn out"
	case FaultShort:
		return fmt.Sprintf("the disk ends at byte %d, before its size, or there is no room for more: use another one", e.Offset)
	case FaultStalled:
		return "the disk does not answer: unplug it"
	case FaultRead:
		return fmt.Sprintf("the disk can't read %d bytes at byte %d: it is faulty, use another one", e.Length, e.Offset)
	}
	if e.Length == 0 {
		return "the disk can't make durable what was written: it is faulty, use another one"
	}
	return fmt.Sprintf("the disk can't write %d bytes at byte %d: it is faulty, use another one", e.Length, e.Offset)
}

func (e *DeviceError) Unwrap() error { return e.Err }

func amount(n int64) string {
	if n%(1<<20) == 0 {
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d bytes (%d MiB)", n, n>>20)
}
