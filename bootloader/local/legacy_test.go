package local

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/bootloader/menulst"
)

const (
	legacyUUID = "6d656d6c-696e-7578-0000-00000000000a"
	// What a stage2 says of itself, as far as newLegacy looks.
	plainStage2  = "\x00\x00timeout\x00savedefault\x00savedefault [NUM | `fallback']\x00print\x00splashimage\x00"
	ubuntuStage2 = plainStage2 + "uuid\x00uuid UUID\x00quiet\x00"
)

// legacyEntry1 and the others are entries of ours.
var (
	legacyEntry1 = Entry{ID: "1111111111111111", Title: "memlinux", Kernel: "vmlinuz-aa", Initrd: "initramfs-bb.img", Cmdline: "quiet memlinux.build=1111111111111111"}
	legacyEntry2 = Entry{ID: "2222222222222222", Title: "memlinux (2)", Kernel: "vmlinuz-cc", Initrd: "initramfs-dd.img", Cmdline: "memlinux.build=2222222222222222 console=ttyS0"}
)

// legacyOn is GRUB Legacy over a folder with these files: a /boot on its own
// ext3 partition, sda2.
func legacyOn(t *testing.T, menu string, saved []byte, stage2 string) *legacy {
	t.Helper()
	boot := filepath.Join(t.TempDir(), "boot")
	if err := os.MkdirAll(filepath.Join(boot, "grub"), 0o755); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"menu.lst": []byte(menu), "stage2": []byte(stage2), "default": saved}
	for name, data := range files {
		if data == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(boot, "grub", name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l, err := newLegacy(&Boot{
		Dir:      filepath.Join(boot, "memlinux"),
		Volume:   Volume{MountPoint: boot, Root: "/", Type: "ext3", Device: "sda2", UUID: legacyUUID},
		Firmware: "bios",
	}, filepath.Join(boot, "grub", "menu.lst"), "hd0", 2)
	if err != nil {
		t.Fatal(err)
	}
	return l.(*legacy)
}

// legacyFiles is what a boot loader sees.
type legacyFiles struct{ menu, saved []byte }

func (l *legacy) files(t *testing.T) legacyFiles {
	t.Helper()
	menu, err := os.ReadFile(l.menu)
	if err != nil {
		t.Fatal(err)
	}
	saved, err := readIf(l.savedPath())
	if err != nil {
		t.Fatal(err)
	}
	return legacyFiles{menu, saved}
}

// after is f with one change, which must begin with what is there.
func (l *legacy) after(t *testing.T, f legacyFiles, c bootfs.Change) legacyFiles {
	t.Helper()
	at := &f.menu
	if c.Path == l.savedPath() {
		at = &f.saved
	} else if c.Path != l.menu {
		t.Fatalf("changes %s", c.Path)
	}
	if !bytes.Equal(*at, c.Old) || (*at == nil) != (c.Old == nil) {
		t.Fatalf("%s: the plan begins with %q, there is %q", c.Path, c.Old, *at)
	}
	if c.Kind == bootfs.InPlace && (len(c.Old) != len(c.New) || len(c.Old) == 0) {
		t.Fatalf("%s: %d bytes in place of %d", c.Path, len(c.New), len(c.Old))
	}
	*at = c.New
	return f
}

// store writes the files as a change leaves them.
func (l *legacy) store(t *testing.T, f legacyFiles) {
	t.Helper()
	for path, data := range map[string][]byte{l.menu: f.menu, l.savedPath(): f.saved} {
		err := os.Remove(path)
		if data != nil {
			err = os.WriteFile(path, data, 0o644)
		}
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
}

const legacyFails = ": Error 15: File not found"

// boots is what GRUB does with the files: the title that it boots by itself, and
// the files as savedefault leaves them.
func (l *legacy) boots(t *testing.T, f legacyFiles) (title string, after legacyFiles) {
	t.Helper()
	menu := menulst.Parse(f.menu)
	numbers, count := l.numbers(menu)
	n, fixed := menu.Default()
	if !fixed {
		n, _ = savedNumber(f.saved)
	}
	if n = inMenu(menu, n, count); n < 0 {
		return "", f
	}
	e := menu.Entries()[slices.Index(numbers, n)]
	if args, ok := e.Arg("savedefault"); ok {
		if len(f.saved) < savedSize {
			return e.Title + legacyFails, f
		}
		next := n
		if v, ok := menulst.Number(args); ok {
			next = v
		}
		f.saved = append(savedHead(next, 0), f.saved[savedSize:]...)
	}
	return e.Title, f
}

// steps is f with all changes. Each of them leaves a menu that boots what the one
// before did, or the last one, or just the default of one of the two.
func (l *legacy) steps(t *testing.T, f legacyFiles, changes []bootfs.Change) legacyFiles {
	t.Helper()
	byItself := func(f legacyFiles) string {
		title, after := l.boots(t, f)
		again, _ := l.boots(t, after)
		return strings.ReplaceAll(title+", then "+again, legacyFails, "")
	}
	titles := []string{byItself(f)}
	for _, c := range changes {
		f = l.after(t, f, c)
		titles = append(titles, byItself(f))
	}
	last := titles[len(titles)-1]
	_, oldDefault, _ := strings.Cut(titles[0], ", then ")
	_, newDefault, _ := strings.Cut(last, ", then ")
	allowed := []string{titles[0], last, oldDefault + ", then " + oldDefault, newDefault + ", then " + newDefault}
	for i, title := range titles {
		if !slices.Contains(allowed, title) {
			t.Errorf("after %d of %d changes it boots %s; before it was %s, and in the end %s", i, len(changes), title, titles[0], last)
		}
	}
	return f
}

// set plans and applies want, and holds what a Plan promises.
func (l *legacy) set(t *testing.T, want Ours) []bootfs.Change {
	t.Helper()
	changes, err := l.Plan(want)
	if err != nil {
		t.Fatal(err)
	}
	l.store(t, l.steps(t, l.files(t), changes))
	m, err := l.Menu()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, m.Ours, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the menu (-want +got):\n%s", diff)
	}
	if again, err := l.Plan(want); err != nil || len(again) != 0 {
		t.Errorf("the same plan again: %d changes, %v", len(again), err)
	}
	return changes
}

const legacyMenu2 = "default\t\t1\ntimeout\t5\n\ntitle\tA\nroot (hd0,0)\nkernel /a\n\ntitle\tB\nkernel /b\n"

func TestLegacyGolden(t *testing.T) {
	for name, stage2 := range map[string]string{"legacy-root": plainStage2, "legacy-uuid": ubuntuStage2} {
		t.Run(name, func(t *testing.T) {
			l := legacyOn(t, legacyMenu2, nil, stage2)
			l.set(t, Ours{Entries: []Entry{legacyEntry1, legacyEntry2}, Default: legacyEntry1.ID, Next: legacyEntry2.ID})
			f := l.files(t)
			got := "--- menu.lst\n" + string(f.menu) + "--- default\n" + string(f.saved)
			golden := filepath.Join("testdata", name+".golden")
			if os.Getenv("MEMLINUX_UPDATE") != "" {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// legacyMenus are menus with what their file default may be.
var legacyMenus = []struct {
	name, menu string
	saved      []byte
	old        string // what boots by itself
}{
	{"no file default", legacyMenu2, nil, "B"},
	{"as grub-set-default writes it", legacyMenu2, []byte("0\n" + savedTail), "B"},
	{"default saved", strings.Replace(legacyMenu2, "1", "saved", 1), []byte("1\n" + savedTail), "B"},
	{"default saved, as GRUB writes it", strings.Replace(legacyMenu2, "1", "saved", 1), []byte("1\x00\n\n\n\n\n\n\n\nx"), "B"},
	{"default saved without a file", strings.Replace(legacyMenu2, "1", "saved", 1), nil, "A"},
	{"default saved and an empty file", strings.Replace(legacyMenu2, "1", "saved", 1), []byte{}, "A"},
	{"default saved and garbage", strings.Replace(legacyMenu2, "1", "saved", 1), []byte("\xff\xfenonsense, and more of it"), "A"},
	{"default saved and entries that save themselves", strings.NewReplacer("1", "saved", "kernel", "savedefault\nkernel").Replace(legacyMenu2), []byte("1\n" + savedTail), "B"},
	{"a file too short for GRUB", legacyMenu2, []byte("0\n"), "B"},
	{"no default", "title A\nroot\ntitle B\nroot\n", nil, "A"},
	{"a default that is no entry yet", strings.Replace(legacyMenu2, "1", "2", 1), nil, "A"},
	{"a default that is no entry yet, and a fallback", strings.Replace(legacyMenu2, "1", "2\nfallback 7 1", 1), nil, "B"},
	{"a saved entry that is none yet", strings.Replace(legacyMenu2, "1", "saved", 1), []byte("3\n" + savedTail), "A"},
	{"an entry that GRUB skips", strings.Replace(legacyMenu2, "title\tB", "title -----\nno command\ntitle\tB", 1), nil, "B"},
	{"the last of two defaults", "default 0\r\n" + strings.ReplaceAll(legacyMenu2, "\n", "\r\n") + "#", nil, "B"},
}

// TestLegacyAddAndRemove goes through what a user does, each from a fresh menu.
func TestLegacyAddAndRemove(t *testing.T) {
	both := []Entry{legacyEntry1, legacyEntry2}
	ways := map[string][]Ours{
		"an entry":                          {{Entries: both[:1]}},
		"two":                               {{Entries: both[:1]}, {Entries: both}, {Entries: both[1:]}},
		"a default":                         {{Entries: both, Default: both[1].ID}},
		"a default that changes":            {{Entries: both[:1], Default: both[0].ID}, {Entries: both, Default: both[1].ID}, {Entries: both}},
		"next":                              {{Entries: both[:1], Next: both[0].ID}},
		"next, asked for later":             {{Entries: both}, {Entries: both, Next: both[1].ID}},
		"next, taken back":                  {{Entries: both, Next: both[1].ID}, {Entries: both}},
		"next, and another":                 {{Entries: both, Next: both[1].ID}, {Entries: both, Next: both[0].ID}},
		"next beside a default":             {{Entries: both, Default: both[0].ID, Next: both[1].ID}, {Entries: both, Default: both[0].ID}},
		"next, then without the one above":  {{Entries: both, Next: both[1].ID}, {Entries: both[1:], Next: both[1].ID}},
		"default moves up while next waits": {{Entries: both, Default: both[1].ID, Next: both[0].ID}, {Entries: both[1:], Default: both[1].ID}},
	}
	for _, test := range legacyMenus {
		for _, way := range slices.Sorted(maps.Keys(ways)) {
			t.Run(test.name+"/"+way, func(t *testing.T) {
				l := legacyOn(t, test.menu, test.saved, plainStage2)
				before := l.files(t)
				if title, _ := l.boots(t, before); title != test.old {
					t.Fatalf("boots %s before all, not %s", title, test.old)
				}
				for _, want := range ways[way] {
					l.set(t, want)
					title, after := l.boots(t, l.files(t))
					again, _ := l.boots(t, after)
					titles := func(id string) string {
						if id == "" {
							return test.old
						}
						return want.Entries[indexOf(want.Entries, id)].Title
					}
					normal, first := titles(want.Default), titles(want.Default)
					if want.Next != "" {
						first = titles(want.Next)
					}
					if title != first || again != normal {
						t.Errorf("%+v boots %q, then %q; want %q and %q", want, title, again, first, normal)
					}
				}
				l.set(t, Ours{})
				if diff := cmp.Diff(before, l.files(t), cmp.AllowUnexported(legacyFiles{})); diff != "" {
					t.Errorf("removed (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestLegacyUsedNext boots the entry once, and gives back what was before.
func TestLegacyUsedNext(t *testing.T) {
	for _, test := range legacyMenus {
		for _, def := range []string{"", legacyEntry1.ID} {
			t.Run(fmt.Sprintf("%s, default %q", test.name, def), func(t *testing.T) {
				l := legacyOn(t, test.menu, test.saved, plainStage2)
				before := l.files(t)
				want := Ours{Entries: []Entry{legacyEntry1, legacyEntry2}, Default: def, Next: legacyEntry2.ID}
				l.set(t, want)
				_, after := l.boots(t, l.files(t))
				l.store(t, after)
				m, err := l.Menu()
				if err != nil {
					t.Fatal(err)
				}
				want.Next = ""
				if diff := cmp.Diff(want, m.Ours); diff != "" {
					t.Errorf("after the boot (-want +got):\n%s", diff)
				}
				for _, o := range m.Others {
					if o.Next || o.Default != (def == "" && o.Title == test.old) {
						t.Errorf("other: %+v", o)
					}
				}
				want.Next = legacyEntry1.ID
				if def == "" {
					l.set(t, want)
					_, after := l.boots(t, l.files(t))
					l.store(t, after)
				}
				want.Next = ""
				l.set(t, want)
				l.set(t, Ours{})
				if diff := cmp.Diff(before, l.files(t), cmp.AllowUnexported(legacyFiles{})); diff != "" {
					t.Errorf("removed (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// TestLegacyKilled stops after each change of a plan, and plans again: nothing
// of memlinux stays behind.
func TestLegacyKilled(t *testing.T) {
	for _, test := range legacyMenus {
		for _, next := range []bool{false, true} {
			for steps := range 4 {
				t.Run(fmt.Sprintf("%s, next %v, %d changes", test.name, next, steps), func(t *testing.T) {
					l := legacyOn(t, test.menu, test.saved, plainStage2)
					before := l.files(t)
					want := Ours{Entries: []Entry{legacyEntry1, legacyEntry2}, Next: legacyEntry2.ID}
					if !next {
						l.set(t, want)
						want = Ours{}
					}
					changes, err := l.Plan(want)
					if err != nil {
						t.Fatal(err)
					}
					f := l.files(t)
					for _, c := range changes[:min(steps, len(changes))] {
						f = l.after(t, f, c)
					}
					l.store(t, f)
					l.set(t, Ours{})
					if diff := cmp.Diff(before, l.files(t), cmp.AllowUnexported(legacyFiles{})); diff != "" {
						t.Errorf("removed (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

// TestLegacyOthersChanged holds that a person's later choice stays.
func TestLegacyOthersChanged(t *testing.T) {
	one := Ours{Entries: []Entry{legacyEntry1}}
	next := Ours{Entries: []Entry{legacyEntry1}, Next: legacyEntry1.ID}
	byDefault := Ours{Entries: []Entry{legacyEntry1}, Default: legacyEntry1.ID}
	tests := []struct {
		name   string
		want   Ours
		change func(f *legacyFiles)
		boots  string
		saved  string // what the file default begins with in the end
		menu   string // what the menu has in the end
	}{
		{"default set by hand while ours was", byDefault, func(f *legacyFiles) { f.menu = bytes.Replace(f.menu, []byte("\t2\n"), []byte("\t0\n"), 1) }, "A", "0\n#", "default\t\t0\n"},
		{"another entry saved while ours waited", next, func(f *legacyFiles) { f.saved = []byte("0\n" + savedTail) }, "A", "0\n#", "default\t\t1\n"},
		{"a kernel came, as update-grub adds one", byDefault, func(f *legacyFiles) {
			f.menu = bytes.Replace(f.menu, []byte("title\tA\n"), []byte("title new\nroot\n\ntitle\tA\n"), 1)
		}, "B", "0\n#", "default\t\t1\n"},
		{"ours made the default by hand", one, func(f *legacyFiles) { f.menu = bytes.Replace(f.menu, []byte("\t1\n"), []byte("\t2\n"), 1) }, "memlinux", "0\n#", "default\t\t2\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			l := legacyOn(t, legacyMenu2, []byte("0\n"+savedTail), plainStage2)
			l.set(t, test.want)
			f := l.files(t)
			test.change(&f)
			l.store(t, f)
			if title, _ := l.boots(t, f); title != test.boots {
				t.Errorf("boots %s, not %s", title, test.boots)
			}
			m, err := l.Menu()
			if err != nil {
				t.Fatal(err)
			}
			if wrong := test.boots == "B"; wrong != (len(m.Warnings) == 1 && strings.Contains(m.Warnings[0], "another one")) {
				t.Errorf("warnings: %q", m.Warnings)
			}
			l.set(t, Ours{Entries: m.Ours.Entries, Default: m.Ours.Default})
			l.set(t, Ours{Entries: m.Ours.Entries})
			l.set(t, Ours{})
			f = l.files(t)
			if !bytes.Contains(f.menu, []byte(test.menu)) || !bytes.HasPrefix(f.saved, []byte(test.saved)) {
				t.Errorf("in the end %q and %q", f.menu, f.saved)
			}
		})
	}
}

// The default needs no next boot of its own.
func TestLegacyNextIsTheDefault(t *testing.T) {
	l := legacyOn(t, legacyMenu2, nil, plainStage2)
	want := Ours{Entries: []Entry{legacyEntry1}, Default: legacyEntry1.ID}
	both := want
	both.Next = legacyEntry1.ID
	l.set(t, want)
	if changes, err := l.Plan(both); err != nil || len(changes) != 0 {
		t.Errorf("%+v, %v", changes, err)
	}
}

func TestLegacyBehindTheBlock(t *testing.T) {
	l := legacyOn(t, legacyMenu2, nil, plainStage2)
	l.set(t, Ours{Entries: []Entry{legacyEntry1}})
	f := l.files(t)
	f.menu = append(f.menu, "\ntitle Z\nroot\n"...)
	l.store(t, f)
	l.set(t, Ours{Entries: []Entry{legacyEntry1, legacyEntry2}, Default: legacyEntry2.ID})
	l.set(t, Ours{Entries: []Entry{legacyEntry1}})
	for _, change := range []struct{ old, new string }{{"default\t\t1", "default\t\t3"}, {"default\t\t1", "default 1\nfallback 3"}} {
		g := f
		g.menu = bytes.Replace(f.menu, []byte(change.old), []byte(change.new), 1)
		l.store(t, g)
		var no *UnsupportedError
		if _, err := l.Plan(Ours{}); !errors.As(err, &no) {
			t.Errorf("%s: got %v, want an UnsupportedError", change.new, err)
		}
		l.set(t, Ours{Entries: []Entry{legacyEntry2}, Next: legacyEntry2.ID})
		l.set(t, Ours{Entries: []Entry{legacyEntry1}})
		if got := l.files(t); !bytes.Equal(got.menu, g.menu) {
			t.Errorf("%q became %q", g.menu, got.menu)
		}
	}
}

func TestLegacyRefuses(t *testing.T) {
	locked := strings.Replace(legacyMenu2, "kernel /a", "lock\nkernel /a", 1)
	with := func(change func(e *Entry)) Ours {
		e := legacyEntry1
		change(&e)
		return Ours{Entries: []Entry{e}}
	}
	one := Ours{Entries: []Entry{legacyEntry1}}
	next, byDefault := one, one
	next.Next, byDefault.Default = legacyEntry1.ID, legacyEntry1.ID
	tests := []struct {
		name, menu  string
		change      func(l *legacy)
		want        Ours
		unsupported bool
		says        string
	}{
		{"a newline in the title", legacyMenu2, nil, with(func(e *Entry) { e.Title = "a\ntitle b" }), false, "title"},
		{"a NUL in the title", legacyMenu2, nil, with(func(e *Entry) { e.Title = "a\x00" }), false, "title"},
		{"a newline in the command line", legacyMenu2, nil, with(func(e *Entry) { e.Cmdline += " a\nlock" }), false, "kernel"},
		{"a command line that goes on in the next line", legacyMenu2, nil, with(func(e *Entry) { e.Cmdline += ` \` }), false, "backslash"},
		{"an ID that is none", legacyMenu2, nil, with(func(e *Entry) { e.ID = "x" }), false, "16 hexadecimal"},
		{"a command line without the ID", legacyMenu2, nil, with(func(e *Entry) { e.Cmdline = "quiet" }), false, "memlinux.build="},
		{"a file outside of the folder", legacyMenu2, nil, with(func(e *Entry) { e.Kernel = "../vmlinuz" }), false, "name of a file"},
		{"a file with a blank", legacyMenu2, nil, with(func(e *Entry) { e.Initrd = "a b" }), false, "name of a file"},
		{"one ID twice", legacyMenu2, nil, Ours{Entries: []Entry{legacyEntry1, legacyEntry1}}, false, "twice"},
		{"a default that is not ours", legacyMenu2, nil, Ours{Default: legacyEntry1.ID}, false, "none of our"},
		{"a next that is not ours", legacyMenu2, nil, Ours{Entries: one.Entries, Next: legacyEntry2.ID}, false, "none of our"},
		{"next in a menu with locked entries", "password x\n" + locked, nil, next, true, "without --next"},
		{"default in a menu with locked entries", "password x\n" + locked, nil, byDefault, true, "without --default"},
		{"next where savedefault takes no number", legacyMenu2, func(l *legacy) { l.saves = false }, next, true, "savedefault"},
		{"next on an array", legacyMenu2, func(l *legacy) { l.boot.Volume.Device = "" }, next, true, "one plain partition"},
		{"next on FAT", legacyMenu2, func(l *legacy) { l.boot.Volume.Type = "vfat" }, next, true, "vfat"},
		{"next on XFS", legacyMenu2, func(l *legacy) { l.boot.Volume.Type = "xfs" }, next, true, "xfs"},
		{"half a block", legacyMenu2 + "### BEGIN memlinux\n", nil, one, false, "line 10"},
		{"another's entry in the block", legacyMenu2 + "### BEGIN memlinux\n\ntitle Z\nroot (hd0,0)\n### END memlinux\n", nil, one, false, "line 12"},
		{"a note of a later version", legacyMenu2 + "### BEGIN memlinux\n# changed by memlinux: color is \"\" and was \"\"\n### END memlinux\n", nil, one, false, "color"},
		{"a path with a blank", legacyMenu2, func(l *legacy) { l.boot.Dir += "/a b" }, one, true, "blank"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			l := legacyOn(t, test.menu, nil, plainStage2)
			if test.change != nil {
				test.change(l)
			}
			_, err := l.Plan(test.want)
			var no *UnsupportedError
			if err == nil || !strings.Contains(err.Error(), test.says) || errors.As(err, &no) != test.unsupported {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestLegacyLocked(t *testing.T) {
	menu := strings.Replace(legacyMenu2, "kernel /a", "lock\nkernel /a", 1)
	for _, test := range []struct {
		name, menu string
		locked     bool
	}{
		{"no password", menu, false},
		{"a password and nothing locked", "password x\n" + legacyMenu2, false},
		{"a password and a locked entry", "password --md5 x\n" + menu, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := legacyOn(t, test.menu, nil, plainStage2)
			l.set(t, Ours{Entries: []Entry{legacyEntry1}})
			if got := bytes.Contains(l.files(t).menu, []byte("\nlock\nroot (hd0,1)\n")); got != test.locked {
				t.Errorf("our entry is locked: %v", got)
			}
		})
	}
	// Who locks an entry later can still have ours removed.
	l := legacyOn(t, "# x\n"+menu, nil, plainStage2)
	byDefault := Ours{Entries: []Entry{legacyEntry1}, Default: legacyEntry1.ID}
	l.set(t, byDefault)
	f := l.files(t)
	f.menu = bytes.Replace(f.menu, []byte("# x"), []byte("password x"), 1)
	l.store(t, f)
	byDefault.Entries = append(byDefault.Entries, legacyEntry2)
	l.set(t, byDefault)
	l.set(t, Ours{})
}

func TestLegacyMenu(t *testing.T) {
	menu := "set default=0\ndefault 1\nroot (hd0,0)\nquiet\ntitle A\nroot\n\ntitle menuentry\nmenuentry 'x' {\n}\ntitle B\ntimeout 5\nlinux /b\nkernel /b\n"
	l := legacyOn(t, menu, nil, plainStage2)
	m, err := l.Menu()
	if err != nil {
		t.Fatal(err)
	}
	want := Menu{Others: []Other{{Title: "A"}, {Title: "B", Default: true}}, Warnings: []string{
		`line 1: GRUB Legacy ignores "set", which is GRUB 2's`,
		`line 3: GRUB Legacy ignores "root" before the first title`,
		`line 4: GRUB Legacy ignores "quiet", a command that it does not have`,
		`line 9: GRUB Legacy ignores "menuentry", which is GRUB 2's`,
		`line 10: GRUB Legacy ignores "}", which is GRUB 2's`,
		`line 8: GRUB Legacy skips the entry "menuentry", which has no command for it, and does not count it`,
		`line 12: "timeout" stops the entry with an error: it belongs before the first title`,
		`line 13: GRUB Legacy ignores "linux", which is GRUB 2's`,
	}}
	for i := range m.Warnings {
		m.Warnings[i] = strings.TrimPrefix(m.Warnings[i], l.menu+": ")
	}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if l = legacyOn(t, "default saved\ntitle A\nroot\n", []byte("??????????"), plainStage2); true {
		if m, err = l.Menu(); err != nil || len(m.Warnings) != 1 || !strings.Contains(m.Warnings[0], "does not begin with a number") {
			t.Errorf("garbage in the file default: %q, %v", m.Warnings, err)
		}
	}
	if l = legacyOn(t, strings.Repeat("}\n", 1000), nil, plainStage2); true {
		if m, err = l.Menu(); err != nil || len(m.Warnings) != maxWarnings+1 {
			t.Errorf("%d warnings, %v", len(m.Warnings), err)
		}
	}
	// A person's own one-shot.
	l = legacyOn(t, "default saved\ntitle A\nroot\ntitle B\nsavedefault 0\nroot\n", []byte("1\n"+savedTail), plainStage2)
	if m, err = l.Menu(); err != nil || !m.Others[0].Default || !m.Others[1].Next || m.Others[1].Default || m.Others[0].Next {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestLegacyOnce(t *testing.T) {
	for _, menu := range []string{
		legacyMenu2,
		"",
		"title A\nroot",
		"hiddenmenu\nterminal serial console\npassword x\n" + strings.Replace(legacyMenu2, "kernel /a", "lock\nkernel /a", 1),
		"terminal --timeout=5 serial console\ngfxmenu (hd0,0)/message\n" + legacyMenu2,
		strings.ReplaceAll("timeout \\\n 300\ndefault saved\n"+legacyMenu2, "\n", "\r\n"),
		strings.ReplaceAll(legacyMenu2, "default\t\t1\ntimeout\t5", "timeout 4294967"),
	} {
		l := legacyOn(t, menu, []byte("0\n"+savedTail), plainStage2)
		want := Ours{Entries: []Entry{legacyEntry1, legacyEntry2}}
		if menu == "" {
			want.Default = legacyEntry1.ID // there is no other
		}
		l.set(t, want)
		before := l.files(t)
		for _, id := range []string{legacyEntry1.ID, legacyEntry2.ID} {
			once, err := l.Once(id)
			if err != nil {
				t.Fatal(err)
			}
			if len(once.Files) != 1 || len(once.Variables) != 0 || once.Files[0].Path != l.menu || len(once.Files[0].New) != len(before.menu) {
				t.Fatalf("%q: %+v", menu, once)
			}
			f := menulst.Parse(once.Files[0].New)
			n, ok := f.Default()
			numbers, _ := l.numbers(f)
			e := f.Entries()[slices.Index(numbers, n)]
			if _, cmdline := e.Kernel(); !ok || !strings.Contains(cmdline, id) {
				t.Errorf("%q boots %+v", menu, e)
			}
			if timeout, _ := f.Global("timeout"); timeout != "0" {
				t.Errorf("%q waits %q s", menu, timeout)
			}
			if _, locked := e.Arg("lock"); locked {
				t.Errorf("%q: the entry is locked", menu)
			}
			terminal, _ := f.Global("terminal")
			if terminal == "serial console" {
				t.Errorf("%q waits for a key", menu)
			}
			if _, gfx := f.Global("gfxmenu"); gfx {
				t.Errorf("%q draws its own menu", menu)
			}
			if len(f.Entries()) != len(menulst.Parse(before.menu).Entries()) {
				t.Errorf("%q: entries came or went: %q", menu, f.Bytes())
			}
		}
		if _, err := l.Once("3333333333333333"); err == nil {
			t.Error("an entry that is not there: no error")
		}
	}
}

func TestNewLegacyRefuses(t *testing.T) {
	dir := t.TempDir()
	menu := filepath.Join(dir, "menu.lst")
	if _, err := newLegacy(&Boot{}, menu, "hd0", 1); err == nil || !strings.Contains(err.Error(), "remove that old menu") {
		t.Errorf("without stage2: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "stage2"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := newLegacy(&Boot{}, menu, "hd0", 1); err == nil || !strings.Contains(err.Error(), "menu") {
		t.Errorf("without a menu: %v", err)
	}
}

// FuzzLegacy installs, boots and removes in any menu, without a disk.
func FuzzLegacy(f *testing.F) {
	for _, m := range legacyMenus {
		f.Add([]byte(m.menu), m.saved, m.saved != nil, true, true)
	}
	files, _ := filepath.Glob("../menulst/testdata/*.lst")
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, []byte("2\n"+savedTail), true, true, false)
	}
	f.Add([]byte("default saved\n"), []byte("1"), true, true, true)
	f.Fuzz(func(t *testing.T, menu, saved []byte, there, next, byDefault bool) {
		if saved == nil {
			saved = []byte{}
		}
		if !there {
			saved = nil
		}
		l := &legacy{boot: &Boot{Dir: "/boot/memlinux", Volume: Volume{MountPoint: "/", Root: "/", Type: "ext3", Device: "sda1"}},
			menu: "/boot/grub/menu.lst", root: "(hd0,0)", saves: true, extras: map[string]bool{}}
		s, err := l.parse(menu, saved)
		if err != nil || s.first != s.behind || len(s.entries) > 0 || bytes.Contains(menu, []byte("### BEGIN memlinux")) {
			return
		}
		before := legacyFiles{menu, saved}
		want := Ours{Entries: []Entry{legacyEntry1, legacyEntry2}}
		if next {
			want.Next = legacyEntry2.ID
		}
		if byDefault {
			want.Default = legacyEntry1.ID
		}
		oldTitle, _ := l.boots(t, before)
		apply := func(at legacyFiles, want Ours) legacyFiles {
			s, err := l.parse(at.menu, at.saved)
			if err != nil {
				t.Fatal(err)
			}
			changes, err := l.plan(s, want)
			if no := (*UnsupportedError)(nil); errors.As(err, &no) {
				t.Skip()
			}
			if err != nil {
				t.Fatalf("%v: %q", err, at.menu)
			}
			return l.steps(t, at, changes)
		}
		at := apply(before, want)
		s, err = l.parse(at.menu, at.saved)
		if err != nil {
			t.Fatal(err)
		}
		got := l.describe(s)
		if oldTitle != "" { // a menu with entries
			if diff := cmp.Diff(want, got.Ours); diff != "" {
				t.Fatalf("%q (-want +got):\n%s", at.menu, diff)
			}
		}
		if again, err := l.plan(s, want); err != nil || len(again) != 0 {
			t.Fatalf("the same again: %+v, %v", again, err)
		}
		if next {
			_, at = l.boots(t, at)
			title, _ := l.boots(t, at)
			// An entry that fails without the file default has it now.
			title, oldTitle = strings.TrimSuffix(title, legacyFails), strings.TrimSuffix(oldTitle, legacyFails)
			if byDefault {
				oldTitle = legacyEntry1.Title
			}
			if title != oldTitle && oldTitle != "" {
				t.Fatalf("boots %q, and %q before: %q", title, oldTitle, at.menu)
			}
		}
		if at = apply(at, Ours{}); !bytes.Equal(at.menu, menu) || !bytes.Equal(at.saved, saved) || (at.saved == nil) != (saved == nil) {
			t.Fatalf("%q and %q became %q and %q", menu, saved, at.menu, at.saved)
		}
	})
}
