package daemon

import (
	"context"
	"errors"
	"syscall"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/bootloader/grub"
	"github.com/memlinux/memlinux/bootloader/install"
	"github.com/memlinux/memlinux/bootloader/local"
	"github.com/memlinux/memlinux/bootloader/menulst"
	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/media/fat32"
	"github.com/memlinux/memlinux/testvm"
)

// errorName finds the contract's name for an error of the rooms.
func errorName(err error) string {
	var (
		contract    *api.Error
		refused     *blockdev.RefusedError
		changed     *blockdev.ChangedError
		space       *media.NoSpaceError
		full        *fat32.NoSpaceError
		mismatch    *media.MismatchError
		grubMissing *grub.MissingError
		qemuMissing *testvm.MissingError
		toolMissing *sandbox.MissingError
		menu        *menulst.InvalidError
		spoiled     *menulst.BlockError
		unsupported *local.UnsupportedError
		overwritten *bootfs.ChangedError
		bootFull    *bootfs.NoSpaceError
		locked      *bootfs.BusyError
	)
	switch {
	case errors.As(err, &contract):
		return contract.Name
	case errors.Is(err, context.Canceled):
		return api.ErrCancelled
	case errors.As(err, &refused):
		return refusedName(refused.Reasons)
	case errors.As(err, &changed):
		return api.ErrDeviceChanged
	case errors.Is(err, blockdev.ErrNoDevice):
		return api.ErrNoSuchDevice
	case errors.As(err, &space), errors.As(err, &full), errors.As(err, &bootFull), errors.Is(err, syscall.ENOSPC):
		return api.ErrNoSpace
	case media.FaultOf(err) == media.FaultGone:
		return api.ErrNoSuchDevice
	case errors.As(err, &mismatch):
		return api.ErrVerification
	case errors.As(err, &grubMissing), errors.As(err, &qemuMissing), errors.As(err, &toolMissing):
		return api.ErrMissingProgram
	case errors.As(err, &unsupported), errors.As(err, &spoiled):
		return api.ErrUnsupported
	case errors.As(err, &overwritten):
		return api.ErrChanged
	case errors.As(err, &locked):
		return api.ErrBusy
	case errors.Is(err, install.ErrNoEntry):
		return api.ErrNoSuchEntry
	case errors.Is(err, install.ErrNothingToRollBack):
		return api.ErrNothing
	case errors.Is(err, imagegen.ErrRecipe), errors.As(err, &menu):
		return api.ErrInvalidOption
	case errors.Is(err, imagegen.ErrKernel), errors.Is(err, imagegen.ErrBusybox):
		return api.ErrInvalidRecipe
	}
	return api.ErrFailed
}

// refusedName is the gravest of the reasons.
func refusedName(reasons []blockdev.Reason) string {
	name := api.ErrDeviceRefused
	for _, r := range reasons {
		switch r.Code {
		case blockdev.ReasonSystem:
			return api.ErrDeviceIsSystem
		case blockdev.ReasonMounted, blockdev.ReasonSwap, blockdev.ReasonHeld, blockdev.ReasonBusy:
			name = api.ErrDeviceBusy
		}
	}
	return name
}
