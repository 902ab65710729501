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
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/memlinux/memlinux/testvm/need"
)

// stand-in for the binary where only the archive matters
var program = bytes.NewReader([]byte("#!/bin/false, in busybox's place\n"))

func pack(t testing.TB, tree Tree, compression string, epoch time.Time) ([]byte, Packed) {
	t.Helper()
	var b bytes.Buffer
	p, err := Pack(context.Background(), &b, tree, Compression{Name: compression}, epoch, nil)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), p
}

// The listing as GNU cpio prints it is the golden file: it holds types, modes,
// owners, dates and order. MEMLINUX_UPDATE=1 writes it anew.
func TestGoldenListing(t *testing.T) {
	gnu := need.Tool(t, "cpio", "cpio")
	b, p := pack(t, Base(program, program.Size()), "none", time.Unix(86400*365, 0))
	if p.Unpacked != int64(len(b)) {
		t.Errorf("Unpacked is %d of %d bytes", p.Unpacked, len(b))
	}
	cmd := exec.Command(gnu, "-itvn", "--quiet")
	cmd.Stdin = bytes.NewReader(b)
	cmd.Env = []string{"TZ=UTC", "LC_ALL=C"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	// Sizes of the scripts would make every comment an edit here.
	got := regexp.MustCompile(` +[0-9]+ (Jan)`).ReplaceAll(out, []byte(" $1"))
	golden := filepath.Join("testdata", "listing.golden")
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
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestPackIsReproducible(t *testing.T) {
	for _, compression := range []string{"zstd", "gzip", "none"} {
		a, _ := pack(t, Base(program, program.Size()), compression, time.Unix(0, 0))
		b, _ := pack(t, Base(program, program.Size()), compression, time.Unix(0, 0))
		if !bytes.Equal(a, b) {
			t.Errorf("%s: two archives of the same tree differ", compression)
		}
		c, _ := pack(t, Base(program, program.Size()), compression, time.Unix(1, 0))
		if bytes.Equal(a, c) {
			t.Errorf("%s: the date is not in the archive", compression)
		}
	}
}

// What other readers get out must be what went in, with each compression.
func TestPackRoundTrip(t *testing.T) {
	big := make([]byte, 3<<20)
	for i := range big {
		big[i] = byte(i * i >> 7)
	}
	tree := Tree{
		{Path: "a", Mode: fs.ModeDir | 0o755},
		{Path: "a/big", Mode: 0o640, Content: bytes.NewReader(big), Size: int64(len(big))},
		{Path: "a/empty", Mode: 0o600, Content: bytes.NewReader(nil)},
		{Path: "a/one byte", Mode: 0o444, Content: strings.NewReader("x"), Size: 1},
		{Path: "t", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
	}
	for compression, tool := range map[string][]string{"zstd": {"zstd", "-tq"}, "gzip": {"gzip", "-t"}, "none": nil} {
		t.Run(compression, func(t *testing.T) {
			b, p := pack(t, tree, compression, time.Unix(1e9, 0))
			if tool != nil {
				cmd := exec.Command(need.Tool(t, tool[0], tool[0]), tool[1])
				cmd.Stdin = bytes.NewReader(b)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%v: %v: %s", tool, err, out)
				}
			}
			var in io.Reader = bytes.NewReader(b)
			switch compression {
			case "zstd":
				z, err := zstd.NewReader(in, zstd.WithDecoderMaxWindow(windowSize))
				if err != nil {
					t.Fatal(err)
				}
				defer z.Close()
				in = z
			case "gzip":
				z, err := gzip.NewReader(in)
				if err != nil {
					t.Fatal(err)
				}
				in = z
			}
			r := cpio.NewReader(in)
			for i, e := range tree {
				h, err := r.Next()
				if err != nil {
					t.Fatal(err)
				}
				if h.Name != e.Path || h.Size != e.Size || fs.FileMode(h.Mode.Perm()) != e.Mode.Perm() || h.ModTime.Unix() != 1e9 || h.Uid != 0 || h.Guid != 0 {
					t.Errorf("%+v became %+v", e, h)
				}
				if e.Mode.IsDir() {
					continue
				}
				hash := sha256.New()
				if _, err := io.Copy(hash, r); err != nil {
					t.Fatal(err)
				}
				if got := hex.EncodeToString(hash.Sum(nil)); got != p.Digests[i] {
					t.Errorf("%s: digest %s of what was read, %s of what was written", e.Path, got, p.Digests[i])
				}
			}
			if _, err := r.Next(); !errors.Is(err, io.EOF) {
				t.Errorf("behind the last entry: %v", err)
			}
		})
	}
}

func TestWithAddsFolders(t *testing.T) {
	x := strings.NewReader("x")
	tree := Base(program, program.Size()).With(
		Entry{Path: "lib/modules/6.1/kernel/a.ko", Mode: 0o644, Content: x, Size: 1},
		Entry{Path: "etc/filesystems", Mode: 0o644, Content: x, Size: 1})
	if err := tree.Validate(); err != nil {
		t.Fatal(err)
	}
	var added []string
	for _, e := range tree {
		if strings.HasPrefix(e.Path, "lib") {
			added = append(added, e.Path)
		}
	}
	if diff := cmp.Diff([]string{"lib", "lib/modules", "lib/modules/6.1", "lib/modules/6.1/kernel", "lib/modules/6.1/kernel/a.ko"}, added); diff != "" {
		t.Error(diff)
	}
}

func TestPackRefuses(t *testing.T) {
	x := strings.NewReader("x")
	file := func(path string) Entry { return Entry{Path: path, Mode: 0o644, Content: x, Size: 1} }
	for _, tc := range []struct {
		name  string
		tree  Tree
		epoch int64
		want  string
	}{
		{"unsorted", Tree{file("b"), file("a")}, 0, "does not come behind"},
		{"twice the same", Tree{file("a"), file("a")}, 0, "does not come behind"},
		{"no parent", Tree{file("a/b")}, 0, "in no folder"},
		{"a file as parent", Tree{file("a"), file("a/b")}, 0, "in no folder"},
		{"an absolute path", Tree{file("/a")}, 0, "not a usable path"},
		{"a way out of the tree", Tree{file("../a")}, 0, "not a usable path"},
		{"a NUL, where the name would end", Tree{file("a\x00b")}, 0, "not a usable path"},
		{"a name longer than the kernel reads", Tree{file(strings.Repeat("a", 4096))}, 0, "not a usable path"},
		{"the name that ends archives", Tree{file("TRAILER!!!")}, 0, "end the archive"},
		{"a device, whose numbers the library drops", Tree{{Path: "null", Mode: fs.ModeDevice | 0o666}}, 0, "neither"},
		{"a socket", Tree{{Path: "s", Mode: fs.ModeSocket | 0o777}}, 0, "neither"},
		{"a symlink without a target", Tree{{Path: "l", Mode: fs.ModeSymlink | 0o777}}, 0, "without a target"},
		{"4 GiB, which the library would write wrongly", Tree{{Path: "a", Mode: 0o644, Content: x, Size: 1 << 32}}, 0, "4 GiB"},
		{"content that ends early", Tree{{Path: "a", Mode: 0o644, Content: x, Size: 2}}, 0, "read a: unexpected EOF"},
		{"a date before 1970", Tree{file("a")}, -1, "1970 to 2106"},
		{"a date behind the format's end", Tree{file("a")}, 1 << 32, "1970 to 2106"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Pack(context.Background(), io.Discard, tc.tree, Compression{Name: "none"}, time.Unix(tc.epoch, 0), nil)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
	if _, err := Pack(context.Background(), io.Discard, nil, Compression{Name: "lzo"}, time.Unix(0, 0), nil); err == nil {
		t.Error("lzo was taken")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Pack(ctx, io.Discard, Base(program, program.Size()), Compression{Name: "zstd"}, time.Unix(0, 0), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := Pack(context.Background(), full{}, Base(program, program.Size()), Compression{Name: "zstd"}, time.Unix(0, 0), nil); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

func TestInitIsGoodShell(t *testing.T) {
	if out, err := exec.Command(need.Tool(t, "shellcheck", "shellcheck"), "-s", "dash", "init").CombinedOutput(); err != nil {
		t.Errorf("shellcheck: %v\n%s", err, out)
	}
	busybox := need.File(t, "/bin/busybox", "busybox-static")
	for _, script := range []string{"init", "etc/profile"} {
		if out, err := exec.Command(busybox, "sh", "-n", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", script, err, out)
		}
	}
}

func FuzzPath(f *testing.F) {
	f.Add("bin/busybox")
	f.Add("TRAILER!!!")
	f.Add("a\x00b")
	f.Fuzz(func(t *testing.T, path string) {
		var b bytes.Buffer
		tree := Tree{{Path: path, Mode: 0o644, Content: strings.NewReader("x"), Size: 1}}
		if _, err := Pack(context.Background(), &b, tree, Compression{Name: "none"}, time.Unix(0, 0), nil); err != nil {
			t.Skip()
		}
		h, err := cpio.NewReader(&b).Next()
		if err != nil || h.Name != path || h.Size != 1 {
			t.Errorf("%q came back as %+v, %v", path, h, err)
		}
	})
}

// cpu is the processor time of this process and its ended children.
func cpu(b *testing.B) time.Duration {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			b.Fatal(err)
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum
}

// BenchmarkPack holds Pack with zstd against find | cpio | gzip on the same
// tree. The figure "ratio" is ours by theirs in processor time; 1 or less is
// the goal.
func BenchmarkPack(b *testing.B) {
	busybox, err := os.Open(need.File(b, "/bin/busybox", "busybox-static"))
	if err != nil {
		b.Fatal(err)
	}
	defer busybox.Close()
	st, err := busybox.Stat()
	if err != nil {
		b.Fatal(err)
	}
	tree := Base(busybox, st.Size())
	dir := b.TempDir()
	for _, e := range tree {
		path := filepath.Join(dir, e.Path)
		if e.Mode.IsDir() {
			if err := os.MkdirAll(path, 0o755); err != nil {
				b.Fatal(err)
			}
			continue
		}
		content, err := io.ReadAll(io.NewSectionReader(e.Content, 0, e.Size))
		if err != nil {
			b.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o755); err != nil {
			b.Fatal(err)
		}
	}
	need.Tool(b, "cpio", "cpio")
	out := filepath.Join(b.TempDir(), "initramfs")
	var ours, theirs time.Duration
	var ourSize, theirSize int64
	for b.Loop() {
		start := cpu(b)
		f, err := os.Create(out)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := Pack(context.Background(), f, tree, Compression{Name: "zstd"}, time.Unix(0, 0), nil); err != nil {
			b.Fatal(err)
		}
		ourSize, _ = f.Seek(0, io.SeekEnd)
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
		ours += cpu(b) - start

		start = cpu(b)
		cmd := exec.Command("sh", "-c", fmt.Sprintf("cd %q && find . | cpio --quiet -H newc -o | gzip >%q", dir, out))
		if msg, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, msg)
		}
		theirs += cpu(b) - start
		if st, err := os.Stat(out); err == nil {
			theirSize = st.Size()
		}
	}
	b.ReportMetric(ours.Seconds()*1000/float64(b.N), "ours-cpu-ms/op")
	b.ReportMetric(theirs.Seconds()*1000/float64(b.N), "theirs-cpu-ms/op")
	b.ReportMetric(ours.Seconds()/theirs.Seconds(), "ratio")
	b.ReportMetric(float64(ourSize), "ours-bytes")
	b.ReportMetric(float64(theirSize), "theirs-bytes")
}
