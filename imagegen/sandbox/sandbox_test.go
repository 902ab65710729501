package sandbox

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// room is a folder that is the sandbox's.
func room(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	// What testing makes is its owner's only.
	if err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), Give(dir)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// shell runs a script in a folder that is the sandbox's and returns what it said.
func shell(t *testing.T, c Command, script string) (string, error) {
	t.Helper()
	if c.Dir == "" {
		c.Dir = room(t)
	}
	if c.Limit == 0 {
		c.Limit = 20 * time.Second
	}
	var out bytes.Buffer
	c.Argv, c.Output = []string{"sh", "-c", script}, &out
	err := Run(t.Context(), c)
	return strings.TrimSpace(out.String()), err
}

func TestWhatAProgramFinds(t *testing.T) {
	dir := room(t)
	t.Setenv("SECRET", "of the daemon")
	leaked, err := syscall.Dup(0) // stays open in what we start
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(leaked)
	old := syscall.Umask(0o077) // as a careful unit sets it
	defer syscall.Umask(old)
	for name, c := range map[string]struct{ script, want string }{
		"a fixed environment, and what the caller adds": {
			"env | grep -v '^_=\\|^PWD=\\|^OLDPWD=\\|^SHLVL=' | sort", "HOME=" + dir + "\nLC_ALL=C\nMORE=1\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nTZ=UTC"},
		"its folder":                     {"pwd", dir},
		"the usual umask":                {"umask", "0022"},
		"bounds":                         {"ulimit -c; ulimit -n; ulimit -Hn; ulimit -p", "0\n8192\n8192\n4096"},
		"its input":                      {"cat", "input"},
		"both streams":                   {"echo a; echo b >&2", "a\nb"},
		"no new privileges by setuid":    {"grep NoNewPrivs /proc/self/status | tr -d '\\t'", "NoNewPrivs:1"},
		"no descriptors but its streams": {"i=3; while [ $i -lt 300 ]; do [ ! -e /proc/$$/fd/$i ] || echo $i; i=$((i+1)); done; echo none", "none"},
		"arguments as they are":          {"printf '%s' '$HOME \"x\"'", `$HOME "x"`},
		"a folder that it may write in":  {"touch x && stat -c %a x", "644"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := shell(t, Command{Dir: dir, Env: []string{"MORE=1"}, Stdin: strings.NewReader("input")}, c.script)
			if err != nil || got != c.want {
				t.Errorf("%q, %v; want %q", got, err, c.want)
			}
		})
	}
}

func TestAsRoot(t *testing.T) {
	need.Root(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ script, want string }{
		"it is nobody, in no other group": {"id -un; id -G; grep -h ^Groups /proc/self/status | tr -d '\\t '", "nobody\n65534\nGroups:"},
		"it has no capabilities":          {"grep ^CapEff /proc/self/status | tr -d '\\t'", "CapEff:0000000000000000"},
		"it has no network":               {"tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | grep -v '^\\(lo\\|tunl0\\|sit0\\|ip6tnl0\\|gre.*\\|erspan0\\|ip_vti0\\|ip6_vti0\\|ip6gre0\\)$'; echo end", "end"},
		"it sees its own processes only":  {"echo $$; test $(ls -d /proc/[0-9]* | wc -l) -lt 6 && echo few", "1\nfew"},
		"it reads nothing of root's":      {"cat " + secret + " 2>/dev/null || echo refused", "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := shell(t, Command{}, c.script)
			if err != nil || got != c.want {
				t.Errorf("%q, %v; want %q", got, err, c.want)
			}
		})
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(mounts), " /proc proc "); n != 1 {
		t.Errorf("the system has %d /proc, its mounts came out of the sandbox", n)
	}
}

func TestErrors(t *testing.T) {
	var exit *exec.ExitError
	if _, err := shell(t, Command{}, "exit 3"); !errors.As(err, &exit) || exit.ExitCode() != 3 || !strings.HasPrefix(err.Error(), "sh: ") {
		t.Errorf("a program that fails: %v", err)
	}
	var missing *MissingError
	if err := Run(t.Context(), Command{Argv: []string{"no-such-compiler"}, Limit: time.Second}); !errors.As(err, &missing) || missing.What != "no-such-compiler" {
		t.Errorf("a program that is not there: %v", err)
	}
	if err := Run(t.Context(), Command{Argv: []string{"true"}}); err == nil {
		t.Error("no limit was taken")
	}
	if err := Run(t.Context(), Command{Argv: []string{"true"}, Dir: "/no/such", Limit: time.Second}); err == nil || !strings.Contains(err.Error(), "start true: its folder can't be reached by its user: ") {
		t.Errorf("no folder: %v", err)
	}
	script := filepath.Join(room(t), "program")
	if err := os.WriteFile(script, []byte("neither a program nor a script"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Run(t.Context(), Command{Argv: []string{script}, Limit: time.Second}); err == nil || !strings.Contains(err.Error(), "exec format error") {
		t.Errorf("not a program: %v", err)
	}
}

// tick is a script that lets a child of its child, which has left the group
// where it can, touch a file for ever.
const tick = "sh -c 'while :; do date +%N >tick; sleep 0.05; done' & echo started; wait"

// still reports whether dir/tick changes.
func still(t *testing.T, dir string) bool {
	t.Helper()
	before, err := os.ReadFile(filepath.Join(dir, "tick"))
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	after, _ := os.ReadFile(filepath.Join(dir, "tick"))
	return bytes.Equal(before, after)
}

func TestKilledWhole(t *testing.T) {
	const begun = 3 * time.Second // by then all of it runs, on a machine with other work, too
	scripts := map[string]string{"a child of its child": tick}
	if os.Geteuid() == 0 {
		scripts["one in a session of its own"] = strings.Replace(tick, "sh", "setsid sh", 1)
	}
	for name, script := range scripts {
		t.Run("at the limit: "+name, func(t *testing.T) {
			dir := room(t)
			start := time.Now()
			_, err := shell(t, Command{Dir: dir, Limit: begun}, script)
			var limit *LimitError
			if !errors.As(err, &limit) || limit.Limit != begun || time.Since(start) > 10*time.Second {
				t.Errorf("%v after %s", err, time.Since(start))
			}
			if !still(t, dir) {
				t.Error("it goes on")
			}
		})
		t.Run("when the context ends: "+name, func(t *testing.T) {
			dir := room(t)
			ctx, cancel := context.WithTimeout(t.Context(), begun)
			defer cancel()
			err := Run(ctx, Command{Argv: []string{"sh", "-c", script}, Dir: dir, Limit: time.Minute})
			if !errors.Is(err, context.DeadlineExceeded) || !still(t, dir) {
				t.Errorf("%v, still: %v", err, still(t, dir))
			}
		})
		t.Run("when it ends by itself: "+name, func(t *testing.T) {
			dir := room(t)
			start := time.Now()
			out, err := shell(t, Command{Dir: dir}, strings.Replace(script, "wait", "sleep 0.3", 1))
			// That its pipes are still held would be an error.
			if err != nil || out != "started" || !still(t, dir) || time.Since(start) > 10*time.Second {
				t.Errorf("%q, %v after %s", out, err, time.Since(start))
			}
		})
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestOutputThatFailsEndsTheProgram(t *testing.T) {
	start := time.Now()
	err := Run(t.Context(), Command{Argv: []string{"sh", "-c", "trap '' PIPE; while :; do echo y; done 2>/dev/null"}, Output: failing{}, Limit: time.Minute})
	if err == nil || !strings.Contains(err.Error(), "sh: take its output: disk full") || time.Since(start) > 10*time.Second {
		t.Errorf("%v after %s", err, time.Since(start))
	}
}

// A reader that never comes back, such as a client's pipe, must not hold us.
func TestInputThatHangs(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	start := time.Now()
	err := Run(t.Context(), Command{Argv: []string{"cat"}, Stdin: r, Limit: 300 * time.Millisecond})
	var limit *LimitError
	if !errors.As(err, &limit) || time.Since(start) > 2*lastWords {
		t.Errorf("%v after %s", err, time.Since(start))
	}
}

func TestInputThatFailsIsNotTheEndOfIt(t *testing.T) {
	broken := io.MultiReader(strings.NewReader("half"), iotest.ErrReader(errors.New("disk broken")))
	err := Run(t.Context(), Command{Argv: []string{"sh", "-c", "cat; sleep 10"}, Stdin: broken, Limit: time.Minute})
	if err == nil || !strings.Contains(err.Error(), "sh: read its input: disk broken") {
		t.Error(err)
	}
}

// The death of this process ends the program, too, with all that it started.
func TestEndsWithUs(t *testing.T) {
	need.Root(t)
	if dir := os.Getenv("SANDBOX_TEST_DIR"); dir != "" {
		_ = Run(t.Context(), Command{Argv: []string{"sh", "-c", tick}, Dir: dir, Limit: time.Minute})
		return
	}
	dir := room(t)
	us := exec.Command(os.Args[0], "-test.run=^TestEndsWithUs$")
	us.Env = append(os.Environ(), "SANDBOX_TEST_DIR="+dir)
	if err := us.Start(); err != nil {
		t.Fatal(err)
	}
	defer us.Wait()
	for range 200 {
		if b, _ := os.ReadFile(filepath.Join(dir, "tick")); len(b) > 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	_ = us.Process.Kill()
	time.Sleep(200 * time.Millisecond)
	if !still(t, dir) {
		t.Error("it goes on")
	}
}

// Root without CAP_SYS_ADMIN, as in a container.
func TestNoNamespacesAllowed(t *testing.T) {
	if os.Getenv("SANDBOX_TEST_CAGED") != "" {
		err := Run(t.Context(), Command{Argv: []string{"true"}, Limit: time.Minute})
		if err == nil || !strings.Contains(err.Error(), "lets root make no namespaces") {
			t.Errorf("%v", err)
		}
		return
	}
	need.Root(t)
	setpriv := need.Tool(t, "setpriv", "util-linux")
	cmd := exec.Command(setpriv, "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", os.Args[0], "-test.run=^TestNoNamespacesAllowed$")
	cmd.Env = append(os.Environ(), "SANDBOX_TEST_CAGED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestUnprivileged(t *testing.T) {
	need.Root(t)
	setpriv := need.Tool(t, "setpriv", "util-linux")
	// All tests again as a plain user; those that need root skip.
	dir := room(t)
	program := filepath.Join(dir, "sandbox.test")
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, b, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", program,
		"-test.run=^(TestWhatAProgramFinds|TestErrors|TestKilledWhole|TestOutputThatFailsEndsTheProgram|TestInputThatHangs|TestInputThatFailsIsNotTheEndOfIt)$")
	cmd.Dir = dir
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "TMPDIR=") }), "TMPDIR="+dir, "HOME="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestGive(t *testing.T) {
	need.Root(t)
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "file")
	if err := errors.Join(os.WriteFile(outside, nil, 0o600), os.Mkdir(dir+"/d", 0o700), os.Symlink(outside, dir+"/d/link")); err != nil {
		t.Fatal(err)
	}
	if err := Give(dir); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]uint32{dir: 65534, dir + "/d": 65534, dir + "/d/link": 65534, outside: 0} {
		st, err := os.Lstat(name)
		if err != nil || st.Sys().(*syscall.Stat_t).Uid != want {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	if err := Give(dir + "/none"); err == nil {
		t.Error("a folder that is not there was given away")
	}
}
