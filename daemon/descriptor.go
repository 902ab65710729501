package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// kind is what a descriptor that a client gives must be.
//
// None of them is trusted to stay as it is: a source is copied and hashed before
// it is looked at (imagegen), read once as a whole (options.read), or read once
// as a stream; a disk image is looked at where it is, by parsers that bear
// changes, and its report says if it changed meanwhile (unchanged).
type kind int

const (
	toBeRead     kind = iota // a regular file, open for reading
	toBeWritten              // a regular file, open for writing
	toBeBoth                 // a regular file, open for both
	toBeStreamed             // a regular file, pipe or socket, open for reading
	toBeJoined               // a stream socket
)

// look is how long the kernel may take to say what a descriptor is. Only a file
// of FUSE takes any time: its server is asked, who may be hostile.
const look = 2 * time.Second

// examine says why f can't be taken. A file that another program serves (FUSE) is
// only taken from root: whoever reads it waits for as long as that program likes,
// and can't be killed. What does not answer in time is still under way in looks.
func examine(f *os.File, want kind, uid uint32, looks *sync.WaitGroup) error {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0) // asks nobody
	if err != nil {
		return fmt.Errorf("the descriptor can't be looked at: %w", err)
	}
	mode := flags & unix.O_ACCMODE
	writes := want == toBeWritten || want == toBeBoth
	switch {
	case flags&unix.O_PATH != 0:
		return errors.New("the descriptor is a mere path (O_PATH); open the file")
	case want != toBeWritten && mode == unix.O_WRONLY:
		return errors.New("the descriptor is not open for reading; open it so")
	case writes && mode == unix.O_RDONLY:
		return errors.New("the descriptor is not open for writing; open it so")
	case writes && flags&unix.O_APPEND != 0:
		return errors.New("the descriptor only appends (O_APPEND); open it without")
	}
	found := make(chan error, 1)
	fd := f.Fd()
	own, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) // f may be closed before the answer comes
	if err != nil {
		return err
	}
	looks.Go(func() {
		defer unix.Close(own)
		found <- examineType(own, want, uid)
	})
	select {
	case err := <-found:
		return err
	case <-time.After(look):
		return errors.New("the program that serves this file (FUSE) does not answer; copy the file to a disk first")
	}
}

// fuseMagic is the file system of programs (linux/magic.h, FUSE_SUPER_MAGIC).
const fuseMagic = 0x65735546

func examineType(fd int, want kind, uid uint32) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("the descriptor can't be looked at: %w", err)
	}
	if fs.Type == fuseMagic && uid != 0 {
		return errors.New("the file is one that another program serves (FUSE), which could hold memlinuxd up; copy it to a disk first")
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("the descriptor can't be looked at: %w", err)
	}
	is := st.Mode & unix.S_IFMT
	switch {
	case want == toBeStreamed && (is == unix.S_IFREG || is == unix.S_IFIFO || is == unix.S_IFSOCK):
		return nil
	case want == toBeStreamed:
		return fmt.Errorf("the descriptor is not a file's, pipe's or socket's, but that of %s", fileType(is))
	case want == toBeJoined:
		if is == unix.S_IFSOCK {
			if t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err == nil && t == unix.SOCK_STREAM {
				return nil
			}
		}
		return fmt.Errorf("the descriptor is not a stream socket's, but that of %s", fileType(is))
	case is != unix.S_IFREG:
		return fmt.Errorf("the descriptor is not a regular file's, but that of %s", fileType(is))
	}
	if want == toBeWritten || want == toBeBoth {
		seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
		if err == nil && seals&(unix.F_SEAL_WRITE|unix.F_SEAL_FUTURE_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK) != 0 {
			return errors.New("the file is sealed and can't be written")
		}
	}
	return nil
}

func fileType(is uint32) string {
	switch is {
	case unix.S_IFREG:
		return "a regular file"
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFIFO:
		return "a pipe"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "a device"
	}
	return "something else"
}

// endsWithClient reports whether f ends with who gave it: a pipe or socket.
func endsWithClient(f *os.File) bool {
	if f == nil {
		return false
	}
	var st unix.Stat_t
	// Where it can't be looked at it is of no use, either.
	err := unix.Fstat(int(f.Fd()), &st)
	return err != nil || st.Mode&unix.S_IFMT == unix.S_IFIFO || st.Mode&unix.S_IFMT == unix.S_IFSOCK
}

// patience is how long a client may send nothing of a stream that it owes. A test
// has less.
var patience = 2 * time.Minute

// streamReader reads a client's stream. A read ends with an error when nothing
// comes for patience, and with ctx's error when ctx ends.
type streamReader struct {
	ctx context.Context
	f   interface {
		io.ReadCloser
		SetReadDeadline(time.Time) error
	}
	stop func() bool
}

// openStream makes a streamReader of f, which stays the caller's. Close it. A file
// is read from where it stands. What the client does with the mode of f, which it
// shares, holds up nobody, and the mode stays as it is.
func openStream(ctx context.Context, f *os.File) (*streamReader, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("look at the stream: %w", err)
	}
	s := &streamReader{ctx: ctx}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFIFO:
		s.f, err = readOnly(f) // opened anew, a pipe has a mode of its own
	case unix.S_IFSOCK:
		s.f, err = openSocket(f)
	default:
		var fd int
		if fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			s.f = os.NewFile(uintptr(fd), f.Name())
		}
	}
	if err != nil {
		return nil, err
	}
	s.stop = context.AfterFunc(ctx, func() { s.f.Close() })
	return s, nil
}

// Read waits no longer than patience.
func (s *streamReader) Read(p []byte) (int, error) {
	// A regular file never waits, and takes no deadline.
	_ = s.f.SetReadDeadline(time.Now().Add(patience))
	n, err := s.f.Read(p)
	switch {
	case err == nil || errors.Is(err, io.EOF):
	case s.ctx.Err() != nil:
		err = s.ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("the client sent nothing for %v", patience)
	}
	return n, err
}

// Close ends a Read that waits.
func (s *streamReader) Close() error {
	s.stop()
	return s.f.Close()
}

// socket is a client's socket. Unlike a pipe it can't be opened anew, and the client
// can make a socket wait at any time that was told not to (O_NONBLOCK). So each call
// says that it does not wait in the kernel: Go waits, and ends that on Close.
type socket struct {
	net.Conn
	raw syscall.RawConn
}

// openSocket makes a socket of f, which stays the caller's, in its mode.
func openSocket(f *os.File) (*socket, error) {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return nil, fmt.Errorf("look at the socket: %w", err)
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	s := &socket{Conn: conn}
	// FileConn has changed the mode, which the client may share with a shell.
	if err = unix.SetNonblock(int(f.Fd()), flags&unix.O_NONBLOCK != 0); err == nil {
		s.raw, err = conn.(syscall.Conn).SyscallConn()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

// Read is that of an io.Reader.
func (s *socket) Read(p []byte) (n int, err error) {
	if failed := s.raw.Read(func(fd uintptr) bool {
		n, _, err = unix.Recvfrom(int(fd), p, unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN)
	}); failed != nil {
		err = failed
	}
	switch {
	case err != nil:
		return 0, err
	case n == 0 && len(p) > 0:
		return 0, io.EOF
	}
	return n, nil
}

// Write is that of an io.Writer.
func (s *socket) Write(p []byte) (n int, err error) {
	for n < len(p) {
		var sent int
		if failed := s.raw.Write(func(fd uintptr) bool {
			sent, err = unix.SendmsgN(int(fd), p[n:], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			return !errors.Is(err, unix.EAGAIN)
		}); failed != nil {
			err = failed
		}
		if err != nil {
			return n, err
		}
		n += sent
	}
	return n, nil
}

// fingerprint changes when a file's content does, unless somebody turns the
// clock back.
type fingerprint struct {
	size         int64
	mtime, ctime unix.Timespec
}

func fingerprintOf(f *os.File) (fingerprint, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fingerprint{}, fmt.Errorf("look at the file: %w", err)
	}
	return fingerprint{st.Size, st.Mtim, st.Ctim}, nil
}
