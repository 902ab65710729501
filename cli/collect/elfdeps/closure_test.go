package elfdeps

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

const ld = "/lib64/ld-linux-x86-64.so.2"

// listing is a closure in words.
func listing(c *Closure) string {
	var b strings.Builder
	for _, lib := range c.Libraries {
		fmt.Fprintf(&b, "%s by %s\n", lib.Target, lib.By)
	}
	for _, folder := range c.Folders {
		fmt.Fprintf(&b, "folder %s\n", folder)
	}
	for _, m := range c.Missing {
		fmt.Fprintf(&b, "%s\n", m)
	}
	return b.String()
}

func TestClosure(t *testing.T) {
	lib := func(name string, needed ...string) spec { return spec{soname: name, needed: needed} }
	cases := []struct {
		name  string
		files map[string]any
		at    string // target of the program, if it moves
		want  string
	}{
		{"a static program needs nothing", map[string]any{"p": spec{kind: 2}}, "", ""},
		{"what libraries need, once, in the loader's order", map[string]any{
			"p": spec{needed: []string{"a", "b"}}, "lib/a": lib("a", "c"), "lib/b": lib("b", "c", "a"), "usr/lib/c": lib("c", "b"),
		}, "", "/lib/a by /p\n/lib/b by /p\n/usr/lib/c by /lib/a\n"},
		{"ld.so.conf comes before the usual folders", map[string]any{
			"p": spec{needed: []string{"a"}}, "opt/a": lib("a"), "lib/a": lib("a"), "etc/ld.so.conf": "include x/*\n", "etc/x/y": "/opt",
		}, "", "/opt/a by /p\n"},
		{"RPATH is inherited", map[string]any{
			"p": spec{needed: []string{"a"}, rpath: "/x"}, "x/a": lib("a", "b"), "x/b": lib("b"), "lib/b": lib("b"),
		}, "", "/x/a by /p\n/x/b by /x/a\n"},
		{"RUNPATH is not", map[string]any{
			"p": spec{needed: []string{"a"}, runpath: "/x"}, "x/a": lib("a", "b"), "x/b": lib("b"), "lib/b": lib("b"),
		}, "", "/x/a by /p\n/lib/b by /x/a\n"},
		{"who has a RUNPATH inherits no RPATH", map[string]any{
			"p": spec{needed: []string{"a"}, rpath: "/x"}, "x/a": spec{needed: []string{"b"}, runpath: "/none"}, "x/b": lib("b"), "lib/b": lib("b"),
		}, "", "/x/a by /p\n/lib/b by /x/a\n"},
		{"$ORIGIN of a program that moves is in its new place", map[string]any{
			"home/app/bin/p": spec{needed: []string{"a"}, runpath: "$ORIGIN/../lib"}, "home/app/lib/a": spec{needed: []string{"b"}, runpath: "${ORIGIN}/sub"}, "home/app/lib/sub/b": lib("b"),
		}, "/usr/bin/p", "/usr/lib/a by /usr/bin/p\n/usr/lib/sub/b by /usr/lib/a\nfolder /usr/bin\n"},
		{"a path in place of a name", map[string]any{
			"opt/p": spec{needed: []string{"/x/a", "$ORIGIN/b", "c/d"}}, "x/a": lib("a"), "opt/b": lib("b"),
		}, "", "/x/a by /opt/p\n/opt/b by /opt/p\nc/d, which opt/p needs, is nowhere (such a path depends on the folder that the program is started in)\n"},
		{"$LIB and $PLATFORM", map[string]any{
			"p": spec{needed: []string{"a"}, runpath: "/o/$LIB/$PLATFORM:relative::/none"}, "o/lib64/x86_64/a": lib("a"),
		}, "", "/o/lib64/x86_64/a by /p\n"},
		{"a library for another machine is passed over", map[string]any{
			"p": spec{needed: []string{"a"}, runpath: "/i386"}, "i386/a": spec{class: 1, machine: 3}, "lib/a": lib("a"),
		}, "", "/lib/a by /p\n"},
		{"a soname found already is not searched again", map[string]any{
			"p": spec{needed: []string{"a", "b"}, rpath: "/x"}, "x/a": lib("b"), "lib/b": lib("b"),
		}, "", "/x/a by /p\n"},
		{"a file with two names is loaded once, and both are there", map[string]any{
			"p": spec{needed: []string{"a", "b"}}, "lib/a": lib("", "c"), "lib/b": "-> a", "lib/c": lib("c"),
		}, "", "/lib/a by /p\n/lib/b by /p\n/lib/c by /lib/a\n"},
		{"all that is missing, with who wants it and what was there instead", map[string]any{
			"p": spec{interp: ld, needed: []string{"a", "b"}}, "lib/a": lib("a", "c", "d"), "lib/b": lib("b", "c"), "lib/d": spec{machine: 183},
		}, "", "/lib/a by /p\n/lib/b by /p\n" + ld + ", which p needs, is nowhere\nc, which lib/a and 1 more need, is nowhere\nd, which lib/a needs, is nowhere (/lib/d is for aarch64)\n"},
		{"the loader counts as loaded", map[string]any{
			"p": spec{interp: ld, needed: []string{"a"}}, "lib/a": lib("a", "ld-linux-x86-64.so.2"), "lib64/ld-linux-x86-64.so.2": lib("ld-linux-x86-64.so.2"),
		}, "", ld + " by /p\n/lib/a by /p\n"},
		{"who ends threads needs what glibc opens for it", map[string]any{
			"p": spec{needed: []string{"libc.so.6"}, soname: "pthread_exit"}, "lib/libc.so.6": lib("libc.so.6"), "lib/libgcc_s.so.1": lib("libgcc_s.so.1", "libc.so.6"),
		}, "", "/lib/libc.so.6 by /p\n/lib/libgcc_s.so.1 by /lib/libc.so.6\n"},
		{"libc alone does not", map[string]any{
			"p": spec{needed: []string{"libc.so.6"}}, "lib/libc.so.6": spec{soname: "libc.so.6", rpath: "pthread_exit"}, "lib/libgcc_s.so.1": lib("libgcc_s.so.1", "libc.so.6"),
		}, "", "/lib/libc.so.6 by /p\n"},
		{"musl: its loader is the C library, its folders are in a file, RUNPATH is inherited", map[string]any{
			"p": spec{interp: "/lib/ld-musl-x86_64.so.1", needed: []string{"libc.musl-x86_64.so.1", "a", "libm.so"}, runpath: "/x"}, "lib/ld-musl-x86_64.so.1": lib("libc"),
			"etc/ld-musl-x86_64.path": "/m\n/n:/o", "n/a": lib("a", "b"), "x/b": lib("b"), "lib/b": lib("b"),
		}, "", "/etc/ld-musl-x86_64.path by /p\n/lib/ld-musl-x86_64.so.1 by /p\n/n/a by /p\n/x/b by /n/a\n"},
		{"musl without that file", map[string]any{
			"p": spec{interp: "/lib/ld-musl-x86_64.so.1", needed: []string{"a"}}, "lib/ld-musl-x86_64.so.1": lib("libc"), "usr/lib/a": lib("a"), "lib64/a": lib("a"),
		}, "", "/lib/ld-musl-x86_64.so.1 by /p\n/usr/lib/a by /p\n"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := root(t, c.files)
			var p Place
			for name := range c.files {
				if filepath.Base(name) == "p" {
					p = Place{Host: filepath.Join(dir, name), Target: "/" + name}
				}
			}
			if c.at != "" {
				p.Target = c.at
			}
			got, err := New(dir).Closure(p)
			if err != nil {
				t.Fatal(err)
			}
			if s := listing(got); s != c.want {
				t.Errorf("got\n%swant\n%s", s, c.want)
			}
		})
	}
}

func TestProvidedComesBeforeTheMachine(t *testing.T) {
	dir := root(t, map[string]any{"p": spec{needed: []string{"a"}}, "lib/a": spec{soname: "a"}, "mine/a": spec{soname: "a", needed: []string{"b"}}, "lib/b": spec{soname: "b"}})
	l := New(dir)
	l.Provided = func(target string) (string, bool) {
		return dir + "/mine/a", target == "/lib/a"
	}
	got, err := l.Closure(Place{dir + "/p", "/p"})
	if err != nil || len(got.Libraries) != 2 || !got.Libraries[0].Provided || got.Libraries[1].Name != "b" {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestPluginsComeWithWhatTheyNeed(t *testing.T) {
	dir := root(t, map[string]any{"p": spec{needed: []string{"a"}, rpath: "/x"}, "lib/a": spec{soname: "a"}, "mod/m": spec{needed: []string{"a", "b", "c"}}, "x/b": spec{soname: "b"}})
	got, err := New(dir).Closure(Place{dir + "/p", "/p"}, Place{dir + "/mod/m", "/mod/m"})
	if err != nil {
		t.Fatal(err)
	}
	want := "/lib/a by /p\n/x/b by /mod/m\nc, which mod/m needs, is nowhere\n"
	if s := listing(got); s != want {
		t.Errorf("got\n%swant\n%s", s, want)
	}
}

// ldd is what the machine's own loader says that a program loads, by path.
func ldd(t *testing.T, name string) []string {
	t.Helper()
	cmd := exec.Command(need.Tool(t, "ldd", "libc-bin"), name)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/bin:/bin"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("ldd %s: %v: %s", name, err, out)
	}
	var all []string
	for line := range strings.Lines(string(out)) {
		line, _, _ = strings.Cut(line, " (0x")
		if _, file, ok := strings.Cut(line, " => "); ok {
			line = file
		}
		if line = strings.TrimSpace(line); filepath.IsAbs(line) {
			all = append(all, filepath.Clean(line))
		} else if strings.Contains(line, "not found") {
			all = append(all, line)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func closureOf(t *testing.T, name string) []string {
	t.Helper()
	real, err := filepath.EvalSymlinks(name)
	if err != nil {
		t.Fatal(err)
	}
	c, err := New("/").Closure(Place{real, real})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, lib := range c.Libraries {
		if !lib.Opened { // ldd runs nothing
			all = append(all, lib.Target)
		}
	}
	for range c.Missing {
		all = append(all, "not found")
	}
	slices.Sort(all)
	return all
}

func TestTheMachinesLoaderAgreesOnItsPrograms(t *testing.T) {
	need.Tool(t, "ldd", "libc-bin")
	checked := 0
	for _, dir := range []string{"/usr/bin", "/usr/sbin"} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for i, e := range entries {
			name := filepath.Join(dir, e.Name())
			o, err := New("/").Open(Place{name, name})
			if err != nil || o.Interp == "" || (i%23 != 0 && !slices.Contains([]string{"curl", "git", "qemu-system-x86_64", "gdb", "perl", "python3", "ssh", "xorriso"}, e.Name())) {
				continue
			}
			checked++
			// ldd takes $ORIGIN for the link's folder, the kernel for the program's.
			real, err := filepath.EvalSymlinks(name)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := closureOf(t, name), ldd(t, real); !slices.Equal(got, want) {
				t.Errorf("%s:\ngot  %v\nldd  %v", name, got, want)
			}
		}
	}
	t.Logf("%d programs", checked)
	if checked < 5 {
		t.Errorf("only %d programs were found", checked)
	}
}

// What the compiler and the machine's own loader make of search paths.
func TestTheMachinesLoaderAgreesOnSearchPaths(t *testing.T) {
	gcc := need.Tool(t, "gcc", "gcc")
	need.Tool(t, "ldd", "libc-bin")
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	compile := func(out string, args ...string) {
		t.Helper()
		full := filepath.Join(dir, out)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(gcc, append([]string{"-x", "c", "-", "-x", "none", "-Wl,--no-as-needed", "-o", full}, args...)...)
		cmd.Dir, cmd.Stdin = dir, strings.NewReader("int main(void){return 0;}")
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("gcc: %v: %s", err, b)
		}
	}
	shared := func(out string, args ...string) {
		t.Helper()
		compile(out, append([]string{"-shared", "-fPIC", "-Wl,-soname," + filepath.Base(out)}, args...)...)
	}
	shared("lib/libdeep.so.1")
	shared("other/libdeep.so.1")
	rpath, runpath := "-Wl,--disable-new-dtags,-rpath,", "-Wl,--enable-new-dtags,-rpath,"
	shared("lib/libplain.so.1", "lib/libdeep.so.1")
	shared("lib/librun.so.1", "lib/libdeep.so.1", runpath+"$ORIGIN/../other")
	shared("lib/librpath.so.1", "lib/libdeep.so.1", rpath+"$ORIGIN/../other")
	shared("lib/liba.so.1")
	shared("lib/libb.so.1", "lib/liba.so.1", runpath+"$ORIGIN")
	shared("lib/liba.so.1", "lib/libb.so.1", runpath+"${ORIGIN}") // now they need each other
	unresolved := "-Wl,--allow-shlib-undefined,--unresolved-symbols=ignore-all"
	for name, args := range map[string][]string{
		"rpath reaches what its library needs":  {"lib/libplain.so.1", rpath + "$ORIGIN/../lib"},
		"runpath does not":                      {"lib/libplain.so.1", runpath + "$ORIGIN/../lib"},
		"the library's runpath":                 {"lib/librun.so.1", rpath + "$ORIGIN/../lib"},
		"the library's rpath before the main":   {"lib/librpath.so.1", rpath + "$ORIGIN/../lib"},
		"two need one, the first decides":       {"lib/librun.so.1", "lib/libplain.so.1", rpath + "$ORIGIN/../lib"},
		"two need one, the first decides, back": {"lib/libplain.so.1", "lib/librun.so.1", rpath + "$ORIGIN/../lib"},
		"a circle":                              {"lib/libb.so.1", runpath + "$ORIGIN/../lib"},
	} {
		t.Run(name, func(t *testing.T) {
			out := "bin/" + strings.ReplaceAll(name, " ", "-")
			compile(out, append(args, unresolved)...)
			program := filepath.Join(dir, out)
			got, want := closureOf(t, program), ldd(t, program)
			for i, w := range want { // of what is missing, ldd gives the name in front
				if strings.Contains(w, "not found") {
					want[i] = "not found"
				}
			}
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("got  %v\nldd  %v", got, want)
			}
		})
	}
}
