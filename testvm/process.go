package testvm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"runtime"
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

// process is one QEMU.
type process struct {
	pid    int
	cancel context.CancelFunc
	done   chan struct{} // closed when it was waited for
	err    error         // of exec.Cmd.Wait; valid once done is closed
	stderr excerpt
}

// spawn starts QEMU in a process group of its own, as the unprivileged user.
// It is killed when ctx ends, and by the kernel when this process dies.
func spawn(ctx context.Context, args []string, files []*os.File, groups []uint32) (*process, error) {
	path, err := exec.LookPath(qemuProgram)
	if err != nil {
		return nil, &MissingError{What: qemuProgram, Package: "qemu-system-x86"}
	}
	cred, err := credential(groups)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &process{cancel: cancel, done: make(chan struct{})}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.ExtraFiles = files
	cmd.Stderr = &p.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Credential: cred}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second // for stderr, should something else hold it

	started := make(chan error)
	go func() {
		// The kernel sends the death signal when the thread that forked ends,
		// not the process: keep that thread until QEMU is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer cancel()
		if err := cmd.Start(); err != nil {
			started <- fmt.Errorf("start %s: %w", path, err)
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
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
