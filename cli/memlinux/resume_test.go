package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// interrupted is a disk of which the write was interrupted by stop, which ends
// the command or its daemon: its head is void.
func interrupted(t *testing.T, w *world, code int, stop func(cli, daemon int) error) (device, backing string) {
	t.Helper()
	backing = w.path("disk")
	fill := func() {
		f, err := os.OpenFile(backing, os.O_WRONLY|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(bytes.Repeat([]byte("old "), 16<<20), 0); err != nil {
			t.Fatal(err)
		}
	}
	fill()
	// Its own attaching: it is to come back as another device.
	device = attach(t, backing)
	for range 20 {
		cmd := w.command("write", "--yes", "--no-boot-test", "--modules", "none", device)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); !isVoid(t, backing); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("it was never written: %s", stderr.String())
			}
		}
		err := stop(cmd.Process.Pid, child(t, cmd.Process.Pid))
		_ = cmd.Wait()
		if err == nil && isVoid(t, backing) {
			if got := cmd.ProcessState.ExitCode(); got != code {
				t.Fatalf("interrupted: exit %d: %s", got, stderr.String())
			}
			return device, backing
		}
		fill() // it was done before it could be interrupted
	}
	t.Fatal("it can't be interrupted")
	return "", ""
}

// child is the process's only one, 0 for none.
func child(t *testing.T, parent int) (pid int) {
	t.Helper()
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	for _, task := range tasks {
		text, _ := os.ReadFile(task)
		_, _ = fmt.Sscan(string(text), &pid)
	}
	return pid
}

func killDaemon(_, daemon int) error {
	if daemon == 0 {
		return os.ErrProcessDone
	}
	return syscall.Kill(daemon, syscall.SIGKILL)
}

// attach makes a loop device that detach or the test's end takes away.
func attach(t *testing.T, backing string) string {
	t.Helper()
	need.Root(t)
	device := strings.TrimSpace(sh(t, need.Tool(t, "losetup", "mount"), "--find", "--show", backing))
	t.Cleanup(func() { detach(t, device, backing) })
	return device
}

func detach(t *testing.T, device, backing string) {
	t.Helper()
	file, _ := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "loop/backing_file"))
	if strings.HasPrefix(string(file), backing) {
		sh(t, "losetup", "--detach", device)
	}
}

func isVoid(t *testing.T, backing string) bool {
	t.Helper()
	f, err := os.Open(backing)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head := make([]byte, headBytes)
	_, err = f.ReadAt(head, 0)
	return err == nil && allZero(head)
}

func TestNothingToResume(t *testing.T) {
	w := newWorld(t)
	device, backing := w.loop(64, "512")
	before := digest(t, backing)
	w.run("write", "--resume").wants(t, 3, "no interrupted write waits")
	w.run("write", "--resume", device).wants(t, 3, "nothing is to be resumed", "memlinux write "+device)
	w.run("write", "--resume", "--yes", device).wants(t, 3, "nothing is to be resumed")
	w.run("write", "--resume", w.path("stick.img")).wants(t, 2, "for a device")
	w.run("write", "--resume", "--kernel", "auto", "--append", "x", device).wants(t, 2, "leave out --append and --kernel")
	w.run("write", "--resume", "--check-capacity", device).wants(t, 2, "leave out --check-capacity")
	if digest(t, backing) != before {
		t.Error("the disk was changed")
	}
}

func TestResume(t *testing.T) {
	whole := func(t *testing.T, w *world, device string) {
		t.Helper()
		w.run("verify", "--no-boot-test", device).wants(t, 0)
		if o := w.run("devices"); strings.Contains(o.stdout, "--resume") {
			t.Errorf("it is whole, and said to wait:\n%s", o.stdout)
		}
	}
	t.Run("after a crash, which is told", func(t *testing.T) {
		w := newWorld(t)
		device, _ := interrupted(t, w, 1, killDaemon)
		if o := w.run("jobs"); !strings.Contains(o.stdout, "write --resume goes on with the same disk") {
			t.Errorf("jobs: %s", o.stdout)
		}
		if o := w.run("devices"); strings.Count(o.stdout, "--resume") != 1 {
			t.Errorf("devices: %s", o.stdout)
		}
		o := w.run("write", "--resume")
		o.wants(t, 0)
		if !strings.Contains(o.stdout, "resumed ") || !strings.Contains(o.stdout, "not booted in a virtual machine, as was asked for") {
			t.Errorf("resumed: %s", o.stdout)
		}
		whole(t, w, device)
	})
	t.Run("after a Ctrl-C", func(t *testing.T) {
		w := newWorld(t)
		device, _ := interrupted(t, w, 130, func(cli, _ int) error { return syscall.Kill(cli, syscall.SIGINT) })
		w.run("write", "--resume", device).wants(t, 0)
		whole(t, w, device)
	})
	t.Run("with two disks, after the command was killed", func(t *testing.T) {
		w, other := newWorld(t), newWorld(t)
		other.env = []string{"MEMLINUX_STATE_DIR=" + w.path("state")}
		var devices []string
		for _, w := range []*world{w, other} {
			device, backing := interrupted(t, w, -1, func(cli, _ int) error { return syscall.Kill(cli, syscall.SIGKILL) })
			awaitProcesses(t, func() bool { return w.left() == "" }) // the daemon follows
			if !isVoid(t, backing) {
				t.Error("its daemon ended, and the disk is not void")
			}
			devices = append(devices, device)
		}
		o := w.run("write", "--resume")
		o.wants(t, 0)
		for _, device := range devices {
			if !strings.Contains(o.stdout, "\n"+device+"\n") {
				t.Errorf("%s is not told of:\n%s", device, o.stdout)
			}
			whole(t, w, device)
		}
	})
	t.Run("as another device, without a serial: only when it is named and agreed to", func(t *testing.T) {
		w := newWorld(t)
		device, backing := interrupted(t, w, 1, killDaemon)
		detach(t, device, backing)
		attach(t, w.file("another", strings.Repeat("x", 1<<20))) // which may get the old name
		device = attach(t, backing)
		w.run("write", "--resume").wants(t, 3, "without a serial", "--resume "+device)
		w.run("write", "--resume", device).wants(t, 2, "--yes")
		if !isVoid(t, backing) {
			t.Error("the disk was changed")
		}
		o := atTerminal(t, w.command("write", "--resume", device), filepath.Base(device))
		if o.code != 0 || !strings.Contains(o.stdout, "may be another disk") {
			t.Errorf("exit %d: %s", o.code, o.stdout)
		}
		whole(t, w, device)
	})
	t.Run("not over what has come on it since", func(t *testing.T) {
		w := newWorld(t)
		device, backing := interrupted(t, w, 1, killDaemon)
		sh(t, need.Tool(t, "mke2fs", "e2fsprogs"), "-q", "-t", "ext4", device)
		before := digest(t, backing)
		w.run("write", "--resume").wants(t, 3, "no interrupted write waits")
		w.run("write", "--resume", device).wants(t, 2, "--yes")
		o := atTerminal(t, w.command("write", "--resume", device), "no")
		if o.code != 3 || !strings.Contains(o.stdout, "ext4") {
			t.Errorf("exit %d: %s", o.code, o.stdout)
		}
		if digest(t, backing) != before {
			t.Error("the disk was changed")
		}
		w.run("write", "--yes", "--no-boot-test", "--modules", "none", device).wants(t, 0)
		w.run("write", "--resume", device).wants(t, 3, "nothing is to be resumed")
	})
	t.Run("not without the cache, which changes nothing", func(t *testing.T) {
		w := newWorld(t)
		device, backing := interrupted(t, w, 1, killDaemon)
		cache := w.cache
		w.cache = w.path("state/empty")
		w.run("write", "--resume", device).wants(t, 1, "no longer in the cache", "plain memlinux write")
		if !isVoid(t, backing) {
			t.Error("the disk was changed")
		}
		w.cache = cache
		w.run("write", "--resume", device).wants(t, 0)
		whole(t, w, device)
	})
}
