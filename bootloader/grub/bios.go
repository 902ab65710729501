package grub

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
)

// sectorSize is the one BIOS disk calls count in, whatever the disk's own is.
const sectorSize = 512

// maxCoreSectors is the room of the BIOS boot partition, LBA 34 to 2047.
const maxCoreSectors = 2014

// BIOS is GRUB for a BIOS, not yet bound to a place on a disk.
type BIOS struct {
	boot []byte // boot.img, 512 bytes
	core []byte // core.img, as grub-mkimage wrote it
}

// MakeBIOS makes GRUB for a BIOS. It shows the menu.lst of the FAT32 partition
// with that volume ID. The same volume ID and GRUB version give the same bytes.
// The error is a *[MissingError] where a piece of GRUB is not installed.
func MakeBIOS(ctx context.Context, launch Launcher, volumeID uint32) (BIOS, error) {
	const pkg = "grub-pc-bin"
	if err := present(biosDir, "boot.img", pkg); err != nil {
		return BIOS{}, err
	}
	boot, err := os.ReadFile(filepath.Join(biosDir, "boot.img"))
	if err != nil {
		return BIOS{}, fmt.Errorf("read GRUB's boot sector: %w", err)
	}
	if len(boot) != sectorSize {
		return BIOS{}, fmt.Errorf("GRUB's boot sector %s/boot.img has %d bytes, not 512: install %s anew", biosDir, len(boot), pkg)
	}
	core, err := image{"i386-pc", biosDir, pkg, biosPrefix, biosConfig(volumeID), biosModules}.make(ctx, launch)
	if err != nil {
		return BIOS{}, err
	}
	if n := sectors(core); n < 2 || n > maxCoreSectors {
		return BIOS{}, fmt.Errorf("GRUB's core.img has %d sectors; the BIOS boot partition holds 2 to %d", n, maxCoreSectors)
	}
	return BIOS{boot, core}, nil
}

func sectors(b []byte) int { return (len(b) + sectorSize - 1) / sectorSize }

// Fields of boot.img and of the first sector of core.img (diskboot.S), little
// endian: GRUB 2.06, include/grub/i386/pc/boot.h and
// include/grub/offsets.h, as grub-bios-setup fills them in.
const (
	bootKernelSector = 0x5c  // u64: LBA of core.img
	bootDrive        = 0x64  // u8: 0xff for the drive that the BIOS booted
	bootDriveCheck   = 0x66  // u16: two nops, so that the BIOS's drive number is believed
	bootKept         = 0x1b8 // up to the signature: the disk signature and partition table
	bootSignature    = 0x1fe

	blocklist        = 0x1e8 // up to the sector's end: the block list; the last entry is the first 12 bytes
	blocklistStart   = 0x1f4 // u64: LBA of the rest of core.img
	blocklistLength  = 0x1fc // u16: its length in sectors
	blocklistSegment = 0x1fe // u16: where it goes in memory, in 16-byte units
	coreSegment      = 0x820
)

// Embed binds GRUB to a disk on which core.img will lie at lba, counted in
// 512-byte sectors from 1. core is whole sectors, at most 2014 of them, to be
// written there. bootSector is the 512 bytes of LBA 0, with zeros from 0x1b8 to
// 0x1fd, where the caller puts the disk's own signature and partition table.
//
// The result is the same as that of grub-bios-setup -s --no-rs-codes.
func (b BIOS) Embed(lba uint64) (bootSector, core []byte, err error) {
	if len(b.boot) != sectorSize || len(b.core) <= sectorSize {
		return nil, nil, fmt.Errorf("embed GRUB: it was not made by MakeBIOS")
	}
	if lba == 0 {
		return nil, nil, fmt.Errorf("embed GRUB: core.img can't lie at LBA 0, where the boot sector is")
	}
	n := sectors(b.core)
	le := binary.LittleEndian

	bootSector = make([]byte, sectorSize)
	copy(bootSector, b.boot)
	le.PutUint64(bootSector[bootKernelSector:], lba)
	bootSector[bootDrive] = 0xff
	bootSector[bootDriveCheck], bootSector[bootDriveCheck+1] = 0x90, 0x90
	clear(bootSector[bootKept:bootSignature])
	bootSector[bootSignature], bootSector[bootSignature+1] = 0x55, 0xaa

	core = make([]byte, n*sectorSize)
	copy(core, b.core)
	clear(core[blocklist:blocklistStart])
	le.PutUint64(core[blocklistStart:], lba+1)
	le.PutUint16(core[blocklistLength:], uint16(n-1))
	le.PutUint16(core[blocklistSegment:], coreSegment)
	return bootSector, core, nil
}
