package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm"
)

// kernel boots our minimal kernel beside Debian's cloud kernel, with one and the
// same initramfs, and looks for the least memory that it boots in.
func (b bench) kernel() error {
	made, err := b.prepare(minimal, cloud)
	if err != nil {
		return err
	}
	our, peer := made[0], made[1]
	us, err := b.booter("memlinux: minimal kernel "+our.Release, start{System: our, Build: our.ID, Memory: 256})
	if err != nil {
		return err
	}
	them, err := b.booter("Debian's cloud kernel "+peer.Release, start{System: peer, Build: peer.ID, Memory: 256})
	if err != nil {
		return err
	}
	if err := inTurn(5, us.side, them.side); err != nil {
		return err
	}
	fmt.Printf("\nstart to ready in QEMU (%s), booted directly with busybox and /init\n", us.verdict.Accelerator)
	for _, s := range []*booter{us, them} {
		fmt.Printf("  %-44s wall %7.2f s   QEMU's CPU in all %7.2f s\n", s.name, median(s.ready), median(s.cpu).Seconds())
	}
	figure("start to ready, memlinux / Debian", "%7.2f", median(us.ready)/median(them.ready), 0.65)
	fmt.Printf("  %-44s %7.2f\n", "QEMU's CPU, memlinux / Debian", median(us.cpu).Seconds()/median(them.cpu).Seconds())

	fmt.Printf("\nthe stick with it: bytes that are written, and the least RAM that gives a shell\n")
	stick, report, err := b.writeStick(minimal)
	if err != nil {
		return err
	}
	files := report.System.KernelSize + report.System.InitramfsSize
	figure("kernel and initramfs on the stick, MiB", "%7.2f", mib(files), 8)
	fmt.Printf("    kernel %.2f, initramfs %.2f; with boot loaders, FATs, partition tables and the\n    zeros over old ones %.2f are written\n",
		mib(report.System.KernelSize), mib(report.System.InitramfsSize), mib(report.Image.Bytes))
	// Longer than any boot that succeeds.
	limit := 4*slices.Max(us.ready) + 10
	for _, try := range []struct {
		name  string
		start start
	}{
		{"least RAM under BIOS from the stick, MiB", start{System: our, Build: report.System.ID, Disk: stick, Limit: 2 * limit}},
		{"least RAM booted directly, MiB", start{System: our, Build: our.ID, Limit: limit}},
	} {
		least, why, err := b.least(try.start)
		if err != nil {
			return err
		}
		figure(try.name, "%7.0f", float64(least), 48)
		fmt.Printf("    with 1 MiB less:\n    %s\n", why)
	}
	fmt.Printf("  %-44s %7d under BIOS, %d under UEFI\n", "computed in the manifest, MiB", our.Memory.BIOS, our.Memory.UEFI)
	return nil
}

// start is a boot of a system.
type start struct {
	System built
	Build  string  // what its ready line says
	Disk   string  // the stick's image; "" to boot kernel and initramfs directly
	Memory int     // MiB
	Limit  float64 // seconds; 0 for testvm's own
	Dir    string
}

// booter is a side that boots a system.
type booter struct {
	*side
	ready   []float64 // seconds from QEMU's start
	verdict testvm.Verdict
}

// booter is a side that boots s to its shell each time.
func (b bench) booter(name string, s start) (*booter, error) {
	s.Dir = b.dir
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	side, err := ours("", "boot", string(text))
	if err != nil {
		return nil, err
	}
	side.name = name
	v := &booter{side: side}
	side.after = func() error {
		v.verdict = testvm.Verdict{}
		if err := json.Unmarshal(side.out, &v.verdict); err != nil {
			return err
		}
		if !v.verdict.OK || !v.verdict.Shell {
			return fmt.Errorf("%w: %s", errNoBoot, reason(v.verdict))
		}
		v.ready = append(v.ready, v.verdict.ToReady)
		return nil
	}
	return v, nil
}

var errNoBoot = errors.New("it does not boot")

// reason is why it is no boot to the shell, without the lines of the console
// that testvm quotes.
func reason(v testvm.Verdict) string {
	if v.Reason == "" {
		return "the shell does not answer"
	}
	text, _, _ := strings.Cut(v.Reason, "; the console's last lines")
	text, _, _ = strings.Cut(text, ": [")
	return text
}

// bootSystem does what the start in its argument says and prints the verdict.
func bootSystem(args []string, out io.Writer) error {
	var s start
	if err := json.Unmarshal([]byte(args[0]), &s); err != nil {
		return err
	}
	m := testvm.Machine{Firmware: testvm.BIOS, MemoryMiB: s.Memory, Dir: s.Dir}
	files := map[string]**os.File{s.System.Kernel: &m.Kernel, s.System.Initramfs: &m.Initrd}
	m.Append = s.System.BootLine
	if s.Disk != "" {
		files, m.Append = map[string]**os.File{s.Disk: &m.Disk}, ""
		m.SectorSize, m.Bus = 512, testvm.USB
	}
	for path, to := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		*to = f
	}
	if m.Disk != nil {
		info, err := m.Disk.Stat()
		if err != nil {
			return err
		}
		m.DiskSize = info.Size()
	}
	ctx := context.Background()
	if s.Limit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(s.Limit*float64(time.Second)))
		defer cancel()
	}
	v, err := testvm.Prove(ctx, m, testvm.Expect{Build: s.Build, Shell: true, Content: s.System.Unpacked}, nil)
	if errors.Is(err, context.DeadlineExceeded) {
		v.OK, v.Reason = false, fmt.Sprintf("no shell within %.0f s", s.Limit)
	} else if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(v)
}

// writeStick writes a stick's image with the system, by the client, and returns
// its path and the client's report.
func (b bench) writeStick(what system) (string, *api.Report, error) {
	image := b.path("stick.img")
	kernel, modules := what.kernel()
	s := side{name: "memlinux write", argv: []string{memlinux, "--private", "--json", "write", "--no-boot-test", "--kernel", kernel, "--modules", modules, image},
		env: []string{"MEMLINUX_STATE_DIR=" + b.path("state")}}
	if err := s.once(); err != nil {
		return "", nil, err
	}
	lines := strings.Split(strings.TrimSpace(string(s.out)), "\n")
	var last struct{ Report *api.Report }
	err := json.Unmarshal([]byte(lines[len(lines)-1]), &last)
	if err == nil && (last.Report == nil || last.Report.System == nil || last.Report.Image == nil) {
		err = errors.New("it does not say what was written")
	}
	if err != nil {
		return "", nil, fmt.Errorf("the report of memlinux write: %w", err)
	}
	return image, last.Report, nil
}

// least finds, by trying, the least MiB of RAM in which s boots to its shell,
// and why it does not with one less.
func (b bench) least(s start) (least int, why string, err error) {
	boots := func(memory int) (bool, error) {
		s.Memory = memory
		v, err := b.booter(fmt.Sprintf("%d MiB", memory), s)
		if err != nil {
			return false, err
		}
		err = v.once()
		if errors.Is(err, errNoBoot) {
			why = reason(v.verdict)
			return false, nil
		}
		return err == nil, err
	}
	low, high := 8, s.System.Memory.BIOS
	for {
		ok, err := boots(high)
		if err != nil {
			return 0, "", err
		}
		if ok {
			break
		}
		if high > 1024 {
			return 0, "", fmt.Errorf("it does not even boot with %d MiB: %s", high, why)
		}
		low, high = high, 2*high
	}
	whyLow := ""
	for high-low > 1 {
		middle := (low + high) / 2
		ok, err := boots(middle)
		if err != nil {
			return 0, "", err
		}
		if ok {
			high = middle
		} else {
			low, whyLow = middle, why
		}
	}
	return high, whyLow, nil
}
