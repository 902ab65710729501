package imagegen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"strings"

	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/imagegen/kernel"
	"github.com/memlinux/memlinux/imagegen/modules"
)

// fetched is the cache's record of the files taken out of a package.
type fetched struct {
	Package debian.Package
	Files   map[string]string // path in the package → SHA-256 in the cache
	Modules string            // SHA-256 of the index of its kernel modules; "" if they were not taken
	State   string            // of apt, when it said that this is the version to fetch
}

// taken is what was taken out of a package.
type taken struct {
	from    debian.Package
	files   map[string]File  // by path in the package
	library *modules.Library // its kernel modules; nil if they were not asked for
}

// fetch brings the files of a Debian package that match one of the patterns
// (path.Match) into the cache, and its kernel modules if they are asked for.
// Where the package depends on one that follow matches, that one is meant. The
// network is used only when the cache has not the version that apt would fetch;
// when that fails, an older version in the cache does, with a warning.
func (b *build) fetch(ctx context.Context, phase, name string, follow *regexp.Regexp, withModules bool, patterns ...string) (taken, error) {
	// apt-get update in two processes at once fails in one of them.
	unlock, err := b.store.Lock(ctx, "apt")
	if err != nil {
		return taken{}, err
	}
	defer unlock()

	var record fetched
	var old taken
	haveOld := false
	if b.store.Record("debian-"+name, &record) == nil {
		old, haveOld = b.lookup(ctx, record, withModules)
	}
	state, err := b.g.Apt.State(ctx)
	if err != nil {
		return taken{}, fmt.Errorf("package %s: %w", name, err)
	}
	if haveOld && record.State == state {
		return old, nil
	}
	p, err := b.resolve(ctx, name, follow)
	updated := false
	if errors.Is(err, debian.ErrNoCandidate) {
		updated = true
		if err = b.g.Apt.Update(ctx); err == nil {
			p, err = b.resolve(ctx, name, follow)
		}
	}
	if err == nil && haveOld && old.from.SHA256 == p.SHA256 {
		if !updated {
			record.State = state
			err = b.store.SetRecord("debian-"+name, record)
		}
		return old, err
	}
	if err == nil {
		record, err = b.download(ctx, phase, p, withModules, patterns)
		if err != nil && !updated && ctx.Err() == nil {
			// Old lists name versions that the mirrors no longer have.
			if b.g.Apt.Update(ctx) == nil {
				if q, rerr := b.resolve(ctx, name, follow); rerr == nil && q.SHA256 != p.SHA256 {
					record, err = b.download(ctx, phase, q, withModules, patterns)
				}
			}
		}
	}
	if err != nil {
		if haveOld && ctx.Err() == nil {
			b.warn("Debian's %s could not be fetched (%v); the cached version %s is used", name, err, old.from.Version)
			return old, nil
		}
		return taken{}, fmt.Errorf("package %s: %w", name, err)
	}
	if err := b.store.SetRecord("debian-"+name, record); err != nil {
		return taken{}, err
	}
	got, whole := b.lookup(ctx, record, withModules)
	if ctx.Err() != nil {
		return taken{}, ctx.Err()
	}
	if !whole && len(record.Files) > 0 {
		return taken{}, fmt.Errorf("package %s: its files went from the cache while they were used; run it again", name)
	}
	return got, nil
}

// lookup finds all that a record has, with the modules if they are asked for,
// in the cache, or fails.
func (b *build) lookup(ctx context.Context, r fetched, withModules bool) (taken, bool) {
	t := taken{from: r.Package, files: map[string]File{}}
	for path, sha := range r.Files {
		look := b.store.Lookup
		if strings.HasPrefix(path, "usr/src/") {
			// A large one, which is read only where it is compiled.
			look = func(_ context.Context, sha string) (File, error) { return b.store.Find(sha) }
		}
		f, err := look(ctx, sha)
		if err != nil {
			return taken{}, false
		}
		t.files[path] = f
	}
	if withModules {
		var err error
		if t.library, err = b.library(ctx, r.Modules); err != nil {
			return taken{}, false
		}
	}
	return t, len(t.files) > 0
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

// modulePath splits the path of a file below lib/modules/RELEASE.
var modulePath = regexp.MustCompile(`^(?:usr/)?lib/modules/([^/]+)/(.+)$`)

func (b *build) download(ctx context.Context, phase string, p debian.Package, withModules bool, patterns []string) (fetched, error) {
	dir, err := b.store.TempDir()
	if err != nil {
		return fetched{}, err
	}
	defer os.RemoveAll(dir)
	deb, err := b.g.Apt.Download(ctx, p, dir, func(done int64) { b.progress(phase, done, p.Size) })
	if err != nil {
		return fetched{}, err
	}
	defer deb.Close()
	record := fetched{Package: p, Files: map[string]string{}}
	unpack := func(add func(release, name string, size int64, content io.Reader) error) error {
		wanted := map[string]bool{}
		for _, pattern := range patterns {
			wanted[pattern] = true
		}
		return debian.Files(ctx, deb, func(name string, size int64, content io.Reader) error {
			if m := modulePath.FindStringSubmatch(name); m != nil && add != nil {
				return add(m[1], m[2], size, content)
			}
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
				f, err := staged.Commit(ctx)
				if err != nil {
					return err
				}
				record.Files[name] = f.SHA256
				if delete(wanted, pattern); len(wanted) == 0 && add == nil {
					// Behind a kernel come hundreds of megabytes of modules.
					return debian.ErrStop
				}
				return nil
			}
			return nil
		})
	}
	if !withModules {
		return record, unpack(nil)
	}
	record.Modules, err = b.importModules(ctx, func(w *modules.Writer) (string, error) {
		release, done := "", int64(0)
		err := unpack(func(of, name string, size int64, content io.Reader) error {
			if release == "" {
				release = of
			}
			if of != release || !modules.Wants(name) {
				return nil
			}
			if size > modules.MaxSize {
				return fmt.Errorf("%s in %s has %d MiB", name, p.Name, size>>20)
			}
			file := make([]byte, size)
			if _, err := io.ReadFull(content, file); err != nil {
				return fmt.Errorf("unpack %s: %w", p.Name, err)
			}
			done += size
			b.progress(phase, done, 0)
			return w.Add(name, file)
		})
		return release, err
	})
	return record, err
}
