package bootable

// What is read of a FAT file system at the most: folders are followed for so many
// clusters, whatever their chains say.
const maxClusters = 1024

// fat is a FAT file system (Microsoft fatgen103).
type fat struct {
	disk
	at                       int64 // of the file system, in bytes
	bits                     int   // 12, 16 or 32 in an entry of the FAT
	cluster                  int64 // bytes
	table, root, data, count int64 // bytes from at; of clusters
	rootSize, rootCluster    int64 // bytes of the root of FAT12 and 16; its first cluster in FAT32
}

// hasLoader tells whether v is a FAT file system with EFI/BOOT/BOOTX64.EFI.
func (d disk) hasLoader(v run) (bool, error) {
	f, err := d.openFAT(v)
	if f == nil {
		return false, err
	}
	entry, err := f.find(f.rootCluster, "EFI        ", true)
	if entry != nil && err == nil {
		entry, err = f.find(f.first(entry), "BOOT       ", true)
	}
	if entry != nil && err == nil {
		entry, err = f.find(f.first(entry), "BOOTX64 EFI", false)
	}
	return entry != nil, err
}

// openFAT returns nil where there is none.
func (d disk) openFAT(v run) (*fat, error) {
	b, err := d.read(v.offset, 512)
	if b == nil || b[510] != 0x55 || b[511] != 0xaa {
		return nil, err
	}
	sector := int64(le.Uint16(b[11:]))
	perCluster, reserved, fats := int64(b[13]), int64(le.Uint16(b[14:])), int64(b[16])
	entries, total, fatSectors := int64(le.Uint16(b[17:])), int64(le.Uint16(b[19:])), int64(le.Uint16(b[22:]))
	if total == 0 {
		total = int64(le.Uint32(b[32:]))
	}
	if fatSectors == 0 {
		fatSectors = int64(le.Uint32(b[36:]))
	}
	if sector < 512 || sector > 4096 || sector&(sector-1) != 0 || perCluster == 0 || perCluster&(perCluster-1) != 0 || reserved == 0 || fats == 0 || fatSectors == 0 {
		return nil, nil
	}
	f := &fat{disk: d, at: v.offset, cluster: perCluster * sector, table: reserved * sector, root: (reserved + fats*fatSectors) * sector, rootSize: entries * 32}
	f.data = f.root + (f.rootSize+sector-1)/sector*sector
	f.count = (total*sector - f.data) / f.cluster
	switch {
	case f.count <= 0:
		return nil, nil
	case f.count < 4085:
		f.bits = 12
	case f.count < 65525:
		f.bits = 16
	default:
		f.bits, f.rootCluster = 32, int64(le.Uint32(b[44:]))
	}
	return f, nil
}

// first is the first cluster of a folder's entry.
func (f *fat) first(entry []byte) int64 {
	c := int64(le.Uint16(entry[26:]))
	if f.bits == 32 {
		c |= int64(le.Uint16(entry[20:])) << 16
	}
	return c
}

// find looks for a name, in 8 and 3 characters, in the folder that begins at the
// cluster; 0 is the root of FAT12 and 16. It returns its entry, or nil.
func (f *fat) find(cluster int64, name string, folder bool) ([]byte, error) {
	if cluster == 0 {
		p, err := f.read(f.at+f.root, int(f.rootSize))
		return search(p, name, folder), err
	}
	for range maxClusters {
		if cluster < 2 || cluster >= f.count+2 {
			return nil, nil
		}
		p, err := f.read(f.at+f.data+(cluster-2)*f.cluster, int(f.cluster))
		if p == nil {
			return nil, err
		}
		if e := search(p, name, folder); e != nil {
			return e, nil
		}
		if cluster, err = f.next(cluster); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// next follows a chain; its end is a cluster that there is not.
func (f *fat) next(cluster int64) (int64, error) {
	p, err := f.read(f.at+f.table+cluster*int64(f.bits)/8, 4)
	if p == nil {
		return 0, err
	}
	v := int64(le.Uint32(p))
	switch f.bits {
	case 12:
		return v >> (cluster & 1 * 4) & 0xfff, nil
	case 16:
		return v & 0xffff, nil
	}
	return v & 0x0fffffff, nil
}

func search(entries []byte, name string, folder bool) []byte {
	const label, directory = 8, 0x10
	for ; len(entries) >= 32 && entries[0] != 0; entries = entries[32:] {
		attributes := entries[11]
		if string(entries[:11]) == name && attributes&label == 0 && (attributes&directory != 0) == folder {
			return entries[:32]
		}
	}
	return nil
}
