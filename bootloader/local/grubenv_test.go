package local

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// env is a grubenv with those lines behind the signature.
func env(lines string) []byte {
	text := grubenvSignature + lines
	return []byte(text + strings.Repeat("#", max(0, grubenvSize-len(text))))
}

func TestParseGrubenv(t *testing.T) {
	tests := []struct {
		name string
		data []byte
		want string // of the error
	}{
		{"empty", env(""), ""},
		{"a variable", env("saved_entry=0\n"), ""},
		{"an escaped newline goes on", env("a=b\\\nc\n"), ""},
		{"with grub-editenv's warning", newGrubenv().data, ""},
		{"too short", env("")[:512], "512 bytes"},
		{"too long", append(env(""), '#'), "1025 bytes"},
		{"nothing", nil, "0 bytes"},
		{"zeros", make([]byte, grubenvSize), "first line"},
		{"a value without end", env("a=b"), "no end"},
		{"a value that ends in the padding by a backslash", env("a=b\\\n"), "no end"},
		{"no variable", env("hello\n"), "not NAME=value"},
		{"one variable twice", env("a=1\na=2\n"), "twice"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			e, err := parseGrubenv(test.data)
			switch {
			case test.want == "" && err != nil:
				t.Fatal(err)
			case test.want == "" && !bytes.Equal(e.bytes(), test.data):
				t.Error("the bytes changed")
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("error %v, not %q", err, test.want)
			}
		})
	}
}

func TestGrubenvSet(t *testing.T) {
	tests := []struct{ name, in, set, value, want string }{
		{"a new one goes behind the others", "b=1\na=2\n", "c", "3", "b=1\na=2\nc=3\n"},
		{"the order stays", "b=1\na=2\nc=3\n", "a", "", "b=1\na=\nc=3\n"},
		{"a longer value moves the rest", "a=1\nb=2\n", "a", "123456", "a=123456\nb=2\n"},
		{"a name that begins another's", "next_entry2=x\n", "next_entry", "y", "next_entry2=x\nnext_entry=y\n"},
		{"backslash and newline are escaped", "", "a", "b\\c\nd", "a=b\\\\c\\\nd\n"},
		{"the same again", "a=1\n", "a", "1", "a=1\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before, err := parseGrubenv(env(test.in))
			if err != nil {
				t.Fatal(err)
			}
			after, err := before.set(test.set, test.value)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(after.bytes(), env(test.want)) {
				t.Errorf("got %q", bytes.TrimRight(after.data, "#"))
			}
			if got, ok := after.get(test.set); !ok || got != test.value {
				t.Errorf("reads back %q, %v", got, ok)
			}
		})
	}
	full, err := parseGrubenv(env("a=" + strings.Repeat("x", 990) + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := full.set("next_entry", "memlinux-0123456789abcdef"); err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("a full block: %v", err)
	}
}

func TestGrubenvUnset(t *testing.T) {
	before, err := parseGrubenv(env("a=1\nb=2\n"))
	if err != nil {
		t.Fatal(err)
	}
	set, err := before.set("next_entry", "x")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(set.unset("next_entry").bytes(), before.bytes()) {
		t.Error("set and unset do not give back the bytes")
	}
	if before.empty() || !before.unset("a").unset("b").unset("c").empty() || !newGrubenv().empty() {
		t.Error("empty is wrong")
	}
}

// TestGrubenvAgainstGRUB holds ours against grub-editenv.
func TestGrubenvAgainstGRUB(t *testing.T) {
	editenv := need.Tool(t, "grub-editenv", "grub-common")
	path := filepath.Join(t.TempDir(), "grubenv")
	run := func(args ...string) string {
		out, err := exec.Command(editenv, append([]string{path}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("grub-editenv %v: %v: %s", args, err, out)
		}
		return string(out)
	}
	run("create")
	same := func(want grubenv) {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want.bytes()) {
			t.Errorf("GRUB has\n%q, ours is\n%q", got, want.data)
		}
	}
	ours := newGrubenv()
	same(ours)
	for _, set := range [][2]string{{"saved_entry", "gnulinux-simple-1>2"}, {"next_entry", "memlinux-0123456789abcdef"}, {"a", `b\c`}, {"saved_entry", "0"}, {"next_entry", ""}} {
		run("set", set[0]+"="+set[1])
		var err error
		if ours, err = ours.set(set[0], set[1]); err != nil {
			t.Fatal(err)
		}
		same(ours)
	}
	run("unset", "saved_entry")
	same(ours.unset("saved_entry"))
}

func FuzzGrubenv(f *testing.F) {
	f.Add([]byte(""), "next_entry", "memlinux-0123456789abcdef")
	f.Add([]byte("saved_entry=a>b\nnext_entry=\n"), "next_entry", "x")
	f.Add([]byte("a=b\\\nc\n# x\n"), "a", "\\\n#")
	f.Fuzz(func(t *testing.T, lines []byte, name, value string) {
		data := env(string(lines))
		before, err := parseGrubenv(data)
		if err != nil {
			return
		}
		if !bytes.Equal(before.bytes(), data) {
			t.Fatal("the bytes changed")
		}
		after, err := before.set(name, value)
		if err != nil {
			return
		}
		again, err := parseGrubenv(after.bytes())
		if err != nil {
			t.Fatalf("%q after %q=%q: %v", lines, name, value, err)
		}
		if got, ok := again.get(name); !ok || got != value {
			t.Fatalf("%q: %q=%q reads back as %q, %v", lines, name, value, got, ok)
		}
		if _, had := before.get(name); !had && !bytes.Equal(after.unset(name).bytes(), before.bytes()) {
			t.Fatalf("%q: set and unset of %q differ", lines, name)
		}
	})
}
