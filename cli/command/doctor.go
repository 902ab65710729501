package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

func newDoctor(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Say what works on this machine, what does not, and how to mend it",
		Long: `Looks at what memlinux needs of this machine: the bus, polkit, GRUB, QEMU with its
firmware and KVM, a kernel and room on the disks. What is not right comes with
what to do about it. Nothing is changed.

The exit code is 0 where a stick can be made and proven here, and 1 where not.`,
		Example: `  memlinux doctor
  memlinux doctor --json | jq 'select(.state != "ok")'`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			checks := g.examine(c.Context())
			if c.Context().Err() != nil {
				return c.Context().Err()
			}
			if g.json {
				if err := printObjects(checks); err != nil {
					return err
				}
			} else {
				printChecks(os.Stdout, checks, term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("TERM") != "dumb" && os.Getenv("NO_COLOR") == "")
			}
			return verdict(checks)
		},
	}
}

// examine looks at this side's part, and asks the daemon for its own.
func (g *global) examine(ctx context.Context) []api.Check {
	var checks []api.Check
	if !g.private {
		checks = client.CheckBus(ctx)
	}
	found, err := ask(ctx, g, (*client.Client).Doctor)
	if err != nil {
		c := api.Check{Name: "service", State: api.CheckFailed, Text: err.Error() + "; what it needs (GRUB, QEMU, a kernel, room) could not be looked at"}
		if strings.HasSuffix(api.ErrorName(err), ".UnknownMethod") {
			c.Text, c.Mend = "the memlinuxd that runs is another version's", "wait until it has ended, which it does when nothing is to be done"
		}
		found = []api.Check{c}
	}
	return append(checks, found...)
}

// verdict is an error where a stick can't be made and proven.
func verdict(checks []api.Check) error {
	var failed []string
	for _, c := range checks {
		if c.State == api.CheckFailed {
			failed = append(failed, c.Name)
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return &api.Error{Name: api.ErrFailed, Message: "no stick can be made and proven here until this is mended: " + strings.Join(failed, ", ")}
}

// printChecks prints a line for each check, and below it how to mend it; with
// colors on a terminal.
func printChecks(out io.Writer, checks []api.Check, colors bool) {
	// SGR: 32 green, 33 yellow, 31 red, 2 faint.
	marks := map[string][2]string{
		api.CheckOK: {"✓", "32"}, api.CheckWarning: {"!", "33"}, api.CheckFailed: {"✗", "31"}, api.CheckUnknown: {"?", "2"},
	}
	width := 0
	for _, c := range checks {
		width = max(width, len(c.Name))
	}
	for _, c := range checks {
		state := fmt.Sprintf("%-7s", c.State)
		if colors {
			m := marks[c.State]
			state = "\x1b[" + m[1] + "m" + m[0] + "\x1b[0m"
		}
		fmt.Fprintf(out, "%s  %-*s  %s\n", state, width, c.Name, c.Text)
		if c.Mend == "" {
			continue
		}
		indent := strings.Repeat(" ", 7+2+width+2)
		if colors {
			indent = strings.Repeat(" ", 1+2+width+2)
		}
		fmt.Fprintf(out, "%s→ %s\n", indent, c.Mend)
	}
}
