package systemd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// manager is a service manager that listens. It returns what it is told, and
// closes the descriptors that come with that, as systemd does.
func manager(t *testing.T) (told <-chan string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "notify-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "s"))
	all := make(chan string, 100)
	ended := make(chan struct{})
	t.Cleanup(func() { socket.Close(); <-ended })
	go func() {
		defer close(ended)
		buf, oob := make([]byte, 4096), make([]byte, 1024)
		for {
			n, oobn, _, _, err := socket.ReadMsgUnix(buf, oob)
			if err != nil {
				return
			}
			messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
			for _, m := range messages {
				fds, _ := unix.ParseUnixRights(&m)
				for _, fd := range fds {
					unix.Close(fd)
				}
			}
			all <- string(buf[:n])
		}
	}()
	return all
}

func TestNotify(t *testing.T) {
	told := manager(t)
	for _, c := range []struct {
		name string
		say  func() error
		want []string
	}{
		{"ready", NotifyReady, []string{"READY=1"}},
		{"stopping, and systemd has read it", func() error { return NotifyStopping(t.Context()) }, []string{"STOPPING=1", "BARRIER=1"}},
		{"more time", func() error { return NotifyBusy(time.Minute) }, []string{"EXTEND_TIMEOUT_USEC=60000000"}},
	} {
		if err := c.say(); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		for _, want := range c.want {
			if got := <-told; got != want {
				t.Errorf("%s: systemd was told %q, want %q", c.name, got, want)
			}
		}
	}
	if err := NotifyReloading(); err != nil {
		t.Fatal(err)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	said := <-told
	usec, found := strings.CutPrefix(strings.TrimSpace(said), "RELOADING=1\nMONOTONIC_USEC=")
	if at, err := strconv.ParseInt(usec, 10, 64); !found || err != nil || at <= 0 || at > now.Nano()/1000 {
		t.Errorf("a reload is told as %q", said)
	}
}

func TestNobodyListens(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	t.Setenv("WATCHDOG_USEC", "")
	if IsService() {
		t.Error("it takes itself for a service")
	}
	if err := errors.Join(NotifyReady(), NotifyReloading(), NotifyStopping(t.Context()), NotifyBusy(time.Second)); err != nil {
		t.Error(err)
	}
	if err := Watchdog(t.Context(), func(context.Context) error { t.Error("asked"); return nil }, nil); err != nil {
		t.Error(err)
	}
}

// The watchdog hears of a service that answers, and not of one that does not.
func TestWatchdog(t *testing.T) {
	told := manager(t)
	t.Setenv("WATCHDOG_USEC", "30000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	ctx, cancel := context.WithCancel(t.Context())
	dead := errors.New("no answer")
	asked, failed := make(chan error), make(chan error, 100)
	ended := make(chan error)
	go func() {
		ended <- Watchdog(ctx, func(context.Context) error { return <-asked }, func(err error) { failed <- err })
	}()
	asked <- dead
	if err := <-failed; !errors.Is(err, dead) {
		t.Errorf("the reason is %v", err)
	}
	asked <- nil
	if got := <-told; got != "WATCHDOG=1" {
		t.Errorf("systemd was told %q", got)
	}
	asked <- dead
	<-failed
	if len(told) > 0 {
		t.Errorf("systemd was told %q of a service that does not answer", <-told)
	}
	cancel()
	close(asked)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// One that hangs is not waited for.
func TestWatchdogOfAHang(t *testing.T) {
	told := manager(t)
	t.Setenv("WATCHDOG_USEC", "30000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	ctx, cancel := context.WithCancel(t.Context())
	hang := func(ctx context.Context) error { <-ctx.Done(); return fmt.Errorf("gave up: %w", ctx.Err()) }
	if err := Watchdog(ctx, hang, func(error) { cancel() }); err != nil {
		t.Error(err)
	}
	if len(told) > 0 {
		t.Errorf("systemd was told %q", <-told)
	}
}
