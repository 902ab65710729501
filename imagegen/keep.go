package imagegen

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/memlinux/memlinux/imagegen/cache"
	"github.com/memlinux/memlinux/imagegen/manifest"
)

// ErrGone says that the cache no longer has all of a system.
var ErrGone = errors.New("the system is no longer in the cache")

// Keep lays the system's manifest beside its kernel and initramfs and returns
// its SHA-256 (hex), by which Load finds the whole system again as long as the
// cache is not emptied.
func (g Generator) Keep(ctx context.Context, s *System) (string, error) {
	text, err := s.Manifest.JSON()
	if err != nil {
		return "", err
	}
	store, err := cache.Open(g.CacheDir, g.Owner)
	if err != nil {
		return "", err
	}
	staged, err := store.Stage()
	if err != nil {
		return "", err
	}
	defer staged.Discard()
	if err := staged.Fill(ctx, bytes.NewReader(text), nil); err != nil {
		return "", fmt.Errorf("keep the manifest: %w", err)
	}
	file, err := staged.Commit(ctx)
	return file.SHA256, err
}

// Load returns the system that Keep gave that digest for, without its warnings.
// The error is ErrGone where a part of it is missing or damaged.
func (g Generator) Load(ctx context.Context, sha256 string) (*System, error) {
	store, err := cache.Open(g.CacheDir, g.Owner)
	if err != nil {
		return nil, err
	}
	find := func(sha256 string) (File, error) {
		file, err := store.Lookup(ctx, sha256)
		if errors.Is(err, fs.ErrNotExist) {
			err = unfit{ErrGone, err}
		}
		return file, err
	}
	file, err := find(sha256)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(file.Path)
	if err != nil {
		return nil, fmt.Errorf("load a system: %w", err)
	}
	defer f.Close()
	s := &System{}
	if s.Manifest, err = manifest.Parse(f); err != nil {
		return nil, err
	}
	s.ID, s.Cmdline = s.Manifest.ID, s.Manifest.Cmdline
	if s.Kernel, err = find(s.Manifest.Kernel.SHA256); err != nil {
		return nil, err
	}
	s.Initramfs, err = find(s.Manifest.Initramfs.SHA256)
	return s, err
}
