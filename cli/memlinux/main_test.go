package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
)

// bin is the folder with the three programs, as make lays them.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "memlinux-cli-test-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil { // nobody runs them too
			panic(err)
		}
		bin = dir
		build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "../memlinux", "../memlinux-write", "../../daemon/memlinuxd")
		build.Stdout, build.Stderr = os.Stdout, os.Stderr
		if err := build.Run(); err != nil {
			panic(err)
		}
		return m.Run()
	}())
}

// world is where one test's commands run.
type world struct {
	t     *testing.T
	dir   string   // for files
	cache string   // shared between tests, so that a kernel is fetched once
	env   []string // more environment
}

func newWorld(t *testing.T) *world {
	t.Helper()
	need.Root(t)
	need.Tool(t, "dbus-daemon", "dbus-daemon")
	return &world{t: t, dir: t.TempDir(), cache: need.Cache(t)}
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

// file makes a file of that content.
func (w *world) file(name, content string) string {
	w.t.Helper()
	if err := os.WriteFile(w.path(name), []byte(content), 0o644); err != nil {
		w.t.Fatal(err)
	}
	return w.path(name)
}

func (w *world) command(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(bin, "memlinux"), append([]string{"--private"}, args...)...)
	cmd.Env = append(os.Environ(), "MEMLINUX_CACHE_DIR="+w.cache, "MEMLINUX_STATE_DIR="+w.path("state"))
	cmd.Env = append(cmd.Env, w.env...)
	return cmd
}

// outcome is how a command ended.
type outcome struct {
	code           int
	stdout, stderr string
}

func (w *world) run(args ...string) outcome {
	w.t.Helper()
	return finish(w.t, w.command(args...))
}

func finish(t *testing.T, cmd *exec.Cmd) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// wants checks the exit code, and that one sentence on stderr says why.
func (o outcome) wants(t *testing.T, code int, says ...string) {
	t.Helper()
	if o.code != code {
		t.Errorf("exit %d, want %d; stderr: %s", o.code, code, o.stderr)
	}
	lines := strings.Split(strings.TrimSpace(o.stderr), "\n")
	if code != 0 && (!strings.HasPrefix(lines[0], "memlinux: ") || len(lines) > 2 || len(lines) == 2 && !strings.HasPrefix(lines[1], "Try ")) {
		t.Errorf("not one sentence: %q", o.stderr)
	}
	for _, s := range says {
		if !strings.Contains(o.stderr, s) {
			t.Errorf("%q is not in %q", s, o.stderr)
		}
	}
}

// holds checks that the folder holds nothing but the named files: no half-made
// image, no temporary file.
func (w *world) holds(names ...string) {
	w.t.Helper()
	entries, err := os.ReadDir(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	allowed := map[string]bool{"state": true}
	for _, n := range names {
		allowed[n] = true
	}
	for _, e := range entries {
		if !allowed[e.Name()] {
			w.t.Errorf("%s was left behind", e.Name())
		}
	}
}

// loop makes a disk of that many MiB.
func (w *world) loop(mib int64, sectorSize string) (device, backing string) {
	w.t.Helper()
	backing = w.path("disk")
	f, err := os.Create(backing)
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(mib << 20); err != nil {
		w.t.Fatal(err)
	}
	return need.Loop(w.t, backing, sectorSize), backing
}

func sh(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return string(out)
}

func TestBadCommandLines(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		says string
	}{
		{"unknown flag", []string{"write", "--fast", "x"}, "--fast"},
		{"unknown command", []string{"wirte"}, "wirte"},
		{"no target", []string{"write"}, "one DEVICE or FILE"},
		{"two files", []string{"write", "a", "b"}, "can only be devices"},
		{"a folder", []string{"write", "/tmp"}, "neither a disk nor a regular file"},
		{"a size that is none", []string{"write", "--size", "big", "x.img"}, "--size"},
		{"nothing to boot", []string{"vm"}, "what to boot"},
		{"initrd without a kernel", []string{"vm", "--initrd", "x", "y"}, "--kernel"},
		{"build to nowhere", []string{"build"}, "-o DIR"},
		{"remove nothing", []string{"remove"}, "the ID of one entry"},
		{"cancel nothing", []string{"cancel"}, "give one JOB"},
		{"next of two", []string{"next", "a", "b"}, "the ID of one entry"},
		{"diff of one", []string{"diff", "a"}, "two manifests, A and B"},
		{"diff of what is not there", []string{"diff", "a", "b"}, "a does not exist"},
		{"explain of two", []string{"explain", "a", "b"}, "one PATH, not 2"},
		{"explain of what is not there", []string{"explain", "--manifest", "/nope"}, "/nope does not exist"},
		{"vm of two", []string{"vm", "a", "b"}, "one DEVICE or FILE, not 2"},
		{"vm of what is not there", []string{"vm", "/nope"}, "/nope does not exist"},
		{"no data", []string{"vm", "--kernel", "/etc/passwd", "--data", "/nope"}, "--data: /nope does not exist"},
		{"verify of what is not there", []string{"verify", "/nope"}, "/nope does not exist"},
		{"write of what is not there", []string{"write", "/dev/nope"}, "no such device: /dev/nope"},
		{"completion of no shell", []string{"completion", "bogus"}, `unknown command "bogus"`},
		{"completion of two", []string{"completion", "bash", "zsh"}, `unknown command "zsh"`},
		{"help of no command", []string{"help", "bogus"}, `there is no command "bogus"`},
		{"a recipe in a folder that is not there", []string{"recipe", "init", "none/x.toml"}, "the folder none does not exist"},
		{"install what", []string{"install", "stick.img"}, "stick.img"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(filepath.Join(bin, "memlinux"), c.args...)
			cmd.Dir = t.TempDir()
			finish(t, cmd).wants(t, 2, c.says)
		})
	}
}

func TestHelpHasExamples(t *testing.T) {
	for _, name := range []string{"write", "build", "verify", "vm", "devices", "jobs", "cancel", "install", "entries", "remove", "next", "rollback"} {
		o := finish(t, exec.Command(filepath.Join(bin, "memlinux"), name, "--help"))
		if o.code != 0 || !strings.Contains(o.stdout, "Examples:") {
			t.Errorf("%s --help: exit %d: %s", name, o.code, o.stdout)
		}
	}
	o := finish(t, exec.Command(filepath.Join(bin, "memlinux"), "completion", "bash"))
	if o.code != 0 || !strings.Contains(o.stdout, "complete") {
		t.Errorf("completion: exit %d", o.code)
	}
}

func TestCancelWhatIsNoJob(t *testing.T) {
	w := newWorld(t)
	for _, id := range []string{"20261129_223204_c6deda", "../manager", "a job", ""} {
		w.run("cancel", id).wants(t, 2, fmt.Sprintf("there is no job %q", id))
	}
}

func TestNoBusForAnOrdinaryUser(t *testing.T) {
	w := newWorld(t)
	for says, args := range map[string][]string{"not on the system bus": {"devices"}, "--private is for root: use sudo": {"devices", "--private"}} {
		cmd := exec.Command(filepath.Join(bin, "memlinux"), args...)
		cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+w.path("none"))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		finish(t, cmd).wants(t, 4, says, "sudo")
	}
}

func TestBadConfiguration(t *testing.T) {
	w := newWorld(t)
	conf := w.file("memlinux.toml", "cashe-dir = \"/tmp\"\n")
	w.env = []string{"MEMLINUX_CONFIG=" + conf}
	w.run("devices").wants(t, 2, conf, "cashe-dir")
}

func TestRefusedTargets(t *testing.T) {
	w := newWorld(t)
	t.Run("no such device", func(t *testing.T) {
		w.run("write", "--yes", "/dev/nosuchdisk").wants(t, 2, "no such device", "memlinux devices")
	})
	t.Run("a file that exists", func(t *testing.T) {
		f := w.file("there", "keep me")
		w.run("write", f).wants(t, 3, "exists", "--force")
		if b, _ := os.ReadFile(f); string(b) != "keep me" {
			t.Error("it was changed")
		}
		os.Remove(f)
	})
	t.Run("a folder that is not there", func(t *testing.T) {
		w.run("write", w.path("none/stick.img")).wants(t, 2, "make it first")
	})
	w.holds()
}

func TestRefusedLoopDevices(t *testing.T) {
	w := newWorld(t)
	dev, backing := w.loop(64, "512")
	t.Run("mounted", func(t *testing.T) {
		sh(t, need.Tool(t, "mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", dev)
		mnt := t.TempDir()
		sh(t, "mount", dev, mnt)
		defer sh(t, "umount", mnt)
		before := digest(t, backing)
		w.run("write", "--yes", dev).wants(t, 3, "mounted at "+mnt)
		if digest(t, backing) != before {
			t.Error("it was changed")
		}
	})
	t.Run("a partition", func(t *testing.T) {
		sh(t, "sh", "-c", "echo 2048,,L | sfdisk -q "+dev)
		sh(t, need.Tool(t, "partx", "util-linux"), "-a", dev)
		defer sh(t, "partx", "-d", dev)
		w.run("write", "--yes", dev+"p1").wants(t, 3, "partition", dev)
	})
	t.Run("no terminal to ask at", func(t *testing.T) {
		w.run("write", dev).wants(t, 2, "--yes")
	})
	w.holds("disk")
}

func TestTooSmall(t *testing.T) {
	w := newWorld(t)
	dev, backing := w.loop(8, "512")
	before := digest(t, backing)
	w.run("write", "--yes", dev).wants(t, 1, "needs ", " MiB, has 8 MiB")
	if digest(t, backing) != before {
		t.Error("the device was changed")
	}
	w.run("write", "--size", "1MiB", w.path("small.img")).wants(t, 1, "the image is too small: needs ", "give a larger --size")
	t.Run("a full disk", func(t *testing.T) {
		mnt := t.TempDir()
		sh(t, "mount", "-t", "tmpfs", "-o", "size=4m", "none", mnt)
		defer sh(t, "umount", mnt)
		w.run("write", mnt+"/stick.img").wants(t, 1, "needs ")
		if left, _ := os.ReadDir(mnt); len(left) != 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	w.holds("disk")
}

func TestBadKernelsAndBusybox(t *testing.T) {
	w := newWorld(t)
	kernel, config := need.Kernel(t)
	image, err := os.ReadFile(kernel)
	if err != nil {
		t.Fatal(err)
	}
	patched := func(name string, change func([]byte)) string {
		b := bytes.Clone(image)
		change(b)
		return w.file(name, string(b))
	}
	out := w.path("out")
	for _, c := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"a text for a kernel", []string{"--kernel", w.file("text", strings.Repeat("not a kernel\n", 1000))}, 2, "not a bzImage"},
		{"a kernel for i386", []string{"--kernel", patched("i386", func(b []byte) { b[0x236] &^= 1 })}, 2, "i386"},
		{"a kernel for arm64", []string{"--kernel", w.file("arm64", string(append(append(make([]byte, 0x38), "ARM\x64"...), make([]byte, 4096)...)))}, 2, "arm64"},
		{"a kernel that is not there", []string{"--kernel", w.path("none")}, 2, w.path("none") + " does not exist"},
		{"a busybox that is not there", []string{"--busybox", w.path("none")}, 2, w.path("none") + " does not exist"},
		{"a package that is not there", []string{"--kernel", "debian:no-such-kernel"}, 1, "no-such-kernel"},
		{"a package's name that is none", []string{"--kernel", "debian:--help"}, 2, "name of a package"},
		{"a module that is not there", []string{"--modules", "disk,nosuchmodule"}, 2, "nosuchmodule"},
		{"a dynamic busybox", []string{"--busybox", "/bin/ls"}, 2, "busybox-static"},
		{"a busybox that is none", []string{"--busybox", w.path("text")}, 2, ""},
		{"a quote on the command line", []string{"--append", `a="b c"`}, 2, "append"},
		{"an unknown compression", []string{"--compression", "rar"}, 2, "zstd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.run(append([]string{"build", "-o", out}, c.args...)...).wants(t, c.code, c.says)
			if left, _ := os.ReadDir(out); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	t.Run("a kernel without initrd support", func(t *testing.T) {
		dir := t.TempDir()
		text, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.ReplaceAll(text, []byte("CONFIG_BLK_DEV_INITRD=y"), []byte("# CONFIG_BLK_DEV_INITRD is not set"))
		release := strings.TrimPrefix(filepath.Base(config), "config-")
		for name, b := range map[string][]byte{"vmlinuz-" + release: image, "config-" + release: text} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		w.run("build", "-o", out, "--kernel", filepath.Join(dir, "vmlinuz-"+release)).wants(t, 2, "BLK_DEV_INITRD")
	})
}

func TestTwoBuildsAreTheSame(t *testing.T) {
	w := newWorld(t)
	a, b := w.path("a"), w.path("b")
	w.run("build", "-o", a).wants(t, 0)
	w.cache = w.path("othercache") // nothing may come from the first
	w.run("build", "-o", b).wants(t, 0)
	for _, name := range api.BuildFiles() {
		if x, y := digest(t, filepath.Join(a, name)), digest(t, filepath.Join(b, name)); x != y {
			t.Errorf("%s differs", name)
		}
	}
}

func TestWithoutQEMUTheWriteStands(t *testing.T) {
	w := newWorld(t)
	w.env = []string{"PATH=" + pathWithout(t, "qemu-system-x86_64")}
	w.run("write", w.path("stick.img")).wants(t, 5, "written and read back", "apt-get install qemu-system-x86")
	if _, err := os.Stat(w.path("stick.img")); err != nil {
		t.Error(err)
	}
	w.holds("stick.img")
	w.run("vm", w.path("stick.img")).wants(t, 1, "apt-get install qemu-system-x86")
}

// pathWithout is a folder of links to all commands but one.
func pathWithout(t *testing.T, missing string) string {
	t.Helper()
	// Not t.TempDir: programs that run as nobody look here too.
	dir, err := os.MkdirTemp("", "memlinux-path-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, from := range filepath.SplitList(os.Getenv("PATH")) {
		entries, _ := os.ReadDir(from)
		for _, e := range entries {
			if e.Name() != missing {
				_ = os.Symlink(filepath.Join(from, e.Name()), filepath.Join(dir, e.Name()))
			}
		}
	}
	return dir
}

// Ctrl-C in each phase: exit 130, and nothing is left: no file, no process, no
// bootable device.
func TestCancelInEachPhase(t *testing.T) {
	for _, phase := range []string{"kernel", "initramfs", "image", "write", "read back", "boot BIOS", "boot UEFI"} {
		t.Run("file: "+phase, func(t *testing.T) {
			w := newWorld(t)
			if phase == "kernel" {
				w.cache = w.path("state/cache") // so that it has to be fetched
			}
			// Enough to write that a phase can be hit.
			cmd := w.command("--json", "write", "--size", "6GiB", w.path("stick.img"))
			cancelled(t, w, cmd, phase)
			w.holds()
		})
	}
	for _, phase := range []string{"write", "read back", "boot BIOS"} {
		t.Run("device: "+phase, func(t *testing.T) {
			w := newWorld(t)
			dev, backing := w.loop(2048, "512")
			reached := cancelled(t, w, w.command("--json", "write", "--yes", dev), phase)
			head := make([]byte, 512)
			f, err := os.Open(backing)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := io.ReadFull(f, head); err != nil {
				t.Fatal(err)
			}
			bootable := head[510] == 0x55 && head[511] == 0xaa
			if done := strings.HasPrefix(reached, "boot"); bootable != done {
				t.Errorf("cancelled during %s, and the boot sector is there: %v", reached, bootable)
			}
			sh(t, "flock", "--nonblock", dev, "true") // nothing holds it any more
		})
	}
}

// cancelled interrupts cmd as soon as the phase begins, and returns the phase
// that it was cancelled in.
func cancelled(t *testing.T, w *world, cmd *exec.Cmd, phase string) string {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stuck := time.AfterFunc(3*time.Minute, func() { cmd.Process.Kill() })
	defer stuck.Stop()
	var last struct {
		Event, Phase, State, Error string
		Exit                       int
	}
	sent := false
	reached := ""
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if err := json.Unmarshal(lines.Bytes(), &last); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		if last.Event == "progress" {
			reached = last.Phase
			if last.Phase == phase && !sent {
				sent = true
				if strings.HasPrefix(phase, "boot") {
					// There is a machine to be stopped, and left would see it.
					awaitProcesses(t, func() bool { return strings.Contains(w.left(), "qemu-system") })
				}
				cmd.Process.Signal(os.Interrupt)
			}
		}
	}
	cmd.Wait()
	if !sent {
		t.Fatalf("the phase %s never came; stderr: %s", phase, stderr.String())
	}
	if code := cmd.ProcessState.ExitCode(); code != 130 || last.Event != "report" || last.State != api.StateCancelled || last.Exit != 130 {
		t.Errorf("exit %d, last event %+v, stderr %s", code, last, stderr.String())
	}
	awaitProcesses(t, func() bool { return w.left() == "" })
	return reached
}

// awaitProcesses waits a while for what is true of the processes.
func awaitProcesses(t *testing.T, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Error("processes still run, or never did")
			return
		}
	}
}

// left names the processes of these programs that run, and all that have a file
// or folder of this world open, as a virtual machine has its scratch.
func (w *world) left() string {
	var found []string
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		if filepath.Base(d) == strconv.Itoa(os.Getpid()) {
			continue
		}
		cmdline, _ := os.ReadFile(d + "/cmdline")
		mine := bytes.HasPrefix(cmdline, []byte(bin))
		fds, _ := filepath.Glob(d + "/fd/*")
		for _, fd := range fds {
			target, _ := os.Readlink(fd)
			mine = mine || strings.HasPrefix(target, w.dir)
		}
		if mine {
			found = append(found, string(bytes.ReplaceAll(cmdline, []byte{0}, []byte(" "))))
		}
	}
	return strings.Join(found, "; ")
}

func digest(t *testing.T, path string) string {
	t.Helper()
	return strings.Fields(sh(t, "sha256sum", path))[0]
}
