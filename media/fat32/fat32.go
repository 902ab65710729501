// Package fat32 lays out a FAT32 volume as a value: a list of files goes in,
// the extents of the finished volume come out.
//
// It works in one pass. Nothing is mounted, no file's content is read, and all
// that could fail for want of room fails before there is a byte to write. Every
// file is one run of clusters, so it is one extent; both FATs are computed as
// they are read, so a volume of any size needs memory only for its names. The
// same volume and files, in any order, give the same bytes.
//
// The format is Microsoft's "FAT: General Overview of On-Disk Format" 1.03
// (fatgen103), with long names and with the cluster size chosen here.
package fat32

import (
	"fmt"
	"io"
	"time"

	"github.com/memlinux/memlinux/media"
)

// File is one file or folder of a volume.
type File struct {
	Path    string      // slash-separated, without a leading slash; parents are made
	Size    int64       // bytes, below 4 GiB; 0 for a folder
	Content io.ReaderAt // the file's bytes, at 0 to Size; not read before the extents are
	ModTime time.Time   // kept in UTC to 2 seconds; before 1980 or after 2107 it becomes the nearest time that FAT knows
	Dir     bool        // a folder, which may stay empty
}

// Volume describes the volume that the files go into.
type Volume struct {
	Size          int64     // bytes; a multiple of SectorSize
	SectorSize    int       // the disk's logical sector size in bytes: 512, 1024, 2048 or 4096
	HiddenSectors uint32    // LBA of the partition's first sector, 0 where there is none
	ID            uint32    // serial number; 0x1234ABCD is the UUID 1234-ABCD
	Label         string    // at most 11 of A-Z, 0-9, space and $%'-_@~`!(){}^#&, or empty
	ModTime       time.Time // of the label, and of parents that have no File of their own
}

// NoSpaceError says that the files do not fit the volume, or that the volume is
// too small for FAT32 at all.
type NoSpaceError struct {
	Need int64 // bytes of the smallest volume that would do
	Have int64 // bytes of the volume
}

func (e *NoSpaceError) Error() string {
	const mib = 1 << 20
	return fmt.Sprintf("the FAT32 volume needs %d MiB for these files and has %d MiB: use a larger device or put less on it",
		(e.Need+mib-1)/mib, e.Have/mib)
}

// Build lays the files out on the volume. The extents' offsets count from the
// volume's start; they are sorted, whole sectors, and do not overlap. A file's
// extent refers to its Content and is filled with zeros to the sector. Both FATs
// and all folders are written in full, their zeros too: what lies in no extent
// (free clusters, the rest of a file's last cluster) may hold anything.
//
// The error is a *NoSpaceError where the volume is too small; any other names
// the file that FAT32 can't hold and says why.
func (v Volume) Build(files []File) ([]media.Extent, error) {
	if err := v.check(); err != nil {
		return nil, err
	}
	t, err := newTree(files, v.ModTime)
	if err != nil {
		return nil, fmt.Errorf("FAT32: %w", err)
	}
	g, err := t.fit(int64(v.SectorSize), v.Size)
	if err != nil {
		return nil, err
	}
	runs := t.place(g)
	used := int64(0)
	for _, r := range runs {
		used += r.clusters
	}

	out := []media.Extent{g.extent(0, g.reserved*g.sector, v.reserved(g, used))}
	for i := range int64(2) {
		out = append(out, g.fatExtents((g.reserved+i*g.fatSectors)*g.sector, runs)...)
	}
	for _, d := range t.dirs {
		out = append(out, g.extent(g.offset(d.cluster), d.clustersOf(g.cluster)*g.cluster, d.entries(v)))
	}
	for _, f := range t.files {
		if f.size > 0 {
			length := ceil(f.size, g.sector) * g.sector
			out = append(out, media.Extent{
				Offset: g.offset(f.cluster), Length: length,
				Content: padded{content: f.content, size: f.size, length: length},
			})
		}
	}
	return out, nil
}

// MinSize is the size in bytes of the smallest volume that Build accepts for
// the files; it accepts every larger one up to 2^32-1 sectors. sectorSize is in
// bytes, as in Volume.
func MinSize(sectorSize int, files []File) (int64, error) {
	if err := checkSectorSize(sectorSize); err != nil {
		return 0, err
	}
	t, err := newTree(files, time.Time{})
	if err != nil {
		return 0, fmt.Errorf("FAT32: %w", err)
	}
	return t.minSize(int64(sectorSize))
}

func checkSectorSize(n int) error {
	switch n {
	case 512, 1024, 2048, 4096:
		return nil
	}
	return fmt.Errorf("FAT32: the sector size is %d, not 512, 1024, 2048 or 4096", n)
}

func (v Volume) check() error {
	if err := checkSectorSize(v.SectorSize); err != nil {
		return err
	}
	if v.Size < 0 || v.Size%int64(v.SectorSize) != 0 {
		return fmt.Errorf("FAT32: the volume's size of %d bytes is not a multiple of its %d-byte sectors", v.Size, v.SectorSize)
	}
	if v.Size/int64(v.SectorSize) > maxSectors {
		return fmt.Errorf("FAT32: the volume has %d sectors and FAT32 knows at most %d: make the partition smaller",
			v.Size/int64(v.SectorSize), int64(maxSectors))
	}
	return checkLabel(v.Label)
}
