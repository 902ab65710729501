package bootfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Extent is a piece of a file on its disk, in bytes.
type Extent struct {
	Offset   int64 // in the file
	Physical int64 // from the start of the file system's device
	Length   int64
}

// Of linux/fs.h and Documentation/filesystems/fiemap.rst.
const (
	ioctlFiemap    = 0xC020660B // FS_IOC_FIEMAP
	ioctlFibmap    = 1          // FIBMAP
	ioctlBlockSize = 2          // FIGETBSZ

	fiemapSync = 1 // FIEMAP_FLAG_SYNC: no delayed allocation

	fiemapLast   = 0x1    // FIEMAP_EXTENT_LAST
	fiemapMerged = 0x1000 // FIEMAP_EXTENT_MERGED: says nothing of the place
	fiemapShared = 0x2000 // FIEMAP_EXTENT_SHARED: neither does this
)

// fiemapHoles names what the flags of an extent say against reading it from the
// disk as it is.
var fiemapHoles = []struct {
	flag uint32
	why  string
}{
	{0x2, "its place is not known"},
	{0x4, "it is not on the disk yet"},
	{0x8, "it is compressed"},
	{0x80, "it is encrypted"},
	{0x200, "it lies within the file system's metadata"},
	{0x100, "it is not aligned to blocks"},
	{0x400, "it shares a block with other files"},
	{0x800, "it was never written"},
}

// Extents says where the bytes of a file lie, in the file's order and without a
// gap. It is an error where that can't be told: on btrfs, and where the file has
// holes or is stored in another form than its bytes.
func Extents(path string) ([]Extent, error) {
	d, err := openFolder(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	file, err := d.open(filepath.Base(path), unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return nil, err
	}
	var vfs unix.Statfs_t
	if err := unix.Fstatfs(int(file.Fd()), &vfs); err != nil {
		return nil, fmt.Errorf("look at the file system of %s: %w", path, err)
	}
	if vfs.Type == unix.BTRFS_SUPER_MAGIC {
		return nil, fmt.Errorf("where %s lies on the disk can't be told: btrfs has addresses of its own", path)
	}
	extents, err := fiemap(file, st.Size())
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) {
		extents, err = fibmap(file, st.Size()) // FAT
	}
	if err != nil {
		return nil, fmt.Errorf("where %s lies on the disk can't be told: %w", path, err)
	}
	return extents, nil
}

func fiemap(file *os.File, size int64) ([]Extent, error) {
	const head, each, room = 32, 56, 64
	var extents []Extent
	var at int64
	for at < size {
		buf := make([]byte, head+room*each)
		binary.NativeEndian.PutUint64(buf[0:], uint64(at))
		binary.NativeEndian.PutUint64(buf[8:], uint64(size-at))
		binary.NativeEndian.PutUint32(buf[16:], fiemapSync)
		binary.NativeEndian.PutUint32(buf[24:], room)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), ioctlFiemap, uintptr(unsafe.Pointer(&buf[0]))); errno != 0 { //nolint:gosec // as ioctl(2) wants it
			return nil, errno
		}
		n := int(binary.NativeEndian.Uint32(buf[20:]))
		if n == 0 {
			return nil, fmt.Errorf("it has a hole at byte %d", at)
		}
		for i := range min(n, room) {
			b := buf[head+i*each:]
			e := Extent{
				Offset:   int64(binary.NativeEndian.Uint64(b[0:])),
				Physical: int64(binary.NativeEndian.Uint64(b[8:])),
				Length:   int64(binary.NativeEndian.Uint64(b[16:])),
			}
			flags := binary.NativeEndian.Uint32(b[40:])
			for _, h := range fiemapHoles {
				if flags&h.flag != 0 {
					return nil, fmt.Errorf("the part at byte %d: %s", e.Offset, h.why)
				}
			}
			if flags &^= fiemapLast | fiemapMerged | fiemapShared; flags != 0 {
				return nil, fmt.Errorf("the part at byte %d has unknown flags 0x%x", e.Offset, flags)
			}
			if e.Offset > at || e.Length <= 0 || e.Offset+e.Length <= at {
				return nil, fmt.Errorf("it has a hole at byte %d", at)
			}
			// The first and the last one may reach over what was asked for.
			e.Physical += at - e.Offset
			e.Length = min(e.Offset+e.Length, size) - at
			e.Offset = at
			extents = append(extents, e)
			if at += e.Length; at >= size {
				break
			}
		}
	}
	return extents, nil
}

// fibmap asks for the file's blocks one by one.
func fibmap(file *os.File, size int64) ([]Extent, error) {
	block, err := unix.IoctlGetInt(int(file.Fd()), ioctlBlockSize)
	if err != nil {
		return nil, err
	}
	if err := file.Sync(); err != nil { // no delayed allocation
		return nil, err
	}
	b := int64(int32(block))
	var extents []Extent
	for at := int64(0); at < size; at += b {
		number := int32(at / b)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), ioctlFibmap, uintptr(unsafe.Pointer(&number))); errno != 0 { //nolint:gosec // as ioctl(2) wants it
			return nil, errno
		}
		if number == 0 {
			return nil, fmt.Errorf("it has a hole at byte %d", at)
		}
		physical, length := int64(uint32(number))*b, min(b, size-at)
		if n := len(extents); n > 0 && extents[n-1].Physical+extents[n-1].Length == physical {
			extents[n-1].Length += length
			continue
		}
		extents = append(extents, Extent{Offset: at, Physical: physical, Length: length})
	}
	return extents, nil
}
