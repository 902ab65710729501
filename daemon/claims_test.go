package daemon

import (
	"math"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/imagegen/kernel"
	"github.com/memlinux/memlinux/imagegen/manifest"
)

func TestImplausible(t *testing.T) {
	k := kernel.Image{LoadAddress: 16 << 20, InitSize: 22183936, LoadSize: 4966400}
	honest := func() api.Manifest {
		return api.Manifest{Boot: []string{"bios", "uefi"}, Memory: manifest.Memory{BIOS: 46, UEFI: 135},
			Microcode: manifest.Microcode{Size: 1 << 20},
			Initramfs: manifest.Initramfs{Size: 2 << 20, Unpacked: 4 << 20, Compression: "zstd", Files: []manifest.File{{Path: "bin/busybox", Size: 2 << 20}, {Path: "init", Size: 1 << 20}}}}
	}
	for name, c := range map[string]struct {
		change func(*api.Manifest)
		want   string // part of the error, "" for none
	}{
		"as it was written":        {func(*api.Manifest) {}, ""},
		"another version's memory": {func(m *api.Manifest) { m.Memory.UEFI += 40 }, ""},
		"2 GiB of zeros": {func(m *api.Manifest) {
			m.Initramfs.Unpacked, m.Memory.BIOS, m.Memory.UEFI = 3<<30, 4300, 4350
			m.Initramfs.Files[0].Size = 2 << 30
		}, ""},
		"more than can be packed by zstd":        {func(m *api.Manifest) { m.Initramfs.Unpacked = 999999999999 }, "an initramfs of 2097152 bytes unpacks to 999999999999"},
		"more than can be packed by gzip":        {func(m *api.Manifest) { m.Initramfs.Compression, m.Initramfs.Unpacked = "gzip", 3<<30 }, "unpacks to 3221225472"},
		"more than there is, uncompressed":       {func(m *api.Manifest) { m.Initramfs.Compression = "none" }, "unpacks to 4194304"},
		"more than fits in memory":               {func(m *api.Manifest) { m.Initramfs.Size, m.Initramfs.Unpacked = 1<<32, math.MaxInt64 }, "unpacks to 9223372036854775807"},
		"less than nothing":                      {func(m *api.Manifest) { m.Initramfs.Unpacked = -1 }, "unpacks to -1"},
		"another compression":                    {func(m *api.Manifest) { m.Initramfs.Compression = "xz" }, `compressed by "xz"`},
		"files that are larger than all":         {func(m *api.Manifest) { m.Initramfs.Files[1].Size = 3 << 20 }, "init has 3145728 bytes"},
		"files whose sum is less than nothing":   {func(m *api.Manifest) { m.Initramfs.Files[1].Size = -1 << 62 }, "init has -"},
		"microcode that is larger than its file": {func(m *api.Manifest) { m.Microcode.Size = 1 << 40 }, "of microcode"},
		"much memory under BIOS":                 {func(m *api.Manifest) { m.Memory.BIOS = 1000 }, "needs 1000 MiB of memory with BIOS, where 47 are enough"},
		"much memory under UEFI":                 {func(m *api.Manifest) { m.Memory.UEFI = 1 << 20 }, "needs 1048576 MiB of memory with UEFI"},
	} {
		m := honest()
		c.change(&m)
		err := implausible(m, k)
		if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "which can't be")) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTooLarge(t *testing.T) {
	for _, c := range []struct {
		name       string
		bios, uefi int // MiB
		boot       []string
		available  int64 // MiB
		want       string
	}{
		{"a small system on a small machine", 100, 246, []string{"bios", "uefi"}, 100, ""},
		{"a large system on a large machine", 4300, 4350, []string{"bios", "uefi"}, 6000, ""},
		{"a large system on a small machine", 4300, 4350, []string{"bios", "uefi"}, 4400, "wants 4300 MiB of memory with BIOS, and of the 4400 MiB that are available here a virtual machine gets 3300"},
		{"too large under UEFI only", 4300, 4350, []string{"bios", "uefi"}, 5760, "wants 4350 MiB of memory with UEFI"},
		{"a firmware that it is not made for", 4300, 9999, []string{"bios"}, 5760, ""},
	} {
		err := tooLarge(api.Manifest{Boot: c.boot, Memory: manifest.Memory{BIOS: c.bios, UEFI: c.uefi}}, c.available<<20, 512)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if n, err := availableMemory(); err != nil || n < 1<<20 {
		t.Errorf("%d bytes are available: %v", n, err)
	}
}
