package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"
)

// bzImage makes the smallest file that is one, as Documentation/arch/x86/boot.rst
// describes it, with payload in it.
func bzImage(payload []byte, change func(head []byte)) []byte {
	const setup = 4
	head := make([]byte, (setup+1)*512)
	le := binary.LittleEndian
	head[offSetupSects] = setup
	le.PutUint32(head[offSysSize:], uint32((len(payload)+15)/16))
	le.PutUint16(head[offBootFlag:], 0xaa55)
	copy(head[offMagic:], "HdrS")
	le.PutUint16(head[offProtocol:], 0x20f)
	le.PutUint16(head[offKernelVersion:], 0x300-0x200)
	head[offLoadFlags] = loadedHigh
	le.PutUint16(head[offXLoadFlags:], xlfKernel64)
	le.PutUint32(head[offCmdlineSize:], 2047)
	le.PutUint32(head[offPayloadLength:], uint32(len(payload)))
	le.PutUint64(head[offPrefAddress:], 16<<20)
	le.PutUint32(head[offInitSize:], 21<<20)
	copy(head[0x300:], "6.1.0-7-test (me@here) #1 SMP\x00")
	if change != nil {
		change(head)
	}
	file := append(head, payload...)
	return append(file, make([]byte, (16-len(payload)%16)%16)...)
}

func parse(b []byte) (Image, error) { return ParseImage(bytes.NewReader(b), int64(len(b))) }

func TestParseImage(t *testing.T) {
	le := binary.LittleEndian
	good := bzImage([]byte("payload."), nil)
	im, err := parse(good)
	if err != nil {
		t.Fatal(err)
	}
	want := Image{Release: "6.1.0-7-test", Version: "6.1.0-7-test (me@here) #1 SMP", Arch: "x86_64", CommandLine: 2047, LoadSize: 16, LoadAddress: 16 << 20, InitSize: 21 << 20, payloadOffset: 2560, payloadLength: 8}
	if diff := cmp.Diff(want, im, cmp.AllowUnexported(Image{})); diff != "" {
		t.Error(diff)
	}
	if im, err := parse(append(slices.Clone(good), "a signature behind it"...)); err != nil || im != want {
		t.Errorf("a signed kernel: %v, %v", im, err)
	}
	im, err = parse(bzImage(nil, func(h []byte) { le.PutUint16(h[offXLoadFlags:], 0) }))
	if err != nil || im.Arch != "i386" {
		t.Errorf("a 32-bit kernel: %+v, %v", im, err)
	}
	for _, tc := range []struct {
		name string
		file []byte
		not  bool // errors.Is ErrNotBzImage
		want string
	}{
		{"an empty file", nil, true, "the file is empty"},
		{"a short file", []byte("hello"), true, "its header is not a kernel's"},
		{"vmlinux", append([]byte("\x7fELF\x02\x01"), make([]byte, 4096)...), true, "ELF"},
		{"a gzip'ed Image", append([]byte("\x1f\x8b\x08"), make([]byte, 4096)...), true, "gzip"},
		{"an arm64 Image", append(append(make([]byte, 0x38), "ARM\x64"...), make([]byte, 4096)...), true, "arm64"},
		{"an initramfs", append([]byte("070701"), make([]byte, 4096)...), true, "cpio"},
		{"an EFI program", append([]byte("MZ"), make([]byte, 4096)...), true, "EFI"},
		{"a zImage", bzImage(nil, func(h []byte) { h[offLoadFlags] = 0 }), true, "zImage"},
		{"a boot sector", bzImage(nil, func(h []byte) { copy(h[offMagic:], "xxxx") }), true, "header"},
		{"Linux 2.6", bzImage(nil, func(h []byte) { le.PutUint16(h[offProtocol:], 0x20a) }), false, "too old: its boot protocol is 2.10"},
		{"a load address above 4 GiB", bzImage(nil, func(h []byte) { le.PutUint64(h[offPrefAddress:], 1<<32) }), false, "load address"},
		{"half a copy", bzImage(make([]byte, 4096), nil)[:4096], false, "cut short"},
		{"no version", bzImage(nil, func(h []byte) { le.PutUint16(h[offKernelVersion:], 0) }), false, "no version"},
		{"a version outside the file", bzImage(nil, func(h []byte) { le.PutUint16(h[offKernelVersion:], 0xfff0) }), false, "which is none"},
		{"a release that would be a path", bzImage(nil, func(h []byte) { copy(h[0x300:], "6/../../x ") }), false, "which is none"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := parse(tc.file)
			if err == nil || !strings.Contains(err.Error(), tc.want) || errors.Is(err, ErrNotBzImage) != tc.not {
				t.Errorf("error %v; want %q in it, ErrNotBzImage %v", err, tc.want, tc.not)
			}
		})
	}
}

const someConfig = "#\n# Automatically generated file; DO NOT EDIT.\n#\nCONFIG_64BIT=y\n# CONFIG_USB is not set\nCONFIG_EXT4_FS=m\nCONFIG_HZ=250\nCONFIG_LOCALVERSION=\"\"\n"

var someOptions = Config{"64BIT": "y", "EXT4_FS": "m", "HZ": "250", "LOCALVERSION": `""`}

// vmlinux is noise with a configuration in it, at the given place.
func vmlinux(at int) []byte {
	noise := make([]byte, at)
	r := rand.NewChaCha8([32]byte{})
	_, _ = r.Read(noise)
	b := bytes.NewBuffer(noise)
	b.WriteString("IKCFG_ST, as this text says, is no configuration\x00IKCFG_ST")
	z := gzip.NewWriter(b)
	_, _ = io.WriteString(z, someConfig)
	_ = z.Close()
	b.WriteString("IKCFG_ED")
	b.Write(noise[:min(at, 10000)])
	return b.Bytes()
}

func compressed(t testing.TB, name string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch name {
	case "gzip":
		w = gzip.NewWriter(&out)
	case "zstd":
		w, err = zstd.NewWriter(&out)
	case "lz4":
		z := lz4.NewWriter(&out)
		err = z.Apply(lz4.LegacyOption(true))
		w = z
	case "lzma":
		w, err = lzma.NewWriter(&out)
	case "bzip2":
		cmd := exec.Command(need.Tool(t, "bzip2", "bzip2"))
		cmd.Stdin = bytes.NewReader(b)
		cmd.Stdout = &out
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		return binary.LittleEndian.AppendUint32(out.Bytes(), uint32(len(b)))
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if name == "gzip" {
		return out.Bytes() // its trailer is the size
	}
	return binary.LittleEndian.AppendUint32(out.Bytes(), uint32(len(b)))
}

func TestEmbeddedConfig(t *testing.T) {
	for _, format := range []string{"gzip", "zstd", "lz4", "lzma", "bzip2"} {
		t.Run(format, func(t *testing.T) {
			// 256 KiB - 5 lays the marker across two reads.
			for _, at := range []int{0, 256<<10 - 5 - 49, 256<<10 - 5, 1 << 20} {
				file := bzImage(compressed(t, format, vmlinux(at)), nil)
				im, err := parse(file)
				if err != nil {
					t.Fatal(err)
				}
				got, err := im.EmbeddedConfig(context.Background(), bytes.NewReader(file))
				if err != nil {
					t.Fatalf("at %d: %v", at, err)
				}
				if diff := cmp.Diff(someOptions, got); diff != "" {
					t.Error(diff)
				}
			}
			file := bzImage(compressed(t, format, make([]byte, 100000)), nil)
			im, err := parse(file)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := im.EmbeddedConfig(context.Background(), bytes.NewReader(file)); !errors.Is(err, ErrNoConfig) {
				t.Errorf("without a configuration: %v", err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			if _, err := im.EmbeddedConfig(ctx, bytes.NewReader(file)); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled: %v", err)
			}
		})
	}
	for _, payload := range []string{"", "\xfd7zXZ\x00 and so on", "\x89LZO and so on"} {
		file := bzImage([]byte(payload), nil)
		im, err := parse(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := im.EmbeddedConfig(context.Background(), bytes.NewReader(file)); !errors.Is(err, ErrNoConfig) {
			t.Errorf("%.5q: %v", payload, err)
		}
	}
}

func TestParseConfig(t *testing.T) {
	got, err := ParseConfig(strings.NewReader(someConfig + "CONFIG_GONE=y\nCONFIG_GONE=n\n"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(someOptions, got); diff != "" {
		t.Error(diff)
	}
	for name, text := range map[string]string{
		"empty":             "",
		"only comments":     "# CONFIG_X is not set\n",
		"another text":      "[Unit]\nDescription=no\n",
		"an option in caps": "CONFIG_A=y\nCONFIG_ B=y\n",
		"too large":         strings.Repeat("CONFIG_A=y\n", maxConfig/11+1),
	} {
		if c, err := ParseConfig(strings.NewReader(text)); err == nil {
			t.Errorf("%s: taken as %d options", name, len(c))
		}
	}
}

// full is a configuration with all that is needed.
func full() Config {
	c := Config{"RD_ZSTD": "y", "RD_GZIP": "y"}
	for _, n := range append(slices.Clone(fatal), useful...) {
		for _, o := range n.options {
			c[strings.Split(o, "|")[0]] = "y"
		}
	}
	return c
}

func TestCheck(t *testing.T) {
	for _, tc := range []struct {
		name        string
		set         Config
		compression string
		fatal       bool
		want        string // the findings; "" for none
	}{
		{"all there", nil, "zstd", false, ""},
		{"no initramfs at all", Config{"BLK_DEV_INITRD": "", "RD_ZSTD": "", "RD_GZIP": ""}, "zstd", true,
			"the kernel does not load an initramfs, which is all of the system: CONFIG_BLK_DEV_INITRD is not set"},
		{"not this compression", Config{"RD_ZSTD": ""}, "zstd", true, "the kernel can't unpack an initramfs compressed by zstd: CONFIG_RD_ZSTD is not set"},
		{"another compression does", Config{"RD_ZSTD": ""}, "gzip", false, ""},
		{"uncompressed needs none", Config{"RD_ZSTD": "", "RD_GZIP": ""}, "none", false, ""},
		{"scripts as a module come too late for /init", Config{"BINFMT_SCRIPT": "m"}, "zstd", true,
			"/init is a script and can't run: CONFIG_BINFMT_SCRIPT is a module, which comes too late"},
		{"one of several does", Config{"FB_EFI": "", "DRM_SIMPLEDRM": "y"}, "zstd", false, ""},
		{"none of several", Config{"FB_EFI": "", "DRM_SIMPLEDRM": "m"}, "zstd", false,
			"the screen stays dark on a PC with UEFI: CONFIG_FB_EFI is not set, CONFIG_FB_SIMPLE is not set, CONFIG_DRM_SIMPLEDRM is a module, which comes too late"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := full()
			for k, v := range tc.set {
				c[k] = v
			}
			var got []string
			for _, f := range c.Check(tc.compression, nil) {
				got = append(got, f.String())
				if f.Fatal != tc.fatal {
					t.Errorf("%s: fatal %v", f, f.Fatal)
				}
			}
			if s := strings.Join(got, "; "); s != tc.want {
				t.Errorf("findings %q, want %q", s, tc.want)
			}
		})
	}
	// What /init loads is as good as built in, for a keyboard; half of it is not.
	keyboard := full()
	for _, o := range []string{"USB_HID", "HID_GENERIC", "USB_XHCI_HCD", "SERIO_I8042", "SERIAL_8250", "BINFMT_ELF"} {
		keyboard[o] = "m"
	}
	var got []string
	for _, f := range keyboard.Check("zstd", func(module string) bool { return module != "xhci_hcd" }) {
		got = append(got, f.String())
	}
	want := []string{
		"no program can run: CONFIG_BINFMT_ELF is a module, which comes too late",
		"a USB keyboard does not work: CONFIG_USB_XHCI_HCD is a module that is not in the initramfs",
		"there is no serial console, on which verification listens: CONFIG_SERIAL_8250 is a module, which comes too late",
	}
	if !slices.Equal(got, want) {
		t.Errorf("findings %q, want %q", got, want)
	}
	if got := (Config{}).Compression(); got != "none" {
		t.Error(got)
	}
	if got := (Config{"RD_GZIP": "y", "RD_ZSTD": "m"}).Compression(); got != "gzip" {
		t.Error(got)
	}
	if got := full().Compression(); got != "zstd" {
		t.Error(got)
	}
}

func TestCompareReleases(t *testing.T) {
	// From old to new.
	order := []string{"0-rescue-8f3", "5.10.0-30-amd64", "6.1", "6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-10-cloud-amd64", "6.9.0", "6.10.0-rc1-amd64", "6.10.0-rc10-amd64", "6.10.0", "6.10.0-amd64", "6.18.44"}
	for i, a := range order {
		for j, b := range order {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := CompareReleases(a, b); got != want {
				t.Errorf("%s against %s: %d, want %d", a, b, got, want)
			}
		}
	}
}

func FuzzParseImage(f *testing.F) {
	f.Add(bzImage([]byte("payload."), nil))
	f.Add(bzImage(nil, nil)[:1024])
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		im, err := parse(b)
		if err == nil && (im.Release == "" || strings.ContainsAny(im.Release, "/\n") || im.payloadOffset+im.payloadLength > int64(len(b))) {
			t.Errorf("taken: %+v", im)
		}
	})
}

func FuzzEmbeddedConfig(f *testing.F) {
	for _, format := range []string{"gzip", "zstd", "lz4", "lzma"} {
		f.Add(compressed(f, format, vmlinux(100)))
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		if len(payload) > 1<<16 {
			t.Skip("larger than a bomb needs to be")
		}
		im := Image{payloadLength: int64(len(payload))}
		c, err := im.EmbeddedConfig(context.Background(), bytes.NewReader(payload))
		if err == nil && len(c) == 0 {
			t.Error("a configuration without options")
		}
	})
}

func FuzzParseConfig(f *testing.F) {
	f.Add(someConfig)
	f.Add("CONFIG_=y\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseConfig(strings.NewReader(text))
		if err == nil && len(c) == 0 {
			t.Error("a configuration without options")
		}
		c.Check(c.Compression(), nil)
	})
}

func FuzzCompareReleases(f *testing.F) {
	f.Add("6.1.0-9-amd64", "6.1.0-rc1")
	f.Fuzz(func(t *testing.T, a, b string) {
		if CompareReleases(a, b) != -CompareReleases(b, a) || CompareReleases(a, a) != 0 {
			t.Error("no order")
		}
	})
}
