package nspawn

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// What the tests of memlinux as a service rest on.
func TestDebian(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	write(t, dir, "disk", strings.Repeat("on the disk\n", 4096))
	write(t, dir, "greet", "#!/bin/sh\necho hello\n")
	if err := os.Chmod(filepath.Join(dir, "greet"), 0o755); err != nil {
		t.Fatal(err)
	}
	loop := need.Loop(t, disk, "512")
	files := Run(t, Debian{
		Files:   map[string]string{"/usr/local/bin/greet": filepath.Join(dir, "greet")},
		Devices: []string{loop},
		Script: fmt.Sprintf(`
greet
systemctl is-system-running
runuser -u %[1]s -- busctl call org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager ListSeats
pkcheck --action-id org.freedesktop.login1.reboot --process $$ && echo polkit answers
head -c 12 %[2]s > disk
systemd-run --quiet --wait --pipe --property=DevicePolicy=closed head -c 12 %[2]s > closed 2>&1 || echo DevicePolicy holds
systemd-run --quiet --wait --pipe --property=DevicePolicy=closed --property=DeviceAllow='%[2]s r' head -c 12 %[2]s > open
systemd-run --quiet --wait --pipe --property=DynamicUser=yes --property=PrivateNetwork=yes id -u > dynamic
`, User, loop),
	})
	for name, want := range map[string]string{
		"said": "hello\nrunning\na(so) 1 \"seat0\" \"/org/freedesktop/login1/seat/seat0\"\npolkit answers\nDevicePolicy holds\n",
		"disk": "on the disk\n",
		"open": "on the disk\n",
	} {
		if files[name] != want {
			t.Errorf("%s is %q, want %q", name, files[name], want)
		}
	}
	if uid := strings.TrimSpace(files["dynamic"]); len(uid) != 5 || uid[0] != '6' {
		t.Errorf("a dynamic user has the id %q", uid)
	}
}

// A Debian leaves nothing behind, whatever runs in it.
func TestNothingIsLeft(t *testing.T) {
	need.Root(t)
	Run(t, Debian{Script: "sleep infinity &\nbusctl list > /dev/null"})
	own := fmt.Sprintf("%s%d-", prefix, os.Getpid())
	for _, dir := range []string{"/sys/fs/cgroup", "/run/systemd/nspawn"} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // nothing made it, or another test's is going
			}
			if err == nil && strings.HasPrefix(e.Name(), own) {
				t.Errorf("left behind: %s", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}
