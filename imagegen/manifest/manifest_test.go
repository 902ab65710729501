package manifest

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/imagegen/microcode"
)

func sample() Manifest {
	return Manifest{
		Version: Version, ID: "0123456789abcdef", Cmdline: "console=tty0", Boot: []string{"bios", "uefi"}, Memory: Memory{BIOS: 48, UEFI: 96},
		Kernel:    Kernel{Release: "6.1.0", Source: "boot", Size: 1000, SHA256: strings.Repeat("a", 64)},
		Microcode: Microcode{Size: 100, Updates: []microcode.Update{{Vendor: microcode.Intel, Signatures: []string{"000906ea"}, Revision: "000000f4", Size: 80}}},
		Initramfs: Initramfs{Size: 100 + 30 + 20 + 7 + 3, Compression: "zstd", Trailer: Cost{124, 3}, Files: []File{
			{Path: "bin", Mode: "040755", Why: "memlinux's own", Cost: Cost{116, 20}},
			{Path: "bin/curl", Mode: "104755", Size: 5, SHA256: strings.Repeat("b", 64), Why: "program of the recipe", Cost: Cost{200, 30}},
			{Path: "bin/curl2", Mode: "120777", Link: "curl", Why: "program of the recipe", Cost: Cost{120, 7}},
		}},
		Busybox: Busybox{Version: "1.35"},
	}
}

func TestManifestComesBackAsItWasWritten(t *testing.T) {
	text, err := sample().JSON()
	if err != nil {
		t.Fatal(err)
	}
	back, err := Parse(bytes.NewReader(text))
	if diff := cmp.Diff(sample(), back); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"nothing", "", "not one that memlinux wrote"},
		{"another JSON", `{"a": 1}`, "not one that memlinux wrote"},
		{"a wrong type", `{"version": 1, "id": "x", "kernel": 5}`, "not one that memlinux wrote"},
		{"no firmware, so that nothing would be booted", `{"version": 1, "id": "x", "memory": {"bios_mib": 1, "uefi_mib": 1}}`, "not one that memlinux wrote"},
		{"a firmware that does not exist", `{"version": 1, "id": "x", "boot": ["bios", "x"], "memory": {"bios_mib": 1, "uefi_mib": 1}}`, "there are bios and uefi"},
		{"a later format", `{"version": 9, "id": "x", "boot": ["bios"], "memory": {"bios_mib": 1, "uefi_mib": 1}}`, "use a newer one"},
	} {
		if _, err := Parse(strings.NewReader(tc.text)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestExplainAccountsForEveryByte(t *testing.T) {
	m := sample()
	a, err := m.Explain("/")
	if err != nil || a.Sum.Compressed != m.Kernel.Size+m.Initramfs.Size || a.Size != a.Sum.Compressed || len(a.Items) != 6 {
		t.Errorf("%+v, %v", a, err)
	}
	a, err = m.Explain("/bin/curl")
	if diff := cmp.Diff(Account{Items: []Item{{"bin/curl", "file", "program of the recipe", Cost{200, 30}}}, Sum: Cost{200, 30}}, a); diff != "" || err != nil {
		t.Errorf("a file, and not one whose name begins with its: %v, %s", err, diff)
	}
	if a, err = m.Explain("bin/"); err != nil || len(a.Items) != 3 {
		t.Errorf("a folder: %+v, %v", a, err)
	}
	if _, err = m.Explain("/usr"); err == nil {
		t.Error("a file that is not there was explained")
	}
	m.Initramfs.Files[1].Compressed--
	if _, err = m.Explain(""); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("a byte that is not accounted for: %v", err)
	}
}

func TestDiff(t *testing.T) {
	if d := Diff(sample(), sample()); len(d) != 0 {
		t.Errorf("two equal ones: %+v", d)
	}
	b := sample()
	b.Cmdline = "quiet"
	b.Initramfs.Files[1].SHA256 = strings.Repeat("b", 63) + "c"
	b.Initramfs.Files[1].Compressed = 40
	b.Initramfs.Files[2] = File{Path: "init", Mode: "100755", Size: 1, Why: "own", Cost: Cost{3, 4}}
	b.Initramfs.Files[0].Compressed++ // the neighbours' doing, not a change
	got := Diff(sample(), b)
	for i := range got {
		got[i].Before, got[i].After = got[i].Before[:min(4, len(got[i].Before))], got[i].After[:min(4, len(got[i].After))]
	}
	want := []Change{
		{What: "command line", Before: "cons", After: "quie"},
		{What: "file", Path: "bin/curl", Before: "mode", After: "mode", Bytes: 10},
		{What: "link", Path: "bin/curl2", Before: "mode", Bytes: -7},
		{What: "file", Path: "init", After: "mode", Bytes: 4},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzParse(f *testing.F) {
	text, _ := sample().JSON()
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := Parse(bytes.NewReader(text))
		if err != nil {
			return
		}
		_, _ = m.Explain("")
		_ = Diff(m, sample())
	})
}
