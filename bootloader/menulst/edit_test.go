package menulst

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var memlinux = Entry{Title: "memlinux", Commands: []Command{
	{Name: "uuid", Args: "1234-ABCD"},
	{Name: "kernel", Args: "/memlinux/vmlinuz quiet"},
	{Name: "initrd", Args: "/memlinux/initramfs.img"},
}}

const memlinuxText = "title memlinux\nuuid 1234-ABCD\nkernel /memlinux/vmlinuz quiet\ninitrd /memlinux/initramfs.img\n"

var ignoreLines = cmp.Options{cmpopts.IgnoreFields(Entry{}, "Line"), cmpopts.IgnoreFields(Command{}, "Line")}

func TestAppend(t *testing.T) {
	crlf := func(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }
	tests := []struct{ name, in, want string }{
		{"to nothing", "", memlinuxText},
		{"behind a blank line", "timeout 5\n", "timeout 5\n\n" + memlinuxText},
		{"a missing last newline stays missing", "timeout 5", "timeout 5\n\n" + strings.TrimSuffix(memlinuxText, "\n")},
		{"in the file's line ends", "timeout 5\r\n", crlf("timeout 5\n\n" + memlinuxText)},
		{"a dangling backslash does not swallow the title", "# a\\\n", "# a\\\n\n" + memlinuxText},
		{"behind another program's end marker", "title a\nroot\n### END\n", "title a\nroot\n### END\n\n" + memlinuxText},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := Parse([]byte(test.in))
			after, err := before.Append(memlinux)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, string(after.Bytes())); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			checkAppended(t, before, after, memlinux)
		})
	}
}

// checkAppended holds what every Append promises.
func checkAppended(t *testing.T, before, after *File, e Entry) {
	t.Helper()
	original := before.Bytes()
	if bytes.HasSuffix(bytes.TrimRight(before.data, "\r"), []byte(`\`)) {
		// With a newline behind it the last backslash becomes a continuation.
		before = Parse(append(before.Bytes(), '\n'))
	}
	entries := after.Entries()
	want := append(before.Entries(), e)
	if diff := cmp.Diff(want, entries, ignoreLines, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before.Globals(), after.Globals()); diff != "" {
		t.Errorf("globals (-want +got):\n%s", diff)
	}
	if !bytes.HasPrefix(after.data, original) {
		t.Errorf("Append changed a byte: %q to %q", original, after.data)
	}
	back, err := after.Remove(len(entries) - 1)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(original), string(back.Bytes())); diff != "" {
		t.Errorf("Append and Remove (-want +got):\n%s", diff)
	}
}

func TestRemove(t *testing.T) {
	tests := []struct {
		name, in string
		index    int
		want     string
	}{
		{"the only entry", "title a\nroot\n", 0, ""},
		{"the first, with the blank line before it", "timeout 5\n\ntitle a\nroot\n\ntitle b\nroot\n", 0, "timeout 5\n\ntitle b\nroot\n"},
		{"the last", "timeout 5\n\ntitle a\nroot\n\ntitle b\nroot\n", 1, "timeout 5\n\ntitle a\nroot\n"},
		{"one of a dense list", "title a\nroot\ntitle b\nroot\ntitle c\nroot\n", 1, "title a\nroot\ntitle c\nroot\n"},
		{"comments before and behind stay", "# one\ntitle a\n# in it\nroot\n\n### END\n", 0, "# one\n\n### END\n"},
		{"an entry without commands", "title a\n\ntitle b\nroot\n", 0, "\ntitle b\nroot\n"},
		{"a title that goes on in the next line", "title a\\\nb\nroot\ntitle c\nroot\n", 0, "title c\nroot\n"},
		{"the end of a continued line stays where more follows", "color a\\\n\ntitle a\nroot\ntitle b\nroot", 0, "color a\\\n\ntitle b\nroot"},
		{"a missing last newline stays missing", "timeout 5\ntitle a\nroot", 0, "timeout 5"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f, err := Parse([]byte(test.in)).Remove(test.index)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, string(f.Bytes())); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	for _, index := range []int{-1, 1, 7} {
		if _, err := Parse([]byte("title a\nroot\n")).Remove(index); err == nil {
			t.Errorf("Remove(%d) of one entry: no error", index)
		}
	}
}

func TestRemoveFromRealFiles(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.lst")
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		f := Parse(data)
		for i := range f.Entries() {
			after, err := f.Remove(i)
			if err != nil {
				t.Fatal(err)
			}
			want := append(f.Entries()[:i], f.Entries()[i+1:]...)
			if diff := cmp.Diff(want, after.Entries(), ignoreLines, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("%s without %d (-want +got):\n%s", name, i, diff)
			}
		}
	}
}

func TestSetGlobal(t *testing.T) {
	tests := []struct{ name, in, global, value, want string }{
		{"tabs and the line's other bytes stay", "default\t\t0\r\ntimeout 5\r\n", "default", "3", "default\t\t3\r\ntimeout 5\r\n"},
		{"the form with = stays", " timeout = 5\n", "timeout", "9", " timeout = 9\n"},
		{"the last one, which counts", "timeout 1\ntimeout 2\n", "timeout", "3", "timeout 1\ntimeout 3\n"},
		{"the same value changes nothing", "timeout  5  \n", "timeout", "5", "timeout  5  \n"},
		{"a command that had no value", "timeout\n", "timeout", "5", "timeout 5\n"},
		{"a missing last newline stays missing", "timeout 5", "timeout", "6", "timeout 6"},
		{"a continued line becomes one", "color a \\\nb\ntimeout 5\n", "color", "c", "color c\ntimeout 5\n"},
		{"a new one goes before the first", "# head\ndefault 0\ntitle a\nroot\n", "timeout", "5", "# head\ntimeout 5\ndefault 0\ntitle a\nroot\n"},
		{"a new one in a file without globals", "title a\ntimeout 3\n", "timeout", "5", "timeout 5\ntitle a\ntimeout 3\n"},
		{"a new one in an empty file", "", "hiddenmenu", "", "hiddenmenu\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f, err := Parse([]byte(test.in)).SetGlobal(test.global, test.value)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, string(f.Bytes())); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzAppendRemove(f *testing.F) {
	for _, in := range []string{"", "a", "a\r", "a\\", "a\\\n", "a\\\r\n", "\n", "a\r\nb", "a\nb\r", "title x", "title x\n\n# c", "\x00\\"} {
		f.Add([]byte(in))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		before := Parse(data)
		after, err := before.Append(memlinux)
		if err != nil {
			t.Fatal(err)
		}
		checkAppended(t, before, after, memlinux)
	})
}

func FuzzSetGlobal(f *testing.F) {
	f.Add([]byte("default 0\ntimeout 5\n\ntitle a\n"), "timeout", "7")
	f.Add([]byte("color\\\n"), "color", "a/b c/d")
	f.Add([]byte("title a\\"), "hiddenmenu", "")
	f.Fuzz(func(t *testing.T, data []byte, name, value string) {
		before := Parse(data)
		after, err := before.SetGlobal(name, value)
		if err != nil {
			if invalid := (*InvalidError)(nil); !errors.As(err, &invalid) {
				t.Fatalf("not an InvalidError: %v", err)
			}
			return
		}
		if got, ok := after.Global(name); !ok || got != strings.Trim(value, " ") {
			t.Errorf("%s is %q, %v after it was set to %q: %q to %q", name, got, ok, value, data, after.Bytes())
		}
		if diff := cmp.Diff(before.Entries(), after.Entries(), ignoreLines); diff != "" {
			t.Errorf("entries (-want +got):\n%s", diff)
		}
		others := func(f *File) (all []Command) {
			for _, c := range f.Globals() {
				if c.Name != name {
					all = append(all, c)
				}
			}
			return all
		}
		if diff := cmp.Diff(others(before), others(after), ignoreLines); diff != "" {
			t.Errorf("other globals (-want +got):\n%s", diff)
		}
	})
}
