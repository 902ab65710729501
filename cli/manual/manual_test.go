package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestTableOfKeysBecomesAList(t *testing.T) {
	got := keyTables("Before.\n\n| Key | Type | Standard | What it does | Example |\n|---|---|---|---|---|\n" +
		"| `memory` | whole number | `512` | MiB of a machine | `memory = 64` |\n\nBetween.\n\n| A | B |\n|---|---|\n| 1 | 2 |\n")
	want := "Before.\n\n`memory` (whole number, standard: `512`)\n:   MiB of a machine. Example: `memory = 64`\n\n\nBetween.\n\n| A | B |\n|---|---|\n| 1 | 2 |\n"
	if got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestTextIsNoCommandOfRoff(t *testing.T) {
	r := &roff{}
	r.text(".config is a file\n'and' --so \\on\n\nA paragraph")
	want := "\\&.config is a file\n\\(aqand\\(aq \\-\\-so \\eon\n.PP\nA paragraph\n"
	if r.String() != want {
		t.Errorf("%q, want %q", r.String(), want)
	}
}

// Every page that another one names is there, and no page has a command that
// man(7) and tbl(1) do not know.
func TestPages(t *testing.T) {
	t.Chdir("../..")
	dir := t.TempDir()
	if err := write(dir); err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob(filepath.Join(dir, "man", "*"))
	if err != nil || len(pages) < 20 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`(memlinux[a-z.\\-]*)\(([158])\)`).FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join(dir, "man", strings.ReplaceAll(name[1], `\`, "")+"."+name[2])); err != nil {
				t.Errorf("%s names %s, which is not there", filepath.Base(page), name[0])
			}
		}
		for _, macro := range regexp.MustCompile(`(?m)^\.([A-Za-z]+)`).FindAllStringSubmatch(string(text), -1) {
			switch macro[1] {
			case "TH", "SH", "SS", "PP", "TP", "B", "br", "RS", "RE", "nf", "fi", "EX", "EE", "IP", "TS", "TE", "nh", "ad", "sp":
			default:
				t.Errorf("%s has .%s", filepath.Base(page), macro[1])
			}
		}
	}
	top, err := os.ReadFile(filepath.Join(dir, "man", "memlinux.1"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{".SH \"ENVIRONMENT\"\n", "SOURCE_DATE_EPOCH", ".SH \"JSON\"\n", "phase, progress, bytes, total, rate, unit",
		"file, line, key, text", "report {kind, target {kind, name,", "boots {firmware, ok,", "written, verified, warnings, seconds, resumed}"} {
		if !strings.Contains(string(top), want) {
			t.Errorf("memlinux.1 has no %q", want)
		}
	}
	for _, name := range []string{"bash/memlinux", "bash/memlinux-write", "zsh/_memlinux", "zsh/_memlinux-write", "fish/memlinux.fish", "fish/memlinux-write.fish"} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Size() == 0 {
			t.Errorf("no completion %s: %v", name, err)
		}
	}
}
