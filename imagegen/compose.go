package imagegen

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/memlinux/memlinux/imagegen/filecaps"
	"github.com/memlinux/memlinux/imagegen/firmware"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/microcode"
	"github.com/memlinux/memlinux/imagegen/modules"
	"github.com/memlinux/memlinux/imagegen/sandbox"
)

// composed is a system's tree and what goes with it.
type composed struct {
	tree     initramfs.Tree
	words    string   // of the command line, that the tree wants
	applets  []string // of busybox, that the tree wants
	firmware firmware.Found
	guest    bool // a root tree of another make
	shell    bool // consoles give a shell without a password
	// streams names the content of entries that came in a tar, whose digest is
	// known: reading them again would tell nothing more.
	streams map[io.ReaderAt]string
}

// compose lays together what the initramfs has: the root tree or busybox, the
// settings, modules with their firmware, and over all the recipe's own files.
func (b *build) compose(ctx context.Context, r Recipe, k kernelFile, selected *modules.Selection, box busyboxFile) (*composed, error) {
	c := &composed{streams: map[io.ReaderAt]string{}}
	content, err := os.Open(box.file.Path)
	if err != nil {
		return nil, fmt.Errorf("make initramfs: %w", err)
	}
	b.closers = append(b.closers, func() { _ = content.Close() })
	if r.Rootfs != nil {
		root, err := b.tree(ctx, c, r.Rootfs, "rootfs", "of the given root", true)
		if err != nil {
			return nil, err
		}
		c.guest = true
		if c.tree, err = initramfs.Guest(root, content, box.file.Size); err != nil {
			return nil, unfit{ErrRecipe, err}
		}
	} else {
		c.tree = initramfs.Base(content, box.file.Size)
	}
	applied, err := r.Settings.Apply(ctx, c.tree, b.g.root())
	if err != nil {
		var missing *sandbox.MissingError
		if ctx.Err() == nil && !errors.As(err, &missing) {
			err = unfit{ErrRecipe, err}
		}
		return nil, err
	}
	c.words, c.applets = applied.Words, applied.Applets
	// What asks for a password or starts an init of its own gives no shell.
	c.shell = !slices.ContainsFunc(applied.Tree, func(e initramfs.Entry) bool { return e.Path == "etc/memlinux/login" || e.Path == "etc/memlinux/init" })
	for _, w := range applied.Warnings {
		b.warn("%s", w)
	}
	own := applied.Tree
	if err := b.addModules(ctx, c, &own, k, selected); err != nil {
		return nil, fmt.Errorf("make initramfs: %w", err)
	}
	c.tree = own
	if r.Payload != nil {
		payload, err := b.tree(ctx, c, r.Payload, "payload", "of the recipe", false)
		if err != nil {
			return nil, err
		}
		if err := c.lay(payload); err != nil {
			return nil, unfit{ErrRecipe, err}
		}
		if !c.guest {
			b.hidden(payload, box)
		}
	}
	if err := c.addCapabilities(); err != nil {
		return nil, unfit{ErrRecipe, err}
	}
	for i := range c.tree {
		if c.tree[i].Path == initramfs.Busybox || c.tree[i].Path == initramfs.GuestBusybox {
			c.tree[i].SHA256 = box.file.SHA256
		}
	}
	return c, nil
}

// hidden warns of programs that busybox's shell has itself: with
// FEATURE_SH_STANDALONE, by which busybox is an applet of its own, it starts
// those first.
func (b *build) hidden(payload initramfs.Tree, box busyboxFile) {
	if !slices.Contains(box.info.Applets, "busybox") {
		return
	}
	var paths []string
	for _, e := range payload {
		if e.Mode.IsRegular() && e.Mode&0o111 != 0 && slices.Contains([]string{"bin", "sbin", "usr/bin", "usr/sbin"}, path.Dir(e.Path)) && slices.Contains(box.info.Applets, path.Base(e.Path)) {
			paths = append(paths, "/"+e.Path)
		}
	}
	if paths != nil {
		b.warn("this busybox's shell starts its own %s when only the name is typed; type the whole path, or take --busybox debian-source, whose shell does not", strings.Join(paths, ", "))
	}
}

func (g Generator) root() string {
	if g.Root == "" {
		return "/"
	}
	return g.Root
}

// tree takes a tar that the caller made and reads what is in it.
func (b *build) tree(ctx context.Context, c *composed, f *os.File, what, why string, replace bool) (initramfs.Tree, error) {
	staged, err := b.take(ctx, f, maxSource, func(done, total int64) { b.progress(PhaseInitramfs, done, total) })
	if err != nil {
		return nil, fmt.Errorf("the tar of the %s: %w", what, err)
	}
	b.closers = append(b.closers, staged.Discard)
	duplicates := initramfs.RefuseDuplicates
	if replace {
		duplicates = initramfs.ReplaceDuplicates
	}
	t, skipped, err := initramfs.FromTar(ctx, staged, staged.Size(), why, duplicates)
	if err != nil {
		return nil, unfit{ErrRecipe, fmt.Errorf("the tar of the %s: %w", what, err)}
	}
	if len(skipped) > 0 {
		b.warn("%d device nodes and sockets of the %s are left out, %s first: the kernel makes the nodes", len(skipped), what, skipped[0])
	}
	sum := staged.SHA256()
	for i, e := range t {
		if e.Content != nil {
			c.streams[e.Content] = fmt.Sprintf("%s %d", sum, i)
		}
	}
	return t, nil
}

// addModules lays the modules and the firmware that they ask for over t.
func (b *build) addModules(ctx context.Context, c *composed, t *initramfs.Tree, k kernelFile, selected *modules.Selection) error {
	if len(selected.Modules) == 0 {
		return nil
	}
	archive, err := b.store.Open(k.library.Archive)
	if err != nil {
		return err
	}
	b.closers = append(b.closers, func() { _ = archive.Close() })
	entries, err := moduleFiles(archive, selected)
	if err != nil {
		return err
	}
	if wanted := firmware.WantedBy(selected); len(wanted) > 0 {
		library, err := firmware.Open(b.g.root(), selected.Release)
		if err != nil {
			return err
		}
		b.closers = append(b.closers, func() { _ = library.Close() })
		if c.firmware, err = library.Find(ctx, wanted); err != nil {
			return err
		}
		entries = append(entries, c.firmware.Entries...)
	}
	c.applets = append(c.applets, initramfs.ModuleApplets...)
	upper, err := initramfs.Tree(nil).Union(entries...)
	if err != nil {
		return err
	}
	*t, err = initramfs.Overlay(*t, upper)
	return err
}

// lay lays the recipe's own files over the tree. They may take the place of what
// a root tree has or memlinux lays into etc, but not of what the system is
// started with, nor of what another key of the recipe has made.
func (c *composed) lay(payload initramfs.Tree) error {
	before := map[string]initramfs.Entry{}
	for _, e := range c.tree {
		before[e.Path] = e
	}
	after, err := initramfs.Overlay(c.tree, payload)
	if err != nil {
		return err
	}
	for _, e := range after {
		old, was := before[e.Path]
		if !was || old.Mode.IsDir() && e.Mode.IsDir() || old.Content == e.Content && old.Link == e.Link && old.HardLink == e.HardLink && old.Mode == e.Mode {
			continue
		}
		if needed(e.Path) || strings.Contains(old.Why, "as the recipe has it") || strings.HasPrefix(old.Why, "module") {
			return fmt.Errorf("two files for /%s: %s, and %s; leave one out", e.Path, old.Why, e.Why)
		}
	}
	c.tree = after
	return nil
}

// needed reports whether a system can't be started without memlinux's own file
// at path.
func needed(path string) bool {
	return path == "init" || path == initramfs.Busybox || strings.HasPrefix(path, "usr/lib/memlinux/") || strings.HasPrefix(path, "etc/memlinux/")
}

// addCapabilities brings the program that gives files the capabilities which the
// archive's format can't hold.
func (c *composed) addCapabilities() error {
	var files []filecaps.File
	for _, e := range c.tree {
		if e.Caps != nil {
			files = append(files, filecaps.File{Path: "/" + e.Path, Caps: e.Caps})
		}
	}
	if files == nil {
		return nil
	}
	program, err := filecaps.Program(files)
	if err != nil {
		return err
	}
	c.tree, err = c.tree.Union(initramfs.Entry{Path: "etc/memlinux/filecaps", Mode: 0o755, Content: bytes.NewReader(program), Size: int64(len(program)),
		Why: fmt.Sprintf("memlinux's own: gives %d files their capabilities", len(files))})
	return err
}

// packedFile is the cache's record of an initramfs.
type packedFile struct {
	SHA256 string
	Packed initramfs.Packed
}

// packVersion changes when the same tree is packed to other bytes than before.
const packVersion = "1"

// pack packs the tree behind the microcode, unless the cache has just that.
func (b *build) pack(ctx context.Context, r Recipe, early *microcode.Set, c *composed) (File, initramfs.Packed, error) {
	epoch := r.Epoch
	if epoch.IsZero() {
		epoch = time.Unix(0, 0)
	}
	key, err := c.key(ctx, r.Compression, epoch, early)
	if err != nil {
		return File{}, initramfs.Packed{}, fmt.Errorf("make initramfs: %w", err)
	}
	name := "initramfs-" + key
	var record packedFile
	if b.store.Record(name, &record) == nil && len(record.Packed.Digests) == len(c.tree) && len(record.Packed.Costs) == len(c.tree)+1 {
		file, err := b.store.Lookup(ctx, record.SHA256)
		if err == nil || ctx.Err() != nil {
			b.progress(PhaseInitramfs, file.Size, file.Size)
			return file, record.Packed, err
		}
	}
	staged, err := b.store.Stage()
	if err != nil {
		return File{}, initramfs.Packed{}, err
	}
	defer staged.Discard()
	if err := early.Pack(staged, epoch); err != nil {
		return File{}, initramfs.Packed{}, err
	}
	record.Packed, err = initramfs.Pack(ctx, staged, c.tree, r.Compression, epoch, func(done, total int64) { b.progress(PhaseInitramfs, done, total) })
	if err != nil {
		return File{}, initramfs.Packed{}, err
	}
	file, err := staged.Commit(ctx)
	if err != nil {
		return File{}, initramfs.Packed{}, err
	}
	record.SHA256 = file.SHA256
	return file, record.Packed, b.store.SetRecord(name, record)
}

// key is a digest over all that decides about the bytes of the initramfs.
func (c *composed) key(ctx context.Context, method initramfs.Compression, epoch time.Time, early *microcode.Set) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%s %s %d %d\n", packVersion, method.Name, method.Level, epoch.Unix())
	if err := early.Pack(h, epoch); err != nil {
		return "", err
	}
	for _, e := range c.tree {
		content := e.SHA256
		if name, ok := c.streams[e.Content]; ok && e.Content != nil {
			content = name
		} else if content == "" && e.Content != nil {
			sum := sha256.New()
			if err := ctx.Err(); err != nil {
				return "", err
			}
			if _, err := io.Copy(sum, io.NewSectionReader(e.Content, 0, e.Size)); err != nil {
				return "", fmt.Errorf("read %s: %w", e.Path, err)
			}
			content = hex.EncodeToString(sum.Sum(nil))
		}
		fmt.Fprintf(h, "%q %o %d %d %q %q %d %d %s\n", e.Path, e.Mode, e.UID, e.GID, e.Link, e.HardLink, e.Size, e.Order, content)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// microcode finds what of the processors' microcode goes along.
func (b *build) microcode(ctx context.Context, choice string, k kernelFile) (*microcode.Set, error) {
	if choice == "" || choice == "none" {
		return &microcode.Set{}, nil
	}
	if k.config != nil && !k.config.BuiltIn("MICROCODE") {
		b.warn("kernel %s does not load microcode: CONFIG_MICROCODE is not set", k.image.Release)
	}
	root := os.DirFS(b.g.root())
	var all microcode.Collection
	err := all.AddFolder(root)
	if errors.Is(err, microcode.ErrNone) {
		err = b.debianMicrocode(ctx, &all)
	}
	if err != nil {
		return nil, unfit{ErrRecipe, fmt.Errorf("microcode: %w", err)}
	}
	if choice == "all" {
		return all.All(), nil
	}
	cpus, err := microcode.HostCPUs(root)
	if err != nil {
		return nil, fmt.Errorf("microcode: %w", err)
	}
	set := all.For(cpus)
	if set.Empty() {
		b.warn("there is no microcode for the processors of this machine")
	}
	return set, nil
}

// debianMicrocode fetches the vendors' packages.
func (b *build) debianMicrocode(ctx context.Context, all *microcode.Collection) error {
	for _, name := range microcode.Packages {
		got, err := b.fetch(ctx, PhaseInitramfs, name, nil, false,
			"lib/firmware/intel-ucode/*", "usr/lib/firmware/intel-ucode/*", "lib/firmware/amd-ucode/*", "usr/lib/firmware/amd-ucode/*")
		if err != nil {
			return fmt.Errorf("none is on this machine, and Debian's could not be fetched (%w); %s", err, microcode.Enable)
		}
		paths := make([]string, 0, len(got.files))
		for path := range got.files {
			paths = append(paths, path)
		}
		slices.Sort(paths)
		for _, path := range paths {
			if !microcode.Wants(path) {
				continue
			}
			f, err := os.Open(got.files[path].Path)
			if err != nil {
				return err
			}
			err = all.Add(path, f)
			_ = f.Close()
			if err != nil {
				return err
			}
		}
	}
	return nil
}
