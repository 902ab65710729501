// Package systemd talks to systemd: it tells the service manager how the
// daemon is, writes into the journal, keeps the machine from going down while
// that would spoil a job, has file systems unmounted, and runs programs as services
// of their own. Its folder also holds the files that integrate memlinuxd: the
// unit, bus activation and the bus policy, polkit's actions, the user for
// compilers and the ageing of the cache.
package systemd

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// IsService reports whether systemd runs this process as a service and listens
// to it (sd_notify(3)). Where it does not, the Notify functions do nothing.
func IsService() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// NotifyReady tells systemd that the service answers.
func NotifyReady() error { return notify("it is ready", daemon.SdNotifyReady) }

// NotifyReloading tells systemd that the configuration is being read again.
// NotifyReady says that it was.
func NotifyReloading() error {
	return notify("it reloads", daemon.SdNotifyReloading+"\n"+daemon.SdNotifyMonotonicUsec())
}

// NotifyStopping tells systemd that the service is about to end, and returns
// when systemd knows: from then on it starts the service anew, when this process
// has ended, for who asks for it.
func NotifyStopping(ctx context.Context) error {
	if err := notify("it stops", daemon.SdNotifyStopping); err != nil {
		return err
	}
	return barrier(ctx)
}

// NotifyBusy asks systemd to wait longer for the end of a service that is
// stopping, for d from now.
func NotifyBusy(d time.Duration) error {
	return notify("it needs more time", "EXTEND_TIMEOUT_USEC="+strconv.FormatInt(d.Microseconds(), 10))
}

func notify(what, state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("tell systemd that %s: %w", what, err)
	}
	return nil
}

// barrier returns when systemd has read what it was sent before: it closes the
// descriptor that comes with BARRIER=1 (sd_notify_barrier(3)).
func barrier(ctx context.Context) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	// Not connected, since package net sends descriptors by no such socket.
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram"})
	if err == nil {
		_, _, err = conn.WriteMsgUnix([]byte("BARRIER=1"), unix.UnixRights(int(w.Fd())), &net.UnixAddr{Name: name, Net: "unixgram"})
		conn.Close()
	}
	w.Close()
	if err != nil {
		return fmt.Errorf("wait for systemd: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	_, _ = r.Read(make([]byte, 1)) // its end is the answer
	return ctx.Err()
}

// Watchdog tells systemd again and again, until ctx ends, that the service
// lives, as long as alive says so; failed is told when it does not. Where the unit has no
// WatchdogSec=, it returns at once.
//
// alive is given a third of WatchdogSec=, and asked after every other third: one
// that is late once does not cost the service its life.
func Watchdog(ctx context.Context, alive func(context.Context) error, failed func(error)) error {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("systemd's watchdog: %w", err)
	}
	if limit == 0 {
		return nil
	}
	third := limit / 3
	for {
		asked, cancel := context.WithTimeout(ctx, third)
		err := alive(asked)
		cancel()
		if err == nil {
			err = notify("it lives", daemon.SdNotifyWatchdog)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			failed(fmt.Errorf("memlinuxd does not answer itself, and systemd will restart it if that lasts: %w", err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(third):
		}
	}
}
