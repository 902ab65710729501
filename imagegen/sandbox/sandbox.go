// Package sandbox runs compilers and unpackers, which work on what others
// wrote, so that they can harm nothing but the folder they work in.
//
// As root, a program runs as the user _memlinux or nobody, gains no privileges by
// setuid files, has no network unless it asks for it, and sees and signals no process but its own;
// killing it kills all that it started, and so does the end of this process.
// Elsewhere it runs as who we are, in a process group of its own, and what it
// started may outlive this process. Always it is bounded in time, processes and
// open files. A process that may not do all that leaves it to a [Launcher].
package sandbox

import (
	"bytes"
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
	// up in /usr/sbin, /usr/bin, /sbin and /bin. Self is this program once more,
	// which finds its task in the next argument.
	Argv []string
	// Dir is the absolute path of the folder it runs in, which its user must be
	// able to reach; see Give.
	Dir string
	// Folders are absolute paths of what it writes, where that is not just Dir.
	Folders []string
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
	// Network says that it may reach other machines.
	Network bool
}

// Self is the path of the program that runs, also of one that was replaced.
const Self = "/proc/self/exe"

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

// Needs are what a program must be allowed, besides what is in its command.
type Needs struct {
	User     int           // the number of the user to run as, or 0 for any: it has no files
	Folders  []string      // absolute paths of what it writes
	Limit    time.Duration // the longest that it may run
	Network  bool          // it fetches something
	GiveAway bool          // it must be root, and say whose files in Folders are
}

// Launcher starts a program that [os/exec] could run, with cmd's Path, Args, Env,
// Dir, Stdin, which is a file or nil, Stdout and Stderr, away from this process:
// apart from the system, and so that it dies with this process. It is killed when
// ctx ends. wait returns when nothing of it runs any more, with nil if it ended
// well.
type Launcher func(ctx context.Context, cmd *exec.Cmd, needs Needs) (wait func() error, err error)

var launch Launcher

// Apart is the Launcher that is in use, or nil.
func Apart() Launcher { return launch }

// Use makes all programs start by l. It is for a process that is kept apart from
// the system itself and so can't keep others apart; call it before any runs.
func Use(l Launcher) { launch = l }

// users are who programs run as where we are root, the first that there is. The
// package has one of its own; what nobody writes belongs to others, too.
var users = []string{"_memlinux", "nobody"}

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
	if path == Self && len(c.Argv) > 1 {
		name = c.Argv[1]
	}
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
	cmd := exec.CommandContext(limited, path)
	cmd.Args = c.Argv
	cmd.Dir = dir
	cmd.Env = append([]string{"PATH=" + strings.Join(folders, ":"), "LC_ALL=C", "TZ=UTC", "HOME=" + dir}, c.Env...)
	streams := &streams{in: c.Stdin, out: c.Output, kill: cancel}
	if c.Output != nil {
		out := (*output)(streams)
		cmd.Stdout, cmd.Stderr = out, out
	}
	feed := func() {}
	if f, ok := c.Stdin.(*os.File); ok {
		cmd.Stdin = f
	} else if c.Stdin != nil {
		// Not c.Stdin, for which Wait would wait even where its Read hangs.
		theirs, pipe, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("start %s: %w", name, err)
		}
		cmd.Stdin = theirs
		feed = func() {
			_ = theirs.Close()
			go func() {
				// A program may end without reading all.
				_, _ = io.Copy(pipe, (*input)(streams))
				_ = pipe.Close()
			}()
		}
	}
	if launch != nil {
		needs := Needs{Limit: c.Limit, Folders: c.Folders, Network: c.Network}
		if c.Dir != "" && needs.Folders == nil {
			needs.Folders = []string{c.Dir}
		}
		if needs.Folders != nil {
			needs.User = uid
		}
		var wait func() error
		wait, err = launch(limited, cmd, needs)
		feed()
		if err == nil {
			err = wait()
		} else {
			err = notStarted{err}
		}
	} else {
		err = child(cmd, uid, gid, c.Network, feed)
	}
	var limit *LimitError
	var start notStarted
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", name, ctx.Err())
	case errors.As(context.Cause(limited), &limit):
		return limit
	case streams.failed() != nil:
		return fmt.Errorf("%s: %w", name, streams.failed())
	case errors.As(err, &start):
		return fmt.Errorf("start %s: %w", name, start.err)
	}
	return fmt.Errorf("%s: %w", name, err)
}

// notStarted is why a program did not begin.
type notStarted struct{ err error }

func (e notStarted) Error() string { return e.err.Error() }

// child runs cmd as a child, calls feed when it has its files, and waits for it.
func child(cmd *exec.Cmd, uid, gid int, network bool, feed func()) error {
	complaint, complaints, err := os.Pipe()
	if err != nil {
		feed()
		return notStarted{err}
	}
	defer complaint.Close()
	// This program again, which turns into the other; see become.
	cmd.Args = append([]string{becomeName, strconv.Itoa(uid), strconv.Itoa(gid), cmd.Dir, cmd.Path}, cmd.Args...)
	cmd.Path, cmd.Dir = Self, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if uid >= 0 {
		cmd.SysProcAttr.Cloneflags = namespaces
		if network {
			cmd.SysProcAttr.Cloneflags &^= syscall.CLONE_NEWNET
		}
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = lastWords
	cmd.ExtraFiles = []*os.File{complaints}

	// The kernel sends the death signal when the thread that forked ends, not
	// the process: keep that thread until the program is gone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	_ = complaints.Close()
	feed()
	if err != nil {
		return notStarted{startError(err)}
	}
	// It ends when the other program begins, or with this one.
	said, _ := io.ReadAll(io.LimitReader(complaint, 4096))
	// All of its group goes before its number is free for another's group. In a
	// PID namespace nothing else is left by now.
	for errors.Is(unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	err = cmd.Wait()
	if err != nil && len(said) > 0 {
		return notStarted{errors.New(string(said))}
	}
	return err
}

func startError(err error) error {
	for _, e := range []error{unix.EPERM, unix.EINVAL, unix.ENOSPC} {
		if os.Geteuid() == 0 && errors.Is(err, e) {
			return fmt.Errorf("this kernel or container lets root make no namespaces, in which it would be apart from the system; run it outside of the container, or in one that may (CAP_SYS_ADMIN): %w", err)
		}
	}
	return err
}

// unprivileged is the user that programs run as, or -1, -1 where we are not
// root and have nothing to give up.
func unprivileged() (uid, gid int, err error) {
	if os.Geteuid() != 0 {
		return -1, -1, nil
	}
	var u *user.User
	for _, name := range users {
		if u, err = user.Lookup(name); err == nil {
			break
		}
	}
	if err != nil {
		return 0, 0, fmt.Errorf("compilers must not run as root, and there is no other user for them: %w", err)
	}
	uid, uerr := strconv.Atoi(u.Uid)
	gid, gerr := strconv.Atoi(u.Gid)
	if err := errors.Join(uerr, gerr); err != nil {
		return 0, 0, fmt.Errorf("user %s: %w", u.Username, err)
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
	return GiveTo(folder, uid, gid)
}

// giveTime is far more than it takes to give away a kernel's tree, 80,000 files.
const giveTime = 5 * time.Minute

// GiveTo is Give, to another user and group.
func GiveTo(folder string, uid, gid int) error {
	if launch != nil {
		return giveApart(folder, uid, gid)
	}
	root, err := os.OpenRoot(folder)
	if err != nil {
		return fmt.Errorf("give %s to the user of compilers: %w", folder, err)
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return root.Lchown(name, uid, gid)
	})
	if err != nil {
		return fmt.Errorf("give %s to the user of compilers: %w", folder, err)
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

// giveApart does it by a program of the Launcher: this process may not.
func giveApart(folder string, uid, gid int) error {
	chown, err := Find("chown", "coreutils")
	if err != nil {
		return err
	}
	var said bytes.Buffer
	ctx, cancel := context.WithTimeout(context.Background(), giveTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, chown, "--recursive", "--no-dereference", "--", fmt.Sprintf("%d:%d", uid, gid), folder)
	cmd.Dir, cmd.Env, cmd.Stderr = "/", []string{"LC_ALL=C"}, &said
	wait, err := launch(ctx, cmd, Needs{Folders: []string{folder}, Limit: giveTime, GiveAway: true})
	if err == nil {
		err = wait()
	}
	if err != nil {
		return fmt.Errorf("give %s to another user: chown: %w%s", folder, err, said.Bytes())
	}
	return nil
}

// Given reports whether the folder belongs to the user that programs run as, as
// Give makes it.
func Given(folder string) (bool, error) {
	uid, _, err := unprivileged()
	if err != nil || uid < 0 {
		return true, err
	}
	st, err := os.Lstat(folder)
	if err != nil {
		return false, err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && int(sys.Uid) == uid, nil
}
