package command

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/godbus/dbus/v5"
	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

func newBuild(g *global) *cobra.Command {
	var s systemFlags
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
			return g.build(c.Context(), &s, dir)
		},
	}
	s.flags(c)
	c.Flags().StringVarP(&dir, "output", "o", "", "the folder that gets the files")
	return c
}

func (g *global) build(ctx context.Context, s *systemFlags, dir string) error {
	o, err := s.open(ctx, g, os.Stdout)
	if err != nil {
		return err
	}
	defer o.close()
	if err := os.MkdirAll(dir, 0o777); err != nil { //nolint:gosec // the umask decides
		return unusable(dir, err)
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
		return c.Start(ctx, "Build", o.options)
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
