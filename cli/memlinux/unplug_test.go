package main

import (
	"cmp"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/debian/debtest"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/pc"
)

// unplugScript installs the package, and has the service started on a PC that never
// saw a stick. Its ordinary user may not write one, and then may; the stick is pulled
// out meanwhile and put in again. What it says goes on the serial line.
const unplugScript = `set -e
anna() { runuser -u anna -- "$@"; }
pid() { systemctl show --property=MainPID --value memlinuxd.service; }
# The stick under the name that udev gives it, as soon as it does.
stick() {
	for i in {1..600}; do
		link=$(echo /dev/disk/by-id/usb-*_MEMSTICK-0:0)
		[ -b "$link" ] && return
		sleep 0.1
	done
	echo no stick came up
	return 1
}
dpkg --install /root/memlinux.deb
systemctl show --property=ActiveState --value memlinuxd.service > installed
if grep ' sd$' /proc/devices; then
	echo the driver of sticks was there before the service
	exit 1
fi
anna memlinux devices --json > before
pid > pid-before
echo pc: put it in
stick
anna memlinux devices --json > plugged
pid > pid-plugged

code=0
anna memlinux write --yes --no-boot-test --kernel host --modules none "$link" < /dev/null > /dev/null 2> denied || code=$?
echo $code > denied-code
cmp --bytes=1048576 "$link" /dev/zero
cat > /etc/polkit-1/rules.d/50-test.rules <<'END'
polkit.addRule(function (action, subject) {
    if (action.id == "org.memlinux.memlinux1.write-removable" && action.lookup("serial") == "MEMSTICK" && subject.user == "anna")
        return polkit.Result.YES;
});
END
systemctl restart polkit

name=$(basename "$(readlink -f "$link")")
anna memlinux write --json --yes --no-boot-test --kernel host --modules none "$link" > first 2> first-error &
job=$!
until grep -q '"phase":"write".*"bytes":[1-9]' first; do
	kill -0 $job
	sleep 0.1
done
systemctl show memlinuxd.service > unit
cat /proc/$(pid)/status > process
# Nothing in the service gets a device that its filter does not let through.
inside() { bash -c 'echo $$ > /sys/fs/cgroup/system.slice/memlinuxd.service/cgroup.procs; exec 3< "$1"' bash "$1"; }
inside "$link"
true 3< /dev/loop-control
if inside /dev/loop-control 2> filter; then exit 1; fi
echo pc: pull it out
while [ -e /sys/block/$name ]; do sleep 0.05; done
gone=$(date +%s%N)
code=0
wait $job || code=$?
echo $code > first-code
echo $((($(date +%s%N) - gone) / 1000000)) > first-ms
anna memlinux devices --json > unplugged
echo pc: put it in again
stick
anna memlinux write --json --resume --no-boot-test > second
anna memlinux devices --json > again
journalctl --sync
journalctl --unit=memlinuxd --output=json --no-pager MEMLINUX_KIND=write > journal
id --user anna > user
`

// The package in a Debian as PCs have it: its kernel with a module for each driver,
// systemd, udev, polkit and a real USB stick, as far as that kernel can tell. The
// service that systemd confines runs before there is a driver for sticks. An ordinary
// user may not write one, and may by an administrator's rule. Pulled out while it is
// written, that is told at once and in plain words. Put in again, the write is gone on
// with, and the stick boots.
func TestUnplug(t *testing.T) {
	w := newWorld(t)
	image := w.path("stick.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	// At first it needs half a minute for what is to be written.
	stick := pc.Stick{Serial: "MEMSTICK", Image: image, Rate: 256 << 10, Out: true}
	s := debianPC(t)
	s.Files["root/memlinux.deb"] = debtest.Build(t, "../..", w.path("deb"))
	m := pc.Start(t, pc.Build(t, s), pc.Guest{NVMe: true, Boots: []string{unplugScript}, Sticks: []pc.Stick{stick}})
	m.Expect("pc: put it in")
	m.Plug(stick)
	m.Expect("pc: pull it out")
	m.Unplug(stick)
	m.Expect("pc: put it in again")
	stick.Rate = 0
	m.Plug(stick)
	files := m.Boot(1)
	m.Off()

	if state := strings.TrimSpace(files["installed"]); state != "inactive" {
		t.Errorf("after its installation the service is %s", state)
	}
	if code, says := strings.TrimSpace(files["denied-code"]), files["denied"]; code != "4" || !strings.HasPrefix(says, "memlinux: not authorized: ") || strings.Count(says, "\n") != 1 {
		t.Errorf("without a rule: exit %s, want 4; it says %q", code, says)
	}
	if files["pid-before"] != files["pid-plugged"] {
		t.Errorf("the service was %s, and %s when the stick was there", files["pid-before"], files["pid-plugged"])
	}
	confined(t, files)
	journaled(t, files, stick.Serial)
	if code := strings.TrimSpace(files["first-code"]); code != "1" {
		t.Errorf("exit %s, want 1", code)
	}
	const sentence = "the disk was unplugged or fell off its bus: plug it in again"
	if says := files["first-error"]; !strings.HasPrefix(says, "memlinux: ") || !strings.Contains(says, sentence) || strings.Count(says, "\n") != 1 {
		t.Errorf("it says %q", says)
	}
	ms, err := strconv.Atoi(strings.TrimSpace(files["first-ms"]))
	if err != nil || ms > 5000 {
		t.Errorf("it ended %q ms after the stick was gone", files["first-ms"])
	}
	t.Logf("it ended %d ms after the stick was gone", ms)
	if r := lastReport(t, files["first"]); r.Image == nil || r.Image.Fault != "unplugged" || r.Written || r.Target == nil || r.Target.Serial != stick.Serial {
		t.Errorf("the report is of %+v", r)
	}
	for file, want := range map[string]bool{"before": false, "plugged": true, "unplugged": false, "again": true} {
		if got := strings.Contains(files[file], stick.Serial); got != want {
			t.Errorf("%s: the stick is listed: %v\n%s", file, got, files[file])
		}
	}
	second := lastReport(t, files["second"])
	if !second.Written || second.Resumed == "" || second.Image.Unchanged == 0 || second.Target.Serial != stick.Serial {
		t.Errorf("the report is of %+v, %+v", second, second.Image)
	}
	t.Logf("resumed: %d bytes written, %d were there", second.Image.Written, second.Image.Unchanged)
	w.run("verify", "--no-boot-test", image).wants(t, 0)
	c := w.console(t, "vm", image)
	c.expect("memlinux: ready build=" + second.System.ID)
	c.expect("memlinux:~# ")
	c.typed("poweroff\r")
	c.ends(0)
}

// debianPC is a PC with the kernel that Debian's have, its modules, and an initramfs
// of ours that finds its disk.
func debianPC(t *testing.T) pc.Spec {
	t.Helper()
	root := need.KernelOfPCs(t)
	tree := t.TempDir()
	modules, _ := filepath.Glob(filepath.Join(root, "lib/modules/*")) // the pattern is right
	to := filepath.Join(tree, "usr/lib/modules", filepath.Base(modules[0]))
	sh(t, "mkdir", "-p", filepath.Dir(to))
	sh(t, "cp", "-a", modules[0], to)
	// Four fifths of the bytes, for what this PC has not.
	for _, other := range []string{"drivers/gpu", "drivers/infiniband", "drivers/isdn", "drivers/media", "drivers/net", "drivers/staging", "net", "sound"} {
		sh(t, "rm", "-rf", filepath.Join(to, "kernel", other))
	}
	busybox, err := os.Open(need.File(t, "/bin/busybox", "busybox-static"))
	if err != nil {
		t.Fatal(err)
	}
	defer busybox.Close()
	system, err := imagegen.Generator{CacheDir: need.Cache(t), Root: root}.Build(t.Context(), imagegen.Recipe{
		Kernel: imagegen.KernelSource{Host: true}, Busybox: imagegen.BusyboxSource{File: busybox}, Modules: []string{"disk", "filesystems"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return pc.Spec{Loader: pc.GRUB2BIOS, Kernel: system.Kernel.Path, Config: filepath.Join(root, "boot/config-"+system.Manifest.Kernel.Release),
		Initrd: system.Initramfs.Path, Tree: tree, Files: map[string]string{}}
}

// confined checks that the unit's limits were in force for memlinuxd when it wrote:
// what systemd set, and what the kernel has of it.
func confined(t *testing.T, files map[string]string) {
	t.Helper()
	for _, want := range []string{"ProtectSystem=strict", "DevicePolicy=closed", "PrivateNetwork=yes", "NoNewPrivileges=yes", "MemoryDenyWriteExecute=yes", "ActiveState=active", "UnitFileState=static"} {
		if !strings.Contains("\n"+files["unit"], "\n"+want+"\n") {
			t.Errorf("memlinuxd.service has not %s", want)
		}
	}
	for _, want := range []string{"NoNewPrivs:\t1\n", "Seccomp:\t2\n", "CapEff:\t0000000000280206\n"} {
		if !strings.Contains(files["process"], want) {
			t.Errorf("memlinuxd's process has not %q:\n%s", want, files["process"])
		}
	}
	if !strings.Contains(files["filter"], "Operation not permitted") {
		t.Errorf("what runs in the service opens /dev/loop-control: %s", files["filter"])
	}
}

// journaled checks that the journal has the story of the two jobs.
func journaled(t *testing.T, files map[string]string, serial string) {
	t.Helper()
	results, phases := map[string]string{}, map[string]bool{}
	for line := range strings.Lines(files["journal"]) {
		var e struct {
			Job    string `json:"MEMLINUX_JOB"`
			Device string `json:"MEMLINUX_DEVICE"`
			Serial string `json:"MEMLINUX_SERIAL"`
			User   string `json:"MEMLINUX_USER"`
			Phase  string `json:"MEMLINUX_PHASE"`
			Result string `json:"MEMLINUX_RESULT"`
			Unit   string `json:"_SYSTEMD_UNIT"`
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e.Unit != "memlinuxd.service" || e.Serial != serial || e.User != strings.TrimSpace(files["user"]) || e.Job == "" || e.Device == "" {
			t.Errorf("the journal has an entry with %+v", e)
		}
		phases[e.Phase] = true
		results[e.Job] = cmp.Or(e.Result, results[e.Job])
	}
	ends := slices.Sorted(maps.Values(results))
	if !slices.Equal(ends, []string{api.StateFailed, api.StateSucceeded}) || !phases["write"] {
		t.Errorf("by the journal the jobs' results are %q, and the phases %v:\n%s", ends, phases, files["journal"])
	}
}

// lastReport is the one at the end of what a command says with --json.
func lastReport(t *testing.T, lines string) api.Report {
	t.Helper()
	var last struct {
		Event  string
		Report *api.Report
	}
	for line := range strings.Lines(lines) {
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
	}
	if last.Event != "report" || last.Report == nil {
		t.Fatalf("there is no report at the end of\n%s", lines)
	}
	return *last.Report
}
