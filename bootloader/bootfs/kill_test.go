package bootfs_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/testvm/need"
)

// buildSteps makes the static program of internal/steps.
func buildSteps(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "steps")
	cmd := exec.Command(need.Tool(t, "go", "golang-go"), "build", "-trimpath", "-buildvcs=false", "-o", program, "./internal/steps")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	return program
}

// killedAt are the system calls that a run is killed before, each of them in
// turn: all that change something. Between them, what a kill leaves is the same.
// Go's own few calls are among them.
var killedAt = []string{
	"fchmod", "fchown", "fdatasync", "fsync", "ftruncate", "ioctl", "linkat", "mkdirat", "openat", "pwrite64", "renameat2", "syncfs", "unlinkat", "write",
}

// A run is killed before each system call of an installation and of a removal.
func TestKilledAtEverySystemCall(t *testing.T) {
	strace := need.Tool(t, "strace", "strace")
	need.Root(t)
	steps := buildSteps(t)
	source := t.TempDir()
	putAll(t, source, sources())
	for _, k := range kinds {
		if k.name == "ext3" || k.name == "ext2" {
			continue // the same calls as ext4
		}
		t.Run(k.name, func(t *testing.T) {
			boot := filepath.Join(mount(t, k.name, k.mkfs, k.pkg, k.size, k.args...), "boot")
			calls, verbs := killedAt, []string{"install", "remove"}
			if k.name == "xfs" {
				// A freeze takes long, and it is what matters here.
				calls, verbs = []string{"ioctl"}, verbs[:1]
			}
			kills := 0
			for _, verb := range verbs {
				start, end := foreign(), installed()
				if verb == "remove" {
					start, end = end, start
				}
				want := t.TempDir()
				putAll(t, want, end)
				wantTree := tree(t, want)
				for _, call := range calls {
					for n := 1; ; n++ {
						if err := os.RemoveAll(boot); err != nil {
							t.Fatal(err)
						}
						putAll(t, boot, start)
						cmd := exec.Command(strace, "-o", "/dev/null", "-e", "trace="+call,
							"-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n), steps, boot, source, verb)
						out, err := cmd.CombinedOutput()
						if err == nil {
							break
						}
						if status := cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() {
							t.Fatalf("%s killed at %s %d: %v: %s", verb, call, n, err, out)
						}
						kills++
						mustNotBeFrozen(t, filepath.Dir(boot))
						err = judge(func(name string) ([]byte, error) { return os.ReadFile(filepath.Join(boot, name)) })
						if err != nil {
							t.Fatalf("%s killed at %s %d: %v", verb, call, n, err)
						}
						if out, err := exec.Command(steps, boot, source, verb).CombinedOutput(); err != nil {
							t.Fatalf("%s after it was killed at %s %d: %v: %s", verb, call, n, err, out)
						}
						if diff := cmp.Diff(wantTree, tree(t, boot), ignoreModes); diff != "" {
							t.Fatalf("%s after it was killed at %s %d:\n%s", verb, call, n, diff)
						}
					}
				}
			}
			t.Logf("%d kills", kills)
			if kills < 15 {
				t.Errorf("only %d kills: is the order of system calls still deterministic?", kills)
			}
		})
	}
}

// ignoreModes leaves the content: modes are TestApply's.
var ignoreModes = cmp.Comparer(func(a, b string) bool {
	_, a, _ = strings.Cut(a, " ")
	_, b, _ = strings.Cut(b, " ")
	return a == b
})

// A process that hangs between freezing and thawing does not keep the file
// system frozen, and its guard ends with it.
func TestStoppedWhileFrozen(t *testing.T) {
	strace := need.Tool(t, "strace", "strace")
	dir := mount(t, "xfs", "mkfs.xfs", "xfsprogs", 320<<20, "-q", "-f")
	steps := buildSteps(t)
	source := t.TempDir()
	putAll(t, source, sources())
	boot := filepath.Join(dir, "boot")
	putAll(t, boot, foreign())
	// The first ioctl is FIFREEZE; the stop comes when it returns.
	cmd := exec.Command(strace, "-o", "/dev/null", "-e", "trace=ioctl", "-e", "inject=ioctl:signal=STOP:when=1", steps, boot, source, "install")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	}()
	frozen := false
	for start := time.Now(); time.Since(start) < 20*time.Second && !frozen; time.Sleep(50 * time.Millisecond) {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		for pid := range strings.FieldsSeq(string(children)) {
			status, _ := os.ReadFile("/proc/" + pid + "/status")
			frozen = frozen || strings.Contains(string(status), "\nState:\tt") || strings.Contains(string(status), "\nState:\tT")
		}
	}
	if !frozen {
		t.Fatal("the process did not stop")
	}
	time.Sleep(time.Second) // strace stops it for a moment at every call
	start := time.Now()
	mustNotBeFrozen(t, dir)
	t.Logf("thawed after %v", time.Since(start))
	if time.Since(start) < time.Second {
		t.Error("it was not frozen")
	}
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it did not go on: %v", err)
	}
}

// What another program froze is not ours to thaw: fsfreeze for a snapshot.
func TestFrozenByAnother(t *testing.T) {
	dir := mount(t, "xfs", "mkfs.xfs", "xfsprogs", 320<<20, "-q", "-f")
	f := open(t, dir)
	run(t, "fsfreeze", "-f", dir)
	err := f.Settle()
	if thaw := exec.Command("fsfreeze", "-u", dir).Run(); thaw != nil {
		t.Errorf("it was thawed: %v", thaw)
	}
	if err == nil || !strings.Contains(err.Error(), "another program has frozen") {
		t.Errorf("got %v", err)
	}
}
