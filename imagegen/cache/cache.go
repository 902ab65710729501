// Package cache keeps files by what they hold.
//
// A [Store] is a folder. A file in it is named by the SHA-256 of its bytes, so
// that the same bytes are kept once, and is put there by one rename after its
// bytes are durable: a reader, another daemon or the next start after a power
// cut sees all of a file or nothing of it. Beside the files are small records,
// replaced as atomically.
package cache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// File is a file in a Store.
type File struct {
	Path   string // absolute if the store's folder is
	Size   int64  // bytes
	SHA256 string // of its bytes, lower-case hex
}

// Store is a folder of files that are named by their content.
type Store struct {
	dir   string
	owner uint32
}

// tempLife is how long a leftover of a killed process stays. No build takes a
// day, so nothing younger is ever taken from under a living one.
const tempLife = 24 * time.Hour

// folders of a store. A system holds what its recipe's author may read and others
// may not, so only the store's owner reads; compilers, who are others, reach
// theirs in tmp.
var folders = map[string]fs.FileMode{"files": 0o700, "owners": 0o700, "records": 0o700, "tmp": 0o711}

// Open makes the store's folder where it is missing and removes what processes
// that were killed left behind more than a day ago. The files that come in count
// in the share of the user owner ([Trim]); 0 is root, who has no bound.
func Open(dir string, owner uint32) (*Store, error) {
	s := &Store{dir: dir, owner: owner}
	for d, mode := range folders {
		path := filepath.Join(dir, d)
		if err := os.MkdirAll(path, mode); err != nil {
			return nil, fmt.Errorf("open cache: %w", err)
		}
		if err := os.Chmod(path, mode); err != nil { // it may be an older version's
			return nil, fmt.Errorf("open cache: %w", err)
		}
	}
	old, err := os.ReadDir(filepath.Join(dir, "tmp"))
	if err != nil {
		return nil, fmt.Errorf("open cache: %w", err)
	}
	for _, e := range old {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > tempLife {
			// A second daemon may be removing it at the same moment.
			_ = os.RemoveAll(filepath.Join(dir, "tmp", e.Name()))
		}
	}
	return s, nil
}

// Lookup returns the file with the given SHA-256 (hex), after reading all of
// it: a file whose bytes no longer match counts as missing. A missing file is
// os.ErrNotExist.
func (s *Store) Lookup(ctx context.Context, sha string) (File, error) {
	if b, err := hex.DecodeString(sha); err != nil || len(b) != sha256.Size {
		return File{}, fmt.Errorf("look up in cache: %q is no SHA-256", sha)
	}
	f := File{Path: filepath.Join(s.dir, "files", sha), SHA256: sha}
	in, err := os.Open(f.Path)
	if err != nil {
		return File{}, fmt.Errorf("look up in cache: %w", err)
	}
	defer in.Close()
	h := sha256.New()
	if f.Size, err = copyContext(ctx, h, in, nil); err != nil {
		return File{}, fmt.Errorf("look up in cache: %w", err)
	}
	if hex.EncodeToString(h.Sum(nil)) != sha {
		return File{}, fmt.Errorf("look up in cache: %s is damaged: %w", f.Path, os.ErrNotExist)
	}
	touch(f.Path)
	return f, nil
}

// Find is Lookup without reading: whether the file's bytes still match is not
// known. It is for large files of which all but the size may never be needed.
func (s *Store) Find(sha string) (File, error) {
	f, err := s.Open(sha)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return File{}, fmt.Errorf("look up in cache: %w", err)
	}
	return File{Path: f.Name(), Size: st.Size(), SHA256: sha}, nil
}

// Open opens the file with the given SHA-256 (hex) without reading it: for a
// large file of which each part that is used is verified by itself. A missing
// file is os.ErrNotExist.
func (s *Store) Open(sha string) (*os.File, error) {
	if b, err := hex.DecodeString(sha); err != nil || len(b) != sha256.Size {
		return nil, fmt.Errorf("open in cache: %q is no SHA-256", sha)
	}
	f, err := os.Open(filepath.Join(s.dir, "files", sha))
	if err != nil {
		return nil, fmt.Errorf("open in cache: %w", err)
	}
	touch(f.Name())
	return f, nil
}

// Staged is a file on its way into the store: it is written, may be looked at,
// and then comes in by Commit or goes away by Discard.
type Staged struct {
	store *Store
	f     *os.File
	hash  hash.Hash
	size  int64
	done  bool
}

// Stage begins a new file. Discard it when it is not committed; Discard after
// Commit does nothing, so it can always be deferred.
func (s *Store) Stage() (*Staged, error) {
	f, err := os.CreateTemp(filepath.Join(s.dir, "tmp"), "stage-*")
	if err != nil {
		return nil, fmt.Errorf("stage in cache: %w", err)
	}
	return &Staged{store: s, f: f, hash: sha256.New()}, nil
}

// Write appends p.
func (st *Staged) Write(p []byte) (int, error) {
	n, err := st.f.Write(p)
	st.hash.Write(p[:n])
	st.size += int64(n)
	return n, err
}

// Fill appends all of src and calls report, which may be nil, with the bytes
// appended so far.
func (st *Staged) Fill(ctx context.Context, src io.Reader, report func(done int64)) error {
	_, err := copyContext(ctx, st, src, report)
	return err
}

// ReadAt reads what was written so far.
func (st *Staged) ReadAt(p []byte, off int64) (int, error) { return st.f.ReadAt(p, off) }

// Size is the number of bytes written so far.
func (st *Staged) Size() int64 { return st.size }

// SHA256 is that of what was written so far, hex.
func (st *Staged) SHA256() string { return hex.EncodeToString(st.hash.Sum(nil)) }

// File is the file itself, for a program that needs one. It ends with Discard.
func (st *Staged) File() *os.File { return st.f }

// Commit makes the file durable and puts it in the store. When a file with the
// same bytes is there already, that one stays.
func (st *Staged) Commit(ctx context.Context) (File, error) {
	if st.done {
		return File{}, errors.New("commit to cache: the file is committed or discarded already")
	}
	sha := st.SHA256()
	if f, err := st.store.Lookup(ctx, sha); err == nil {
		st.Discard()
		return f, nil
	} else if ctx.Err() != nil {
		return File{}, err
	}
	f := File{Path: filepath.Join(st.store.dir, "files", sha), Size: st.size, SHA256: sha}
	// renameio wants the name before the first byte, but here the name is the
	// digest of all of them; so: bytes durable, then the name, then the folder.
	if err := st.f.Sync(); err != nil {
		return File{}, fmt.Errorf("commit to cache: %w", err)
	}
	if err := os.Rename(st.f.Name(), f.Path); err != nil {
		return File{}, fmt.Errorf("commit to cache: %w", err)
	}
	st.done = true
	if err := st.f.Close(); err != nil {
		return File{}, fmt.Errorf("commit to cache: %w", err)
	}
	if err := syncDir(filepath.Dir(f.Path)); err != nil {
		return File{}, fmt.Errorf("commit to cache: %w", err)
	}
	if err := st.store.charge(sha); err != nil {
		return File{}, fmt.Errorf("commit to cache: %w", err)
	}
	return f, nil
}

// Discard removes the file unless it was committed.
func (st *Staged) Discard() {
	if st.done {
		return
	}
	st.done = true
	// What can't be removed now is removed by an Open in a day.
	_ = st.f.Close()
	_ = os.Remove(st.f.Name())
}

// TempDir makes a folder for an external program to write in. It is empty and
// only its owner's; the caller removes it.
func (s *Store) TempDir() (string, error) {
	dir, err := os.MkdirTemp(filepath.Join(s.dir, "tmp"), "dir-*")
	if err != nil {
		return "", fmt.Errorf("make a folder in the cache: %w", err)
	}
	return dir, nil
}

// Record reads the record called name into v, a pointer to a JSON value.
// A missing record is os.ErrNotExist.
func (s *Store) Record(name string, v any) error {
	b, err := os.ReadFile(s.record(name))
	if err != nil {
		return fmt.Errorf("read record: %w", err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read record %s: %w", name, err)
	}
	return nil
}

// SetRecord replaces the record called name by v as JSON.
func (s *Store) SetRecord(name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write record %s: %w", name, err)
	}
	err = renameio.WriteFile(s.record(name), append(b, '\n'), 0o600, renameio.WithTempDir(filepath.Join(s.dir, "tmp")))
	if err != nil {
		return fmt.Errorf("write record %s: %w", name, err)
	}
	return nil
}

func (s *Store) record(name string) string {
	return filepath.Join(s.dir, "records", filepath.Base(name)+".json")
}

// Lock waits until no other process and no other caller holds the lock called
// name, and holds it until unlock is called or the process ends.
func (s *Store) Lock(ctx context.Context, name string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(s.dir, filepath.Base(name)+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	// flock(2) can't be interrupted by a context, so ask again and again.
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("wait for lock %s: %w", name, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func copyContext(ctx context.Context, dst io.Writer, src io.Reader, report func(int64)) (int64, error) {
	buf := make([]byte, 256<<10)
	var done int64
	for {
		if err := ctx.Err(); err != nil {
			return done, err
		}
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return done, werr
			}
			done += int64(n)
			if report != nil {
				report(done)
			}
		}
		if errors.Is(err, io.EOF) {
			return done, nil
		}
		if err != nil {
			return done, err
		}
	}
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
