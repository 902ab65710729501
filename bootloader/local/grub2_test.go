package local

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/testvm/need"
)

// A grub.cfg as grub-mkconfig 2.06 of Debian 12 writes it: with the text of
// 00_header and 41_custom.
const debianHeader = `if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="@DEFAULT@"
fi

if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi

export menuentry_id_option

function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
`

const debianFooter = `menuentry "It's \"Windows\"" --class windows $menuentry_id_option 'osprober-chain-1' { chainloader +1; }
if [ "$grub_platform" = "efi" ]; then
	fwsetup --is-supported
	if [ "$?" = 0 ]; then
		menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
			fwsetup
		}
	fi
fi
if [ -f  ${config_directory}/custom.cfg ]; then
  source ${config_directory}/custom.cfg
elif [ -z "${config_directory}" -a -f  $prefix/custom.cfg ]; then
  source $prefix/custom.cfg
fi
`

func debianCfg(def string) string {
	return strings.ReplaceAll(debianHeader, "@DEFAULT@", def) + debianEntries + debianFooter
}

// grubMachine is a /boot with GRUB 2 in a folder.
type grubMachine struct {
	t testing.TB
	*grub2
}

func newGRUBMachine(t testing.TB, cfg string, change func(b *Boot)) grubMachine {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, "boot/grub")
	for name, text := range map[string]string{"grub.cfg": cfg, "i386-pc/legacycfg.mod": "", "i386-pc/linux16.mod": ""} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b := &Boot{Dir: filepath.Join(root, "boot/memlinux"), Firmware: "bios", Disk: "sda",
		Volume: Volume{MountPoint: root, Root: "/", Type: "ext4", Device: "sda1", UUID: pcUUID, Start: pcStart}}
	if change != nil {
		change(b)
	}
	l, err := newGRUB2(b, dir)
	if err != nil {
		t.Fatal(err)
	}
	return grubMachine{t, l.(*grub2)}
}

// snapshot is every file of the machine.
func (m grubMachine) snapshot() map[string]string {
	m.t.Helper()
	files := map[string]string{}
	err := filepath.Walk(filepath.Dir(m.dir), func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		files[path] = string(data)
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return files
}

var secondEntry = Entry{ID: "fedcba9876543210", Title: "memlinux 2", Kernel: "vmlinuz-bb", Initrd: "initramfs-bb.img", Cmdline: "quiet memlinux.build=fedcba9876543210"}

// scriptCheck holds text against GRUB's own parser.
func scriptCheck(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.Command(need.Tool(t, "grub-script-check", "grub-common"), path).CombinedOutput(); err != nil {
		t.Errorf("grub-script-check %s: %v: %s", path, err, out)
	}
}

func TestGRUB2Golden(t *testing.T) {
	tests := []struct {
		name   string
		change func(b *Boot)
		want   Ours
	}{
		{"grub2-legacy", nil, Ours{Entries: []Entry{qemuEntry, secondEntry}, Default: qemuID, Next: secondEntry.ID}},
		{"grub2-plain", func(b *Boot) {
			b.Firmware, b.SecureBoot = "uefi", true
			b.Volume.Type, b.Volume.Root = "btrfs", "/@"
		}, Ours{Entries: []Entry{qemuEntry}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			m := newGRUBMachine(t, debianCfg("0"), test.change)
			write(t, m.file("grubenv"), string(newGrubenv().bytes()))
			changes := plan(t, m, test.want)
			apply(t, changes)
			scriptCheck(t, m.file("custom.cfg"))
			var out strings.Builder
			for _, c := range changes {
				kind := map[bootfs.Kind]string{bootfs.Replace: "replace", bootfs.InPlace: "in place"}[c.Kind]
				text := string(bytes.TrimRight(c.New, "#"))
				fmt.Fprintf(&out, "=== %s: %s, %d bytes for %d\n%s", filepath.Base(c.Path), kind, len(c.New), len(c.Old), text)
			}
			sameAsGolden(t, "testdata/"+test.name+".golden", strings.ReplaceAll(out.String(), m.boot.Volume.MountPoint, "")+"\n")
		})
	}
}

func TestGRUB2AddAndRemove(t *testing.T) {
	used := strings.Replace(string(env("saved_entry=0\nnext_entry=\n")), "", "", 1)
	tests := []struct{ name, custom, env string }{
		{"no custom.cfg, no grubenv", "-", "-"},
		{"an empty custom.cfg", "", "-"},
		{"an entry of somebody's", "menuentry 'x' {\n\ttrue\n}\n", string(newGrubenv().bytes())},
		{"no last newline", "set x=y", string(env("saved_entry=0\n"))},
		{"CRLF", "set x=y\r\nset z=1\r\n", used},
		{"CRLF without the last newline", "set x=y\r", used},
		{"only a newline", "\n", string(env("a=b\nnext_entry=\nc=d\n"))},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			m := newGRUBMachine(t, debianCfg("0"), nil)
			if test.custom != "-" {
				write(t, m.file("custom.cfg"), test.custom)
			}
			if test.env != "-" {
				write(t, m.file("grubenv"), test.env)
			}
			before := m.snapshot()
			one := Ours{Entries: []Entry{qemuEntry}}
			two := Ours{Entries: []Entry{qemuEntry, secondEntry}, Default: qemuID, Next: secondEntry.ID}
			for _, steps := range [][]Ours{
				{one}, {two}, {one, two}, {two, one},
				{two, {Entries: []Entry{secondEntry}, Next: secondEntry.ID}},
				{{Entries: []Entry{qemuEntry}, Next: qemuID}, {Entries: []Entry{secondEntry}}, two},
			} {
				for _, want := range append(steps, Ours{}) {
					apply(t, plan(t, m, want))
					menu, err := m.Menu()
					if err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(fmt.Sprint(want), fmt.Sprint(menu.Ours)); diff != "" {
						t.Errorf("read back:\n%s", diff)
					}
					if again := plan(t, m, want); len(again) != 0 {
						t.Errorf("the same again has a plan: %v", again)
					}
					if len(want.Entries) > 0 && !strings.Contains(test.custom, "\r") {
						scriptCheck(t, m.file("custom.cfg"))
					}
				}
				if diff := cmp.Diff(before, m.snapshot()); diff != "" {
					t.Errorf("after %d steps:\n%s", len(steps), diff)
				}
			}

			// The same, but GRUB has booted the entry and taken its name out.
			apply(t, plan(t, m, two))
			data, err := os.ReadFile(m.file("grubenv"))
			if err != nil {
				t.Fatal(err)
			}
			e, err := parseGrubenv(data)
			if err != nil {
				t.Fatal(err)
			}
			if e, err = e.set("next_entry", ""); err != nil {
				t.Fatal(err)
			}
			write(t, m.file("grubenv"), string(e.bytes()))
			menu, err := m.Menu()
			if err != nil {
				t.Fatal(err)
			}
			if menu.Ours.Next != "" {
				t.Errorf("next is still %q", menu.Ours.Next)
			}
			if again := plan(t, m, menu.Ours); len(again) != 0 {
				t.Errorf("what is there has a plan: %v", again)
			}
			apply(t, plan(t, m, Ours{}))
			if diff := cmp.Diff(before, m.snapshot()); diff != "" {
				t.Errorf("after the boot:\n%s", diff)
			}
		})
	}
}

// Each prefix of a plan must leave a machine that boots: no name of an entry
// that is not there, no entry whose menu is not there.
func TestGRUB2EveryPrefixBoots(t *testing.T) {
	one := Ours{Entries: []Entry{qemuEntry}, Next: qemuID}
	two := Ours{Entries: []Entry{secondEntry}, Default: secondEntry.ID}
	for _, steps := range [][2]Ours{{{}, one}, {one, {}}, {one, two}, {two, one}} {
		m := newGRUBMachine(t, debianCfg("0"), nil)
		write(t, m.file("grubenv"), string(newGrubenv().bytes()))
		apply(t, plan(t, m, steps[0]))
		for _, change := range plan(t, m, steps[1]) {
			apply(t, []bootfs.Change{change})
			menu, err := m.Menu()
			if err != nil {
				t.Fatal(err)
			}
			if len(menu.Warnings) > 0 {
				t.Errorf("behind %s: %v", change.Path, menu.Warnings)
			}
			if next := menu.Ours.Next; next != "" && !strings.Contains(fmt.Sprint(menu.Ours.Entries), next) && next != qemuID {
				t.Errorf("behind %s: next is %s", change.Path, next)
			}
		}
	}
}

func TestGRUB2Menu(t *testing.T) {
	show := func(m Menu) string {
		var out strings.Builder
		for _, o := range m.Others {
			mark := ""
			if o.Default {
				mark += " default"
			}
			if o.Next {
				mark += " next"
			}
			fmt.Fprintf(&out, "%s%s\n", o.Title, mark)
		}
		return out.String()
	}
	const simple, advanced = "Debian GNU/Linux", "Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1"
	tests := []struct {
		name, def, env, custom string
		byDefault, next        string
	}{
		{"by number", "0", "", "", simple, ""},
		{"a submenu by number: its first", "1", "", "", advanced, ""},
		{"in a submenu by numbers", "1>0", "", "", advanced, ""},
		{"by title", "It's \\\"Windows\\\"", "", "", "It's \"Windows\"", ""},
		{"by titles", advanced, "", "", advanced, ""},
		{"by IDs", "gnulinux-advanced-" + pcUUID + ">gnulinux-6.1-advanced-" + pcUUID, "", "", advanced, ""},
		{"one that is not there is the first", "gone", "", "", simple, ""},
		{"a number too large is the first", "9", "", "", simple, ""},
		{"the saved one", "${saved_entry}", "saved_entry=osprober-chain-1\n", "", "It's \"Windows\"", ""},
		{"saved, but nothing is", "${saved_entry}", "", "", simple, ""},
		{"the one saved before the last", "${saved_entry}", "saved_entry=0\nprev_saved_entry=1\n", "", advanced, ""},
		{"the next", "0", "next_entry=osprober-chain-1\n", "", simple, "It's \"Windows\""},
		{"one of custom.cfg", "mine", "", "menuentry mine { true; }\n", "mine", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			m := newGRUBMachine(t, debianCfg(test.def), nil)
			write(t, m.file("grubenv"), string(env(test.env)))
			write(t, m.file("custom.cfg"), test.custom)
			menu, err := m.Menu()
			if err != nil {
				t.Fatal(err)
			}
			var want strings.Builder
			titles := []string{simple, advanced, "It's \"Windows\"", "UEFI Firmware Settings"}
			if test.custom != "" {
				titles = append(titles, "mine")
			}
			for _, title := range titles {
				want.WriteString(title)
				if title == test.byDefault {
					want.WriteString(" default")
				}
				if title == test.next {
					want.WriteString(" next")
				}
				want.WriteString("\n")
			}
			if diff := cmp.Diff(want.String(), show(menu)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			// Ours as the default and the next take that away from the others.
			apply(t, plan(t, m, Ours{Entries: []Entry{qemuEntry}, Default: qemuID}))
			if menu, err = m.Menu(); err != nil || strings.Contains(show(menu), " default") || len(menu.Others) != len(titles) {
				t.Errorf("with ours as the default: %s, %v", show(menu), err)
			}
		})
	}
}

func TestGRUB2Refuses(t *testing.T) {
	add := Ours{Entries: []Entry{qemuEntry}}
	next := Ours{Entries: []Entry{qemuEntry}, Next: qemuID}
	byDefault := Ours{Entries: []Entry{qemuEntry}, Default: qemuID}
	users := "set superusers=\"root\"\npassword_pbkdf2 root x\n"
	file := func(name, text string) func(m grubMachine) {
		return func(m grubMachine) { write(m.t.(*testing.T), m.file(name), text) }
	}
	tests := []struct {
		name   string
		cfg    string
		change func(b *Boot)
		with   func(m grubMachine)
		want   Ours
		reason string // "" where it can be given
	}{
		{"grub.cfg without 41_custom", debianHeader + debianEntries, nil, nil, add, "41_custom"},
		{"a custom.cfg of another folder", debianHeader + debianEntries + "source /etc/custom.cfg\n", nil, nil, add, "41_custom"},
		{"sourced by a function that nobody calls", debianHeader + "function f {\nsource $prefix/custom.cfg\n}\n", nil, nil, add, "41_custom"},
		{"sourced by its path", debianHeader + debianEntries + "source /boot/grub/custom.cfg\n", nil, nil, add, ""},
		{"a file system without UUID", debianCfg("0"), func(b *Boot) { b.Volume.UUID = "" }, nil, add, "no UUID"},
		{"no next_entry in grub.cfg", debianEntries + debianFooter, nil, nil, next, "next_entry"},
		{"btrfs for one boot", debianCfg("0"), func(b *Boot) { b.Volume.Type = "btrfs" }, nil, next, "can't write to btrfs"},
		{"btrfs for an entry", debianCfg("0"), func(b *Boot) { b.Volume.Type = "btrfs" }, nil, add, ""},
		{"LVM for one boot", debianCfg("0"), func(b *Boot) { b.Volume.Device = "" }, nil, next, "no LVM, RAID"},
		{"a grubenv of another size", debianCfg("0"), nil, file("grubenv", "# GRUB Environment Block\n"), next, "1024"},
		{"a grubenv that is none", debianCfg("0"), nil, file("grubenv", strings.Repeat("#", 1024)), next, "first line"},
		{"a grubenv that is a link", debianCfg("0"), nil, func(m grubMachine) {
			write(m.t.(*testing.T), m.file("env"), string(newGrubenv().bytes()))
			if err := os.Symlink("env", m.file("grubenv")); err != nil {
				m.t.Fatal(err)
			}
		}, next, "no regular file"},
		{"a full grubenv", debianCfg("0"), nil, file("grubenv", string(env("a="+strings.Repeat("x", 980)+"\n"))), next, "no room"},
		{"somebody's next boot", debianCfg("0"), nil, file("grubenv", string(env("next_entry=1\n"))), next, "already set"},
		{"somebody's next boot and an entry only", debianCfg("0"), nil, file("grubenv", string(env("next_entry=1\n"))), add, ""},
		{"superusers for one boot", users + debianCfg("0"), nil, nil, next, "password"},
		{"superusers for the default", users + debianCfg("0"), nil, nil, byDefault, "password"},
		{"superusers of custom.cfg for the default", debianCfg("0"), nil, file("custom.cfg", users), byDefault, "password"},
		{"superusers for an entry", users + debianCfg("0"), nil, nil, add, ""},
		{"superusers with unrestricted entries", users + debianHeader + "menuentry x --unrestricted { true; }\n" + "source $prefix/custom.cfg\n", nil, nil, byDefault, ""},
		{"superusers with entries of some users", users + debianHeader + "menuentry x --users joe { true; }\n" + "source $prefix/custom.cfg\n", nil, nil, byDefault, "password"},
		{"a number behind custom.cfg", debianHeader + "set default=1\nmenuentry a { true; }\nsource $prefix/custom.cfg\nmenuentry b { true; }\n", nil, nil, add, "number 1"},
		{"a number before custom.cfg", debianHeader + "set default=0\nmenuentry a { true; }\nsource $prefix/custom.cfg\nmenuentry b { true; }\n", nil, nil, add, ""},
		{"an entry in our block", debianCfg("0"), nil, file("custom.cfg", blockBegin+"menuentry mine { true; }\n"+blockEnd), add, "mine"},
		{"half a block", debianCfg("0"), nil, file("custom.cfg", blockBegin+"menuentry mine { true; }\n"), add, "restore them"},
		{"two blocks", debianCfg("0"), nil, file("custom.cfg", blockBegin+blockEnd+blockBegin+blockEnd), add, "restore them"},
		{"a custom.cfg that ends in a quote", debianCfg("0"), nil, file("custom.cfg", "set x='y\n"), add, "swallow"},
		{"a custom.cfg that ends in a backslash", debianCfg("0"), nil, file("custom.cfg", "set x=y\\\n"), add, "swallow"},
		{"a custom.cfg that ends in a block", debianCfg("0"), nil, file("custom.cfg", "menuentry x {\n"), add, "swallow"},
		{"a damaged custom.cfg for nothing", debianCfg("0"), nil, file("custom.cfg", "set x='y\n"), Ours{}, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			m := newGRUBMachine(t, test.cfg, test.change)
			if test.with != nil {
				m.t = t
				test.with(m)
			}
			_, err := m.Plan(test.want)
			refused := (*UnsupportedError)(nil)
			switch {
			case test.reason == "" && err != nil:
				t.Error(err)
			case test.reason != "" && (!errors.As(err, &refused) || !strings.Contains(err.Error(), test.reason)):
				t.Errorf("got %v, not an UnsupportedError with %q", err, test.reason)
			}
		})
	}
}

func TestGRUB2RefusesEntries(t *testing.T) {
	tests := []struct {
		name   string
		change func(e *Entry)
	}{
		{"a newline in the title", func(e *Entry) { e.Title = "a\nb" }},
		{"a control character in the title", func(e *Entry) { e.Title = "a\x1bb" }},
		{"a title that GRUB takes for an option", func(e *Entry) { e.Title = "--id" }},
		{"an empty title", func(e *Entry) { e.Title = " " }},
		{"a quote in the command line", func(e *Entry) { e.Cmdline = "a='b'" }},
		{"a backslash in the command line", func(e *Entry) { e.Cmdline = `a\b` }},
		{"a newline in the command line", func(e *Entry) { e.Cmdline = "a\x00b" }},
		{"a command line longer than GRUB's", func(e *Entry) { e.Cmdline = strings.Repeat("x", 2000) }},
		{"a kernel elsewhere", func(e *Entry) { e.Kernel = "../vmlinuz" }},
		{"no initramfs", func(e *Entry) { e.Initrd = "" }},
		{"an ID that is none", func(e *Entry) { e.ID = "x" }},
	}
	for _, test := range tests {
		m := newGRUBMachine(t, debianCfg("0"), nil)
		e := qemuEntry
		test.change(&e)
		if changes, err := m.Plan(Ours{Entries: []Entry{e}}); err == nil {
			t.Errorf("%s: %v", test.name, changes)
		}
	}
	m := newGRUBMachine(t, debianCfg("0"), nil)
	for _, want := range []Ours{{Default: qemuID}, {Next: qemuID}, {Entries: []Entry{qemuEntry, qemuEntry}}} {
		if changes, err := m.Plan(want); err == nil {
			t.Errorf("%v: %v", want, changes)
		}
	}
	if _, err := m.Once(qemuID); err == nil {
		t.Error("an entry that is not there boots once")
	}
}

func TestGRUB2Orphans(t *testing.T) {
	m := newGRUBMachine(t, debianCfg("0"), nil)
	apply(t, plan(t, m, Ours{Entries: []Entry{qemuEntry}}))
	write(t, m.menuPath(secondEntry.ID), "left over\n")
	write(t, filepath.Join(m.boot.Dir, "menu-mine.lst"), "somebody's\n")
	apply(t, plan(t, m, Ours{Entries: []Entry{qemuEntry}}))
	left, _ := filepath.Glob(m.boot.Dir + "/*")
	if diff := cmp.Diff([]string{m.menuPath(qemuID), filepath.Join(m.boot.Dir, "menu-mine.lst")}, left); diff != "" {
		t.Error(diff)
	}
	// An entry whose menu has gone is told of, and can be taken away.
	if err := os.Remove(m.menuPath(qemuID)); err != nil {
		t.Fatal(err)
	}
	menu, err := m.Menu()
	if err != nil || len(menu.Warnings) != 1 || menu.Ours.Entries[0].ID != qemuID {
		t.Errorf("%+v, %v", menu, err)
	}
	apply(t, plan(t, m, Ours{}))
}

func TestSignedKernel(t *testing.T) {
	kernel, _ := need.Kernel(t)
	for name, want := range map[string]bool{kernel: true, os.Args[0]: false} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if got, err := SignedKernel(f); err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for _, data := range []string{"", "M", "MZ", "MZ" + strings.Repeat("\x00", 1000)} {
		if got, err := SignedKernel(strings.NewReader(data)); got || err != nil {
			t.Errorf("%.9q: %v, %v", data, got, err)
		}
	}
}

func FuzzScript(f *testing.F) {
	f.Add([]byte(debianCfg("0")))
	f.Add([]byte("menuentry 'a'\\''b' \"c\\\"$d\" { x; }\nsubmenu x { { menuentry y { z } } }\n# }\n${x\\"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := parseScript(data)
		st := grubState{config: s, custom: customFile{}}
		locate(st.menu(), st.defaultSpec())
		allUnrestricted(s.items)
		// Our own quoting is read as one word, whatever it is.
		if !bytes.ContainsAny(data, "\n") {
			words := parseScript([]byte("a " + quoteScript(string(data)) + "\n"))
			if len(words.commands) != 1 || len(words.commands[0].words) != 2 || words.commands[0].words[1] != string(data) || words.open {
				t.Fatalf("%q is read as %v", data, words.commands)
			}
		}
	})
}

func FuzzCustom(f *testing.F) {
	f.Add([]byte{}, "--nux", "quiet")
	f.Add([]byte{}, "$menuentry_id_option", "quiet")
	for _, seed := range []string{"", "set x=y", "set x=y\r\n", "menuentry x {\n}\n", blockBegin, blockEnd + "\n" + blockBegin, "\x00'", blockBegin + blockMade + " newline\n" + blockEnd + "z"} {
		f.Add([]byte(seed), "memlinux", "quiet")
	}
	f.Fuzz(func(t *testing.T, data []byte, title, cmdline string) {
		c, err := parseCustom(data)
		if err != nil {
			return
		}
		if c.present {
			if got := c.without(); marks(got, blockBegin) != nil {
				t.Fatalf("the block stays: %q", got)
			}
			return
		}
		v := Volume{MountPoint: "/boot", Root: "/", Type: "ext4", UUID: pcUUID, Device: "sda1"}
		g := &grub2{boot: &Boot{Dir: "/boot/memlinux", Volume: v}, dir: "/boot/grub", plain: len(title)%2 == 0}
		e := qemuEntry
		e.Title, e.Cmdline = title, cmdline
		text, menu, err := g.render(e, false)
		if err != nil {
			return
		}
		m := made{newline: len(data) > 0 && !bytes.HasSuffix(data, []byte("\n"))}
		custom := c.with(text, []string{e.ID}, e.ID, 0, m)
		again, err := parseCustom(custom)
		if err != nil || !again.present {
			t.Fatalf("%q: %v", custom, err)
		}
		if got := again.without(); !bytes.Equal(got, data) {
			t.Fatalf("%q became %q", data, got)
		}
		ours := grubState{custom: again, menus: map[string][]byte{e.ID: menu}}.ours()
		if len(ours.Entries) != 1 || ours.Entries[0].Title != strings.TrimSpace(title) || ours.Entries[0].Cmdline != strings.Join(strings.Fields(cmdline), " ") || ours.Default != e.ID {
			t.Fatalf("%q, %q are read back as %+v", title, cmdline, ours)
		}
	})
}
