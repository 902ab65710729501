package command

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/memlinux/memlinux/daemon/api"
)

// imageFlags name somebody else's image, to be written as it is.
type imageFlags struct{ image, sha256 string }

func (i *imageFlags) flags(c *cobra.Command) {
	c.Flags().StringVar(&i.image, "image", "", "write the disk image or ISO FILE, or - for what comes on stdin, as it is, instead of a system of memlinux; gzip, xz, zstd and bzip2 are decompressed")
	c.Flags().StringVar(&i.sha256, "sha256", "", "that the --image must have, as the file is given (default: as FILE.sha256 or SHA256SUMS beside it says, if there is one)")
}

// fromStdin is the name of an image that comes on stdin.
const fromStdin = "-"

// checkImage refuses flags that say nothing together. devices is how many targets
// are devices, file a target that is none.
func (w *writeFlags) checkImage(devices int, file string) error {
	switch given := w.given(); {
	case w.image == "" && w.sha256 != "":
		return usagef("--sha256 is the sum of an --image; the kernel's is --kernel-sha256")
	case w.image == "":
		return nil
	case len(given) > 0:
		return usagef("--image is written as it is, and --%s says what system to make: leave out one of them", strings.Join(given, ", --"))
	case w.checkCapacity:
		return usagef("--check-capacity writes nothing: leave out --image")
	case file != "":
		return usagef("--image is for a device, and %s is a file: copy or decompress the image there", file)
	case w.image == fromStdin && devices > 1:
		return usagef("an image from stdin can be written on one device only, and %d are given", devices)
	case w.image == fromStdin && term.IsTerminal(int(os.Stdin.Fd())):
		return usagef("--image - is what comes on stdin, and that is a terminal: put a pipe in front, or name the file")
	case w.image == fromStdin && !w.yes:
		return usagef("the image comes on stdin, so no answer can: say --yes if the device may be erased")
	}
	return nil
}

// openImage opens the image, and finds the sum that it must have.
func (g *global) openImage(w *writeFlags) (_ *opened, err error) {
	o := &opened{options: api.Properties{}}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	sum, from := strings.ToLower(w.sha256), "--sha256"
	if w.image == fromStdin {
		o.set(api.OptImage, fdOf(os.Stdin))
		g.image = api.Source{Name: "stdin"}
	} else {
		if isDir(w.image) {
			return nil, usagef("--image: %s is a folder", w.image)
		}
		if err := o.setFile(api.OptImage, "--image", w.image); err != nil {
			return nil, err
		}
		if sum == "" {
			if sum, from, err = findSum(w.image); err != nil {
				return nil, err
			}
		}
		g.image = api.Source{Name: filepath.Base(w.image)}
	}
	if sum == "" {
		return o, nil
	}
	if b, err := hex.DecodeString(sum); err != nil || len(b) != 32 {
		return nil, usagef("--sha256 is %q; it must be 64 hexadecimal digits", w.sha256)
	}
	o.set(api.OptSHA256, sum)
	g.image.From = from
	return o, nil
}

// nameSource adds to a report what only this side knows of somebody else's image.
func (g *global) nameSource(r *api.Report) {
	if r != nil && r.Image != nil && r.Image.Source != nil {
		r.Image.Source.Name, r.Image.Source.From = g.image.Name, g.image.From
	}
}

// seenAfter is when something was seen, if it was.
func seenAfter(what string, seconds float64) string {
	if seconds == 0 {
		return ""
	}
	return fmt.Sprintf("%s %.1f s ", what, seconds)
}

// rowsOfSource tells of somebody else's image.
func rowsOfSource(im *api.Image, row func(key, format string, args ...any)) {
	s := im.Source
	what := size(s.Bytes)
	if s.Format != "raw" {
		what += " of " + s.Format
		if im.Size > 0 {
			what = size(im.Size) + " in " + what
		}
	}
	row("image", "%s, %s", printable(s.Name), what)
	switch {
	case s.SHA256 == "":
	case s.Expected == "":
		row("", "sha256 %s, held against no sum: none was given, and none is beside it", s.SHA256)
	case s.SHA256 == s.Expected:
		row("", "sha256 %s, as %s says", s.SHA256, printable(s.From))
	default:
		row("", "sha256 %s, and %s says %s", s.SHA256, printable(s.From), s.Expected)
	}
	if im.SHA256Written != "" && im.SHA256Written != s.SHA256 {
		row("", "sha256 %s of what was written", im.SHA256Written)
	}
}
