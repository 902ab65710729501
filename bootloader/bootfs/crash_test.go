package bootfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// sources are the contents that internal/steps installs. Nobody changes them.
var sources = sync.OnceValue(func() map[string][]byte {
	env := func(s string) []byte {
		return append([]byte("# GRUB Environment Block\n"+s), bytes.Repeat([]byte("#"), 1024-25-len(s))...)
	}
	// menu.lst reaches over sectors and blocks of the file system, where that
	// has small ones, and changes in all of them.
	menu := func(s string) []byte { return bytes.Repeat([]byte("title "+s+"\n"), 300) }
	return map[string][]byte{
		"menu.lst.old": menu("Debian"),
		"menu.lst.new": append(menu("memlinux"), menu("Debian")...),
		"custom.cfg":   []byte("menuentry memlinux {}\n"),
		"menu-1.lst":   noise(2000, 5),
		"grubenv.old":  env(""),
		"grubenv.new":  env("next_entry=memlinux\n"),
		"grub.cfg":     noise(9000, 8),
		"vmlinuz-6.1":  noise(100_000, 9),
		"vmlinuz":      noise(300_000, 6),
		"initramfs":    noise(700_000, 7),
	}
})

// foreign are the files of the boot folder before the installation, which are
// there after the removal.
func foreign() map[string][]byte {
	s := sources()
	return map[string][]byte{
		"grub/menu.lst": s["menu.lst.old"],
		"grub/grubenv":  s["grubenv.old"],
		"grub/grub.cfg": s["grub.cfg"],
		"vmlinuz-6.1":   s["vmlinuz-6.1"],
	}
}

// installed are the files after the installation.
func installed() map[string][]byte {
	s, files := sources(), foreign()
	files["grub/menu.lst"], files["grub/grubenv"], files["grub/custom.cfg"] = s["menu.lst.new"], s["grubenv.new"], s["custom.cfg"]
	files["memlinux/menu-1.lst"], files["memlinux/vmlinuz"], files["memlinux/initramfs"] = s["menu-1.lst"], s["vmlinuz"], s["initramfs"]
	return files
}

func putAll(t *testing.T, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		write(t, filepath.Join(dir, name), data)
	}
}

// judge says what is wrong with a boot folder in the midst of the steps, in the
// eyes of a boot loader. read is an error that is os.ErrNotExist if there is no
// such file.
func judge(read func(name string) ([]byte, error)) error {
	before, after := foreign(), installed()
	is := func(name string) (old, new bool, err error) {
		data, err := read(name)
		switch {
		case errors.Is(err, os.ErrNotExist):
			old = before[name] == nil
		case err != nil:
			return false, false, fmt.Errorf("%s: %w", name, err)
		default:
			old = before[name] != nil && bytes.Equal(data, before[name])
			new = bytes.Equal(data, after[name])
		}
		if !old && !new {
			return false, false, fmt.Errorf("%s is neither old nor new: %d bytes, %.60q", name, len(data), data)
		}
		return old, new, nil
	}
	// What comes later in this order is only there with all that comes before.
	// A kernel and initramfs that no menu names may be anything.
	inOrder := []string{"memlinux/menu-1.lst", "grub/custom.cfg", "grub/menu.lst", "grub/grubenv"}
	last, missing := "", ""
	for _, name := range inOrder {
		_, new, err := is(name)
		switch {
		case err != nil:
			return err
		case !new && missing == "":
			missing = name
		case new && missing != "":
			return fmt.Errorf("%s is new, but %s is not", name, missing)
		case new:
			last = name
		}
	}
	names := []string{"grub/grub.cfg", "vmlinuz-6.1"}
	if last != "" {
		names = append(names, "memlinux/vmlinuz", "memlinux/initramfs")
	}
	for _, name := range names {
		if _, new, err := is(name); err != nil || !new {
			return fmt.Errorf("with %q new, %s is not right: %w", last, name, err)
		}
	}
	return nil
}
