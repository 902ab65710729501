package bootfs

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// ChangedError says that a file is not what a plan took it for.
type ChangedError struct{ Path string }

func (e *ChangedError) Error() string {
	return fmt.Sprintf("%s was changed by another program meanwhile and was left as it is now; run the command again", e.Path)
}

// Apply makes the changes in their order, each durable and visible to a boot
// loader before the next. If one of the files is not what the change says it
// was, that is a *ChangedError, and usually nothing was done (a file can still
// be changed while another one is written; then the changes before it are made).
// After any other error the files say what is done; Recover removes what is left
// over.
//
// A replaced file keeps mode, owner and extended attributes. A new one is
// readable for all and its folder must be there. A path's folders hold no
// symbolic link, and a file that is one is refused.
func (f *FS) Apply(ctx context.Context, changes []Change) error {
	seen := map[string]bool{}
	for _, c := range changes {
		if err := c.valid(); err != nil {
			return err
		}
		if seen[c.Path] {
			continue // it has to be what the change before makes of it
		}
		seen[c.Path] = true
		if err := c.check(); err != nil {
			return err
		}
	}
	for _, c := range changes {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := f.apply(c); err != nil {
			return err
		}
	}
	return nil
}

func (c Change) valid() error {
	switch {
	case !filepath.IsAbs(c.Path) || filepath.Clean(c.Path) != c.Path || c.Path == "/":
		return fmt.Errorf("change %q: not the clean absolute path of a file", c.Path)
	case c.Kind < Replace || c.Kind > Variable:
		return fmt.Errorf("change %s: unknown kind %d", c.Path, c.Kind)
	case c.Kind == InPlace && (c.Old == nil || c.New == nil || len(c.Old) != len(c.New)):
		return fmt.Errorf("change %s in place: it is %d bytes and shall be %d", c.Path, len(c.Old), len(c.New))
	}
	return nil
}

// check holds the file against Old.
func (c Change) check() error {
	d, err := openFolder(filepath.Dir(c.Path))
	if errors.Is(err, fs.ErrNotExist) && c.Old == nil {
		return nil // where that is an error, it is one when the file is made
	}
	if err != nil {
		return err
	}
	defer d.Close()
	return d.holds(filepath.Base(c.Path), c.Old)
}

func (f *FS) apply(c Change) error {
	d, err := openFolder(filepath.Dir(c.Path))
	if err != nil {
		return err
	}
	defer d.Close()
	name := filepath.Base(c.Path)
	if c.Kind == Variable {
		return d.variable(name, c.Old, c.New)
	}
	on, err := f.on(d)
	if err != nil {
		return err
	}
	switch {
	case c.Kind == InPlace:
		return on.inPlace(d, name, c.Old, c.New)
	case c.New != nil:
		return on.replace(d, name, c.Old, c.New)
	case c.Old != nil:
		return on.remove(d, name, c.Old)
	}
	return d.holds(name, nil)
}

// holds says by a *ChangedError if the file is not want; nil is no file.
func (d *folder) holds(name string, want []byte) error {
	f, err := d.open(name, unix.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if want == nil {
			return nil
		}
		return &ChangedError{filepath.Join(d.path, name)}
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return holds(f, want)
}

func holds(f *os.File, want []byte) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if want == nil || st.Size() != int64(len(want)) {
		return &ChangedError{f.Name()}
	}
	got := make([]byte, len(want)+1)
	n, err := io.ReadFull(f, got)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read %s: %w", f.Name(), err)
	}
	if !bytes.Equal(got[:n], want) {
		return &ChangedError{f.Name()}
	}
	return nil
}

// The steps of replace and remove, and who needs them, are:
//
//  1. The new content goes into a temporary file beside the old one; fsync.
//  2. Settle. ext4, XFS: the new inode is in its place before a name leads to
//     it, and a kernel and initramfs before the menu that names them.
//  3. One rename changes what the name leads to. The old content gets the
//     temporary name by it: no inode or cluster is freed that the folder on the
//     disk may still lead to, not even if we are killed here.
//  4. fsync of both files and of the folder. FAT: the first cluster and length
//     of a file stand in the folder, but are written with the file.
//  5. Settle: the folder on the disk has the new name in the eyes of a loader.
//  6. Only now the temporary name, with the old content, is removed.
//
// Held against every prefix and random parts of the writes on ext4, XFS, btrfs
// and FAT by TestPowerCuts. Recover does step 5 and 6 after a kill.

// replace gives name the content new. It is old, nil where it is not there.
func (f *FS) replace(d *folder, name string, old, new []byte) error {
	var was *os.File
	if old != nil {
		var err error
		if was, err = d.open(name, unix.O_RDONLY, 0); err != nil {
			return err
		}
		defer was.Close()
	}
	tmp, err := f.temporary(d, func(w *os.File) error {
		if _, err := w.Write(new); err != nil {
			return err
		}
		return attributes(w, was, f)
	})
	if err != nil {
		return fmt.Errorf("write what %s shall be: %w", filepath.Join(d.path, name), err)
	}
	defer tmp.Close()
	if err := f.settle(d); err != nil {
		return errors.Join(err, d.unlink(tmp.name()))
	}
	if err := d.holds(name, old); err != nil {
		return errors.Join(err, d.unlink(tmp.name()))
	}
	return f.place(d, tmp, name, was)
}

// place gives name to the settled temporary file, in the place of was, if there
// is such: steps 3 to 6.
func (f *FS) place(d *folder, tmp *temporary, name string, was *os.File) error {
	flags := uint(unix.RENAME_NOREPLACE)
	if was != nil {
		flags = unix.RENAME_EXCHANGE
	}
	if err := f.rename(d, tmp.name(), name, flags, name); err != nil {
		return errors.Join(err, d.unlink(tmp.name()))
	}
	for _, file := range []*os.File{tmp.File, was} {
		if file == nil {
			continue
		}
		if err := file.Sync(); err != nil {
			return d.fail("make durable", name, err)
		}
	}
	if err := d.sync(); err != nil {
		return err
	}
	if err := f.settle(d); err != nil || was == nil {
		return err
	}
	if err := d.unlink(tmp.name()); err != nil {
		return err
	}
	return d.sync()
}

// remove removes the file name, which is old.
func (f *FS) remove(d *folder, name string, old []byte) error {
	was, err := d.open(name, unix.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return &ChangedError{filepath.Join(d.path, name)}
	}
	if err != nil {
		return err
	}
	defer was.Close()
	if err := holds(was, old); err != nil {
		return err
	}
	gone := temporaryName()
	if err := f.rename(d, name, gone, unix.RENAME_NOREPLACE, name); err != nil {
		return err
	}
	if err := was.Sync(); err != nil {
		return d.fail("make durable", name, err)
	}
	if err := d.sync(); err != nil {
		return err
	}
	if err := f.settle(d); err != nil {
		return err
	}
	if err := d.unlink(gone); err != nil {
		return err
	}
	return d.sync()
}

// rename renames within the folder; a person knows the file as name.
func (f *FS) rename(d *folder, from, to string, flags uint, name string) error {
	err := unix.Renameat2(d.fd(), from, d.fd(), to, flags)
	switch {
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOENT):
		return &ChangedError{filepath.Join(d.path, name)}
	case errors.Is(err, unix.EINVAL) && f.magic == unix.MSDOS_SUPER_MAGIC:
		err = fmt.Errorf("this kernel can't exchange two files on FAT; use Linux 6.0 or later: %w", err)
	case errors.Is(err, unix.EINVAL):
		err = fmt.Errorf("this kernel can't exchange two files on this file system; mount ext2 by the ext4 driver: %w", err)
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("%w; if lsattr shows that it is immutable, run chattr -i on it", err)
	case err == nil:
		return nil
	}
	return d.fail("change", name, err)
}

// inPlace writes new over the same number of bytes of old. The file stays where
// it is on the disk. A cut can leave a part of the sectors written; what differs
// between old and new should stand in one.
func (f *FS) inPlace(d *folder, name string, old, new []byte) error {
	file, err := d.open(name, unix.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := holds(file, old); err != nil {
		return err
	}
	if _, err := file.WriteAt(new, 0); err != nil {
		return fmt.Errorf("write %s: %w", file.Name(), err)
	}
	if err := file.Sync(); err != nil {
		return d.fail("make durable", name, err)
	}
	// ext4 with data=journal has even this in its journal.
	return f.settle(d)
}

// variable gives the file of an EFI variable the content new, or removes it.
// The firmware writes a variable whole or not at all.
func (d *folder) variable(name string, old, new []byte) (err error) {
	path := filepath.Join(d.path, name)
	file, err := d.open(name, unix.O_RDONLY, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		file = nil
		if old != nil {
			return &ChangedError{path}
		}
	case err != nil:
		return err
	default:
		defer file.Close()
		if err := holds(file, old); err != nil {
			return err
		}
	}
	if bytes.Equal(old, new) && (old == nil) == (new == nil) {
		return nil
	}
	if file != nil {
		// Linux protects most variables by the immutable flag, since there is
		// firmware that fails without them (Documentation/filesystems/efivarfs.rst).
		flags, err := unix.IoctlGetInt(int(file.Fd()), unix.FS_IOC_GETFLAGS)
		if err == nil && flags&immutable != 0 {
			if err := unix.IoctlSetPointerInt(int(file.Fd()), unix.FS_IOC_SETFLAGS, flags&^immutable); err != nil {
				return d.fail("make writable", name, err)
			}
			defer func() {
				if new == nil && err == nil {
					return
				}
				if back := unix.IoctlSetPointerInt(int(file.Fd()), unix.FS_IOC_SETFLAGS, flags); back != nil && err == nil {
					err = d.fail("protect again", name, back)
				}
			}()
		}
	}
	if new == nil {
		return d.unlink(name)
	}
	flags := unix.O_WRONLY
	if file == nil {
		flags |= unix.O_CREAT | unix.O_EXCL
	}
	w, err := d.open(name, flags, 0o644)
	if err != nil {
		return err
	}
	defer w.Close()
	// The kernel takes each write(2) for a whole variable.
	n, err := retry(func() (int, error) { return unix.Write(int(w.Fd()), new) })
	if err == nil && n < len(new) {
		err = io.ErrShortWrite
	}
	if err != nil {
		if file == nil {
			_ = d.unlink(name) // the name without a variable; the first error counts
		}
		return fmt.Errorf("write the EFI variable %s: %w", path, err)
	}
	return nil
}

// immutable is FS_IMMUTABLE_FL of linux/fs.h, what chattr +i sets.
const immutable = 0x10

// Remove removes files that no menu names any more, durably. One that is not
// there is no error; a folder or a link is.
func (f *FS) Remove(paths ...string) error {
	folders := map[string]*folder{}
	defer func() {
		for _, d := range folders {
			d.Close()
		}
	}()
	for _, path := range paths {
		dir, name := filepath.Dir(path), filepath.Base(path)
		d := folders[dir]
		if d == nil {
			var err error
			d, err = openFolder(dir)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			folders[dir] = d
		}
		file, err := d.open(name, unix.O_RDONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		file.Close()
		if err := d.unlink(name); err != nil {
			return err
		}
	}
	for _, d := range folders {
		if err := d.sync(); err != nil {
			return err
		}
	}
	return nil
}

// RemoveDir removes the folder dir, durably, if it is empty. If it is not, or
// is not there, nothing happens.
func (f *FS) RemoveDir(dir string) error {
	d, err := openFolder(filepath.Dir(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	err = unix.Unlinkat(d.fd(), filepath.Base(dir), unix.AT_REMOVEDIR)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTEMPTY), errors.Is(err, unix.EEXIST):
		return nil
	case err != nil:
		return d.fail("remove the folder", filepath.Base(dir), err)
	}
	return d.sync()
}

// Recover removes the temporary files that a killed run left in the folders. A
// folder that is not there has none.
func (f *FS) Recover(dirs ...string) error {
	for _, dir := range dirs {
		if err := f.recover(dir); err != nil {
			return err
		}
	}
	return nil
}

func (f *FS) recover(dir string) error {
	d, err := openFolder(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return fmt.Errorf("look into %s: %w", dir, err)
	}
	var left []string
	for _, e := range entries {
		if temporaryPattern.MatchString(e.Name()) && e.Type().IsRegular() {
			left = append(left, e.Name())
		}
	}
	if left == nil {
		return nil
	}
	on, err := f.on(d)
	if err != nil {
		return err
	}
	// It may be the old content of a name that leads to the new one only in
	// the journal or in memory.
	if err := on.settle(d); err != nil {
		return err
	}
	for _, name := range left {
		if err := d.unlink(name); err != nil {
			return err
		}
	}
	return d.sync()
}

// temporaryPattern is what temporaryName makes.
var temporaryPattern = regexp.MustCompile(`^\.memlinux-[0-9a-f]{16}\.tmp$`)

func temporaryName() string {
	var random [8]byte
	_, _ = rand.Read(random[:]) // never fails
	return ".memlinux-" + hex.EncodeToString(random[:]) + ".tmp"
}

// temporary is an open file with a temporary name.
type temporary struct{ *os.File }

func (t *temporary) name() string { return filepath.Base(t.Name()) }

// temporary makes a file in the folder that holds what fill writes, durably.
func (f *FS) temporary(d *folder, fill func(*os.File) error) (*temporary, error) {
	file, err := d.open(temporaryName(), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	t := &temporary{file}
	if err = fill(file); err == nil {
		err = file.Sync()
	}
	if err != nil {
		file.Close()
		return nil, errors.Join(err, d.unlink(t.name()))
	}
	return t, nil
}

func (d *folder) unlink(name string) error {
	if err := unix.Unlinkat(d.fd(), name, 0); err != nil {
		return d.fail("remove", name, err)
	}
	return nil
}

// attributes gives w the owner, extended attributes and mode of the file was;
// where there is none, w is for all to read.
func attributes(w, was *os.File, f *FS) error {
	if was == nil {
		if f.magic == unix.MSDOS_SUPER_MAGIC {
			return nil // it has no modes but those of the mount
		}
		return w.Chmod(0o644)
	}
	var from, to unix.Stat_t
	if err := unix.Fstat(int(was.Fd()), &from); err != nil {
		return err
	}
	if err := unix.Fstat(int(w.Fd()), &to); err != nil {
		return err
	}
	if from.Uid != to.Uid || from.Gid != to.Gid {
		if err := w.Chown(int(from.Uid), int(from.Gid)); err != nil {
			return err
		}
	}
	if err := copyXattrs(w, was); err != nil {
		return err
	}
	// Last: a change of owner clears bits of the mode.
	if from.Mode != to.Mode {
		return unix.Fchmod(int(w.Fd()), from.Mode&0o7777)
	}
	return nil
}

// copyXattrs copies the extended attributes, such as an SELinux label or an
// ACL, but not those that sign the old content.
func copyXattrs(w, was *os.File) error {
	size, err := unix.Flistxattr(int(was.Fd()), nil)
	if errors.Is(err, unix.EOPNOTSUPP) || err == nil && size == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the extended attributes of %s: %w", was.Name(), err)
	}
	list := make([]byte, size)
	if size, err = unix.Flistxattr(int(was.Fd()), list); err != nil {
		return fmt.Errorf("read the extended attributes of %s: %w", was.Name(), err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:size]), "\x00"), "\x00") {
		if name == "security.ima" || name == "security.evm" {
			continue
		}
		value := make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err := unix.Fgetxattr(int(was.Fd()), name, value)
		if err == nil {
			err = unix.Fsetxattr(int(w.Fd()), name, value[:n], 0)
		}
		if err != nil {
			return fmt.Errorf("copy the extended attribute %s of %s: %w", name, was.Name(), err)
		}
	}
	return nil
}
