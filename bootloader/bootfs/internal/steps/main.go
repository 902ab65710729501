// steps does to a file system what an installation of a boot entry does, and
// its removal. Tests kill it, and cut the power of the virtual machine that it
// is the first process of.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"golang.org/x/sys/unix"
)

// The system calls of a run are counted by thread: have one.
func init() { runtime.LockOSThread() }

func main() {
	if os.Getpid() == 1 {
		guest()
	}
	if len(os.Args) != 4 || os.Args[3] != "install" && os.Args[3] != "remove" {
		fmt.Fprintln(os.Stderr, "usage: steps FOLDER SOURCE install|remove")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "steps:", err)
		os.Exit(1)
	}
}

// run brings the boot files in dir to what they are after an installation or a
// removal, whatever a run before left. The contents come from the folder source.
func run(dir, source, verb string) error {
	ctx := context.Background()
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(source, name))
		if err != nil {
			panic(err)
		}
		return data
	}
	payloadDir := filepath.Join(dir, "memlinux")
	menu := func(name string) string { return filepath.Join(dir, "grub", name) }
	changes := []bootfs.Change{
		{Path: filepath.Join(payloadDir, "menu-1.lst"), New: read("menu-1.lst")},
		{Path: menu("custom.cfg"), New: read("custom.cfg")},
		{Path: menu("menu.lst"), Old: read("menu.lst.old"), New: read("menu.lst.new")},
		{Path: menu("grubenv"), Old: read("grubenv.old"), New: read("grubenv.new"), Kind: bootfs.InPlace},
	}
	var payload []bootfs.Payload
	for _, name := range []string{"vmlinuz", "initramfs"} {
		data := read(name)
		sum := sha256.Sum256(data)
		payload = append(payload, bootfs.Payload{Name: name, Source: filepath.Join(source, name), Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])})
	}

	f, err := bootfs.Open(dir)
	if err != nil {
		return err
	}
	if err := f.Recover(payloadDir, filepath.Join(dir, "grub")); err != nil {
		return err
	}
	if verb == "install" {
		if err := f.AddPayload(ctx, payloadDir, payload, nil); err != nil {
			return err
		}
		return f.Apply(ctx, todo(changes))
	}
	slices.Reverse(changes)
	for i, c := range changes {
		changes[i].Old, changes[i].New = c.New, c.Old
	}
	if err := f.Apply(ctx, todo(changes)); err != nil {
		return err
	}
	if err := f.Remove(filepath.Join(payloadDir, "vmlinuz"), filepath.Join(payloadDir, "initramfs")); err != nil {
		return err
	}
	return f.RemoveDir(payloadDir)
}

// todo is the changes that are not made yet.
func todo(changes []bootfs.Change) []bootfs.Change {
	var rest []bootfs.Change
	for _, c := range changes {
		is, err := os.ReadFile(c.Path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			panic(err)
		}
		if bytes.Equal(is, c.New) && (err == nil) == (c.New != nil) {
			continue
		}
		rest = append(rest, c)
	}
	return rest
}

// guest is the first process of a virtual machine: it loads the modules in
// /modules, mounts /dev/vda, installs, removes, and turns the machine off. The
// last line says how it went.
func guest() {
	err := func() error {
		for _, dir := range []string{"/dev", "/proc", "/boot"} {
			_ = os.Mkdir(dir, 0o700)
		}
		if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
			return err
		}
		if err := unix.Mount("dev", "/dev", "devtmpfs", 0, ""); err != nil {
			return err
		}
		// It started without a console where the initramfs has no /dev/console.
		console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		os.Stdout, os.Stderr = console, console
		if err := modules(); err != nil {
			return err
		}
		cmdline, err := os.ReadFile("/proc/cmdline")
		if err != nil {
			return err
		}
		_, kind, _ := strings.Cut(string(cmdline), "steps.type=")
		kind, _, _ = strings.Cut(strings.TrimSpace(kind), " ") // OVMF adds initrd=
		if kind == "efivarfs" {
			return variables()
		}
		for range 100 {
			if err = unix.Mount("/dev/vda", "/boot", kind, 0, ""); !errors.Is(err, os.ErrNotExist) {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if err != nil {
			return fmt.Errorf("mount: %w", err)
		}
		for _, verb := range []string{"install", "remove"} {
			if err := run("/boot", "/source", verb); err != nil {
				return fmt.Errorf("%s: %w", verb, err)
			}
			fmt.Println("STEPS did", verb)
			if err := extents("/boot/grub/grub.cfg", kind); err != nil {
				return err
			}
		}
		return nil
	}()
	if err != nil {
		fmt.Println("STEPS failed:", err)
	} else {
		fmt.Println("STEPS done")
	}
	// Not unmounted: the disk is as a cut at the very end would leave it.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// extents reads the file from the disk itself, where bootfs says that it lies.
func extents(path, kind string) error {
	places, err := bootfs.Extents(path)
	if kind == "btrfs" {
		if err == nil {
			return fmt.Errorf("btrfs told where %s lies: %v", path, places)
		}
		return nil
	}
	if err != nil {
		return err
	}
	want, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	disk, err := os.Open("/dev/vda")
	if err != nil {
		return err
	}
	defer disk.Close()
	var got []byte
	for _, e := range places {
		p := make([]byte, e.Length)
		if _, err := disk.ReadAt(p, e.Physical); err != nil {
			return err
		}
		got = append(got, p...)
	}
	if len(want) == 0 || !bytes.Equal(got, want) {
		return fmt.Errorf("%s does not lie at %v", path, places)
	}
	return nil
}

// variables makes, changes and removes an EFI variable.
func variables() error {
	if err := unix.Mount("efivarfs", "/boot", "efivarfs", 0, ""); err != nil {
		return err
	}
	const path = "/boot/LoaderEntryOneShot-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
	long := append([]byte{7, 0, 0, 0}, bytes.Repeat([]byte("a\x00"), 500)...)
	contents := [][]byte{nil, []byte("\x07\x00\x00\x00a\x00\x00\x00"), long, []byte("\x07\x00\x00\x00b\x00\x00\x00"), nil, long}
	for i, content := range contents[1:] {
		change := bootfs.Change{Path: path, Old: contents[i], New: content, Kind: bootfs.Variable}
		if err := new(bootfs.FS).Apply(context.Background(), []bootfs.Change{change}); err != nil {
			return fmt.Errorf("change %d of a variable: %w", i, err)
		}
		// Again: it is not as it was.
		err := new(bootfs.FS).Apply(context.Background(), []bootfs.Change{change})
		if changed := new(bootfs.ChangedError); !errors.As(err, &changed) {
			return fmt.Errorf("change %d of a variable again: %w", i, err)
		}
		is, err := os.ReadFile(path)
		if !bytes.Equal(is, content) || errors.Is(err, os.ErrNotExist) != (content == nil) {
			return fmt.Errorf("the variable is %q after change %d, %w", is, i, err)
		}
	}
	return nil
}

// modules loads what is in /modules, in any order that works.
func modules() error {
	files, _ := filepath.Glob("/modules/*.ko") // the pattern is right
	for len(files) > 0 {
		var rest []string
		var last error
		for _, path := range files {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
				rest, last = append(rest, path), fmt.Errorf("%s: %w", path, err)
			}
			f.Close()
		}
		if len(rest) == len(files) {
			return last
		}
		files = rest
	}
	return nil
}
