// Package pc makes whole PCs for tests: the image of a disk with firmware's
// first sectors, a boot loader as its distribution installs it, and a system,
// and runs them in QEMU from power-on to power-off, reboots included.
//
// [Bare] makes one in two seconds whose system is a busybox shell on the serial
// console; [Build] makes one with Debian, systemd and D-Bus, in which scripts
// of the test run. No loop device is needed: file systems are filled by mke2fs
// -d and mtools. What must be fetched lies in need.Cache.
package pc

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/nspawn"
)

// Loader is the boot loader of a PC.
type Loader string

// The boot loaders. GRUB2BIOS: ext4 on an MBR disk, core.img behind the MBR.
// GRUB2BIOSGPT: the same on a GPT disk, core.img in a BIOS boot partition.
// GRUBLegacy: 0.97 on ext3 with stage1_5 behind the MBR. GRUB2UEFI: GRUB's own
// build in EFI/debian and EFI/BOOT of the ESP at /boot/efi, all else on ext4.
// SystemdBoot: systemd-boot with kernel and entries on the ESP.
const (
	GRUB2BIOS    Loader = "grub2-bios"
	GRUB2BIOSGPT Loader = "grub2-bios-gpt"
	GRUBLegacy   Loader = "grub-legacy"
	GRUB2UEFI    Loader = "grub2-uefi"
	SystemdBoot  Loader = "systemd-boot"
)

// The firmwares, as testvm writes them, too.
const bios, uefi = "bios", "uefi"

// Spec is what a PC shall be.
type Spec struct {
	Loader Loader
	// SeparateBoot gives /boot a file system of its own. With systemd-boot that
	// is the ESP, which otherwise is at /efi.
	SeparateBoot bool
	// Kernel is a bzImage for the PC's system, which lies in /boot under its
	// release, and Config its configuration, which lies beside it. Initrd is its
	// initramfs; where it is "" there is none, and the kernel needs its disk's
	// driver and ext4 built in: need.Kernel does for a bare PC with an NVMe disk.
	// Only GRUB 2 is told of an initramfs.
	Kernel, Config, Initrd string
	// Tree is a folder that is laid over the system's root, such as what make
	// install made; "" for none.
	Tree string
	// Files are more files for the system: their path to the host's file.
	Files map[string]string
}

// Partition is one of a PC's, with a file system on it.
type Partition struct {
	Number int    // from 1; 0 where there is no such partition
	Start  int64  // bytes from the disk's start
	Size   int64  // bytes
	Type   string // ext4, ext3 or vfat
	UUID   string // of the file system, as blkid writes it
	// PartUUID is what the kernel's root=PARTUUID= takes.
	PartUUID string
}

// PC is a disk that boots.
type PC struct {
	Disk     string // path of the raw image, sparse; sectors of 512 bytes
	Firmware string // bios or uefi
	Loader   Loader
	Release  string // of the kernel: /boot/vmlinuz-RELEASE
	Root     Partition
	Boot     Partition // where /boot is a file system of its own and not the ESP
	ESP      Partition // with UEFI
	ESPMount string    // /boot/efi, /efi or /boot

	machineID string
	diskID    string // MBR disk signature, 8 hex digits
	console   string // words of the kernel's command line
	initrd    bool   // there is /boot/initrd.img-RELEASE
}

// Build makes a PC with the Debian of package nspawn, in which [Start] runs
// scripts. It needs root and the network when that Debian is not in need.Cache yet;
// some 10 s else.
func Build(t testing.TB, s Spec) *PC {
	t.Helper()
	tools(t, s)
	from := nspawn.Tree(t)
	return assemble(t, s, sizes{root: 1280, boot: 192, esp: 192}, func(root string) {
		debian(t, root, from)
	})
}

// Bare makes a PC with nothing but its boot files and a busybox that mounts what
// /etc/fstab names, says "pc: the old system" on the serial line and gives root a
// shell with the prompt "pc:~# ". The disk has 160 to 300 MiB and takes about two
// seconds; need.Kernel is good enough for it.
func Bare(t testing.TB, s Spec) *PC {
	t.Helper()
	tools(t, s)
	busybox := need.File(t, "/bin/busybox", "busybox-static")
	return assemble(t, s, sizes{root: 96, boot: 64, esp: 96}, func(root string) {
		bare(t, root, busybox)
	})
}

// sizes are of partitions, in MiB. FAT32 needs 33 at least.
type sizes struct{ root, boot, esp int64 }

func tools(t testing.TB, s Spec) {
	t.Helper()
	need.Root(t) // who owns the files
	for tool, pkg := range map[string]string{"sfdisk": "fdisk", "mke2fs": "e2fsprogs"} {
		need.Tool(t, tool, pkg)
	}
	switch s.Loader {
	case GRUB2BIOS, GRUB2BIOSGPT, GRUB2UEFI:
		need.Tool(t, "grub-mkimage", "grub-common")
		need.Tool(t, "grub-editenv", "grub-common")
		need.File(t, "/etc/grub.d/00_header", "grub-common")
	}
	switch s.Loader {
	case GRUB2BIOS, GRUB2BIOSGPT:
		need.File(t, "/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin")
	case GRUBLegacy:
	case GRUB2UEFI:
		need.File(t, "/usr/lib/grub/x86_64-efi/normal.mod", "grub-efi-amd64-bin")
	case SystemdBoot:
	default:
		t.Fatalf("no boot loader %q", s.Loader)
	}
	if s.firmware() == uefi {
		need.Tool(t, "mkfs.vfat", "dosfstools")
		need.Tool(t, "mcopy", "mtools")
	}
}

func (s Spec) firmware() string {
	if s.Loader == GRUB2UEFI || s.Loader == SystemdBoot {
		return uefi
	}
	return bios
}

// assemble lays out the disk, lets fill make the system's tree, adds the boot
// loader and turns the tree into file systems.
func assemble(t testing.TB, s Spec, size sizes, fill func(root string)) *PC {
	t.Helper()
	p := &PC{
		Disk: filepath.Join(t.TempDir(), string(s.Loader)+".img"), Firmware: s.firmware(), Loader: s.Loader,
		Release: release(t, s.Kernel), machineID: random(16), diskID: random(4),
		// The kernel's check of its timer panics where other work keeps QEMU from
		// ticking in time; under KVM it leaves the check out by itself.
		console: "console=tty0 console=ttyS0,115200 quiet libata.force=nodbdelay no_timer_check",
	}
	p.partition(t, s, size)

	root := filepath.Join(t.TempDir(), "root")
	fill(root)
	if s.Tree != "" {
		run(t, nil, "cp", "-a", "--", s.Tree+"/.", root)
	}
	tr := openTree(t, root)
	defer tr.close()
	for to, from := range s.Files {
		tr.copy(to, from)
	}
	tr.write("etc/machine-id", p.machineID+"\n", 0o444)
	tr.write("etc/hostname", "pc\n", 0o644)
	tr.write("etc/fstab", p.fstab(), 0o644)
	tr.copy("boot/vmlinuz-"+p.Release, s.Kernel)
	if s.Config != "" {
		tr.copy("boot/config-"+p.Release, s.Config)
	}
	if p.initrd = s.Initrd != ""; p.initrd {
		tr.copy("boot/initrd.img-"+p.Release, s.Initrd)
	}
	switch s.Loader {
	case GRUB2BIOS, GRUB2BIOSGPT:
		p.grub2(t, tr)
		p.grub2BIOS(t)
	case GRUB2UEFI:
		p.grub2(t, tr)
		p.grub2UEFI(t, tr)
	case GRUBLegacy:
		p.grubLegacy(t, tr)
	case SystemdBoot:
		p.systemdBoot(t, tr)
	}
	p.fill(t, root)
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *PC) fstab() string {
	text := "# <file system> <mount point> <type> <options> <dump> <pass>\n"
	text += fmt.Sprintf("UUID=%s / %s errors=remount-ro 0 1\n", p.Root.UUID, p.Root.Type)
	if p.Boot.Number != 0 {
		text += fmt.Sprintf("UUID=%s /boot %s defaults 0 2\n", p.Boot.UUID, p.Boot.Type)
	}
	if p.ESP.Number != 0 {
		text += fmt.Sprintf("UUID=%s %s vfat umask=0077 0 1\n", p.ESP.UUID, p.ESPMount)
	}
	return text
}

// append is the system's kernel command line.
func (p *PC) append() string { return "root=PARTUUID=" + p.Root.PartUUID + " ro " + p.console }

// bootPath is the path of a file in /boot as a GRUB sees it that has set its
// root to the file system of /boot.
func (p *PC) bootPath(name string) string {
	if p.Boot.Number != 0 {
		return "/" + name
	}
	return "/boot/" + name
}

// bootPart is the partition that /boot lies on.
func (p *PC) bootPart() Partition {
	if p.Boot.Number != 0 {
		return p.Boot
	}
	return p.Root
}

// release reads a bzImage's (Linux Documentation/arch/x86/boot.rst,
// kernel_version).
func release(t testing.TB, kernel string) string {
	t.Helper()
	b := read(t, kernel)
	if len(b) < 0x210 || string(b[0x202:0x206]) != "HdrS" {
		t.Fatalf("%s is not a bzImage", kernel)
	}
	at := 0x200 + int(b[0x20e]) + int(b[0x20f])<<8
	text, _, found := strings.Cut(string(b[min(at, len(b)):min(at+256, len(b))]), " ")
	if !found || text == "" {
		t.Fatalf("%s does not say its release", kernel)
	}
	return text
}

// random is n random bytes in hex.
func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func randomUUID() string {
	h := random(16)
	return strings.Join([]string{h[:8], h[8:12], "4" + h[13:16], "8" + h[17:20], h[20:]}, "-")
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// run runs a program to its end, with env added to the environment, and returns
// what it says.
func run(t testing.TB, env []string, argv ...string) string {
	t.Helper()
	return runWith(t, env, "", argv...)
}

func runWith(t testing.TB, env []string, input string, argv ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Env = append(append(os.Environ(), "LC_ALL=C"), env...)
	cmd.Stdin = strings.NewReader(input)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s%s", strings.Join(argv, " "), err, out, stderr.String())
	}
	return string(out)
}
