package imagegen

import (
	"fmt"
	"io/fs"

	"github.com/memlinux/memlinux/imagegen/budget"
	"github.com/memlinux/memlinux/imagegen/filecaps"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/manifest"
	"github.com/memlinux/memlinux/imagegen/microcode"
	"github.com/memlinux/memlinux/imagegen/modules"
)

// describe writes the manifest of a system.
func describe(s *System, r Recipe, k kernelFile, selected *modules.Selection, box busyboxFile, early *microcode.Set, c *composed, packed initramfs.Packed, need budget.Need) manifest.Manifest {
	m := manifest.Manifest{
		Version: manifest.Version, ID: s.ID, Cmdline: s.Cmdline, Boot: []string{"bios", "uefi"}, Shell: c.shell,
		Memory: manifest.Memory{BIOS: need.BIOS, UEFI: need.UEFI},
		Kernel: manifest.Kernel{
			Release: k.image.Release, Arch: k.image.Arch, Size: k.file.Size, SHA256: k.file.SHA256,
			Source: k.source, Config: k.configSource, Missing: []string{},
		},
		Initramfs: manifest.Initramfs{
			Size: s.Initramfs.Size, Unpacked: packed.Unpacked, SHA256: s.Initramfs.SHA256,
			Compression: r.Compression.Name, Level: r.Compression.Level, Files: make([]manifest.File, len(c.tree)),
		},
		Modules:   manifest.Modules{Sets: modules.Sets(r.Modules), Count: len(selected.Modules), Firmware: []string{}, MissingFirmware: []string{}},
		Microcode: manifest.Microcode{Size: early.Size(), Updates: early.Updates},
		Busybox:   manifest.Busybox{Version: box.info.Version, SHA256: box.file.SHA256, Source: box.source, Applets: box.info.Applets},
	}
	if len(r.Boot) > 0 {
		m.Boot = r.Boot
	}
	if k.config != nil {
		for _, f := range k.config.Check(r.Compression.Name, selected.Has) {
			m.Kernel.Missing = append(m.Kernel.Missing, f.String())
		}
	}
	for _, e := range c.firmware.Entries {
		m.Modules.Firmware = append(m.Modules.Firmware, e.Path)
	}
	m.Modules.MissingFirmware = append(m.Modules.MissingFirmware, c.firmware.Missing...)
	for i, e := range c.tree {
		f := manifest.File{Path: e.Path, Mode: octal(e.Mode), UID: e.UID, GID: e.GID, Size: e.Size, SHA256: packed.Digests[i],
			Link: e.Link, HardLink: e.HardLink, Why: e.Why, Cost: manifest.Cost(packed.Costs[i])}
		if e.Caps != nil {
			f.Capabilities, _ = filecaps.Text(e.Caps) // filecaps.Program took them
		}
		m.Initramfs.Files[i] = f
	}
	m.Initramfs.Trailer = manifest.Cost(packed.Costs[len(c.tree)])
	return m
}

// octal is a mode as stat(2) has it.
func octal(m fs.FileMode) string {
	bits := uint32(m.Perm())
	for _, b := range []struct {
		is  fs.FileMode
		bit uint32
	}{{fs.ModeSetuid, 0o4000}, {fs.ModeSetgid, 0o2000}, {fs.ModeSticky, 0o1000}} {
		if m&b.is != 0 {
			bits |= b.bit
		}
	}
	kinds := map[fs.FileMode]uint32{0: 0o100000, fs.ModeDir: 0o040000, fs.ModeSymlink: 0o120000, fs.ModeNamedPipe: 0o010000}
	return fmt.Sprintf("%06o", bits|kinds[m.Type()])
}
