package kbuild

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"github.com/memlinux/memlinux/imagegen/tarball"
	"github.com/memlinux/memlinux/testvm/need"
)

// fakeMakefile stands for the kernel's: it takes every option but those in the
// file drop, and compiles nothing.
const fakeMakefile = `VERSION = 9
PATCHLEVEL = 9
SUBLEVEL = 1

tinyconfig x86_64_defconfig:
	printf 'CONFIG_64BIT=y\nCONFIG_X86_64=y\nCONFIG_BLK_DEV_INITRD=y\n# CONFIG_TINY is not set\n' >$(O)/.config
olddefconfig:
	grep -vxFf drop $(O)/.config >$(O)/.new
	mv $(O)/.new $(O)/.config
bzImage:
	@for i in 1 2 3 4 5; do echo "  CC      init/file$$i.o"; done
	mkdir -p $(O)/arch/x86/boot $(O)/include/config
	id -u >$(O)/arch/x86/boot/bzImage
	echo $(KBUILD_BUILD_USER) $(CC) >>$(O)/arch/x86/boot/bzImage
	echo 9.9.1-fake >$(O)/include/config/kernel.release
	@echo "  LD [M]  this/is.ko"
modules:
	@echo "  CC [M]  drivers/one.o"
modules_install:
	mkdir -p $(INSTALL_MOD_PATH)/lib/modules/9.9.1-fake/kernel
	touch $(INSTALL_MOD_PATH)/lib/modules/9.9.1-fake/kernel/one.ko
	ln -s $(CURDIR) $(INSTALL_MOD_PATH)/lib/modules/9.9.1-fake/build
`

const fakeKconfig = `mainmenu "Linux"
source "arch/$(SRCARCH)/Kconfig"
config MODULES
	bool "Modules"
menu "Drivers"
	depends on DRIVERS
config CARD
	tristate "A card" if EXPERT
	depends on PCI && (ISA || USB)
	help
	  config NOT_THIS
	  a text
config HELPER
	bool
endmenu
config USB
	bool "USB"
	select HELPER
config USB_STORAGE
	bool "Storage"
	depends on USB
`

func fakeFiles(change map[string]string) map[string]string {
	files := map[string]string{
		"Makefile": fakeMakefile, "Kbuild": "#\n", "Kconfig": fakeKconfig, "arch/x86/Makefile": "#\n", "arch/x86/Kconfig": "config 64BIT\n\tbool \"64\"\n",
		"drop": "no such line\n",
	}
	maps.Copy(files, change)
	return files
}

// tarOf is a tar of files, with their folders, below top.
func tarOf(t testing.TB, top string, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h *tar.Header, content string) {
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if top != "" {
		add(&tar.Header{Typeflag: tar.TypeDir, Name: top + "/", Mode: 0o755}, "")
	}
	made := map[string]bool{".": true}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		dir := filepath.Dir(name)
		for i := range len(dir) + 1 {
			if sub := dir[:i]; (i == len(dir) || dir[i] == '/') && sub != "" && !made[sub] && !strings.Contains(sub, "..") {
				made[sub] = true
				add(&tar.Header{Typeflag: tar.TypeDir, Name: filepath.Join(top, sub) + "/", Mode: 0o755}, "")
			}
		}
		path := name
		if top != "" {
			path = top + "/" + name
		}
		add(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o644}, files[name])
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(b)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// workDir is an empty folder that the compilers' user can reach; t.TempDir is
// in one that it can't in some setups.
func workDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "memlinux-kbuild-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func request(t testing.TB, source []byte) Request {
	t.Helper()
	path := filepath.Join(t.TempDir(), "linux.tar")
	if err := os.WriteFile(path, source, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	sum := sha256.Sum256(source)
	return Request{Source: f, Size: int64(len(source)), SourceSHA256: hex.EncodeToString(sum[:]), Base: "minimal", WorkDir: workDir(t)}
}

// needTools needs what a build asks for, also where the kernel is a fake.
func needTools(t testing.TB) {
	t.Helper()
	need.Root(t)
	for _, tool := range tools {
		if strings.HasPrefix(tool.name, "/") {
			need.File(t, tool.name, tool.pkg)
		} else {
			need.Tool(t, tool.name, tool.pkg)
		}
	}
	need.Tool(t, "zstd", "zstd")
}

func TestBuild(t *testing.T) {
	needTools(t)
	r := request(t, gz(t, tarOf(t, "linux-9.9.1", fakeFiles(map[string]string{
		"Documentation/Makefile": "", "Documentation/a.rst": "long", "arch/arm/Kconfig": "", "arch/arm/mach.c": "", "out/old.o": "x", ".config": "CONFIG_OLD=y\n",
	}))))
	r.Fragments = []Fragment{{Name: "more", Text: []byte("CONFIG_MODULES=y\n")}}
	r.Modules = true
	r.CcacheDir = workDir(t)
	steps := map[string]int64{}
	res, err := Build(t.Context(), r, func(step string, done, total int64) {
		if done < steps[step] || done > total {
			t.Errorf("%s: %d of %d behind %d", step, done, total, steps[step])
		}
		steps[step] = done
	})
	if err != nil {
		t.Fatal(err)
	}
	if res.Release != "9.9.1-fake" || res.Objects != 6 || len(res.Warnings) > 0 {
		t.Errorf("%+v", res)
	}
	if diff := cmp.Diff(map[string]int64{"unpack": r.Size, "compile": 6}, steps); diff != "" {
		t.Error(diff)
	}
	image, err := os.ReadFile(res.Image)
	if err != nil {
		t.Fatal(err)
	}
	if want := "65534\nmemlinux "; !strings.HasPrefix(string(image), want) {
		t.Errorf("made by %q, not unprivileged, or not under the fixed name", image)
	}
	config, err := os.ReadFile(res.Config)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"CONFIG_MODULES=y", "CONFIG_USB_HID=y", "# CONFIG_TINY is not set"} {
		if !strings.Contains("\n"+string(config), "\n"+line+"\n") {
			t.Errorf("the configuration has no %q", line)
		}
	}
	if strings.Contains(string(config), "OLD") {
		t.Error("a former configuration came along")
	}
	listing, _ := filepath.Glob(res.ModulesDir + "/*")
	if len(listing) != 1 || filepath.Base(listing[0]) != "kernel" {
		t.Errorf("modules: %q", listing)
	}
	for name, want := range map[string]bool{"Documentation/Makefile": true, "Documentation/a.rst": false, "arch/arm/Kconfig": true, "arch/arm/mach.c": false, "out/old.o": false} {
		if _, err := os.Stat(filepath.Join(r.WorkDir, "source/linux-9.9.1", name)); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if log, err := os.ReadFile(res.Log); err != nil || !strings.Contains(string(log), "CC      init/file5.o") {
		t.Errorf("log %q, %v", log, err)
	}
}

func TestBuildFailures(t *testing.T) {
	needTools(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("the secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	replaced := func(old, with string) map[string]string {
		if !strings.Contains(fakeMakefile, old) {
			t.Fatalf("the fake has no %q", old)
		}
		return map[string]string{"Makefile": strings.Replace(fakeMakefile, old, with, 1)}
	}
	for _, tc := range []struct {
		name   string
		change map[string]string
		with   func(*Request)
		want   []string
	}{
		{"an option that was dropped is named with what it lacks", map[string]string{"drop": "CONFIG_CARD=m\nCONFIG_USB=y\n"}, func(r *Request) {
			r.Fragments = []Fragment{{Name: "cards.config", Text: []byte("CONFIG_CARD=m\n# CONFIG_EXPERT is not set\n")}}
		}, []string{"Linux 9.9.1: it did not take", "CONFIG_CARD=m (cards.config): it needs CONFIG_DRIVERS (not set) and CONFIG_EXPERT"}},
		{"a user's option that does not exist", map[string]string{"drop": "CONFIG_NEVER=y\n"}, func(r *Request) {
			r.Fragments = []Fragment{{Name: "mine", Text: []byte("CONFIG_NEVER=y\n")}}
		}, []string{"CONFIG_NEVER=y (mine): this kernel has no such option"}},
		{"no programs can run", map[string]string{"drop": "CONFIG_BINFMT_ELF=y\n"}, nil, []string{"no program can run: CONFIG_BINFMT_ELF is not set"}},
		{"the initramfs is lost", map[string]string{"drop": "CONFIG_BLK_DEV_INITRD=y\n"}, func(r *Request) {
			r.Base, r.Config = "", []byte("CONFIG_X86_64=y\nCONFIG_64BIT=y\nCONFIG_BLK_DEV_INITRD=y\n")
		}, []string{"has no CONFIG_BLK_DEV_INITRD"}},
		{"the initramfs is switched off", nil, func(r *Request) {
			r.Fragments = []Fragment{{Name: "mine", Text: []byte("# CONFIG_BLK_DEV_INITRD is not set\n")}}
		}, []string{"switches CONFIG_BLK_DEV_INITRD off"}},
		{"32 bits", nil, func(r *Request) {
			r.Base, r.Config = "", []byte("CONFIG_X86_32=y\nCONFIG_BLK_DEV_INITRD=y\n")
		}, []string{"not for amd64"}},
		{"Debian's configuration", nil, func(r *Request) {
			r.Base, r.Config = "", []byte("CONFIG_64BIT=y\nCONFIG_X86_64=y\nCONFIG_BLK_DEV_INITRD=y\nCONFIG_BINFMT_ELF=y\nCONFIG_BINFMT_SCRIPT=y\nCONFIG_PROC_FS=y\nCONFIG_TTY=y\nCONFIG_SYSTEM_TRUSTED_KEYS=\"debian/certs/a.pem\"\n")
		}, []string{`CONFIG_SYSTEM_TRUSTED_KEYS=""`}},
		{"a compile error", replaced("\tmkdir -p $(O)/arch", "\t@echo 'a.c:1: error: no'; for i in $$(seq 100); do echo more $$i; done; false\n\tmkdir -p $(O)/arch"), nil,
			[]string{"compile Linux 9.9.1: make: exit status 2; the log says:\n  a.c:1: error: no\n  [...]\n", "more 100", "***"}},
		{"no Makefile of a kernel", map[string]string{"Makefile": "all:\n"}, nil, []string{"no Linux kernel's source", "VERSION"}},
		{"a configuration that is a link to a secret", replaced("\tmv $(O)/.new $(O)/.config", "\tln -sf "+secret+" $(O)/.config"), nil, []string{"configure Linux"}},
		{"a kernel that is a link to a secret", replaced("\techo 9.9.1-fake", "\tln -sf "+secret+" $(O)/arch/x86/boot/bzImage\n\techo 9.9.1-fake"), nil, []string{"do not trust this source"}},
		{"a folder that is a link", replaced("\techo 9.9.1-fake", "\tmv $(O)/arch /$(CURDIR)/../x; ln -s ../../x $(O)/arch\n\techo 9.9.1-fake"), nil, []string{"do not trust this source"}},
		{"a release that is a path", replaced("echo 9.9.1-fake", "echo ../../etc"), nil, []string{"no release"}},
		{"a kernel that is not made", replaced("\tid -u >$(O)/arch/x86/boot/bzImage\n\techo $(KBUILD_BUILD_USER) $(CC) >>$(O)/arch/x86/boot/bzImage\n", ""), nil, []string{"made no bzImage"}},
		{"nothing to begin with", nil, func(r *Request) { r.Base = "" }, []string{"minimal, defconfig or a .config"}},
		{"an unknown base", nil, func(r *Request) { r.Base = "max" }, []string{`"max"`}},
		{"two bases", nil, func(r *Request) { r.Config = []byte("CONFIG_A=y\n") }, []string{"at once"}},
		{"a fragment with a mistake", nil, func(r *Request) { r.Fragments = []Fragment{{Name: "mine", Text: []byte("\nUSB=y\n")}} }, []string{`fragment mine: line 2 is not CONFIG_NAME=VALUE: "USB=y"`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := request(t, tarOf(t, "linux-9.9.1", fakeFiles(tc.change)))
			if tc.with != nil {
				tc.with(&r)
			}
			res, err := Build(t.Context(), r, nil)
			if err == nil {
				t.Fatalf("no error: %+v", res)
			}
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q has no %q", err, w)
				}
			}
			if strings.Contains(err.Error(), "the secret") {
				t.Errorf("error %q tells a secret", err)
			}
			var failed *BuildError
			if errors.As(err, &failed) && (len(failed.Lines) > 20 || failed.Log == "") {
				t.Errorf("%d lines of log %s", len(failed.Lines), failed.Log)
			}
		})
	}
}

func TestLostOptionsOfOursAreWarnings(t *testing.T) {
	needTools(t)
	r := request(t, tarOf(t, "", fakeFiles(map[string]string{"drop": "CONFIG_MICROCODE_AMD=y\nCONFIG_FB_VESA=y\nCONFIG_USB_STORAGE=y\n"})))
	r.Fragments = []Fragment{{Name: "mine", Text: []byte("# CONFIG_USB is not set\n")}}
	res, err := Build(t.Context(), r, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"Linux 9.9.1 does not know these options of the minimal configuration, which go by other names there: CONFIG_FB_VESA, CONFIG_MICROCODE_AMD",
		"Linux 9.9.1 did not take these options of the minimal configuration: CONFIG_USB_STORAGE=y (minimal): it needs CONFIG_USB (not set)",
	}
	if diff := cmp.Diff(want, res.Warnings); diff != "" {
		t.Error(diff)
	}
}

func TestBadSources(t *testing.T) {
	needTools(t)
	limits := sourceLimits
	sourceLimits = tarball.Limits{Bytes: 1 << 20, Files: 1000}
	defer func() { sourceLimits = limits }()
	whole := gz(t, tarOf(t, "linux-9.9.1", fakeFiles(map[string]string{"lib/noise": noise(100 << 10)})))
	ended := tarOf(t, "linux", fakeFiles(nil))
	many := map[string]string{}
	for i := range 1100 {
		many[fmt.Sprintf("a%04d", i)] = ""
	}
	for _, tc := range []struct {
		name   string
		source []byte
		want   string
	}{
		{"empty", nil, "an empty file"},
		{"a text", []byte(strings.Repeat("hello, world\n", 200)), "unpack the kernel's source: it is not a tar"},
		{"truncated", whole[:len(whole)/2], "end too early"},
		{"truncated behind the tar", whole[:len(whole)-6], "end too early"},
		{"truncated between two files", ended[:len(ended)-1024], "it is truncated"},
		{"two tars", append(slices.Clone(ended), ended...), "behind its end"},
		{"truncated without compression", tarOf(t, "linux", fakeFiles(map[string]string{"lib/noise": noise(100 << 10)}))[:60<<10], "truncated"},
		{"another project", tarOf(t, "hello-1.0", map[string]string{"Makefile": "all:\n", "hello.c": ""}), "no Linux kernel's source: it has no Kbuild"},
		{"many files of another project", tarOf(t, "hello", many), "no Linux kernel's source: it has no Makefile"},
		{"two folders", append(tarOf(t, "linux", map[string]string{"a": ""})[:1024], tarOf(t, "other", nil)...), `"other/" is beside the folder "linux"`},
		{"a path that leaves", tarOf(t, "", fakeFiles(map[string]string{"../../evil": "x"})), `"../../evil"`},
		{"a path that leaves the kernel's folder", tarOf(t, "linux", fakeFiles(map[string]string{"lib/../../../evil": "x"})), `"linux/lib/../../../evil"`},
		{"a bomb", gz(t, tarOf(t, "linux", fakeFiles(map[string]string{"lib/zero": string(make([]byte, 4<<20))}))), "unpack the kernel's source"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := request(t, tc.source)
			_, err := Build(t.Context(), r, nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v; want %q in it", err, tc.want)
			}
		})
	}
}

func noise(n int) string {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		sum := sha256.Sum256(fmt.Append(nil, i))
		b.Write(sum[:])
	}
	return b.String()[:n]
}

func TestCancelKillsTheWholeTree(t *testing.T) {
	needTools(t)
	const mark = "86399.2718"
	r := request(t, tarOf(t, "linux", fakeFiles(map[string]string{
		"Makefile": strings.Replace(fakeMakefile, "bzImage:\n", "bzImage:\n\t@setsid sleep "+mark+" & echo '  CC      a.o'; sleep "+mark+"; true\n", 1),
	})))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	sleeping := false
	start := time.Now()
	_, err := Build(ctx, r, func(step string, done, _ int64) {
		if step == "compile" && done == 1 {
			for deadline := time.Now().Add(10 * time.Second); !sleeping && time.Now().Before(deadline); {
				sleeping = len(running(t, mark)) > 0
			}
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if !sleeping {
		t.Error("nothing ran that could be killed")
	}
	if left := running(t, mark); len(left) > 0 || time.Since(start) > 20*time.Second {
		t.Errorf("after %s there still run %q", time.Since(start), left)
	}
}

// running lists the processes with an argument.
func running(t *testing.T, mark string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), "sleep\x00"+mark) {
			found = append(found, f)
		}
	}
	return found
}

func TestCancelWhileUnpacking(t *testing.T) {
	needTools(t)
	r := request(t, tarOf(t, "linux", fakeFiles(map[string]string{"lib/noise": noise(8 << 20)})))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := Build(ctx, r, func(string, int64, int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestMissingToolsAreNamedAtOnce(t *testing.T) {
	err := missing([]tool{{"sh", "dash"}, {"no-flex", "flex"}, {"/no/gelf.h", "libelf-dev"}, {"no-bison", "bison"}, {"no-flex", "flex"}})
	var none *sandbox.MissingError
	if !errors.As(err, &none) {
		t.Fatal(err)
	}
	if none.What != "no-flex, /no/gelf.h, no-bison" || none.Package != "flex libelf-dev bison" {
		t.Errorf("%+v", none)
	}
	if err := missing([]tool{{"sh", "dash"}}); err != nil {
		t.Error(err)
	}
}

func TestRoom(t *testing.T) {
	if err := room(t.TempDir(), 1<<60); err == nil || !strings.Contains(err.Error(), "GB are free there") {
		t.Error(err)
	}
	if err := room(t.TempDir(), 1); err != nil {
		t.Error(err)
	}
	if spaceFor("minimal", values{}) >= spaceFor("defconfig", values{}) || spaceFor("", values{"DEBUG_INFO": "y"}) <= spaceFor("", values{}) {
		t.Error("more work does not take more space")
	}
}

func TestKey(t *testing.T) {
	need.Root(t)
	base := Request{SourceSHA256: "aa", Base: "minimal", Fragments: []Fragment{{Name: "x", Text: []byte("CONFIG_A=y\n")}}}
	key := func(change func(*Request)) string {
		r := base
		if change != nil {
			change(&r)
		}
		k, err := r.Key(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(k) != 64 {
			t.Errorf("key %q", k)
		}
		return k
	}
	same := key(nil)
	if key(func(r *Request) { r.WorkDir, r.CcacheDir, r.Size = "/elsewhere", "/cache", 3 }) != same {
		t.Error("the folders change the key")
	}
	if key(func(r *Request) { r.Fragments = []Fragment{{Name: "y", Text: []byte("CONFIG_A=y\n")}} }) != same {
		t.Error("a fragment's name changes the key")
	}
	seen := map[string]string{same: "nothing"}
	for name, change := range map[string]func(*Request){
		"source":    func(r *Request) { r.SourceSHA256 = "ab" },
		"base":      func(r *Request) { r.Base = "defconfig" },
		"config":    func(r *Request) { r.Base, r.Config = "", []byte("CONFIG_A=y\n") },
		"fragment":  func(r *Request) { r.Fragments = []Fragment{{Text: []byte("CONFIG_B=y\n")}} },
		"fragments": func(r *Request) { r.Fragments = []Fragment{{Text: []byte("CONFIG_A=y")}, {Text: []byte("\n")}} },
		"modules":   func(r *Request) { r.Modules = true },
	} {
		k := key(change)
		if other, have := seen[k]; have {
			t.Errorf("%s and %s give one key", name, other)
		}
		seen[k] = name
	}
}

func TestToolchainTellsCompilersApart(t *testing.T) {
	need.Tool(t, "gcc", "gcc")
	text, err := toolchain()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"gcc: /usr/bin/", "ld: /usr/bin/", "lzop: "} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %s", want, text)
		}
	}
}

func TestAheadIsNeverPassed(t *testing.T) {
	for done := int64(0); done < 3000; done++ {
		if total := ahead(done, 1000); total <= done || total < 1000 || total < ahead(max(0, done-1), 1000) {
			t.Fatalf("%d of %d", done, total)
		}
	}
}
