package command

import (
	"context"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

type installFlags struct {
	systemFlags
	name                               string
	next, standard, dryRun, noBootTest bool
}

func newInstall(g *global) *cobra.Command {
	var w installFlags
	c := &cobra.Command{
		Use:   "install [flags]",
		Short: "Add the in-memory system to this PC's boot menu, and prove that it boots",
		Long: `Makes the in-memory system, copies its kernel and initramfs beside this PC's
boot loader, and adds an entry to its menu: GRUB 2, GRUB Legacy or systemd-boot,
whichever boots this PC. Then it boots this PC's own disk in a virtual machine,
through its own boot loader into the new entry, without a change to the disk.
Where that fails, all is as it was before.

The entry is only chosen by hand in the menu, unless --next or --default says
otherwise. An entry of memlinux with the same name is replaced by the new one;
memlinux rollback brings it back.`,
		Example: `  sudo memlinux install --dry-run           says what would change, file by file
  sudo memlinux install                     a new entry in the menu
  sudo memlinux install --next              which the next boot takes, once
  sudo memlinux install --name Rescue --recipe rescue.toml`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return g.install(c.Context(), &w) },
	}
	w.flags(c)
	f := c.Flags()
	f.StringVar(&w.name, "name", "", "the entry's title in the menu (default: memlinux)")
	f.BoolVar(&w.next, "next", false, "boot the entry at the next start, and only then")
	f.BoolVar(&w.standard, "default", false, "boot the entry by itself from now on")
	f.BoolVar(&w.dryRun, "dry-run", false, "say what would change, and change nothing")
	f.BoolVar(&w.noBootTest, "no-boot-test", false, "do not try the entry in a virtual machine")
	return c
}

func (g *global) install(ctx context.Context, w *installFlags) error {
	o, err := w.open(ctx, g, os.Stdout)
	if err != nil {
		return err
	}
	defer o.close()
	if w.set.Changed("name") {
		o.set(api.OptName, w.name)
	}
	o.set(api.OptNext, w.next)
	o.set(api.OptDefault, w.standard)
	o.set(api.OptDryRun, w.dryRun)
	o.set(api.OptBootTest, !w.noBootTest)
	return g.job(ctx, func(ctx context.Context, c *client.Client) (dbus.ObjectPath, error) {
		return c.Start(ctx, "InstallEntry", o.options)
	}, nil)
}

func newEntries(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "entries",
		Short: "List the entries of this PC's boot menu",
		Example: `  sudo memlinux entries
  sudo memlinux entries --json | jq -r 'select(.ours).id'`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			menu, err := ask(c.Context(), g, (*client.Client).BootMenu)
			if err != nil {
				return err
			}
			if g.json {
				return printObjects(menu.Entries)
			}
			fmt.Printf("%s, %s; memlinux keeps its files in %s\n", menu.Loader, strings.ToUpper(menu.Firmware), menu.Directory)
			t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "ID\tBOOTS\tTITLE")
			for _, e := range menu.Entries {
				var boots []string
				if e.Default {
					boots = append(boots, "by itself")
				}
				if e.Next {
					boots = append(boots, "next, once")
				}
				fmt.Fprintf(t, "%s\t%s\t%s\n", dash(e.ID), dash(strings.Join(boots, "; ")), e.Title)
			}
			if err := t.Flush(); err != nil {
				return err
			}
			for _, warning := range menu.Warnings {
				fmt.Fprintf(os.Stderr, "memlinux: %s\n", warning)
			}
			return nil
		},
	}
}

// menuJob is a command that changes the boot menu in a moment.
func (g *global) menuJob(ctx context.Context, method string, arguments ...any) error {
	return g.job(ctx, func(ctx context.Context, c *client.Client) (dbus.ObjectPath, error) {
		return c.Start(ctx, method, append(arguments, api.Properties{})...)
	}, nil)
}

func newRemove(g *global) *cobra.Command {
	return &cobra.Command{
		Use:     "remove ID",
		Short:   "Take an entry of memlinux out of this PC's boot menu",
		Example: `  sudo memlinux remove 403533b4e99c633c`,
		Args:    oneEntry,
		RunE:    func(c *cobra.Command, a []string) error { return g.menuJob(c.Context(), "RemoveEntry", a[0]) },
	}
}

func newNext(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "next ID|none",
		Short: "Say which entry of memlinux the next boot takes, once",
		Example: `  sudo memlinux next 403533b4e99c633c
  sudo memlinux next none`,
		Args: oneEntry,
		RunE: func(c *cobra.Command, a []string) error {
			id := a[0]
			if id == "none" {
				id = ""
			}
			return g.menuJob(c.Context(), "SetNextBoot", id)
		},
	}
}

func newRollback(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "rollback",
		Short: "Take the last install back: what it replaced stands in the menu again",
		Long: `Takes the last install back: what it replaced stands in the menu again. That goes
until an entry is removed, after which there is nothing to take back.`,
		Example: `  sudo memlinux rollback`,
		Args:    args(cobra.NoArgs),
		RunE:    func(c *cobra.Command, _ []string) error { return g.menuJob(c.Context(), "Rollback") },
	}
}

// oneEntry wants the ID of one entry.
func oneEntry(c *cobra.Command, a []string) error {
	if len(a) != 1 || a[0] == "" {
		return usagef("give the ID of one entry; %s entries lists them", c.Root().Name())
	}
	return nil
}

// rowsOfEntry prints what a job did to the boot menu.
func rowsOfEntry(kind string, e *api.Entry, row func(key, format string, args ...any)) {
	how := "chosen by hand in the menu"
	switch {
	case kind == api.KindRemove:
		how = "removed"
	case kind == api.KindRollback:
		how = "taken back"
	case e.Next && e.Default:
		how = "boots next, and by itself"
	case e.Next:
		how = "boots next, once"
	case e.Default:
		how = "boots by itself"
	}
	if e.ID != "" {
		row("entry", "%s %q in %s: %s", e.ID, e.Title, e.Loader, how)
	} else {
		row("boot menu", "%s: no entry of memlinux boots next", e.Loader)
	}
	done := map[string]string{api.ActionCreate: "new", api.ActionReplace: "replaced", api.ActionWrite: "written in place", api.ActionRemove: "removed"}
	would := ""
	if e.DryRun {
		would = "would be "
	}
	for _, f := range e.Changes {
		if f.Action == api.ActionRemove {
			row("", "%s: %s%s", f.Path, would, done[f.Action])
		} else {
			row("", "%s: %s%s, %s", f.Path, would, done[f.Action], size(f.Size))
		}
	}
	if len(e.Changes) == 0 {
		row("", "it was so already: nothing was changed")
	}
}
