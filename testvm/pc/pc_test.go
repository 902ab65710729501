package pc

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// A second entry, made by hand, is booted once by the loader's own means, and
// the next boot is the old system's again. That is what the tests of memlinux
// rest on; those boot all other loaders so, too.
func TestBootOnce(t *testing.T) {
	kernel, config := need.Kernel(t)
	p := Bare(t, Spec{Loader: GRUB2BIOSGPT, SeparateBoot: true, Kernel: kernel, Config: config})
	m := Start(t, p, Guest{NVMe: true, MemoryMiB: 256})
	prompt := func(words string) {
		t.Helper()
		m.Expect("pc: the old system")
		m.Expect("pc:~# ")
		// The quotes keep the echo of what is typed from looking like an answer.
		m.Type(`grep -q pc=second /proc/cmdline && echo sec''ond || echo fir''st`)
		if said := m.Expect(`\n(first|second)\r`)[1]; said != words {
			t.Fatalf("the %s entry was booted", said)
		}
		m.Expect("pc:~# ")
	}
	prompt("first")
	m.Type(fmt.Sprintf(`echo "menuentry 'a second one' --id second { search --fs-uuid --set=root %s; linux %s %s; }" > /boot/grub/custom.cfg`,
		p.bootPart().UUID, p.bootPath("vmlinuz-"+p.Release), p.append()+" pc=second"))
	m.Expect("pc:~# ")
	m.Type(`(echo "# GRUB Environment Block"; echo next_entry=second; head -c 1024 /dev/zero | tr '\0' '#') | head -c 1024 | dd of=/boot/grub/grubenv conv=notrunc`)
	m.Expect("pc:~# ")
	m.Type("umount /boot; mount -o remount,ro /; sync; reboot -f")
	prompt("second")
	m.Type("reboot -f")
	prompt("first")
	m.Type("poweroff -f")
	m.Off()
}

// Every kind of PC, seen by the tools of its file systems and of its boot loader.
func TestDisksAreSound(t *testing.T) {
	for _, loader := range []Loader{GRUB2BIOS, GRUB2BIOSGPT, GRUBLegacy, GRUB2UEFI, SystemdBoot} {
		for _, separate := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, /boot on its own: %v", loader, separate), func(t *testing.T) {
				s := Spec{Loader: loader, SeparateBoot: separate}
				s.Kernel, s.Config = need.Kernel(t)
				p := Bare(t, s)
				sound(t, p)
				if loader != GRUBLegacy && loader != SystemdBoot {
					runWith(t, nil, p.grubCfg(t), need.Tool(t, "grub-script-check", "grub-common"))
				}
			})
		}
	}
}

// sound checks the partitions and file systems.
func sound(t *testing.T, p *PC) {
	t.Helper()
	run(t, nil, "sfdisk", "--verify", "--quiet", p.Disk)
	for _, part := range []Partition{p.Root, p.Boot, p.ESP} {
		if part.Number == 0 {
			continue
		}
		img := filepath.Join(t.TempDir(), "part")
		run(t, nil, "dd", "if="+p.Disk, "of="+img, "bs=1M", "conv=sparse", fmt.Sprintf("skip=%d", part.Start>>20), fmt.Sprintf("count=%d", part.Size>>20))
		if part.Type == "vfat" {
			run(t, nil, need.Tool(t, "fsck.vfat", "dosfstools"), "-n", img)
		} else {
			run(t, nil, need.Tool(t, "e2fsck", "e2fsprogs"), "-f", "-n", img)
		}
	}
}
