package iso

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kdomanski/iso9660"

	"github.com/memlinux/memlinux/testvm/need"
)

// member is one entry of a tar stream; a name that ends in a slash is a folder.
type member struct {
	name, body string
}

func tarOf(t testing.TB, members ...member) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Name: m.name, Size: int64(len(m.body)), Mode: 0o644, Typeflag: tar.TypeReg}
		if strings.HasSuffix(m.name, "/") {
			h.Typeflag = tar.TypeDir
		}
		writeHeader(t, w, h)
		if _, err := w.Write([]byte(m.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func writeHeader(t testing.TB, w *tar.Writer, h *tar.Header) {
	t.Helper()
	if err := w.WriteHeader(h); err != nil {
		t.Fatal(err)
	}
}

func newDisc(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disc.iso"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// extract copies a disc's files out by xorriso.
func extract(t *testing.T, disc string) map[string]string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "out")
	msg, err := exec.Command(need.Tool(t, "xorriso", "xorriso"), "-osirrox", "on", "-abort_on", "WARNING", "-indev", disc, "-extract", "/", out).CombinedOutput()
	if err != nil {
		t.Fatalf("xorriso: %v\n%s", err, msg)
	}
	got := map[string]string{}
	err = filepath.WalkDir(out, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == out {
			return err
		}
		name := strings.TrimPrefix(path, out+"/")
		if d.IsDir() {
			// xorriso restores the disc's r-x; the test must be able to clean up.
			got[name+"/"] = ""
			return os.Chmod(path, 0o755)
		}
		b, err := os.ReadFile(path)
		got[name] = fmt.Sprintf("%d %x", len(b), sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(out, 0o755); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestXorrisoReadsTheSame(t *testing.T) {
	var many, exact []member
	for i := range 1000 {
		many = append(many, member{fmt.Sprintf("many/file%d.txt", i), strings.Repeat("x", i*5)})
	}
	for i := range 45 { // 68 bytes for . and .., 45 records of 44: one sector exactly
		exact = append(exact, member{fmt.Sprintf("exact/file%d.md", 10+i), fmt.Sprint("body ", i)})
	}
	for i, m := range exact[:45:45] { // two such folders, folders and files behind them
		exact = append(exact, member{"exact2/" + m.name[6:], m.body}, member{"z/" + fmt.Sprint(i), strings.Repeat("\x00", 3*sectorSize)})
	}
	for name, members := range map[string][]member{
		"nothing":                        nil,
		"only the root":                  {{"./", ""}},
		"as tar -C writes it":            {{"./", ""}, {"./a/", ""}, {"./a/b", "c"}, {"./d", "e"}},
		"parents that are not listed":    {{"a/b/c", "d"}, {"a/", ""}},
		"sizes around the sector":        {{"0", ""}, {"1", "x"}, {"2047", strings.Repeat("y", 2047)}, {"2048", strings.Repeat("z", 2048)}, {"2049", strings.Repeat("w", 2049)}},
		"every character":                {{`abcdefghijklmnopqrstuvwxyz`, "1"}, {`0123456789_!"%&'()*+,-`, "2"}, {`:<=>?.:<=>?`, "3"}, {`dir:<=>?!"%&'()*+,-/f`, "4"}},
		"the longest names":              {{strings.Repeat("a", 28), "1"}, {strings.Repeat("b", 19) + ".ignition", "2"}, {strings.Repeat("d", 31) + "/f", "3"}},
		"dots":                           {{".profile", "1"}, {"a.b", "2"}, {"conf.d/x.y", "3"}, {"a.b.c/d", "4"}, {".hidden.d/x", "5"}},
		"ten folders deep":               {{"1/2/3/4/5/6/7/8/9/10/f", "deep"}},
		"1000 files in a folder":         many,
		"folders that fill their sector": exact,
	} {
		t.Run(name, func(t *testing.T) {
			disc := newDisc(t)
			if err := FromTar(t.Context(), disc, tarOf(t, members...), "MY_DATA_1", 64<<20); err != nil {
				t.Fatal(err)
			}
			want := map[string]string{}
			for _, m := range members {
				path := strings.TrimPrefix(m.name, "./")
				if path == "" {
					continue
				}
				for i, c := range path {
					if c == '/' {
						want[path[:i+1]] = ""
					}
				}
				if !strings.HasSuffix(path, "/") {
					want[path] = fmt.Sprintf("%d %x", len(m.body), sha256.Sum256([]byte(m.body)))
				}
			}
			got := extract(t, disc.Name())
			for path := range want {
				if got[path] != want[path] {
					t.Errorf("%q is %q, want %q", path, got[path], want[path])
				}
			}
			if len(got) != len(want) {
				t.Errorf("the disc holds %d, want %d", len(got), len(want))
			}
			if info, err := disc.Stat(); err != nil || info.Size()%sectorSize != 0 {
				t.Errorf("the disc has %d bytes", info.Size())
			}
		})
	}
}

func TestLabelIsShownByXorriso(t *testing.T) {
	xorriso := need.Tool(t, "xorriso", "xorriso")
	disc := newDisc(t)
	if err := FromTar(t.Context(), disc, tarOf(t, member{"a", "b"}), "MEMLINUX_DATA", 1<<20); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(xorriso, "-indev", disc.Name(), "-pvd_info").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Volume Id    : MEMLINUX_DATA") {
		t.Errorf("xorriso: %v\n%s", err, out)
	}
}

func TestRefused(t *testing.T) {
	special := func(h tar.Header) *bytes.Buffer {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		writeHeader(t, w, &h)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return &b
	}
	files := func(names ...string) *bytes.Buffer {
		var list []member
		for _, n := range names {
			list = append(list, member{n, ""})
		}
		return tarOf(t, list...)
	}
	var crowd []string
	for i := range maxEntries + 1 {
		crowd = append(crowd, fmt.Sprint(i))
	}
	for _, c := range []struct {
		name string
		tar  *bytes.Buffer
		want []string
	}{
		{"upper case", files("boot/README"), []string{`file "boot/README"`, "lower-case", "rename it"}},
		{"other upper case", files("É"), []string{"lower-case"}},
		{"an upper-case folder", files("Boot/a"), []string{`folder "Boot"`, "lower-case"}},
		{"a space", files("my file"), []string{`"my file"`, `' '`}},
		{"a tilde", files("a~"), []string{`'~'`}},
		{"a letter beyond ASCII", files("é"), []string{`'é'`}},
		{"a semicolon", files("a;1"), []string{`';'`}},
		{"a semicolon in a folder", files("a;1/b"), []string{`folder "a;1"`}},
		{"a backslash", files(`a\b`), []string{`'\\'`}},
		{"a control character", files("a\nb"), []string{`'\n'`}},
		{"two dots", files("archive.tar.gz"), []string{`"archive.tar.gz"`, "only one dot"}},
		{"a dot at the end", files("a."), []string{"dot at the end"}},
		{"a long extension", files("a.123456789"), []string{"at most 8 characters behind the dot"}},
		{"a long hidden name", files(".bash_history"), []string{"at most 8 characters behind the dot"}},
		{"a long name", files(strings.Repeat("a", 29)), []string{"at most 28 characters for a file"}},
		{"a long folder", files(strings.Repeat("a", 32) + "/b"), []string{"at most 31 characters for a folder"}},
		{"an absolute path", files("/etc/passwd"), []string{`"/etc/passwd"`, "absolute"}},
		{"an absolute path behind a dot", files(".//etc/passwd"), []string{"absolute"}},
		{"a way out", files("../../etc/passwd"), []string{`"../../etc/passwd"`, `".."`}},
		{"a way out further in", files("a/../../b"), []string{`".."`}},
		{"a way out as a folder", files("../"), []string{`".."`}},
		{"an empty part", files("a//b"), []string{"empty part"}},
		{"a file twice", files("a", "a"), []string{`"a" is in the tar stream twice`}},
		{"a file twice by another path", files("a", "./a"), []string{"twice"}},
		{"a file and a folder", files("a", "a/b"), []string{`"a" is in the tar stream twice`}},
		{"a folder and a file", files("a/b", "a"), []string{`"a" is in the tar stream twice`}},
		{"an empty folder", files("a/b", "c/"), []string{`folder "c" is empty`}},
		{"a symbolic link", special(tar.Header{Name: "sh", Linkname: "busybox", Typeflag: tar.TypeSymlink}), []string{`"sh" is a link`}},
		{"a hard link", special(tar.Header{Name: "sh", Linkname: "busybox", Typeflag: tar.TypeLink}), []string{`"sh" is a link`}},
		{"a device", special(tar.Header{Name: "null", Typeflag: tar.TypeChar}), []string{`"null"`, `'3'`}},
		{"a fifo", special(tar.Header{Name: "pipe", Typeflag: tar.TypeFifo}), []string{`"pipe"`}},
		{"too much data", tarOf(t, member{"ok", "x"}, member{"big", strings.Repeat("x", 1<<20)}), []string{"more than the 1 MiB"}},
		{"too many folders", tarOf(t, func() (m []member) {
			for i := range 600 {
				m = append(m, member{fmt.Sprintf("%d/f", i), ""})
			}
			return m
		}()...), []string{"more than the 1 MiB"}},
		{"an absurd size", sizedTar(t, math.MaxInt64), []string{"more than the 1 MiB"}},
		{"too many files", files(crowd...), []string{"more than"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			temp := t.TempDir()
			t.Setenv("TMPDIR", temp)
			disc := newDisc(t)
			if _, err := disc.WriteString("old"); err != nil {
				t.Fatal(err)
			}
			err := FromTar(t.Context(), disc, c.tar, "DATA", 1<<20)
			var refused *RefusedError
			if !errors.As(err, &refused) {
				t.Fatalf("%v is no RefusedError", err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			checkNothingLeft(t, disc, temp)
		})
	}
}

// sizedTar is the header of a file that claims a size.
func sizedTar(t *testing.T, size int64) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	writeHeader(t, tar.NewWriter(&b), &tar.Header{Name: "big", Size: size, Typeflag: tar.TypeReg, Format: tar.FormatGNU})
	return &b
}

func checkNothingLeft(t *testing.T, disc *os.File, temp string) {
	t.Helper()
	if info, err := disc.Stat(); err != nil || info.Size() != 0 {
		t.Errorf("%d bytes of a disc are left", info.Size())
	}
	entries, err := os.ReadDir(temp)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("%q is left in the temporary folder", e.Name())
	}
}

func TestLabelsRefused(t *testing.T) {
	for _, label := range []string{"", "lower", "A B", "A-B", strings.Repeat("A", 33), "Ä"} {
		disc := newDisc(t)
		var refused *RefusedError
		if err := FromTar(t.Context(), disc, tarOf(t), label, 1<<20); !errors.As(err, &refused) {
			t.Errorf("label %q: %v", label, err)
		}
	}
}

func TestBrokenStreamsGiveNoDisc(t *testing.T) {
	whole := tarOf(t, member{"a", strings.Repeat("x", 1000)}, member{"b", strings.Repeat("\x00", 5000)}).Bytes()
	for cut := 0; cut < len(whole)-512; cut += 256 { // at all borders, and between
		temp := t.TempDir()
		t.Setenv("TMPDIR", temp)
		disc := newDisc(t)
		if err := FromTar(t.Context(), disc, bytes.NewReader(whole[:cut]), "DATA", 1<<20); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d of %d: %v", cut, len(whole), err)
		}
		checkNothingLeft(t, disc, temp)
	}
	disc := newDisc(t)
	if err := FromTar(t.Context(), disc, strings.NewReader(strings.Repeat("\x1f\x8b", 2000)), "DATA", 1<<20); err == nil || !strings.Contains(err.Error(), "not compressed") {
		t.Errorf("no tar at all: %v", err)
	}
}

func TestCancelLeavesNothing(t *testing.T) {
	stream := tarOf(t, member{"a", strings.Repeat("x", 1<<20)}, member{"b", strings.Repeat("x", 3<<20)}).Bytes()
	for _, at := range []int{0, 1, 2, 40, 100} { // Reads before the cancel
		temp := t.TempDir()
		t.Setenv("TMPDIR", temp)
		disc := newDisc(t)
		ctx, cancel := context.WithCancel(t.Context())
		reads := 0
		r := readFunc(func() {
			if reads++; reads > at {
				cancel()
			}
		})
		if err := FromTar(ctx, disc, io.TeeReader(bytes.NewReader(stream), r), "DATA", 16<<20); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled after %d reads: %v", at, err)
		}
		checkNothingLeft(t, disc, temp)
		cancel()
	}
	// while the disc is written
	disc, ctx, cancel := newDisc(t), context.Context(nil), context.CancelFunc(nil)
	ctx, cancel = context.WithCancel(t.Context())
	w := &imageWriter{ctx: ctx, w: disc, limit: 1 << 20}
	cancel()
	if _, err := w.Write(make([]byte, sectorSize)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while writing: %v", err)
	}
}

type readFunc func()

func (f readFunc) Write(p []byte) (int, error) { f(); return len(p), nil }

// What the library gets wrong must be found by reading back.
func TestCompareFindsWhatTheLibraryLoses(t *testing.T) {
	sum := func(s string) [sha256.Size]byte { return sha256.Sum256([]byte(s)) }
	whole := func() map[string]*entry {
		return map[string]*entry{"a": {size: 3, hash: sum("aaa")}, "d": {dir: true}, "d/b": {size: 2, hash: sum("bb")}}
	}
	lib, err := iso9660.NewWriter()
	if err != nil {
		t.Fatal(err)
	}
	defer lib.Cleanup()
	for name, body := range map[string]string{"a": "aaa", "d/b": "bb"} {
		if err := lib.AddFile(strings.NewReader(body), name); err != nil {
			t.Fatal(err)
		}
	}
	disc := newDisc(t)
	if err := lib.WriteTo(disc, "DATA"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(map[string]*entry)
		want   string
	}{
		{"nothing", func(map[string]*entry) {}, ""},
		{"a file that is missing", func(m map[string]*entry) { m["d/c"] = &entry{} }, `"d/c" is missing`},
		{"a folder that is missing", func(m map[string]*entry) { m["e"] = &entry{dir: true} }, `"e" is missing`},
		{"a file too many", func(m map[string]*entry) { delete(m, "d/b") }, `"d/b" is on the disc and should not be`},
		{"a folder for a file", func(m map[string]*entry) { m["d"].dir = false }, `"d" is on the disc`},
		{"another size", func(m map[string]*entry) { m["a"].size = 4 }, `"a" differs`},
		{"other bytes", func(m map[string]*entry) { m["d/b"].hash = sum("bc") }, `"d/b" differs`},
	} {
		want := &content{entries: whole()}
		c.change(want.entries)
		err := want.compare(t.Context(), disc, "DATA")
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	if err := (&content{entries: whole()}).compare(t.Context(), disc, "OTHER"); err == nil {
		t.Error("another label passes")
	}
	for cut := int64(0); cut < 22*sectorSize; cut += sectorSize {
		if err := disc.Truncate(22*sectorSize - sectorSize - cut); err != nil {
			break
		}
		if err := (&content{entries: whole()}).compare(t.Context(), disc, "DATA"); err == nil {
			t.Errorf("a disc cut to %d bytes passes", 21*sectorSize-cut)
		}
	}
}

func TestGitArchiveCommentIsSkipped(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	writeHeader(t, w, &tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}})
	writeHeader(t, w, &tar.Header{Typeflag: tar.TypeReg, Name: "a"})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := FromTar(t.Context(), newDisc(t), &b, "DATA", 1<<20); err != nil {
		t.Error(err)
	}
}

// FuzzFromTar: whatever the stream, FromTar must not panic, must not write
// outside its folder, and what it accepts must read back as tar reads it.
func FuzzFromTar(f *testing.F) {
	for _, list := range [][]member{
		{{"a", "b"}}, {{"./", ""}, {"./d/", ""}, {"./d/e.txt", "hello"}}, {{"../x", "y"}}, {{"A", ""}}, {{"a/b/c/d", "x"}, {"a/b/e", ""}}, {{"/abs", "x"}},
	} {
		f.Add(tarOf(f, list...).Bytes())
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		outer := t.TempDir()
		temp := filepath.Join(outer, "temp")
		if err := os.Mkdir(temp, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Setenv("TMPDIR", temp)
		disc := newDisc(t)
		err := FromTar(t.Context(), disc, bytes.NewReader(stream), "FUZZ", 4<<20)
		left, readErr := os.ReadDir(outer)
		inside, readErr2 := os.ReadDir(temp)
		if readErr != nil || readErr2 != nil || len(left) != 1 || len(inside) != 0 {
			t.Fatalf("left behind: %v %v (%v, %v)", left, inside, readErr, readErr2)
		}
		info, statErr := disc.Stat()
		if statErr != nil || (err != nil) != (info.Size() == 0) {
			t.Fatalf("error %v, and a disc of %d bytes", err, info.Size())
		}
		if err != nil {
			return
		}
		image, err := iso9660.OpenImage(disc)
		if err != nil {
			t.Fatal(err)
		}
		root, err := image.RootDir()
		if err != nil {
			t.Fatal(err)
		}
		r := tar.NewReader(bytes.NewReader(stream))
		for {
			h, err := r.Next()
			if err != nil {
				break
			}
			path := strings.Trim(strings.TrimPrefix(h.Name, "./"), "/")
			if h.Typeflag != tar.TypeReg || path == "" {
				continue
			}
			at := root
			for _, part := range strings.Split(strings.TrimPrefix(path, "./"), "/") {
				if part == "." {
					continue
				}
				children, err := at.GetChildren()
				if err != nil {
					t.Fatal(err)
				}
				i := slices.IndexFunc(children, func(f *iso9660.File) bool { return f.Name() == part })
				if i < 0 {
					t.Fatalf("%q is not on the disc", h.Name)
				}
				at = children[i]
			}
			want, _ := io.ReadAll(r)
			got, _ := io.ReadAll(at.Reader())
			if !bytes.Equal(got, want) {
				t.Fatalf("%q differs", h.Name)
			}
		}
	})
}
