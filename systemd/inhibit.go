package systemd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/busguard"
)

// Inhibit asks logind to let the machine neither go down nor to sleep, not even
// when its lid is closed, until release is called
// (https://systemd.io/INHIBITOR_LOCKS). People are shown why. Where there is no
// logind on the system bus, whose address that is, it is an error.
func Inhibit(ctx context.Context, address, why string) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// The lock is the descriptor: the connection is needed no longer than that.
	locks := make(chan int, 1)
	conn, err := busguard.Dial(address, dbus.TypeMethodReply, func(msg *dbus.Message, _ int, files []int) {
		if msg.Type == dbus.TypeMethodCall {
			msg.Type = 0 // nobody has a reason to call
		}
		if len(files) == 1 && len(locks) == 0 {
			locks <- files[0]
			return
		}
		busguard.Discard(files)
	}, dbus.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("reach logind: %w", err)
	}
	defer func() {
		conn.Close()
		if err != nil && len(locks) > 0 { // it came too late
			_ = unix.Close(<-locks)
		}
	}()
	var index dbus.UnixFDIndex
	// Not started for this: what does not run lets nothing sleep.
	err = conn.Object("org.freedesktop.login1", "/org/freedesktop/login1").CallWithContext(ctx, "org.freedesktop.login1.Manager.Inhibit", dbus.FlagNoAutoStart,
		"shutdown:sleep:idle:handle-lid-switch", "memlinux", why, "block").Store(&index)
	if err != nil {
		return nil, fmt.Errorf("ask logind to keep the machine up: %w", err)
	}
	select {
	case fd := <-locks:
		return func() { _ = unix.Close(fd) }, nil
	default:
		return nil, errors.New("ask logind to keep the machine up: it gave no descriptor")
	}
}
