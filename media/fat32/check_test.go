package fat32

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf16"

	"github.com/memlinux/memlinux/media"
)

// item is what the checker found under a path.
type item struct {
	dir     bool
	size    int64
	first   int64 // cluster
	short   string
	modTime time.Time
}

// volumeCheck is a strict reader of FAT32, written from fatgen103 apart from
// the builder: it knows nothing of trees and geometries, only bytes.
type volumeCheck struct {
	r                    io.ReaderAt
	sector, cluster      int64
	reserved, fatSectors int64
	clusters             int64
	dataStart            int64
	fat                  []byte
	used                 int64
	owned                []bool // whether a file or folder holds a cluster
	items                map[string]item
	label                string
}

// disk reads extents as a disk whose gaps hold stale bytes.
type disk struct{ im media.Image }

func (d disk) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.im.ReadAt(p, off)
	end := int64(0)
	stale := func(from, to int64) {
		for i := max(from, off); i < min(to, off+int64(n)); i++ {
			p[i-off] = 0xa5
		}
	}
	for _, e := range d.im.Extents {
		if e.Offset > off+int64(n) {
			break
		}
		stale(end, e.Offset)
		end = e.End()
	}
	if end < off+int64(n) && (len(d.im.Extents) == 0 || end == d.im.Extents[len(d.im.Extents)-1].End()) {
		stale(end, d.im.Size)
	}
	return n, err
}

func checkVolume(v Volume, extents []media.Extent) (*volumeCheck, error) {
	end := int64(0)
	for i, e := range extents {
		s := int64(v.SectorSize)
		if e.Content == nil || e.Length <= 0 || e.Offset%s != 0 || e.Length%s != 0 || e.Offset < end || e.End() > v.Size {
			return nil, fmt.Errorf("extent %d (%d bytes at %d) is bad; the one before ends at %d", i, e.Length, e.Offset, end)
		}
		end = e.End()
	}
	c := &volumeCheck{
		r:     disk{media.Image{Size: v.Size, SectorSize: v.SectorSize, Extents: extents}},
		items: map[string]item{},
	}
	boot, err := c.read(0, 512)
	if err != nil {
		return nil, err
	}
	u16 := func(at int) int64 { return int64(binary.LittleEndian.Uint16(boot[at:])) }
	u32 := func(at int) int64 { return int64(binary.LittleEndian.Uint32(boot[at:])) }
	c.sector = u16(11)
	c.cluster = c.sector * int64(boot[13])
	c.reserved, c.fatSectors = u16(14), u32(36)
	total := u32(32)
	c.dataStart = (c.reserved + 2*c.fatSectors) * c.sector
	c.clusters = (total*c.sector - c.dataStart) / c.cluster
	switch {
	case u16(510) != 0xaa55 || boot[0] != 0xeb || boot[2] != 0x90:
		return nil, fmt.Errorf("no boot sector")
	case c.sector != int64(v.SectorSize) || boot[13] == 0 || boot[13]&(boot[13]-1) != 0 || c.cluster > 32<<10:
		return nil, fmt.Errorf("bad sector or cluster size: %d, %d", c.sector, c.cluster)
	case boot[16] != 2 || u16(17) != 0 || u16(19) != 0 || u16(22) != 0 || boot[21] != 0xf8 || u16(40) != 0 || u16(42) != 0 || boot[65] != 0:
		return nil, fmt.Errorf("bad BPB: % x", boot[:90])
	case u32(28) != int64(v.HiddenSectors) || u32(67) != int64(v.ID):
		return nil, fmt.Errorf("hidden sectors or ID not kept")
	case total*c.sector > v.Size:
		return nil, fmt.Errorf("%d sectors do not fit %d bytes", total, v.Size)
	case c.clusters < 65525 || c.clusters > 0x0ffffff5:
		return nil, fmt.Errorf("%d clusters are not FAT32", c.clusters)
	case c.fatSectors*c.sector < (c.clusters+2)*4:
		return nil, fmt.Errorf("the FAT has %d sectors, too few for %d clusters", c.fatSectors, c.clusters)
	case c.dataStart%c.cluster != 0:
		return nil, fmt.Errorf("data at %d is not aligned to the cluster size %d", c.dataStart, c.cluster)
	case u32(44) != 2 || u16(48) != 1 || u16(50) != 6:
		return nil, fmt.Errorf("root folder, FSInfo or backup are not where they should be")
	}
	both, err := c.read(0, c.reserved*c.sector)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(both[:2*c.sector], both[6*c.sector:8*c.sector]) {
		return nil, fmt.Errorf("the backup boot sectors differ")
	}
	if c.fat, err = c.read(c.reserved*c.sector, c.fatSectors*c.sector); err != nil {
		return nil, err
	}
	fat2, err := c.read((c.reserved+c.fatSectors)*c.sector, c.fatSectors*c.sector)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(c.fat, fat2) {
		return nil, fmt.Errorf("the FATs differ")
	}
	if c.entry(0) != 0x0ffffff8 || c.entry(1) != 0x0fffffff {
		return nil, fmt.Errorf("FAT[0], FAT[1] = %#x, %#x", c.entry(0), c.entry(1))
	}
	c.owned = make([]bool, c.clusters+2)
	if err := c.folder("", 2, 0); err != nil {
		return nil, err
	}
	firstFree := int64(0xffffffff)
	for i := int64(2); i < int64(len(c.fat))/4; i++ {
		if free := c.entry(i) == 0; i < c.clusters+2 && free == c.owned[i] || i >= c.clusters+2 && !free {
			return nil, fmt.Errorf("FAT[%d] = %#x, and that is wrong", i, c.entry(i))
		} else if free && i < c.clusters+2 {
			firstFree = min(firstFree, i)
		}
	}
	info := both[c.sector:]
	free, next := binary.LittleEndian.Uint32(info[488:]), binary.LittleEndian.Uint32(info[492:])
	if string(info[:4]) != "RRaA" || string(info[484:488]) != "rrAa" || info[510] != 0x55 || info[511] != 0xaa ||
		int64(free) != c.clusters-c.used || int64(next) != firstFree {
		return nil, fmt.Errorf("FSInfo says %d free from %d; true: %d from %d", free, next, c.clusters-c.used, firstFree)
	}
	if label := strings.TrimRight(string(boot[71:82]), " "); label != c.label && (c.label != "" || label != "NO NAME") {
		return nil, fmt.Errorf("the label is %q in the boot sector and %q in the root", label, c.label)
	}
	return c, nil
}

func (c *volumeCheck) read(off, n int64) ([]byte, error) {
	b := make([]byte, n)
	if _, err := c.r.ReadAt(b, off); err != nil {
		return nil, fmt.Errorf("read %d bytes at %d: %w", n, off, err)
	}
	return b, nil
}

func (c *volumeCheck) entry(i int64) uint32 { return binary.LittleEndian.Uint32(c.fat[4*i:]) }

// chain claims the clusters of path and gives their number; they must be in a row.
func (c *volumeCheck) chain(path string, first int64) (int64, error) {
	for at, n := first, int64(1); ; n++ {
		if at < 2 || at >= c.clusters+2 {
			return 0, fmt.Errorf("%q: cluster %d is not on the volume", path, at)
		}
		if c.owned[at] {
			return 0, fmt.Errorf("%q: cluster %d belongs to another file too", path, at)
		}
		c.owned[at] = true
		c.used++
		next := int64(c.entry(at))
		if next >= 0x0ffffff8 {
			return n, nil
		}
		if next != at+1 {
			return 0, fmt.Errorf("%q: cluster %d is followed by %d", path, at, next)
		}
		at = next
	}
}

func (c *volumeCheck) folder(path string, first, parent int64) error {
	n, err := c.chain(path, first)
	if err != nil {
		return err
	}
	if n*c.cluster > 65536*32 {
		return fmt.Errorf("%q: %d clusters are too many for a folder", path, n)
	}
	data, err := c.read(c.dataStart+(first-2)*c.cluster, n*c.cluster)
	if err != nil {
		return err
	}
	var long []uint16
	var wantPiece, wantSum byte
	shorts, names := map[string]bool{}, map[string]bool{}
	for i := 0; i < len(data) && data[i] != 0; i += 32 {
		e := data[i : i+32]
		cluster := int64(binary.LittleEndian.Uint16(e[20:]))<<16 | int64(binary.LittleEndian.Uint16(e[26:]))
		size := int64(binary.LittleEndian.Uint32(e[28:]))
		if i/32 < 2 && first != 2 {
			want := []struct {
				name    string
				cluster int64
			}{{".          ", first}, {"..         ", parent}}[i/32]
			if string(e[:11]) != want.name || cluster != want.cluster || e[11] != 0x10 || size != 0 {
				return fmt.Errorf("%q: entry %d is %q at %d, want %q at %d", path, i/32, e[:11], cluster, want.name, want.cluster)
			}
			continue
		}
		if e[11] == 0x0f {
			if e[0]&0x40 != 0 {
				long, wantPiece, wantSum = make([]uint16, int(e[0]&0x3f)*13), e[0]&0x3f, e[13]
			}
			if piece := e[0] & 0x3f; piece == 0 || piece != wantPiece || e[13] != wantSum || cluster&0xffff != 0 || e[12] != 0 {
				return fmt.Errorf("%q: bad piece of a long name: % x", path, e)
			}
			wantPiece--
			units := append(append(append([]byte{}, e[1:11]...), e[14:26]...), e[28:32]...)
			for j := range 13 {
				long[int(wantPiece)*13+j] = binary.LittleEndian.Uint16(units[2*j:])
			}
			continue
		}
		var sum byte
		for _, b := range e[:11] {
			sum = (sum&1)<<7 + sum>>1 + b
		}
		if e[11] == 0x08 {
			if first != 2 || i != 0 || cluster != 0 || size != 0 {
				return fmt.Errorf("%q: a label at entry %d", path, i/32)
			}
			c.label = strings.TrimRight(string(e[:11]), " ")
			continue
		}
		short := strings.TrimRight(string(e[:8]), " ")
		if ext := strings.TrimRight(string(e[8:11]), " "); ext != "" {
			short += "." + ext
		}
		for _, b := range []byte(strings.Replace(short, ".", "", 1)) {
			if !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789$%'-_@~`!(){}^#&", rune(b)) {
				return fmt.Errorf("%q: bad short name %q", path, e[:11])
			}
		}
		name := short
		if long != nil {
			if wantPiece != 0 || sum != wantSum {
				return fmt.Errorf("%q: a long name does not belong to %q", path, short)
			}
			end := len(long)
			for j, u := range long {
				if u == 0 {
					end = j
					for _, u := range long[j+1:] {
						if u != 0xffff {
							return fmt.Errorf("%q: bad filling behind the long name of %q", path, short)
						}
					}
					break
				}
			}
			if len(long)-end > 13 || end == 0 {
				return fmt.Errorf("%q: the long name of %q has an entry too many", path, short)
			}
			name, long = string(utf16.Decode(long[:end])), nil
		}
		if shorts[short] || short == "" || e[0] == ' ' || names[name] {
			return fmt.Errorf("%q: the name %q (%q) is there twice or empty", path, name, short)
		}
		shorts[short], names[name] = true, true
		full := strings.TrimPrefix(path+"/"+name, "/")
		date, clock := int(binary.LittleEndian.Uint16(e[24:])), int(binary.LittleEndian.Uint16(e[22:]))
		it := item{dir: e[11] == 0x10, size: size, first: cluster, short: short,
			modTime: time.Date(1980+date>>9, time.Month(date>>5&15), date&31, clock>>11, clock>>5&63, clock&31*2, 0, time.UTC)}
		c.items[full] = it
		switch {
		case it.dir:
			if size != 0 {
				return fmt.Errorf("%q: a folder with size %d", full, size)
			}
			up := first
			if first == 2 {
				up = 0
			}
			if err := c.folder(full, cluster, up); err != nil {
				return err
			}
		case e[11] != 0x20:
			return fmt.Errorf("%q: attributes %#x", full, e[11])
		case size == 0:
			if cluster != 0 {
				return fmt.Errorf("%q: empty, with cluster %d", full, cluster)
			}
		default:
			n, err := c.chain(full, cluster)
			if err != nil {
				return err
			}
			if n != (size+c.cluster-1)/c.cluster {
				return fmt.Errorf("%q: %d bytes in %d clusters", full, size, n)
			}
		}
	}
	for _, name := range sortedKeys(names) {
		for other := range shorts {
			if strings.EqualFold(name, other) && c.items[strings.TrimPrefix(path+"/"+name, "/")].short != other {
				return fmt.Errorf("%q: %q is the short name of another file", path, name)
			}
		}
		if len(names) > 200 {
			break // quadratic
		}
	}
	if long != nil {
		return fmt.Errorf("%q: a long name without a file", path)
	}
	return nil
}

// content reads a file of the volume.
func (c *volumeCheck) content(path string) io.Reader {
	it := c.items[path]
	return io.NewSectionReader(c.r, c.dataStart+(it.first-2)*c.cluster, it.size)
}
