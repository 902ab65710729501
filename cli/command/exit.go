// Package command is memlinux's command line: cobra commands, the progress that
// they show and the reports that they print. It is a thin client; the work is
// memlinuxd's.
package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

// Exit codes.
const (
	exitDone       = 0
	exitFailed     = 1
	exitUsage      = 2
	exitRefused    = 3 // refused for safety
	exitNotAllowed = 4 // not authorized
	exitUnproven   = 5 // verification failed
	exitCancelled  = 130
)

// usageError is a command line that can't be understood.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// unusableError is something that the command line names rightly, and that can't
// be used.
type unusableError struct{ error }

func (e unusableError) Unwrap() error { return e.error }

// unusable is the error of looking at or opening a path that the user named, as a
// sentence.
func unusable(path string, err error) error {
	var on *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return unusableError{fmt.Errorf("%s does not exist", path)}
	case errors.As(err, &on):
		err = on.Err
	}
	return unusableError{fmt.Errorf("%s can't be used: %w", path, err)}
}

// refusal is a target that is not written for safety.
func refusal(format string, args ...any) error {
	return &api.Error{Name: api.ErrDeviceRefused, Message: fmt.Sprintf(format, args...)}
}

func exitCode(err error) int {
	var usage usageError
	var names unusableError
	var config *client.ConfigError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &usage), errors.As(err, &names), errors.As(err, &config):
		return exitUsage
	case errors.Is(err, context.Canceled):
		return exitCancelled
	}
	switch api.ErrorName(err) {
	case api.ErrInvalidOption, api.ErrInvalidRecipe, api.ErrNoSuchEntry, api.ErrNoSuchJob:
		return exitUsage
	case api.ErrDeviceBusy, api.ErrDeviceIsSystem, api.ErrDeviceRefused, api.ErrDeviceChanged, api.ErrUnsupported, api.ErrChanged:
		return exitRefused
	case api.ErrNotAuthorized:
		return exitNotAllowed
	case api.ErrVerification:
		return exitUnproven
	case api.ErrCancelled:
		return exitCancelled
	}
	return exitFailed
}
