package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/nspawn"
)

// What memlinuxd's own service may not do, its machinery does in services of its
// own: apt fetches a kernel, source comes by http and is compiled, GRUB is made, and
// virtual machines boot the stick. Cancelled, or when memlinuxd is stopped or killed,
// nothing of it stays; and what is stopped is cancelled, not failed.
func TestMachineryOfAService(t *testing.T) {
	need.Root(t)
	need.Tool(t, "gcc", "gcc")
	image, _ := need.Kernel(t)
	unit, err := os.ReadFile("../../systemd/memlinuxd.service")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	unitFile := filepath.Join(dir, "memlinuxd.service")
	if err := os.WriteFile(unitFile, []byte(strings.ReplaceAll(string(unit), "@libexecdir@", "/usr/libexec")), 0o644); err != nil {
		t.Fatal(err)
	}
	files := nspawn.Run(t, nspawn.Debian{
		Files: map[string]string{
			"/usr/libexec/memlinuxd":                                    filepath.Join(bin, "memlinuxd"),
			"/usr/bin/memlinux":                                         filepath.Join(bin, "memlinux"),
			"/run/systemd/system/memlinuxd.service":                     unitFile,
			"/usr/share/polkit-1/actions/org.memlinux.memlinux1.policy": "../../systemd/org.memlinux.memlinux1.policy",
			"/etc/dbus-1/system.d/org.memlinux.Memlinux1.conf":          "../../systemd/org.memlinux.Memlinux1.conf",
			"/usr/lib/sysusers.d/memlinux.conf":                         "../../systemd/memlinux.sysusers",
			"/srv/deb/boot/vmlinuz-6.1.0-1-amd64":                       image,
		},
		// This machine's compilers.
		Args:   []string{"--overlay=/usr::/usr"},
		Script: machinery,
	})
	t.Log(files["said"])
	if got, _, _ := strings.Cut(files["digest"], " "); len(got) != 64 || !strings.Contains(files["refused"], "x.tar has the SHA-256 "+got) {
		t.Errorf("a download with the digest %s: %s", got, files["refused"])
	}
	if got := files["stopped"]; got != "memlinux: cancelled during boot BIOS\n130\n" {
		t.Errorf("memlinuxd was stopped: %q", got)
	}
	for _, name := range []string{"cancelled", "killed"} {
		if files[name] != "" {
			t.Errorf("%s, what is left: %s", name, files[name])
		}
	}
	if got := strings.Fields(files["fetched"]); fmt.Sprint(got) != "[initramfs.img manifest.json menu.lst vmlinuz]" {
		t.Errorf("of a fetched kernel was made: %q", got)
	}
	if got := files["compiled"]; got != "by _memlinux\n" {
		t.Errorf("the compiler ran %q", got)
	}
	// Names of services end with numbers.
	for _, want := range []string{"memlinux-fetch-", "memlinux-chown-", "memlinux-build-", "memlinux-grub-", "memlinux-qemu-"} {
		if !strings.Contains(files["units"], want) {
			t.Errorf("no service was called %s: %s", want, files["units"])
		}
	}
}

const machinery = `
systemd-sysusers
systemctl daemon-reload
systemctl reload dbus
systemctl start memlinuxd

# A repository with one kernel, which apt does not know yet.
cd /srv
mkdir -p deb/DEBIAN repo
printf 'Package: linux-image-test\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody <nobody@localhost>\nDescription: test\n' > deb/DEBIAN/control
dpkg-deb --root-owner-group -Znone --build deb repo/linux-image-test_1_amd64.deb > /dev/null
{ cat deb/DEBIAN/control; cd repo; for d in *.deb; do echo "Filename: ./$d"; echo "Size: $(stat -c %s $d)"; echo "SHA256: $(sha256sum $d | cut -d' ' -f1)"; done; } > repo/Packages
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/* /var/lib/apt/lists/*
echo 'deb [trusted=yes] file:/srv/repo ./' > /etc/apt/sources.list
cd /run/test/out
memlinux build --kernel debian:linux-image-test --modules none -o /srv/out
ls /srv/out > fetched
test -z "$(ls -A /var/lib/apt/lists)" # which are not ours

# By http, of an address that memlinuxd itself does not reach. What came is told by
# its digest.
mkdir /srv/www
head -c 3000000 /dev/urandom > /srv/www/x.tar
busybox httpd -p 127.0.0.1:8080 -h /srv/www
memlinux build --kernel source:http://127.0.0.1:8080/x.tar --kernel-sha256 $(printf '%064d' 0) -o /srv/none 2> refused && false || echo $? >> refused
sha256sum < /srv/www/x.tar > digest

# A busybox that is compiled, as far as such a small one is.
mkdir -p /srv/busybox/applets
touch /srv/busybox/applets/applet_tables.c
cat > /srv/busybox/who.c <<'END'
#include <pwd.h>
#include <stdio.h>
#include <unistd.h>
int main(void) { return printf("by %s\n", getpwuid(geteuid())->pw_name) < 0; }
END
printf '%s\n' 'VERSION = 1' 'PATCHLEVEL = 99' 'SUBLEVEL = 0' 'EXTRAVERSION =' 'defconfig:' '	@echo CONFIG_BUSYBOX=y > .config' 'oldconfig:' '	@read x; test -z "$$x"' \
	'busybox: who.c' '	gcc -O2 -o who who.c' '	./who > who.txt' '	cp /bin/busybox busybox' '	cat who.txt >> busybox' > /srv/busybox/Makefile
memlinux build --kernel /srv/out/vmlinuz --modules none --busybox source:/srv/busybox --compression none -o /srv/compiled
grep -aom1 'by _memlinux' /srv/compiled/initramfs.img > compiled

# What runs of the services, besides memlinuxd, and the virtual machine.
running() { systemctl list-units --plain --no-legend --all 'memlinux-*'; grep -lsx 'qemu-system-x86' /proc/[0-9]*/comm || :; }
guest() { for i in {1..1200}; do running | grep -q qemu-system && return; running | grep -q 'memlinux-qemu.*running' && grep -qsx qemu-system-x86 /proc/[0-9]*/comm && return; sleep 0.1; done; return 1; }

memlinux write --yes --kernel /srv/out/vmlinuz --modules none /srv/stick.img & pid=$!
guest
kill -INT $pid
wait $pid && false || test $? = 130
running > cancelled
systemctl is-active memlinuxd

memlinux write --yes --kernel /srv/out/vmlinuz --modules none /srv/stick3.img 2> stopped & pid=$!
guest
systemctl stop memlinuxd
wait $pid && false || echo $? >> stopped
running >> stopped
systemctl start memlinuxd

memlinux write --yes --kernel /srv/out/vmlinuz --modules none /srv/stick2.img & pid=$!
guest
systemctl kill --kill-whom=main --signal=SIGKILL memlinuxd
! wait $pid
for i in {1..100}; do running > killed; test -s killed || break; sleep 0.1; done
journalctl --boot --no-pager --output=cat | grep '^Started memlinux-' > units
`
