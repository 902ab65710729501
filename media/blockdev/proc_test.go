package blockdev

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseMountinfo(t *testing.T) {
	const text = `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
60 28 65:161 / /media/a\040b\134c\011d rw shared:1 master:2 propagate_from:3 unbindable - vfat /dev/sd\040a rw
61 28 0:44 / /- rw - btrfs /dev/sdc
`
	got, err := parseMountinfo(text)
	if err != nil {
		t.Fatal(err)
	}
	want := []mount{
		{36, devNum{98, 0}, "/mnt2", "ext3", "/dev/root", "rw,errors=continue"},
		{27, devNum{254, 0}, "/", "ext4", "/dev/vda", "rw,discard"},
		{60, devNum{65, 161}, "/media/a b\\c\td", "vfat", "/dev/sd a", "rw"},
		{61, devNum{0, 44}, "/-", "btrfs", "/dev/sdc", ""},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(mount{}, devNum{})); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []string{
		"nonsense",
		"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 ext3 /dev/root rw",
		"36 35 98:0 /mnt1 /mnt2 rw,noatime - ext3",
		"x6 35 98:0 /mnt1 /mnt2 rw,noatime - ext3 /dev/root rw",
		"36 35 98 /mnt1 /mnt2 rw,noatime - ext3 /dev/root rw",
		"36 35 98:-1 /mnt1 /mnt2 rw,noatime - ext3 /dev/root rw",
		"36 35 4294967296:1 /mnt1 /mnt2 rw,noatime - ext3 /dev/root rw",
	} {
		if m, err := parseMountinfo(bad); err == nil {
			t.Errorf("%q: %v and no error", bad, m)
		}
	}
}

func TestParseSwaps(t *testing.T) {
	const header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	got, err := parseSwaps(header + "/dev/dm-2                               partition\t7999996\t\t0\t\t-2\n" +
		"/mnt/swap\\040file\\040(deleted)  file\t\t1048572\t\t0\t\t-2\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]swap{{"/dev/dm-2", false}, {"/mnt/swap file", true}}, got, cmp.AllowUnexported(swap{})); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []string{"nonsense", header + "/dev/sda1", header + "/dev/sda1 what 1 2 3", header + "sda1 partition 1 2 3"} {
		if s, err := parseSwaps(bad); err == nil {
			t.Errorf("%q: %v and no error", bad, s)
		}
	}
}

func TestParseExport(t *testing.T) {
	got := parseExport("DEVNAME=/dev/sda1\nLABEL=x\\ \\$y\\\"\\\\z\\ é\nTYPE=ext4\n\n=x\nnothing\nEND=\\")
	want := map[string]string{"DEVNAME": "/dev/sda1", "LABEL": `x $y"\z é`, "TYPE": "ext4", "END": `\`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestPathsOfMount(t *testing.T) {
	for super, want := range map[string][]string{
		"rw":                             nil,
		"rw,relatime,subvol=/@home":      {"/@home"},
		"rw,logdev=/dev/sda1,sunit=8":    {"/dev/sda1"},
		"rw,lowerdir=/a:/b::/c,xino=off": {"/a", "/b", "/c"},
		`rw,lowerdir=/a\134:b\054c:d:/e\040f,upperdir=/g`: {"/a:b,c", "/e f", "/g"},
		`rw,lowerdir=/a\,b,upperdir=/c`:                   {"/a,b", "/c"},
		`rw,upperdir=/a\`:                                 {`/a\`},
	} {
		if diff := cmp.Diff(want, mount{super: super}.paths()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", super, diff)
		}
	}
}

func FuzzParseMountinfo(f *testing.F) {
	if text, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(string(text))
	}
	f.Add("36 35 98:0 /mnt1 /m\\040t2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n")
	f.Add("25 1 0:27 / / rw - overlay overlay rw,lowerdir=/a\\134:b:/c::/d,upperdir=/e\\054f\n")
	f.Add("1 2 3:4 5 \\08\\0400\\ 7 - - - -")
	f.Fuzz(func(t *testing.T, text string) {
		mounts, err := parseMountinfo(text)
		lines := 0
		for _, line := range strings.Split(text, "\n") {
			if line != "" {
				lines++
			}
		}
		if err == nil && len(mounts) != lines {
			t.Errorf("%d lines, %d mounts: one was lost without an error", lines, len(mounts))
		}
		for _, m := range mounts {
			holding(mounts, m.point+"/x")
			isSystem(m.point)
			for _, path := range m.paths() {
				if path[0] != '/' {
					t.Errorf("path %q", path)
				}
			}
		}
	})
}

func FuzzParseSwaps(f *testing.F) {
	f.Add("Filename\tType\tSize\tUsed\tPriority\n/dev/dm-2 partition 7999996 0 -2\n")
	f.Add("/a\\040b\\040(deleted) file 1 2 3")
	f.Fuzz(func(t *testing.T, text string) {
		swaps, err := parseSwaps(text)
		if err != nil {
			return
		}
		for _, s := range swaps {
			if !strings.HasPrefix(s.path, "/") && s.path != "" {
				t.Errorf("path %q", s.path)
			}
		}
	})
}

func FuzzParseExport(f *testing.F) {
	f.Add("DEVNAME=/dev/sda1\nLABEL=x\\ \\$y\\\"\\\\z\nTYPE=ext4\n")
	f.Add("A=\\")
	f.Fuzz(func(t *testing.T, text string) {
		for key, value := range parseExport(text) {
			if key == "" || len(value) > len(text) || len([]rune(Clean(value))) > 64 {
				t.Errorf("%q: %q", key, value)
			}
		}
	})
}
