package budget

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/kernel"
	"github.com/memlinux/memlinux/testvm/need"
)

// The kernels that were measured, all Linux 6.1.192.
var (
	cloud   = kernel.Image{LoadAddress: 16 << 20, InitSize: 53968896, LoadSize: 14186432 - 0x7e00}
	generic = kernel.Image{LoadAddress: 16 << 20, InitSize: 66682880, LoadSize: 8247232 - 0x7e00}
	minimal = kernel.Image{LoadAddress: 16 << 20, InitSize: 22183936, LoadSize: 4998144 - 0x7e00}
)

// base is what the files of the measured trees have besides the one that makes
// them large: busybox and some texts.
const base = 2023424

// measured are true minima, found by bisection to 1 MiB in QEMU 7.2 (q35, one
// processor, TCG): bios and uefi from a stick of memlinux write on virtio, direct
// by QEMU's -kernel, which takes no more than GRUB under BIOS. 0 is not measured.
var measured = []struct {
	kernel             kernel.Image
	name               string
	compression        string
	compressed         int64 // bytes
	payload            int64 // MiB, in one file
	ramfs              bool
	direct, bios, uefi int
}{
	{cloud, "cloud, 1 MiB of zeros", "none", 3041000, 1, false, 73, 0, 0},
	{cloud, "cloud, 1 MiB of zeros", "gzip", 1090000, 1, false, 73, 84, 244},
	{cloud, "cloud, 1 MiB of noise", "zstd", 2141777, 1, false, 81, 85, 0},
	{cloud, "cloud, 30 MiB of noise", "zstd", 32551944, 30, false, 141, 141, 244},
	{cloud, "cloud, 30 MiB of noise", "none", 33451908, 30, false, 142, 0, 0},
	{cloud, "cloud, 30 MiB of zeros", "zstd", 1096052, 30, false, 109, 109, 0},
	{cloud, "cloud, 30 MiB of zeros", "gzip", 1118940, 30, false, 109, 0, 0},
	{cloud, "cloud, 100 MiB of noise", "zstd", 105958000, 100, false, 354, 0, 0},
	{cloud, "cloud, 100 MiB of noise", "none", 106850000, 100, false, 355, 355, 396},
	{cloud, "cloud, 100 MiB of zeros", "zstd", 1101000, 100, false, 251, 0, 293},
	{cloud, "cloud, 100 MiB of zeros", "gzip", 1195000, 100, false, 251, 251, 0},
	{cloud, "cloud, 100 MiB of noise, ramfs", "none", 106850000, 100, true, 276, 0, 0},
	{cloud, "cloud, 100 MiB of zeros, ramfs", "zstd", 1101000, 100, true, 182, 0, 0},
	{generic, "generic, 1 MiB of zeros", "none", 3041000, 1, false, 85, 0, 0},
	{generic, "generic, 1 MiB of zeros", "gzip", 1090000, 1, false, 85, 90, 276},
	{generic, "generic, 100 MiB of zeros", "gzip", 1195000, 100, false, 266, 0, 305},
	{generic, "generic, 100 MiB of zeros, ramfs", "gzip", 1195000, 100, true, 187, 0, 0},
	{minimal, "minimal, 1 MiB of zeros", "none", 3041000, 1, false, 41, 0, 0},
	{minimal, "minimal, 1 MiB of zeros", "gzip", 1090000, 1, false, 39, 44, 133},
	{minimal, "minimal, 1 MiB of noise", "zstd", 2141777, 1, false, 41, 46, 0},
	{minimal, "minimal, 100 MiB of zeros", "gzip", 1195000, 100, false, 229, 0, 271},
	{minimal, "minimal, 100 MiB of zeros, ramfs", "gzip", 1195000, 100, true, 136, 0, 0},
	{minimal, "minimal, 30 MiB of noise", "none", 33451908, 30, false, 118, 0, 159},
	{minimal, "minimal, 30 MiB of noise", "zstd", 32551944, 30, false, 0, 117, 0},
	{cloud, "cloud, 60 MiB of noise, too large for the piece above GRUB's heap", "none", 64910000, 60, false, 0, 0, 326},
}

// TestLeast holds the formula against what was measured: never below, and not
// much above.
func TestLeast(t *testing.T) {
	for _, m := range measured {
		t.Run(m.name+", "+m.compression, func(t *testing.T) {
			sizes := append(make([]int64, 24), base, m.payload<<20)
			got := Least(m.kernel, Initramfs{Compressed: m.compressed, Compression: m.compression, Sizes: slices.Values(sizes), Ramfs: m.ramfs})
			check := func(what string, got, least int) {
				if least == 0 {
					return
				}
				t.Logf("%s: %d MiB computed, %d measured, %+d", what, got, least, got-least)
				if got < least || got > least+least*15/100+16 {
					t.Errorf("%s: %d MiB, but the least is %d", what, got, least)
				}
			}
			if m.bios == 0 && m.direct != 0 && got.BIOS < m.direct {
				t.Errorf("direct: %d MiB, but the least is %d", got.BIOS, m.direct)
			}
			check("BIOS", got.BIOS, m.bios)
			check("UEFI", got.UEFI, m.uefi)
		})
	}
}

func TestLeastGrows(t *testing.T) {
	of := func(k kernel.Image, compression string, ramfs bool, sizes ...int64) Need {
		return Least(k, Initramfs{Compressed: 1 << 20, Compression: compression, Ramfs: ramfs, Sizes: slices.Values(sizes)})
	}
	small := of(minimal, "gzip", false, 30<<20)
	for _, tc := range []struct {
		name string
		need Need
		want int // of BIOS, more than small
	}{
		{"the same", of(minimal, "gzip", false, 30<<20), 0},
		{"a tmpfs takes twice its content", of(minimal, "gzip", false, 40<<20), 20},
		{"files are rounded up to pages", of(minimal, "gzip", false, append(slices.Repeat([]int64{1}, 2560), 30<<20)...), 20},
		{"a tmpfs has no more files than pages, not even empty ones", of(minimal, "gzip", false, append(slices.Repeat([]int64{0}, 10240), 30<<20)...), 20},
		{"zstd's window does not count where half of the memory does", of(minimal, "zstd", false, 30<<20), 0},
		{"a ramfs can take all", of(minimal, "gzip", true, 30<<20), -23},
	} {
		if got := tc.need.BIOS - small.BIOS; got < tc.want-1 || got > tc.want+1 {
			t.Errorf("%s: %+d MiB, want %+d", tc.name, got, tc.want)
		}
	}
	if a, b := of(cloud, "gzip", true), of(cloud, "zstd", true); b.BIOS < a.BIOS {
		t.Errorf("zstd takes less: %v, %v", a, b)
	}
	tree := initramfs.Tree{{Path: "a", Size: 5}, {Path: "b"}}
	if got := slices.Collect(Sizes(tree)); !slices.Equal(got, []int64{5, 0}) {
		t.Error(got)
	}
}

// TestBoot boots a system in QEMU with the computed least, and sees it fail with
// clearly less.
func TestBoot(t *testing.T) {
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	image, _ := need.Kernel(t)
	box, err := os.Open(need.File(t, "/bin/busybox", "busybox-static"))
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	st, err := box.Stat()
	if err != nil {
		t.Fatal(err)
	}
	const size = 60 << 20
	tree := initramfs.Base(box, st.Size()).With(initramfs.Entry{Path: "payload", Mode: 0o644, Content: bytes.NewReader(make([]byte, size)), Size: size, Why: "a test"})
	file := filepath.Join(t.TempDir(), "initramfs")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := initramfs.Pack(t.Context(), f, tree, initramfs.Compression{Name: "zstd"}, time.Unix(0, 0), nil); err != nil {
		t.Fatal(err)
	}
	packed, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	least := Least(parse(t, image), Initramfs{Compressed: packed.Size(), Compression: "zstd", Sizes: Sizes(tree)}).BIOS
	boot := func(mib int, until *regexp.Regexp) string {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, qemu, "-accel", "tcg", "-m", strconv.Itoa(mib), "-display", "none", "-nic", "none", "-no-reboot",
			"-monitor", "none", "-serial", "stdio", "-kernel", image, "-initrd", file, "-append", "console=ttyS0 memlinux.build=0123456789abcdef")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { cancel(); _ = cmd.Wait() }()
		var log bytes.Buffer
		for buf := make([]byte, 4096); !until.Match(log.Bytes()); {
			n, err := out.Read(buf)
			log.Write(buf[:n])
			if err != nil {
				break
			}
		}
		return log.String()
	}
	end := regexp.MustCompile(`memlinux:~# |memlinux: only part|unpacking failed[^\n]*\n|not syncing`)
	if log := boot(least, end); !regexp.MustCompile(`memlinux: ready .*(?s:.*)memlinux:~# `).MatchString(log) {
		t.Errorf("with %d MiB it does not boot:\n%s", least, log)
	}
	// The measured least is 10 MiB below the computed one.
	less := least - 20
	if log := boot(less, end); !regexp.MustCompile(`Initramfs unpacking failed: write error`).MatchString(log) {
		t.Errorf("with %d MiB it boots, but the least is to be %d:\n%s", less, least, log)
	}
}

func parse(t *testing.T, file string) kernel.Image {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	k, err := kernel.ParseImage(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return k
}
