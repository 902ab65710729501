package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/daemon/api"
)

// doctor runs it and returns the checks by name.
func (w *world) doctor(code int, says ...string) map[string]api.Check {
	w.t.Helper()
	o := w.run("doctor", "--json")
	o.wants(w.t, code, says...)
	checks := map[string]api.Check{}
	for line := range strings.Lines(o.stdout) {
		var c api.Check
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			w.t.Fatalf("%v: %s", err, line)
		}
		checks[c.Name] = c
	}
	return checks
}

func TestDoctor(t *testing.T) {
	w := newWorld(t)
	for name, c := range w.doctor(0) {
		// KVM, and the boot menu, are this machine's own.
		if c.State != api.CheckOK && name != "KVM" && name != "boot menu of this PC" {
			t.Errorf("%s: %+v", name, c)
		}
	}
	w.env = []string{"PATH=" + pathWithout(t, "qemu-system-x86_64")}
	c := w.doctor(1, "until this is mended: QEMU")["QEMU"]
	if c.State != api.CheckFailed || c.Mend != "sudo apt install qemu-system-x86" {
		t.Errorf("without QEMU: %+v", c)
	}
	w.env = []string{"PATH=" + pathWithout(t, "grub-mkimage")}
	if c := w.doctor(1, "GRUB for BIOS, GRUB for UEFI")["GRUB for UEFI"]; c.Mend != "sudo apt install grub-common" {
		t.Errorf("without GRUB: %+v", c)
	}
}
