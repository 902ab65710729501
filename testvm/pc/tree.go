package pc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// tree is the root of a system to be. Its absolute links can't lead a write
// into the host's own files.
type tree struct {
	t    testing.TB
	root *os.Root
}

func openTree(t testing.TB, dir string) *tree {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	return &tree{t, root}
}

func (tr *tree) close() { _ = tr.root.Close() }

func (tr *tree) write(name, content string, mode fs.FileMode) {
	tr.t.Helper()
	name = strings.TrimPrefix(name, "/")
	if err := tr.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		tr.t.Fatal(err)
	}
	if err := tr.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		tr.t.Fatal(err)
	}
	if err := tr.root.WriteFile(name, []byte(content), mode); err != nil {
		tr.t.Fatal(err)
	}
}

// copy copies a file of the host, with its permissions.
func (tr *tree) copy(name, from string) {
	tr.t.Helper()
	st, err := os.Stat(from)
	if err != nil {
		tr.t.Fatal(err)
	}
	tr.write(name, string(read(tr.t, from)), st.Mode().Perm())
}

// copyAll copies the files of a folder of the host that match one of patterns.
func (tr *tree) copyAll(dir, from string, patterns ...string) {
	tr.t.Helper()
	for _, pattern := range patterns {
		files, _ := filepath.Glob(filepath.Join(from, pattern)) // the patterns are right
		for _, f := range files {
			tr.copy(path.Join(dir, filepath.Base(f)), f)
		}
	}
}

func (tr *tree) link(name, target string) {
	tr.t.Helper()
	if err := tr.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		tr.t.Fatal(err)
	}
	if err := tr.root.Symlink(target, name); err != nil {
		tr.t.Fatal(err)
	}
}

// bareInit ends in a shell on the serial line. What can't be mounted for want
// of a driver the test mounts itself.
const bareInit = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -o remount,rw /
/bin/busybox --install -s /bin
export PATH=/bin PS1='pc:~# '
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
echo 1 > /proc/sys/kernel/printk
while read -r what where kind rest; do
	case $what in
	UUID=*) [ "$where" = / ] || mount -t "$kind" "$(findfs "$what")" "$where";;
	esac
done < /etc/fstab 2>/dev/null
[ ! -d /sys/firmware/efi/efivars ] || mount -t efivarfs efivarfs /sys/firmware/efi/efivars 2>/dev/null
cd /
echo "pc: the old system" > /dev/ttyS0
exec setsid cttyhack sh < /dev/ttyS0 > /dev/ttyS0 2>&1
`

func bare(t testing.TB, root, busybox string) {
	t.Helper()
	for _, dir := range []string{"bin", "sbin", "proc", "sys", "dev", "tmp", "boot"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil { //nolint:gosec // a part of the PC's tree
			t.Fatal(err)
		}
	}
	tr := openTree(t, root)
	defer tr.close()
	tr.copy("bin/busybox", busybox)
	tr.write("sbin/init", bareInit, 0o755)
	tr.link("usr/share/pc", "/tmp") // so that /usr is there
}

// DebianTar is a root tree of Debian 12 with systemd, D-Bus, udev and kmod in a
// tar, made by mmdebstrap and kept in need.Cache under the name that the other
// tests with a Debian use, too.
func DebianTar(t testing.TB) string {
	t.Helper()
	need.Root(t)
	mmdebstrap := need.Tool(t, "mmdebstrap", "mmdebstrap")
	const include = "systemd-sysv,dbus,udev,kmod"
	file := filepath.Join(need.Cache(t), "bookworm-"+strings.ReplaceAll(include, ",", "-")+".tar")
	unlock := lock(t, file+".lock")
	defer unlock()
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		return file
	}
	if !need.All() {
		t.Skip("skipped: the test needs a root tree made by mmdebstrap; run make test")
	}
	part := filepath.Join(need.Cache(t), fmt.Sprintf("bookworm-%d.part.tar", os.Getpid()))
	defer os.Remove(part)
	run(t, nil, mmdebstrap, "--quiet", "--mode=root", "--variant=minbase", "--include="+include, "--aptopt=Acquire::Languages \"none\"", "bookworm", part)
	if err := os.Rename(part, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// lock holds a lock among the tests of several packages until unlock.
func lock(t testing.TB, name string) (unlock func()) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() { _ = f.Close() }
}
