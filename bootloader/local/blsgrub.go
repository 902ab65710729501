package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/bootloader/menulst"
)

// grubChoice is how a GRUB 2 that reads BLS entries, by Fedora's command
// blscfg, is told what to boot: by saved_entry and next_entry in its
// environment.
type grubChoice struct {
	machine *Boot
	dir     string // where GRUB's own files lie
	env     string // the file grubenv, links resolved; "" where there is none
	cfg     string // what grub.cfg says
}

func newGRUBChoice(b *Boot, dir string) (*grubChoice, error) {
	c := &grubChoice{machine: b, dir: filepath.Join(dir, "grub2")}
	if missing(c.dir) {
		c.dir = filepath.Join(dir, "grub")
	}
	// On Fedora before 34 with UEFI it is a link to the ESP.
	env, err := filepath.EvalSymlinks(filepath.Join(c.dir, "grubenv"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("find GRUB's environment: %w", err)
	}
	places := []string{c.dir}
	if err == nil {
		c.env = env
		places = append(places, filepath.Dir(env))
	}
	for _, place := range places {
		cfg, err := os.ReadFile(filepath.Join(place, "grub.cfg"))
		if err == nil {
			c.cfg = string(cfg)
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read GRUB's menu: %w", err)
		}
	}
	return c, nil
}

// grubDefault is a line of grub.cfg as grub-mkconfig's 00_header writes it.
var grubDefault = regexp.MustCompile(`(?m)^[ \t]*set default="?([^"\n]*)"?`)

const (
	nextEntry  = "next_entry"
	savedEntry = "saved_entry"
)

// byDefault is what grub.cfg boots by itself, saved whether that is
// saved_entry's to say.
func (c *grubChoice) byDefault() (value string, saved bool) {
	for _, m := range grubDefault.FindAllStringSubmatch(c.cfg, -1) {
		if m[1] != "${next_entry}" {
			value = m[1]
		}
	}
	return value, value == "${saved_entry}"
}

func (c *grubChoice) environment() (env grubenv, found bool, err error) {
	if c.env == "" {
		return grubenv{}, false, nil
	}
	data, err := os.ReadFile(c.env)
	if err != nil {
		return grubenv{}, false, fmt.Errorf("read GRUB's environment: %w", err)
	}
	env, err = parseGrubenv(data)
	if err != nil {
		return grubenv{}, false, unsupported("GRUB can't use its environment %s: %v; make it anew by grub2-editenv %s create", c.env, err, c.env)
	}
	return env, true, nil
}

func envSetting(env grubenv, name string) blsSetting {
	value, ok := env.get(name)
	if !ok {
		return blsSetting{}
	}
	// Not empty, also where the value is.
	return blsSetting{raw: []byte("=" + value), value: value}
}

func (c *grubChoice) read(entries []blsEntry) (blsChosen, error) {
	env, found, err := c.environment()
	if err != nil {
		return blsChosen{}, err
	}
	chosen := blsChosen{entries: entries, byDefault: envSetting(env, savedEntry), once: envSetting(env, nextEntry)}
	value, saved := c.byDefault()
	if saved {
		value = chosen.byDefault.value
	}
	others := 0
	find := func(value string) string {
		for _, e := range entries {
			if value == strings.TrimSuffix(e.id, ".conf") || value != "" && value == e.field("title") {
				return e.id
			}
		}
		return ""
	}
	for _, e := range entries {
		if blsID(e.id) == "" {
			others++
		}
	}
	chosen.boots, chosen.next = find(value), find(chosen.once.value)
	if chosen.boots == "" && others == 0 && len(entries) > 0 {
		chosen.boots = entries[0].id
	}

	if n, err := strconv.Atoi(value); err == nil && n >= others {
		chosen.noEntry = unsupported("GRUB boots entry number %d by itself, which another entry would become: name it by grub2-set-default", n)
	}
	noEnv := unsupported("GRUB has no environment to be told what to boot: make it by grub2-editenv %s create, or choose the entry in the boot menu", filepath.Join(c.dir, "grubenv"))
	if !found {
		chosen.noDefault, chosen.noOnce = noEnv, noEnv
		return chosen, nil
	}
	if !saved {
		chosen.noDefault = unsupported("GRUB takes its default from /etc/default/grub: set GRUB_DEFAULT=saved there and run grub2-mkconfig, or choose the entry in the boot menu")
	}
	switch v := c.machine.Volume; {
	case !strings.Contains(c.cfg, "${"+nextEntry+"}"):
		chosen.noOnce = unsupported("GRUB's menu %s does not know %s: run grub2-mkconfig, or choose the entry in the boot menu", filepath.Join(c.dir, "grub.cfg"), nextEntry)
	case !within(c.env, c.dir): // on the ESP, which GRUB can write
	case v.Type == "btrfs" || v.Type == "zfs" || v.Device == "":
		chosen.noOnce = unsupported("GRUB can't write its environment on %s (%s), so it would boot the entry again and again: choose it in the boot menu", v.MountPoint, v.Type)
	}
	return chosen, nil
}

func within(path, dir string) bool { return filepath.Dir(path) == dir }

func (c *grubChoice) setting(name string) blsSetting {
	return blsSetting{raw: []byte("=" + name), value: name}
}

func (c *grubChoice) change(_ blsChosen, byDefault, once *blsSetting) ([]bootfs.Change, error) {
	if byDefault == nil && once == nil {
		return nil, nil
	}
	old, _, err := c.environment()
	if err != nil {
		return nil, err
	}
	env := old
	for _, v := range []struct {
		name string
		to   *blsSetting
	}{{savedEntry, byDefault}, {nextEntry, once}} {
		switch {
		case v.to == nil:
		case v.to.raw == nil:
			env = env.unset(v.name)
		default:
			if env, err = env.set(v.name, string(v.to.raw[1:])); err != nil {
				return nil, unsupported("%v: take a variable out by grub2-editenv %s unset NAME", err, c.env)
			}
		}
	}
	return []bootfs.Change{{Path: c.env, Old: old.bytes(), New: env.bytes(), Kind: bootfs.InPlace}}, nil
}

// check refuses what GRUB would take for its own script: blscfg makes one of
// the entry.
func (c *grubChoice) check(e Entry) error {
	if err := menulst.CheckCommandLine(e.Cmdline); err != nil {
		return unsupported("%v", err)
	}
	if i := strings.IndexAny(e.Cmdline, "$;&|<>{}"); i >= 0 {
		return unsupported("boot entry %s: its kernel command line holds %c, which GRUB would read as a part of its script: leave it out", e.ID, e.Cmdline[i])
	}
	if strings.Contains(" "+e.Cmdline, " #") {
		return unsupported("boot entry %s: its kernel command line has a word that begins with #, where GRUB would stop to read: leave it out", e.ID)
	}
	return nil
}

// lines are those of Fedora's own entries: with a password on GRUB's menu,
// ours is as free to boot as they are.
func (c *grubChoice) lines() []string {
	return []string{"grub_users $grub_users", "grub_arg --unrestricted", "grub_class memlinux"}
}

func (c *grubChoice) takeBack() string { return "grub2-editenv " + c.env + " unset " + nextEntry }

// boot can't shorten GRUB's timeout: that stands in grub.cfg.
func (c *grubChoice) boot(now blsChosen, name string) (Once, error) {
	to := c.setting(name)
	var changes []bootfs.Change
	var err error
	switch _, saved := c.byDefault(); {
	case c.env != "" && strings.Contains(c.cfg, "${"+nextEntry+"}"):
		changes, err = c.change(now, nil, &to)
	case c.env != "" && saved:
		changes, err = c.change(now, &to, nil)
	default:
		return Once{}, now.noOnce
	}
	if err != nil {
		return Once{}, err
	}
	return Once{Files: []Patch{{Path: c.env, New: changes[0].New}}}, nil
}
