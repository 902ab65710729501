// Package command is memlinux's command line: cobra commands, the progress that
// they show and the reports that they print. It is a thin client; the work is
// memlinuxd's.
package command

import (
	"context"
	"errors"
	"fmt"

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

// refusal is a target that is not written for safety.
func refusal(format string, args ...any) error {
	return &api.Error{Name: api.ErrDeviceRefused, Message: fmt.Sprintf(format, args...)}
}

func exitCode(err error) int {
	var usage usageError
	var config *client.ConfigError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &usage), errors.As(err, &config):
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
