package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/media/mediatest"
	"github.com/memlinux/memlinux/testvm/need"
)

// A disk whose reads never come back: the others are shown, it is refused, and no
// matter how often one looks, no more than one program waits for it.
func TestDiskThatDoesNotAnswer(t *testing.T) {
	need.Root(t)
	need.Tool(t, "blkid", "util-linux")
	oldAnswer, oldSilent := answerTime, silentTime
	answerTime, silentTime = time.Second, time.Hour
	defer func() { answerTime, silentTime = oldAnswer, oldSilent }()
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	sound := filepath.Base(need.Loop(t, file, "512"))
	disk := mediatest.New(t, 1<<20, 512)
	hung := filepath.Base(disk.Path)
	answer := make(chan struct{})
	release := func() {
		select {
		case <-answer:
		default:
			close(answer)
		}
	}
	t.Cleanup(release) // before all others: what waits holds them up
	disk.Break(mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
		if !c.Write {
			<-answer
		}
		return 0
	}})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	silent := func(d Device) bool {
		return slices.ContainsFunc(d.Reasons, func(r Reason) bool {
			return r.Code == ReasonUnknown && !r.Soft && strings.Contains(r.Text, "does not answer")
		})
	}

	for range 2 {
		all, err := System{}.Devices(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{sound, hung} {
			i := slices.IndexFunc(all, func(d Device) bool { return d.Name == name })
			if i < 0 {
				t.Fatalf("%s is not listed", name)
			}
			if got := silent(all[i]); got != (name == hung) {
				t.Errorf("%s does not answer: %v", name, got)
			}
		}
	}
	d, err := System{}.Device(ctx, hung)
	if err != nil || !silent(d) || len(d.Contents) != 1 || d.Contents[0].Type != "" {
		t.Errorf("%+v, %v", d, err)
	}
	var refused *RefusedError
	if _, _, err := (System{}).OpenRead(ctx, hung); !errors.As(err, &refused) || !refused.Has(ReasonUnknown) {
		t.Errorf("open for reading: %v", err)
	}
	if _, err := (System{}).Open(ctx, hung, "token"); !errors.As(err, &refused) || !refused.Has(ReasonUnknown) {
		t.Errorf("open for writing: %v", err)
	}
	if n := waiting(t, disk.Path); n > 1 {
		t.Errorf("%d programs wait for the disk", n)
	}

	release()
	silentTime = 0
	for d, err = (System{}).Device(ctx, hung); err == nil && silent(d); d, err = (System{}).Device(ctx, hung) {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Errorf("it answers again: %v", err)
	}
	if n := waiting(t, disk.Path); n != 0 {
		t.Errorf("%d programs are left", n)
	}
}

// waiting counts the programs of this test that were told the path: other tests
// look at all disks, too.
func waiting(t *testing.T, path string) (n int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		b, _ := os.ReadFile(name) // it may be gone
		argv := strings.Split(string(b), "\x00")
		// What was killed and is still there has no arguments any more, but a name.
		comm, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "comm"))
		status, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "status"))
		ours := strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", os.Getpid()))
		if ours && strings.TrimSpace(string(comm)) == "blkid" && (len(b) == 0 || slices.Contains(argv, path)) {
			n++
		}
	}
	return n
}
