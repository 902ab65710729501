package testvm

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// seen is what a test wants to have been detected.
type seen struct {
	Stage, Failure string
	RAM            int
	Shell          bool
}

func look(d *detector) seen { return seen{d.stage(), d.failure, d.ramMiB, d.shell} }

const ready = "memlinux: ready build=abc123 ram=470 MiB"

func TestDetector(t *testing.T) {
	for name, c := range map[string]struct {
		serial, firmware string
		want             seen
	}{
		"silence is the firmware":                  {want: seen{Stage: StageFirmware}},
		"a GRUB menu painted with cursor moves":    {serial: "\x1b[H\x1b[J\x1b[1;1H\x1b[?25l\x1b[m\x1b[2;24HGNU GRUB  version 2.06\n\r", want: seen{Stage: StageGRUB}},
		"GRUB without a menu":                      {serial: "\x1b[H\x1b[J  Booting `memlinux test'\n\r", want: seen{Stage: StageGRUB}},
		"UEFI's mirror says it twice":              {serial: "\x1b[37m\x1b[40m    Booting `a'Booting `a'\n\r\n\r", want: seen{Stage: StageGRUB}},
		"colour in the middle of a sign":           {serial: "GNU\x1b[0m \x1b[37;40mGRUB", want: seen{Stage: StageGRUB}},
		"a title with an OSC string":               {serial: "\x1b]0;Kernel panic\x07Linux version 6.1", want: seen{Stage: StageKernel}},
		"kernel":                                   {serial: "\r\n[    0.000000] Linux version 6.1.0-56-cloud-amd64\r\n", want: seen{Stage: StageKernel}},
		"ready":                                    {serial: "Linux version 6\r\n" + ready + "\r\n", want: seen{Stage: StageReady, RAM: 470}},
		"ready before any GRUB":                    {serial: ready, want: seen{Stage: StageReady, RAM: 470}},
		"ready behind a kernel message":            {serial: "[    1.2] usb 1-1: new device " + ready + "\r\n", want: seen{Stage: StageReady, RAM: 470}},
		"a ready line that is not finished":        {serial: "memlinux: ready build=abc123 ram=470", want: seen{Stage: StageFirmware}},
		"another build's ready line":               {serial: "memlinux: ready build=abc1234 ram=1 MiB", want: seen{Stage: StageFirmware, Failure: "booted build abc1234, expected abc123"}},
		"a build ID is no pattern":                 {serial: "memlinux: ready build=abc.23 ram=1 MiB", want: seen{Stage: StageFirmware, Failure: "booted build abc.23, expected abc123"}},
		"the ready line in the kernel's arguments": {serial: "Command line: memlinux: ready build=X\r\n ram=1 MiB\r\n", want: seen{Stage: StageFirmware}},
		"the answer, not the question's echo":      {serial: ready + "\r\n/ # " + shellQuestion + "\r\n", want: seen{Stage: StageReady, RAM: 470}},
		"shell":                                    {serial: ready + "\r\n/ # " + shellQuestion + "\r\n" + shellAnswer + "\r\n", want: seen{Stage: StageReady, RAM: 470, Shell: true}},
		"no answer before the question":            {serial: shellAnswer + "\r\n" + ready, want: seen{Stage: StageReady, RAM: 470}},
		"trouble behind the ready line is later":   {serial: ready + "\r\nKernel panic - not syncing", want: seen{Stage: StageReady, RAM: 470}},
		"panic":                                    {serial: "Linux version 6\r\n[ 1.0] Kernel panic - not syncing: VFS", want: seen{Stage: StageKernel, Failure: "the kernel panicked"}},
		"a failure stays, whatever follows":        {serial: "Kernel panic\r\n" + ready, want: seen{Stage: StageFirmware, Failure: "the kernel panicked"}},
		"partial initramfs, and Linux goes on":     {serial: "Linux version 6\r\nInitramfs unpacking failed: write error\r\n" + ready, want: seen{Stage: StageKernel, Failure: "the kernel could not unpack the initramfs: it is damaged, or too large for the machine's memory"}},
		"an /init that can't run":                  {serial: "Failed to execute /init (error -2)\r\n", want: seen{Stage: StageFirmware, Failure: "the kernel could not run /init of the initramfs"}},
		"a volume that is not there":               {serial: "\x1b[1;1Herror: no such device: CAFE-0001.\n\r", want: seen{Stage: StageFirmware, Failure: "GRUB did not find the volume that it searched for"}},
		"a kernel that is not there":               {serial: "  Booting `x'\n\r\n\rerror: couldn't load file /vmlinuz.\n\rerror: you need to load the kernel first.\n\r", want: seen{Stage: StageGRUB, Failure: "GRUB could not load the kernel"}},
		"GRUB's rescue prompt":                     {serial: "GRUB loading.\n\rEntering rescue mode...\n\rgrub rescue> ", want: seen{Stage: StageFirmware, Failure: "GRUB did not find its modules and fell back to its rescue prompt"}},
		"GRUB's prompt":                            {serial: "GNU GRUB\n\r\n\rgrub> ", want: seen{Stage: StageGRUB, Failure: "GRUB found no menu and shows its prompt"}},
		"GRUB's prompt inside a line is no prompt": {serial: "GNU GRUB\n\ra title with grub> in it", want: seen{Stage: StageGRUB}},
		"UEFI finds nothing":                       {serial: "\x1b[01;01HUEFI Interactive Shell v2.2\r\n", want: seen{Stage: StageFirmware, Failure: "the firmware found nothing to boot on the disk"}},
		"GRUB Legacy's error":                      {serial: "\x1b[5;1HError 15: File not found\r\n", want: seen{Stage: StageFirmware, Failure: "GRUB could not boot the entry"}},
		"an error behind the kernel is another's":  {serial: "Linux version 6\r\nError 15: x\r\n", want: seen{Stage: StageKernel}},
		"a stick may boot with any command line":   {serial: "Linux version 6\r\nCommand line: quiet\r\n" + ready, want: seen{Stage: StageReady, RAM: 470}},
		"BIOS finds nothing":                       {firmware: "Booting from Hard Disk...\nBoot failed: not a bootable disk\n\nNo bootable device.\n", want: seen{Stage: StageFirmware, Failure: "the firmware found nothing to boot on the disk"}},
		"the firmware's log can't say ready":       {firmware: ready + "\n", want: seen{Stage: StageFirmware}},
		"random bytes without line ends":           {serial: strings.Repeat("\xffx\x1b[", 5000) + "m" + ready, want: seen{Stage: StageReady, RAM: 470}},
	} {
		t.Run(name, func(t *testing.T) {
			whole, bytewise := detector{buildID: "abc123"}, detector{buildID: "abc123"}
			whole.feedFirmware([]byte(c.firmware))
			whole.feedSerial([]byte(c.serial), time.Second)
			for _, b := range []byte(c.firmware) {
				bytewise.feedFirmware([]byte{b})
			}
			for _, b := range []byte(c.serial) {
				bytewise.feedSerial([]byte{b}, time.Second)
			}
			if d := cmp.Diff(c.want, look(&whole)); d != "" {
				t.Errorf("fed at once (-want +got)\n%s", d)
			}
			if d := cmp.Diff(c.want, look(&bytewise)); d != "" {
				t.Errorf("fed byte by byte (-want +got)\n%s", d)
			}
		})
	}
}

// TestDetectorLocal is of a PC's own disk, with other systems on it.
func TestDetectorLocal(t *testing.T) {
	const version = "[    0.000000] Linux version 6.1.0-18-amd64 (x@y) (gcc 12)\r\n"
	const cmdline = "[    0.000000] Command line: BOOT_IMAGE=/vmlinuz console=ttyS0 "
	long := strings.Repeat("x", maxLine)
	for name, c := range map[string]struct {
		serial, firmware string
		screen           []string
		want             string // verdict and quote, or what a time-out says
	}{
		"our entry, a time-out":              {serial: version + cmdline + "memlinux.build=abc123 a\r\n", want: "no ready line within 2m0s; the boot came as far as the kernel; the console's last lines: [    0.000000] Linux version 6.1.0-18-amd64 (x@y) (gcc 12) | [    0.000000] Command line: BOOT_IMAGE=/vmlinuz console=ttyS0 memlinux.build=abc123 a"},
		"another system":                     {serial: version + cmdline + "root=/dev/sda1 ro\r\n", want: otherSystem + ": Linux version 6.1.0-18-amd64; the console's last lines: "},
		"another entry of ours":              {serial: version + cmdline + "memlinux.build=abc1234\r\n", want: otherSystem + ": Linux version 6.1.0-18-amd64; "},
		"a command line that is not whole":   {serial: version + cmdline + "memlinux.bui", want: "no ready line"},
		"a command line that is cut":         {serial: version + cmdline + long + " memlinux.build=abc123\r\n", want: "no ready line"},
		"a command line in a menu":           {serial: "Command line: root=/dev/sda1\r\n", want: "no ready line"},
		"a command line that misses bytes":   {serial: version + cmdline + "memlild=abc123\r\n[    0.1] Kernel command line: a memlinux.build=abc123\r\n", want: "no ready line"},
		"the other one that misses bytes":    {serial: version + cmdline + "memlinux.build=abc123\r\n[    0.1] Kernel command line: a memlild=abc123\r\n", want: "no ready line"},
		"a login that settles it":            {serial: version + cmdline + "root=/dev/sda1 ro\r\npc login: ", want: otherSystem + ": Linux version 6.1.0-18-amd64; "},
		"a login of a silent kernel":         {serial: "\r\nDebian GNU/Linux 12 pc ttyS0\r\n\r\npc login: ", want: otherSystem + ": it asks for a login; the console's last lines: Debian GNU/Linux 12 pc ttyS0 | pc login:"},
		"a login of our own entry":           {serial: version + cmdline + "memlinux.build=abc123\r\npc login: ", want: "no ready line"},
		"a search for another disk's volume": {serial: "error: no such device: 1234.\r\n", want: "no ready line"},
		"silence, and the screen":            {firmware: "x\nBooting from Hard Disk...\nVBE mode info request: 100\n", screen: []string{"GNU GRUB", "error: file `/a' not found."}, want: "no ready line within 2m0s; the boot came as far as the boot loader; the console's last lines: Booting from Hard Disk...; the screen says: GNU GRUB | error: file `/a' not found."},
		"nothing at all":                     {want: "no ready line within 2m0s; the boot came as far as the firmware; the console stayed empty"},
		"a dead end on the screen":           {screen: []string{"error: file `/a' not found.", "error: you need to load the kernel first.", "Press any key to continue..."}, want: "GRUB could not load the kernel: error: you need to load the kernel first.; the console stayed empty; the screen says: error: file `/a' not found. | error: you need to load the kernel first. | Press any key to continue..."},
		"a missing volume on the screen":     {screen: []string{"error: no such device: 1234."}, want: "no ready line"},
		"GRUB's prompt on the screen":        {screen: []string{"Minimal BASH-like line editing is supported.", "grub>"}, want: "GRUB found no menu and shows its prompt: grub>; "},
		"GRUB Legacy's error on the screen":  {screen: []string{"Booting 'x'", "Error 17: Cannot mount selected partition", "Press any key to continue..."}, want: "GRUB could not boot the entry: Error 17: Cannot mount selected partition; "},
		"a screen behind the kernel's start": {serial: version, screen: []string{"Error 17: Cannot mount selected partition"}, want: "no ready line within 2m0s; the boot came as far as the kernel; the console's last lines: [    0.000000] Linux version 6.1.0-18-amd64 (x@y) (gcc 12)"},
		"UEFI's complaint stays":             {serial: "BdsDxe: failed to load Boot0000 \"x\": Not Found\r\nBdsDxe: starting Boot0001 \"y\"\r\n", want: "no ready line within 2m0s; the boot came as far as the boot loader; the console's last lines: BdsDxe: failed to load Boot0000 \"x\": Not Found | BdsDxe: starting Boot0001 \"y\""},
	} {
		t.Run(name, func(t *testing.T) {
			d := detector{buildID: "abc123", local: true}
			d.feedFirmware([]byte(c.firmware))
			d.feedSerial([]byte(c.serial), time.Second)
			d.feedScreen(c.screen)
			got := d.timedOut(2 * time.Minute)
			if d.failure != "" {
				got = d.verdict() + "; " + d.quote()
			}
			if !strings.HasPrefix(got, c.want) || strings.HasSuffix(c.want, ".") && got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestScreenLines(t *testing.T) {
	for name, c := range map[string]struct {
		rows []string
		want []string
	}{
		"an empty screen":                   {nil, nil},
		"empty rows and indents":            {[]string{"", "  GNU GRUB  version 2.06", "", "error: x."}, []string{"GNU GRUB  version 2.06", "error: x."}},
		"a frame":                           {[]string{"\xda\xc4\xc4\xbf", "\xb3*old \xb3"}, []string{"*old"}},
		"a row that is full goes on":        {[]string{strings.Repeat("a", screenColumns), "b", "c"}, []string{strings.Repeat("a", screenColumns) + "b", "c"}},
		"the last row is full":              {append(make([]string, 24), strings.Repeat("z", screenColumns)), []string{strings.Repeat("z", screenColumns)}},
		"a graphics mode has no text":       {slices.Repeat([]string{strings.Repeat("\xff", screenColumns)}, 25), nil},
		"escape sequences are no sequences": {[]string{"a\x1b[2Jb"}, []string{"a [2Jb"}},
	} {
		t.Run(name, func(t *testing.T) {
			memory := make([]byte, screenBytes)
			for i, r := range c.rows {
				for j := range len(r) {
					memory[(i*screenColumns+j)*2], memory[(i*screenColumns+j)*2+1] = r[j], 'A' // a colour
				}
			}
			if d := cmp.Diff(c.want, screenLines(memory)); d != "" {
				t.Error(d)
			}
		})
	}
}

func FuzzScreen(f *testing.F) {
	f.Add([]byte("e\x07r\x07r\x07"))
	f.Add(make([]byte, screenBytes))
	f.Fuzz(func(t *testing.T, memory []byte) {
		lines := screenLines(memory)
		d := detector{buildID: "abc123", local: true}
		d.feedScreen(lines)
		for _, l := range append(lines, d.quote()) {
			if l == "" || l != printable(l) {
				t.Errorf("line %q", l)
			}
		}
	})
}

func TestDetectorTimes(t *testing.T) {
	d := detector{buildID: "abc123"}
	d.feedSerial([]byte("GNU GR"), 1*time.Second)
	d.feedSerial([]byte("UB\r\n"), 2*time.Second)
	d.feedSerial([]byte("Booting `x'\r\nLinux version 6\r\nmemlinux: rea"), 3*time.Second)
	d.feedSerial([]byte("Linux version 6\r\n"+ready), 4*time.Second)
	got := []time.Duration{d.toGRUB, d.toKernel, d.toReady}
	if diff := cmp.Diff([]time.Duration{2 * time.Second, 3 * time.Second, 4 * time.Second}, got); diff != "" {
		t.Errorf("the first sign counts, when it is whole (-want +got)\n%s", diff)
	}
}

func TestQuote(t *testing.T) {
	for name, c := range map[string]struct{ serial, want string }{
		"nothing":                 {"\r\n\x1b[2J", "the console stayed empty"},
		"only the last lines":     {"1\n2\n3\n4\n5\n6\n7\n8", "the console's last lines: 2 | 3 | 4 | 5 | 6 | 7 | 8"},
		"no control, C1, invalid": {"a\x00\x08\u009b\xff\u202eb\n", "the console's last lines: ab"},
		"empty lines don't count": {"a\n\n  \r\n\x1b[5;5H\nb\n", "the console's last lines: a | b"},
	} {
		t.Run(name, func(t *testing.T) {
			var d detector
			d.feedSerial([]byte(c.serial), time.Second)
			if got := d.quote(); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestVerdictShowsTheLineThatSaysIt(t *testing.T) {
	for name, c := range map[string]struct{ serial, want string }{
		"a panic and what follows it": {"a\n[ 1.0] Kernel panic - not syncing: VFS\r\nb\nc\n", "the kernel panicked: [ 1.0] Kernel panic - not syncing: VFS"},
		"a line that has no end yet":  {"Kernel panic - not", "the kernel panicked"},
		"a line of great length":      {"Kernel panic" + strings.Repeat("x", 500) + "\n", "the kernel panicked: Kernel panic" + strings.Repeat("x", maxQuote-12)},
	} {
		t.Run(name, func(t *testing.T) {
			var d detector
			d.feedSerial([]byte(c.serial), time.Second)
			if got := d.verdict(); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// FuzzDetector holds the detector to what its user relies on: portions don't
// matter, memory is bounded, and nothing unprintable reaches a person.
func FuzzDetector(f *testing.F) {
	for _, s := range []string{"", ready, "\x1b[2;24HGNU GRUB\r\nLinux version \n" + ready, "\x1b]0;x\x1b\\grub> ", "\x1b(B\x1b[31", "memlinux: ready build=x ram=1 MiB"} {
		f.Add([]byte(s), 3, false)
	}
	f.Add([]byte("Linux version 6.1 x\r\nCommand line: a memlinux.build=abc\r\npc login: "), 30, true)
	f.Fuzz(func(t *testing.T, p []byte, cut int, local bool) {
		cut = max(0, min(cut, len(p)))
		whole, parts := detector{buildID: "abc123", local: local}, detector{buildID: "abc123", local: local}
		whole.feedSerial(p, time.Second)
		parts.feedSerial(p[:cut], time.Second)
		parts.feedSerial(p[cut:], time.Second)
		if d := cmp.Diff(look(&whole), look(&parts)); d != "" {
			t.Errorf("cut at %d it sees something else\n%s", cut, d)
		}
		for _, say := range []func(*detector) string{(*detector).quote, (*detector).verdict, func(d *detector) string { return d.timedOut(time.Minute) }} {
			if q := say(&whole); q != say(&parts) || q != printable(q) {
				t.Errorf("it says %q and %q", q, say(&parts))
			}
		}
		if len(whole.serial.line) >= maxLine || len(whole.last) > keepLines {
			t.Errorf("it keeps a line of %d bytes and %d lines", len(whole.serial.line), len(whole.last))
		}
	})
}

func TestMenuThatWaitsIsADeadEnd(t *testing.T) {
	grub2 := []string{"GNU GRUB  version 2.06", "*memlinux", "Press enter to boot the selected OS, `e' to edit the commands", "before booting or `c' for a command-line."}
	legacy := []string{"memlinux", "Press enter to boot the selected OS, 'e' to edit the", "commands before booting, or 'c' for a command-line."}
	counting := []string{"*memlinux", "Press enter to boot the selected OS, `e' to edit the commands", "before booting or `c' for a command-line.", "The highlighted entry will be executed automatically in 5s."}
	for _, c := range []struct {
		name    string
		screens [][]string
		dead    bool
	}{
		{"GRUB 2", [][]string{grub2, grub2, grub2}, true},
		{"GRUB Legacy", [][]string{legacy, legacy, legacy}, true},
		{"a countdown", [][]string{counting, counting, counting, counting}, false},
		{"it goes on", [][]string{grub2, grub2, {"Booting `memlinux'"}, grub2, grub2}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := &detector{buildID: testBuild, local: true}
			for _, lines := range c.screens {
				d.feedScreen(lines)
			}
			if dead := d.failure != ""; dead != c.dead {
				t.Errorf("failure %q", d.failure)
			}
		})
	}
}
