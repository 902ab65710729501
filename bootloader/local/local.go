// Package local knows the boot loader of this machine: which one it is, what
// its menu says, and what would have to change for other entries of ours. It
// looks and plans; nothing here writes.
package local

import (
	"github.com/memlinux/memlinux/bootloader/bootfs"
)

// Entry is a boot entry of memlinux.
type Entry struct {
	ID      string `json:"id"`     // the system's build ID, 16 hex digits
	Title   string `json:"title"`  // what the menu shows
	Kernel  string `json:"kernel"` // file name within Boot.Dir
	Initrd  string `json:"initrd"` // file name within Boot.Dir
	Cmdline string `json:"cmdline"`
}

// Ours is all that memlinux has in a boot menu, or shall have.
type Ours struct {
	Entries []Entry `json:"entries"` // in their order
	Default string  `json:"default"` // ID of the entry that boots by itself; "": not one of ours
	Next    string  `json:"next"`    // ID of the entry that the next boot, and only that, takes; "": not one of ours
}

// Other is an entry that is not ours.
type Other struct {
	Title   string
	Default bool // it boots by itself
	Next    bool // the next boot takes it, once
}

// Menu is a boot menu as it is.
type Menu struct {
	Ours     Ours
	Others   []Other  // as far as they can be known without running the loader
	Warnings []string // such as lines that the loader ignores
}

// Loader is a boot loader with its configuration.
type Loader interface {
	// Name is what a person calls it: GRUB 2, GRUB Legacy, systemd-boot.
	Name() string
	// Folders are those that its files lie in, besides Boot.Dir.
	Folders() []string
	// Menu reads the configuration.
	Menu() (Menu, error)
	// Plan says which changes make the menu hold want and nothing else of ours,
	// in an order in which the machine boots after each of them. No change is
	// an empty plan. A want that this loader can't be given is an
	// *UnsupportedError, before anything is changed.
	Plan(want Ours) ([]bootfs.Change, error)
	// Once says what makes the loader, in a copy of the disk and of the
	// machine's EFI variables, boot the entry with that ID by itself and soon.
	Once(id string) (Once, error)
}

// Once is what has to differ in a copy of the machine.
type Once struct {
	Files     []Patch
	Variables []Variable
}

// Patch is other content of the same length for a file.
type Patch struct {
	Path string
	New  []byte
}

// Variable is an EFI variable.
type Variable struct {
	Name, GUID string // GUID as 8be4df61-93ca-11d2-aa0d-00e098032b8c
	Attributes uint32
	Data       []byte
}

// UnsupportedError says why this machine can't be given what was asked for, and
// the way out.
type UnsupportedError struct{ Reason string }

func (e *UnsupportedError) Error() string { return e.Reason }
