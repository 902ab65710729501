package need

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// kernelPackage is Debian's smallest kernel: serial console, NVMe and ext4 are
// built in, USB and AHCI are not.
const kernelPackage = "linux-image-cloud-amd64"

// Kernel is a Linux kernel for virtual machines, Debian's cloud kernel out of
// [Cache], and the file with its configuration. It is fetched by apt where it
// is not there yet and all tests must run; else the test is skipped then.
func Kernel(t testing.TB) (image, config string) {
	t.Helper()
	boot := filepath.Join(Cache(t), "kernel", "boot")
	// Tests of several packages run at once.
	lock, err := os.OpenFile(filepath.Join(Cache(t), "kernel.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if one(boot, "vmlinuz-*") == "" {
		if !All() {
			unmet(t, "needs Debian's cloud kernel in %s; run make test", boot)
		}
		fetch(t, filepath.Dir(boot))
	}
	image, config = one(boot, "vmlinuz-*"), one(boot, "config-*")
	if image == "" || config == "" {
		t.Fatalf("%s has no kernel with its configuration; remove that folder", boot)
	}
	return image, config
}

func one(dir, pattern string) string {
	found, _ := filepath.Glob(filepath.Join(dir, pattern)) // the patterns are right
	if len(found) == 0 {
		return ""
	}
	return found[0]
}

// fetch unpacks the package that the kernel's metapackage depends on into dir.
func fetch(t testing.TB, dir string) {
	t.Helper()
	run := func(in string, argv ...string) string {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir = in
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
		}
		return string(out)
	}
	tmp := t.TempDir()
	pkg := ""
	for range 2 {
		for line := range strings.Lines(run(tmp, "apt-cache", "depends", "--important", kernelPackage)) {
			if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
				pkg = "linux-image-" + name
			}
		}
		if pkg != "" {
			break
		}
		run(tmp, "apt-get", "update", "-qq")
	}
	run(tmp, "apt-get", "download", "-qq", pkg)
	// Whole or not at all: the folder takes its name when it is complete.
	part := dir + ".part"
	run(tmp, "rm", "-rf", part)
	run(tmp, "dpkg-deb", "-x", one(tmp, "*.deb"), part)
	run(tmp, "mv", part, dir)
}
