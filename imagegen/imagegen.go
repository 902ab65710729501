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

	"github.com/memlinux/memlinux/imagegen/budget"
	"github.com/memlinux/memlinux/imagegen/cache"
	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/kbuild"
	"github.com/memlinux/memlinux/imagegen/manifest"
	"github.com/memlinux/memlinux/imagegen/modules"
	"github.com/memlinux/memlinux/imagegen/settings"
)

// Recipe says what to make. The zero value is a good one.
type Recipe struct {
	Kernel      KernelSource
	Busybox     BusyboxSource
	Modules     []string              // sets (modules.SetNames) or names of kernel modules; empty for modules.Default
	Microcode   string                // for "all" processors, those of this machine ("host") or "none", also ""
	Settings    settings.Settings     // Guest is set by Rootfs
	Payload     *os.File              // a tar of files that lie over all else; nil for none
	Rootfs      *os.File              // a tar of a whole root tree, which takes busybox's place; nil for none
	Compression initramfs.Compression // the Name may be "auto" or "" for the best that the kernel can unpack
	Append      string                // more words for the kernel's command line
	Boot        []string              // the firmwares that it is for: "bios", "uefi"; empty for both
	RAM         int64                 // of the machine that it is for, in bytes; 0 where that is not known
	Epoch       time.Time             // of everything in the initramfs; the zero Time is 1970
}

// KernelSource says where the kernel comes from. The zero value is auto: the
// running kernel's file in /boot, else the newest one there, else Debian's
// [DefaultKernelPackage].
type KernelSource struct {
	// Host leaves the last one out.
	Host bool
	// Source is compiled: from Base ("minimal" or "defconfig") or the whole
	// Config, and Fragments over it.
	Source    SourceCode
	Base      string
	Config    []byte
	Fragments []kbuild.Fragment
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

// System is a kernel, an initramfs and a command line that belong together.
type System struct {
	ID        string // 16 hex digits of a digest over the three
	Kernel    File
	Initramfs File
	Cmdline   string // without the memlinux.build=ID that a boot entry adds
	Manifest  manifest.Manifest
	Warnings  []string // sentences without full stop
}

// File is a file in the cache.
type File = cache.File

// The phases of a build. Only a kernel from source is unpacked and compiled.
const (
	PhaseKernel    = "kernel"
	PhaseUnpack    = "unpack source"
	PhaseCompile   = "compile kernel" // counts objects
	PhaseBusybox   = "busybox"
	PhaseMake      = "compile busybox" // counts objects
	PhaseInitramfs = "initramfs"
)

// Progress is told how far a phase is in bytes, or in objects. A phase that
// first fetches, then unpacks modules and then copies counts each from 0 with
// its own total; total is 0 while it is unknown.
type Progress func(phase string, done, total int64)

// Generator makes systems. Several may share a cache, also across processes.
type Generator struct {
	CacheDir string
	// Root is where boot/, lib/modules/ and bin/ of the host are; "" for /.
	Root string
	// Release is the running kernel's; "" to ask the running kernel.
	Release string
	Apt     debian.Apt
	LogDir  string // a folder where logs of compilations are kept; "" for nowhere
	Owner   uint32 // the user whose share of the cache it counts in; root's is all
}

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
	if err := r.Validate(); err != nil {
		return nil, unfit{ErrRecipe, err}
	}
	store, err := cache.Open(g.CacheDir, g.Owner)
	if err != nil {
		return nil, err
	}
	if err := store.Room(0); err != nil {
		return nil, err
	}
	b := &build{g: g, store: store, progress: progress}
	defer b.close()
	k, err := b.kernel(ctx, r.Kernel, len(modules.Sets(r.Modules)) > 0)
	if err != nil {
		return nil, err
	}
	selected, err := b.selectModules(k, r.Modules)
	if err != nil {
		return nil, err
	}
	if r.Compression, err = b.check(k, selected, r.Compression); err != nil {
		return nil, unfit{ErrKernel, err}
	}
	box, err := b.busybox(ctx, r.Busybox)
	if err != nil {
		return nil, err
	}
	early, err := b.microcode(ctx, r.Microcode, k)
	if err != nil {
		return nil, err
	}
	c, err := b.compose(ctx, r, k, selected, box)
	if err != nil {
		return nil, err
	}
	cmdline := strings.Join(strings.Fields(c.words+" "+k.words+" "+r.Append), " ")
	if limit, longest := k.image.CommandLine, len(manifest.BootLine(cmdline, strings.Repeat("f", 16), 1<<30)); longest > limit {
		return nil, unfit{ErrRecipe, fmt.Errorf("the command line has %d bytes and the kernel takes %d; shorten what is appended", longest, limit)}
	}
	for _, applet := range c.applets {
		if !slices.Contains(box.info.Applets, applet) {
			return nil, unfit{ErrBusybox, fmt.Errorf("this busybox lacks the applet %s, which this system needs; take another one", applet)}
		}
	}
	file, packed, err := b.pack(ctx, r, early, c)
	if err != nil {
		return nil, err
	}
	need := budget.Least(k.image, budget.Initramfs{Compressed: file.Size, Compression: r.Compression.Name, Ramfs: ramfs(k, r.Append),
		Sizes: func(yield func(int64) bool) {
			// The kernel unpacks the microcode, too.
			if yield(early.Size()) {
				budget.Sizes(c.tree)(yield)
			}
		}})
	if err := fits(need, r.RAM, r.Boot); err != nil {
		return nil, unfit{ErrRecipe, err}
	}
	s := &System{ID: SystemID(k.file.SHA256, file.SHA256, cmdline), Kernel: k.file, Initramfs: file, Cmdline: cmdline, Warnings: b.warnings}
	s.Manifest = describe(s, r, k, selected, box, early, c, packed, need)
	return s, nil
}

// Validate checks all that can be known before anything is looked at.
func (r Recipe) Validate() error {
	if (r.Rootfs == nil) != (r.Settings.Guest == nil) {
		return errors.New("settings for a guest are for a root tree, and a root tree wants such")
	}
	switch r.Compression.Name {
	case "", "auto":
		if r.Compression.Level != 0 {
			return errors.New("a level needs a compression to be named: zstd or gzip")
		}
	case "zstd", "gzip", "none":
		if err := r.Compression.Validate(); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%q is no compression of the initramfs; use auto, zstd, gzip or none", r.Compression.Name)
	}
	if err := modules.Validate(r.Modules); err != nil {
		return err
	}
	switch r.Microcode {
	case "", "none", "host", "all":
	default:
		return fmt.Errorf("%q is no choice of microcode; use all, host or none", r.Microcode)
	}
	for _, firmware := range r.Boot {
		if firmware != "bios" && firmware != "uefi" {
			return fmt.Errorf("%q is no firmware to boot with; use bios and uefi", firmware)
		}
	}
	if err := r.Settings.Validate(); err != nil {
		return err
	}
	// A line break would begin a new line in the boot menu.
	for _, c := range []byte(r.Append) {
		if c < ' ' || c > '~' {
			return fmt.Errorf("the command line has the character %q; only printable ASCII can be on it", c)
		}
	}
	for _, word := range strings.Fields(r.Append) {
		if strings.HasPrefix(word, "memlinux.") {
			return fmt.Errorf("%s on the command line is set by the boot entry; leave it out", word)
		}
	}
	if err := r.Kernel.validate(); err != nil {
		return err
	}
	return r.Busybox.validate()
}

// FromSource reports whether it is compiled.
func (s KernelSource) FromSource() bool { return !s.Source.isZero() }

func (s KernelSource) validate() error {
	given := 0
	for _, is := range []bool{s.Host, s.Debian != "", s.File != nil, !s.Source.isZero()} {
		if is {
			given++
		}
	}
	switch {
	case given > 1:
		return errors.New("the kernel can come from one place only: this machine, a package, a file or source")
	case s.Debian != "" && !debian.ValidName(s.Debian):
		return fmt.Errorf("%q is not a Debian package name", s.Debian)
	case s.Source.isZero():
		if s.Base != "" || s.Config != nil || len(s.Fragments) > 0 {
			return errors.New("a kernel's configuration is for one that is made from source; name its source, or leave the configuration out")
		}
		return nil
	case (s.Base != "") == (s.Config != nil):
		return errors.New("a kernel from source needs one configuration to begin with: minimal, defconfig or a file")
	case s.Base != "" && s.Base != "minimal" && s.Base != "defconfig":
		return fmt.Errorf("%q is no configuration to begin with; use minimal, defconfig or a file", s.Base)
	}
	return s.Source.validate("kernel")
}

// ramfs reports whether the kernel unpacks the initramfs into a file system that
// no half of the memory limits (Linux init/do_mounts.c, init_rootfs).
func ramfs(k kernelFile, words string) bool {
	return k.config != nil && !k.config.BuiltIn("TMPFS") || slices.ContainsFunc(strings.Fields(words), func(w string) bool { return strings.HasPrefix(w, "root=") })
}

// fits says whether a system that needs so much can come up in ram bytes, where
// that is known.
func fits(need budget.Need, ram int64, boot []string) error {
	least := need.BIOS
	if !slices.Contains(boot, "bios") && len(boot) > 0 {
		least = need.UEFI
	}
	if ram == 0 || ram >= int64(least)<<20 {
		return nil
	}
	return fmt.Errorf("this system needs %d MiB of RAM to come up, and the machine that it is for has %d; leave something out", least, ram>>20)
}

// build is one run of Build.
type build struct {
	g        Generator
	store    *cache.Store
	progress Progress
	warnings []string
	closers  []func() // of what the tree reads
}

func (b *build) warn(format string, args ...any) {
	b.warnings = append(b.warnings, fmt.Sprintf(format, args...))
}

func (b *build) close() {
	for _, c := range b.closers {
		c()
	}
}

// check holds the kernel's configuration against what the system needs and
// returns how the initramfs is to be compressed.
func (b *build) check(k kernelFile, selected *modules.Selection, compression initramfs.Compression) (initramfs.Compression, error) {
	auto := compression.Name == "" || compression.Name == "auto"
	if k.config == nil {
		b.warn("the configuration of kernel %s is not known (no CONFIG_IKCONFIG in it, no config-%s beside it), so it could not be checked", k.image.Release, k.image.Release)
		if auto {
			// Nearly every kernel of the last 20 years unpacks it.
			compression.Name = "gzip"
		}
		return compression, nil
	}
	if auto {
		compression.Name = k.config.Compression()
	}
	var fatal []string
	for _, f := range k.config.Check(compression.Name, selected.Has) {
		if f.Fatal {
			fatal = append(fatal, f.String())
		} else {
			b.warn("%s", f)
		}
	}
	if fatal != nil {
		return compression, fmt.Errorf("kernel %s can't start a system in memory: %s", k.image.Release, strings.Join(fatal, "; "))
	}
	return compression, nil
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
	if err := b.store.Room(st.Size()); err != nil {
		return nil, err
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
