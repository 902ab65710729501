package testvm

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"
)

// How far a foreign system was seen, in Verdict.Reached.
const (
	ReachedLoader = "boot loader" // code of the disk runs, and reads on
	ReachedKernel = "kernel"      // Linux's first messages
	ReachedLogin  = "login"       // it asks for a login
)

// foreignQuiet is how long a foreign system may give no sign of life, which are text and
// reading from the disk: then no more is to be seen of it. Boot loaders count down from 10
// at most, seldom more. Tests have less.
var foreignQuiet = 25 * time.Second

const (
	// foreignKernel is how long a kernel is watched: for a panic, or a login.
	foreignKernel = 12 * time.Second
	// loaderReads is what a boot loader has read of the disk, in bytes, at the least. Firmware
	// reads a BIOS's boot sector alone, and a boot sector that only complains reads little more.
	loaderReads = 16 << 10
)

// loaderSigns are what boot loaders say, on the serial line or the screen of text.
var loaderSigns = append([]string{"SYSLINUX ", "ISOLINUX ", "EXTLINUX ", "PXELINUX ", "LILO ", "systemd-boot", "rEFInd", "Loading Linux", "Loading initial ramdisk", "BTX loader"}, grubSigns...)

// kernelSigns are what Linux says: with a serial console, from its EFI stub, from its real-mode
// code, and on the screen, where the first lines are gone soon.
var (
	kernelSigns = []string{kernelSign, "EFI stub: ", "Probing EDD", "Decompressing Linux"}
	kernelStamp = regexp.MustCompile(`^\[ {0,4}[0-9]{1,5}\.[0-9]{6}\] `)
)

// foreignDeadEnds are what boot sectors say that found nothing to go on with.
var foreignDeadEnds = []string{"Missing operating system", "Operating System not found", "Error loading operating system", "Invalid partition table",
	"This is not a bootable disk", "Non-System disk", "isolinux.bin missing or corrupt", "BOOTMGR is missing", "No DEFAULT or UI configuration directive found"}

// matchForeign looks at what the newest byte of the serial line completes.
func (d *detector) matchForeign(line []byte, at time.Duration) {
	d.started = d.started || endsWith(line, uefiStarts)
	d.login = d.login || endsWith(line, loginSign) || endsWith(line, "memlinux: ready")
	d.matchDeadEnds(line)
	d.matchForeignText(line, at, endsWith)
}

// matchForeignText looks for signs in a text.
func (d *detector) matchForeignText(text []byte, at time.Duration, has func(text []byte, sign string) bool) {
	for _, sign := range loaderSigns {
		if d.toGRUB == 0 && d.toKernel == 0 && has(text, sign) {
			d.toGRUB = at
		}
	}
	for _, sign := range kernelSigns {
		if d.toKernel == 0 && has(text, sign) {
			d.toKernel = at
		}
	}
	if d.toKernel == 0 && kernelStamp.Match(text) {
		d.toKernel = at
	}
	for _, sign := range foreignDeadEnds {
		if d.toKernel == 0 && has(text, sign) {
			d.fail(sign, "its boot code found no system")
		}
	}
}

// feedForeignScreen takes what the screen says at, since QEMU's start.
func (d *detector) feedForeignScreen(lines []string, at time.Duration) {
	d.feedScreen(lines)
	for _, l := range lines {
		failed := d.failure != ""
		d.matchForeignText([]byte(l), at, func(text []byte, sign string) bool { return bytes.Contains(text, []byte(sign)) })
		if !failed && d.failure != "" {
			d.evidence = l
		}
		d.login = d.login || strings.HasSuffix(l, " "+loginSign)
	}
}

// foreignReached is how far the boot was seen, or "".
func (d *detector) foreignReached() string {
	switch {
	case d.login:
		return ReachedLogin
	case d.toKernel != 0:
		return ReachedKernel
	case d.toGRUB != 0:
		return ReachedLoader
	}
	return ""
}

// untilStarted returns "" when something of the disk was seen to run, and nothing said
// that it failed; or why that is not so.
func (w *watch) untilStarted(ctx context.Context, limit time.Duration) (reason string, err error) {
	w.report()
	d := &w.detector
	decided := func() bool { return d.login || d.waits || d.failure != "" }
	begin, alive := time.Now(), true
	var read int64
	logged, alert := 0, begin // when there was the last sign of life
	for alive && !decided() && time.Since(begin) < limit {
		if alive, err = w.takeFor(ctx, screenRepeat/2, decided); err != nil {
			return "", err
		}
		if !alive || decided() {
			break
		}
		at := time.Since(w.vm.started)
		if lines, err := w.vm.readScreen(ctx); err == nil {
			d.feedForeignScreen(lines, at)
		}
		now, err := w.vm.bytesRead(ctx)
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		if err == nil && now != read || w.logged != logged {
			read, logged, alert = now, w.logged, time.Now()
		}
		// UEFI says that it starts a program of the disk; of a BIOS it takes more to know that
		// what it handed over to is alive.
		if d.toGRUB == 0 && d.toKernel == 0 && d.started && (w.vm.uefi || read >= loaderReads) {
			d.toGRUB = at
		}
		w.report()
		if d.toKernel != 0 && at >= d.toKernel+foreignKernel || d.started && time.Since(alert) >= foreignQuiet {
			break
		}
	}
	switch {
	case d.failure != "":
		if _, err := w.takeFor(ctx, lastWords, never); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s; %s", d.verdict(), d.quote()), nil
	case !alive && !d.login:
		return fmt.Sprintf("%s; the boot came as far as %s; %s", w.vm.end(), d.reached(), d.quote()), nil
	case d.foreignReached() != "":
		return "", nil
	case d.started:
		return "the firmware started the disk's boot code, and nothing was seen to come of it; " + d.quote(), nil
	}
	return fmt.Sprintf("the firmware did not start it within %v; %s", limit, d.quote()), nil
}

// bytesRead is how much the machine has read of its disk.
func (vm *VM) bytesRead(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, monitorLimit)
	defer cancel()
	answer, err := vm.monitor.Run(ctx, "query-blockstats", nil)
	if err != nil {
		return 0, err
	}
	var drives []struct {
		Device string `json:"device"`
		Stats  struct {
			Read int64 `json:"rd_bytes"`
		} `json:"stats"`
	}
	if err := json.Unmarshal(answer, &drives); err != nil {
		return 0, fmt.Errorf("QMP query-blockstats: %w", err)
	}
	for _, d := range drives {
		if d.Device == "disk" {
			return d.Stats.Read, nil
		}
	}
	return 0, fmt.Errorf("QMP query-blockstats: no disk")
}
