package tarball

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/testvm/need"
)

// plenty is more than any test has.
var plenty = Limits{Bytes: 64 << 20, Files: 1000}

func file(name, content string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(1e9, 0), Linkname: content}
}
func folder(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}
}
func symlink(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
}
func hardlink(name, to string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
}

// archive makes a tar of headers; a file's content is its Linkname.
func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content, h.Linkname = h.Linkname, ""
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// list is what is below dir, a line each.
func list(t testing.TB, dir string) []string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		line := info.Mode().String() + " " + strings.TrimPrefix(name, dir+"/")
		switch {
		case d.Type() == fs.ModeSymlink:
			to, _ := os.Readlink(name)
			line += " -> " + to
		case d.Type().IsRegular():
			b, _ := os.ReadFile(name)
			line += fmt.Sprintf(" %q %d", b, info.ModTime().Unix())
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestUnpack(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	executable := file("./top/run", "#!")
	executable.Mode = 0o6777
	future := file("top/future", "")
	future.ModTime = time.Now().Add(1000 * time.Hour)
	global := tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "abc"}}
	b := archive(t, global, folder("./"), folder("top/"), executable, file("top/deep/er/a", "content"), symlink("top/deep/link", "../../top/run"),
		hardlink("top/second", "top/deep/er/a"), symlink("top/dangling", "no/where"), folder("top"), future)
	dir := t.TempDir()
	files, size := 0, int64(0)
	if err := Unpack(t.Context(), bytes.NewReader(b), dir, plenty, func(f int, s int64) { files, size = f, s }); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(dir + "/top/future")
	if err != nil || st.ModTime().After(time.Now()) {
		t.Errorf("a time to come: %v, %v", st.ModTime(), err)
	}
	_ = os.Remove(dir + "/top/future")
	want := []string{
		"drwxr-xr-x top", "Lrwxrwxrwx top/dangling -> no/where", "drwxr-xr-x top/deep", "drwxr-xr-x top/deep/er",
		`-rw-r--r-- top/deep/er/a "content" 1000000000`, "Lrwxrwxrwx top/deep/link -> ../../top/run",
		`-rwxr-xr-x top/run "#!" 1000000000`, `-rw-r--r-- top/second "content" 1000000000`,
	}
	if diff := cmp.Diff(want, list(t, dir)); diff != "" {
		t.Error(diff)
	}
	if files != 9 || size != 9 {
		t.Errorf("reported %d files, %d bytes", files, size)
	}
	a, _ := os.Stat(dir + "/top/deep/er/a")
	second, _ := os.Stat(dir + "/top/second")
	if !os.SameFile(a, second) {
		t.Error("the hard link is a file of its own")
	}
}

func TestRefused(t *testing.T) {
	good := archive(t, file("a", strings.Repeat("x", 600)), file("b", ""))
	device := tar.Header{Typeflag: tar.TypeChar, Name: "dev/null"}
	fifo := tar.Header{Typeflag: tar.TypeFifo, Name: "fifo"}
	flip := bytes.Clone(good)
	flip[1024+512+10] ^= 1
	var many []tar.Header
	for i := range plenty.Files + 1 {
		many = append(many, file(fmt.Sprint(i), ""))
	}
	var nested []tar.Header
	for i := range 6 {
		nested = append(nested, file(fmt.Sprint(i)+strings.Repeat("/d", 190)+"/x", ""))
	}
	for name, c := range map[string]struct {
		tar  []byte
		want string
	}{
		"an absolute path":                       {archive(t, file("/etc/passwd", "x")), `"/etc/passwd" in the archive is not a path inside`},
		"a path that climbs out":                 {archive(t, file("a/../../x", "x")), `"a/../../x" in the archive is not a path inside`},
		"a path with only ..":                    {archive(t, folder("..")), `".." in the archive is not a path inside`},
		"an absolute symlink":                    {archive(t, symlink("a", "/etc")), `the symbolic link "a" in the archive leads to "/etc", outside`},
		"a symlink that climbs out":              {archive(t, symlink("d/a", "../../x")), `the symbolic link "d/a" in the archive leads to "../../x", outside`},
		"a symlink that climbs out through one":  {archive(t, symlink("d/e/up", "../.."), symlink("x", "d/e/up/..")), `the symbolic link "x"`},
		"a symlink to nothing":                   {archive(t, symlink("a", "")), `the symbolic link "a"`},
		"a member behind a symlink":              {archive(t, folder("d"), symlink("l", "d"), file("l/x", "")), `"l/x" in the archive lies in "l", which is not a folder`},
		"a member in a file":                     {archive(t, file("f", ""), file("f/x", "")), `"f/x" in the archive lies in "f"`},
		"a hard link to a file of the system":    {archive(t, hardlink("a", "/etc/passwd")), `"a" in the archive is a hard link to "/etc/passwd"`},
		"a hard link that climbs out":            {archive(t, hardlink("a", "../../etc/passwd")), `"a" in the archive is a hard link to "../../etc/passwd"`},
		"a hard link to a symlink":               {archive(t, symlink("s", "x"), hardlink("d/e", "s")), `"d/e" in the archive is a hard link to "s"`},
		"a file over a symlink":                  {archive(t, symlink("s", "x"), file("s", "")), `"s" is in the archive twice`},
		"a folder over a file":                   {archive(t, file("s", ""), folder("s")), `"s" is in the archive twice`},
		"a file over the folder itself":          {archive(t, file(".", "")), `"." is in the archive twice`},
		"a device":                               {archive(t, device), `"dev/null" in the archive is neither`},
		"a named pipe":                           {archive(t, fifo), `"fifo" in the archive is neither`},
		"a bomb of bytes":                        {archive(t, file("a", strings.Repeat("0", int(plenty.Bytes)))), `unpacks to more than the 64 MiB that are allowed here (at "a")`},
		"a bomb of files":                        {archive(t, many...), `more than the 1000 files that are allowed here (at "1000")`},
		"a bomb of folders":                      {archive(t, nested...), "more than the 1000 files"},
		"folders without end":                    {archive(t, file(strings.Repeat("d/", 2000)+"x", "")), "more than 200 folders deep"},
		"nothing at all":                         {nil, "this is not a tar archive: it is empty"},
		"a tar of nothing":                       {archive(t), "the tar archive has nothing in it"},
		"text":                                   {[]byte(strings.Repeat("not a tar\n", 100)), "this is not a tar archive"},
		"short text":                             {[]byte("not a tar\n"), "this is not a tar archive"},
		"truncated in a file":                    {good[:700], `ends too early, behind "a"`},
		"truncated between files":                {good[:512+1024], `ends too early, behind "a"`},
		"truncated in the padding":               {good[:512+1000], `ends too early, behind "a"`},
		"truncated in a header":                  {good[:512+1024+200], `ends too early, behind "a"`},
		"truncated before its end":               {good[:512+1024+512], `ends too early, behind "b"`},
		"a damaged header":                       {flip, `damaged behind "a"`},
		"something behind its end":               {append(bytes.Clone(good), "garbage"...), `goes on behind its end ("b" is the last of it)`},
		"two archives joined":                    {append(bytes.Clone(good), good...), `goes on behind its end`},
		"a name that is too long":                {archive(t, file(strings.Repeat("n", 5000), "")), "is not a path inside of it"},
		"a name that the file system can't have": {archive(t, file(strings.Repeat("n", 300), "")), "file name too long"},
	} {
		t.Run(name, func(t *testing.T) {
			outer := t.TempDir()
			dir := filepath.Join(outer, "in")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			err := Unpack(t.Context(), bytes.NewReader(c.tar), dir, plenty, nil)
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v; want %q", err, c.want)
			}
			holdsOnly(t, outer)
		})
	}
}

// holdsOnly checks that nothing is in outer but the folder "in" with what may
// be in an unpacked tree.
func holdsOnly(t testing.TB, outer string) {
	t.Helper()
	entries, err := os.ReadDir(outer)
	if err != nil || len(entries) != 1 {
		t.Errorf("outside: %v, %v", entries, err)
	}
	root, err := os.OpenRoot(filepath.Join(outer, "in"))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := root.Lstat(name)
		if err != nil {
			return err
		}
		if info.Mode()&^(fs.ModeDir|fs.ModeSymlink|fs.ModePerm) != 0 {
			t.Errorf("%s: %s", name, info.Mode())
		}
		// os.Root itself resolves the link, and fails where it leaves.
		if d.Type() == fs.ModeSymlink {
			if _, err := root.Stat(name); err != nil && strings.Contains(err.Error(), "escapes") {
				t.Errorf("a link leads out: %v", err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// A sparse file of 1 TiB is some hundred bytes of tar.
func TestSparseBomb(t *testing.T) {
	tool := need.Tool(t, "tar", "tar")
	src := t.TempDir()
	if err := errors.Join(os.WriteFile(src+"/hole", nil, 0o600), os.Truncate(src+"/hole", 1<<40)); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"gnu", "pax"} {
		b, err := exec.Command(tool, "-C", src, "-S", "--format="+format, "-c", "hole").Output()
		if err != nil {
			t.Fatal(err)
		}
		err = Unpack(t.Context(), bytes.NewReader(b), t.TempDir(), plenty, nil)
		if err == nil || !strings.Contains(err.Error(), `unpacks to more than the 64 MiB`) {
			t.Errorf("%s, %d bytes: %v", format, len(b), err)
		}
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	b := archive(t, file("a", strings.Repeat("x", 1<<20)), file("b", ""))
	err := Unpack(ctx, bytes.NewReader(b), t.TempDir(), plenty, func(int, int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestSourceThatFails(t *testing.T) {
	broken := errors.New("disk broken")
	good := archive(t, file("a", strings.Repeat("x", 5000)))
	for _, tool := range compressors {
		b := compress(t, tool, good)
		r, err := NewReader(io.MultiReader(bytes.NewReader(b[:len(b)/2]), iotest.ErrReader(broken)))
		if err == nil {
			err = Unpack(t.Context(), r, t.TempDir(), plenty, nil)
			_ = r.Close()
		}
		if !errors.Is(err, broken) {
			t.Errorf("%s: %v", tool, err)
		}
	}
}

// compressors are programs and, behind a space, their Debian packages.
var compressors = []string{"xz xz-utils", "gzip gzip", "bzip2 bzip2", "zstd zstd", "cat coreutils"}

func compress(t testing.TB, tool string, b []byte) []byte {
	t.Helper()
	name, pkg, _ := strings.Cut(tool, " ")
	cmd := exec.Command(need.Tool(t, name, pkg))
	if name != "cat" {
		cmd.Args = append(cmd.Args, "-c")
	}
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestEveryCompression(t *testing.T) {
	// More than any buffer on the way, and not all alike.
	var text strings.Builder
	for i := range 150000 {
		fmt.Fprintln(&text, i*7919)
	}
	plain := archive(t, file("a", text.String()))
	for _, tool := range compressors {
		name, _, _ := strings.Cut(tool, " ")
		t.Run(name, func(t *testing.T) {
			b := compress(t, tool, plain)
			r, err := NewReader(iotest.HalfReader(bytes.NewReader(b)))
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, plain) {
				t.Errorf("%d bytes of %d: %v", len(got), len(plain), err)
			}
			if name == "cat" {
				return
			}
			flipped := bytes.Clone(b)
			flipped[len(b)/2] ^= 0x55
			for damage, bad := range map[string][]byte{
				"truncated":                 b[:len(b)*2/3],
				"truncated in the magic":    b[:6],
				"a flipped bit":             flipped,
				"something behind it":       append(bytes.Clone(b), "garbage, more of it than one magic"...),
				"not in it what is claimed": compress(t, tool, []byte("no tar")),
			} {
				err := unpackAll(t, bad)
				if err == nil || strings.Contains(err.Error(), "\n") {
					t.Errorf("%s: %v", damage, err)
				}
			}
		})
	}
}

func unpackAll(t testing.TB, b []byte) error {
	t.Helper()
	r, err := NewReader(bytes.NewReader(b))
	if err != nil {
		return err
	}
	defer r.Close()
	return Unpack(t.Context(), r, t.TempDir(), plenty, nil)
}

// 60 KiB that unpack to 64 MiB and more stop at the limit, and so does the xz.
func TestCompressedBomb(t *testing.T) {
	plain := archive(t, file("zeros", strings.Repeat("\x00", 80<<20)))
	for _, tool := range compressors {
		start := time.Now()
		err := unpackAll(t, compress(t, tool, plain))
		if err == nil || !strings.Contains(err.Error(), "unpacks to more than the 64 MiB") {
			t.Errorf("%s: %v after %s", tool, err, time.Since(start))
		}
	}
}

// A reader that is closed early, or whose source hangs, leaves nothing behind.
func TestClosedEarly(t *testing.T) {
	text := make([]byte, 8<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(text)
	b := compress(t, compressors[0], archive(t, file("text", string(text))))
	pr, pw := io.Pipe()
	defer pw.Close()
	r, err := NewReader(io.MultiReader(bytes.NewReader(b[:len(b)/2]), pr))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := r.Close(); err != nil || time.Since(start) > 2*time.Second {
		t.Errorf("%v after %s", err, time.Since(start))
	}
	if _, err := r.Read(make([]byte, 1)); err == nil {
		t.Error("it reads on")
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, folder("d"), file("d/f", "x"), symlink("d/s", "../d/f"), hardlink("h", "d/f")))
	f.Add(archive(f, symlink("d/e/up", "../.."), symlink("x", "d/e/up/..")))
	f.Add(archive(f, symlink("l", "d"), file("l/x", "")))
	f.Add(archive(f, hardlink("a", "../../etc/passwd"), file("/x", "")))
	f.Add([]byte("no tar"))
	f.Fuzz(func(t *testing.T, b []byte) {
		outer := t.TempDir()
		dir := filepath.Join(outer, "in")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = Unpack(t.Context(), bytes.NewReader(b), dir, Limits{Bytes: 1 << 20, Files: 50}, nil)
		holdsOnly(t, outer)
	})
}

func FuzzNewReader(f *testing.F) {
	plain := archive(f, file("a", "content"))
	for _, tool := range compressors[1:] { // an xz each time would be slow, and is not our parser
		f.Add(compress(f, tool, plain))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.HasPrefix(b, []byte("\xfd7zXZ\x00")) {
			t.Skip("the xz program's matter")
		}
		r, err := NewReader(bytes.NewReader(b))
		if err != nil {
			return
		}
		defer r.Close()
		_, _ = io.Copy(io.Discard, io.LimitReader(r, 1<<20))
	})
}
