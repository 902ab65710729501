package blockdev

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// What a device, its user or another program chose may be anything: it must
// never crash the look at the machine, hide a mount or swap area, pass an unreadable
// value as fine, or reach a terminal unclean.
func FuzzLook(f *testing.F) {
	f.Add("8:0\n", "15728640\n", "0\n", "1\n", "512\n", "7\n", "SanDisk ", "\x00\x80\x00\x04A1B2", "/media/x/a.img\n", "root",
		"28 1 8:1 / /media/x rw,relatime shared:1 - vfat /dev/sda1 rw\n", "Filename\tType\tSize\tUsed\tPriority\n/dev/dm-0 partition 3999996 0 -2\n")
	f.Add("8:0", "99999999999999999999", "", "2", "-512", "-1", "\x1b[31m\u202e", "", "/dev/sda (deleted)", "\xff",
		"1 2 0:3 / / rw - overlay overlay rw,lowerdir=/a\\134:b:/media,upperdir=/c\n3 1 0:4 / /media rw - btrfs /dev/sda1 rw\n", "/media/swap\\040file file 1 2 3\n")
	f.Add("8:0", "0", "1", "0", "4096", "0", "", "", "", "", "4 1 7:0 / /boot rw - xfs /dev/loop0 rw,logdev=/dev/sda1\n", "")

	root := scratch(f)
	s := System{Sys: filepath.Join(root, "sys"), Proc: filepath.Join(root, "proc"), Dev: filepath.Join(root, "dev")}
	class := filepath.Join(s.Sys, "class/block")
	put := func(t testing.TB, path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dirs := map[string]string{}
	for name, dir := range map[string]string{"sda": "pci0000:00/usb1/1-1/host0/block/sda", "sda1": "pci0000:00/usb1/1-1/host0/block/sda/sda1",
		"dm-0": "virtual/block/dm-0", "loop0": "virtual/block/loop0"} {
		dirs[name] = filepath.Join(s.Sys, "devices", dir)
		for _, sub := range []string{"holders", "slaves", "queue", "device", "dm", "loop"} {
			if sub == name || sub == "dm" && name != "dm-0" || sub == "loop" && name != "loop0" {
				continue
			}
			if err := os.MkdirAll(filepath.Join(dirs[name], sub), 0o755); err != nil {
				f.Fatal(err)
			}
		}
		for attr, value := range map[string]string{"size": "2048\n", "ro": "0\n", "removable": "0\n", "queue/logical_block_size": "512\n"} {
			put(f, filepath.Join(dirs[name], attr), value)
		}
	}
	put(f, filepath.Join(dirs["sda1"], "partition"), "1\n")
	put(f, filepath.Join(dirs["sda1"], "dev"), "8:1\n")
	put(f, filepath.Join(dirs["dm-0"], "dev"), "253:0\n")
	put(f, filepath.Join(dirs["loop0"], "dev"), "7:0\n")
	for _, dir := range []string{class, filepath.Join(s.Proc, "self"), s.Dev} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			f.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dirs["dm-0"], "slaves/sda1"), 0o755); err != nil {
		f.Fatal(err)
	}
	for name, dir := range dirs {
		if err := os.Symlink(dir, filepath.Join(class, name)); err != nil {
			f.Fatal(err)
		}
	}

	f.Fuzz(func(t *testing.T, dev, size, ro, removable, sector, seq, vendor, serial, backing, dm, mountinfo, swaps string) {
		for path, text := range map[string]string{
			filepath.Join(dirs["sda"], "dev"): dev, filepath.Join(dirs["sda"], "size"): size, filepath.Join(dirs["sda"], "ro"): ro,
			filepath.Join(dirs["sda"], "removable"): removable, filepath.Join(dirs["sda"], "queue/logical_block_size"): sector,
			filepath.Join(dirs["sda"], "diskseq"): seq, filepath.Join(dirs["sda"], "device/vendor"): vendor, filepath.Join(dirs["sda"], "device/vpd_pg80"): serial,
			filepath.Join(dirs["loop0"], "loop/backing_file"): backing, filepath.Join(dirs["dm-0"], "dm/name"): dm,
			filepath.Join(s.Proc, "self/mountinfo"): mountinfo, filepath.Join(s.Proc, "swaps"): swaps,
		} {
			put(t, path, text)
		}
		v, err := s.look()
		if err != nil {
			return
		}
		mounts, err := parseMountinfo(mountinfo)
		if err != nil {
			t.Fatalf("a mountinfo that is not understood was passed over: %v", err)
		}
		areas, err := parseSwaps(swaps)
		if err != nil {
			t.Fatalf("swap areas that are not understood were passed over: %v", err)
		}
		for name, n := range v.nodes {
			d := v.device(n)
			for _, text := range []string{d.Vendor, d.Model, d.Serial, d.Backing} {
				if Clean(text) != text {
					t.Errorf("%s: %q can't be printed", name, text)
				}
			}
			for _, r := range d.Reasons {
				if strings.ContainsFunc(r.Text, func(r rune) bool { return Clean(string(r)) != string(r) && r != ' ' }) {
					t.Errorf("%s: %q can't be printed", name, r.Text)
				}
			}
		}
		sda := v.nodes["sda"]
		d := v.device(sda)
		fine := !slices.ContainsFunc(d.Reasons, func(r Reason) bool { return !r.Soft })
		for _, m := range mounts {
			if (m.dev == devNum{8, 1} || m.dev == devNum{sda.Major, sda.Minor} && m.dev.major != 0) && fine {
				t.Errorf("%+v is on it, and it is fine: %v", m, d.Reasons)
			}
		}
		for _, a := range areas {
			if !a.file && fine {
				t.Errorf("swap on the device %q, which is this disk or an unknown one, and it is fine: %v", a.path, d.Reasons)
			}
		}
		trimmed := func(s string) string { return strings.TrimSuffix(s, "\n") }
		if fine && (d.Size <= 0 || trimmed(ro) != "0" || trimmed(removable) != "0" && trimmed(removable) != "1" || d.LogicalBlockSize != 512 && d.LogicalBlockSize != 4096) {
			t.Errorf("it is fine: %+v", d)
		}
	})
}
