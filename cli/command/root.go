package command

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/godbus/dbus/v5"
	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

// Version is set by the build.
var Version = "devel"

// global is what every command takes.
type global struct {
	private bool
	json    bool
	notes   []string      // sentences about what this side collected, for the report
	answers *bufio.Reader // the terminal's lines
	image   api.Source    // what this side knows of somebody else's image
}

// Main runs memlinux and returns its exit code.
func Main() int { return run(newRoot()) }

// MainWrite runs memlinux-write, the same as memlinux write.
func MainWrite() int { return run(newWriteRoot()) }

func newWriteRoot() *cobra.Command {
	g := &global{}
	c := newWrite(g)
	c.Use = "memlinux-write [flags] [DEVICE...|FILE]"
	c.Example = writeExamples("memlinux-write")
	c.Version = Version
	prepare(c, g)
	return c
}

func newRoot() *cobra.Command {
	g := &global{}
	root := &cobra.Command{
		Use:   "memlinux",
		Short: "Make a Linux that runs in memory, put it on a stick and prove that it boots",
		Long: `memlinux makes a Linux that runs completely in memory, writes it on a USB stick,
into a file or beside the system of this PC, reads it back and proves in a
virtual machine that it boots.`,
		Example: `  sudo memlinux write /dev/sdb        a bootable stick
  sudo memlinux write stick.img       a bootable disk image
  sudo memlinux build -o out          kernel, initramfs and menu.lst for your own use
  sudo memlinux vm stick.img          try it; Ctrl-A X leaves
  sudo memlinux install --next        an entry in this PC's boot menu, for the next boot`,
		Version: Version,
		Args:    args(cobra.NoArgs),
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	prepare(root, g)
	root.AddCommand(newWrite(g), newBuild(g), newExplain(g), newDiff(g), newVerify(g), newVM(g), newInstall(g), newEntries(g), newRemove(g), newNext(g), newRollback(g), newDevices(g), newJobs(g), newCancel(g), newDoctor(g), newRecipe(g), newVersion(g))
	checkOthers(root)
	return root
}

// checkOthers has the commands that cobra brings complain about arguments as ours
// do.
func checkOthers(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			show := c.Run
			c.RunE = func(c *cobra.Command, a []string) error {
				if _, rest, err := root.Find(a); err != nil || len(rest) > 0 {
					return usagef("there is no command %q", strings.Join(a, " "))
				}
				show(c, a)
				return nil
			}
		case "completion":
			c.Args = args(cobra.NoArgs)
			c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
			for _, shell := range c.Commands() {
				shell.Args = args(cobra.NoArgs)
			}
		}
	}
}

func prepare(c *cobra.Command, g *global) {
	c.SilenceErrors, c.SilenceUsage = true, true
	c.PersistentFlags().BoolVar(&g.private, "private", false, "start a memlinuxd on a bus of its own for this command (done by itself where the caller is root and no service runs)")
	c.PersistentFlags().BoolVar(&g.json, "json", false, "print JSON, an object a line: a job's progress and report, or what is listed; memlinux(1) names the fields")
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	c.SetVersionTemplate("{{.Version}}\n")
}

// run executes the command. A signal cancels its context: the command then
// cancels its job and waits for its end.
func run(c *cobra.Command) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	executed, err := c.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	if errors.Is(err, context.Canceled) {
		err = &api.Error{Name: api.ErrCancelled, Message: "cancelled, and nothing was done"} // before there was a job
	}
	fmt.Fprintf(os.Stderr, "memlinux: %v\n", err)
	var usage usageError
	if errors.As(err, &usage) {
		fmt.Fprintf(os.Stderr, "Try '%s --help'.\n", executed.CommandPath())
	}
	return exitCode(err)
}

// args makes cobra's complaints about arguments usage errors.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, a []string) error {
		if err := check(c, a); err != nil {
			return usageError{err}
		}
		return nil
	}
}

// atMostOne wants one of what, or none.
func atMostOne(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, a []string) error {
		if len(a) > 1 {
			return usagef("give one %s, not %d", what, len(a))
		}
		return nil
	}
}

// oneTarget wants one DEVICE or FILE.
func oneTarget(_ *cobra.Command, a []string) error {
	if len(a) != 1 {
		return usagef("give one DEVICE or FILE, not %d", len(a))
	}
	return nil
}

// job starts a job by start, follows it to its end and reports it. finish is
// called with the ended job before its report is printed, to keep or drop what
// the job made; it returns what was kept.
func (g *global) job(ctx context.Context, start func(context.Context, *client.Client) (dbus.ObjectPath, error), finish func(api.Job) (string, error)) error {
	job, output, err := g.follow(ctx, os.Stdout, start, finish)
	if job.Report != nil {
		job.Report.Warnings = append(job.Report.Warnings, g.notes...)
	}
	g.nameSource(job.Report)
	if g.json {
		return errors.Join(err, printJSONReport(os.Stdout, job, output, err))
	}
	if job.Report != nil && job.State != api.StateCancelled {
		printReport(os.Stdout, job.Report, output)
	}
	return err
}

// follow starts a job and follows it to its end, with its progress on out.
func (g *global) follow(ctx context.Context, out *os.File, start func(context.Context, *client.Client) (dbus.ObjectPath, error), finish func(api.Job) (string, error)) (job api.Job, output string, err error) {
	c, err := client.Connect(ctx, g.private)
	if err != nil {
		return job, "", err
	}
	defer c.Close()
	path, err := start(ctx, c)
	if err != nil {
		return job, "", err
	}
	v := newView(out, g.json)
	job, err = c.Follow(ctx, path, v.update)
	v.end(err == nil && (job.State == api.StateSucceeded || job.Error == api.ErrVerification))
	if err == nil && job.State != api.StateSucceeded {
		err = &api.Error{Name: job.Error, Message: job.Message}
	}
	if finish != nil {
		var keepErr error
		output, keepErr = finish(job)
		err = errors.Join(err, keepErr)
	}
	return job, output, err
}
