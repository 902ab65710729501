package cache

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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

// Trim removes those files of the store in dir that were used longest ago, until
// they have no more than limit bytes on disk together. While somebody uses the
// store it does nothing: what they do ends with a Trim of theirs.
func Trim(dir string, limit int64) error {
	lock, err := lockUse(dir, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("trim the cache: %w", err)
	}
	defer lock.Close()
	files, err := os.ReadDir(filepath.Join(dir, "files"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("trim the cache: %w", err)
	}
	type kept struct {
		path string
		size int64
		used time.Time
	}
	var all []kept
	var sum int64
	for _, e := range files {
		info, err := e.Info()
		if err != nil {
			continue // it has just gone
		}
		k := kept{filepath.Join(dir, "files", e.Name()), info.Size(), info.ModTime()}
		all = append(all, k)
		sum += k.size
	}
	slices.SortFunc(all, func(a, b kept) int { return a.used.Compare(b.used) })
	for _, k := range all {
		if sum <= limit {
			break
		}
		if err := os.Remove(k.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("trim the cache: %w", err)
		}
		sum -= k.size
	}
	return nil
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
