package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// becomeName is what this program is called when Run starts it a second time.
const becomeName = "memlinux-sandbox"

// Limits of a sandboxed program and all that it starts.
const (
	// The kernel counts all threads of the user, also those of other jobs and of
	// virtual machines: a parallel compile has five for each CPU, a QEMU some
	// dozens, a desktop's user a thousand. It is an eighth of the smallest
	// pid_max, so that a fork bomb leaves the system enough to fork.
	maxProcesses = 4096
	// Linkers open every object at once; the kernel's has some thousand.
	maxOpenFiles = 8192
)

// A fork can be given neither limits, nor a umask, nor a /proc of its namespace.
// So Run starts this program in the namespaces, which arranges all of that here,
// before main, and turns into the other program.
func init() {
	if len(os.Args) < 6 || os.Args[0] != becomeName {
		return
	}
	err := become(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5:])
	// Run reads why it is still us.
	fmt.Fprint(os.NewFile(complaints, "complaints"), err)
	os.Exit(127)
}

// complaints is the descriptor of the pipe to Run.
const complaints = 3

func become(uid, gid, dir, path string, argv []string) error {
	// What follows is the thread's that calls execve.
	runtime.LockOSThread()
	// Whatever this process inherited itself is not the program's either.
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("close descriptors: %w", err)
	}
	for _, e := range open {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	u, uerr := strconv.Atoi(uid)
	g, gerr := strconv.Atoi(gid)
	if err := errors.Join(uerr, gerr); err != nil {
		return err
	}
	if u >= 0 {
		if err := leaveRoot(u, g); err != nil {
			return err
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("refuse new privileges: %w", err)
	}
	unix.Umask(0o022)
	if err := os.Chdir(dir); err != nil {
		return fmt.Errorf("its folder can't be reached by its user: %w", err)
	}
	for resource, limit := range map[int]uint64{unix.RLIMIT_CORE: 0, unix.RLIMIT_NOFILE: maxOpenFiles, unix.RLIMIT_NPROC: maxProcesses} {
		if err := lower(resource, limit); err != nil {
			return err
		}
	}
	return unix.Exec(path, argv, os.Environ())
}

// leaveRoot hides the processes of the system and gives up root.
func leaveRoot(uid, gid int) error {
	// Mounts of ours stay here; unmounts of the system come in, so that this
	// keeps no disk busy.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("part from the system's mounts: %w", err)
	}
	// The system's /proc has the memory and files of others of the same user.
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount a /proc of its own: %w", err)
	}
	if err := unix.Setgroups(nil); err != nil {
		return fmt.Errorf("leave root's groups: %w", err)
	}
	if err := unix.Setresgid(gid, gid, gid); err != nil {
		return fmt.Errorf("leave root's group: %w", err)
	}
	if err := unix.Setresuid(uid, uid, uid); err != nil {
		return fmt.Errorf("leave root: %w", err)
	}
	// A new user has lost the death signal that Run asked for.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("ask for the death signal: %w", err)
	}
	return nil
}

func lower(resource int, limit uint64) error {
	var now unix.Rlimit
	if err := unix.Getrlimit(resource, &now); err != nil {
		return fmt.Errorf("read a limit: %w", err)
	}
	limit = min(limit, now.Max)
	if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
		return fmt.Errorf("set a limit: %w", err)
	}
	return nil
}
