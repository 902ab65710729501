package settings

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"github.com/memlinux/memlinux/testvm/need"
)

const hash = "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/"

func ptr(s string) *string { return &s }

func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		name string
		s    Settings
		want string // in the error; "" for none
	}{
		{"nothing at all", Settings{}, ""},
		{"all there is", Settings{Hostname: "a-1.example", Keymap: "us(altgr-intl)", Timezone: "America/Argentina/Buenos_Aires", Consoles: []string{"hvc0", "ttyS1,9600n8"},
			Services: []Service{{Command: "sleep 1", Action: "askfirst", Console: "tty2"}}, RootPassword: ptr(hash), DHCP: []string{"eth0", "enp0s3.5"}}, ""},
		{"a hostname of the most characters", Settings{Hostname: strings.Repeat("a", 63)}, ""},
		{"a label of too many", Settings{Hostname: strings.Repeat("a", 64)}, "is no hostname"},
		{"a hostname of too many", Settings{Hostname: strings.Repeat("a", 33) + "." + strings.Repeat("a", 33)}, "and Linux takes 64"},
		{"a hostname with a hyphen first", Settings{Hostname: "-a"}, "is no hostname"},
		{"a hostname with two dots", Settings{Hostname: "a..b"}, "is no hostname"},
		{"a hostname that would be two lines", Settings{Hostname: "a\nb"}, "is no hostname"},
		{"a keymap that is an option", Settings{Keymap: "-I/etc"}, "is no keymap"},
		{"a keymap that is a path", Settings{Keymap: "../../etc/shadow"}, "is no keymap"},
		{"a time zone out of the folder", Settings{Timezone: "../../../etc/shadow"}, "is no time zone"},
		{"an absolute time zone", Settings{Timezone: "/etc/localtime"}, "is no time zone"},
		{"no console", Settings{Consoles: []string{}}, "nowhere to speak"},
		{"a console that is two words", Settings{Consoles: []string{"tty0 quiet"}}, "is no console"},
		{"a console twice", Settings{Consoles: []string{"ttyS0", "ttyS0,9600"}}, "ttyS0 is there twice"},
		{"a service without a command", Settings{Services: []Service{{Command: " "}}}, "no command"},
		{"a service of two lines", Settings{Services: []Service{{Command: "a\n::respawn:b"}}}, "line break"},
		{"a service with what inittab takes for a comment", Settings{Services: []Service{{Command: "echo '#'"}}}, "has a #"},
		{"a service that busybox would cut off", Settings{Services: []Service{{Command: strings.Repeat("a", 241)}}}, "takes 240"},
		{"an action that is none", Settings{Services: []Service{{Command: "a", Action: "always"}}}, `"always"; use sysinit`},
		{"a console that is a path", Settings{Services: []Service{{Command: "a", Console: "/dev/tty1"}}}, "terminal's name"},
		{"the password itself", Settings{RootPassword: ptr("secret")}, "openssl passwd -6"},
		{"a password that adds a user", Settings{RootPassword: ptr("$6$a$b:::::::\nroot2::")}, "openssl passwd -6"},
		{"a hash that busybox can't check", Settings{RootPassword: ptr("$y$j9T$abc$def")}, "openssl passwd -6"},
		{"but a guest can", Settings{RootPassword: ptr("$y$j9T$abc$def"), Guest: &Guest{}}, ""},
		{"a link with a space", Settings{DHCP: []string{"eth0 -s"}}, "is no network link"},
		{"a link that is an option", Settings{DHCP: []string{"*", "eth0"}}, "is no network link"},
		{"a link of too many characters", Settings{DHCP: []string{strings.Repeat("e", 16)}}, "is no network link"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.s.Validate()
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
			if tc.s.RootPassword != nil && err != nil && strings.Contains(err.Error(), *tc.s.RootPassword) {
				t.Error("the error repeats the password")
			}
		})
	}
}

var program = bytes.NewReader([]byte("#!/bin/false, in busybox's place\n"))

func file(path, content string) initramfs.Entry {
	e := text(path, 0o644, []byte(content), "the test's "+path)
	if strings.Contains(path, "bin/") || strings.HasSuffix(path, "systemd") {
		e.Mode = 0o755
	}
	return e
}

func symlink(path, to string) initramfs.Entry {
	return initramfs.Entry{Path: path, Mode: linkMode, Link: to, Why: "the test's " + path}
}

func rootTree(t testing.TB, entries ...initramfs.Entry) initramfs.Tree {
	t.Helper()
	root, err := initramfs.Tree{}.Union(entries...)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := initramfs.Guest(root, program, program.Size())
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// content is what a file of the tree holds; "-" where it is none.
func content(t *testing.T, tree initramfs.Tree, path string) string {
	t.Helper()
	b, err := open(tree, true).read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "-"
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestApplyToOurs(t *testing.T) {
	base := initramfs.Base(program, program.Size())
	zones := t.TempDir()
	if err := os.MkdirAll(filepath.Join(zones, zoneinfo), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(zones, zoneinfo, "UTC"), []byte("TZif2..."), 0o644); err != nil {
		t.Fatal(err)
	}
	a, err := Settings{
		Hostname: "kiosk.example", Timezone: "UTC", Consoles: []string{"ttyS1,9600", "tty0"}, RootPassword: ptr(hash), DHCP: []string{"eth0", "eth1"},
		Services: []Service{{Command: " /usr/bin/app --x ", Console: "tty0"}, {Command: "b", Action: "once"}},
	}.Apply(t.Context(), base, zones)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{"words": a.Words}
	for _, path := range []string{"etc/hostname", "etc/hosts", "etc/localtime", "etc/timezone", "etc/memlinux/inittab", "etc/memlinux/login", "etc/memlinux/init", "etc/passwd", "etc/shadow"} {
		got[path] = content(t, a.Tree, path)
	}
	if diff := cmp.Diff(map[string]string{
		"words": "console=ttyS1,9600 console=tty0", "etc/hostname": "kiosk.example\n", "etc/hosts": "127.0.0.1 localhost kiosk.example kiosk\n::1 localhost\n",
		"etc/localtime": "TZif2...", "etc/timezone": "UTC\n", "etc/memlinux/login": "", "etc/memlinux/init": "-",
		"etc/memlinux/inittab": "tty1::respawn:/usr/bin/app --x\n::once:b\n::respawn:/usr/lib/memlinux/dhcp eth0 eth1\n",
		"etc/passwd":           "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
		"etc/shadow":           "root:" + hash + ":1:0:99999:7:::\n",
	}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if e, _ := open(a.Tree, false).find("etc/shadow"); e.Mode != 0o600 {
		t.Errorf("etc/shadow has the mode %v", e.Mode)
	}
	if want := []string{"getty", "login", "ip", "mv", "rm", "udhcpc"}; !slices.Equal(a.Applets, want) {
		t.Errorf("applets %q, want %q", a.Applets, want)
	}
	// Packed it is what /init relies on: the mark last.
	if _, err := initramfs.Pack(t.Context(), io.Discard, a.Tree, initramfs.Compression{Name: "none"}, epoch, nil); err != nil {
		t.Error(err)
	}
	if last := a.Tree[slices.IndexFunc(a.Tree, func(e initramfs.Entry) bool { return e.Order == 1 })]; last.Path != "etc/memlinux/complete" {
		t.Errorf("the archive ends with %s", last.Path)
	}
}

func TestApplyChangesNothingUnasked(t *testing.T) {
	base := initramfs.Base(program, program.Size())
	a, err := Settings{}.Apply(t.Context(), base, "/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	paths := func(tree initramfs.Tree) (p []string) {
		for _, e := range tree {
			p = append(p, e.Path)
		}
		return p
	}
	if diff := cmp.Diff(paths(base), paths(a.Tree)); diff != "" {
		t.Error(diff)
	}
	if a.Words != "console=ttyS0,115200 console=tty0" {
		t.Error(a.Words)
	}
	// An empty password is what a shell without login asks for anyway.
	a, err = Settings{RootPassword: ptr("")}.Apply(t.Context(), base, "/nowhere")
	if err != nil || len(a.Tree) != len(base) {
		t.Errorf("%v, %d entries", err, len(a.Tree))
	}
}

func TestApplyRefuses(t *testing.T) {
	systemd := []initramfs.Entry{file("usr/lib/systemd/systemd", ""), symlink("sbin/init", "/lib/systemd/systemd"), symlink("lib", "usr/lib")}
	ours := func(e ...initramfs.Entry) initramfs.Tree {
		tree, err := initramfs.Overlay(initramfs.Base(program, program.Size()), e)
		if err != nil {
			t.Fatal(err)
		}
		return tree
	}
	for _, tc := range []struct {
		name string
		s    Settings
		tree initramfs.Tree
		want string
	}{
		{"a file of the recipe and a key for the same", Settings{Hostname: "a"}, ours(file("etc/hostname", "b\n")), "two of etc/hostname: the test's etc/hostname; and the hostname, as the recipe has it"},
		{"no tzdata here", Settings{Timezone: "UTC"}, ours(), "apt-get install tzdata"},
		{"a folder for a file", Settings{Hostname: "a", Guest: &Guest{}}, rootTree(t, file("etc/hostname/x", "")), "etc/hostname"},
		{"services beside a guest's init", Settings{Services: []Service{{Command: "a"}}, Guest: &Guest{}}, rootTree(t, systemd...), "services are busybox's to start, and this root has an init of its own (/sbin/init)"},
		{"dhcp beside a guest's init", Settings{DHCP: []string{AllLinks}, Guest: &Guest{}}, rootTree(t, systemd...), "dhcp is for systems that busybox starts"},
		{"an image's command that is not in it", Settings{Guest: &Guest{Command{Argv: []string{"nginx"}}}}, rootTree(t), "command nginx is not in its root"},
		{"an image's user that is not in it", Settings{Guest: &Guest{Command{Argv: []string{"/x"}, User: "www"}}}, rootTree(t), `user "www"`},
		{"an image's group that is not in it", Settings{Guest: &Guest{Command{Argv: []string{"/x"}, User: "0:www"}}}, rootTree(t), `group "www"`},
		{"an environment that is none", Settings{Guest: &Guest{Command{Argv: []string{"/x"}, Env: []string{"A"}}}}, rootTree(t), "no variable"},
		{"a NUL in an image", Settings{Guest: &Guest{Command{Argv: []string{"/x\x00"}}}}, rootTree(t), "NUL"},
		{"a hash that no login of the guest can check", Settings{RootPassword: ptr("$y$j9T$abc$def"), Guest: &Guest{}}, rootTree(t), "no login of its own"},
		{"a shadow that is no file", Settings{RootPassword: ptr(hash)}, ours(initramfs.Entry{Path: "etc/shadow", Mode: fs.ModeNamedPipe | 0o600, Why: "test"}), "not a file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := tc.s.Apply(t.Context(), tc.tree, "/nowhere")
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
	var missing *sandbox.MissingError
	if _, err := (Settings{Timezone: "UTC"}).Apply(t.Context(), ours(), "/nowhere"); !errors.As(err, &missing) || missing.Package != "tzdata" {
		t.Errorf("no *sandbox.MissingError in %v", err)
	}
}

func TestGuestsInit(t *testing.T) {
	inittab := func(program string) initramfs.Entry {
		return file("etc/inittab", "# a comment\n::sysinit:"+program+" start\ntty1::respawn:/sbin/getty 0 tty1\n")
	}
	for _, tc := range []struct {
		name string
		root []initramfs.Entry
		want guestInit
	}{
		{"an empty root", nil, guestInit{}},
		{"systemd behind two links", []initramfs.Entry{file("usr/lib/systemd/systemd", ""), symlink("sbin", "usr/sbin"), symlink("usr/sbin/init", "/lib/systemd/systemd"), symlink("lib", "usr/lib")}, guestInit{"sbin/init", true}},
		{"systemd without the link", []initramfs.Entry{file("usr/lib/systemd/systemd", "")}, guestInit{"usr/lib/systemd/systemd", true}},
		{"an init of its own", []initramfs.Entry{file("sbin/init", "")}, guestInit{path: "sbin/init"}},
		{"a link that leads nowhere", []initramfs.Entry{symlink("sbin/init", "/lib/systemd/systemd")}, guestInit{}},
		{"a link to itself", []initramfs.Entry{symlink("sbin/init", "init")}, guestInit{}},
		{"a file that can't be run", []initramfs.Entry{text("sbin/init", 0o644, nil, "test")}, guestInit{}},
		{"a container's busybox without openrc", []initramfs.Entry{file("bin/busybox", ""), symlink("sbin/init", "/bin/busybox"), inittab("/sbin/openrc")}, guestInit{}},
		{"a busybox that has what it starts", []initramfs.Entry{file("bin/busybox", ""), symlink("sbin/init", "../bin/busybox"), inittab("/etc/init.d/rcS"), file("etc/init.d/rcS", "")}, guestInit{path: "sbin/init"}},
		{"busybox by a hard link", []initramfs.Entry{file("bin/busybox", ""), {Path: "sbin/init", Mode: 0o755, HardLink: "bin/busybox"}}, guestInit{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := open(rootTree(t, tc.root...), true).findInit(); got != tc.want {
				t.Errorf("%+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestApplyToSystemd(t *testing.T) {
	root := []initramfs.Entry{
		file("usr/lib/systemd/systemd", ""), symlink("lib", "usr/lib"), symlink("sbin", "usr/sbin"), symlink("usr/sbin/init", "/lib/systemd/systemd"), file("init", "the image's own"),
		file("etc/hostname", "old\n"), symlink("etc/localtime", "/usr/share/zoneinfo/Etc/UTC"), file(zoneinfo+"/Europe/Berlin", "TZif"), file("etc/machine-id", "uninitialized\n"),
		file("etc/passwd", "daemon:x:1:1::/:\nroot::0:0:root:/root:/bin/bash\n"), file("etc/hosts", "127.0.0.1 localhost old\n"),
	}
	shadow := file("etc/shadow", "daemon:*:1::::::\nroot:*:20000:0:99999:7:::\n")
	shadow.Mode, shadow.GID = 0o640, 42
	s := Settings{Hostname: "new", Timezone: "Europe/Berlin", RootPassword: ptr(""), Guest: &Guest{Command{Argv: []string{"/usr/sbin/nginx", "-g"}}}}
	a, err := s.Apply(t.Context(), rootTree(t, append(root, shadow)...), "/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{"words": a.Words, "warnings": strings.Join(a.Warnings, "\n")}
	for _, path := range []string{"init", "etc/hostname", "etc/machine-id", "etc/passwd", "etc/shadow", "etc/hosts", "etc/memlinux/init", "etc/memlinux/ready-by-unit", "etc/memlinux/login", "etc/memlinux/inittab"} {
		got[path] = content(t, a.Tree, path)
	}
	if diff := cmp.Diff(map[string]string{
		"words":    "console=ttyS0,115200 console=tty0 rdinit=/usr/lib/memlinux/init",
		"warnings": "the image's command (/usr/sbin/nginx -g) is not started: its root has an init (/sbin/init), which is",
		"init":     "the image's own", "etc/hostname": "new\n", "etc/machine-id": "", "etc/hosts": "127.0.0.1 localhost old\n",
		"etc/passwd": "daemon:x:1:1::/:\nroot:x:0:0:root:/root:/bin/bash\n", "etc/shadow": "daemon:*:1::::::\nroot::20000:0:99999:7:::\n",
		"etc/memlinux/init": "/sbin/init\n", "etc/memlinux/ready-by-unit": "", "etc/memlinux/login": "-", "etc/memlinux/inittab": "-",
	}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	tree := open(a.Tree, true)
	if e := tree.entries["etc/shadow"]; e.Mode != 0o640 || e.GID != 42 {
		t.Errorf("etc/shadow became %v of group %d", e.Mode, e.GID)
	}
	if e := tree.entries["etc/localtime"]; e.Link != "/usr/share/zoneinfo/Europe/Berlin" {
		t.Errorf("etc/localtime leads to %q", e.Link)
	}
	if unit := content(t, a.Tree, "etc/systemd/system/multi-user.target.wants/memlinux-ready.service"); !strings.Contains(unit, "ExecStart=/usr/lib/memlinux/init\n") {
		t.Errorf("the unit does not start our init: %s", unit)
	}
	if content(t, a.Tree, "etc/systemd/system/serial-getty@.service") == "-" {
		t.Error("no getty that does without udev")
	}
	s.Guest = &Guest{}
	a, err = s.Apply(t.Context(), rootTree(t, append(root, file("usr/lib/systemd/systemd-udevd", ""))...), "/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	if content(t, a.Tree, "etc/systemd/system/serial-getty@.service") != "-" {
		t.Error("a getty of ours though there is udev")
	}
}

// systemd itself must find nothing to say about our units.
func TestUnitsAreGood(t *testing.T) {
	analyze := need.Tool(t, "systemd-analyze", "systemd")
	dir := t.TempDir()
	for from, to := range map[string]string{"ready.service": "memlinux-ready.service", "serial-getty.service": "serial-getty@.service"} {
		b, err := files.ReadFile("units/" + from)
		if err != nil {
			t.Fatal(err)
		}
		// What it starts must be there.
		b = bytes.ReplaceAll(b, []byte("ExecStart=/init"), []byte("ExecStart=/bin/true"))
		unit := filepath.Join(dir, to)
		if err := os.WriteFile(unit, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(analyze, "verify", "--man=no", "--recursive-errors=no", unit).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v: %s", from, err, out)
		}
	}
}

func TestScriptsAreGoodShell(t *testing.T) {
	shellcheck := need.Tool(t, "shellcheck", "shellcheck")
	busybox := need.File(t, "/bin/busybox", "busybox-static")
	scripts, err := filepath.Glob("scripts/*")
	if err != nil {
		t.Fatal(err)
	}
	scripts = append(scripts, "../initramfs/init", "../initramfs/guest-profile.sh")
	for _, script := range scripts {
		if out, err := exec.Command(shellcheck, "-s", "dash", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
		if out, err := exec.Command(busybox, "sh", "-n", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", script, err, out)
		}
	}
}

func TestCommandScript(t *testing.T) {
	root := rootTree(t, file("opt/bin/app", ""), file("etc/passwd", "root:x:0:0::/root:/bin/sh\nwww:x:33:34::/var/www:/bin/false\n"), file("etc/group", "root:x:0:\nweb:x:8:\n"))
	for _, tc := range []struct {
		name string
		c    Command
		want string
	}{
		{"as root, by PATH", Command{Argv: []string{"app", "it's", "$x"}, Env: []string{"PATH=/sbin:/opt/bin", "A=b c"}},
			`mkdir -p '/'
exec /b env -i 'PATH=/sbin:/opt/bin' 'A=b c' 'HOME=/root' \
    '/b' 'sh' '-c' 'cd "$0" && exec "$@"' '/' '/opt/bin/app' 'it'\''s' '$x' </dev/null`},
		{"as a user with a home", Command{Argv: []string{"/opt/bin/app"}, Dir: "srv", User: "www:web"},
			`mkdir -p '/srv'
exec /b env -i 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' 'HOME=/var/www' \
    '/b' 'start-stop-daemon' '-S' '-p' '/run/memlinux/none' '-c' '33:8' '-x' '/b' '--' 'sh' '-c' 'cd "$0" && exec "$@"' '/srv' '/opt/bin/app' </dev/null`},
		{"as a number with its own home", Command{Argv: []string{"./app"}, Env: []string{"HOME=/h"}, Dir: "/opt/bin", User: "33"},
			`mkdir -p '/opt/bin'
exec /b env -i 'HOME=/h' 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    '/b' 'start-stop-daemon' '-S' '-p' '/run/memlinux/none' '-c' '33:34' '-x' '/b' '--' 'sh' '-c' 'cd "$0" && exec "$@"' '/opt/bin' './app' </dev/null`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := open(root, true).commandScript(tc.c, "/b")
			if err != nil {
				t.Fatal(err)
			}
			_, body, _ := strings.Cut(got, "\n\n/b ")
			if diff := cmp.Diff(tc.want+"\n", body); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	tree := open(root, true)
	if _, err := tree.commandScript(Command{Argv: []string{"/x"}, User: "1001"}, "/b"); err != nil {
		t.Fatal(err)
	}
	if b, _ := tree.read("etc/passwd"); !strings.HasSuffix(string(b), "\nuser1001:x:1001:0::/:/bin/false\n") {
		t.Errorf("etc/passwd became %q", b)
	}
}

func TestShellsAreNoCommand(t *testing.T) {
	for want, commands := range map[bool][]string{
		true:  {"sh", "/bin/bash", "bash -l", "/bin/sh -i", "zsh --login"},
		false: {"sh -c ls", "bash script", "/usr/bin/python3", "shutdown"},
	} {
		for _, c := range commands {
			if isShell(strings.Fields(c)) != want {
				t.Errorf("%s: %v", c, !want)
			}
		}
	}
}

func TestKeymap(t *testing.T) {
	need.Tool(t, "ckbcomp", "console-setup")
	need.Tool(t, "loadkeys", "kbd")
	need.File(t, xkbSymbols+"de", "xkb-data")
	maps := map[string][]byte{}
	for _, name := range []string{"us", "de", "de(nodeadkeys)", "cz", "ru", "jp"} {
		b, err := compileKeymap(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		again, err := compileKeymap(t.Context(), name)
		if err != nil || !bytes.Equal(b, again) {
			t.Errorf("%s is not the same the second time: %v", name, err)
		}
		for other, m := range maps {
			if bytes.Equal(m, b) {
				t.Errorf("%s and %s are the same", name, other)
			}
		}
		maps[name] = b
	}
	for name, want := range map[string]string{"xx": "no layout of that name", "de(quatsch)": "has no variant quatsch"} {
		if _, err := compileKeymap(t.Context(), name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q in it", name, err, want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := compileKeymap(ctx, "de"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestZone(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, zoneinfo)
	if err := os.MkdirAll(filepath.Join(dir, "Europe"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"Europe/Berlin": "TZif2", "zone.tab": "# text", "tzdata": strings.Repeat("TZif", maxZone)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := readZone(root, "Europe/Berlin"); err != nil || string(b) != "TZif2" {
		t.Errorf("%q, %v", b, err)
	}
	for name, want := range map[string]string{"Europe": "is no time zone", "Europe/Bonn": "no time zone Europe/Bonn", "zone.tab": "is no time zone", "tzdata": "is no time zone"} {
		if _, err := readZone(root, name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q in it", name, err, want)
		}
	}
}

// Whatever a root has in the files that are read: no crash, no endless loop, and
// a tree that can be packed, or an error.
func FuzzGuest(f *testing.F) {
	f.Add("usr/sbin", "../bin/busybox", "::sysinit:/etc/rc\n", "root::0:0\n", "root:*\n", "www:8")
	f.Add("/sbin", "init", "", "root", "", "root")
	f.Add("sbin", "/sbin/init", "a:b", ":::::::\n\n", "root", "1:2")
	f.Add("..", "../..", "::sysinit:../../x", "x:x:x:x:x:x:x", "\x00", "4294967296:99999999999")
	f.Fuzz(func(t *testing.T, sbin, init, inittab, passwd, shadow, user string) {
		root, err := initramfs.Tree{}.Union(file("bin/busybox", ""), symlink("sbin", sbin), symlink("usr/sbin/init", init),
			file("etc/inittab", inittab), file("etc/passwd", passwd), file("etc/shadow", shadow))
		if err != nil {
			t.Skip()
		}
		tree, err := initramfs.Guest(root, program, program.Size())
		if err != nil {
			t.Skip()
		}
		s := Settings{Hostname: "a", RootPassword: ptr(""), Guest: &Guest{Command{Argv: []string{"/bin/busybox", "x"}, User: user}}}
		a, err := s.Apply(t.Context(), tree, "/nowhere")
		if err != nil {
			return
		}
		if err := a.Tree.Validate(); err != nil {
			t.Error(err)
		}
		b, err := open(a.Tree, true).read("etc/shadow")
		if err != nil || !strings.HasPrefix(string(b), "root::") && !strings.Contains(string(b), "\nroot::") {
			t.Errorf("root has not the empty password: %q, %v", b, err)
		}
	})
}

func FuzzValidate(f *testing.F) {
	f.Add("host", "de(x)", "Europe/Berlin", "ttyS0,115200", "a b", "tty1", hash, "eth0")
	f.Fuzz(func(t *testing.T, hostname, keymap, zone, console, command, tty, password, link string) {
		s := Settings{Hostname: hostname, Keymap: keymap, Timezone: zone, Consoles: []string{console}, Services: []Service{{Command: command, Console: tty}}, RootPassword: &password, DHCP: []string{link}}
		if s.Validate() != nil {
			t.Skip()
		}
		// What goes into one line of a file, or a path, stays there.
		for _, v := range []string{hostname, keymap, zone, console, command, tty, password, link} {
			if strings.ContainsAny(v, "\n\x00") {
				t.Errorf("%q was taken", v)
			}
		}
		if strings.Contains(zone, "..") || strings.HasPrefix(zone, "/") || strings.ContainsAny(tty+keymap+link, "/") || strings.Contains(password, ":") || strings.ContainsAny(console, " ") {
			t.Errorf("%+v was taken", s)
		}
	})
}
