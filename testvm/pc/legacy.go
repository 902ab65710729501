package pc

import (
	"encoding/binary"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// configName is where stage1_5 and stage2 have the name of the file that they
// read, behind the version "0.97" and its zero.
const configName = 0x217

// grubLegacy installs GRUB 0.97 as its setup command does, byte for byte
// (stage1/stage1.h, stage2/shared.h), and a menu.lst as Debian's update-grub
// keeps it.
func (p *PC) grubLegacy(t testing.TB, tr *tree) {
	t.Helper()
	from := filepath.Join(need.Package(t, "grub-legacy"), "usr/lib/grub/x86_64-pc")
	for _, name := range []string{"stage1", "e2fs_stage1_5"} {
		tr.copy("boot/grub/"+name, filepath.Join(from, name))
	}
	stage2 := read(t, filepath.Join(from, "stage2"))
	copy(stage2[configName:], p.bootPath("grub/menu.lst")+"\x00")
	tr.write("boot/grub/stage2", string(stage2), 0o644)
	tr.write("boot/grub/device.map", "(hd0)\t/dev/sda\n", 0o644)
	// As grub-set-default writes it: savedefault writes over it in place.
	tr.write("boot/grub/default", "default\n#\n#\n#\n#\n#\n#\n#\n#\n#\n#\n# WARNING: If you want to edit this file directly, do not remove any line\n"+
		"# from this file, including this warning. Using `grub-set-default\\' is\n# strongly recommended.\n", 0o644)
	tr.write("boot/grub/menu.lst", p.menuLst(), 0o644)

	stage1, core := read(t, filepath.Join(from, "stage1")), read(t, filepath.Join(from, "e2fs_stage1_5"))
	le := binary.LittleEndian
	le.PutUint16(stage1[0x42:], 0x2000)
	le.PutUint32(stage1[0x44:], 1)
	le.PutUint16(stage1[0x48:], 0x200)
	stage1[0x4b], stage1[0x4c] = 0x90, 0x90
	core = whole(core)
	le.PutUint32(core[0x1f8:], 2)
	le.PutUint16(core[0x1fc:], uint16(len(core)/sector-1))
	le.PutUint16(core[0x1fe:], 0x220)
	where := append([]byte{0xff, 0xff, byte(p.bootPart().Number - 1), 0xff}, p.bootPath("grub/stage2")+" "+p.bootPath("grub/menu.lst")+"\x00"...)
	copy(core[configName:], where)
	p.sectors(t, stage1, [2]int{0x03, 0x3e}, 1, core)
}

func (p *PC) menuLst() string {
	root := fmt.Sprintf("(hd0,%d)", p.bootPart().Number-1)
	entry := func(title, more string) string {
		return fmt.Sprintf("title\t\t%s\nroot\t\t%s\nkernel\t\t%s %s%s\n", title, root, p.bootPath("vmlinuz-"+p.Release), p.append(), more)
	}
	title := "Debian GNU/Linux, kernel " + p.Release
	return `# menu.lst - See: grub(8), info grub, update-grub(8)
#            grub-install(8), grub-floppy(8),
#            grub-md5-crypt, /usr/share/doc/grub
#            and /usr/share/doc/grub-legacy-doc/.

serial --unit=0 --speed=115200
terminal --timeout=1 serial console

## default num
# Set the default entry to the entry number NUM. Numbering starts from 0, and
# the entry number 0 is the default if the command is not used.
default		0

## timeout sec
# Set a timeout, in SEC seconds, before automatically booting the default entry
# (normally the first entry defined).
timeout		2

# Pretty colours
color cyan/blue white/blue

#
# Put static boot stanzas before and/or after AUTOMAGIC KERNEL LIST

### BEGIN AUTOMAGIC KERNELS LIST
## lines between the AUTOMAGIC KERNELS LIST markers will be modified
## by the debian update-grub script except for the default options below

## DO NOT UNCOMMENT THEM, Just edit them to your needs

## ## Start Default Options ##
## default kernel options
# kopt=` + p.append() + `

## default grub root device
# groot=` + root + `

## should update-grub create alternative automagic boot options
# alternative=true

## should update-grub lock alternative automagic boot options
# lockalternative=false

## should update-grub lock old automagic boot options
# lockold=false

## controls how many kernels should be put into the menu.lst
# howmany=all

## should update-grub adjust the value of the default booted system
# updatedefaultentry=false

## should update-grub add savedefault to the default options
# savedefault=false

## ## End Default Options ##

` + entry(title, "") + "\n" + entry(title+" (single-user mode)", " single") + `
### END DEBIAN AUTOMAGIC KERNELS LIST
`
}
