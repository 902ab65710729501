package client

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// agentStart is how long the agent may take to be ready.
const agentStart = 5 * time.Second

// startAgent starts polkit's agent for terminals, and waits until it is ready to
// ask on behalf of this process: as a fallback, so that an agent of the session
// comes first. Where there is no terminal or no such agent, nothing happens: the
// call then says that it was denied. Call stop when nobody is to be asked any
// more; it waits for the agent's end.
func startAgent(ctx context.Context) (stop func()) {
	nothing := func() {}
	terminal, err := os.Open("/dev/tty") // where it asks, wherever our input comes from
	if err != nil {
		return nothing
	}
	terminal.Close()
	program, err := exec.LookPath("pkttyagent")
	if err != nil {
		return nothing
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nothing
	}
	defer r.Close()
	cmd := exec.Command(program, "--process", strconv.Itoa(os.Getpid()), "--notify-fd", "3")
	if sessions, _ := os.ReadDir("/run/systemd/sessions"); len(sessions) > 0 {
		// polkit 122 never comes to a fallback where logind knows no session,
		// and then there is no other agent, either.
		cmd.Args = append(cmd.Args, "--fallback")
	}
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stderr = os.Stderr
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nothing
	}
	stop = func() {
		_ = cmd.Process.Signal(unix.SIGTERM) // it gives the terminal back as it was
		_ = cmd.Wait()                       // how it ended matters no more
		if ctx.Err() != nil {
			leavePrompt()
		}
	}
	ready := make(chan struct{})
	go func() {
		defer close(ready)
		_, _ = io.Copy(io.Discard, r) // closed when it is ready, or ended
	}()
	select {
	case <-ready:
	case <-ctx.Done():
	case <-time.After(agentStart):
		r.Close()
	}
	return stop
}

// leavePrompt begins a new line on the terminal on which an agent has asked.
func leavePrompt() {
	if terminal, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0); err == nil {
		fmt.Fprintln(terminal)
		terminal.Close()
	}
}
