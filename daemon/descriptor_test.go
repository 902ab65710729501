package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

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

// A stream that gives nothing ends with its job, or when patience is over, and its other
// users find its mode as it was. The time in which nobody reads does not count.
func TestStreamsEnd(t *testing.T) {
	standard := patience
	defer func() { patience = standard }()
	for _, name := range []string{"pipe", "named pipe", "socket"} {
		t.Run(name, func(t *testing.T) {
			ends := make([]int, 2)
			var err error
			switch name {
			case "pipe":
				err = unix.Pipe2(ends, unix.O_CLOEXEC)
			case "named pipe":
				fifo := filepath.Join(t.TempDir(), "fifo")
				if err = unix.Mkfifo(fifo, 0o600); err != nil {
					t.Fatal(err)
				}
				var both int // so that none waits for the other
				if both, err = unix.Open(fifo, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
					t.Fatal(err)
				}
				defer unix.Close(both)
				if ends[0], err = unix.Open(fifo, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
					t.Fatal(err)
				}
				ends[1], err = unix.Open(fifo, unix.O_WRONLY|unix.O_CLOEXEC, 0)
			case "socket":
				ends[0], ends[1] = socketPair(t)
			}
			if err != nil {
				t.Fatal(err)
			}
			fd, err := unix.Dup(ends[0])
			if err != nil {
				t.Fatal(err)
			}
			f := os.NewFile(uintptr(fd), name)
			defer f.Close()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			s, err := openStream(ctx, f)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if flags, err := unix.FcntlInt(uintptr(ends[0]), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
				t.Errorf("the flags are %#x, %v", flags, err)
			}
			buf := make([]byte, 10)
			read := func() error {
				if _, err := unix.Write(ends[1], []byte("x")); err != nil {
					t.Fatal(err)
				}
				n, err := s.Read(buf)
				if n != 1 && err == nil {
					err = fmt.Errorf("read %d", n)
				}
				return err
			}
			patience = 100 * time.Millisecond
			for range 2 {
				if err := read(); err != nil {
					t.Error(err)
				}
				time.Sleep(2 * patience)
			}
			if n, err := s.Read(buf); n != 0 || err == nil || err.Error() != "the client sent nothing for 100ms" {
				t.Errorf("after patience: %d, %v", n, err)
			}
			if err := read(); err != nil {
				t.Error(err)
			}
			patience = standard
			time.AfterFunc(20*time.Millisecond, cancel)
			if n, err := s.Read(buf); n != 0 || !errors.Is(err, context.Canceled) {
				t.Errorf("after the job's end: %d, %v", n, err)
			}
		})
	}
}
