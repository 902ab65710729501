package testvm

import (
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
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, p []byte, cut int) {
		cut = max(0, min(cut, len(p)))
		whole, parts := detector{buildID: "abc123"}, detector{buildID: "abc123"}
		whole.feedSerial(p, time.Second)
		parts.feedSerial(p[:cut], time.Second)
		parts.feedSerial(p[cut:], time.Second)
		if d := cmp.Diff(look(&whole), look(&parts)); d != "" {
			t.Errorf("cut at %d it sees something else\n%s", cut, d)
		}
		if q := whole.quote(); q != parts.quote() || q != printable(q) {
			t.Errorf("quotes %q and %q", q, parts.quote())
		}
		if len(whole.serial.line) >= maxLine || len(whole.last) > keepLines {
			t.Errorf("it keeps a line of %d bytes and %d lines", len(whole.serial.line), len(whole.last))
		}
	})
}
