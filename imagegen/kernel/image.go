// Package kernel reads Linux kernels: what a bzImage says about itself, the
// configuration it was built with, and what that configuration lacks for a
// system that lives in memory. It runs nothing and changes nothing.
package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// MaxSize bounds what is taken for a kernel, in bytes. Real ones are 4 to 100 MiB.
const MaxSize = 256 << 20

// Image is the header of a bzImage (Linux Documentation/arch/x86/boot.rst).
type Image struct {
	Release     string // "6.1.0-56-cloud-amd64"
	Version     string // the whole version line, which begins with Release
	Arch        string // "x86_64" or "i386"
	CommandLine int    // the longest command line it takes, in bytes without the NUL

	LoadSize    int64 // bytes of the file that a boot loader puts into memory: all but the setup code
	LoadAddress int64 // where in memory it unpacks itself, in bytes; above, if there is no room
	InitSize    int64 // bytes of memory from there on that it needs until it is unpacked

	payloadOffset, payloadLength int64 // the compressed vmlinux in the file
}

// Offsets of the setup header's fields in the file, boot.rst "The Real-Mode
// Kernel Header".
const (
	offSetupSects     = 0x1f1
	offSysSize        = 0x1f4
	offBootFlag       = 0x1fe
	offMagic          = 0x202
	offProtocol       = 0x206
	offKernelVersion  = 0x20e
	offLoadFlags      = 0x211
	offXLoadFlags     = 0x236
	offCmdlineSize    = 0x238
	offPayloadOffset  = 0x248
	offPayloadLength  = 0x24c
	offPrefAddress    = 0x258
	offInitSize       = 0x260
	headerEnd         = 0x264
	loadedHigh        = 1 << 0 // of LoadFlags: bzImage, not zImage
	xlfKernel64       = 1 << 0 // of XLoadFlags: has a 64-bit entry point
	minProtocol       = 0x20c  // the first with XLoadFlags: Linux 3.8
	maxVersionLine    = 512
	sectorSize        = 512
	defaultSetupSects = 4 // what 0 means, for history's sake
)

// ErrNotBzImage says that a file is no kernel that an x86 boot loader can load.
var ErrNotBzImage = errors.New("not a bzImage (the vmlinuz of an x86 kernel)")

// ParseImage reads the header of the kernel in the size bytes of r. For a file
// that is something else it fails with ErrNotBzImage and says what it is where
// it knows.
func ParseImage(r io.ReaderAt, size int64) (Image, error) {
	if size == 0 {
		return Image{}, fmt.Errorf("%w: the file is empty", ErrNotBzImage)
	}
	head := make([]byte, headerEnd)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Image{}, fmt.Errorf("read kernel header: %w", err)
	}
	le := binary.LittleEndian
	if n < headerEnd || le.Uint16(head[offBootFlag:]) != 0xaa55 || string(head[offMagic:offMagic+4]) != "HdrS" {
		return Image{}, fmt.Errorf("%w: %s", ErrNotBzImage, guess(head[:n]))
	}
	if p := le.Uint16(head[offProtocol:]); p < minProtocol {
		return Image{}, fmt.Errorf("the kernel is too old: its boot protocol is %d.%02d, and 2.12 (Linux 3.8) is needed", p>>8, p&0xff)
	}
	if head[offLoadFlags]&loadedHigh == 0 {
		return Image{}, fmt.Errorf("%w: a zImage", ErrNotBzImage)
	}
	im := Image{
		Arch: "i386", CommandLine: int(le.Uint32(head[offCmdlineSize:])),
		LoadSize: int64(le.Uint32(head[offSysSize:])) * 16, InitSize: int64(le.Uint32(head[offInitSize:])),
	}
	address := le.Uint64(head[offPrefAddress:])
	if address >= 1<<32 {
		return Image{}, fmt.Errorf("the kernel's header has the load address %#x, which no boot loader can reach", address)
	}
	im.LoadAddress = int64(address)
	if le.Uint16(head[offXLoadFlags:])&xlfKernel64 != 0 {
		im.Arch = "x86_64"
	}

	setup := int64(head[offSetupSects])
	if setup == 0 {
		setup = defaultSetupSects
	}
	code := (setup + 1) * sectorSize
	// The field counts 16-byte paragraphs, rounded up.
	end := code + im.LoadSize
	if size < end-15 {
		return Image{}, fmt.Errorf("the kernel is cut short: its header speaks of %d bytes, the file has %d; copy it again", end, size)
	}
	if offset, length := int64(le.Uint32(head[offPayloadOffset:])), int64(le.Uint32(head[offPayloadLength:])); offset+length <= size-code {
		im.payloadOffset, im.payloadLength = code+offset, length
	}

	at := int64(le.Uint16(head[offKernelVersion:]))
	if at == 0 {
		return Image{}, errors.New("the kernel's header has no version")
	}
	line := make([]byte, maxVersionLine)
	n, err = r.ReadAt(line, at+0x200)
	if err != nil && !errors.Is(err, io.EOF) {
		return Image{}, fmt.Errorf("read kernel version: %w", err)
	}
	im.Version, _, _ = strings.Cut(string(line[:n]), "\x00")
	im.Release, _, _ = strings.Cut(im.Version, " ")
	if !printable(im.Version) || !validRelease(im.Release) {
		return Image{}, fmt.Errorf("the kernel's header has the version %q, which is none", im.Version)
	}
	return im, nil
}

// guess names the kinds of file that people take for a bzImage.
func guess(head []byte) string {
	has := func(off int, magic string) bool {
		return len(head) >= off+len(magic) && string(head[off:off+len(magic)]) == magic
	}
	switch {
	case has(0, "\x7fELF"):
		return "it is an ELF file, as vmlinux is; use arch/x86/boot/bzImage of the same build"
	case has(0x38, "ARM\x64"):
		return "it is a kernel for arm64"
	case has(0x30, "RISCV\x00\x00\x00"):
		return "it is a kernel for RISC-V"
	case has(0, "\x1f\x8b"):
		return "it is a gzip file; if that is a kernel, unpack it first"
	case has(0, "\x28\xb5\x2f\xfd"):
		return "it is a zstd file; if that is a kernel, unpack it first"
	case has(0, "\x27\x05\x19\x56"):
		return "it is a U-Boot image"
	case has(0, "!<arch>\n"):
		return "it is a Debian package or library; use debian:PACKAGE"
	case has(0, "0707"):
		return "it is a cpio archive, as an initramfs is"
	case has(0, "MZ"):
		return "it is an EFI program without a kernel's header"
	}
	return "its header is not a kernel's"
}

func printable(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// validRelease keeps a release usable as the end of a file's name.
func validRelease(s string) bool {
	return s != "" && s[0] >= '0' && s[0] <= '9' && printable(s) && !strings.ContainsAny(s, "/ ")
}
