// Package stick lays out a disk that PC BIOS and UEFI both boot, and looks at
// such a disk again.
//
// The layout: a protective MBR with GRUB's boot code, a GPT, a BIOS boot
// partition with GRUB's core image in front of the first MiB's end, and from
// 1 MiB on an EFI system partition (FAT32) with everything else. What is behind
// it stays free, so that few bytes are written however large the stick is.
// Sources: UEFI specification 2.10 §5.2 and §5.3; GRUB manual 2.06 §3.4
// "BIOS installation".
package stick

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"time"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/partition/gpt"

	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/fat32"
)

const (
	// CoreLBA is where GRUB's core image begins on a disk with 512-byte sectors:
	// right behind the partition table. The boot sector has to name it.
	CoreLBA = 34

	mib = 1 << 20

	// espOffset is where the EFI system partition begins, in bytes. GRUB's core
	// image has the room before it.
	espOffset = mib

	// MaxCore is the size in bytes of the largest core image.
	MaxCore = espOffset - CoreLBA*512

	// bootCodeSize is the part of an MBR that is code; the disk's signature and
	// the partition entries follow.
	bootCodeSize = 0x1b8

	// headroom stays free for what a user adds to the stick or edits on it.
	headroom = 4 * mib

	entryCount = 128 // entries of a GPT
	entrySize  = 128 // bytes of one
)

// LoaderForBIOS reads GRUB for a PC BIOS from a disk of this layout: the boot code,
// and all the room of the core image.
func LoaderForBIOS(disk io.ReaderAt) io.Reader {
	return io.MultiReader(io.NewSectionReader(disk, 0, bootCodeSize), io.NewSectionReader(disk, CoreLBA*512, MaxCore))
}

// Spec says what goes on a stick.
type Spec struct {
	Size       int64        // of the disk in bytes; 0: the least that fits
	SectorSize int          // 512 or 4096 bytes
	BootSector []byte       // GRUB's boot sector, 512 bytes; none for a disk that only UEFI boots
	Core       []byte       // GRUB's core image; goes with BootSector
	Files      []fat32.File // of the EFI system partition
	VolumeID   uint32       // of its file system, not 0; each stick needs another one, for GRUB finds it by it
	Label      string       // of its file system
	ModTime    time.Time    // of its label and of folders that are not in Files
	GUIDs      GUIDs
}

// GUIDs are the unique identifiers in a partition table, as text. An empty one
// becomes a random one.
type GUIDs struct{ Disk, BIOSBoot, ESP string }

// RandomGUIDs are fresh ones.
func RandomGUIDs() GUIDs {
	return GUIDs{Disk: randomGUID(), BIOSBoot: randomGUID(), ESP: randomGUID()}
}

// Image lays the stick out. The first MiB and the file system's metadata are in
// it in full, and zeros wherever else on the disk and in the partition an old
// signature could be found (media.Image.EraseSignatures), so that no old partition
// table, RAID member or file system is seen there. Not wiped, as they are not in the image: the
// rest of the file system's free clusters and of the space behind it.
//
// The error is a *media.NoSpaceError if Size is too small. Sticks with
// 4096-byte sectors can't be booted by a PC BIOS: BootSector and Core must be
// empty then.
func (s Spec) Image() (*media.Image, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	least, err := fat32.MinSize(s.SectorSize, s.Files)
	if err != nil {
		return nil, fmt.Errorf("stick: %w", err)
	}
	table := tableSize(s.SectorSize)
	need := espOffset + least + table
	size := s.Size
	if size == 0 {
		size = espOffset + roundUp(least+headroom, mib) + mib
	}
	if size < need {
		return nil, &media.NoSpaceError{Where: "the disk", Need: need, Have: size}
	}
	// As large as it may be, whole MiB unless the last bytes are needed.
	esp := min(roundUp(least+headroom, mib), roundDown(size-table-espOffset, mib))
	if esp < least {
		esp = roundDown(size-table-espOffset, int64(s.SectorSize))
	}

	volume := fat32.Volume{
		Size:          esp,
		SectorSize:    s.SectorSize,
		HiddenSectors: uint32(espOffset / s.SectorSize),
		ID:            s.VolumeID,
		Label:         s.Label,
		ModTime:       s.ModTime,
	}
	extents, err := volume.Build(s.Files)
	if err != nil {
		return nil, fmt.Errorf("stick: %w", err)
	}

	head := make([]byte, espOffset)
	tail := make([]byte, min(mib, size-espOffset-esp))
	if err := s.writeTable(head, tail, size, esp); err != nil {
		return nil, fmt.Errorf("stick: partition table: %w", err)
	}
	im := &media.Image{Size: size, SectorSize: s.SectorSize}
	im.Extents = append(im.Extents, media.Extent{Length: int64(len(head)), Content: bytes.NewReader(head)})
	for _, e := range extents {
		e.Offset += espOffset
		im.Extents = append(im.Extents, e)
	}
	im.Extents = append(im.Extents, media.Extent{Offset: size - int64(len(tail)), Length: int64(len(tail)), Content: bytes.NewReader(tail)})
	im.EraseSignatures(0, size)
	im.EraseSignatures(espOffset, esp)
	return im, im.Validate()
}

func (s Spec) check() error {
	bios := len(s.BootSector) > 0 || len(s.Core) > 0
	switch {
	case s.SectorSize != 512 && s.SectorSize != 4096:
		return fmt.Errorf("stick: sectors of %d bytes; 512 and 4096 are supported", s.SectorSize)
	case s.Size < 0 || s.Size%int64(s.SectorSize) != 0:
		return fmt.Errorf("stick: the size %d is not made of whole sectors", s.Size)
	case bios && s.SectorSize != 512:
		return errors.New("stick: a PC BIOS boots only from 512-byte sectors: leave out the boot sector and the core image")
	case bios && (len(s.BootSector) != 512 || len(s.Core) == 0):
		return errors.New("stick: a boot sector of 512 bytes and a core image go together")
	case len(s.Core) > MaxCore:
		return fmt.Errorf("stick: the core image has %d bytes, there is room for %d", len(s.Core), MaxCore)
	case s.VolumeID == 0:
		return errors.New("stick: the volume ID is 0, GRUB can't find the stick by that")
	}
	return nil
}

// tableSize is the size in bytes of the table at the disk's end: entries and
// header.
func tableSize(sector int) int64 { return entryCount*entrySize + int64(sector) }

// writeTable fills in the disk's first MiB and its last bytes.
func (s Spec) writeTable(head, tail []byte, size, esp int64) error {
	sector := int64(s.SectorSize)
	copy(head, s.BootSector[:min(bootCodeSize, len(s.BootSector))])
	copy(head[0x1be:], protectiveEntry(size/sector))
	head[510], head[511] = 0x55, 0xaa
	copy(head[CoreLBA*512:], s.Core) // nothing with 4096-byte sectors

	guids := [3]string{s.GUIDs.Disk, s.GUIDs.ESP, s.GUIDs.BIOSBoot}
	for i := range guids {
		if guids[i] == "" {
			guids[i] = randomGUID()
		}
	}
	var parts []*gpt.Partition
	if len(s.Core) > 0 {
		parts = append(parts, &gpt.Partition{
			Index: 1, Start: CoreLBA, End: espOffset/512 - 1,
			Type: gpt.BIOSBoot, Name: "BIOS boot", GUID: guids[2],
		})
	}
	parts = append(parts, &gpt.Partition{
		Index: len(parts) + 1,
		Start: uint64(espOffset / sector),
		End:   uint64((espOffset+esp)/sector) - 1,
		Type:  gpt.EFISystemPartition, Name: "EFI system", GUID: guids[1],
	})
	if err := checkPartitions(parts, s.SectorSize, size); err != nil {
		return err
	}
	table := gpt.Table{
		Partitions:         parts,
		LogicalSectorSize:  s.SectorSize, // 512 unless set, and the table would lie elsewhere
		PhysicalSectorSize: s.SectorSize,
		GUID:               guids[0],
		// The protective MBR is above: the library's own is wrong over 2 TiB.
		ProtectiveMBR: false,
	}
	return table.Write(&recorder{head: head, tail: tail, size: size}, size)
}

// protectiveEntry is the one partition entry of a protective MBR: it covers the
// disk, or as much of it as 32 bits can say (UEFI 2.10 §5.2.3).
func protectiveEntry(sectors int64) []byte {
	entry := []byte{0, 0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff}
	entry = binary.LittleEndian.AppendUint32(entry, 1)
	return binary.LittleEndian.AppendUint32(entry, uint32(min(sectors-1, math.MaxUint32)))
}

// checkPartitions makes the checks that the GPT library leaves out: each
// partition lies in the usable part, and none in another.
func checkPartitions(parts []*gpt.Partition, sector int, size int64) error {
	entries := uint64(entryCount * entrySize / sector)
	last := uint64(size/int64(sector)) - 2 - entries
	for i, p := range parts {
		if p.Start < 2+entries || p.End < p.Start || p.End > last {
			return fmt.Errorf("partition %d (LBA %d to %d) is not inside LBA %d to %d", p.Index, p.Start, p.End, 2+entries, last)
		}
		for _, q := range parts[:i] {
			if p.Start <= q.End && q.Start <= p.End {
				return fmt.Errorf("partitions %d and %d overlap", q.Index, p.Index)
			}
		}
	}
	return nil
}

// randomGUID is a version 4 UUID (RFC 9562 §5.4).
func randomGUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails, as its documentation says
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%X-%X-%X-%X-%X", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func roundUp(n, to int64) int64   { return (n + to - 1) / to * to }
func roundDown(n, to int64) int64 { return n / to * to }

// recorder is the disk that the GPT library writes on: its first and last bytes,
// in memory.
type recorder struct {
	head, tail []byte
	size       int64
}

var _ backend.WritableFile = (*recorder)(nil)

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	end := off + int64(len(p))
	tail := r.size - int64(len(r.tail))
	switch {
	case off >= 0 && end <= int64(len(r.head)):
		return copy(r.head[off:], p), nil
	case off >= tail && end <= r.size:
		return copy(r.tail[off-tail:], p), nil
	}
	return 0, fmt.Errorf("the GPT library wrote %d bytes at %d, where no table belongs", len(p), off)
}

// The rest is asked for by the library's interface only; it calls none of it.
func (r *recorder) Stat() (fs.FileInfo, error)        { return nil, errors.ErrUnsupported }
func (r *recorder) Read([]byte) (int, error)          { return 0, errors.ErrUnsupported }
func (r *recorder) Close() error                      { return nil }
func (r *recorder) Seek(int64, int) (int64, error)    { return 0, errors.ErrUnsupported }
func (r *recorder) ReadAt([]byte, int64) (int, error) { return 0, errors.ErrUnsupported }
