package testvm

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// The tests boot a kernel that they find and an initramfs of a static busybox
// and a few lines of shell, from disks made by the field's own tools.

const testBuild = "0123456789abcdef"

// testInit says it is ready, then does what mode= of the command line says.
const testInit = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
echo 1 > /proc/sys/kernel/printk
mode= build=
for word in $(cat /proc/cmdline); do case $word in mode=*|build=*) eval "$word";; esac; done
case $mode in
reset) reboot -f;;
off) poweroff -f;;
panic) exit 3;;
login) echo "pc login: " > /dev/ttyS0; sleep 1000;;
mute) sleep 1000;;
esac
ram=$(awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo)
for console in /dev/ttyS0 /dev/tty1; do echo "memlinux: ready build=$build ram=$ram MiB" > $console; done
exec setsid cttyhack sh < /dev/ttyS0 > /dev/ttyS0 2>&1
`

const testAppend = "console=tty0 console=ttyS0,115200"

// fixture is a folder with kernel, initrd and, on demand, disks. It is made
// once for all tests.
var fixture struct {
	sync.Mutex
	dir  string
	made map[string]bool
}

// make1 makes the file name in the fixture's folder, once.
func make1(t *testing.T, name string, make func(t *testing.T, path string)) string {
	t.Helper()
	fixture.Lock()
	defer fixture.Unlock()
	path := filepath.Join(fixture.dir, name)
	if !fixture.made[name] {
		make(t, path)
		fixture.made[name] = true
	}
	return path
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return string(out)
}

// testKernel is a kernel with a serial console.
func testKernel(t *testing.T) string {
	t.Helper()
	image, _ := need.Kernel(t)
	return image
}

func testInitrd(t *testing.T) string {
	cpio := need.Tool(t, "cpio", "cpio")
	busybox := need.File(t, "/bin/busybox", "busybox-static")
	return make1(t, "initrd", func(t *testing.T, path string) {
		root := t.TempDir()
		for _, d := range []string{"bin", "proc", "dev"} {
			if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		run(t, "cp", busybox, filepath.Join(root, "bin/busybox"))
		if err := os.WriteFile(filepath.Join(root, "init"), []byte(testInit), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(cpio, "-o", "-H", "newc", "--quiet", "-F", path)
		cmd.Dir = root
		cmd.Stdin = strings.NewReader("bin\nbin/busybox\nproc\ndev\ninit\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("cpio: %v\n%s", err, out)
		}
	})
}

const (
	volumeID = "CAFE0001"
	grubCfg  = `serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
search --no-floppy --set=root --fs-uuid CAFE-0001
`
	loadMenu = "legacy_configfile ($root)/boot/grub/menu.lst\n"
)

// fillFAT puts the system into the FAT file system at fs (mtools' notation).
func fillFAT(t *testing.T, fs, kernel, initrd string) {
	t.Helper()
	dir := t.TempDir()
	menu, cfg, efi := filepath.Join(dir, "menu.lst"), filepath.Join(dir, "efi.cfg"), filepath.Join(dir, "BOOTX64.EFI")
	write(t, menu, "default 0\ntimeout 0\ntitle test\nkernel /vmlinuz "+testAppend+" build="+testBuild+"\ninitrd /initrd\n")
	write(t, cfg, grubCfg+"set prefix=($root)/boot/grub\n"+loadMenu)
	run(t, "grub-mkimage", "-O", "x86_64-efi", "-o", efi, "-c", cfg, "-p", "/boot/grub",
		"part_gpt", "fat", "search", "search_fs_uuid", "normal", "legacycfg", "linux", "serial", "terminal", "echo", "test", "efi_gop", "all_video")
	run(t, "mmd", "-i", fs, "::boot", "::boot/grub", "::EFI", "::EFI/BOOT")
	for from, to := range map[string]string{kernel: "::vmlinuz", initrd: "::initrd", menu: "::boot/grub/menu.lst", efi: "::EFI/BOOT/BOOTX64.EFI"} {
		run(t, "mcopy", "-i", fs, from, to)
	}
}

func diskTools(t *testing.T) {
	t.Helper()
	for tool, pkg := range map[string]string{"sgdisk": "gdisk", "mkfs.vfat": "dosfstools", "mcopy": "mtools", "mmd": "mtools", "grub-mkimage": "grub-common"} {
		need.Tool(t, tool, pkg)
	}
	need.File(t, "/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin")
	need.File(t, "/usr/lib/grub/x86_64-efi/normal.mod", "grub-efi-amd64-bin")
}

// gptDisk boots on BIOS and UEFI: GPT, GRUB's core image in a BIOS boot
// partition, and an EFI system partition.
func gptDisk(t *testing.T) string {
	diskTools(t)
	kernel, initrd := testKernel(t), testInitrd(t)
	st, err := os.Stat(kernel)
	if err != nil {
		t.Fatal(err)
	}
	sizeMiB := st.Size()>>20 + 48
	return make1(t, "gpt.img", func(t *testing.T, path string) {
		write(t, path, "")
		if err := os.Truncate(path, sizeMiB<<20); err != nil {
			t.Fatal(err)
		}
		run(t, "sgdisk", "-a", "1", "-n", "1:34:2047", "-t", "1:ef02", "-n", "2:2048:0", "-t", "2:ef00", path)
		// One sector a cluster, so that it is FAT32; 33 sectors hold the second GPT.
		run(t, "mkfs.vfat", "-F", "32", "-s", "1", "-i", volumeID, "--offset", "2048", path, fmt.Sprint((sizeMiB-1)<<10-17))
		fillFAT(t, path+"@@1M", kernel, initrd)

		cfg := filepath.Join(t.TempDir(), "cfg")
		write(t, cfg, grubCfg+loadMenu)
		embedGRUB(t, path, "-c", cfg, "-p", "(,gpt2)/boot/grub",
			"biosdisk", "part_gpt", "fat", "search", "search_fs_uuid", "normal", "legacycfg", "linux", "linux16", "serial", "terminal", "echo", "test")
	})
}

// embedGRUB puts GRUB for a PC BIOS into the disk's boot sector and its BIOS
// boot partition at LBA 34.
func embedGRUB(t *testing.T, path string, mkimage ...string) {
	t.Helper()
	coreFile := filepath.Join(t.TempDir(), "core.img")
	run(t, "grub-mkimage", append([]string{"-O", "i386-pc", "-o", coreFile}, mkimage...)...)
	boot, core := read(t, "/usr/lib/grub/i386-pc/boot.img"), read(t, coreFile)
	const lba = 34
	sectors := (len(core) + 511) / 512
	core = append(core, make([]byte, sectors*512-len(core))...)
	binary.LittleEndian.PutUint64(boot[0x5c:], lba)
	boot[0x64], boot[0x66], boot[0x67] = 0xff, 0x90, 0x90
	binary.LittleEndian.PutUint64(core[0x1f4:], lba+1)
	binary.LittleEndian.PutUint16(core[0x1fc:], uint16(sectors-1))
	binary.LittleEndian.PutUint16(core[0x1fe:], 0x0820)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mbr := make([]byte, 512)
	if _, err := f.ReadAt(mbr, 0); err != nil {
		t.Fatal(err)
	}
	copy(mbr, boot[:0x1b8])
	mbr[0x1fe], mbr[0x1ff] = 0x55, 0xaa
	for off, p := range map[int64][]byte{0: mbr, lba * 512: core} {
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
}

// largeSectorDisk boots on UEFI only: FAT32 with sectors of 4096 bytes on the
// whole disk, as UEFI allows.
func largeSectorDisk(t *testing.T) string {
	diskTools(t)
	kernel, initrd := testKernel(t), testInitrd(t)
	return make1(t, "4096.img", func(t *testing.T, path string) {
		write(t, path, "")
		if err := os.Truncate(path, 288<<20); err != nil { // FAT32 begins at 65,525 clusters
			t.Fatal(err)
		}
		run(t, "mkfs.vfat", "-F", "32", "-S", "4096", "-s", "1", "-i", volumeID, path)
		fillFAT(t, path, kernel, initrd)
	})
}

// garbageDisk has nothing that any firmware takes for a boot loader.
func garbageDisk(t *testing.T) string {
	return make1(t, "garbage.img", func(t *testing.T, path string) {
		write(t, path, strings.Repeat("garbage!", 1<<17))
	})
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// state is what must not change about a disk that is booted.
func state(t *testing.T, path string) string {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x %v", sha256.Sum256(read(t, path)), st.ModTime())
}
