package fat32

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"sort"
	"time"

	"github.com/memlinux/memlinux/media"
)

const (
	entrySize = 32 // bytes of a directory entry

	attrVolumeID  = 0x08
	attrDirectory = 0x10
	attrArchive   = 0x20
	attrLongName  = 0x0f

	fsInfoSector = 1
	backupSector = 6 // of the boot sector; FSInfo's follows

	mediaFixed = 0xf8       // a disk that is not a floppy, in the BPB and in FAT[0]
	endOfChain = 0x0fffffff // in FAT[1] it says too: unmounted cleanly, no disk error
)

var le = binary.LittleEndian

// reserved makes the boot sector, FSInfo and their backups.
func (v Volume) reserved(g geometry, used int64) []byte {
	boot := make([]byte, g.sector)
	copy(boot, "\xeb\x58\x90MSWIN4.1") // jump to 90; the OEM name that fatgen103 finds safest
	le.PutUint16(boot[11:], uint16(g.sector))
	boot[13] = byte(g.cluster / g.sector)
	le.PutUint16(boot[14:], uint16(g.reserved))
	boot[16] = 2 // FATs
	boot[21] = mediaFixed
	le.PutUint16(boot[24:], 63)  // sectors per track, and
	le.PutUint16(boot[26:], 255) // heads: what a BIOS makes of any large disk
	le.PutUint32(boot[28:], v.HiddenSectors)
	le.PutUint32(boot[32:], uint32(g.sectors()))
	le.PutUint32(boot[36:], uint32(g.fatSectors))
	le.PutUint32(boot[44:], firstData) // the root folder
	le.PutUint16(boot[48:], fsInfoSector)
	le.PutUint16(boot[50:], backupSector)
	boot[64] = 0x80 // the BIOS's number for a hard disk
	boot[66] = 0x29 // the three fields below are there
	le.PutUint32(boot[67:], v.ID)
	label := v.label()
	if v.Label == "" {
		copy(label[:], "NO NAME    ")
	}
	copy(boot[71:], label[:])
	copy(boot[82:], "FAT32   ")
	copy(boot[90:], "\xfa\xf4\xeb\xfd") // cli; hlt; jump back to hlt: this volume boots nothing by itself
	le.PutUint16(boot[510:], 0xaa55)

	info := make([]byte, g.sector)
	le.PutUint32(info[0:], 0x41615252)
	le.PutUint32(info[484:], 0x61417272)
	le.PutUint32(info[488:], uint32(g.clusters-used))
	next := uint32(0xffffffff) // no cluster is free
	if used < g.clusters {
		next = uint32(firstData + used)
	}
	le.PutUint32(info[492:], next)
	le.PutUint32(info[508:], 0xaa550000)

	area := make([]byte, (backupSector+2)*g.sector)
	for _, at := range []int64{0, backupSector} {
		copy(area[at*g.sector:], boot)
		copy(area[(at+fsInfoSector)*g.sector:], info)
	}
	return area
}

func (v Volume) label() [11]byte { return shortName(v.Label, v.Label[min(8, len(v.Label)):]) }

// entries makes a folder's content.
func (n *node) entries(v Volume) []byte {
	b := make([]byte, 0, n.slots()*entrySize)
	if n.parent == nil {
		if v.Label != "" {
			b = appendEntry(b, v.label(), attrVolumeID, v.ModTime, 0, 0)
		}
	} else {
		parent := n.parent.cluster
		if n.parent.parent == nil {
			parent = 0 // what ".." says for the root, whatever its cluster
		}
		b = appendEntry(b, shortName(".", ""), attrDirectory, n.modTime, n.cluster, 0)
		b = appendEntry(b, shortName("..", ""), attrDirectory, n.modTime, parent, 0)
	}
	for _, c := range n.children {
		b = appendLongName(b, c.long, c.short)
		attr := byte(attrArchive)
		if c.dir {
			attr = attrDirectory
		}
		b = appendEntry(b, c.short, attr, c.modTime, c.cluster, c.size)
	}
	return b
}

func appendEntry(b []byte, short [11]byte, attr byte, t time.Time, cluster, size int64) []byte {
	var e [entrySize]byte
	copy(e[:], short[:])
	e[11] = attr
	date, clock := dosTime(t)
	le.PutUint16(e[14:], clock) // made
	le.PutUint16(e[16:], date)
	le.PutUint16(e[18:], date) // read
	le.PutUint16(e[20:], uint16(cluster>>16))
	le.PutUint16(e[22:], clock) // written
	le.PutUint16(e[24:], date)
	le.PutUint16(e[26:], uint16(cluster))
	le.PutUint32(e[28:], uint32(size))
	return append(b, e[:]...)
}

// appendLongName puts down a long name as fatgen103 has it: 13 units to an
// entry, the last piece first, each with the short name's checksum.
func appendLongName(b []byte, long []uint16, short [11]byte) []byte {
	sum := checksum(short)
	pieces := int(ceil(int64(len(long)), longUnits))
	for piece := pieces; piece > 0; piece-- {
		var e [entrySize]byte
		e[0] = byte(piece)
		if piece == pieces {
			e[0] |= 0x40
		}
		e[11] = attrLongName
		e[13] = sum
		for i := range longUnits {
			unit := uint16(0xffff)
			switch at := (piece-1)*longUnits + i; {
			case at < len(long):
				unit = long[at]
			case at == len(long):
				unit = 0
			}
			le.PutUint16(e[longUnitOffset(i):], unit)
		}
		b = append(b, e[:]...)
	}
	return b
}

// longUnitOffset is where a long name's i-th unit lies in its entry: the units
// fill what the fields of a short entry leave.
func longUnitOffset(i int) int {
	switch {
	case i < 5:
		return 1 + 2*i
	case i < 11:
		return 14 + 2*(i-5)
	default:
		return 28 + 2*(i-11)
	}
}

func checksum(short [11]byte) byte {
	var sum byte
	for _, c := range short {
		sum = sum>>1 | sum<<7
		sum += c
	}
	return sum
}

var (
	firstTime = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)
	lastTime  = time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)
)

// dosTime gives a directory entry's date and time of day.
func dosTime(t time.Time) (date, clock uint16) {
	t = t.UTC()
	if t.Before(firstTime) {
		t = firstTime
	}
	if t.After(lastTime) {
		t = lastTime
	}
	date = uint16(t.Year()-1980)<<9 | uint16(t.Month())<<5 | uint16(t.Day())
	clock = uint16(t.Hour())<<11 | uint16(t.Minute())<<5 | uint16(t.Second()/2)
	return date, clock
}

// extent makes an extent of data, filled with zeros to length bytes.
func (g geometry) extent(offset, length int64, data []byte) media.Extent {
	return media.Extent{Offset: offset, Length: length,
		Content: padded{content: bytes.NewReader(data), size: int64(len(data)), length: length}}
}

// fatExtents makes one FAT at offset: the part that the runs fill, and the rest,
// which is zero but must be written, as a device holds stale bytes there.
func (g geometry) fatExtents(offset int64, runs []run) []media.Extent {
	last := runs[len(runs)-1]
	length := g.fatSectors * g.sector
	head := ceil((last.first+last.clusters)*4, g.sector) * g.sector
	out := []media.Extent{{Offset: offset, Length: head, Content: fat{runs: runs, length: head}}}
	if head < length {
		out = append(out, media.Extent{Offset: offset + head, Length: length - head, Content: padded{length: length - head}})
	}
	return out
}

// fat reads as a file allocation table: its entries follow from the runs.
type fat struct {
	runs   []run // sorted by cluster
	length int64 // bytes
}

func (f fat) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("FAT: negative offset")
	}
	n := int(max(0, min(int64(len(p)), f.length-off)))
	at := sort.Search(len(f.runs), func(i int) bool { return (f.runs[i].first+f.runs[i].clusters)*4 > off })
	var entry [4]byte
	for i := 0; i < n; {
		cluster := (off + int64(i)) / 4
		le.PutUint32(entry[:], f.entry(cluster, &at))
		i += copy(p[i:n], entry[(off+int64(i))%4:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// entry is the FAT's value for a cluster. at is the index of the run that holds
// it or comes next, and moves along as clusters go up.
func (f fat) entry(cluster int64, at *int) uint32 {
	switch cluster {
	case 0:
		return 0x0fffff00 | mediaFixed
	case 1:
		return endOfChain
	}
	for *at < len(f.runs) && cluster >= f.runs[*at].first+f.runs[*at].clusters {
		*at++
	}
	if *at == len(f.runs) || cluster < f.runs[*at].first {
		return 0
	}
	if r := f.runs[*at]; cluster == r.first+r.clusters-1 {
		return endOfChain
	}
	return uint32(cluster + 1)
}

// padded reads as size bytes of content and zeros from there to length.
type padded struct {
	content      io.ReaderAt // nil where size is 0
	size, length int64
}

func (z padded) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	n := int(max(0, min(int64(len(p)), z.length-off)))
	zeros := p[:n]
	if off < z.size {
		want := int(min(int64(n), z.size-off))
		got, err := z.content.ReadAt(p[:want], off)
		if got < want {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return got, err
		}
		zeros = p[want:n]
	}
	clear(zeros)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
