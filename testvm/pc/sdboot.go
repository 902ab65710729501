package pc

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// systemdBoot puts on the ESP what bootctl install and kernel-install do.
func (p *PC) systemdBoot(t testing.TB, tr *tree) {
	t.Helper()
	efi := filepath.Join(need.Package(t, "systemd-boot-efi"), "usr/lib/systemd/boot/efi/systemd-bootx64.efi")
	esp := strings.TrimPrefix(p.ESPMount, "/")
	tr.copy(esp+"/EFI/systemd/systemd-bootx64.efi", efi)
	tr.copy(esp+"/EFI/BOOT/BOOTX64.EFI", efi)
	tr.write(esp+"/loader/loader.conf", "timeout 1\n#console-mode keep\n", 0o644)
	tr.write(esp+"/loader/entries.srel", "type1\n", 0o644)
	linux := "/" + p.machineID + "/" + p.Release + "/linux"
	tr.write(fmt.Sprintf("%s/loader/entries/%s-%s.conf", esp, p.machineID, p.Release), fmt.Sprintf(`# Boot Loader Specification type#1 entry
# File created by /usr/lib/kernel/install.d/90-loaderentry.install (systemd 252)
title      Debian GNU/Linux 12 (bookworm)
version    %s
machine-id %s
sort-key   debian
options    %s
linux      %s
`, p.Release, p.machineID, p.append(), linux), 0o644)
	kernel, err := tr.root.ReadFile("boot/vmlinuz-" + p.Release)
	if err != nil {
		t.Fatal(err)
	}
	tr.write(esp+linux, string(kernel), 0o644)
}
