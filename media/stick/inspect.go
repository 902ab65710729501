package stick

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math"
	"os"
	"strings"
	"sync"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/partition/gpt"
)

// Stick is a disk that has the layout of this package, whoever made it.
type Stick struct {
	Size       int64 // of the disk in bytes
	SectorSize int   // bytes
	DiskGUID   string
	Partitions []Partition
	ESP        Partition // the EFI system partition, one of Partitions
	BIOS       bool      // there are boot code and a BIOS boot partition
	VolumeID   uint32    // of the file system in the ESP
	Label      string    // likewise

	files *volume
}

// Partition is an entry of the partition table.
type Partition struct {
	Number int // from 1
	Type   string
	GUID   string
	Name   string
	Offset int64 // bytes
	Size   int64 // bytes
}

// FS is the file system of the EFI system partition, read-only. Names are
// found whatever their case, as FAT does. A file that was opened is an
// io.ReaderAt and io.Seeker too; it reads from the disk each time, and each
// error of the disk is its error.
func (s *Stick) FS() fs.FS { return s.files }

var le = binary.LittleEndian

// Inspect reads a disk of size bytes through r and checks that it has the
// layout of this package: the protective MBR, both partition tables with their
// checksums, partitions that lie on the disk and not in each other, and in the
// EFI system partition a FAT32 file system whose FATs are alike and whose
// cluster chains are sound and whose folders can be read. The error says what
// is wrong. Files' contents are not read. It never writes, and whatever is on
// the disk, it needs no more than some 150 MiB of memory, for a large FAT.
func Inspect(r io.ReaderAt, size int64, sectorSize int) (*Stick, error) {
	s, err := inspect(&source{r: r, size: size, budget: math.MaxInt64}, size, sectorSize)
	if err != nil {
		return nil, fmt.Errorf("stick: %w", err)
	}
	return s, nil
}

func inspect(src *source, size int64, sector int) (*Stick, error) {
	if sector != 512 && sector != 4096 {
		return nil, fmt.Errorf("sectors of %d bytes; 512 and 4096 are supported", sector)
	}
	if size%int64(sector) != 0 || size < espOffset+tableSize(sector) {
		return nil, fmt.Errorf("a disk of %d bytes is too small for the layout or has no whole sectors", size)
	}
	bootCode, err := checkMBR(src, size/int64(sector))
	if err != nil {
		return nil, fmt.Errorf("protective MBR: %w", err)
	}
	if err := checkHeaders(src, size, sector); err != nil {
		return nil, err
	}
	table, err := gpt.Read(src, sector, sector)
	if err != nil {
		return nil, fmt.Errorf("partition table: %w", err)
	}
	if err := checkPartitions(table.Partitions, sector, size); err != nil {
		return nil, fmt.Errorf("partition table: %w", err)
	}

	s := &Stick{Size: size, SectorSize: sector, DiskGUID: strings.ToUpper(table.GUID)}
	for _, p := range table.Partitions {
		part := Partition{
			Number: p.Index,
			Type:   string(p.Type),
			GUID:   p.GUID,
			Name:   p.Name,
			Offset: int64(p.Start) * int64(sector),
			Size:   int64(p.End-p.Start+1) * int64(sector),
		}
		s.Partitions = append(s.Partitions, part)
		switch p.Type {
		case gpt.EFISystemPartition:
			if s.ESP.Number != 0 {
				return nil, fmt.Errorf("partitions %d and %d are both EFI system partitions", s.ESP.Number, p.Index)
			}
			s.ESP = part
		case gpt.BIOSBoot:
			s.BIOS = bootCode
		}
	}
	if s.ESP.Number == 0 {
		return nil, errors.New("there is no EFI system partition")
	}
	if s.files, err = openVolume(src, s.ESP, sector); err != nil {
		return nil, fmt.Errorf("EFI system partition: %w", err)
	}
	s.VolumeID, s.Label = s.files.id, s.files.label
	return s, nil
}

// checkMBR looks for exactly one entry, which covers the disk (UEFI 2.10
// §5.2.3), and tells whether there is boot code.
func checkMBR(src *source, sectors int64) (bootCode bool, err error) {
	mbr := make([]byte, 512)
	if err := src.read(mbr, 0); err != nil {
		return false, err
	}
	if mbr[510] != 0x55 || mbr[511] != 0xaa {
		return false, errors.New("the disk's first sector is not a boot sector")
	}
	want := protectiveEntry(sectors)
	entry := mbr[0x1be:0x1ce]
	// The addresses in cylinders, heads and sectors mean nothing.
	if entry[4] != want[4] || !bytes.Equal(entry[8:], want[8:]) {
		return false, errors.New("its first entry does not cover the disk as type 0xEE")
	}
	if !zero(mbr[0x1ce:510]) {
		return false, errors.New("it has more than one entry")
	}
	return !zero(mbr[:bootCodeSize]), nil
}

func zero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// checkHeaders checks both GPT headers and their entries (UEFI 2.10 §5.3.2)
// before the GPT library, which believes in their sizes, sees them.
func checkHeaders(src *source, size int64, sector int) error {
	last := size/int64(sector) - 1
	entries := int64(entryCount * entrySize / sector)
	var seen [2][]byte
	for i, h := range []struct {
		name               string
		lba, other, entLBA int64
	}{
		{"primary", 1, last, 2},
		{"backup", last, 1, last - entries},
	} {
		b := make([]byte, sector)
		if err := src.read(b, h.lba*int64(sector)); err != nil {
			return fmt.Errorf("%s partition table: %w", h.name, err)
		}
		if string(b[:8]) != "EFI PART" || le.Uint32(b[8:]) != 0x00010000 || le.Uint32(b[12:]) != 92 {
			return fmt.Errorf("%s partition table: there is no GPT header at LBA %d", h.name, h.lba)
		}
		sum := le.Uint32(b[16:])
		clear(b[16:20])
		if crc32.ChecksumIEEE(b[:92]) != sum {
			return fmt.Errorf("%s partition table: the header's checksum is wrong", h.name)
		}
		for _, f := range []struct {
			what      string
			got, want uint64
		}{
			{"own LBA", le.Uint64(b[24:]), uint64(h.lba)},
			{"other header's LBA", le.Uint64(b[32:]), uint64(h.other)},
			{"first usable LBA", le.Uint64(b[40:]), uint64(2 + entries)},
			{"last usable LBA", le.Uint64(b[48:]), uint64(last - entries - 1)},
			{"LBA of the entries", le.Uint64(b[72:]), uint64(h.entLBA)},
			{"number of entries", uint64(le.Uint32(b[80:])), entryCount},
			{"size of an entry", uint64(le.Uint32(b[84:])), entrySize},
		} {
			if f.got != f.want {
				return fmt.Errorf("%s partition table: %s is %d, not %d", h.name, f.what, f.got, f.want)
			}
		}
		table := make([]byte, entryCount*entrySize)
		if err := src.read(table, h.entLBA*int64(sector)); err != nil {
			return fmt.Errorf("%s partition table: %w", h.name, err)
		}
		if crc32.ChecksumIEEE(table) != le.Uint32(b[88:]) {
			return fmt.Errorf("%s partition table: the entries' checksum is wrong", h.name)
		}
		seen[i] = append(table, b[56:72]...) // the disk's GUID belongs to what must be alike
	}
	if !bytes.Equal(seen[0], seen[1]) {
		return errors.New("the primary and the backup partition table differ")
	}
	return nil
}

// source is the disk as go-diskfs wants to see it. The library ignores
// errors of reading, so the first one is kept here, to be asked for after each
// call; and it can be kept busy by folders that lie in folders, so the bytes
// that it may read are counted.
type source struct {
	r    io.ReaderAt
	size int64

	mu     sync.Mutex
	err    error
	budget int64
}

var _ backend.Storage = (*source)(nil)

var errTooMuch = errors.New("it has more folders than a stick has that boots")

// ReadAt reads from the disk, and never behind its end.
func (s *source) ReadAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	s.budget -= int64(len(p))
	over := s.budget < 0
	s.mu.Unlock()
	err := errTooMuch
	if !over {
		err = s.read(p, off)
	}
	if err != nil {
		s.mu.Lock()
		if s.err == nil {
			s.err = err
		}
		s.mu.Unlock()
		return 0, err
	}
	return len(p), nil
}

// read fills p.
func (s *source) read(p []byte, off int64) error {
	if off < 0 || int64(len(p)) > s.size-off {
		return fmt.Errorf("%d bytes at %d are not on the disk", len(p), off)
	}
	n, err := s.r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read the disk at %d: %w", off, err)
}

// watch runs f, which may read budget bytes, and returns its error, but rather
// that of the disk.
func (s *source) watch(budget int64, f func() error) error {
	s.mu.Lock()
	s.err, s.budget = nil, budget
	s.mu.Unlock()
	err := f()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		err = s.err
	}
	s.budget = math.MaxInt64
	return err
}

// Seek serves to ask for the size only.
func (s *source) Seek(offset int64, whence int) (int64, error) {
	if offset == 0 && whence == io.SeekEnd {
		return s.size, nil
	}
	return 0, errors.ErrUnsupported
}

// The rest is asked for by the library's interface only.
func (s *source) Stat() (fs.FileInfo, error)              { return nil, errors.ErrUnsupported }
func (s *source) Read([]byte) (int, error)                { return 0, errors.ErrUnsupported }
func (s *source) Close() error                            { return nil }
func (s *source) Sys() (*os.File, error)                  { return nil, backend.ErrNotSuitable }
func (s *source) Writable() (backend.WritableFile, error) { return nil, backend.ErrIncorrectOpenMode }
func (s *source) Path() string                            { return "" }
