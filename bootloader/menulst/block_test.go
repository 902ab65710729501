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

// locked holds what a block may hold and Render refuses.
var locked = Entry{Title: "memlinux, locked", Commands: []Command{
	{Name: "root", Args: "(hd0,0)"},
	{Name: "lock"},
	{Name: "savedefault", Args: "2"},
	{Name: "kernel", Args: "/k"},
}}

const lockedText = "title memlinux, locked\nroot (hd0,0)\nlock\nsavedefault 2\nkernel /k\n"

func blockText(lines string) string { return "### BEGIN memlinux\n" + lines + "### END memlinux\n" }

func TestSetBlock(t *testing.T) {
	crlf := func(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }
	ours := blockText("# by memlinux\n\n" + memlinuxText)
	tests := []struct{ name, in, want string }{
		{"in an empty file", "", ours},
		{"behind a blank line", "timeout 5\n", "timeout 5\n\n" + ours},
		{"a missing last newline stays missing", "timeout 5", "timeout 5\n\n" + strings.TrimSuffix(ours, "\n")},
		{"in the file's line ends", "timeout 5\r\n", crlf("timeout 5\n\n" + ours)},
		{"a last backslash does not swallow the marker", "# a\\\n", "# a\\\n\n" + ours},
		{"a last backslash without a newline", "# a\\", "# a\\\n\n" + strings.TrimSuffix(ours, "\n")},
		{"behind Debian's end marker", "title a\nroot\n### END DEBIAN AUTOMAGIC KERNELS LIST\n", "title a\nroot\n### END DEBIAN AUTOMAGIC KERNELS LIST\n\n" + ours},
		{"behind a marker that is another's", "### BEGIN memlinux2\n", "### BEGIN memlinux2\n\n" + ours},
		{"in a file of one NUL", "\x00", "\x00\n\n" + strings.TrimSuffix(ours, "\n")},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := Parse([]byte(test.in))
			after := checkSetBlock(t, before, Block{Comments: []string{"by memlinux"}, Entries: []Entry{memlinux}})
			if diff := cmp.Diff(test.want, string(after.Bytes())); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// checkSetBlock sets b in a file that has no block, and holds what SetBlock and
// RemoveBlock promise.
func checkSetBlock(t *testing.T, before *File, b Block) *File {
	t.Helper()
	after, err := before.SetBlock(b)
	if err != nil {
		t.Fatal(err)
	}
	original := before.Bytes()
	if !bytes.HasPrefix(after.data, original) {
		t.Errorf("SetBlock changed a byte: %q to %q", original, after.data)
	}
	if bytes.HasSuffix(bytes.TrimRight(original, "\r"), []byte(`\`)) {
		// With a newline behind it the last backslash becomes a continuation.
		before = Parse(append(before.Bytes(), '\n'))
	}
	want := append(before.Entries(), b.Entries...)
	if diff := cmp.Diff(want, after.Entries(), ignoreLines, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before.Globals(), after.Globals()); diff != "" {
		t.Errorf("globals (-want +got):\n%s", diff)
	}
	got, err := after.Block()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&b, got, ignoreLines, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("block (-want +got):\n%s", diff)
	}
	if first, behind, err := after.BlockEntries(); err != nil || first != len(before.Entries()) || behind-first != len(b.Entries) {
		t.Errorf("the block's entries: %d to %d, %v", first, behind, err)
	}
	if again, err := after.SetBlock(b); err != nil || !bytes.Equal(again.data, after.data) {
		t.Errorf("the same block again: %v, %q", err, again.Bytes())
	}
	grown, err := after.SetBlock(Block{Comments: b.Comments, Undo: b.Undo, Entries: append(b.Entries[:len(b.Entries):len(b.Entries)], locked)})
	if err != nil {
		t.Fatal(err)
	}
	back, err := grown.SetBlock(b)
	if err != nil || !bytes.Equal(back.data, after.data) {
		t.Errorf("an entry more and one less: %v, %q", err, back.Bytes())
	}
	for _, f := range []*File{after, grown} {
		removed, err := f.RemoveBlock()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(original), string(removed.Bytes())); diff != "" {
			t.Errorf("SetBlock and RemoveBlock (-want +got):\n%s", diff)
		}
	}
	return after
}

func TestSetBlockInPlace(t *testing.T) {
	undo := []Undo{{Name: "default", Was: "default\t\t0 # \"x\" \\\n\xff\x00 b\r\n", Is: "saved"}, {Name: "timeout", Is: "5"}}
	head, tail := "title a\nroot\n\n", "\ntitle z\nroot\n"
	f := Parse([]byte(head + blockText("# old\n\n"+memlinuxText) + tail))
	after, err := f.SetBlock(Block{Comments: []string{"new", ""}, Undo: undo, Entries: []Entry{memlinux, locked}})
	if err != nil {
		t.Fatal(err)
	}
	want := head + blockText("# new\n#\n"+
		`# changed by memlinux: default is "saved" and was "default\t\t0 # \"x\" \\\n\xff\x00 b\r\n"`+"\n"+
		`# changed by memlinux: timeout is "5" and was ""`+"\n\n"+memlinuxText+"\n"+lockedText) + tail
	if diff := cmp.Diff(want, string(after.Bytes())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	b, err := after.Block()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(undo, b.Undo); diff != "" {
		t.Errorf("undo (-want +got):\n%s", diff)
	}
	if first, behind, err := after.BlockEntries(); first != 1 || behind != 3 || err != nil {
		t.Errorf("the block's entries: %d to %d, %v", first, behind, err)
	}
	removed, err := after.RemoveBlock()
	if err != nil || string(removed.Bytes()) != "title a\nroot\n"+tail {
		t.Errorf("removed: %v, %q", err, removed.Bytes())
	}
}

func TestRemoveBlockAfterOthersWrote(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"lines behind a block that ended the file without a newline", "a\n\n" + blockText("") + "title z\nroot", "a\ntitle z\nroot"},
		{"the blank line before it is gone", "a\n" + blockText(""), "a\n"},
		{"more blank lines before it", "a\n\n\n\n" + blockText(""), "a\n\n\n"},
		{"at the top", blockText("") + "a\n", "a\n"},
		{"no block", "a\n", "a\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := Parse([]byte(test.in)).RemoveBlock()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, string(got.Bytes())); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestBlocksThatAreNotTouched(t *testing.T) {
	ours := blockText("# by memlinux\n\n" + memlinuxText)
	tests := []struct {
		name, in string
		line     int
	}{
		{"a begin without its end", "a\n### BEGIN memlinux\n" + memlinuxText, 2},
		{"an end without its begin", memlinuxText + "### END memlinux\n", 5},
		{"the end before the begin", "### END memlinux\n### BEGIN memlinux\n", 1},
		{"two blocks", ours + ours, 9},
		{"a begin within the block", "### BEGIN memlinux\n### BEGIN memlinux\n### END memlinux\n", 2},
		{"a marker that was written over", strings.Replace(ours, "BEGIN memlinux", "BEGIN memlinux (keep!)", 1), 1},
		{"an indented marker", " " + ours, 1},
		{"an end that swallows the next line", "a\n" + strings.TrimSuffix(ours, "\n") + "\\\ntitle z\nroot\n", 9},
		{"a comment within an entry", strings.Replace(ours, "uuid", "# mine\nuuid", 1), 5},
		{"a blank line too many", strings.Replace(ours, "\nuuid", "\n\nuuid", 1), 5},
		{"a blank behind a title", strings.Replace(ours, "title memlinux", "title memlinux ", 1), 4},
		{"tabs in an entry", strings.Replace(ours, "uuid ", "uuid\t", 1), 5},
		{"a global command", strings.Replace(ours, "# by", "default 0\n# by", 1), 2},
		{"an entry in another style", strings.Replace(ours, "### END", "title Windows\nrootnoverify (hd0,0)\n### END", 1), 8},
		{"a value that memlinux refuses to write", strings.Replace(ours, "uuid 1234", "uuid $1234", 1), 1},
		{"an entry that GRUB skips", strings.Replace(ours, "### END", "\ntitle no commands\n### END", 1), 1},
		{"mixed line ends", strings.Replace(ours, "quiet\n", "quiet\r\n", 1), 6},
		{"a note that can't be read", strings.Replace(ours, "# by memlinux", `# changed by memlinux: default is "4" and was "x`, 1), 1},
		{"a note written another way", strings.Replace(ours, "# by memlinux", `# changed by memlinux: default is "4" and was "\x61"`, 1), 2},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := Parse([]byte(test.in))
			_, readErr := f.Block()
			_, setErr := f.SetBlock(Block{Entries: []Entry{memlinux}})
			_, removeErr := f.RemoveBlock()
			for _, err := range []error{readErr, setErr, removeErr} {
				var wrong *BlockError
				if !errors.As(err, &wrong) {
					t.Fatalf("got %v, want a BlockError", err)
				}
				if wrong.Line != test.line {
					t.Errorf("blames line %d, not %d: %v", wrong.Line, test.line, err)
				}
			}
		})
	}
}

func TestSetBlockRefuses(t *testing.T) {
	tests := []struct {
		name  string
		block Block
		what  string
	}{
		{"a newline in a comment", Block{Comments: []string{"a\ntitle b"}}, "comment"},
		{"a comment that swallows the next line", Block{Comments: []string{`a\`}}, "comment"},
		{"a comment that reads like a note", Block{Comments: []string{"changed by memlinux: x"}}, "comment"},
		{"a global that is no word", Block{Undo: []Undo{{Name: "a b"}}}, "command"},
		{"an entry that GRUB skips", Block{Entries: []Entry{{Title: "a"}}}, "title"},
		{"a newline in a title", Block{Entries: []Entry{{Title: "a\nb", Commands: memlinux.Commands}}}, "title"},
		{"a password", Block{Entries: []Entry{{Title: "a", Commands: []Command{{Name: "password", Args: "x"}}}}}, "password"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse(nil).SetBlock(test.block)
			var invalid *InvalidError
			if !errors.As(err, &invalid) || invalid.What != test.what {
				t.Errorf("got %v, want an InvalidError about the %s", err, test.what)
			}
		})
	}
}

// TestBlockInRealFiles installs in every file of the corpus as an install does:
// an entry, and a default.
func TestBlockInRealFiles(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.lst")
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			before := Parse(data)
			changed, undo, err := before.SetGlobal("default", "42")
			if err != nil {
				t.Fatal(err)
			}
			b := Block{Comments: []string{"by memlinux"}, Undo: []Undo{undo}, Entries: []Entry{memlinux, locked}}
			checkSetBlock(t, before, b)
			after := checkSetBlock(t, changed, b)
			golden(t, strings.TrimSuffix(name, ".lst")+".block.golden", string(after.Bytes()))
			removed, err := after.UndoGlobal(undo).RemoveBlock()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(data), string(removed.Bytes())); diff != "" {
				t.Errorf("added and removed (-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzBlock(f *testing.F) {
	for _, in := range []string{"", "a", "a\r", "a\\", "a\\\n", "a\\\r\n", "\n", "a\r\nb", "a\nb\r", "title x", "title x\n\n# c", "\x00\\",
		"default a\\\r\nb", "default 1\\\n\r\n", "### BEGIN memlinux", blockText("# c\n\n" + memlinuxText), blockText("") + "x"} {
		f.Add([]byte(in))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		before := Parse(data)
		b, err := before.Block()
		if err != nil {
			if wrong := (*BlockError)(nil); !errors.As(err, &wrong) || wrong.Line < 1 || wrong.Line > bytes.Count(data, []byte("\n"))+1 {
				t.Fatalf("not a BlockError: %v", err)
			}
			return
		}
		if b != nil {
			// What was read is all that is there.
			same, err := before.SetBlock(*b)
			if err != nil || !bytes.Equal(same.data, data) {
				t.Fatalf("%q, read and set: %v, %q", data, err, same.Bytes())
			}
			if before, err = before.RemoveBlock(); err != nil {
				t.Fatal(err)
			}
			if b, err = before.Block(); err != nil || b != nil {
				return // Two halves of a marker met.
			}
		}
		checkSetBlock(t, before, Block{Entries: []Entry{memlinux}})
		changed, undo, err := before.SetGlobal("default", "saved")
		if err != nil {
			t.Fatal(err)
		}
		after := checkSetBlock(t, changed, Block{Comments: []string{"by memlinux"}, Undo: []Undo{undo}, Entries: []Entry{memlinux}})
		removed, err := after.UndoGlobal(undo).RemoveBlock()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(removed.data, before.data) {
			t.Errorf("added and removed: %q became %q", before.data, removed.data)
		}
	})
}
