package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// touch notes that the file was used. It is a hint for Trim, and nothing is lost
// where it fails.
func touch(path string) {
	now := time.Now()
	_ = os.Chtimes(path, now, now)
}

// Use keeps Trim, of this process and of others, from the store in dir until
// done is called: paths of its files stay good.
func Use(dir string) (done func(), err error) {
	f, err := lockUse(dir, unix.LOCK_SH)
	if err != nil {
		return nil, fmt.Errorf("use the cache: %w", err)
	}
	return func() { _ = f.Close() }, nil
}

func lockUse(dir string, how int) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // as Open makes it
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "use.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(err, f.Close())
		}
	}
}

// charge notes whose share the file counts in: that of who first brought it.
// owners has an empty file for each, named by the digest and the user.
func (s *Store) charge(sha string) error {
	if s.owner == 0 {
		return nil
	}
	return os.WriteFile(filepath.Join(s.dir, "owners", sha+"."+strconv.FormatUint(uint64(s.owner), 10)), nil, 0o600)
}

// kept is a file of a store, as Trim sees it.
type kept struct {
	path    string
	size    int64
	used    time.Time
	owner   string // "": root
	charged string // the path of the note that says so
}

// Trim removes those files of the store in dir that were used longest ago, until
// they have no more than limit bytes on disk together, and those of each user but
// root no more than share. While somebody uses the store it does nothing: what
// they do ends with a Trim of theirs.
func Trim(dir string, limit, share int64) error {
	lock, err := lockUse(dir, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("trim the cache: %w", err)
	}
	defer lock.Close()
	all, err := list(dir)
	if err != nil {
		return fmt.Errorf("trim the cache: %w", err)
	}
	var sum int64
	of := map[string]int64{}
	for _, k := range all {
		sum += k.size
		of[k.owner] += k.size
	}
	slices.SortFunc(all, func(a, b kept) int { return a.used.Compare(b.used) })
	for _, k := range all {
		if sum <= limit && (k.owner == "" || of[k.owner] <= share) {
			continue
		}
		if err := k.remove(); err != nil {
			return fmt.Errorf("trim the cache: %w", err)
		}
		sum -= k.size
		of[k.owner] -= k.size
	}
	return nil
}

func (k kept) remove() error {
	if err := os.Remove(k.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if k.charged == "" {
		return nil
	}
	if err := os.Remove(k.charged); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// list is the files of the store in dir. Notes of files that are gone go, too.
func list(dir string) ([]kept, error) {
	files, err := os.ReadDir(filepath.Join(dir, "files"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // nobody opened it yet
	}
	if err != nil {
		return nil, err
	}
	notes, err := os.ReadDir(filepath.Join(dir, "owners"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	owners := map[string]string{}
	for _, n := range notes {
		sha, owner, _ := strings.Cut(n.Name(), ".")
		owners[sha] = owner
		if _, err := os.Lstat(filepath.Join(dir, "files", sha)); errors.Is(err, fs.ErrNotExist) {
			if err := os.Remove(filepath.Join(dir, "owners", n.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
	}
	var all []kept
	for _, e := range files {
		info, err := e.Info()
		if err != nil {
			continue // it has just gone
		}
		k := kept{path: filepath.Join(dir, "files", e.Name()), size: info.Size(), used: info.ModTime(), owner: owners[e.Name()]}
		if k.owner != "" {
			k.charged = filepath.Join(dir, "owners", e.Name()+"."+k.owner)
		}
		all = append(all, k)
	}
	return all, nil
}

// reserve is what stays free on the cache's disk: others need it, too.
const reserve = 256 << 20

// Room fails with unix.ENOSPC where the store's disk has no room for so many
// bytes more.
func (s *Store) Room(size int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return fmt.Errorf("ask for the cache's free space: %w", err)
	}
	free := int64(st.Bavail) * st.Bsize
	if free-reserve < size {
		return fmt.Errorf("%s has %d MiB free, and %d are needed (%d stay free); make room there, or set cache-dir to another disk: %w",
			s.dir, free>>20, (size+reserve)>>20, int64(reserve)>>20, unix.ENOSPC)
	}
	return nil
}
