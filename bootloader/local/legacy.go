package local

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/bootloader/menulst"
)

// legacy is GRUB Legacy 0.97 with its menu.lst, in which our entries are one
// marked block at the end, so that no other entry's number moves.
//
// It has no command that boots an entry once. What it has is "default saved":
// the number of the entry stands in the file default beside the menu, and an
// entry that begins with "savedefault N" writes N there as it is booted
// (stage2/builtins.c, savedefault_func). So the next boot takes ours, and the
// one after that N, the entry that boots otherwise. What the menu and that file
// said before stands in our block.
type legacy struct {
	boot   *Boot
	menu   string          // the file's path
	root   string          // of Boot.Dir's partition: (hd0,0)
	uuid   bool            // this GRUB finds a file system by its UUID
	saves  bool            // its savedefault takes a number
	extras map[string]bool // commands that distributions patched in
}

// newLegacy knows GRUB Legacy by its menu, a menu.lst or grub.conf that is no
// symbolic link. hd is the BIOS's name for the disk of Boot.Dir, as "hd0", and
// partition the kernel's number of its partition, from 1. The error says that
// the menu or GRUB's stage2 beside it can't be read.
func newLegacy(b *Boot, menu string, hd string, partition int) (Loader, error) {
	stage2, err := os.ReadFile(filepath.Join(filepath.Dir(menu), "stage2"))
	if err != nil {
		return nil, fmt.Errorf("read GRUB Legacy's program beside %s: %w; if another boot loader starts this machine, remove that old menu", menu, err)
	}
	if _, err := os.ReadFile(menu); err != nil {
		return nil, fmt.Errorf("read GRUB Legacy's menu: %w", err)
	}
	l := &legacy{boot: b, menu: menu, root: fmt.Sprintf("(%s,%d)", hd, partition-1), extras: map[string]bool{}}
	for _, name := range legacyExtras {
		l.extras[name] = bytes.Contains(stage2, []byte("\x00"+name+"\x00"))
	}
	// Ubuntu's patch, which knows the UUIDs of a few file systems only.
	l.uuid = l.extras["uuid"] && b.Volume.UUID != "" && slices.Contains([]string{"ext2", "ext3", "ext4"}, b.Volume.Type)
	l.saves = bytes.Contains(stage2, []byte("savedefault [NUM"))
	return l, nil
}

// Name is GRUB Legacy.
func (l *legacy) Name() string { return "GRUB Legacy" }

// Folders is that of the menu, the file default and stage2.
func (l *legacy) Folders() []string { return []string{filepath.Dir(l.menu)} }

func (l *legacy) savedPath() string { return filepath.Join(filepath.Dir(l.menu), "default") }

// legacyState is everything that was read.
type legacyState struct {
	menu    *menulst.File
	saved   []byte  // the file default; nil where it is not there
	entries []Entry // ours
	first   int     // index of our first entry among the menu's
	behind  int     // index of the first one behind ours
	notes   []menulst.Undo

	// The two files as they would be without memlinux, but for the block.
	base      *menulst.File
	baseSaved []byte
}

func (l *legacy) read() (legacyState, error) {
	data, err := os.ReadFile(l.menu)
	if err != nil {
		return legacyState{}, fmt.Errorf("read GRUB Legacy's menu: %w", err)
	}
	saved, err := readIf(l.savedPath())
	if err != nil {
		return legacyState{}, fmt.Errorf("read GRUB Legacy's saved entry: %w", err)
	}
	return l.parse(data, saved)
}

func (l *legacy) parse(data, saved []byte) (legacyState, error) {
	s := legacyState{menu: menulst.Parse(data), saved: saved}
	s.base, s.baseSaved = s.menu, s.saved
	block, err := s.menu.Block()
	if err != nil {
		return legacyState{}, fmt.Errorf("%s: %w", l.menu, err)
	}
	if s.first, s.behind, err = s.menu.BlockEntries(); err != nil || block == nil {
		return s, err
	}
	var olds []int
	for _, e := range block.Entries {
		entry, old, err := readLegacy(e)
		if err != nil {
			return legacyState{}, fmt.Errorf("%s: %w", l.menu, err)
		}
		if slices.ContainsFunc(s.entries, func(o Entry) bool { return o.ID == entry.ID }) {
			return legacyState{}, fmt.Errorf("%s: line %d: the entry %s is there twice: remove one of the two", l.menu, e.Line, entry.ID)
		}
		s.entries = append(s.entries, entry)
		if old >= 0 {
			olds = append(olds, old)
		}
	}
	for _, u := range block.Undo {
		switch u.Name {
		case "default":
			s.base = s.base.UndoGlobal(u)
		case savedNote, noSavedNote:
			s.notes = append(s.notes, u)
			s.baseSaved = undoSaved(s.saved, u, olds)
		default:
			return legacyState{}, fmt.Errorf("%s: memlinux's block keeps %q, which this version does not know: take the one that wrote it", l.menu, u.Name)
		}
	}
	return s, nil
}

// readLegacy reads an entry of our block, and the number that it saves as it is
// booted, or -1.
func readLegacy(e menulst.Entry) (entry Entry, old int, err error) {
	old = -1
	var names []string
	for _, c := range e.Commands {
		switch c.Name {
		case "lock":
			continue
		case "savedefault":
			if n, ok := menulst.Number(c.Args); ok {
				old = n
			}
			continue
		case "uuid":
			c.Name = "root"
		}
		names = append(names, c.Name)
	}
	kernel, cmdline := e.Kernel()
	entry = Entry{Title: e.Title, Kernel: path.Base(kernel), Initrd: path.Base(e.Initrd()), Cmdline: cmdline}
	for word := range strings.FieldsSeq(cmdline) {
		if id, ok := strings.CutPrefix(word, buildArg); ok && buildID.MatchString(id) {
			entry.ID = id
		}
	}
	if entry.ID == "" || !slices.Equal(names, []string{"root", "kernel", "initrd"}) {
		return Entry{}, 0, fmt.Errorf("line %d: the entry %q within memlinux's block is not memlinux's: move it out of the block", e.Line, e.Title)
	}
	return entry, old, nil
}

// buildArg begins the word of a command line that holds an entry's ID.
const buildArg = "memlinux.build="

// numbers are those by which GRUB counts the entries of f, and their count. An
// entry without a command that GRUB knows is skipped, and has the number -1.
func (l *legacy) numbers(f *menulst.File) (numbers []int, count int) {
	for _, e := range f.Entries() {
		if slices.ContainsFunc(e.Commands, func(c menulst.Command) bool { return l.knows(c.Name) }) {
			numbers = append(numbers, count)
			count++
		} else {
			numbers = append(numbers, -1)
		}
	}
	return numbers, count
}

// chosen is the number of the entry that boots by itself, and that of the one
// that the next boot takes, once, or -1.
func (l *legacy) chosen(f *menulst.File, saved []byte) (number, once int) {
	numbers, count := l.numbers(f)
	n, fixed := f.Default()
	if !fixed {
		n, _ = savedNumber(saved)
	}
	n = inMenu(f, n, count)
	if !fixed && n >= 0 {
		e := f.Entries()[slices.Index(numbers, n)]
		if args, ok := e.Arg("savedefault"); ok {
			if next, ok := menulst.Number(args); ok && next != n {
				return inMenu(f, next, count), n
			}
		}
	}
	return n, -1
}

// inMenu is what GRUB takes n for where there is no such entry: the first
// fallback that there is, else the first entry. It is -1 where there is none.
func inMenu(f *menulst.File, n, count int) int {
	if n < count {
		return n
	}
	for _, n := range fallbacks(f) {
		if n < count {
			return n
		}
	}
	return min(0, count-1)
}

func fallbacks(f *menulst.File) []int {
	var list []int
	args, _ := f.Global("fallback")
	for word := range strings.FieldsSeq(args) {
		n, ok := menulst.Number(word)
		if !ok {
			break
		}
		list = append(list, n)
	}
	return list
}

// Menu reads the menu and the file default. The error is about a block of ours
// that was changed by hand, too.
func (l *legacy) Menu() (Menu, error) {
	s, err := l.read()
	if err != nil {
		return Menu{}, err
	}
	return l.describe(s), nil
}

func (l *legacy) describe(s legacyState) Menu {
	m := Menu{Ours: Ours{Entries: s.entries}, Warnings: l.warnings(s.menu)}
	numbers, _ := l.numbers(s.menu)
	number, once := l.chosen(s.menu, s.saved)
	for i, e := range s.menu.Entries() {
		n := numbers[i]
		switch {
		case i >= s.first && i < s.behind:
			if n == number {
				m.Ours.Default = s.entries[i-s.first].ID
			}
			if n == once {
				m.Ours.Next = s.entries[i-s.first].ID
			}
		case n >= 0:
			m.Others = append(m.Others, Other{Title: e.Title, Default: n == number, Next: n == once})
		}
	}
	if _, fixed := s.menu.Default(); !fixed && s.saved != nil {
		if _, ok := savedNumber(s.saved); !ok {
			m.Warnings = append(m.Warnings, fmt.Sprintf("%s does not begin with a number: GRUB Legacy boots the first entry", l.savedPath()))
		}
	}
	// What memlinux chose by its number may be another entry by now.
	chose := !bytes.Equal(s.menu.Bytes(), s.base.Bytes())
	if readsSaved(s.menu) {
		chose = !bytes.Equal(s.saved, s.baseSaved)
	}
	if m.Ours.Default == "" && once < 0 && chose {
		if _, want, err := l.withoutNext(s, Ours{Entries: s.entries}, nil); err == nil && want != number {
			m.Warnings = append(m.Warnings, fmt.Sprintf("GRUB Legacy boots entry number %d by itself, which was another one when memlinux chose it: "+
				"entries came or went since. The next change by memlinux gives back what was before", number))
		}
	}
	return m
}

// Plan has one change where no saved entry is involved. Where one is, the menu
// first boots a fixed number, the old one, and says how to undo all; then the
// file default changes, which that menu does not read; then the menu reads it.
func (l *legacy) Plan(want Ours) ([]bootfs.Change, error) {
	s, err := l.read()
	if err != nil {
		return nil, err
	}
	return l.plan(s, want)
}

func (l *legacy) plan(s legacyState, want Ours) ([]bootfs.Change, error) {
	if err := l.check(s, want); err != nil {
		return nil, err
	}
	final, number, err := l.withoutNext(s, want, nil)
	if err != nil {
		return nil, err
	}
	mid, saved, once := s.menu, s.baseSaved, -1
	if want.Next != "" {
		numbers, _ := l.numbers(final)
		once = numbers[s.first+indexOf(want.Entries, want.Next)]
	}
	switch {
	case once >= 0 && once == number:
		once = -1 // It boots the next time as every time.
	case once >= 0:
		saved = withSaved(s.baseSaved, once)
		notes := []menulst.Undo{noteSaved(s.baseSaved, once)}
		if bytes.Equal(saved, s.baseSaved) {
			notes = nil
		}
		if mid, _, err = l.withoutNext(s, want, notes); err != nil {
			return nil, err
		}
		if readsSaved(mid) {
			if mid, err = l.compose(s, want, strconv.Itoa(number), -1, notes); err != nil {
				return nil, err
			}
		}
		if final, err = l.compose(s, want, "saved", number, notes); err != nil {
			return nil, err
		}
	case readsSaved(s.menu) && !bytes.Equal(s.saved, saved):
		now, _ := l.chosen(s.menu, s.saved)
		if mid, err = l.fixed(s, now); err != nil {
			return nil, err
		}
	}
	// GRUB's way through a menu is odd enough to be followed once more.
	if n, o := l.chosen(final, saved); n != number || o != once {
		return nil, fmt.Errorf("%s: GRUB Legacy would boot entry number %d, and %d once, where %d and %d are meant: see its lines with default, fallback and savedefault",
			l.menu, n, o, number, once)
	}
	at := s.menu.Bytes()
	var changes []bootfs.Change
	menu := func(f *menulst.File) {
		if data := f.Bytes(); !bytes.Equal(at, data) {
			changes = append(changes, bootfs.Change{Path: l.menu, Old: at, New: data})
			at = data
		}
	}
	if !bytes.Equal(s.saved, saved) || (s.saved == nil) != (saved == nil) {
		if !bytes.Equal(at, final.Bytes()) {
			menu(mid)
		}
		kind := bootfs.Replace
		if s.saved != nil && len(s.saved) == len(saved) {
			kind = bootfs.InPlace
		}
		changes = append(changes, bootfs.Change{Path: l.savedPath(), Old: s.saved, New: saved, Kind: kind})
	}
	menu(final)
	return changes, nil
}

func readsSaved(f *menulst.File) bool {
	_, fixed := f.Default()
	return !fixed
}

func indexOf(entries []Entry, id string) int {
	return slices.IndexFunc(entries, func(e Entry) bool { return e.ID == id })
}

// fixed is the menu as it is, but that it boots the entry of that number, and
// keeps how to undo that.
func (l *legacy) fixed(s legacyState, number int) (*menulst.File, error) {
	block, err := s.menu.Block()
	if err != nil {
		return nil, err
	}
	f, undo, err := s.base.SetGlobal("default", strconv.Itoa(number))
	if err != nil {
		return nil, err
	}
	block.Undo = slices.Clone(s.notes)
	if undo.Name != "" {
		block.Undo = append(block.Undo, undo)
	}
	return f.SetBlock(*block)
}

// withoutNext is the menu with want's entries and default, and the number that
// boots by itself.
func (l *legacy) withoutNext(s legacyState, want Ours, notes []menulst.Undo) (f *menulst.File, number int, err error) {
	if f, err = l.compose(s, want, "", -1, notes); err != nil {
		return nil, 0, err
	}
	now, _ := l.chosen(f, s.baseSaved)
	if len(want.Entries) == 0 {
		return f, now, nil
	}
	numbers, _ := l.numbers(f)
	first := numbers[s.first]
	number = now
	if want.Default != "" {
		number = first + indexOf(want.Entries, want.Default)
	} else if number >= first && number < first+len(want.Entries) {
		// The menu names no other entry. Ours must not boot by accident.
		bare, err := s.base.RemoveBlock()
		if err != nil {
			return nil, 0, err
		}
		if n, _ := l.chosen(bare, s.baseSaved); n >= first {
			number = n + len(want.Entries)
		} else if n >= 0 {
			number = n
		}
	}
	if number != now {
		f, err = l.compose(s, want, strconv.Itoa(number), -1, notes)
	}
	return f, number, err
}

// compose is the menu with want's entries, default set to value where that is
// not "", and the entry of want.Next beginning with "savedefault old" where old
// is not negative.
func (l *legacy) compose(s legacyState, want Ours, value string, old int, notes []menulst.Undo) (*menulst.File, error) {
	if len(want.Entries) == 0 {
		return s.base.RemoveBlock()
	}
	locked := l.locked(s)
	b := menulst.Block{Comments: legacyComments, Undo: notes}
	for _, e := range want.Entries {
		entry := menulst.Entry{Title: e.Title}
		add := func(name, args string) {
			entry.Commands = append(entry.Commands, menulst.Command{Name: name, Args: args})
		}
		if old >= 0 && e.ID == want.Next {
			add("savedefault", strconv.Itoa(old))
		}
		if locked && e.ID != want.Next && e.ID != want.Default {
			add("lock", "")
		}
		if l.uuid {
			add("uuid", l.boot.Volume.UUID)
		} else {
			add("root", l.root)
		}
		kernel, err := l.boot.Volume.LoaderPath(filepath.Join(l.boot.Dir, e.Kernel))
		if err != nil {
			return nil, err
		}
		initrd, err := l.boot.Volume.LoaderPath(filepath.Join(l.boot.Dir, e.Initrd))
		if err != nil {
			return nil, err
		}
		if strings.ContainsAny(kernel+initrd, " \t") {
			return nil, unsupported("GRUB Legacy can't load %s or %s: it ends a path at a blank", kernel, initrd)
		}
		add("kernel", kernel+" "+e.Cmdline)
		add("initrd", initrd)
		b.Entries = append(b.Entries, entry)
	}
	f, err := s.base.SetBlock(b)
	if err != nil || value == "" {
		return f, err
	}
	f, undo, err := f.SetGlobal("default", value)
	if err != nil || undo.Name == "" {
		return f, err
	}
	b.Undo = append([]menulst.Undo{undo}, notes...)
	return f.SetBlock(b)
}

// legacyComments stand at the top of our block. Once needs their length.
var legacyComments = []string{
	"These entries start systems of memlinux, which run completely in memory.",
	`See them with "memlinux entries", take one away with "memlinux remove ID".`,
	"memlinux reads this block again: change nothing in it, and add entries of",
	"your own above it, so that the numbers of the entries stay what they are.",
}

// locked says whether a person needs the menu's password for some entry.
func (l *legacy) locked(s legacyState) bool {
	if _, ok := s.menu.Global("password"); !ok {
		return false
	}
	for i, e := range s.menu.Entries() {
		if _, ok := e.Arg("lock"); ok && (i < s.first || i >= s.behind) {
			return true
		}
	}
	return false
}

// check says why this GRUB can't be given what is wanted.
func (l *legacy) check(s legacyState, want Ours) error {
	for i, e := range want.Entries {
		if !buildID.MatchString(e.ID) {
			return fmt.Errorf("the entry %q: its ID %q is not 16 hexadecimal digits", e.Title, e.ID)
		}
		if indexOf(want.Entries, e.ID) != i {
			return fmt.Errorf("the entry %s is there twice", e.ID)
		}
		if !slices.Contains(strings.Fields(e.Cmdline), buildArg+e.ID) {
			return fmt.Errorf("the entry %s: its command line lacks %s%s, by which it is known", e.ID, buildArg, e.ID)
		}
		for _, name := range []string{e.Kernel, e.Initrd} {
			if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/ \t") {
				return fmt.Errorf("the entry %s: %q is not the name of a file in %s", e.ID, name, l.boot.Dir)
			}
		}
	}
	for what, id := range map[string]string{"default": want.Default, "next boot": want.Next} {
		if id != "" && indexOf(want.Entries, id) < 0 {
			return fmt.Errorf("the %s can't be %s, which is none of our entries", what, id)
		}
	}
	if err := l.checkNumbers(s, want); err != nil {
		return err
	}
	number, once := l.chosen(s.menu, s.saved)
	newly := func(id string, n int) bool {
		i := indexOf(s.entries, id)
		numbers, _ := l.numbers(s.menu)
		return id != "" && (i < 0 || numbers[s.first+i] != n)
	}
	if l.locked(s) {
		if newly(want.Next, once) {
			return unsupported("%s asks for a password before it boots a locked entry, so that none of ours can boot by itself the next time: install without --next and choose the entry in the menu", l.menu)
		}
		if newly(want.Default, number) {
			return unsupported("%s asks for a password before it boots a locked entry, so that ours can't be the default: install without --default", l.menu)
		}
	}
	if !newly(want.Next, once) {
		return nil
	}
	v := l.boot.Volume
	const way = ": install without --next and choose the entry in the menu"
	switch {
	case !l.saves:
		return unsupported("this GRUB Legacy has no savedefault with a number, by which the machine would come back from one boot" + way)
	case v.Device == "":
		return unsupported("%s is not on one plain partition, and GRUB Legacy would write its next entry on one disk of several"+way, l.boot.Dir)
	case !slices.Contains([]string{"ext2", "ext3", "ext4"}, v.Type):
		return unsupported("GRUB Legacy is not known to write its next entry on %s safely"+way, v.Type)
	}
	return nil
}

// checkNumbers refuses to move entries that stand behind our block and that
// the menu names by their numbers.
func (l *legacy) checkNumbers(s legacyState, want Ours) error {
	numbers, count := l.numbers(s.menu)
	if len(want.Entries) == len(s.entries) || s.behind == len(numbers) || s.first == s.behind {
		return nil
	}
	used := fallbacks(s.menu)
	n, fixed := s.base.Default()
	if !fixed {
		n, _ = savedNumber(s.baseSaved)
	}
	for _, n := range append(used, n) {
		if n >= numbers[s.first]+len(s.entries) && n < count {
			return unsupported("%s has entries behind memlinux's block, and counts on the number %d of one of them, which would become another: move them above the block first", l.menu, n)
		}
	}
	return nil
}

// Once is the menu with other numbers in default and timeout, and without what
// would wait for a person. The room comes from our block's comments.
func (l *legacy) Once(id string) (Once, error) {
	s, err := l.read()
	if err != nil {
		return Once{}, err
	}
	i := indexOf(s.entries, id)
	if i < 0 {
		return Once{}, fmt.Errorf("%s has no entry %s of memlinux", l.menu, id)
	}
	numbers, _ := l.numbers(s.menu)
	f := s.menu
	for _, set := range []struct{ name, value string }{{"default", strconv.Itoa(numbers[s.first+i])}, {"timeout", "0"}} {
		if f, _, err = f.SetGlobal(set.name, set.value); err != nil {
			return Once{}, fmt.Errorf("%s: %w", l.menu, err)
		}
	}
	lines := map[int]bool{} // that would wait
	for _, c := range f.Globals() {
		words := strings.Fields(c.Args)
		terminals := slices.DeleteFunc(slices.Clone(words), func(w string) bool { return strings.HasPrefix(w, "--") })
		waits := len(terminals) > 1 && !slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(w, "--timeout") })
		lines[c.Line] = c.Name == "gfxmenu" || c.Name == "terminal" && waits
	}
	for _, c := range f.Entries()[s.first+i].Commands {
		lines[c.Line] = c.Name == "lock"
	}
	data := f.Bytes()
	for start, n := 0, 1; start < len(data); n++ {
		if lines[n] {
			at := start + len(data[start:]) - len(bytes.TrimLeft(data[start:], " \t\r"))
			data[at] = '#'
		}
		end := bytes.IndexByte(data[start:], '\n')
		if end < 0 {
			break
		}
		start += end + 1
	}
	size := len(s.menu.Bytes())
	for _, c := range legacyComments {
		line := []byte("# " + c)
		more := len(data) - size
		if at := bytes.LastIndex(data, line); at >= 0 && more > 0 {
			keep := max(1, len(line)-more)
			data = slices.Delete(data, at+keep, at+len(line))
		}
	}
	if len(data) > size {
		return Once{}, fmt.Errorf("%s: the comments of memlinux's block are too short to try the entry %s in a copy", l.menu, id)
	}
	data = append(data, bytes.Repeat([]byte("\n"), size-len(data))...)
	return Once{Files: []Patch{{Path: l.menu, New: data}}}, nil
}
