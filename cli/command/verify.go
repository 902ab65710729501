package command

import (
	"context"
	"os"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

func newVerify(g *global) *cobra.Command {
	var noBootTest bool
	c := &cobra.Command{
		Use:   "verify [flags] DEVICE|FILE",
		Short: "Check a stick or disk image, and prove that it boots",
		Long: `Reads the partition table, the filesystem and every file of a stick or disk
image that memlinux wrote, compares them with its manifest, and boots it under
BIOS and UEFI firmware. Nothing is written to it.`,
		Example: `  sudo memlinux verify /dev/sdb
  sudo memlinux verify --no-boot-test stick.img`,
		Args: oneTarget,
		RunE: func(c *cobra.Command, a []string) error {
			o := &opened{options: api.Properties{}}
			defer o.close()
			o.set(api.OptBootTest, !noBootTest)
			method, subject, err := readTarget(o, a[0], "Verify", "VerifyFile")
			if err != nil {
				return err
			}
			return g.job(c.Context(), func(ctx context.Context, c *client.Client) (dbus.ObjectPath, error) {
				return c.Start(ctx, method, subject, o.options)
			}, func(api.Job) (string, error) { return a[0], nil })
		},
	}
	c.Flags().BoolVar(&noBootTest, "no-boot-test", false, "do not boot it in a virtual machine")
	return c
}

// readTarget is what a method needs to read a target that must exist: a
// device's object, or an open file.
func readTarget(o *opened, path, onDevice, onFile string) (method string, subject any, err error) {
	if _, err := os.Stat(path); err != nil {
		return "", nil, unusable(path, err)
	}
	t, err := resolveTarget(path)
	if err != nil {
		return "", nil, err
	}
	if t.device != "" {
		return onDevice, api.DevicePath(t.device), nil
	}
	f, err := o.open(t.file)
	if err != nil {
		return "", nil, err
	}
	return onFile, fdOf(f), nil
}
