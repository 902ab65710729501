package daemon

import (
	"context"
	"os/exec"
	"runtime"
	"time"

	"github.com/memlinux/memlinux/bootloader/grub"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"github.com/memlinux/memlinux/systemd"
	"github.com/memlinux/memlinux/testvm"
)

// What works on other people's bytes, or writes code into memory, or needs the
// network, does not run in memlinuxd's own service, which may do none of that:
// systemd runs each in a service of its own. Where there is no systemd, the rooms
// start it as children, as a user without rights.

// vmTime is the longest that a virtual machine lives. A proof has its own, much
// shorter limits: this is for a person's console that nobody closes.
const vmTime = 7 * 24 * time.Hour

// qemu starts virtual machines; nil where the room does that itself.
func (s *Server) qemu() testvm.Launcher {
	if s.units == nil {
		return nil
	}
	return func(ctx context.Context, cmd *exec.Cmd, needs testvm.Needs) (func() error, error) {
		// Without KVM, QEMU translates the guest's code and executes that.
		return s.units.Start(ctx, cmd, systemd.Unit{Name: "qemu", Memory: needs.Memory, File: needs.File, Time: vmTime, JIT: !needs.KVM, KVM: needs.KVM})
	}
}

// mkimage starts grub-mkimage; nil where the room does that itself.
func (s *Server) mkimage() grub.Launcher {
	if s.units == nil {
		return nil
	}
	return func(ctx context.Context, cmd *exec.Cmd) (func() error, error) {
		return s.units.Start(ctx, cmd, systemd.Unit{Name: "grub", Memory: 256 << 20, Time: time.Minute})
	}
}

// compile starts compilers and unpackers. What links a kernel takes about 1 GiB,
// and with options for debugging or optimization some times that.
func (s *Server) compile(ctx context.Context, cmd *exec.Cmd, needs sandbox.Needs) (func() error, error) {
	memory := int64(4+2*runtime.NumCPU()) << 30
	name := "build"
	switch {
	case needs.Network:
		name = "fetch"
	case needs.GiveAway:
		name = "chown"
	}
	return s.units.Start(ctx, cmd, systemd.Unit{Name: name, Memory: memory, Time: needs.Limit, User: needs.User, Folders: needs.Folders,
		Network: needs.Network, GiveAway: needs.GiveAway})
}
