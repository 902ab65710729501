package pc

import (
	"errors"
	"os"
	"os/exec"
	"testing"
)

// runner runs the script of this boot, tells on the serial line how it ended,
// hands its results out and goes on to the next boot.
const runner = `#!/bin/bash
# The number of this boot.
mkdir -p /var/lib/pc /run/pc/in /run/pc/out
n=$(($(cat /var/lib/pc/boots 2>/dev/null || echo 0) + 1))
echo $n > /var/lib/pc/boots
say() { echo "pc: $*" > /dev/ttyS0; }
for i in {1..100}; do
	[ -b /dev/sr0 ] && [ -e /dev/virtio-ports/out$n ] && break
	sleep 0.1
done
if ! tar -C /run/pc/in -xf /dev/sr0 || [ ! -e /run/pc/in/boot$n ]; then
	say "boot $n of the old system was not expected"
	exec systemctl --no-block poweroff
fi
say "boot $n of the old system"
cd /run/pc/out
bash /run/pc/in/boot$n < /dev/null 2>&1 | tee /run/pc/said > /dev/ttyS0
status=${PIPESTATUS[0]}
[ $status = 0 ] || journalctl --boot --no-pager --output=cat --lines=100 > /dev/ttyS0
cp /run/pc/said said
echo $status > status
tar -cf /dev/virtio-ports/out$n .
cd /
say "boot $n ended"
if [ $status = 0 ] && [ -e /run/pc/in/boot$((n + 1)) ]; then
	exec systemctl --no-block reboot
fi
exec systemctl --no-block poweroff
`

const runnerUnit = `[Unit]
Description=the test's script
After=multi-user.target dbus.service

[Service]
Type=oneshot
ExecStart=/usr/lib/pc/run
# Else it would be stopped by the shutdown that it asks for.
KillMode=process
`

// debian copies a Debian that runs the scripts of [Guest] as it is up.
func debian(t testing.TB, root, from string) {
	t.Helper()
	if err := os.Mkdir(root, 0o755); err != nil { //nolint:gosec // a root is for all to read
		t.Fatal(err)
	}
	argv := []string{"--create", "--numeric-owner", "--directory=" + from, "--anchored"}
	for _, what := range []string{"dev/*", "boot/*", "usr/share/doc/*", "usr/share/man/*", "usr/share/locale/*", "usr/share/zoneinfo/*", "var/cache/apt/*", "var/lib/apt/lists/*"} {
		argv = append(argv, "--exclude=./"+what)
	}
	pack := exec.CommandContext(t.Context(), "tar", append(argv, ".")...)
	unpack := exec.CommandContext(t.Context(), "tar", "--extract", "--numeric-owner", "--directory="+root)
	pipe, err := pack.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	unpack.Stdin, pack.Stderr, unpack.Stderr = pipe, t.Output(), t.Output()
	if err := unpack.Start(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(pack.Run(), unpack.Wait()); err != nil {
		t.Fatalf("copy the Debian: %v", err)
	}
	tr := openTree(t, root)
	defer tr.close()
	tr.write("usr/lib/pc/run", runner, 0o755)
	const units = "etc/systemd/system/"
	tr.write(units+"pc.service", runnerUnit, 0o644)
	tr.link(units+"multi-user.target.wants/pc.service", "../pc.service")
	// It would hang up the line that the script's words go to.
	tr.link(units+"serial-getty@ttyS0.service", "/dev/null")
}
