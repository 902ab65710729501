package microcode

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/memlinux/memlinux/testvm/need"
)

// intel makes an update by Intel's format, with n 32-bit words of data and more
// processors in its extended table.
func intel(revision uint32, n int, first target, more ...target) []byte {
	const date = 0x10242023
	head := []uint32{1, revision, date, first.signature, 0, 1, first.flags, uint32(n * 4), 0, 0, 0, 0}
	if len(more) > 0 {
		head[8] = uint32(intelHeader + n*4 + intelTable + intelSignature*len(more))
	} else {
		head[8] = uint32(intelHeader + n*4)
	}
	words := slices.Clone(head)
	for i := range n {
		words = append(words, revision*7919+uint32(i)*104729)
	}
	words[4] = -total(words)
	if len(more) > 0 {
		table := []uint32{uint32(len(more)), 0, 0, 0, 0}
		for _, t := range more {
			table = append(table, t.signature, t.flags, first.signature+first.flags+words[4]-t.signature-t.flags)
		}
		table[1] = -total(table)
		words = append(words, table...)
	}
	return le(words)
}

func total(words []uint32) (s uint32) {
	for _, w := range words {
		s += w
	}
	return s
}

func le(words []uint32) []byte {
	var b []byte
	for _, w := range words {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b
}

// fix makes the update's checksum right again.
func fix(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[16:], 0)
	binary.LittleEndian.PutUint32(b[16:], -sum(b))
	return b
}

// amd makes a container by AMD's format.
func amd(table []amdProcessor, patches ...amdUpdate) []byte {
	b := le([]uint32{amdMagic, amdTable, uint32(amdEntry * (len(table) + 1))})
	for _, p := range table {
		entry := make([]byte, amdEntry)
		binary.LittleEndian.PutUint32(entry, p.signature)
		binary.LittleEndian.PutUint16(entry[amdEntryShortID:], p.shortID)
		b = append(b, entry...)
	}
	b = append(b, make([]byte, amdEntry)...)
	for _, u := range patches {
		patch := make([]byte, amdPatchHeader+int(u.date))
		binary.LittleEndian.PutUint32(patch, 0x01152022)
		binary.LittleEndian.PutUint32(patch[4:], u.revision)
		binary.LittleEndian.PutUint16(patch[amdShortID:], u.shortID)
		b = slices.Concat(b, words(amdPatch, len(patch)), patch)
	}
	return b
}

// The processors of the fixtures, of which Intel's are told apart by platform.
var (
	skylake = target{0x000506e3, 0x36}
	coffee2 = target{0x000906ea, 0x02}
	coffee8 = target{0x000906ea, 0x22}
	zen2    = amdProcessor{signature: 0x00830f10, shortID: 0x8310}
	zen2b   = amdProcessor{signature: 0x00830f11, shortID: 0x8310}
	zen3    = amdProcessor{signature: 0x00a20f10, shortID: 0xa210}
	lost    = amdProcessor{signature: 0x00a20f12, shortID: 0xa212}
)

// firmware is a lib/firmware with all kinds of file.
func firmware(t testing.TB) fstest.MapFS {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	file := func(parts ...[]byte) *fstest.MapFile { return &fstest.MapFile{Data: slices.Concat(parts...)} }
	return fstest.MapFS{
		"lib/firmware/intel-ucode/06-5e-03":           file(intel(0xf0, 500, skylake)),
		"lib/firmware/intel-ucode/06-9e-0a.zst":       file(z.EncodeAll(slices.Concat(intel(0xf8, 244, coffee8), intel(0xf4, 500, coffee2, skylake)), nil)),
		"lib/firmware/intel-ucode/06-4f-01.initramfs": file(intel(0xb000040, 500, target{0x000406f1, 0xef})),
		"lib/firmware/intel-ucode/README":             file([]byte("no microcode")),
		"lib/firmware/amd-ucode/microcode_amd_fam17h.bin": file(
			amd([]amdProcessor{zen2, zen2b}, amdUpdate{shortID: zen2.shortID, revision: 0x0830107a, date: 3136})),
		"lib/firmware/amd-ucode/microcode_amd_fam19h.bin": file(
			amd([]amdProcessor{zen3, lost}, amdUpdate{shortID: zen3.shortID, revision: 0x0a20120e, date: 5504}),
			amd([]amdProcessor{lost}, amdUpdate{shortID: 0xffff, revision: 1})),
		"lib/firmware/amd-ucode/microcode_amd_fam19h.bin.asc": file([]byte("-----BEGIN PGP SIGNATURE-----")),
		// A merged /usr has all of it twice.
		"usr/lib/firmware/intel-ucode/06-5e-03": file(intel(0xf0, 500, skylake)),
		"usr/lib/firmware/amd-ucode/microcode_amd_fam17h.bin": file(
			amd([]amdProcessor{zen2, zen2b}, amdUpdate{shortID: zen2.shortID, revision: 0x0830107a, date: 3136})),
	}
}

func collect(t testing.TB) *Collection {
	t.Helper()
	var c Collection
	if err := c.AddFolder(firmware(t)); err != nil {
		t.Fatal(err)
	}
	return &c
}

func TestSets(t *testing.T) {
	c := collect(t)
	for _, tc := range []struct {
		name string
		set  *Set
		want []string
	}{
		{"all: each once, sorted, without a patch that nobody could use", c.All(), []string{
			"GenuineIntel 000406f1 0b000040 2023-10-24 2048 intel-ucode/06-4f-01.initramfs",
			"GenuineIntel 000506e3 000000f0 2023-10-24 2048 intel-ucode/06-5e-03",
			"GenuineIntel 000506e3,000906ea 000000f4 2023-10-24 2080 intel-ucode/06-9e-0a",
			"GenuineIntel 000906ea 000000f8 2023-10-24 1024 intel-ucode/06-9e-0a",
			"AuthenticAMD 00830f10,00830f11 0830107a 2022-01-15 3200 amd-ucode/microcode_amd_fam17h.bin",
			"AuthenticAMD 00a20f10 0a20120e 2022-01-15 5568 amd-ucode/microcode_amd_fam19h.bin",
		}},
		{"a platform that both updates are for", c.For([]CPU{{Intel, 0x906ea, 0x02}}), []string{
			"GenuineIntel 000506e3,000906ea 000000f4 2023-10-24 2080 intel-ucode/06-9e-0a",
			"GenuineIntel 000906ea 000000f8 2023-10-24 1024 intel-ucode/06-9e-0a",
		}},
		{"a platform that one is for", c.For([]CPU{{Intel, 0x906ea, 0x20}}), []string{
			"GenuineIntel 000906ea 000000f8 2023-10-24 1024 intel-ucode/06-9e-0a",
		}},
		{"found by the extended table too", c.For([]CPU{{Intel, 0x506e3, 0x20}}), []string{
			"GenuineIntel 000506e3 000000f0 2023-10-24 2048 intel-ucode/06-5e-03",
			"GenuineIntel 000506e3,000906ea 000000f4 2023-10-24 2080 intel-ucode/06-9e-0a",
		}},
		{"an unknown platform takes those for all", c.For([]CPU{{Intel, 0x906ea, 0}}), []string{
			"GenuineIntel 000506e3,000906ea 000000f4 2023-10-24 2080 intel-ucode/06-9e-0a",
			"GenuineIntel 000906ea 000000f8 2023-10-24 1024 intel-ucode/06-9e-0a",
		}},
		{"AMD: one of two processors that share a patch", c.For([]CPU{{AMD, 0x830f11, 0}}), []string{
			"AuthenticAMD 00830f11 0830107a 2022-01-15 3200 amd-ucode/microcode_amd_fam17h.bin",
		}},
		{"AMD: a processor in the table without a patch", c.For([]CPU{{AMD, lost.signature, 0}}), nil},
		{"the signature of the other vendor", c.For([]CPU{{AMD, 0x906ea, 0}}), nil},
		{"no processor", c.For(nil), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, u := range tc.set.Updates {
				got = append(got, fmt.Sprint(u.Vendor, " ", strings.Join(u.Signatures, ","), " ", u.Revision, " ", u.Date, " ", u.Size, " ", u.File))
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
			if tc.set.Empty() != (tc.want == nil) {
				t.Error("Empty is wrong")
			}
			// What was written is good again, and has the same.
			var again Collection
			if len(tc.set.intel) > 0 {
				if err := again.Add("intel-ucode/00-00-00", bytes.NewReader(tc.set.intel)); err != nil {
					t.Error(err)
				}
			}
			if len(tc.set.amd) > 0 {
				if err := again.Add("amd-ucode/microcode_amd.bin", bytes.NewReader(tc.set.amd)); err != nil {
					t.Error(err)
				}
			}
			if s := again.All(); !bytes.Equal(s.intel, tc.set.intel) || !bytes.Equal(s.amd, tc.set.amd) {
				t.Error("read back it is something else")
			}
		})
	}
	// A container of which all is taken stays as it is.
	f := firmware(t)
	if !bytes.HasPrefix(c.All().amd, f["lib/firmware/amd-ucode/microcode_amd_fam17h.bin"].Data) {
		t.Error("the whole container was changed")
	}
}

func TestSetDoesNotDependOnTheOrderOfFiles(t *testing.T) {
	f := firmware(t)
	var names []string
	for name := range f {
		names = append(names, name)
	}
	slices.Sort(names)
	pack := func() []byte {
		var c Collection
		for _, name := range names {
			if err := c.Add(name, bytes.NewReader(f[name].Data)); err != nil {
				t.Fatal(err)
			}
		}
		var b bytes.Buffer
		if err := c.All().Pack(&b, time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	one := pack()
	slices.Reverse(names)
	if !bytes.Equal(one, pack()) {
		t.Error("other bytes")
	}
}

func TestBrokenFiles(t *testing.T) {
	const inIntel, inAMD = "lib/firmware/intel-ucode/06-5e-03", "lib/firmware/amd-ucode/microcode_amd.bin"
	good := intel(1, 500, skylake)
	table := intel(1, 500, skylake, coffee2)
	container := amd([]amdProcessor{zen2}, amdUpdate{shortID: zen2.shortID, revision: 1, date: 100})
	change := func(b []byte, at int, v uint32) []byte {
		b = slices.Clone(b)
		binary.LittleEndian.PutUint32(b[at:], v)
		return b
	}
	for _, tc := range []struct {
		name, file string
		content    []byte
		want       string
	}{
		{"an empty Intel file", inIntel, nil, "empty"},
		{"a text", inIntel, []byte(strings.Repeat("text", 100)), "no Intel microcode: header version"},
		{"cut in the header", inIntel, good[:40], "cut short in the header"},
		{"cut in the data", inIntel, good[:2000], "its header speaks of 2048 bytes, and 2000 are there"},
		{"a flipped bit", inIntel, change(good, 100, 1), "checksum is wrong"},
		{"the second of two is broken", inIntel, slices.Concat(good, change(good, 100, 1)), "the update at byte 2048: its checksum"},
		{"more data than all", inIntel, fix(change(good, 28, 4000)), "which can't be"},
		{"a size that wraps around", inIntel, fix(change(good, 28, 0xfffffffc)), "which can't be"},
		{"a table with too large a count", inIntel, change(table, 2048, 2), "which can't be"},
		{"a flipped bit in the table's flags", inIntel, change(table, len(table)-8, 3), "checksum of its table"},
		{"two flipped bits in the table", inIntel, change(change(table, len(table)-8, 3), 2052, binary.LittleEndian.Uint32(table[2052:])-1), "the checksum for the processor 000906ea"},
		{"an empty AMD file", inAMD, nil, "empty"},
		{"an Intel file for AMD", inAMD, good, "magic"},
		{"no table", inAMD, container[:4], "cut short"},
		{"a table of another type", inAMD, change(container, 4, 1), "table of processors is none"},
		{"a table of half an entry", inAMD, change(container, 8, 24), "table of processors is none"},
		{"a patch cut short", inAMD, container[:len(container)-1], "a section of 164 bytes, and 163 are there"},
		{"a patch of another type", inAMD, change(container, 44, 7), "a patch of it is none: type 7"},
		{"a patch without its header", inAMD, slices.Concat(container, words(amdPatch, 60), make([]byte, 60)), "a patch of it is none: type 1, 60 bytes"},
		{"something behind the container", inAMD, append(slices.Clone(container), 1, 2, 3), "cut short"},
		{"no xz file", inAMD + ".xz", container, "decompress"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var c Collection
			err := c.Add(tc.file, bytes.NewReader(tc.content))
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), tc.file) {
				t.Errorf("error %v; want the file's name and %q in it", err, tc.want)
			}
			if !c.All().Empty() {
				t.Error("something was taken")
			}
		})
	}
	// A size of 0 is 2000 bytes of data, for history's sake.
	old := fix(change(change(good, 28, 0), 32, 0))
	var c Collection
	if err := c.Add(inIntel, bytes.NewReader(old)); err != nil || len(c.All().intel) != 2048 {
		t.Errorf("an update without sizes: %v", err)
	}
}

func TestAddFolder(t *testing.T) {
	var c Collection
	if err := c.AddFolder(fstest.MapFS{"lib/firmware/intel-ucode/README": {}}); !errors.Is(err, ErrNone) || !strings.Contains(err.Error(), "non-free-firmware") {
		t.Errorf("nothing there: %v", err)
	}
	// Through the links of a merged /usr, out of a real folder.
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "usr"), fstest.MapFS{"lib/firmware/intel-ucode/06-5e-03": {Data: intel(1, 500, skylake), Mode: 0o644}}); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("usr/lib", filepath.Join(dir, "lib")); err != nil {
		t.Fatal(err)
	}
	if err := c.AddFolder(os.DirFS(dir)); err != nil || len(c.All().Updates) != 1 {
		t.Errorf("a merged /usr: %v, %d updates", err, len(c.All().Updates))
	}
}

func TestHostCPUs(t *testing.T) {
	line := func(vendor string, family, model, stepping int) string {
		return fmt.Sprintf("processor\t: 0\nvendor_id\t: %s\ncpu family\t: %d\nmodel\t\t: %d\nmodel name\t: A: B\nstepping\t: %d\nflags\t\t: fpu vme\n\n", vendor, family, model, stepping)
	}
	for _, tc := range []struct {
		name, cpuinfo, flags string
		want                 []CPU
		wrong                string
	}{
		{"Intel's Skylake, twice the same", line("GenuineIntel", 6, 94, 3) + line("GenuineIntel", 6, 94, 3), "0x2\n", []CPU{{Intel, 0x506e3, 2}}, ""},
		{"Intel without its platform", line("GenuineIntel", 6, 158, 10), "", []CPU{{Intel, 0x906ea, 0}}, ""},
		{"AMD's Zen 2 has no platform", line("AuthenticAMD", 23, 49, 0), "0x0\n", []CPU{{AMD, 0x830f10, 0}}, ""},
		{"AMD's Zen 5", line("AuthenticAMD", 26, 2, 1), "", []CPU{{AMD, 0xb00f21, 0}}, ""},
		{"two kinds in one machine", line("AuthenticAMD", 25, 33, 0) + line("AuthenticAMD", 25, 33, 2), "", []CPU{{AMD, 0xa20f10, 0}, {AMD, 0xa20f12, 0}}, ""},
		{"a file without its last line break", strings.TrimSpace(line("GenuineIntel", 15, 4, 1)), "", []CPU{{Intel, 0xf41, 0}}, ""},
		{"another architecture", "processor : 0\nBogoMIPS : 50\nCPU implementer : 0x41\n", "", nil, `cpu family is ""`},
		{"nothing", "", "", nil, "no processor"},
		{"flags that are none", line("GenuineIntel", 6, 94, 3), "yes", nil, "processor_flags"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := fstest.MapFS{"proc/cpuinfo": {Data: []byte(tc.cpuinfo)}}
			if tc.flags != "" {
				root["sys/devices/system/cpu/cpu0/microcode/processor_flags"] = &fstest.MapFile{Data: []byte(tc.flags)}
			}
			got, err := HostCPUs(root)
			if tc.wrong != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wrong) {
					t.Errorf("error %v, want %q in it", err, tc.wrong)
				}
				return
			}
			if diff := cmp.Diff(tc.want, got); diff != "" || err != nil {
				t.Errorf("%v %s", err, diff)
			}
		})
	}
	// This machine has some, and the kernel tells them as CPUID does.
	if got, err := HostCPUs(os.DirFS("/")); err != nil || len(got) == 0 || got[0].Signature == 0 {
		t.Errorf("this machine: %v, %v", got, err)
	}
}

func TestPack(t *testing.T) {
	set := collect(t).All()
	var b bytes.Buffer
	if err := set.Pack(&b, time.Unix(1700000000, 0)); err != nil {
		t.Fatal(err)
	}
	if b.Len()%block != 0 || int64(b.Len()) != set.Size() {
		t.Errorf("%d bytes, Size says %d", b.Len(), set.Size())
	}
	for name, content := range map[string][]byte{"GenuineIntel": set.intel, "AuthenticAMD": set.amd} {
		if at := bytes.Index(b.Bytes(), content); at < 0 || at%align != 0 {
			t.Errorf("%s is at byte %d", name, at)
		}
		if got := earlyFind(b.Bytes(), "kernel/x86/microcode/"+name+".bin"); !bytes.Equal(got, content) {
			t.Errorf("%s: the kernel would find %d bytes", name, len(got))
		}
	}
	cpio := need.Tool(t, "cpio", "cpio")
	cmd := exec.Command(cpio, "-itv", "--quiet")
	cmd.Stdin = bytes.NewReader(b.Bytes())
	cmd.Env = append(os.Environ(), "TZ=UTC", "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	golden, err := os.ReadFile("testdata/listing.golden")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(golden), string(out)); diff != "" {
		t.Error(diff)
	}
	// One vendor alone, with the other one's place taken by nothing.
	b.Reset()
	if err := collect(t).For([]CPU{{Intel, 0x506e3, 0}}).Pack(&b, time.Unix(0, 0)); err != nil || bytes.Contains(b.Bytes(), []byte("AMD")) {
		t.Errorf("Intel alone: %v", err)
	}
	b.Reset()
	if err := (&Set{}).Pack(&b, time.Unix(0, 0)); err != nil || b.Len() != 0 {
		t.Errorf("nothing: %d bytes, %v", b.Len(), err)
	}
	if err := set.Pack(io.Discard, time.Unix(-1, 0)); err == nil {
		t.Error("1969 is taken")
	}
	if err := set.Pack(full{}, time.Unix(0, 0)); err == nil {
		t.Error("a failing writer goes unnoticed")
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space") }

// earlyFind finds a file as lib/earlycpio.c of Linux describes it: headers of 13
// hex fields, zero words between entries, names and contents aligned to 4.
func earlyFind(b []byte, path string) []byte {
	for at := 0; at+newcHeader <= len(b); {
		if b[at] == 0 {
			at += 4
			continue
		}
		var field [13]int
		for i := range field {
			if _, err := fmt.Sscanf(string(b[at+6+8*i:at+14+8*i]), "%x", &field[i]); err != nil {
				return nil
			}
		}
		name := at + newcHeader
		content := (name + field[11] + 3) &^ 3
		if field[1]&0o170000 == 0o100000 && strings.HasPrefix(string(b[name:name+field[11]]), path) {
			return b[content : content+field[6]]
		}
		at = (content + field[6] + 3) &^ 3
	}
	return nil
}

func FuzzParseIntel(f *testing.F) {
	f.Add(intel(1, 4, skylake))
	f.Add(slices.Concat(intel(1, 4, skylake), intel(2, 3, skylake, coffee2, coffee8)))
	f.Add(fix(make([]byte, intelHeader+intelData)))
	f.Fuzz(func(t *testing.T, b []byte) {
		updates, err := parseIntel("file", b)
		if err != nil {
			return
		}
		var all []byte
		for _, u := range updates {
			if len(u.targets) == 0 {
				t.Error("an update for nobody")
			}
			u.update()
			all = append(all, u.bytes...)
		}
		if !bytes.Equal(all, b) {
			t.Error("the updates are not all of the file")
		}
	})
}

func FuzzParseAMD(f *testing.F) {
	one := amd([]amdProcessor{zen2, zen2b}, amdUpdate{shortID: zen2.shortID, revision: 1, date: 10})
	f.Add(one)
	f.Add(slices.Concat(one, amd([]amdProcessor{zen3, lost}, amdUpdate{shortID: zen3.shortID, revision: 2})))
	f.Fuzz(func(t *testing.T, b []byte) {
		containers, err := parseAMD("file", b)
		if err != nil {
			return
		}
		for _, c := range containers {
			all, updates := c.trim(func(uint32) bool { return true })
			if len(updates) == 0 {
				continue
			}
			again, err := parseAMD("file", all)
			if err != nil || len(again) != 1 {
				t.Fatalf("what was written can't be read: %v", err)
			}
			if twice, _ := again[0].trim(func(uint32) bool { return true }); !bytes.Equal(all, twice) {
				t.Error("trimmed twice it is something else")
			}
		}
	})
}

func FuzzParseCPUInfo(f *testing.F) {
	f.Add("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 94\nstepping\t: 3\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		cpus, err := parseCPUInfo(strings.NewReader(text))
		if (err == nil) != (len(cpus) > 0) {
			t.Errorf("%d processors, %v", len(cpus), err)
		}
	})
}
