package imagegen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/memlinux/memlinux/imagegen/busybox/source"
	"github.com/memlinux/memlinux/imagegen/kbuild"
	"github.com/memlinux/memlinux/imagegen/modules"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"golang.org/x/sys/unix"
)

// builtKernel is the cache's record of a kernel that was made from source.
type builtKernel struct {
	Image, Config string // SHA-256
	Modules       string // SHA-256 of the index of its kernel modules; "" if they were not built
	Warnings      []string
}

// sourceKernel makes a kernel from source, unless the cache has the one that
// the same source, configuration and toolchain give.
func (b *build) sourceKernel(ctx context.Context, src KernelSource, withModules bool) (kernelFile, error) {
	code, err := b.source(ctx, PhaseKernel, src.Source)
	if err != nil {
		return kernelFile{}, err
	}
	defer code.close()
	r := kbuild.Request{Source: code.f, Size: code.size, SourceSHA256: code.sha256, Base: src.Base, Config: src.Config, Fragments: src.Fragments, Modules: withModules}
	key, err := r.Key(ctx)
	if err != nil {
		return kernelFile{}, err
	}
	// Two that want the same kernel: one makes it, the other then has it.
	unlock, err := b.store.Lock(ctx, "kernel-"+key[:16])
	if err != nil {
		return kernelFile{}, err
	}
	defer unlock()
	var record builtKernel
	if b.store.Record("kernel-"+key, &record) == nil {
		k, err := b.builtKernel(ctx, record, code.name, withModules)
		if err == nil || ctx.Err() != nil {
			k.words = minimalWords(src)
			return k, err
		}
	}
	if err := b.verify(ctx, src.Source, code); err != nil {
		return kernelFile{}, err
	}
	if record, err = b.compileKernel(ctx, r); err != nil {
		return kernelFile{}, err
	}
	if err := b.store.SetRecord("kernel-"+key, record); err != nil {
		return kernelFile{}, err
	}
	k, err := b.builtKernel(ctx, record, code.name, withModules)
	k.words = minimalWords(src)
	return k, err
}

// minimalWords are what the minimal kernel wants on its command line. libata waits
// 200 ms before it looks whether a SATA port has a device, for the sake of odd
// ones (Linux Documentation/admin-guide/kernel-parameters.txt, libata.force), and
// a kernel with the driver built in waits for that before it starts /init. A
// device that is late is found as one that was plugged in; nothing of a system in
// memory is on it. The same words, appended by the user with dbdelay, undo it.
func minimalWords(src KernelSource) string {
	if src.Base == "minimal" {
		return "libata.force=nodbdelay"
	}
	return ""
}

func (b *build) compileKernel(ctx context.Context, r kbuild.Request) (record builtKernel, err error) {
	if r.WorkDir, err = b.store.TempDir(); err != nil {
		return record, err
	}
	defer os.RemoveAll(r.WorkDir)
	if r.CcacheDir, err = b.ccache(ctx); err != nil {
		return record, err
	}
	built, err := kbuild.Build(ctx, r, func(step string, done, total int64) {
		b.progress(map[string]string{"unpack": PhaseUnpack, "compile": PhaseCompile}[step], done, total)
	})
	if built != nil && built.Log != "" {
		if path := b.keepLog(built.Log, "kernel-build.log"); path != "" && err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w\nthe whole log is %s", err, path)
		}
	}
	if err != nil {
		return record, err
	}
	record.Warnings = built.Warnings
	if record.Image, err = b.keep(ctx, built.Image); err != nil {
		return record, err
	}
	if record.Config, err = b.keep(ctx, built.Config); err != nil {
		return record, err
	}
	if built.ModulesDir != "" {
		names, _, total, lerr := listModules(built.ModulesDir)
		if lerr != nil {
			return record, fmt.Errorf("read the modules of kernel %s: %w", built.Release, lerr)
		}
		record.Modules, err = b.importFiles(ctx, built.ModulesDir, names, total, built.Release)
	}
	return record, err
}

// ccache is the folder of the compilers' cache, made where it is missing. It is
// for the user that compiles, who must be able to come there.
func (b *build) ccache(ctx context.Context) (string, error) {
	if err := sandbox.Run(ctx, sandbox.Command{Argv: []string{"true"}, Dir: b.g.CacheDir, Limit: time.Minute}); err != nil {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		return "", fmt.Errorf("compilers can't run in the cache's folder: %w; set cache-dir to one that every user can enter", err)
	}
	dir := filepath.Join(b.g.CacheDir, "ccache")
	// Of another user, which compiled before the package brought its own, they
	// could not be used.
	if given, err := sandbox.Given(dir); err == nil && !given {
		if err := os.RemoveAll(dir); err != nil {
			return "", fmt.Errorf("the compilers' cache: %w", err)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // object files are no secret
		return "", fmt.Errorf("the compilers' cache: %w", err)
	}
	return dir, nil
}

// keep copies a file that a build made into the cache and returns its SHA-256.
func (b *build) keep(ctx context.Context, path string) (string, error) {
	// The unprivileged user who made it could have laid a link there.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	staged, err := b.take(ctx, f, maxBuilt, nil)
	if err != nil {
		return "", fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	defer staged.Discard()
	file, err := staged.Commit(ctx)
	return file.SHA256, err
}

// maxBuilt bounds a file that a compilation made, in bytes.
const maxBuilt = 1 << 30

// keepLog copies a compilation's log to where logs are kept. It returns where
// it lies, "" where it can't be kept: what it tells of matters more.
func (b *build) keepLog(path, name string) string {
	if b.g.LogDir == "" {
		return ""
	}
	from, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return ""
	}
	defer from.Close()
	to, err := os.Create(filepath.Join(b.g.LogDir, name))
	if err != nil {
		return ""
	}
	_, err = io.Copy(to, from)
	if errors.Join(err, to.Close()) != nil {
		return ""
	}
	return to.Name()
}

// builtKernel is the kernel of a record whose files are all in the cache.
func (b *build) builtKernel(ctx context.Context, r builtKernel, source string, withModules bool) (kernelFile, error) {
	image, err := b.store.Lookup(ctx, r.Image)
	if err != nil {
		return kernelFile{}, err
	}
	k, err := b.cachedKernel(ctx, image, "source "+source, func(string) (io.ReadCloser, error) { return b.store.Open(r.Config) })
	if err != nil {
		return kernelFile{}, err
	}
	if withModules && r.Modules != "" {
		if k.library, err = b.library(ctx, r.Modules); err != nil {
			return kernelFile{}, err
		}
	}
	k.noModules = "its configuration builds none"
	for _, w := range r.Warnings {
		b.warn("%s", w)
	}
	return k, nil
}

// importFiles brings modules, whose files lie in the folder dir and have total
// bytes, into the cache and returns the SHA-256 of their index.
func (b *build) importFiles(ctx context.Context, dir string, names []string, total int64, release string) (string, error) {
	return b.importModules(ctx, func(w *modules.Writer) (string, error) {
		done := int64(0)
		for _, name := range names {
			content, err := readModule(filepath.Join(dir, name))
			if err != nil {
				return "", err
			}
			if err := w.Add(name, content); err != nil {
				return "", err
			}
			done = min(done+int64(len(content)), total)
			b.progress(PhaseKernel, done, total)
		}
		return release, nil
	})
}

// builtBusybox is the cache's record of a busybox that was made from source.
type builtBusybox struct {
	Binary   string // SHA-256
	Source   string
	Warnings []string
}

// sourceBusybox makes a busybox from source, unless the cache has the one that
// the same source, configuration and toolchain give.
func (b *build) sourceBusybox(ctx context.Context, s BusyboxSource) (busyboxFile, error) {
	r := source.Request{Apt: b.g.Apt}
	lock := "busybox"
	verify := func() error { return nil } // apt's signed lists do
	if s.DebianSource {
		lock = "apt" // which does its work in between
	} else {
		code, err := b.source(ctx, PhaseBusybox, s.Source)
		if err != nil {
			return busyboxFile{}, err
		}
		defer code.close()
		r.Source, r.Size, r.SourceSHA256 = code.f, code.size, code.sha256
		verify = func() error { return b.verify(ctx, s.Source, code) }
	}
	for _, name := range slices.Sorted(maps.Keys(s.Fragments)) {
		r.Fragments = append(r.Fragments, source.Fragment{Name: name, Text: s.Fragments[name]})
	}
	unlock, err := b.store.Lock(ctx, lock)
	if err != nil {
		return busyboxFile{}, err
	}
	defer unlock()
	key, err := r.Key(ctx)
	if err != nil {
		return busyboxFile{}, err
	}
	var record builtBusybox
	if b.store.Record("busybox-"+key, &record) == nil {
		box, err := b.builtBusybox(ctx, record)
		if err == nil || ctx.Err() != nil {
			return box, err
		}
	}
	if err := verify(); err != nil {
		return busyboxFile{}, err
	}
	if r.WorkDir, err = b.store.TempDir(); err != nil {
		return busyboxFile{}, err
	}
	defer os.RemoveAll(r.WorkDir)
	if r.CcacheDir, err = b.ccache(ctx); err != nil {
		return busyboxFile{}, err
	}
	built, err := source.Build(ctx, r, func(step string, done, total int64) {
		phase := PhaseBusybox
		if step == "compile" {
			phase = PhaseMake
		}
		b.progress(phase, done, total)
	})
	if built != nil && built.Log != "" {
		if path := b.keepLog(built.Log, "busybox-build.log"); path != "" && err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w\nthe whole log is %s", err, path)
		}
	}
	if err != nil {
		return busyboxFile{}, err
	}
	record = builtBusybox{Source: "source " + built.Source, Warnings: built.Warnings}
	if record.Binary, err = b.keep(ctx, built.Binary); err != nil {
		return busyboxFile{}, err
	}
	if err := b.store.SetRecord("busybox-"+key, record); err != nil {
		return busyboxFile{}, err
	}
	return b.builtBusybox(ctx, record)
}

func (b *build) builtBusybox(ctx context.Context, r builtBusybox) (busyboxFile, error) {
	f, err := b.store.Open(r.Binary)
	if err != nil {
		return busyboxFile{}, err
	}
	defer f.Close()
	for _, w := range r.Warnings {
		b.warn("%s", w)
	}
	return b.takeBusybox(ctx, f, r.Source)
}
