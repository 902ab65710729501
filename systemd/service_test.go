package systemd

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/nspawn"
	"github.com/memlinux/memlinux/testvm/pc"
)

// programs is the folder with what build made, for all tests.
var programs string

func TestMain(m *testing.M) {
	if what := os.Getenv(serviceVariable); what != "" {
		asService(what)
		return
	}
	code := m.Run()
	if programs != "" {
		os.RemoveAll(programs)
	}
	os.Exit(code)
}

var build = sync.OnceValue(func() error {
	var err error
	if programs, err = os.MkdirTemp("", "memlinux-programs-"); err != nil {
		return err
	}
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", programs+"/", "../cli/memlinux", "../daemon/memlinuxd").CombinedOutput()
	if err != nil {
		return fmt.Errorf("go build: %w: %s", err, out)
	}
	return nil
})

// installed is memlinux as make install lays it down, for a Debian.
func installed(t *testing.T) map[string]string {
	t.Helper()
	need.Root(t)
	if err := build(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files := map[string]string{"/usr/bin/memlinux": programs + "/memlinux", "/usr/libexec/memlinuxd": programs + "/memlinuxd"}
	for to, name := range map[string]string{
		"/usr/lib/systemd/system/":           "memlinuxd.service",
		"/usr/share/dbus-1/system-services/": "org.memlinux.Memlinux1.service",
		"/usr/share/dbus-1/system.d/":        "org.memlinux.Memlinux1.conf",
		"/usr/share/polkit-1/actions/":       "org.memlinux.memlinux1.policy",
	} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text = []byte(strings.ReplaceAll(string(text), "@libexecdir@", "/usr/libexec"))
		files[to+name] = filepath.Join(dir, name)
		if err := os.WriteFile(files[to+name], text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// disk is an empty one.
func disk(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 128<<20); err != nil {
		t.Fatal(err)
	}
	return need.Loop(t, path, "512")
}

// prepare makes the service's start not depend on how often it was started, and
// gives the script what it waits with.
const prepare = `
mkdir -p /etc/systemd/system/memlinuxd.service.d /etc/memlinux /var/cache/memlinux
printf '[Unit]\nStartLimitIntervalSec=0\n' > /etc/systemd/system/memlinuxd.service.d/test.conf
systemctl daemon-reload
systemctl reload dbus
# Tries until it is so, for no longer than a machine with other work needs.
until_so() {
	local end=$((SECONDS + 60))
	until "$@"; do
		if [ $SECONDS -ge $end ]; then echo "this never was so: $*"; return 1; fi
		sleep 0.05
	done
}
state() { [ "$(systemctl show -P ActiveState memlinuxd)" = $1 ]; }
version() { busctl call org.memlinux.Memlinux1 /org/memlinux/Memlinux1 org.freedesktop.DBus.Properties Get ss org.memlinux.Memlinux1.Manager Version; }
# Begins a job on the disk that waits for this lock of the cache.
begin() {
	flock /var/cache/memlinux/apt.lock sleep infinity &
	lock=$!
	memlinux write --yes --no-boot-test --kernel debian:linux-image-cloud-amd64 $disk > write 2>&1 &
	writer=$!
	until_so eval '[ "$(systemd-inhibit --list --no-legend | grep -c memlinux)" = 1 ] || ! kill -0 $writer'
	kill -0 $writer || { cat write; exit 1; }
}
`

// The service comes when it is called and goes when it has nothing to do, and
// nobody's call is lost at that.
func TestComesAndGoes(t *testing.T) {
	said := nspawn.Run(t, nspawn.Debian{Files: installed(t), Script: prepare + `
state inactive
memlinux jobs
state active
echo 'idle-exit = "0.05s"' > /etc/memlinux/memlinux.toml
systemctl reload memlinuxd
until_so state inactive
[ "$(systemctl show -P Result memlinuxd)" = success ]
# Calls that come about when it leaves.
for i in {40..64}; do
	version > /dev/null
	sleep 0.0$i
done
journalctl -u memlinuxd --no-pager -o cat | grep -c Deactivated > left
# A configuration that can't be read changes nothing.
systemctl stop memlinuxd
echo 'idle-exit = "0s"' > /etc/memlinux/memlinux.toml
version > /dev/null
echo 'idle-exit = nonsense' > /etc/memlinux/memlinux.toml
systemctl reload memlinuxd
until_so eval 'journalctl -u memlinuxd -o cat | grep -q "stays as it was"'
until_so state active
# Another version was put in its place: it goes on the next occasion.
cp /usr/libexec/memlinuxd /usr/libexec/new
mv /usr/libexec/new /usr/libexec/memlinuxd
echo 'idle-exit = "0s"' > /etc/memlinux/memlinux.toml
systemctl reload memlinuxd
until_so state inactive
version > /dev/null
`})
	if n := strings.TrimSpace(said["left"]); n == "0" || n == "" {
		t.Error("it never left")
	}
}

// A stick is written and booted under the unit, and unmounted by systemd before;
// the journal tells of it.
func TestWritesAStick(t *testing.T) {
	kernel, config := need.Kernel(t)
	loop := disk(t)
	files := installed(t)
	files["/boot/"+filepath.Base(kernel)], files["/boot/"+filepath.Base(config)] = kernel, config
	said := nspawn.Run(t, nspawn.Debian{Files: files, Devices: []string{loop}, Script: "disk=" + loop + prepare + `
memlinux devices | grep $disk
mkfs.ext4 -q $disk
mkdir -p /media/anna/a-stick
mount $disk /media/anna/a-stick
manager() { busctl --json=short call org.memlinux.Memlinux1 /org/memlinux/Memlinux1 org.memlinux.Memlinux1.Manager "$@"; }
device=/org/memlinux/Memlinux1/devices/$(basename $disk)
token=$(manager Plan 'oa{sv}' $device 0 | sed 's/.*"token":{"type":"s","data":"\([0-9a-f]*\)".*/\1/')
bytes=$(printf /media/anna/a-stick | od -An -v -tu1)
manager Write 'osa{sv}' $device $token 1 unmount aay 1 $(echo $bytes | wc -w) $bytes
for i in {1..400}; do memlinux jobs --json > job; grep -q '"state":"running"' job || break; sleep 0.5; done
journalctl --boot -o cat > journal
if grep a-stick /proc/mounts; then exit 1; fi
journalctl -u memlinuxd -o json MEMLINUX_DEVICE=$(basename $disk) > story
`})
	var job struct {
		State  string
		Report struct {
			Verified bool
			Boots    []struct {
				Firmware string
				OK       bool
			}
		}
	}
	if err := json.Unmarshal([]byte(said["job"]), &job); err != nil || job.State != "succeeded" || !job.Report.Verified || len(job.Report.Boots) != 2 || !job.Report.Boots[0].OK || !job.Report.Boots[1].OK {
		t.Errorf("the job (%v):\n%s\n%s", err, said["job"], said["journal"])
	}
	if n := strings.Count(said["journal"], "Started memlinux-qemu-"); n != 2 {
		t.Errorf("%d services of QEMU were started:\n%s", n, said["journal"])
	}
	var phases []string
	for line := range strings.Lines(said["story"]) {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e["MEMLINUX_USER"] != "0" || e["MEMLINUX_KIND"] != "write" || e["_SYSTEMD_UNIT"] != "memlinuxd.service" || e["MESSAGE_ID"] == nil || e["MEMLINUX_JOB"] == nil {
			t.Errorf("an entry of the journal is %s", line)
		}
		phases = append(phases, e["MEMLINUX_PHASE"].(string))
		if result, ended := e["MEMLINUX_RESULT"]; ended && result != "succeeded" {
			t.Errorf("the journal says %v", e["MESSAGE"])
		}
	}
	for _, want := range []string{"kernel", "initramfs", "image", "write", "read back", "boot BIOS", "boot UEFI"} {
		if !slices.Contains(phases, want) {
			t.Errorf("the journal tells of the phases %q, and not of %s", phases, want)
		}
	}
}

// This PC's boot menu is changed under the unit, and put back.
func TestChangesTheBootMenu(t *testing.T) {
	need.Root(t)
	kernel, config := need.Kernel(t)
	p := pc.Bare(t, pc.Spec{Loader: pc.GRUB2BIOS, Kernel: kernel, Config: config})
	device := p.Attach(t)
	root := fmt.Sprintf("%sp%d", device, p.Root.Number)
	said := nspawn.Run(t, nspawn.Debian{Files: installed(t), Devices: []string{device, root}, Script: "root=" + root + prepare + `
mkdir /disk
mount -o noatime $root /disk
mount --bind /disk/boot /boot
list() { find /boot -printf '%y %m %U:%G %p\n' -type f -exec sha256sum {} +; }
list | sort > before
memlinux install --json --no-boot-test --next --kernel host > report
memlinux entries
list | sort > installed
memlinux rollback
list | sort > after
`})
	t.Log(said["said"])
	if said["before"] != said["after"] || said["before"] == said["installed"] || !strings.Contains(said["installed"], "/boot/memlinux/vmlinuz-") {
		t.Errorf("/boot was\n%s\nthen\n%s\nand in the end\n%s", said["before"], said["installed"], said["after"])
	}
}

// A job that is stopped from outside, or cut off, is known as such afterwards,
// and the machine may not go down meanwhile.
func TestJobIsCutOff(t *testing.T) {
	loop := disk(t)
	said := nspawn.Run(t, nspawn.Debian{Files: installed(t), Devices: []string{loop}, Script: "disk=" + loop + prepare + `
begin
systemd-inhibit --list > inhibited
systemctl stop memlinuxd
wait $writer || echo the command ended with $?
[ -z "$(systemd-inhibit --list --no-legend | grep memlinux)" ]
memlinux jobs --json > stopped

kill $lock; wait $lock || true
begin
systemctl kill --kill-who=main --signal=SIGKILL memlinuxd
wait $writer || echo the command ended with $?
until_so eval '[ -z "$(systemd-inhibit --list --no-legend | grep memlinux)" ]'
until_so state active
memlinux jobs --json > killed
journalctl -u memlinuxd -o json MEMLINUX_RESULT=failed > story

kill $lock; wait $lock || true
begin
# What hangs is ended by the watchdog: it is the signal that systemd sends then.
systemctl kill --kill-who=main --signal=SIGSTOP memlinuxd
systemctl kill --kill-who=main --signal=SIGABRT memlinuxd
systemctl kill --kill-who=main --signal=SIGCONT memlinuxd
wait $writer || echo the command ended with $?
until_so state active
memlinux jobs --json > aborted
kill $lock
`})
	if !strings.Contains(said["inhibited"], "shutdown:sleep:idle:handle-lid-switch a system is being written on "+filepath.Base(loop)) {
		t.Errorf("the machine is kept up by\n%s", said["inhibited"])
	}
	for name, want := range map[string][]string{
		"stopped": {"cancelled"},
		"killed":  {"cancelled", "failed"},
		"aborted": {"cancelled", "failed", "failed"},
	} {
		var states []string
		for line := range strings.Lines(said[name]) {
			var j struct{ State string }
			if err := json.Unmarshal([]byte(line), &j); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			states = append(states, j.State)
		}
		slices.Sort(states) // jobs of one second are listed in any order
		if !slices.Equal(states, want) {
			t.Errorf("after it was %s, the jobs are %q, want %q", name, states, want)
		}
	}
	if !strings.Contains(said["story"], `"MEMLINUX_PHASE":"kernel"`) || !strings.Contains(said["story"], "interrupted: memlinuxd ended during kernel") {
		t.Errorf("of the job that was cut off the journal says\n%s", said["story"])
	}
}
