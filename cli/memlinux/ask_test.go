package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// atTerminal runs a command at a terminal where a person types the answers.
func atTerminal(t *testing.T, cmd *exec.Cmd, answers ...string) outcome {
	t.Helper()
	quoted := make([]string, len(cmd.Args))
	for i, a := range cmd.Args {
		quoted[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	script := exec.Command(need.Tool(t, "script", "bsdutils"), "--quiet", "--return", "--command", strings.Join(quoted, " "), "/dev/null")
	script.Env = append(cmd.Env, "TERM=dumb")
	script.Stdin = strings.NewReader(strings.Join(answers, "\n") + "\n")
	return finish(t, script)
}

// What a desktop has mounted is unmounted if the person says so, and only then.
func TestAutomountedStickAsksFirst(t *testing.T) {
	for _, c := range []struct {
		name, point string
		answers     func(disk string) []string
		yes         bool
		code        int
		says        string
	}{
		{"yes", "/media/memlinux-test", func(disk string) []string { return []string{"yes", disk} }, false, 0, "Unmount that?"},
		{"no", "/media/memlinux-test", func(string) []string { return []string{"no"} }, false, 3, "stays mounted"},
		{"another disk's name", "/media/memlinux-test", func(string) []string { return []string{"yes", "sda"} }, false, 3, "the answer was not"},
		{"not asked for with --yes", "/media/memlinux-test", func(string) []string { return nil }, true, 3, "is mounted at"},
		{"not a desktop's mount", "/mnt", func(disk string) []string { return []string{"yes", disk} }, false, 3, "is mounted at"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			device, backing := w.loop(64, "512")
			sh(t, need.Tool(t, "mke2fs", "e2fsprogs"), "-q", "-t", "ext4", backing)
			before := digest(t, backing)
			// Below a tmpfs, so that the folder is nobody else's.
			holder := exec.Command("sh", "-ec", fmt.Sprintf("mount -t tmpfs none %s; mkdir -p %s; mount -o ro,noload %s %s; echo mounted; exec sleep infinity",
				"/"+strings.Split(c.point, "/")[1], c.point, device, c.point))
			holder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
			out, err := holder.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			holder.Stderr = os.Stderr
			if err := holder.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { holder.Process.Kill(); holder.Wait() })
			if line, err := io.ReadAll(io.LimitReader(out, int64(len("mounted\n")))); err != nil || string(line) != "mounted\n" {
				t.Fatalf("mount: %q, %v", line, err)
			}
			args := []string{"write", "--no-boot-test", device}
			if c.yes {
				args = append(args, "--yes")
			}
			inner := w.command(args...)
			cmd := exec.Command("nsenter", append([]string{"--target", strconv.Itoa(holder.Process.Pid), "--mount", "--root", "--"}, inner.Args...)...)
			cmd.Env = inner.Env
			o := atTerminal(t, cmd, c.answers(filepath.Base(device))...)
			if o.code != c.code || !strings.Contains(o.stdout, c.says) {
				t.Errorf("exit %d, want %d:\n%s", o.code, c.code, o.stdout)
			}
			mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", holder.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			if still := strings.Contains(string(mounts), device+" "); still != (c.code != 0) {
				t.Errorf("mounted afterwards: %v", still)
			}
			if now := digest(t, backing); (now == before) != (c.code != 0) {
				t.Errorf("the disk was written: %v", now != before)
			}
		})
	}
}

func TestNothingToPick(t *testing.T) {
	w := newWorld(t)
	o := atTerminal(t, w.command("write"))
	// Unless somebody has plugged a stick in: then it asks, and the empty
	// answer is none.
	if o.code != 1 && o.code != 3 {
		t.Errorf("exit %d: %s", o.code, o.stdout)
	}
	if !strings.Contains(o.stdout, "plugged in") && !strings.Contains(o.stdout, "is not the number of a disk") {
		t.Errorf("it says %s", o.stdout)
	}
}

func TestCheckCapacityLeavesTheContent(t *testing.T) {
	w := newWorld(t)
	device, backing := w.loop(256, "512")
	sh(t, need.Tool(t, "mke2fs", "e2fsprogs"), "-q", "-t", "ext4", backing)
	before := digest(t, backing)
	o := w.run("write", "--check-capacity", device)
	o.wants(t, 0)
	if !strings.Contains(o.stdout, "256 MiB, as it says") {
		t.Errorf("it says %s", o.stdout)
	}
	if digest(t, backing) != before {
		t.Error("the content is another")
	}
	w.run("write", "--check-capacity", w.path("x.img")).wants(t, 2, "for a device")
}

// One image on several sticks, a report for each; one that is refused does not
// stop the others.
func TestSeveralSticks(t *testing.T) {
	w := newWorld(t)
	var devices []string
	for i := range 3 {
		sub := &world{t: t, dir: t.TempDir(), cache: w.cache}
		device, backing := sub.loop(64, "512")
		if i == 1 { // in use: a loop device on it
			need.Loop(t, device, "512")
		}
		devices = append(devices, device)
		_ = backing
	}
	o := w.run(append([]string{"write", "--yes", "--no-boot-test"}, devices...)...)
	if o.code != 3 || !strings.Contains(o.stderr, devices[1]) {
		t.Errorf("exit %d: %s", o.code, o.stderr)
	}
	for i, device := range devices {
		name := filepath.Base(device)
		if reported := strings.Contains(o.stdout, "\n"+device+"\n"); reported != (i != 1) {
			t.Errorf("%s is reported: %v\n%s", device, reported, o.stdout)
		}
		if progress := strings.Contains(o.stdout, "\n"+name+" write: "); progress != (i != 1) {
			t.Errorf("the progress of %s is shown: %v\n%s", device, progress, o.stdout)
		}
		if i != 1 {
			w.run("verify", "--no-boot-test", device).wants(t, 0)
		}
	}
	if a, b := volumeID(t, devices[0]), volumeID(t, devices[2]); a == b {
		t.Errorf("two sticks have the volume ID %s", a)
	}
	w.run("write", "--yes", devices[0], devices[0]).wants(t, 2, "twice")
}
