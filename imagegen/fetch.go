package imagegen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"

	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/imagegen/kernel"
)

// fetched is the cache's record of the files taken out of a package.
type fetched struct {
	Package debian.Package
	Files   map[string]string // path in the package → SHA-256 in the cache
}

// fetch brings the files of a Debian package that match one of the patterns
// (path.Match) into the cache. Where the package depends on one that follow
// matches, that one is meant. The network is used only when the cache has not
// the version that apt would fetch; when that fails, an older version in the
// cache does, with a warning.
func (b *build) fetch(ctx context.Context, phase, name string, follow *regexp.Regexp, patterns ...string) (map[string]File, debian.Package, error) {
	// apt-get update in two processes at once fails in one of them.
	unlock, err := b.store.Lock(ctx, "apt")
	if err != nil {
		return nil, debian.Package{}, err
	}
	defer unlock()

	var old fetched
	oldFiles, haveOld := map[string]File(nil), false
	if b.store.Record("debian-"+name, &old) == nil {
		oldFiles, haveOld = b.lookup(ctx, old.Files)
	}
	p, err := b.resolve(ctx, name, follow)
	updated := false
	if errors.Is(err, debian.ErrNoCandidate) {
		updated = true
		if err = b.g.Apt.Update(ctx); err == nil {
			p, err = b.resolve(ctx, name, follow)
		}
	}
	if err == nil && haveOld && old.Package.SHA256 == p.SHA256 {
		return oldFiles, p, nil
	}
	var files map[string]File
	if err == nil {
		files, err = b.download(ctx, phase, p, patterns)
		if err != nil && !updated && ctx.Err() == nil {
			// Old lists name versions that the mirrors no longer have.
			if b.g.Apt.Update(ctx) == nil {
				if q, rerr := b.resolve(ctx, name, follow); rerr == nil && q.SHA256 != p.SHA256 {
					p = q
					files, err = b.download(ctx, phase, p, patterns)
				}
			}
		}
	}
	if err != nil {
		if haveOld && ctx.Err() == nil {
			b.warn("Debian's %s could not be fetched (%v); the cached version %s is used", name, err, old.Package.Version)
			return oldFiles, old.Package, nil
		}
		return nil, debian.Package{}, fmt.Errorf("package %s: %w", name, err)
	}
	record := fetched{Package: p, Files: map[string]string{}}
	for path, f := range files {
		record.Files[path] = f.SHA256
	}
	if err := b.store.SetRecord("debian-"+name, record); err != nil {
		return nil, debian.Package{}, err
	}
	return files, p, nil
}

// lookup finds all files of a record in the cache, or none.
func (b *build) lookup(ctx context.Context, want map[string]string) (map[string]File, bool) {
	files := map[string]File{}
	for path, sha := range want {
		f, err := b.store.Lookup(ctx, sha)
		if err != nil {
			return nil, false
		}
		files[path] = f
	}
	return files, len(files) > 0
}

func (b *build) resolve(ctx context.Context, name string, follow *regexp.Regexp) (debian.Package, error) {
	// linux-image-amd64 → linux-image-6.1.0-56-amd64; nobody chains more.
	for range 3 {
		p, err := b.g.Apt.Candidate(ctx, name)
		if err != nil || follow == nil {
			return p, err
		}
		next := ""
		for _, dep := range p.Depends {
			if follow.MatchString(dep) {
				next = dep
				break
			}
		}
		if next == "" {
			return p, nil
		}
		name = next
	}
	return debian.Package{}, fmt.Errorf("%s only leads to more packages", name)
}

func (b *build) download(ctx context.Context, phase string, p debian.Package, patterns []string) (map[string]File, error) {
	dir, err := b.store.TempDir()
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	deb, err := b.g.Apt.Download(ctx, p, dir, func(done int64) { b.progress(phase, done, p.Size) })
	if err != nil {
		return nil, err
	}
	defer deb.Close()
	files, wanted := map[string]File{}, map[string]bool{}
	for _, pattern := range patterns {
		wanted[pattern] = true
	}
	err = debian.Files(ctx, deb, func(name string, size int64, content io.Reader) error {
		for _, pattern := range patterns {
			if ok, _ := path.Match(pattern, name); !ok {
				continue
			}
			if size > kernel.MaxSize {
				return fmt.Errorf("%s in %s has %d MiB", name, p.Name, size>>20)
			}
			staged, err := b.store.Stage()
			if err != nil {
				return err
			}
			defer staged.Discard()
			if err := staged.Fill(ctx, content, nil); err != nil {
				return fmt.Errorf("unpack %s: %w", p.Name, err)
			}
			if files[name], err = staged.Commit(ctx); err != nil {
				return err
			}
			if delete(wanted, pattern); len(wanted) == 0 {
				// Behind a kernel come hundreds of megabytes of modules.
				return debian.ErrStop
			}
			return nil
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return files, nil
}
