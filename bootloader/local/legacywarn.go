package local

import (
	"fmt"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/bootloader/menulst"
)

// The commands of GRUB Legacy 0.97 (stage2/builtins.c), by where a menu may have
// them. Those for menus set the whole menu; those for entries run as one is
// booted.
var (
	legacyBoth = strings.Fields("bootp color device dhcp hide ifconfig pager partnew parttype password rarp " +
		"serial setkey terminal terminfo tftpserver unhide")
	legacyMenu  = strings.Fields("default fallback hiddenmenu timeout")
	legacyEntry = strings.Fields("blocklist boot cat chainloader cmp configfile debug displayapm displaymem dump embed find " +
		"fstest geometry halt help impsprobe initrd install ioprobe kernel lock makeactive map md5crypt module " +
		"modulenounzip pause quit read reboot root rootnoverify savedefault setup testload testvbe uppermem vbeprobe")
	// legacyExtras are patches of distributions. The first three are for entries.
	legacyExtras = strings.Fields("uuid findroot print quiet splashimage foreground background border viewport shade gfxmenu")

	grub2Words = strings.Fields("menuentry submenu set insmod search linux linux16 initrd16 linuxefi initrdefi load_env save_env " +
		"source if else elif fi then function export unset } {")
)

// knows says whether this GRUB has a command of that name.
func (l *legacy) knows(name string) bool {
	return slices.Contains(legacyBoth, name) || slices.Contains(legacyMenu, name) ||
		slices.Contains(legacyEntry, name) || l.extras[name]
}

// maxWarnings keeps a file that is no menu.lst at all from filling the screen.
const maxWarnings = 20

// warnings name the lines that GRUB Legacy ignores without a word, or that
// break an entry.
func (l *legacy) warnings(f *menulst.File) []string {
	var list []string
	warn := func(c menulst.Command, text string) {
		list = append(list, fmt.Sprintf("%s: line %d: %s", l.menu, c.Line, text))
	}
	check := func(c menulst.Command, entry bool) {
		switch {
		case slices.Contains(grub2Words, c.Name):
			warn(c, fmt.Sprintf("GRUB Legacy ignores %q, which is GRUB 2's", c.Name))
		case !l.knows(c.Name):
			warn(c, fmt.Sprintf("GRUB Legacy ignores %q, a command that it does not have", c.Name))
		case !entry && (slices.Contains(legacyEntry, c.Name) || slices.Contains(legacyExtras[:3], c.Name)):
			warn(c, fmt.Sprintf("GRUB Legacy ignores %q before the first title", c.Name))
		case entry && slices.Contains(legacyMenu, c.Name):
			warn(c, fmt.Sprintf("%q stops the entry with an error: it belongs before the first title", c.Name))
		}
	}
	for _, c := range f.Globals() {
		check(c, false)
	}
	for _, e := range f.Entries() {
		for _, c := range e.Commands {
			check(c, true)
		}
		if !slices.ContainsFunc(e.Commands, func(c menulst.Command) bool { return l.knows(c.Name) }) {
			warn(menulst.Command{Line: e.Line}, fmt.Sprintf("GRUB Legacy skips the entry %q, which has no command for it, and does not count it", e.Title))
		}
	}
	if more := len(list) - maxWarnings; more > 0 {
		list = append(list[:maxWarnings], fmt.Sprintf("%s: %d more lines that GRUB Legacy ignores", l.menu, more))
	}
	return list
}
