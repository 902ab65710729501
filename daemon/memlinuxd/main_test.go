package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
)

// startDaemon builds memlinuxd, starts it with a bus of its own and returns
// the bus's address.
func startDaemon(t *testing.T) (address string, cmd *exec.Cmd) {
	t.Helper()
	need.Root(t)
	need.Tool(t, "dbus-daemon", "dbus-daemon")
	program := filepath.Join(t.TempDir(), "memlinuxd")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	cmd = exec.Command(program, "--private")
	cmd.Env = append(os.Environ(), "MEMLINUX_CACHE_DIR="+need.Cache(t), "MEMLINUX_STATE_DIR="+t.TempDir())
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close() // it lives as long as its input
		if err := cmd.Wait(); err != nil && !t.Failed() && cmd.ProcessState.Exited() {
			t.Errorf("memlinuxd: %v", err)
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line), cmd
}

// bus is somebody else's client.
type bus struct {
	t       *testing.T
	address string
}

// call calls a method by busctl and returns its values as JSON.
func (b bus) call(path, iface, method string, args ...string) []any {
	b.t.Helper()
	argv := append([]string{"--address=" + b.address, "--json=short", "call", api.BusName, path, iface, method}, args...)
	var stderr strings.Builder
	cmd := exec.Command("busctl", argv...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		b.t.Fatalf("busctl %s: %v: %s", strings.Join(argv, " "), err, stderr.String())
	}
	var reply struct{ Data []any }
	if len(out) > 0 {
		if err := json.Unmarshal(out, &reply); err != nil {
			b.t.Fatalf("%s: %v", out, err)
		}
	}
	return reply.Data
}

// await polls a job until it has ended and returns its report.
func (b bus) await(job string) api.Report {
	b.t.Helper()
	for deadline := time.Now().Add(6 * time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		props := b.call(job, api.PropertiesInterface, "GetAll", "s", api.JobInterface)[0].(map[string]any)
		value := func(of map[string]any, key string) any {
			v, _ := of[key].(map[string]any)
			return v["data"]
		}
		switch value(props, "State") {
		case api.StateRunning:
			continue
		case api.StateSucceeded:
			if p := value(props, "Progress"); p != 1.0 {
				b.t.Errorf("succeeded with the progress %v", p)
			}
			result, _ := value(props, "Result").(map[string]any)
			var report api.Report
			if err := json.Unmarshal([]byte(value(result, api.ResultReport).(string)), &report); err != nil {
				b.t.Fatal(err)
			}
			return report
		default:
			b.t.Fatalf("the job ended as %v: %v", value(props, "State"), value(props, "Message"))
		}
	}
	b.t.Fatal("the job does not end")
	return api.Report{}
}

// A build and a write without the command line, by gdbus and busctl.
func TestOthersDriveIt(t *testing.T) {
	gdbus := need.Tool(t, "gdbus", "libglib2.0-bin")
	need.Tool(t, "busctl", "systemd")
	address, _ := startDaemon(t)
	out, err := exec.Command(gdbus, "introspect", "--address", address, "--dest", api.BusName, "--object-path", string(api.ManagerPath), "--recurse").CombinedOutput()
	for _, want := range []string{"interface " + api.ManagerInterface, "WriteFile(in  h file", "interface " + api.DeviceInterface} {
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("gdbus introspect: %v: %q is not in\n%s", err, want, out)
		}
	}

	b := bus{t, address}
	manager := func(method string, args ...string) string {
		return b.call(string(api.ManagerPath), api.ManagerInterface, method, args...)[0].(string)
	}
	built := b.await(manager("Build", "a{sv}", "1", api.OptCompression, "s", "gzip"))
	if !built.Verified || len(built.System.ID) != 16 {
		t.Errorf("Build: %+v", built)
	}

	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 128<<20); err != nil {
		t.Fatal(err)
	}
	dev := need.Loop(t, disk, "512")
	path := string(api.DevicePath(filepath.Base(dev)))
	plan := b.call(string(api.ManagerPath), api.ManagerInterface, "Plan", "oa{sv}", path, "0")[0].(map[string]any)
	token := plan["token"].(map[string]any)["data"].(string)
	written := b.await(manager("Write", "osa{sv}", path, token, "1", api.OptCompression, "s", "gzip"))
	if !written.Written || !written.Verified || len(written.Boots) != 2 || written.System.ID != built.System.ID {
		t.Errorf("Write: %+v", written)
	}
	if written.Image.SHA256Planned != written.Image.SHA256Written || written.Image.SHA256Planned != written.Image.SHA256Read {
		t.Errorf("digests: %+v", written.Image)
	}

	// The disk has changed since: the token is no longer good.
	cmd := exec.Command("busctl", "--address="+address, "call", api.BusName, string(api.ManagerPath), api.ManagerInterface, "Write", "osa{sv}", path, token, "0")
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("an old token was taken: %s", out)
	}
}

// A bus whose daemon was killed does not stay.
func TestBusDiesWithTheDaemon(t *testing.T) {
	address, cmd := startDaemon(t)
	socket := strings.TrimPrefix(strings.Split(address, ",")[0], "unix:path=")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(socket)) })
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if exec.Command("busctl", "--address="+address, "list").Run() != nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the bus still answers")
		}
	}
}
