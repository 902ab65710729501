package blockdev

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// maxProbes is how many disks are probed at once.
const maxProbes = 8

// answerTime is how long a disk may take to say what is on it, or on one of its
// partitions; one that slept has begun to turn by then. Tests have less.
var answerTime = 5 * time.Second

// deathTime is how long a killed program may take to be gone. One that waits for a
// disk can't be killed before the kernel gives that up.
const deathTime = 500 * time.Millisecond

// errSilent is a disk that does not answer.
var errSilent = errors.New("it does not answer")

// silentTime is for how long a disk that did not answer is not asked again: who
// lists the disks and then looks at one waits once. Tests have another.
var silentTime = 30 * time.Second

// diskID is a disk in a machine's life: one that is plugged in again is another.
type diskID struct {
	devNum
	seq uint64
}

// probing is a program that looks at a disk, or did.
type probing struct {
	over   chan struct{} // closed when it is gone, or silent
	silent bool          // the disk did not answer
	gone   time.Time     // of the program, if it is
}

// answersNot says that asking is no use.
func (p *probing) answersNot() bool {
	return p != nil && p.silent && (p.gone.IsZero() || time.Since(p.gone) < silentTime)
}

// probes are what programs look at or did in vain, one for each disk: at one that
// does not answer they would become ever more.
var probes = struct {
	sync.Mutex
	of map[diskID]*probing
}{of: map[diskID]*probing{}}

// beginProbe waits for its turn at the disk. The error is errSilent, or ctx's.
func beginProbe(ctx context.Context, id diskID) (*probing, error) {
	for {
		probes.Lock()
		p := probes.of[id]
		if p == nil || p.silent && !p.answersNot() {
			p = &probing{over: make(chan struct{})}
			probes.of[id] = p
			probes.Unlock()
			return p, nil
		}
		silent := p.silent
		probes.Unlock()
		if silent {
			return nil, errSilent
		}
		select {
		case <-p.over:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// end says that the program is gone.
func (p *probing) end(id diskID) {
	probes.Lock()
	defer probes.Unlock()
	p.gone = time.Now()
	if !p.silent {
		delete(probes.of, id)
		close(p.over)
	}
}

// giveUp says that the disk does not answer, unless the program is gone by now.
func (p *probing) giveUp() {
	probes.Lock()
	defer probes.Unlock()
	if !p.silent && p.gone.IsZero() {
		p.silent = true
		close(p.over)
	}
}

// whole is the disk that n is, or is a part of.
func (v *survey) whole(n *node) *node {
	if disk := v.nodes[n.disk]; n.partition && disk != nil {
		return disk
	}
	return n
}

func (n *node) id() diskID { return diskID{devNum{n.Major, n.Minor}, n.DiskSeq} }

// isSilent reports whether the node's disk did not answer a short while ago.
func (v *survey) isSilent(n *node) bool {
	probes.Lock()
	defer probes.Unlock()
	return probes.of[v.whole(n).id()].answersNot()
}

// silence is the reason against a disk that does not answer.
func (v *survey) silence(n *node) Reason {
	return Reason{Code: ReasonUnknown, Text: v.whole(n).Name + " does not answer: unplug it and plug it in again"}
}

// contents probes the disk and its partitions. What is on one that does not answer
// (silent) is left unknown.
func (v *survey) contents(ctx context.Context, name string) (all []Content, silent bool, err error) {
	names := []string{name}
	for _, up := range v.above[name] {
		if u := v.nodes[up]; u != nil && u.partition && u.disk == name {
			names = append(names, up)
		}
	}
	for _, name := range names {
		c := Content{Name: name, Size: v.nodes[name].Size}
		path := filepath.Join(v.system.dev(), name)
		if _, ok := nodeNumber(path); ok && c.Size > 0 && !silent {
			err := c.probe(ctx, path, v.whole(v.nodes[name]).id())
			silent = errors.Is(err, errSilent)
			if err != nil && !silent {
				return nil, false, fmt.Errorf("see what is on %s: %w", name, err)
			}
		}
		all = append(all, c)
	}
	return all, silent, nil
}

// probe asks libblkid, the library by which udev and mount know file systems
// too. The error is errSilent where the disk does not answer within seconds.
func (c *Content) probe(ctx context.Context, path string, disk diskID) error {
	blkid, err := exec.LookPath("blkid")
	if err != nil {
		// An administrator's tool can be outside of PATH.
		if blkid, err = exec.LookPath("/usr/sbin/blkid"); err != nil {
			return errors.New("blkid is missing: install util-linux")
		}
	}
	turn, err := beginProbe(ctx, disk)
	if err != nil {
		return err
	}
	cmd := exec.Command(blkid, "-p", "-o", "export", path)
	cmd.Env = []string{"LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var said bytes.Buffer // the program's, until it is gone
	cmd.Stdout = &said
	if err := cmd.Start(); err != nil {
		turn.end(disk)
		return fmt.Errorf("run blkid: %w", err)
	}
	gone := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		turn.end(disk)
		gone <- err
	}()
	limit := time.NewTimer(answerTime)
	defer limit.Stop()
	var stop error
	select {
	case err = <-gone:
	case <-limit.C:
		turn.giveUp()
		stop = errSilent
	case <-ctx.Done():
		stop = ctx.Err()
	}
	if stop != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		select {
		case <-gone: //nolint:errcheck // that it was killed
		case <-time.After(deathTime):
			turn.giveUp() // the kernel has it
		}
		return stop
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit) && exit.ExitCode() == 8:
		c.Type = "ambivalent" // blkid's word for several signatures at once
		return nil
	case errors.As(err, &exit): // 2: nothing known, or it could not be read
		return nil
	default:
		return fmt.Errorf("run blkid: %w", err)
	}
	found := parseExport(said.String())
	c.Type = Clean(orElse(found["TYPE"], found["PTTYPE"]))
	c.Label = Clean(orElse(found["LABEL"], found["LABEL_FATBOOT"]))
	c.UUID = Clean(orElse(found["UUID"], found["PTUUID"]))
	c.PartLabel = Clean(found["PART_ENTRY_NAME"])
	return nil
}
