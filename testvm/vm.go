package testvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/memlinux/memlinux/testvm/qmp"
)

// startLimit bounds the time until QEMU greets on its monitor, before the
// guest runs. It takes well under a second; a loaded machine may need more.
const startLimit = 300 * time.Second

// VM is a running machine.
type VM struct {
	process     *process
	console     *os.File
	firmwareLog *os.File // only of a proof
	screen      *os.File // only of a proof: where QEMU puts the text screen
	screenPath  string   // QEMU's name for it
	monitor     *qmp.Client
	kvm         bool
	uefi        bool
	started     time.Time
	shutdown    atomic.Pointer[string] // QEMU's reason for its end, as in its SHUTDOWN event
}

// Start runs m for a person at its serial console. The machine lives until it
// powers itself off, [VM.Stop] is called or ctx ends.
func Start(ctx context.Context, m Machine) (*VM, error) {
	return launch(ctx, m, nil)
}

// Console is our end of the serial line: a stream socket, in non-blocking mode
// as Go wants it, that another process may be given as well. It reads EOF when
// the machine has ended. Close it when done.
func (vm *VM) Console() *os.File { return vm.console }

// Wait waits until the machine has ended: nil if it powered itself off, else
// why it ended, which after [VM.Stop] is that it was killed.
func (vm *VM) Wait() error {
	<-vm.process.done
	<-vm.monitor.Done()
	return vm.process.failure()
}

// Stop ends the machine as if by its plug, and waits until it is gone. To stop
// a machine that has ended does nothing.
func (vm *VM) Stop() {
	vm.process.kill()
	vm.monitor.Close()
}

// close stops the machine and closes our ends of its lines.
func (vm *VM) close() {
	vm.Stop()
	vm.console.Close()
	for _, f := range []*os.File{vm.firmwareLog, vm.screen} {
		if f != nil {
			f.Close()
		}
	}
}

func (vm *VM) onEvent(e qmp.Event) {
	if e.Name != "SHUTDOWN" {
		return
	}
	var data struct{ Reason string }
	if json.Unmarshal(e.Data, &data) == nil && data.Reason != "" {
		vm.shutdown.Store(&data.Reason)
	}
}

// launch starts QEMU and returns when its monitor answers. On an error nothing
// is left of it. A screenshot, a file open for writing only, makes it a machine
// for a proof: it has a firmware log, which the caller reads, its text screen
// can be read, and it ends where another would reboot.
func launch(ctx context.Context, m Machine, screenshot *os.File) (*VM, error) {
	if err := m.validate(); err != nil {
		return nil, err
	}
	if err := Check(m.Firmware); err != nil {
		return nil, err
	}
	kvm, err := kvmWorks(ctx)
	if err != nil {
		return nil, err
	}
	scratch, err := makeScratch(m)
	if err != nil {
		return nil, fmt.Errorf("machine: %w", err)
	}
	// QEMU opens all that it needs in there before it greets: when launch
	// returns the names can go, also that of the disk's overlay.
	defer os.RemoveAll(scratch.Name())
	defer scratch.Close()

	vm := &VM{kvm: kvm, uefi: m.Firmware == UEFI}
	w := wiring{kvm: kvm, scratch: scratch, screenshot: screenshot}
	if m.Disk != nil {
		w.diskDriver, _ = blockDriver(m.Disk) // validate saw the error
	}
	if m.DataDisc != nil {
		w.discDriver, _ = blockDriver(m.DataDisc)
	}
	var monitor *os.File
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	pair := func(name string, ours, theirs **os.File) {
		if err == nil {
			if *ours, *theirs, err = socketPair(name); err == nil {
				opened = append(opened, *theirs)
			}
		}
	}
	pair("monitor", &monitor, &w.monitor)
	pair("console", &vm.console, &w.serial)
	if screenshot != nil && err == nil {
		if vm.firmwareLog, w.firmwareLog, err = os.Pipe(); err == nil {
			opened = append(opened, w.firmwareLog)
			vm.screen, err = memoryFile()
			w.screen = vm.screen
		}
	}
	closeOurs := func() {
		for _, f := range []*os.File{monitor, vm.console, vm.firmwareLog, vm.screen} {
			if f != nil {
				f.Close()
			}
		}
	}
	if err != nil {
		closeOurs()
		return nil, err
	}

	args, files := m.command(w)
	if vm.screen != nil {
		vm.screenPath = inheritedPath(strconv.Itoa(slices.Index(files, vm.screen) + 3))
	}
	var groups []uint32
	if kvm {
		groups = kvmGroups()
	}
	vm.started = time.Now()
	vm.process, err = spawn(ctx, args, files, groups)
	if err != nil {
		closeOurs()
		return nil, err
	}
	for _, f := range opened {
		f.Close() // else a dead QEMU's socket would never read EOF
	}
	opened = nil
	greet, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	vm.monitor, err = qmp.Open(greet, monitor, vm.onEvent)
	if err != nil {
		if errors.Is(err, qmp.ErrClosed) {
			<-vm.process.done // it is going down: keep its own exit status
		}
		vm.process.kill()
		closeOurs()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if greet.Err() != nil {
			return nil, fmt.Errorf("%s did not answer on its monitor within %v", qemuProgram, startLimit)
		}
		if failure := vm.process.failure(); failure != nil {
			return nil, failure
		}
		return nil, fmt.Errorf("%s: %w", qemuProgram, err)
	}
	return vm, nil
}

// socketPair makes a connected pair: ours for Go's poller, theirs for a child.
func socketPair(name string) (ours, theirs *os.File, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair for the %s: %w", name, err)
	}
	if err := syscall.SetNonblock(fds[0], true); err != nil {
		syscall.Close(fds[0])
		syscall.Close(fds[1])
		return nil, nil, fmt.Errorf("make a socket pair for the %s: %w", name, err)
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// makeScratch makes the machine's scratch folder in m.Dir, with what QEMU must
// open by name: kernel and initramfs, which may be files that its user can't
// read, the disk's overlay, and a fresh store of UEFI variables. It belongs to
// QEMU's user and nobody else can enter it.
func makeScratch(m Machine) (dir *os.File, err error) {
	path, err := os.MkdirTemp(m.Dir, ".qemu-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(path)
		}
	}()
	if m.Kernel != nil {
		if err := copyInto(path, scratchKernel, m.Kernel); err != nil {
			return nil, err
		}
	}
	if m.Initrd != nil {
		if err := copyInto(path, scratchInitrd, m.Initrd); err != nil {
			return nil, err
		}
	}
	if m.Firmware == UEFI {
		flash, err := os.ReadFile(ovmfVars)
		if err == nil && len(m.Variables) > 0 {
			flash, err = setVariables(flash, m.Variables)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", ovmfVars, err)
		}
		if err := makeIn(path, scratchVars, func(f *os.File) error {
			_, err := f.Write(flash)
			return err
		}); err != nil {
			return nil, err
		}
	}
	if m.Disk != nil {
		if err := makeIn(path, scratchOverlay, func(f *os.File) error {
			return writeOverlay(f, m.Disk, m.DiskSize, m.Patches)
		}); err != nil {
			return nil, err
		}
	}
	// Last: from here on another process of that user can change the folder.
	if err := giveAway(path); err != nil {
		return nil, err
	}
	return os.Open(path)
}

// copyInto copies all of f, whatever its offset, to a new file for QEMU.
func copyInto(dir, name string, f *os.File) error {
	return makeIn(dir, name, func(to *os.File) error {
		if _, err := io.Copy(to, io.NewSectionReader(f, 0, 1<<62)); err != nil {
			return fmt.Errorf("copy %s: %w", f.Name(), err)
		}
		return nil
	})
}

// makeIn makes a new file for QEMU, with what fill writes.
func makeIn(dir, name string, fill func(*os.File) error) error {
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fill(f); err != nil {
		return err
	}
	if err := giveAway(path); err != nil {
		return err
	}
	return f.Close()
}

// giveAway makes path belong to the user that QEMU runs as.
func giveAway(path string) error {
	cred, err := credential(nil)
	if err != nil || cred == nil {
		return err
	}
	return os.Lchown(path, int(cred.Uid), int(cred.Gid))
}
