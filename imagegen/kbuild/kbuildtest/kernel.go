// Package kbuildtest gives tests a kernel that memlinux made from source.
package kbuildtest

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/imagegen/kbuild"
	"github.com/memlinux/memlinux/testvm/need"
	"golang.org/x/sys/unix"
)

// sourcePackage is the Debian package with the kernel's source.
const sourcePackage = "linux-source-6.1"

// Kernel is the minimal kernel, made by kbuild from Debian's linux-source-6.1,
// and the file with its configuration. Both are kept in need.Cache by the key of
// the request. Where they are not there yet and all tests must run, the source is
// fetched and the kernel made, which takes two CPUs about ten minutes; else the
// test is skipped then.
func Kernel(t testing.TB) (image, config string) {
	t.Helper()
	need.Root(t)
	cache := need.Cache(t)
	unlock := lock(t, filepath.Join(cache, "kbuild.lock"))
	defer unlock()
	source := Source(t)
	st, err := source.Stat()
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(source, 0, st.Size())); err != nil {
		t.Fatal(err)
	}
	r := kbuild.Request{Source: source, Size: st.Size(), SourceSHA256: hex.EncodeToString(h.Sum(nil)), Base: "minimal"}
	key, err := r.Key(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "kbuild", key)
	image, config = filepath.Join(dir, "bzImage"), filepath.Join(dir, "config")
	if _, err := os.Stat(config); err == nil {
		need.KeepSmallKernel(t, dir)
		return image, config
	}
	if !need.All() {
		t.Skipf("skipped: the test needs a kernel made from %s in %s, which takes ten minutes; run make test", sourcePackage, dir)
	}
	// Not in the cache's folder, which only root may reach.
	if r.WorkDir, err = os.MkdirTemp("", "memlinux-kbuild-"); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(r.WorkDir)
	t.Logf("making %s, which takes about ten minutes", dir)
	result, err := kbuild.Build(t.Context(), r, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range result.Warnings {
		t.Errorf("the minimal kernel: %s", w)
	}
	// Whole or not at all: the folder takes its name when it is complete.
	part := dir + ".part"
	run(t, "", "rm", "-rf", part)
	run(t, "", "mkdir", "-p", part)
	run(t, "", "cp", result.Image, filepath.Join(part, "bzImage"))
	run(t, "", "cp", result.Config, filepath.Join(part, "config"))
	run(t, "", "mv", part, dir)
	need.KeepSmallKernel(t, dir)
	return image, config
}

// Source is the tar of Debian's linux-source-6.1 in need.Cache, fetched by apt
// where it is not there and all tests must run; else the test is skipped then.
func Source(t testing.TB) *os.File {
	t.Helper()
	dir := filepath.Join(need.Cache(t), sourcePackage)
	unlock := lock(t, dir+".lock")
	defer unlock()
	path := filepath.Join(dir, "usr/src", sourcePackage+".tar.xz")
	if _, err := os.Stat(path); err != nil {
		if !need.All() {
			t.Skipf("skipped: the test needs Debian's %s in %s; run make test", sourcePackage, dir)
		}
		fetch(t, dir)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// fetch unpacks the source's package into dir.
func fetch(t testing.TB, dir string) {
	t.Helper()
	tmp := t.TempDir()
	if exec.Command("apt-cache", "show", sourcePackage).Run() != nil {
		run(t, tmp, "apt-get", "update", "-qq")
	}
	run(t, tmp, "apt-get", "download", "-qq", sourcePackage)
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb")) // the pattern is right
	if len(debs) != 1 {
		t.Fatalf("apt-get left %d packages, not one", len(debs))
	}
	part := dir + ".part"
	run(t, tmp, "rm", "-rf", part)
	run(t, tmp, "dpkg-deb", "-x", debs[0], part)
	run(t, tmp, "mv", part, dir)
}

func run(t testing.TB, in string, argv ...string) {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = in
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
}

// lock holds a lock among the tests of several packages until unlock.
func lock(t testing.TB, path string) (unlock func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() { _ = f.Close() }
}
