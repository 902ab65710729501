package grub

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/testvm/need"
)

var update = flag.Bool("update", false, "write the golden files")

const volumeID = 0x1234abcd

func TestConfigs(t *testing.T) {
	for name, got := range map[string]string{"bios": biosConfig(volumeID), "efi": efiConfig(volumeID)} {
		path := filepath.Join("testdata", name+".cfg.golden")
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
	}
}

func TestVolumeUUID(t *testing.T) {
	for id, want := range map[uint32]string{0: "0000-0000", 0xab: "0000-00AB", 0x1234abcd: "1234-ABCD"} {
		if got := VolumeUUID(id); got != want {
			t.Errorf("VolumeUUID(%#x) = %s, not %s", id, got, want)
		}
	}
}

// needGRUB makes both boot files.
func needGRUB(t *testing.T) (BIOS, []byte) {
	t.Helper()
	need.Tool(t, "grub-mkimage", "grub-common")
	need.File(t, biosDir+"/boot.img", "grub-pc-bin")
	need.File(t, efiDir+"/moddep.lst", "grub-efi-amd64-bin")
	bios, err := MakeBIOS(t.Context(), nil, volumeID)
	if err != nil {
		t.Fatal(err)
	}
	efi, err := MakeEFI(t.Context(), nil, volumeID)
	if err != nil {
		t.Fatal(err)
	}
	return bios, efi
}

func TestSameInputSameBytes(t *testing.T) {
	bios, efi := needGRUB(t)
	bios2, efi2 := needGRUB(t)
	if !bytes.Equal(bios.boot, bios2.boot) || !bytes.Equal(bios.core, bios2.core) || !bytes.Equal(efi, efi2) {
		t.Error("two runs gave different bytes")
	}
	other, err := MakeBIOS(t.Context(), nil, volumeID+1)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(bios.core, other.core) {
		t.Error("another volume ID gave the same core.img")
	}
	t.Logf("core.img %d bytes, %d sectors; BOOTX64.EFI %d bytes", len(bios.core), sectors(bios.core), len(efi))
}

// fakeMkimage puts another grub-mkimage, a shell script, in the PATH.
func fakeMkimage(t *testing.T, script string) image {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "grub-mkimage"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	// The user nobody must get at it.
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	return image{format: "x", dir: efiDir, pkg: "grub-efi-amd64-bin", config: "the config\n"}
}

func TestNobodyRunsMkimage(t *testing.T) {
	need.Root(t)
	need.File(t, efiDir+"/moddep.lst", "grub-efi-amd64-bin")
	got, err := fakeMkimage(t, "id -u; id -g; id -G; pwd; cat /proc/self/fd/0\n").make(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := "65534\n65534\n65534\n/\nthe config\n"; string(got) != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCancelKillsMkimageAndItsChildren(t *testing.T) {
	need.File(t, efiDir+"/moddep.lst", "grub-efi-amd64-bin")
	im := fakeMkimage(t, "sleep 60 & sleep 60\n")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := im.make(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	// A child that lived on would hold its stderr open until WaitDelay.
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("it took %v", d)
	}
}

func TestMissing(t *testing.T) {
	var missing *MissingError
	if err := present(t.TempDir(), "boot.img", "grub-pc-bin"); !errors.As(err, &missing) || missing.Package != "grub-pc-bin" {
		t.Errorf("a missing folder: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	_, err := MakeEFI(t.Context(), nil, volumeID)
	if !errors.As(err, &missing) || missing.Name != "grub-mkimage" || missing.Package != "grub-common" {
		t.Errorf("no grub-mkimage: %v", err)
	}
}

func TestCancelled(t *testing.T) {
	needGRUB(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := MakeBIOS(ctx, nil, volumeID); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestMkimageFails(t *testing.T) {
	needGRUB(t)
	_, err := image{"i386-pc", biosDir, "", "/", "", []string{"no-such-module"}}.make(t.Context(), nil)
	if err == nil || !strings.Contains(err.Error(), "no-such-module") {
		t.Errorf("its message is lost: %v", err)
	}
}

func TestEmbedRefuses(t *testing.T) {
	if _, _, err := (BIOS{}).Embed(34); err == nil {
		t.Error("the zero BIOS: no error")
	}
	if _, _, err := (BIOS{make([]byte, 512), make([]byte, 1024)}).Embed(0); err == nil {
		t.Error("LBA 0: no error")
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

const (
	coreLBA   = 34
	espLBA    = 2048
	diskBytes = 64 << 20
)

// gptDisk makes a disk with the two partitions, both empty.
func gptDisk(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, diskBytes); err != nil {
		t.Fatal(err)
	}
	run(t, need.Tool(t, "sgdisk", "gdisk"), "-a1", fmt.Sprintf("-n1:%d:%d", coreLBA, espLBA-1), "-t1:ef02",
		fmt.Sprintf("-n2:%d:0", espLBA), "-t2:ef00", path)
}

// embed writes GRUB for a BIOS on a disk, as media will.
func embed(t *testing.T, bios BIOS, path string) {
	t.Helper()
	boot, core, err := bios.Embed(coreLBA)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	if _, err := disk.ReadAt(boot[bootKept:bootSignature], bootKept); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.WriteAt(boot, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.WriteAt(core, coreLBA*sectorSize); err != nil {
		t.Fatal(err)
	}
}

// TestSameAsGrubBiosSetup holds the disk's first MiB against what GRUB's own
// installer writes.
func TestSameAsGrubBiosSetup(t *testing.T) {
	need.Root(t)
	setup := need.File(t, biosDir+"/grub-bios-setup", "grub-pc-bin")
	mke2fs, mount, umount := need.Tool(t, "mke2fs", "e2fsprogs"), need.Tool(t, "mount", "mount"), need.Tool(t, "umount", "mount")
	bios, _ := needGRUB(t)
	dir := t.TempDir()
	ours, theirs := filepath.Join(dir, "ours.img"), filepath.Join(dir, "theirs.img")
	gptDisk(t, ours)
	data, err := os.ReadFile(ours)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(theirs, data, 0o600); err != nil {
		t.Fatal(err)
	}
	embed(t, bios, ours)

	// grub-bios-setup wants to know the disk under its folder: give it one of
	// the test's own.
	files, root := filepath.Join(dir, "files"), filepath.Join(dir, "root.img")
	if err := os.Mkdir(files, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"boot.img": bios.boot, "core.img": bios.core} {
		if err := os.WriteFile(filepath.Join(files, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run(t, mke2fs, "-q", "-t", "ext4", "-d", files, root, "8M")
	loop := need.Loop(t, root, "512")
	mnt, deviceMap := filepath.Join(dir, "mnt"), filepath.Join(dir, "device.map")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, mount, "-t", "ext4", loop, mnt)
	t.Cleanup(func() {
		if out, err := exec.Command(umount, mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	if err := os.WriteFile(deviceMap, []byte("(hd0) "+theirs+"\n(hd1) "+loop+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, setup, "-s", "--no-rs-codes", "-d", mnt, "-m", deviceMap, "(hd0)")

	a, err := os.ReadFile(ours)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(theirs)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(a[:512], data[:512]) {
		t.Fatal("nothing was embedded")
	}
	for i := range a {
		if a[i] != b[i] {
			t.Fatalf("byte %#x is %#x, by grub-bios-setup %#x", i, a[i], b[i])
		}
	}
}
