package menulst

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/testvm/need"
)

var update = flag.Bool("update", false, "write the golden files")

// dump is what the package makes of a file, as text for the golden files.
func dump(f *File) string {
	var b strings.Builder
	index, ok := f.Default()
	fmt.Fprintf(&b, "default: %d %v\n", index, ok)
	for _, c := range f.Globals() {
		fmt.Fprintf(&b, "%d: %s [%s]\n", c.Line, c.Name, c.Args)
	}
	for i, e := range f.Entries() {
		fmt.Fprintf(&b, "\n%d: entry %d [%s]\n", e.Line, i, e.Title)
		for _, c := range e.Commands {
			fmt.Fprintf(&b, "%d:   %s [%s]\n", c.Line, c.Name, c.Args)
		}
		kernel, cmdline := e.Kernel()
		fmt.Fprintf(&b, "kernel [%s] [%s] initrd [%s] root [%s] uuid [%s]\n", kernel, cmdline, e.Initrd(), e.Root(), e.UUID())
	}
	return b.String()
}

func TestRealFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/*.lst")
	if err != nil || len(files) < 15 {
		t.Fatalf("testdata: %v %v", files, err)
	}
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			f := Parse(data)
			if diff := cmp.Diff(data, f.Bytes()); diff != "" {
				t.Errorf("bytes changed:\n%s", diff)
			}
			golden(t, strings.TrimSuffix(name, ".lst")+".golden", dump(f))
			if filepath.Base(name) != "by-hand.lst" { // it has an empty entry, which GRUB 2 can't read
				checkAgainstGRUB(t, f)
			}
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// convert runs GRUB's own converter, and its syntax check over what comes out.
func convert(t *testing.T, data string) string {
	t.Helper()
	convert := exec.Command(need.Tool(t, "grub-menulst2cfg", "grub-common"))
	// legacy_configfile drops indents and carriage returns before it parses;
	// the converter does not.
	var lines []string
	for _, l := range strings.SplitAfter(strings.ReplaceAll(data, "\r", ""), "\n") {
		if l = strings.TrimLeft(l, " \t"); l == "lock\n" {
			continue // GRUB 2.06 forgets a newline behind it: a syntax error
		}
		lines = append(lines, l)
	}
	convert.Stdin = strings.NewReader(strings.Join(lines, ""))
	cfg, err := convert.Output()
	if err != nil {
		t.Fatalf("grub-menulst2cfg: %v", err)
	}
	check := exec.Command(need.Tool(t, "grub-script-check", "grub-common"))
	check.Stdin = strings.NewReader(string(cfg))
	if out, err := check.CombinedOutput(); err != nil {
		t.Fatalf("grub-script-check: %v: %s\n%s", err, out, cfg)
	}
	return string(cfg)
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func quoteWords(s string) string {
	words := strings.Fields(s)
	for i := range words {
		words[i] = quote(words[i])
	}
	return strings.Join(words, " ")
}

// checkAgainstGRUB holds titles and kernel lines against GRUB's converter.
func checkAgainstGRUB(t *testing.T, f *File) {
	t.Helper()
	cfg := convert(t, string(f.Bytes()))
	entries := strings.Split(cfg, "menuentry ")[1:]
	if len(entries) != len(f.Entries()) {
		t.Fatalf("GRUB sees %d entries, Parse %d:\n%s", len(entries), len(f.Entries()), cfg)
	}
	for i, e := range f.Entries() {
		if want := quote(e.Title) + " {\n"; !strings.HasPrefix(entries[i], want) {
			t.Errorf("entry %d: GRUB has no %s:\n%s", i, want, entries[i])
		}
		for _, c := range e.Commands {
			// GRUB 2 has no continuation lines.
			if c.Name == "kernel" && !strings.Contains(string(f.Bytes()), "\\\n") {
				path, args := e.Kernel()
				// A blank at the end of a line is an empty word for GRUB 2.
				got := strings.ReplaceAll(entries[i], " ''\n", "\n")
				if want := " " + quoteWords(path+" "+args) + "\n"; !strings.Contains(got, want) {
					t.Errorf("entry %d: GRUB has no %s:\n%s", i, want, entries[i])
				}
			}
		}
		if uuid := e.UUID(); uuid != "" && !strings.Contains(entries[i], "--fs-uuid "+quote(uuid)+"\n") {
			t.Errorf("entry %d: GRUB has no UUID %s:\n%s", i, uuid, entries[i])
		}
	}
}

func TestGrammar(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"an empty file", "", "default: 0 true\n"},
		{"both forms of a global", "timeout = 5\ndefault=2", "default: 2 true\n1: timeout [5]\n2: default [2]\n"},
		{"an = in the arguments stays", "kopt a=b", "default: 0 true\n1: kopt [a=b]\n"},
		{"a command without arguments", "hiddenmenu", "default: 0 true\n1: hiddenmenu []\n"},
		{"the last default counts", "default 1\ndefault 3\n", "default: 3 true\n1: default [1]\n2: default [3]\n"},
		{"default saved is not in the file", "default saved", "default: 0 false\n1: default [saved]\n"},
		{"saved with a blank behind it is no number either", "default saved \n", "default: 0 true\n1: default [saved]\n"},
		{"a default that is no number leaves the one before", "default 3\ndefault x\ndefault 99999999999\n", "default: 3 true\n1: default [3]\n2: default [x]\n3: default [99999999999]\n"},
		{"a default that is no number", "default x", "default: 0 true\n1: default [x]\n"},
		{"a default with text behind it", "default 2 # two", "default: 2 true\n1: default [2 # two]\n"},
		{"a hexadecimal default", "default 0x1f", "default: 31 true\n1: default [0x1f]\n"},
		{"indents, tabs, CRLF", "\t timeout\t5 \t\r\n", "default: 0 true\n1: timeout [5]\n"},
		{"a carriage return inside", "time\rout 5\n", "default: 0 true\n1: timeout [5]\n"},
		{"a comment only at the start", " # a\nroot #b", "default: 0 true\n2: root [#b]\n"},
		{"a continuation", "color a \\\n b\ntimeout 1", "default: 0 true\n1: color [a   b]\n3: timeout [1]\n"},
		{"a continuation with CRLF", "color a\\\r\nb\r\ntimeout 1", "default: 0 true\n1: color [a b]\n3: timeout [1]\n"},
		{"a comment goes on too", "# a \\\ntimeout 5\ndefault 1", "default: 1 true\n3: default [1]\n"},
		{"a continuation at the end of the file", "color a\\\n", "default: 0 true\n1: color [a]\n"},
		{"a NUL ends its line", "color a\x00b\ntimeout 1", "default: 0 true\n1: color [a]\n2: timeout [1]\n"},
		{"= before a title is skipped", "title = a = b", "default: 0 true\n\n1: entry 0 [a = b]\nkernel [] [] initrd [] root [] uuid []\n"},
		{"case matters", "TITLE a\n", "default: 0 true\n1: TITLE [a]\n"},
		{"a global after a title is the entry's", "title a\ntimeout 5", "default: 0 true\n\n1: entry 0 [a]\n2:   timeout [5]\nkernel [] [] initrd [] root [] uuid []\n"},
		{"quotes are text", "title a\nkernel /k a=\"b c\"", "default: 0 true\n\n1: entry 0 [a]\n2:   kernel [/k a=\"b c\"]\nkernel [/k] [a=\"b c\"] initrd [] root [] uuid []\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := Parse([]byte(test.in))
			if diff := cmp.Diff(test.want, dump(f)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if string(f.Bytes()) != test.in {
				t.Errorf("bytes changed: %q", f.Bytes())
			}
		})
	}
}

func TestBytesAreTheCallersOwn(t *testing.T) {
	in := []byte("timeout 5\n")
	f := Parse(in)
	in[0] = 'x'
	f.Bytes()[1] = 'y'
	if got := string(f.Bytes()); got != "timeout 5\n" {
		t.Errorf("a caller's slice changed the file: %q", got)
	}
}

func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.lst")
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("title a\\\r\n\r\n\x00=\\"))
	f.Fuzz(func(t *testing.T, data []byte) {
		file := Parse(data)
		if diff := cmp.Diff(string(data), string(file.Bytes())); diff != "" {
			t.Errorf("bytes changed:\n%s", diff)
		}
		end, num := 0, 1
		for _, l := range file.lines {
			if l.start != end || l.end <= l.start || l.num != num {
				t.Fatalf("line %+v does not follow on byte %d, line %d", l, end, num)
			}
			end, num = l.end, num+strings.Count(string(data[l.start:l.end]), "\n")
		}
		if end != len(data) {
			t.Errorf("the lines end at %d of %d", end, len(data))
		}
		dump(file)
	})
}
