package install

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/bootloader/local"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/pc"
)

// Environment of the test program when it plays a run that may be killed.
const (
	envRoot  = "MEMLINUX_TEST_INSTALL_ROOT"
	envState = "MEMLINUX_TEST_INSTALL_STATE"
	// envInside says that the program has a mount namespace of its own.
	envInside = "MEMLINUX_TEST_INSTALL_INSIDE"
)

func TestMain(m *testing.M) {
	if root := os.Getenv(envRoot); root != "" {
		runtime.LockOSThread() // strace counts the calls of each thread
		if err := life(local.System{Root: root}, os.Getenv(envState)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() == 0 && os.Getenv(envInside) == "" {
		// What is mounted here is nobody else's to see, and to hold.
		self, err := os.Executable()
		if err != nil {
			panic(err)
		}
		again := exec.Command(self, os.Args[1:]...)
		again.Stdin, again.Stdout, again.Stderr = os.Stdin, os.Stdout, os.Stderr
		again.Env = append(os.Environ(), envInside+"=1")
		again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		_ = again.Run() // its exit code tells
		os.Exit(again.ProcessState.ExitCode())
	}
	os.Exit(m.Run())
}

// life is all that can be done to the menu, one after the other.
func life(sys local.System, dir string) error {
	path := filepath.Join(dir, "state.json")
	ctx := context.Background()
	with := func(do func(*Session) error) error {
		s, err := Open(ctx, sys, path)
		if err != nil {
			return err
		}
		defer s.Close()
		return do(s)
	}
	first, err := request(dir, 'a')
	if err != nil {
		return err
	}
	second, err := request(dir, 'b')
	if err != nil {
		return err
	}
	second.Next, second.Default = true, true
	proven := func(context.Context) error { return nil }
	for i, do := range []func(*Session) error{
		func(s *Session) error { _, err := s.Install(ctx, first, nil, proven); return err },
		func(s *Session) error { _, err := s.Install(ctx, second, nil, proven); return err },
		func(s *Session) error { _, err := s.Next(ctx, ""); return err },
		func(s *Session) error { _, err := s.Rollback(ctx); return err },
		func(s *Session) error { _, err := s.Remove(ctx, first.Entry.ID); return err },
	} {
		if err := with(do); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	return nil
}

// request is one of a system whose ID is a letter sixteen times.
func request(dir string, letter byte) (Request, error) {
	id := strings.Repeat(string(letter), 16)
	r := Request{Entry: local.Entry{ID: id, Title: "memlinux", Cmdline: "console=ttyS0 memlinux.build=" + id}}
	var digests [2]string
	for i, part := range []string{"kernel", "initramfs"} {
		content := []byte(strings.Repeat(part+" of "+id+"\n", 3000))
		path := filepath.Join(dir, part+string(letter))
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return r, err
		}
		digest := sha256.Sum256(content)
		digests[i] = hex.EncodeToString(digest[:])
		r.Files = append(r.Files, bootfs.Payload{Source: path, Size: int64(len(content)), SHA256: digests[i]})
	}
	r.Entry.Kernel, r.Entry.Initrd = PayloadNames(digests[0], digests[1])
	r.Files[0].Name, r.Files[1].Name = r.Entry.Kernel, r.Entry.Initrd
	return r, nil
}

// thisPC mounts the /boot of a test's PC where a machine's root would be.
func thisPC(t *testing.T, spec pc.Spec) local.System {
	t.Helper()
	spec.Kernel, spec.Config = need.Kernel(t)
	spec.SeparateBoot = true
	p := pc.Bare(t, spec)
	device := p.Attach(t)
	part := fmt.Sprintf("%sp%d", device, p.Boot.Number)
	root := t.TempDir()
	boot := filepath.Join(root, "boot")
	for _, dir := range []string{"boot", "proc/self", "etc", "run/lock"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, link := range []string{"dev", "sys"} {
		if err := os.Symlink("/"+link, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mount(part, boot, p.Boot.Type, 0, ""); err != nil {
		t.Fatalf("mount %s: %v", part, err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(boot, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	info, err := os.Stat(boot)
	if err != nil {
		t.Fatal(err)
	}
	dev := info.Sys().(*syscall.Stat_t).Dev
	mounts := fmt.Sprintf("20 1 0:99 / / rw - tmpfs none rw\n21 20 %d:%d / /boot rw,relatime - %s %s rw\n", dev>>8, dev&255, p.Boot.Type, part)
	if err := os.WriteFile(filepath.Join(root, "proc/self/mountinfo"), []byte(mounts), 0o600); err != nil {
		t.Fatal(err)
	}
	return local.System{Root: root}
}

// tree is every file below dir with its content.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			all[path] = ""
			return err
		}
		text, err := os.ReadFile(path)
		all[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func sameTree(t *testing.T, when string, got, want map[string]string) {
	t.Helper()
	for path, text := range want {
		if now, ok := got[path]; !ok {
			t.Errorf("%s: %s is gone", when, path)
		} else if now != text {
			t.Errorf("%s: %s is\n%q, and was\n%q", when, path, now, text)
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%s: %s was left behind", when, path)
		}
	}
}

var loaders = []struct {
	name string
	spec pc.Spec
}{
	{"GRUB 2", pc.Spec{Loader: pc.GRUB2BIOS}},
	{"GRUB Legacy", pc.Spec{Loader: pc.GRUBLegacy}},
}

func TestLifeOfEntries(t *testing.T) {
	for _, c := range loaders {
		t.Run(c.name, func(t *testing.T) {
			sys, dir := thisPC(t, c.spec), t.TempDir()
			boot := filepath.Join(sys.Root, "boot")
			before := tree(t, boot)
			if err := life(sys, dir); err != nil {
				t.Fatal(err)
			}
			sameTree(t, "after everything was removed", tree(t, boot), before)
			if _, err := os.Stat(filepath.Join(dir, "state.json")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the state is still there: %v", err)
			}
		})
	}
}

// A proof that fails, or an end of ctx in it, takes all back.
func TestFailedProofTakesAllBack(t *testing.T) {
	sys, dir := thisPC(t, pc.Spec{Loader: pc.GRUB2BIOS}), t.TempDir()
	boot := filepath.Join(sys.Root, "boot")
	before := tree(t, boot)
	r, err := request(dir, 'c')
	if err != nil {
		t.Fatal(err)
	}
	r.Next, r.Default = true, true
	s, err := Open(t.Context(), sys, filepath.Join(dir, "state.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	failure := errors.New("it did not boot")
	for _, c := range []struct {
		name  string
		prove func(context.Context) error
		want  error
	}{
		{"failed", func(context.Context) error {
			menu, err := s.Boot.Menu()
			if err != nil || find(menu.Ours, r.Entry.ID) < 0 || menu.Ours.Next != "" || menu.Ours.Default != "" {
				t.Errorf("while it is proven the menu has %+v, %v", menu.Ours, err)
			}
			return failure
		}, failure},
		{"cancelled", func(ctx context.Context) error { cancel(); return ctx.Err() }, context.Canceled},
	} {
		if _, err := s.Install(ctx, r, nil, c.prove); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		sameTree(t, c.name, tree(t, boot), before)
	}
}

// killable are the calls by which files change. A kill comes before the call.
const killable = "openat,openat2,mkdirat,write,pwrite64,copy_file_range,fallocate,ftruncate,fchmod,fchown,fsetxattr,fsync,fdatasync,syncfs,linkat,renameat,renameat2,unlink,unlinkat,rmdir,ioctl"

// Whatever call a kill comes at: the menu that is left boots, and the next run
// leaves nothing behind.
func TestKilledAtEveryCall(t *testing.T) {
	strace := need.Tool(t, "strace", "strace")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range loaders {
		t.Run(c.name, func(t *testing.T) {
			sys := thisPC(t, c.spec)
			boot := filepath.Join(sys.Root, "boot")
			before := tree(t, boot)
			play := func(dir string, args ...string) error {
				// blkid and the like, which it starts, go on unharmed.
				cmd := exec.Command(strace, append(append([]string{"-f", "-y", "--detach-on=execve", "-qq", "-o", filepath.Join(dir, "trace"), "-e", "trace=" + killable}, args...), self)...)
				cmd.Env = append(os.Environ(), envRoot+"="+sys.Root, envState+"="+dir, "GOMAXPROCS=1")
				out, err := cmd.CombinedOutput()
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return nil
			}
			dir := t.TempDir()
			if err := play(dir); err != nil {
				t.Fatal(err)
			}
			sameTree(t, "without a kill", tree(t, boot), before)
			points := countCalls(t, filepath.Join(dir, "trace"), sys.Root)
			kills, menus := 0, map[string]bool{}
			for _, point := range points {
				dir := t.TempDir()
				err := play(dir, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", point.call, point.n))
				if err == nil {
					continue // the threads shared the calls otherwise this time
				}
				if !strings.Contains(err.Error(), "killed") {
					t.Fatalf("%v: %v", point, err)
				}
				kills++
				when := fmt.Sprintf("killed at %s %d", point.call, point.n)
				menus[checkMenu(t, when, sys)] = true
				// The next run cleans up, and all can be taken out again.
				s, err := Open(t.Context(), sys, filepath.Join(dir, "state.json"))
				if err != nil {
					t.Fatalf("%s: %v", when, err)
				}
				menu, err := s.Boot.Menu()
				if err != nil {
					t.Fatalf("%s: %v", when, err)
				}
				for _, e := range menu.Ours.Entries {
					if _, err := s.Remove(t.Context(), e.ID); err != nil {
						t.Errorf("%s: remove: %v", when, err)
					}
				}
				s.Close()
				sameTree(t, when, tree(t, boot), before)
				if t.Failed() {
					t.FailNow()
				}
			}
			t.Logf("%d kills at calls of %d, %d different menus", kills, len(points), len(menus))
			if kills < 100 {
				t.Errorf("only %d kills", kills)
			}
		})
	}
}

type point struct {
	call string
	n    int
}

var callLine = regexp.MustCompile(`^(\d+) +([a-z0-9_]+)\((.*)`)

// countCalls finds the calls of the main thread on the machine's boot files.
func countCalls(t *testing.T, trace, root string) (points []point) {
	t.Helper()
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	n := map[string]int{}
	main := ""
	for line := range strings.Lines(string(text)) {
		m := callLine.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if main == "" {
			main = m[1]
		}
		if m[1] != main {
			continue
		}
		n[m[2]]++
		reading := strings.HasPrefix(m[2], "openat") && !strings.Contains(m[3], "O_CREAT") && !strings.Contains(m[3], "O_TMPFILE")
		if strings.Contains(m[3], root) && !reading {
			points = append(points, point{m[2], n[m[2]]})
		}
	}
	return points
}

// checkMenu reads the menu as it is and holds every entry of ours against its
// files. It returns what the menu says.
func checkMenu(t *testing.T, when string, sys local.System) string {
	t.Helper()
	b, err := local.Find(t.Context(), sys)
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	menu, err := b.Menu()
	if err != nil {
		t.Fatalf("%s: the menu can't be read: %v", when, err)
	}
	for _, e := range menu.Ours.Entries {
		for part, name := range map[string]string{"kernel": e.Kernel, "initramfs": e.Initrd} {
			content, err := os.ReadFile(filepath.Join(b.Dir, name))
			if err != nil || string(content) != strings.Repeat(part+" of "+e.ID+"\n", 3000) {
				t.Errorf("%s: the %s of %s is not whole: %v", when, part, e.ID, err)
			}
		}
	}
	if custom, err := os.ReadFile(filepath.Join(sys.Root, "boot/grub/custom.cfg")); err == nil {
		cmd := exec.Command(need.Tool(t, "grub-script-check", "grub-common"))
		cmd.Stdin = strings.NewReader(string(custom))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: custom.cfg: %v: %s", when, err, out)
		}
	}
	ids := []string{}
	for _, e := range menu.Ours.Entries {
		ids = append(ids, e.ID)
	}
	slices.Sort(ids)
	return fmt.Sprint(ids, menu.Ours.Default, menu.Ours.Next)
}
