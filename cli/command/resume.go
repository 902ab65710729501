package command

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

// resumeTargets are the disks whose interrupted writes are to be gone on with:
// those that are named, else all of which that is sure.
func (g *global) resumeTargets(ctx context.Context, c *cobra.Command, named []string) ([]string, error) {
	allowed := []string{"resume", "yes", "no-boot-test", "json", "private"}
	var others []string
	c.Flags().Visit(func(f *pflag.Flag) {
		if !slices.Contains(allowed, f.Name) {
			others = append(others, "--"+f.Name)
		}
	})
	if len(others) > 0 {
		return nil, usagef("--resume goes on with what was being written; leave out %s", strings.Join(others, " and "))
	}
	for _, path := range named {
		t, err := resolveTarget(path)
		if err != nil {
			return nil, err
		}
		if t.device == "" {
			return nil, usagef("--resume is for a device; %s is a file", path)
		}
	}
	if len(named) > 0 {
		return named, nil
	}
	return ask(ctx, g, func(c *client.Client, ctx context.Context) ([]string, error) {
		all, err := c.Devices(ctx)
		if err != nil {
			return nil, err
		}
		var sure, doubtful []string
		for _, d := range all {
			if d.Interrupted == "" {
				continue
			}
			plan, err := c.Plan(ctx, d.Name)
			if err != nil {
				return nil, err
			}
			if plan.Agreed {
				sure = append(sure, "/dev/"+d.Name)
			} else {
				doubtful = append(doubtful, "/dev/"+d.Name)
			}
		}
		switch {
		case len(sure) > 0:
			return sure, nil
		case len(doubtful) > 0:
			return nil, refusal("a disk without a serial can't be known again for sure; if %s is the one that was being written, name it: memlinux write --resume %s", strings.Join(doubtful, " or "), doubtful[0])
		}
		return nil, refusal("no interrupted write waits for a disk that is plugged in; plug in the disk that was being written, or begin anew with memlinux write DEVICE")
	})
}

// open opens what is to be written, which with --resume the daemon has.
func (w *writeFlags) open(ctx context.Context, g *global, out *os.File) (*opened, error) {
	if !w.resume {
		return w.systemFlags.open(ctx, g, out)
	}
	o := &opened{options: api.Properties{}}
	o.set(api.OptResume, true)
	return o, nil
}

// consent has a person agree to the write, unless it goes on with one that was
// agreed to and nothing has changed since.
func (g *global) consent(ctx context.Context, c *client.Client, w *writeFlags, name string, plan api.Plan, o *opened) error {
	if w.resume {
		switch {
		case plan.Interrupted == "":
			return refusal("nothing is to be resumed on /dev/%[1]s: no interrupted write to this disk is known; memlinux write /dev/%[1]s begins one", name)
		case plan.Agreed && len(plan.Refused) == 0:
			return nil
		case !w.yes && !g.json && term.IsTerminal(int(os.Stdin.Fd())):
			fmt.Printf("/dev/%s may be another disk than the one that was being written, or something has come on it since.\n", name)
		}
	}
	return g.agree(ctx, c, w.yes, name, plan, o)
}
