package need

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Package is a folder of Cache with what is in Debian's package name, and in
// those of more, which are fetched by apt and not installed: some would put
// others out, or change how the machine boots.
func Package(t testing.TB, name string, more ...string) string {
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
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	if !All() {
		unmet(t, "needs Debian's package %s in %s; run make test", name, dir)
	}
	tmp := t.TempDir()
	run := func(argv ...string) error {
		cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
		cmd.Dir = tmp
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Logf("%s: %v: %s", strings.Join(argv, " "), err, out)
		}
		return err
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	download := append([]string{"apt-get", "download", "-qq", name}, more...)
	if run(download...) != nil {
		must(run("apt-get", "update", "-qq"))
		must(run(download...))
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1+len(more) {
		t.Fatalf("apt-get left %q", debs)
	}
	// Whole or not at all: the folder takes its name when it is complete.
	part := dir + ".part"
	must(os.RemoveAll(part))
	for _, deb := range debs {
		must(run("dpkg-deb", "-x", deb, part))
	}
	must(os.Rename(part, dir))
	return dir
}
