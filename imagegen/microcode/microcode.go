// Package microcode makes the early initramfs out of which the Linux kernel
// updates the microcode of x86 processors before anything else runs.
//
// A [Collection] takes the files of lib/firmware/intel-ucode and amd-ucode, from
// a folder or a package, and checks each by its vendor's format. A [Set] is what
// of it goes along: all, or what some processors can use. It promises that the
// same files give the same bytes, and that a broken file is an error which names
// it, and not a processor without its update.
package microcode

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"slices"

	"github.com/memlinux/memlinux/imagegen/firmware/compressed"
)

// Packages are the Debian packages that have microcode, in Debian's section
// non-free-firmware.
var Packages = []string{"intel-microcode", "amd64-microcode"}

// Enable says how to get at Packages where apt does not know them.
const Enable = "Debian's packages intel-microcode and amd64-microcode are in its section non-free-firmware: add non-free-firmware behind main in /etc/apt/sources.list or sources.list.d, and run apt-get update"

// ErrNone says that a folder or package has no microcode.
var ErrNone = errors.New("no CPU microcode")

// maxFile bounds one file, in bytes. The largest of 2025 has 2 MiB.
const maxFile = 64 << 20

// Vendor is who made a processor, as CPUID and /proc/cpuinfo tell it.
type Vendor string

// The vendors whose processors Linux loads microcode into.
const (
	Intel Vendor = "GenuineIntel"
	AMD   Vendor = "AuthenticAMD"
)

// CPU is what of a processor says which update is for it.
type CPU struct {
	Vendor    Vendor
	Signature uint32 // EAX of CPUID leaf 1: stepping, model and family
	// Flags has bit N set on a processor with the platform ID N (Intel SDM
	// vol. 3A §10.11.4, MSR 17h), and is 0 where that is not known: then updates
	// for every platform are taken. AMD has no such thing.
	Flags uint32
}

// Update is one update of a processor's microcode, for the manifest.
type Update struct {
	Vendor     Vendor   `json:"vendor"`
	Signatures []string `json:"signatures"` // of the processors that it is for, 8 hex digits each; sorted
	Revision   string   `json:"revision"`   // 8 hex digits
	Date       string   `json:"date"`       // YYYY-MM-DD
	Size       int64    `json:"size"`       // bytes
	File       string   `json:"file"`       // where it is from, as in "intel-ucode/06-9e-0d"
}

// Collection is microcode that was read and found good. The zero value is empty.
type Collection struct {
	intel []intelUpdate
	amd   []amdContainer
}

// The names that Intel's and AMD's releases and linux-firmware have. Debian adds
// .initramfs to what must not be loaded later than by an early initramfs.
var (
	intelName = regexp.MustCompile(`(?:^|/)(intel-ucode/[0-9a-f]{2}-[0-9a-f]{2}-[0-9a-f]{2}(?:\.initramfs)?(?:\.xz|\.zst)?)$`)
	amdName   = regexp.MustCompile(`(?:^|/)(amd-ucode/microcode_amd[0-9a-z_]*\.bin(?:\.xz|\.zst)?)$`)
)

// Wants reports whether Add has a use for the file at name.
func Wants(name string) bool { return intelName.MatchString(name) || amdName.MatchString(name) }

// Add takes the file at name, of whose path it looks at the last folder and the
// file's own name only, as in "usr/lib/firmware/amd-ucode/microcode_amd.bin".
// What Wants does not want it passes over. A file that is broken is an error.
func (c *Collection) Add(name string, content io.Reader) error {
	file, add := "", c.addIntel
	if m := intelName.FindStringSubmatch(name); m != nil {
		file = m[1]
	} else if m := amdName.FindStringSubmatch(name); m != nil {
		file, add = m[1], c.addAMD
	} else {
		return nil
	}
	b, err := compressed.ReadAll(file, content, maxFile)
	if err == nil {
		err = add(compressed.Trim(file), b)
	}
	if err != nil {
		return fmt.Errorf("microcode %s: %w; install its package again", name, err)
	}
	return nil
}

func (c *Collection) addIntel(file string, b []byte) error {
	updates, err := parseIntel(file, b)
	c.intel = append(c.intel, updates...)
	return err
}

func (c *Collection) addAMD(file string, b []byte) error {
	containers, err := parseAMD(file, b)
	c.amd = append(c.amd, containers...)
	return err
}

// AddFolder takes all that the folders intel-ucode and amd-ucode below
// lib/firmware and usr/lib/firmware of root have. Where neither has any it fails
// with ErrNone.
func (c *Collection) AddFolder(root fs.FS) error {
	found := false
	for _, dir := range []string{"lib/firmware/amd-ucode", "lib/firmware/intel-ucode", "usr/lib/firmware/amd-ucode", "usr/lib/firmware/intel-ucode"} {
		entries, err := fs.ReadDir(root, dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read microcode: %w", err)
		}
		for _, e := range entries {
			name := path.Join(dir, e.Name())
			if !Wants(name) {
				continue
			}
			if err := c.addFile(root, name); err != nil {
				return err
			}
			found = true
		}
	}
	if !found {
		return fmt.Errorf("%w is in lib/firmware; install intel-microcode and amd64-microcode. %s", ErrNone, Enable)
	}
	return nil
}

func (c *Collection) addFile(root fs.FS, name string) error {
	f, err := root.Open(name)
	if err != nil {
		return fmt.Errorf("read microcode: %w", err)
	}
	defer f.Close()
	return c.Add(name, f)
}

// All is all that the collection has.
func (c *Collection) All() *Set { return c.choose(nil) }

// For is what of the collection the processors cpus can use; that may be
// nothing.
func (c *Collection) For(cpus []CPU) *Set {
	if cpus == nil {
		cpus = []CPU{}
	}
	return c.choose(cpus)
}

// choose takes what is for one of the processors; nil is for all.
func (c *Collection) choose(cpus []CPU) *Set {
	s := &Set{}
	// The order of the kernel's choice does not matter to it: it takes the
	// newest that fits. Ours must not depend on the order of the files.
	intel := slices.Clone(c.intel)
	slices.SortStableFunc(intel, func(a, b intelUpdate) int {
		return cmp.Or(cmp.Compare(a.targets[0].signature, b.targets[0].signature), cmp.Compare(a.targets[0].flags, b.targets[0].flags),
			cmp.Compare(a.revision, b.revision), bytes.Compare(a.bytes, b.bytes), cmp.Compare(a.file, b.file))
	})
	intel = slices.CompactFunc(intel, func(a, b intelUpdate) bool { return bytes.Equal(a.bytes, b.bytes) })
	for _, u := range intel {
		if cpus == nil || slices.ContainsFunc(cpus, u.fits) {
			s.Updates = append(s.Updates, u.update())
			s.intel = append(s.intel, u.bytes...)
		}
	}
	amd := slices.Clone(c.amd)
	slices.SortStableFunc(amd, func(a, b amdContainer) int { return cmp.Or(cmp.Compare(a.file, b.file), cmp.Compare(a.at, b.at)) })
	var have [][]byte
	for _, container := range amd {
		b, updates := container.trim(func(signature uint32) bool {
			return cpus == nil || slices.ContainsFunc(cpus, func(c CPU) bool { return c.Vendor == AMD && c.Signature == signature })
		})
		if len(updates) == 0 || slices.ContainsFunc(have, func(other []byte) bool { return bytes.Equal(b, other) }) {
			continue
		}
		have = append(have, b)
		s.Updates = append(s.Updates, updates...)
		s.amd = append(s.amd, b...)
	}
	return s
}

// bcd is a date as both vendors write it, in binary-coded decimal: mmddyyyy.
func bcd(date uint32) string {
	return fmt.Sprintf("%04x-%02x-%02x", date&0xffff, date>>24, date>>16&0xff)
}
