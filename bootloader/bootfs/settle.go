package bootfs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of linux/fs.h, and of Linux' Documentation/admin-guide/ext4.rst:
// EXT4_IOC_CHECKPOINT is _IOW('f', 43, __u32), since Linux 5.15.
const (
	ioctlFreeze         = 0xC0045877 // FIFREEZE
	ioctlThaw           = 0xC0045878 // FITHAW
	ioctlExt4Checkpoint = 0x4004662B // EXT4_IOC_CHECKPOINT
)

// Settle makes everything that was written to the file system durable, and
// puts it where a boot loader that replays no journal finds it.
func (f *FS) Settle() error {
	d, err := openFolder(f.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(d.fd()); err != nil {
		return fmt.Errorf("write what is dirty on the file system of %s: %w", f.dir, err)
	}
	return f.settle(d)
}

// settle does it for what was already made durable by fsync(2), on the file
// system f that d lies on. Other programs' dirty data is not waited for where
// that can be.
func (f *FS) settle(d *folder) error {
	var err error
	switch f.magic {
	case unix.EXT4_SUPER_MAGIC:
		err = checkpoint(d.File)
	case unix.XFS_SUPER_MAGIC:
		// XFS has no call that empties its log but this.
		err = freeze(d.File)
	case unix.BTRFS_SUPER_MAGIC:
		// fsync(2) on btrfs writes a log tree, which GRUB does not read;
		// syncfs(2) commits the transaction, with one write of the superblock.
		err = unix.Syncfs(d.fd())
	case unix.MSDOS_SUPER_MAGIC:
		// FAT has no journal. syncfs(2) writes all that is dirty but does not
		// flush the device's cache (measured on Linux 6.1); fsync(2) does.
		if err = unix.Syncfs(d.fd()); err == nil {
			err = d.Sync()
		}
	}
	if err != nil {
		return fmt.Errorf("bring the changes of %s to their place on the disk: %w", d.path, err)
	}
	return nil
}

// checkpoint empties the journal of an ext4 file system: all metadata is then
// where it belongs. Nothing is frozen by it.
func checkpoint(dir *os.File) error {
	var flags uint32                                                                                            // no discarding
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), ioctlExt4Checkpoint, uintptr(unsafe.Pointer(&flags))) //nolint:gosec // as ioctl(2) wants it
	switch errno {
	case 0:
		return nil
	case unix.ENODEV:
		// ext2, and ext4 without a journal: written is in its place.
		return unix.Syncfs(int(dir.Fd()))
	case unix.ENOTTY, unix.EOPNOTSUPP:
		// Linux before 5.15.
		return freeze(dir)
	}
	return errno
}

// freeze empties the journal of any file system: to be frozen it must be
// complete without it. It is thawed at once.
//
// A frozen file system that nobody thaws hangs every program that writes to it,
// and if it is / the machine. That must not happen even if this process is
// killed within the system call: a guard, which is a process of its own, holds
// the file system too and thaws it when this process is gone or takes too long.
func freeze(dir *os.File) error {
	// What is dirty is written before the others have to wait for it.
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return err
	}
	g, err := startGuard(dir)
	if err != nil {
		return err
	}
	defer g.end()
	if err := g.say(aboutToFreeze); err != nil {
		return err
	}
	frozen, err := freezeAndThaw(int(dir.Fd()))
	if !frozen {
		// Or the guard would thaw it, and perhaps for somebody else.
		_ = g.say(notFrozen)
	}
	if errors.Is(err, unix.EBUSY) {
		return errors.New("another program has frozen the file system (fsfreeze, a snapshot); try again when it has thawed")
	}
	return err
}

// freezeAndThaw reports whether we left it frozen.
func freezeAndThaw(fd int) (frozen bool, err error) {
	// Nothing but the two calls: the goroutine keeps its thread between them.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.IoctlSetInt(fd, ioctlFreeze, 0); err != nil {
		return false, err
	}
	// EINVAL: the guard lost its patience first. It was frozen all the same.
	if err := unix.IoctlSetInt(fd, ioctlThaw, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return true, fmt.Errorf("thaw it: %w", err)
	}
	return false, nil
}

const (
	// guardName in os.Args[0] makes this program the guard.
	guardName = "memlinux-thaw-guard"
	// guardPatience is how long the file system may stay frozen.
	guardPatience = 5 * time.Second
)

// What the guard is told by a byte each. The end of the pipe says that its
// parent is done or gone.
const (
	aboutToFreeze byte = 'f'
	notFrozen     byte = 'n'
)

type guardian struct {
	cmd *exec.Cmd
	to  *os.File
}

// startGuard starts this very program again as the guard of dir's file system,
// and returns when it watches.
func startGuard(dir *os.File) (*guardian, error) {
	hear, to, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer hear.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{guardName}
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{dir, hear}
	// Not in our session: what is sent to all of it must not reach the guard.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	ready, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		to.Close()
		return nil, fmt.Errorf("start the process that thaws it: %w", err)
	}
	g := &guardian{cmd: cmd, to: to}
	if n, err := ready.Read(make([]byte, 1)); n != 1 {
		g.end()
		return nil, fmt.Errorf("start the process that thaws it: it does not answer: %w", err)
	}
	return g, nil
}

func (g *guardian) say(what byte) error {
	_, err := g.to.Write([]byte{what})
	return err
}

// end lets the guard go, and waits for it.
func (g *guardian) end() {
	g.to.Close()
	_ = g.cmd.Wait() // it says nothing
}

// init turns the program into the guard if it was started as such. It is here
// and not in a main, so that no program can freeze without being able to guard.
func init() {
	if len(os.Args) == 1 && os.Args[0] == guardName {
		guard(3, 4)
		os.Exit(0)
	}
}

// guard thaws the file system of fd if whoever is at the other end of pipe is
// gone between freezing and thawing.
func guard(fd, pipe int) {
	signal.Ignore()
	// Against what kills a whole service at once: out of its control group
	// (where that is allowed), and last in the order of the OOM killer.
	_ = os.WriteFile("/sys/fs/cgroup/cgroup.procs", []byte("0"), 0)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	if _, err := os.Stdout.Write([]byte{0}); err != nil {
		return
	}
	patience := -1 // ms; none before it is told that a freeze comes
	for {
		ready, err := retry(func() (int, error) {
			return unix.Poll([]unix.PollFd{{Fd: int32(pipe), Events: unix.POLLIN}}, patience)
		})
		said := make([]byte, 1)
		n := 0
		if err == nil && ready > 0 {
			n, _ = retry(func() (int, error) { return unix.Read(pipe, said) })
		}
		switch {
		case n == 1 && said[0] == aboutToFreeze:
			patience = int(guardPatience.Milliseconds())
			continue
		case n == 1, patience < 0:
			return
		}
		// Not frozen is an error that says just that. If the freeze is still
		// on its way, this waits for it.
		_ = unix.IoctlSetInt(fd, ioctlThaw, 0)
		if ready > 0 || err != nil {
			return
		}
	}
}
