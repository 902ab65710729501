package testvm

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// The stages of a boot, as [Prove] reports them.
const (
	StageFirmware = "firmware" // QEMU runs
	StageGRUB     = "grub"     // the boot loader's menu, or its "Booting"
	StageKernel   = "kernel"   // the kernel's first line
	StageReady    = "ready"    // the ready line
)

// detector follows a boot by what the machine writes on its serial line. It
// takes bytes in any portions: only their order matters.
type detector struct {
	buildID string // what the ready line must say
	local   bool   // Expect.Local
	foreign bool   // Expect.Foreign

	toGRUB, toKernel, toReady time.Duration // since QEMU's start; 0: not seen
	ramMiB                    int
	failure                   string // why the boot can't succeed any more, or ""
	evidence                  string // the console's line that says so, once it is whole
	shell                     bool   // shellAnswer was seen after the ready line

	started bool   // the firmware started a boot loader
	version string // "Linux version 6.1.0-18-amd64"
	entered bool   // the kernel's command line is the entry's
	other   bool   // it seems to be another's
	login   bool   // a system asked for a login
	waits   bool   // a foreign boot loader's menu waits for a person

	serial, firmware stream
	last             []string // the last lines of both that were not empty
	screen           []string // the lines of the screen when it was last read
	waiting          int      // how many screens in a row showed a menu that waits for a key
}

// stream is one of the machine's lines.
type stream struct {
	stripper stripper
	line     []byte // the text line so far
}

const (
	// keepLines is how much of the console a failed proof quotes.
	keepLines = 6
	// maxLine cuts what has no line ends at all, such as random bytes.
	maxLine = 1024

	// maxQuote cuts a quoted line, in characters.
	maxQuote = 160

	shellQuestion = "echo memlinux-$((6*7))"
	shellAnswer   = "memlinux-42"
)

var readyLine = regexp.MustCompile(`memlinux: ready build=(\S+) ram=([0-9]{1,9}) MiB`)

// stages by what is seen first of them. A stage that is seen passes the ones
// before it: a menu may be switched off, or shown on the screen alone.
var (
	grubSigns  = []string{"GNU GRUB", "Booting `", "Welcome to GRUB!"}
	kernelSign = "Linux version "
)

const (
	// cmdlineSign is in the kernel's second line, as "Command line: ", and in a
	// later one, as "Kernel command line: ".
	cmdlineSign = "ommand line: "
	// loginSign is at the end of what getty prints.
	loginSign = "login:"
)

// The firmwares say that they hand over to a boot loader: SeaBIOS in its log,
// OVMF on the serial line.
const (
	biosStarts = "Booting from "
	uefiStarts = "BdsDxe: starting Boot"
)

// deadEnds are the words after which no boot succeeds, and what they mean.
var deadEnds = []struct{ sign, meaning string }{
	{"No bootable device", "the firmware found nothing to boot on the disk"},
	{"No bootable option or device was found", "the firmware found nothing to boot on the disk"},
	{"UEFI Interactive Shell v", "the firmware found nothing to boot on the disk"},
	{"grub rescue>", "GRUB did not find its modules and fell back to its rescue prompt"},
	{noSuchDevice, "GRUB did not find the volume that it searched for"},
	{"error: you need to load the kernel first", "GRUB could not load the kernel"},
	{"error: out of memory", "GRUB ran out of memory"},
	{"Initramfs unpacking failed", "the kernel could not unpack the initramfs: it is damaged, or too large for the machine's memory"},
	{"Failed to execute /init", "the kernel could not run /init of the initramfs"},
	{"Kernel panic", "the kernel panicked"},
	{"was unpacked; add memory", "the system did not fit into the machine's memory"},
	{"its initramfs is damaged; write it again", "the system's initramfs is damaged"},
}

// noSuchDevice is a search that fails. It leaves $root alone, so that a stick
// can still boot by luck: here it is the only disk, at its PC it is not. On a
// PC's own disk it is no dead end: what was searched for may have been a font.
const noSuchDevice = "error: no such device"

// legacyError is GRUB Legacy's complaint at the start of a line.
var legacyError = regexp.MustCompile(`^Error [0-9]{1,2}: `)

// grubPrompt alone at the start of a line is GRUB without a menu.
const grubPrompt = "grub>"

// feedSerial takes bytes of the serial line that arrived at, since QEMU's start.
func (d *detector) feedSerial(p []byte, at time.Duration) {
	d.feed(&d.serial, p, func() { d.matchSerial(at) })
}

// feedScreen takes what the screen says, which has no order in time: only a
// boot that ended shows on it.
func (d *detector) feedScreen(lines []string) {
	d.screen = lines
	if !waitsForKey(lines) {
		d.waiting = 0
	} else if d.waiting++; d.foreign {
		d.waits = d.waiting >= waitingLimit
	} else if d.waiting == waitingLimit && d.failure == "" && d.toKernel == 0 {
		d.failure = "the boot loader shows its menu and waits for a person: the entry that it was to boot by itself is not there, or did not start"
	}
	for _, l := range lines {
		if d.failure != "" || d.toKernel != 0 {
			return
		}
		for _, e := range deadEnds {
			if strings.Contains(l, e.sign) {
				d.fail(e.sign, e.meaning)
			}
		}
		d.matchWhole(l)
		if d.failure != "" {
			d.evidence = l
		}
	}
}

// waitingLimit is how many screens in a row with a menu that waits are a dead
// end: one may be read in the moment before a countdown begins or ends.
const waitingLimit = 3

// waitsForKey reports whether a screen shows GRUB's menu, or GRUB Legacy's,
// without a countdown.
func waitsForKey(lines []string) bool {
	text := strings.Join(lines, " ")
	return (strings.Contains(text, "to edit the commands before booting") || strings.Contains(text, "'e' to edit the commands")) &&
		!strings.Contains(text, "automatically in")
}

// feedFirmware takes bytes of SeaBIOS's debug port, where it says what it says
// on the screen; on the serial line it says nothing. Behind the firmware, it
// only tells of video modes.
func (d *detector) feedFirmware(p []byte) {
	if d.stage() == StageFirmware {
		d.feed(&d.firmware, p, func() {
			if !d.started && endsWith(d.firmware.line, biosStarts) {
				d.started = true
				d.last = nil // maps of memory and the like, which cause nothing
			}
			d.matchDeadEnds(d.firmware.line)
		})
	}
}

func (d *detector) feed(s *stream, p []byte, match func()) {
	for _, c := range p {
		switch c = s.stripper.strip(c); c {
		case 0:
		case '\n':
			if s == &d.serial {
				d.matchLine(string(s.line))
			}
			d.endLine(s)
		default:
			s.line = append(s.line, c)
			match()
			if len(s.line) == maxLine {
				d.endLine(s)
			}
		}
	}
}

func (d *detector) endLine(s *stream) {
	text := quotable(s.line)
	if s == &d.firmware && strings.HasPrefix(text, "VBE ") {
		text = "" // of its services for video modes, which a boot loader uses
	}
	if text != "" {
		if d.failure != "" && d.evidence == "" {
			d.evidence = text
		}
		d.last = append(d.last, text)
		if len(d.last) > keepLines {
			d.last = d.last[1:]
		}
	}
	s.line = s.line[:0]
}

// endsWith looks at what the newest byte of a line completes.
func endsWith(line []byte, sign string) bool {
	return line[len(line)-1] == sign[len(sign)-1] && bytes.HasSuffix(line, []byte(sign))
}

func (d *detector) matchSerial(at time.Duration) {
	line := d.serial.line
	if d.foreign {
		d.matchForeign(line, at)
		return
	}
	if d.toReady != 0 {
		d.shell = d.shell || endsWith(line, shellAnswer)
		return
	}
	if d.toGRUB == 0 && d.toKernel == 0 {
		for _, sign := range grubSigns {
			if endsWith(line, sign) {
				d.toGRUB = at
			}
		}
	}
	if d.toKernel == 0 && endsWith(line, kernelSign) {
		d.toKernel = at
	}
	d.started = d.started || endsWith(line, uefiStarts)
	d.login = d.login || endsWith(line, loginSign)
	d.matchDeadEnds(line)
	if d.failure == "" && endsWith(line, " MiB") {
		if m := readyLine.FindSubmatch(line); m != nil {
			if got := string(m[1]); got != d.buildID {
				d.failure = fmt.Sprintf("booted build %s, expected %s", printable(got), d.buildID)
				return
			}
			d.ramMiB, _ = strconv.Atoi(string(m[2])) // nine digits at most
			d.toReady = at
		}
	}
}

// matchDeadEnds looks at what the newest byte of either stream completes.
func (d *detector) matchDeadEnds(line []byte) {
	for _, e := range deadEnds {
		if endsWith(line, e.sign) {
			d.fail(e.sign, e.meaning)
		}
	}
	if string(line) == grubPrompt {
		d.matchWhole(grubPrompt)
	}
}

// matchLine looks at a line of the serial console that is whole.
func (d *detector) matchLine(line string) {
	if d.toReady != 0 {
		return
	}
	d.matchWhole(line)
	if i := strings.Index(line, kernelSign); i >= 0 && d.version == "" {
		words := strings.Fields(line[i:]) // who compiled it, with what, follows
		d.version = quotable([]byte(strings.Join(words[:min(3, len(words))], " ")))
	}
	// Linux prints its command line twice, and gives up what the serial port
	// does not take in 10 ms: on a loaded machine any byte may be missing.
	if d.local && d.toKernel != 0 && strings.Contains(line, cmdlineSign) {
		d.entered = d.entered || slices.Contains(strings.Fields(line), "memlinux.build="+d.buildID)
		d.other = !d.entered
	}
}

// otherSystem is what a boot came to that chose another entry.
const otherSystem = "the machine booted, but not into this entry"

// matchWhole looks at a line of a boot loader.
func (d *detector) matchWhole(line string) {
	switch {
	case d.toKernel != 0:
	case line == grubPrompt:
		d.fail(grubPrompt, "GRUB found no menu and shows its prompt")
	case legacyError.MatchString(line):
		d.fail(line, "GRUB could not boot the entry")
	}
}

// fail notes the first failure.
func (d *detector) fail(sign, meaning string) {
	if d.failure == "" && (!d.local && !d.foreign || sign != noSuchDevice) {
		d.failure = meaning
	}
}

// stage is how far the boot came.
func (d *detector) stage() string {
	switch {
	case d.toReady != 0:
		return StageReady
	case d.toKernel != 0:
		return StageKernel
	case d.toGRUB != 0:
		return StageGRUB
	}
	return StageFirmware
}

// reached is how far the boot came, for a person.
func (d *detector) reached() string {
	switch stage := d.stage(); {
	case stage == StageKernel:
		return "the kernel"
	case stage == StageGRUB:
		return "GRUB"
	case d.started:
		return "the boot loader"
	}
	return "the firmware"
}

// timedOut says what was seen when limit was over, for a person.
func (d *detector) timedOut(limit time.Duration) string {
	switch {
	case d.other:
		return fmt.Sprintf("%s: %s; %s", otherSystem, d.version, d.quote())
	case d.local && d.login && !d.entered:
		return fmt.Sprintf("%s: it asks for a login; %s", otherSystem, d.quote())
	}
	return fmt.Sprintf("no ready line within %v; the boot came as far as %s; %s", limit, d.reached(), d.quote())
}

// verdict is the failure and the line that shows it, for a person.
func (d *detector) verdict() string {
	if d.evidence == "" {
		return d.failure
	}
	return d.failure + ": " + d.evidence
}

// quote is the console's last lines, for a person.
func (d *detector) quote() string {
	lines := d.last
	if text := quotable(d.serial.line); text != "" {
		lines = append(lines[:len(lines):len(lines)], text)
	}
	said := "the console stayed empty"
	if len(lines) > 0 {
		said = "the console's last lines: " + strings.Join(lines, " | ")
	}
	// A kernel that speaks on the serial line says there all that it says.
	// A GRUB that speaks on both says the same on both.
	if n := len(d.screen); n > 0 && d.toKernel == 0 && !slices.Contains(lines, d.screen[n-1]) {
		said += "; the screen says: " + strings.Join(d.screen[max(0, len(d.screen)-keepLines):], " | ")
	}
	return said
}

// quotable is a line as it is quoted, which has an end.
func quotable(line []byte) string {
	text := []rune(strings.TrimSpace(printable(string(line))))
	return string(text[:min(len(text), maxQuote)])
}

// printable drops what could move a terminal's cursor or worse.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s)
}

// stripper removes terminal control from a stream, byte by byte (ECMA-48):
// GRUB and UEFI paint the screen, and their text is interleaved with it.
type stripper struct {
	state stripState
}

type stripState int

const (
	stripText   stripState = iota
	stripEscape            // behind ESC
	stripCSI               // behind ESC [
	stripString            // in an OSC, DCS, SOS, PM or APC string
	stripStringEscape
	stripCharset // behind ESC and an intermediate byte
)

// strip returns c if it is text, '\n' if it ends a line or moves the cursor,
// and 0 if it is nothing.
func (s *stripper) strip(c byte) byte {
	const esc, bel, can, sub = 0x1b, 0x07, 0x18, 0x1a
	if c == can || c == sub { // both abort a sequence
		s.state = stripText
		return 0
	}
	switch s.state {
	case stripText:
		switch {
		case c == esc:
			s.state = stripEscape
		case c == '\n':
			return c
		case c >= 0x20 && c != 0x7f:
			return c
		}
	case stripEscape:
		switch {
		case c == '[':
			s.state = stripCSI
		case c == ']' || c == 'P' || c == 'X' || c == '^' || c == '_':
			s.state = stripString
		case c >= 0x20 && c < 0x30:
			s.state = stripCharset
		case c != esc:
			s.state = stripText
		}
	case stripCSI:
		switch {
		case c == esc:
			s.state = stripEscape
		case c == '\n':
			// Cut off by a reset or a kernel that takes over the line.
			s.state = stripText
			return c
		case c >= 0x40 && c < 0x7f:
			s.state = stripText
			switch c {
			case 'H', 'f', 'J', 'A', 'B', 'E', 'F', 'd': // another line
				return '\n'
			}
		}
	case stripString:
		switch c {
		case bel, '\n': // no string of ours has lines: it was cut off
			s.state = stripText
		case esc:
			s.state = stripStringEscape
		}
	case stripStringEscape: // ESC \ ends the string, and so does any other
		s.state = stripText
	case stripCharset:
		if c >= 0x30 {
			s.state = stripText
		}
	}
	return 0
}
