// Package nspawn boots a Debian 12 under real systemd for tests, in a container
// of systemd-nspawn: D-Bus, polkit, logind, bus activation and the confinement
// of units are those of a user's machine. A boot takes about a second, and the
// kernel is the host's, so that there are no modules to load and no udev.
//
// The Debian comes out of need.Cache and is never written: what a test changes
// is in memory and gone with it. It has what memlinux's package depends on, and
// an ordinary user, [User].
//
// cgroups are the unified hierarchy, as on Debian 12, so DevicePolicy= holds
// here. Whether MemoryMax= and the like do depends on the host: on one that has
// its controllers in version 1 they are set and not enforced.
package nspawn

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// User is an ordinary user of the Debian, without a password.
const User = "anna"

// Patience is how long a container may take from its start to its end.
const Patience = 5 * time.Minute

// packages are in the Debian beside the essential ones and apt: a system as a
// person has it, without a desktop, and what memlinux's package depends on.
var packages = []string{
	"systemd-sysv", "libpam-systemd", "dbus", "udev", "kmod", "polkitd",
	"busybox-static", "grub-common", "grub-efi-amd64-bin", "grub-pc-bin", "ovmf", "qemu-system-x86", "util-linux", "xz-utils",
}

// Debian is how one is run.
type Debian struct {
	// Script is run by bash as root when the Debian is up, with the errors of
	// commands ending it (set -e). What it writes into its working directory
	// comes out. The Debian ends with it.
	Script string
	// Files are copied into the Debian before the script runs: from the host's
	// path by the absolute path there, with their permissions.
	Files map[string]string
	// Devices are nodes of the host's that the Debian gets: /dev/loop0.
	Devices []string
	// Args are more arguments for systemd-nspawn.
	Args []string
}

// A container's name is prefix, the process that runs it, and a number.
const prefix = "memlinux-test-"

var count atomic.Int64

// runner runs the script, and tells how it ended.
const runner = `
cd /run/test/out
systemctl is-system-running --wait > /dev/null
cp -a /run/test/in/. / && bash -e -o pipefail /run/test/script < /dev/null > said 2>&1
status=$?
[ $status = 0 ] || journalctl --boot --no-pager > /run/test/journal
echo $status > /run/test/status
`

const runnerUnit = `[Unit]
Description=the test's script
After=multi-user.target dbus.service
SuccessAction=exit-force
FailureAction=exit-force

[Service]
Type=exec
ExecStart=/bin/bash /run/test/run
`

// Run boots a Debian, runs the script in it and returns the files that the
// script left in its working directory, and all it said under the name "said".
// A script that fails fails the test. Nothing of the Debian is left when Run
// returns, and nothing runs on when the test process is killed.
//
// The Debian has a network of its own, with nothing but the loopback. /sys is
// the host's, read-only.
func Run(t testing.TB, d Debian) map[string]string {
	t.Helper()
	need.Root(t)
	program := need.Tool(t, "systemd-nspawn", "systemd-container")
	root := Tree(t)
	dir := t.TempDir()
	write(t, dir, "script", d.Script)
	write(t, dir, "run", runner)
	write(t, dir, "unit", runnerUnit)
	mkdir(t, filepath.Join(dir, "in"))
	mkdir(t, filepath.Join(dir, "out"))
	for to, from := range d.Files {
		in := filepath.Join(dir, "in", to)
		mkdir(t, filepath.Dir(in))
		run(t, "cp", "--preserve=mode", "--reflink=auto", from, in)
	}
	name := fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), count.Add(1))
	argv := []string{
		program, "--quiet", "--directory=" + root, "--volatile=overlay", "--boot", "--machine=" + name, "--hostname=debian", "--register=no", "--keep-unit",
		"--private-network", "--link-journal=no", "--resolv-conf=off", "--timezone=off", "--console=pipe", "--kill-signal=SIGRTMIN+3",
		// What systemd needs to enforce DevicePolicy=.
		"--capability=CAP_BPF", "--system-call-filter=bpf",
		"--bind=" + dir + ":/run/test", "--bind-ro=" + filepath.Join(dir, "unit") + ":/run/systemd/system/test.service",
	}
	for _, device := range d.Devices {
		argv = append(argv, "--bind="+device)
	}
	argv = append(append(argv, d.Args...), "systemd.wants=test.service", "systemd.show_status=0")

	console, err := boot(t, name, argv)
	status, readErr := os.ReadFile(filepath.Join(dir, "status"))
	files := readAll(t, filepath.Join(dir, "out"))
	switch {
	case readErr != nil:
		t.Fatalf("the Debian ended (%v) before its script did; its console:\n%s\nthe script said:\n%s", err, console, files["said"])
	case strings.TrimSpace(string(status)) != "0":
		journal, _ := os.ReadFile(filepath.Join(dir, "journal")) // it may have failed before
		t.Fatalf("the script ended with status %s; its journal:\n%s\nit said:\n%s", bytes.TrimSpace(status), journal, files["said"])
	case err != nil:
		t.Fatalf("systemd-nspawn: %v; its console:\n%s", err, console)
	}
	return files
}

// boot runs systemd-nspawn to its end, in a cgroup of its own that is removed
// then, and returns what the container's console said.
func boot(t testing.TB, name string, argv []string) (console string, err error) {
	t.Helper()
	groups := cgroups(t, name)
	defer removeGroups(t, groups)
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	// systemd-nspawn leaves folders in a /run that is not a tmpfs.
	enter := "mount --make-rslave /; mount -t proc proc /proc; mount -t tmpfs tmpfs /run; "
	for _, g := range groups {
		enter += "echo $$ > " + g + "/cgroup.procs; "
	}
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-e", "-c", enter + `exec "$@"`, "sh"}, argv...)...)
	cmd.Env = append(os.Environ(), "UNIFIED_CGROUP_HIERARCHY=1", "SYSTEMD_NSPAWN_LOCK=0") // many may read one tree
	// systemd-nspawn that is killed leaves its container running; the first
	// process of a PID namespace takes all in it along.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Setpgid: true, Pdeathsig: syscall.SIGKILL}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.WaitDelay = 5 * time.Second
	done := make(chan error)
	go func() {
		// The kernel sends the death signal when the thread that forked ends,
		// not the process: keep that thread.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- cmd.Run()
	}()
	err = <-done
	if ctx.Err() != nil {
		err = fmt.Errorf("killed after %s: %w", Patience, ctx.Err())
	}
	return said.String(), err
}

// cgroups makes a cgroup of the given name below this process's own, in the
// unified hierarchy and in systemd's own where that is another. All containers
// would share one otherwise.
func cgroups(t testing.TB, name string) []string {
	t.Helper()
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	var made []string
	for line := range strings.Lines(string(own)) {
		// cgroups(7): hierarchy-ID:controller-list:cgroup-path
		part := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(part) != 3 || part[1] != "" && part[1] != "name=systemd" {
			continue
		}
		for _, mount := range map[string][]string{"": {"/sys/fs/cgroup/unified", "/sys/fs/cgroup"}, "name=systemd": {"/sys/fs/cgroup/systemd"}}[part[1]] {
			if _, err := os.Stat(filepath.Join(mount, part[2], "cgroup.procs")); err != nil {
				continue
			}
			removeStale(t, filepath.Join(mount, part[2]))
			g := filepath.Join(mount, part[2], name)
			if err := os.Mkdir(g, 0o755); err != nil { //nolint:gosec // the kernel's own mode
				removeGroups(t, made)
				t.Fatal(err)
			}
			made = append(made, g)
			break
		}
	}
	return made
}

// removeStale removes the empty cgroups that tests left in dir which were killed.
func removeStale(t testing.TB, dir string) {
	t.Helper()
	found, _ := filepath.Glob(filepath.Join(dir, prefix+"*")) // the pattern is right
	for _, g := range found {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(g), prefix), "-")
		if n, err := strconv.Atoi(pid); err == nil && errors.Is(unix.Kill(n, 0), unix.ESRCH) {
			removeGroups(t, []string{g})
		}
	}
}

// removeGroups removes cgroups with all below them, the innermost first.
func removeGroups(t testing.TB, groups []string) {
	t.Helper()
	for _, g := range groups {
		var all []string
		_ = filepath.WalkDir(g, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				all = append(all, path)
			}
			return nil // it may be going
		})
		for _, dir := range slices.Backward(all) {
			// The kernel may still be at the end of what was killed.
			err := unix.Rmdir(dir)
			for n := 0; errors.Is(err, unix.EBUSY) && n < 500; n++ {
				time.Sleep(10 * time.Millisecond)
				err = unix.Rmdir(dir)
			}
			if err != nil && !errors.Is(err, unix.ENOENT) {
				t.Errorf("remove cgroup %s: %v", dir, err)
			}
		}
	}
}

// Tree is the Debian's root, made by mmdebstrap and kept in need.Cache. It must
// not be written.
func Tree(t testing.TB) string {
	t.Helper()
	need.Root(t)
	include := strings.Join(packages, ",")
	dir := filepath.Join(need.Cache(t), fmt.Sprintf("nspawn-bookworm-%x", sha256.Sum256([]byte(include)))[:len("nspawn-bookworm-")+12])
	mmdebstrap := need.Tool(t, "mmdebstrap", "mmdebstrap")
	// Tests of several packages run at once.
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	// The folder around the tree keeps this machine's users from its programs
	// with the setuid bit.
	root := filepath.Join(dir, "root")
	if _, err := os.Stat(root); err == nil {
		return root
	}
	if !need.All() {
		t.Skip("skipped: the test needs a Debian made by mmdebstrap; run make test")
	}
	part := filepath.Join(dir, "part")
	if err := os.RemoveAll(part); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, mmdebstrap, "--quiet", "--mode=root", "--variant=minbase", "--include="+include, "--aptopt=Acquire::Languages \"none\"", "bookworm", part)
	run(t, "useradd", "--root", part, "--create-home", "--shell", "/bin/bash", User)
	if err := os.Rename(part, root); err != nil {
		t.Fatal(err)
	}
	return root
}

// readAll reads the regular files below dir.
func readAll(t testing.TB, dir string) map[string]string {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	files := map[string]string{}
	err = fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		b, err := root.ReadFile(name)
		files[name] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func write(t testing.TB, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil { //nolint:gosec // systemd warns of units that not all may read
		t.Fatal(err)
	}
}

func mkdir(t testing.TB, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // they become folders of the Debian
		t.Fatal(err)
	}
}

func run(t testing.TB, argv ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
}
