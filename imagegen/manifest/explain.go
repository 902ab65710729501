package manifest

import (
	"fmt"
	"path"
	"strings"
)

// Item is a line of the account of a system: something that takes bytes.
type Item struct {
	Path string `json:"path"` // in the system; "" for what is no file there
	What string `json:"what"` // "kernel", "microcode", "folder", "file", "link", "end of the archive"
	Why  string `json:"why"`
	Cost
}

// Account is what a system, or a part of it, takes.
type Account struct {
	Items []Item `json:"items"`
	Sum   Cost   `json:"sum"`
	// Size is that of the files kernel and initramfs, of which a whole account
	// is the sum; 0 in the account of a part.
	Size int64 `json:"size,omitempty"`
}

// Explain accounts for all of the system, or for the file or folder at name
// with all that is in it.
func (m Manifest) Explain(name string) (Account, error) {
	var a Account
	name = strings.Trim(path.Clean("/"+name), "/")
	if name == "" {
		a.Size = m.Kernel.Size + m.Initramfs.Size
		a.add(Item{What: "kernel", Why: "Linux " + m.Kernel.Release + " (" + m.Kernel.Source + ")", Cost: Cost{m.Kernel.Size, m.Kernel.Size}})
		if m.Microcode.Size > 0 {
			a.add(Item{What: "microcode", Why: fmt.Sprintf("%d updates of processors' microcode, which the kernel loads first of all", len(m.Microcode.Updates)),
				Cost: Cost{m.Microcode.Size, m.Microcode.Size}})
		}
	}
	for _, f := range m.Initramfs.Files {
		if name == "" || f.Path == name || strings.HasPrefix(f.Path, name+"/") {
			a.add(Item{Path: f.Path, What: f.what(), Why: f.Why, Cost: f.Cost})
		}
	}
	if name == "" {
		a.add(Item{What: "end of the archive", Why: "the newc format ends with it", Cost: m.Initramfs.Trailer})
		if a.Sum.Compressed != a.Size {
			return a, fmt.Errorf("the manifest accounts for %d bytes, and kernel and initramfs have %d: it is damaged", a.Sum.Compressed, a.Size)
		}
	}
	if len(a.Items) == 0 {
		return a, fmt.Errorf("nothing in the system is called /%s", name)
	}
	return a, nil
}

func (a *Account) add(i Item) {
	a.Items = append(a.Items, i)
	a.Sum.Raw += i.Raw
	a.Sum.Compressed += i.Compressed
}

// what names a file's type, of which mode(7) has the leading digits.
func (f File) what() string {
	switch {
	case strings.HasPrefix(f.Mode, "04"):
		return "folder"
	case strings.HasPrefix(f.Mode, "12"):
		return "link"
	case strings.HasPrefix(f.Mode, "01"):
		return "pipe"
	}
	return "file"
}
