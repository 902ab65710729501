package daemon

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/imagegen/budget"
	"github.com/memlinux/memlinux/imagegen/kernel"
	"github.com/memlinux/memlinux/testvm"
)

// A manifest on a medium is whoever's wrote it, and says how much memory and time
// a virtual machine gets that proves the medium.

// mostPacked is how many bytes one byte of an initramfs can unpack to: a block of
// zstd has 128 KiB at most and takes 4 bytes at least (RFC 8878, 3.1.1.2), and
// deflate makes at most 258 bytes of 2 bits (RFC 1951).
var mostPacked = map[string]int64{"zstd": 128 << 10 / 4, "gzip": 258 * 4, "none": 1}

// mostUnpacked is larger than any system that has to fit in memory, in bytes.
const mostUnpacked = 1 << 38

// implausible says what of a manifest can't be, or is nil. Its kernel is k, and the
// sizes of its files are those on the medium. A memlinux of another version may
// have computed the memory in another way.
func implausible(m api.Manifest, k kernel.Image) error {
	in := m.Initramfs
	cant := func(format string, args ...any) error {
		return fmt.Errorf("%s says %s, which can't be: it was changed", stickManifest, fmt.Sprintf(format, args...))
	}
	most, known := mostPacked[in.Compression]
	switch {
	case !known:
		return cant("that the initramfs is compressed by %q", in.Compression)
	case in.Unpacked < 0 || in.Unpacked > mostUnpacked || in.Unpacked/most > in.Size:
		return cant("that an initramfs of %d bytes unpacks to %d", in.Size, in.Unpacked)
	case m.Microcode.Size < 0 || m.Microcode.Size > in.Size:
		return cant("that an initramfs of %d bytes has %d of microcode", in.Size, m.Microcode.Size)
	}
	sizes, sum := []int64{m.Microcode.Size}, int64(0)
	for _, f := range in.Files {
		if f.Size < 0 || f.Size > in.Unpacked-sum {
			return cant("that %s has %d bytes, and all of the initramfs %d", f.Path, f.Size, in.Unpacked)
		}
		sizes, sum = append(sizes, f.Size), sum+f.Size
	}
	need := budget.Least(k, budget.Initramfs{Compressed: in.Size, Compression: in.Compression, Sizes: slices.Values(sizes)})
	for _, c := range []struct {
		firmware      testvm.Firmware
		claimed, need int
	}{{testvm.BIOS, m.Memory.BIOS, need.BIOS}, {testvm.UEFI, m.Memory.UEFI, need.UEFI}} {
		if c.claimed/2 > c.need {
			return cant("that the system needs %d MiB of memory with %s, where %d are enough", c.claimed, strings.ToUpper(string(c.firmware)), c.need)
		}
	}
	return nil
}

// stickImage is the header of the kernel on a stick.
func stickImage(files fs.FS, size int64) (kernel.Image, error) {
	f, err := files.Open(stickKernel)
	if err != nil {
		return kernel.Image{}, fmt.Errorf("%s: %w", stickKernel, err)
	}
	defer f.Close()
	r, ok := f.(io.ReaderAt)
	if !ok {
		return kernel.Image{}, fmt.Errorf("%s: %w", stickKernel, errors.ErrUnsupported)
	}
	k, err := kernel.ParseImage(r, size)
	if err != nil {
		return k, fmt.Errorf("%s: %w", stickKernel, err)
	}
	return k, nil
}

// A system that a medium brings gets this share of the memory that is there at
// most: who works at this machine goes on with that.
const guestShare, ofMemory = 3, 4

// tooLarge says why a virtual machine for the system m can't be had in available
// bytes of memory, or is nil. A machine of usual MiB is always had.
func tooLarge(m api.Manifest, available int64, usual int) error {
	for _, fw := range firmwares {
		wanted := leastMemory(m, fw)
		if !slices.Contains(m.Boot, string(fw)) || wanted <= usual || int64(wanted) <= available>>20*guestShare/ofMemory {
			continue
		}
		return fmt.Errorf("not booted: the system wants %d MiB of memory with %s, and of the %d MiB that are available here a virtual machine gets %d at most; free some, or verify it on a machine with more",
			wanted, strings.ToUpper(string(fw)), available>>20, available>>20*guestShare/ofMemory)
	}
	return nil
}

// availableMemory is how many bytes programs can still have without others being
// swapped out (proc_meminfo(5), MemAvailable).
func availableMemory() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var kib int64
		if n, _ := fmt.Sscanf(lines.Text(), "MemAvailable: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, errors.New("/proc/meminfo does not say how much memory is available")
}
