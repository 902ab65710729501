package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// What a machine has, in namespaces of its own that end with the shell: a system
// bus, polkit with our policy, memlinuxd, and a user games with a password, who
// may verify when they say it. Then it runs the command as games.
const machineOfGames = `set -e
cd "$1"; shift
mount --bind actions /usr/share/polkit-1/actions
mount --bind rules /etc/polkit-1/rules.d
mount --bind shadow /etc/shadow
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/dbus
dbus-daemon --config-file=bus.conf --nofork --nopidfile --nosyslog >words 2>&1 &
until [ -S /run/dbus/system_bus_socket ]; do sleep 0.02; done
/usr/lib/polkit-1/polkitd --no-debug >>words 2>&1 &
setsid "$BIN/memlinuxd" >>words 2>&1 & # a Ctrl-C is not for it
gdbus wait --system --timeout 30 org.freedesktop.PolicyKit1
gdbus wait --system --timeout 30 org.memlinux.Memlinux1
set +e
setpriv --reuid games --regid games --clear-groups "$BIN/memlinux" "$@"
code=$?
cat words >memlinuxd.words
exit $code
`

// A user whom polkit asks for a password gives it on the terminal.
func TestPolkitAsksOnTheTerminal(t *testing.T) {
	need.Root(t)
	for tool, pkg := range map[string]string{"unshare": "util-linux", "setpriv": "util-linux", "gdbus": "libglib2.0-bin", "dbus-daemon": "dbus-daemon", "pkttyagent": "polkitd", "openssl": "openssl"} {
		need.Tool(t, tool, pkg)
	}
	w := newWorld(t)
	var err error
	if w.dir, err = os.MkdirTemp("", "memlinux-polkit-"); err != nil { // one that games can enter
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(w.dir) })
	if err := os.Chmod(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"actions", "rules"} {
		if err := os.Mkdir(w.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	policy, err := os.ReadFile("../../systemd/org.memlinux.memlinux1.policy")
	if err != nil {
		t.Fatal(err)
	}
	w.file("actions/org.memlinux.memlinux1.policy", string(policy))
	w.file("rules/50-test.rules", `polkit.addRule(function (action, subject) {
    if (action.id == "org.memlinux.memlinux1.verify" && subject.user == "games") return polkit.Result.AUTH_SELF;
});
`)
	w.file("bus.conf", `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>
`)
	hash, err := exec.Command("openssl", "passwd", "-6", "the password").Output()
	if err != nil {
		t.Fatal(err)
	}
	shadow, err := os.ReadFile("/etc/shadow")
	if err != nil {
		t.Fatal(err)
	}
	w.file("shadow", regexp.MustCompile(`(?m)^games:[^:]*:`).ReplaceAllLiteralString(string(shadow), "games:"+strings.TrimSpace(string(hash))+":"))
	if err := os.Chmod(w.path("shadow"), 0o600); err != nil {
		t.Fatal(err)
	}
	image := w.file("image", strings.Repeat("\x00", 1<<20))

	for _, c := range []struct {
		name, answer string
		terminal     bool
		code         int
		says         string
	}{
		{"the right password", "the password\n", true, 5, "Authentication is required to verify a stick or a disk image"},
		{"a wrong one", "open, Sesame\n", true, 4, "not authorized: "},
		{"Ctrl-C", "\x03", true, 130, "cancelled, and nothing was done"},
		{"no terminal", "", false, 4, "no agent is there to ask for it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
				"sh", "-c", machineOfGames, "sh", w.dir, "verify", image)
			cmd.Env = append(os.Environ(), "BIN="+bin, "MEMLINUX_CACHE_DIR="+w.path("cache"), "MEMLINUX_STATE_DIR="+t.TempDir())
			var shown bytes.Buffer
			var code int
			if c.terminal {
				shown, code = onTerminal(t, cmd, "Password:", c.answer)
			} else {
				cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
				cmd.Stdout, cmd.Stderr = &shown, &shown
				code = exitOf(t, cmd.Run())
			}
			if code != c.code || !strings.Contains(shown.String(), c.says) {
				words, _ := os.ReadFile(w.path("memlinuxd.words"))
				t.Errorf("exit %d, want %d and %q:\n%s\n%s", code, c.code, c.says, shown.String(), words)
			}
		})
	}
}

func exitOf(t *testing.T, err error) int {
	t.Helper()
	if err == nil {
		return 0
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return exit.ExitCode()
}

// onTerminal runs the command on a terminal of its own and types the answer when
// it is asked for. A line is typed again and again: what comes before the agent
// has turned the echo off, it throws away.
func onTerminal(t *testing.T, cmd *exec.Cmd, prompt, answer string) (shown bytes.Buffer, code int) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	terminal, err := os.OpenFile(filepath.Join("/dev/pts", fmt.Sprint(n)), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = cmd.Start()
	terminal.Close()
	if err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(2*time.Minute, func() { cmd.Process.Kill() })
	defer limit.Stop()
	over := make(chan struct{})
	defer close(over)
	buf := make([]byte, 4096)
	for {
		n, err := master.Read(buf)
		shown.Write(buf[:n])
		if answer != "" && bytes.Contains(shown.Bytes(), []byte(prompt)) {
			line := answer
			answer = ""
			go func() {
				for {
					if _, err := master.WriteString(line); err != nil || !strings.HasSuffix(line, "\n") {
						return
					}
					select {
					case <-over:
						return
					case <-time.After(500 * time.Millisecond):
					}
				}
			}()
		}
		if err != nil { // the last who had the terminal open is gone
			break
		}
	}
	return shown, exitOf(t, cmd.Wait())
}
