package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
)

// accounts runs a command that prints the account of what build laid into dir,
// and checks that it is whole.
func (w *world) accounts(t *testing.T, dir string, args ...string) {
	t.Helper()
	o := w.run(args...)
	o.wants(t, 0)
	var a api.Account
	if err := json.Unmarshal([]byte(o.stdout), &a); err != nil {
		t.Fatalf("%v: %s", err, o.stdout)
	}
	var sum, size int64
	for _, i := range a.Items {
		sum += i.Compressed
		if i.Why == "" || i.Compressed < 0 {
			t.Errorf("%+v", i)
		}
	}
	for _, name := range []string{"vmlinuz", "initramfs.img"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if sum != size || a.Sum.Compressed != size || a.Size != size {
		t.Errorf("the items have %d bytes, their sum says %d, the account %d, and the files have %d", sum, a.Sum.Compressed, a.Size, size)
	}
}

func TestExplainAndDiff(t *testing.T) {
	w := newWorld(t)
	need.Kernel(t)
	recipe := func(name, hostname, motd string) string {
		return w.file(name+".toml", fmt.Sprintf("hostname = %q\n[[file]]\nto = \"/etc/motd\"\ntext = %q\n[[file]]\nto = \"/etc/issue\"\ntext = \"the same\"\n", hostname, motd))
	}
	ra, rb := recipe("a", "first", "be welcome\n"), recipe("b", "second", "be gone\n")
	a, b := w.path("a"), w.path("b")
	w.run("build", "-o", a, "--recipe", ra).wants(t, 0)
	w.run("build", "-o", b, "--recipe", rb).wants(t, 0)

	w.accounts(t, a, "explain", "--json", "--recipe", ra)
	w.accounts(t, a, "explain", "--json", "--manifest", filepath.Join(a, "manifest.json"))
	if o := w.run("explain", "--recipe", ra, "/etc/motd"); o.code != 0 || !strings.Contains(o.stdout, "/etc/motd") || !strings.Contains(o.stdout, "file of the recipe ("+ra+":2)") || strings.Contains(o.stdout, "busybox") {
		t.Errorf("explain /etc/motd: exit %d: %s%s", o.code, o.stdout, o.stderr)
	}
	// Its progress goes to stderr, too.
	if o := w.run("explain", "--recipe", ra, "/no/such/file"); o.code != 2 || !strings.HasSuffix(o.stderr, "memlinux: nothing in the system is called /no/such/file\n") {
		t.Errorf("explain /no/such/file: exit %d: %s", o.code, o.stderr)
	}
	w.run("explain", "--recipe", ra, "--manifest", a).wants(t, 2, "--manifest")
	w.run("explain", "--manifest", ra).wants(t, 2, ra)

	o := w.run("diff", "--json", a, b)
	o.wants(t, 0)
	got := map[string]string{}
	for line := range strings.Lines(o.stdout) {
		var c api.ManifestChange
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		got[strings.TrimSpace(c.What+" "+c.Path)] = c.Before + " → " + c.After
	}
	for _, what := range []string{"system", "initramfs", "file etc/hostname", "file etc/hosts", "file etc/motd"} {
		if before, after, _ := strings.Cut(got[what], " → "); before == "" || after == "" {
			t.Errorf("%s is not told: %s", what, o.stdout)
		}
		delete(got, what)
	}
	if len(got) > 0 {
		t.Errorf("told, and the same: %v", got)
	}
	if o := w.run("diff", a, b); o.code != 0 || !strings.Contains(o.stdout, "/etc/motd") || strings.Contains(o.stdout, "/etc/issue") {
		t.Errorf("diff: exit %d: %s%s", o.code, o.stdout, o.stderr)
	}
	if o := w.run("diff", a, a); o.code != 0 || !strings.HasPrefix(o.stdout, "the same system") {
		t.Errorf("diff of one: exit %d: %s%s", o.code, o.stdout, o.stderr)
	}
	w.run("diff", a, w.path("none")).wants(t, 2, "none")
}

// patched is a copy of a program in which something is different, of the same
// length.
func (w *world) patched(name, from string, change func([]byte) []byte) string {
	w.t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		w.t.Fatal(err)
	}
	w.file(name, string(change(b)))
	if err := os.Chmod(w.path(name), 0o755); err != nil {
		w.t.Fatal(err)
	}
	return w.path(name)
}

// Each in one sentence, and nothing is written.
func TestBadRecipes(t *testing.T) {
	w := newWorld(t)
	need.Kernel(t)
	w.folder("state/overlay/etc")
	w.file("state/overlay/etc/one", "of the overlay\n")
	w.file("state/text", "no tar, no program\n")
	w.patched("state/arm", need.File(t, "/bin/busybox", "busybox-static"), func(b []byte) []byte { b[18] = 183; return b })
	w.patched("state/nolib", need.File(t, "/usr/bin/curl", "curl"), func(b []byte) []byte {
		return bytes.ReplaceAll(b, []byte("libcurl.so.4"), []byte("libcurx.so.4"))
	})
	w.file("state/large", "")
	if err := os.Truncate(w.path("state/large"), 4<<30); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		recipe string
		args   []string
		code   int
		says   []string
	}{
		{"a module that is not there", `modules = ["disk", "nosuchmodule"]`, nil, 2, []string{"nosuchmodule", "filesystems"}},
		{"a program of another architecture", "[[program]]\nfrom = \"arm\"", nil, 2, []string{"memlinux.toml:1", "state/arm is for aarch64"}},
		{"a missing library", "[[program]]\nfrom = \"nolib\"", nil, 2, []string{"memlinux.toml:1", "libcurx.so.4", "nolib needs", "install the package"}},
		{"a program that is none", "[[program]]\nfrom = \"text\"\nmode = \"0755\"", nil, 2, []string{"memlinux.toml:1", "text is no program"}},
		{"two files for one path", "[[overlay]]\nfrom = \"overlay\"\n[[file]]\nto = \"/etc/one\"\ntext = \"x\"", nil, 2, []string{"memlinux.toml:1 ", "memlinux.toml:3", "/etc/one"}},
		{"a file in the place of memlinux's own", "[[file]]\nto = \"/init\"\ntext = \"x\"", nil, 2, []string{"two files for /init", "memlinux's own", "memlinux.toml:1"}},
		{"a file of 4 GiB", "[[file]]\nfrom = \"large\"\nto = \"/srv/large\"", nil, 2, []string{"memlinux.toml:1", "state/large", "4 GiB"}},
		{"a wrong type", "dhcp = true\nhostname = 5", nil, 2, []string{"memlinux.toml:2: hostname", "a text in quotes"}},
		{"two files for one path, by the same key", "[[file]]\nto = \"/x\"\ntext = \"x\"\n[[file]]\nto = \"/x\"\ntext = \"y\"", nil, 2, []string{"memlinux.toml:5: file.to", "/x", "line 1"}},
		{"a file that is not there", "[[file]]\nfrom = \"none\"\nto = \"/x\"", nil, 2, []string{"memlinux.toml:2: file.from", "none does not exist"}},
		{"a root tree that is a text", `rootfs = "text"`, nil, 2, []string{"rootfs", "state/text", "tar"}},
		{"a service for a root with an init of its own", "[[service]]\ncommand = \"/bin/x\"", []string{"--rootfs", w.rootWithInit()}, 2, []string{"/sbin/init", "services"}},
		{"less memory than it takes", "", []string{"--ram", "32MiB"}, 2, []string{"needs ", "has 32"}},
		{"memory without a unit", "", []string{"--ram", "32"}, 2, []string{"512MiB"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			recipe := w.file("state/memlinux.toml", c.recipe+"\n")
			o := w.run(append([]string{"write", "--recipe", recipe, w.path("stick.img")}, c.args...)...)
			o.wants(t, c.code, c.says...)
			w.holds()
		})
	}
}

// rootWithInit is the tar of a root tree that a service can't be given.
func (w *world) rootWithInit() string {
	w.t.Helper()
	return w.file("state/root.tar", string(tarOf(w.t, member{"sbin/init", []byte("\x7fELF"), 0})))
}

// member is a file in a tar. size, if not 0, is what its header says, and the tar
// ends behind what there is of its content.
type member struct {
	name    string
	content []byte
	size    int64
}

func tarOf(t *testing.T, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	out := tar.NewWriter(&b)
	for _, m := range members {
		if err := out.WriteHeader(&tar.Header{Name: m.name, Mode: 0o755, Size: max(m.size, int64(len(m.content))), Format: tar.FormatPAX}); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Write(m.content); err != nil {
			t.Fatal(err)
		}
		if m.size > 0 {
			return b.Bytes()
		}
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zipped(t *testing.T, plain []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(plain); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// bomb is less than a MiB that unpacks to head and 20 GiB of zeros.
func bomb(t *testing.T, head []byte) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	zeros := z.EncodeAll(make([]byte, 64<<20), nil)
	return slices.Concat(z.EncodeAll(head, nil), bytes.Repeat(zeros, 20<<30/(64<<20)))
}

// A source that is no kernel's leaves nothing behind, here or in the cache.
func TestBadKernelSources(t *testing.T) {
	w := newWorld(t)
	// Compilers run as a user who can't enter the tests' own folders.
	var err error
	if w.cache, err = os.MkdirTemp("", "memlinux-test-cache-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(w.cache) })
	if err := os.Chmod(w.cache, 0o755); err != nil {
		t.Fatal(err)
	}
	kernel := []member{{"linux-6.1/Makefile", []byte("VERSION = 6\nPATCHLEVEL = 1\n"), 0}, {"linux-6.1/Kbuild", nil, 0}, {"linux-6.1/Kconfig", nil, 0}, {"linux-6.1/arch/x86/Makefile", nil, 0}}
	with := func(more ...member) []byte { return tarOf(t, append(slices.Clone(kernel), more...)...) }
	whole := zipped(t, with())
	w.folder("state")
	for _, c := range []struct {
		name   string
		source []byte
		args   []string
		says   []string
	}{
		{"a tar that is no kernel", zipped(t, tarOf(t, member{"notes/readme", []byte("hello\n"), 0})), nil, []string{"no Linux kernel's source", "Makefile"}},
		{"a text", []byte(strings.Repeat("no tar\n", 1000)), nil, []string{"not a tar"}},
		{"a truncated one", whole[:len(whole)*2/3], nil, []string{"too early", "fetch"}},
		{"a truncated one that is not compressed", with()[:2000], nil, []string{"truncated", "fetch"}},
		{"a path that leaves the folder", zipped(t, with(member{"linux-6.1/../../etc/cron.d/x", []byte("x"), 0})), nil, []string{"linux-6.1/../../etc/cron.d/x", "leave the folder"}},
		{"another SHA-256", whole, []string{"--kernel-sha256", strings.Repeat("0", 64)}, []string{"the source has the SHA-256", "not " + strings.Repeat("0", 64), "damaged"}},
		{"a bomb", bomb(t, with(member{"linux-6.1/drivers/zeros.c", nil, 20 << 30})), nil, []string{"unpacks to more than", "drivers/zeros.c"}},
		{"a bomb in what is left out", bomb(t, with(member{"linux-6.1/Documentation/zeros", nil, 20 << 30})), nil, []string{"unpacks to more than"}},
		{"a bomb behind the end", bomb(t, with()), nil, []string{"unpacks to more than"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			source := w.file("state/linux.tar", string(c.source))
			o := w.run(append([]string{"build", "-o", w.path("out"), "--kernel", "source:" + source}, c.args...)...)
			o.wants(t, 2, c.says...)
			if left, _ := os.ReadDir(w.path("out")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
			for _, dir := range []string{"files", "tmp", "records"} {
				if left, err := os.ReadDir(filepath.Join(w.cache, dir)); err != nil || len(left) != 0 {
					t.Errorf("left behind in the cache's %s: %v, %v", dir, left, err)
				}
			}
		})
	}
}
