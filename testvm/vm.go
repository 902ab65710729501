package testvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
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
	kvm, err := kvmWorks(ctx, m.Launch)
	if err != nil {
		return nil, err
	}
	written, err := m.mayWrite()
	if err != nil {
		return nil, fmt.Errorf("machine: %w", err)
	}
	scratch, err := makeScratch(m)
	if err != nil {
		return nil, fmt.Errorf("machine: %w", err)
	}
	defer scratch.Close() // QEMU has its own descriptors

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
	vm.started = time.Now()
	vm.process, err = spawn(ctx, m.Launch, args, files, Needs{Memory: m.memoryBound(), File: written, KVM: kvm})
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

// scratch are the files that are a machine's own; nil where it needs none. They
// have no names: QEMU gets their descriptors, nobody else can reach them, and
// they go when it ends, however it ends.
type scratch struct {
	kernel, initrd     *os.File
	variables, overlay *os.File // which it writes
}

func (s scratch) Close() {
	for _, f := range []*os.File{s.kernel, s.initrd, s.variables, s.overlay} {
		if f != nil {
			f.Close()
		}
	}
}

// makeScratch makes, on the disk of m.Dir, the disk's overlay, a fresh store of
// UEFI variables, and copies of kernel and initramfs, which may be files that
// QEMU's user can't read.
func makeScratch(m Machine) (s scratch, err error) {
	make := func(to **os.File, fill func(*os.File) error) {
		if err != nil {
			return
		}
		var f *os.File
		if f, err = nameless(m.Dir); err == nil {
			*to, err = f, fill(f)
		}
	}
	if m.Kernel != nil {
		make(&s.kernel, copyOf(m.Kernel))
	}
	if m.Initrd != nil {
		make(&s.initrd, copyOf(m.Initrd))
	}
	if m.Firmware == UEFI {
		make(&s.variables, func(f *os.File) error {
			flash, err := os.ReadFile(ovmfVars)
			if err == nil && len(m.Variables) > 0 {
				flash, err = setVariables(flash, m.Variables)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", ovmfVars, err)
			}
			_, err = f.Write(flash)
			return err
		})
	}
	if m.Disk != nil {
		make(&s.overlay, func(f *os.File) error { return writeOverlay(f, m.Disk, m.DiskSize, m.Patches) })
	}
	if err != nil {
		s.Close()
		return scratch{}, err
	}
	return s, nil
}

// nameless makes a file on dir's disk that has no name, and goes when nobody
// has it open any more. Whoever gets its descriptor may open it again: QEMU does,
// and we can't know as which user.
func nameless(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".qemu-")
	if err != nil {
		return nil, err
	}
	if err = os.Remove(f.Name()); err == nil {
		err = f.Chmod(0o666)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// copyOf fills a file with all of f, whatever its offset.
func copyOf(f *os.File) func(*os.File) error {
	return func(to *os.File) error {
		if _, err := io.Copy(to, io.NewSectionReader(f, 0, 1<<62)); err != nil {
			return fmt.Errorf("copy %s: %w", f.Name(), err)
		}
		return nil
	}
}
