package local

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/bootloader/bootfs"
)

// What systemd-boot says of itself in LoaderFeatures
// (https://systemd.io/BOOT_LOADER_INTERFACE).
const (
	featureDefault = 1 << 2
	featureOneShot = 1 << 3
	featureSortKey = 1 << 8
)

const (
	loaderDefault = "LoaderEntryDefault"
	loaderOneShot = "LoaderEntryOneShot"
)

// efiChoice is how systemd-boot is told what to boot: by EFI variables, and by
// loader.conf, which is the user's and stays as it is.
type efiChoice struct {
	dir     string // with loader/entries
	efivars string
}

func (c *efiChoice) text(name string) (blsSetting, error) {
	v, err := readVariable(c.efivars, name, loaderGUID)
	if v == nil || err != nil {
		return blsSetting{}, err
	}
	value, err := decodeUTF16(v.Data)
	if err != nil {
		return blsSetting{}, fmt.Errorf("read the EFI variable %s: %w", name, err)
	}
	return blsSetting{raw: v.file(), value: value}, nil
}

func (c *efiChoice) read(entries []blsEntry) (blsChosen, error) {
	chosen := blsChosen{}
	var saved, info blsSetting
	for name, to := range map[string]*blsSetting{
		loaderDefault: &chosen.byDefault, loaderOneShot: &chosen.once,
		"LoaderEntryLastBooted": &saved, "LoaderInfo": &info,
	} {
		var err error
		if *to, err = c.text(name); err != nil {
			return blsChosen{}, err
		}
	}
	features, listed, err := c.loader()
	if err != nil {
		return blsChosen{}, err
	}
	config, err := os.ReadFile(filepath.Join(c.esp(), "loader", "loader.conf"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return blsChosen{}, fmt.Errorf("read the boot loader's settings: %w", err)
	}
	configured := lastField(parseBLS(config), "default")

	chosen.suffix = ".conf"
	if namesShort(entries, listed) {
		chosen.suffix = ""
	}
	chosen.entries = withListed(entries, listed)
	find := func(pattern string) string {
		if strings.EqualFold(pattern, "@saved") {
			pattern = saved.value
		}
		if chosen.suffix == "" && pattern != "" && !strings.HasSuffix(pattern, "*") {
			pattern += ".conf"
		}
		for _, e := range chosen.entries {
			if e.matches(pattern) {
				return e.id
			}
		}
		return ""
	}
	chosen.next = find(chosen.once.value)
	chosen.boots = find(chosen.byDefault.value)
	if chosen.boots == "" {
		chosen.boots = find(configured)
	}
	told := chosen.boots != ""
	if !told {
		for _, e := range chosen.entries {
			if !strings.HasPrefix(e.id, "auto-") {
				chosen.boots = e.id
				break
			}
		}
	}

	name := info.value
	if name == "" {
		name = "systemd-boot"
	}
	switch {
	case missing(c.efivars):
		chosen.noDefault = unsupported("systemd-boot is told what to boot by EFI variables, but %s is not there: mount efivarfs, or choose the entry in the boot menu", c.efivars)
		chosen.noOnce = chosen.noDefault
	case features == nil:
		chosen.noOnce = unsupported("whether systemd-boot can boot an entry once is not known, since this PC was started by another loader (there is no EFI variable LoaderFeatures): choose the entry in the boot menu")
	case *features&featureOneShot == 0:
		chosen.noOnce = unsupported("%s can't boot an entry once: update it by bootctl update, or choose the entry in the boot menu", name)
	}
	if features != nil && *features&featureDefault == 0 && chosen.noDefault == nil {
		chosen.noDefault = unsupported("%s can't be told its default by the system: update it by bootctl update, or set default in loader.conf", name)
	}
	if features != nil && *features&featureSortKey == 0 && !told && len(entries) > 0 {
		chosen.noEntry = unsupported("%s has no default entry set and is so old that it would boot the new entry by itself: say which entry boots by bootctl set-default, or update it by bootctl update", name)
	}
	return chosen, nil
}

// loader reads what the loader said of itself and of its menu when it ran;
// features is nil where it did not.
func (c *efiChoice) loader() (features *uint64, listed []string, err error) {
	v, err := readVariable(c.efivars, "LoaderFeatures", loaderGUID)
	if err != nil {
		return nil, nil, err
	}
	if v != nil {
		if len(v.Data) != 8 {
			return nil, nil, fmt.Errorf("read the EFI variable LoaderFeatures: it has %d bytes, not 8", len(v.Data))
		}
		bits := binary.LittleEndian.Uint64(v.Data)
		features = &bits
	}
	v, err = readVariable(c.efivars, "LoaderEntries", loaderGUID)
	if err != nil || v == nil {
		return features, nil, err
	}
	if listed, err = decodeUTF16List(v.Data); err != nil {
		return nil, nil, fmt.Errorf("read the EFI variable LoaderEntries: %w", err)
	}
	return features, listed, nil
}

// esp is the partition that loader.conf is read from: the one that the
// firmware starts loaders from.
func (c *efiChoice) esp() string {
	for _, dir := range append([]string{c.dir}, otherMounts(c.dir)...) {
		for _, name := range []string{"EFI", "efi"} {
			if st, err := os.Stat(filepath.Join(dir, name, "systemd")); err == nil && st.IsDir() {
				return dir
			}
		}
	}
	return c.dir
}

// namesShort says whether the loader's names for entries have no .conf, as old
// versions gave them.
func namesShort(entries []blsEntry, listed []string) bool {
	for _, e := range entries {
		short := strings.ToLower(strings.TrimSuffix(e.id, ".conf"))
		if slices.ContainsFunc(listed, func(id string) bool { return strings.ToLower(id) == short }) {
			return true
		}
	}
	return false
}

// What systemd-boot calls entries that it finds by itself.
var autoTitles = map[string]string{
	"auto-windows":                  "Windows Boot Manager",
	"auto-osx":                      "macOS",
	"auto-efi-shell":                "EFI Shell",
	"auto-efi-default":              "EFI Default Loader",
	"auto-reboot-to-firmware-setup": "Reboot Into Firmware Interface",
	"auto-poweroff":                 "Power Off The System",
	"auto-reboot":                   "Reboot The System",
}

// withListed puts what the loader listed and what has no file of its own, as
// Windows and kernels with all in one file (UKI), where the loader had it.
func withListed(entries []blsEntry, listed []string) []blsEntry {
	all := slices.Clone(entries)
	at := len(all)
	for _, id := range slices.Backward(listed) {
		known := func(e blsEntry) bool {
			plain, _ := e.plain()
			return strings.EqualFold(e.id, id) || strings.EqualFold(plain, id)
		}
		if i := slices.IndexFunc(all, known); i >= 0 {
			at = i
			continue
		}
		// Else it is gone.
		if lower := strings.ToLower(id); strings.HasPrefix(lower, "auto-") || strings.HasSuffix(lower, ".efi") {
			e := blsEntry{id: id}
			if title := autoTitles[lower]; title != "" {
				e.fields = []blsField{{"title", title}}
			}
			all = slices.Insert(all, at, e)
		}
	}
	return all
}

func (c *efiChoice) setting(name string) blsSetting {
	return blsSetting{raw: c.variable(loaderDefault, name).file(), value: name}
}

func (c *efiChoice) variable(name, value string) Variable {
	return Variable{Name: name, GUID: loaderGUID, Attributes: keptVariable, Data: encodeUTF16(value)}
}

func (c *efiChoice) change(now blsChosen, byDefault, once *blsSetting) ([]bootfs.Change, error) {
	var changes []bootfs.Change
	add := func(name string, from blsSetting, to *blsSetting) {
		if to != nil {
			changes = append(changes, bootfs.Change{
				Path: variablePath(c.efivars, name, loaderGUID), Old: from.raw, New: to.raw, Kind: bootfs.Variable,
			})
		}
	}
	add(loaderDefault, now.byDefault, byDefault)
	add(loaderOneShot, now.once, once)
	return changes, nil
}

func (c *efiChoice) check(Entry) error { return nil }

func (c *efiChoice) lines() []string { return nil }

func (c *efiChoice) takeBack() string { return `bootctl set-oneshot ""` }

// boot names the entry in both variables, since the loader may know only one
// of them. LoaderConfigTimeoutOneShot would not do: whatever it says, it makes
// the menu show.
func (c *efiChoice) boot(_ blsChosen, name string) (Once, error) {
	return Once{Variables: []Variable{
		c.variable(loaderOneShot, name),
		c.variable(loaderDefault, name),
		c.variable("LoaderConfigTimeout", "0"),
	}}, nil
}
