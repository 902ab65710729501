package initramfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Duplicates says what two members of a tar with one path are.
type Duplicates int

// What FromTar does with the second member of a path.
const (
	RefuseDuplicates  Duplicates = iota // an error, unless both are folders
	ReplaceDuplicates                   // it takes the place of the first, as when tar unpacks
)

// PAX records that FromTar reads besides those of the format itself.
const (
	// RecordWhy is the Why of a member: UTF-8 that can be printed, of at most
	// maxWhy bytes.
	RecordWhy = "MEMLINUX.why"
	// RecordCaps is its security.capability, raw, as bsdtar, GNU tar and
	// container tools write it.
	RecordCaps = "SCHILY.xattr.security.capability"
)

// Limits of what the header of a tar may make us keep in memory. A Debian with
// a desktop has 200,000 files whose paths have 15 MiB.
const (
	maxNames = 32 << 20 // bytes of paths, links and reasons together
	maxWhy   = 1000     // bytes
)

// FromTar reads a tree out of an uncompressed tar (ustar, GNU or PAX, POSIX
// pax(1)) that has size bytes of r. Contents stay where they are: an entry reads
// them from r when it is packed. why is the reason of members that have no
// RecordWhy.
//
// A path begins at the root of the tree, with or without "./" and slashes in
// front; one that goes through a symbolic link of the tar is where the link
// leads. The root folder itself says nothing. Device nodes are not taken, and
// neither are hard links to them: skipped lists them. Everything else that the
// tree can't hold is an error with the member's name: a path with "..", a file
// with holes, a type that is unknown. A tar without its end mark is cut off.
func FromTar(ctx context.Context, r io.ReaderAt, size int64, why string, duplicates Duplicates) (t Tree, skipped []string, err error) {
	in := importer{content: r, file: io.NewSectionReader(r, 0, size), why: why, last: map[string]int{}, files: map[int]int{}, whys: map[string]string{}}
	if err := in.read(ctx); err != nil {
		return nil, nil, err
	}
	wins := nobodyWins
	if duplicates == ReplaceDuplicates {
		wins = lastWins
	}
	in.last = nil // it is large, and did its work
	if t, err = merge(nil, in.entries, in.files, wins); err != nil {
		return nil, nil, err
	}
	return t, in.skipped, nil
}

// importer is one run of FromTar.
type importer struct {
	content io.ReaderAt
	file    *io.SectionReader // all of content, as the tar reader wants it
	why     string
	entries []Entry
	last    map[string]int // path → the last entry there; -1 for a member that is skipped
	files   map[int]int    // hard links → the entry that they are a name of
	whys    map[string]string
	skipped []string
	names   int64 // bytes, see maxNames
	end     int64 // of the last member with its padding
}

func (in *importer) read(ctx context.Context) error {
	archive := tar.NewReader(in.file)
	behind := "at its begin"
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return in.checkEnd()
		}
		if err != nil {
			return fmt.Errorf("it is no uncompressed tar, or damaged %s: %w", behind, err)
		}
		if n == maxEntries {
			return fmt.Errorf("it has more than %d members", maxEntries)
		}
		if in.names += int64(len(h.Name) + len(h.Linkname)); in.names > maxNames {
			return fmt.Errorf("it has more than %d MiB of names", maxNames>>20)
		}
		if err := in.add(h); err != nil {
			return fmt.Errorf("member %q: %w", shortened(h.Name), err)
		}
		behind = fmt.Sprintf("behind %q", shortened(h.Name))
	}
}

// shortened is a name that a sentence can hold.
func shortened(name string) string {
	if len(name) > 200 {
		return name[:200] + "…"
	}
	return name
}

// checkEnd looks for what distinguishes a tar that is complete from one that was
// cut off between two members: a block of zeros.
func (in *importer) checkEnd() error {
	at, err := in.file.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if at < in.end+tarBlock {
		return errors.New("its end is missing: it was cut off")
	}
	mark := make([]byte, tarBlock)
	if _, err := in.file.ReadAt(mark, in.end); err != nil {
		return err
	}
	if !bytes.Equal(mark, make([]byte, tarBlock)) {
		return errors.New("its end is missing: it was cut off")
	}
	return nil
}

const tarBlock = 512 // bytes

func (in *importer) add(h *tar.Header) error {
	begin, err := in.file.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	in.end = begin
	name, err := cleaned(h.Name)
	if err != nil {
		return err
	}
	e := Entry{Path: name, UID: h.Uid, GID: h.Gid, Mode: permissions(h.Mode)}
	if e.Why, err = in.reason(h); err != nil {
		return err
	}
	if caps, ok := h.PAXRecords[RecordCaps]; ok {
		e.Caps = []byte(caps)
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return errSparse
		}
	}
	file := false
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil // comments, such as those of git archive
	case tar.TypeReg, tar.TypeCont:
		file = true
		if h.Size > in.file.Size()-begin {
			return errors.New("the tar ends in the middle of it: it was cut off")
		}
		in.end += (h.Size + tarBlock - 1) / tarBlock * tarBlock
		e.Content, e.Size = io.NewSectionReader(in.content, begin, h.Size), h.Size
	case tar.TypeDir:
		e.Mode |= fs.ModeDir
	case tar.TypeSymlink:
		e.Mode |= fs.ModeSymlink
		e.Link = h.Linkname
	case tar.TypeFifo:
		e.Mode |= fs.ModeNamedPipe
	case tar.TypeLink:
		if e.HardLink, err = cleaned(h.Linkname); err != nil {
			return fmt.Errorf("a hard link: %w", err)
		}
		if e.HardLink == "" {
			return errors.New("a hard link to the root folder")
		}
		if skip := in.link(&e); skip {
			in.skip(name, "a hard link to a device")
			return nil
		}
		file = e.Mode.IsRegular()
	case tar.TypeChar:
		in.skip(name, "a character device")
		return nil
	case tar.TypeBlock:
		in.skip(name, "a block device")
		return nil
	case tar.TypeGNUSparse:
		return errSparse
	default:
		return fmt.Errorf("it is of the unknown type %q", h.Typeflag)
	}
	if name == "" {
		if e.Mode.IsDir() {
			return nil
		}
		return errors.New("the root of the tree can only be a folder")
	}
	// Attributes that only a file can have stay behind with what is none.
	if !file || e.HardLink != "" {
		e.Caps = nil
	}
	if err := e.validate(); err != nil {
		return fmt.Errorf("it %w", err)
	}
	in.last[name] = len(in.entries)
	in.entries = append(in.entries, e)
	return nil
}

var errSparse = errors.New("it is a file with holes (sparse); make the tar without --sparse")

// link binds e to the file that it is another name of, which is what the path
// means at this point of the tar. What comes only later is for merge to find.
func (in *importer) link(e *Entry) (skip bool) {
	i, there := in.last[e.HardLink]
	switch {
	case !there:
		return false
	case i < 0:
		return true
	}
	to := in.entries[i]
	if to.Mode.IsRegular() {
		in.files[len(in.entries)] = i
		return false
	}
	if !to.Mode.IsDir() {
		// A link or pipe by another name is as good as one more of it.
		to.Path, to.Why = e.Path, e.Why
		*e = to
	}
	return false
}

func (in *importer) skip(name, what string) {
	in.last[name] = -1
	in.skipped = append(in.skipped, name+" ("+what+")")
}

// reason is what the member says, or the reason of all.
func (in *importer) reason(h *tar.Header) (string, error) {
	why, ok := h.PAXRecords[RecordWhy]
	if !ok {
		return in.why, nil
	}
	// Many have the same.
	if same, ok := in.whys[why]; ok {
		return same, nil
	}
	if len(why) > maxWhy || !utf8.ValidString(why) || strings.ContainsFunc(why, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return "", fmt.Errorf("its %s is no line of text of at most %d bytes", RecordWhy, maxWhy)
	}
	in.names += int64(len(why))
	in.whys[why] = why
	return why, nil
}

// cleaned is the path of a member as a tree has it; "" for the root.
func cleaned(name string) (string, error) {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", errors.New(`its path has "..", which leads to who knows where`)
		}
	}
	clean := strings.TrimPrefix(path.Clean("/"+name), "/")
	if len(clean) > maxPath || strings.ContainsRune(clean, 0) {
		return "", fmt.Errorf("no path may have more than %d bytes, or one that is 0", maxPath)
	}
	return clean, nil
}

// permissions are the low 12 bits of a mode as stat(2) has it.
func permissions(mode int64) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	for bit, is := range [...]fs.FileMode{9: fs.ModeSticky, 10: fs.ModeSetgid, 11: fs.ModeSetuid} {
		if mode&(1<<bit) != 0 {
			m |= is
		}
	}
	return m
}
