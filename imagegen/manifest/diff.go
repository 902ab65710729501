package manifest

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Change is something in which two systems differ.
type Change struct {
	What   string `json:"what"`             // "kernel", "command line", "file", …
	Path   string `json:"path,omitempty"`   // of a file
	Before string `json:"before,omitempty"` // "" for what is new
	After  string `json:"after,omitempty"`  // "" for what is gone
	Bytes  int64  `json:"bytes,omitempty"`  // how much more it takes, compressed
}

// Diff lists the differences from a to b, files last and by path.
func Diff(a, b Manifest) []Change {
	var out []Change
	note := func(what, before, after string, bytes int64) {
		if before != after {
			out = append(out, Change{What: what, Before: before, After: after, Bytes: bytes})
		}
	}
	note("system", a.ID, b.ID, 0)
	note("command line", a.Cmdline, b.Cmdline, 0)
	note("boot", strings.Join(a.Boot, ", "), strings.Join(b.Boot, ", "), 0)
	note("kernel", a.Kernel.text(), b.Kernel.text(), b.Kernel.Size-a.Kernel.Size)
	note("kernel lacks", strings.Join(a.Kernel.Missing, "; "), strings.Join(b.Kernel.Missing, "; "), 0)
	note("modules", strings.Join(a.Modules.Sets, ", "), strings.Join(b.Modules.Sets, ", "), 0)
	note("microcode", a.Microcode.text(), b.Microcode.text(), b.Microcode.Size-a.Microcode.Size)
	note("busybox", a.Busybox.text(), b.Busybox.text(), 0)
	note("compression", a.Initramfs.compression(), b.Initramfs.compression(), 0)
	note("initramfs", fmt.Sprintf("%d bytes", a.Initramfs.Size), fmt.Sprintf("%d bytes", b.Initramfs.Size), b.Initramfs.Size-a.Initramfs.Size)
	note("least memory", a.Memory.text(), b.Memory.text(), 0)

	before := map[string]File{}
	for _, f := range a.Initramfs.Files {
		before[f.Path] = f
	}
	var files []Change
	for _, f := range b.Initramfs.Files {
		old, was := before[f.Path]
		delete(before, f.Path)
		switch {
		case !was:
			files = append(files, Change{What: f.what(), Path: f.Path, After: f.text(), Bytes: f.Compressed})
		case old.content() != f.content():
			files = append(files, Change{What: f.what(), Path: f.Path, Before: old.text(), After: f.text(), Bytes: f.Compressed - old.Compressed})
		}
	}
	for _, f := range before {
		files = append(files, Change{What: f.what(), Path: f.Path, Before: f.text(), Bytes: -f.Compressed})
	}
	slices.SortFunc(files, func(x, y Change) int { return cmp.Compare(x.Path, y.Path) })
	return append(out, files...)
}

func (k Kernel) text() string {
	return fmt.Sprintf("%s (%s), sha256 %s", k.Release, k.Source, short(k.SHA256))
}

func (m Memory) text() string { return fmt.Sprintf("%d MiB, with UEFI %d MiB", m.BIOS, m.UEFI) }

func (m Microcode) text() string {
	if m.Size == 0 {
		return "none"
	}
	revisions := make([]string, len(m.Updates))
	for i, u := range m.Updates {
		revisions[i] = string(u.Vendor) + " " + strings.Join(u.Signatures, "+") + " " + u.Revision
	}
	slices.Sort(revisions)
	return strings.Join(revisions, ", ")
}

func (b Busybox) text() string { return fmt.Sprintf("%s, sha256 %s", b.Version, short(b.SHA256)) }

func (i Initramfs) compression() string {
	if i.Level == 0 {
		return i.Compression
	}
	return fmt.Sprintf("%s, level %d", i.Compression, i.Level)
}

// content is all of a file that the booted system could tell.
func (f File) content() File {
	f.Why, f.Cost = "", Cost{}
	return f
}

// text is content for a person.
func (f File) text() string {
	s := "mode " + f.Mode
	if f.UID != 0 || f.GID != 0 {
		s += fmt.Sprintf(", owner %d:%d", f.UID, f.GID)
	}
	if f.Capabilities != "" {
		s += ", " + f.Capabilities
	}
	switch {
	case f.Link != "":
		return s + ", to " + f.Link
	case f.HardLink != "":
		return s + ", the same file as " + f.HardLink
	case f.SHA256 != "":
		return s + fmt.Sprintf(", %d bytes, sha256 %s", f.Size, short(f.SHA256))
	}
	return s
}

// short is as much of a digest as a person compares.
func short(digest string) string { return digest[:min(12, len(digest))] }
