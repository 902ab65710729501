package grub

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Where Debian's packages put GRUB's modules and boot sectors.
const (
	biosDir = "/usr/lib/grub/i386-pc"
	efiDir  = "/usr/lib/grub/x86_64-efi"
)

// nobody is the user and group that grub-mkimage runs as when we are root: it
// needs no right at all. Linux and Debian know both as 65534.
const nobody = 65534

// MissingError says that a piece of GRUB is not installed.
type MissingError struct {
	Name    string // the program or file
	Package string // the Debian package that has it
}

// Error says what to install.
func (e *MissingError) Error() string {
	return fmt.Sprintf("%s is missing: install it with apt-get install %s", e.Name, e.Package)
}

// Launcher starts a program that [os/exec] could run, with cmd's Path, Args, Env,
// Dir and standard files, away from this process: apart from the system, as a user
// without rights, and so that it dies with this process. It is killed when ctx
// ends. wait returns when nothing of it runs any more, with nil if it ended well.
type Launcher func(ctx context.Context, cmd *exec.Cmd) (wait func() error, err error)

// asChild is the Launcher of a machine without systemd.
func asChild(_ context.Context, cmd *exec.Cmd) (wait func() error, err error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd.Wait, cmd.Start()
}

// image is one run of grub-mkimage.
type image struct {
	format  string // its -O
	dir     string // its -d
	pkg     string // the package that has dir
	prefix  string
	config  string
	modules []string
}

// make returns what grub-mkimage makes of im. It gets its script from, and
// writes to, files that have no name: there is nothing to clean up, and a user
// without rights can use them.
func (im image) make(ctx context.Context, launch Launcher) ([]byte, error) {
	path, err := exec.LookPath("grub-mkimage")
	if err != nil {
		return nil, &MissingError{"grub-mkimage", "grub-common"}
	}
	if err := present(im.dir, "moddep.lst", im.pkg); err != nil {
		return nil, err
	}
	script, err := memoryFile("memlinux-grub.cfg")
	if err != nil {
		return nil, err
	}
	defer script.Close()
	if _, err := script.WriteString(im.config); err != nil {
		return nil, fmt.Errorf("write GRUB's script into memory: %w", err)
	}
	// A file and not a pipe: grub-mkimage fails where it can't fsync.
	out, err := memoryFile("memlinux-grub.img")
	if err != nil {
		return nil, err
	}
	defer out.Close()

	args := append([]string{"-O", im.format, "-d", im.dir, "-p", im.prefix, "-c", "/proc/self/fd/0"}, im.modules...)
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"LC_ALL=C"}
	cmd.Stdin, cmd.Stdout = script, out
	var messages bytes.Buffer
	cmd.Stderr = &messages
	if launch == nil {
		launch = asChild
	}
	wait, err := launch(ctx, cmd)
	if err == nil {
		err = wait()
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("make GRUB's %s image: %w", im.format, ctx.Err())
		}
		return nil, fmt.Errorf("make GRUB's %s image: grub-mkimage: %w: %s", im.format, err, strings.TrimSpace(messages.String()))
	}
	data, err := io.ReadAll(io.NewSectionReader(out, 0, 1<<30))
	if err != nil {
		return nil, fmt.Errorf("read GRUB's %s image: %w", im.format, err)
	}
	return data, nil
}

func memoryFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make the file %s in memory: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// present checks for a file of GRUB's.
func present(dir, name, pkg string) error {
	path := filepath.Join(dir, name)
	_, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return &MissingError{path, pkg}
	}
	return err
}
