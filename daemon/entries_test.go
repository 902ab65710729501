package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/bootloader/install"
	"github.com/memlinux/memlinux/bootloader/local"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/testvm"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/pc"
)

// What local says makes systemd-boot take an entry once is what testvm gives the
// firmware's variables. (The other loaders are proven through the command line:
// this machine's kernel may have no driver for FAT.)
func TestProofThroughSystemdBoot(t *testing.T) {
	need.Root(t)
	mcopy := need.Tool(t, "mcopy", "mtools")
	kernel, config := need.Kernel(t)
	p := pc.Bare(t, pc.Spec{Loader: pc.SystemdBoot, Kernel: kernel, Config: config})
	volume := fmt.Sprintf("%s@@%d", p.Disk, p.ESP.Start)
	root := t.TempDir()
	esp := filepath.Join(root, "efi")
	for path, text := range map[string]string{
		"proc/self/mountinfo": "20 1 8:2 / / rw - ext4 /dev/sda2 rw\n21 20 8:1 / /efi rw - vfat /dev/sda1 rw\n",
		"sys/firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f":     variable("systemd-boot 252.39"),
		"sys/firmware/efi/efivars/LoaderFeatures-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f": "\x06\x00\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00",
		"boot/.keep": "",
		"efi/.keep":  "",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(mcopy, "-s", "-n", "-i", volume, "::/*", esp).CombinedOutput(); err != nil {
		t.Fatalf("mcopy: %v: %s", err, out)
	}
	b, err := local.Find(t.Context(), local.System{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	if b.Name() != "systemd-boot" || b.Firmware != "uefi" {
		t.Fatalf("found %s, %s", b.Name(), b.Firmware)
	}

	sys, err := imagegen.Generator{CacheDir: need.Cache(t)}.Build(t.Context(), imagegen.Recipe{
		Kernel: imagegen.KernelSource{File: open(t, kernel)}, Modules: []string{"none"}, Boot: []string{"uefi"}}, func(string, int64, int64) {})
	if err != nil {
		t.Fatal(err)
	}
	m := sys.Manifest
	e := local.Entry{ID: m.ID, Title: "memlinux", Cmdline: m.BootLine()}
	e.Kernel, e.Initrd = install.PayloadNames(digestOf(t, sys.Kernel.Path), digestOf(t, sys.Initramfs.Path))
	res, err := install.Preview(b, install.Request{Entry: e})
	if err != nil {
		t.Fatal(err)
	}
	put := func(from, to string) {
		t.Helper()
		if dir := filepath.Dir(to); dir != "/" {
			_ = exec.Command("mmd", "-i", volume, "::"+dir).Run() // it may be there
		}
		if out, err := exec.Command(mcopy, "-o", "-i", volume, from, "::"+to).CombinedOutput(); err != nil {
			t.Fatalf("mcopy %s: %v: %s", to, err, out)
		}
	}
	onESP := func(path string) string { return strings.TrimPrefix(path, esp) }
	put(sys.Kernel.Path, onESP(filepath.Join(b.Dir, e.Kernel)))
	put(sys.Initramfs.Path, onESP(filepath.Join(b.Dir, e.Initrd)))
	for _, c := range res.Changes {
		if !strings.HasPrefix(c.Path, esp+"/") {
			t.Errorf("without a default or next, the plan changes %s", c.Path)
			continue
		}
		if err := os.WriteFile(c.Path, c.New, 0o600); err != nil {
			t.Fatal(err)
		}
		put(c.Path, onESP(c.Path))
	}

	once, err := b.Once(m.ID)
	if err != nil {
		t.Fatal(err)
	}
	if len(once.Files) != 0 || len(once.Variables) == 0 {
		t.Fatalf("once: %+v", once)
	}
	before := digestOf(t, p.Disk)
	disk := open(t, p.Disk)
	info, err := disk.Stat()
	if err != nil {
		t.Fatal(err)
	}
	machine := testvm.Machine{Firmware: testvm.UEFI, Disk: disk, DiskSize: info.Size(), SectorSize: 512, Bus: testvm.AHCI, MemoryMiB: 512, Dir: t.TempDir()}
	for _, v := range once.Variables {
		machine.Variables = append(machine.Variables, testvm.Variable(v))
	}
	want := expect(m)
	want.Local = true
	verdict, err := testvm.Prove(t.Context(), machine, want, nil)
	if err != nil || !verdict.OK || !verdict.Shell {
		t.Fatalf("%+v, %v", verdict, err)
	}
	if now := digestOf(t, p.Disk); now != before {
		t.Error("the proof changed the disk")
	}
}

// variable is one of systemd-boot's with a string, as efivarfs has it.
func variable(text string) string {
	b := []byte{6, 0, 0, 0}
	for _, c := range []byte(text + "\x00") {
		b = append(b, c, 0)
	}
	return string(b)
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256(text)
	return hex.EncodeToString(digest[:])
}
