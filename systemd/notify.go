// Package systemd talks to systemd, and its folder holds the files that
// integrate memlinuxd: the unit, bus activation and the bus policy.
package systemd

import (
	"fmt"

	"github.com/coreos/go-systemd/v22/daemon"
)

// NotifyReady tells systemd that the service answers (sd_notify(3)). Without
// systemd it does nothing.
func NotifyReady() error {
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		return fmt.Errorf("tell systemd that memlinuxd is ready: %w", err)
	}
	return nil
}
