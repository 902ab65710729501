package modules

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Selection is modules that can be loaded from an initramfs that has them alone.
type Selection struct {
	Release string
	Modules []Module // sorted by path

	byName map[string]Module
	why    map[string]string
}

// ErrNoModule says that a module that was asked for exists nowhere.
var ErrNoModule = errors.New("no such module")

// Validate checks a choice of modules as far as that goes without a Library.
func Validate(choice []string) error {
	for _, name := range choice {
		if name == "none" && len(choice) > 1 {
			return errors.New("modules: none goes with nothing else")
		}
		if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_+.") != "" {
			return fmt.Errorf("modules: %q is neither a set (%s) nor a module's name", name, strings.Join(SetNames(), ", "))
		}
	}
	return nil
}

// Sets spells a choice out: an empty one is Default, "all" is all sets, and
// "none" is nothing. It is sorted and has nothing twice.
func Sets(choice []string) []string {
	if len(choice) == 0 {
		choice = Default
	}
	names := []string{}
	for _, name := range choice {
		switch name {
		case "none":
		case "all":
			for _, s := range sets {
				names = append(names, s.name)
			}
		default:
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Singles are the names in a choice that are not sets.
func Singles(choice []string) []string {
	return slices.DeleteFunc(Sets(choice), func(name string) bool {
		return slices.ContainsFunc(sets, func(s set) bool { return s.name == name })
	})
}

// Select takes the modules of a choice and all that they depend on, hard and
// soft. A set takes what this kernel has of it, be that nothing; a single
// module that is built in takes nothing, and one that does not exist is
// ErrNoModule.
func (l *Library) Select(choice []string) (*Selection, error) {
	c := closure{library: l, byName: map[string]Module{}, byAlias: map[string][]string{}, taken: map[string]Module{}, why: map[string]string{}}
	for _, m := range l.Modules {
		c.byName[m.Name()] = m
	}
	names := Sets(choice)
	for _, s := range sets {
		if !slices.Contains(names, s.name) {
			continue
		}
		for _, m := range l.Modules {
			if s.has(m) {
				if err := c.take(m.Name(), "", "of the set "+s.name); err != nil {
					return nil, err
				}
			}
		}
	}
	for _, name := range Singles(choice) {
		if _, ok := c.byName[Name(name)]; !ok {
			if l.builtIn(Name(name)) {
				continue
			}
			return nil, fmt.Errorf("%w in kernel %s: %s is neither loadable nor built in, and the sets are %s", ErrNoModule, l.Release, name, strings.Join(SetNames(), ", "))
		}
		if err := c.take(Name(name), "", "asked for by its name"); err != nil {
			return nil, err
		}
	}
	s := &Selection{Release: l.Release, byName: c.taken, why: c.why}
	for _, m := range c.taken {
		s.Modules = append(s.Modules, m)
	}
	slices.SortFunc(s.Modules, func(a, b Module) int { return strings.Compare(a.Path, b.Path) })
	return s, nil
}

func (l *Library) builtIn(name string) bool {
	_, found := slices.BinarySearch(l.BuiltIn, name)
	return found
}

// closure is one run of Select.
type closure struct {
	library *Library
	byName  map[string]Module
	byAlias map[string][]string // aliases without wildcards → names; made when first needed
	globs   []glob
	indexed bool
	taken   map[string]Module
	why     map[string]string // of those that are taken
}

type glob struct {
	pattern, name string
	literal       string // what the pattern begins with, to pass by most of them quickly
}

// take takes the module called name, for which the module called by asked, for
// the given reason, and all that it depends on.
func (c *closure) take(name, by, why string) error {
	if _, ok := c.taken[name]; ok {
		return nil // also where modules softly depend on each other in a circle
	}
	m, ok := c.byName[name]
	if !ok {
		if c.library.builtIn(name) {
			return nil
		}
		return fmt.Errorf("module %s, which %s depends on, is missing in the modules of kernel %s", name, by, c.library.Release)
	}
	if m.Bad != "" {
		return fmt.Errorf("module %s of kernel %s (%s) can't be used: %s", name, c.library.Release, m.Path, m.Bad)
	}
	if m.Release != "" && m.Release != c.library.Release {
		return fmt.Errorf("module %s is for kernel %s, not %s", name, m.Release, c.library.Release)
	}
	c.taken[name], c.why[name] = m, why
	for _, dep := range m.Depends {
		if err := c.take(dep, name, "that "+name+" depends on"); err != nil {
			return err
		}
	}
	for _, dep := range m.Softdeps {
		for _, other := range c.resolve(dep) {
			if err := c.take(other, name, "that "+name+" works better with"); err != nil {
				return err
			}
		}
	}
	return nil
}

// resolve finds the modules that a soft dependency means: by name, else by
// alias. There need not be any.
func (c *closure) resolve(dep string) []string {
	if _, ok := c.byName[Name(dep)]; ok {
		return []string{Name(dep)}
	}
	if !c.indexed {
		c.indexed = true
		for _, m := range c.library.Modules {
			for _, alias := range m.Aliases {
				if at := strings.IndexAny(alias, "*?[\\"); at >= 0 {
					c.globs = append(c.globs, glob{alias, m.Name(), alias[:at]})
				} else {
					c.byAlias[alias] = append(c.byAlias[alias], m.Name())
				}
			}
		}
	}
	names := slices.Clone(c.byAlias[dep])
	for _, g := range c.globs {
		if !strings.HasPrefix(dep, g.literal) {
			continue
		}
		if ok, _ := path.Match(g.pattern, dep); ok {
			names = append(names, g.name)
		}
	}
	return names
}

// Has reports whether the module called name is in the selection.
func (s *Selection) Has(name string) bool {
	_, ok := s.byName[Name(name)]
	return ok
}

// Why says in a clause why the module called name is in the selection: "of the
// set disk", "that ext4 depends on".
func (s *Selection) Why(name string) string { return s.why[Name(name)] }

// Firmware are the files below /lib/firmware that the modules may ask for,
// sorted.
func (s *Selection) Firmware() []string {
	all := []string{}
	for _, m := range s.Modules {
		all = append(all, m.Firmware...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Dep is modules.dep (depmod(8)): of each module the paths of all that must be
// loaded before it, the last one first. Modprobe loads from the end.
func (s *Selection) Dep() []byte {
	var b bytes.Buffer
	for _, m := range s.Modules {
		b.WriteString(m.Path + ":")
		// What a module depends on comes behind it, so that from the end
		// everything comes before what needs it.
		var order []string
		s.before(m, map[string]bool{m.Name(): true}, &order)
		for _, name := range slices.Backward(order) {
			b.WriteString(" " + s.byName[name].Path)
		}
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// before appends what m depends on to order, each behind what it depends on.
func (s *Selection) before(m Module, seen map[string]bool, order *[]string) {
	for _, name := range m.Depends {
		dep, ok := s.byName[name]
		if !ok || seen[name] {
			continue
		}
		seen[name] = true
		s.before(dep, seen, order)
		*order = append(*order, name)
	}
}

// Alias is modules.alias. Ranges in it are spelled out, [0-2] as [012]: busybox
// takes every dash for an underscore.
func (s *Selection) Alias() []byte {
	var b bytes.Buffer
	for _, m := range s.Modules {
		for _, alias := range m.Aliases {
			b.WriteString("alias " + spellOut(alias) + " " + m.Name() + "\n")
		}
	}
	return b.Bytes()
}

// spellOut replaces each range of digits or letters in the brackets of a pattern
// by these.
func spellOut(pattern string) string {
	var b strings.Builder
	in := false
	for i := 0; i < len(pattern); i++ {
		c := pattern[i]
		switch {
		case c == '[':
			in = true
		case c == ']':
			in = false
		case in && i+2 < len(pattern) && pattern[i+1] == '-' && c <= pattern[i+2] && class(c) != 0 && class(c) == class(pattern[i+2]):
			for x := int(c); x <= int(pattern[i+2]); x++ {
				b.WriteByte(byte(x))
			}
			i += 2
			continue
		}
		b.WriteByte(c)
	}
	return b.String()
}

// class tells digits, capitals and small letters (1, 2, 3) from other bytes (0).
func class(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return 1
	case 'A' <= c && c <= 'Z':
		return 2
	case 'a' <= c && c <= 'z':
		return 3
	}
	return 0
}

// Devname is modules.devname: a line "MODULE NODE cMAJOR:MINOR" for each device
// node that must be there before its module, which the kernel loads when the
// node is opened.
func (s *Selection) Devname() []byte {
	var b bytes.Buffer
	for _, m := range s.Modules {
		node, kind, number := "", "", ""
		for _, alias := range m.Aliases {
			if name, ok := strings.CutPrefix(alias, "devname:"); ok {
				node = name
			}
			for prefix, k := range map[string]string{"char-major-": "c", "block-major-": "b"} {
				major, minor, ok := strings.Cut(strings.TrimPrefix(alias, prefix), "-")
				if strings.HasPrefix(alias, prefix) && ok && isNumber(major) && isNumber(minor) {
					kind, number = k, major+":"+minor
				}
			}
		}
		if node != "" && number != "" && !strings.Contains(node, "..") {
			b.WriteString(m.Name() + " " + node + " " + kind + number + "\n")
		}
	}
	return b.Bytes()
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 20)
	return err == nil
}

// Filesystems is /etc/filesystems for busybox's mount: the file systems of the
// selection that live on block devices. Those that are loaded or built in it
// learns from the kernel.
func (s *Selection) Filesystems() []byte {
	have := map[string]bool{}
	for _, m := range s.Modules {
		for _, alias := range m.Aliases {
			if name, ok := strings.CutPrefix(alias, "fs-"); ok {
				have[name] = true
			}
		}
	}
	var b bytes.Buffer
	for _, name := range blockFilesystems {
		if have[name] {
			b.WriteString(name + "\n")
		}
	}
	return b.Bytes()
}
