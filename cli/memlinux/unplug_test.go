package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/imagegen/kbuild/kbuildtest"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/pc"
)

// unplugScript writes a stick that is pulled out meanwhile and put in again.
const unplugScript = `set -e
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
stick
memlinux devices --json > plugged
name=$(basename "$(readlink -f "$link")")
memlinux write --json --yes --no-boot-test --kernel host "$link" > first 2> first-error &
job=$!
until grep -q '"phase":"write".*"bytes":[1-9]' first; do
	kill -0 $job
	sleep 0.1
done
echo pc: pull it out
while [ -e /sys/block/$name ]; do sleep 0.05; done
gone=$(date +%s%N)
code=0
wait $job || code=$?
echo $code > first-code
echo $((($(date +%s%N) - gone) / 1000000)) > first-ms
memlinux devices --json > unplugged
echo pc: put it in
stick
memlinux write --json --resume --no-boot-test > second
memlinux devices --json > again
`

// A real USB stick, as far as a machine's kernel can tell, is pulled out while it
// is written: that is told at once and in plain words. Put in again, the write is
// gone on with, and the stick boots.
func TestUnplug(t *testing.T) {
	w := newWorld(t)
	kernel, config := kbuildtest.Kernel(t)
	tree := t.TempDir()
	sh(t, need.Tool(t, "make", "make"), "--silent", "-C", "../..", "install", "DESTDIR="+tree)
	grubParts(t, tree)
	image := w.path("stick.img")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	// At first it needs half a minute for what is to be written.
	stick := pc.Stick{Serial: "MEMSTICK", Image: image, Rate: 256 << 10}
	disk := pc.Build(t, pc.Spec{Loader: pc.GRUB2BIOS, Kernel: kernel, Config: config, Tree: tree, Files: map[string]string{
		"usr/bin/busybox":      need.File(t, "/bin/busybox", "busybox-static"),
		"usr/bin/grub-mkimage": need.Tool(t, "grub-mkimage", "grub-common"),
	}})
	m := pc.Start(t, disk, pc.Guest{Boots: []string{unplugScript}, Sticks: []pc.Stick{stick}})
	m.Expect("pc: pull it out")
	m.Unplug(stick)
	m.Expect("pc: put it in")
	stick.Rate = 0
	m.Plug(stick)
	files := m.Boot(1)
	m.Off()

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
	for file, want := range map[string]bool{"plugged": true, "unplugged": false, "again": true} {
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

// grubParts puts what memlinux needs of GRUB into a tree.
func grubParts(t *testing.T, tree string) {
	t.Helper()
	for dir, pkg := range map[string]string{"/usr/lib/grub/i386-pc": "grub-pc-bin", "/usr/lib/grub/x86_64-efi": "grub-efi-amd64-bin"} {
		need.File(t, filepath.Join(dir, "moddep.lst"), pkg)
		if err := os.MkdirAll(filepath.Join(tree, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		for _, pattern := range []string{"*.mod", "*.lst", "*.img"} {
			files, err := filepath.Glob(filepath.Join(dir, pattern))
			if err != nil {
				t.Fatal(err)
			}
			if len(files) == 0 {
				continue
			}
			if out, err := exec.Command("cp", append(files, filepath.Join(tree, dir))...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
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
