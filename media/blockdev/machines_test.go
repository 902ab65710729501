package blockdev

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/testvm/need"
)

var update = flag.Bool("update", false, "write the golden files")

// machine lays out a recorded machine, a file of testdata/machines.
func machine(t testing.TB, name string) System {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata/machines", name+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	return layOut(t, string(text))
}

// layOut makes files of what testdata/record.sh prints or a person wrote. A line that begins
// with / names a folder; the indented lines below give its attributes:
// "name = value", "name -> link target", "name/" for an empty folder. "! name" leaves out
// one that every device has and that is filled in otherwise. Lines that
// begin with | make the named path a file instead.
func layOut(t testing.TB, text string) System {
	t.Helper()
	root := scratch(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(path, text string) {
		must(os.MkdirAll(filepath.Dir(path), 0o755))
		must(os.WriteFile(path, []byte(text), 0o600))
	}

	var current string
	var devices []string
	without := map[string]bool{}
	files := map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		switch text := strings.TrimSpace(line); {
		case text == "" || line[0] == '#':
		case line[0] == '/':
			current = filepath.Join(root, line)
			if strings.HasPrefix(line, "/sys/devices/") {
				devices = append(devices, current)
			}
		case line[0] == '|':
			files[current] += strings.TrimPrefix(line, "| ") + "\n"
		case text[0] == '!':
			without[filepath.Join(current, strings.TrimSpace(text[1:]))] = true
		case strings.HasSuffix(text, "/"):
			must(os.MkdirAll(filepath.Join(current, text), 0o755))
		default:
			if link, target, ok := strings.Cut(text, " -> "); ok {
				must(os.MkdirAll(current, 0o755))
				must(os.Symlink(target, filepath.Join(current, link)))
				continue
			}
			attr, value, ok := strings.Cut(text, " = ")
			if !ok {
				t.Fatalf("line %q", line)
			}
			if value[0] == '"' {
				var err error
				value, err = strconv.Unquote(value)
				must(err)
			}
			write(filepath.Join(current, attr), value+"\n")
		}
	}
	for path, text := range files {
		write(path, text)
	}

	class := filepath.Join(root, "sys/class/block")
	must(os.MkdirAll(class, 0o755))
	for _, dir := range devices {
		if _, err := os.Stat(filepath.Join(dir, "size")); err != nil {
			continue // not a block device
		}
		for attr, value := range map[string]string{"ro": "0", "removable": "0", "queue/logical_block_size": "512"} {
			path := filepath.Join(dir, attr)
			if _, err := os.Stat(path); err != nil && !without[path] {
				write(path, value+"\n")
			}
		}
		if holders := filepath.Join(dir, "holders"); !without[holders] {
			if _, err := os.Lstat(holders); err != nil {
				must(os.Mkdir(holders, 0o755))
			}
		}
		must(os.Symlink(dir, filepath.Join(class, filepath.Base(dir))))
	}
	return System{Sys: filepath.Join(root, "sys"), Proc: filepath.Join(root, "proc"), Dev: filepath.Join(root, "dev")}
}

// scratch is a folder in memory where there is one: a machine is hundreds of files.
func scratch(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "machine")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// show prints devices as the golden files keep them.
func show(devices []Device) string {
	var b strings.Builder
	for _, d := range devices {
		fmt.Fprintf(&b, "%s %d:%d %d bytes", d.Name, d.Major, d.Minor, d.Size)
		for _, v := range []struct {
			name string
			set  bool
			text string
		}{
			{"sectors", d.LogicalBlockSize != 512, strconv.Itoa(d.LogicalBlockSize)},
			{"transport", true, d.Transport},
			{"vendor", d.Vendor != "", d.Vendor},
			{"model", d.Model != "", d.Model},
			{"serial", d.Serial != "", d.Serial},
			{"backing", d.Backing != "", d.Backing},
			{"removable", d.Removable, "yes"},
			{"read-only", d.ReadOnly, "yes"},
			{"diskseq", d.DiskSeq != 0, strconv.FormatUint(d.DiskSeq, 10)},
		} {
			if v.set {
				fmt.Fprintf(&b, ", %s %q", v.name, v.text)
			}
		}
		b.WriteString("\n")
		for _, c := range d.Contents {
			fmt.Fprintf(&b, "  on %s: %d bytes\n", c.Name, c.Size)
		}
		for _, r := range d.Reasons {
			soft := ""
			if r.Soft {
				soft = ", soft"
			}
			fmt.Fprintf(&b, "  %s%s: %s\n", r.Code, soft, r.Text)
		}
		if len(d.Reasons) == 0 {
			b.WriteString("  fine\n")
		}
	}
	return b.String()
}

func TestMachines(t *testing.T) {
	recorded, err := filepath.Glob("testdata/machines/*.txt")
	if err != nil || len(recorded) == 0 {
		t.Fatalf("no machines: %v", err)
	}
	for _, path := range recorded {
		name := strings.TrimSuffix(filepath.Base(path), ".txt")
		t.Run(name, func(t *testing.T) {
			devices, err := machine(t, name).Devices(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			got := show(devices)
			golden := strings.TrimSuffix(path, ".txt") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("devices (-want +got):\n%s", diff)
			}
		})
	}
}

// What is recorded of a machine must say of its disks what the machine itself
// does, or the golden files prove nothing.
func TestRecordThisMachine(t *testing.T) {
	need.Root(t)
	name, point := mountedLoop(t)
	upper := filepath.Base(need.Loop(t, "/dev/"+loop(t, 4*mib, "4096"), "512"))
	// Other tests on this machine come and go with loop devices of their own: what
	// changed while it was recorded is recorded again.
	shown := func(s System) string {
		t.Helper()
		devices, err := s.Devices(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return show(slices.DeleteFunc(devices, func(d Device) bool { return d.Transport == "loop" && d.Name != name && d.Name != upper }))
	}
	var got, want string
	for range 20 {
		before := shown(System{})
		text, err := exec.Command(need.Tool(t, "sh", "dash"), "testdata/record.sh").Output()
		if err != nil {
			t.Fatal(err)
		}
		if got, want = shown(layOut(t, string(text))), shown(System{}); want == before && got == want {
			break
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the machine and its record (-machine +record):\n%s", diff)
	}
	if !strings.Contains(got, point) || !strings.Contains(got, "only another name") {
		t.Errorf("the record lacks what was made for it:\n%s", got)
	}
}

func codes(reasons []Reason) []string {
	var all []string
	for _, r := range reasons {
		if !slices.Contains(all, r.Code) {
			all = append(all, r.Code)
		}
	}
	return all
}

// The rules one by one: which codes a disk must have, whatever the words.
func TestReasons(t *testing.T) {
	machines := map[string]System{}
	for _, name := range []string{"laptop", "server", "container", "lost-swap"} {
		machines[name] = machine(t, name)
	}
	for _, c := range []struct {
		what, machine, disk string
		codes               []string
	}{
		{"USB stick with an idle partition", "laptop", "sda", nil},
		{"USB disk without the removable flag", "laptop", "sdb", nil},
		{"SD card", "laptop", "mmcblk0", nil},
		{"system under LUKS and LVM on NVMe", "laptop", "nvme0n1", []string{"system", "swap", "held", "not-removable"}},
		{"stick that is mounted, under a loop device's file", "laptop", "sdaa", []string{"mounted", "held"}},
		{"reader without a card", "laptop", "sdc", []string{"empty"}},
		{"DVD drive", "laptop", "sr0", []string{"unsupported"}},
		{"snap", "laptop", "loop0", []string{"mounted", "read-only"}},
		{"partition of a fine stick", "laptop", "sda1", []string{"partition"}},
		{"partition of the system's disk", "laptop", "nvme0n1p1", []string{"system", "partition", "swap", "held", "not-removable"}},
		{"logical volume with the system", "laptop", "dm-1", []string{"system", "held", "not-removable"}},
		{"first half of a RAID with LVM", "server", "sda", []string{"system", "held", "not-removable"}},
		{"second half of a RAID with LVM", "server", "sdb", []string{"system", "held", "not-removable"}},
		{"btrfs's device that mountinfo names", "server", "sdc", []string{"system", "not-removable"}},
		{"btrfs's other device", "server", "sdd", []string{"system", "not-removable"}},
		{"stick with a swap file", "server", "sde", []string{"swap", "mounted"}},
		{"read-only stick", "server", "sdf", []string{"read-only"}},
		{"stick in the first process's namespace", "server", "sdg", []string{"mounted"}},
		{"stick with a swap partition, by a link", "server", "sdh", []string{"swap"}},
		{"ZRAM swap", "server", "zram0", []string{"swap", "not-removable"}},
		{"a virtual machine's second disk", "server", "vda", []string{"not-removable"}},
		{"eMMC", "server", "mmcblk1", []string{"not-removable"}},
		{"eMMC's boot area", "server", "mmcblk1boot0", []string{"read-only", "not-removable"}},
		{"loop over the system's disk", "server", "loop0", []string{"indirect", "system"}},
		{"loop under a loop", "server", "loop1", []string{"held"}},
		{"loop over a loop", "server", "loop2", []string{"indirect"}},
		{"loop over a file", "server", "loop3", nil},
		{"a container's host disk", "container", "vda", []string{"system", "not-removable"}},
		{"a stick in a container", "container", "sda", nil},
		{"values that are missing", "container", "sdb", []string{"unknown"}},
		{"sectors of 520 bytes", "container", "sdc", []string{"unsupported"}},
		{"held by what is not shown", "container", "sdd", []string{"held", "unknown"}},
		{"a swap area whose disk is not found", "lost-swap", "sda", []string{"unknown"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := machines[c.machine]
			d, err := s.Device(t.Context(), c.disk)
			if err != nil {
				t.Fatal(err)
			}
			got, want := codes(d.Reasons), slices.Clone(c.codes)
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("reasons %v, want codes %v", d.Reasons, c.codes)
			}
			if len(want) == 0 {
				return
			}
			// There is no node that could be opened: a refusal comes before that.
			_, err = s.Open(t.Context(), c.disk, "")
			var refused *RefusedError
			if !errors.As(err, &refused) || !slices.Equal(refused.Reasons, d.Reasons) {
				t.Errorf("Open: %v, want it refused for %v", err, d.Reasons)
			}
		})
	}
}

func TestNoDevice(t *testing.T) {
	s := machine(t, "container")
	for _, name := range []string{"", ".", "..", "sd", "sdaa", "/dev/sda", "../sda", "nvme1c1n1", "sd\x1b[1ma"} {
		if _, err := s.Device(t.Context(), name); !errors.Is(err, ErrNoDevice) || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("Device(%q): %v", name, err)
		}
		if _, err := s.Open(t.Context(), name, ""); !errors.Is(err, ErrNoDevice) {
			t.Errorf("Open(%q): %v", name, err)
		}
	}
	if _, err := s.Open(t.Context(), "sda", ""); !errors.Is(err, ErrNoDevice) {
		t.Errorf("Open without a node: %v", err)
	}
	if d, err := s.Device(t.Context(), "cciss/c0d0"); err != nil || d.Path != "/dev/cciss/c0d0" {
		t.Errorf("a name with a slash: %+v, %v", d, err)
	}
}

// What can't be read must stop everything: it could be the reason.
func TestUnreadable(t *testing.T) {
	for _, path := range []string{"proc/self/mountinfo", "proc/1/mountinfo", "proc/swaps", "sys/class/block"} {
		s := machine(t, "server")
		full := filepath.Join(filepath.Dir(s.Sys), path)
		if err := os.RemoveAll(full); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte("nonsense\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Devices(t.Context()); err == nil {
			t.Errorf("%s can't be understood, and there is no error", path)
		}
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"  SanDisk  Ultra ":             "SanDisk Ultra",
		"a\x00b\x1b[31mc\td\n":          "ab[31mc d",
		"\u202eevil\u200b\ufeff":        "evil",
		"bad \xff utf8":                 "bad utf8",
		"Größe 東京":                      "Größe 東京",
		strings.Repeat("é", 100):        strings.Repeat("é", 64),
		strings.Repeat("é", 63) + " éé": strings.Repeat("é", 63),
		"a\u2028b\u00a0c\u0085d\u0007":  "a b c d",
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestCompareNames(t *testing.T) {
	sorted := []string{"loop2", "loop10", "nvme0n1", "nvme0n2", "nvme10n1", "s", "sda", "sda2", "sda10", "sdb", "sdz", "sdaa", "vda"}
	got := slices.Clone(sorted)
	slices.Reverse(got)
	slices.SortFunc(got, compareNames)
	if !slices.Equal(got, sorted) {
		t.Errorf("sorted %v", got)
	}
}
