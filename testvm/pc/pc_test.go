package pc

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// A second entry, made by hand, is booted once by the loader's own means, and
// the next boot is the old system's again. That is what the tests of memlinux
// rest on. The other layouts are booted by cli/memlinux's TestWholePC.
func TestBootOnce(t *testing.T) {
	for _, c := range []struct {
		name string
		spec Spec
		// next, typed in the old system, makes the entry that second boots.
		next func(p *PC, second string) []string
	}{
		{"GRUB 2, BIOS, GPT, /boot on its own", Spec{Loader: GRUB2BIOSGPT, SeparateBoot: true}, nextGRUB2},
		{"GRUB Legacy", Spec{Loader: GRUBLegacy}, nextLegacy},
		{"GRUB 2, UEFI", Spec{Loader: GRUB2UEFI}, nextGRUB2},
		{"systemd-boot, ESP on /boot", Spec{Loader: SystemdBoot, SeparateBoot: true}, nextSystemdBoot},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.spec
			s.Kernel, s.Config = need.Kernel(t)
			s.Files = modules(t, s.Kernel)
			p := Bare(t, s)
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
			for _, line := range append(c.next(p, p.append()+" pc=second"), "umount /boot/efi /boot /efi 2>/dev/null; mount -o remount,ro /; sync; reboot -f") {
				m.Type(line)
				if !strings.HasSuffix(line, "reboot -f") {
					m.Expect("pc:~# ")
				}
			}
			prompt("second")
			m.Type("reboot -f")
			prompt("first")
			m.Type("poweroff -f")
			m.Off()
		})
	}
}

func nextGRUB2(p *PC, second string) []string {
	return []string{
		fmt.Sprintf(`echo "menuentry 'a second one' --id second { search --fs-uuid --set=root %s; linux %s %s; }" > /boot/grub/custom.cfg`, p.bootPart().UUID, p.bootPath("vmlinuz-"+p.Release), second),
		`(echo "# GRUB Environment Block"; echo next_entry=second; head -c 1024 /dev/zero | tr '\0' '#') | head -c 1024 | dd of=/boot/grub/grubenv conv=notrunc`,
	}
}

func nextLegacy(p *PC, second string) []string {
	return []string{
		`sed -i 's/^default.*/default saved/' /boot/grub/menu.lst`,
		fmt.Sprintf(`printf 'title second\nroot (hd0,%d)\nkernel %s %s\nsavedefault 0\n' >> /boot/grub/menu.lst`, p.bootPart().Number-1, p.bootPath("vmlinuz-"+p.Release), second),
		`(echo 2; tail -n +2 /boot/grub/default) > /boot/grub/new; mv /boot/grub/new /boot/grub/default`,
	}
}

func nextSystemdBoot(p *PC, second string) []string {
	return []string{
		"for m in fat vfat nls_cp437 nls_ascii nls_utf8 efivarfs; do insmod /modules/$m.ko; done",
		"mount -t vfat $(findfs UUID=" + p.ESP.UUID + ") " + p.ESPMount,
		"mount -t efivarfs none /sys/firmware/efi/efivars",
		fmt.Sprintf(`printf 'title a second one\nlinux /%s/%s/linux\noptions %s\n' > %s/loader/entries/second.conf`, p.machineID, p.Release, second, p.ESPMount),
		`printf '\7\0\0\0s\0e\0c\0o\0n\0d\0.\0c\0o\0n\0f\0\0\0' > /sys/firmware/efi/efivars/LoaderEntryOneShot-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f`,
	}
}

// modules are those of Debian's kernel that it needs for an ESP.
func modules(t *testing.T, kernel string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(filepath.Join(filepath.Dir(kernel), "../lib/modules"), func(path string, _ os.DirEntry, err error) error {
		switch name := filepath.Base(path); name {
		case "fat.ko", "vfat.ko", "nls_cp437.ko", "nls_ascii.ko", "nls_utf8.ko", "efivarfs.ko":
			files["modules/"+name] = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
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
