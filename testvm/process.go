package testvm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// unprivilegedUser is who QEMU runs as where we are root.
const unprivilegedUser = "nobody"

// credential is the unprivileged user's with the given supplementary groups
// and no others, or nil where we are not root and have nothing to give up.
func credential(groups []uint32) (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup(unprivilegedUser)
	if err != nil {
		return nil, fmt.Errorf("QEMU must not run as root, and there is no other user for it: %w", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user %s: %w", unprivilegedUser, err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user %s: %w", unprivilegedUser, err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid), Groups: groups}, nil
}

// Needs are what a QEMU must be allowed, besides what is in its command.
type Needs struct {
	Memory int64 // the most that it takes, in bytes
	File   int64 // the most that a file may have that it writes, in bytes
	KVM    bool  // it opens /dev/kvm; else it writes code that it executes
}

// Launcher starts a program that [os/exec] could run, with cmd's Path, Args,
// Env, Dir, Stderr and ExtraFiles, away from this process: apart from the
// system, as a user without rights, and so that it dies with this process. It
// is killed when ctx ends. wait returns when nothing of it runs any more, with
// nil if it ended well.
type Launcher func(ctx context.Context, cmd *exec.Cmd, needs Needs) (wait func() error, err error)

// process is one QEMU.
type process struct {
	pid    int // 0 where a Launcher started it
	cancel context.CancelFunc
	done   chan struct{} // closed when it was waited for
	err    error         // how it ended; valid once done is closed
	stderr excerpt
}

// spawn starts QEMU by launch, or in a process group of its own, as the
// unprivileged user. It is killed when ctx ends, and when this process dies.
func spawn(ctx context.Context, launch Launcher, args []string, files []*os.File, needs Needs) (*process, error) {
	path, err := exec.LookPath(qemuProgram)
	if err != nil {
		return nil, &MissingError{What: qemuProgram, Package: "qemu-system-x86"}
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &process{cancel: cancel, done: make(chan struct{})}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.ExtraFiles = files
	cmd.Stderr = &p.stderr
	if launch == nil {
		launch = p.asChild
	}
	wait, err := launch(ctx, cmd, needs)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	go func() {
		defer cancel()
		p.err = wait()
		close(p.done)
	}()
	return p, nil
}

// asChild is the [Launcher] of a machine without systemd.
func (p *process) asChild(_ context.Context, cmd *exec.Cmd, needs Needs) (wait func() error, err error) {
	var groups []uint32
	if needs.KVM {
		groups = kvmGroups()
	}
	cred, err := credential(groups)
	if err == nil {
		err = bound(cmd, needs)
	}
	if err != nil {
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Credential: cred}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second // for stderr, should something else hold it

	started, ended := make(chan error), make(chan error, 1)
	go func() {
		// The kernel sends the death signal when the thread that forked ends,
		// not the process: keep that thread until QEMU is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		ended <- cmd.Wait()
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return func() error { return <-ended }, nil
}

// mapped is what QEMU maps but does not use, in bytes: its libraries, and the
// stacks and arenas of its threads.
const mapped = 4 << 30

// bound makes cmd set limits for itself before it becomes QEMU. Processes are not
// among them: the kernel counts all of the user's, of other programs, too.
func bound(cmd *exec.Cmd, needs Needs) error {
	prlimit, err := exec.LookPath("prlimit")
	if err != nil {
		return &MissingError{What: "prlimit", Package: "util-linux"}
	}
	limits := []string{prlimit, fmt.Sprintf("--as=%d", needs.Memory+mapped), fmt.Sprintf("--fsize=%d", needs.File), "--core=0", "--nofile=1024"}
	cmd.Path, cmd.Args = prlimit, slices.Concat(limits, []string{"--", cmd.Path}, cmd.Args[1:])
	return nil
}

// kill ends the process, if it still runs, and waits for it.
func (p *process) kill() {
	p.cancel()
	<-p.done
}

// failure says how the process ended, with what it complained about; nil if it
// ended well. Only valid once done is closed.
func (p *process) failure() error {
	if p.err == nil {
		return nil
	}
	if s := p.stderr.String(); s != "" {
		return fmt.Errorf("%s: %w: %s", qemuProgram, p.err, s)
	}
	return fmt.Errorf("%s: %w", qemuProgram, p.err)
}

// excerpt keeps the first 4 KiB written to it, and drops the rest: the first
// complaint is the one that matters.
type excerpt struct {
	mu   sync.Mutex
	text []byte
}

func (e *excerpt) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.text = append(e.text, p[:min(len(p), 4096-len(e.text))]...)
	return len(p), nil
}

func (e *excerpt) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.TrimSpace(printable(string(e.text)))
}
