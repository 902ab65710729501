package command

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/godbus/dbus/v5"
	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

// recipe is the flags that say what system to make.
type recipe struct {
	kernel, busybox, compression, append string
	modules                              []string
}

func (r *recipe) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&r.kernel, "kernel", "", "auto, a bzImage FILE, or debian:PACKAGE (default: auto, or as memlinuxd is configured)")
	f.StringSliceVar(&r.modules, "modules", nil, "kernel modules: none, all, sets (input, usb-storage, disk, filesystems, network) or names (default: all sets but network)")
	f.StringVar(&r.busybox, "busybox", "", "a static busybox FILE (default: this machine's, else Debian's)")
	f.StringVar(&r.compression, "compression", "auto", "of the initramfs: auto, zstd, gzip or none")
	f.StringVar(&r.append, "append", "", "more kernel command line")
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
		return nil, err
	}
	o.files = append(o.files, f)
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return f, nil
}

func (o *opened) set(key string, value any) { o.options[key] = dbus.MakeVariant(value) }

func fdOf(f *os.File) dbus.UnixFD { return dbus.UnixFD(f.Fd()) }

// open opens the recipe's files with this user's rights.
func (r *recipe) open() (*opened, error) {
	o := &opened{options: api.Properties{}}
	if err := r.fill(o); err != nil {
		o.close()
		return nil, err
	}
	return o, nil
}

func (r *recipe) fill(o *opened) error {
	o.set(api.OptCompression, r.compression)
	if r.append != "" {
		o.set(api.OptAppend, r.append)
	}
	if len(r.modules) > 0 {
		o.set(api.OptModules, r.modules)
	}
	switch {
	case r.kernel == "":
	case r.kernel == "auto" || strings.HasPrefix(r.kernel, "debian:"):
		o.set(api.OptKernel, r.kernel)
	default:
		if err := o.openKernel(r.kernel); err != nil {
			return err
		}
	}
	if r.busybox != "" {
		f, err := o.open(r.busybox)
		if err != nil {
			return fmt.Errorf("--busybox: %w", err)
		}
		o.set(api.OptBusybox, fdOf(f))
	}
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		t, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return usagef("SOURCE_DATE_EPOCH is %q; it must be seconds since 1970", s)
		}
		o.set(api.OptSourceDateEpoch, t)
	}
	return nil
}

// maxConfigs bounds how many configurations beside a kernel are offered: a
// message on the bus carries only a few descriptors.
const maxConfigs = 12

// openKernel opens the kernel, and the configurations beside it: which of them
// is the kernel's is for the daemon to find out.
func (o *opened) openKernel(path string) error {
	f, err := o.open(path)
	if err != nil {
		return fmt.Errorf("--kernel: %w", err)
	}
	o.set(api.OptKernel, fdOf(f))
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

func newBuild(g *global) *cobra.Command {
	var r recipe
	var dir string
	c := &cobra.Command{
		Use:   "build [flags] -o DIR",
		Short: "Make a kernel, an initramfs and a menu.lst",
		Long: `Makes the in-memory system and lays vmlinuz, initramfs.img, menu.lst and
manifest.json into a folder. The same inputs give the same bytes.`,
		Example: `  sudo memlinux build -o out
  sudo memlinux build --kernel debian:linux-image-amd64 --compression gzip -o out
  sudo memlinux build --kernel /boot/vmlinuz-6.1.0-18-amd64 --append "quiet" -o out`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if dir == "" {
				return usagef("say where to with -o DIR")
			}
			return g.build(c.Context(), &r, dir)
		},
	}
	r.flags(c)
	c.Flags().StringVarP(&dir, "output", "o", "", "the folder that gets the files")
	return c
}

func (g *global) build(ctx context.Context, r *recipe, dir string) error {
	o, err := r.open()
	if err != nil {
		return err
	}
	defer o.close()
	if err := os.MkdirAll(dir, 0o777); err != nil { //nolint:gosec // the umask decides
		return err
	}
	files := map[string]*renameio.PendingFile{}
	defer func() {
		for _, f := range files {
			_ = f.Cleanup() // nothing is left to do where it was kept
		}
	}()
	fds := api.Properties{}
	for _, name := range api.BuildFiles() {
		f, err := renameio.NewPendingFile(filepath.Join(dir, name), renameio.WithPermissions(0o644), renameio.WithExistingPermissions())
		if err != nil {
			return err
		}
		files[name] = f
		fds[name] = dbus.MakeVariant(fdOf(f.File))
	}
	o.set(api.OptFiles, fds)
	return g.job(ctx, func(ctx context.Context, c *client.Client) (dbus.ObjectPath, error) {
		return c.Start(context.WithoutCancel(ctx), "Build", o.options)
	}, func(job api.Job) (string, error) {
		if job.State != api.StateSucceeded {
			return "", nil
		}
		for _, name := range api.BuildFiles() {
			if err := files[name].CloseAtomicallyReplace(); err != nil {
				return "", fmt.Errorf("%s: %w", name, err)
			}
		}
		return dir, nil
	})
}
