package initramfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/testvm/need"
)

// m is a member of a tar; its content is the Uname, which nobody else needs.
type m = tar.Header

// tarred is a tar of members.
func tarred(t testing.TB, members ...m) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range members {
		content := h.Uname
		h.Uname = ""
		h.Size = int64(len(content))
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 && h.Typeflag == tar.TypeReg {
			h.Mode = 0o644
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

func fromTar(b []byte, d Duplicates) (Tree, []string, error) {
	return FromTar(context.Background(), bytes.NewReader(b), int64(len(b)), "of the tar", d)
}

func TestFromTar(t *testing.T) {
	cap20 := "\x01\x00\x00\x02\x00\x20\x00\x00" + strings.Repeat("\x00", 12)
	b := tarred(t,
		m{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "of git archive"}},
		m{Name: "./", Typeflag: tar.TypeDir, Mode: 0o700},
		m{Name: "./usr/", Typeflag: tar.TypeDir, Mode: 0o7755, Uid: 1, Gid: 2},
		m{Name: "/usr/bin//ping", Mode: 0o4755, Uname: "ping's content", PAXRecords: map[string]string{RecordCaps: cap20, RecordWhy: "program of the recipe (/usr/bin/ping)"}},
		m{Name: "usr/bin/ping4", Typeflag: tar.TypeLink, Linkname: "./usr/bin/ping"},
		m{Name: "bin", Typeflag: tar.TypeSymlink, Linkname: "usr/bin"},
		m{Name: "bin/sh", Mode: 0o755, Uname: "sh's"},
		m{Name: "usr/bin/bash", Typeflag: tar.TypeLink, Linkname: "/bin/sh"},
		m{Name: "early", Typeflag: tar.TypeLink, Linkname: "late"},
		m{Name: "late", Uname: "of a file that comes behind its other name"},
		m{Name: "dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
		m{Name: "dev/also", Typeflag: tar.TypeLink, Linkname: "dev/null"},
		m{Name: "dev/loop0", Typeflag: tar.TypeBlock, Devmajor: 7},
		m{Name: "run/pipe", Typeflag: tar.TypeFifo, Mode: 0o600},
		m{Name: "run/link", Typeflag: tar.TypeLink, Linkname: "bin"},
		m{Name: strings.Repeat("long/", 60) + "name with \xc3\xa4", Uname: "PAX"},
	)
	tree, skipped, err := fromTar(b, RefuseDuplicates)
	if err != nil {
		t.Fatal(err)
	}
	want := `Lrwxrwxrwx bin -> usr/bin (of the tar)
-rw-r--r-- early == late (of the tar)
-rw-r--r-- late "of a file that comes behind its other name" (of the tar)
-rw-r--r-- ` + strings.Repeat("long/", 60) + `name with ä "PAX" (of the tar)
Lrwxrwxrwx run/link -> usr/bin (of the tar)
prw------- run/pipe (of the tar)
dugtrwxr-xr-x usr (of the tar)
-rwxr-xr-x usr/bin/bash == usr/bin/sh (of the tar)
urwxr-xr-x usr/bin/ping "ping's content" (program of the recipe (/usr/bin/ping))
urwxr-xr-x usr/bin/ping4 == usr/bin/ping (of the tar)
-rwxr-xr-x usr/bin/sh "sh's" (of the tar)
`
	// A link's mode is what the tar has; that it is 0 here nobody sees.
	got := strings.ReplaceAll(listing(t, tree), "L--------- ", "Lrwxrwxrwx ")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"dev/null (a character device)", "dev/also (a hard link to a device)", "dev/loop0 (a block device)"}, skipped); diff != "" {
		t.Error(diff)
	}
	for _, e := range tree {
		if (e.Path == "usr/bin/ping") != (string(e.Caps) == cap20) {
			t.Errorf("%s has the capabilities %x", e.Path, e.Caps)
		}
		if e.Path == "usr" && (e.UID != 1 || e.GID != 2) {
			t.Errorf("usr belongs to %d:%d", e.UID, e.GID)
		}
	}
	if _, p := pack(t, tree, "zstd", epochOfTests); p.Unpacked == 0 {
		t.Error("nothing was packed")
	}
}

// A member of a path that was there takes its place, as tar does it.
func TestFromTarReplaces(t *testing.T) {
	for _, tc := range []struct {
		name    string
		members []m
		want    string
	}{
		{"a file", []m{{Name: "a", Uname: "1"}, {Name: "./a", Uname: "2"}}, "-rw-r--r-- a \"2\" (of the tar)\n"},
		{"a link by a file", []m{{Name: "a", Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: "b"}, {Name: "a", Uname: "2"}}, "-rw-r--r-- a \"2\" (of the tar)\n"},
		{"a link to a folder by a folder", []m{{Name: "a", Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: "b"}, {Name: "a", Typeflag: tar.TypeDir, Mode: 0o700}, {Name: "a/c", Uname: "2"}}, "drwx------ a (of the tar)\n-rw-r--r-- a/c \"2\" (of the tar)\n"},
		{"a folder's mode", []m{{Name: "a", Typeflag: tar.TypeDir, Mode: 0o700}, {Name: "a/b", Uname: "1"}, {Name: "a", Typeflag: tar.TypeDir, Mode: 0o711}}, "drwx--x--x a (of the tar)\n-rw-r--r-- a/b \"1\" (of the tar)\n"},
		{"a file that has another name, which keeps it", []m{{Name: "a", Uname: "1"}, {Name: "b", Typeflag: tar.TypeLink, Linkname: "a"}, {Name: "a", Uname: "2"}}, "-rw-r--r-- a \"2\" (of the tar)\n-rw-r--r-- b \"1\" (of the tar)\n"},
		{"a name by what it is a name of", []m{{Name: "a", Uname: "1"}, {Name: "a", Typeflag: tar.TypeLink, Linkname: "a"}}, "-rw-r--r-- a \"1\" (of the tar)\n"},
		{"what a link made the same path", []m{{Name: "l", Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: "d"}, {Name: "l/a", Uname: "1"}, {Name: "d/a", Uname: "2"}}, "-rw-r--r-- d/a \"2\" (of the tar)\nLrwxrwxrwx l -> d (of the tar)\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := tarred(t, tc.members...)
			tree, _, err := fromTar(b, ReplaceDuplicates)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, listing(t, tree)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestFromTarRefuses(t *testing.T) {
	plain := tarred(t, m{Name: "a", Uname: strings.Repeat("x", 600)})
	why := func(s string) m { return m{Name: "a", PAXRecords: map[string]string{RecordWhy: s}} }
	flipped := slices.Clone(plain)
	flipped[3] ^= 1
	patched := func(at int, b byte) []byte { // with the checksum made right
		p := slices.Clone(plain)
		p[at] = b
		copy(p[148:], "        ")
		sum := 0
		for _, c := range p[:512] {
			sum += int(c)
		}
		copy(p[148:], fmt.Sprintf("%06o\x00 ", sum))
		return p
	}
	for _, tc := range []struct {
		name string
		tar  []byte
		want string
	}{
		{"a path twice", tarred(t, m{Name: "a"}, m{Name: "./a", PAXRecords: map[string]string{RecordWhy: "B"}}), "two files for a: of the tar and B"},
		{"a path twice through a link", tarred(t, m{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "d"}, m{Name: "l/a"}, m{Name: "d/a"}), "two files for d/a"},
		{"a way out", tarred(t, m{Name: "a/../../b"}), `member "a/../../b": its path has ".."`},
		{"a way out of a hard link", tarred(t, m{Name: "a", Typeflag: tar.TypeLink, Linkname: "../b"}), `a hard link: its path has ".."`},
		{"a hard link to nothing", tarred(t, m{Name: "a", Typeflag: tar.TypeLink, Linkname: "b"}), "a (of the tar) is a hard link to b, which is not there"},
		{"a hard link to a folder", tarred(t, m{Name: "b", Typeflag: tar.TypeDir}, m{Name: "a", Typeflag: tar.TypeLink, Linkname: "b"}), "no file"},
		{"a hard link to itself", tarred(t, m{Name: "a", Typeflag: tar.TypeLink, Linkname: "a"}), "hard link to itself"},
		{"a hard link to the root", tarred(t, m{Name: "a", Typeflag: tar.TypeLink, Linkname: "/"}), "root folder"},
		{"a file in the root's place", tarred(t, m{Name: "."}), "can only be a folder"},
		{"a link that leads out, used as a folder", tarred(t, m{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "../x"}, m{Name: "a/b"}), "leads out of the tree"},
		{"a file with what is in it", tarred(t, m{Name: "a"}, m{Name: "a/b"}), "a is a file (of the tar)"},
		{"a user that the format can't hold", tarred(t, m{Name: "a", Uid: 1 << 33}), "belongs to 8589934592:0"},
		{"a negative user", tarred(t, m{Name: "a", Uid: -1}), "belongs to -1:0"},
		{"a link to nowhere", tarred(t, m{Name: "a", Typeflag: tar.TypeSymlink}), "without a target"},
		{"a name longer than the kernel's", tarred(t, m{Name: strings.Repeat("a/", 2100) + "b"}), "4095 bytes"},
		{"a reason with a line break", tarred(t, why("a\nb")), "MEMLINUX.why is no line"},
		{"a reason with a terminal's codes", tarred(t, why("a\x1b[2Jb")), "MEMLINUX.why is no line"},
		{"a novel of a reason", tarred(t, why(strings.Repeat("a", maxWhy+1))), "MEMLINUX.why is no line"},
		{"the name that ends archives", tarred(t, m{Name: "TRAILER!!!"}), "TRAILER!!! would end"},
		{"4 GiB", patched(124, '7'), "cut off"}, // the size's first digit: 7 GiB
		{"an unknown type", patched(156, 'Z'), "unknown type 'Z'"},
		{"the type of old sparse files", patched(156, 'S'), "damaged at its begin"},
		{"no tar", []byte(strings.Repeat("no tar at all. ", 100)), "it is no uncompressed tar, or damaged at its begin"},
		{"gzip", append([]byte("\x1f\x8b\x08\x00"), make([]byte, 2000)...), "it is no uncompressed tar"},
		{"nothing", nil, "cut off"},
		{"a flipped bit in a header", flipped, "damaged at its begin"},
		{"cut off in a header", plain[:400], "damaged at its begin"},
		{"cut off in a file", plain[:700], "cut off"},
		{"cut off behind a file", plain[:1536], "cut off"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, _, err := fromTar(tc.tar, RefuseDuplicates)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := FromTar(ctx, bytes.NewReader(plain), int64(len(plain)), "", RefuseDuplicates); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// repeated is endless: the same bytes again and again.
type repeated []byte

func (r repeated) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		n += copy(p[n:], r[(off+int64(n))%int64(len(r)):])
	}
	return len(p), nil
}

// A tar of endless names is refused before it takes the memory.
func TestFromTarIsBounded(t *testing.T) {
	members := func(list ...m) []byte {
		b := tarred(t, list...)
		return b[:len(b)-1024] // without the end mark
	}
	var deep []m
	for i := range 200 {
		deep = append(deep, m{Name: fmt.Sprintf("%d/%sx", i, strings.Repeat("a/", 2000))})
	}
	for _, tc := range []struct {
		name string
		tar  repeated
		want string
	}{
		{"members", members(m{Name: "a"}), "it has more than 262144 members"},
		{"names", members(m{Name: strings.Repeat("a/", 2000) + "x"}), "it has more than 32 MiB of names"},
		{"folders that only paths name", append(members(deep...), make([]byte, 1<<20)...), "there are more than 262144 files and folders"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, _, err := FromTar(t.Context(), tc.tar, 1<<30, "", ReplaceDuplicates); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
}

// The tars of GNU tar, with all that it can do to a file.
func TestGNUTar(t *testing.T) {
	need.Root(t)
	gnu := need.Tool(t, "tar", "tar")
	dir := t.TempDir()
	run := func(argv ...string) {
		t.Helper()
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", argv, err, out)
		}
	}
	run("sh", "-c", `mkdir root && cd root && mkdir -m 1777 tmp && echo a >a && ln a b && ln -s a l && mkfifo p && mknod n c 1 3 && chown 70000:5 a && chmod 6755 a &&
		truncate -s 1M hole && echo x >>hole && mkdir -p deep/`+strings.Repeat("folder/", 40)+` && echo y >deep/`+strings.Repeat("folder/", 40)+`file`)
	for _, format := range []string{"gnu", "posix", "ustar"} {
		if format == "ustar" { // which has no such long names
			run("rm", "-r", "root/deep")
		}
		run(gnu, "-C", "root", "--format="+format, "-cf", "out.tar", ".")
		b, err := os.ReadFile(filepath.Join(dir, "out.tar"))
		if err != nil {
			t.Fatal(err)
		}
		tree, skipped, err := fromTar(b, ReplaceDuplicates)
		if err != nil {
			t.Errorf("%s: %v", format, err)
			continue
		}
		if want := map[bool]int{true: 6, false: 6 + 42}[format == "ustar"]; len(tree) != want || len(skipped) != 1 {
			t.Errorf("%s: %d entries, skipped %v", format, len(tree), skipped)
		}
		i, _ := tree.index("a")
		if tree[i].Mode.String() != "ugrwxr-xr-x" || tree[i].UID != 70000 || tree[i].GID != 5 {
			t.Errorf("%s: %+v", format, tree[i])
		}
	}
	for _, format := range []string{"--format=gnu", "--format=posix", "--sparse-version=0.0", "--sparse-version=0.1"} {
		run(gnu, "-C", "root", format, "--sparse", "-cf", "out.tar", "hole")
		b, err := os.ReadFile(filepath.Join(dir, "out.tar"))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := fromTar(b, ReplaceDuplicates); err == nil || !strings.Contains(err.Error(), `member "hole": it is a file with holes`) {
			t.Errorf("%s: %v", format, err)
		}
	}
}

// What a root tree's headers take in memory must stay small beside its content,
// which stays in the tar.
func TestFromTarTakesLittleMemory(t *testing.T) {
	f, size := bigTar(t)
	// What counts is what is in use; garbage that waits is the collector's choice.
	defer debug.SetGCPercent(debug.SetGCPercent(5))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	stop, highest := make(chan struct{}), make(chan uint64)
	go func() {
		var most uint64
		for {
			select {
			case <-stop:
				highest <- most
				return
			case <-time.After(time.Millisecond):
				var now runtime.MemStats
				runtime.ReadMemStats(&now)
				most = max(most, now.HeapAlloc)
			}
		}
	}()
	tree, _, err := FromTar(t.Context(), f, size, "of the given root", ReplaceDuplicates)
	close(stop)
	most := <-highest
	if err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	kept := float64(after.HeapAlloc-before.HeapAlloc) / (1 << 20)
	peak := float64(most-min(most, before.HeapAlloc)) / (1 << 20)
	t.Logf("%d entries: %.1f MiB kept, %.1f MiB at the peak", len(tree), kept, peak)
	if kept > 12 || peak > 22 {
		t.Error("that is too much")
	}
	runtime.KeepAlive(tree)
}

// bigTar is the tar of a root tree of 30,000 files.
func bigTar(t testing.TB) (f *os.File, size int64) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "tar"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w := tar.NewWriter(f)
	for i := range 30000 {
		if i%15 == 0 {
			if err := w.WriteHeader(&m{Name: fmt.Sprintf("./usr/share/doc/package-number-%d/", i/15), Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.WriteHeader(&m{Name: fmt.Sprintf("./usr/share/doc/package-number-%d/a-file-of-it-%d", i/15, i), Typeflag: tar.TypeReg, Mode: 0o644, Size: 3}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, "abc"); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	size, err = f.Seek(0, io.SeekCurrent)
	if err != nil {
		t.Fatal(err)
	}
	return f, size
}

func BenchmarkFromTar(b *testing.B) {
	f, size := bigTar(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := FromTar(b.Context(), f, size, "", ReplaceDuplicates); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzFromTar(f *testing.F) {
	for _, members := range [][]m{
		{{Name: "a", Uname: "1"}, {Name: "./b", Typeflag: tar.TypeLink, Linkname: "a"}, {Name: "a", Uname: "2"}},
		{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "d/../e"}, {Name: "l/a", Uname: "1"}, {Name: "d", Typeflag: tar.TypeDir, Mode: 0o1777}},
		{{Name: "a", Mode: 0o4755, PAXRecords: map[string]string{RecordCaps: "\x00", RecordWhy: "why"}}, {Name: "p", Typeflag: tar.TypeFifo}, {Name: "n", Typeflag: tar.TypeChar}},
		{{Name: strings.Repeat("a/", 200) + "b", Uname: "1"}, {Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"x": "y"}}},
	} {
		f.Add(tarred(f, members...), true)
		f.Add(tarred(f, members...), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, replace bool) {
		d := RefuseDuplicates
		if replace {
			d = ReplaceDuplicates
		}
		tree, _, err := fromTar(b, d)
		if err != nil {
			return
		}
		if err := tree.Validate(); err != nil {
			t.Error(err)
		}
		if _, err := Pack(t.Context(), io.Discard, tree, Compression{Name: "none"}, epochOfTests, nil); err != nil {
			t.Error(err)
		}
	})
}

// FuzzMembers makes tars that are right of members that are anything: raw bytes
// hardly ever get past a header's checksum.
func FuzzMembers(f *testing.F) {
	f.Add([]byte("0a.1\x002b.a\x000a.2\x00"), true)
	f.Add([]byte("2l.d/../e\x000l/a.1\x005d.\x00"), false)
	f.Add([]byte("1a.b\x001b.c\x000c.x\x006p.\x001q.p\x003n.\x001o.n\x00"), true)
	f.Fuzz(func(t *testing.T, script []byte, replace bool) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for line := range bytes.SplitSeq(script, []byte{0}) {
			if len(line) < 2 {
				continue
			}
			name, rest, _ := strings.Cut(string(line[1:]), ".")
			h := m{Typeflag: line[0], Name: strings.ReplaceAll(name, ",", "."), Linkname: rest, Mode: int64(len(rest)) * 0o111 & 0o7777}
			if h.Typeflag == tar.TypeReg {
				h.Linkname, h.Size = "", int64(len(rest))
				h.PAXRecords = map[string]string{RecordWhy: "w" + name}
			}
			if err := w.WriteHeader(&h); err != nil {
				t.Skip()
			}
			if h.Typeflag == tar.TypeReg {
				if _, err := io.WriteString(w, rest); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.Close(); err != nil {
			t.Skip()
		}
		d := RefuseDuplicates
		if replace {
			d = ReplaceDuplicates
		}
		tree, _, err := fromTar(b.Bytes(), d)
		if err != nil {
			return
		}
		if over, err := Overlay(tree, tree); err != nil || len(over) != len(tree) {
			// Over itself only what a link leads elsewhere can change.
			if !slices.ContainsFunc(tree, func(e Entry) bool { return e.Link != "" }) {
				t.Errorf("over itself: %d entries of %d, %v", len(over), len(tree), err)
			}
		}
		if _, err := Pack(t.Context(), io.Discard, tree, Compression{Name: "none"}, epochOfTests, nil); err != nil {
			t.Error(err)
		}
	})
}
