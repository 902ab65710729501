package testvm

import (
	"bytes"
	"context"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/testvm/need"
)

func TestForeignDetector(t *testing.T) {
	type seen struct{ Reached, Failure string }
	for name, c := range map[string]struct {
		serial, firmware string
		screen           []string
		screens          int // how often it is read
		waits            bool
		want             seen
	}{
		"silence":                                  {},
		"a loader on the screen":                   {screen: []string{"ISOLINUX 6.04 EDD Copyright (C) H. Peter Anvin", "boot:"}, want: seen{Reached: ReachedLoader}},
		"GRUB on the serial line":                  {serial: "GNU GRUB  version 2.06\r\n", want: seen{Reached: ReachedLoader}},
		"its menu waits for a person":              {screen: []string{"GNU GRUB  version 2.06", "press enter to boot, `e' to edit the commands before booting"}, screens: waitingLimit, waits: true, want: seen{Reached: ReachedLoader}},
		"its menu counts down":                     {screen: []string{"GNU GRUB", "`e' to edit the commands before booting", "executed automatically in 5s."}, screens: waitingLimit + 1, want: seen{Reached: ReachedLoader}},
		"a kernel on the serial line":              {serial: "GNU GRUB\r\n[    0.000000] Linux version 6.1\r\n", want: seen{Reached: ReachedKernel}},
		"a kernel without its first line":          {serial: "[    0.512345] pci 0000:00\r\n", want: seen{Reached: ReachedKernel}},
		"a kernel on the screen":                   {screen: []string{"[    1.234567] usb 1-1: new device"}, want: seen{Reached: ReachedKernel}},
		"a kernel's EFI stub":                      {serial: "EFI stub: Loaded initrd from LINUX_EFI_INITRD_MEDIA_GUID device path\r\n", want: seen{Reached: ReachedKernel}},
		"a login on the serial line":               {serial: "Linux version 6.1\r\n\r\nalpine login:", want: seen{Reached: ReachedLogin}},
		"a login on the screen":                    {screen: []string{"Debian GNU/Linux 12 debian tty1", "debian login:"}, want: seen{Reached: ReachedLogin}},
		"memlinux itself, whatever build it is":    {serial: "Linux version 6\r\nmemlinux: ready build=xyz ram=1 MiB\r\n", want: seen{Reached: ReachedLogin}},
		"the firmware finds nothing":               {firmware: "Booting from Hard Disk...\nBoot failed: not a bootable disk\n\nNo bootable device.\n", want: seen{Failure: "the firmware found nothing to boot on the disk"}},
		"UEFI's shell":                             {serial: "UEFI Interactive Shell v2.2\r\n", want: seen{Failure: "the firmware found nothing to boot on the disk"}},
		"UEFI finds nothing":                       {serial: "BdsDxe: No bootable option or device was found.\r\n", want: seen{Failure: "the firmware found nothing to boot on the disk"}},
		"a boot sector that complains":             {screen: []string{"Booting from Hard Disk...", "Missing operating system"}, want: seen{Failure: "its boot code found no system"}},
		"a loader's font that is not there":        {serial: "error: no such device: 1234.\r\nGNU GRUB\r\n", want: seen{Reached: ReachedLoader}},
		"a panic":                                  {serial: "Linux version 6.1\r\nKernel panic - not syncing: VFS\r\n", want: seen{ReachedKernel, "the kernel panicked"}},
		"what a running system says is no failure": {serial: "Linux version 6.1\r\nMissing operating system\r\n", want: seen{Reached: ReachedKernel}},
	} {
		t.Run(name, func(t *testing.T) {
			d := detector{foreign: true}
			d.feedFirmware([]byte(c.firmware))
			for _, b := range []byte(c.serial) {
				d.feedSerial([]byte{b}, time.Second)
			}
			for range max(c.screens, 1) {
				d.feedForeignScreen(c.screen, 2*time.Second)
			}
			if diff := cmp.Diff(c.want, seen{d.foreignReached(), d.failure}); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			if d.waits != c.waits {
				t.Errorf("it waits for a person: %v", d.waits)
			}
		})
	}
}

// Boot code that says nothing is known by what it reads; one that does nothing at all is
// not taken for a system.
func TestProveForeignBootCode(t *testing.T) {
	need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	for _, c := range []struct {
		name string
		code []byte // 16-bit, at 0x7c00
		want string
	}{
		// Reads 64 sectors to 1000:0000 and halts: mov ah,42 would need a packet; CHS does.
		{"it reads on", []byte{
			0xb8, 0x00, 0x10, 0x8e, 0xc0, 0x31, 0xdb, // mov ax,1000; mov es,ax; xor bx,bx
			0xb8, 0x30, 0x02, 0xb9, 0x02, 0x00, 0xb6, 0x00, // mov ax,0230; mov cx,2; mov dh,0
			0xcd, 0x13, 0xf4, 0xeb, 0xfd, // int 13; hlt; jmp
		}, ReachedLoader},
		{"it does nothing", []byte{0xfa, 0xf4, 0xeb, 0xfd}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := foreignQuiet
			foreignQuiet = 4 * time.Second
			defer func() { foreignQuiet = before }()
			disk := make([]byte, 4<<20)
			copy(disk, c.code)
			disk[510], disk[511] = 0x55, 0xaa
			v, err := Prove(context.Background(), Machine{Firmware: BIOS, Disk: diskFile(t, disk), DiskSize: int64(len(disk)), SectorSize: 512, Bus: USB, Dir: t.TempDir()},
				Expect{Foreign: true}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if v.Reached != c.want || v.OK != (c.want != "") || v.Screenshot == "" {
				t.Errorf("%+v", v)
			}
		})
	}
}

func diskFile(t *testing.T, p []byte) *os.File {
	t.Helper()
	path := t.TempDir() + "/disk"
	if err := os.WriteFile(path, bytes.Clone(p), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
