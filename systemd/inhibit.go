package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/godbus/dbus/v5"
)

// Inhibit asks logind to let the machine neither go down nor to sleep, not even
// when its lid is closed, until release is called
// (https://systemd.io/INHIBITOR_LOCKS). People are shown why. Where there is no
// logind on the system bus, whose address that is, it is an error.
func Inhibit(ctx context.Context, address, why string) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// The lock is the descriptor: the connection is needed no longer than that.
	conn, err := dbus.Connect(address, dbus.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("reach logind: %w", err)
	}
	defer conn.Close()
	var fd dbus.UnixFD
	// Not started for this: what does not run lets nothing sleep.
	err = conn.Object("org.freedesktop.login1", "/org/freedesktop/login1").CallWithContext(ctx, "org.freedesktop.login1.Manager.Inhibit", dbus.FlagNoAutoStart,
		"shutdown:sleep:idle:handle-lid-switch", "memlinux", why, "block").Store(&fd)
	if err != nil {
		return nil, fmt.Errorf("ask logind to keep the machine up: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inhibitor")
	if f == nil {
		return nil, errors.New("ask logind to keep the machine up: it gave no descriptor")
	}
	return func() { f.Close() }, nil
}
