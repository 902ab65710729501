package command

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

func newDevices(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "devices",
		Short: "List the disks, what is on them, and why one is refused",
		Example: `  sudo memlinux devices
  sudo memlinux devices --json | jq 'select(.refused == null).path'`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := ask(c.Context(), g, (*client.Client).Devices)
			if err != nil {
				return err
			}
			if g.json {
				return printObjects(list)
			}
			t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "DEVICE\tSIZE\tSECTOR\tBUS\tMODEL\tHOLDS\tCAN BE WRITTEN")
			for _, d := range list {
				var holds, refused []string
				for _, c := range d.Contents {
					if c.Type == "" {
						continue
					}
					holds = append(holds, strings.Join(nonEmpty(c.Name+":", c.Type, c.Label), " "))
				}
				for _, r := range d.Refused {
					refused = append(refused, r.Text)
				}
				state := "yes"
				if len(refused) > 0 {
					state = "no: " + strings.Join(refused, "; ")
				}
				if d.Interrupted != "" {
					state += "; memlinux write --resume goes on with an interrupted write"
				}
				fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\t%s\n", d.Path, size(d.Size), d.SectorSize, dash(d.Transport),
					dash(strings.TrimSpace(d.Vendor+" "+d.Model)), dash(strings.Join(holds, ", ")), state)
			}
			return t.Flush()
		},
	}
}

func newJobs(g *global) *cobra.Command {
	return &cobra.Command{
		Use:     "jobs",
		Short:   "List the jobs that run or ended a short while ago",
		Example: `  sudo memlinux jobs`,
		Args:    args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := ask(c.Context(), g, (*client.Client).Jobs)
			if err != nil {
				return err
			}
			if g.json {
				return printObjects(list)
			}
			t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "JOB\tKIND\tUSER\tSTATE\tPHASE\tPROGRESS\tMESSAGE")
			for _, j := range list {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%.0f%%\t%s\n", j.ID, j.Kind, userName(j.Owner), j.State, dash(j.Phase), 100*j.Progress, dash(firstLine(j.Message)))
			}
			return t.Flush()
		},
	}
}

// firstLine is what a message says before it quotes a log, in one cell of a table.
func firstLine(message string) string {
	line, _, more := strings.Cut(message, "\n")
	if more {
		line += " …"
	}
	return strings.ReplaceAll(line, "\t", " ")
}

// userName is the user's name, or the number where it has none.
func userName(uid uint32) string {
	number := strconv.FormatUint(uint64(uid), 10)
	u, err := user.LookupId(number)
	if err != nil {
		return number
	}
	return u.Username
}

func newCancel(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel JOB",
		Short: "Cancel a job, and wait until nothing of it runs any more",
		Long: `Cancels a job that runs, as Ctrl-C does in the command that started it: a job goes
on when that command's terminal is gone. memlinux jobs lists them. A stick that was
being written does not boot then; memlinux write --resume goes on with it.`,
		Example: `  memlinux cancel 20261129_223204_c6deda`,
		Args: func(_ *cobra.Command, a []string) error {
			if len(a) != 1 {
				return usagef("give one JOB; memlinux jobs lists them")
			}
			return nil
		},
		RunE: func(c *cobra.Command, a []string) error {
			job, err := ask(c.Context(), g, func(conn *client.Client, ctx context.Context) (api.Job, error) { return conn.CancelJob(ctx, a[0]) })
			switch {
			case err != nil:
				return err
			case job.State != api.StateCancelled:
				return &api.Error{Name: api.ErrFailed, Message: fmt.Sprintf("%s %s can't be cancelled: it has ended before, and %s", job.Kind, job.ID, job.State)}
			case g.json:
				return printObjects([]api.Job{job})
			}
			_, err = fmt.Printf("%s %s: %s\n", job.Kind, job.ID, job.Message)
			return err
		},
	}
}

// ask asks the daemon one question.
func ask[T any](ctx context.Context, g *global, question func(*client.Client, context.Context) (T, error)) (T, error) {
	conn, err := client.Connect(ctx, g.private)
	if err != nil {
		var none T
		return none, err
	}
	defer conn.Close()
	return question(conn, ctx)
}

func newVersion(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if g.json {
				return json.NewEncoder(os.Stdout).Encode(map[string]string{"version": Version})
			}
			_, err := fmt.Println("memlinux", Version)
			return err
		},
	}
}

// printObjects prints each element as an object on a line.
func printObjects[T any](list []T) error {
	out := json.NewEncoder(os.Stdout)
	for _, e := range list {
		if err := out.Encode(e); err != nil {
			return err
		}
	}
	return nil
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
