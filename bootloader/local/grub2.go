package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/memlinux/memlinux/bootloader/menulst"
)

// grub2 is GRUB 2 with the grub.cfg that grub-mkconfig writes. Nothing of that
// is touched: our entries are a block in custom.cfg, which grub.cfg sources, and
// each of them reads a menu of its own, menu-ID.lst in Boot.Dir.
type grub2 struct {
	boot *Boot
	dir  string // where grub.cfg, custom.cfg and grubenv are
	// plain entries load the kernel by GRUB 2's own commands, since this GRUB
	// can't read menu.lst: the module is missing, or Secure Boot forbids it.
	plain bool
	video bool // this firmware's GRUB has a module for the screen
}

// newGRUB2 knows GRUB 2 by the folder of its grub.cfg, /boot/grub or
// /boot/grub2. The error says that there is no grub.cfg to be read.
func newGRUB2(b *Boot, dir string) (Loader, error) {
	if _, err := os.ReadFile(filepath.Join(dir, "grub.cfg")); err != nil {
		return nil, fmt.Errorf("read GRUB's configuration: %w", err)
	}
	g := &grub2{boot: b, dir: dir}
	has := func(platform string, names ...string) bool {
		for _, name := range names {
			if st, err := os.Stat(filepath.Join(dir, platform, name+".mod")); err != nil || !st.Mode().IsRegular() {
				return false
			}
		}
		return true
	}
	if b.Firmware == "uefi" {
		g.plain = b.SecureBoot || !has("x86_64-efi", "legacycfg", "linux") && !has("i386-efi", "legacycfg", "linux")
		// A signed GRUB has it built in, and its own modules are not loaded.
		g.video = b.SecureBoot || has("x86_64-efi", "all_video") || has("i386-efi", "all_video")
	} else {
		g.plain = !has("i386-pc", "legacycfg", "linux16")
	}
	return g, nil
}

// Name is GRUB 2.
func (g *grub2) Name() string { return "GRUB 2" }

// Folders is that of grub.cfg, custom.cfg and grubenv.
func (g *grub2) Folders() []string { return []string{g.dir} }

// idPrefix begins the names that GRUB has for our entries.
const idPrefix = "memlinux-"

var buildID = regexp.MustCompile(`^[0-9a-f]{16}$`)

// ownID is the build ID behind a GRUB entry's name, if it is ours.
func ownID(id string) (string, bool) {
	id, ok := strings.CutPrefix(id, idPrefix)
	return id, ok && buildID.MatchString(id)
}

func (g *grub2) file(name string) string { return filepath.Join(g.dir, name) }

// readIf is a file's bytes, and nil where it is not there.
func readIf(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if data == nil {
		data = []byte{}
	}
	return data, err
}

// grubState is everything that was read.
type grubState struct {
	config   script
	sources  int // how many items of the menu stand before custom.cfg is read; -1: it is not read
	custom   customFile
	foreign  script // custom.cfg without our block
	env      *grubenv
	envBytes []byte // nil: there is no grubenv
	envError error  // why it can't be used
	menus    map[string][]byte
}

func (g *grub2) read() (grubState, error) {
	s := grubState{sources: -1, menus: map[string][]byte{}}
	fail := func(err error) (grubState, error) {
		return s, fmt.Errorf("read GRUB's configuration: %w", err)
	}
	data, err := os.ReadFile(g.file("grub.cfg"))
	if err != nil {
		return fail(err)
	}
	s.config = parseScript(data)
	for _, c := range s.config.commands {
		if !c.function && len(c.words) == 2 && (c.words[0] == "source" || c.words[0] == ".") && g.isCustom(c.words[1]) {
			s.sources = c.before
			break
		}
	}
	custom, err := readIf(g.file("custom.cfg"))
	if err != nil {
		return fail(err)
	}
	if s.custom, err = parseCustom(custom); err != nil {
		return s, &UnsupportedError{fmt.Sprintf("%s: %v", g.file("custom.cfg"), err)}
	}
	s.foreign = parseScript(slices.Concat(s.custom.before, s.custom.after))
	if st, err := os.Lstat(g.file("grubenv")); err == nil && !st.Mode().IsRegular() {
		s.envError = fmt.Errorf("%s is no regular file", g.file("grubenv"))
	}
	if s.envBytes, err = readIf(g.file("grubenv")); err != nil {
		return fail(err)
	}
	if s.envBytes != nil {
		if env, err := parseGrubenv(s.envBytes); err == nil {
			s.env = &env
		} else if s.envError == nil {
			s.envError = fmt.Errorf("%s: %w", g.file("grubenv"), err)
		}
	}
	names, _ := filepath.Glob(filepath.Join(globEscape(g.boot.Dir), "menu-*.lst")) // the pattern is right
	for _, name := range names {
		id := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(name), "menu-"), ".lst")
		if !buildID.MatchString(id) {
			continue
		}
		if s.menus[id], err = os.ReadFile(name); err != nil {
			return fail(err)
		}
	}
	return s, nil
}

var globEscaper = strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`)

func globEscape(path string) string { return globEscaper.Replace(path) }

// isCustom says whether a path in grub.cfg is that of the custom.cfg beside it,
// as 41_custom of GRUB 1.98 to 2.12 writes it, or in full.
func (g *grub2) isCustom(arg string) bool {
	switch arg {
	case "$prefix/custom.cfg", "${prefix}/custom.cfg", "$config_directory/custom.cfg", "${config_directory}/custom.cfg":
		return true
	}
	full, err := g.boot.Volume.LoaderPath(g.file("custom.cfg"))
	return err == nil && (arg == full || arg == "($root)"+full)
}

// menu is the whole menu, and which of its items are ours.
func (s grubState) menu() []menuItem {
	at := max(s.sources, 0)
	if s.sources < 0 || at > len(s.config.items) {
		return s.config.items
	}
	return slices.Concat(s.config.items[:at], parseScript(s.custom.before).items,
		s.custom.script.items, parseScript(s.custom.after).items, s.config.items[at:])
}

func (s grubState) variable(name string) string {
	if s.env == nil || !s.config.has("load_env") {
		return ""
	}
	value, _ := s.env.get(name)
	return value
}

// defaultSpec is what grub.cfg gives to its variable default where there is no
// next_entry: a number, an ID or a title, with > between a submenu's and what
// is in it.
func (s grubState) defaultSpec() string {
	saved := s.variable("saved_entry")
	if prev := s.variable("prev_saved_entry"); prev != "" {
		saved = prev
	}
	spec := "0"
	s.config.assignments("default", func(value string, condition []string, _ int) {
		switch value {
		case "${next_entry}", "$next_entry":
			return
		case "${saved_entry}", "$saved_entry":
			value = saved
		}
		// Debian's and Ubuntu's: if [ "x$default" = 'OLD TITLE' ]
		if i := slices.IndexFunc(condition, func(w string) bool { return w == "x$default" || w == "x${default}" }); i >= 0 &&
			(i+2 >= len(condition) || condition[i+2] != "x"+spec) {
			return
		}
		spec = value
	})
	return spec
}

// locate is where in the menu a value of default leads, and false where it
// leads nowhere and GRUB takes the first entry (grub-core/normal/menu.c).
func locate(items []menuItem, spec string) (indices []int, ok bool) {
	for {
		// The part up to a single >; two stand for one.
		part, rest, more := "", "", false
		for i := 0; i < len(spec); i++ {
			if spec[i] == '>' {
				if i+1 == len(spec) || spec[i+1] != '>' {
					rest, more = spec[i+1:], true
					break
				}
				i++
			}
			part += string(spec[i])
		}
		at, err := strconv.Atoi(part)
		if err != nil || at < 0 {
			at = slices.IndexFunc(items, func(m menuItem) bool { return m.title == part || m.id == part })
		}
		if at < 0 || at >= len(items) {
			return indices, false
		}
		indices = append(indices, at)
		if !items[at].submenu {
			return indices, true
		}
		items = items[at].items
		if !more || rest == "" {
			rest = "0"
		}
		spec = rest
	}
}

// Menu reads grub.cfg, custom.cfg, grubenv and our own menus.
func (g *grub2) Menu() (Menu, error) {
	s, err := g.read()
	if err != nil {
		return Menu{}, err
	}
	m := Menu{Ours: s.ours()}
	if s.sources < 0 {
		m.Warnings = append(m.Warnings, g.notSourced())
	}
	if s.envError != nil {
		m.Warnings = append(m.Warnings, fmt.Sprintf("GRUB can't remember anything: %v", s.envError))
	}
	for _, e := range m.Ours.Entries {
		if e.Kernel == "" {
			m.Warnings = append(m.Warnings, fmt.Sprintf("the entry %q (%s) can't boot: %s is missing or damaged; run memlinux remove %s",
				e.Title, e.ID, filepath.Join(g.boot.Dir, "menu-"+e.ID+".lst"), e.ID))
		}
	}
	items := s.menu()
	var def, next []int
	if m.Ours.Default == "" {
		if def, _ = locate(items, s.defaultSpec()); len(def) == 0 && len(items) > 0 {
			def, _ = locate(items, "0")
		}
	}
	if spec := s.variable("next_entry"); spec != "" && m.Ours.Next == "" {
		next, _ = locate(items, spec)
	}
	var walk func(items []menuItem, above string, at []int)
	walk = func(items []menuItem, above string, at []int) {
		for i, item := range items {
			here := append(slices.Clone(at), i)
			if _, ours := ownID(item.id); ours {
				continue
			}
			if item.submenu {
				walk(item.items, above+item.title+">", here)
				continue
			}
			m.Others = append(m.Others, Other{Title: above + item.title, Default: slices.Equal(here, def), Next: slices.Equal(here, next)})
		}
	}
	walk(items, "", nil)
	return m, nil
}

// ours reads our block and our menus.
func (s grubState) ours() Ours {
	var o Ours
	for _, item := range s.custom.script.items {
		id, ok := ownID(item.id)
		if !ok {
			continue
		}
		e := Entry{ID: id, Title: item.title}
		for _, c := range item.commands {
			switch {
			case c[0] == "legacy_configfile":
				for _, m := range menulst.Parse(s.menus[id]).Entries() {
					kernel, cmdline := m.Kernel()
					if kernel != "" && m.Initrd() != "" {
						e.Kernel, e.Cmdline, e.Initrd = path.Base(kernel), cmdline, path.Base(m.Initrd())
					}
				}
			case c[0] == "linux" && len(c) > 1:
				e.Kernel, e.Cmdline = path.Base(c[1]), strings.Join(c[2:], " ")
			case c[0] == "initrd" && len(c) > 1:
				e.Initrd = path.Base(c[1])
			}
		}
		o.Entries = append(o.Entries, e)
	}
	s.custom.script.assignments("default", func(value string, _ []string, _ int) {
		if id, ok := ownID(value); ok {
			o.Default = id
		}
	})
	if id, ok := ownID(s.variable("next_entry")); ok {
		o.Next = id
	}
	return o
}

func (g *grub2) notSourced() string {
	return fmt.Sprintf("%s does not read %s, where entries of one's own belong: make /etc/grub.d/41_custom executable again and run update-grub (grub-mkconfig -o %s)",
		g.file("grub.cfg"), g.file("custom.cfg"), g.file("grub.cfg"))
}

func unsupported(format string, args ...any) error {
	return &UnsupportedError{fmt.Sprintf(format, args...)}
}
