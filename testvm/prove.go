package testvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Verdict is what a proof found. The seconds are of the host's clock (a
// guest's is useless under emulation), from QEMU's start, and 0 for what was
// not seen.
type Verdict struct {
	Firmware    Firmware `json:"firmware"`
	OK          bool     `json:"ok"`                // the ready line with the right build ID was seen; or a foreign system
	Skipped     bool     `json:"skipped"`           // not tried, since it can't be: Reason says why
	Reached     string   `json:"reached,omitempty"` // of a foreign system: how far it was seen, one of the Reached constants
	Reason      string   `json:"reason,omitempty"`
	Accelerator string   `json:"accelerator,omitempty"` // "kvm" or "tcg"
	QEMUVersion string   `json:"qemu_version,omitempty"`
	ToGRUB      float64  `json:"to_grub"`
	ToKernel    float64  `json:"to_kernel"`
	ToReady     float64  `json:"to_ready"`
	RAMMiB      int      `json:"ram_mib"`               // as the ready line says
	Shell       bool     `json:"shell"`                 // a shell on the serial line did a sum
	ConsoleLog  string   `json:"console_log,omitempty"` // path: the serial line's bytes, its first 4 MiB
	Screenshot  string   `json:"screenshot,omitempty"`  // path: a PNG, also of a failed boot
}

// How long a boot may take until the ready line. Measured on two shared cores
// without KVM: 6 to 8 s of processor time for BIOS, 10 to 11 for UEFI. A loaded
// machine takes ten times as long; nothing that boots takes longer.
const (
	biosLimit = 120 * time.Second
	uefiLimit = 180 * time.Second
)

const (
	// shellLimit bounds the wait for the shell's answer, behind the ready line.
	shellLimit = 20 * time.Second
	// shellRepeat is when the question is put again: a shell that starts may
	// flush what was typed before.
	shellRepeat = 4 * time.Second
	// settle is the least time between the ready line and the screenshot, so
	// that the screen shows the shell, too.
	settle = 1500 * time.Millisecond
	// screenRepeat is how often a screen is read while a boot loader may run.
	screenRepeat = 3 * time.Second
	// otherLimit is the time that is left, from its first line on, to a kernel
	// that seems to be of another system than was to boot.
	otherLimit = 40 * time.Second
	// lastWords is how long a failing machine may go on, for what it says next
	// is often the cause.
	lastWords = 700 * time.Millisecond
	// quitLimit is when a QEMU that was asked to quit is killed.
	quitLimit = 5 * time.Second
	// monitorLimit bounds one question to QEMU itself.
	monitorLimit = 20 * time.Second

	maxConsoleLog = 4 << 20
)

// Expect is what a machine that boots is to show.
type Expect struct {
	Build string // what its ready line says
	Shell bool   // the serial console then gives a shell, without a password
	// Content is how many bytes the system unpacks into memory: what is larger
	// than a small system is given more time.
	Content int64
	// Local says that Disk is a PC's own, with other systems on it, and that
	// the entry's command line has memlinux.build=Build: a kernel with another
	// command line is the boot's failure.
	Local bool
	// Foreign says that the disk holds a system that is not ours and has no ready
	// line: it is enough that the firmware hands over and something of the disk goes on. Of
	// the rest only Extra counts then.
	Foreign bool
	// Extra is time on top of the usual: what the boot loader's menu waits for
	// a person.
	Extra time.Duration
}

// mostPatience bounds what one proof may take, whatever its system says that it
// unpacks.
const mostPatience = 30 * time.Minute

// contentRate is what of a system is loaded, unpacked and started in a second,
// in bytes, at the very least. Measured without KVM on two loaded cores: 4 MiB.
const contentRate = 1 << 20

// Prove boots m and watches its serial line until it prints
//
//	memlinux: ready build=<buildID> ram=<N> MiB
//
// Then it asks the shell there, if there is to be one, for a sum, takes a
// screenshot and ends the machine. A foreign system is watched until it asks for a login, or
// for a while after its last sign of life. progress, if not nil, is called with each Stage as it is reached.
//
// A machine that does not boot is a Verdict with a Reason and no error. An
// error means that nothing was proven either way: a [*MissingError], a Machine
// that can't be run, or ctx's.
func Prove(ctx context.Context, m Machine, want Expect, progress func(stage string)) (Verdict, error) {
	v := Verdict{Firmware: m.Firmware}
	if err := m.validate(); err != nil {
		return v, err
	}
	if m.Firmware == BIOS && m.Kernel == nil && m.Disk != nil && m.SectorSize == 4096 {
		v.Skipped = true
		v.Reason = "PC BIOS can't boot disks with 4096-byte sectors; UEFI can"
		return v, nil
	}
	if progress == nil {
		progress = func(string) {}
	}
	begin, limit := time.Now(), patience(m.Firmware, want)
	v, err := prove(ctx, m, want, limit, progress)
	if err == nil && !v.OK && strings.Contains(v.Reason, timerPanic) {
		v, err = prove(ctx, m, want, min(limit, mostPatience-time.Since(begin)), progress)
	}
	if err != nil {
		return v, fmt.Errorf("prove %s: %w", m.Firmware, err)
	}
	return v, nil
}

// timerPanic is Linux's complaint about an emulated machine that got no processor
// time just when its timer was tried: it tells of the load here, and nothing of
// the disk. It is tried once more.
const timerPanic = "IO-APIC + timer doesn't work"

// patience is how long the boot may take until its ready line.
func patience(fw Firmware, want Expect) time.Duration {
	limit := biosLimit
	if fw == UEFI {
		limit = uefiLimit
	}
	unpacking := time.Duration(min(want.Content/contentRate, int64(mostPatience/time.Second))) * time.Second
	return min(limit+unpacking+want.Extra, mostPatience)
}

func prove(ctx context.Context, m Machine, want Expect, limit time.Duration, progress func(string)) (Verdict, error) {
	v := Verdict{Firmware: m.Firmware, Accelerator: "tcg"}
	log, err := createAnew(filepath.Join(m.Dir, string(m.Firmware)+"-console.log"))
	if err != nil {
		return v, err
	}
	defer log.Close()
	screen, err := createAnew(filepath.Join(m.Dir, string(m.Firmware)+"-screen.png"))
	if err != nil {
		return v, err
	}
	defer screen.Close()

	vm, err := launch(ctx, m, screen)
	if err != nil {
		os.Remove(log.Name())
		os.Remove(screen.Name())
		return v, err
	}
	defer vm.close()
	v.QEMUVersion = vm.monitor.Version().String()
	if vm.kvm {
		v.Accelerator = "kvm"
	}
	v.ConsoleLog = log.Name()

	w := watch{vm: vm, detector: detector{buildID: want.Build, local: want.Local, foreign: want.Foreign}, log: log, progress: progress}
	listening, stop := context.WithCancel(ctx)
	defer stop()
	w.listen(listening)
	if want.Foreign {
		v.Reason, err = w.untilStarted(ctx, limit)
		v.Reached = w.detector.foreignReached()
	} else {
		v.Reason, err = w.untilReady(ctx, limit)
	}
	if err == nil && v.Reason == "" {
		v.OK = true
		if want.Shell {
			err = w.askShell(ctx)
		} else {
			_, err = w.takeFor(ctx, settle, never)
		}
	}
	d := &w.detector
	v.ToGRUB, v.ToKernel, v.ToReady = d.toGRUB.Seconds(), d.toKernel.Seconds(), d.toReady.Seconds()
	v.RAMMiB, v.Shell = d.ramMiB, d.shell
	if err != nil {
		os.Remove(screen.Name())
		return v, err
	}
	if w.logErr != nil {
		return v, fmt.Errorf("write the console's log: %w", w.logErr)
	}

	// A screenshot shows a person more; no verdict hangs on it.
	if vm.screenshot(ctx, screen.Name()) == nil {
		v.Screenshot = screen.Name()
	} else {
		os.Remove(screen.Name())
	}
	vm.quit(ctx)
	return v, ctx.Err()
}

// createAnew makes an empty file, not following a link that is there. Whoever
// can enter the folder may read it: there is nothing secret on the screen of a
// machine that boots a stick.
func createAnew(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644) //nolint:gosec // readable on purpose
}

// watch is the following of one machine's lines.
type watch struct {
	vm       *VM
	detector detector
	log      *os.File
	logged   int
	logErr   error
	progress func(string)
	stage    string
	portions <-chan portion // closed when the machine has ended
}

// portion is what one read brought.
type portion struct {
	firmware bool // from the firmware's log, not the serial line
	data     []byte
	at       time.Duration
}

// listen reads both lines until they end or ctx does.
func (w *watch) listen(ctx context.Context) {
	portions := make(chan portion)
	w.portions = portions
	var readers sync.WaitGroup
	read := func(f *os.File, firmware bool) {
		for {
			buf := make([]byte, 16<<10)
			n, err := f.Read(buf)
			if n > 0 {
				select {
				case portions <- portion{firmware, buf[:n], time.Since(w.vm.started)}:
				case <-ctx.Done():
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	readers.Go(func() { read(w.vm.console, false) })
	readers.Go(func() { read(w.vm.firmwareLog, true) })
	go func() {
		readers.Wait()
		close(portions)
	}()
}

// take lets log and detector see one portion, and reports a new stage.
func (w *watch) take(p portion) {
	if p.firmware {
		w.detector.feedFirmware(p.data)
	} else {
		w.detector.feedSerial(p.data, p.at)
		n := min(len(p.data), maxConsoleLog-w.logged)
		if n > 0 && w.logErr == nil {
			_, w.logErr = w.log.Write(p.data[:n])
		}
		w.logged += n
	}
	w.report()
}

func (w *watch) report() {
	if s := w.detector.stage(); s != w.stage {
		w.stage = s
		w.progress(s)
	}
}

// takeFor takes what comes until enough says so, the time is over or the
// machine has ended; in these cases it returns true, true and false.
func (w *watch) takeFor(ctx context.Context, d time.Duration, enough func() bool) (alive bool, err error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for !enough() {
		select {
		case p, ok := <-w.portions:
			if !ok {
				return false, ctx.Err()
			}
			w.take(p)
		case <-timer.C:
			return true, nil
		case <-ctx.Done():
			return true, ctx.Err()
		}
	}
	return true, nil
}

func never() bool { return false }

// untilReady returns "" when the ready line was seen, or why it won't be.
func (w *watch) untilReady(ctx context.Context, limit time.Duration) (reason string, err error) {
	w.report()
	d := &w.detector
	decided := func() bool { return d.toReady != 0 || d.failure != "" }
	begin, alive := time.Now(), true
	for end := begin.Add(limit); alive && !decided() && time.Now().Before(end); {
		if alive, err = w.takeFor(ctx, min(screenRepeat, time.Until(end)), decided); err != nil {
			return "", err
		}
		// A boot loader may say on the screen alone why it does not go on.
		if alive && !decided() && d.toKernel == 0 {
			if err := w.readScreen(ctx); err != nil {
				return "", err
			}
		}
		switch last := w.vm.started.Add(d.toKernel + otherLimit); {
		case d.other && d.login:
			end = time.Now()
		case d.other && last.Before(end):
			end = last
		}
	}
	switch {
	case d.toReady != 0:
		return "", nil
	case d.failure != "":
		if _, err := w.takeFor(ctx, lastWords, never); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s; %s", d.verdict(), d.quote()), nil
	case !alive:
		return fmt.Sprintf("%s; the boot came as far as %s; %s", w.vm.end(), d.reached(), d.quote()), nil
	}
	return d.timedOut(limit), nil
}

// readScreen lets the detector see the text screen. A machine that has just
// ended has none, which is no error: the lines' end tells of it.
func (w *watch) readScreen(ctx context.Context) error {
	if w.vm.screen == nil {
		return nil
	}
	if lines, err := w.vm.readScreen(ctx); err == nil {
		w.detector.feedScreen(lines)
	}
	return ctx.Err()
}

// askShell asks on the serial line for a sum until it is answered or it is
// clear that nobody does.
func (w *watch) askShell(ctx context.Context) error {
	ready := time.Now()
	answered := func() bool { return w.detector.shell }
	for alive := true; alive && !answered() && time.Since(ready) < shellLimit; {
		// A guest that does not read must not stop us; an error shows in alive.
		_ = w.vm.console.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = w.vm.console.WriteString(shellQuestion + "\n")
		var err error
		if alive, err = w.takeFor(ctx, shellRepeat, answered); err != nil {
			return err
		}
	}
	_, err := w.takeFor(ctx, settle-time.Since(ready), never)
	return err
}

// end says how the machine ended by itself.
func (vm *VM) end() string {
	err := vm.Wait()
	if reason := vm.shutdown.Load(); reason != nil {
		switch *reason {
		case "guest-reset":
			return "the machine reset itself"
		case "guest-shutdown":
			return "the machine powered itself off"
		}
		return "the machine ended (" + *reason + ")"
	}
	if err != nil {
		return "QEMU ended: " + err.Error()
	}
	return "QEMU ended"
}

// quit ends the machine in order, by force if it takes too long.
func (vm *VM) quit(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, quitLimit)
	defer cancel()
	if _, err := vm.monitor.Run(ctx, "quit", nil); err != nil {
		return // close kills
	}
	select {
	case <-vm.process.done:
	case <-ctx.Done():
	}
}
