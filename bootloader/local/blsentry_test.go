package local

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

func TestParseBLS(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []blsField
	}{
		{"nothing", "", nil},
		{"no last newline", "title A\nlinux /a", []blsField{{"title", "A"}, {"linux", "/a"}}},
		{"CRLF, CR, blank lines", "title A\r\n\r\nlinux /a\rinitrd /b\n", []blsField{{"title", "A"}, {"linux", "/a"}, {"initrd", "/b"}}},
		{"tabs and blanks around", "\t title \t A  b\t \n", []blsField{{"title", "A  b"}}},
		{"comments", "# title A\n  #title B\ntitle C # D\n", []blsField{{"title", "C # D"}}},
		{"a key without a value", "title\nlinux /a\ntitle \n", []blsField{{"linux", "/a"}}},
		{"quotes around all", "title \"A B\"\n", []blsField{{"title", "A B"}}},
		{"quotes within", "options a=\"b c\" d\noptions \"\n", []blsField{{"options", `a="b c" d`}, {"options", `"`}}},
		{"a key more than once", "initrd /a\ninitrd /b\n", []blsField{{"initrd", "/a"}, {"initrd", "/b"}}},
		{"a NUL", "title A\x00B\nlinux /a\n", []blsField{{"title", "A"}}},
	} {
		got := parseBLS([]byte(tt.text))
		if diff := gocmp.Diff(tt.want, got, gocmp.AllowUnexported(blsField{})); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.name, diff)
		}
	}
}

func TestBLSNames(t *testing.T) {
	for _, tt := range []struct {
		id, plain string
		tries     int
	}{
		{"a.conf", "a.conf", -1},
		{"a+3.conf", "a.conf", 3},
		{"a+2-1.conf", "a.conf", 2},
		{"a+0-3.conf", "a.conf", 0},
		{"a+b+1.efi", "a+b.efi", 1},
		{"a+.conf", "a+.conf", -1},
		{"a+1-.conf", "a+1-.conf", -1},
		{"a+-1.conf", "a+-1.conf", -1},
		{"a+1x.conf", "a+1x.conf", -1},
		{"a+99999999999.conf", "a+99999999999.conf", -1},
		{"a.conf+1", "a.conf+1", -1},
		{"auto-windows", "auto-windows", -1},
	} {
		if plain, tries := (blsEntry{id: tt.id}).plain(); plain != tt.plain || tries != tt.tries {
			t.Errorf("%s: %s with %d, want %s with %d", tt.id, plain, tries, tt.plain, tt.tries)
		}
	}
	for name, want := range map[string]string{
		"_-memlinux-0123456789abcdef.conf":   "0123456789abcdef",
		"_-memlinux-0123456789abcdef":        "0123456789abcdef",
		"memlinux-0123456789abcdef.conf":     "",
		"_-memlinux-0123456789ABCDEF.conf":   "",
		"_-memlinux-0123456789abcde.conf":    "",
		"_-memlinux-0123456789abcdef+1.conf": "",
		"_-memlinux-0123456789abcdef.conf\n": "",
	} {
		if got := blsID(name); got != want {
			t.Errorf("%q is the file of %q, want %q", name, got, want)
		}
	}
}

// The examples are those of the Version Format Specification and of systemd's
// own documentation of systemd-analyze compare-versions.
func TestCompareVersions(t *testing.T) {
	for _, order := range [][]string{
		{"122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1", "123.1-1", "123a-1", "124-1"},
		{"~1", "", "-1", "^1", ".1", "a", "1"},
		{"6.1.0-9", "6.1.0-10", "6.10"},
		{"_-memlinux-1.conf", "arch-fallback.conf", "arch.conf", "memlinux-1.conf", "00-x.conf"},
		{"_-memlinux-0a.conf", "_-memlinux-0b.conf", "a3f5.conf"},
		{"0", "1", "10"},
	} {
		for i, a := range order {
			for j, b := range order {
				if got := compareVersions(a, b); cmp.Compare(got, 0) != cmp.Compare(i, j) {
					t.Errorf("%q and %q: %d", a, b, got)
				}
			}
		}
	}
	for _, same := range [][2]string{{"123_a", "123a"}, {"00123", "123"}, {"", ""}, {"a-", "a-"}, {"ä1", "1"}, {"_", ""}} {
		if got := compareVersions(same[0], same[1]); got != 0 {
			t.Errorf("%q and %q: %d", same[0], same[1], got)
		}
	}
}

// Ours must come last wherever nothing says what boots: there the first one is
// it.
func TestOursComesLast(t *testing.T) {
	ours := blsEntry{id: blsPrefix + "ffffffffffffffff.conf"}
	for _, id := range []string{"arch.conf", "0.conf", "00000000000000000000000000000000-6.1.conf", "a.conf", "A+3.conf", "debian-6.1.0-9.conf", "linux.efi", "_x.conf", "__1.conf", ".-.conf"} {
		for _, fields := range [][]blsField{nil, {{"sort-key", "zz"}}, {{"sort-key", "a"}, {"version", "1"}}} {
			if other := (blsEntry{id, fields}); compareBLS(other, ours) >= 0 {
				t.Errorf("ours comes before %s with %v", id, fields)
			}
		}
	}
}

func FuzzBLSEntry(f *testing.F) {
	for _, text := range []string{archEntry, archFiles["efi/loader/loader.conf"], "title \"A\"\r\n\tlinux\t/a b \n#\n", "\x00", "default a*\noptions \"", "title \xff\nversion 1~2^3.4-5_6"} {
		f.Add([]byte(text), "arch+3-0.conf")
	}
	golden, err := filepath.Glob("testdata/bls-*.golden")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range golden {
		data, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, blsPrefix+"0123456789abcdef.conf")
	}
	f.Fuzz(func(t *testing.T, data []byte, name string) {
		fields := parseBLS(data)
		var again []string
		for _, field := range fields {
			if field.key == "" || field.key[0] == '#' || strings.ContainsAny(field.key, " \t\r\n\x00") || strings.ContainsAny(field.value, "\r\n\x00") {
				t.Fatalf("%q has the field %q", data, field)
			}
			again = append(again, field.key+" \""+field.value+"\"")
		}
		if got := parseBLS([]byte(strings.Join(again, "\n"))); !slices.Equal(got, fields) {
			t.Errorf("%q became %q", fields, got)
		}
		e := blsEntry{name, fields}
		e.title()
		e.loads()
		ourBLS(blsID(name), e)
		readRecords(data)
		if plain, tries := e.plain(); tries >= 0 && len(plain) >= len(name) {
			t.Errorf("%q without its counter %d is %q", name, tries, plain)
		}
		e.matches(e.field("default"))
		if compareBLS(e, e) != 0 {
			t.Errorf("%q is not itself", e)
		}
		other := blsEntry{"arch.conf", []blsField{{"version", string(data)}, {"sort-key", e.field("sort-key")}}}
		if compareBLS(e, other) != -compareBLS(other, e) {
			t.Errorf("%q and %q have no order", e, other)
		}
	})
}

// What is not refused comes back as it was written.
func FuzzBLSRender(f *testing.F) {
	f.Add("memlinux", "console=ttyS0 memlinux.build=0123456789abcdef", true)
	f.Add("a \"b\" c", `quiet a="b c" d='e' f\g #h`, false)
	f.Add("\"a\"", "a\nb", false)
	f.Add(" #a", "\"a b\"", true)
	f.Add("\u00a0a", "a\u2028b \ufeff", true)
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, title, cmdline string, grub bool) {
		l := &bls{boot: &Boot{Dir: dir + "/memlinux", Volume: Volume{MountPoint: dir, Root: "/"}}, kind: systemdBoot, choice: &efiChoice{}}
		if grub {
			l.kind, l.choice = grubBLS, &grubChoice{}
		}
		e := ourEntry(1)
		e.Title, e.Cmdline = title, cmdline
		if l.check(e) != nil {
			return
		}
		data, err := l.render(e, nil)
		if err != nil {
			t.Fatal(err)
		}
		read := blsEntry{blsPrefix + e.ID + ".conf", parseBLS(data)}
		if got := ourBLS(blsID(read.id), read); got != e {
			t.Errorf("%+v became %+v", e, got)
		}
		lines := 6
		if grub {
			lines = 9
		}
		if n := strings.Count(string(data), "\n"); n != lines || len(read.fields) != lines-1 {
			t.Errorf("%d lines with %d fields: %q", n, len(read.fields), data)
		}
	})
}
