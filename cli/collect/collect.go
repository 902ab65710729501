// Package collect makes the tar streams that a client sends to the daemon, with
// the rights of the user who calls it.
//
// [Payload] is what a recipe names: programs with all that they need to run,
// files, and overlay folders. [Rootfs] is a whole root tree: a folder, a tar, or a
// container image. Nothing of what is read is ever run.
//
// Both streams are in the PAX format. Times are 0 and there are no names of users.
// The record [WhyRecord] of an entry is a clause that says why it is there, and
// [CapsRecord] holds a program's capabilities. Folders that are only on the way to
// an entry are not in the stream. The same input gives the same bytes.
package collect

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"strings"
)

// Names of the PAX records.
const (
	WhyRecord  = "MEMLINUX.why"                     // a clause: why the entry is in the image
	CapsRecord = "SCHILY.xattr.security.capability" // the raw attribute (capabilities(7))
)

// MaxFile is the size of the largest file that is taken, in bytes: an initramfs
// can't hold a larger one.
const MaxFile = 1<<32 - 1

// Program is an ELF program of amd64, a shared library or a script. With it come
// its loader, its libraries and its interpreter.
type Program struct {
	From string       // on this machine
	To   string       // absolute path in the system; "" is From
	Mode *fs.FileMode // permissions, setuid, setgid, sticky; nil is what From has
	Line string       // how an error names it, as in "memlinux.toml:12"
}

// File is a single file.
type File struct {
	From     string       // on this machine; symlinks are followed
	Text     *string      // the content, if there is no From
	To       string       // absolute path in the system
	Mode     *fs.FileMode // nil is what From has, 0644 for a Text
	UID, GID int
	Line     string
}

// Overlay is a folder whose content is laid over the system; all of it belongs to
// root there.
type Overlay struct {
	From string // on this machine
	To   string // absolute path of a folder in the system; "" is /
	Line string
}

// Set is what a recipe names.
type Set struct {
	Programs []Program
	Files    []File
	Overlays []Overlay
}

// Progress is told how many bytes of content are through; total is 0 where it
// isn't known. It may be nil.
type Progress func(done, total int64)

// Summary is what a payload has.
type Summary struct {
	Entries int   // of the tar
	Bytes   int64 // content of its files
	Brought []Brought
	Special []Special
	Notes   []string // sentences: what was left out, or may be missing
}

// Brought is what came along with a program.
type Brought struct {
	For   string // the program's path in the system, without a slash in front
	What  string // "loader", "libraries", "interpreter", "standard library", "terminal descriptions"
	Files int    // symlinks are none
	Bytes int64
}

// Special is a file that gives who runs it more rights: it is setuid or setgid, or
// has capabilities.
type Special struct {
	Path     string
	Mode     fs.FileMode
	UID, GID int
	Caps     []byte // security.capability, raw
}

func (s Special) String() string {
	var is []string
	if s.Mode&fs.ModeSetuid != 0 {
		is = append(is, fmt.Sprintf("setuid of user %d", s.UID))
	}
	if s.Mode&fs.ModeSetgid != 0 {
		is = append(is, fmt.Sprintf("setgid of group %d", s.GID))
	}
	if s.Caps != nil {
		is = append(is, "allowed "+CapsText(s.Caps))
	}
	return s.Path + " is " + strings.Join(is, ", ")
}

// ProblemsError is everything that is wrong with a set, a sentence each.
type ProblemsError struct {
	Problems []string
}

func (e *ProblemsError) Error() string { return strings.Join(e.Problems, "\n") }

// Payload writes a tar with all of s, sorted by path, each path once. All that is
// wrong with s is found before the first byte is written, and returned as one
// *ProblemsError. The other errors name the file that changed or could not be
// read meanwhile, or are those of w.
func Payload(ctx context.Context, w io.Writer, s Set, progress Progress) (Summary, error) {
	c := newCollector(ctx)
	if err := c.collect(s); err != nil {
		return Summary{}, err
	}
	return c.write(ctx, w, progress)
}
