package command

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
)

type vmFlags struct {
	kernel, initrd, append, data, firmware string
	memory                                 uint64
}

func newVM(g *global) *cobra.Command {
	var f vmFlags
	c := &cobra.Command{
		Use:   "vm [flags] [DEVICE|FILE]",
		Short: "Boot a stick, a disk image or a kernel in a virtual machine",
		Long: `Boots a stick, a disk image or a kernel in a virtual machine whose serial console
is this terminal. Ctrl-A X leaves, Ctrl-A Ctrl-A sends a Ctrl-A. What the
machine writes is thrown away: the disk stays as it is.`,
		Example: `  sudo memlinux vm stick.img
  sudo memlinux vm --firmware uefi /dev/sdb
  sudo memlinux vm --kernel out/vmlinuz --initrd out/initramfs.img --append "console=ttyS0"
  sudo memlinux vm --data payload stick.img     the folder as a CD-ROM`,
		Args: atMostOne("DEVICE or FILE"),
		RunE: func(c *cobra.Command, a []string) error { return g.vm(c.Context(), &f, a) },
	}
	fs := c.Flags()
	fs.StringVar(&f.kernel, "kernel", "", "boot this kernel FILE directly")
	fs.StringVar(&f.initrd, "initrd", "", "the initramfs FILE of --kernel")
	fs.StringVar(&f.append, "append", "", "the command line of --kernel")
	fs.StringVar(&f.data, "data", "", "attach this FOLDER as a data disc")
	fs.StringVar(&f.firmware, "firmware", "bios", "bios or uefi")
	fs.Uint64Var(&f.memory, "memory", 0, "MiB of memory (default: 512, or as memlinuxd is configured)")
	return c
}

func (g *global) vm(ctx context.Context, f *vmFlags, a []string) error {
	switch {
	case len(a) == 0 && f.kernel == "":
		return usagef("say what to boot: a DEVICE, a FILE, or --kernel FILE")
	case f.kernel == "" && (f.initrd != "" || f.append != ""):
		return usagef("--initrd and --append go with --kernel")
	}
	o := &opened{options: api.Properties{}}
	defer o.close()
	o.set(api.OptFirmware, f.firmware)
	if f.memory != 0 {
		o.set(api.OptMemory, f.memory)
	}
	if f.append != "" {
		o.set(api.OptAppend, f.append)
	}
	for key, path := range map[string]string{api.OptKernel: f.kernel, api.OptInitrd: f.initrd} {
		if path == "" {
			continue
		}
		file, err := o.open(path)
		if err != nil {
			return err
		}
		o.set(key, fdOf(file))
	}
	if len(a) == 1 {
		key, subject, err := readTarget(o, a[0], api.OptDevice, api.OptFile)
		if err != nil {
			return err
		}
		o.set(key, subject)
	}
	var packed chan error
	if f.data != "" {
		if info, err := os.Stat(f.data); err != nil {
			return fmt.Errorf("--data: %w", unusable(f.data, err))
		} else if !info.IsDir() {
			return usagef("--data: %s is no folder", f.data)
		}
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		o.files = append(o.files, r)
		o.set(api.OptData, fdOf(r))
		packed = make(chan error, 1)
		go func() { packed <- pack(w, f.data) }()
	}
	err := g.console(ctx, o)
	if packed != nil {
		o.close() // so that pack ends if the daemon did not read it all
		if packErr := <-packed; packErr != nil && !errors.Is(packErr, unix.EPIPE) {
			return packErr
		}
	}
	return err
}

// pack streams the folder as a tar, with this user's rights.
func pack(w *os.File, dir string) error {
	t := tar.NewWriter(w)
	err := t.AddFS(os.DirFS(dir))
	if err == nil {
		err = t.Close()
	}
	if closeErr := w.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("--data %s: %w", dir, err)
	}
	return nil
}

// console starts the machine and joins its console to this terminal until it
// ends.
func (g *global) console(ctx context.Context, o *opened) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "console"), os.NewFile(uintptr(fds[1]), "console")
	defer ours.Close()
	defer theirs.Close()

	c, err := client.Connect(ctx, g.private)
	if err != nil {
		return err
	}
	defer c.Close()
	path, err := c.Start(ctx, "StartVM", fdOf(theirs), o.options)
	if err != nil {
		return err
	}
	theirs.Close()

	in := int(os.Stdin.Fd())
	if term.IsTerminal(in) {
		fmt.Fprint(os.Stderr, "Ctrl-A X leaves the virtual machine.\r\n")
		saved, err := term.MakeRaw(in)
		if err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		defer func() {
			_ = term.Restore(in, saved) // the terminal is gone if this fails
			fmt.Fprintln(os.Stderr)
		}()
	}
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	var left atomic.Bool
	go func() {
		// Ends with the process: a read of the terminal can't be interrupted.
		if copyKeys(ours, os.Stdin) {
			left.Store(true)
			leave()
		}
	}()
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		_, _ = io.Copy(os.Stdout, ours) // ends when the machine does
	}()
	job, err := c.Follow(ctx, path, func(api.Job) {})
	if err != nil {
		return err
	}
	<-shown
	if job.State == api.StateSucceeded || left.Load() {
		return nil
	}
	return &api.Error{Name: job.Error, Message: job.Message}
}

const ctrlA = 0x01

// copyKeys passes what is typed on to the machine until the end of the input or
// Ctrl-A X, and reports whether it was that.
func copyKeys(to io.Writer, from io.Reader) (left bool) {
	buf := make([]byte, 1024)
	escaped := false
	for {
		n, err := from.Read(buf)
		var out []byte
		for _, b := range buf[:n] {
			switch {
			case escaped && (b == 'x' || b == 'X'):
				return true
			case escaped:
				escaped = false
				out = append(out, ctrlA)
				if b != ctrlA {
					out = append(out, b)
				}
			case b == ctrlA:
				escaped = true
			default:
				out = append(out, b)
			}
		}
		if _, werr := to.Write(out); werr != nil || err != nil {
			return false
		}
	}
}
