package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

func TestExitCodes(t *testing.T) {
	named := func(name string) error { return &api.Error{Name: name, Message: "m"} }
	for _, c := range []struct {
		name string
		err  error
		want int
	}{
		{"done", nil, 0},
		{"any failure", errors.New("x"), 1},
		{"too small", named(api.ErrNoSpace), 1},
		{"a device that went away", named(api.ErrNoSuchDevice), 1},
		{"bad flag", usagef("x"), 2},
		{"a file that is not there", fmt.Errorf("--kernel: %w", unusable("x", fs.ErrNotExist)), 2},
		{"a device that is not there", noDevice("x"), 2},
		{"bad configuration", &client.ConfigError{Message: "x"}, 2},
		{"bad option on the bus", named(api.ErrInvalidOption), 2},
		{"system disk", named(api.ErrDeviceIsSystem), 3},
		{"mounted", named(api.ErrDeviceBusy), 3},
		{"swapped", named(api.ErrDeviceChanged), 3},
		{"file exists", refusal("x"), 3},
		{"not allowed", client.ErrNotRoot, 4},
		{"not proven", fmt.Errorf("x: %w", named(api.ErrVerification)), 5},
		{"cancelled job", named(api.ErrCancelled), 130},
		{"Ctrl-C at the prompt", context.Canceled, 130},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestKeysOfTheConsole(t *testing.T) {
	for _, c := range []struct {
		name, typed, sent string
		left              bool
	}{
		{"text passes", "ls\r", "ls\r", false},
		{"Ctrl-A X leaves", "ls\x01xrm", "ls", true},
		{"Ctrl-A Ctrl-A is one Ctrl-A", "a\x01\x01b", "a\x01b", false},
		{"Ctrl-A before another key passes", "\x01c", "\x01c", false},
		{"Ctrl-A X in two reads", "\x01|X", "", true},
	} {
		var parts []io.Reader
		for _, p := range strings.Split(c.typed, "|") {
			parts = append(parts, strings.NewReader(p))
		}
		var sent bytes.Buffer
		if left := copyKeys(&sent, io.MultiReader(parts...)); left != c.left || !strings.HasPrefix(c.sent, sent.String()) || !c.left && sent.String() != c.sent {
			t.Errorf("%s: sent %q, left %v", c.name, sent.String(), left)
		}
	}
}

func TestLinesInAPipe(t *testing.T) {
	var out bytes.Buffer
	v := &lineView{out: &out}
	v.update(api.Job{State: api.StateRunning, Phase: "kernel"})
	v.update(api.Job{State: api.StateRunning, Phase: "write", Bytes: 1 << 20, Total: 2 << 20})
	v.update(api.Job{State: api.StateRunning, Phase: "write", Bytes: 2 << 20, Total: 2 << 20})
	v.update(api.Job{State: api.StateSucceeded, Phase: "write", Bytes: 2 << 20, Total: 2 << 20})
	v.end(true)
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "kernel: ") || !strings.HasPrefix(lines[1], "write: 2.0 MiB in ") {
		t.Errorf("got %q", lines)
	}
	out.Reset()
	v = &lineView{out: &out}
	v.update(api.Job{State: api.StateRunning, Phase: "write"})
	v.end(false)
	if !strings.Contains(out.String(), "stopped") {
		t.Errorf("a failed phase: %q", out.String())
	}
}

func TestTargets(t *testing.T) {
	dir := t.TempDir()
	file := dir + "/f"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, dir+"/link"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		want       target
		code       int
	}{
		{"a new file", dir + "/new", target{file: dir + "/new"}, 0},
		{"a link is followed", dir + "/link", target{file: file}, 0},
		{"a typing mistake below /dev is no new file", "/dev/nosuchdisk", target{}, exitUsage},
		{"nor by another way", "/dev/../dev/nosuchdisk", target{}, exitUsage},
		{"a folder", dir, target{}, exitUsage},
		{"a character device", "/dev/null", target{}, exitUsage},
	} {
		got, err := resolveTarget(c.path)
		if got != c.want || exitCode(err) != c.code {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
}

func TestRefusalSaysWhatLiftsIt(t *testing.T) {
	soft, hard := api.Reason{Text: "vda is built in", Soft: true}, api.Reason{Text: "vda is read-only"}
	for _, c := range []struct {
		name, serial string
		plan         api.Plan
		lifted       bool
	}{
		{"the serial does", "4C53", api.Plan{Refused: []api.Reason{soft}, Token: "t"}, true},
		{"a disk without one", "", api.Plan{Refused: []api.Reason{soft}, Token: "t"}, false},
		{"a reason that nothing lifts beside it", "4C53", api.Plan{Refused: []api.Reason{soft, hard}}, false},
		{"mounted only", "4C53", api.Plan{Refused: []api.Reason{{Text: "it is mounted", Code: api.ReasonMounted}}, Token: "t"}, false},
	} {
		if says := refusedPlan("vda", c.plan, c.serial).Error(); strings.Contains(says, "type its serial") != c.lifted || !strings.Contains(says, c.plan.Refused[0].Text) {
			t.Errorf("%s: %s", c.name, says)
		}
	}
}

func TestReportTellsWhatFailed(t *testing.T) {
	var out bytes.Buffer
	printReport(&out, &api.Report{
		Target: &api.Target{Kind: "device", Name: "sdb", Model: "Stick", Size: 8 << 30, SectorSize: 512},
		Image:  &api.Image{Bytes: 1 << 20, SHA256Planned: "aa", SHA256Written: "aa", SHA256Read: "bb"},
		Boots:  []api.Boot{{Firmware: "bios", OK: true, Ready: 8, Accel: "tcg"}, {Firmware: "uefi", Reason: "no ready line"}, {Firmware: "x", Skipped: true, Reason: "can't"}},
	}, "")
	for _, want := range []string{"/dev/sdb, Stick, 8.0 GiB", "DIFFERENT: sha256 bb", "boot BIOS  OK", "boot UEFI  FAILED: no ready line", "left out: can't"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in\n%s", want, out.String())
		}
	}
}

// A job whose message quotes a log is one line of the table, and one cell.
func TestFirstLine(t *testing.T) {
	for in, want := range map[string]string{
		"":                     "",
		"cancelled":            "cancelled",
		"the log says:\n  a:1": "the log says: …",
		"a\tb":                 "a b",
	} {
		if got := firstLine(in); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}

func TestChecksArePrintedWithWhatToDo(t *testing.T) {
	checks := []api.Check{
		{Name: "QEMU", State: api.CheckOK, Text: "version 7.2 runs"},
		{Name: "UEFI firmware", State: api.CheckFailed, Text: "OVMF is not installed", Mend: "sudo apt install ovmf"},
		{Name: "KVM", State: api.CheckWarning, Text: "not here"},
	}
	for _, c := range []struct {
		name   string
		colors bool
		want   string
	}{
		{"in a pipe: words", false, `ok       QEMU           version 7.2 runs
failed   UEFI firmware  OVMF is not installed
                        → sudo apt install ovmf
warning  KVM            not here
`},
		{"on a terminal: signs and colors", true, "\x1b[32m✓\x1b[0m  QEMU           version 7.2 runs\n" +
			"\x1b[31m✗\x1b[0m  UEFI firmware  OVMF is not installed\n                  → sudo apt install ovmf\n\x1b[33m!\x1b[0m  KVM            not here\n"},
	} {
		var out bytes.Buffer
		printChecks(&out, checks, c.colors)
		if out.String() != c.want {
			t.Errorf("%s:\n%q, want\n%q", c.name, out.String(), c.want)
		}
	}
	for _, c := range []struct {
		name   string
		checks []api.Check
		code   int
	}{
		{"a warning is no failure", []api.Check{checks[0], checks[2], {State: api.CheckUnknown}}, exitDone},
		{"a failure is one", checks, exitFailed},
	} {
		if got := exitCode(verdict(c.checks)); got != c.code {
			t.Errorf("%s: exit %d, want %d", c.name, got, c.code)
		}
	}
}
