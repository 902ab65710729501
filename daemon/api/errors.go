package api

import (
	"errors"
	"strings"
	"unicode"

	"github.com/godbus/dbus/v5"
)

// Errors of the contract, as names on the bus. The message of each is a
// sentence, which says what to do next where that is known.
const (
	errPrefix = "org.memlinux.Memlinux1.Error."

	ErrFailed         = errPrefix + "Failed"         // anything that has no name of its own
	ErrNotAuthorized  = errPrefix + "NotAuthorized"  // the caller may not do this
	ErrNoSuchDevice   = errPrefix + "NoSuchDevice"   // no block device of that name
	ErrDeviceBusy     = errPrefix + "DeviceBusy"     // mounted, held or opened by somebody else
	ErrDeviceIsSystem = errPrefix + "DeviceIsSystem" // the running system lives on it
	ErrDeviceRefused  = errPrefix + "DeviceRefused"  // another reason against writing it
	ErrDeviceChanged  = errPrefix + "DeviceChanged"  // not the device that was planned for
	ErrNoSpace        = errPrefix + "NoSpace"        // the target is too small
	ErrBusy           = errPrefix + "Busy"           // too many jobs run, or another program is at work on the same thing
	ErrLimitsExceeded = errPrefix + "LimitsExceeded" // the caller wants too much at once
	ErrCancelled      = errPrefix + "Cancelled"      // the job was cancelled
	ErrInvalidOption  = errPrefix + "InvalidOption"  // an unknown option, or a value of the wrong type
	ErrInvalidRecipe  = errPrefix + "InvalidRecipe"  // a recipe, or a kernel, busybox or file of it, that can't make a system
	ErrVerification   = errPrefix + "Verification"   // written, but not proven
	ErrMissingProgram = errPrefix + "MissingProgram" // a program or its data is not installed
	ErrNoSuchJob      = errPrefix + "NoSuchJob"      // no job of that id
	ErrNoSuchEntry    = errPrefix + "NoSuchEntry"    // no boot entry of ours of that id
	ErrUnsupported    = errPrefix + "Unsupported"    // this PC's boot loader can't be given that
	ErrChanged        = errPrefix + "Changed"        // another program changed the boot files meanwhile
	ErrNothing        = errPrefix + "NothingToDo"    // there is nothing to roll back or to resume
)

// Error is an error of the contract.
type Error struct {
	Name    string // one of the names above
	Message string
}

// NewError makes an Error of err, keeping its message.
func NewError(name string, err error) *Error { return &Error{Name: name, Message: err.Error()} }

func (e *Error) Error() string { return e.Message }

// DBusError gives godbus the error's name and body.
func (e *Error) DBusError() (string, []any) { return e.Name, []any{e.Message} }

// Words is text as the bus takes it, UTF-8, and at most limit bytes of it (and a mark
// that there was more). Much of it is quoted, and goes to somebody's terminal: but for
// line ends and tabs it has nothing that a terminal would obey.
func Words(text string, limit int) string {
	cut := len(text) > limit
	if cut {
		text = text[:limit]
	}
	text = strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsGraphic(r) {
			return r
		}
		return unicode.ReplacementChar
	}, strings.ToValidUTF8(text, "\uFFFD"))
	if cut {
		text += "…"
	}
	return text
}

// ErrorName is the contract's name for err: that of an [Error] or of a
// dbus.Error in its chain, ErrFailed for any other.
func ErrorName(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Name
	}
	var d dbus.Error
	if errors.As(err, &d) {
		return d.Name
	}
	return ErrFailed
}
