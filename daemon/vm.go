package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/media/iso"
	"github.com/memlinux/memlinux/testvm"
)

const (
	dataLabel = "DATA"
	// maxData bounds a data disc: it is made in the cache.
	maxData = 4 << 30
)

// startVM runs a virtual machine whose serial console is the caller's socket.
// It ends when the machine powers off, or when the caller closes its end.
func (s *Server) startVM(c *call) ([]any, error) {
	o := c.options()
	console := o.argument(toBeJoined)
	m := testvm.Machine{
		Firmware:   testvm.Firmware(o.oneOf(api.OptFirmware, string(testvm.BIOS), string(testvm.UEFI))),
		Bus:        testvm.USB,
		SectorSize: 512,
		Kernel:     o.file(api.OptKernel),
		Initrd:     o.file(api.OptInitrd),
		Append:     get[string](o, api.OptAppend),
		MemoryMiB:  s.config().Memory,
	}
	if memory := get[uint64](o, api.OptMemory); memory != 0 {
		if memory < 64 || memory > 1<<20 {
			o.fail("option %q is %d MiB; it can be 64 to 1048576", api.OptMemory, memory)
		}
		m.MemoryMiB = int(memory)
	}
	file := o.file(api.OptFile)
	device := get[dbus.ObjectPath](o, api.OptDevice)
	data := o.stream(api.OptData)
	switch {
	case file != nil && device != "":
		o.fail("options %q and %q exclude each other", api.OptFile, api.OptDevice)
	case file == nil && device == "" && m.Kernel == nil:
		o.fail("nothing to boot: give %q, %q or %q", api.OptDevice, api.OptFile, api.OptKernel)
	case m.Kernel == nil && (m.Initrd != nil || m.Append != ""):
		o.fail("options %q and %q go with %q", api.OptInitrd, api.OptAppend, api.OptKernel)
	}
	if err := o.end(); err != nil {
		return nil, err
	}
	files := o.files
	disk, err := s.openToRead(c.ctx, file, device)
	if err == nil {
		err = testvm.Check(m.Firmware)
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	if disk != nil {
		if m.Kernel == nil && m.Firmware == testvm.BIOS && disk.sectorSize != 512 {
			closeAll(append(files, disk.file))
			return nil, invalidOption("a PC BIOS can't boot a disk with %d-byte sectors: ask for the firmware uefi", disk.sectorSize)
		}
		m.Disk, m.DiskSize, m.SectorSize = disk.file, disk.size, disk.sectorSize
		files = append(files, disk.file)
		c.target = disk.target
	}
	return s.start(c, api.KindVM, []jobs.Phase{{Name: phaseData, Weight: 1}, {Name: phaseRun, Weight: 1}}, files,
		func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
			if data != nil {
				j.Begin(phaseData)
				disc, err := s.dataDisc(ctx, data)
				if err != nil {
					return nil, err
				}
				defer disc.Close()
				m.DataDisc = disc
			}
			j.Begin(phaseRun)
			return nil, s.runVM(ctx, j, m, console)
		})
}

// source is a disk that is opened for reading.
type source struct {
	file       *os.File
	size       int64 // bytes
	sectorSize int
	target     *api.Target
	device     *blockdev.Device // nil: a file
}

// openToRead opens the device, or the file once more; nil where there is
// neither. The caller closes the source's file.
func (s *Server) openToRead(ctx context.Context, file *os.File, device dbus.ObjectPath) (*source, error) {
	switch {
	case device != "":
		d, err := s.lookUp(ctx, device)
		if err != nil {
			return nil, err
		}
		f, d, err := s.devices.system.OpenRead(ctx, d.Name)
		if err != nil {
			return nil, err
		}
		return &source{f, d.Size, d.LogicalBlockSize, deviceTarget(d), &d}, nil
	case file != nil:
		f, err := readOnly(file)
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		// A disk has whole sectors; what is left over is of no partition.
		size := info.Size() / 512 * 512
		if size == 0 {
			f.Close()
			return nil, invalidOption("the file is smaller than a sector; it is no disk image")
		}
		return &source{f, size, 512, &api.Target{Kind: "file", Size: size, SectorSize: 512}, nil}, nil
	}
	return nil, nil
}

// dataDisc makes an ISO image of the tar stream in a nameless file.
func (s *Server) dataDisc(ctx context.Context, stream *os.File) (*os.File, error) {
	in, err := openStream(ctx, stream)
	if err != nil {
		return nil, fmt.Errorf("data disc: %w", err)
	}
	defer in.Close()
	if err := os.MkdirAll(s.config().CacheDir, 0o755); err != nil { //nolint:gosec // as the cache itself makes it
		return nil, fmt.Errorf("data disc: %w", err)
	}
	tmp, err := os.CreateTemp(s.config().CacheDir, "data-*.iso")
	if err != nil {
		return nil, fmt.Errorf("data disc: %w", err)
	}
	defer tmp.Close()
	// Without a name it goes with the last descriptor, however we end.
	if err := os.Remove(tmp.Name()); err != nil {
		return nil, fmt.Errorf("data disc: %w", err)
	}
	if err := iso.FromTar(ctx, tmp, in, dataLabel, maxData); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("data disc: %w", err)
	}
	return readOnly(tmp)
}

// runVM joins the machine's console and the caller's socket until one ends.
func (s *Server) runVM(ctx context.Context, j *jobs.Job, m testvm.Machine, socket *os.File) error {
	console, err := openSocket(socket)
	if err != nil {
		return invalidOption("the console's descriptor: %v", err)
	}
	defer console.Close()
	// A client that takes nothing does not hold up a cancel.
	stop := context.AfterFunc(ctx, func() { console.Close() })
	defer stop()
	owner := j.Snapshot().Owner
	if owner != 0 {
		select {
		case s.consoles <- struct{}{}:
			defer func() { <-s.consoles }()
		default:
			return &api.Error{Name: api.ErrBusy, Message: "a virtual machine with a user's console runs already; wait for it to end"}
		}
	}
	done, err := s.guests.enterNow(owner)
	if err != nil {
		return err
	}
	defer done()
	m.Dir = s.reportDir(j.ID())
	m.Launch = s.qemu()
	vm, err := testvm.Start(ctx, m)
	if err != nil {
		return err
	}
	line := vm.Console()
	defer line.Close()
	var gone error
	typed := make(chan struct{})
	go func() {
		defer close(typed)
		_, _ = io.Copy(line, console)
		gone = errCallerGone
		vm.Stop()
	}()
	_, _ = io.Copy(console, line) // ends with the machine
	err = vm.Wait()
	console.Close() // ends the other direction, and tells the caller
	<-typed
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		return nil
	case errors.Is(gone, errCallerGone):
		return fmt.Errorf("the console was closed: %w", err)
	}
	return err
}

var errCallerGone = errors.New("the caller is gone")
