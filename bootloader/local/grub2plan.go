package local

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/bootloader/menulst"
)

// Plan writes our menus, then custom.cfg, and has grubenv name an entry only
// while that stands; a menu goes when nothing reads it any more.
func (g *grub2) Plan(want Ours) ([]bootfs.Change, error) {
	s, err := g.read()
	if err != nil {
		return nil, err
	}
	now := s.ours()
	restricted, err := g.check(s, now, want)
	if err != nil {
		return nil, err
	}

	made := s.custom.made
	if len(want.Entries) > 0 && !s.custom.present {
		made.file = s.custom.before == nil
		made.newline = len(s.custom.before) > 0 && !bytes.HasSuffix(s.custom.before, []byte("\n"))
	}
	env, err := g.planEnv(s, now, want, &made)
	if err != nil {
		return nil, err
	}

	var menus, steps []bootfs.Change
	var text string
	var ids []string
	wanted := map[string]bool{}
	for _, e := range want.Entries {
		wanted[e.ID] = true
		entry, menu, err := g.render(e, restricted)
		if err != nil {
			return nil, err
		}
		text += entry
		ids = append(ids, e.ID)
		if menu != nil && !bytes.Equal(s.menus[e.ID], menu) {
			menus = append(menus, bootfs.Change{Path: g.menuPath(e.ID), Old: s.menus[e.ID], New: menu})
		}
		wanted[e.ID] = menu != nil
	}
	// The first entry that is not ours: it stays the same when grub.cfg is made
	// anew, and whatever the default was, it is a system of this PC.
	fallback := 0
	if s.sources+len(parseScript(s.custom.before).items) == 0 {
		fallback = len(want.Entries)
	}
	custom := s.custom.with(text, ids, want.Default, fallback, made)
	if len(want.Entries) == 0 {
		custom = s.custom.without()
	}
	steps = append(steps, menus...)
	if env != nil && want.Next == "" {
		steps = append(steps, *env)
	}
	if !bytes.Equal(custom, s.custom.bytes) || (custom == nil) != (s.custom.bytes == nil) {
		steps = append(steps, bootfs.Change{Path: g.file("custom.cfg"), Old: s.custom.bytes, New: custom})
	}
	if env != nil && want.Next != "" {
		steps = append(steps, *env)
	}
	for _, id := range slices.Sorted(maps.Keys(s.menus)) {
		if !wanted[id] {
			steps = append(steps, bootfs.Change{Path: g.menuPath(id), Old: s.menus[id]})
		}
	}
	return steps, nil
}

func (g *grub2) menuPath(id string) string { return filepath.Join(g.boot.Dir, "menu-"+id+".lst") }

// check says why this GRUB can't be given what is wanted, and whether our
// entries are to ask for a password.
func (g *grub2) check(s grubState, now, want Ours) (restricted bool, err error) {
	seen := map[string]bool{}
	for _, e := range want.Entries {
		switch {
		case !buildID.MatchString(e.ID):
			return false, fmt.Errorf("the entry %q: its ID %q is not 16 hexadecimal digits", e.Title, e.ID)
		case seen[e.ID]:
			return false, fmt.Errorf("the entry %q is there twice", e.ID)
		}
		seen[e.ID] = true
	}
	for what, id := range map[string]string{"default": want.Default, "next boot": want.Next} {
		if id != "" && !seen[id] {
			return false, fmt.Errorf("the %s can't be %s, which is none of our entries", what, id)
		}
	}
	for _, item := range s.custom.script.items {
		if _, ours := ownID(item.id); !ours {
			return false, unsupported("the entry %q of %s stands within memlinux's block: move it out of that", item.title, g.file("custom.cfg"))
		}
	}
	if len(want.Entries) == 0 {
		return false, nil
	}
	if s.sources < 0 {
		return false, unsupported("%s", g.notSourced())
	}
	if g.boot.Volume.UUID == "" {
		return false, unsupported("the file system of %s has no UUID by which GRUB could find it: give it one", g.boot.Dir)
	}
	items := s.config.items
	if at, _ := locate(s.menu(), s.defaultSpec()); len(at) > 0 && len(now.Entries) == 0 && at[0] >= s.sources+len(s.foreign.items) && at[0] < len(items)+len(s.foreign.items) {
		if _, err := strconv.Atoi(strings.Split(s.defaultSpec(), ">")[0]); err == nil {
			return false, unsupported("GRUB boots its entry number %s, and an entry of ours would come before it: name that entry by its title in GRUB_DEFAULT of /etc/default/grub and run update-grub",
				s.defaultSpec())
		}
	}
	if s.foreign.open {
		return false, unsupported("%s ends within a command, a quote or a brace, which would swallow our entries: see grub-script-check %s", g.file("custom.cfg"), g.file("custom.cfg"))
	}
	users := false
	for _, sc := range []script{s.config, s.foreign} {
		sc.assignments("superusers", func(value string, _ []string, _ int) { users = users || value != "" })
	}
	if users {
		restricted = len(items) == 0 || !allUnrestricted(items)
	}
	if restricted && want.Next != "" && want.Next != now.Next {
		return false, unsupported("GRUB asks for a password here before it boots an entry, so that none can boot by itself the next time: install without --next and choose the entry in the menu")
	}
	if restricted && want.Default != "" && want.Default != now.Default {
		return false, unsupported("GRUB asks for a password here before it boots an entry, so that ours can't be the default: install without --default")
	}
	return restricted, nil
}

// allUnrestricted says whether every entry boots without a password.
func allUnrestricted(items []menuItem) bool {
	return !slices.ContainsFunc(items, func(item menuItem) bool {
		return !item.submenu && !item.unrestricted || !allUnrestricted(item.items)
	})
}

// planEnv is the change of grubenv, or nil, and notes in made what of it is ours.
func (g *grub2) planEnv(s grubState, now, want Ours, made *made) (*bootfs.Change, error) {
	const name = "next_entry"
	path := g.file("grubenv")
	change := func(env grubenv) *bootfs.Change {
		if bytes.Equal(s.envBytes, env.bytes()) {
			return nil
		}
		return &bootfs.Change{Path: path, Old: s.envBytes, New: env.bytes(), Kind: bootfs.InPlace}
	}
	if want.Next != "" {
		if want.Next == now.Next {
			return nil, nil
		}
		if err := g.remembers(s); err != nil {
			return nil, err
		}
		env := newGrubenv()
		if s.env != nil {
			env = *s.env
			switch value, ok := env.get(name); {
			case !ok:
				made.nextEntry = true
			case value != "" && now.Next == "":
				return nil, unsupported("the next boot is already set to %q: boot that first, or run: grub-editenv %s unset next_entry", value, path)
			}
		} else {
			made.grubenv = true
		}
		env, err := env.set(name, idPrefix+want.Next)
		if err != nil {
			return nil, unsupported("%s: %v; remove a variable with: grub-editenv %s unset NAME", path, err, path)
		}
		if s.envBytes == nil {
			return &bootfs.Change{Path: path, New: env.bytes()}, nil
		}
		return change(env), nil
	}
	if s.env == nil || now.Next == "" && len(want.Entries) > 0 {
		return nil, nil
	}
	env := *s.env
	value, _ := env.get(name)
	_, ours := ownID(value)
	if value != "" && !ours {
		return nil, nil // somebody else's by now
	}
	switch {
	case made.grubenv, made.nextEntry:
		env = env.unset(name)
		made.nextEntry = false
	case ours:
		var err error
		if env, err = env.set(name, ""); err != nil {
			return nil, err
		}
	}
	if made.grubenv && env.empty() {
		made.grubenv = false
		return &bootfs.Change{Path: path, Old: s.envBytes}, nil
	}
	return change(env), nil
}

// remembers says why GRUB can't boot an entry once here.
func (g *grub2) remembers(s grubState) error {
	const otherwise = "choose the entry in GRUB's menu, or install it with --default"
	nextRead := false
	s.config.assignments("default", func(value string, _ []string, _ int) {
		nextRead = nextRead || value == "${next_entry}" || value == "$next_entry"
	})
	v := g.boot.Volume
	switch {
	case !s.config.has("load_env") || !nextRead:
		return unsupported("%s does not ask which entry to boot next (next_entry): run update-grub (grub-mkconfig -o %s), or %s", g.file("grub.cfg"), g.file("grub.cfg"), otherwise)
	case v.Device == "":
		return unsupported("GRUB can't boot an entry once here: %s does not lie on one partition of a disk, and GRUB writes to no LVM, RAID or encrypted volume, so that it would boot the entry again and again; %s", g.dir, otherwise)
	case !slices.Contains([]string{"ext2", "ext3", "ext4", "xfs", "vfat", "msdos"}, v.Type):
		return unsupported("GRUB can't boot an entry once here: it can't write to %s, on which %s lies, so that it would boot the entry again and again; %s", v.Type, g.dir, otherwise)
	case s.envError != nil:
		return unsupported("GRUB can't boot an entry once here: %v; make it anew with: grub-editenv %s create", s.envError, g.file("grubenv"))
	}
	return nil
}

// render is an entry for custom.cfg, and its own menu, or nil for a plain one.
func (g *grub2) render(e Entry, restricted bool) (entry string, menu []byte, err error) {
	v := g.boot.Volume
	kernel, err1 := v.LoaderPath(filepath.Join(g.boot.Dir, e.Kernel))
	initrd, err2 := v.LoaderPath(filepath.Join(g.boot.Dir, e.Initrd))
	list, err3 := v.LoaderPath(g.menuPath(e.ID))
	if err := errors.Join(err1, err2, err3); err != nil {
		return "", nil, fmt.Errorf("the entry %q: %w", e.Title, err)
	}
	for _, name := range []string{e.Kernel, e.Initrd} {
		if name == "" || strings.Contains(name, "/") {
			return "", nil, fmt.Errorf("the entry %q: %q is no file name in %s", e.Title, name, g.boot.Dir)
		}
	}
	cmdline := strings.Join(strings.Fields(e.Cmdline), " ")
	title := strings.TrimSpace(e.Title)
	if strings.HasPrefix(title, "-") {
		return "", nil, fmt.Errorf("the entry %s: %w", e.ID, &menulst.InvalidError{What: "title", Value: title, Reason: "begins with -, by which GRUB 2 knows an option: begin it with a letter"})
	}
	menu, err = menulst.Render(menulst.Menu{
		Comments: []string{"memlinux: the entry " + e.ID + " of GRUB 2's custom.cfg"},
		Globals:  []menulst.Command{{Name: "default", Args: "0"}, {Name: "timeout", Args: "0"}},
		Entries: []menulst.Entry{{Title: title, Commands: []menulst.Command{
			{Name: "uuid", Args: v.UUID},
			{Name: "kernel", Args: strings.TrimSpace(kernel + " " + cmdline)},
			{Name: "initrd", Args: initrd},
		}}},
	})
	if err != nil {
		return "", nil, fmt.Errorf("the entry %s: %w", e.ID, err)
	}

	var b strings.Builder
	fmt.Fprintf(&b, "menuentry %s --class memlinux --id %s", quoteScript(title), quoteScript(idPrefix+e.ID))
	if !restricted {
		b.WriteString(" --unrestricted")
	}
	b.WriteString(" {\n")
	if g.video {
		b.WriteString("\tinsmod all_video\n")
	}
	if v.Type == "btrfs" {
		// SUSE's GRUB else takes paths from the default subvolume on.
		b.WriteString("\tset btrfs_relative_path=n\n")
	}
	fmt.Fprintf(&b, "\tsearch --no-floppy --fs-uuid --set=root %s\n", v.UUID)
	if g.plain {
		fmt.Fprintf(&b, "\tlinux %s", quoteScript(kernel))
		for _, arg := range strings.Fields(cmdline) {
			b.WriteString(" " + quoteScript(arg))
		}
		fmt.Fprintf(&b, "\n\tinitrd %s\n}\n", quoteScript(initrd))
		return b.String(), nil, nil
	}
	// A missing file must not end in the second menu, from which nothing falls
	// back to the old system.
	fmt.Fprintf(&b, "\tif [ -f %s -a -f %s -a -f %s ]; then\n\t\tlegacy_configfile %s\n\telse\n",
		quoteScript(list), quoteScript(kernel), quoteScript(initrd), quoteScript(list))
	fmt.Fprintf(&b, "\t\techo %s\n\t\tsleep --interruptible 10\n\tfi\n}\n",
		quoteScript("memlinux: files of this entry are gone from the file system "+v.UUID+". Boot another entry and install it again."))
	return b.String(), menu, nil
}

// Once has grubenv name the entry, if GRUB reads that, and our block make the
// menu go on at once. An entry that fails is to be seen failing: it has no
// fallback there.
func (g *grub2) Once(id string) (Once, error) {
	s, err := g.read()
	if err != nil {
		return Once{}, err
	}
	if !slices.ContainsFunc(s.ours().Entries, func(e Entry) bool { return e.ID == id }) {
		return Once{}, fmt.Errorf("boot %s once: it is none of our entries", id)
	}
	var once Once
	script := "set timeout=0\nset timeout_style=menu\nunset superusers\nunset fallback\n"
	if env, ok := s.onceEnv(g, id); ok {
		once.Files = append(once.Files, Patch{Path: g.file("grubenv"), New: env.bytes()})
	} else {
		script += "set default=" + idPrefix + id + "\n"
	}
	at := bytes.LastIndex(s.custom.bytes, []byte(blockRoom))
	if at < 0 || len(script)+2 > len(blockRoom) {
		return Once{}, fmt.Errorf("boot %s once: the comment in memlinux's block of %s was changed: run memlinux install again", id, g.file("custom.cfg"))
	}
	script += strings.Repeat("#", len(blockRoom)-len(script)-1) + "\n"
	custom := bytes.Clone(s.custom.bytes)
	copy(custom[at:], script)
	once.Files = append(once.Files, Patch{Path: g.file("custom.cfg"), New: custom})
	return once, nil
}

// onceEnv is a grubenv that makes GRUB boot the entry once, where it is there
// and GRUB asks it.
func (s grubState) onceEnv(g *grub2, id string) (grubenv, bool) {
	if s.env == nil || g.remembers(s) != nil {
		return grubenv{}, false
	}
	env, err := s.env.set("next_entry", idPrefix+id)
	return env, err == nil
}
