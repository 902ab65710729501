package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// TestMain lets a test run a piece of itself in another mount namespace.
func TestMain(m *testing.M) {
	if name := os.Getenv("BLOCKDEV_OPEN"); name != "" {
		if err := openUnmounting(name, os.Getenv("BLOCKDEV_UNMOUNT")); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func openUnmounting(name, point string) error {
	ctx := context.Background()
	f, d, err := System{}.OpenRead(ctx, name)
	if err != nil {
		return err
	}
	tok, err := d.Token(f)
	f.Close()
	if err != nil {
		return err
	}
	disk, err := System{}.OpenOn(ctx, name, tok, Terms{Unmount: []string{point}})
	if err != nil {
		return err
	}
	return disk.Close()
}

// mountedLoop makes a loop device with an ext4 that is mounted.
func mountedLoop(t *testing.T) (name, point string) {
	t.Helper()
	mkfs := need.Tool(t, "mkfs.ext4", "e2fsprogs")
	name = loop(t, 16*mib, "512")
	run(t, mkfs, "-q", "/dev/"+name)
	return name, mountAt(t, "/dev/"+name, "ext4", t.TempDir())
}

// mountAt mounts until the test ends, or until somebody else unmounts it.
func mountAt(t *testing.T, source, fstype, point string) string {
	t.Helper()
	if err := unix.Mount(source, point, fstype, 0, ""); err != nil {
		t.Fatalf("mount %s as %s: %v", source, fstype, err)
	}
	t.Cleanup(func() {
		for unix.Unmount(point, unix.MNT_DETACH) == nil {
		}
	})
	return point
}

func isMounted(t *testing.T, point string) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := parseMountinfo(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(mounts, func(m mount) bool { return m.point == point })
}

// background starts a command that ends with the test or by the returned function.
func background(t *testing.T, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(stop)
	return stop
}

func TestIsSystem(t *testing.T) {
	for point, want := range map[string]bool{
		"/": true, "/boot": true, "/boot/efi": true, "/boot/firmware": true, "/efi": true, "/usr": true, "/usr/local": true, "/var": true, "/var/lib/x": true,
		"/home": true, "/home/ann": true, "/home/ann/stick": false, "/var/home/ann": true, "/etc/hosts": true, "/nix/store": true, "/root": true, "/root/x": false,
		"/run/live/medium": true, "/lib/live/mount/medium": true, "/run/archiso/bootmnt": true, "/cdrom": true, "/run/initramfs/live": true, "/sysroot": true,
		"/mnt": false, "/mnt/x": false, "/var/mnt/x": false, "/media/ann/X": false, "/run/media/ann/X": false, "/var/run/media/ann/X": false, "/media/root-ro": true,
		"/tmp": true, "/tmp/x": false, "/data": false, "/bootx": false, "/variable": false, "/homes": false, "/srv": true, "/srv/data": false, "": false,
	} {
		if got := isSystem(point); got != want {
			t.Errorf("%q: %v", point, got)
		}
	}
}

func TestMountsOfMachines(t *testing.T) {
	for _, c := range []struct {
		what, machine, disk string
		want                []Mount
	}{
		{"automounted, twice", "laptop", "sdaa", []Mount{{"sdaa1", "/media/ann/PHOTOS", "vfat", true}, {"sdaa1", "/media/ann/two words", "vfat", true}}},
		{"the system is nobody's to unmount", "laptop", "nvme0n1", []Mount{{"dm-1", "/", "ext4", false}, {"nvme0n1p1", "/boot/efi", "vfat", false}}},
		{"Fedora's place", "fedora-btrfs", "sda", []Mount{{"sda1", "/run/media/ann/STICK", "vfat", true}}},
		{"through LUKS", "unlocked-stick", "sda", []Mount{{"dm-3", "/media/ann/SECRET", "ext4", true}}},
		{"in both namespaces", "other-namespace", "sdb", []Mount{{"sdb1", "/media/ann/STICK", "vfat", true}}},
		{"in the first process's namespace alone", "other-namespace", "sdc", []Mount{{"sdc", "/data", "ext4", false}}},
		{"btrfs by its other device", "btrfs-data", "sdc", []Mount{{"sdc1", "/data", "btrfs", false}}},
		{"a live system's medium below /media", "alpine-diskless", "sda", []Mount{{"sda1", "/media/usb", "vfat", true}}},
		{"control characters stay for the caller", "hostile-names", "sda", []Mount{{"dm-0", "/media/ann/\x1b[31mA\nB", "ext4", true}}},
		{"nothing", "laptop", "sda", nil},
	} {
		t.Run(c.what, func(t *testing.T) {
			got, err := machine(t, c.machine).Mounts(t.Context(), c.disk)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("mounts (-want +got):\n%s", diff)
			}
		})
	}
	if _, err := machine(t, "laptop").Mounts(t.Context(), "sdq"); !errors.Is(err, ErrNoDevice) {
		t.Errorf("no such disk: %v", err)
	}
}

// A desktop mounts what it sees and udev hears of it only unlocked: between the
// unmounting and the claim there must be no moment for that.
func TestUnmountAndOpen(t *testing.T) {
	name, point := mountedLoop(t)
	if err := os.WriteFile(filepath.Join(point, "file"), []byte("not yet on the disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	mounts, err := System{}.Mounts(t.Context(), name)
	if err != nil || !slices.Equal(mounts, []Mount{{name, point, "ext4", false}}) {
		t.Fatalf("mounts %+v: %v", mounts, err)
	}
	tok := token(t, name)
	wantRefused(t, name, ReasonMounted)
	if _, err := (System{}).OpenOn(t.Context(), name, tok, Terms{Unmount: []string{point + "x", "/"}}); !isRefused(err, ReasonMounted) {
		t.Errorf("other points: %v", err)
	}
	_, err = System{}.OpenOn(t.Context(), name, strings.Repeat("0", len(tok)), Terms{Unmount: []string{point}})
	var changed *ChangedError
	if !errors.As(err, &changed) {
		t.Errorf("another disk's token: %v", err)
	}
	if !isMounted(t, point) {
		t.Fatal("what was refused is unmounted")
	}

	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan int)
	go func() {
		remounted := 0
		defer func() { ended <- remounted }()
		for ctx.Err() == nil {
			if isMounted(t, point) {
				continue
			}
			f, err := os.Open("/dev/" + name)
			if err != nil {
				continue
			}
			if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil && unix.Mount("/dev/"+name, point, "ext4", 0, "") == nil {
				remounted++
			}
			f.Close()
		}
	}()
	d, err := System{}.OpenOn(t.Context(), name, tok, Terms{Unmount: []string{point}})
	time.Sleep(50 * time.Millisecond)
	stop()
	if n := <-ended; n != 0 {
		t.Errorf("it was mounted again %d times", n)
	}
	if err != nil {
		t.Fatal(err)
	}
	if isMounted(t, point) {
		t.Error("it is still mounted")
	}
	if _, err := d.WriteAt(make([]byte, 64<<10), 0); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	f, err := os.Open("/dev/" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("the lock is still held after Close: %v", err)
	}
}

func TestUnmountBusy(t *testing.T) {
	name, point := mountedLoop(t)
	if err := os.WriteFile(filepath.Join(point, "file"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	sleep, inside := need.Tool(t, "sleep", "coreutils"), filepath.Join(point, "inside")
	run(t, need.Tool(t, "cp", "coreutils"), sleep, filepath.Join(point, "program"))
	if err := os.Mkdir(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	tok := token(t, name)
	file := func(t *testing.T) *os.File {
		f, err := os.Open(filepath.Join(point, "file"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	for what, start := range map[string]func(t *testing.T) *exec.Cmd{
		"working folder": func(*testing.T) *exec.Cmd {
			c := exec.Command(sleep, "1000")
			c.Dir = point
			return c
		},
		"open file": func(t *testing.T) *exec.Cmd {
			c := exec.Command(sleep, "1000")
			c.Stdin = file(t)
			return c
		},
		"program": func(*testing.T) *exec.Cmd { return exec.Command(filepath.Join(point, "program"), "1000") },
	} {
		t.Run(what, func(t *testing.T) {
			cmd := start(t)
			stop := background(t, cmd)
			if cmd.Stdin != nil {
				cmd.Stdin.(*os.File).Close()
			}
			_, err := System{}.OpenOn(t.Context(), name, tok, Terms{Unmount: []string{point}})
			if !isRefused(err, ReasonBusy) || !strings.Contains(err.Error(), fmt.Sprintf("(%d)", cmd.Process.Pid)) || !strings.Contains(err.Error(), filepath.Base(cmd.Path)) {
				t.Errorf("error %v", err)
			}
			if !isMounted(t, point) {
				t.Fatal("it was unmounted under the program")
			}
			stop()
		})
	}
	t.Run("mapped file of our own", func(t *testing.T) {
		f := file(t)
		p, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		_, err = System{}.OpenOn(t.Context(), name, tok, Terms{Unmount: []string{point}})
		if !isRefused(err, ReasonBusy) || !strings.Contains(err.Error(), fmt.Sprintf("(%d)", os.Getpid())) {
			t.Errorf("error %v", err)
		}
		if err := unix.Munmap(p); err != nil {
			t.Error(err)
		}
	})
	t.Run("another mount inside", func(t *testing.T) {
		mountAt(t, "tmpfs", "tmpfs", inside)
		_, err := System{}.OpenOn(t.Context(), name, tok, Terms{Unmount: []string{point}})
		if !isRefused(err, ReasonBusy) || !strings.Contains(err.Error(), Clean(inside)) || !isMounted(t, point) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("cancelled while it waits", func(t *testing.T) {
		c := exec.Command(sleep, "1000")
		c.Dir = point
		background(t, c)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := (System{}).OpenOn(ctx, name, tok, Terms{Unmount: []string{point}}); !errors.Is(err, context.DeadlineExceeded) || !isMounted(t, point) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("only for a moment", func(t *testing.T) {
		c := exec.Command(sleep, "0.2")
		c.Dir = point
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error)
		go func() { ended <- c.Wait() }()
		d, err := System{}.OpenOn(t.Context(), name, tok, Terms{Unmount: []string{point}})
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestUnmountSeveral(t *testing.T) {
	name, point := mountedLoop(t)
	inner := filepath.Join(point, "inner")
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	other := t.TempDir()
	for _, target := range []string{inner, other, other} { // one inside of itself, two over each other
		if err := unix.Mount(point, target, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	}
	tok := token(t, name)
	if _, err := (System{}).OpenOn(t.Context(), name, tok, Terms{Unmount: []string{point}}); !isRefused(err, ReasonMounted) {
		t.Errorf("one of three points: %v", err)
	}
	if !isMounted(t, point) || !isMounted(t, inner) || !isMounted(t, other) {
		t.Fatal("what was refused is unmounted")
	}
	d, err := System{}.OpenOn(t.Context(), name, tok, Terms{Unmount: []string{point, inner, other, "/not/mounted"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// A service has mounts of its own, which follow the machine's but not the other way
// round: what is unmounted there must be unmounted for the user.
func TestUnmountFromService(t *testing.T) {
	unshare, mkfs := need.Tool(t, "unshare", "util-linux"), need.Tool(t, "mkfs.ext4", "e2fsprogs")
	name := loop(t, 16*mib, "512")
	run(t, mkfs, "-q", "/dev/"+name)
	point := t.TempDir()
	// A machine within the machine: its first process, and a service below it.
	script := `mount --make-rshared / && mount "$0" "$1" || exit 9
		unshare --mount --propagation slave "$2" || exit 8
		grep -qF " $1 " /proc/self/mountinfo && exit 7
		exit 0`
	cmd := exec.Command(unshare, "--mount", "--pid", "--fork", "--mount-proc", need.Tool(t, "sh", "dash"), "-c", script, "/dev/"+name, point, os.Args[0])
	cmd.Env = append(os.Environ(), "BLOCKDEV_OPEN="+name, "BLOCKDEV_UNMOUNT="+point)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestMountedElsewhere(t *testing.T) {
	unshare, sleep := need.Tool(t, "unshare", "util-linux"), need.Tool(t, "sleep", "coreutils")
	name, point := mountedLoop(t)
	ready := filepath.Join(t.TempDir(), "ready")
	cmd := exec.Command(unshare, "--mount", "--propagation", "private", need.Tool(t, "sh", "dash"), "-c", `: > "$0"; exec "$1" 1000`, ready, sleep)
	background(t, cmd)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(ready); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the namespace was not made")
		}
	}
	_, err := System{}.OpenOn(t.Context(), name, token(t, name), Terms{Unmount: []string{point}})
	if !isRefused(err, ReasonBusy) || !strings.Contains(err.Error(), fmt.Sprintf("(%d)", cmd.Process.Pid)) {
		t.Errorf("with the other's copy: %v", err)
	}
	if isMounted(t, point) {
		t.Error("our own is still mounted")
	}
	// Now no mount of it is left that sysfs, our own or the first process's mounts tell.
	if _, err := (System{}).Open(t.Context(), name, token(t, name)); !isRefused(err, ReasonBusy) {
		t.Errorf("mounted for others only: %v", err)
	}
}

func TestBtrfsOverTwo(t *testing.T) {
	mkfs := need.Tool(t, "mkfs.btrfs", "btrfs-progs")
	first, second, third := loop(t, 128*mib, "512"), loop(t, 128*mib, "512"), loop(t, 128*mib, "512")
	run(t, mkfs, "-q", "-d", "raid1", "-m", "raid1", "/dev/"+first, "/dev/"+second)
	point := mountAt(t, "/dev/"+first, "btrfs", t.TempDir())
	for _, name := range []string{first, second} {
		wantRefused(t, name, ReasonMounted)
	}
	if d, err := (System{}).Device(t.Context(), third); err != nil || len(d.Reasons) != 0 {
		t.Errorf("a third disk: %v, %v", d.Reasons, err)
	}

	mounts, err := System{}.Mounts(t.Context(), second)
	if err != nil || len(mounts) != 1 || mounts[0].Point != point {
		t.Fatalf("mounts %+v: %v", mounts, err)
	}
	d, err := System{}.OpenOn(t.Context(), second, token(t, second), Terms{Unmount: []string{point}})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if isMounted(t, point) {
		t.Error("it is still mounted")
	}
}
