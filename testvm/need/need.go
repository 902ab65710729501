// Package need says what a test needs of the machine it runs on.
//
// On any laptop a test whose need is not met is skipped with the reason. Where
// MEMLINUX_TEST_ALL=1 is set (make test sets it) the same need fails the test
// instead: a skip must never pass for a proof.
package need

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// All reports whether every need must be met (MEMLINUX_TEST_ALL=1).
func All() bool { return os.Getenv("MEMLINUX_TEST_ALL") == "1" }

func unmet(t testing.TB, format string, args ...any) {
	t.Helper()
	if All() {
		t.Fatalf("MEMLINUX_TEST_ALL=1, but the test "+format, args...)
	}
	t.Skipf("skipped: the test "+format, args...)
}

// Root needs the test to run as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		unmet(t, "needs root; run make test")
	}
}

// Tool needs the command name, which Debian's package pkg brings, and returns
// its path.
func Tool(t testing.TB, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		unmet(t, "needs %s; apt-get install %s", name, pkg)
	}
	return path
}

// File needs the file at path, which Debian's package pkg brings.
func File(t testing.TB, path, pkg string) string {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		unmet(t, "needs %s; apt-get install %s", path, pkg)
	}
	return path
}

// Loop needs root and a kernel with loop devices. It attaches file to a new
// loop device of the given logical sector size, detaches it when the test
// ends, and returns the device's path.
func Loop(t testing.TB, file string, sectorSize string) string {
	t.Helper()
	Root(t)
	losetup := Tool(t, "losetup", "mount")
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		unmet(t, "needs loop devices: %v", err)
	}
	out, err := exec.Command(losetup, "--find", "--show", "--sector-size", sectorSize, file).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup %s: %v: %s", file, err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

// Cache is the folder where tests keep what is slow to get, such as kernels:
// MEMLINUX_TEST_CACHE, else memlinux-test in the user's cache.
func Cache(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("MEMLINUX_TEST_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			unmet(t, "needs a folder for its cache; set MEMLINUX_TEST_CACHE: %v", err)
		}
		dir = filepath.Join(base, "memlinux-test")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // kernels are no secret
		t.Fatal(err)
	}
	return dir
}

// FUSE needs root and a kernel with FUSE, and returns its device, open. The test
// has to mount it. In a container the device's node may be missing: then one of
// the test's own is made, if the container may.
func FUSE(t testing.TB) *os.File {
	t.Helper()
	Root(t)
	const node, major, minor = "/dev/fuse", 10, 229 // Linux Documentation/admin-guide/devices.txt
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		own := filepath.Join(t.TempDir(), "fuse")
		if err = unix.Mknod(own, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err == nil {
			f, err = os.OpenFile(own, os.O_RDWR, 0)
		}
	}
	if err != nil {
		unmet(t, "needs a kernel with FUSE (modprobe fuse), and in a container leave to use the device %d:%d: %v", major, minor, err)
	}
	return f
}
