package command

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/memlinux/memlinux/cli/collect"
	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/api/recipe"
)

// systemFlags say what system to make: a recipe file, and what is to be other
// than in it.
type systemFlags struct {
	recipe string

	kernel, kernelConfig, kernelSHA256, kernelKeyring, kernelSignature string
	kernelFragments                                                    []string
	modules                                                            []string
	microcode, busybox, rootfs, compression, append, ram               string

	set *pflag.FlagSet
}

func (s *systemFlags) flags(c *cobra.Command) {
	s.set = c.Flags()
	f := pflag.NewFlagSet("system", pflag.ContinueOnError)
	f.StringVarP(&s.recipe, "recipe", "r", "", "a recipe FILE, as memlinux recipe init writes one; the flags here win over it")
	f.StringVar(&s.kernel, "kernel", "", "auto, host, debian:PACKAGE, debian-source:VERSION, source:PATH|URL or a bzImage FILE (default: auto, or as memlinuxd is configured)")
	f.StringVar(&s.kernelConfig, "kernel-config", "", "of a kernel from source: minimal, defconfig or a .config FILE (default: minimal)")
	f.StringSliceVar(&s.kernelFragments, "kernel-fragment", nil, "FILE with more options for a kernel from source; can be repeated")
	f.StringVar(&s.kernelSHA256, "kernel-sha256", "", "that the kernel's source must have")
	f.StringVar(&s.kernelKeyring, "kernel-keyring", "", "FILE of OpenPGP keys, one of which must have signed the kernel's source")
	f.StringVar(&s.kernelSignature, "kernel-signature", "", "FILE with that signature (default: from beside a URL)")
	f.StringSliceVar(&s.modules, "modules", nil, "kernel modules: none, all, sets (input, usb-storage, disk, filesystems, network) or names (default: all sets but network)")
	f.StringVar(&s.microcode, "microcode", "", "of the CPU: none, all, or host for this machine's (default: none)")
	f.StringVar(&s.busybox, "busybox", "", "auto, host, debian, debian-source, source:PATH|URL or a static busybox FILE (default: this machine's, else Debian's)")
	f.StringVar(&s.rootfs, "rootfs", "", "a root tree that becomes the system: a folder, a tar, or an OCI image layout")
	f.StringVar(&s.compression, "compression", "", "of the initramfs: auto, zstd, gzip or none (default: auto)")
	f.StringVar(&s.append, "append", "", "more kernel command line")
	f.StringVar(&s.ram, "ram", "", "that the target machine has, such as 512MiB: a system that does not fit is refused")
	c.Flags().AddFlagSet(f)
}

// given lists the flags above that are on the command line.
func (s *systemFlags) given() []string {
	probe := &systemFlags{}
	c := &cobra.Command{}
	probe.flags(c)
	var names []string
	s.set.Visit(func(f *pflag.Flag) {
		if c.Flags().Lookup(f.Name) != nil {
			names = append(names, f.Name)
		}
	})
	return names
}

// load reads the recipe, if one is named, and lays the flags over it.
func (s *systemFlags) load() (r recipe.Recipe, text []byte, err error) {
	dir := "."
	if s.recipe != "" {
		if text, err = readRecipe(s.recipe); err != nil {
			return r, nil, err
		}
		dir = filepath.Dir(s.recipe)
	}
	r, problems := recipe.Parse(text, s.recipe)
	r.Rebase(dir)
	if problems = addMissing(&r, problems); len(problems) > 0 {
		return r, nil, problemsError(problems)
	}
	unmarshal := func(flag, value string, to interface{ UnmarshalText([]byte) error }) {
		if value != "" && err == nil {
			if uerr := to.UnmarshalText([]byte(value)); uerr != nil {
				err = usagef("--%s: %v", flag, uerr)
			}
		}
	}
	unmarshal("kernel", s.kernel, &r.Kernel)
	unmarshal("busybox", s.busybox, &r.Busybox)
	unmarshal("ram", s.ram, &r.RAM)
	for _, o := range []struct{ flag, to *string }{
		{&s.kernelConfig, &r.KernelBuild.Config}, {&s.kernelSHA256, &r.KernelBuild.SHA256}, {&s.kernelKeyring, &r.KernelBuild.Keyring},
		{&s.kernelSignature, &r.KernelBuild.Signature}, {&s.microcode, &r.Microcode}, {&s.rootfs, &r.Rootfs}, {&s.compression, &r.Compression},
	} {
		if *o.flag != "" {
			*o.to = *o.flag
		}
	}
	if len(s.kernelFragments) > 0 {
		r.KernelBuild.Fragments = s.kernelFragments
	}
	if len(s.modules) > 0 {
		r.Modules = s.modules
	}
	r.Append = strings.TrimSpace(r.Append + " " + s.append)
	if err == nil && !r.Kernel.Built() {
		for _, flag := range s.given() {
			if strings.HasPrefix(flag, "kernel-") {
				err = usagef("--%s is for a kernel from source: say --kernel debian-source:VERSION or source:PATH", flag)
			}
		}
	}
	return r, text, err
}

// opened is options for the bus and the files behind their descriptors.
type opened struct {
	options api.Properties
	files   []*os.File
}

func (o *opened) close() {
	for _, f := range o.files {
		_ = f.Close() // opened for reading
	}
}

func (o *opened) open(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, unusable(path, err)
	}
	o.files = append(o.files, f)
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, unusableError{fmt.Errorf("%s is not a regular file", path)}
	}
	return f, nil
}

func (o *opened) set(key string, value any) { o.options[key] = dbus.MakeVariant(value) }

// setFile opens path for the option; flag is how a person names it.
func (o *opened) setFile(key, flag, path string) error {
	f, err := o.open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", flag, err)
	}
	o.set(key, fdOf(f))
	return nil
}

// setFragments opens files that are merged in their order: the daemon goes by
// their names.
func (o *opened) setFragments(key, flag string, paths []string) error {
	if len(paths) == 0 {
		return nil
	}
	if len(paths) > maxConfigs {
		return usagef("%s: %d files are given, and %d can be sent; join some", flag, len(paths), maxConfigs)
	}
	all := api.Properties{}
	for i, path := range paths {
		f, err := o.open(path)
		if err != nil {
			return fmt.Errorf("%s: %w", flag, err)
		}
		all[fmt.Sprintf("%02d %s", i, filepath.Base(path))] = dbus.MakeVariant(fdOf(f))
	}
	o.set(key, all)
	return nil
}

func fdOf(f *os.File) dbus.UnixFD { return dbus.UnixFD(f.Fd()) }

// open opens and collects all that the system is made of, with this user's
// rights. What is wrong is told before a daemon is asked for anything.
func (s *systemFlags) open(ctx context.Context, g *global, out *os.File) (*opened, error) {
	r, text, err := s.load()
	if err != nil {
		return nil, err
	}
	o := &opened{options: api.Properties{}}
	v := newView(out, g.json && out == os.Stdout)
	err = s.fill(ctx, g, o, r, text, v)
	v.end(err == nil)
	if err != nil {
		o.close()
		return nil, err
	}
	return o, nil
}

// phaseCollect is the phase before the job: what the recipe names is read.
const phaseCollect = "collect"

func (s *systemFlags) fill(ctx context.Context, g *global, o *opened, r recipe.Recipe, text []byte, v view) error {
	if len(text) > 0 {
		o.set(api.OptRecipe, string(text))
	}
	if err := s.fillKernel(ctx, o, r, v); err != nil {
		return err
	}
	if err := s.fillBusybox(ctx, o, r, v); err != nil {
		return err
	}
	o.set(api.OptCompression, r.Compression)
	o.set(api.OptModules, r.Modules)
	o.set(api.OptMicrocode, r.Microcode)
	if r.Append != "" {
		o.set(api.OptAppend, r.Append)
	}
	if r.RAM > 0 {
		o.set(api.OptRAM, uint64(r.RAM))
	}
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		t, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return usagef("SOURCE_DATE_EPOCH is %q; it must be seconds since 1970", s)
		}
		o.set(api.OptSourceDateEpoch, t)
	}
	if err := o.collectRootfs(ctx, g, r.Rootfs, v); err != nil {
		return err
	}
	return o.collectPayload(ctx, g, s.recipe, r, v)
}

func (s *systemFlags) fillKernel(ctx context.Context, o *opened, r recipe.Recipe, v view) error {
	switch k := r.Kernel; k.Kind {
	case recipe.KindFile:
		return o.openKernel(k.Value)
	case recipe.KindSourcePath:
		if err := o.setSource(ctx, api.OptKernelSource, "--kernel", k.Value, v); err != nil {
			return err
		}
	case recipe.KindAuto:
		// Where nobody asks for it, it is the daemon's to say.
		if s.kernel != "" || r.Line("kernel") > 0 {
			o.set(api.OptKernel, k.String())
		}
	default:
		o.set(api.OptKernel, k.String())
	}
	if !r.Kernel.Built() {
		return nil
	}
	b := r.KernelBuild
	if b.Config == "minimal" || b.Config == "defconfig" {
		o.set(api.OptKernelConfig, b.Config)
	} else if err := o.setFile(api.OptKernelConfig, "kernel configuration", b.Config); err != nil {
		return err
	}
	if b.SHA256 != "" {
		o.set(api.OptKernelSHA256, b.SHA256)
	}
	for _, f := range []struct{ key, flag, path string }{{api.OptKernelKeyring, "keyring", b.Keyring}, {api.OptKernelSignature, "signature", b.Signature}} {
		if f.path == "" {
			continue
		}
		if err := o.setFile(f.key, f.flag, f.path); err != nil {
			return err
		}
	}
	return o.setFragments(api.OptKernelFragments, "kernel fragment", b.Fragments)
}

func (s *systemFlags) fillBusybox(ctx context.Context, o *opened, r recipe.Recipe, v view) error {
	switch b := r.Busybox; b.Kind {
	case recipe.KindFile:
		return o.setFile(api.OptBusybox, "--busybox", b.Value)
	case recipe.KindSourcePath:
		if err := o.setSource(ctx, api.OptBusyboxSource, "--busybox", b.Value, v); err != nil {
			return err
		}
	default:
		o.set(api.OptBusybox, b.String())
	}
	if !r.Busybox.Built() {
		return nil
	}
	if r.BusyboxBuild.SHA256 != "" {
		o.set(api.OptBusyboxSHA256, r.BusyboxBuild.SHA256)
	}
	return o.setFragments(api.OptBusyboxFragments, "busybox fragment", r.BusyboxBuild.Fragments)
}

// maxConfigs bounds how many files of a kind are offered: a message on the bus
// carries only a few descriptors.
const maxConfigs = 12

// openKernel opens the kernel, and the configurations beside it: which of them
// is the kernel's is for the daemon to find out.
func (o *opened) openKernel(path string) error {
	if err := o.setFile(api.OptKernel, "--kernel", path); err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("--kernel: %w", err)
	}
	found, err := filepath.Glob(filepath.Join(filepath.Dir(real), "config-*"))
	if err != nil {
		return fmt.Errorf("--kernel: %w", err)
	}
	// The one with the kernel's own ending first, should there be many.
	_, release, _ := strings.Cut(filepath.Base(real), "-")
	own := filepath.Join(filepath.Dir(real), "config-"+release)
	configs := api.Properties{}
	for _, name := range append([]string{own}, found...) {
		if _, ok := configs[filepath.Base(name)]; ok || len(configs) >= maxConfigs {
			continue
		}
		// A configuration that can't be read is one that can't be checked.
		if c, err := o.open(name); err == nil {
			configs[filepath.Base(name)] = dbus.MakeVariant(fdOf(c))
		}
	}
	if len(configs) > 0 {
		o.set(api.OptKernelConfigs, configs)
	}
	return nil
}

// stream makes a nameless file by write and sets the option to it.
func (o *opened) stream(key string, v view, write func(io.Writer, func(done, total int64)) error) error {
	// Not /tmp, which may be memory: a kernel's source has more than a GiB.
	f, err := os.CreateTemp("/var/tmp", "memlinux-*.tar")
	if err != nil {
		return fmt.Errorf("collect files: %w", err)
	}
	o.files = append(o.files, f)
	if err := os.Remove(f.Name()); err != nil {
		return fmt.Errorf("collect files: %w", err)
	}
	begun := time.Now()
	err = write(f, func(done, total int64) {
		// What takes no time needs no line.
		if took := time.Since(begun); took > time.Second/2 {
			v.update(api.Job{State: api.StateRunning, Phase: phaseCollect, Unit: api.UnitBytes, Bytes: uint64(done), Total: uint64(total), Rate: uint64(float64(done) / took.Seconds())})
		}
	})
	if err != nil {
		return err
	}
	o.set(key, fdOf(f))
	return nil
}

// setSource sets the option to a tar of source code, which is at path or made of
// the folder there.
func (o *opened) setSource(ctx context.Context, key, flag, path string, v view) error {
	if !isDir(path) {
		return o.setFile(key, flag, path)
	}
	return o.stream(key, v, func(w io.Writer, progress func(done, total int64)) error {
		if err := tarSource(ctx, w, path, progress); err != nil {
			return fmt.Errorf("%s %s: %w", flag, path, err)
		}
		return nil
	})
}

// tarSource writes a tar of the tree at dir without what a build or git has left
// in it. The same tree gives the same bytes.
func tarSource(ctx context.Context, w io.Writer, dir string, progress func(done, total int64)) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	t := tar.NewWriter(w)
	done := int64(0)
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if leftover(name, d) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		h := &tar.Header{Name: "source/" + name, Mode: int64(info.Mode().Perm()), Format: tar.FormatPAX}
		switch {
		case d.IsDir():
			h.Typeflag = tar.TypeDir
			h.Name += "/"
		case info.Mode()&fs.ModeSymlink != 0:
			h.Typeflag = tar.TypeSymlink
			if h.Linkname, err = root.Readlink(name); err != nil {
				return err
			}
		case info.Mode().IsRegular():
			h.Typeflag, h.Size = tar.TypeReg, info.Size()
		default:
			return nil
		}
		if err := t.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
			return err
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		n, err := io.Copy(t, io.LimitReader(f, h.Size))
		if err == nil && n < h.Size {
			err = fmt.Errorf("%s became shorter while it was read", name)
		}
		done += n
		progress(done, 0)
		return err
	})
	if err != nil {
		return err
	}
	return t.Close()
}

// leftover reports what git and a build in the tree itself leave, with which the
// kernel's own build refuses to work elsewhere.
func leftover(name string, d fs.DirEntry) bool {
	base := filepath.Base(name)
	if d.IsDir() {
		return base == ".git" || slices.Contains([]string{"include/config", "include/generated", "arch/x86/include/generated"}, name)
	}
	return name == ".config" || slices.Contains([]string{".o", ".ko", ".a", ".cmd", ".mod"}, filepath.Ext(base)) || base == ".git"
}

// collectRootfs sends a root tree.
func (o *opened) collectRootfs(ctx context.Context, g *global, from string, v view) error {
	if from == "" {
		return nil
	}
	var info collect.RootInfo
	err := o.stream(api.OptRootfs, v, func(w io.Writer, progress func(done, total int64)) error {
		var err error
		info, err = collect.Rootfs(ctx, w, from, progress)
		return err
	})
	if err != nil && ctx.Err() == nil {
		return &api.Error{Name: api.ErrInvalidRecipe, Message: "rootfs: " + err.Error()}
	}
	if err != nil {
		return err
	}
	g.notes = append(g.notes, info.Notes...)
	g.special(info.Special)
	if command := slices.Concat(info.Entrypoint, info.Cmd); len(command) > 0 {
		o.set(api.OptRootfsCommand, command)
		o.set(api.OptRootfsEnv, append([]string{}, info.Env...))
		o.set(api.OptRootfsDir, info.WorkingDir)
		o.set(api.OptRootfsUser, info.User)
	}
	return nil
}

// special notes the files that give who runs them more rights; the manifest has
// all of them.
func (g *global) special(files []collect.Special) {
	const most = 5
	for _, f := range files[:min(len(files), most)] {
		g.notes = append(g.notes, "/"+f.String())
	}
	if more := len(files) - most; more > 0 {
		g.notes = append(g.notes, fmt.Sprintf("so are %d more files; the manifest has their modes and capabilities", more))
	}
}

// collectPayload sends the recipe's own programs, files and overlays.
func (o *opened) collectPayload(ctx context.Context, g *global, name string, r recipe.Recipe, v view) error {
	if len(r.Programs)+len(r.Files)+len(r.Overlays) == 0 {
		return nil
	}
	line := func(key string, i int) string {
		return fmt.Sprintf("%s:%d", name, r.Line(fmt.Sprintf("%s[%d]", key, i)))
	}
	mode := func(m *recipe.Mode) *fs.FileMode {
		if m == nil {
			return nil
		}
		return (*fs.FileMode)(m)
	}
	var set collect.Set
	for i, p := range r.Programs {
		set.Programs = append(set.Programs, collect.Program{From: p.From, To: p.To, Mode: mode(p.Mode), Line: line("program", i)})
	}
	for i, f := range r.Files {
		set.Files = append(set.Files, collect.File{From: f.From, Text: f.Text, To: f.To, Mode: mode(f.Mode), UID: f.Owner.UID, GID: f.Owner.GID, Line: line("file", i)})
	}
	for i, l := range r.Overlays {
		set.Overlays = append(set.Overlays, collect.Overlay{From: l.From, To: l.To, Line: line("overlay", i)})
	}
	var summary collect.Summary
	err := o.stream(api.OptPayload, v, func(w io.Writer, progress func(done, total int64)) error {
		var err error
		summary, err = collect.Payload(ctx, w, set, progress)
		return err
	})
	var problems *collect.ProblemsError
	if errors.As(err, &problems) {
		return &api.Error{Name: api.ErrInvalidRecipe, Message: problems.Error()}
	}
	if err != nil {
		return err
	}
	g.notes = append(g.notes, summary.Notes...)
	g.special(summary.Special)
	return nil
}
