package stick

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/diskfs/go-diskfs/filesystem/fat12"
	"github.com/diskfs/go-diskfs/filesystem/fat32"
)

// volume is a FAT32 file system that was checked. go-diskfs reads its folders
// and finds the clusters of its files. Their bytes are read here: the
// library's own reading ignores errors of the disk, gives bytes from behind a
// file's end to reads that begin inside a cluster, and can't read empty files.
type volume struct {
	src     *source
	at      int64 // where it begins on the disk, in bytes
	size    int64 // bytes
	cluster int64 // bytes
	id      uint32
	label   string

	mu    sync.Mutex // for one call into the library at a time
	fat   *fat32.FileSystem
	files map[string]*file // by lower-case path; "." is the root
}

const (
	// maxFAT bounds one FAT in bytes. It is read into memory some six times over;
	// 4 million clusters are 2 GiB of the smallest ones.
	maxFAT = 16 << 20

	// maxFolder bounds a folder in bytes: 32,768 entries, half of what FAT allows.
	maxFolder = 1 << 20

	// lookupBudget bounds what the library reads to find something, in bytes.
	lookupBudget = 64 << 20
)

// openVolume checks the file system in part and reads its folders.
func openVolume(src *source, part Partition, sector int) (*volume, error) {
	v := &volume{src: src, at: part.Offset, files: map[string]*file{}}
	if err := v.checkBootSector(part.Size, sector); err != nil {
		return nil, err
	}
	err := src.watch(1<<62, func() (err error) {
		v.fat, err = fat32.Read(src, v.size, v.at, int64(sector))
		return err
	})
	if err != nil {
		return nil, err
	}
	return v, src.watch(lookupBudget, v.walk)
}

// checkBootSector reads the BIOS parameter block (fatgen103, "Boot Sector and
// BPB") and the FATs. The library believes in all of it.
func (v *volume) checkBootSector(size int64, sector int) error {
	b := make([]byte, 512)
	if err := v.src.read(b, v.at); err != nil {
		return err
	}
	if b[510] != 0x55 || b[511] != 0xaa {
		return errors.New("it does not begin with a boot sector")
	}
	perCluster, reserved := int64(b[13]), int64(le.Uint16(b[14:]))
	total, fatSectors := int64(le.Uint32(b[32:])), int64(le.Uint32(b[36:]))
	info := int64(le.Uint16(b[48:]))
	bytesPerSector := int64(sector)
	switch {
	case int(le.Uint16(b[11:])) != sector:
		return fmt.Errorf("its file system has sectors of %d bytes, the disk has %d", le.Uint16(b[11:]), sector)
	case le.Uint16(b[17:]) != 0 || le.Uint16(b[19:]) != 0 || le.Uint16(b[22:]) != 0 || le.Uint16(b[42:]) != 0 || b[66] != 0x29:
		return errors.New("its file system is not FAT32")
	case perCluster == 0 || perCluster&(perCluster-1) != 0 || perCluster*bytesPerSector > 64<<10:
		return fmt.Errorf("clusters of %d sectors", perCluster)
	case b[16] != 2:
		return fmt.Errorf("%d FATs, not 2", b[16])
	case le.Uint32(b[44:]) != 2:
		return fmt.Errorf("its root folder begins at cluster %d, not 2", le.Uint32(b[44:]))
	case info == 0 || info >= reserved:
		return fmt.Errorf("the FSInfo sector %d is not among the %d reserved ones", info, reserved)
	case total*bytesPerSector > size:
		return fmt.Errorf("its file system has %d bytes, the partition %d", total*bytesPerSector, size)
	case fatSectors*bytesPerSector > maxFAT:
		return fmt.Errorf("a FAT of %d MiB; at most %d are read", fatSectors*bytesPerSector>>20, maxFAT>>20)
	}
	clusters := (total - reserved - 2*fatSectors) / perCluster
	if clusters < 65525 || clusters+2 > fatSectors*bytesPerSector/4 {
		return fmt.Errorf("its file system has %d clusters, a FAT32 of this size can't have that", clusters)
	}
	v.size = total * bytesPerSector
	v.cluster = perCluster * bytesPerSector
	v.id = le.Uint32(b[67:])
	if label := strings.TrimRight(string(b[71:82]), " "); label != "NO NAME" {
		v.label = label
	}
	return v.checkFATs(reserved*bytesPerSector, fatSectors*bytesPerSector, clusters)
}

// checkFATs checks that both FATs are alike and that in them no two chains
// meet, none is a ring, and none leaves the volume. The library would follow
// a ring until the memory is full.
func (v *volume) checkFATs(offset, size, clusters int64) error {
	first, second := make([]byte, size), make([]byte, size)
	if err := v.src.read(first, v.at+offset); err != nil {
		return err
	}
	if err := v.src.read(second, v.at+offset+size); err != nil {
		return err
	}
	if !bytes.Equal(first, second) {
		return errors.New("the two FATs differ")
	}
	const bad, end = 0x0ffffff7, 0x0ffffff8
	next := func(cluster int64) int64 { return int64(le.Uint32(first[cluster*4:])) }
	limit := clusters + 2
	pointedAt := make([]bool, limit)
	for i := int64(2); i < limit; i++ {
		n := next(i)
		switch {
		case n == 0 || n == bad || n >= end && n <= 0x0fffffff:
		case n < 2 || n >= limit:
			return fmt.Errorf("FAT: cluster %d is followed by %d, which there is not", i, n)
		case pointedAt[n]:
			return fmt.Errorf("FAT: two chains meet at cluster %d", n)
		default:
			pointedAt[n] = true
			if m := next(n); m == 0 || m == bad {
				return fmt.Errorf("FAT: cluster %d is followed by %d, which is not in use", i, n)
			}
		}
	}
	for i := limit; i < size/4; i++ {
		if next(i) != 0 {
			return fmt.Errorf("FAT: entry %d is in use, but there are only %d clusters", i, clusters)
		}
	}
	// No cluster has two before it, so what can't be reached from a chain's
	// first cluster lies in a ring.
	reached := make([]bool, limit)
	var root int64
	for i := int64(2); i < limit; i++ {
		if n := next(i); n == 0 || n == bad || pointedAt[i] {
			continue
		}
		length := int64(0)
		for c := i; c < end; c = next(c) {
			reached[c] = true
			length++
		}
		if i == 2 {
			root = length
		}
	}
	for i := int64(2); i < limit; i++ {
		if pointedAt[i] && !reached[i] {
			return fmt.Errorf("FAT: the chain of cluster %d is a ring", i)
		}
	}
	if root == 0 || root*v.cluster > maxFolder {
		return fmt.Errorf("the root folder has %d clusters", root)
	}
	return nil
}

// walk reads all folders.
func (v *volume) walk() error {
	root := &file{name: ".", path: ".", dir: true}
	v.files["."] = root
	if label := v.fat.Label(); label != "" {
		v.label = label
	}
	folders := map[uint32]string{} // by first cluster
	for queue := []*file{root}; len(queue) > 0; queue = queue[1:] {
		folder := queue[0]
		clusters, err := v.chain(folder)
		if err != nil {
			return err
		}
		if other, ok := folders[clusters[0]]; ok {
			return fmt.Errorf("the folders %q and %q are one", other, folder.path)
		}
		folders[clusters[0]] = folder.path
		if n := int64(len(clusters)) * v.cluster; n > maxFolder {
			return fmt.Errorf("the folder %q has %d MiB", folder.path, n>>20)
		}
		entries, err := v.fat.ReadDir(folder.path)
		if err == nil {
			err = v.failed()
		}
		if err != nil {
			return fmt.Errorf("folder %q: %w", folder.path, err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil {
				return fmt.Errorf("folder %q: %w", folder.path, err)
			}
			f := &file{name: e.Name(), path: path.Join(folder.path, e.Name()), dir: e.IsDir(), modTime: info.ModTime()}
			if !f.dir {
				f.size = info.Size()
			}
			// The library takes a backslash for a slash.
			if f.name == "." || f.name == ".." || strings.ContainsAny(f.name, `/\`) || !fs.ValidPath(f.path) {
				return fmt.Errorf("folder %q: %q is not a name", folder.path, f.name)
			}
			key := strings.ToLower(f.path)
			if _, ok := v.files[key]; ok {
				return fmt.Errorf("there are two of %q", f.path)
			}
			v.files[key] = f
			folder.entries = append(folder.entries, f)
			if f.dir {
				queue = append(queue, f)
			}
		}
		slices.SortFunc(folder.entries, func(a, b *file) int { return strings.Compare(a.name, b.name) })
	}
	return nil
}

// failed is the error that the library ignored.
func (v *volume) failed() error {
	v.src.mu.Lock()
	defer v.src.mu.Unlock()
	return v.src.err
}

// find asks the library for a file.
func (v *volume) find(f *file) (*fat12.File, error) {
	opened, err := v.fat.Open(f.path)
	if err == nil {
		err = v.failed()
	}
	if err != nil {
		return nil, fmt.Errorf("%q: %w", f.path, err)
	}
	// A damaged folder can have an 8.3 name that is another file's long one.
	found, ok := opened.(*fat12.File)
	if !ok {
		return nil, fmt.Errorf("%q is no FAT file", f.path)
	}
	if info, err := found.Stat(); err != nil || f.path != "." && (info.Name() != f.name || info.IsDir() != f.dir || !f.dir && info.Size() != f.size) {
		return nil, fmt.Errorf("%q: its folder has another entry of that name", f.path)
	}
	return found, nil
}

func (v *volume) chain(f *file) ([]uint32, error) {
	found, err := v.find(f)
	if err != nil {
		return nil, err
	}
	clusters, err := found.GetClusterChain()
	if err == nil && len(clusters) == 0 {
		err = errors.New("no clusters")
	}
	if err != nil {
		return nil, fmt.Errorf("folder %q: %w", f.path, err)
	}
	return clusters, nil
}

// ranges finds where a file's bytes lie on the disk.
func (v *volume) ranges(f *file) (ranges []diskRange, err error) {
	if f.size == 0 {
		return nil, nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	err = v.src.watch(lookupBudget, func() error {
		found, err := v.find(f)
		if err != nil {
			return err
		}
		runs, err := found.GetDiskRanges()
		if err != nil {
			return fmt.Errorf("%q: %w", f.path, err)
		}
		left := f.size
		for _, r := range runs {
			off, n := int64(r.Offset), int64(r.Length)
			if off < 0 || n <= 0 || n > v.size-off {
				return fmt.Errorf("%q leaves the volume", f.path)
			}
			n = min(n, left)
			ranges = append(ranges, diskRange{v.at + off, n})
			left -= n
			if left == 0 {
				return nil
			}
		}
		return fmt.Errorf("%q has %d bytes, its clusters have fewer", f.path, f.size)
	})
	return ranges, err
}

type diskRange struct{ off, n int64 }

// file is a file or folder; it is its own fs.FileInfo and fs.DirEntry.
type file struct {
	name, path string
	size       int64
	dir        bool
	modTime    time.Time
	entries    []*file
}

func (f *file) Name() string               { return f.name }
func (f *file) Size() int64                { return f.size }
func (f *file) ModTime() time.Time         { return f.modTime }
func (f *file) IsDir() bool                { return f.dir }
func (f *file) Sys() any                   { return nil }
func (f *file) Type() fs.FileMode          { return f.Mode().Type() }
func (f *file) Info() (fs.FileInfo, error) { return f, nil }
func (f *file) Mode() fs.FileMode {
	if f.dir {
		return fs.ModeDir | 0o555
	}
	return 0o444
}

// Open implements fs.FS.
func (v *volume) Open(name string) (fs.File, error) {
	fail := func(err error) (fs.File, error) { return nil, &fs.PathError{Op: "open", Path: name, Err: err} }
	if !fs.ValidPath(name) {
		return fail(fs.ErrInvalid)
	}
	f := v.files[strings.ToLower(name)]
	if f == nil {
		return fail(fs.ErrNotExist)
	}
	if f.dir {
		return &openFolder{file: f, left: f.entries}, nil
	}
	ranges, err := v.ranges(f)
	if err != nil {
		return fail(err)
	}
	r := &rangesReader{v.src, ranges}
	return &openFile{io.NewSectionReader(r, 0, f.size), f}, nil
}

type openFile struct {
	*io.SectionReader
	file *file
}

func (o *openFile) Stat() (fs.FileInfo, error) { return o.file, nil }
func (o *openFile) Close() error               { return nil }

// rangesReader reads a file's ranges one behind the other. It is never asked
// for bytes behind their end.
type rangesReader struct {
	src    *source
	ranges []diskRange
}

func (r *rangesReader) ReadAt(p []byte, off int64) (n int, err error) {
	for _, c := range r.ranges {
		if off >= c.n {
			off -= c.n
			continue
		}
		piece := p[n:min(int64(len(p)), int64(n)+c.n-off)]
		if err := r.src.read(piece, c.off+off); err != nil {
			return n, err
		}
		n += len(piece)
		if off = 0; n == len(p) {
			return n, nil
		}
	}
	return n, io.EOF
}

type openFolder struct {
	file *file
	left []*file
}

func (o *openFolder) Stat() (fs.FileInfo, error) { return o.file, nil }
func (o *openFolder) Close() error               { return nil }
func (o *openFolder) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: o.file.path, Err: errors.New("is a folder")}
}

// ReadDir implements fs.ReadDirFile.
func (o *openFolder) ReadDir(n int) ([]fs.DirEntry, error) {
	if n <= 0 {
		n = len(o.left)
	} else if len(o.left) == 0 {
		return nil, io.EOF
	}
	n = min(n, len(o.left))
	entries := make([]fs.DirEntry, n)
	for i, f := range o.left[:n] {
		entries[i] = f
	}
	o.left = o.left[n:]
	return entries, nil
}
