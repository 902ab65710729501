package imagegen

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"

	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/modules"
)

// Manifest says what a System is made of. It holds nothing of the machine or
// the moment it was made at: the same system has the same manifest.
type Manifest struct {
	Version   int               `json:"version"` // of this format: 1
	ID        string            `json:"id"`
	Cmdline   string            `json:"cmdline"`
	Kernel    ManifestKernel    `json:"kernel"`
	Initramfs ManifestInitramfs `json:"initramfs"`
	Modules   ManifestModules   `json:"modules"`
	Busybox   ManifestBusybox   `json:"busybox"`
}

// ManifestKernel describes the kernel.
type ManifestKernel struct {
	Release string   `json:"release"`
	Arch    string   `json:"arch"`
	Size    int64    `json:"size"` // bytes
	SHA256  string   `json:"sha256"`
	Source  string   `json:"source"`  // "boot", "file" or "debian PACKAGE VERSION"
	Config  string   `json:"config"`  // "config-RELEASE", "IKCONFIG", or "" for unknown
	Missing []string `json:"missing"` // what the configuration lacks and what that breaks
}

// ManifestModules describes the kernel modules; the files of the initramfs have
// each of them with its size and digest.
type ManifestModules struct {
	Sets     []string `json:"sets"`     // what was asked for, spelled out; sorted
	Count    int      `json:"count"`    // with all that they depend on
	Firmware []string `json:"firmware"` // below /lib/firmware, what they may ask for and the initramfs has not
}

// ManifestInitramfs describes the initramfs.
type ManifestInitramfs struct {
	Size        int64          `json:"size"`     // bytes
	Unpacked    int64          `json:"unpacked"` // bytes of the archive before compression
	SHA256      string         `json:"sha256"`
	Compression string         `json:"compression"` // "zstd", "gzip" or "none"
	Files       []ManifestFile `json:"files"`       // sorted by path
}

// ManifestFile is a folder or file in the initramfs.
type ManifestFile struct {
	Path   string `json:"path"` // without a leading slash
	Mode   string `json:"mode"` // octal, with the type's bits: "100755"
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256,omitempty"`
}

// ManifestBusybox describes the busybox.
type ManifestBusybox struct {
	Version string   `json:"version"`
	SHA256  string   `json:"sha256"`
	Applets []string `json:"applets"`
}

// JSON is the manifest as indented JSON with a line break at its end.
func (m Manifest) JSON() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(m); err != nil {
		return nil, fmt.Errorf("write manifest: %w", err)
	}
	return b.Bytes(), nil
}

func manifest(s *System, r Recipe, k kernelFile, selected *modules.Selection, box busyboxFile, compression string, packed initramfs.Packed, tree initramfs.Tree) Manifest {
	m := Manifest{
		Version: 1,
		ID:      s.ID,
		Cmdline: s.Cmdline,
		Kernel: ManifestKernel{
			Release: k.image.Release, Arch: k.image.Arch, Size: k.file.Size, SHA256: k.file.SHA256,
			Source: k.source, Config: k.configSource, Missing: []string{},
		},
		Initramfs: ManifestInitramfs{
			Size: s.Initramfs.Size, Unpacked: packed.Unpacked, SHA256: s.Initramfs.SHA256, Compression: compression,
		},
		Modules: ManifestModules{Sets: modules.Sets(r.Modules), Count: len(selected.Modules), Firmware: selected.Firmware()},
		Busybox: ManifestBusybox{Version: box.info.Version, SHA256: box.file.SHA256, Applets: box.info.Applets},
	}
	if k.config != nil {
		for _, f := range k.config.Check(compression, selected.Has) {
			m.Kernel.Missing = append(m.Kernel.Missing, f.String())
		}
	}
	for i, e := range tree {
		m.Initramfs.Files = append(m.Initramfs.Files, ManifestFile{Path: e.Path, Mode: octal(e.Mode), Size: e.Size, SHA256: packed.Digests[i]})
	}
	return m
}

// octal is a mode as stat(2) has it.
func octal(m fs.FileMode) string {
	bits := uint32(m.Perm())
	if m&fs.ModeSticky != 0 {
		bits |= 0o1000
	}
	if m.IsDir() {
		bits |= 0o040000
	} else {
		bits |= 0o100000
	}
	return fmt.Sprintf("%06o", bits)
}
