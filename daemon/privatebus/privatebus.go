// Package privatebus starts a dbus-daemon of our own where there is no system
// bus: in a container, in CI, on a first try. godbus has no server, so the
// service and its client meet on this bus by the same contract.
package privatebus

import (
	"bufio"
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Bus is a running dbus-daemon. Only its own user, and root, can connect.
type Bus struct {
	Address string // D-Bus address of its socket
	dir     string
	cmd     *exec.Cmd
}

// The bus is for one client and one service of the same user, so the default
// policy of a bus of no well-known type is right: its user and root may
// connect; owning names and talking must be allowed by name.
const configuration = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path=%s</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow own="*"/>
    <allow send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
  </policy>
</busconfig>
`

// Start starts a bus. Call it from a goroutine that is locked to the process's
// main thread: the bus is killed when the thread that started it ends.
func Start(ctx context.Context) (*Bus, error) {
	program, err := exec.LookPath("dbus-daemon")
	if err != nil {
		return nil, errors.New("dbus-daemon is not installed; apt-get install dbus-daemon")
	}
	removeStale()
	dir, err := os.MkdirTemp("", prefix)
	if err != nil {
		return nil, fmt.Errorf("private bus: %w", err)
	}
	b := &Bus{dir: dir}
	if err := b.start(ctx, program); err != nil {
		b.Stop()
		return nil, fmt.Errorf("private bus: %w", err)
	}
	return b, nil
}

// prefix begins the names of the buses' folders.
const prefix = "memlinux-bus-"

// settleTime is how long after a folder was made its bus listens for sure: between
// bind(2) and listen(2) its socket looks like one that was left.
const settleTime = time.Minute

// removeStale removes what buses left behind whose memlinuxd was killed: folders
// of ours with a socket that nobody listens on.
func removeStale() {
	folders, _ := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*")) // the pattern is right
	for _, dir := range folders {
		info, err := os.Lstat(dir)
		if err != nil || !info.IsDir() || time.Since(info.ModTime()) < settleTime {
			continue
		}
		if stat, ok := info.Sys().(*syscall.Stat_t); !ok || int(stat.Uid) != os.Geteuid() {
			continue
		}
		conn, err := net.Dial("unix", filepath.Join(dir, "bus"))
		if err == nil {
			conn.Close()
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			_ = os.RemoveAll(dir) // the next start tries again
		}
	}
}

func (b *Bus) start(ctx context.Context, program string) error {
	var socket strings.Builder
	if err := xml.EscapeText(&socket, []byte(filepath.Join(b.dir, "bus"))); err != nil {
		return err
	}
	config := filepath.Join(b.dir, "bus.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, configuration, socket.String()), 0o600); err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(program, "--config-file="+config, "--nofork", "--nopidfile", "--nosyslog", "--print-address=3")
	cmd.ExtraFiles = []*os.File{w}
	// A word that it may not raise its own limits, and why it ends.
	var words bytes.Buffer
	cmd.Stderr = &words
	// Its own group: a Ctrl-C at the terminal is not for the bus.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	b.cmd = cmd
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	address, err := bufio.NewReader(io.LimitReader(r, 4096)).ReadString('\n')
	if err != nil {
		_ = cmd.Wait() // it has ended, or was killed for ctx
		return fmt.Errorf("dbus-daemon ended at once: %s", bytes.TrimSpace(words.Bytes()))
	}
	b.Address = strings.TrimSpace(address)
	return nil
}

// Stop ends the bus and waits for it. It may be called at any time.
func (b *Bus) Stop() {
	if b.cmd != nil {
		_ = b.cmd.Process.Kill() // it has no state
		_ = b.cmd.Wait()
	}
	_ = os.RemoveAll(b.dir) // in the temporary folder
}
