package command

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/godbus/dbus/v5"
	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

type writeFlags struct {
	systemFlags
	imageFlags
	yes, force, noBootTest, checkCapacity, resume bool
	size                                          string
}

func writeExamples(name string) string {
	return fmt.Sprintf(`  sudo %[1]s /dev/sdb                               asks before it erases the stick
  sudo %[1]s --yes stick.img                        a disk image
  sudo %[1]s --yes --size 1GiB stick.img            a larger one
  sudo %[1]s /dev/sdb /dev/sdc                      several at once
  sudo %[1]s --check-capacity /dev/sdb              whether it holds what it says
  sudo %[1]s --image debian.iso.xz /dev/sdb         somebody else's image, checked against SHA256SUMS
  curl URL | sudo %[1]s --yes --sha256 SUM --image - /dev/sdb
  sudo %[1]s --resume                               goes on with an interrupted write
  sudo %[1]s --kernel debian:linux-image-amd64 /dev/sdb`, name)
}

func newWrite(g *global) *cobra.Command {
	var w writeFlags
	c := &cobra.Command{
		Use:   "write [flags] [DEVICE...|FILE]",
		Short: "Write a bootable stick or disk image, and prove that it boots",
		Long: `Makes the in-memory system, writes it on a whole disk or into a new file, reads
back what was written, and boots the result in a virtual machine under BIOS and
UEFI firmware. All that the disk holds is lost. The disk of the running system,
and whatever is in use, is refused; what a desktop has mounted is unmounted if you
say so. A disk that is built in, or larger than a stick ever is, is written only
if you type its serial. Without an argument you choose from the disks that can
be taken out. Several disks are written at once, each with a report of its own.

With --image, somebody else's disk image or ISO is written instead, decompressed as
it comes, with the same care. It must have the sum that --sha256 gives, or that
FILE.sha256 or SHA256SUMS beside it names, if there is one. The boot test then sees how far it comes:
to its boot loader, its kernel or a login.

A write that was interrupted (unplugged, cancelled, a power cut) leaves a disk that
does not boot. --resume goes on with it, without asking again: it finds the disk by
its serial, whatever its name is now, and writes only what is not there yet.`,
		Example: writeExamples("memlinux write"),
		RunE: func(c *cobra.Command, a []string) error {
			if w.resume {
				var err error
				if a, err = g.resumeTargets(c.Context(), c, a); err != nil {
					return err
				}
			}
			if len(a) == 0 {
				name, err := g.pick(c.Context())
				if err != nil {
					return err
				}
				a = []string{"/dev/" + name}
			}
			if len(a) > 1 {
				return g.writeSeveral(c.Context(), &w, a)
			}
			return g.write(c.Context(), &w, a[0])
		},
	}
	w.systemFlags.flags(c)
	w.imageFlags.flags(c)
	f := c.Flags()
	f.BoolVarP(&w.yes, "yes", "y", false, "do not ask before a disk is erased")
	f.BoolVar(&w.force, "force", false, "replace a FILE that exists")
	f.BoolVar(&w.noBootTest, "no-boot-test", false, "do not boot the result in a virtual machine")
	f.BoolVar(&w.checkCapacity, "check-capacity", false, "only find out, in seconds, whether a DEVICE holds what it says; its content stays")
	f.BoolVar(&w.resume, "resume", false, "go on with an interrupted write, to the DEVICE or to all that wait for it")
	f.StringVar(&w.size, "size", "", "of a FILE, such as 512MiB (default: the least that fits)")
	return c
}

func (g *global) write(ctx context.Context, w *writeFlags, target string) error {
	t, err := resolveTarget(target)
	if err != nil {
		return err
	}
	if err := w.checkImage(1, t.file); err != nil {
		return err
	}
	if t.device != "" && (w.force || w.size != "") {
		return usagef("--force and --size are for a file; %s is a device", target)
	}
	if w.checkCapacity {
		if t.device == "" {
			return usagef("--check-capacity is for a device; %s is a file", target)
		}
		return g.checkCapacity(ctx, t.device)
	}
	o, err := w.openSource(ctx, g)
	if err != nil {
		return err
	}
	defer o.close()
	o.set(api.OptBootTest, !w.noBootTest)
	if t.device != "" {
		return g.writeDevice(ctx, w, t.device, o)
	}
	return g.writeFile(ctx, w, t.file, o)
}

// openSource opens what is to be written.
func (w *writeFlags) openSource(ctx context.Context, g *global) (*opened, error) {
	if w.image != "" {
		return g.openImage(w)
	}
	return w.open(ctx, g, os.Stdout)
}

// target is what the user named: a block device's kernel name, or a file.
type target struct{ device, file string }

// resolveTarget finds out what a path is without opening it. A path below /dev
// that is not there is a typing mistake, never a new file.
func resolveTarget(path string) (target, error) {
	real, err := filepath.EvalSymlinks(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		abs, err := filepath.Abs(path)
		if err != nil {
			return target{}, err
		}
		if strings.HasPrefix(abs, "/dev/") {
			return target{}, noDevice("no such device: %s", path)
		}
		return target{file: path}, nil
	case err != nil:
		return target{}, unusable(path, err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return target{}, unusable(path, err)
	}
	switch mode := info.Mode(); {
	case mode.IsRegular():
		return target{file: real}, nil
	case mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
		name, err := kernelName(info)
		return target{device: name}, err
	default:
		return target{}, usagef("%s is neither a disk nor a regular file", path)
	}
}

func noDevice(format string, args ...any) error {
	return unusableError{&api.Error{Name: api.ErrNoSuchDevice, Message: fmt.Sprintf(format, args...) + "; list the disks with memlinux devices"}}
}

// noFolder is the error of a new file whose folder is not there.
func noFolder(file string) error {
	return unusableError{fmt.Errorf("the folder %s does not exist; make it first", filepath.Dir(file))}
}

// kernelName is the kernel's own name of a block device: what /sys/dev/block
// says of its number, whatever the node is called.
func kernelName(info fs.FileInfo) (string, error) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", errors.New("the device's number can't be read")
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(stat.Rdev), unix.Minor(stat.Rdev)))
	if err != nil {
		return "", noDevice("%s is the node of a device that is not there", info.Name())
	}
	// The slash of names such as cciss/c0d0 is an exclamation mark there.
	return strings.ReplaceAll(filepath.Base(link), "!", "/"), nil
}

func (g *global) writeDevice(ctx context.Context, w *writeFlags, name string, o *opened) error {
	return g.job(ctx, func(ctx context.Context, c *client.Client) (dbus.ObjectPath, error) {
		plan, err := c.Plan(ctx, name)
		if err != nil {
			return "", err
		}
		if err := g.consent(ctx, c, w, name, plan, o); err != nil {
			return "", err
		}
		return c.Start(ctx, "Write", api.DevicePath(name), plan.Token, o.options)
	}, nil)
}

// stick is one of several disks to be written.
type stick struct {
	name   string
	token  string
	path   dbus.ObjectPath
	opened *opened
	job    api.Job
	err    error
}

// writeSeveral writes the same system on several disks at once. One that fails
// does not stop the others; the first error decides how the command ends.
func (g *global) writeSeveral(ctx context.Context, w *writeFlags, targets []string) error {
	if w.force || w.size != "" || w.checkCapacity {
		return usagef("--force, --size and --check-capacity are for one target, and %d are given", len(targets))
	}
	var sticks []*stick
	for _, target := range targets {
		t, err := resolveTarget(target)
		if err != nil {
			return err
		}
		if t.device == "" {
			return usagef("%s is a file; several targets can only be devices", target)
		}
		if slices.ContainsFunc(sticks, func(s *stick) bool { return s.name == t.device }) {
			return usagef("/dev/%s is given twice", t.device)
		}
		sticks = append(sticks, &stick{name: t.device})
	}
	if err := w.checkImage(len(sticks), ""); err != nil {
		return err
	}
	c, err := client.Connect(ctx, g.private)
	if err != nil {
		return err
	}
	defer c.Close()
	// All questions come before anything is erased.
	for _, s := range sticks {
		// Each job reads what it is made of through descriptors of its own.
		if s.opened, err = w.openSource(ctx, g); err != nil {
			return err
		}
		defer s.opened.close()
		s.opened.set(api.OptBootTest, !w.noBootTest)
		plan, err := c.Plan(ctx, s.name)
		if err == nil {
			err = g.consent(ctx, c, w, s.name, plan, s.opened)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if s.err = err; err == nil {
			s.token = plan.Token
		}
	}
	var names []string
	var following sync.WaitGroup
	for _, s := range sticks {
		if s.err != nil {
			continue
		}
		if s.path, s.err = c.Start(ctx, "Write", api.DevicePath(s.name), s.token, s.opened.options); s.err == nil {
			names = append(names, s.name)
		}
	}
	var views []view
	if len(names) > 0 {
		views = newViews(os.Stdout, g.json, names...)
	}
	for _, s := range sticks {
		if s.err != nil {
			continue
		}
		v := views[0]
		views = views[1:]
		following.Go(func() {
			s.job, s.err = c.Follow(ctx, s.path, v.update)
			v.end(s.err == nil && (s.job.State == api.StateSucceeded || s.job.Error == api.ErrVerification))
			if s.err == nil && s.job.State != api.StateSucceeded {
				s.err = &api.Error{Name: s.job.Error, Message: s.job.Message}
			}
		})
	}
	following.Wait()
	var first error
	for _, s := range sticks {
		if s.err != nil {
			s.err = fmt.Errorf("/dev/%s: %w", s.name, s.err)
		}
		g.nameSource(s.job.Report)
		switch {
		case g.json:
			if err := printJSONReport(os.Stdout, s.job, "", s.err); err != nil {
				return err
			}
		case s.job.Report != nil && s.job.State != api.StateCancelled:
			fmt.Printf("\n/dev/%s\n", s.name)
			printReport(os.Stdout, s.job.Report, "")
		}
		switch {
		case s.err == nil:
		case first == nil:
			first = s.err
		default:
			fmt.Fprintf(os.Stderr, "memlinux: %v\n", s.err)
		}
	}
	return first
}

// checkCapacity asks nothing: the content stays.
func (g *global) checkCapacity(ctx context.Context, name string) error {
	return g.job(ctx, func(ctx context.Context, c *client.Client) (dbus.ObjectPath, error) {
		plan, err := c.Plan(ctx, name)
		if err != nil {
			return "", err
		}
		if len(plan.Refused) > 0 {
			return "", refusedPlan(name, plan, "")
		}
		return c.Start(ctx, "CheckCapacity", api.DevicePath(name), plan.Token, api.Properties{})
	}, nil)
}

// refusedPlan tells each reason, and whether the disk's serial, typed at a terminal,
// would lift them all; "" is none that can be typed.
func refusedPlan(name string, plan api.Plan, serial string) error {
	var said []string
	soft := false
	for _, r := range plan.Refused {
		said = append(said, r.Text)
		soft = soft || r.Soft
	}
	if soft && plan.Token != "" && serial != "" {
		said = append(said, "if it is meant all the same, type its serial at a terminal, without --yes")
	}
	return refusal("/dev/%s is refused: %s", name, strings.Join(said, "; "))
}

// pick lets a person choose from the disks that can be taken out and that
// nothing speaks against but a mount.
func (g *global) pick(ctx context.Context) (string, error) {
	if g.json || !term.IsTerminal(int(os.Stdin.Fd())) {
		return "", usagef("give one DEVICE or FILE; memlinux devices lists the disks")
	}
	all, err := ask(ctx, g, (*client.Client).Devices)
	if err != nil {
		return "", err
	}
	var sticks []api.Device
	for _, d := range all {
		if d.Removable && !slices.ContainsFunc(d.Refused, func(r api.Reason) bool { return r.Code != api.ReasonMounted }) {
			sticks = append(sticks, d)
		}
	}
	if len(sticks) == 0 {
		return "", &api.Error{Name: api.ErrNoSuchDevice, Message: "no disk that can be taken out and written is plugged in; memlinux devices says why the others are refused"}
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for i, d := range sticks {
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\n", i+1, d.Path, size(d.Size), strings.TrimSpace(d.Vendor+" "+d.Model), serial(d.Serial))
	}
	if err := t.Flush(); err != nil {
		return "", err
	}
	answer, err := g.ask(ctx, fmt.Sprintf("Which one? Type its number (1 to %d): ", len(sticks)))
	if err != nil {
		return "", err
	}
	n, err := strconv.Atoi(answer)
	if err != nil || n < 1 || n > len(sticks) {
		return "", refusal("nothing was erased: %q is not the number of a disk", answer)
	}
	return sticks[n-1].Name, nil
}

// agree has a person agree to what the plan says will happen to the device, and
// puts what was agreed to into the options. What only a person at a terminal can
// lift is refused without one, and with --yes.
func (g *global) agree(ctx context.Context, c *client.Client, yes bool, name string, plan api.Plan, o *opened) error {
	soft, mounted := false, false
	for _, r := range plan.Refused {
		soft = soft || r.Soft
		mounted = mounted || r.Code == api.ReasonMounted
	}
	for _, m := range plan.Mounts {
		if mounted && !m.ByUser {
			return refusedPlan(name, plan, "")
		}
	}
	asking := !yes && !g.json && term.IsTerminal(int(os.Stdin.Fd()))
	switch {
	case len(plan.Refused) > 0 && (plan.Token == "" || !asking):
		typed := ""
		if d, err := c.Device(ctx, name); err == nil && !asking {
			typed = d.Serial
		}
		return refusedPlan(name, plan, typed)
	case yes:
		return nil
	case !asking:
		return usagef("/dev/%s would be erased, and there is no terminal to ask at: say --yes if that is right", name)
	}
	d, err := c.Device(ctx, name)
	if err != nil {
		return err
	}
	if soft && d.Serial == "" {
		return refusedPlan(name, plan, "") // nothing could be typed
	}
	g.show(name, d, plan)
	if soft {
		for _, r := range plan.Refused {
			if r.Soft {
				fmt.Printf("  %s\n", r.Text)
			}
		}
		answer, err := g.ask(ctx, "If it is meant all the same, type its serial: ")
		if err != nil {
			return err
		}
		if answer != d.Serial {
			return refusal("not erased: the answer was not the serial of /dev/%s", name)
		}
		o.set(api.OptSerial, answer)
	}
	if mounted {
		var points [][]byte
		for _, m := range plan.Mounts {
			fmt.Printf("  %s is mounted at %s\n", m.Device, printable(m.Point))
			points = append(points, []byte(m.Point))
		}
		answer, err := g.ask(ctx, "Unmount that? Type yes: ")
		if err != nil {
			return err
		}
		if answer != "yes" {
			return refusal("not erased: %s stays mounted", name)
		}
		o.set(api.OptUnmount, points)
	}
	answer, err := g.ask(ctx, fmt.Sprintf("Type %s to erase it: ", name))
	if err != nil {
		return err
	}
	if answer != name {
		return refusal("not erased: the answer was not %s", name)
	}
	return nil
}

// printable is a path without what would change the terminal.
func printable(path string) string {
	return strings.Trim(strconv.QuoteToGraphic(path), `"`)
}

// show prints the device and what will be lost.
func (g *global) show(name string, d api.Device, plan api.Plan) {
	fmt.Printf("%s\n", strings.Join(nonEmpty("/dev/"+name, strings.TrimSpace(d.Vendor+" "+d.Model), serial(d.Serial), d.Transport, size(d.Size)), ", "))
	known := false
	for _, e := range plan.Erases {
		if e.Type != "" {
			known = true
			fmt.Printf("  will be lost: %s\n", strings.Join(nonEmpty(e.Name, e.Type, size(e.Size), e.Label), ", "))
		}
	}
	if !known {
		fmt.Println("  holds no file system that is known; whatever is on it will be lost")
	}
}

// ask puts a question at the terminal.
func (g *global) ask(ctx context.Context, question string) (string, error) {
	fmt.Print(question)
	if g.answers == nil {
		g.answers = bufio.NewReader(os.Stdin)
	}
	answer := make(chan string, 1)
	go func() {
		// Stays behind on a Ctrl-C; the process ends then.
		s, _ := g.answers.ReadString('\n')
		answer <- strings.TrimSpace(s)
	}()
	select {
	case <-ctx.Done():
		fmt.Println()
		return "", ctx.Err()
	case s := <-answer:
		return s, nil
	}
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func (g *global) writeFile(ctx context.Context, w *writeFlags, path string, o *opened) error {
	if w.size != "" {
		n, err := humanize.ParseBytes(w.size)
		if err != nil || n == 0 {
			return usagef("--size is %q; it must be like 512MiB", w.size)
		}
		o.set(api.OptSize, n)
	}
	if _, err := os.Lstat(path); err == nil && !w.force {
		return refusal("%s exists; say --force to replace it", path)
	}
	if !isDir(filepath.Dir(path)) {
		return noFolder(path)
	}
	// The image takes the file's name only when it is whole.
	pending, err := renameio.NewPendingFile(path, renameio.WithPermissions(0o644), renameio.WithExistingPermissions())
	if err != nil {
		return err
	}
	defer pending.Cleanup() //nolint:errcheck // nothing is left to do where it was kept
	return g.job(ctx, func(ctx context.Context, c *client.Client) (dbus.ObjectPath, error) {
		return c.Start(ctx, "WriteFile", fdOf(pending.File), o.options)
	}, func(job api.Job) (string, error) {
		// What was written and read back stands, even where the boot test
		// failed or could not be run.
		if job.Report == nil || !job.Report.Written || job.State == api.StateCancelled {
			return "", nil
		}
		return path, pending.CloseAtomicallyReplace()
	})
}
