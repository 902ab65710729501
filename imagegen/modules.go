package imagegen

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/modules"
)

// importModules brings the modules that fill adds into the cache, where they
// are two files: the archive, and the index, whose SHA-256 it returns. fill also
// says which kernel release they are of.
func (b *build) importModules(ctx context.Context, fill func(*modules.Writer) (release string, err error)) (string, error) {
	archive, err := b.store.Stage()
	if err != nil {
		return "", err
	}
	defer archive.Discard()
	w := modules.NewWriter(ctx, archive)
	release, ferr := fill(w)
	library, err := w.Close(release)
	if err == nil {
		err = ferr
	}
	if err != nil {
		return "", fmt.Errorf("import modules: %w", err)
	}
	file, err := archive.Commit(ctx)
	if err != nil {
		return "", err
	}
	library.Archive = file.SHA256
	index, err := b.store.Stage()
	if err != nil {
		return "", err
	}
	defer index.Discard()
	if err := library.Write(index); err != nil {
		return "", fmt.Errorf("import modules: %w", err)
	}
	if file, err = index.Commit(ctx); err != nil {
		return "", err
	}
	return file.SHA256, nil
}

// library opens an index whose archive is there too. The bytes of the archive
// are verified module by module, as they are read.
func (b *build) library(ctx context.Context, index string) (*modules.Library, error) {
	file, err := b.store.Lookup(ctx, index)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(file.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	l, err := modules.Parse(f)
	if err != nil {
		return nil, err
	}
	if !l.Checked {
		return nil, fmt.Errorf("the modules in the cache have no checksums: %w", os.ErrNotExist)
	}
	archive, err := b.store.Open(l.Archive)
	if err != nil {
		return nil, err
	}
	return l, archive.Close()
}

// hostTree is the cache's record of the folder of modules that was imported
// last for a release.
type hostTree struct {
	Fingerprint string // over name, size and time of each file
	Index       string // SHA-256
}

// hostModules finds the modules of k in the host's lib/modules and imports them
// where that was not done yet or they have changed since.
func (b *build) hostModules(ctx context.Context, k *kernelFile) error {
	dir := filepath.Join(b.g.Root, "/lib/modules", k.image.Release)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		k.noModules = dir + " is not there"
		return nil
	}
	unlock, err := b.store.Lock(ctx, "modules")
	if err != nil {
		return err
	}
	defer unlock()
	names, fingerprint, total, err := listModules(dir)
	if err != nil {
		return fmt.Errorf("read the modules of kernel %s: %w", k.image.Release, err)
	}
	if len(names) == 0 {
		k.noModules = dir + " has none"
		return nil
	}
	record, name := hostTree{}, "modules-"+k.image.Release
	if b.store.Record(name, &record) == nil && record.Fingerprint == fingerprint {
		if k.library, err = b.library(ctx, record.Index); err == nil || ctx.Err() != nil {
			return err
		}
	}
	record.Fingerprint = fingerprint
	if record.Index, err = b.importFiles(ctx, dir, names, total, k.image.Release); err != nil {
		return err
	}
	if err := b.store.SetRecord(name, record); err != nil {
		return err
	}
	k.library, err = b.library(ctx, record.Index)
	return err
}

// listModules lists the files that matter in a lib/modules/RELEASE, sorted,
// with a digest that changes when they do, and their size in bytes.
func listModules(dir string) (names []string, fingerprint string, total int64, err error) {
	h := sha256.New()
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path) // path begins with dir
		if d.IsDir() || !modules.Wants(name) {
			return nil
		}
		info, err := os.Stat(path) // weak-updates/ has links
		if err != nil || !info.Mode().IsRegular() {
			return nil //nolint:nilerr // a link to nowhere is no module
		}
		names = append(names, name)
		total += info.Size()
		fmt.Fprintf(h, "%q %d %d\n", name, info.Size(), info.ModTime().UnixNano())
		return nil
	})
	return names, hex.EncodeToString(h.Sum(nil)), total, err
}

func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > modules.MaxSize {
		return nil, fmt.Errorf("%s has %d MiB", path, st.Size()>>20)
	}
	b := make([]byte, st.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return b, nil
}

// selectModules chooses from k's modules. Where there are none to choose from,
// sets are empty with a warning.
func (b *build) selectModules(k kernelFile, choice []string) (*modules.Selection, error) {
	release := k.image.Release
	if len(modules.Sets(choice)) == 0 {
		return &modules.Selection{Release: release}, nil
	}
	if k.library == nil || len(k.library.Modules) == 0 && len(k.library.BuiltIn) == 0 {
		if singles := modules.Singles(choice); len(singles) > 0 {
			return nil, unfit{ErrRecipe, fmt.Errorf("the module %s can't be had: no modules of kernel %s are known (%s)", singles[0], release, k.noModules)}
		}
		if k.config == nil || k.config.BuiltIn("MODULES") {
			b.warn("no modules are in the initramfs (%s): a device works only if its driver is built into kernel %s", k.noModules, release)
		}
		return &modules.Selection{Release: release}, nil
	}
	if k.library.Release != release {
		return nil, unfit{ErrKernel, fmt.Errorf("the modules are for kernel %s, not %s", k.library.Release, release)}
	}
	selected, err := k.library.Select(choice)
	if errors.Is(err, modules.ErrNoModule) {
		return nil, unfit{ErrRecipe, err}
	}
	if err != nil {
		return nil, unfit{ErrKernel, err}
	}
	return selected, nil
}

// moduleFiles are the entries of the initramfs for the modules s, whose bytes
// are in archive: the modules as the kernel loads them, plain, and the texts by
// which modprobe, mount and /init find them.
func moduleFiles(archive io.ReaderAt, s *modules.Selection) ([]initramfs.Entry, error) {
	r, err := modules.NewReader(archive)
	if err != nil {
		return nil, err
	}
	dir := "lib/modules/" + s.Release
	if !fs.ValidPath(dir) || strings.Count(dir, "/") != 2 {
		return nil, fmt.Errorf("%q is no kernel release", s.Release)
	}
	var entries []initramfs.Entry
	text := func(path string, b []byte, why string) {
		entries = append(entries, initramfs.Entry{Path: path, Mode: 0o644, Content: bytes.NewReader(b), Size: int64(len(b)), Why: "memlinux's own: " + why})
	}
	text(dir+"/modules.dep", s.Dep(), "which modules a module needs, for modprobe")
	text(dir+"/modules.alias", s.Alias(), "which modules a device needs, for modprobe")
	text(dir+"/modules.devname", s.Devname(), "device nodes that load their module")
	text("etc/filesystems", s.Filesystems(), "the order in which mount tries file systems")
	for _, m := range s.Modules {
		entries = append(entries, initramfs.Entry{Path: dir + "/" + m.Path, Mode: 0o644, Content: r.Open(m), Size: m.Size, SHA256: m.SHA256, Checked: true, Why: "module " + s.Why(m.Name())})
	}
	return entries, nil
}
