package menulst

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func one(title, name, args string) Menu {
	return Menu{Entries: []Entry{{Title: title, Commands: []Command{{Name: name, Args: args}}}}}
}

func TestRender(t *testing.T) {
	menu := Menu{
		Comments: []string{"Written by memlinux.", ""},
		Globals:  []Command{{Name: "default", Args: "0"}, {Name: "timeout", Args: "5"}, {Name: "hiddenmenu"}},
		Entries: []Entry{memlinux, {Title: " It's $HOME; \"half\" | {off} & <on> \\o/ für # 1 ", Commands: []Command{
			{Name: "root", Args: "(hd0,1)"},
			{Name: "kernel", Args: "/vmlinuz console=ttyS0,115200 $x ${y} a;b `c` {d} <e> f|g &h #i *? ~ ! ü =j k=l,m"},
		}}},
	}
	data, err := Render(menu)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/render.golden", string(data))
	f := Parse(data)
	menu.Entries[1].Title = strings.TrimSpace(menu.Entries[1].Title)
	if diff := cmp.Diff(menu.Entries, f.Entries(), ignoreLines); diff != "" {
		t.Errorf("Render and Parse (-want +got):\n%s", diff)
	}
	checkAgainstGRUB(t, f)
	golden(t, "testdata/render.cfg.golden", convert(t, string(data)))
}

func TestRenderRefuses(t *testing.T) {
	tests := []struct {
		name string
		menu Menu
		what string
	}{
		{"a newline in a title", one("a\nkernel /evil", "boot", ""), "title"},
		{"a carriage return in a title", one("a\rb", "boot", ""), "title"},
		{"a NUL in a title", one("a\x00b", "boot", ""), "title"},
		{"a tab in a title", one("a\tb", "boot", ""), "title"},
		{"an escape sequence in a title", one("\x1b[2J", "boot", ""), "title"},
		{"a C1 control in a title", one("a\u009b2J", "boot", ""), "title"},
		{"a title that is not UTF-8", one("a\xff", "boot", ""), "title"},
		{"an empty title", one("  ", "boot", ""), "title"},
		{"a title that GRUB would cut", one("= a", "boot", ""), "title"},
		{"a title that swallows the next line", one(`a\ `, "boot", ""), "title"},
		{"a title longer than GRUB's line", one(strings.Repeat("x", MaxLine-5), "boot", ""), "title"},
		{"an entry that crashes GRUB 2", Menu{Entries: []Entry{{Title: "a"}}}, "title"},
		{"a lock, which GRUB 2 can't parse", one("a", "lock", ""), "lock"},
		{"a password in an entry, which GRUB 2 can't parse", one("a", "password", "x"), "password"},
		{"a newline in a command line", one("a", "kernel", "/k a\nb"), "kernel"},
		{"a DEL in a command line", one("a", "kernel", "/k a\x7f"), "kernel"},
		{"a double quote in a command line", one("a", "kernel", `/k a="b c"`), "kernel command line"},
		{"a single quote in a command line", one("a", "kernel", "/k a='b"), "kernel command line"},
		{"a backslash in a command line", one("a", "kernel", `/k a\b c`), "kernel command line"},
		{"a quote in a module's command line", one("a", "module", "/k '"), "kernel command line"},
		{"a quote in a path", one("a", "initrd", "/it's"), "initrd"},
		{"a command line longer than GRUB's line", one("a", "kernel", "/k "+strings.Repeat("x", MaxLine)), "kernel"},
		{"a kernel without a path", one("a", "kernel", "quiet"), "kernel"},
		{"a kernel that is nothing", one("a", "kernel", ""), "kernel"},
		{"a title inside an entry", one("a", "title", "b"), "title"},
		{"a command with a newline", one("a", "boot\ntitle", "b"), "command"},
		{"a comment as a command", one("a", "#boot", ""), "command"},
		{"a command that hides its =", one("a", "root=x", ""), "command"},
		{"arguments that GRUB would cut", one("a", "root", "=x"), "root"},
		{"a UUID that is none", one("a", "uuid", "$(reboot)"), "uuid"},
		{"a timeout that GRUB 2 reads as 0", Menu{Globals: []Command{{Name: "timeout", Args: "-1"}}}, "timeout"},
		{"a timeout that GRUB 2 reads as octal", Menu{Globals: []Command{{Name: "timeout", Args: "010"}}}, "timeout"},
		{"a default that is no entry", Menu{Globals: []Command{{Name: "default", Args: "memlinux"}}}, "default"},
		{"a newline in a comment", Menu{Comments: []string{"a\ntitle b"}}, "comment"},
		{"a comment that swallows the next line", Menu{Comments: []string{`a\`}}, "comment"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			data, err := Render(test.menu)
			var invalid *InvalidError
			if !errors.As(err, &invalid) {
				t.Fatalf("got %v, %q; want an InvalidError", err, data)
			}
			if invalid.What != test.what {
				t.Errorf("blames the %s, not the %s: %v", invalid.What, test.what, err)
			}
		})
	}
}

func TestLongestLine(t *testing.T) {
	title := strings.Repeat("x", MaxLine-len("title "))
	data, err := Render(one(title, "kernel", "/k "+strings.Repeat("y", MaxLine-len("kernel /k "))))
	if err != nil {
		t.Fatal(err)
	}
	checkAgainstGRUB(t, Parse(data))
}

func FuzzRender(f *testing.F) {
	f.Add("5", "memlinux", "kernel", "/boot/vmlinuz quiet")
	f.Add("0", " it's = \\ # ", "uuid", "1234-ABCD")
	f.Add("x", "title", "root", " (hd0,0) ")
	f.Fuzz(func(t *testing.T, timeout, title, name, args string) {
		menu := one(title, name, args)
		menu.Globals = []Command{{Name: "timeout", Args: timeout}}
		menu.Comments = []string{title}
		data, err := Render(menu)
		if err != nil {
			var invalid *InvalidError
			if !errors.As(err, &invalid) {
				t.Fatalf("not an InvalidError: %v", err)
			}
			return
		}
		file := Parse(data)
		e := &menu.Entries[0]
		e.Title = strings.Trim(e.Title, " ")
		e.Commands[0].Args = strings.Trim(e.Commands[0].Args, " ")
		menu.Globals[0].Args = strings.Trim(timeout, " ")
		if diff := cmp.Diff(menu.Entries, file.Entries(), ignoreLines); diff != "" {
			t.Errorf("entries (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(menu.Globals, file.Globals(), ignoreLines, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("globals (-want +got):\n%s", diff)
		}
	})
}

func ExampleRender() {
	data, err := Render(Menu{
		Globals: []Command{{Name: "default", Args: "0"}, {Name: "timeout", Args: "5"}},
		Entries: []Entry{{Title: "memlinux", Commands: []Command{
			{Name: "uuid", Args: "1234-ABCD"},
			{Name: "kernel", Args: "/boot/vmlinuz console=tty0 console=ttyS0,115200"},
			{Name: "initrd", Args: "/boot/initramfs.img"},
		}}},
	})
	fmt.Printf("%s%v", data, err)
	// Output:
	// default 0
	// timeout 5
	//
	// title memlinux
	// uuid 1234-ABCD
	// kernel /boot/vmlinuz console=tty0 console=ttyS0,115200
	// initrd /boot/initramfs.img
	// <nil>
}
