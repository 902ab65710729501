package imagegen

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/imagegen/debian/debiantest"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/manifest"
)

// tinyKernel is a header without a kernel behind it.
func tinyKernel(release string, amd64 bool) string {
	b := make([]byte, 5*512)
	b[0x1f1] = 4
	binary.LittleEndian.PutUint16(b[0x1fe:], 0xaa55)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x20f)
	binary.LittleEndian.PutUint16(b[0x20e:], 0x100)
	b[0x211] = 1
	if amd64 {
		b[0x236] = 1
	}
	binary.LittleEndian.PutUint32(b[0x238:], 255)
	copy(b[0x300:], release+" (me@here) #1")
	return string(b)
}

// tinyBusybox is an ELF header with a table of applets behind it.
func tinyBusybox(segment elf.ProgType, applets []string) string {
	data := "/lib64/ld.so\x00BusyBox v1.2.3\x00--install\x00\x00" + strings.Join(applets, "\x00") + "\x00"
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	_ = binary.Write(&b, binary.LittleEndian, h)
	_ = binary.Write(&b, binary.LittleEndian, elf.Prog64{Type: uint32(segment), Off: 120, Filesz: 13})
	b.WriteString(data)
	return b.String()
}

var goodBusybox = tinyBusybox(elf.PT_LOAD, initramfs.Applets)

const goodConfig = `CONFIG_64BIT=y
CONFIG_BLK_DEV_INITRD=y
CONFIG_RD_ZSTD=y
CONFIG_RD_GZIP=y
CONFIG_BINFMT_ELF=y
CONFIG_BINFMT_SCRIPT=y
CONFIG_PROC_FS=y
CONFIG_TTY=y
`

// host is a machine's root with the given files, and a generator on it whose
// apt knows an empty repository.
func host(t *testing.T, files map[string]string) (Generator, *debiantest.Repository) {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	repo := debiantest.New(t)
	// Closed folders would make apt fetch without its sandbox, with a warning.
	cache, err := os.MkdirTemp("", "memlinux-cache-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(cache) })
	if err := os.Chmod(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	return Generator{CacheDir: cache, Root: root, Release: "6.1.0-9-amd64", Apt: repo.Apt()}, repo
}

func file(t *testing.T, name, content string) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestAutoPicksTheKernel(t *testing.T) {
	kernels := func(releases ...string) map[string]string {
		files := map[string]string{"bin/busybox": goodBusybox}
		for _, r := range releases {
			files["boot/vmlinuz-"+r] = tinyKernel(strings.TrimSuffix(r, ".old"), !strings.Contains(r, "686"))
			files["boot/config-"+r] = goodConfig
		}
		return files
	}
	for _, tc := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"the running one before a newer one", kernels("6.1.0-9-amd64", "6.1.0-10-amd64"), "6.1.0-9-amd64"},
		{"else the newest by number", kernels("6.1.0-8-amd64", "6.1.0-10-amd64"), "6.1.0-10-amd64"},
		{"not one for another architecture", kernels("6.1.0-8-amd64", "6.1.0-10-686"), "6.1.0-8-amd64"},
		{"not a saved old one", kernels("6.1.0-8-amd64", "6.1.0-10-amd64.old"), "6.1.0-8-amd64"},
		{"else Debian's, through the meta package", map[string]string{"bin/busybox": goodBusybox}, "6.1.0-56-cloud-amd64"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g, repo := host(t, tc.files)
			repo.Add(DefaultKernelPackage, "6.1.192-2", "linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)", nil)
			repo.Add("linux-image-6.1.0-56-cloud-amd64", "6.1.192-2", "kmod", map[string]string{
				"boot/vmlinuz-6.1.0-56-cloud-amd64": tinyKernel("6.1.0-56-cloud-amd64", true),
				"boot/config-6.1.0-56-cloud-amd64":  goodConfig,
			})
			s, err := g.Build(t.Context(), Recipe{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if s.Manifest.Kernel.Release != tc.want {
				t.Errorf("kernel %s, want %s", s.Manifest.Kernel.Release, tc.want)
			}
			if s.Manifest.Kernel.Config != "config-"+tc.want || s.Manifest.Initramfs.Compression != "zstd" {
				t.Errorf("config %q, compression %q", s.Manifest.Kernel.Config, s.Manifest.Initramfs.Compression)
			}
		})
	}
}

func TestBusyboxFromDebian(t *testing.T) {
	g, repo := host(t, map[string]string{
		"bin/busybox":                tinyBusybox(elf.PT_INTERP, initramfs.Applets), // Debian's package busybox is dynamic
		"boot/vmlinuz-6.1.0-9-amd64": tinyKernel("6.1.0-9-amd64", true),
		"boot/config-6.1.0-9-amd64":  goodConfig,
	})
	repo.Add(BusyboxPackage, "1:1.35", "", map[string]string{"bin/busybox": goodBusybox, "usr/share/doc/busybox-static/copyright": "GPL"})
	s, err := g.Build(t.Context(), Recipe{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(manifest.Busybox{Version: "1.2.3", SHA256: s.Manifest.Busybox.SHA256, Source: "debian busybox-static 1:1.35", Applets: initramfs.Applets}, s.Manifest.Busybox); diff != "" {
		t.Error(diff)
	}
}

// A second build needs no repository, a new version is fetched, and when that
// fails the cached one is used with a word about it.
func TestDebianPackageIsCached(t *testing.T) {
	g, repo := host(t, map[string]string{"bin/busybox": goodBusybox})
	const name = "linux-image-6.1.0-9-amd64"
	add := func(version, release string) {
		repo.Add(name, version, "", map[string]string{"boot/vmlinuz-" + release: tinyKernel(release, true), "boot/config-" + release: goodConfig})
	}
	build := func() *System {
		t.Helper()
		s, err := g.Build(t.Context(), Recipe{Kernel: KernelSource{Debian: name}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	fetchWarning := func(s *System) bool { return strings.Contains(strings.Join(s.Warnings, "\n"), "could not be fetched") }

	add("1", "6.1.0-1")
	first := build()
	if err := os.Remove(repo.Deb(name, "1")); err != nil {
		t.Fatal(err)
	}
	if again := build(); again.ID != first.ID || fetchWarning(again) {
		t.Errorf("the second build: %s, not %s; warnings %q", again.ID, first.ID, again.Warnings)
	}
	add("2", "6.1.0-2")
	if err := g.Apt.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := build().Manifest.Kernel; got.Release != "6.1.0-2" || got.Source != "debian "+name+" 2" {
		t.Errorf("after an update: %+v", got)
	}
	add("3", "6.1.0-3")
	if err := g.Apt.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(repo.Deb(name, "3")); err != nil {
		t.Fatal(err)
	}
	if s := build(); s.Manifest.Kernel.Release != "6.1.0-2" || !fetchWarning(s) {
		t.Errorf("offline: %s, warnings %q", s.Manifest.Kernel.Release, s.Warnings)
	}
}

// Two builds of one recipe with other folders, another cache and, in between,
// other times must give the same bytes, the manifest's too.
func TestBuildIsReproducible(t *testing.T) {
	files := map[string]string{
		"bin/busybox":                goodBusybox,
		"boot/vmlinuz-6.1.0-9-amd64": tinyKernel("6.1.0-9-amd64", true),
		"boot/config-6.1.0-9-amd64":  goodConfig,
	}
	var manifests, initramfses [][]byte
	for range 2 {
		g, _ := host(t, files)
		s, err := g.Build(t.Context(), Recipe{Append: "panic=5", Epoch: time.Unix(1e9, 0)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.Manifest.JSON()
		if err != nil {
			t.Fatal(err)
		}
		i, err := os.ReadFile(s.Initramfs.Path)
		if err != nil {
			t.Fatal(err)
		}
		manifests, initramfses = append(manifests, m), append(initramfses, i)
		if strings.Contains(string(m), g.Root) || strings.Contains(string(m), g.CacheDir) {
			t.Errorf("the manifest tells where it was made:\n%s", m)
		}
		if s.Cmdline != "console=ttyS0,115200 console=tty0 panic=5" || !regexp.MustCompile(`^[0-9a-f]{16}$`).MatchString(s.ID) {
			t.Errorf("command line %q, ID %q", s.Cmdline, s.ID)
		}
	}
	if diff := cmp.Diff(string(manifests[0]), string(manifests[1])); diff != "" {
		t.Error(diff)
	}
	if !bytes.Equal(initramfses[0], initramfses[1]) {
		t.Error("the initramfs differs")
	}
	var back manifest.Manifest
	if err := json.Unmarshal(manifests[0], &back); err != nil {
		t.Fatal(err)
	}
	if len(back.Initramfs.Files) == 0 || back.Initramfs.Unpacked == 0 {
		t.Errorf("manifest:\n%s", manifests[0])
	}
}

func TestEverythingIsInTheID(t *testing.T) {
	g, _ := host(t, map[string]string{"bin/busybox": goodBusybox, "boot/vmlinuz-6.1.0-9-amd64": tinyKernel("6.1.0-9-amd64", true)})
	ids := map[string]string{}
	for name, r := range map[string]Recipe{
		"as it is":      {},
		"command line":  {Append: "x"},
		"date":          {Epoch: time.Unix(1, 0)},
		"compression":   {Compression: initramfs.Compression{Name: "none"}},
		"kernel":        {Kernel: KernelSource{File: file(t, "k", tinyKernel("6.1.0-8", true))}},
		"other busybox": {Busybox: BusyboxSource{File: file(t, "b", goodBusybox+"x")}},
	} {
		s, err := g.Build(t.Context(), r, nil)
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := ids[s.ID]; ok {
			t.Errorf("%s and %s have the ID %s", name, other, s.ID)
		}
		ids[s.ID] = name
	}
}

func TestBuildRefuses(t *testing.T) {
	g, _ := host(t, map[string]string{
		"bin/busybox":                goodBusybox,
		"boot/vmlinuz-6.1.0-9-amd64": tinyKernel("6.1.0-9-amd64", true),
		"boot/config-6.1.0-9-amd64":  goodConfig,
	})
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	pipe, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	defer w.Close()
	without := func(option string) KernelSource {
		config := strings.NewReader(regexp.MustCompile("(?m)^CONFIG_"+option+"=y\n").ReplaceAllString(goodConfig, ""))
		return KernelSource{File: file(t, "k", tinyKernel("6.1.0-8", true)), Configs: map[string]io.ReaderAt{"config-6.1.0-8": config, "config-6.1.0-7": strings.NewReader("no")}}
	}
	for _, tc := range []struct {
		name string
		r    Recipe
		kind error
		want string
	}{
		{"a compression nobody knows", Recipe{Compression: initramfs.Compression{Name: "lzo"}}, ErrRecipe, `"lzo" is no compression of the initramfs; use auto, zstd, gzip or none`},
		{"a line break, which would be a line of the menu", Recipe{Append: "a\nboot"}, ErrRecipe, `the character '\n'`},
		{"a forged build", Recipe{Append: "a memlinux.build=0"}, ErrRecipe, "set by the boot entry"},
		{"a command line the kernel would cut", Recipe{Append: strings.Repeat("x", 200)}, ErrRecipe, "and the kernel takes 255; shorten"},
		{"an option for apt", Recipe{Kernel: KernelSource{Debian: "-oX=1"}}, ErrRecipe, "not a Debian package name"},
		{"a package nobody has", Recipe{Kernel: KernelSource{Debian: "linux-image-nothere"}}, nil, "package linux-image-nothere: linux-image-nothere: apt knows no such package"},
		{"a kernel that is a folder", Recipe{Kernel: KernelSource{File: dir}}, ErrKernel, "it is a directory"},
		{"a kernel that is a pipe", Recipe{Kernel: KernelSource{File: pipe}}, ErrKernel, "not a regular file"},
		{"an empty kernel", Recipe{Kernel: KernelSource{File: file(t, "k", "")}}, ErrKernel, "the file is empty"},
		{"vmlinux", Recipe{Kernel: KernelSource{File: file(t, "k", "\x7fELF")}}, ErrKernel, "not a bzImage"},
		{"a 32-bit kernel", Recipe{Kernel: KernelSource{File: file(t, "k", tinyKernel("6.1.0-686", false))}}, ErrKernel, "kernel 6.1.0-686 is for i386, and memlinux makes amd64 systems"},
		{"a kernel without initramfs", Recipe{Kernel: without("BLK_DEV_INITRD")}, ErrKernel, "CONFIG_BLK_DEV_INITRD is not set"},
		{"a kernel without the chosen decompressor", Recipe{Kernel: without("RD_ZSTD"), Compression: initramfs.Compression{Name: "zstd"}}, ErrKernel, "CONFIG_RD_ZSTD is not set"},
		{"a dynamic busybox", Recipe{Busybox: BusyboxSource{File: file(t, "b", tinyBusybox(elf.PT_INTERP, initramfs.Applets))}}, ErrBusybox, "dynamically linked (interpreter /lib64/ld.so)"},
		{"a busybox without switch_root", Recipe{Busybox: BusyboxSource{File: file(t, "b", tinyBusybox(elf.PT_LOAD, initramfs.Applets[:slices.Index(initramfs.Applets, "switch_root")]))}}, ErrBusybox, "lacks the applet"},
		{"no busybox at all", Recipe{Busybox: BusyboxSource{File: file(t, "b", "#!/bin/sh")}}, ErrBusybox, "not a program"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := g.Build(t.Context(), tc.r, nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Fatalf("error %v, want %q in it, on one line", err, tc.want)
			}
			if tc.kind != nil && !errors.Is(err, tc.kind) {
				t.Errorf("%v is not of the kind %q", err, tc.kind)
			}
		})
	}
	if left, err := os.ReadDir(filepath.Join(g.CacheDir, "tmp")); err != nil || len(left) > 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
	// What was refused must not stand in the way of what is good.
	s, err := g.Build(t.Context(), Recipe{Kernel: without("RD_ZSTD")}, nil)
	if err != nil || s.Manifest.Initramfs.Compression != "gzip" {
		t.Errorf("auto compression: %+v, %v", s, err)
	}
}

func TestUnknownConfigurationIsAWarning(t *testing.T) {
	g, _ := host(t, map[string]string{"bin/busybox": goodBusybox})
	s, err := g.Build(t.Context(), Recipe{Kernel: KernelSource{File: file(t, "k", tinyKernel("6.1.0-8", true))}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Warnings) != 2 || !strings.Contains(s.Warnings[0], "no modules are in the initramfs (a kernel that is given as a file comes without them)") ||
		!strings.Contains(s.Warnings[1], "config-6.1.0-8 beside it") || s.Manifest.Initramfs.Compression != "gzip" {
		t.Errorf("warnings %q, compression %s", s.Warnings, s.Manifest.Initramfs.Compression)
	}
}

func TestBuildCancelled(t *testing.T) {
	g, _ := host(t, map[string]string{
		"bin/busybox":                goodBusybox,
		"boot/vmlinuz-6.1.0-9-amd64": tinyKernel("6.1.0-9-amd64", true),
		"boot/config-6.1.0-9-amd64":  goodConfig,
	})
	for _, phase := range []string{"kernel", "initramfs"} {
		ctx, cancel := context.WithCancel(t.Context())
		_, err := g.Build(ctx, Recipe{}, func(p string, done, total int64) {
			if done > total && total > 0 {
				t.Errorf("%s: %d of %d bytes", p, done, total)
			}
			if p == phase {
				cancel()
			}
		})
		cancel()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("in phase %s: %v", phase, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(g.CacheDir, "tmp")); err != nil || len(left) > 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
}

func ExampleGenerator_Build() {
	g := Generator{CacheDir: "/var/cache/memlinux"}
	s, err := g.Build(context.Background(), Recipe{Append: "panic=10"}, nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(s.Kernel.Path, s.Initramfs.Path, s.Cmdline+" memlinux.build="+s.ID)
}
