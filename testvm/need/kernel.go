package need

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// Debian's kernels, by their metapackages: the smallest, with serial console, NVMe
// and ext4 built in, USB and AHCI left out; and that of PCs, with nearly all in
// modules.
const cloudKernel, pcKernel = "linux-image-cloud-amd64", "linux-image-amd64"

// Kernel is a Linux kernel for virtual machines, Debian's cloud kernel out of
// [Cache], and the file with its configuration. It is fetched by apt where it
// is not there yet and all tests must run; else the test is skipped then.
func Kernel(t testing.TB) (image, config string) {
	t.Helper()
	boot := filepath.Join(kernel(t, cloudKernel, "kernel"), "boot")
	return one(boot, "vmlinuz-*"), one(boot, "config-*")
}

// smallKernel is the folder in [Cache] with what [SmallKernel] gives.
const smallKernel = "small-kernel"

// SmallKernel is memlinux's own minimal kernel, and the file with its
// configuration: a third of Debian's, it boots in a fraction of the time where
// firmware reads it. The package imagegen/kbuild/kbuildtest makes it, and its test
// is the first of make test; where it is not there the test is skipped, or fails if
// all must run.
func SmallKernel(t testing.TB) (image, config string) {
	t.Helper()
	dir := filepath.Join(Cache(t), smallKernel)
	image, config = filepath.Join(dir, "bzImage"), filepath.Join(dir, "config")
	if _, err := os.Stat(image); err != nil {
		unmet(t, "needs a kernel that is compiled from source in %s; run make test", dir)
	}
	return image, config
}

// KeepSmallKernel makes the folder, which is in [Cache], what SmallKernel gives.
func KeepSmallKernel(t testing.TB, folder string) {
	t.Helper()
	link := filepath.Join(Cache(t), smallKernel)
	to, err := filepath.Rel(filepath.Dir(link), folder)
	if err != nil {
		t.Fatal(err)
	}
	if is, err := os.Readlink(link); err == nil && is == to {
		return
	}
	if err := renameio.Symlink(to, link); err != nil {
		t.Fatal(err)
	}
}

// KernelOfPCs is the folder, in [Cache], with the kernel that Debian's PCs have:
// boot/ and lib/modules/, as its package has them, and what depmod adds. It is
// fetched and the test skipped as with [Kernel].
func KernelOfPCs(t testing.TB) (root string) {
	t.Helper()
	Tool(t, "depmod", "kmod")
	return kernel(t, pcKernel, "kernel-of-pcs")
}

// kernel is the folder of that name, with what is in the package that pkg depends on.
func kernel(t testing.TB, pkg, name string) string {
	t.Helper()
	dir := filepath.Join(Cache(t), name)
	// Tests of several packages run at once.
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	boot := filepath.Join(dir, "boot")
	if one(boot, "vmlinuz-*") == "" {
		if !All() {
			unmet(t, "needs Debian's %s in %s; run make test", pkg, dir)
		}
		fetch(t, pkg, dir)
	}
	if one(boot, "vmlinuz-*") == "" || one(boot, "config-*") == "" {
		t.Fatalf("%s has no kernel with its configuration; remove that folder", boot)
	}
	return dir
}

func one(dir, pattern string) string {
	found, _ := filepath.Glob(filepath.Join(dir, pattern)) // the patterns are right
	if len(found) == 0 {
		return ""
	}
	return found[0]
}

// fetch unpacks the package that the kernel's metapackage depends on into dir.
func fetch(t testing.TB, meta, dir string) {
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
		for line := range strings.Lines(run(tmp, "apt-cache", "depends", "--important", meta)) {
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
	if meta == pcKernel {
		run(tmp, "depmod", "-b", part, filepath.Base(one(filepath.Join(part, "lib/modules"), "*")))
	}
	run(tmp, "mv", part, dir)
}
