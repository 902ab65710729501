package bootfs

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
	"golang.org/x/sys/unix"
)

// system makes a root folder with the given files.
func system(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, data := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func busy(t *testing.T, root string) string {
	t.Helper()
	l, err := Lock(t.Context(), root)
	if err == nil {
		l.Unlock()
		return ""
	}
	var b *BusyError
	if !errors.As(err, &b) {
		t.Fatal(err)
	}
	return b.By
}

func TestLockAgainstAnother(t *testing.T) {
	root := system(t, nil)
	first, err := Lock(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	if by := busy(t, root); by != "another memlinux" {
		t.Errorf("busy by %q", by)
	}
	first.Unlock()
	first.Unlock() // again is harmless
	if by := busy(t, root); by != "" {
		t.Errorf("busy by %q after Unlock", by)
	}
	// Nothing was made that belongs to package managers.
	if _, err := os.Stat(filepath.Join(root, "var")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("var was made: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Lock(ctx, root); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// The lock as dpkg takes it, held by another process.
func TestLockAgainstPackageManagers(t *testing.T) {
	python := need.Tool(t, "python3", "python3-minimal")
	for _, name := range packageLocks {
		t.Run(name, func(t *testing.T) {
			root := system(t, map[string]string{name: ""})
			if err := os.Symlink("/proc", filepath.Join(root, "proc")); err != nil {
				t.Fatal(err)
			}
			holder := exec.Command(python, "-c", `
import fcntl, sys
f = open(sys.argv[1], "r+")
fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
sys.stdin.read()
`, filepath.Join(root, name))
			in, err := holder.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := holder.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := holder.Start(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
				t.Fatal(line, err)
			}
			if by := busy(t, root); !strings.HasPrefix(by, "python3") || !strings.HasSuffix(by, " (pid "+strconv.Itoa(holder.Process.Pid)+")") {
				t.Errorf("busy by %q, not pid %d", by, holder.Process.Pid)
			}
			in.Close()
			if err := holder.Wait(); err != nil {
				t.Fatal(err)
			}

			// And it can't have the lock while we do.
			l, err := Lock(t.Context(), root)
			var busy *BusyError
			if errors.As(err, &busy) {
				t.Skipf("skipped: this machine is at work: %v", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer l.Unlock()
			err = exec.Command(python, "-c", `
import fcntl, sys
try:
    fcntl.lockf(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(7)
`, filepath.Join(root, name)).Run()
			if code := new(exec.ExitError); !errors.As(err, &code) || code.ExitCode() != 7 {
				t.Errorf("another process got the lock too: %v", err)
			}
		})
	}
}

func TestLockAgainstPrograms(t *testing.T) {
	for _, c := range []struct{ name, cmdline, want string }{
		{"a script by its interpreter", "/bin/sh\x00/usr/sbin/update-grub\x00", "update-grub (pid 77)"},
		{"an interpreter with a flag", "/bin/sh\x00-e\x00/usr/sbin/update-initramfs\x00-u\x00", "update-initramfs (pid 77)"},
		{"a shell of busybox", "busybox\x00sh\x00/sbin/grub-mkconfig\x00", "grub-mkconfig (pid 77)"},
		{"a program", "grub-install\x00/dev/sda\x00", "grub-install (pid 77)"},
		{"a program by its path", "/usr/bin/bootctl\x00update\x00", "bootctl (pid 77)"},
		{"reading about one is none", "man\x00grub-install\x00", ""},
		{"a command that only names one", "sh\x00-c\x00update-grub\x00", ""},
		{"a program with such a name", "/bin/bash\x00/root/my-update-grub\x00", ""},
		{"a dead process has no command line", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := system(t, map[string]string{
				"proc/77/cmdline": c.cmdline, "proc/77/comm": "update-grub\n",
				"proc/1/cmdline": "/sbin/init\x00", "proc/self/cmdline": "update-grub\x00", "proc/stat": "cpu",
			})
			if by := busy(t, root); by != c.want {
				t.Errorf("busy by %q, not %q", by, c.want)
			}
		})
	}
}

// A lock does not outlive its process, nor go to its children.
func TestLockIsNotInherited(t *testing.T) {
	root := system(t, map[string]string{"var/lib/dpkg/lock": ""})
	l, err := Lock(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range l.files {
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s goes to children: %v", f.Name(), err)
		}
	}
	l.Unlock()
}

func TestBusyErrorSaysWhatToDo(t *testing.T) {
	if got := (&BusyError{By: "apt-get (pid 123)"}).Error(); got != "apt-get (pid 123) is at work on this machine's boot files or packages; try again when it has finished" {
		t.Error(got)
	}
}

func FuzzProgram(f *testing.F) {
	for _, s := range []string{"", "\x00", "/bin/sh\x00/usr/sbin/update-grub\x00", "busybox\x00sh\x00-c\x00x", "sh\x00--\x00\x00", "a/b/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, cmdline string) {
		if got := program(cmdline); strings.Contains(got, "\x00") || got == "" {
			t.Errorf("%q is run by %q", cmdline, got)
		}
	})
}
