package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/nspawn"
)

// In a Debian under systemd this test program is a service as memlinuxd is one,
// and does what asService says.
const serviceVariable = "MEMLINUX_TEST_SERVICE"

// ours is a service that may do none of what its services do.
const ours = `[Service]
Type=%[2]s
ExecStart=/usr/local/bin/systemd.test
Environment=%[3]s=%[1]s SECRET=of-the-daemon
StandardOutput=file:/run/test/out/%[1]s
StandardError=file:/run/test/out/%[1]s
CacheDirectory=test
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateNetwork=yes
PrivateDevices=yes
ProtectProc=invisible
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK
MemoryDenyWriteExecute=yes
NoNewPrivileges=yes
CapabilityBoundingSet=CAP_DAC_OVERRIDE
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
`

func TestServicesOfOurOwn(t *testing.T) {
	need.Root(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unit := func(name, kind string) string {
		return fmt.Sprintf("cat > /run/systemd/system/%s.service <<'END'\n"+ours+"END\n", name, kind, serviceVariable)
	}
	files := nspawn.Run(t, nspawn.Debian{
		Files: map[string]string{"/usr/local/bin/systemd.test": self},
		Script: unit("table", "oneshot") + unit("hang", "exec") + `
systemctl start table.service || { cat table; exit 1; }
# Not the one that this script waits by.
sleeps() { grep -lsxz "10.." /proc/[0-9]*/cmdline || :; }
running() { systemctl list-units --plain --no-legend --all 'memlinux-*' > left; sleeps >> left; }
running; test ! -s left
echo none left of table >> table

# SIGKILL of the service that they are of.
systemctl start hang.service
for i in {1..600}; do [ $(sleeps | wc -l) = 3 ] && break; sleep 0.1; done
running; wc -l < left >> hang
systemctl kill --kill-whom=main --signal=SIGKILL hang.service
for i in {1..600}; do running; test -s left || break; sleep 0.1; done
cat left >> hang
echo none left of hang >> hang
`})
	t.Log(files["table"])
	for line := range strings.Lines(wantTable) {
		if !strings.Contains(files["table"], strings.TrimSuffix(line, "\n")) {
			t.Errorf("missing: %s", line)
		}
	}
	// One service, of three processes.
	if want := "4\nnone left of hang\n"; files["hang"] != want {
		t.Errorf("hang: %q, want %q", files["hang"], want)
	}
}

// wantTable has a line for each case: what the program said, and how it ended.
const wantTable = `its files: "inherited input err A=1 /usr" exit status 3
a user that nobody is: "1" <nil>
no rights: "CapEff: 0000000000000000 NoNewPrivs: 1 Seccomp: 2" <nil>
no network but its own: "lo:" <nil>
no other addresses: "Address family not supported by protocol" exit status 1
no folders: "Read-only file system" exit status 1
a /tmp of its own: "a" <nil>
no devices: "full null random tty urandom zero" <nil>
nothing of homes: "" <nil>
folders given away: "written by 33, of 33" <nil>
no other rights for who gives away: "Read-only file system" exit status 1
no large files: "1048576" <nil>
a time limit: "" it ran for longer than it may, and was killed
a signal: "" signal: terminated
output that nobody takes: "" disk full
cancelled: "" context canceled
cancelled before: "" context canceled
no such program: "" execute /no/such: no such file or directory
no such folder: "" its folder /no/such can't be reached by its user: no such file or directory
a folder that is not there: "" systemd could not start the service (226/NAMESPACE)
none left of table
`

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("disk full") }

// asService is the service's main.
func asService(what string) {
	if err := service(what); err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
}

func service(what string) error {
	ctx := context.Background()
	units, err := OwnUnits(ctx, "unix:path=/run/dbus/system_bus_socket")
	if err != nil {
		return err
	}
	if units == nil {
		return errors.New("systemd does not know this service")
	}
	defer units.Close()
	if err := hostileSignal(units.conn.Names()[0]); err != nil {
		return err
	}
	if what == "hang" {
		wait, err := units.Start(ctx, exec.Command("/bin/sh", "-c", "sleep 1000 & sleep 1001 & setsid sleep 1002"), Unit{Name: "hang"})
		if err != nil {
			return err
		}
		return wait()
	}
	dir, err := os.MkdirTemp("/var/cache/test", "folder-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	in, err := os.CreateTemp(dir, "")
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := in.WriteString("inherited"); err != nil {
		return err
	}
	if _, err := in.Seek(0, 0); err != nil {
		return err
	}
	over, cancel := context.WithCancel(ctx)
	cancel()
	sh := func(script string) *exec.Cmd { return exec.Command("/bin/bash", "-c", script) }
	inheriting := sh(`cat <&3; echo " $(cat)"; echo err >&2; env | grep -v '^_=\|PWD\|SHLVL'; pwd; exit 3`)
	inheriting.ExtraFiles, inheriting.Dir, inheriting.Env = []*os.File{in}, "/usr", []string{"A=1"}
	if inheriting.Stdin, err = input("input"); err != nil {
		return err
	}
	unwanted := sh("trap '' PIPE; while :; do echo y || sleep 1; done")
	unwanted.Stdout = full{}
	lost := sh("")
	lost.Dir = "/no/such"
	for _, c := range []struct {
		name string
		ctx  context.Context
		cmd  *exec.Cmd
		unit Unit
	}{
		{"its files", ctx, inheriting, Unit{}},
		{"a user that nobody is", ctx, sh("[[ $(id -u) > 61183 && $(id -u) < 65520 ]] && echo 1"), Unit{}},
		{"no rights", ctx, sh(`grep '^CapEff\|^NoNewPrivs\|^Seccomp:' /proc/self/status`), Unit{}},
		{"no network but its own", ctx, sh(`grep -o '[a-z0-9]*:' /proc/self/net/dev`), Unit{}},
		{"no other addresses", ctx, sh("exec 3<>/dev/tcp/127.0.0.1/80"), Unit{}},
		{"no folders", ctx, sh("touch /usr/x"), Unit{}},
		{"a /tmp of its own", ctx, sh("touch /tmp/a; ls /tmp"), Unit{}},
		{"no devices", ctx, sh("cd /dev; find . -maxdepth 1 -type c -printf '%P\n' | sort"), Unit{}},
		{"nothing of homes", ctx, sh("ls /home /root 2> /dev/null; :"), Unit{}},
		{"give", ctx, exec.Command("/bin/chown", "-R", "33:33", dir), Unit{GiveAway: true, Folders: []string{dir}}},
		{"folders given away", ctx, sh("cd " + dir + " && id -u > f && echo written by $(cat f), of $(stat -c %u f)"), Unit{User: 33, Folders: []string{dir}}},
		{"no other rights for who gives away", ctx, sh("chown 33 /usr"), Unit{GiveAway: true, Folders: []string{dir}}},
		{"no large files", ctx, sh("exec 2> /dev/null; head -c 2M /dev/zero > /tmp/a; stat -c %s /tmp/a"), Unit{File: 1 << 20}},
		{"a time limit", ctx, sh("sleep 1000"), Unit{Time: time.Second}},
		{"a signal", ctx, sh("kill $$"), Unit{}},
		{"output that nobody takes", ctx, unwanted, Unit{}},
		{"cancelled", nil, sh("sleep 1000 & setsid sleep 1000"), Unit{}},
		{"cancelled before", over, sh(""), Unit{}},
		{"no such program", ctx, exec.Command("/no/such"), Unit{}},
		{"no such folder", ctx, lost, Unit{}},
		{"a folder that is not there", ctx, sh(""), Unit{User: 33, Folders: []string{"/no/such"}}},
	} {
		var out bytes.Buffer
		if c.cmd.Stdout == nil {
			c.cmd.Stdout, c.cmd.Stderr = &out, &out
		}
		c.unit.Name = "test"
		stop := func() {}
		if c.ctx == nil {
			c.ctx, stop = context.WithCancel(ctx)
		}
		begin := time.Now()
		wait, err := units.Start(c.ctx, c.cmd, c.unit)
		stop()
		if err == nil {
			err = wait()
		}
		said := strings.Join(strings.Fields(strings.ReplaceAll(out.String(), "\x00", "")), " ")
		if i := strings.LastIndex(said, ": "); err != nil && i > 0 {
			said = said[i+2:]
		}
		fmt.Printf("%s: %q %v (%d ms)\n", c.name, said, err, time.Since(begin).Milliseconds())
	}
	return nil
}

// hostileSignal sends what godbus panics on, as any user may.
func hostileSignal(to string) error {
	conn, err := dbus.ConnectSystemBus()
	if err != nil {
		return err
	}
	defer conn.Close()
	body := []any{[]dbus.UnixFD{0, 0}}
	return conn.Send(&dbus.Message{Type: dbus.TypeSignal, Body: body, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(to), dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath("/a")), dbus.FieldInterface: dbus.MakeVariant("a.b"),
		dbus.FieldMember: dbus.MakeVariant("C"), dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(body...))}}, nil).Err
}

// input is a file of that text.
func input(text string) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	_, err = w.WriteString(text)
	return r, err
}
