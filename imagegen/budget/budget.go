// Package budget computes the least memory with which a system boots.
//
// A system that does not fit fails in ways that do not tell so: the boot loader
// lets the kernel overwrite its initramfs, or the kernel unpacks a part and goes
// on with that. Whoever is to boot one should know before.
package budget

import (
	"iter"

	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/kernel"
)

// Need is the least memory of a PC, in MiB, as it is bought or given to QEMU.
type Need struct {
	BIOS int `json:"bios"` // with SeaBIOS and GRUB
	UEFI int `json:"uefi"` // with OVMF and GRUB
}

// Initramfs is what of an initramfs counts.
type Initramfs struct {
	Compressed  int64           // bytes of the file, with an early archive before it
	Compression string          // "zstd", "gzip" or "none"
	Sizes       iter.Seq[int64] // of all that is unpacked, in bytes; 0 for folders and links
	// Ramfs says that the kernel unpacks into a ramfs, of which no half of the
	// memory is the limit: it was built without CONFIG_TMPFS, or root= is on its
	// command line (Linux init/do_mounts.c, init_rootfs).
	Ramfs bool
}

// Sizes is what Initramfs needs to know of a tree.
func Sizes(t initramfs.Tree) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		for _, e := range t {
			if !yield(e.Size) {
				return
			}
		}
	}
}

const (
	mib  = 1 << 20
	page = 4096

	// inode is what the kernel keeps of each file besides its content: an inode
	// of tmpfs and a name in the cache, rounded up to 1 KiB.
	inode = 1 << 10
	// window is what unpacking zstd takes: the window of 8 MiB with which
	// imagegen compresses, and the decompressor's own (Linux lib/decompress_unzstd.c).
	window = 8*mib + mib/2

	// early is what the kernel has taken for itself besides its code when it
	// mounts its first file system; all measured had that much room in I.
	early = 2 * mib

	// grubBIOS is what GRUB keeps above the kernel that it has loaded, and what
	// SeaBIOS and ACPI keep at the end of memory; up to 2.0 MiB were seen.
	grubBIOS = 3 * mib

	// OVMF leaves nothing of use below ovmfLow and keeps ovmfHigh at the end of
	// memory; in all it keeps ovmfTaken. GRUB's heap lies below a free piece of
	// ovmfGap at that end. (GRUB's lsefimmap shows all that.)
	ovmfLow   = 21 * mib
	ovmfHigh  = 35 * mib
	ovmfGap   = 35 * mib
	ovmfTaken = 46 * mib
	gapSpare  = 3 * mib // of ovmfGap
	// ovmfKept is what of it the kernel, too, does not have yet when it mounts
	// its first file system; 39 to 42 MiB were seen.
	ovmfKept = 43 * mib
	// kernelAlign is that of the place where GRUB puts a kernel for UEFI.
	kernelAlign = 2 * mib
)

// Least computes the memory without which k does not boot with the initramfs i
// to the shell. It is that of the kernel, /init and a shell: what programs take
// besides comes on top, and so do modules once they are loaded, and about 1 MiB
// for each processor but the first.
//
// The following must fit, each at its time. I is init_size of the kernel's
// header: where it unpacks itself, until it has (Linux
// Documentation/arch/x86/boot.rst). C is the compressed and U the unpacked
// initramfs in whole pages.
//
// Placed by GRUB 2.06 under BIOS: the kernel unpacks itself from its load
// address on (16 MiB), over I bytes; behind that must lie the initramfs, C, and
// the compressed kernel, which GRUB loads at the end of memory
// (grub-core/loader/i386/pc/linux.c). Below it, the kernel spoils the initramfs:
// "Initramfs unpacking failed: invalid magic at start of compressed archive",
// and then it panics for want of a root, or runs with an empty one.
//
//	load address + I + C + compressed kernel + 3 MiB
//
// Placed by GRUB 2.06 under UEFI: a quarter of the free memory is its heap
// (kern/efi/mm.c), and above that a piece of 35 MiB is free. As OVMF keeps the
// kernel's own load address, GRUB looks for another place, and does not give
// back what it tried first: I counts twice, though one may lie above the heap
// (loader/i386/linux.c, lib/relocator.c). So does the initramfs, else it counts,
// too. Below it, GRUB says "couldn't load file" or "you need to load the kernel
// first".
//
//	(91 MiB for OVMF and GRUB + 2 I + 2 MiB) · 4/3 - 15 MiB, if C is at most 32 MiB
//
// Unpacked into a tmpfs, which holds half of the memory that is there when it is
// mounted (mm/shmem.c, shmem_default_max_blocks): all but the kernel with what it
// took, at most I + 2 MiB, and the compressed initramfs. As many pages as it may hold, so many files it
// may have. Below it: "Initramfs unpacking failed: write error", and the system
// goes on with a part.
//
//	I + 2 MiB + C + 2 U, and what OVMF keeps
//
// Unpacked at all: kernel, its own memory (which grew with its code: I/4 + 4 MiB
// are above all kernels measured), C, U and the decompressor's window. Below it
// the kernel panics: "System is deadlocked on memory".
//
//	5/4 I + 4 MiB + C + U + U/64 + 1 KiB for each file + window, and what OVMF keeps
//
// The kernel's table of pages takes 1/64 of all memory besides: a struct page of
// 64 bytes (include/linux/mm_types.h) for each 4096.
//
// Measured in QEMU 7.2 with three kernels of Linux 6.1 (I of 21, 51 and 64 MiB)
// it was never below the truth, and at most 13 MiB above it: see the test's table.
func Least(k kernel.Image, i Initramfs) Need {
	var files, unpacked int64
	for size := range i.Sizes {
		files++
		unpacked += (size + page - 1) / page * page
	}
	compressed := (i.Compressed + page - 1) / page * page

	bios := k.LoadAddress + k.InitSize + compressed + k.LoadSize + grubBIOS

	// Two times the kernel below GRUB's heap, or once there and once above it,
	// where the initramfs is if that leaves it room.
	behind := func(room int64) int64 {
		if compressed <= room {
			return 0
		}
		return compressed
	}
	uefi := kernelAlign + 2*k.InitSize + behind(ovmfGap-gapSpare)
	if room := ovmfGap - gapSpare - kernelAlign - k.InitSize; room >= 0 {
		uefi = min(uefi, k.InitSize+behind(room))
	}
	uefi += ovmfLow + ovmfHigh + ovmfGap
	// Of x MiB the heap is (x - ovmfTaken) / 4; the rest must be that much.
	uefi = (uefi*4 - ovmfTaken) / 3

	fits := k.InitSize*5/4 + 4*mib + compressed + unpacked + unpacked/64 + files*inode
	if i.Compression == "zstd" {
		fits += window
	}
	if !i.Ramfs {
		fits = max(fits, k.InitSize+early+compressed+2*max(unpacked, files*page))
	}
	// 1/64 of the whole is 1/63 of the rest.
	return Need{
		BIOS: ceil(max(bios, fits+fits/63)),
		UEFI: ceil(max(uefi, fits+fits/63+ovmfKept)),
	}
}

func ceil(bytes int64) int { return int((bytes + mib - 1) / mib) }
