// Package blockdev knows the disks of this machine: what they are, what is on
// them, every reason not to write one, and how to open one so that it is still
// the disk that was looked at.
//
// What the kernel says is read from sysfs and procfs; disks are told apart by
// their device numbers, never by the start of a name ("sda" is also how "sdaa"
// begins). What can't be read or understood is a reason to refuse.
package blockdev

import (
	"context"
	"strings"
	"unicode"
	"unicode/utf8"
)

// System says where the kernel shows its devices. The zero value is the
// running machine; tests put a recorded machine there.
//
// Its methods name a disk as the kernel does (sda, nvme0n1, cciss/c0d0), never
// by a path. Who has a path asks sysfs for the name behind the node's device
// number (/sys/dev/block/MAJOR:MINOR), so that no link leads astray.
type System struct {
	Sys  string // "/sys" if empty
	Proc string // "/proc" if empty
	Dev  string // "/dev" if empty

	// Unmount, where there is one, unmounts what is mounted at point in the first
	// process's mount namespace: for a process that may not enter that itself. It
	// can unmount all that is mounted there, one over the other.
	Unmount func(ctx context.Context, point string) error
}

func (s System) sys() string  { return orElse(s.Sys, "/sys") }
func (s System) proc() string { return orElse(s.Proc, "/proc") }
func (s System) dev() string  { return orElse(s.Dev, "/dev") }

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// Device is a disk as the kernel shows it, and what speaks against writing it.
type Device struct {
	Name             string // the kernel's: sda, nvme0n1
	Path             string // its node: /dev/sda
	Major, Minor     uint32
	Size             int64 // bytes
	LogicalBlockSize int   // bytes
	Vendor, Model    string
	Serial           string
	Transport        string // usb, nvme, ata, scsi, mmc, virtio, xen, nbd, loop, device-mapper, md, …; "" if unknown
	Removable        bool   // a USB disk, an SD card, or a medium that can be taken out
	ReadOnly         bool
	DiskSeq          uint64    // counts each disk the kernel has met; 0 before Linux 5.15
	Contents         []Content // of the disk and its partitions; only from Devices and Device
	Reasons          []Reason  // all of them; empty: the disk may be written
	Backing          string    // a loop device's file

	// mounted: a file system on the disk itself, not on a partition, is mounted
	// and writes where partition tables lie.
	mounted bool
}

// Content is what lies on a disk or a partition, as blkid's probe sees it.
type Content struct {
	Name      string // sda or sda1
	Size      int64  // bytes
	Type      string // file system (ext4, vfat, …) or partition table (gpt, dos); "" if nothing is known
	Label     string // the file system's
	UUID      string // the file system's or the table's
	PartLabel string // the partition's own name
}

// Reason is one reason not to write a disk. Code is one of the constants, for
// programs; Text is a sentence for a person.
type Reason struct {
	Code, Text string
	// Soft: the disk could be written, but it is hardly the one that is meant. A
	// person who types its serial lifts it ([Terms]); nothing lifts any other.
	Soft bool
}

// The codes of reasons. Only ReasonNotRemovable and ReasonTooLarge are soft.
const (
	ReasonSystem       = "system"        // the running system's /, /boot, /usr, /var, /home or the like is on it
	ReasonSource       = "source"        // what is to be written is read from it
	ReasonMounted      = "mounted"       // it or a part of it is mounted
	ReasonSwap         = "swap"          // it holds swap space in use
	ReasonHeld         = "held"          // device mapper, md or a loop device uses it
	ReasonPartition    = "partition"     // it is only a part of a disk
	ReasonIndirect     = "indirect"      // it is another device under a second name
	ReasonReadOnly     = "read-only"     // the kernel or a switch forbids writing
	ReasonNotRemovable = "not-removable" // it is built in
	ReasonTooLarge     = "too-large"     // it is larger than sticks and cards are
	ReasonEmpty        = "empty"         // no medium is in it
	ReasonUnsupported  = "unsupported"   // an optical or floppy drive, zones, or sectors that no stick has
	ReasonUnknown      = "unknown"       // the kernel does not say what has to be known
	ReasonBusy         = "busy"          // a program has it open, or uses what is mounted of it
)

// Clean makes a name that a device or its user chose fit to be printed:
// control characters, marks that turn the direction of text and what is not
// UTF-8 are dropped, and it is cut at 64 characters.
func Clean(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == utf8.RuneError, r == 0xfeff:
			return -1
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r): // also drops Cf: direction and joining marks
			return -1
		}
		return r
	}, s)
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > 64 {
		s = strings.TrimSuffix(string(r[:64]), " ")
	}
	return s
}
