// Package iso makes small data discs for virtual machines: the files of a tar
// stream on an ISO 9660 image, which any Linux mounts without a driver of ours.
//
// github.com/kdomanski/iso9660 writes the disc. It knows no Rock Ridge, so a
// disc keeps names, folders and contents, but no modes, owners, times or links
// (Linux shows files r-xr-xr-x, of root, of 1912). And it changes names without
// a word. What it does, by experiment with v0.4.0, xorriso 1.5.4 and Linux 6.1:
//
//   - All letters become lower case. Linux lower-cases the names of such a disc
//     too (isofs, map=normal), xorriso and the library's reader show them as
//     they are: a lower-case name is the same everywhere.
//   - Letters, digits and _!"%&'()*+,-.:;<=>? stay; a space, #, $, @, ~ and all
//     others become _, one for each byte.
//   - In a file's name each dot but the last becomes _ and a dot at the end is
//     lost; a folder's name keeps its dots. A file may begin with its one dot.
//   - The part behind the dot is cut to 8 characters, a file's name to 28 in
//     all, a folder's to 31.
//   - A ; stays on the disc, but Linux shows a dot, and the library's reader
//     drops what follows it.
//   - Names that become the same overwrite each other; an empty folder is left
//     out; depth does not matter (10 folders were read by all three).
//   - The image is broken where a folder's records fill its last sector exactly;
//     this package mends that as it is written.
//
// So FromTar refuses beforehand every name that would change, reads the whole
// disc back, and compares it with what it was given: a disc holds what the tar
// stream held, under the same names, or there is no disc.
package iso

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/kdomanski/iso9660"
)

const (
	sectorSize = 2048

	maxFolder    = 31 // characters of a folder's name
	maxFile      = 28 // of a file's: 30 with the version ";1"
	maxExtension = 8  // of the part behind the dot

	// The library's reader computes a folder's place in 32 bits.
	maxDisc = 4 << 30 // bytes

	// A disc for a test machine, not an archive: this bounds the memory and the
	// inodes that a stream of empty files can take.
	maxEntries = 1 << 16
)

// RefusedError says that the disc can't hold what the tar stream brings. Its
// text names the file and says what to do.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return e.Reason }

func refuse(format string, args ...any) error {
	return &RefusedError{Reason: fmt.Sprintf(format, args...)}
}

// FromTar writes an ISO 9660 disc of the files and folders in the tar stream r
// (not compressed) into disc, from its start and in place of what it held, reads
// it back and compares. disc is a regular file open for reading and writing; it
// is empty when FromTar fails. On the way the files lie in a folder under
// os.TempDir, which is gone when FromTar returns.
//
// label is the volume's name, 1 to 32 of A-Z, 0-9 and _. The disc takes at most
// maxBytes, and at most 4 GiB.
//
// Absolute paths, "..", links, devices and all that package iso says would be
// changed give a *RefusedError, as does too much data. A cancelled ctx ends
// FromTar at the next Read of r that returns: close r to end one that waits.
func FromTar(ctx context.Context, disc *os.File, r io.Reader, label string, maxBytes int64) (err error) {
	if err := checkLabel(label); err != nil {
		return err
	}
	if err := disc.Truncate(0); err != nil {
		return fmt.Errorf("ISO disc: empty the file: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, disc.Truncate(0))
		}
	}()
	lib, err := iso9660.NewWriter()
	if err != nil {
		return fmt.Errorf("ISO disc: make a temporary folder: %w", err)
	}
	defer func() { err = errors.Join(err, lib.Cleanup()) }()

	want := &content{entries: map[string]*entry{}, limit: min(maxBytes, maxDisc)}
	if err := want.readTar(ctx, lib, r); err != nil {
		return err
	}
	buffered := bufio.NewWriterSize(io.NewOffsetWriter(disc, 0), 1<<20)
	if err := lib.WriteTo(&imageWriter{ctx: ctx, w: buffered, limit: want.limit}, label); err != nil {
		return fmt.Errorf("write ISO disc: %w", err)
	}
	if err := buffered.Flush(); err != nil {
		return fmt.Errorf("write ISO disc: %w", err)
	}
	if err := want.compare(ctx, disc, label); err != nil {
		return fmt.Errorf("read ISO disc back: %w", err)
	}
	return nil
}

func checkLabel(label string) error {
	if len(label) < 1 || len(label) > 32 || strings.Trim(label, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" {
		return refuse("ISO disc: the label %q is not 1 to 32 of A-Z, 0-9 and _", label)
	}
	return nil
}

// entry is what the disc must hold under a path.
type entry struct {
	dir    bool
	filled bool // a folder that is not empty
	listed bool // in the tar stream, not only the parent of what is
	size   int64
	hash   [sha256.Size]byte
}

// content is all that the disc must hold.
type content struct {
	entries map[string]*entry
	bytes   int64 // that the entries take on the disc, at least
	limit   int64
}

// take counts n more bytes of the disc.
func (c *content) take(n int64) error {
	if n > c.limit-c.bytes {
		return tooLarge(c.limit)
	}
	c.bytes += n
	return nil
}

func tooLarge(limit int64) error {
	return refuse("ISO disc: the files need more than the %d MiB that the disc may have: put less on it", limit>>20)
}

// readTar brings the stream's files into the library's folder.
func (c *content) readTar(ctx context.Context, lib *iso9660.ImageWriter, r io.Reader) error {
	src := &source{ctx: ctx, r: r}
	t := tar.NewReader(src)
	if err := c.take(18 * sectorSize); err != nil { // the system area and the volume descriptors
		return err
	}
	for {
		src.zeros = 0
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read the tar stream (it must be plain tar, not compressed): %w", err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // a comment, as git archive writes it
		}
		path, e, err := c.add(h)
		if err != nil {
			return err
		}
		if e == nil || e.dir {
			continue
		}
		sum := sha256.New()
		if err := lib.AddFile(io.TeeReader(t, sum), path); err != nil {
			return fmt.Errorf("ISO disc: bring in file %q: %w", path, err)
		}
		sum.Sum(e.hash[:0])
	}
	// A stream that breaks off between two files reads as a whole one, but for
	// the two blocks of zeros that must end it.
	if src.zeros < 1024 {
		return fmt.Errorf("read the tar stream: it ends without its end mark: %w", io.ErrUnexpectedEOF)
	}
	for path, e := range c.entries {
		if e.dir && !e.filled {
			return refuse("ISO disc: folder %q is empty, and the disc can't hold an empty folder: put a file into it or leave it out", path)
		}
	}
	return nil
}

// add checks a tar header and enters its file. The entry is nil for the stream's
// root folder.
func (c *content) add(h *tar.Header) (string, *entry, error) {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeDir:
	case tar.TypeSymlink, tar.TypeLink:
		return "", nil, refuse("ISO disc: file %q is a link, and the disc holds only files and folders: put a copy in its place, or put a tar archive on the disc", h.Name)
	default:
		return "", nil, refuse("ISO disc: file %q is of tar type %q, and the disc holds only files and folders: leave it out, or put a tar archive on the disc", h.Name, h.Typeflag)
	}
	dir := h.Typeflag == tar.TypeDir
	path := h.Name
	for strings.HasPrefix(path, "./") {
		path = path[2:]
	}
	if dir {
		path = strings.TrimSuffix(path, "/")
		if path == "" || path == "." {
			return "", nil, nil
		}
	}
	parts := strings.Split(path, "/")
	if strings.HasPrefix(path, "/") || slices.Contains(parts, "") || slices.Contains(parts, ".") || slices.Contains(parts, "..") {
		return "", nil, refuse(`ISO disc: the path %q is absolute or has an empty part, "." or "..": give it as a plain path below the disc's root`, h.Name)
	}
	var parent, e *entry
	for end := range parts {
		prefix, last := strings.Join(parts[:end+1], "/"), end == len(parts)-1
		e = c.entries[prefix]
		switch {
		case e == nil:
			if err := checkName(prefix, parts[end], dir || !last); err != nil {
				return "", nil, err
			}
			if len(c.entries) == maxEntries {
				return "", nil, refuse("ISO disc: there are more than %d files and folders: put a tar archive on the disc instead", maxEntries)
			}
			e = &entry{dir: dir || !last}
			c.entries[prefix] = e
			if err := c.take(int64(33 + len(parts[end]))); err != nil { // a directory record
				return "", nil, err
			}
			if e.dir {
				if err := c.take(sectorSize); err != nil {
					return "", nil, err
				}
			}
		case last && e.listed || e.dir != (dir || !last):
			return "", nil, refuse("ISO disc: %q is in the tar stream twice: leave one out", prefix)
		}
		if parent != nil {
			parent.filled = true
		}
		parent = e
	}
	e.listed, e.size = true, h.Size
	if dir {
		e.size = 0
	}
	if e.size > c.limit {
		return "", nil, tooLarge(c.limit)
	}
	return path, e, c.take((e.size + sectorSize - 1) / sectorSize * sectorSize)
}

// checkName refuses a name that would come out as another; the rules are in
// this package's comment.
func checkName(path, name string, dir bool) error {
	kind, limit := "file", maxFile
	if dir {
		kind, limit = "folder", maxFolder
	}
	reason := ""
	bad := strings.IndexFunc(name, func(c rune) bool {
		return !strings.ContainsRune(`abcdefghijklmnopqrstuvwxyz0123456789_!"%&'()*+,-.:<=>?`, c)
	})
	switch {
	case name != strings.ToLower(name):
		reason = "the disc keeps lower-case names only"
	case bad >= 0:
		reason = fmt.Sprintf("the disc can't hold the character %q in a name", []rune(name[bad:])[0])
	case len(name) > limit:
		reason = fmt.Sprintf("the disc's names have at most %d characters for a %s", limit, kind)
	case dir:
	case strings.Count(name, ".") > 1:
		reason = "the disc keeps only one dot in a file's name"
	case strings.HasSuffix(name, "."):
		reason = "the disc loses a dot at the end of a file's name"
	case strings.Contains(name, ".") && len(name)-strings.IndexByte(name, '.')-1 > maxExtension:
		reason = fmt.Sprintf("the disc keeps at most %d characters behind the dot", maxExtension)
	}
	if reason == "" {
		return nil
	}
	return refuse("ISO disc: %s %q: %s: rename it, or put a tar archive on the disc", kind, path, reason)
}

// compare reads the disc and holds it against what it must hold.
func (c *content) compare(ctx context.Context, disc io.ReaderAt, label string) error {
	image, err := iso9660.OpenImage(disc)
	if err != nil {
		return err
	}
	if got, err := image.Label(); err != nil {
		return err
	} else if got != label {
		return fmt.Errorf("the label is %q, not %q", got, label)
	}
	root, err := image.RootDir()
	if err != nil {
		return err
	}
	type folder struct {
		prefix string
		file   *iso9660.File
	}
	found := make(map[string]bool, len(c.entries))
	for todo := []folder{{"", root}}; len(todo) > 0; todo = todo[1:] {
		// Not GetChildren: it panics where a folder can't be read.
		children, err := todo[0].file.GetAllChildren()
		if err != nil {
			return fmt.Errorf("folder %q: %w", todo[0].prefix, err)
		}
		if len(children) < 2 || children[0].Name() != "\x00" || children[1].Name() != "\x01" {
			return fmt.Errorf("folder %q has no entries for itself and its parent", todo[0].prefix)
		}
		for _, f := range children[2:] {
			path := todo[0].prefix + f.Name()
			e := c.entries[path]
			if e == nil || found[path] || e.dir != f.IsDir() {
				return fmt.Errorf("%q is on the disc and should not be", path)
			}
			found[path] = true
			if e.dir {
				todo = append(todo, folder{path + "/", f})
				continue
			}
			sum := sha256.New()
			if _, err := io.Copy(sum, &source{ctx: ctx, r: f.Reader()}); err != nil {
				return fmt.Errorf("file %q: %w", path, err)
			}
			if f.Size() != e.size || [sha256.Size]byte(sum.Sum(nil)) != e.hash {
				return fmt.Errorf("file %q differs from what the tar stream brought", path)
			}
		}
	}
	for path := range c.entries {
		if !found[path] {
			return fmt.Errorf("%q is missing", path)
		}
	}
	return nil
}

// source reads r until ctx is done, and counts the zeros that it last brought.
type source struct {
	ctx   context.Context
	r     io.Reader
	zeros int
}

func (s *source) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := s.r.Read(p)
	i := n
	for i > 0 && p[i-1] == 0 {
		i--
	}
	if i > 0 {
		s.zeros = 0
	}
	s.zeros += n - i
	return n, err
}

// imageWriter takes the library's image. Where a folder's records end with a
// sector, the library fills up one sector too many, and all that follows would
// lie 2048 bytes behind its place: that sector is left out.
type imageWriter struct {
	ctx    context.Context
	w      io.Writer
	limit  int64 // bytes
	at     int64
	record bool // the last Write was a directory record
}

func (w *imageWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	// Records come one by one, filling is at most a sector of zeros, files come
	// in whole sectors, and a folder's last record is followed by its filling.
	if w.record && w.at%sectorSize == 0 && len(p) == sectorSize {
		w.record = false
		return len(p), nil
	}
	w.record = len(p) > 0 && len(p) < sectorSize && int(p[0]) == len(p)
	if w.at += int64(len(p)); w.at > w.limit {
		return 0, tooLarge(w.limit)
	}
	return w.w.Write(p)
}
