package tarball

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"
)

// Limits bounds what Unpack makes.
type Limits struct {
	Bytes int64 // of the plain tar, and of all files together
	Files int   // files, folders and links together
}

// maxName is the longest path, in bytes: PATH_MAX of linux/limits.h without the NUL.
const maxName = 4095

// maxDepth bounds the folders in folders: each file in them takes as many system
// calls. Linux's source has 11.
const maxDepth = 200

// Unpack makes the files of r, a plain tar (POSIX.1-2017 pax, or GNU), in the
// empty folder dir. report, which may be nil, is called with what was made so far.
//
// Files, folders, and links that stay inside come out, with the tar's times, no
// owners, and permissions that let nobody but their owner write. A member that
// would be elsewhere, be reached through a link, lead elsewhere as a link, come
// twice, or be a device is an error that names it. So is a tar with more than
// lim allows, one that ends too early or has something behind its end, and what
// is no tar; what was made until then stays for the caller to remove.
func Unpack(ctx context.Context, r io.Reader, dir string, lim Limits, report func(files int, bytes int64)) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	defer root.Close()
	if report == nil {
		report = func(int, int64) {}
	}
	in := &bounded{ctx: ctx, r: r, left: lim.Bytes}
	u := unpacker{root: root, in: in, tar: tar.NewReader(in), lim: lim, report: report, made: map[string]byte{".": tar.TypeDir}, now: time.Now(), buf: make([]byte, 128<<10)}
	return u.all()
}

var errTooBig = errors.New("too big")

// bounded ends with errTooBig behind its bound, and with the context, and counts
// the zero bytes at its end.
type bounded struct {
	ctx   context.Context
	r     io.Reader
	left  int64
	zeros int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	// One byte more, to tell a tar that just fits from one that does not.
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, errTooBig
	}
	for i := n - 1; ; i-- {
		if i < 0 {
			b.zeros += int64(n)
			break
		}
		if p[i] != 0 {
			b.zeros = int64(n - 1 - i)
			break
		}
	}
	return n, err
}

type unpacker struct {
	root   *os.Root
	in     *bounded
	tar    *tar.Reader
	lim    Limits
	report func(files int, bytes int64)
	made   map[string]byte // type of each member and folder by its clean path
	last   string          // the member in hand
	files  int
	bytes  int64
	now    time.Time
	buf    []byte
}

func (u *unpacker) all() error {
	for {
		u.in.zeros = 0
		h, err := u.tar.Next()
		if errors.Is(err, io.EOF) {
			return u.end()
		}
		if err != nil {
			return u.explain(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader { // git archive's note of its commit
			continue
		}
		u.last = h.Name
		if err := u.member(h); err != nil {
			return err
		}
		u.report(u.files, u.bytes)
	}
}

// explain makes a sentence of an error of reading.
func (u *unpacker) explain(err error) error {
	switch {
	case u.in.ctx.Err() != nil:
		return fmt.Errorf("unpack: %w", u.in.ctx.Err())
	case errors.Is(err, errTooBig):
		return u.tooBig()
	case errors.Is(err, tar.ErrHeader) && u.last == "":
		return errors.New("this is not a tar archive")
	case errors.Is(err, tar.ErrHeader):
		return fmt.Errorf("the tar archive is damaged behind %q; fetch it again", u.last)
	case errors.Is(err, io.ErrUnexpectedEOF) && u.last == "":
		return errors.New("this is not a tar archive, or only the beginning of one")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return u.tooShort()
	}
	return fmt.Errorf("unpack: %w", err)
}

func (u *unpacker) tooBig() error {
	return fmt.Errorf("the archive unpacks to more than the %d MiB that are allowed here (at %q)", u.lim.Bytes>>20, u.last)
}

func (u *unpacker) tooShort() error {
	return fmt.Errorf("the tar archive ends too early, behind %q; fetch it again", u.last)
}

// end reads what follows the last member: a tar ends with zeros.
func (u *unpacker) end() error {
	// The last member is filled up with up to 511 zeros, the end mark is two
	// blocks of 512, of which the reader takes one for enough.
	if u.in.zeros < 512 {
		if u.last == "" {
			return errors.New("this is not a tar archive: it is empty")
		}
		return u.tooShort()
	}
	for {
		n, err := u.in.Read(u.buf)
		if n > 0 && u.in.zeros < int64(n) {
			return fmt.Errorf("the archive goes on behind its end (%q is the last of it); it is damaged, or two were joined", u.last)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return u.explain(err)
		}
	}
	if u.files == 0 {
		return errors.New("the tar archive has nothing in it")
	}
	return nil
}

// count admits one more file, folder or link.
func (u *unpacker) count() error {
	if u.files++; u.files > u.lim.Files {
		return fmt.Errorf("the archive has more than the %d files that are allowed here (at %q)", u.lim.Files, u.last)
	}
	return nil
}

func (u *unpacker) member(h *tar.Header) error {
	name := path.Clean(h.Name)
	if h.Name == "" || path.IsAbs(h.Name) || !fs.ValidPath(name) || strings.ContainsRune(name, 0) || len(name) > maxName {
		return fmt.Errorf("%.200q in the archive is not a path inside of it", h.Name)
	}
	if strings.Count(name, "/") > maxDepth {
		return fmt.Errorf("%.100q… in the archive is more than %d folders deep", h.Name, maxDepth)
	}
	if kind, twice := u.made[name]; twice {
		if h.Typeflag == tar.TypeDir && kind == tar.TypeDir {
			return nil
		}
		return fmt.Errorf("%q is in the archive twice", h.Name)
	}
	if err := u.folder(path.Dir(name)); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeDir {
		if err := u.count(); err != nil {
			return err
		}
	}
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		return u.folder(name)
	case tar.TypeReg, tar.TypeGNUSparse:
		u.made[name] = tar.TypeReg
		return u.file(name, h)
	case tar.TypeSymlink:
		if !inside(name, h.Linkname) {
			return fmt.Errorf("the symbolic link %q in the archive leads to %q, outside of it", h.Name, h.Linkname)
		}
		err = u.root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		target := path.Clean(h.Linkname)
		if u.made[target] != tar.TypeReg {
			return fmt.Errorf("%q in the archive is a hard link to %q, which is no file in front of it", h.Name, h.Linkname)
		}
		err = u.root.Link(target, name)
		u.made[name] = tar.TypeReg
		return wrap(err)
	default:
		return fmt.Errorf("%q in the archive is neither a file, a folder nor a link (type %q); no source tree has such", h.Name, h.Typeflag)
	}
	u.made[name] = h.Typeflag
	return wrap(err)
}

func wrap(err error) error {
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	return nil
}

// inside reports whether a link called name, in real folders of the archive,
// with the given target can't lead out of it. With .. at its beginning only, a
// target climbs through those real folders, and what it then goes down through
// is folders, or links of which the same holds.
func inside(name, target string) bool {
	if target == "" || path.IsAbs(target) || strings.ContainsRune(target, 0) || len(target) > maxName {
		return false
	}
	depth := strings.Count(name, "/")
	down := false
	for part := range strings.SplitSeq(target, "/") {
		switch part {
		case "", ".":
		case "..":
			if depth--; down || depth < 0 {
				return false
			}
		default:
			down = true
		}
	}
	return true
}

// folder makes the folder and those that it is in.
func (u *unpacker) folder(name string) error {
	kind, made := u.made[name]
	if made && kind == tar.TypeDir {
		return nil
	}
	if made {
		return fmt.Errorf("%q in the archive lies in %q, which is not a folder", u.last, name)
	}
	if err := u.folder(path.Dir(name)); err != nil {
		return err
	}
	if err := u.count(); err != nil {
		return err
	}
	u.made[name] = tar.TypeDir
	if err := u.root.Mkdir(name, 0o755); err != nil {
		return wrap(err)
	}
	// Whatever our umask is.
	return wrap(u.root.Chmod(name, 0o755))
}

func (u *unpacker) file(name string, h *tar.Header) error {
	// A sparse file says little and is long.
	if h.Size > u.lim.Bytes-u.bytes {
		return u.tooBig()
	}
	f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return wrap(err)
	}
	defer f.Close()
	if err := u.copy(f); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if h.Mode&0o111 != 0 {
		mode = 0o755
	}
	if err := f.Chmod(mode); err != nil {
		return wrap(err)
	}
	if err := f.Close(); err != nil {
		return wrap(err)
	}
	// make goes by times, and complains of those to come.
	when := h.ModTime
	if when.After(u.now) {
		when = u.now
	}
	if when.Unix() < 0 {
		when = time.Unix(0, 0)
	}
	return wrap(u.root.Chtimes(name, when, when))
}

func (u *unpacker) copy(f *os.File) error {
	for {
		if err := u.in.ctx.Err(); err != nil {
			return u.explain(err)
		}
		n, err := u.tar.Read(u.buf)
		if _, werr := f.Write(u.buf[:n]); werr != nil {
			return wrap(werr)
		}
		u.bytes += int64(n)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return u.explain(err)
		}
		u.report(u.files, u.bytes)
	}
}
