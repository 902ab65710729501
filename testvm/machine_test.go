package testvm

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// open opens path with flags until the test ends.
func open(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestCommandGolden(t *testing.T) {
	disk := open(t, "/dev/null", os.O_RDONLY)
	stick := Machine{Disk: disk, DiskSize: 64 << 20, SectorSize: 512}
	with := func(m Machine, fw Firmware, bus Bus) Machine { m.Firmware, m.Bus = fw, bus; return m }
	proof := func(m Machine) wiring {
		return wiring{diskDriver: "file", firmwareLog: disk, screenshot: disk, screen: disk}
	}
	type entry struct {
		name string
		m    Machine
		w    wiring
	}
	var entries []entry
	for _, fw := range []Firmware{BIOS, UEFI} {
		for _, bus := range []Bus{USB, Virtio, AHCI} {
			m := with(stick, fw, bus)
			entries = append(entries, entry{fmt.Sprintf("prove-%s-%s", fw, bus), m, proof(m)})
		}
	}
	device := with(stick, UEFI, USB)
	device.SectorSize = 4096
	entries = append(entries,
		entry{"prove-uefi-usb-4096-device-kvm", device, wiring{kvm: true, diskDriver: "host_device", firmwareLog: disk, screenshot: disk, screen: disk}},
		entry{"start-bios-kernel-disc", Machine{Firmware: BIOS, Kernel: disk, Initrd: disk, Append: "console=ttyS0, a=b", DataDisc: disk, MemoryMiB: 256}, wiring{discDriver: "file"}},
	)
	for _, e := range entries {
		t.Run(e.name, func(t *testing.T) {
			args, files := e.m.command(e.w)
			var b strings.Builder
			fmt.Fprintf(&b, "# %d inherited files\n", len(files))
			for _, a := range args {
				if strings.HasPrefix(a, "-") {
					b.WriteString("\n" + a)
				} else {
					b.WriteString(" " + a)
				}
			}
			golden(t, e.name+".args", []byte(b.String()+"\n"))
		})
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update rewrites it):\n%s", path, got)
	}
}

func TestValidate(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	good := Machine{Firmware: BIOS, Disk: open(t, image, os.O_RDONLY), DiskSize: 8192, SectorSize: 512, Bus: USB, Dir: t.TempDir()}
	for name, c := range map[string]struct {
		change func(*Machine)
		want   string // part of the error, "" for none
	}{
		"a good machine":                  {func(*Machine) {}, ""},
		"a disk cut shorter":              {func(m *Machine) { m.DiskSize = 4096 }, ""},
		"a disk open for writing":         {func(m *Machine) { m.Disk = open(t, image, os.O_RDWR) }, "is not open read-only"},
		"a disk open for writing only":    {func(m *Machine) { m.Disk = open(t, image, os.O_WRONLY) }, "is not open read-only"},
		"a disc open for writing":         {func(m *Machine) { m.DataDisc = open(t, image, os.O_RDWR) }, "is not open read-only"},
		"a character device as a disk":    {func(m *Machine) { m.Disk = open(t, "/dev/zero", os.O_RDONLY) }, "neither a file nor a block device"},
		"a folder as a disk":              {func(m *Machine) { m.Disk = open(t, "/", os.O_RDONLY) }, "neither a file nor a block device"},
		"a file shorter than the disk":    {func(m *Machine) { m.DiskSize = 16384 }, "has 8192 bytes, fewer"},
		"half a sector":                   {func(m *Machine) { m.DiskSize = 700 }, "not a positive multiple"},
		"no size":                         {func(m *Machine) { m.DiskSize = 0 }, "not a positive multiple"},
		"an odd sector size":              {func(m *Machine) { m.SectorSize = 520 }, "neither 512 nor 4096"},
		"AHCI with large sectors":         {func(m *Machine) { m.SectorSize, m.Bus = 4096, AHCI }, "AHCI"},
		"no bus":                          {func(m *Machine) { m.Bus = "" }, "bus"},
		"no firmware":                     {func(m *Machine) { m.Firmware = "" }, "firmware"},
		"nothing to boot":                 {func(m *Machine) { m.Disk = nil }, "nothing to boot"},
		"an initramfs without a kernel":   {func(m *Machine) { m.Initrd = m.Disk }, "without a kernel"},
		"arguments without a kernel":      {func(m *Machine) { m.Append = "x" }, "without a kernel"},
		"a folder that is not there":      {func(m *Machine) { m.Dir = "/does/not/exist" }, "does not exist"},
		"a negative amount of memory":     {func(m *Machine) { m.MemoryMiB = -1 }, "memory"},
		"a kernel alone needs no disk":    {func(m *Machine) { m.Kernel, m.Disk, m.Bus = m.Disk, nil, "" }, ""},
		"a patch at the very end":         {func(m *Machine) { m.Patches = []Patch{{8190, []byte("ab")}} }, ""},
		"a patch beyond the disk":         {func(m *Machine) { m.Patches = []Patch{{8191, []byte("ab")}} }, "reaches beyond"},
		"a patch before the disk":         {func(m *Machine) { m.Patches = []Patch{{-1, []byte("ab")}} }, "reaches beyond"},
		"a patch without a disk":          {func(m *Machine) { m.Kernel, m.Disk, m.Patches = m.Disk, nil, []Patch{{}} }, "patches without a disk"},
		"UEFI variables for BIOS":         {func(m *Machine) { m.Variables = []Variable{bootOrder} }, "UEFI variables with bios"},
		"UEFI variables":                  {func(m *Machine) { m.Firmware, m.Variables = UEFI, []Variable{bootOrder} }, ""},
		"a UEFI variable without a name":  {func(m *Machine) { m.Firmware, m.Variables = UEFI, []Variable{{GUID: globalGUID}} }, "that is no name"},
		"an empty Dir is not the current": {func(m *Machine) { m.Dir = "" }, "does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			m := good
			c.change(&m)
			err := m.validate()
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

func TestMissingQEMUNamesThePackage(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	m := Machine{Firmware: BIOS, Disk: open(t, image, os.O_RDONLY), DiskSize: 512, SectorSize: 512, Bus: USB, Dir: t.TempDir()}
	t.Setenv("PATH", "")
	_, proveErr := Prove(t.Context(), m, Expect{Build: "x"}, nil)
	_, startErr := Start(t.Context(), m)
	for call, err := range map[string]error{"Check": Check(UEFI), "Prove": proveErr, "Start": startErr} {
		var missing *MissingError
		if !errors.As(err, &missing) || missing.Package != "qemu-system-x86" || missing.What != qemuProgram {
			t.Errorf("%s: error %v", call, err)
		}
	}
	left, err := os.ReadDir(m.Dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left in the folder: %v, %v", left, err)
	}
}

func TestBIOSSkipsLargeSectors(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	m := Machine{Firmware: BIOS, Disk: open(t, image, os.O_RDONLY), DiskSize: 4096, SectorSize: 4096, Bus: USB, Dir: t.TempDir()}
	v, err := Prove(t.Context(), m, Expect{Build: "x"}, nil)
	if err != nil || v.OK || !v.Skipped || v.Reason == "" {
		t.Errorf("verdict %+v, error %v", v, err)
	}
}

func TestHasVirtualization(t *testing.T) {
	for name, c := range map[string]struct {
		cpuinfo string
		want    bool
	}{
		"Intel":                          {"processor\t: 0\nflags\t\t: fpu vmx sse\n", true},
		"AMD":                            {"flags\t\t: fpu svm\n", true},
		"a guest without":                {"flags\t\t: fpu sse hypervisor\n", false},
		"a flag of a similar name":       {"flags\t\t: svm_lock avmx\n", false},
		"vmx flags line, not flags line": {"vmx flags\t: vnmi vmx\n", false},
		"nothing":                        {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := hasVirtualization(c.cpuinfo); got != c.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestParsePPM(t *testing.T) {
	img, err := parsePPM([]byte("P6\n2 1\n255\n\x01\x02\x03\x0a\x20\x30"))
	if err != nil {
		t.Fatal(err)
	}
	if r, g, b, _ := img.At(1, 0).RGBA(); r>>8 != 0x0a || g>>8 != 0x20 || b>>8 != 0x30 {
		t.Errorf("pixel %x %x %x", r, g, b)
	}
	for name, ppm := range map[string]string{
		"empty": "", "PNG": "\x89PNG\r\n", "too few pixels": "P6\n2 2\n255\nxxx", "negative": "P6\n-1 -1\n255\nxxx",
		"too large": "P6\n99999 99999\n255\n", "sixteen bits": "P6\n1 1\n65535\nxxxxxx", "no levels": "P6\n1 1\n", "a head without its end": "P6\n1 1\n255", "more spaces than QEMU's": "P6\n 1 1\n255\nxxx",
	} {
		if _, err := parsePPM([]byte(ppm)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzParsePPM(f *testing.F) {
	f.Add([]byte("P6\n2 1\n255\n\x01\x02\x03\x0a\x20\x30"))
	f.Add([]byte("P6\n1 1\n255\n\x01\x02"))
	f.Add([]byte("P6\n1 1\n255"))
	f.Fuzz(func(t *testing.T, p []byte) {
		if img, err := parsePPM(p); err == nil && img.Bounds().Dx()*img.Bounds().Dy()*3 > len(p) {
			t.Errorf("%v pixels of %d bytes", img.Bounds(), len(p))
		}
	})
}
