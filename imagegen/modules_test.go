package imagegen

import (
	"bytes"
	"debug/elf"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/manifest"
	"github.com/memlinux/memlinux/imagegen/modules/modulestest"
)

const modularConfig = goodConfig + "CONFIG_MODULES=y\n"

// modular is a host with a kernel that has modules.
func modular() map[string]string {
	const dir = "lib/modules/6.1.0-9-amd64/"
	ko := func(pieces ...string) string { return string(modulestest.Module(pieces...)) }
	return map[string]string{
		"bin/busybox":                           tinyBusyboxWithModules,
		"boot/vmlinuz-6.1.0-9-amd64":            tinyKernel("6.1.0-9-amd64", true),
		"boot/config-6.1.0-9-amd64":             modularConfig,
		dir + "modules.builtin":                 "kernel/drivers/nvme/host/nvme.ko\n",
		dir + "modules.dep":                     "not read, and wrong",
		dir + "kernel/drivers/scsi/scsi_mod.ko": ko("vermagic=6.1.0-9-amd64 SMP"),
		dir + "kernel/drivers/scsi/sd_mod.ko":   ko("depends=scsi_mod", "alias=scsi:t-0x00*"),
		dir + "kernel/drivers/hid/hid-apple.ko": ko("firmware=apple.fw"),
		dir + "kernel/fs/ext4/ext4.ko":          ko("alias=fs-ext4"),
		dir + "kernel/drivers/net/dummy.ko":     ko("depends=nothere"),
	}
}

// The table of applets is sorted, as in the real one.
var tinyBusyboxWithModules = tinyBusybox(elf.PT_LOAD, slices.Sorted(slices.Values(slices.Concat(initramfs.Applets, initramfs.ModuleApplets))))

// paths are the files of a system below lib/modules/RELEASE/ and the file
// systems for mount.
func paths(s *System) string {
	var all []string
	for _, f := range s.Manifest.Initramfs.Files {
		if name, ok := strings.CutPrefix(f.Path, "lib/modules/6.1.0-9-amd64/"); ok && f.SHA256 != "" {
			all = append(all, filepath.Base(name))
		}
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

const texts = " modules.alias modules.dep modules.devname"

func TestModulesOfTheHost(t *testing.T) {
	g, _ := host(t, modular())
	build := func(choice ...string) *System {
		t.Helper()
		s, err := g.Build(t.Context(), Recipe{Modules: choice}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	noModules := func(s *System) bool {
		return strings.Contains(strings.Join(s.Warnings, "\n"), "no modules are in the initramfs")
	}
	for choice, want := range map[string]string{
		"":                 "ext4.ko hid-apple.ko" + texts + " scsi_mod.ko sd_mod.ko",
		"none":             "",
		"sd-mod":           strings.TrimSpace(texts + " scsi_mod.ko sd_mod.ko"),
		"filesystems nvme": "ext4.ko" + texts,
		"network":          "", // a set of which nothing is there
	} {
		s := build(strings.Fields(choice)...)
		if got := paths(s); got != want || noModules(s) {
			t.Errorf("%q: %q, want %q; warnings %q", choice, got, want, s.Warnings)
		}
	}
	if diff := cmp.Diff(manifest.Modules{Sets: []string{"disk", "filesystems", "input", "usb-storage"}, Count: 4, Firmware: []string{}, MissingFirmware: []string{"apple.fw"}}, build().Manifest.Modules); diff != "" {
		t.Error(diff)
	}
	// A changed module is imported anew, as an added one is.
	dir := filepath.Join(g.Root, "lib/modules/6.1.0-9-amd64")
	before := build("ext4")
	ext4 := filepath.Join(dir, "kernel/fs/ext4/ext4.ko")
	if err := os.WriteFile(ext4, modulestest.Module("alias=fs-ext3"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(ext4, time.Time{}, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if build("ext4").ID == before.ID {
		t.Error("a changed module is not in the next build")
	}
	// The archive is gone, as when somebody empties the cache by halves.
	files, err := filepath.Glob(filepath.Join(g.CacheDir, "files", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	if build("ext4").Manifest.Modules.Count != 1 {
		t.Error("nothing was imported after the cache was emptied")
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if s := build(); !noModules(s) || paths(s) != "" {
		t.Errorf("without the folder: %q, warnings %q", paths(s), s.Warnings)
	}
	if s := build("none"); noModules(s) {
		t.Errorf("none was asked for: %q", s.Warnings)
	}
}

func TestModulesRefused(t *testing.T) {
	files := modular()
	files["lib/modules/6.1.0-9-amd64/kernel/fs/xfs.ko"] = "no module"
	g, _ := host(t, files)
	kernelFile := KernelSource{File: file(t, "k", tinyKernel("6.1.0-8", true))}
	for _, tc := range []struct {
		name string
		r    Recipe
		kind error
		want string
	}{
		{"none and more", Recipe{Modules: []string{"none", "disk"}}, ErrRecipe, "none goes with nothing else"},
		{"what is no name", Recipe{Modules: []string{"../x"}}, ErrRecipe, `"../x" is neither a set (input, `},
		{"a module that is nowhere", Recipe{Modules: []string{"e1000"}}, ErrRecipe, "e1000 is neither loadable nor built in"},
		{"a module of a kernel file", Recipe{Modules: []string{"disk", "e1000"}, Kernel: kernelFile}, ErrRecipe, "the module e1000 can't be had: no modules of kernel 6.1.0-8 are known"},
		{"a dependency that is nowhere", Recipe{Modules: []string{"dummy"}}, ErrKernel, "module nothere, which dummy depends on, is missing"},
		{"a broken module", Recipe{Modules: []string{"xfs"}}, ErrKernel, "(kernel/fs/xfs.ko) can't be used: it is no module"},
		{"a busybox that can't load modules", Recipe{Busybox: BusyboxSource{File: file(t, "b", goodBusybox)}}, ErrBusybox, "lacks the applet find, which this system needs"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := g.Build(t.Context(), tc.r, nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") || !errors.Is(err, tc.kind) {
				t.Errorf("error %v, want %q in it, on one line, of the kind %q", err, tc.want, tc.kind)
			}
		})
	}
	if left, err := os.ReadDir(filepath.Join(g.CacheDir, "tmp")); err != nil || len(left) > 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
}

// A package's modules come with its kernel, are there for the next build
// without the network, and are fetched when an earlier build wanted none. From
// the package and from the host's folder they are the same system.
func TestModulesOfDebian(t *testing.T) {
	g, repo := host(t, map[string]string{"bin/busybox": tinyBusyboxWithModules})
	const name = "linux-image-6.1.0-9-amd64"
	files := modular()
	delete(files, "bin/busybox")
	// Another release in the same package is not this kernel's.
	files["lib/modules/6.1.0-99-amd64/kernel/fs/ext4/ext4.ko"] = "x"
	repo.Add(name, "1", "", files)
	build := func(g Generator, k KernelSource, choice ...string) *System {
		t.Helper()
		s, err := g.Build(t.Context(), Recipe{Kernel: k, Modules: choice}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	k := KernelSource{Debian: name}
	if s := build(g, k, "none"); s.Manifest.Modules.Count != 0 {
		t.Errorf("none: %q", paths(s))
	}
	first := build(g, k)
	if got := paths(first); got != "ext4.ko hid-apple.ko"+texts+" scsi_mod.ko sd_mod.ko" {
		t.Errorf("modules %q", got)
	}
	if err := os.Remove(repo.Deb(name, "1")); err != nil {
		t.Fatal(err)
	}
	again := build(g, k)
	if again.ID != first.ID || len(again.Warnings) != len(first.Warnings) {
		t.Errorf("the second build: %s, not %s; warnings %q", again.ID, first.ID, again.Warnings)
	}
	if s := build(g, k, "none"); s.Manifest.Modules.Count != 0 {
		t.Errorf("none: %q", paths(s))
	}
	other, _ := host(t, modular())
	twin := build(other, KernelSource{})
	a, err := os.ReadFile(first.Initramfs.Path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(twin.Initramfs.Path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) || twin.ID != first.ID {
		t.Error("the package and the host's folder give different systems")
	}

	repo.Add("linux-image-empty", "1", "", map[string]string{"boot/vmlinuz-6": tinyKernel("6", true), "boot/config-6": modularConfig})
	if err := g.Apt.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := build(g, KernelSource{Debian: "linux-image-empty"}); !strings.Contains(strings.Join(s.Warnings, "\n"), "(Debian's package linux-image-empty has none)") {
		t.Errorf("a package without modules: %q", s.Warnings)
	}
}
