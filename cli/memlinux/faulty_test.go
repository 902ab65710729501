package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/media/mediatest"
)

// What a faulty stick ends with: the exit code, the sentence, the fault in the
// report, and no disk that boots. All kinds of faults are media's
// TestFaultMatrixOfRealDevices.
func TestFaultySticks(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name   string
		faults func(d *mediatest.Disk) mediatest.Faults
		args   []string
		code   int
		fault  string
		says   string
		keeps  bool // the head is what it was
	}{
		{"a bit flips", func(*mediatest.Disk) mediatest.Faults { return mediatest.Faults{Flip: 3*mib + 77} },
			nil, 5, "flipped", "1 flipped bits, first at byte 3145805", false},
		{"a fake size", func(*mediatest.Disk) mediatest.Faults { return mediatest.Faults{WrapAt: 16 * mib} },
			nil, 5, "wraps", "wraps after 16 MiB", false},
		{"a fake size, only looked for", func(*mediatest.Disk) mediatest.Faults { return mediatest.Faults{WrapAt: 16 * mib} },
			[]string{"--check-capacity"}, 5, "wraps", "says that it holds 64 MiB and holds 16", true},
		{"a place that can't be written", func(*mediatest.Disk) mediatest.Faults {
			return mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
				if c.Write && c.Touches(4*mib+512) {
					return syscall.EIO
				}
				return 0
			}}
		}, nil, 1, "write-error", "can't write", false},
		{"taken out during the write", func(d *mediatest.Disk) mediatest.Faults {
			var gone atomic.Bool
			return mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
				if c.Write && c.Touches(4*mib) && gone.CompareAndSwap(false, true) {
					d.Resize(0)
					return syscall.EIO
				}
				return 0
			}}
		}, nil, 1, "unplugged", "plug it in again", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			d := mediatest.New(t, 64*mib, 512)
			before := string(d.Holds(0, mib))
			d.Break(c.faults(d))
			args := append([]string{"--json", "write", "--no-boot-test"}, c.args...)
			if len(c.args) == 0 {
				args = append(args, "--yes")
			}
			o := w.run(append(args, d.Path)...)
			o.wants(t, c.code, c.says)
			lines := strings.Split(strings.TrimSpace(o.stdout), "\n")
			var last struct {
				Event, State string
				Exit         int
				Report       *api.Report
			}
			if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil {
				t.Fatalf("%q: %v", o.stdout, err)
			}
			if last.Event != "report" || last.Exit != c.code || last.State != api.StateFailed || last.Report == nil {
				t.Fatalf("the last event is %+v", last)
			}
			fault := ""
			switch r := last.Report; {
			case r.Image != nil:
				fault = r.Image.Fault
				if r.Written || r.Verified {
					t.Errorf("the report is of %+v", r)
				}
			case r.Capacity != nil:
				fault = r.Capacity.Fault
			}
			if fault != c.fault {
				t.Errorf("the report's fault is %q, want %q", fault, c.fault)
			}
			switch head := string(d.Holds(0, mib)); {
			case c.keeps && head != before:
				t.Error("the head is another")
			case !c.keeps && strings.Trim(head, "\x00") != "":
				t.Error("the head is not void")
			}
		})
	}
}

// A stick that answers no more: Ctrl-C ends the command, though the kernel does
// not give back what it was asked for.
func TestSilentStick(t *testing.T) {
	const mib = 1 << 20
	w := newWorld(t)
	d := mediatest.New(t, 64*mib, 512)
	silent := make(chan struct{})
	var once sync.Once
	d.Break(mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
		if c.Write && c.Touches(4*mib) {
			once.Do(func() { close(silent) })
			d.Hold()
			return syscall.EIO
		}
		return 0
	}})
	cmd := w.command("--json", "write", "--yes", "--no-boot-test", d.Path)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stuck := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer stuck.Stop()
	select {
	case <-silent:
	case <-time.After(time.Minute): // and stuck ends it
	}
	cmd.Process.Signal(os.Interrupt)
	cmd.Wait()
	outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}.wants(t, 130, "cancelled during write: the disk does not answer: unplug it")
	if r := lastReport(t, stdout.String()); r.Image == nil || r.Image.Fault != "stalled" {
		t.Errorf("the report is of %+v", r)
	}
	if strings.Trim(string(d.Holds(0, mib)), "\x00") != "" {
		t.Error("the head is not void")
	}
}
