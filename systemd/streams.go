package systemd

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
)

// streams are the descriptors that a program begins with, and what copies its
// output to where it is wanted.
type streams struct {
	theirs []*os.File // by their numbers
	made   []*os.File // those of theirs that are to be closed
	pipes  []*os.File // our ends
	copies sync.WaitGroup

	once   sync.Once
	failed chan struct{} // closed when output can't be taken
	err    error         // why; valid once failed is closed
}

func newStreams(cmd *exec.Cmd) (s *streams, err error) {
	s = &streams{failed: make(chan struct{})}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return s, err
	}
	s.made = append(s.made, null)
	stdin := null
	if cmd.Stdin != nil {
		f, ok := cmd.Stdin.(*os.File)
		if !ok {
			return s, fmt.Errorf("start %s: its input is no file", cmd.Path)
		}
		stdin = f
	}
	stdout, err := s.output(cmd.Stdout, null)
	if err != nil {
		return s, err
	}
	stderr := stdout
	if cmd.Stderr != cmd.Stdout {
		if stderr, err = s.output(cmd.Stderr, null); err != nil {
			return s, err
		}
	}
	s.theirs = append([]*os.File{stdin, stdout, stderr}, cmd.ExtraFiles...)
	return s, nil
}

// output is the descriptor of which w gets what is written.
func (s *streams) output(w io.Writer, null *os.File) (*os.File, error) {
	if w == nil {
		return null, nil
	}
	if f, ok := w.(*os.File); ok {
		return f, nil
	}
	r, theirs, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	s.made = append(s.made, theirs)
	s.pipes = append(s.pipes, r)
	s.copies.Go(func() {
		if _, err := io.Copy(w, r); err != nil {
			s.once.Do(func() { s.err = err; close(s.failed) })
		}
	})
	return theirs, nil
}

// closeTheirs closes our copies of the program's own ends, without which our
// ends would never see an end.
func (s *streams) closeTheirs() {
	for _, f := range s.made {
		f.Close()
	}
	s.made = nil
}

// close gives all up, before the program was started.
func (s *streams) close() {
	s.closeTheirs()
	_ = s.wait()
}

// wait waits until all output is taken, which ends with the program.
func (s *streams) wait() error {
	s.copies.Wait()
	for _, f := range s.pipes {
		f.Close()
	}
	select {
	case <-s.failed:
		return s.err
	default:
		return nil
	}
}
