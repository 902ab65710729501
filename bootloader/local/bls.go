package local

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/memlinux/memlinux/bootloader/bootfs"
)

// The kinds of boot loader that newBLS knows.
const (
	systemdBoot = "systemd-boot"
	grubBLS     = "GRUB 2 (BLS)"
)

// bls is a boot loader that reads entries of the Boot Loader Specification,
// type 1: a small file for each. Every file of ours is wholly ours; which entry
// boots is said elsewhere, by its choice.
//
// Ours are called _-memlinux-ID.conf and have no sort-key, so that they come
// last for systemd-boot (which drops the _, and then - is less than all else that
// the specification lets a name begin with) and for Fedora's GRUB. Where nothing
// says what boots, both boot the first: the name memlinux-ID.conf, or a sort-key,
// would have made us that on many machines.
type bls struct {
	boot    *Boot
	dir     string
	entries string // the folder of ours
	kind    string
	choice  blsChoice
}

// blsChoice is where a loader keeps which entry it boots.
type blsChoice interface {
	// read looks at the machine. entries are those in files, in the loader's
	// order.
	read(entries []blsEntry) (blsChosen, error)
	// setting chooses the entry that the loader calls name.
	setting(name string) blsSetting
	// change writes the settings that are not nil, where now is what read gave.
	change(now blsChosen, byDefault, once *blsSetting) ([]bootfs.Change, error)
	// check says what in an entry the loader would spoil.
	check(e Entry) error
	// lines are what an entry has besides what all have.
	lines() []string
	// takeBack is the command that takes back what shall boot once.
	takeBack() string
	// boot says what makes a copy of the machine boot the entry that the loader
	// calls name.
	boot(now blsChosen, name string) (Once, error)
}

// blsSetting says which entry boots, by itself or once.
type blsSetting struct {
	raw   []byte // as the loader keeps it; nil where it has none
	value string
}

// blsChosen is what a loader is told, and what comes of it.
type blsChosen struct {
	entries         []blsEntry // all that the menu shows, in its order
	byDefault, once blsSetting
	boots           string // the id of the entry that boots by itself; "" where that can't be known
	next            string // the id of the entry that the next boot takes for once, or ""
	suffix          string // of a file's name where the loader wants it: ".conf" or ""
	// Why they can't be set, and why no entry can be added; or nil.
	noDefault, noOnce, noEntry error
}

// newBLS returns the loader of the given kind that reads dir/loader/entries.
// dir is where its partition is mounted, or /boot.
func newBLS(b *Boot, dir, kind, efivars string) (Loader, error) {
	l := &bls{boot: b, dir: dir, entries: filepath.Join(dir, "loader", "entries"), kind: kind}
	if st, err := os.Stat(l.entries); err != nil || !st.IsDir() {
		return nil, unsupported("%s has no folder %s for its entries: run bootctl install, or make it", kind, l.entries)
	}
	switch kind {
	case systemdBoot:
		l.choice = &efiChoice{dir: dir, efivars: efivars}
	case grubBLS:
		choice, err := newGRUBChoice(b, dir)
		if err != nil {
			return nil, err
		}
		l.choice = choice
	default:
		return nil, fmt.Errorf("%q is no boot loader with BLS entries", kind)
	}
	return l, nil
}

// Name is the kind.
func (l *bls) Name() string { return l.kind }

// Folders is the one with the entries.
func (l *bls) Folders() []string { return []string{l.entries} }

// Menu reads the entries and what is chosen of them.
func (l *bls) Menu() (Menu, error) {
	state, err := l.read()
	if err != nil {
		return Menu{}, err
	}
	menu := Menu{Warnings: state.warnings}
	titles := map[string]int{}
	for _, e := range state.chosen.entries {
		titles[e.title()]++
	}
	for _, e := range state.chosen.entries {
		boots, next := e.id == state.chosen.boots, e.id == state.chosen.next
		id := blsID(e.id)
		if ours, ok := state.ours[id]; ok && id != "" {
			menu.Ours.Entries = append(menu.Ours.Entries, ours.entry)
			if boots {
				menu.Ours.Default = id
			}
			if next {
				menu.Ours.Next = id
			}
			continue
		}
		title := e.title()
		if version := e.field("version"); titles[title] > 1 && version != "" {
			title += " (" + version + ")"
		}
		menu.Others = append(menu.Others, Other{Title: title, Default: boots, Next: next})
	}
	return menu, nil
}

// blsFile is a file of ours as it is.
type blsFile struct {
	path    string
	data    []byte
	entry   Entry
	records map[string]blsSetting
}

type blsState struct {
	ours     map[string]blsFile // by ID
	chosen   blsChosen
	warnings []string
}

func (l *bls) read() (blsState, error) {
	state := blsState{ours: map[string]blsFile{}}
	var entries []blsEntry
	for _, dir := range l.folders() {
		files, err := readBLS(filepath.Join(dir, "loader", "entries"))
		if err != nil {
			return blsState{}, err
		}
		for _, f := range files {
			e := blsEntry{id: filepath.Base(f.path), fields: parseBLS(f.data)}
			id := blsID(e.id)
			if id != "" && dir == l.dir {
				f.entry = ourBLS(id, e)
				f.records = readRecords(f.data)
				state.ours[id] = f
			}
			switch loads := e.loads(); {
			case loads == "":
				state.warnings = append(state.warnings, fmt.Sprintf("%s names nothing to boot: the loader leaves it out", f.path))
			case l.kind == systemdBoot && missing(filepath.Join(dir, loads)):
				state.warnings = append(state.warnings, fmt.Sprintf("%s names %s, which is not there: the loader leaves it out", f.path, loads))
			default:
				entries = append(entries, e)
			}
		}
	}
	slices.SortStableFunc(entries, compareBLS)
	var err error
	state.chosen, err = l.choice.read(entries)
	return state, err
}

func missing(path string) bool {
	_, err := os.Stat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// folders is dir and, for systemd-boot, where the other of the two partitions
// that it reads may be mounted: the ESP and the XBOOTLDR partition.
func (l *bls) folders() []string {
	folders := []string{l.dir}
	if l.kind != systemdBoot {
		return folders
	}
	for _, dir := range otherMounts(l.dir) {
		if st, err := os.Stat(filepath.Join(dir, "loader", "entries")); err == nil && st.IsDir() && !sameFile(dir, l.dir) {
			return append(folders, dir)
		}
	}
	return folders
}

// otherMounts are the usual places of ESP and XBOOTLDR besides dir, which is
// one of them.
func otherMounts(dir string) []string {
	places := []string{"/boot/efi", "/efi", "/boot"}
	for i, place := range places {
		if root, ok := strings.CutSuffix(dir, place); ok {
			var others []string
			for _, other := range slices.Delete(slices.Clone(places), i, i+1) {
				others = append(others, root+other)
			}
			return others
		}
	}
	return nil
}

func sameFile(a, b string) bool {
	stA, errA := os.Stat(a)
	stB, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(stA, stB)
}

// readBLS reads the entries of a folder, by the names that the loaders accept.
func readBLS(dir string) ([]blsFile, error) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the boot entries: %w", err)
	}
	var files []blsFile
	for _, item := range list {
		name := strings.ToLower(item.Name())
		if item.IsDir() || !strings.HasSuffix(name, ".conf") || name[0] == '.' || strings.HasPrefix(name, "auto-") {
			continue
		}
		path := filepath.Join(dir, item.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read the boot entries: %w", err)
		}
		files = append(files, blsFile{path: path, data: data})
	}
	return files, nil
}

const blsPrefix = "_-memlinux-"

var blsName = regexp.MustCompile("^" + blsPrefix + `([0-9a-f]{16})(\.conf)?$`)

// blsID is the ID of an entry of ours by its file's name, with or without
// .conf; "" for another's.
func blsID(name string) string {
	if m := blsName.FindStringSubmatch(name); m != nil {
		return m[1]
	}
	return ""
}

func ourBLS(id string, e blsEntry) Entry {
	base := func(key string) string {
		if value := e.field(key); value != "" {
			return filepath.Base(value)
		}
		return ""
	}
	return Entry{ID: id, Title: e.field("title"), Kernel: base("linux"), Initrd: base("initrd"), Cmdline: e.field("options")}
}

// What was chosen before an entry of ours was is kept in that entry's file, in
// a comment: as hexadecimal bytes, or "none".
const (
	defaultBefore = "# default-before "
	nextBefore    = "# next-before "
)

func readRecords(data []byte) map[string]blsSetting {
	records := map[string]blsSetting{}
	for line := range strings.Lines(string(data)) {
		for _, key := range []string{defaultBefore, nextBefore} {
			value, ok := strings.CutPrefix(strings.TrimSpace(line), key)
			if !ok {
				continue
			}
			if raw, err := hex.DecodeString(value); err == nil && len(raw) > 0 {
				records[key] = blsSetting{raw: raw}
			} else if value == "none" {
				records[key] = blsSetting{}
			}
		}
	}
	return records
}

// render is the file of an entry.
func (l *bls) render(e Entry, records map[string]blsSetting) ([]byte, error) {
	linux, err := l.boot.Volume.LoaderPath(filepath.Join(l.boot.Dir, e.Kernel))
	if err != nil {
		return nil, err
	}
	initrd, err := l.boot.Volume.LoaderPath(filepath.Join(l.boot.Dir, e.Initrd))
	if err != nil {
		return nil, err
	}
	lines := []string{"# Made by memlinux; edits will be lost."}
	for _, key := range []string{defaultBefore, nextBefore} {
		if before, ok := records[key]; ok {
			value := hex.EncodeToString(before.raw)
			if len(before.raw) == 0 {
				value = "none"
			}
			lines = append(lines, key+value)
		}
	}
	lines = append(lines, "title "+e.Title, "version "+e.ID, "linux "+linux, "initrd "+initrd)
	options := "options " + e.Cmdline
	if l.kind == grubBLS {
		// Fedora's grub2-mkconfig may write the installed system's options over
		// every line that begins with the word.
		options = " " + options
	}
	lines = append(append(lines, options), l.choice.lines()...)
	return []byte(strings.Join(lines, "\n") + "\n"), nil
}

// maxCmdline is what Linux on x86 reads of its command line, in bytes.
const maxCmdline = 2047

func (l *bls) check(e Entry) error {
	refuse := func(format string, args ...any) error {
		return unsupported("boot entry %s: %s", e.ID, fmt.Sprintf(format, args...))
	}
	if blsID(blsPrefix+e.ID) == "" {
		return fmt.Errorf("boot entry %q: its ID is not 16 hexadecimal digits", e.ID)
	}
	for _, name := range []string{e.Kernel, e.Initrd} {
		if name == "" || name != filepath.Base(name) || strings.ContainsFunc(name, unicode.IsSpace) {
			return fmt.Errorf("boot entry %s: %q is no file name", e.ID, name)
		}
	}
	for _, part := range [][2]string{{"title", e.Title}, {"kernel command line", e.Cmdline}} {
		what, text := part[0], part[1]
		bad := strings.IndexFunc(text, func(r rune) bool {
			// The loaders read the basic plane only.
			return r == utf8.RuneError || r > 0xffff || !unicode.IsPrint(r)
		})
		switch {
		case text == "":
			return refuse("its %s is empty: give it one", what)
		case !utf8.ValidString(text):
			return refuse("its %s is not UTF-8", what)
		case bad >= 0:
			r, _ := utf8.DecodeRuneInString(text[bad:])
			return refuse("its %s holds %+q, which the boot loader can't show or pass on: leave it out", what, r)
		case text != strings.Trim(text, " "):
			return refuse("its %s begins or ends with a blank: leave that out", what)
		case unquoted(text) != text:
			return refuse("its %s is in quotes, which the boot loader takes off: leave them out", what)
		}
	}
	if n := len("BOOT_IMAGE=(hd0,gpt99) initrd= ") + 2*len(l.boot.Dir) + len(e.Kernel) + len(e.Initrd) + len(e.Cmdline); n > maxCmdline {
		return refuse("its kernel command line is %d bytes too long: Linux reads %d", n-maxCmdline, maxCmdline)
	}
	return l.choice.check(e)
}

// Plan says which files and settings would have to change. Entries come in the
// loader's own order, whatever want's is. Each file of ours is written before,
// and removed after, a setting that names it.
func (l *bls) Plan(want Ours) ([]bootfs.Change, error) {
	wanted := map[string]bool{}
	for _, e := range want.Entries {
		if err := l.check(e); err != nil {
			return nil, err
		}
		if wanted[e.ID] {
			return nil, fmt.Errorf("boot entry %s is wanted twice", e.ID)
		}
		wanted[e.ID] = true
	}
	for _, id := range []string{want.Default, want.Next} {
		if id != "" && !wanted[id] {
			return nil, fmt.Errorf("boot entry %s is to be booted, but is not among those wanted", id)
		}
	}
	state, err := l.read()
	if err != nil {
		return nil, err
	}
	chosen := state.chosen

	byDefault := l.moveDefault(state, want)
	once := l.moveNext(state, want)
	switch {
	case byDefault.to != nil && want.Default != "" && chosen.noDefault != nil:
		return nil, chosen.noDefault
	case once.to != nil && want.Next != "" && chosen.noOnce != nil:
		return nil, chosen.noOnce
	case once.to != nil && want.Next != "" && blsID(chosen.once.value) == "" && chosen.once.value != "" && (l.kind == grubBLS || chosen.next != ""):
		return nil, unsupported("the next boot is already set to %q: boot that first, or take it back by %s", chosen.once.value, l.choice.takeBack())
	}
	if chosen.noEntry != nil && want.Default == "" && slices.ContainsFunc(want.Entries, func(e Entry) bool {
		_, there := state.ours[e.ID]
		return !there
	}) {
		return nil, chosen.noEntry
	}

	var first, last []bootfs.Change
	for _, e := range want.Entries {
		records := map[string]blsSetting{}
		if before, ok := byDefault.records[e.ID]; ok {
			records[defaultBefore] = before
		}
		if before, ok := once.records[e.ID]; ok {
			records[nextBefore] = before
		}
		data, err := l.render(e, records)
		if err != nil {
			return nil, err
		}
		old, there := state.ours[e.ID]
		change := bootfs.Change{Path: filepath.Join(l.entries, blsPrefix+e.ID+".conf"), Old: old.data, New: data}
		switch {
		case there && bytes.Equal(old.data, data):
		case len(old.records) > len(records):
			// What it remembers is needed until that is restored.
			last = append(last, change)
		default:
			first = append(first, change)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(state.ours)) {
		if f := state.ours[id]; !wanted[id] {
			last = append(last, bootfs.Change{Path: f.path, Old: f.data})
		}
	}
	settings, err := l.choice.change(chosen, byDefault.to, once.to)
	if err != nil {
		return nil, err
	}
	return slices.Concat(first, settings, last), nil
}

// blsMove is how a setting changes.
type blsMove struct {
	to      *blsSetting           // nil: it stays
	records map[string]blsSetting // what the files of entries then remember of it, by ID
}

// records are those in the files as they are.
func (s blsState) records(key string) map[string]blsSetting {
	all := map[string]blsSetting{}
	for id, f := range s.ours {
		if before, ok := f.records[key]; ok {
			all[id] = before
		}
	}
	return all
}

// moveDefault gives the default to the wanted entry, whose file remembers what
// it was, and back.
func (l *bls) moveDefault(state blsState, want Ours) blsMove {
	now, records := state.chosen.byDefault, state.records(defaultBefore)
	id := blsID(now.value)
	switch {
	case id == want.Default:
		return blsMove{records: records} // also where it is another's
	case blsID(state.chosen.boots) == want.Default && id == "":
		return blsMove{records: records} // it boots by itself by the user's own settings
	}
	before := now
	if id != "" {
		before = records[id] // absent, where somebody else chose our entry
	}
	if want.Default == "" {
		return blsMove{to: &before}
	}
	to := l.choice.setting(blsPrefix + want.Default + state.chosen.suffix)
	m := blsMove{to: &to}
	if before.raw != nil {
		m.records = map[string]blsSetting{want.Default: before}
	}
	return m
}

// moveNext has the wanted entry boot once. The loader takes that back when it
// does: systemd-boot removes the variable, but GRUB leaves an empty next_entry.
// Where there was none before, the file of an entry of ours remembers that.
func (l *bls) moveNext(state blsState, want Ours) blsMove {
	now, records := state.chosen.once, state.records(nextBefore)
	wanted := func(id string) bool {
		return slices.ContainsFunc(want.Entries, func(e Entry) bool { return e.ID == id })
	}
	remember := l.kind == grubBLS && (now.raw == nil || len(records) > 0)
	kept := len(records) > 0
	for id := range records {
		kept = kept && wanted(id)
	}
	id := blsID(now.value)
	switch {
	case want.Next != "":
		m := blsMove{records: records}
		if remember && !kept {
			m.records = map[string]blsSetting{want.Next: {}}
		}
		if id != want.Next {
			to := l.choice.setting(blsPrefix + want.Next + state.chosen.suffix)
			m.to = &to
		}
		return m
	case id != "" && l.kind == grubBLS && !remember:
		return blsMove{to: &blsSetting{raw: []byte("=")}}
	case id != "", len(records) > 0 && !kept && now.raw != nil && now.value == "":
		return blsMove{to: &blsSetting{}}
	}
	return blsMove{records: records}
}

// Once makes a copy of the machine boot the entry.
func (l *bls) Once(id string) (Once, error) {
	state, err := l.read()
	if err != nil {
		return Once{}, err
	}
	if _, ok := state.ours[id]; !ok {
		return Once{}, fmt.Errorf("there is no boot entry %s in %s", id, l.entries)
	}
	return l.choice.boot(state.chosen, blsPrefix+id+state.chosen.suffix)
}
