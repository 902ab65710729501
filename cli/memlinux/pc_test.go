package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/imagegen/kbuild/kbuildtest"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/pc"
)

// The scripts of the PC's Debian: the first boot installs, the next one, after
// that of the in-memory system, removes.
const (
	listScript = `set -e
anna() { runuser -u anna -- "$@"; }
# Type, mode, owner, name and content of all that a boot loader reads, and the
# variables that we could have set.
list() {
	find /boot $(ls -d /efi 2>/dev/null) -printf '%y %m %U:%G %p\n' -type f -exec sha256sum {} + | sort
	ls /sys/firmware/efi/efivars 2>/dev/null | grep -E '^LoaderEntry(OneShot|Default)' || true
}
`
	installScript = listScript + `
list > before
anna memlinux install --json --name 'On this PC' --next --no-boot-test --kernel host --append no_timer_check > report
list > installed
systemctl show memlinuxd.service > service
anna memlinux entries
anna memlinux entries --json > entries
anna memlinux install --name 'On this PC' --next --no-boot-test --kernel host --append no_timer_check > again
sed -n 's/.*"id":"\([0-9a-f]*\)".*/\1/p' entries > /var/lib/pc/id
`
	removeScript = listScript + `
anna memlinux entries --json > entries
anna memlinux remove $(cat /var/lib/pc/id)
anna memlinux entries --json > entries-after
list > after
`
)

// anna may change the boot menu.
const bootRule = `polkit.addRule(function (action, subject) {
    if (action.id == "org.memlinux.memlinux1.change-boot-menu" && subject.user == "anna")
        return polkit.Result.YES;
});
`

// A whole PC, from its firmware to its Debian and back: memlinux, put there by
// make install and started by the bus for a user whom polkit lets, adds its system
// to the boot menu for the next boot; the PC's own loader boots it, once; and when
// it is removed everything is as it was.
func TestWholePC(t *testing.T) {
	kernel, config := kbuildtest.Kernel(t)
	installed, rule := t.TempDir(), filepath.Join(t.TempDir(), "rule")
	sh(t, need.Tool(t, "make", "make"), "--silent", "-C", "../..", "install", "DESTDIR="+installed)
	if err := os.WriteFile(rule, []byte(bootRule), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		spec   pc.Spec
		loader string
	}{
		{"GRUB 2 on a BIOS PC", pc.Spec{Loader: pc.GRUB2BIOS}, "GRUB 2"},
		{"GRUB Legacy, boot on its own", pc.Spec{Loader: pc.GRUBLegacy, SeparateBoot: true}, "GRUB Legacy"},
		{"GRUB 2 on a UEFI PC, boot on its own", pc.Spec{Loader: pc.GRUB2UEFI, SeparateBoot: true}, "GRUB 2"},
		{"systemd-boot", pc.Spec{Loader: pc.SystemdBoot}, "systemd-boot"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := c.spec
			s.Kernel, s.Config, s.Tree = kernel, config, installed
			s.Files = map[string]string{"etc/polkit-1/rules.d/50-test.rules": rule}
			m := pc.Start(t, pc.Build(t, s), pc.Guest{Boots: []string{installScript, removeScript}})

			first := m.Boot(1)
			id := installedID(t, first["report"], c.loader)
			if ours := ofMemlinux(t, first["entries"]); len(ours) != 1 || ours[0].ID != id || ours[0].Title != "On this PC" || !ours[0].Next || ours[0].Default {
				t.Errorf("after the install the entries of memlinux are %+v", ours)
			}
			if !strings.Contains(first["before"], "/boot/vmlinuz-") || !strings.Contains(first["installed"], "/memlinux/vmlinuz-") {
				t.Errorf("the boot files were\n%s\nand with the entry\n%s", first["before"], first["installed"])
			}
			for _, want := range []string{"ActiveState=active", "ProtectSystem=strict", "DevicePolicy=closed"} {
				if !strings.Contains(first["service"], want+"\n") {
					t.Errorf("memlinuxd did not run in its service with %s: %s", want, first["service"])
				}
			}
			if !strings.Contains(first["again"], "nothing was changed") {
				t.Errorf("a second install says\n%s", first["again"])
			}

			if said := m.Expect(`memlinux: ready build=([0-9a-f]{16})`); said[1] != id {
				t.Fatalf("build %s was booted, and %s was installed", said[1], id)
			}
			m.Expect(`memlinux:~# `)
			m.Type("reboot")

			second := m.Boot(2)
			m.Off()
			if ours := ofMemlinux(t, second["entries"]); len(ours) != 1 || ours[0].ID != id || ours[0].Next || ours[0].Default {
				t.Errorf("after the boot the entries of memlinux are %+v", ours)
			}
			if ours := ofMemlinux(t, second["entries-after"]); len(ours) != 0 {
				t.Errorf("after the removal the entries of memlinux are %+v", ours)
			}
			if before, after := first["before"], second["after"]; before != after {
				t.Errorf("the boot files are not as they were before:\n%s\nand are now:\n%s", before, after)
			}
		})
	}
}

// installedID is the build's, of a report of memlinux install --json.
func installedID(t *testing.T, lines, loader string) string {
	t.Helper()
	var last struct {
		Event  string
		Report api.Report
	}
	for line := range strings.Lines(lines) {
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
	}
	e, system := last.Report.Entry, last.Report.System
	if last.Event != "report" || e == nil || system == nil {
		t.Fatalf("there is no report of an install at the end of\n%s", lines)
	}
	if e.Loader != loader || !e.Next || e.Default || e.ID != system.ID || !regexp.MustCompile(`^[0-9a-f]{16}$`).MatchString(e.ID) {
		t.Errorf("the report is of %+v", e)
	}
	return e.ID
}

// ofMemlinux are the entries of memlinux in what memlinux entries --json says.
func ofMemlinux(t *testing.T, lines string) (ours []api.BootEntry) {
	t.Helper()
	for line := range strings.Lines(lines) {
		var e api.BootEntry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e.Ours {
			ours = append(ours, e)
		}
	}
	return ours
}
