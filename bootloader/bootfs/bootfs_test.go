package bootfs_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/testvm/need"
	"golang.org/x/sys/unix"
)

// TestMain runs the tests in a mount namespace of their own: whatever they
// mount goes with it, also if they are killed.
func TestMain(m *testing.M) {
	const marker = "BOOTFS_TEST_NAMESPACE"
	if os.Geteuid() != 0 || os.Getenv(marker) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // the death signal comes when the thread ends, not the process
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "a mount namespace for the tests:", err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

// kinds are the file systems that the tests mount here. FAT is missing: not
// every kernel that tests run on has it. It is done in TestPowerCuts.
var kinds = []struct {
	name, typ string // the test's, FS.Type
	size      int64
	mkfs, pkg string
	args      []string
}{
	{"ext4", "ext4", 64 << 20, "mkfs.ext4", "e2fsprogs", []string{"-q", "-F"}},
	{"ext3", "ext4", 64 << 20, "mkfs.ext3", "e2fsprogs", []string{"-q", "-F", "-I", "128"}},
	{"ext2", "ext4", 64 << 20, "mkfs.ext2", "e2fsprogs", []string{"-q", "-F"}},
	{"xfs", "xfs", 320 << 20, "mkfs.xfs", "xfsprogs", []string{"-q", "-f"}},
	{"btrfs", "btrfs", 128 << 20, "mkfs.btrfs", "btrfs-progs", []string{"-q", "-f"}},
}

// mount makes a file system in memory and mounts it.
func mount(t *testing.T, name, mkfs, pkg string, size int64, args ...string) (dir string) {
	t.Helper()
	need.Root(t)
	tool := need.Tool(t, mkfs, pkg)
	memory, dir := t.TempDir(), t.TempDir()
	run(t, "mount", "-t", "tmpfs", "tmpfs", memory)
	// The kernel lets go of the loop device a moment after its last user.
	t.Cleanup(func() { run(t, "umount", "--lazy", memory) })
	image := filepath.Join(memory, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	run(t, tool, append(args, image)...)
	run(t, "mount", "-t", name, "-o", "loop", image, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir
}

// backing is the file below the loop device that is mounted on dir. Unlike the
// device, of which the kernel may keep what it once read, it has what was written.
func backing(t *testing.T, dir string) string {
	t.Helper()
	loop := filepath.Base(strings.TrimSpace(run(t, "findmnt", "-n", "-o", "SOURCE", dir)))
	file, err := os.ReadFile(filepath.Join("/sys/block", loop, "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(file))
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func eachKind(t *testing.T, test func(t *testing.T, dir string)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			test(t, mount(t, k.name, k.mkfs, k.pkg, k.size, k.args...))
		})
	}
}

func open(t *testing.T, dir string) *bootfs.FS {
	t.Helper()
	f, err := bootfs.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// tree is all that is below dir: files with their content and mode, folders.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, dir)
		if e.Name() == "lost+found" {
			return fs.SkipDir
		}
		all[name] = info.Mode().String()
		if e.Type().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(data)
			all[name] += " " + hex.EncodeToString(sum[:4])
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestType(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			f := open(t, mount(t, k.name, k.mkfs, k.pkg, k.size, k.args...))
			if f.Type() != k.typ {
				t.Errorf("Type is %s, not %s", f.Type(), k.typ)
			}
			free, err := f.Free()
			if err != nil || free <= 0 || free > k.size {
				t.Errorf("%d bytes free of %d, %v", free, k.size, err)
			}
			if err := f.Settle(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	need.Root(t)
	memory := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "tmpfs", memory)
	t.Cleanup(func() { run(t, "umount", memory) })
	ext4 := mount(t, "ext4", "mkfs.ext4", "e2fsprogs", 16<<20, "-q", "-F")
	run(t, "mount", "-o", "remount,ro", ext4)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/", link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, dir, want string }{
		{"a kind without a procedure", memory, "(tmpfs)"},
		{"read-only", ext4, "mount -o remount,rw " + ext4},
		{"a folder that is not there", filepath.Join(memory, "none"), "no such file"},
		{"a symbolic link", link, "symbolic link"},
		{"a relative path", "boot", "not absolute"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := bootfs.Open(c.dir)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestApply(t *testing.T) {
	eachKind(t, func(t *testing.T, dir string) {
		f := open(t, dir)
		menu, env, custom := filepath.Join(dir, "grub/menu.lst"), filepath.Join(dir, "grub/grubenv"), filepath.Join(dir, "grub/custom.cfg")
		old, env0 := []byte("title old\r\n"), bytes.Repeat([]byte("#"), 1024)
		write(t, menu, old)
		write(t, env, env0)
		if err := os.Chmod(menu, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(menu, 12, 34); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setxattr(menu, "security.selinux", []byte("system_u:object_r:boot_t:s0\x00"), 0); err != nil {
			t.Fatal(err)
		}
		var inode unix.Stat_t
		if err := unix.Stat(env, &inode); err != nil {
			t.Fatal(err)
		}
		before := tree(t, dir)

		env1 := append([]byte("next_entry=1\n"), env0[13:]...)
		changes := []bootfs.Change{
			{Path: custom, New: []byte("menuentry 1 {}\n")},
			{Path: menu, Old: old, New: []byte("title new\n")},
			{Path: env, Old: env0, New: env1, Kind: bootfs.InPlace},
			{Path: menu, Old: []byte("title new\n"), New: []byte{}}, // again, and empty is not missing
		}
		if err := f.Apply(t.Context(), changes); err != nil {
			t.Fatal(err)
		}
		for path, want := range map[string]string{custom: "menuentry 1 {}\n", menu: "", env: string(env1)} {
			if got, err := os.ReadFile(path); err != nil || string(got) != want {
				t.Errorf("%s is %.40q, not %.40q (%v)", path, got, want, err)
			}
		}
		var st unix.Stat_t
		if err := unix.Stat(menu, &st); err != nil || st.Mode&0o7777 != 0o600 || st.Uid != 12 || st.Gid != 34 {
			t.Errorf("the replaced file has mode %o of %d:%d, %v", st.Mode, st.Uid, st.Gid, err)
		}
		label := make([]byte, 100)
		if n, err := unix.Getxattr(menu, "security.selinux", label); err != nil || string(label[:n]) != "system_u:object_r:boot_t:s0\x00" {
			t.Errorf("the replaced file has the label %q, %v", label[:max(n, 0)], err)
		}
		if err := unix.Stat(env, &st); err != nil || st.Ino != inode.Ino {
			t.Errorf("the file in place became inode %d from %d, %v", st.Ino, inode.Ino, err)
		}
		if err := unix.Stat(custom, &st); err != nil || st.Mode&0o7777 != 0o644 {
			t.Errorf("the new file has mode %o, %v", st.Mode, err)
		}

		back := []bootfs.Change{
			{Path: env, Old: env1, New: env0, Kind: bootfs.InPlace},
			{Path: menu, Old: []byte{}, New: old},
			{Path: custom, Old: []byte("menuentry 1 {}\n")},
		}
		if err := f.Apply(t.Context(), back); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
			t.Errorf("not as before:\n%s", diff)
		}
	})
}

func TestApplyRefuses(t *testing.T) {
	dir := mount(t, "ext4", "mkfs.ext4", "e2fsprogs", 16<<20, "-q", "-F")
	f := open(t, dir)
	path := func(name string) string { return filepath.Join(dir, name) }
	write(t, path("menu"), []byte("old"))
	write(t, path("other"), []byte("other"))
	for link, target := range map[string]string{"link": path("menu"), "dangling": path("none"), "folderlink": dir} {
		if err := os.Symlink(target, path(link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(path("folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(path("pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	write(t, path("immutable"), []byte("old"))
	run(t, "chattr", "+i", path("immutable"))
	t.Cleanup(func() { run(t, "chattr", "-i", path("immutable")) })
	before := tree(t, dir)

	was, is := []byte("old"), []byte("new")
	for _, c := range []struct {
		name    string
		change  bootfs.Change
		changed bool   // a *ChangedError
		want    string // in the error
	}{
		{"other content of the same length", bootfs.Change{Path: path("menu"), Old: []byte("odl"), New: is}, true, "run the command again"},
		{"shorter content", bootfs.Change{Path: path("menu"), Old: []byte("ol"), New: is}, true, ""},
		{"a file that should not be there", bootfs.Change{Path: path("menu"), New: is}, true, ""},
		{"a file that should be there", bootfs.Change{Path: path("none"), Old: was, New: is}, true, ""},
		{"an empty file that should be there", bootfs.Change{Path: path("none"), Old: []byte{}, New: is}, true, ""},
		{"removing what is not there", bootfs.Change{Path: path("none"), Old: was}, true, ""},
		{"removing what is something else", bootfs.Change{Path: path("other"), Old: was}, true, ""},
		{"in place with other content", bootfs.Change{Path: path("menu"), Old: []byte("odl"), New: is, Kind: bootfs.InPlace}, true, ""},
		{"in place with another length", bootfs.Change{Path: path("menu"), Old: was, New: []byte("newer"), Kind: bootfs.InPlace}, false, "in place"},
		{"in place without a file", bootfs.Change{Path: path("none"), New: is, Kind: bootfs.InPlace}, false, "in place"},
		{"a symbolic link", bootfs.Change{Path: path("link"), Old: was, New: is}, false, "symbolic link"},
		{"removing a symbolic link", bootfs.Change{Path: path("link"), Old: was}, false, "symbolic link"},
		{"a dangling link", bootfs.Change{Path: path("dangling"), New: is}, false, "symbolic link"},
		{"a link in the path", bootfs.Change{Path: path("folderlink/menu"), Old: was, New: is}, false, "symbolic link"},
		{"a folder", bootfs.Change{Path: path("folder"), Old: was, New: is}, false, "not a regular file"},
		{"a pipe does not block", bootfs.Change{Path: path("pipe"), Old: was, New: is}, false, "not a regular file"},
		{"a folder that is not there", bootfs.Change{Path: path("none/menu"), New: is}, false, "no such file"},
		{"a relative path", bootfs.Change{Path: "menu", Old: was, New: is}, false, "absolute"},
		{"a path that is not clean", bootfs.Change{Path: dir + "/folder/../menu", Old: was, New: is}, false, "clean"},
		{"an immutable file", bootfs.Change{Path: path("immutable"), Old: was, New: is}, false, "chattr -i"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// A right change before it must not be made.
			first := bootfs.Change{Path: path("other"), Old: []byte("other"), New: []byte("changed")}
			changes := []bootfs.Change{first, c.change}
			if c.name == "a folder that is not there" || c.name == "an immutable file" || c.change.Path == first.Path {
				changes = changes[1:] // only known when it is tried
			}
			err := f.Apply(t.Context(), changes)
			var changed *bootfs.ChangedError
			if err == nil || errors.As(err, &changed) != c.changed || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
			if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
				t.Errorf("something was done:\n%s", diff)
			}
		})
	}
	t.Run("a run that was cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := f.Apply(ctx, []bootfs.Change{{Path: path("menu"), Old: was, New: is}}); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

// An EFI variable's file: protected by the immutable flag, written by one
// write(2). ext4 knows the flag too; efivarfs itself is there under UEFI only.
func TestVariable(t *testing.T) {
	dir := mount(t, "ext4", "mkfs.ext4", "e2fsprogs", 16<<20, "-q", "-F")
	f := open(t, dir)
	path := filepath.Join(dir, "LoaderEntryOneShot-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f")
	flags := func() string { return strings.Fields(run(t, "lsattr", path))[0] }
	one, two := []byte("\x07\x00\x00\x00a\x00\x00\x00"), []byte("\x07\x00\x00\x00b\x00\x00\x00")
	change := func(old, new []byte) error {
		return f.Apply(t.Context(), []bootfs.Change{{Path: path, Old: old, New: new, Kind: bootfs.Variable}})
	}
	if err := change(nil, one); err != nil {
		t.Fatal(err)
	}
	run(t, "chattr", "+i", path)
	t.Cleanup(func() { _ = exec.Command("chattr", "-i", path).Run() })
	if err := change(one, two); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, two) {
		t.Fatalf("it is %q, %v", got, err)
	}
	if !strings.Contains(flags(), "i") {
		t.Errorf("it is not protected any more: %s", flags())
	}
	var changed *bootfs.ChangedError
	if err := change(one, nil); !errors.As(err, &changed) || !strings.Contains(flags(), "i") {
		t.Errorf("got %v, flags %s", err, flags())
	}
	if err := change(two, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}

func payload(t *testing.T, name string, data []byte) bootfs.Payload {
	t.Helper()
	source := filepath.Join(t.TempDir(), "source")
	write(t, source, data)
	sum := sha256.Sum256(data)
	return bootfs.Payload{Name: name, Source: source, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])}
}

func noise(n int, seed byte) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p) // never fails
	return p
}

func TestAddPayload(t *testing.T) {
	eachKind(t, func(t *testing.T, dir string) {
		f := open(t, dir)
		before := tree(t, dir)
		to := filepath.Join(dir, "memlinux")
		kernel, initrd := noise(5<<20, 1), noise(chunk+1, 2)
		files := []bootfs.Payload{payload(t, "vmlinuz-1", kernel), payload(t, "initramfs-1.img", initrd), payload(t, "empty", nil)}
		var last, total int64
		progress := func(done, all int64) {
			if done < last || total != 0 && all != total {
				t.Errorf("progress %d of %d after %d of %d", done, all, last, total)
			}
			last, total = done, all
		}
		if err := f.AddPayload(t.Context(), to, files, progress); err != nil {
			t.Fatal(err)
		}
		if want := int64(len(kernel) + len(initrd)); last != want || total != want {
			t.Errorf("progress ended at %d of %d, not %d", last, total, want)
		}
		whole := tree(t, dir)
		for name, want := range map[string][]byte{"vmlinuz-1": kernel, "initramfs-1.img": initrd, "empty": {}} {
			if got, err := os.ReadFile(filepath.Join(to, name)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s differs (%v)", name, err)
			}
		}

		t.Run("what is there stays", func(t *testing.T) {
			called := false
			if err := f.AddPayload(t.Context(), to, files, func(_, _ int64) { called = true }); err != nil || called {
				t.Errorf("written again: %v", err)
			}
		})
		t.Run("a rotten bit is repaired", func(t *testing.T) {
			rotten := bytes.Clone(kernel)
			rotten[4711] ^= 1
			write(t, filepath.Join(to, "vmlinuz-1"), rotten)
			if err := f.AddPayload(t.Context(), to, files, nil); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(whole, tree(t, dir)); diff != "" {
				t.Error(diff)
			}
		})
		t.Run("a source that is not what was named", func(t *testing.T) {
			wrong := payload(t, "vmlinuz-2", kernel)
			wrong.SHA256 = files[1].SHA256
			if err := f.AddPayload(t.Context(), to, []bootfs.Payload{wrong}, nil); err == nil {
				t.Error("it was taken")
			}
			wrong = payload(t, "vmlinuz-2", kernel)
			wrong.Size--
			if err := f.AddPayload(t.Context(), to, []bootfs.Payload{wrong}, nil); err == nil {
				t.Error("it was taken")
			}
			if diff := cmp.Diff(whole, tree(t, dir)); diff != "" {
				t.Error(diff)
			}
		})
		t.Run("cancelled", func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			err := f.AddPayload(ctx, filepath.Join(dir, "other"), []bootfs.Payload{payload(t, "vmlinuz-3", noise(9<<20, 3))}, func(done, _ int64) { cancel() })
			if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if diff := cmp.Diff(whole, tree(t, dir)); diff != "" {
				t.Error(diff)
			}
		})
		t.Run("too little space", func(t *testing.T) {
			p := payload(t, "vmlinuz-4", nil)
			free, err := f.Free()
			if err != nil {
				t.Fatal(err)
			}
			p.Size = free + 128<<20 // XFS gives back what was removed a little later
			var full *bootfs.NoSpaceError
			if err := f.AddPayload(t.Context(), filepath.Join(dir, "other"), []bootfs.Payload{p}, nil); !errors.As(err, &full) {
				t.Fatalf("got %v", err)
			}
			if full.Have < free || full.Need < p.Size+1<<20 {
				t.Errorf("need %d, have %d", full.Need, full.Have)
			}
			if diff := cmp.Diff(whole, tree(t, dir)); diff != "" {
				t.Error(diff)
			}
		})

		if err := f.RemoveDir(to); err != nil {
			t.Errorf("a folder that is not empty: %v", err)
		}
		if err := f.Remove(filepath.Join(to, "vmlinuz-1"), filepath.Join(to, "initramfs-1.img"), filepath.Join(to, "empty"), filepath.Join(to, "none"), filepath.Join(dir, "none/x")); err != nil {
			t.Fatal(err)
		}
		if err := f.RemoveDir(to); err != nil {
			t.Fatal(err)
		}
		if err := f.RemoveDir(to); err != nil {
			t.Errorf("a folder that is not there: %v", err)
		}
		if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
			t.Errorf("not as before:\n%s", diff)
		}
	})
}

const chunk = 4 << 20

// The disk gets full while something is written.
func TestFull(t *testing.T) {
	dir := mount(t, "ext4", "mkfs.ext4", "e2fsprogs", 16<<20, "-q", "-F", "-m", "0")
	f := open(t, dir)
	menu := filepath.Join(dir, "menu.lst")
	write(t, menu, []byte("old"))
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = fill.Write(make([]byte, 4096))
	}
	if err := errors.Join(fill.Sync(), fill.Close()); err != nil {
		t.Fatal(err)
	}
	before := tree(t, dir)
	err = f.Apply(t.Context(), []bootfs.Change{{Path: menu, Old: []byte("old"), New: noise(1<<20, 1)}})
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff(before, tree(t, dir)); diff != "" {
		t.Error(diff)
	}
}

func TestRecover(t *testing.T) {
	eachKind(t, func(t *testing.T, dir string) {
		f := open(t, dir)
		for _, name := range []string{".memlinux-00.tmp", "x.memlinux-0123456789abcdef.tmp", ".memlinux-0123456789abcdef.tmp.bak", "menu.lst"} {
			write(t, filepath.Join(dir, "grub", name), []byte("not ours to remove"))
		}
		if err := os.Mkdir(filepath.Join(dir, "grub/.memlinux-0123456789abcdef.tmp"), 0o755); err != nil {
			t.Fatal(err)
		}
		want := tree(t, dir)
		for _, name := range []string{".memlinux-0123456789abcde0.tmp", ".memlinux-0123456789abcde1.tmp"} {
			write(t, filepath.Join(dir, "grub", name), []byte("left"))
		}
		if err := f.Recover(filepath.Join(dir, "none"), filepath.Join(dir, "grub"), dir); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, tree(t, dir)); diff != "" {
			t.Error(diff)
		}
	})
}

// What Extents says is read from the device itself.
func TestExtents(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			dir := mount(t, k.name, k.mkfs, k.pkg, k.size, k.args...)
			device := backing(t, dir)
			path := filepath.Join(dir, "grubenv")
			if k.name == "btrfs" {
				write(t, path, noise(1024, 1))
				if _, err := bootfs.Extents(path); err == nil || !strings.Contains(err.Error(), "btrfs") {
					t.Errorf("got %v", err)
				}
				return
			}
			for _, size := range []int{0, 1, 1024, 4096, 4097, 3 << 20} {
				want := noise(size, byte(size))
				path := fmt.Sprint(path, size)
				write(t, path, want)
				if got := readExtents(t, device, path, dir); !bytes.Equal(got, want) {
					t.Errorf("the device has other bytes in the place of %d", size)
				}
			}

			// In pieces: two files that grow by turns.
			var files [2]*os.File
			for i := range files {
				f, err := os.Create(fmt.Sprint(path, "-turn", i))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				files[i] = f
			}
			want := noise(100*4096, 3)
			for at := 0; at < len(want); at += 4096 {
				for _, f := range files {
					if _, err := f.Write(want[at : at+4096]); err != nil {
						t.Fatal(err)
					}
					if err := f.Sync(); err != nil {
						t.Fatal(err)
					}
				}
			}
			extents, err := bootfs.Extents(files[0].Name())
			if err != nil || k.name != "xfs" && len(extents) < 2 {
				t.Errorf("a file in pieces has %d extents, %v", len(extents), err)
			}
			if got := readExtents(t, device, files[0].Name(), dir); !bytes.Equal(got, want) {
				t.Error("the device has other bytes in the place of a file in pieces")
			}

			for name, make := range map[string]func(f *os.File) error{
				"a hole at the start": func(f *os.File) error { _, err := f.WriteAt([]byte("x"), 1<<20); return err },
				"a hole at the end": func(f *os.File) error {
					_, err := f.Write([]byte("x"))
					return errors.Join(err, f.Truncate(1<<20))
				},
				"nothing but a hole": func(f *os.File) error { return f.Truncate(1 << 20) },
				"never written": func(f *os.File) error {
					err := unix.Fallocate(int(f.Fd()), 0, 0, 1<<20)
					if errors.Is(err, unix.EOPNOTSUPP) { // ext2, ext3
						return f.Truncate(1 << 20)
					}
					return err
				},
			} {
				f, err := os.Create(filepath.Join(dir, "sparse"))
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(make(f), f.Close()); err != nil {
					t.Fatal(err)
				}
				if e, err := bootfs.Extents(f.Name()); err == nil {
					t.Errorf("%s: %v", name, e)
				}
			}
		})
	}
	t.Run("inline data", func(t *testing.T) {
		dir := mount(t, "ext4", "mkfs.ext4", "e2fsprogs", 16<<20, "-q", "-F", "-O", "inline_data", "-I", "256")
		path := filepath.Join(dir, "small")
		write(t, path, []byte("in the inode"))
		if e, err := bootfs.Extents(path); err == nil || !strings.Contains(err.Error(), "metadata") {
			t.Errorf("got %v, %v", e, err)
		}
	})
}

func readExtents(t *testing.T, device, path, dir string) []byte {
	t.Helper()
	extents, err := bootfs.Extents(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := open(t, dir).Settle(); err != nil {
		t.Fatal(err)
	}
	d, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	all := []byte{}
	for _, e := range extents {
		if e.Offset != int64(len(all)) {
			t.Fatalf("a gap: %v", extents)
		}
		p := make([]byte, e.Length)
		if _, err := d.ReadAt(p, e.Physical); err != nil {
			t.Fatal(err)
		}
		all = append(all, p...)
	}
	return all
}

// A journal that is settled is empty: a copy of the disk made then, and not
// replayed, has everything.
func TestSettleEmptiesTheJournal(t *testing.T) {
	fstest := need.Tool(t, "grub-fstest", "grub-common")
	eachKind(t, func(t *testing.T, dir string) {
		f := open(t, dir)
		device := backing(t, dir)
		want := noise(100_000, 9)
		write(t, filepath.Join(dir, "sub/new"), want)
		if err := f.Settle(); err != nil {
			t.Fatal(err)
		}
		got, err := exec.Command(fstest, device, "cat", "/sub/new").Output()
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("GRUB reads %d bytes, %v", len(got), err)
		}
	})
}

// Writes must go on after whatever happens to the process that freezes.
func mustNotBeFrozen(t *testing.T, dir string) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- os.WriteFile(filepath.Join(dir, "thawed?"), []byte("yes"), 0o644) }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(20 * time.Second):
		// Or nothing here ends any more.
		out, err := exec.Command("fsfreeze", "-u", dir).CombinedOutput()
		t.Fatalf("%s is frozen; thawing it: %v %s", dir, err, out)
	}
	if err := os.Remove(filepath.Join(dir, "thawed?")); err != nil {
		t.Fatal(err)
	}
}
