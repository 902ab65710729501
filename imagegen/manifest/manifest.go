// Package manifest says what a generated system is made of, byte for byte.
//
// A manifest holds nothing of the machine or the moment it was made at: the
// same system has the same manifest (but for Loaders, on a stick). It accounts for every byte of the
// initramfs: the shares of its items add up to its size.
package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/memlinux/memlinux/imagegen/microcode"
)

// Version is that of the format.
const Version = 1

// Manifest describes a system. Sizes are bytes unless they say otherwise,
// digests are SHA-256 in lower-case hex, paths have no leading slash.
type Manifest struct {
	Version   int       `json:"version"`
	ID        string    `json:"id"`
	Cmdline   string    `json:"cmdline"`
	Boot      []string  `json:"boot"`  // the firmwares it is made for: "bios", "uefi"
	Shell     bool      `json:"shell"` // its consoles give a shell without asking for a password
	Memory    Memory    `json:"memory"`
	Kernel    Kernel    `json:"kernel"`
	Initramfs Initramfs `json:"initramfs"`
	Modules   Modules   `json:"modules"`
	Microcode Microcode `json:"microcode"`
	Busybox   Busybox   `json:"busybox"`

	// Loaders are, on a stick, the digests of its boot loaders by their firmware:
	// "uefi" of the file, "bios" of the boot code with all the room of the core image.
	Loaders map[string]string `json:"loaders,omitempty"`
}

// Memory is the least RAM with which the system comes up, in MiB, under each
// firmware.
type Memory struct {
	BIOS int `json:"bios_mib"`
	UEFI int `json:"uefi_mib"`
}

// Kernel describes the kernel.
type Kernel struct {
	Release string   `json:"release"`
	Arch    string   `json:"arch"`
	Size    int64    `json:"size"`
	SHA256  string   `json:"sha256"`
	Source  string   `json:"source"`  // "boot", "file", "debian PACKAGE VERSION" or "source …"
	Config  string   `json:"config"`  // "config-RELEASE", "IKCONFIG", or "" for unknown
	Missing []string `json:"missing"` // what the configuration lacks and what that breaks
}

// Modules describes the kernel modules; the files of the initramfs have each of
// them with its size and digest.
type Modules struct {
	Sets            []string `json:"sets"`             // what was asked for, spelled out; sorted
	Count           int      `json:"count"`            // with all that they depend on
	Firmware        []string `json:"firmware"`         // below lib/firmware, what they may ask for and the initramfs has
	MissingFirmware []string `json:"missing_firmware"` // and has not
}

// Microcode describes the early archive with the processors' microcode, which
// stands before the initramfs's own archive in the same file.
type Microcode struct {
	Size    int64              `json:"size"` // of the early archive with its padding, 0 for none
	Updates []microcode.Update `json:"updates"`
}

// Initramfs describes the initramfs.
type Initramfs struct {
	Size        int64  `json:"size"`     // of the file, with the microcode before it
	Unpacked    int64  `json:"unpacked"` // of the archive before compression
	SHA256      string `json:"sha256"`
	Compression string `json:"compression"` // "zstd", "gzip" or "none"
	Level       int    `json:"level"`       // 0: the compression's standard
	Files       []File `json:"files"`       // sorted by path
	Trailer     Cost   `json:"trailer"`     // what ends the archive
}

// Cost is what something takes in the initramfs.
type Cost struct {
	Raw        int64 `json:"raw"`        // in the archive, with its header and padding
	Compressed int64 `json:"compressed"` // its share of the compressed bytes
}

// File is a folder, file or link in the initramfs.
type File struct {
	Path         string `json:"path"`
	Mode         string `json:"mode"` // octal, with the type's bits: "100755"
	UID          int    `json:"uid,omitempty"`
	GID          int    `json:"gid,omitempty"`
	Size         int64  `json:"size"` // of its content
	SHA256       string `json:"sha256,omitempty"`
	Link         string `json:"link,omitempty"`         // a symlink's target
	HardLink     string `json:"hard_link,omitempty"`    // the file that this is a second name of
	Capabilities string `json:"capabilities,omitempty"` // "cap_net_raw=ep"
	Why          string `json:"why"`
	Cost
}

// Busybox describes the busybox.
type Busybox struct {
	Version string   `json:"version"`
	SHA256  string   `json:"sha256"`
	Source  string   `json:"source"` // "host", "file", "debian PACKAGE VERSION" or "source …"
	Applets []string `json:"applets"`
}

// BootLine is the kernel's command line of a boot entry for the system with that
// line and ID that needs so many MiB of RAM: /init reads what is added, for what
// it says on the consoles.
func BootLine(cmdline, id string, ram int) string {
	return fmt.Sprintf("%s memlinux.build=%s memlinux.ram=%d", cmdline, id, ram)
}

// BootLine is the kernel's command line of a boot entry.
func (m Manifest) BootLine() string { return BootLine(m.Cmdline, m.ID, m.Memory.BIOS) }

// JSON is the manifest as indented JSON with a line break at
// its end.
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

// maxSize bounds a manifest that is read, in bytes: a whole Debian's has about
// 15 MiB.
const maxSize = 256 << 20

// Parse reads what JSON made. Text that is no manifest, or of a later version,
// is an error.
func Parse(r io.Reader) (Manifest, error) {
	var m Manifest
	limited := &io.LimitedReader{R: r, N: maxSize}
	d := json.NewDecoder(limited)
	err := d.Decode(&m)
	switch {
	case err != nil && limited.N <= 0:
		return Manifest{}, fmt.Errorf("read manifest: it is larger than %d MiB", maxSize>>20)
	case err != nil:
		return Manifest{}, fmt.Errorf("read manifest: it is not one that memlinux wrote: %w", err)
	case m.Version == 0 || m.ID == "" || len(m.Boot) == 0 || m.Memory.BIOS <= 0 || m.Memory.UEFI <= 0:
		return Manifest{}, errors.New("read manifest: it is not one that memlinux wrote")
	case slices.ContainsFunc(m.Boot, func(b string) bool { return b != "bios" && b != "uefi" }):
		return Manifest{}, fmt.Errorf("read manifest: it is for the firmwares %q, and there are bios and uefi", m.Boot)
	case m.Version > Version:
		return Manifest{}, fmt.Errorf("read manifest: it has version %d, and this memlinux knows %d; use a newer one", m.Version, Version)
	}
	return m, nil
}
