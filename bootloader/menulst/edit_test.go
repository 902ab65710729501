package menulst

import (
	"errors"
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

func TestSetGlobal(t *testing.T) {
	tests := []struct{ name, in, global, value, want string }{
		{"tabs and the line's other bytes stay", "default\t\t0\r\ntimeout 5\r\n", "default", "3", "default\t\t3\r\ntimeout 5\r\n"},
		{"the form with = stays", " timeout = 5\n", "timeout", "9", " timeout = 9\n"},
		{"the last one, which counts", "timeout 1\ntimeout 2\n", "timeout", "3", "timeout 1\ntimeout 3\n"},
		{"the same value changes nothing", "timeout  5\n", "timeout", "5", "timeout  5\n"},
		{"saved with a blank behind it, which GRUB does not take for saved", "default saved \n", "default", "saved", "default saved\n"},
		{"a command that had no value", "timeout\n", "timeout", "5", "timeout 5\n"},
		{"a missing last newline stays missing", "timeout 5", "timeout", "6", "timeout 6"},
		{"a continued line becomes one", "color a \\\nb\ntimeout 5\n", "color", "c", "color c\ntimeout 5\n"},
		{"a line that goes on in an empty one", "color a \\\n\r\ntimeout 5\n", "color", "c", "color c\r\ntimeout 5\n"},
		{"a new one goes before the first", "# head\ndefault 0\ntitle a\nroot\n", "timeout", "5", "# head\ntimeout 5\ndefault 0\ntitle a\nroot\n"},
		{"a new one stays out of Debian's block", "# head\n### BEGIN AUTOMAGIC KERNELS LIST\nsplashimage=/s\ntitle a\nroot\n", "default", "5", "default 5\n# head\n### BEGIN AUTOMAGIC KERNELS LIST\nsplashimage=/s\ntitle a\nroot\n"},
		{"a new one in a file without globals", "title a\ntimeout 3\n", "timeout", "5", "timeout 5\ntitle a\ntimeout 3\n"},
		{"a new one in an empty file", "", "hiddenmenu", "", "hiddenmenu\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f, undo, err := Parse([]byte(test.in)).SetGlobal(test.global, test.value)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, string(f.Bytes())); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.in, string(f.UndoGlobal(undo).Bytes())); diff != "" {
				t.Errorf("undone (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUndoGlobalKeepsALaterChoice(t *testing.T) {
	tests := []struct{ name, now, want string }{
		{"another value", "default 7\n", "default 7\n"},
		{"the command is gone", "timeout 5\n", "timeout 5\n"},
		{"another one behind it", "default 4\ndefault 7\n", "default 4\ndefault 7\n"},
		{"written another way, but the same", "default=4\n", "default\t0\n"},
		{"a last newline gone", "default 4", "default\t0\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := Parse([]byte(test.now)).UndoGlobal(Undo{Name: "default", Was: "default\t0\n", Is: "4"})
			if diff := cmp.Diff(test.want, string(got.Bytes())); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzSetGlobal(f *testing.F) {
	f.Add([]byte("default 0\ntimeout 5\n\ntitle a\n"), "timeout", "7")
	f.Add([]byte("color\\\n"), "color", "a/b c/d")
	f.Add([]byte("color a\\\n\r\n"), "color", "b")
	f.Add([]byte("title a\\"), "hiddenmenu", "")
	f.Fuzz(func(t *testing.T, data []byte, name, value string) {
		before := Parse(data)
		after, undo, err := before.SetGlobal(name, value)
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
		if got := after.UndoGlobal(undo); string(got.Bytes()) != string(data) {
			t.Errorf("%q became %q, and undone %q", data, after.Bytes(), got.Bytes())
		}
		if got, ok := parseUndo(undo.comment()); !ok || got != undo {
			t.Errorf("%+v was kept as %q and read as %+v", undo, undo.comment(), got)
		}
	})
}
