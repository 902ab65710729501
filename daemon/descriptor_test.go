package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDescriptorsAreLookedAt(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(path string, flags int) int {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		return fd
	}
	sealed := func(seals int) int {
		fd, err := unix.MemfdCreate("test", unix.MFD_ALLOW_SEALING|unix.MFD_CLOEXEC)
		if err == nil {
			_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
		}
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	stream, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	datagram, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	all := unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK | unix.F_SEAL_SEAL
	for _, c := range []struct {
		name string
		fd   int
		fits []kind
	}{
		{"a file to read", open(path, unix.O_RDONLY), []kind{toBeRead, toBeStreamed}},
		{"a file to write", open(path, unix.O_WRONLY), []kind{toBeWritten}},
		{"a file for both", open(path, unix.O_RDWR), []kind{toBeRead, toBeWritten, toBeBoth, toBeStreamed}},
		{"a file that only grows", open(path, unix.O_RDWR|unix.O_APPEND), []kind{toBeRead, toBeStreamed}},
		{"a path", open(path, unix.O_PATH), nil},
		{"a directory", open(dir, unix.O_RDONLY), nil},
		{"a device", open(os.DevNull, unix.O_RDWR), nil},
		{"a sealed memfd", sealed(all), []kind{toBeRead, toBeStreamed}},
		{"a memfd", sealed(0), []kind{toBeRead, toBeWritten, toBeBoth, toBeStreamed}},
		{"a pipe's end to read", pipe[0], []kind{toBeStreamed}},
		{"a pipe's end to write", pipe[1], nil},
		{"a stream socket", stream[0], []kind{toBeStreamed, toBeJoined}},
		{"a datagram socket", datagram[0], []kind{toBeStreamed}},
	} {
		f := os.NewFile(uintptr(c.fd), c.name)
		defer f.Close()
		for _, want := range []kind{toBeRead, toBeWritten, toBeBoth, toBeStreamed, toBeJoined} {
			fits := false
			for _, k := range c.fits {
				fits = fits || k == want
			}
			if err := examine(f, want, 1000, new(sync.WaitGroup)); (err == nil) != fits {
				t.Errorf("%s as %d: %v", c.name, want, err)
			}
		}
	}
	unix.Close(stream[1])
	unix.Close(datagram[1])
}

// A stream that gives nothing ends with its job, and the pipe's other users find
// it as it was.
func TestStreamsEndWithTheirJob(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := unix.SetNonblock(int(r.Fd()), false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s, err := openStream(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := w.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	if n, err := s.Read(buf); n != 1 || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
	ended := make(chan error)
	go func() {
		_, err := s.Read(buf)
		ended <- err
	}()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("after the job's end: %v", err)
	}
	if flags, err := unix.FcntlInt(r.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("the pipe's flags are %#x, %v", flags, err)
	}
}
