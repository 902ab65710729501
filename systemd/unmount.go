package systemd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/unit"
	"github.com/godbus/dbus/v5"
)

// systemd hears of a mount a moment after it was made.
const (
	tryInterval = 100 * time.Millisecond
	mostTries   = 30
)

func isUnknownUnit(err error) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == "org.freedesktop.systemd1.NoSuchUnit"
}

// Unmount has systemd unmount what is mounted at point in its own mount
// namespace, which a service that has one itself can't reach, and returns when it
// is done. What systemd knows to need the mount is stopped before.
func Unmount(ctx context.Context, point string) error {
	if strings.ContainsFunc(point, func(r rune) bool { return r < ' ' }) {
		// go-systemd escapes these otherwise than systemd, which could mean another mount.
		return fmt.Errorf("the mount point %q has control characters: unmount it yourself", point)
	}
	conn, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("reach systemd: %w", err)
	}
	defer conn.Close()
	name := unit.UnitNamePathEscape(point) + ".mount"
	done := make(chan string, 1)
	for tries := 0; ; tries++ {
		_, err := conn.StopUnitContext(ctx, name, "fail", done)
		if err == nil {
			break
		}
		if !isUnknownUnit(err) || tries == mostTries {
			return fmt.Errorf("have systemd stop %s: %w", name, err)
		}
		select {
		case <-time.After(tryInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("have systemd stop %s: it says %q; systemctl status %s tells more", name, result, name)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
