package collect

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/cli/collect/elfdeps"
	"github.com/memlinux/memlinux/testvm/need"
)

// lay makes files below dir: a name that ends in / is a folder, a value "-> x" a
// symlink, "| " a named pipe.
func lay(t testing.TB, dir string, files map[string]string) string {
	t.Helper()
	for name, v := range files {
		full := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch to, link := strings.CutPrefix(v, "-> "); {
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(full, 0o755)
		case link:
			err = os.Symlink(to, full)
		case v == "| ":
			err = syscall.Mkfifo(full, 0o644)
		default:
			if err = os.WriteFile(full, []byte(v), 0o644); err == nil && (strings.HasPrefix(v, "#!") || strings.HasPrefix(v, elf.ELFMAG)) {
				err = os.Chmod(full, 0o755)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// static is a program that needs nothing; machine is 62 for amd64.
func static(machine uint16) string {
	h := elf.Header64{Type: 2, Machine: machine, Version: 1, Ehsize: 64}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = 2, 1, 1
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, h)
	return b.String()
}

type entry struct {
	*tar.Header
	content string
}

func (e entry) String() string {
	s := fmt.Sprintf("%s %04o %d:%d", e.Name, e.Mode, e.Uid, e.Gid)
	switch e.Typeflag {
	case tar.TypeReg:
		s += fmt.Sprintf(" %q", e.content)
	case tar.TypeLink:
		s += " = " + e.Linkname
	case tar.TypeSymlink:
		s += " -> " + e.Linkname
	case tar.TypeFifo:
		s += " pipe"
	}
	if e.PAXRecords[CapsRecord] != "" {
		s += " " + CapsText([]byte(e.PAXRecords[CapsRecord]))
	}
	return s
}

func entries(t testing.TB, r io.Reader) []entry {
	t.Helper()
	var all []entry
	seen := map[string]bool{}
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		if seen[strings.TrimSuffix(h.Name, "/")] {
			t.Errorf("%s is there twice", h.Name)
		}
		seen[strings.TrimSuffix(h.Name, "/")] = true
		if h.PAXRecords[WhyRecord] == "" || h.ModTime.Unix() != 0 || h.Uname != "" || h.Gname != "" {
			t.Errorf("%s: why %q, time %v, user %q", h.Name, h.PAXRecords[WhyRecord], h.ModTime, h.Uname)
		}
		all = append(all, entry{h, string(b)})
	}
}

func words(all []entry) string {
	var b strings.Builder
	for _, e := range all {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

func payload(t testing.TB, s Set) ([]entry, Summary) {
	t.Helper()
	var b bytes.Buffer
	sum, err := Payload(context.Background(), &b, s, nil)
	if err != nil {
		t.Fatal(err)
	}
	all := entries(t, &b)
	if !slices.IsSortedFunc(all, func(a, b entry) int {
		return strings.Compare(strings.TrimSuffix(a.Name, "/"), strings.TrimSuffix(b.Name, "/"))
	}) {
		t.Error("it is not sorted")
	}
	if len(all) != sum.Entries {
		t.Errorf("%d entries, and the summary says %d", len(all), sum.Entries)
	}
	return all, sum
}

func mode(m fs.FileMode) *fs.FileMode { return &m }
func text(s string) *string           { return &s }

func TestFilesAndOverlays(t *testing.T) {
	dir := lay(t, t.TempDir(), map[string]string{
		"a": "A", "link": "-> a", "over/etc/motd": "hello", "over/etc/rc": "-> /etc/motd", "over/pipe": "| ", "over/empty/": "", "over/dangling": "-> nowhere",
	})
	if err := os.Link(dir+"/over/etc/motd", dir+"/over/issue"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir+"/over/empty", 0o1777|fs.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mknod(dir+"/over/socket", syscall.S_IFSOCK|0o600, 0); err != nil {
		t.Fatal(err)
	}
	got, sum := payload(t, Set{
		Files: []File{
			{From: dir + "/link", To: "/opt/b", UID: 3, GID: 4, Line: "m:1"},
			{From: dir + "/a", To: "/opt/c", Mode: mode(0o600), Line: "m:2"},
			{Text: text("T"), To: "/opt/t", Line: "m:3"},
		},
		Overlays: []Overlay{{From: dir + "/over", Line: "m:4"}, {From: dir + "/over/etc", To: "/srv/x/", Line: "m:5"}},
	})
	want := `dangling 0777 0:0 -> nowhere
empty/ 1777 0:0
etc/ 0755 0:0
etc/motd 0644 0:0 "hello"
etc/rc 0777 0:0 -> /etc/motd
issue 0644 0:0 = etc/motd
opt/b 0644 3:4 "A"
opt/c 0600 0:0 "A"
opt/t 0644 0:0 "T"
pipe 0644 0:0 pipe
srv/x/ 0755 0:0
srv/x/motd 0644 0:0 = etc/motd
srv/x/rc 0777 0:0 -> /etc/motd
`
	if d := cmp.Diff(want, words(got)); d != "" {
		t.Error(d)
	}
	if len(sum.Notes) != 1 || !strings.HasSuffix(sum.Notes[0], "over/socket is a socket or a device, and was left out") {
		t.Error(sum.Notes)
	}
	if why := got[1].PAXRecords[WhyRecord]; why != "overlay of the recipe ("+dir+"/over)" {
		t.Error(why)
	}
}

func TestProgramsBehindSymlinks(t *testing.T) {
	dir := lay(t, t.TempDir(), map[string]string{
		"v1/bin/p": static(62), "bin/p": "-> ../current/bin/p", "current": "-> v1", "abs": "-> DIR",
	})
	if err := os.Remove(dir + "/abs"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir+"/bin/p", dir+"/abs"); err != nil {
		t.Fatal(err)
	}
	got, _ := payload(t, Set{Programs: []Program{{From: dir + "/abs", To: "/usr/bin/p", Line: "m:1"}, {From: dir + "/bin/p", To: "/opt/bin/q", Mode: mode(0o700 | fs.ModeSetuid), Line: "m:2"}}})
	d := dir[1:]
	want := []string{
		"opt/bin/q 0777 0:0 -> ../current/bin/p", "opt/current/bin/p 4700 0:0 ", d + "/bin/p 0777 0:0 -> ../current/bin/p",
		d + "/current/bin/p 0755 0:0 ", "usr/bin/p 0777 0:0 -> " + dir + "/bin/p",
	}
	for i := range want {
		if i >= len(got) || !strings.HasPrefix(got[i].String(), want[i]) {
			t.Fatalf("got\n%swant\n%s", words(got), strings.Join(want, "\n"))
		}
	}
}

func TestEverythingThatIsWrongIsSaidAtOnce(t *testing.T) {
	dir := lay(t, t.TempDir(), map[string]string{
		"arm": static(183), "ok": static(62), "text": "hello", "crlf": "#!/bin/sh\r\necho\r\n", "nowhere": "#!/opt/no/such\n", "env": "#!/usr/bin/env nosuchprogram\n",
		"relative": "#!bin/sh\n", "loop": "-> loop", "one/etc/x": "1", "two/etc/x": "2", "three/etc": "-> /srv",
	})
	if err := os.WriteFile(dir+"/mode", []byte(static(62)), 0o644); err != nil {
		t.Fatal(err)
	}
	huge, err := os.Create(dir + "/huge")
	if err != nil {
		t.Fatal(err)
	}
	if err := huge.Truncate(MaxFile + 1); err != nil {
		t.Fatal(err)
	}
	huge.Close()
	cases := []struct {
		name string
		set  Set
		want []string
	}{
		{"a program for another machine", Set{Programs: []Program{{From: dir + "/arm", Line: "m:1"}}},
			[]string{"m:1: DIR/arm is for aarch64, and the system is for amd64: take a build for amd64"}},
		{"no program at all", Set{Programs: []Program{{From: dir + "/text", Line: "m:1"}, {From: dir + "/none", Line: "m:2"}, {From: dir + "/one", Line: "m:3"}, {From: dir + "/mode", Line: "m:4"}}},
			[]string{
				"m:1: DIR/text is no program: it is neither an ELF file nor a script with #! and an interpreter",
				"m:2: DIR/none is not there (no such file or directory)",
				"m:3: DIR/one is a folder: name it as an [[overlay]]",
				"m:4: DIR/mode is not executable: chmod +x it, or give it a mode",
			}},
		{"scripts that nothing runs", Set{Programs: []Program{{From: dir + "/crlf", Line: "m:1"}, {From: dir + "/nowhere", To: "/n", Line: "m:2"}, {From: dir + "/env", To: "/e", Line: "m:3"}, {From: dir + "/relative", To: "/r", Line: "m:4"}}},
			[]string{
				"m:1: DIR/crlf is a script whose lines end in CR LF, which no interpreter takes: make them LF (sed -i 's/\\r$//')",
				"m:2: /opt/no/such, the interpreter of n, is nowhere: install it, or bring it by a [[program]]",
				"m:3: nosuchprogram, by which e is run, is in none of /usr/sbin, /usr/bin, /sbin, /bin: install it, or bring it by a [[program]]",
				"m:4: the interpreter of r, \"bin/sh\", is no absolute path",
			}},
		{"symlinks in a circle", Set{Programs: []Program{{From: dir + "/loop", To: "/p", Line: "m:1"}}},
			[]string{"m:1: DIR/loop: more than 40 symlinks one behind the other"}},
		{"paths that are none", Set{Files: []File{{Text: text(""), To: "etc/x", Line: "m:1"}, {Text: text(""), To: "/", Line: "m:2"}, {Text: text(""), To: "/a/../b", Line: "m:3"}}, Overlays: []Overlay{{From: dir, To: "x", Line: "m:4"}}},
			[]string{`m:4: to: "x" is no absolute path`, `m:1: to: "etc/x" is no absolute path`, `m:2: to: "/" is the root folder`, `m:3: to: "/a/../b" is not usable as a path in the system`}},
		{"a file of 4 GiB", Set{Files: []File{{From: dir + "/huge", To: "/h", Line: "m:1"}}},
			[]string{"m:1 (DIR/huge): /h has 4294967296 bytes, and no file of 4 GiB or more can be in the system"}},
		{"two contents", Set{Overlays: []Overlay{{From: dir + "/one", Line: "m:1"}, {From: dir + "/two", Line: "m:2"}}},
			[]string{"/etc/x has other content of m:1 (DIR/one/etc/x) than of m:2 (DIR/two/etc/x): only one can be"}},
		{"two modes, owners and types", Set{
			Files:    []File{{Text: text("1"), To: "/etc/x", Mode: mode(0o600), Line: "m:2"}, {Text: text("1"), To: "/etc/x", UID: 1, Line: "m:3"}, {Text: text("1"), To: "/etc", Line: "m:4"}},
			Overlays: []Overlay{{From: dir + "/one", Line: "m:1"}},
		}, []string{
			"/etc/x has the mode 0644 of m:1 (DIR/one/etc/x), and 0600 of m:2: only one can be",
			"/etc/x belongs to 0:0 by m:1 (DIR/one/etc/x), and to 1:0 by m:3: only one can be",
			"/etc is a folder of m:1 (DIR/one/etc), and a file of m:4: only one can be",
		}},
		{"a symlink on the way", Set{Files: []File{{Text: text("1"), To: "/etc/x/y", Line: "m:2"}}, Overlays: []Overlay{{From: dir + "/three", Line: "m:1"}}},
			[]string{"/etc is a symlink of m:1 (DIR/three/etc), and a folder because of /etc/x/y of m:2: only one can be"}},
		{"a folder as a file, a file as a folder", Set{Files: []File{{From: dir + "/one", To: "/x", Line: "m:1"}}, Overlays: []Overlay{{From: dir + "/ok", Line: "m:2"}, {From: dir + "/none", Line: "m:3"}}},
			[]string{"m:2: DIR/ok is no folder: name it as a [[file]]", "m:3: DIR/none is not there (no such file or directory)", "m:1: DIR/one is a folder: name it as an [[overlay]]"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			_, err := Payload(context.Background(), &b, c.set, nil)
			var problems *ProblemsError
			if !errors.As(err, &problems) {
				t.Fatalf("got %v", err)
			}
			for i, p := range problems.Problems {
				problems.Problems[i] = strings.ReplaceAll(p, dir, "DIR")
			}
			if d := cmp.Diff(c.want, problems.Problems); d != "" {
				t.Error(d)
			}
			if b.Len() > 0 {
				t.Error("something was written")
			}
		})
	}
}

func TestTheSameFromTwoSidesIsOne(t *testing.T) {
	dir := lay(t, t.TempDir(), map[string]string{"one/etc/x": "1", "two/etc/x": "1"})
	got, _ := payload(t, Set{Overlays: []Overlay{{From: dir + "/one", Line: "m:1"}, {From: dir + "/two", Line: "m:2"}}, Files: []File{{Text: text("1"), To: "/etc/x", Line: "m:3"}}})
	if w := words(got); w != "etc/ 0755 0:0\netc/x 0644 0:0 \"1\"\n" {
		t.Error(w)
	}
}

func TestScriptsTakeWhatTheRecipeBrings(t *testing.T) {
	dir := lay(t, t.TempDir(), map[string]string{
		"sh": "#!/bin/sh\n", "awk": "#!/usr/bin/env awk -f\n", "own": "#!/opt/own -x\n", "byenv": "#!/usr/bin/env -S FOO=1 own2\n", "nested": "#!/opt/sh2\n", "o": static(62), "sh2": "#!/bin/sh\n",
	})
	got, sum := payload(t, Set{
		Programs: []Program{
			{From: dir + "/sh", To: "/b/sh", Line: "m:1"}, {From: dir + "/awk", To: "/b/awk", Line: "m:2"}, {From: dir + "/own", To: "/b/own", Line: "m:3"},
			{From: dir + "/byenv", To: "/b/byenv", Line: "m:4"}, {From: dir + "/nested", To: "/b/nested", Line: "m:5"}, {From: dir + "/sh2", To: "/opt/sh2", Line: "m:6"},
			{From: dir + "/o", To: "/opt/own", Line: "m:7"},
		},
		Files: []File{{From: dir + "/o", To: "/usr/bin/own2", Line: "m:8"}},
	})
	if len(got) != 8 || len(sum.Brought) != 0 {
		t.Errorf("%s%v", words(got), sum.Brought)
	}
	if len(sum.Notes) != 1 || !strings.Contains(sum.Notes[0], "env -S") {
		t.Error(sum.Notes)
	}
}

// unpack lays entries into a new folder, as the daemon does into its tree.
func unpack(t *testing.T, all []entry) string {
	t.Helper()
	dir := t.TempDir()
	for _, e := range all {
		full := filepath.Join(dir, e.Name)
		err := os.MkdirAll(filepath.Dir(full), 0o755)
		if err == nil {
			switch e.Typeflag {
			case tar.TypeDir:
				err = os.MkdirAll(full, fs.FileMode(e.Mode&0o777))
			case tar.TypeSymlink:
				err = os.Symlink(e.Linkname, full)
			case tar.TypeLink:
				err = os.Link(filepath.Join(dir, e.Linkname), full)
			case tar.TypeReg:
				err = os.WriteFile(full, []byte(e.content), fs.FileMode(e.Mode&0o777))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// What is collected runs where nothing else is.
func TestProgramsRunInATreeOfTheirOwn(t *testing.T) {
	need.Root(t)
	for tool, pkg := range map[string]string{"tput": "ncurses-bin", "curl": "curl", "perl": "perl-base", "bash": "bash"} {
		need.Tool(t, tool, pkg)
	}
	need.File(t, "/usr/bin/python3", "python3")
	curl := need.File(t, "/usr/bin/curl", "curl")
	dir := lay(t, t.TempDir(), map[string]string{
		"py":   "#!/usr/bin/env python3\nimport json, ssl, sqlite3, ctypes, subprocess, hashlib, lzma, readline, decimal, sys, threading, _thread\nt = threading.Thread(target=_thread.exit); t.start(); t.join()\nprint(json.dumps(sys.version_info[0]))\n",
		"pl":   "#!/usr/bin/perl -w\nuse strict; use POSIX; use List::Util qw(sum); print sum(1,2), \"\\n\";\n",
		"bash": "#!/bin/bash\necho ${BASH_VERSION:+bash} $(( 2 + 3 ))\n",
	})
	got, sum := payload(t, Set{Programs: []Program{
		{From: curl, Line: "m:1"}, {From: "/usr/bin/tput", Line: "m:7"}, {From: dir + "/py", To: "/usr/bin/py", Line: "m:2"}, {From: dir + "/pl", To: "/usr/bin/pl", Line: "m:3"},
		{From: dir + "/bash", To: "/usr/bin/ba", Line: "m:4"}, {From: need.File(t, "/bin/busybox", "busybox-static"), To: "/bin/busybox", Line: "m:5"},
	}, Files: []File{{Text: text(""), To: "/dev/null", Line: "m:6"}}})
	tree := unpack(t, got)
	if err := os.Symlink("/bin/busybox", tree+"/usr/bin/env"); err != nil {
		t.Fatal(err)
	}
	for command, want := range map[string]string{"curl --version": "curl ", "tput -T linux longname": "Linux console", "tput -T vt100 cols": "80", "py": "3\n", "pl": "3\n", "ba": "bash 5\n"} {
		args := strings.Fields(command)
		cmd := exec.Command("/usr/bin/"+args[0], args[1:]...)
		cmd.SysProcAttr, cmd.Dir = &syscall.SysProcAttr{Chroot: tree}, "/"
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE=1"}
		cmd.Path = "/usr/bin/" + args[0]
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.HasPrefix(string(out), want) {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	for _, e := range got {
		if strings.Contains(e.Name, "__pycache__") || strings.Contains(e.Name, "/test/") {
			t.Errorf("%s is there", e.Name)
		}
	}
	t.Logf("%d entries, %d bytes", sum.Entries, sum.Bytes)
	for _, b := range sum.Brought {
		t.Logf("%+v", b)
	}
	for _, n := range sum.Notes {
		t.Log(n)
	}
}

// Without an ld.so.cache the loader finds a library of an odd folder by a link.
func TestLibrariesOfOddFoldersAreReached(t *testing.T) {
	dir := lay(t, t.TempDir(), map[string]string{"p": static(62), "libodd.so": static(62), "libc.so.6": static(62)})
	c := newCollector(context.Background())
	at := func(name, target string) elfdeps.Place { return elfdeps.Place{Host: dir + "/" + name, Target: target} }
	p := program{Place: at("p", "/usr/bin/p"), name: "usr/bin/p", source: "m:1"}
	c.libraries(p, &elfdeps.Closure{Libraries: []elfdeps.Library{
		{Place: at("libodd.so", "/usr/local/lib/libodd.so"), Name: "libodd.so", By: "/usr/bin/p", Searched: true},
		{Place: at("libc.so.6", "/usr/lib/x/libc.so.6"), Name: "libc.so.6", By: "/usr/bin/p", Searched: true},
		{Place: at("libodd.so", "/lib/x/libtwin.so"), Name: "libtwin.so", By: "/usr/bin/p", Searched: true},
		{Place: at("libodd.so", "/opt/own.so"), Name: "own.so", By: "/usr/bin/p"},
	}}, "")
	if n := c.nodes["usr/lib/x/libodd.so"]; n == nil || n.link != "/usr/local/lib/libodd.so" || len(c.nodes) != 5 || len(c.problems) != 0 {
		t.Errorf("%v %v", c.sorted(), c.problems)
	}
}

func TestMissingLibrariesAreNamedWithWhoWantsThem(t *testing.T) {
	gcc := need.Tool(t, "gcc", "gcc")
	dir := t.TempDir()
	compile := func(out string, args ...string) {
		cmd := exec.Command(gcc, append([]string{"-x", "c", "-", "-x", "none", "-Wl,--no-as-needed", "-o", dir + "/" + out}, args...)...)
		cmd.Stdin, cmd.Dir = strings.NewReader("int main(void){return 0;}"), dir
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
	}
	compile("libgone.so.1", "-shared", "-fPIC", "-Wl,-soname,libmemlinuxgone.so.1")
	compile("libmid.so.1", "-shared", "-fPIC", "-Wl,-soname,libmid.so.1", "libgone.so.1")
	compile("p", "libmid.so.1", "libgone.so.1", "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined")
	_, err := Payload(context.Background(), io.Discard, Set{Programs: []Program{{From: dir + "/p", To: "/usr/bin/p", Line: "m:1"}}}, nil)
	want := "m:1: libmemlinuxgone.so.1, which usr/bin/p and 1 more need, is nowhere: install the package that has it (apt-file search libmemlinuxgone.so.1), or bring it by a [[program]] or an [[overlay]]"
	if err == nil || err.Error() != want {
		t.Fatalf("got  %v\nwant %s", err, want)
	}
	// An overlay that has it will do.
	lay(t, dir, map[string]string{"over/usr/bin/": ""})
	if err := os.Rename(dir+"/libgone.so.1", dir+"/over/usr/bin/libmemlinuxgone.so.1"); err != nil {
		t.Fatal(err)
	}
	got, _ := payload(t, Set{Programs: []Program{{From: dir + "/p", To: "/usr/bin/p", Line: "m:1"}}, Overlays: []Overlay{{From: dir + "/over", Line: "m:2"}}})
	if !slices.ContainsFunc(got, func(e entry) bool { return e.Name == "usr/bin/libmid.so.1" }) {
		t.Error(words(got))
	}
}

func TestSetuidAndCapabilitiesAreKeptAndReported(t *testing.T) {
	need.Root(t)
	setcap, getcap := need.Tool(t, "setcap", "libcap2-bin"), need.Tool(t, "getcap", "libcap2-bin")
	dir := lay(t, t.TempDir(), map[string]string{"suid": static(62), "cap": static(62) + " ", "over/sgid": "x"})
	for _, err := range []error{
		os.Chown(dir+"/suid", 7, 8), os.Chmod(dir+"/suid", 0o755|fs.ModeSetuid), os.Chmod(dir+"/over/sgid", 0o755|fs.ModeSetgid),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command(setcap, "cap_net_bind_service,cap_net_raw=ep", dir+"/cap").CombinedOutput(); err != nil {
		t.Fatalf("setcap: %v: %s", err, out)
	}
	got, sum := payload(t, Set{
		Programs: []Program{{From: dir + "/suid", To: "/s", Line: "m:1"}, {From: dir + "/cap", To: "/c", Line: "m:2"}},
		Overlays: []Overlay{{From: dir + "/over", Line: "m:3"}},
	})
	var special []string
	for _, s := range sum.Special {
		special = append(special, s.String())
	}
	want := []string{"c is allowed cap_net_bind_service,cap_net_raw=ep", "s is setuid of user 7", "sgid is setgid of group 0"}
	if !slices.Equal(special, want) {
		t.Errorf("got %q", special)
	}
	if !strings.Contains(words(got), "s 4755 7:0 ") || !strings.HasSuffix(got[0].String(), " cap_net_bind_service,cap_net_raw=ep") {
		t.Error(words(got))
	}
	for _, set := range []string{"cap_net_bind_service,cap_net_raw=ep", "cap_sys_admin=eip", "cap_chown=p", "cap_bpf,cap_checkpoint_restore=i", "cap_net_admin=ip"} {
		if out, err := exec.Command(setcap, set, dir+"/cap").CombinedOutput(); err != nil {
			t.Fatalf("setcap: %v: %s", err, out)
		}
		raw, err := capsOf(dir + "/cap")
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(getcap, dir+"/cap").Output()
		if theirs := strings.TrimSpace(strings.TrimPrefix(string(out), dir+"/cap ")); err != nil || CapsText(raw) != theirs {
			t.Errorf("%s: got %s, getcap says %s (%v)", set, CapsText(raw), theirs, err)
		}
	}
}

// writeHook calls do once something is written.
type writeHook struct{ do func() }

func (w *writeHook) Write(b []byte) (int, error) {
	if w.do != nil {
		w.do()
		w.do = nil
	}
	return len(b), nil
}

func TestFilesThatChangeAreNamed(t *testing.T) {
	for name, change := range map[string]func(file string) error{
		"shorter":  func(f string) error { return os.Truncate(f, 5) },
		"longer":   func(f string) error { return os.Truncate(f, 2<<20) },
		"gone":     os.Remove,
		"replaced": func(f string) error { _ = os.Remove(f); return os.Symlink("/etc/passwd", f) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := lay(t, t.TempDir(), map[string]string{"a": strings.Repeat("a", 1<<20), "b": strings.Repeat("b", 1<<20)})
			set := Set{Overlays: []Overlay{{From: dir, Line: "m:1"}}}
			_, err := Payload(context.Background(), &writeHook{func() {
				if err := change(dir + "/b"); err != nil {
					t.Error(err)
				}
			}}, set, nil)
			if err == nil || !strings.Contains(err.Error(), dir+"/b") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestTheSameSetGivesTheSameBytes(t *testing.T) {
	need.File(t, "/usr/bin/python3", "python3")
	var a, b bytes.Buffer
	set := Set{Programs: []Program{{From: "/usr/bin/python3", Line: "m:1"}, {From: "/bin/ls", Line: "m:2"}}}
	var last, total int64
	for _, out := range []io.Writer{&a, &b} {
		if _, err := Payload(context.Background(), out, set, func(d, t int64) { last, total = d, t }); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) || a.Len() == 0 || last != total || total == 0 {
		t.Errorf("%d and %d bytes, progress %d of %d", a.Len(), b.Len(), last, total)
	}
}

func TestCancelEndsIt(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	dir := lay(t, t.TempDir(), map[string]string{"a": strings.Repeat("a", 1<<20), "b": "b"})
	if _, err := Payload(ctx, &writeHook{cancel}, Set{Overlays: []Overlay{{From: dir, Line: "m:1"}}}, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := Payload(ctx, io.Discard, Set{Overlays: []Overlay{{From: dir, Line: "m:1"}}}, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := Rootfs(ctx, io.Discard, dir, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestShebang(t *testing.T) {
	long := strings.Repeat("a", 300)
	cases := []struct {
		name, start, interpreter, argument string
		ok                                 bool
	}{
		{"plain", "#!/bin/sh\nx", "/bin/sh", "", true},
		{"blanks around", "#! \t/bin/sh \t\n", "/bin/sh", "", true},
		{"all that follows is one argument", "#!/usr/bin/env  python3 -u \n", "/usr/bin/env", "python3 -u", true},
		{"without a line's end", "#!/bin/sh", "/bin/sh", "", true},
		{"nothing", "#!\n", "", "", false},
		{"no script", "# !/bin/sh\n", "", "", false},
		{"cut off within the name", "#!/" + long, "", "", false},
		{"cut off within the argument", "#!/bin/sh " + long, "/bin/sh", long[:256-10], true},
		{"CR LF", "#!/bin/sh\r\n", "/bin/sh\r", "", true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if i, a, ok := Shebang([]byte(c.start)); i != c.interpreter || a != c.argument || ok != c.ok {
				t.Errorf("got %q %q %v", i, a, ok)
			}
		})
	}
}

func FuzzShebang(f *testing.F) {
	for _, s := range []string{"#!/bin/sh -e\n", "#!  /usr/bin/env -S a=b c", "#!" + strings.Repeat("x", 300)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		i, a, ok := Shebang(b)
		if ok != (i != "") && ok || strings.ContainsAny(i, " \t\n\x00") || strings.ContainsAny(a, "\n\x00") || len(i)+len(a) > shebangSize {
			t.Fatalf("%q %q %v", i, a, ok)
		}
		_ = envProgram(a)
	})
}

func FuzzCapsText(f *testing.F) {
	f.Add([]byte{1, 0, 0, 2, 0, 0x24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if CapsText(b) == "" {
			t.Fatal("nothing")
		}
	})
}
