// Package imagegen makes a Linux that lives in memory: a [Recipe] becomes a
// [System], which is a kernel, an initramfs and a command line.
//
// It promises that the same recipe and the same inputs give the same bytes,
// that what it hands out is complete and durable in a content-addressed cache,
// and that a kernel or busybox that could not work is refused with the reason
// instead of failing at boot.
package imagegen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/memlinux/memlinux/imagegen/busybox"
	"github.com/memlinux/memlinux/imagegen/cache"
	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/modules"
)

// Recipe says what to make. The zero value is a good one.
type Recipe struct {
	Kernel      KernelSource
	Busybox     *os.File  // a static busybox; nil for the host's, else Debian's busybox-static
	Modules     []string  // sets (modules.SetNames) or names of kernel modules; empty for modules.Default
	Compression string    // "zstd", "gzip", "none", or "auto" or "" for the best that the kernel can unpack
	Append      string    // more words for the kernel's command line
	Epoch       time.Time // of everything in the initramfs; the zero Time is 1970
}

// KernelSource says where the kernel comes from. The zero value is auto: the
// running kernel's file in /boot, else the newest one there, else Debian's
// [DefaultKernelPackage].
type KernelSource struct {
	// Debian is a package's name, fetched by apt and not installed.
	Debian string
	// File is an open bzImage, which is read by descriptor only.
	File *os.File
	// Configs are configurations that lie beside File, by file name; the one
	// called config-RELEASE is read.
	Configs map[string]io.ReaderAt
}

// DefaultKernelPackage is the Debian package of the kernel where /boot has none.
const DefaultKernelPackage = "linux-image-cloud-amd64"

// BusyboxPackage is the Debian package of the busybox where the host has no
// static one.
const BusyboxPackage = "busybox-static"

// System is a kernel, an initramfs and a command line that belong together.
type System struct {
	ID        string // 16 hex digits of a digest over the three
	Kernel    File
	Initramfs File
	Cmdline   string // without the memlinux.build=ID that a boot entry adds
	Manifest  Manifest
	Warnings  []string // sentences without full stop
}

// File is a file in the cache.
type File = cache.File

// Progress is told how far a phase, "kernel" or "initramfs", is in bytes. A
// phase that first fetches, then unpacks modules and then copies counts each
// from 0 with its own total; total is 0 while it is unknown.
type Progress func(phase string, done, total int64)

// Generator makes systems. Several may share a cache, also across processes.
type Generator struct {
	CacheDir string
	// Root is where boot/, lib/modules/ and bin/ of the host are; "" for /.
	Root string
	// Release is the running kernel's; "" to ask the running kernel.
	Release string
	Apt     debian.Apt
}

// Consoles begins every command line. The kernel talks on all of them; the
// last one is /dev/console, where a system that root= starts speaks: the screen
// of a PC. A console without its hardware does not count.
const Consoles = "console=ttyS0,115200 console=tty0"

// buildWord is what a boot entry adds to the command line, here for its length.
const buildWord = " memlinux.build=0123456789abcdef"

// Errors that say whose fault it is that nothing was made; the message has the
// sentence.
var (
	// ErrRecipe: something in the recipe can't be.
	ErrRecipe = errors.New("the recipe")
	// ErrKernel: the kernel is unfit.
	ErrKernel = errors.New("the kernel")
	// ErrBusybox: the busybox is unfit.
	ErrBusybox = errors.New("the busybox")
)

// unfit is err with one of the errors above on it that errors.Is finds and
// nobody needs to read.
type unfit struct{ what, err error }

func (u unfit) Error() string   { return u.err.Error() }
func (u unfit) Unwrap() []error { return []error{u.what, u.err} }

// Build makes the system that r describes. progress may be nil. When it returns
// an error, nothing was made but what the cache may keep for next time.
func (g Generator) Build(ctx context.Context, r Recipe, progress Progress) (*System, error) {
	if progress == nil {
		progress = func(string, int64, int64) {}
	}
	if err := r.validate(); err != nil {
		return nil, unfit{ErrRecipe, err}
	}
	store, err := cache.Open(g.CacheDir)
	if err != nil {
		return nil, err
	}
	b := build{g: g, store: store, progress: progress}
	k, err := b.kernel(ctx, r.Kernel, len(modules.Sets(r.Modules)) > 0)
	if err != nil {
		return nil, err
	}
	selected, err := b.selectModules(k, r.Modules)
	if err != nil {
		return nil, err
	}
	compression, err := b.check(k, selected, r.Compression)
	if err != nil {
		return nil, unfit{ErrKernel, err}
	}
	cmdline := strings.TrimSpace(Consoles + " " + r.Append)
	if limit := k.image.CommandLine; len(cmdline)+len(buildWord) > limit {
		return nil, unfit{ErrRecipe, fmt.Errorf("the command line has %d bytes and the kernel takes %d; shorten what is appended", len(cmdline)+len(buildWord), limit)}
	}
	box, err := b.busybox(ctx, r.Busybox)
	if err != nil {
		return nil, err
	}
	for _, applet := range initramfs.ModuleApplets {
		if len(selected.Modules) > 0 && !slices.Contains(box.info.Applets, applet) {
			return nil, unfit{ErrBusybox, fmt.Errorf("this busybox lacks the applet %s, by which /init loads modules; take another, or no modules (none)", applet)}
		}
	}
	return b.assemble(ctx, r, k, selected, box, compression, cmdline)
}

func (r Recipe) validate() error {
	switch r.Compression {
	case "", "auto", "zstd", "gzip", "none":
	default:
		return fmt.Errorf("%q is no compression of the initramfs; use auto, zstd, gzip or none", r.Compression)
	}
	if err := modules.Validate(r.Modules); err != nil {
		return err
	}
	// A line break would begin a new line in the boot menu.
	for _, c := range []byte(r.Append) {
		if c < ' ' || c > '~' {
			return fmt.Errorf("the command line has the character %q; only printable ASCII can be on it", c)
		}
	}
	for _, word := range strings.Fields(r.Append) {
		if strings.HasPrefix(word, "memlinux.build=") {
			return errors.New("memlinux.build= on the command line is set by the boot entry; leave it out")
		}
	}
	if r.Kernel.Debian != "" && r.Kernel.File != nil {
		return errors.New("the kernel can't come from a file and a package at once")
	}
	if r.Kernel.Debian != "" && !debian.ValidName(r.Kernel.Debian) {
		return fmt.Errorf("%q is not a Debian package name", r.Kernel.Debian)
	}
	return nil
}

// build is one run of Build.
type build struct {
	g        Generator
	store    *cache.Store
	progress Progress
	warnings []string
}

func (b *build) warn(format string, args ...any) {
	b.warnings = append(b.warnings, fmt.Sprintf(format, args...))
}

// assemble packs the initramfs and names the result.
func (b *build) assemble(ctx context.Context, r Recipe, k kernelFile, selected *modules.Selection, box busyboxFile, compression, cmdline string) (*System, error) {
	epoch := r.Epoch
	if epoch.IsZero() {
		epoch = time.Unix(0, 0)
	}
	content, err := os.Open(box.file.Path)
	if err != nil {
		return nil, fmt.Errorf("make initramfs: %w", err)
	}
	defer content.Close()
	tree := initramfs.Base(content, box.file.Size)
	if len(selected.Modules) > 0 {
		archive, err := b.store.Open(k.library.Archive)
		if err != nil {
			return nil, fmt.Errorf("make initramfs: %w", err)
		}
		defer archive.Close()
		loadable, err := moduleFiles(archive, selected)
		if err != nil {
			return nil, fmt.Errorf("make initramfs: %w", err)
		}
		tree = tree.With(loadable...)
	}
	staged, err := b.store.Stage()
	if err != nil {
		return nil, err
	}
	defer staged.Discard()
	packed, err := initramfs.Pack(ctx, staged, tree, compression, epoch, func(done, total int64) { b.progress("initramfs", done, total) })
	if err != nil {
		return nil, err
	}
	file, err := staged.Commit(ctx)
	if err != nil {
		return nil, err
	}
	s := &System{ID: SystemID(k.file.SHA256, file.SHA256, cmdline), Kernel: k.file, Initramfs: file, Cmdline: cmdline, Warnings: b.warnings}
	s.Manifest = manifest(s, r, k, selected, box, compression, packed, tree)
	return s, nil
}

// check holds the kernel's configuration against what the system needs and
// returns how the initramfs is to be compressed.
func (b *build) check(k kernelFile, selected *modules.Selection, compression string) (string, error) {
	auto := compression == "" || compression == "auto"
	if k.config == nil {
		b.warn("the configuration of kernel %s is not known (no CONFIG_IKCONFIG in it, no config-%s beside it), so it could not be checked", k.image.Release, k.image.Release)
		if auto {
			// Nearly every kernel of the last 20 years unpacks it.
			compression = "gzip"
		}
		return compression, nil
	}
	if auto {
		compression = k.config.Compression()
	}
	var fatal []string
	for _, f := range k.config.Check(compression, selected.Has) {
		if f.Fatal {
			fatal = append(fatal, f.String())
		} else {
			b.warn("%s", f)
		}
	}
	if fatal != nil {
		return "", fmt.Errorf("kernel %s can't start a system in memory: %s", k.image.Release, strings.Join(fatal, "; "))
	}
	return compression, nil
}

// busyboxFile is a busybox that was inspected.
type busyboxFile struct {
	file File
	info busybox.Info
}

func (b *build) busybox(ctx context.Context, f *os.File) (busyboxFile, error) {
	if f != nil {
		box, err := b.takeBusybox(ctx, f)
		if err != nil {
			return busyboxFile{}, unfit{ErrBusybox, fmt.Errorf("%s: %w", f.Name(), err)}
		}
		return box, nil
	}
	for _, path := range []string{"/bin/busybox", "/usr/bin/busybox"} {
		host, err := os.Open(b.g.Root + path)
		if err != nil {
			continue
		}
		box, err := b.takeBusybox(ctx, host)
		_ = host.Close()
		if err == nil || ctx.Err() != nil {
			return box, err
		}
	}
	got, err := b.fetch(ctx, "initramfs", BusyboxPackage, nil, false, "bin/busybox", "usr/bin/busybox")
	if err != nil {
		return busyboxFile{}, unfit{ErrBusybox, fmt.Errorf("no static busybox on this machine, and Debian's could not be fetched: %w", err)}
	}
	for _, file := range got.files {
		f, err := os.Open(file.Path)
		if err != nil {
			return busyboxFile{}, err
		}
		defer f.Close()
		box, err := b.takeBusybox(ctx, f)
		if err != nil {
			return busyboxFile{}, unfit{ErrBusybox, fmt.Errorf("package %s: %w", BusyboxPackage, err)}
		}
		return box, nil
	}
	return busyboxFile{}, unfit{ErrBusybox, fmt.Errorf("no busybox is in Debian's %s", BusyboxPackage)}
}

// takeBusybox copies f into the cache and inspects the copy.
func (b *build) takeBusybox(ctx context.Context, f *os.File) (busyboxFile, error) {
	staged, err := b.take(ctx, f, busybox.MaxSize, nil)
	if err != nil {
		return busyboxFile{}, err
	}
	defer staged.Discard()
	info, err := busybox.Inspect(staged, staged.Size())
	if err != nil {
		return busyboxFile{}, err
	}
	for _, applet := range initramfs.Applets {
		if !slices.Contains(info.Applets, applet) {
			return busyboxFile{}, fmt.Errorf("this busybox lacks the applet %s, which /init needs", applet)
		}
	}
	file, err := staged.Commit(ctx)
	return busyboxFile{file: file, info: info}, err
}

// take copies all of an open file into the cache: what is checked and hashed
// is then what is used, whatever its owner does to the file meanwhile.
func (b *build) take(ctx context.Context, f *os.File, limit int64, report func(done, total int64)) (*cache.Staged, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	switch {
	case st.IsDir():
		return nil, errors.New("it is a directory")
	case !st.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case st.Size() > limit:
		return nil, fmt.Errorf("it has %d MiB, and no more than %d are taken", st.Size()>>20, limit>>20)
	}
	staged, err := b.store.Stage()
	if err != nil {
		return nil, err
	}
	// ReadAt, so that the descriptor's position, which the caller shares,
	// neither matters nor moves.
	err = staged.Fill(ctx, io.NewSectionReader(f, 0, st.Size()), func(done int64) {
		if report != nil {
			report(done, st.Size())
		}
	})
	if err != nil {
		staged.Discard()
		return nil, fmt.Errorf("copy into the cache: %w", err)
	}
	return staged, nil
}
