package bootfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// NoSpaceError says that a file system is too full. Nothing was written then.
type NoSpaceError struct {
	Dir        string
	Need, Have int64 // bytes
}

func (e *NoSpaceError) Error() string {
	const mib = 1 << 20
	return fmt.Sprintf("the file system of %s is too full: %d MiB are needed, %d MiB are free; remove old kernels or entries from it", e.Dir, (e.Need+mib-1)/mib, e.Have/mib)
}

// reserve is left free beside the payload, in bytes: the menu's files, which
// are written new before the old ones go, and the folders' growth.
const reserve = 1 << 20

// AddPayload puts files into the folder dir, which is made (mode 0755) where it
// is missing, and returns when a boot loader finds them. A file that is there
// with the right content stays; one with another content under the name, such
// as bit rot makes, is replaced. progress, which may be nil, is told the bytes
// written.
//
// If there is too little space, that is a *NoSpaceError before anything is
// written. When ctx ends, what was not complete is removed.
func (f *FS) AddPayload(ctx context.Context, dir string, files []Payload, progress func(done, total int64)) error {
	parent, err := openFolder(filepath.Dir(dir))
	if err != nil {
		return err
	}
	defer parent.Close()
	// dir may be a mount point, or not there at all.
	d, err := openFolder(dir)
	switch {
	case err == nil:
		defer func() { d.Close() }()
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	on, err := f.on(parent)
	if err == nil && d != nil {
		on, err = f.on(d)
	}
	if err != nil {
		return err
	}

	free, block, err := on.space()
	if err != nil {
		return err
	}
	var missing []Payload
	var total int64
	need := int64(reserve)
	for _, p := range files {
		if filepath.Base(p.Name) != p.Name || p.Name == "." || p.Name == ".." || p.Name == "/" || temporaryPattern.MatchString(p.Name) {
			return fmt.Errorf("payload %q: not a file's name", p.Name)
		}
		if d != nil {
			switch same, err := d.holdsPayload(ctx, p); {
			case err != nil:
				return err
			case same:
				continue
			}
		}
		missing = append(missing, p)
		total += p.Size
		need += (p.Size + block - 1) / block * block
	}
	if len(missing) == 0 {
		return nil
	}
	if free < need {
		return &NoSpaceError{Dir: filepath.Dir(dir), Need: need, Have: free}
	}

	made := false
	if d == nil {
		if err := unix.Mkdirat(parent.fd(), filepath.Base(dir), 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return parent.fail("make the folder", filepath.Base(dir), err)
		}
		made = true
		if err := parent.sync(); err != nil {
			return err
		}
		if d, err = openFolder(dir); err != nil {
			return err
		}
		defer d.Close()
	}
	err = on.addPayload(ctx, d, missing, func(done int64) {
		if progress != nil {
			progress(done, total)
		}
	})
	if err != nil && made {
		// Not if a file is in it already: that is whole, and of use next time.
		return errors.Join(err, on.RemoveDir(dir))
	}
	return err
}

func (f *FS) addPayload(ctx context.Context, d *folder, files []Payload, progress func(done int64)) error {
	var done int64
	for _, p := range files {
		n, err := f.put(ctx, d, p, func(n int64) { progress(done + n) })
		if err != nil {
			return err
		}
		done += n
	}
	return f.settle(d)
}

// put copies one file. It gets its name when it is whole and durable.
func (f *FS) put(ctx context.Context, d *folder, p Payload, progress func(done int64)) (int64, error) {
	source, err := os.Open(p.Source)
	if err != nil {
		return 0, err
	}
	defer source.Close()
	tmp, err := f.temporary(d, func(w *os.File) error { return copyPayload(ctx, w, source, p, progress) })
	if err != nil {
		return 0, fmt.Errorf("copy %s to %s: %w", p.Source, d.path, err)
	}
	defer tmp.Close()
	// No menu names a new file yet; place need not be preceded by settle.
	was, err := d.open(p.Name, unix.O_RDONLY, 0)
	switch {
	case err == nil:
		defer was.Close()
		// But it may name a rotten one, which may boot all the same.
		if err := f.settle(d); err != nil {
			return 0, errors.Join(err, d.unlink(tmp.name()))
		}
	case errors.Is(err, fs.ErrNotExist):
		was = nil
	default:
		return 0, errors.Join(err, d.unlink(tmp.name()))
	}
	return p.Size, f.place(d, tmp, p.Name, was)
}

// chunk is how much is copied, in bytes, before the caller is asked whether to
// go on. It is synced too, so that progress is honest and the end soon follows
// the last byte.
const chunk = 4 << 20

func copyPayload(ctx context.Context, w, source *os.File, p Payload, progress func(done int64)) error {
	h := sha256.New()
	buf := make([]byte, min(chunk, p.Size+1))
	var done int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(source, buf)
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		h.Write(buf[:n])
		done += int64(n)
		if done > p.Size {
			break
		}
		if n == chunk {
			if err := unix.Fdatasync(int(w.Fd())); err != nil {
				return err
			}
		}
		progress(done)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if done != p.Size || hex.EncodeToString(h.Sum(nil)) != p.SHA256 {
		return fmt.Errorf("the source is not the file that was named (%d bytes with SHA-256 %s); it changed meanwhile", p.Size, p.SHA256)
	}
	return nil
}

// holdsPayload reports whether the folder has p, with the right content.
func (d *folder) holdsPayload(ctx context.Context, p Payload) (bool, error) {
	file, err := d.open(p.Name, unix.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer file.Close()
	if st, err := file.Stat(); err != nil || st.Size() != p.Size {
		return false, err
	}
	h := sha256.New()
	for {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		_, err := io.CopyN(h, file, chunk)
		if errors.Is(err, io.EOF) {
			break
		}
		if errors.Is(err, unix.EIO) {
			return false, nil // the disk can't read it; written new it may lie elsewhere
		}
		if err != nil {
			return false, d.fail("read", p.Name, err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)) == p.SHA256, nil
}
