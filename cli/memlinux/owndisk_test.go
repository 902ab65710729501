package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// ownDisk is the kernel's name of the disk that / is on, and the names of its
// partitions. The test is skipped where / is on none, or on several.
func ownDisk(t *testing.T) (disk string, partitions []string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat("/", &st); err != nil {
		t.Fatal(err)
	}
	at, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		t.Skipf("skipped: / is on no disk of its own: %v", err)
	}
	if _, err := os.Stat(filepath.Join(at, "partition")); err == nil {
		at = filepath.Dir(at)
	}
	if below, _ := os.ReadDir(filepath.Join(at, "slaves")); len(below) > 0 {
		t.Skipf("skipped: / is on %s, which is made of other disks", filepath.Base(at))
	}
	disk = filepath.Base(at)
	found, err := filepath.Glob(filepath.Join(at, "*", "partition"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range found {
		partitions = append(partitions, filepath.Base(filepath.Dir(p)))
	}
	return disk, partitions
}

// The disk that this machine runs from is refused under every name that it has,
// and those that somebody may make for it. Should that fail, there is still
// neither --yes nor a terminal: the command would end at its question.
func TestOwnDiskUnderEveryName(t *testing.T) {
	w := newWorld(t)
	disk, partitions := ownDisk(t)
	node := "/dev/" + disk
	if _, err := os.Stat(node); err != nil {
		t.Skipf("skipped: %v", err)
	}
	number := func(path string) (major, minor uint32) {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return unix.Major(st.Rdev), unix.Minor(st.Rdev)
	}
	major, minor := number(node)
	names := []string{node, "//dev/../dev/./" + disk, "/proc/self/root" + node}
	if refused := w.run("write", node); !strings.Contains(refused.stderr, "the running system's / is on "+disk) {
		t.Fatalf("it says %q", refused.stderr)
	}

	// Those that udev or somebody else made.
	for _, pattern := range []string{"/dev/root", "/dev/block/*", "/dev/disk/by-*/*", "/dev/mapper/*", "/dev/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range found {
			if other, err := os.Stat(name); err == nil && name != node && other.Mode()&os.ModeDevice != 0 && other.Mode()&os.ModeCharDevice == 0 {
				if a, b := number(name); a == major && b == minor {
					names = append(names, name)
				}
			}
		}
	}
	// Our own.
	link := func(to string, path ...string) string {
		from := filepath.Join(append([]string{w.dir, "state"}, path...)...)
		if err := os.MkdirAll(filepath.Dir(from), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, from); err != nil {
			t.Fatal(err)
		}
		return from
	}
	up := strings.Repeat("../", strings.Count(w.dir, "/")+2)
	absolute := link(node, "absolute")
	relative := link(up+"dev/"+disk, "links", "relative")
	names = append(names, absolute, relative,
		link("absolute", "one"), link("../state/links/../links/relative", "two"), link("one", "three"),
		filepath.Join(link("/dev", "folder"), disk), link("three", "stick.img"))
	own := w.path("state/node")
	if err := unix.Mknod(own, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor))); err != nil {
		t.Fatal(err)
	}
	names = append(names, own, link("node", "of the node"))
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			w.run("write", name).wants(t, 3, "/dev/"+disk+" is refused: the running system's / is on "+disk)
		})
	}
	for _, p := range partitions {
		t.Run("the partition "+p, func(t *testing.T) {
			w.run("write", "/dev/"+p).wants(t, 3, "partition")
		})
	}
	t.Run("among others", func(t *testing.T) {
		device, backing := w.loop(64, "512")
		before := digest(t, backing)
		o := w.run("write", own, device)
		if o.code != 3 || !strings.Contains(o.stderr, "the running system's / is on "+disk) {
			t.Errorf("exit %d: %s", o.code, o.stderr)
		}
		if digest(t, backing) != before {
			t.Error("the other disk was written")
		}
	})
	t.Run("below a loop device", func(t *testing.T) {
		losetup := need.Tool(t, "losetup", "mount")
		out, err := exec.Command(losetup, "--read-only", "--find", "--show", node).CombinedOutput()
		if err != nil {
			t.Skipf("skipped: here the kernel makes none: %s", out)
		}
		loop := strings.TrimSpace(string(out))
		defer sh(t, losetup, "--detach", loop)
		w.run("write", loop).wants(t, 3, "only another name for")
	})
	t.Run("nothing is opened for writing", func(t *testing.T) {
		log := w.path("state/trace")
		inner := w.command("write", absolute)
		cmd := exec.Command(need.Tool(t, "strace", "strace"), append([]string{"-f", "-qq", "-e", "trace=open,openat,openat2,creat", "-o", log}, inner.Args...)...)
		cmd.Env = inner.Env
		finish(t, cmd).wants(t, 3, "the running system's / is on "+disk)
		trace, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		opened := regexp.MustCompile(`"/dev/`+disk+`[^/"]*".*`).FindAllString(string(trace), -1)
		for _, call := range opened {
			if strings.Contains(call, "O_RDWR") || strings.Contains(call, "O_WRONLY") {
				t.Errorf("it was opened: %s", call)
			}
		}
		if !strings.Contains(string(trace), "mountinfo") {
			t.Error("the trace does not show what the daemon opens")
		}
	})
}
