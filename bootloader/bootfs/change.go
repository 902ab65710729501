// Package bootfs changes the files of a mounted /boot so that a power cut, a
// kill or a full disk at any moment leaves each of them as it was or as it
// shall be, also in the eyes of a boot loader, which replays no journal.
package bootfs

// Kind is how a file is changed.
type Kind int

// The kinds. Replace gives the file's name to a new file in one step, or
// makes or removes it. InPlace writes over the bytes of a file that a boot
// loader writes to by its place on the disk: Old and New have one length, and
// the file stays where it is. Variable is an EFI variable in efivarfs, with its
// four bytes of attributes in front.
const (
	Replace Kind = iota
	InPlace
	Variable
)

// Change is one step on the machine's boot files.
type Change struct {
	Path     string // absolute
	Old, New []byte // the whole file; nil where it is not there
	Kind     Kind
}

// Payload is a file that boot entries load, under a name that says its content.
type Payload struct {
	Name   string // within its folder: "vmlinuz-0123456789ab"
	Source string // a file with the content
	Size   int64  // bytes
	SHA256 string // hex
}
