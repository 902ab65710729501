package firmware

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/modules"
	"github.com/memlinux/memlinux/imagegen/modules/modulestest"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/ulikunitz/xz"
)

// root makes a root folder: a path and its content; "-> TARGET" is a link.
// Contents of .xz and .zst are compressed; "raw:" prevents and "xz:" asks for it.
func root(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		full := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			if err := os.Symlink(target, full); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(full, packed(t, name, []byte(content)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func packed(t testing.TB, name string, b []byte) []byte {
	t.Helper()
	if raw, ok := bytes.CutPrefix(b, []byte("raw:")); ok {
		return raw
	}
	if plain, ok := bytes.CutPrefix(b, []byte("xz:")); ok {
		name, b = ".xz", plain
	}
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch path.Ext(name) {
	case ".xz":
		w, err = xz.WriterConfig{CheckSum: xz.CRC32}.NewWriter(&out)
	case ".zst":
		w, err = zstd.NewWriter(&out)
	default:
		return b
	}
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func find(t testing.TB, dir string, wanted ...string) (Found, func()) {
	t.Helper()
	l, err := Open(dir, "6.1.0-7-test")
	if err != nil {
		t.Fatal(err)
	}
	w := Wanted{}
	for _, name := range wanted {
		w[name] = []string{"driver"}
	}
	found, err := l.Find(context.Background(), w)
	if err != nil {
		t.Fatal(err)
	}
	return found, func() { l.Close() }
}

// text is found as lines "path = content", "path -> target" and "missing path".
func text(t testing.TB, found Found) string {
	t.Helper()
	var b strings.Builder
	for _, e := range found.Entries {
		if e.Mode&fs.ModeSymlink != 0 {
			fmt.Fprintf(&b, "%s -> %s\n", e.Path, e.Link)
			continue
		}
		content, err := io.ReadAll(io.NewSectionReader(e.Content, 0, e.Size+1))
		if err != nil || int64(len(content)) != e.Size {
			t.Errorf("%s: %d bytes of %d, %v", e.Path, len(content), e.Size, err)
		}
		if sum := sha256.Sum256(content); e.SHA256 != "" && e.SHA256 != hex.EncodeToString(sum[:]) {
			t.Errorf("%s: not the digest", e.Path)
		}
		fmt.Fprintf(&b, "%s = %s\n", e.Path, content)
	}
	for _, name := range found.Missing {
		fmt.Fprintf(&b, "missing %s\n", name)
	}
	return b.String()
}

func TestFind(t *testing.T) {
	for _, tc := range []struct {
		name   string
		files  map[string]string
		wanted []string
		want   string
	}{
		{"a plain file", map[string]string{"lib/firmware/a/x.bin": "X"}, []string{"a/x.bin"}, "lib/firmware/a/x.bin = X\n"},
		{"compressed ones are plain in the image", map[string]string{"lib/firmware/x.bin.xz": "X", "lib/firmware/y.bin.zst": "Y"}, []string{"x.bin", "y.bin"},
			"lib/firmware/x.bin = X\nlib/firmware/y.bin = Y\n"},
		{"what is missing", map[string]string{"lib/firmware/x.bin": "X"}, []string{"z.bin", "x.bin", "no/*"}, "lib/firmware/x.bin = X\nmissing no/*\nmissing z.bin\n"},
		{"no firmware at all", map[string]string{"etc/passwd": ""}, []string{"x.bin", "*"}, "missing *\nmissing x.bin\n"},
		{"only in /usr", map[string]string{"usr/lib/firmware/x.bin": "X"}, []string{"x.bin"}, "lib/firmware/x.bin = X\n"},
		{"a merged /usr, by an absolute link", map[string]string{"usr/lib/firmware/x.bin": "X", "lib": "-> /usr/lib"}, []string{"x.bin"}, "lib/firmware/x.bin = X\n"},
		{"updates come first", map[string]string{
			"lib/firmware/x.bin": "old", "lib/firmware/updates/x.bin": "new",
			"lib/firmware/y.bin": "old", "lib/firmware/updates/6.1.0-7-test/y.bin": "this release", "lib/firmware/updates/y.bin": "any release",
			"lib/firmware/z.bin": "old", "lib/firmware/6.1.0-7-test/z.bin": "this release", "lib/firmware/6.1.0-8-test/z.bin": "another",
		}, []string{"x.bin", "y.bin", "z.bin"}, "lib/firmware/x.bin = new\nlib/firmware/y.bin = this release\nlib/firmware/z.bin = this release\n"},
		{"as in the kernel a plain file comes before compressed updates", map[string]string{"lib/firmware/x.bin": "plain", "lib/firmware/updates/x.bin.xz": "packed"},
			[]string{"x.bin"}, "lib/firmware/x.bin = plain\n"},
		{"patterns, each file once", map[string]string{
			"lib/firmware/b/x-1.bin": "1", "lib/firmware/b/x-2.bin.xz": "2", "lib/firmware/b/y.bin": "no", "lib/firmware/updates/b/x-3.bin": "3", "lib/firmware/b/x-1.bin.zst": "no",
		}, []string{"b/x-*.bin", "b/x-[12].*"}, "lib/firmware/b/x-1.bin = 1\nlib/firmware/b/x-2.bin = 2\nlib/firmware/b/x-3.bin = 3\n"},
		{"a folder is no file", map[string]string{"lib/firmware/x/y": "Y"}, []string{"x", "*"}, "missing *\nmissing x\n"},
		{"a file is no folder", map[string]string{"lib/firmware/x": "X"}, []string{"x/y"}, "missing x/y\n"},
		{"a link stays one, with what it leads to", map[string]string{"lib/firmware/a/x.bin": "-> ../b/c/y.bin", "lib/firmware/b/c/y.bin": "Y"},
			[]string{"a/x.bin"}, "lib/firmware/a/x.bin -> ../b/c/y.bin\nlib/firmware/b/c/y.bin = Y\n"},
		{"a link and its target, both wanted", map[string]string{"lib/firmware/x": "-> y", "lib/firmware/y": "Y"}, []string{"x", "y"},
			"lib/firmware/x -> y\nlib/firmware/y = Y\n"},
		{"links to compressed files lose the suffix", map[string]string{"lib/firmware/x.bin.xz": "-> y.bin.xz", "lib/firmware/y.bin.xz": "Y"}, []string{"x.bin"},
			"lib/firmware/x.bin -> y.bin\nlib/firmware/y.bin = Y\n"},
		{"a chain of links, an absolute one too, is one link", map[string]string{"lib/firmware/x": "-> /lib/firmware/y", "lib/firmware/y": "-> z/w", "lib/firmware/z/w": "W"}, []string{"x"},
			"lib/firmware/x -> z/w\nlib/firmware/z/w = W\n"},
		{"a linked folder", map[string]string{"lib/firmware/new": "-> old", "lib/firmware/old/x": "X"}, []string{"new/x", "old/x", "new/*"},
			"lib/firmware/new/x -> ../old/x\nlib/firmware/old/x = X\n"},
		{"a link that leaves the folder is what it leads to", map[string]string{
			"lib/firmware/regulatory.db": "-> /etc/alternatives/regulatory.db", "etc/alternatives/regulatory.db": "-> /usr/share/db", "usr/share/db": "DB",
		}, []string{"regulatory.db"}, "lib/firmware/regulatory.db = DB\n"},
		{"Debian's alternatives lead back inside", map[string]string{
			"lib": "-> usr/lib", "usr/lib/firmware/regulatory.db": "-> /etc/alternatives/regulatory.db",
			"etc/alternatives/regulatory.db": "-> /lib/firmware/regulatory.db-debian", "usr/lib/firmware/regulatory.db-debian": "DB",
		}, []string{"regulatory.db"}, "lib/firmware/regulatory.db -> regulatory.db-debian\nlib/firmware/regulatory.db-debian = DB\n"},
		{"a plain name that leads to a compressed file means its bytes as they are", map[string]string{
			"lib/firmware/x": "-> y.xz", "lib/firmware/y.xz": "raw:no xz", "lib/firmware/y": "plain",
		}, []string{"x", "y"}, "lib/firmware/x -> y.xz\nlib/firmware/y = plain\nlib/firmware/y.xz = no xz\n"},
		{"a link out of a store, where names have no suffix", map[string]string{
			"lib/firmware/x.xz": "-> store/1", "lib/firmware/store/1": "xz:X", "lib/firmware/y": "-> store/2", "lib/firmware/store/2": "Y",
		}, []string{"x", "y"}, "lib/firmware/store/2 = Y\nlib/firmware/x = X\nlib/firmware/y -> store/2\n"},
		{"a link to a name that means another file", map[string]string{
			"lib/firmware/x.xz": "-> y.xz", "lib/firmware/y.xz": "packed", "lib/firmware/y": "plain",
		}, []string{"x", "y"}, "lib/firmware/x = packed\nlib/firmware/y = plain\n"},
		{"links to nowhere and in circles", map[string]string{"lib/firmware/x": "-> none", "lib/firmware/a": "-> b", "lib/firmware/b": "-> a"}, []string{"x", "a"},
			"missing a\nmissing x\n"},
		{"a way out of the root ends there", map[string]string{"lib/firmware/x": "-> ../../../../../../etc/hostname"}, []string{"x"}, "missing x\n"},
		{"names that are none", map[string]string{"lib/firmware/x": "X"}, []string{"../firmware/x", "/x", "x/", "", "a\x00b", "[", "."},
			"missing \nmissing .\nmissing ../firmware/x\nmissing /x\nmissing [\nmissing a\x00b\nmissing x/\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			found, done := find(t, root(t, tc.files), tc.wanted...)
			defer done()
			if diff := cmp.Diff(tc.want, text(t, found)); diff != "" {
				t.Error(diff)
			}
			var tree initramfs.Tree
			if err := tree.With(found.Entries...).Validate(); err != nil {
				t.Errorf("no tree: %v", err)
			}
		})
	}
}

func TestWhy(t *testing.T) {
	var library bytes.Buffer
	w := modules.NewWriter(t.Context(), &library)
	for name, file := range map[string][]byte{
		"kernel/e100.ko": modulestest.Module("firmware=e100/d101m.bin", "depends=mii", "vermagic=6.1 SMP"),
		"kernel/mii.ko":  modulestest.Module("firmware=e100/d101m.bin", "firmware=none.bin"),
	} {
		if err := w.Add(name, file); err != nil {
			t.Fatal(err)
		}
	}
	l, err := w.Close("6.1")
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Select([]string{"e100"})
	if err != nil {
		t.Fatal(err)
	}
	want := Wanted{"e100/d101m.bin": {"e100", "mii"}, "none.bin": {"mii"}}
	if diff := cmp.Diff(want, WantedBy(s)); diff != "" {
		t.Error(diff)
	}
	for want, by := range map[string][]string{
		"firmware that the module a asks for":                    {"a"},
		"firmware that the modules a, b ask for":                 {"a", "b"},
		"firmware that the modules a, b, c and 2 more ask for":   {"a", "b", "c", "d", "e"},
		"firmware that the modules aa, bb, cc ask for":           {"aa", "bb", "cc"},
		"firmware that the modules amdgpu, radeon, r128 ask for": {"amdgpu", "radeon", "r128"},
	} {
		if got := reason(by); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	found, done := find(t, root(t, map[string]string{"lib/firmware/x": "-> y", "lib/firmware/y": "Y"}), "x")
	defer done()
	if got := found.Entries[1].Why; got != "what lib/firmware/x is a link to: firmware that the module driver asks for" {
		t.Error(got)
	}
}

func TestFindFails(t *testing.T) {
	dir := root(t, map[string]string{"lib/firmware/x.bin.xz": "X", "lib/firmware/large.bin": ""})
	file := filepath.Join(dir, "lib/firmware/x.bin.xz")
	if err := os.WriteFile(file, []byte("no xz"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "lib/firmware/large.bin"), MaxSize+1); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "lib/firmware/pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := Open(dir, "6.1")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, want := range map[string]string{"x.bin": "x.bin.xz", "large.bin": "no more than 128 are taken"} {
		if _, err := l.Find(t.Context(), Wanted{name: {"driver"}}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "the module driver") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Opening it would wait for ever.
	if found, err := l.Find(t.Context(), Wanted{"pipe": {"driver"}}); err != nil || len(found.Missing) != 1 {
		t.Errorf("a pipe: %v, %v", found, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Find(ctx, Wanted{"x": {"driver"}}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := Open(filepath.Join(dir, "none"), "6.1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no root: %v", err)
	}
}

// TestInitramfs packs what is found and unpacks it with cpio.
func TestInitramfs(t *testing.T) {
	cpio := need.Tool(t, "cpio", "cpio")
	big := strings.Repeat("0123456789abcdef", 40000) // several reads long
	found, done := find(t, root(t, map[string]string{
		"lib/firmware/a/x.bin.xz": big, "lib/firmware/a/y.bin": "-> x.bin", "lib/firmware/a/y.bin.xz": "-> x.bin.xz", "lib/firmware/b.zst": "B", "lib/firmware/c": big + "c",
	}), "a/y.bin", "b", "c")
	defer done()
	var tree initramfs.Tree
	var archive bytes.Buffer
	if _, err := initramfs.Pack(t.Context(), &archive, tree.With(found.Entries...), initramfs.Compression{Name: "none"}, time.Unix(0, 0), nil); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command(cpio, "-id", "--quiet")
	cmd.Dir, cmd.Stdin = dir, &archive
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, want := range map[string]string{"a/x.bin": big, "a/y.bin": big, "b": "B", "c": big + "c"} {
		if got, err := os.ReadFile(filepath.Join(dir, "lib/firmware", name)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if target, err := os.Readlink(filepath.Join(dir, "lib/firmware/a/y.bin")); err != nil || target != "x.bin" {
		t.Errorf("the link: %q, %v", target, err)
	}
}
