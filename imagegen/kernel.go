package imagegen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/imagegen/kernel"
	"github.com/memlinux/memlinux/imagegen/modules"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"golang.org/x/sys/unix"
)

// kernelFile is a kernel in the cache and what is known of it.
type kernelFile struct {
	file         File
	image        kernel.Image
	source       string           // for the manifest
	config       kernel.Config    // nil if unknown
	configSource string           // "" if unknown
	library      *modules.Library // nil if they are not known, or not wanted
	noModules    string           // why they are not known
	words        string           // of the command line, that this kernel wants
}

// kernel finds the kernel, and its modules if they are wanted.
func (b *build) kernel(ctx context.Context, src KernelSource, withModules bool) (kernelFile, error) {
	switch {
	case src.File != nil:
		k, err := b.takeKernel(ctx, src.File, "file", func(name string) (io.ReadCloser, error) {
			if r := src.Configs[name]; r != nil {
				return io.NopCloser(io.NewSectionReader(r, 0, math.MaxInt64)), nil
			}
			return nil, os.ErrNotExist
		})
		if err != nil {
			return kernelFile{}, unfit{ErrKernel, fmt.Errorf("%s: %w", src.File.Name(), err)}
		}
		k.noModules = "a kernel that is given as a file comes without them"
		return k, nil
	case src.Debian != "":
		return b.debianKernel(ctx, src.Debian, withModules)
	case !src.Source.isZero():
		k, err := b.sourceKernel(ctx, src, withModules)
		var missing *sandbox.MissingError
		if err != nil && ctx.Err() == nil && !errors.As(err, &missing) {
			err = unfit{ErrKernel, err}
		}
		return k, err
	}
	boot := filepath.Join(b.g.Root, "/boot")
	for _, name := range b.g.bootKernels(boot) {
		k, err := b.bootKernel(ctx, boot, name)
		if err == nil && withModules {
			// What is wrong with them is told: the next kernel is no better
			// for having a better folder.
			err = b.hostModules(ctx, &k)
			return k, err
		}
		if err == nil || ctx.Err() != nil {
			return k, err
		}
		// One for another machine, say; the next may be better.
	}
	if src.Host {
		return kernelFile{}, unfit{ErrKernel, fmt.Errorf("no kernel for amd64 is in %s; name another source of it", boot)}
	}
	k, err := b.debianKernel(ctx, DefaultKernelPackage, withModules)
	if err != nil {
		return kernelFile{}, unfit{ErrKernel, fmt.Errorf("no kernel for amd64 is in %s, and Debian's could not be fetched: %w", boot, err)}
	}
	return k, nil
}

// bootKernels lists the kernels in boot: the running one, then from new to old.
func (g Generator) bootKernels(boot string) []string {
	release := g.Release
	if release == "" {
		var u unix.Utsname
		if unix.Uname(&u) == nil {
			release = unix.ByteSliceToString(u.Release[:])
		}
	}
	paths, _ := filepath.Glob(filepath.Join(boot, "vmlinuz-*"))
	var names []string
	for _, p := range paths {
		name := filepath.Base(p)
		switch filepath.Ext(name) {
		case ".old", ".bak", ".dpkg-new", ".dpkg-old", ".dpkg-tmp":
			continue
		}
		names = append(names, name)
	}
	slices.SortStableFunc(names, func(x, y string) int {
		running := "vmlinuz-" + release
		if (x == running) != (y == running) {
			if x == running {
				return -1
			}
			return 1
		}
		return kernel.CompareReleases(y, x)
	})
	return names
}

func (b *build) bootKernel(ctx context.Context, boot, name string) (kernelFile, error) {
	f, err := os.Open(filepath.Join(boot, name))
	if err != nil {
		return kernelFile{}, err
	}
	defer f.Close()
	return b.takeKernel(ctx, f, "boot", func(name string) (io.ReadCloser, error) {
		return os.Open(filepath.Join(boot, name))
	})
}

// takeKernel copies the kernel f into the cache and reads what it is. beside
// opens a file that lies beside it.
func (b *build) takeKernel(ctx context.Context, f *os.File, source string, beside func(name string) (io.ReadCloser, error)) (kernelFile, error) {
	staged, err := b.take(ctx, f, kernel.MaxSize, func(done, total int64) { b.progress(PhaseKernel, done, total) })
	if err != nil {
		return kernelFile{}, err
	}
	defer staged.Discard()
	k, err := inspectKernel(ctx, staged, staged.Size(), source, beside)
	if err != nil {
		return kernelFile{}, err
	}
	k.file, err = staged.Commit(ctx)
	return k, err
}

// cachedKernel reads what the kernel is that the cache has in file.
func (b *build) cachedKernel(ctx context.Context, file File, source string, beside func(name string) (io.ReadCloser, error)) (kernelFile, error) {
	f, err := os.Open(file.Path)
	if err != nil {
		return kernelFile{}, err
	}
	defer f.Close()
	k, err := inspectKernel(ctx, f, file.Size, source, beside)
	k.file = file
	b.progress(PhaseKernel, file.Size, file.Size)
	return k, err
}

func inspectKernel(ctx context.Context, r io.ReaderAt, size int64, source string, beside func(name string) (io.ReadCloser, error)) (k kernelFile, err error) {
	k.source = source
	if k.image, err = kernel.ParseImage(r, size); err != nil {
		return kernelFile{}, err
	}
	if k.image.Arch != "x86_64" {
		return kernelFile{}, fmt.Errorf("kernel %s is for %s, and memlinux makes amd64 systems", k.image.Release, k.image.Arch)
	}
	// The file beside it first: the kernel would have to be unpacked.
	name := "config-" + k.image.Release
	if text, err := beside(name); err == nil {
		k.config, err = kernel.ParseConfig(text)
		_ = text.Close()
		if err != nil {
			return kernelFile{}, fmt.Errorf("%s: %w", name, err)
		}
		k.configSource = name
	} else if config, err := k.image.EmbeddedConfig(ctx, r); err == nil {
		k.config, k.configSource = config, "IKCONFIG"
	} else if ctx.Err() != nil {
		return kernelFile{}, err
	} else if !errors.Is(err, kernel.ErrNoConfig) {
		return kernelFile{}, fmt.Errorf("kernel %s: %w", k.image.Release, err)
	}
	return k, nil
}

// A kernel's meta package depends on the package of one release.
var releasePackage = regexp.MustCompile(`^linux-image-[0-9]`)

func (b *build) debianKernel(ctx context.Context, name string, withModules bool) (kernelFile, error) {
	got, err := b.fetch(ctx, PhaseKernel, name, releasePackage, withModules, "boot/vmlinuz-*", "boot/config-*")
	if err != nil {
		return kernelFile{}, err
	}
	files, from := got.files, got.from
	image, found := "", false
	for path := range files {
		if strings.HasPrefix(path, "boot/vmlinuz-") {
			image, found = path, true
		}
	}
	if !found {
		return kernelFile{}, unfit{ErrKernel, fmt.Errorf("no kernel (boot/vmlinuz-…) is in Debian's package %s", from.Name)}
	}
	k, err := b.cachedKernel(ctx, files[image], "debian "+from.Name+" "+from.Version, func(name string) (io.ReadCloser, error) {
		return os.Open(files["boot/"+name].Path)
	})
	if err != nil {
		return kernelFile{}, unfit{ErrKernel, fmt.Errorf("package %s: %w", from.Name, err)}
	}
	k.library, k.noModules = got.library, "Debian's package "+from.Name+" has none"
	return k, nil
}
