package bootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// BusyError says that another program is at work on the boot files.
type BusyError struct{ By string } // "apt-get (pid 123)"

func (e *BusyError) Error() string {
	return fmt.Sprintf("%s is at work on this machine's boot files or packages; try again when it has finished", e.By)
}

// Locked holds the locks that [Lock] took.
type Locked struct{ files []*os.File }

// Unlock gives the locks back. They also end with the process.
func (l *Locked) Unlock() {
	for _, f := range l.files {
		f.Close()
	}
	l.files = nil
}

// ownLock keeps two of us apart. /run is root's alone, unlike /run/lock, and the
// folder is all of it that the service may write in.
const ownLock = "run/memlinux/boot.lock"

// packageLocks are the lock files of package managers, in the order in which
// apt and dpkg take theirs: install kernels, and run update-grub at the end.
var packageLocks = []string{
	"var/lib/dpkg/lock-frontend",
	"var/lib/dpkg/lock",
	"var/lib/rpm/.rpm.lock",
}

// programs change boot files without a lock.
var programs = map[string]bool{
	"bootctl": true, "dracut": true, "grubby": true, "kernel-install": true, "mkinitcpio": true,
	"update-grub": true, "update-grub2": true, "update-initramfs": true,
	"grub-install": true, "grub-mkconfig": true, "grub-reboot": true, "grub-set-default": true,
	"grub2-install": true, "grub2-mkconfig": true, "grub2-reboot": true, "grub2-set-default": true,
}

// interpreters run scripts: then the program is what they run.
var interpreters = map[string]bool{"sh": true, "bash": true, "dash": true, "ash": true, "busybox": true, "perl": true, "python3": true}

// Lock locks the boot files of the system whose root folder is root ("" is the
// running one) against another memlinux, dpkg and apt, rpm, and the programs that
// write boot menus. It does not wait: if one of them is at work, that is a
// *BusyError. dpkg and rpm can't start before Unlock; for the others it is a
// look at what runs now, as they know no lock.
func Lock(ctx context.Context, root string) (_ *Locked, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if root == "" {
		root = "/"
	}
	l := &Locked{}
	defer func() {
		if err != nil {
			l.Unlock()
		}
	}()
	if err := l.lockOwn(filepath.Join(root, ownLock)); err != nil {
		return nil, err
	}
	for _, name := range packageLocks {
		if err := l.lockPackages(root, name); err != nil {
			return nil, err
		}
	}
	if by := running(root); by != "" {
		return nil, &BusyError{By: by}
	}
	return l, nil
}

func (l *Locked) lockOwn(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // as /run is
		return fmt.Errorf("lock the boot files: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("lock the boot files: %w", err)
	}
	l.files = append(l.files, f)
	// flock(2) and not fcntl(2): it also keeps two jobs of one daemon apart.
	err = retryErr(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return &BusyError{By: "another memlinux"}
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", path, err)
	}
	return nil
}

// lockPackages takes the lock as dpkg and rpm do: fcntl(2), to write, the whole
// file. Where the package manager is not, nothing is made.
func (l *Locked) lockPackages(root, name string) error {
	path := filepath.Join(root, name)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("lock out the package manager: %w", err)
	}
	l.files = append(l.files, f)
	err = retryErr(func() error {
		return unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET})
	})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		holder := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
		by := "a package manager"
		if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &holder); err == nil && holder.Type != unix.F_UNLCK && holder.Pid > 0 {
			by = process(root, int(holder.Pid))
		}
		return &BusyError{By: by}
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", path, err)
	}
	return nil
}

// process is how a person knows a process: "apt-get (pid 123)".
func process(root string, pid int) string {
	name := "a program"
	if comm, err := os.ReadFile(filepath.Join(root, "proc", strconv.Itoa(pid), "comm")); err == nil {
		name = strings.TrimSpace(string(comm))
	}
	return fmt.Sprintf("%s (pid %d)", name, pid)
}

// running names one of programs that runs now, or is "".
func running(root string) string {
	entries, err := os.ReadDir(filepath.Join(root, "proc"))
	if err != nil {
		return "" // no proc, no programs that could be known
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// Not comm: the kernel cuts it, and a dead process that nobody waited
		// for has one.
		cmdline, err := os.ReadFile(filepath.Join(root, "proc", e.Name(), "cmdline"))
		if err != nil {
			continue // it has ended
		}
		if name := program(string(cmdline)); programs[name] {
			return fmt.Sprintf("%s (pid %d)", name, pid)
		}
	}
	return ""
}

// program is the name of the program that has this /proc/PID/cmdline: of the
// script, if an interpreter runs one.
func program(cmdline string) string {
	args := strings.Split(strings.TrimRight(cmdline, "\x00"), "\x00")
	name := filepath.Base(args[0])
	if !interpreters[name] {
		return name
	}
	for _, arg := range args[1:] {
		if arg == "-c" {
			return name // the next is a command, no script
		}
		if !strings.HasPrefix(arg, "-") {
			// busybox sh SCRIPT
			if base := filepath.Base(arg); !interpreters[base] {
				return base
			}
		}
	}
	return name
}

func retryErr(call func() error) error {
	_, err := retry(func() (struct{}, error) { return struct{}{}, call() })
	return err
}
