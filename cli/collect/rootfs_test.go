package collect

import (
	"archive/tar"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/memlinux/memlinux/testvm/need"
)

func rootfs(t testing.TB, from string) ([]entry, RootInfo) {
	t.Helper()
	var b bytes.Buffer
	info, err := Rootfs(context.Background(), &b, from, nil)
	if err != nil {
		t.Fatal(err)
	}
	all := entries(t, &b)
	at := map[string]int{}
	for i, e := range all {
		at[strings.TrimSuffix(e.Name, "/")] = i
	}
	for i, e := range all {
		if to, ok := at[e.Linkname]; e.Typeflag == tar.TypeLink && (!ok || to > i || all[to].Typeflag != tar.TypeReg) {
			t.Errorf("the hard link %s is not behind its file", e.Name)
		}
		if up, ok := at[filepath.Dir(e.Name)]; ok && up > i {
			t.Errorf("%s comes before its folder", e.Name)
		}
	}
	if info.Entries != len(all) {
		t.Errorf("%d entries, and the info says %d", len(all), info.Entries)
	}
	return all, info
}

func sorted(all []entry) string {
	slices.SortFunc(all, func(a, b entry) int { return strings.Compare(a.Name, b.Name) })
	return words(all)
}

func TestRootfsOfAFolder(t *testing.T) {
	need.Root(t)
	setcap := need.Tool(t, "setcap", "libcap2-bin")
	dir := lay(t, t.TempDir(), map[string]string{
		"bin": "-> usr/bin", "usr/bin/a": "A", "usr/bin/ping": "P", "etc/shadow": "s", "proc/1/": "", "sys/x": "x", "dev/null": "", "tmp/": "", "run/fifo": "| ", "up": "-> ../../up",
	})
	for _, err := range []error{
		os.Link(dir+"/usr/bin/a", dir+"/usr/bin/b"), os.Chown(dir+"/etc/shadow", 0, 42), os.Chmod(dir+"/etc/shadow", 0o640),
		os.Chmod(dir+"/tmp", 0o777|fs.ModeSticky), os.Chmod(dir+"/usr/bin/a", 0o755|fs.ModeSetuid), syscall.Mknod(dir+"/run/null", syscall.S_IFCHR|0o600, 0x103), syscall.Mknod(dir+"/run/sock", syscall.S_IFSOCK|0o600, 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(setcap, "cap_net_raw=ep", dir+"/usr/bin/ping").CombinedOutput(); err != nil {
		t.Fatalf("setcap: %v: %s", err, out)
	}
	got, info := rootfs(t, dir)
	want := `bin 0777 0:0 -> usr/bin
dev/ 0755 0:0
etc/ 0755 0:0
etc/shadow 0640 0:42 "s"
proc/ 0755 0:0
run/ 0755 0:0
run/fifo 0644 0:0 pipe
sys/ 0755 0:0
tmp/ 1777 0:0
up 0777 0:0 -> ../../up
usr/ 0755 0:0
usr/bin/ 0755 0:0
usr/bin/a 4755 0:0 "A"
usr/bin/b 4755 0:0 = usr/bin/a
usr/bin/ping 0644 0:0 "P" cap_net_raw=ep
`
	if d := cmp.Diff(want, words(got)); d != "" {
		t.Error(d)
	}
	if info.Kind != "folder" || info.Skipped != 2 || len(info.Special) != 3 || info.Bytes != 3 {
		t.Errorf("%+v", info)
	}
}

func add(h tar.Header, content string) func(*tar.Writer) error {
	return func(w *tar.Writer) error {
		h := h
		h.Size = int64(len(content))
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		_, err := w.Write([]byte(content))
		return err
	}
}

func file(name, content string) func(*tar.Writer) error { return add(tar.Header{Name: name}, content) }
func folder(name string) func(*tar.Writer) error {
	return add(tar.Header{Name: name, Typeflag: tar.TypeDir}, "")
}
func symlink(name, to string) func(*tar.Writer) error {
	return add(tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeSymlink}, "")
}
func hard(name, to string) func(*tar.Writer) error {
	return add(tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeLink}, "")
}

func makeTar(t testing.TB, all ...func(*tar.Writer) error) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range all {
		if err := f(w); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRootfsOfATar(t *testing.T) {
	cases := []struct {
		name string
		all  []func(*tar.Writer) error
		want string // entries, or an error that ends so
	}{
		{"names in all their forms", []func(*tar.Writer) error{folder("./"), folder("./etc/"), file("./etc/a", "1"), file("/etc/b", "2"), file("etc/../c", "3")},
			"c 0644 0:0 \"3\"\netc/ 0755 0:0\netc/a 0644 0:0 \"1\"\netc/b 0644 0:0 \"2\"\n"},
		{"what the kernel makes is left out", []func(*tar.Writer) error{folder("dev"), file("dev/console", ""), file("proc/x", ""), add(tar.Header{Name: "etc/null", Typeflag: tar.TypeChar}, ""), file("a", "")},
			"a 0644 0:0 \"\"\ndev/ 0755 0:0\n"},
		{"the last of two counts", []func(*tar.Writer) error{file("a", "1"), hard("b", "a"), file("a", "22"), folder("c"), file("c/d", "3"), file("c", "4")},
			"a 0644 0:0 \"22\"\nb 0644 0:0 \"1\"\nc 0644 0:0 \"4\"\n"},
		{"through a symlinked folder", []func(*tar.Writer) error{symlink("lib", "usr/lib"), file("lib/a", "1"), symlink("var/run", "/run"), file("var/run/x", "2"), hard("lib/b", "lib/a"), symlink("top", "../.."), file("top/y", "3")},
			"lib 0777 0:0 -> usr/lib\nrun/x 0644 0:0 \"2\"\ntop 0777 0:0 -> ../..\nusr/lib/a 0644 0:0 \"1\"\nusr/lib/b 0644 0:0 = usr/lib/a\nvar/run 0777 0:0 -> /run\ny 0644 0:0 \"3\"\n"},
		{"whiteouts are of images alone", []func(*tar.Writer) error{file(".wh.a", "1")}, ".wh.a 0644 0:0 \"1\"\n"},
		{"owners and capabilities, but no names", []func(*tar.Writer) error{add(tar.Header{Name: "a", Uid: 5, Gid: 6, Uname: "u", Mode: 0o4711, PAXRecords: map[string]string{CapsRecord: "\x01\x00\x00\x02\x00\x20\x00\x00" + strings.Repeat("\x00", 12), "SCHILY.xattr.user.x": "y"}}, "")},
			"a 4711 5:6 \"\" cap_net_raw=ep\n"},
		{"a path that leaves", []func(*tar.Writer) error{file("../a", "1")}, `its entry "../a" leaves the root tree`},
		{"a path that leaves later", []func(*tar.Writer) error{file("a/../../b", "1")}, `its entry "a/../../b" leaves the root tree`},
		{"a hard link that leaves", []func(*tar.Writer) error{file("a", "1"), hard("b", "../etc/passwd")}, `its hard link /b to "../etc/passwd": its entry "../etc/passwd" leaves the root tree`},
		{"a hard link to nothing", []func(*tar.Writer) error{hard("b", "c")}, `its hard link /b to "c": there is no such file in front of it`},
		{"a file as a folder", []func(*tar.Writer) error{file("a", "1"), file("a/b", "1")}, "its entry /a/b: a in /a is no folder"},
		{"symlinks in a circle", []func(*tar.Writer) error{symlink("a", "b"), symlink("b", "a"), file("a/c", "")}, "its entry /a/c: /a has more than 40 symlinks one behind the other"},
		{"nothing in it", nil, "holds nothing that could be a root tree"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			from := t.TempDir() + "/x.tar"
			if err := os.WriteFile(from, makeTar(t, c.all...), 0o644); err != nil {
				t.Fatal(err)
			}
			var b bytes.Buffer
			if _, err := Rootfs(context.Background(), &b, from, nil); err != nil {
				if !strings.HasPrefix(err.Error(), from) || !strings.HasSuffix(err.Error(), c.want) || b.Len() > 0 {
					t.Errorf("got %v, and %d bytes", err, b.Len())
				}
				return
			}
			got, info := rootfs(t, from)
			if d := cmp.Diff(c.want, sorted(got)); d != "" || info.Kind != "tar" {
				t.Errorf("%s %s", info.Kind, d)
			}
		})
	}
}

// compressed is b in all forms that are taken.
func compressed(t testing.TB, b []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{"plain": b}
	for name, make := range map[string]func(io.Writer) (io.WriteCloser, error){
		"gz":  func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil },
		"xz":  func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) },
		"zst": func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) },
	} {
		var z bytes.Buffer
		w, err := make(&z)
		if err == nil {
			_, err = w.Write(b)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		out[name] = z.Bytes()
	}
	if bzip, err := exec.LookPath("bzip2"); err == nil { // nothing of ours writes it
		cmd := exec.Command(bzip, "-c")
		cmd.Stdin = bytes.NewReader(b)
		z, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := io.ReadAll(bzip2.NewReader(bytes.NewReader(z))); err != nil || !bytes.Equal(back, b) {
			t.Fatal(err)
		}
		out["bz2"] = z
	}
	return out
}

func TestCompressedTars(t *testing.T) {
	plain := makeTar(t, folder("etc"), file("etc/a", strings.Repeat("abc", 10000)), file("etc/b", "b"))
	var want string
	for kind, b := range compressed(t, plain) {
		t.Run(kind, func(t *testing.T) {
			from := t.TempDir() + "/x"
			if err := os.WriteFile(from, b, 0o644); err != nil {
				t.Fatal(err)
			}
			got, _ := rootfs(t, from)
			if want == "" {
				want = words(got)
			}
			if words(got) != want || len(got) != 3 {
				t.Error(words(got))
			}
			if err := os.WriteFile(from, b[:len(b)*2/3], 0o644); err != nil {
				t.Fatal(err)
			}
			if kind == "plain" {
				_ = os.Truncate(from, 5000)
			}
			var out bytes.Buffer
			if _, err := Rootfs(context.Background(), &out, from, nil); err == nil || out.Len() > 0 {
				t.Errorf("cut off: %v, %d bytes", err, out.Len())
			} else {
				t.Log(err)
			}
		})
	}
}

func TestWhatIsNoRootTree(t *testing.T) {
	dir := lay(t, t.TempDir(), map[string]string{"text": "hello", "long": strings.Repeat("hello\n", 1000), "pipe": "| ", "void": "", "empty/": ""})
	for name, want := range map[string]string{
		"text": "is neither a tar", "long": "is neither a tar", "pipe": "is neither a folder nor a file", "void": "holds nothing", "empty": "holds nothing", "none": "is not there",
	} {
		if _, err := Rootfs(context.Background(), io.Discard, dir+"/"+name, nil); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The layers of the image that the tests have: each does something to the one
// below that is easily done wrong.
func testLayers(t testing.TB) [][]byte {
	return [][]byte{
		makeTar(t, folder("usr"), folder("usr/bin"), folder("usr/lib"), symlink("lib", "usr/lib"), file("usr/bin/a", "first"), hard("usr/bin/b", "usr/bin/a"), hard("usr/bin/c", "usr/bin/a"),
			file("usr/bin/gone", "x"), folder("opaque"), file("opaque/old", "x"), folder("opaque/sub"), file("opaque/sub/old", "x"), file("both", "1"), folder("dir"), file("dir/x", "x"),
			symlink("climbs", "../../usr/bin"), folder("tree"), folder("tree/deep"), file("tree/deep/x", "x"), symlink("tofile", "both"), file("keep", "k")),
		makeTar(t, folder("usr"), folder("usr/bin"), file("usr/bin/a", "second"), file("usr/bin/.wh.gone", ""), folder("opaque"), file("opaque/.wh..wh..opq", ""), file("opaque/new", "n"),
			file(".wh.tree", ""), file("lib/libx", "through the symlink"), file("dir/.wh.x", ""), file("dir/y", "y")),
		makeTar(t, file(".wh.dir", ""), file("dir2", "now a file"), file("usr/bin/.wh.b", ""), add(tar.Header{Name: "opaque/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 9}, ""), hard("usr/bin/d", "keep"),
			folder("tree"), file("tree/again", "t"), folder("tofile"), file("tofile/x", "in a folder"), add(tar.Header{Name: "usr/bin/su", Mode: 0o4755}, "su")),
	}
}

func makeImage(t testing.TB, os, arch string, layers ...[]byte) v1.Image {
	t.Helper()
	img := empty.Image
	for i, b := range layers {
		opts := []tarball.LayerOption{tarball.WithMediaType(types.OCILayer)}
		if i%2 == 1 {
			opts = append(opts, tarball.WithCompression("zstd"), tarball.WithMediaType(types.OCILayerZStd))
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, opts...)
		if err == nil {
			img, err = mutate.AppendLayers(img, l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := img.ConfigFile()
	if err == nil {
		cfg = cfg.DeepCopy()
		cfg.OS, cfg.Architecture = os, arch
		cfg.Config = v1.Config{Entrypoint: []string{"/usr/bin/a"}, Cmd: []string{"-x"}, Env: []string{"A=b"}, WorkingDir: "/srv", User: "7"}
		img, err = mutate.ConfigFile(img, cfg)
	}
	if err != nil {
		t.Fatal(err)
	}
	return mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
}

func makeLayout(t testing.TB, images ...v1.Image) string {
	t.Helper()
	dir := t.TempDir() + "/layout"
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for i, img := range images {
		cfg, err := img.ConfigFile()
		if err == nil {
			err = p.AppendImage(img, layout.WithPlatform(v1.Platform{OS: cfg.OS, Architecture: cfg.Architecture}),
				layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": fmt.Sprint("tag", i)}))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const imageTree = `climbs 0777 0:0 -> ../../usr/bin
both 0644 0:0 "1"
dir2 0644 0:0 "now a file"
keep 0644 0:0 "k"
lib 0777 0:0 -> usr/lib
opaque/ 0700 9:0
opaque/new 0644 0:0 "n"
tofile/ 0755 0:0
tofile/x 0644 0:0 "in a folder"
tree/ 0755 0:0
tree/again 0644 0:0 "t"
usr/ 0755 0:0
usr/bin/ 0755 0:0
usr/bin/a 0644 0:0 "second"
usr/bin/c 0644 0:0 "first"
usr/bin/d 0644 0:0 = keep
usr/bin/su 4755 0:0 "su"
usr/lib/ 0755 0:0
usr/lib/libx 0644 0:0 "through the symlink"
`

func lines(s string) []string {
	all := strings.SplitAfter(s, "\n")
	slices.Sort(all)
	return all
}

func TestRootfsOfAnImage(t *testing.T) {
	img := makeImage(t, "linux", "amd64", testLayers(t)...)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	arm := makeImage(t, "linux", "arm64", makeTar(t, file("arm", "")))
	dir := makeLayout(t, arm, img)
	tools := t.TempDir()
	archive := tools + "/oci.tar"
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	forms := map[string]string{"layout": dir}
	for kind, z := range compressed(t, b.Bytes()) {
		forms["archive "+kind] = archive + kind
		if err := os.WriteFile(archive+kind, z, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tag, err := name.NewTag("test:latest")
	if err == nil {
		err = tarball.WriteToFile(tools+"/docker.tar", tag, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	forms["docker"] = tools + "/docker.tar"
	// A layout within which the image is in an index of its own, as buildx makes.
	inner := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img}, mutate.IndexAddendum{Add: arm},
		mutate.IndexAddendum{Add: makeImage(t, "unknown", "unknown"), Descriptor: v1.Descriptor{Annotations: map[string]string{"vnd.docker.reference.type": "attestation-manifest"}, Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}})
	nested := tools + "/nested"
	if p, err := layout.Write(nested, empty.Index); err != nil {
		t.Fatal(err)
	} else if err := p.AppendIndex(inner); err != nil {
		t.Fatal(err)
	}
	forms["nested"] = nested
	for form, from := range forms {
		t.Run(form, func(t *testing.T) {
			got, info := rootfs(t, from)
			if d := cmp.Diff(lines(imageTree), lines(words(got))); d != "" {
				t.Error(d)
			}
			if info.Kind != "image" || info.Entrypoint[0] != "/usr/bin/a" || info.Cmd[0] != "-x" || info.Env[0] != "A=b" || info.WorkingDir != "/srv" || info.User != "7" || len(info.Special) != 1 {
				t.Errorf("%+v", info)
			}
			if form != "docker" && info.Image != digest.String() {
				t.Errorf("the image is %s", info.Image)
			}
		})
	}
}

func TestImagesThatAreRefused(t *testing.T) {
	amd := makeImage(t, "linux", "amd64", makeTar(t, file("a", strings.Repeat("a", 1000))))
	other := makeImage(t, "linux", "amd64", makeTar(t, file("b", "b")))
	arm := makeImage(t, "linux", "arm64", makeTar(t, file("a", "a")))
	blobOf := func(dir string, h v1.Hash) string { return filepath.Join(dir, "blobs", h.Algorithm, h.Hex) }
	layers, err := amd.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layerDigest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := amd.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	cases := []struct {
		name   string
		images []v1.Image
		spoil  func(dir string) error
		want   string
	}{
		{"another machine's", []v1.Image{arm}, nil, "it is for linux/arm64, and the system is linux/amd64: get that one"},
		{"two that fit", []v1.Image{amd, other}, nil, "it holds 2 images for linux/amd64 (tag0, tag1): copy one of them"},
		{"none", nil, nil, "it is empty"},
		{"a layer that is gone", []v1.Image{amd}, func(dir string) error { return os.Remove(blobOf(dir, layerDigest)) }, "no such file"},
		{"a layer that is cut off", []v1.Image{amd}, func(dir string) error { return os.Truncate(blobOf(dir, layerDigest), 40) }, "layer 1 of 1"},
		{"a layer of other content", []v1.Image{amd}, func(dir string) error {
			return os.WriteFile(blobOf(dir, layerDigest), makeTar(t, file("evil", "")), 0o644)
		}, "its content does not have the digest"},
		{"a configuration of other content", []v1.Image{amd}, func(dir string) error { return os.WriteFile(blobOf(dir, config), []byte("{}"), 0o644) }, "does not have that digest"},
		{"an index that is no JSON", []v1.Image{amd}, func(dir string) error { return os.WriteFile(dir+"/index.json", []byte("<"), 0o644) }, "read its index"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := makeLayout(t, c.images...)
			if c.spoil != nil {
				if err := c.spoil(dir); err != nil {
					t.Fatal(err)
				}
			}
			var b bytes.Buffer
			_, err := Rootfs(context.Background(), &b, dir, nil)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "the image "+dir) || b.Len() > 0 {
				t.Errorf("got %v, and %d bytes", err, b.Len())
			}
		})
	}
}

// walked is a folder in the words of an entry.
func walked(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(full string, d fs.DirEntry, err error) error {
		if err != nil || full == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		s := info.Sys().(*syscall.Stat_t)
		name, _ := filepath.Rel(dir, full)
		line := fmt.Sprintf("%s %v %d:%d", name, info.Mode(), s.Uid, s.Gid)
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			to, _ := os.Readlink(full)
			line = fmt.Sprintf("%s -> %s", name, to)
		case info.Mode().IsRegular():
			b, _ := os.ReadFile(full)
			line += fmt.Sprintf(" %q, %d names", b, s.Nlink)
		}
		all = append(all, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// umoci, and GNU tar for what we make of it, must come to the same tree.
func TestUmociUnpacksTheSame(t *testing.T) {
	need.Root(t)
	umoci, gnutar := need.Tool(t, "umoci", "umoci"), need.Tool(t, "tar", "tar")
	img := empty.Image
	for _, b := range testLayers(t) { // as gzip: umoci 0.4 knows no zstd
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, tarball.WithMediaType(types.OCILayer))
		if err == nil {
			img, err = mutate.AppendLayers(img, l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	img = mutate.ConfigMediaType(mutate.MediaType(img, types.OCIManifestSchema1), types.OCIConfigJSON)
	dir := makeLayout(t, img)
	bundle, mine := t.TempDir()+"/bundle", t.TempDir()
	if out, err := exec.Command(umoci, "unpack", "--image", dir+":tag0", bundle).CombinedOutput(); err != nil {
		t.Fatalf("umoci: %v: %s", err, out)
	}
	var b bytes.Buffer
	if _, err := Rootfs(context.Background(), &b, dir, nil); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(gnutar, "-x", "-p", "-C", mine)
	cmd.Stdin = &b
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	if d := cmp.Diff(walked(t, bundle+"/rootfs"), walked(t, mine)); d != "" {
		t.Errorf("umoci has -, we have +\n%s", d)
	}
}

func TestSkopeosArchives(t *testing.T) {
	skopeo := need.Tool(t, "skopeo", "skopeo")
	dir := makeLayout(t, makeImage(t, "linux", "amd64", makeTar(t, folder("etc"), file("etc/a", "1"), file("b", "2"))))
	want, _ := rootfs(t, dir)
	for _, kind := range []string{"oci-archive", "docker-archive"} {
		out := t.TempDir() + "/x.tar"
		if msg, err := exec.Command(skopeo, "--insecure-policy", "copy", "oci:"+dir+":tag0", kind+":"+out+":x:latest").CombinedOutput(); err != nil {
			t.Fatalf("skopeo: %v: %s", err, msg)
		}
		if got, info := rootfs(t, out); words(got) != words(want) || info.Kind != "image" {
			t.Errorf("%s: %s %s", kind, info.Kind, words(got))
		}
	}
}

func TestALargeRootTreeStreams(t *testing.T) {
	dir := t.TempDir()
	big, err := os.Create(dir + "/big")
	if err != nil {
		t.Fatal(err)
	}
	if err := big.Truncate(512 << 20); err != nil {
		t.Fatal(err)
	}
	big.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := Rootfs(context.Background(), io.Discard, dir, nil); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 4<<20 {
		t.Errorf("%d bytes were allocated", grown)
	}
}

func FuzzRootTar(f *testing.F) {
	for _, b := range testLayers(f) {
		f.Add(b)
	}
	f.Add(makeTar(f, symlink("a", "b"), symlink("b", "a"), file("a/c", ""), hard("x", "a")))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, whiteouts := range []bool{false, true} {
			var out bytes.Buffer
			w := &rootWriter{ctx: context.Background(), tar: tar.NewWriter(&out), why: "fuzz"}
			half := layer{"x", func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
			if err := w.layers([]layer{half, half}, whiteouts); err != nil {
				continue
			}
			if err := w.tar.Close(); err != nil {
				t.Fatal(err)
			}
			seen := map[string]byte{}
			in := tar.NewReader(&out)
			for {
				h, err := in.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				name := strings.TrimSuffix(h.Name, "/")
				if c, err := clean(name); err != nil || c != name || seen[name] != 0 {
					t.Fatalf("%q: %v", h.Name, err)
				}
				if h.Typeflag == tar.TypeLink && seen[h.Linkname] != tar.TypeReg {
					t.Fatalf("%q links to %q", h.Name, h.Linkname)
				}
				if up, ok := seen[filepath.Dir(name)]; ok && up != tar.TypeDir {
					t.Fatalf("%q is in no folder", h.Name)
				}
				seen[name] = h.Typeflag
			}
		}
	})
}

func FuzzImageIndex(f *testing.F) {
	b, err := os.ReadFile(makeLayout(f, makeImage(f, "linux", "amd64", makeTar(f, file("a", "")))) + "/index.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"manifests":[null,{"digest":"sha256:x"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		w := &rootWriter{ctx: context.Background()}
		_, _, _ = w.oci(&tarStore{}, b)
		_, _, _ = w.docker(&tarStore{}, b)
	})
}
