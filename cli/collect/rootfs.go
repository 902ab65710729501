package collect

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// RootInfo is what a root tree has, and what its image says of how to start it.
type RootInfo struct {
	Kind    string // "folder", "tar", "image"
	Image   string // digest of an image, as in "sha256:…": of its manifest, or of its configuration in a docker save; else ""
	Entries int    // of the tar
	Bytes   int64  // content of its files
	Skipped int    // devices and sockets, which the system makes itself
	Special []Special
	Notes   []string // sentences

	// The image's configuration; empty for others.
	Entrypoint, Cmd, Env []string
	WorkingDir, User     string
}

// Rootfs writes a tar with the root tree that from has, with owners, modes, hard
// links, symlinks and capabilities as they are there. From is a folder, a tar (plain
// or compressed by xz, gzip, bzip2 or zstd), or a container image: the folder of an
// OCI layout, a tar of one, or one that docker save made. Of an image its layers are
// applied in order, and each must have the digest that the image says.
//
// What is in /proc, /sys and /dev is left out, and all devices and sockets. Each
// path is there once, a folder before what is in it, and a hard link behind its
// file. A tar or image is read twice: what is wrong with it is found before the
// first byte is written.
func Rootfs(ctx context.Context, w io.Writer, from string, progress Progress) (RootInfo, error) {
	info, err := os.Stat(from)
	if err != nil {
		return RootInfo{}, reading(from, err)
	}
	buffer := bufio.NewWriterSize(w, 256<<10)
	out := &rootWriter{ctx: ctx, tar: tar.NewWriter(buffer), why: "root tree (" + from + ")", progress: progress}
	switch {
	case info.IsDir() && isLayout(from):
		err = out.layout(from)
	case info.IsDir():
		err = out.folder(from)
	case info.Mode().IsRegular():
		err = out.archive(from)
	default:
		err = fmt.Errorf("%s is neither a folder nor a file: a root tree is read twice, so write it into a file first", from)
	}
	if err == nil && out.info.Entries == 0 {
		err = fmt.Errorf("%s holds nothing that could be a root tree", from)
	}
	if err != nil {
		return RootInfo{}, err
	}
	if err := out.tar.Close(); err != nil {
		return RootInfo{}, fmt.Errorf("send the end of the root tree: %w", err)
	}
	if err := buffer.Flush(); err != nil {
		return RootInfo{}, fmt.Errorf("send the end of the root tree: %w", err)
	}
	return out.info, nil
}

// rootWriter writes the tar of a root tree.
type rootWriter struct {
	ctx         context.Context
	tar         *tar.Writer
	why         string
	progress    Progress
	done, total int64
	info        RootInfo
}

// inode is a file of a root tree, apart from its names.
type inode struct {
	kind     byte  // tar.TypeReg and so on
	mode     int64 // in the bits of chmod(2)
	uid, gid int
	link     string // target of a symlink
	size     int64
	caps     string

	// For a layer's: where it was read, and the names that it has in the end.
	entry entryID
	names []string
}

// header writes the entry of a file, or of a further name of the one at hardLink.
func (w *rootWriter) header(name string, i *inode, hardLink string) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Typeflag: i.kind, Name: name, Linkname: i.link, Mode: i.mode, Uid: i.uid, Gid: i.gid, Size: i.size,
		PAXRecords: map[string]string{WhyRecord: w.why},
	}
	if i.kind == tar.TypeDir {
		h.Name += "/"
	}
	if i.caps != "" {
		h.PAXRecords[CapsRecord] = i.caps
	}
	if hardLink != "" {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, hardLink, 0
	}
	if err := w.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("send /%s: %w", name, err)
	}
	w.info.Entries++
	if i.kind == tar.TypeReg && (i.mode&0o6000 != 0 || i.caps != "") {
		s := Special{Path: name, Mode: fs.FileMode(i.mode & 0o777), UID: i.uid, GID: i.gid}
		if i.mode&0o4000 != 0 {
			s.Mode |= fs.ModeSetuid
		}
		if i.mode&0o2000 != 0 {
			s.Mode |= fs.ModeSetgid
		}
		if i.caps != "" {
			s.Caps = []byte(i.caps)
		}
		w.info.Special = append(w.info.Special, s)
	}
	return nil
}

func (w *rootWriter) content(r io.Reader, size int64, name string) error {
	w.info.Bytes += size
	return copyExactly(w.ctx, w.tar, r, size, name, func(n int64) {
		if w.done += n; w.progress != nil {
			w.progress(w.done, w.total)
		}
	})
}

// isLayout reports whether a folder is an OCI layout (image-spec, image-layout.md).
func isLayout(dir string) bool {
	for _, name := range []string{"oci-layout", "index.json"} {
		if info, err := os.Lstat(filepath.Join(dir, name)); err != nil || !info.Mode().IsRegular() {
			return false
		}
	}
	return true
}

// virtual are the folders whose content the kernel makes.
var virtual = []string{"proc", "sys", "dev"}

// isVirtual reports whether a path is in one of them.
func isVirtual(name string) bool {
	top, _, below := strings.Cut(name, "/")
	return below && slices.Contains(virtual, top)
}

// folder sends a folder. It goes through an os.Root, for the tree may be another
// user's, who could lay symlinks where a moment ago were folders.
func (w *rootWriter) folder(from string) error {
	w.info.Kind = "folder"
	root, err := os.OpenRoot(from)
	if err != nil {
		return reading(from, err)
	}
	defer root.Close()
	seen := map[fileID]string{} // files that have more names, by the first
	foreign := 0
	err = fs.WalkDir(root.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		full := filepath.Join(from, name)
		if err != nil {
			return reading(full, err)
		}
		if name == "." {
			return w.ctx.Err()
		}
		info, err := root.Lstat(name)
		if err != nil {
			return reading(full, err)
		}
		if isVirtual(name) {
			if info.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if err := w.entry(root, name, full, info, seen); err != nil {
			return err
		}
		if s, ok := info.Sys().(*syscall.Stat_t); ok && s.Uid != 0 {
			foreign++
		}
		return nil
	})
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 && foreign == w.info.Entries {
		w.info.Notes = append(w.info.Notes, fmt.Sprintf(
			"no file of %s belongs to root, as in a tree that was unpacked by another user: owners are kept as they are; unpack it as root, or take its tar", from))
	}
	return nil
}

// entry sends one entry of a folder.
func (w *rootWriter) entry(root *os.Root, name, full string, info fs.FileInfo, seen map[fileID]string) error {
	i := &inode{mode: tarMode(info.Mode())}
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("read %s: its owner is not known", full)
	}
	i.uid, i.gid = int(s.Uid), int(s.Gid)
	switch {
	case info.IsDir():
		i.kind = tar.TypeDir
		return w.header(name, i, "")
	case info.Mode()&fs.ModeSymlink != 0:
		var err error
		i.kind, i.mode = tar.TypeSymlink, 0o777
		if i.link, err = root.Readlink(name); err != nil {
			return reading(full, err)
		}
		return w.header(name, i, "")
	case info.Mode()&fs.ModeNamedPipe != 0:
		i.kind = tar.TypeFifo
		return w.header(name, i, "")
	case !info.Mode().IsRegular():
		w.info.Skipped++
		return nil
	}
	if info.Size() > MaxFile {
		return tooLarge(full, info.Size())
	}
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return reading(full, err)
	}
	defer f.Close()
	now, err := f.Stat()
	if err != nil {
		return reading(full, err)
	}
	if idOf(now) != idOf(info) || now.Size() != info.Size() {
		return changed(full)
	}
	b := make([]byte, 64)
	n, err := unix.Fgetxattr(int(f.Fd()), "security.capability", b)
	caps, err := capsResult(full, b, n, err)
	if err != nil {
		return err
	}
	i.kind, i.size, i.caps = tar.TypeReg, info.Size(), string(caps)
	if s.Nlink > 1 {
		if first, ok := seen[idOf(info)]; ok {
			return w.header(name, i, first)
		}
		seen[idOf(info)] = name
	}
	if err := w.header(name, i, ""); err != nil {
		return err
	}
	return w.content(f, i.size, full)
}

func tooLarge(name string, size int64) error {
	return fmt.Errorf("%s has %d bytes, and no file of 4 GiB or more can be in the system: remove it from the root tree", name, size)
}

// errNoTar is what is said of a file that is none of what it could be.
var errNoTar = errors.New("is neither a tar (plain, or compressed by xz, gzip, bzip2 or zstd) nor a container image")
