package microcode

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"time"
)

// Set is microcode that goes along.
type Set struct {
	Updates []Update // in the order in which they are written

	intel, amd []byte
}

// Empty reports whether there is nothing to pack.
func (s *Set) Empty() bool { return len(s.Updates) == 0 }

// Size is how many bytes Pack writes.
func (s *Set) Size() int64 {
	var n count
	_ = s.Pack(&n, time.Unix(0, 0)) // counting can't fail
	return int64(n)
}

type count int64

func (c *count) Write(p []byte) (int, error) {
	*c += count(len(p))
	return len(p), nil
}

// dir is where the kernel looks for the files GenuineIntel.bin and
// AuthenticAMD.bin (Linux Documentation/arch/x86/microcode.rst, "Early load
// microcode").
const dir = "kernel/x86/microcode"

const (
	fileMode = 0o100644
	dirMode  = 0o040755
	// block is what cpio archives are rounded up to. The kernel needs 4 for an
	// archive behind this one and takes any number of zero bytes between two.
	block = 512
	// align is that of an Intel update in memory, SDM vol. 3A §10.11.6: the
	// kernel has the processor read it where the boot loader put it, which is at
	// the begin of a page.
	align = 16
)

// Pack writes the early initramfs: an uncompressed newc archive (Linux
// Documentation/driver-api/early-userspace/buffer-format.rst) in which
// everything is from the moment epoch, which lies in 1970 to 2106. The real
// initramfs, compressed or not, follows it directly. An empty set writes
// nothing.
//
// It is no archive of package initramfs, because the kernel finds the updates
// before it has memory to unpack them into, at their place in the archive: they
// have to be aligned there.
func (s *Set) Pack(w io.Writer, epoch time.Time) error {
	if s.Empty() {
		return nil
	}
	seconds := epoch.Unix()
	if seconds < 0 || seconds >= 1<<32 {
		return fmt.Errorf("write microcode: the date %s is not in 1970 to 2106", epoch.UTC().Format(time.DateOnly))
	}
	a := archive{w: bufio.NewWriter(w), seconds: seconds}
	for i, c := range dir + "/" {
		if c == '/' {
			a.entry(dir[:i], dirMode, 2, nil)
		}
	}
	for _, f := range []struct {
		vendor  Vendor
		content []byte
	}{{AMD, s.amd}, {Intel, s.intel}} {
		if len(f.content) > 0 {
			a.entry(dir+"/"+string(f.vendor)+".bin", fileMode, 1, f.content)
		}
	}
	a.entry("TRAILER!!!", 0, 1, nil)
	a.pad(block)
	if err := a.w.Flush(); err != nil {
		return fmt.Errorf("write microcode: %w", err)
	}
	return nil
}

// archive writes the newc format. Its writer keeps the first error.
type archive struct {
	w       *bufio.Writer
	seconds int64
	at      int
	ino     int
}

const newcHeader = 110 // bytes

func (a *archive) entry(name string, mode, links int, content []byte) {
	nul := 1
	if len(content) > 0 {
		// More NULs behind the name move the content; readers take the name
		// up to the first.
		nul += (align - (a.at+newcHeader+len(name)+nul)%align) % align
	}
	a.ino++
	ino, seconds := a.ino, a.seconds
	if mode == 0 {
		ino, seconds = 0, 0 // the trailer
	}
	a.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		ino, mode, 0, 0, links, seconds, len(content), 0, 0, 0, 0, len(name)+nul, 0))
	a.write([]byte(name + strings.Repeat("\x00", nul)))
	a.pad(4)
	a.write(content)
	a.pad(4)
}

func (a *archive) write(b []byte) {
	n, _ := a.w.Write(b) // Flush says what went wrong
	a.at += n
}

func (a *archive) pad(to int) { a.write(make([]byte, (to-a.at%to)%to)) }
