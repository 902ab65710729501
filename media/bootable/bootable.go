// Package bootable looks at a disk that somebody else made, for what a PC's firmware would
// start from it.
package bootable

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Found is what Look found.
type Found struct {
	BIOS string // why no BIOS starts this disk; "" where there is something to start
	UEFI string // likewise for UEFI on x86-64

	// Table is "GPT", "MBR", or "" where there is no partition table. A protective MBR
	// without its GPT is none.
	Table string
	// OtherSectors is the sector size that a GPT on the disk was made for, if it is not the
	// disk's own: no firmware and no system then reads it. Else 0.
	OtherSectors int
	// End is where the last of the partitions ends, in bytes; 0: there are none.
	End int64
}

var le = binary.LittleEndian

const (
	mbrCode    = 440 // bytes of boot code in a master boot record
	mbrEntries = 446 // four of 16 bytes
	protective = 0xee

	// What mkfs.fat puts where boot code would be: text that says that there is none.
	noBootCode = "This is not a bootable disk"

	discSector = 2048 // of ISO 9660 and El Torito
)

// maxPartitions bounds how many partitions are looked at.
const maxPartitions = 128

// errUnreadable tells a disk's errors from what does not look as expected.
var errUnreadable = errors.New("the disk can't be read")

// mostRead bounds what is read of a disk in bytes, however many partitions with however
// long folders it says that it has.
const mostRead = 32 << 20

// disk reads sectors.
type disk struct {
	r      io.ReaderAt
	size   int64
	sector int64
	left   *int64 // of mostRead
}

// read gives n bytes at off, or nil where the disk does not go so far, or enough was read.
func (d disk) read(off int64, n int) ([]byte, error) {
	if off < 0 || n < 0 || off > d.size-int64(n) || int64(n) > *d.left {
		return nil, nil
	}
	*d.left -= int64(n)
	p := make([]byte, n)
	if m, err := d.r.ReadAt(p, off); m < n {
		return nil, fmt.Errorf("%w: %w", errUnreadable, err)
	}
	return p, nil
}

// Look reads the partition tables of the disk r of size bytes, its boot sector, its El
// Torito catalogue, and the folder EFI/BOOT of each FAT file system. What is damaged counts as
// not there. The error says that the disk could not be read.
//
// Sources: UEFI 2.10 §5 (GPT), §13.3 (removable media), ECMA-119, El Torito 1.0.
func Look(r io.ReaderAt, size int64, sectorSize int) (Found, error) {
	left := int64(mostRead)
	d := disk{r, size, int64(sectorSize), &left}
	var f Found
	boot, err := d.read(0, 512)
	if err != nil || boot == nil {
		return Found{BIOS: nothing, UEFI: nothing}, err
	}
	parts, err := f.tables(d, boot)
	if err != nil {
		return f, err
	}
	for _, p := range parts {
		f.End = max(f.End, p.offset+p.length)
	}
	cd, err := d.elTorito()
	if err != nil {
		return f, err
	}
	f.BIOS = biosReason(boot, cd)

	volumes := append([]run{{0, size}}, parts...) // a file system may have no partition around it
	if cd.efi != 0 {
		volumes = append(volumes, run{cd.efi, size - cd.efi})
	}
	for _, v := range volumes {
		found, err := d.hasLoader(v)
		if found || err != nil {
			return f, err
		}
	}
	f.UEFI = "there is no EFI/BOOT/BOOTX64.EFI on it"
	return f, nil
}

const nothing = "there is nothing on it"

func biosReason(boot []byte, cd catalogue) string {
	switch {
	case le.Uint16(boot[510:]) == 0xaa55 && !allZero(boot[:mbrCode]):
		if bytes.Contains(boot, []byte(noBootCode)) {
			return "its boot sector only says that it is not bootable"
		}
		return ""
	case cd.bios:
		return "it is made for optical discs: a BIOS starts it from a CD, and not from a stick"
	}
	return "there is no boot code in its first sector"
}

func allZero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

// run is a part of the disk, in bytes.
type run struct{ offset, length int64 }

// tables reads the partition table.
func (f *Found) tables(d disk, boot []byte) (parts []run, err error) {
	for _, sector := range []int64{512, 4096} {
		header, err := d.read(sector, 92)
		if err != nil {
			return nil, err
		}
		if header == nil || string(header[:8]) != "EFI PART" {
			continue
		}
		if sector != d.sector {
			f.OtherSectors = int(sector)
			continue
		}
		f.Table, f.OtherSectors = "GPT", 0
		return d.gpt(header)
	}
	if le.Uint16(boot[510:]) != 0xaa55 {
		return nil, nil
	}
	for i := mbrEntries; i < 510; i += 16 {
		e := boot[i : i+16]
		start, length := int64(le.Uint32(e[8:])), int64(le.Uint32(e[12:]))
		if e[0]&0x7f != 0 { // neither active nor not: no table, but a file system's boot sector
			return nil, nil
		}
		if e[4] != 0 && e[4] != protective && length > 0 && start*d.sector < d.size {
			parts = append(parts, run{start * d.sector, length * d.sector})
		}
	}
	if len(parts) > 0 {
		f.Table = "MBR"
	}
	return parts, nil
}

func (d disk) gpt(header []byte) (parts []run, err error) {
	at, count, size := le.Uint64(header[72:]), le.Uint32(header[80:]), le.Uint32(header[84:])
	if size < 128 || size > 4096 || at > uint64(d.size/d.sector) {
		return nil, nil
	}
	entries, err := d.read(int64(at)*d.sector, int(min(count, maxPartitions)*size))
	if entries == nil {
		return nil, err
	}
	for ; len(entries) > 0; entries = entries[size:] {
		first, last := le.Uint64(entries[32:]), le.Uint64(entries[40:])
		if allZero(entries[:16]) || first > last || last >= uint64(d.size/d.sector) {
			continue
		}
		parts = append(parts, run{int64(first) * d.sector, int64(last-first+1) * d.sector})
	}
	return parts, nil
}

// catalogue is what an El Torito boot catalogue offers.
type catalogue struct {
	bios bool
	efi  int64 // where the file system for UEFI begins, in bytes; 0: none
}

// elTorito reads the boot catalogue (El Torito 1.0 §2, UEFI 2.10 §13.3.2.1).
func (d disk) elTorito() (c catalogue, err error) {
	record, err := d.read(17*discSector, discSector)
	if record == nil || string(record[:7]) != "\x00CD001\x01" || !bytes.HasPrefix(record[7:], []byte("EL TORITO SPECIFICATION")) {
		return c, err
	}
	entries, err := d.read(int64(le.Uint32(record[71:]))*discSector, discSector)
	if entries == nil || entries[0] != 1 || entries[30] != 0x55 || entries[31] != 0xaa {
		return c, err
	}
	const bootable, efi = 0x88, 0xef
	platform := entries[1]
	for i := 32; i < discSector; i += 32 {
		switch e := entries[i : i+32]; {
		case e[0] == 0x90 || e[0] == 0x91: // a section's header
			platform = e[1]
		case e[0] == bootable && platform == efi:
			c.efi = int64(le.Uint32(e[8:])) * discSector
		case e[0] == bootable && platform == 0:
			c.bios = true
		}
	}
	return c, nil
}
