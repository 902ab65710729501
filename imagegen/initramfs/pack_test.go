package initramfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/imagegen/filecaps"
	"github.com/memlinux/memlinux/testvm/need"
)

var epochOfTests = time.Unix(1e9, 0)

// everything is a tree with all that the format has.
func everything(t testing.TB) Tree {
	t.Helper()
	owned := func(e Entry, mode fs.FileMode, uid, gid int) Entry {
		e.Mode |= mode
		e.UID, e.GID = uid, gid
		return e
	}
	return tree(t, "e",
		owned(dir("all", 0o710), fs.ModeSetgid, 1, 2),
		owned(file("all/setuid", "s"), fs.ModeSetuid|0o755, 0, 0),
		owned(file("all/setgid", "g"), fs.ModeSetgid|0o755, 3, 65534),
		owned(file("all/m", "of three names"), 0o755, 70000, 4294967294),
		owned(hard("all/a", "all/m"), 0o755, 70000, 4294967294),
		owned(hard("all/z", "all/m"), 0o755, 70000, 4294967294),
		owned(link("all/link", "../all/nowhere at all"), 0, 5, 6),
		owned(pipe("all/pipe"), 0o620, 7, 8),
		file("all/empty", ""),
		file("all/empty2", ""), hard("all/empty3", "all/empty2"),
		file("all/name with a space", "n"),
		dir("all/sticky", fs.ModeSticky|0o777),
	)
}

// What GNU cpio unpacks must be what went in, for root.
func TestGNUCpioUnpacks(t *testing.T) {
	need.Root(t)
	gnu := need.Tool(t, "cpio", "cpio")
	in := everything(t)
	b, _ := pack(t, in, "none", epochOfTests)
	dir := t.TempDir()
	cmd := exec.Command(gnu, "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(b)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	inodes := map[string]uint64{}
	for _, e := range in {
		path := filepath.Join(dir, e.Path)
		info, err := os.Lstat(path)
		if err != nil {
			t.Error(err)
			continue
		}
		st := info.Sys().(*syscall.Stat_t)
		mode := info.Mode()
		if e.Link != "" {
			mode = e.Mode
		}
		if mode != e.Mode || int(st.Uid) != e.UID || int(st.Gid) != e.GID || e.Mode.IsRegular() && info.ModTime().Unix() != 1e9 {
			t.Errorf("%s: %s %d:%d of %s, want %s %d:%d", e.Path, mode, st.Uid, st.Gid, info.ModTime(), e.Mode, e.UID, e.GID)
		}
		inodes[e.Path] = st.Ino
		switch {
		case e.Link != "":
			if to, err := os.Readlink(path); err != nil || to != e.Link {
				t.Errorf("%s leads to %q, %v", e.Path, to, err)
			}
		case e.Content != nil || e.HardLink != "":
			if e.HardLink != "" {
				i, _ := in.index(e.HardLink)
				e = in[i]
			}
			want, _ := io.ReadAll(io.NewSectionReader(e.Content, 0, e.Size))
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s has %q, %v", e.Path, got, err)
			}
		}
	}
	if inodes["all/a"] != inodes["all/m"] || inodes["all/z"] != inodes["all/m"] || inodes["all/empty3"] != inodes["all/empty2"] || inodes["all/empty"] == inodes["all/empty2"] {
		t.Errorf("names of one file: %v", inodes)
	}
}

// The kernel's own unpacking, seen by the shell that it starts.
func TestKernelUnpacks(t *testing.T) {
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	kernel, _ := need.Kernel(t)
	box, err := os.ReadFile(need.File(t, "/bin/busybox", "busybox-static"))
	if err != nil {
		t.Fatal(err)
	}
	// In three orders of the names of a file, of which the last has the content.
	script := `#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc
/bin/busybox --install -s /bin
mount -t proc proc /proc
cd /all
echo "BEGIN"
stat -c '%A %u:%g %h %s %n' . * | sed "s/ 'link'.*/ link/"
readlink link
cat m a z setuid
[ $(stat -c %i a) = $(stat -c %i m) ] && [ $(stat -c %i z) = $(stat -c %i m) ] && echo "one inode"
[ $(stat -c %i setuid) = $(stat -c %i setgid) ] || echo "two inodes"
dmesg | grep -i "unpacking failed" || echo "no complaint"
/caps
echo "capabilities: $?"
echo "END"
poweroff -f
`
	caps, err := filecaps.Program([]filecaps.File{
		{Path: "/all/a", Caps: []byte("\x01\x00\x00\x02\x00\x20" + strings.Repeat("\x00", 14))},
		{Path: "/all/nowhere", Caps: []byte("\x01\x00\x00\x02\x00\x20" + strings.Repeat("\x00", 14))},
	})
	if err != nil {
		t.Fatal(err)
	}
	in, err := everything(t).Union(file("init", script), file("bin/busybox", string(box)), file("caps", string(caps)),
		ordered(file("all/y", "of two names, in another order"), 0), ordered(hard("all/b", "all/y"), 1))
	if err != nil {
		t.Fatal(err)
	}
	for i := range in {
		if slices.Contains([]string{"init", "bin/busybox", "caps"}, in[i].Path) {
			in[i].Mode = 0o755
		}
	}
	archive := filepath.Join(t.TempDir(), "initramfs")
	b, _ := pack(t, in, "zstd", epochOfTests)
	if err := os.WriteFile(archive, b, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 120*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, qemu, "-accel", "tcg", "-m", "256", "-display", "none", "-nic", "none", "-no-reboot", "-monitor", "none",
		"-serial", "stdio", "-kernel", kernel, "-initrd", archive, "-append", "console=ttyS0 quiet panic=-1").CombinedOutput()
	if err != nil {
		t.Fatalf("qemu: %v: %s", err, out)
	}
	_, said, _ := strings.Cut(strings.ReplaceAll(string(out), "\r", ""), "BEGIN\n")
	said, _, _ = strings.Cut(said, "END\n")
	want := `drwx--s--- 1:2 3 . .
-rwxr-xr-x 70000:4294967294 3 14 a
-rw-r--r-- 0:0 2 30 b
-rw-r--r-- 0:0 1 0 empty
-rw-r--r-- 0:0 2 0 empty2
-rw-r--r-- 0:0 2 0 empty3
lrwxrwxrwx 5:6 1 21 link
-rwxr-xr-x 70000:4294967294 3 14 m
-rw-r--r-- 0:0 1 1 name with a space
prw--w---- 7:8 1 0 pipe
-rwxr-sr-x 3:65534 1 1 setgid
-rwsr-xr-x 0:0 1 1 setuid
drwxrwxrwt 0:0 2 . sticky
-rw-r--r-- 0:0 2 30 y
-rwxr-xr-x 70000:4294967294 3 14 z
../all/nowhere at all
of three namesof three namesof three namessone inode
two inodes
no complaint
memlinux: /all/nowhere did not get its capabilities, cap_net_raw=ep
capabilities: 1
`
	// The size of a folder is the file system's affair.
	said = regexp.MustCompile(`(?m)^(d\S+ \S+ \d+) \d+ `).ReplaceAllString(said, "$1 . ")
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("(-want +got):\n%s\n%s", diff, out)
	}
}

func TestOrder(t *testing.T) {
	in := tree(t, "o", file("b", ""), ordered(file("a/late", ""), 1), ordered(file("z/early", ""), -1), file("z/c", ""), ordered(file("0", ""), 1))
	b, _ := pack(t, in, "none", epochOfTests)
	var got []string
	for r := cpio.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, h.Name)
	}
	if want := "z z/early b z/c 0 a a/late"; strings.Join(got, " ") != want {
		t.Errorf("the order is %q, want %q", strings.Join(got, " "), want)
	}
	in[0].Order, in[1].Order = 0, 1
	for i, e := range in {
		if e.Path == "z" {
			in[i].Order = 0
		}
	}
	if err := in.Validate(); err == nil || !strings.Contains(err.Error(), "z/early comes before the folder") {
		t.Errorf("a file before its folder: %v", err)
	}
}

func TestDigests(t *testing.T) {
	sum := sha256.Sum256([]byte("x"))
	x := hex.EncodeToString(sum[:])
	good := file("good", "x")
	good.SHA256 = x
	in := tree(t, "d", good, hard("name", "good"), link("link", "good"), pipe("pipe"), dir("z", 0o755))
	_, p := pack(t, in, "none", epochOfTests)
	if diff := cmp.Diff([]string{x, "", x, "", ""}, p.Digests); diff != "" {
		t.Error(diff)
	}
	bad := file("bad", "y")
	bad.SHA256 = x
	_, err := Pack(t.Context(), io.Discard, tree(t, "d", bad), Compression{Name: "zstd"}, epochOfTests, nil)
	if err == nil || !strings.Contains(err.Error(), "bad (d:bad) is damaged") {
		t.Errorf("content with another digest: %v", err)
	}
}

func TestCompression(t *testing.T) {
	text := file("text", strings.Repeat("all that is in it is said more than once or twice; ", 20000)+fmt.Sprint(rand.New(rand.NewPCG(4, 5)).Perm(20000)))
	in := tree(t, "c", text)
	sizes := map[string]int{}
	for _, c := range []Compression{{"zstd", 0}, {"zstd", 1}, {"zstd", 3}, {"zstd", 8}, {"zstd", 22}, {"gzip", 0}, {"gzip", 1}, {"gzip", 6}, {"gzip", 9}, {"none", 0}} {
		var b bytes.Buffer
		if _, err := Pack(t.Context(), &b, in, c, epochOfTests, nil); err != nil {
			t.Fatal(err)
		}
		sizes[fmt.Sprint(c.Name, c.Level)] = b.Len()
	}
	if sizes["zstd0"] != sizes["zstd3"] || sizes["zstd1"] == sizes["zstd3"] || sizes["zstd3"] <= sizes["zstd8"] || sizes["zstd8"] <= sizes["zstd22"] || sizes["gzip9"] == sizes["gzip1"] {
		t.Errorf("sizes: %v", sizes)
	}
	for _, tc := range []struct {
		c    Compression
		want string
	}{
		{Compression{"zstd", 23}, "zstd has no level 23; use 1 to 22"},
		{Compression{"gzip", 10}, "gzip has no level 10; use 1 to 9"},
		{Compression{"gzip", -1}, "gzip has no level -1"},
		{Compression{"none", 1}, "without compression"},
		{Compression{"lzo", 0}, `"lzo" is no compression`},
		{Compression{}, `"" is no compression`},
	} {
		if _, err := Pack(t.Context(), io.Discard, in, tc.c, epochOfTests, nil); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, want %q in it", tc.c, err, tc.want)
		}
	}
}

// The costs of all entries must sum up to the archive, whatever is in it.
func TestCostsSumUp(t *testing.T) {
	noise := make([]byte, 1<<19)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	in := func(seed uint64) Tree {
		rnd := rand.New(rand.NewPCG(seed, 3))
		var list []Entry
		for i := range rnd.IntN(40) {
			size := 1 << rnd.IntN(19)
			size = rnd.IntN(size + 1)
			e := file(fmt.Sprintf("folder%d/file%d", i%5, i), "")
			e.Content, e.Size = bytes.NewReader(noise[:size]), int64(size)
			if rnd.IntN(2) == 0 {
				e.Content = bytes.NewReader(make([]byte, size))
			}
			e.Order = rnd.IntN(3) - 1
			list = append(list, e)
			if rnd.IntN(8) == 0 {
				list = append(list, hard(fmt.Sprintf("name%d", i), e.Path), link(fmt.Sprintf("link%d", i), e.Path))
			}
		}
		return tree(t, "s", list...)
	}
	for seed := range uint64(40) {
		tree := in(seed)
		for _, c := range []Compression{{"zstd", 0}, {"zstd", 1}, {"zstd", 4}, {"gzip", 1}, {"gzip", 9}, {"none", 0}} {
			if seed%4 != 0 && c.Level > 1 {
				continue // they take their time
			}
			var b bytes.Buffer
			p, err := Pack(t.Context(), &b, tree, c, epochOfTests, nil)
			if err != nil {
				t.Fatal(err)
			}
			if len(p.Costs) != len(tree)+1 {
				t.Fatalf("%d costs for %d entries", len(p.Costs), len(tree))
			}
			var sum Cost
			for i, cost := range p.Costs {
				sum.Raw += cost.Raw
				sum.Compressed += cost.Compressed
				want := int64(124) // the end mark
				if i < len(tree) {
					e := tree[i]
					padded := func(n int64) int64 { return (n + 3) / 4 * 4 }
					want = padded(110+int64(len(e.Path))+1) + padded(e.Size+int64(len(e.Link)))
				}
				if cost.Raw != want || cost.Compressed < 0 || c.Name == "none" && cost.Compressed != want {
					t.Errorf("seed %d, %v: entry %d costs %+v, want %d", seed, c, i, cost, want)
				}
			}
			if want := (Cost{Raw: p.Unpacked, Compressed: int64(b.Len())}); sum != want {
				t.Errorf("seed %d, %v: all costs %+v, the archive %+v", seed, c, sum, want)
			}
		}
	}
}

// Noise can't be compressed, and zeros nearly vanish: the costs must show it.
func TestCostsAreFair(t *testing.T) {
	noise := make([]byte, 4<<20)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	for _, name := range []string{"zstd", "gzip"} {
		a, b := file("noise", ""), file("zeros", "")
		a.Content, a.Size = bytes.NewReader(noise), int64(len(noise))
		b.Content, b.Size = bytes.NewReader(make([]byte, len(noise))), int64(len(noise))
		_, p := pack(t, tree(t, "f", a, b), name, epochOfTests)
		if n, z := p.Costs[0].Compressed, p.Costs[1].Compressed; n < 4<<20-1<<17 || z > 1<<18 {
			t.Errorf("%s: noise costs %d, zeros %d", name, n, z)
		}
	}
}
