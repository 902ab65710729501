package collect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// node is an entry of the payload.
type node struct {
	path     string // without a slash at either end
	mode     fs.FileMode
	uid, gid int
	link     string // of a symlink
	host     string // of a file: where its content is, or
	text     []byte // the content
	size     int64
	id       fileID // of host
	caps     []byte
	why      string
	source   string // how an error names where it is from
	// for the Summary: what it came along with, and as what
	with, as string
	// A file that has two names here gets two names there. Not so what a user
	// names by [[file]]: two files that begin as one may go apart.
	share bool
}

type fileID struct{ dev, ino uint64 }

func idOf(info fs.FileInfo) fileID {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return fileID{s.Dev, s.Ino}
	}
	return fileID{}
}

// kept are the bits of a mode that go into the system.
const kept = fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky

// tree is the payload while it grows.
type tree struct {
	nodes    map[string]*node
	problems []string
	notes    []string
}

func (t *tree) problem(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(t.problems, s) {
		t.problems = append(t.problems, s)
	}
}

func (t *tree) note(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(t.notes, s) {
		t.notes = append(t.notes, s)
	}
}

// put adds n. What is there already must be the same.
func (t *tree) put(n *node) {
	if n.size > MaxFile {
		t.problem("%s: /%s has %d bytes, and no file of 4 GiB or more can be in the system", n.source, n.path, n.size)
		return
	}
	old, ok := t.nodes[n.path]
	if !ok {
		t.nodes[n.path] = n
		return
	}
	differ := ""
	switch {
	case old.mode.Type() != n.mode.Type():
		differ = fmt.Sprintf("is a %s of %s, and a %s of %s", kind(old.mode), old.source, kind(n.mode), n.source)
	case old.link != n.link:
		differ = fmt.Sprintf("is a symlink to %s of %s, and one to %s of %s", old.link, old.source, n.link, n.source)
	case old.mode != n.mode:
		differ = fmt.Sprintf("has the mode %04o of %s, and %04o of %s", tarMode(old.mode), old.source, tarMode(n.mode), n.source)
	case old.uid != n.uid || old.gid != n.gid:
		differ = fmt.Sprintf("belongs to %d:%d by %s, and to %d:%d by %s", old.uid, old.gid, old.source, n.uid, n.gid, n.source)
	case !bytes.Equal(old.caps, n.caps):
		differ = fmt.Sprintf("has other capabilities of %s than of %s", old.source, n.source)
	case n.mode.IsRegular():
		same, err := sameContent(old, n)
		if err != nil {
			t.problem("%s: %v", n.source, err)
			return
		}
		if !same {
			differ = fmt.Sprintf("has other content of %s than of %s", old.source, n.source)
		}
	}
	if differ != "" {
		t.problem("/%s %s: only one can be", n.path, differ)
	}
}

func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "folder"
	case m.IsRegular():
		return "file"
	case m&fs.ModeSymlink != 0:
		return "symlink"
	}
	return "named pipe"
}

// tarMode is the mode in the bits of chmod(2).
func tarMode(m fs.FileMode) int64 {
	bits := int64(m.Perm())
	for bit, value := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			bits |= value
		}
	}
	return bits
}

func sameContent(a, b *node) (bool, error) {
	if a.host != "" && a.id == b.id {
		return true, nil
	}
	if a.size != b.size {
		return false, nil
	}
	ra, err := a.open()
	if err != nil {
		return false, err
	}
	defer ra.Close()
	rb, err := b.open()
	if err != nil {
		return false, err
	}
	defer rb.Close()
	var ba, bb [64 << 10]byte
	for {
		na, errA := io.ReadFull(ra, ba[:])
		nb, errB := io.ReadFull(rb, bb[:])
		for _, err := range []error{errA, errB} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if !bytes.Equal(ba[:na], bb[:nb]) {
			return false, nil
		}
		if errA != nil || errB != nil {
			return true, nil
		}
	}
}

// open opens the content of a file, which must still be the one that was found.
func (n *node) open() (io.ReadCloser, error) {
	if n.host == "" {
		return io.NopCloser(bytes.NewReader(n.text)), nil
	}
	f, err := os.OpenFile(n.host, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, reading(n.host, err)
	}
	info, err := f.Stat()
	if err == nil && (idOf(info) != n.id || info.Size() != n.size || !info.Mode().IsRegular()) {
		err = changed(n.host)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func changed(name string) error {
	return fmt.Errorf("%s changed while it was read: try again when nothing writes into it", name)
}

// reading says what to do about an error of a file that is read.
func reading(name string, err error) error {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		err = pathErr.Err
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s can't be read by this user: run the command as one who may (%w)", name, err)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is not there (%w)", name, err)
	}
	return fmt.Errorf("read %s: %w", name, err)
}

// inFolders checks that what is on the way to each entry is a folder.
func (t *tree) inFolders() {
	for _, name := range t.sorted() {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if up := t.nodes[dir]; up != nil && !up.mode.IsDir() {
				t.problem("/%s is a %s of %s, and a folder because of /%s of %s: only one can be", dir, kind(up.mode), up.source, name, t.nodes[name].source)
				break
			}
		}
	}
}

func (t *tree) sorted() []string {
	names := make([]string, 0, len(t.nodes))
	for name := range t.nodes {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// file follows the symlinks of the tree to the file that is at an absolute path of
// the system.
func (t *tree) file(target string) (*node, bool) {
	for range maxLinks {
		n := t.nodes[strings.TrimPrefix(path.Clean(target), "/")]
		switch {
		case n == nil:
			return nil, false
		case n.mode.IsRegular():
			return n, true
		case n.mode&fs.ModeSymlink == 0:
			return nil, false
		case path.IsAbs(n.link):
			target = n.link
		default:
			target = path.Join(path.Dir(target), n.link)
		}
	}
	return nil, false
}

// maxLinks is how many symlinks in a row the kernel follows (path_resolution(7)).
const maxLinks = 40

// capsOf is the raw security.capability of a file that is no symlink; nil for none.
func capsOf(name string) ([]byte, error) {
	b := make([]byte, 64) // vfs_ns_cap_data has 24
	n, err := unix.Lgetxattr(name, "security.capability", b)
	return capsResult(name, b, n, err)
}

func capsResult(name string, b []byte, n int, err error) ([]byte, error) {
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read the capabilities of %s: %w", name, err)
	}
	return b[:n:n], nil
}

// copyExactly copies the size bytes of r, which must have no more and no less.
func copyExactly(ctx context.Context, w io.Writer, r io.Reader, size int64, name string, step func(int64)) error {
	buf := make([]byte, 128<<10)
	for left := size; ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, buf)
		if int64(n) > left {
			return changed(name)
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return fmt.Errorf("send %s: %w", name, err)
		}
		left -= int64(n)
		step(int64(n))
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			if left != 0 {
				return changed(name)
			}
			return nil
		case err != nil:
			return reading(name, err)
		}
	}
}
