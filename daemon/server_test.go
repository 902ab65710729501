package daemon

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/imagegen/cache"
	"github.com/memlinux/memlinux/testvm/need"
)

// openBus starts a dbus-daemon that lets every user in, as a system bus does,
// and serves memlinuxd on it for root. It returns the bus's address.
func openBus(t *testing.T) string {
	t.Helper()
	address := startBus(t)
	serve(t, address, RootOnly)
	return address
}

// startBus starts a dbus-daemon that lets every user in. It returns its address.
func startBus(t *testing.T) string {
	t.Helper()
	program := need.Tool(t, "dbus-daemon", "dbus-daemon")
	dir, err := os.MkdirTemp("", "memlinux-test-bus-") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "bus")
	conf := filepath.Join(dir, "bus.conf")
	text := `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path=` + socket + `</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>`
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	bus := exec.Command(program, "--config-file="+conf, "--nofork", "--nopidfile", "--nosyslog")
	var words bytes.Buffer // it tells of each call that it drops
	bus.Stderr = &words
	if err := bus.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		bus.Process.Kill()
		bus.Wait()
		if t.Failed() {
			t.Logf("dbus-daemon: %.2000s", words.Bytes())
		}
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("dbus-daemon makes no socket")
		}
	}
	return "unix:path=" + socket
}

// serve serves memlinuxd on the bus until the test ends.
func serve(t *testing.T, address string, authority Authority) config.Config {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	c := config.Config{CacheDir: t.TempDir(), StateDir: t.TempDir(), Kernel: "auto", Memory: 512, JobRetention: time.Minute}
	go func() {
		ended <- Serve(ctx, address, authority, c, "test", func() error { close(ready); return nil })
	}()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatalf("Serve: %v", err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return c
}

func dial(t *testing.T, address string) *dbus.Conn {
	t.Helper()
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func invoke(conn *dbus.Conn, path dbus.ObjectPath, method string, args ...any) *dbus.Call {
	return conn.Object(api.BusName, path).Call(method, 0, args...)
}

// What the introspection promises is just what the dispatcher's table has.
func TestIntrospectionIsTheTable(t *testing.T) {
	need.Root(t) // the service lists the machine's disks
	address := openBus(t)
	conn := dial(t, address)
	promised := map[string]string{}
	for _, path := range []dbus.ObjectPath{api.ManagerPath} {
		var text string
		if err := invoke(conn, path, api.IntrospectableInterface+".Introspect").Store(&text); err != nil {
			t.Fatal(err)
		}
		collect(t, text, promised)
	}
	collect(t, api.Introspect(api.JobInterface, nil), promised)
	collect(t, api.Introspect(api.DeviceInterface, nil), promised)
	collect(t, api.Introspect(api.EntryInterface, nil), promised)
	for _, m := range methods {
		name := m.iface + "." + m.member
		if in, ok := promised[name]; !ok || in != m.in {
			t.Errorf("%s(%s) is in the table; introspection has %q, %v", name, m.in, in, ok)
		}
		delete(promised, name)
	}
	for name := range promised {
		t.Errorf("%s is introspected but not in the table", name)
	}
}

func collect(t *testing.T, text string, into map[string]string) {
	t.Helper()
	var node struct {
		Interfaces []struct {
			Name    string `xml:"name,attr"`
			Methods []struct {
				Name string `xml:"name,attr"`
				Args []struct {
					Type      string `xml:"type,attr"`
					Direction string `xml:"direction,attr"`
				} `xml:"arg"`
			} `xml:"method"`
		} `xml:"interface"`
	}
	if err := xml.Unmarshal([]byte(text), &node); err != nil {
		t.Fatal(err)
	}
	for _, i := range node.Interfaces {
		for _, m := range i.Methods {
			in := ""
			for _, a := range m.Args {
				if a.Direction == "in" {
					in += a.Type
				}
			}
			into[i.Name+"."+m.Name] = in
		}
	}
}

func TestBadCallsAreNamedErrors(t *testing.T) {
	need.Root(t)
	conn := dial(t, openBus(t))
	none := map[string]dbus.Variant{}
	with := func(key string, value any) map[string]dbus.Variant {
		return map[string]dbus.Variant{key: dbus.MakeVariant(value)}
	}
	nul, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer nul.Close()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(ends[0])
	defer unix.Close(ends[1])
	manager := api.ManagerInterface + "."
	for _, c := range []struct {
		name   string
		path   dbus.ObjectPath
		method string
		args   []any
		want   string // error name
		says   string
	}{
		{"unknown option", api.ManagerPath, manager + "Build", []any{with("kernal", "auto")}, api.ErrInvalidOption, `unknown option "kernal"; known are`},
		{"option of a wrong type", api.ManagerPath, manager + "Build", []any{with(api.OptAppend, uint32(1))}, api.ErrInvalidOption, "must be of the D-Bus type s, not u"},
		{"unknown compression", api.ManagerPath, manager + "Build", []any{with(api.OptCompression, "rar")}, api.ErrInvalidOption, "auto, zstd, gzip or none"},
		{"kernel by path", api.ManagerPath, manager + "Build", []any{with(api.OptKernel, "/boot/vmlinuz")}, api.ErrInvalidOption, "send it open, as the option"},
		{"kernel that is a device node", api.ManagerPath, manager + "WriteFile", []any{dbus.UnixFD(nul.Fd()), none}, api.ErrInvalidOption, "not a regular file"},
		{"unknown output file", api.ManagerPath, manager + "Build", []any{with(api.OptFiles, map[string]dbus.Variant{"passwd": dbus.MakeVariant(dbus.UnixFD(nul.Fd()))})}, api.ErrInvalidOption, "passwd"},
		{"options where there are none", api.ManagerPath, manager + "Devices", []any{with("all", true)}, api.ErrInvalidOption, "there are none"},
		{"device that is not there", api.ManagerPath, manager + "Plan", []any{api.DevicePath("nosuch"), none}, api.ErrNoSuchDevice, ""},
		{"device name that climbs out", api.ManagerPath, manager + "Plan", []any{api.DevicePath("../../etc"), none}, api.ErrNoSuchDevice, ""},
		{"path that is no device's", api.ManagerPath, manager + "Plan", []any{dbus.ObjectPath("/"), none}, api.ErrNoSuchDevice, "not the path of a device"},
		{"write without a plan", api.ManagerPath, manager + "Write", []any{api.DevicePath("nosuch"), "token", none}, api.ErrNoSuchDevice, ""},
		{"nothing to boot", api.ManagerPath, manager + "StartVM", []any{dbus.UnixFD(ends[0]), none}, api.ErrInvalidOption, "nothing to boot"},
		{"console that is no socket", api.ManagerPath, manager + "StartVM", []any{dbus.UnixFD(nul.Fd()), none}, api.ErrInvalidOption, "not a stream socket"},
		{"wrong signature", api.ManagerPath, manager + "Plan", []any{"sda", none}, "org.freedesktop.DBus.Error.InvalidArgs", ""},
		{"unknown method", api.ManagerPath, manager + "Format", nil, "org.freedesktop.DBus.Error.UnknownMethod", ""},
		{"unknown interface", api.ManagerPath, "org.example.X.Y", nil, "org.freedesktop.DBus.Error.UnknownInterface", ""},
		{"unknown object", "/org/memlinux/Memlinux1/jobs/none", api.JobInterface + ".Cancel", []any{none}, "org.freedesktop.DBus.Error.UnknownObject", ""},
		{"job's method on the manager", api.ManagerPath, api.JobInterface + ".Cancel", []any{none}, "org.freedesktop.DBus.Error.UnknownInterface", ""},
		{"unknown property", api.ManagerPath, api.PropertiesInterface + ".Get", []any{api.ManagerInterface, "Colour"}, "org.freedesktop.DBus.Error.UnknownProperty", ""},
		{"read-only property", api.ManagerPath, api.PropertiesInterface + ".Set", []any{api.ManagerInterface, "Version", dbus.MakeVariant("2")}, "org.freedesktop.DBus.Error.PropertyReadOnly", ""},
	} {
		err := invoke(conn, c.path, c.method, c.args...).Err
		if name := api.ErrorName(err); err == nil || name != c.want || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %s: %v", c.name, name, err)
		}
	}
	var version dbus.Variant
	if err := invoke(conn, api.ManagerPath, api.PropertiesInterface+".Get", api.ManagerInterface, "Version").Store(&version); err != nil || version.Value() != "test" {
		t.Errorf("after all that, Version is %v, %v", version, err)
	}
}

// A descriptor that comes with a call that fails is closed.
func TestDescriptorsAreClosed(t *testing.T) {
	need.Root(t)
	conn := dial(t, openBus(t))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	options := map[string]dbus.Variant{"unknown": dbus.MakeVariant(dbus.UnixFD(w.Fd())), api.OptBusybox: dbus.MakeVariant(dbus.UnixFD(w.Fd()))}
	if err := invoke(conn, api.ManagerPath, api.ManagerInterface+".Build", options).Err; api.ErrorName(err) != api.ErrInvalidOption {
		t.Fatal(err)
	}
	w.Close()
	end := make(chan error, 1)
	go func() {
		_, err := r.Read(make([]byte, 1))
		end <- err
	}()
	select {
	case <-end:
	case <-time.After(10 * time.Second):
		t.Error("the daemon still holds the descriptor")
	}
}

func TestTreeCanBeWalked(t *testing.T) {
	need.Root(t)
	busctl := need.Tool(t, "busctl", "systemd")
	out, err := exec.Command(busctl, "--address="+openBus(t), "tree", api.BusName).CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte(api.ManagerPath)) {
		t.Errorf("busctl tree: %v\n%s", err, out)
	}
}

func TestOnlyOneOnABus(t *testing.T) {
	need.Root(t)
	address := openBus(t)
	c := config.Config{CacheDir: t.TempDir(), StateDir: t.TempDir(), Kernel: "auto", Memory: 512, JobRetention: time.Minute}
	err := Serve(context.Background(), address, RootOnly, c, "second", func() error { return fmt.Errorf("it became ready") })
	if err == nil || !strings.Contains(err.Error(), "another memlinuxd") {
		t.Errorf("the second one: %v", err)
	}
}

// A disk that comes and goes is told on the bus without anybody asking.
func TestDisksComeAndGo(t *testing.T) {
	need.Root(t)
	losetup := need.Tool(t, "losetup", "mount")
	conn := dial(t, openBus(t))
	signals := make(chan *dbus.Signal, 64)
	conn.Signal(signals)
	if err := conn.AddMatchSignal(dbus.WithMatchSender(api.BusName), dbus.WithMatchInterface(api.ObjectManagerInterface)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, "--find", "--show", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	dev := strings.TrimSpace(string(out))
	detached := false
	detach := func() {
		if !detached {
			detached = true
			if out, err := exec.Command(losetup, "--detach", dev).CombinedOutput(); err != nil {
				t.Errorf("losetup --detach: %v: %s", err, out)
			}
		}
	}
	defer detach()
	path := api.DevicePath(filepath.Base(dev))
	await := func(member string) *dbus.Signal {
		t.Helper()
		timeout := time.After(time.Minute) // other tests make disks, too, and each is looked at
		for {
			select {
			case s := <-signals:
				if s.Name == api.ObjectManagerInterface+"."+member && s.Body[0] == path {
					return s
				}
			case <-timeout:
				t.Fatalf("no %s for %s", member, path)
			}
		}
	}
	added := await("InterfacesAdded")
	props := added.Body[1].(map[string]map[string]dbus.Variant)[api.DeviceInterface]
	d, err := api.DeviceFrom(props)
	if err != nil || d.Path != dev || d.Size != 1<<20 || d.Transport != "loop" {
		t.Errorf("added as %+v, %v", d, err)
	}
	detach()
	await("InterfacesRemoved")
}

// A job that needs nothing of the cache does not keep it from being cleared away,
// and one that does, does.
func TestWhoKeepsTheCache(t *testing.T) {
	need.Root(t)
	address := startBus(t)
	dir := serve(t, address, RootOnly).CacheDir
	conn := dial(t, address)
	file := filepath.Join(dir, "files", strings.Repeat("a", 64))
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	kept := func() bool {
		t.Helper()
		if err := os.WriteFile(file, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := cache.Trim(dir, 0, 0); err != nil {
			t.Fatal(err)
		}
		_, err := os.Stat(file)
		return err == nil
	}
	console, _ := startWaiting(t, conn)
	awaitState(t, conn, console, api.StateRunning)
	if kept() {
		t.Error("a virtual machine's console keeps the cache")
	}
	if err := invoke(conn, console, api.JobInterface+".Cancel", map[string]dbus.Variant{}).Err; err != nil {
		t.Fatal(err)
	}

	ours := &Server{}
	ours.configuration.Store(&config.Config{CacheDir: dir})
	if _, err := ours.withCache(func(context.Context, *jobs.Job) (*api.Report, error) {
		if !kept() {
			t.Error("what a build works with goes")
		}
		return nil, nil
	})(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("the cache stays larger than it may after a build")
	}
}
