package source

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/memlinux/memlinux/imagegen/busybox"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"github.com/memlinux/memlinux/testvm/need"
)

// room is an empty folder that other users can reach.
func room(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func compilers(t testing.TB) {
	t.Helper()
	for _, tool := range tools {
		need.Tool(t, tool[0], tool[1])
	}
}

// open opens a tarball as a request's source.
func open(t testing.TB, path string) Request {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Request{Source: f, Size: st.Size(), SourceSHA256: "of " + path, WorkDir: room(t)}
}

// debianBusybox is the busybox of Debian's source, built once and kept in the
// tests' cache, with the upstream tarball in that source.
func debianBusybox(t *testing.T) (r Result, tarball string) {
	t.Helper()
	need.Root(t)
	compilers(t)
	for _, tool := range debianTools {
		need.Tool(t, tool[0], tool[1])
	}
	work := room(t)
	request := Request{WorkDir: work}
	key, err := request.Key(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(need.Cache(t), "busybox-source-"+key[:16])
	record := filepath.Join(kept, "result.json")
	if text, err := os.ReadFile(record); err == nil && json.Unmarshal(text, &r) == nil {
		return r, filepath.Join(kept, "orig.tar")
	}
	last := map[string]int64{}
	start := time.Now()
	got, err := Build(t.Context(), request, func(step string, done, total int64) {
		if done < last[step] || total != 0 && done > total {
			t.Errorf("%s: %d of %d behind %d", step, done, total, last[step])
		}
		last[step] = done
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d objects in %s, %v, %v", got.Source, got.Objects, time.Since(start), last, got.Warnings)
	if last["compile"] != got.Objects || got.Objects < 500 || last["fetch"] < 1e6 {
		t.Errorf("progress: %v", last)
	}
	if err := os.MkdirAll(kept, 0o755); err != nil {
		t.Fatal(err)
	}
	orig, _ := filepath.Glob(filepath.Join(work, "source/debian/*.orig.tar.*"))
	for from, to := range map[string]string{got.Binary: "busybox", got.Config: "config", got.Log: "build.log", slices.Concat(orig, []string{""})[0]: "orig.tar"} {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(kept, to), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	got.Binary, got.Config, got.Log = filepath.Join(kept, "busybox"), filepath.Join(kept, "config"), filepath.Join(kept, "build.log")
	text, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(record, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return *got, filepath.Join(kept, "orig.tar")
}

func TestDebianBusyboxWorks(t *testing.T) {
	r, _ := debianBusybox(t)
	f, err := os.Open(r.Binary)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	info, err := busybox.Inspect(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(info.Version, "(Debian 1:1.") || st.Size() > 4<<20 || len(r.Warnings) > 0 {
		t.Errorf("%s, %d bytes, warnings %q", info.Version, st.Size(), r.Warnings)
	}
	run := func(args ...string) string {
		out, err := exec.Command(r.Binary, args...).CombinedOutput()
		if err != nil {
			t.Errorf("busybox %q: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	list := strings.Fields(run("--list"))
	// busybox itself is an applet only of a standalone shell, which takes applets
	// before programs.
	wanted := slices.DeleteFunc(slices.Concat(initramfs.Applets, initramfs.ModuleApplets), func(a string) bool { return a == "busybox" })
	for _, applet := range append(wanted, []string{"blkid", "setfattr", "udhcpc", "loadkmap", "getty", "login"}...) {
		if !slices.Contains(list, applet) || !slices.Contains(info.Applets, applet) {
			t.Errorf("it has no %s", applet)
		}
	}
	if slices.Contains(list, "tc") {
		t.Error("it has tc, which does not compile everywhere")
	}
	for want, args := range map[string][]string{
		"42":         {"sh", "-c", "echo $((6*7))"},
		"hello":      {"sh", "-c", "printf hello | gzip | zcat"},
		"a=1 b":      {"sh", "-c", "printf 'b\\0a=1\\0' | sort -z | xargs -0 echo"},
		"1970-01-01": {"date", "-u", "-d", "@0", "+%F"},
	} {
		if got := run(args...); got != want {
			t.Errorf("%q: %q", args, got)
		}
	}
	said, _ := exec.Command(r.Binary, "mdev", "--help").CombinedOutput()
	if !strings.Contains(string(said), "-d") {
		t.Errorf("mdev has no daemon: %s", said)
	}
	said, _ = exec.Command(r.Binary, "modprobe", "--help").CombinedOutput()
	if !strings.Contains(string(said), "-a") || !strings.Contains(string(said), "-b") {
		t.Errorf("modprobe is the small one: %s", said)
	}
}

// small is a fragment over allnoconfig with little to compile.
const small = `CONFIG_LFS=y
CONFIG_BUSYBOX=y
CONFIG_FEATURE_INSTALLER=y
CONFIG_STATIC=y
CONFIG_SHOW_USAGE=y
CONFIG_ECHO=y
CONFIG_CAT=y
CONFIG_TRUE=y
CONFIG_MD5SUM=y
CONFIG_ASH=y
CONFIG_SH_IS_ASH=y
`

func TestSameBytesInAnyFolder(t *testing.T) {
	_, orig := debianBusybox(t)
	ccache := room(t)
	var first []byte
	for i, name := range []string{"by ccache", "another folder, without ccache"} {
		r := open(t, orig)
		if i == 0 {
			need.Tool(t, "ccache", "ccache")
			r.CcacheDir = ccache
		} else {
			r.WorkDir = filepath.Join(r.WorkDir, "a/longer/path")
			if err := os.MkdirAll(r.WorkDir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		b := &build{r: r, progress: func(string, int64, int64) {}, base: "allnoconfig", limit: makeLimit}
		own := fragment
		fragment = []byte(small)
		start := time.Now()
		got, err := b.run(t.Context())
		fragment = own
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		t.Logf("%s: %s, %d objects in %s", name, got.Info.Version, got.Objects, time.Since(start))
		bytesOf, err := os.ReadFile(got.Binary)
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = bytesOf
		}
		if !bytes.Equal(first, bytesOf) {
			t.Errorf("%s: %d bytes differ from the first %d", name, len(bytesOf), len(first))
		}
		if bytes.Contains(bytesOf, []byte(r.WorkDir)) {
			t.Errorf("%s: the folder's name is in it", name)
		}
	}
}

// A fragment's mistake is found before the long compile.
func TestWishesThatDoNotComeTrue(t *testing.T) {
	_, orig := debianBusybox(t)
	for fragment, want := range map[string]string{
		"# CONFIG_STATIC is not set": "CONFIG_STATIC=y is not in the configuration, but there are no libraries in the initramfs",
		"CONFIG_NO_SUCH_OPTION=y\n# CONFIG_MDEV is not set\nCONFIG_FEATURE_MDEV_DAEMON=y": "CONFIG_FEATURE_MDEV_DAEMON=y (mine): it depends on MDEV; CONFIG_NO_SUCH_OPTION=y (mine): this busybox has no such option",
	} {
		r := open(t, orig)
		r.Fragments = []Fragment{{"mine", []byte(fragment)}}
		if _, err := Build(t.Context(), r, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want %q", fragment, err, want)
		}
	}
}

// fake is a tar of a source tree with the given Makefile rules, and whatever
// else a test wants in it.
func fake(t testing.TB, rules string, more map[string]string) string {
	t.Helper()
	files := map[string]string{
		"applets/applet_tables.c": "",
		"Makefile":                "VERSION = 1\nPATCHLEVEL = 99\nSUBLEVEL = 0\nEXTRAVERSION =\ndefconfig:\n\t@echo CONFIG_BUSYBOX=y >.config\noldconfig:\n\t@read x; test -z \"$$x\"\n" + rules,
	}
	for name, content := range more {
		files[name] = content
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: "busybox-1.99/" + name, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(1e9, 0)}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "busybox.tar")
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFailedCompileShowsTheErrorFirst(t *testing.T) {
	compilers(t)
	rules := "busybox:\n\t@echo 'util.c:5:3: error: too good to be true'; i=0; while [ $$i -lt 99 ]; do echo line $$i; i=$$((i+1)); done; printf '\\033[31mred\\n'; exit 1\n"
	_, err := Build(t.Context(), open(t, fake(t, rules, nil)), nil)
	var failed *BuildError
	if !errors.As(err, &failed) {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if failed.Step != "compile busybox 1.99.0" || !errors.As(err, &exit) {
		t.Errorf("%q: %v", failed.Step, failed.Err)
	}
	if n := len(failed.Lines); n > 20 || failed.Lines[0] != "util.c:5:3: error: too good to be true" || !slices.Contains(failed.Lines, "line 98") || !slices.Contains(failed.Lines, "?[31mred") {
		t.Errorf("%q", failed.Lines)
	}
	log, err := os.ReadFile(failed.Log)
	if err != nil || !strings.Contains(string(log), "line 0\nline 1\n") {
		t.Errorf("the log: %v", err)
	}
}

func TestHungMake(t *testing.T) {
	compilers(t)
	b := &build{r: open(t, fake(t, "busybox:\n\t@echo waiting; sleep 1000\n", nil)), progress: func(string, int64, int64) {}, base: "defconfig", limit: time.Second}
	_, err := b.run(t.Context())
	var limit *sandbox.LimitError
	if !errors.As(err, &limit) || !strings.Contains(err.Error(), "waiting") {
		t.Error(err)
	}
}

func TestCancelled(t *testing.T) {
	compilers(t)
	r := open(t, fake(t, "busybox:\n\t@echo '  CC      a/b.o'; while :; do date +%N >tick; sleep 0.05; done\n", nil))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := Build(ctx, r, func(step string, done, total int64) {
		if step == "compile" && done == 1 {
			go func() { time.Sleep(200 * time.Millisecond); cancel() }()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	tick := filepath.Join(r.WorkDir, "source/busybox-1.99/tick")
	before, err := os.ReadFile(tick)
	time.Sleep(200 * time.Millisecond)
	after, _ := os.ReadFile(tick)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("it goes on: %v", err)
	}
}

// What a source's Makefile leaves is read by root: it must not lead elsewhere.
func TestHostileResults(t *testing.T) {
	need.Root(t)
	compilers(t)
	for name, rules := range map[string]string{
		"a link as the result":               "busybox:\n\t@ln -s /etc/shadow busybox\n",
		"a pipe as the result":               "busybox:\n\t@mkfifo busybox\n",
		"a hole of 1 TiB as the result":      "busybox:\n\t@truncate -s 1T busybox\n",
		"no result":                          "busybox:\n\t@true\n",
		"a text as the result":               "busybox:\n\t@echo hello >busybox\n",
		"the tree swapped for a link":        "busybox:\n\t@cd .. && mv busybox-1.99 x && ln -s /etc busybox-1.99\n",
		"a link as the configuration":        "oldconfig: a\na:\n\t@ln -sf /etc/shadow .config\nbusybox:\n",
		"a configuration that is no such":    "oldconfig: a\na:\n\t@rm .config; echo hello >.config\nbusybox:\n",
		"a loop of links for what is walked": "oldconfig: a\na:\n\t@ln -s . loop; ln -s /proc Kbuild; mkfifo Config.in; rm .config; for o in STATIC BUSYBOX FEATURE_INSTALLER; do echo CONFIG_$$o=y; done >.config\nbusybox:\n",
	} {
		_, err := Build(t.Context(), open(t, fake(t, rules, nil)), nil)
		if err == nil || strings.Contains(err.Error(), "root:") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBadSources(t *testing.T) {
	compilers(t)
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte(strings.Repeat("no tar\n", 999)), 0o644); err != nil {
		t.Fatal(err)
	}
	good := fake(t, "", nil)
	whole, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(t.TempDir(), "half")
	if err := os.WriteFile(half, whole[:len(whole)/3], 0o644); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		text: "unpack busybox's source: this is not a tar archive",
		half: "unpack busybox's source: the tar archive ends too early",
		fake(t, "", map[string]string{"Makefile": "all:\n"}):                           "this is not busybox's source: its Makefile names no version",
		fake(t, "", map[string]string{"Makefile": "VERSION = 6\nPATCHLEVEL = $(x)\n"}): "this is not busybox's source",
	} {
		if _, err := Build(t.Context(), open(t, path), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	r := open(t, good)
	r.Fragments = []Fragment{{"mine", []byte("CONFIG_A=y\nCONFIG_B y\n")}}
	if _, err := Build(t.Context(), r, nil); err == nil || !strings.Contains(err.Error(), "fragment mine: line 2 is not CONFIG_NAME=VALUE") {
		t.Error(err)
	}
}

func TestMissingCompilerNamesThePackages(t *testing.T) {
	compilers(t)
	old := tools
	defer func() { tools = old }()
	tools = append(slices.Clone(old), [2]string{"no-such-cc", "cc-one"}, [2]string{"no-such-ld", "cc-one"}, [2]string{"no-such-as", "cc-two"})
	_, err := Build(t.Context(), open(t, fake(t, "", nil)), nil)
	var missing *sandbox.MissingError
	if !errors.As(err, &missing) || missing.Package != "cc-one cc-two" || err.Error() != "busybox can't be built here: no-such-cc, no-such-ld, no-such-as is not installed; run apt-get install cc-one cc-two" {
		t.Error(err)
	}
}

func TestKey(t *testing.T) {
	compilers(t)
	path := fake(t, "", nil)
	base := open(t, path)
	key := func(change func(r *Request)) string {
		r := base
		change(&r)
		k, err := r.Key(t.Context())
		if err != nil || len(k) != 64 {
			t.Fatalf("%q, %v", k, err)
		}
		return k
	}
	first := key(func(*Request) {})
	same := key(func(r *Request) { r.WorkDir, r.CcacheDir = "/elsewhere", "/cache"; r.Fragments = []Fragment{} })
	if same != first {
		t.Error("a key depends on folders")
	}
	seen := map[string]bool{first: true}
	for i, change := range []func(r *Request){
		func(r *Request) { r.SourceSHA256 = "other" },
		func(r *Request) { r.Fragments = []Fragment{{"a", []byte("CONFIG_A=y\nCONFIG_B=y\n")}} },
		func(r *Request) {
			r.Fragments = []Fragment{{"a", []byte("CONFIG_A=y\n")}, {"b", []byte("CONFIG_B=y\n")}}
		},
	} {
		if k := key(change); seen[k] {
			t.Errorf("change %d gives a known key", i)
		} else {
			seen[k] = true
		}
	}
}
