package modules

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/memlinux/memlinux/imagegen/modules/modulestest"
	"github.com/ulikunitz/xz"
)

var ko = modulestest.Module

func compressed(t testing.TB, suffix string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var err error
	switch suffix {
	case ".gz":
		z := gzip.NewWriter(&out)
		_, err = z.Write(b)
		err = errors.Join(err, z.Close())
	case ".xz":
		var z *xz.Writer
		if z, err = xz.NewWriter(&out); err == nil {
			_, err = z.Write(b)
			err = errors.Join(err, z.Close())
		}
	case ".zst":
		var z *zstd.Encoder
		if z, err = zstd.NewWriter(&out); err == nil {
			_, err = z.Write(b)
			err = errors.Join(err, z.Close())
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// library imports files (path → content) and returns the archive too.
func library(t testing.TB, files map[string][]byte) (*Library, []byte) {
	t.Helper()
	var archive bytes.Buffer
	w := NewWriter(context.Background(), &archive)
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		if Wants(name) {
			if err := w.Add(name, files[name]); err != nil {
				t.Fatal(err)
			}
		}
	}
	l, err := w.Close("6.1.0-9-amd64")
	if err != nil {
		t.Fatal(err)
	}
	return l, archive.Bytes()
}

// generic is a kernel with a bit of everything.
func generic(t testing.TB) map[string][]byte {
	const magic = "vermagic=6.1.0-9-amd64 SMP preempt mod_unload modversions "
	return map[string][]byte{
		"modules.builtin": []byte("kernel/drivers/tty/serial/8250/8250.ko\nkernel/lib/crc-ccitt.ko\n"),
		"modules.order":   []byte("not read"),
		"kernel/drivers/usb/common/usb-common.ko":      ko(magic),
		"kernel/drivers/usb/core/usbcore.ko":           ko("depends=usb-common", magic),
		"kernel/drivers/usb/host/xhci-hcd.ko":          ko("depends=usbcore,usb-common", magic),
		"kernel/drivers/usb/host/xhci-pci.ko":          ko("alias=pci:v*d*sv*sd*bc0Csc03i30*", "depends=xhci-hcd,usbcore", magic),
		"kernel/drivers/usb/host/ehci-hcd.ko":          ko("depends=usbcore", magic),
		"kernel/drivers/usb/host/ehci-pci.ko":          ko("depends=ehci-hcd", magic),
		"kernel/drivers/usb/host/ohci-pci.ko":          ko("softdep=pre: ehci_pci", "depends=usbcore", magic),
		"kernel/drivers/usb/host/sl811_cs.ko":          ko("depends=pcmcia", magic),
		"kernel/drivers/usb/storage/usb-storage.ko":    ko("depends=usbcore,scsi_mod", "alias=usb:v13FDp3940d0[0-2]*dc*", magic),
		"kernel/drivers/scsi/scsi_mod.ko":              ko("depends=", magic),
		"kernel/drivers/scsi/sd_mod.ko":                ko("depends=scsi_mod", "alias=scsi:t-0x00*", "alias=block-major-8-*", magic),
		"kernel/drivers/hid/hid.ko.xz":                 compressed(t, ".xz", ko(magic)),
		"kernel/drivers/hid/hid-generic.ko.gz":         compressed(t, ".gz", ko("depends=hid", "alias=hid:b*g0001v*p*", magic)),
		"kernel/drivers/hid/usbhid/usbhid.ko.zst":      compressed(t, ".zst", ko("depends=hid,usbcore", magic)),
		"kernel/fs/ext4/ext4.ko":                       ko("softdep=pre: crypto-crc32c", "alias=fs-ext4", "depends=jbd2,crc16,crc-ccitt", magic),
		"kernel/fs/jbd2/jbd2.ko":                       ko("depends=crc16", magic),
		"kernel/lib/crc16.ko":                          ko(magic),
		"kernel/crypto/crc32c_generic.ko":              ko("alias=crypto-crc32c", magic),
		"kernel/arch/x86/crypto/crc32c-intel.ko":       ko("alias=crypto-crc32c", magic),
		"kernel/fs/fat/fat.ko":                         ko(magic),
		"kernel/fs/fat/vfat.ko":                        ko("alias=fs-vfat", "depends=fat", "softdep=pre: nothing-like-it", magic),
		"kernel/drivers/block/loop.ko":                 ko("alias=devname:loop-control", "alias=char-major-10-237", "alias=block-major-7-*", magic),
		"kernel/drivers/net/phy/libphy.ko":             ko(magic),
		"kernel/drivers/net/ethernet/realtek/r8169.ko": ko("depends=libphy", "firmware=rtl_nic/rtl8168d-1.fw", "firmware=rtl_nic/rtl8105e-1.fw", magic),
		"kernel/sound/a.ko":                            ko("softdep=pre: b post: c", "firmware=x", magic),
		"kernel/sound/b.ko":                            ko("softdep=post: a", magic),
		"kernel/sound/c.ko":                            ko("depends=a", magic),
		"kernel/sound/orphan.ko":                       ko("depends=a,gone-away", magic),
		"kernel/sound/asks_orphan.ko":                  ko("depends=orphan", magic),
		"kernel/sound/other.ko":                        ko("vermagic=6.1.0-8-amd64 SMP"),
		"kernel/sound/broken.ko":                       []byte("\x7fELF"),
		"kernel/sound/badxz.ko.xz":                     []byte("no xz"),
		"kernel/sound/alpha.ko":                        elfFor(ko(), 183),
	}
}

// elfFor makes a file one for another machine.
func elfFor(b []byte, machine byte) []byte {
	b = slices.Clone(b)
	b[18] = machine
	return b
}

func names(s *Selection) []string {
	var all []string
	for _, m := range s.Modules {
		all = append(all, m.Name())
	}
	slices.Sort(all)
	return all
}

func TestSelect(t *testing.T) {
	l, _ := library(t, generic(t))
	usb := "ehci_hcd ehci_pci ohci_pci usb_common usbcore xhci_hcd xhci_pci"
	for _, tc := range []struct {
		name   string
		choice []string
		want   string
	}{
		{"a set, compressed modules too, and not a PC card's driver beside it", []string{"input"}, usb + " hid hid_generic usbhid"},
		{"two sets have what they share once", []string{"input", "usb-storage"}, usb + " hid hid_generic usbhid usb_storage scsi_mod sd_mod"},
		{"an alias as soft dependency brings all that have it; an unknown one nothing", []string{"filesystems"}, "ext4 jbd2 crc16 crc32c_generic crc32c_intel fat vfat loop"},
		{"a set of which this kernel has little", []string{"disk"}, "scsi_mod sd_mod"},
		{"a single one, by the dashes that its file has not", []string{"sd-mod"}, "scsi_mod sd_mod"},
		{"a single one, by the underscores that its file has not", []string{"xhci_hcd"}, "usb_common usbcore xhci_hcd"},
		{"one that is built in brings nothing", []string{"8250", "crc16"}, "crc16"},
		{"soft dependencies in a circle", []string{"a"}, "a b c"},
		{"network", []string{"network"}, usb + " libphy r8169"},
		{"none", []string{"none"}, ""},
		{"empty is the default", nil, usb + " hid hid_generic usbhid usb_storage scsi_mod sd_mod ext4 jbd2 crc16 crc32c_generic crc32c_intel fat vfat loop"},
		{"all is the sets, not the whole kernel", []string{"all"}, usb + " hid hid_generic usbhid usb_storage scsi_mod sd_mod ext4 jbd2 crc16 crc32c_generic crc32c_intel fat vfat loop libphy r8169"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := Validate(tc.choice); err != nil {
				t.Fatal(err)
			}
			s, err := l.Select(tc.choice)
			if err != nil {
				t.Fatal(err)
			}
			want := strings.Fields(tc.want)
			slices.Sort(want)
			if diff := cmp.Diff(want, names(s), cmp.Transformer("", func(s []string) string { return strings.Join(s, " ") })); diff != "" {
				t.Error(diff)
			}
			for _, m := range s.Modules {
				for _, dep := range m.Depends {
					if !s.Has(dep) && dep != "crc_ccitt" {
						t.Errorf("%s is in, but %s is not", m.Name(), dep)
					}
				}
			}
		})
	}
}

func TestSelectRefuses(t *testing.T) {
	l, _ := library(t, generic(t))
	for _, tc := range []struct{ name, choice, want string }{
		{"a module that is nowhere", "nothere", "no such module in kernel 6.1.0-9-amd64: nothere is neither loadable nor built in, and the sets are input, usb-storage, disk, filesystems, network, all, none"},
		{"a dependency that is nowhere, with who wants it", "asks-orphan", "module gone_away, which orphan depends on, is missing in the modules of kernel 6.1.0-9-amd64"},
		{"one for another release", "other", "module other is for kernel 6.1.0-8-amd64, not 6.1.0-9-amd64"},
		{"one that is no ELF file", "broken", "module broken of kernel 6.1.0-9-amd64 (kernel/sound/broken.ko) can't be used: it is no module"},
		{"one that can't be decompressed", "badxz", "can't be used: decompress: "},
		{"one for another machine", "alpha", "it is no module for amd64 but ET_REL of EM_AARCH64"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := l.Select([]string{"input", tc.choice})
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %v, want %q in it, on one line", err, tc.want)
			}
			if errors.Is(err, ErrNoModule) != (tc.choice == "nothere") {
				t.Errorf("%v: ErrNoModule is for what does not exist", err)
			}
		})
	}
	for _, choice := range [][]string{{"none", "disk"}, {""}, {"../x"}, {"a b"}, {"a\n"}} {
		if Validate(choice) == nil {
			t.Errorf("%q was taken", choice)
		}
	}
}

// Whatever is chosen, sets are chosen the same way in any order.
func TestSetsAreSpelledOut(t *testing.T) {
	for _, tc := range []struct{ choice, want string }{
		{"", "disk filesystems input usb-storage"},
		{"all e1000e disk", "disk e1000e filesystems input network usb-storage"},
		{"none", ""},
	} {
		if got := strings.Join(Sets(strings.Fields(tc.choice)), " "); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.choice, got, tc.want)
		}
	}
}

func TestPatternsAreGood(t *testing.T) {
	for _, s := range sets {
		for _, p := range s.patterns {
			if _, err := path.Match(strings.TrimPrefix(p, "!"), "x"); err != nil || strings.Contains(p, "_") || strings.HasSuffix(p, ".ko") || strings.HasPrefix(p, "kernel/") {
				t.Errorf("%s: %q can match nothing (%v)", s.name, p, err)
			}
		}
	}
}

// The texts that modprobe, mount and /init read. MEMLINUX_UPDATE=1 writes them anew.
func TestGoldenTexts(t *testing.T) {
	l, _ := library(t, generic(t))
	s, err := l.Select([]string{"all", "a"})
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string][]byte{
		"modules.dep": s.Dep(), "modules.alias": s.Alias(), "modules.devname": s.Devname(), "filesystems": s.Filesystems(),
		"firmware": []byte(strings.Join(s.Firmware(), "\n") + "\n"),
	} {
		golden := filepath.Join("testdata", name+".golden")
		if os.Getenv("MEMLINUX_UPDATE") == "1" {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// In each line what is loaded first, which is the last, must need none before it.
func TestDepOrder(t *testing.T) {
	l, _ := library(t, generic(t))
	s, err := l.Select([]string{"all"})
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(s.Dep())) {
		first, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		order := append([]string{first}, strings.Fields(rest)...)
		loaded := map[string]bool{"crc_ccitt": true}
		for _, file := range slices.Backward(order) {
			for _, dep := range s.byName[Name(file)].Depends {
				if !loaded[dep] {
					t.Errorf("%s: %s is loaded before %s", first, file, dep)
				}
			}
			loaded[Name(file)] = true
		}
	}
}

func TestSpellOut(t *testing.T) {
	for pattern, want := range map[string]string{
		"usb:v13FDd0[0-2]*": "usb:v13FDd0[012]*", "[0-9A-C]x-y": "[0123456789ABC]x-y", "a-b[cd]e-f": "a-b[cd]e-f",
		"[": "[", "[0-": "[0-", "[-]": "[-]", "[9-0]": "[9-0]", "[0-]": "[0-]", "[0-9a-c]": "[0123456789abc]", "[9-a]": "[9-a]",
	} {
		if got := spellOut(pattern); got != want {
			t.Errorf("%q became %q, want %q", pattern, got, want)
		}
	}
}

// An updated driver is in the sets of the one that it replaces.
func TestUpdatesReplace(t *testing.T) {
	for _, tc := range []struct{ name, other string }{{"before kernel/ in the order of names", "extra/ahci.ko"}, {"after it", "updates/dkms/ahci.ko"}} {
		t.Run(tc.name, func(t *testing.T) {
			l, _ := library(t, map[string][]byte{"kernel/drivers/ata/ahci.ko": ko(), tc.other: ko("alias=new")})
			s, err := l.Select([]string{"disk"})
			if err != nil || len(s.Modules) != 1 || s.Modules[0].Path != tc.other {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
}

// What comes out of the archive must be what went in, from any place in it.
func TestArchiveRoundTrip(t *testing.T) {
	files := generic(t)
	big := append(ko("alias=x"), bytes.Repeat([]byte("0123456789"), 1<<17)...)
	files["kernel/fs/xfs/xfs.ko"] = big
	l, archive := library(t, files)
	var b bytes.Buffer
	err := l.Write(&b)
	if err != nil {
		t.Fatal(err)
	}
	back, err := Parse(&b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(l, back); diff != "" {
		t.Error(diff)
	}
	again, sameArchive := library(t, files)
	if diff := cmp.Diff(l, again); diff != "" || !bytes.Equal(archive, sameArchive) {
		t.Errorf("two imports differ: %s", diff)
	}
	r, err := NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	s, err := back.Select([]string{"filesystems"})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range s.Modules {
		content := make([]byte, m.Size)
		if _, err := r.Open(m).ReadAt(content, 0); err != nil || !bytes.Equal(content, files[m.Path]) {
			t.Errorf("%s: %d bytes, %v", m.Path, len(content), err)
		}
	}
	xfs := s.byName["xfs"]
	one, other := r.Open(xfs), r.Open(s.byName["fat"])
	part := make([]byte, 10)
	for _, off := range []int64{xfs.Size - 10, 7, 1 << 19} {
		if _, err := other.ReadAt(part[:1], 0); err != nil {
			t.Fatal(err)
		}
		if _, err := one.ReadAt(part, off); err != nil || !bytes.Equal(part, big[off:off+10]) {
			t.Errorf("at %d: %q, %v", off, part, err)
		}
	}
	archive[xfs.Offset+xfs.Packed/2] ^= 1
	if _, err := r.Open(s.byName["fat"]).ReadAt(part, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Open(xfs).ReadAt(part, 0); err == nil || !strings.Contains(err.Error(), "archive of modules") {
		t.Errorf("a damaged archive: %v", err)
	}
}

func TestNoBombs(t *testing.T) {
	var bomb bytes.Buffer
	z, err := zstd.NewWriter(&bomb)
	if err != nil {
		t.Fatal(err)
	}
	for range MaxSize>>20 + 1 {
		if _, err := z.Write(make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	l, _ := library(t, map[string][]byte{"kernel/a.ko.zst": bomb.Bytes()})
	if _, err := l.Select([]string{"a"}); err == nil || !strings.Contains(err.Error(), "decompress") {
		t.Error(err)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

func TestWriterFails(t *testing.T) {
	w := NewWriter(t.Context(), full{})
	for range 100 {
		_ = w.Add("kernel/a.ko", ko())
	}
	if _, err := w.Close("6"); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w = NewWriter(ctx, &bytes.Buffer{})
	cancel()
	_ = w.Add("kernel/a.ko", ko())
	if _, err := w.Close("6"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestWants(t *testing.T) {
	for name, want := range map[string]bool{
		"kernel/a.ko": true, "updates/a.ko.xz": true, "a.ko.zst": true, "a.ko.gz": true, "modules.builtin": true,
		"modules.dep": false, "kernel/.ko": false, "a.ko.bz2": false, "a.kox": false, "build/modules.builtin": false, "kernel/a b.ko": false, "a\nb.ko": false,
	} {
		if Wants(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
}

func FuzzReadInfo(f *testing.F) {
	f.Add(ko("depends=a-b,c", "softdep=pre: x post: y", "alias=pci:*", "firmware=a/b", "vermagic=6.1 SMP"))
	f.Add(ko())
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		info, err := ReadInfo(bytes.NewReader(b))
		if err != nil {
			return
		}
		check(t, info)
	})
}

func FuzzParseInfo(f *testing.F) {
	f.Add([]byte("depends=a-b,,c\x00softdep=pre: x\talias=\x00alias=a b\x00=\x00vermagic= "))
	f.Fuzz(func(t *testing.T, b []byte) { check(t, parseInfo(b)) })
}

// check holds what the texts of a Selection rely on.
func check(t *testing.T, info Info) {
	for _, word := range info.Aliases {
		if strings.ContainsAny(word, " \t\r\n\x00") || word == "" {
			t.Errorf("alias %q", word)
		}
		_ = spellOut(word)
	}
	for _, dep := range info.Depends {
		if dep == "" || strings.Contains(dep, "-") {
			t.Errorf("depends on %q", dep)
		}
	}
	l := Library{Modules: []Module{{Path: "kernel/drivers/block/loop.ko", Info: info}}}
	l.Modules[0].Release = ""
	if s, err := l.Select([]string{"loop"}); err == nil {
		if lines := bytes.Count(s.Alias(), []byte("\n")); lines != len(info.Aliases) {
			t.Errorf("%d lines for %d aliases", lines, len(info.Aliases))
		}
		s.Dep()
		s.Devname()
		s.Filesystems()
	}
}
