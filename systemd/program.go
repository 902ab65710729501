package systemd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// systemd 252 can hand a service that is made over D-Bus no descriptors but its
// three standard ones. So the service starts this program again, with a socket
// as its standard input, over which it gets all that it then turns into.

// programName is what this program is called when a service starts it so.
const programName = "memlinux-unit"

// program is what a service turns into.
type program struct {
	Path string
	Argv []string
	Env  []string
	Dir  string
}

// maxDescriptors is the kernel's limit for one message (SCM_MAX_FD).
const maxDescriptors = 253

func init() {
	if len(os.Args) != 1 || os.Args[0] != programName {
		return
	}
	complaints, err := become()
	if complaints > 0 {
		_, _ = unix.Write(complaints, []byte(err.Error()))
	} else {
		fmt.Fprintln(os.Stderr, err) // the journal
	}
	os.Exit(127)
}

// become takes what it is to turn into, and turns into it. On an error it also
// returns the descriptor on which that is to be told, if there is one yet.
func become() (complaints int, err error) {
	// What follows is the thread's that calls execve.
	runtime.LockOSThread()
	oob := make([]byte, unix.CmsgSpace(4*maxDescriptors))
	n, oobn, flags, _, err := unix.Recvmsg(0, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return 0, fmt.Errorf("take what to run: %w", err)
	}
	if n == 0 || flags&unix.MSG_CTRUNC != 0 {
		return 0, errors.New("take what to run: it did not come whole")
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return 0, fmt.Errorf("take what to run: %d control messages: %w", len(messages), err)
	}
	files, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(files) < 5 {
		return 0, fmt.Errorf("take what to run: %d descriptors: %w", len(files), err)
	}
	spec, complaints, files := files[0], files[1], files[2:]
	text, err := io.ReadAll(io.NewSectionReader(os.NewFile(uintptr(spec), "program"), 0, 1<<30))
	if err != nil {
		return complaints, fmt.Errorf("take what to run: %w", err)
	}
	var p program
	if err := json.Unmarshal(text, &p); err != nil {
		return complaints, fmt.Errorf("take what to run: %w", err)
	}
	unix.Umask(0o022)
	if p.Dir != "" {
		if err := unix.Chdir(p.Dir); err != nil {
			return complaints, fmt.Errorf("its folder %s can't be reached by its user: %w", p.Dir, err)
		}
	}
	// First out of the way of all numbers, then to their own. Go's own poller
	// loses its descriptors to that, and is not needed any more.
	away := func(fd int) int {
		if err == nil {
			fd, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, len(files))
		}
		return fd
	}
	complaints = away(complaints)
	for i, fd := range files {
		files[i] = away(fd)
	}
	for i, fd := range files {
		if err == nil {
			err = unix.Dup3(fd, i, 0)
		}
	}
	if err != nil {
		return complaints, fmt.Errorf("move a descriptor: %w", err)
	}
	err = unix.Exec(p.Path, p.Argv, p.Env)
	return complaints, fmt.Errorf("execute %s: %w", p.Path, err)
}
