package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// side is one of those that are compared.
type side struct {
	name   string
	argv   []string
	dir    string       // its working folder
	env    []string     // besides ours
	stderr io.Writer    // where what it says goes; nil for into its error
	rounds int          // how often it runs; 0 for as often as all
	before func() error // runs ahead of each round and does not count; or nil
	after  func() error // the same, behind it

	wall, cpu []time.Duration
	peak      []int64 // bytes of the largest of its processes
	out       []byte  // what it printed the last time
}

// ours is a side that does a work of this program's.
func ours(name, work string, args ...string) (*side, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return &side{name: "memlinux: " + name, argv: append([]string{self, "work", work}, args...)}, nil
}

// once runs the side and takes its figures. A process's times include those of
// its children, and its peak is the largest of theirs: the kernel counts what
// was waited for. That peak is no less than that of this process, which is what
// the new process was before it had a program of its own.
func (s *side) once() error {
	if s.before != nil {
		if err := s.before(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	cmd := exec.Command(s.argv[0], s.argv[1:]...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), s.env...)
	var said bytes.Buffer
	cmd.Stderr = &said
	if s.stderr != nil {
		cmd.Stderr = s.stderr
	}
	begin := time.Now()
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w: %s%s", s.name, err, out, said.Bytes())
	}
	s.wall = append(s.wall, time.Since(begin))
	s.cpu = append(s.cpu, cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime())
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		return errors.New("the kernel does not tell what a process used")
	}
	s.peak = append(s.peak, usage.Maxrss<<10)
	s.out = out
	if s.after != nil {
		if err := s.after(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// inTurn runs each side once, then each once more, and so on.
func inTurn(rounds int, sides ...*side) error {
	for i := range rounds {
		for _, s := range sides {
			if s.rounds > 0 && i >= s.rounds {
				continue
			}
			if err := s.once(); err != nil {
				return err
			}
		}
	}
	return nil
}

func median[T cmp.Ordered](all []T) T {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}

const rounds = 7

// compare runs us and the peer in turn and prints both and the ratios.
func compare(title string, us, peer *side) error {
	if err := inTurn(rounds, us, peer); err != nil {
		return err
	}
	fmt.Printf("\n%s\n", title)
	for _, s := range []*side{us, peer} {
		fmt.Printf("  %-44s wall %7.3f s   CPU %7.3f s\n", s.name, median(s.wall).Seconds(), median(s.cpu).Seconds())
	}
	fmt.Printf("  %-44s wall %7.2f     CPU %7.2f\n", "ratio (below 1: memlinux takes less)",
		float64(median(us.wall))/float64(median(peer.wall)), float64(median(us.cpu))/float64(median(peer.cpu)))
	return nil
}

// figure prints a figure beside the goal that it should not exceed.
func figure(name, format string, value, goal float64) {
	verdict := "met"
	if value > goal {
		verdict = "MISSED"
	}
	fmt.Printf("  %-44s %s   goal %s   %s\n", name, fmt.Sprintf(format, value), strings.TrimSpace(fmt.Sprintf(format, goal)), verdict)
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }
