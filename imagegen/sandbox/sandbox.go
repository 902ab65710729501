// Package sandbox runs compilers and unpackers, which work on what others
// wrote, so that they can harm nothing but the folder they work in.
//
// As root, a program runs as the user nobody, gains no privileges by setuid
// files, has no network, and sees and signals no process but its own; killing it
// kills all that it started, and so does the end of this process. Elsewhere it
// runs as who we are, in a process group of its own, and what it started may
// outlive this process. Always it is bounded in time, processes and open files.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Command is a program to run.
type Command struct {
	// Argv is the program and its arguments. A program without a slash is looked
	// up in /usr/sbin, /usr/bin, /sbin and /bin.
	Argv []string
	// Dir is the absolute path of the folder it runs in, which its user must be
	// able to reach; see Give.
	Dir string
	// Env is "NAME=value", besides PATH, LC_ALL=C, TZ=UTC and HOME=Dir; what is
	// here wins.
	Env []string
	// Stdin is what it reads; nil for nothing. When it fails, the program is
	// killed. A call of its Read that blocks is not waited for and may outlive
	// Run; an *os.File is handed to the program itself.
	Stdin io.Reader
	// Output takes stdout and stderr; nil drops them. When it fails, the program
	// is killed. A call of its Write that blocks holds Run.
	Output io.Writer
	// Limit is the longest that it may run, in wall time; it must be set.
	Limit time.Duration
}

// MissingError is a program that is not installed.
type MissingError struct {
	What    string // the program
	Package string // the Debian package that brings it; Run can't know, so its caller fills it in
}

func (e *MissingError) Error() string {
	if e.Package == "" {
		return e.What + " is not installed"
	}
	return fmt.Sprintf("%s is not installed; run apt-get install %s", e.What, e.Package)
}

// LimitError is a program that ran for too long and was killed.
type LimitError struct {
	What  string // the program
	Limit time.Duration
}

func (e *LimitError) Error() string {
	return fmt.Sprintf("%s did not end in %s and was stopped", e.What, e.Limit)
}

// unprivilegedUser is who programs run as where we are root.
const unprivilegedUser = "nobody"

const namespaces = syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNS

// lastWords is how long we wait for the pipes of a program that has ended:
// without namespaces, one that it started may have got away and hold them.
const lastWords = 2 * time.Second

var folders = []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// Find returns the path of the program that Run would run, or a *MissingError
// with the given Debian package, which may be "".
func Find(program, pkg string) (string, error) {
	candidates := []string{program}
	if !strings.Contains(program, "/") {
		candidates = nil
		for _, dir := range folders {
			candidates = append(candidates, dir+"/"+program)
		}
	}
	for _, path := range candidates {
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", &MissingError{What: program, Package: pkg}
}

// Run runs c and waits for it. When it returns, nothing of it runs any more
// (but see Command.Stdin; without root, also but for what left the process
// group). Its error is a *MissingError, a *LimitError, what Stdin's
// Read or Output's Write returned, ctx's, or holds an *exec.ExitError.
func Run(ctx context.Context, c Command) error {
	if len(c.Argv) == 0 || c.Limit <= 0 {
		return errors.New("run a program: it has no name or no time limit")
	}
	path, err := Find(c.Argv[0], "")
	if err != nil {
		return err
	}
	name := filepath.Base(path)
	uid, gid, err := unprivileged()
	if err != nil {
		return err
	}
	dir := c.Dir
	if dir == "" {
		dir = "/"
	}

	limited, cancel := context.WithTimeoutCause(ctx, c.Limit, &LimitError{What: name, Limit: c.Limit})
	defer cancel()
	// This program again, which turns into the other; see become.
	cmd := exec.CommandContext(limited, "/proc/self/exe")
	cmd.Args = append([]string{becomeName, strconv.Itoa(uid), strconv.Itoa(gid), dir, path}, c.Argv...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=" + strings.Join(folders, ":"), "LC_ALL=C", "TZ=UTC", "HOME=" + dir}, c.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if uid >= 0 {
		cmd.SysProcAttr.Cloneflags = namespaces
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = lastWords
	streams := &streams{in: c.Stdin, out: c.Output, kill: cancel}
	if c.Output != nil {
		out := (*output)(streams)
		cmd.Stdout, cmd.Stderr = out, out
	}
	feed := func() {}
	if f, ok := c.Stdin.(*os.File); ok {
		cmd.Stdin = f
	} else if c.Stdin != nil {
		// Not cmd.Stdin, for which Wait waits even where its Read hangs.
		pipe, err := cmd.StdinPipe()
		if err != nil {
			return fmt.Errorf("start %s: %w", name, err)
		}
		feed = func() {
			// A program may end without reading all.
			_, _ = io.Copy(pipe, (*input)(streams))
			_ = pipe.Close()
		}
	}
	complaint, complaints, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	defer complaint.Close()
	cmd.ExtraFiles = []*os.File{complaints}

	// The kernel sends the death signal when the thread that forked ends, not
	// the process: keep that thread until the program is gone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	_ = complaints.Close()
	if err != nil {
		return startError(name, err)
	}
	go feed()
	// It ends when the other program begins, or with this one.
	said, _ := io.ReadAll(io.LimitReader(complaint, 4096))
	// All of its group goes before its number is free for another's group. In a
	// PID namespace nothing else is left by now.
	for errors.Is(unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	err = cmd.Wait()

	var limit *LimitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", name, ctx.Err())
	case errors.As(context.Cause(limited), &limit):
		return limit
	case streams.failed() != nil:
		return fmt.Errorf("%s: %w", name, streams.failed())
	case len(said) > 0:
		return fmt.Errorf("start %s: %s", name, said)
	}
	return fmt.Errorf("%s: %w", name, err)
}

func startError(name string, err error) error {
	for _, e := range []error{unix.EPERM, unix.EINVAL, unix.ENOSPC} {
		if os.Geteuid() == 0 && errors.Is(err, e) {
			return fmt.Errorf("start %s apart from the system: this kernel or container lets root make no namespaces; run it outside of the container, or in one that may (CAP_SYS_ADMIN): %w", name, err)
		}
	}
	return fmt.Errorf("start %s: %w", name, err)
}

// unprivileged is the user that programs run as, or -1, -1 where we are not
// root and have nothing to give up.
func unprivileged() (uid, gid int, err error) {
	if os.Geteuid() != 0 {
		return -1, -1, nil
	}
	u, err := user.Lookup(unprivilegedUser)
	if err != nil {
		return 0, 0, fmt.Errorf("compilers must not run as root, and there is no other user for them: %w", err)
	}
	uid, uerr := strconv.Atoi(u.Uid)
	gid, gerr := strconv.Atoi(u.Gid)
	if err := errors.Join(uerr, gerr); err != nil {
		return 0, 0, fmt.Errorf("user %s: %w", unprivilegedUser, err)
	}
	return uid, gid, nil
}

// Give makes the folder and all below it belong to the user that programs run
// as; symbolic links are not followed. It does nothing where we are not root.
// Call it before any program ran in there, not behind one, which may have made
// hard links.
func Give(folder string) error {
	uid, gid, err := unprivileged()
	if err != nil || uid < 0 {
		return err
	}
	root, err := os.OpenRoot(folder)
	if err != nil {
		return fmt.Errorf("give %s to the user %s: %w", folder, unprivilegedUser, err)
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return root.Lchown(name, uid, gid)
	})
	if err != nil {
		return fmt.Errorf("give %s to the user %s: %w", folder, unprivilegedUser, err)
	}
	return nil
}

// streams are what a program reads and writes. When one of them fails, that is
// remembered and the program ended: one that nobody reads would wait forever,
// and one that nobody feeds would take what it has for all.
type streams struct {
	in   io.Reader
	out  io.Writer
	kill func()
	mu   sync.Mutex
	err  error
}

func (s *streams) fail(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.mu.Unlock()
	s.kill()
}

func (s *streams) failed() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

type input streams

func (i *input) Read(p []byte) (int, error) {
	n, err := i.in.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		(*streams)(i).fail(fmt.Errorf("read its input: %w", err))
	}
	return n, err
}

type output streams

func (o *output) Write(p []byte) (int, error) {
	n, err := o.out.Write(p)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		(*streams)(o).fail(fmt.Errorf("take its output: %w", err))
	}
	return n, err
}
