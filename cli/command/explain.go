package command

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

func newExplain(g *global) *cobra.Command {
	var s systemFlags
	var from string
	c := &cobra.Command{
		Use:   "explain [flags] [PATH]",
		Short: "Say why each file, module and firmware is in the system, and what it takes",
		Long: `Lists what the system is made of: why each file is there, and what it takes
unpacked and in the compressed image. The shares add up to the sizes of kernel
and initramfs. PATH is a file or folder in the system. The system is the one that
the flags describe, which is built where the cache has it not, or the one of a
manifest.`,
		Example: `  sudo memlinux explain                        the standard system
  sudo memlinux explain --recipe memlinux.toml /lib/modules
  memlinux explain --manifest out /usr/bin/curl`,
		Args: atMostOne("PATH"),
		RunE: func(c *cobra.Command, a []string) error {
			path := "/"
			if len(a) == 1 {
				path = a[0]
			}
			var m api.Manifest
			var err error
			if from != "" {
				if flags := s.given(); len(flags) > 0 {
					return usagef("--%s and --manifest don't go together: a manifest is of a system that is built", flags[0])
				}
				m, err = readManifest(from)
			} else {
				m, err = g.buildManifest(c.Context(), &s)
			}
			if err != nil {
				return err
			}
			account, err := m.Explain(path)
			if err != nil {
				return unusableError{err}
			}
			if g.json {
				return json.NewEncoder(os.Stdout).Encode(account)
			}
			return printAccount(os.Stdout, account)
		},
	}
	s.flags(c)
	c.Flags().StringVar(&from, "manifest", "", "the manifest.json, or the folder of build -o, to explain instead")
	return c
}

// printAccount prints the dearest first.
func printAccount(w io.Writer, a api.Account) error {
	slices.SortStableFunc(a.Items, func(x, y api.Item) int { return cmp.Compare(y.Compressed, x.Compressed) })
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "COMPRESSED\tUNPACKED\tWHAT\tWHY")
	for _, i := range a.Items {
		what := i.What
		if i.Path != "" {
			what = "/" + i.Path
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", humanize.Comma(i.Compressed), humanize.Comma(i.Raw), what, i.Why)
	}
	sum := fmt.Sprintf("sum of %s", plural(len(a.Items), "item"))
	if a.Size > 0 {
		sum += fmt.Sprintf("; kernel and initramfs have %s bytes", humanize.Comma(a.Size))
	}
	fmt.Fprintf(t, "%s\t%s\t%s\n", humanize.Comma(a.Sum.Compressed), humanize.Comma(a.Sum.Raw), sum)
	return t.Flush()
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// readManifest reads a manifest.json, or the one in a folder.
func readManifest(path string) (api.Manifest, error) {
	if isDir(path) {
		path = filepath.Join(path, api.FileManifest)
	}
	f, err := os.Open(path)
	if err != nil {
		return api.Manifest{}, unusable(path, err)
	}
	defer f.Close()
	m, err := api.ParseManifest(f)
	if err != nil {
		return api.Manifest{}, unusableError{fmt.Errorf("%s: %w", path, err)}
	}
	return m, nil
}

// buildManifest builds the system and keeps nothing of it but its manifest.
func (g *global) buildManifest(ctx context.Context, s *systemFlags) (api.Manifest, error) {
	o, err := s.open(ctx, g, os.Stderr)
	if err != nil {
		return api.Manifest{}, err
	}
	defer o.close()
	fd, err := unix.MemfdCreate(api.FileManifest, unix.MFD_CLOEXEC)
	if err != nil {
		return api.Manifest{}, fmt.Errorf("make room for the manifest: %w", err)
	}
	f := os.NewFile(uintptr(fd), api.FileManifest)
	defer f.Close()
	o.set(api.OptFiles, api.Properties{api.FileManifest: dbus.MakeVariant(fdOf(f))})
	// The account goes to stdout, so what happens meanwhile goes to stderr.
	if _, _, err := g.follow(ctx, os.Stderr, func(ctx context.Context, c *client.Client) (dbus.ObjectPath, error) {
		return c.Start(ctx, "Build", o.options)
	}, nil); err != nil {
		return api.Manifest{}, err
	}
	return api.ParseManifest(io.NewSectionReader(f, 0, 1<<62))
}

func newDiff(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "diff A B",
		Short: "Tell in what two systems differ",
		Long: `Compares two manifests: kernel, command line, modules, microcode, busybox and each
file. A and B are a manifest.json each, or a folder of build -o.`,
		Example: `  memlinux diff out-monday out-today
  memlinux diff --json old/manifest.json /media/stick/boot/manifest.json`,
		Args: func(_ *cobra.Command, a []string) error {
			if len(a) != 2 {
				return usagef("give two manifests, A and B, not %d", len(a))
			}
			return nil
		},
		RunE: func(_ *cobra.Command, a []string) error {
			before, err := readManifest(a[0])
			if err != nil {
				return err
			}
			after, err := readManifest(a[1])
			if err != nil {
				return err
			}
			changes := api.DiffManifests(before, after)
			if g.json {
				return printObjects(changes)
			}
			if len(changes) == 0 {
				_, err := fmt.Println("the same system, build", before.ID)
				return err
			}
			t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
			for _, c := range changes {
				what := c.What
				if c.Path != "" {
					what = "/" + c.Path
				}
				bytes := ""
				if c.Bytes != 0 {
					bytes = fmt.Sprintf("%+d", c.Bytes)
				}
				switch {
				case c.Before == "":
					fmt.Fprintf(t, "+\t%s\t%s\t%s\n", what, bytes, c.After)
				case c.After == "":
					fmt.Fprintf(t, "-\t%s\t%s\t%s\n", what, bytes, c.Before)
				default:
					fmt.Fprintf(t, "~\t%s\t%s\t%s → %s\n", what, bytes, c.Before, c.After)
				}
			}
			return t.Flush()
		},
	}
}
