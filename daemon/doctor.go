package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/bootloader/grub"
	"github.com/memlinux/memlinux/bootloader/local"
	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"github.com/memlinux/memlinux/testvm"
)

// checkup is what an examination found.
type checkup struct {
	checks        []api.Check
	at            time.Time
	configuration *config.Config // that was in force
}

// checkupLife is how long a user is told what was found the last time: each
// examination starts programs, and anybody may ask.
const checkupLife = 30 * time.Second

// doctor looks at what the daemon needs of this machine: one look at a time, of
// which all who wait for it get what it finds. Root, who may just have mended
// something, gets a new one.
func (s *Server) doctor(c *call) ([]any, error) {
	if err := c.options().end(); err != nil {
		return nil, err
	}
	now := s.configuration.Load()
	last := s.checkup.Load()
	if c.uid == 0 || last == nil || last.configuration != now || time.Since(last.at) >= checkupLife {
		got, err, _ := s.checks.Do("", func() (any, error) {
			return &checkup{s.examine(s.ctx), time.Now(), now}, s.ctx.Err()
		})
		if err != nil {
			return nil, err
		}
		last = got.(*checkup)
		s.checkup.Store(last)
	}
	found := []api.Properties{}
	for _, check := range last.checks {
		found = append(found, check.Dictionary())
	}
	return []any{found}, nil
}

func (s *Server) examine(ctx context.Context) []api.Check {
	return []api.Check{
		{Name: "service", State: api.CheckOK, Text: "memlinuxd " + s.version},
		checkGRUB("GRUB for BIOS", func() error { _, err := grub.MakeBIOS(ctx, s.mkimage(), 1); return err }),
		checkGRUB("GRUB for UEFI", func() error { _, err := grub.MakeEFI(ctx, s.mkimage(), 1); return err }),
		checkQEMU(ctx, s.qemu()),
		checkFirmware(),
		checkKVM(ctx, s.qemu()),
		s.checkKernel(ctx),
		checkBusybox(),
		checkSpace("space for the cache", s.config().CacheDir, 200<<20, 1<<30, api.CheckFailed, "empty it while no job runs (rm -r "+s.config().CacheDir+"/*), or name another cache-dir in /etc/memlinux/memlinux.toml"),
		checkSpace("space for reports", s.config().StateDir, 20<<20, 100<<20, api.CheckFailed, "make room, or name another state-dir in /etc/memlinux/memlinux.toml"),
		checkSpace("space in /boot", "/boot", 0, 100<<20, api.CheckWarning, "take old kernels (apt autoremove) or entries of memlinux (memlinux remove) away before memlinux install"),
		checkLoader(ctx),
	}
}

// failed is a check that err ended, with what to install if that is why.
func failed(name string, err error) api.Check {
	c := api.Check{Name: name, State: api.CheckFailed, Text: err.Error()}
	var (
		ofGRUB *grub.MissingError
		ofQEMU *testvm.MissingError
		tool   *sandbox.MissingError
	)
	install := func(what, pkg string) {
		c.Text, c.Mend = what+" is not installed", "sudo apt install "+pkg
	}
	switch {
	case errors.As(err, &ofGRUB):
		install(ofGRUB.Name, ofGRUB.Package)
	case errors.As(err, &ofQEMU):
		install(ofQEMU.What, ofQEMU.Package)
	case errors.As(err, &tool):
		install(tool.What, tool.Package)
	}
	return c
}

// checkGRUB makes a GRUB as every stick gets one.
func checkGRUB(name string, make func() error) api.Check {
	if err := make(); err != nil {
		return failed(name, err)
	}
	return api.Check{Name: name, State: api.CheckOK, Text: "can be made"}
}

func checkQEMU(ctx context.Context, launch testvm.Launcher) api.Check {
	const name = "QEMU"
	dir, err := os.MkdirTemp("", "memlinux-doctor-")
	if err != nil {
		return failed(name, err)
	}
	defer os.RemoveAll(dir)
	version, err := testvm.Version(ctx, testvm.Machine{Dir: dir, Launch: launch})
	if err != nil {
		return failed(name, err)
	}
	return api.Check{Name: name, State: api.CheckOK, Text: "version " + version + " runs"}
}

func checkFirmware() api.Check {
	const name = "UEFI firmware"
	var missing *testvm.MissingError
	if err := testvm.Check(testvm.UEFI); errors.As(err, &missing) && missing.Package == "qemu-system-x86" {
		return api.Check{Name: name, State: api.CheckUnknown, Text: "it needs QEMU"}
	} else if err != nil {
		return failed(name, err)
	}
	return api.Check{Name: name, State: api.CheckOK, Text: "OVMF is there"}
}

func checkKVM(ctx context.Context, launch testvm.Launcher) api.Check {
	const name = "KVM"
	why, err := testvm.KVM(ctx, launch)
	switch {
	case err != nil:
		return failed(name, err)
	case why != "":
		return api.Check{Name: name, State: api.CheckWarning, Text: why + "; virtual machines work, and take several times as long",
			Mend: "turn virtualization (VT-x, AMD-V) on in the firmware, or nested virtualization in the hypervisor"}
	}
	return api.Check{Name: name, State: api.CheckOK, Text: "virtual machines use it"}
}

func (s *Server) checkKernel(ctx context.Context) api.Check {
	const name = "kernel"
	pkg := imagegen.DefaultKernelPackage
	if configured, ok := strings.CutPrefix(s.config().Kernel, "debian:"); ok {
		pkg = configured
	} else {
		path, release, err := (imagegen.Generator{CacheDir: s.config().CacheDir}).HostKernel(ctx)
		if err != nil {
			return failed(name, err)
		}
		if path != "" {
			return api.Check{Name: name, State: api.CheckOK, Text: fmt.Sprintf("%s, Linux %s", path, release)}
		}
	}
	return fetched(name, pkg)
}

func checkBusybox() api.Check {
	const name = "busybox"
	if path := (imagegen.Generator{}).HostBusybox(); path != "" {
		return api.Check{Name: name, State: api.CheckOK, Text: path}
	}
	c := fetched(name, imagegen.BusyboxPackage)
	if c.State == api.CheckOK {
		c.State, c.Mend = api.CheckWarning, "sudo apt install "+imagegen.BusyboxPackage
	}
	return c
}

// fetched is the check of what comes from Debian's package pkg.
func fetched(name, pkg string) api.Check {
	if _, err := sandbox.Find("apt-get", "apt"); err != nil {
		return failed(name, err)
	}
	return api.Check{Name: name, State: api.CheckOK, Text: "Debian's package " + pkg + ", which is fetched when it is first wanted"}
}

// checkSpace looks at the file system that dir lies on, or will. Below least
// bytes the check is worst, below enough bytes a warning.
func checkSpace(name, dir string, least, enough int64, worst, mend string) api.Check {
	at := dir
	var fs unix.Statfs_t
	err := unix.Statfs(at, &fs)
	for errors.Is(err, os.ErrNotExist) && at != "/" {
		at = filepath.Dir(at)
		err = unix.Statfs(at, &fs)
	}
	if err != nil {
		return api.Check{Name: name, State: worst, Text: fmt.Sprintf("%s: %v", at, err)}
	}
	free := int64(fs.Bavail) * fs.Bsize
	c := api.Check{Name: name, State: api.CheckOK, Text: humanize.IBytes(uint64(free)) + " free in " + dir}
	if free < enough {
		c.State, c.Mend = api.CheckWarning, mend
	}
	if free < least {
		c.State = worst
	}
	return c
}

// checkLoader tells whether memlinux install can work.
func checkLoader(ctx context.Context) api.Check {
	const name = "boot menu of this PC"
	b, err := local.Find(ctx, local.System{})
	if err != nil {
		return api.Check{Name: name, State: api.CheckWarning, Text: "memlinux install can't be used: " + err.Error()}
	}
	text := b.Name() + " of " + strings.ToUpper(b.Firmware)
	if b.NoProof != "" {
		return api.Check{Name: name, State: api.CheckWarning, Text: text + "; an entry can't be tried before it counts: " + b.NoProof}
	}
	return api.Check{Name: name, State: api.CheckOK, Text: text}
}
