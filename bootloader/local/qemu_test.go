package local

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// console runs a machine with a serial console until done says so of what stood
// there, or the machine ends, and returns that. limit is for a loaded machine.
func console(t *testing.T, limit time.Duration, done func(log string) bool, args ...string) string {
	t.Helper()
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	serial := filepath.Join(t.TempDir(), "serial.log")
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, append([]string{"-accel", "tcg", "-display", "none", "-nic", "none", "-serial", "file:" + serial}, args...)...)
	// It goes with this program, however that ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	over := false
	for {
		log, _ := os.ReadFile(serial) // none yet
		switch {
		case done(string(log)):
			cancel()
			if !over {
				<-ended
			}
			t.Logf("after %.1f s", time.Since(start).Seconds())
			return string(log)
		case over && ctx.Err() != nil:
			t.Fatalf("not within %v; the serial console said:\n%s", limit, log)
		case over:
			return string(log)
		}
		select {
		case <-ended:
			over = true // what it said last is still to be read
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// never is for a machine that ends by itself.
func never(string) bool { return false }
