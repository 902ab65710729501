package bootfs

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// FS is a mounted file system that boot files lie on.
type FS struct {
	dir    string // an existing folder on it, absolute
	device uint64 // st_dev of dir
	magic  int64  // as statfs(2) says
}

// names are the file systems with a procedure that was proven against power
// cuts, by the magic number of statfs(2). ext2, ext3 and ext4 share one.
var names = map[int64]string{
	unix.EXT4_SUPER_MAGIC:  "ext4",
	unix.XFS_SUPER_MAGIC:   "xfs",
	unix.BTRFS_SUPER_MAGIC: "btrfs",
	unix.MSDOS_SUPER_MAGIC: "vfat",
}

// Open looks at the file system that the existing folder dir lies on; dir is
// absolute and has no symbolic link in it. One that is mounted read-only, and
// one of a kind without a proven procedure, is an error that says what to do.
func Open(dir string) (*FS, error) {
	d, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.fileSystem()
}

// fileSystem is the one that the folder lies on.
func (d *folder) fileSystem() (*FS, error) {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd(), &st); err != nil {
		return nil, d.fail("look at", "", err)
	}
	var vfs unix.Statfs_t
	if err := unix.Fstatfs(d.fd(), &vfs); err != nil {
		return nil, d.fail("look at", "", err)
	}
	f := &FS{dir: d.path, device: st.Dev, magic: vfs.Type}
	if names[f.magic] == "" {
		_, kind := mountOf(d.path)
		return nil, fmt.Errorf("%s lies on a file system (%s) that memlinux can't change safely against power cuts; it can on ext2, ext3, ext4, XFS, btrfs and FAT: "+
			"mount one of these there", d.path, kind)
	}
	if vfs.Flags&unix.ST_RDONLY != 0 {
		point, _ := mountOf(d.path)
		return nil, fmt.Errorf("%s is mounted read-only: run mount -o remount,rw %s, and if that fails, look into dmesg for the disk's errors", point, point)
	}
	return f, nil
}

// mountOf is the mount point that dir lies below, and its file system's name.
func mountOf(dir string) (point, kind string) {
	point, kind = dir, "of an unknown kind"
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(dir))
	if err != nil {
		return point, kind
	}
	longest := -1
	for _, m := range mounts {
		// Of two mounts on one point the later one is seen.
		if len(m.Mountpoint) >= longest {
			longest, point, kind = len(m.Mountpoint), m.Mountpoint, m.FSType
		}
	}
	return point, kind
}

// Type is ext4 (also for ext2 and ext3), xfs, btrfs or vfat.
func (f *FS) Type() string { return names[f.magic] }

// Free is the number of bytes that can be written to the file system, without
// what it keeps back for root.
func (f *FS) Free() (int64, error) {
	free, _, err := f.space()
	return free, err
}

// space is the free space and the size of a block, in bytes.
func (f *FS) space() (free, block int64, err error) {
	var vfs unix.Statfs_t
	if err := unix.Statfs(f.dir, &vfs); err != nil {
		return 0, 0, fmt.Errorf("ask for the free space of %s: %w", f.dir, err)
	}
	block = max(vfs.Bsize, 512)
	if vfs.Bavail > math.MaxInt64/uint64(block) {
		return math.MaxInt64, block, nil
	}
	return int64(vfs.Bavail) * block, block, nil
}

// on is the file system that the folder lies on: f, or another one.
func (f *FS) on(d *folder) (*FS, error) {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd(), &st); err != nil {
		return nil, d.fail("look at", "", err)
	}
	if st.Dev == f.device {
		return f, nil
	}
	return d.fileSystem()
}

// folder is an open folder. Whoever renames its parents or puts links in their
// place does not lead us elsewhere.
type folder struct {
	*os.File
	path string
}

// openFolder opens an existing folder; a symbolic link anywhere in path is an
// error.
func openFolder(path string) (*folder, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("open %q: the path is not absolute", path)
	}
	path = filepath.Clean(path)
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	// Step by step, not by openat2(2): that is shut off in a service that may set
	// no setuid bit (systemd.exec(5), RestrictSUIDSGID=).
	fd, err := retry(func() (int, error) { return unix.Open("/", flags, 0) })
	for name := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		if err != nil || name == "" { // "" for the root itself
			break
		}
		above := fd
		fd, err = retry(func() (int, error) { return unix.Openat(above, name, flags, 0) })
		if errors.Is(err, unix.ENOTDIR) {
			var st unix.Stat_t
			if unix.Fstatat(above, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
				err = unix.ELOOP
			}
		}
		unix.Close(above)
	}
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("open %s: a part of it is a symbolic link, which memlinux does not follow here", path)
	case err != nil:
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &folder{File: os.NewFile(uintptr(fd), path), path: path}, nil
}

func (d *folder) fd() int { return int(d.Fd()) }

// fail says what could not be done to which name in the folder.
func (d *folder) fail(verb, name string, err error) error {
	return fmt.Errorf("%s %s: %w", verb, filepath.Join(d.path, name), err)
}

// open opens a regular file in the folder, and nothing else: neither a link's
// target nor a pipe that would block.
func (d *folder) open(name string, flags int, mode uint32) (*os.File, error) {
	fd, err := retry(func() (int, error) {
		return unix.Openat(d.fd(), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, mode)
	})
	if errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link, not a regular file; memlinux does not follow it", filepath.Join(d.path, name))
	}
	if err != nil {
		return nil, d.fail("open", name, err)
	}
	f := os.NewFile(uintptr(fd), filepath.Join(d.path, name))
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file; memlinux does not touch it", f.Name())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sync makes the folder's names durable.
func (d *folder) sync() error {
	if err := d.Sync(); err != nil {
		return fmt.Errorf("make the folder %s durable: %w", d.path, err)
	}
	return nil
}

// retry does what a signal interrupted again.
func retry[T any](call func() (T, error)) (T, error) {
	for {
		v, err := call()
		if !errors.Is(err, unix.EINTR) {
			return v, err
		}
	}
}
