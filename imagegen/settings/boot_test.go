package settings

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/testvm/need"
)

// patience is for one step under TCG on a busy machine.
const patience = 120 * time.Second

var epoch = time.Unix(0, 0)

// machine is a QEMU that boots a tree directly, with its serial line.
type machine struct {
	t      *testing.T
	keys   io.Writer
	exited chan struct{}
	qmp    string
	start  time.Time

	mu   sync.Mutex
	log  bytes.Buffer
	more chan struct{} // closed and replaced as the log grows
}

// boot packs a tree and starts it in a machine with so many MiB of memory.
func boot(t *testing.T, a *Applied, memory int, args ...string) *machine {
	t.Helper()
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	kernel, _ := need.Kernel(t)
	// Not t.TempDir: its name has what QEMU's options can't hold.
	dir, err := os.MkdirTemp("", "memlinux-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	archive, err := os.Create(filepath.Join(dir, "initramfs"))
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	if _, err := initramfs.Pack(t.Context(), archive, a.Tree, initramfs.Compression{Name: "zstd"}, epoch, nil); err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, exited: make(chan struct{}), more: make(chan struct{}), qmp: filepath.Join(dir, "qmp"), start: time.Now()}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, qemu, append([]string{
		"-accel", "tcg", "-m", fmt.Sprint(memory), "-display", "none", "-no-reboot", "-monitor", "none",
		"-serial", "stdio", "-qmp", "unix:" + m.qmp + ",server=on,wait=off",
		"-kernel", kernel, "-initrd", archive.Name(), "-append", a.Words + " memlinux.build=0123456789abcdef",
	}, args...)...)
	if m.keys, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(m.exited)
		buf := make([]byte, 4096)
		for {
			n, err := out.Read(buf)
			m.mu.Lock()
			m.log.Write(buf[:n])
			close(m.more)
			m.more = make(chan struct{})
			m.mu.Unlock()
			if err != nil {
				break
			}
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		cancel()
		<-m.exited
		if t.Failed() || os.Getenv("MEMLINUX_CONSOLE") != "" {
			t.Logf("console:\n%s\nqemu: %s", m.text(), stderr.String())
		}
	})
	return m
}

func (m *machine) text() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return strings.ReplaceAll(m.log.String(), "\r", "")
}

// expect waits until the console has a match of pattern and returns it.
func (m *machine) expect(pattern string) string {
	m.t.Helper()
	re := regexp.MustCompile(pattern)
	timeout := time.After(patience)
	for {
		m.mu.Lock()
		more := m.more
		m.mu.Unlock()
		if found := re.FindString(m.text()); found != "" {
			return found
		}
		select {
		case <-more:
		case <-m.exited:
			if found := re.FindString(m.text()); found != "" {
				return found
			}
			m.t.Fatalf("the machine ended before its console said %q", pattern)
		case <-timeout:
			m.t.Fatalf("the console did not say %q in %s", pattern, patience)
		}
	}
}

func (m *machine) typed(line string) {
	m.t.Helper()
	if _, err := io.WriteString(m.keys, line+"\n"); err != nil {
		m.t.Fatal(err)
	}
}

// never fails the test where the console has a match of pattern.
func (m *machine) never(pattern string) {
	m.t.Helper()
	if found := regexp.MustCompile(pattern).FindString(m.text()); found != "" {
		m.t.Errorf("the console said %q", found)
	}
}

func (m *machine) expectEnd() {
	m.t.Helper()
	select {
	case <-m.exited:
	case <-time.After(patience):
		m.t.Fatalf("the machine still runs after %s", patience)
	}
}

// press presses keys of QEMU's names on the machine's keyboard, one after the
// other.
func (m *machine) press(keys ...string) {
	m.t.Helper()
	c, err := net.Dial("unix", m.qmp)
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	call := func(v any) {
		b, err := json.Marshal(v)
		if err != nil {
			m.t.Fatal(err)
		}
		if _, err := c.Write(append(b, '\n')); err != nil {
			m.t.Fatal(err)
		}
		for {
			line, err := r.ReadString('\n')
			if err != nil || strings.Contains(line, `"error"`) {
				m.t.Fatalf("QMP: %v: %s", err, line)
			}
			if strings.Contains(line, `"return"`) {
				return
			}
		}
	}
	call(map[string]any{"execute": "qmp_capabilities"})
	for _, chord := range keys {
		var list []any
		for key := range strings.SplitSeq(chord, "-") {
			list = append(list, map[string]any{"type": "qcode", "data": key})
		}
		call(map[string]any{"execute": "send-key", "arguments": map[string]any{"keys": list}})
		time.Sleep(200 * time.Millisecond)
	}
}

var noNIC = []string{"-nic", "none"}

// busyboxFile is the host's busybox, for a tree.
func busyboxFile(t *testing.T) (*os.File, int64) {
	t.Helper()
	f, err := os.Open(need.File(t, "/bin/busybox", "busybox-static"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, st.Size()
}

// ours is a system of busybox with more files and with settings.
func ours(t *testing.T, s Settings, more ...initramfs.Entry) *Applied {
	t.Helper()
	return apply(t, s, initramfs.Base(busyboxFile(t)).With(more...))
}

// guest is a root tree of another make with settings.
func guest(t *testing.T, s Settings, root initramfs.Tree) *Applied {
	t.Helper()
	if s.Guest == nil {
		s.Guest = &Guest{}
	}
	b, size := busyboxFile(t)
	tree, err := initramfs.Guest(root, b, size)
	if err != nil {
		t.Fatal(err)
	}
	return apply(t, s, tree)
}

func apply(t *testing.T, s Settings, tree initramfs.Tree) *Applied {
	t.Helper()
	a, err := s.Apply(t.Context(), tree, "/")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// drivers are the modules of the kernel's network card for QEMU, and the service
// that loads them: what is under test here is not how modules are found.
func drivers(t *testing.T, names ...string) ([]initramfs.Entry, Service) {
	t.Helper()
	kernel, _ := need.Kernel(t)
	lib := filepath.Join(filepath.Dir(filepath.Dir(kernel)), "lib", "modules")
	var files []initramfs.Entry
	command := "insmod"
	script := "#!/bin/busybox sh\n"
	for _, name := range names {
		found := ""
		_ = filepath.WalkDir(lib, func(p string, _ fs.DirEntry, _ error) error {
			if filepath.Base(p) == name+".ko" {
				found = p
			}
			return nil
		})
		b, err := os.ReadFile(found)
		if err != nil {
			t.Fatalf("the kernel has no module %s: %v", name, err)
		}
		files = append(files, text("lib/"+name+".ko", 0o644, b, "test"))
		script += command + " /lib/" + name + ".ko\n"
	}
	files = append(files, text("lib/drivers", 0o755, []byte(script), "test"))
	return files, Service{Command: "/lib/drivers", Action: "sysinit"}
}

func TestBootAllSettings(t *testing.T) {
	need.Tool(t, "ckbcomp", "console-setup")
	need.Tool(t, "loadkeys", "kbd")
	need.File(t, "/usr/share/zoneinfo/Asia/Kathmandu", "tzdata")
	load, early := drivers(t, "failover", "net_failover", "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_net")
	// In the place of the program that gives files their capabilities.
	load = append(load, text("etc/memlinux/filecaps", 0o755, []byte("#!/bin/busybox sh\ntouch /run/caps\necho no such file\nexit 1\n"), "test"))
	a := ours(t, Settings{
		Hostname: "kiosk.example.org", Keymap: "de", Timezone: "Asia/Kathmandu", DHCP: []string{AllLinks},
		Services: []Service{
			early,
			{Command: "echo first >>/run/order", Action: "sysinit"},
			{Command: "sh -c 'echo second >>/run/order'", Action: "wait"},
			{Command: "sleep 12345"},
			{Command: "sh -c 'while read line; do echo $line >>/run/typed; done'", Console: "tty1"},
		},
	}, load...)
	m := boot(t, a, 256, "-netdev", "user,id=n,net=192.168.77.0/24,dhcpstart=192.168.77.9", "-device", "virtio-net-pci,netdev=n")
	m.expect(`(?m)^memlinux: file capabilities are missing: no such file$`)
	m.expect(`(?m)^memlinux: ready build=0123456789abcdef ram=2[0-9]{2} MiB$`)
	m.expect(`memlinux:~# `)
	m.typed(`ls /run/caps; hostname; date -d @0 +%H:%M; xargs </run/order; ps | grep -c "sleep 1234[5]"; cat /etc/timezone`)
	m.expect(`(?m)^/run/caps\nkiosk\.example\.org\n05:30\nfirst second\n1\nAsia/Kathmandu$`)
	m.typed(`n=0; until grep -qs ^nameserver /etc/resolv.conf || [ $n = 50 ]; do sleep 1; n=$((n+1)); done; ip route | xargs; cat /etc/resolv.conf; ip -4 -o addr show dev eth0 | grep -o "inet [^ ]*"; ping -c1 192.168.77.2 | grep -o "1 packets received"`)
	m.expect(`(?m)^default via 192\.168\.77\.2 dev eth0 metric \d+ 192\.168\.77\.0/24 dev eth0 scope link src 192\.168\.77\.9\nnameserver 192\.168\.77\.3\ninet 192\.168\.77\.9/24\n1 packets received$`)
	// The keys Y and ;, on a German keyboard z and ö.
	m.press("y", "semicolon", "shift-7", "ret")
	m.typed(`n=0; until [ -s /run/typed ] || [ $n = 50 ]; do sleep 1; n=$((n+1)); done; cat /run/typed; ls -l /proc/[0-9]*/fd/0 2>/dev/null | grep -c "sh.*/dev/tty1$"`)
	m.expect(`(?m)^zö/$`)
	m.typed(`poweroff`)
	m.expectEnd()
}

func TestBootLogin(t *testing.T) {
	openssl := need.Tool(t, "openssl", "openssl")
	out, err := exec.Command(openssl, "passwd", "-6", "-salt", "saltsalt", "open sesame").Output()
	if err != nil {
		t.Fatal(err)
	}
	hash := strings.TrimSpace(string(out))
	m := boot(t, ours(t, Settings{RootPassword: &hash}), 256, noNIC...)
	m.expect(`memlinux: ready `)
	m.expect(`memlinux login: `)
	m.typed("root")
	m.expect(`Password: `)
	m.typed("wrong")
	m.expect(`(?s)Login incorrect.*memlinux login: `)
	m.typed("root")
	m.expect(`(?s)Login incorrect.*Password: `)
	m.typed("open sesame")
	m.expect(`memlinux:~# `)
	m.typed(`id -un; tty; echo $TERM; stat -c %a /etc/shadow; ps | grep -c "getty.*tty[1]"`)
	m.expect(`(?m)^root\n/dev/ttyS0\nvt102\n600\n1$`)
	m.typed(`poweroff`)
	m.expectEnd()
}

// A shell for whoever stands at the console would make the password void.
func TestBootLoginAlsoForRescue(t *testing.T) {
	hash := "$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/"
	a := ours(t, Settings{RootPassword: &hash})
	a.Words += " root=/dev/nothere rootwait=1"
	m := boot(t, a, 256, noNIC...)
	m.expect(`memlinux: root=/dev/nothere did not appear in 1 s`)
	m.expect(`memlinux login: `)
	m.never(`memlinux:~# `)
}

// incompressible is a file that takes as much room in the archive as in memory.
func incompressible(name string, mib int) initramfs.Entry {
	b := make([]byte, mib<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b) // never fails
	return text(name, 0o644, b, "test")
}

// needs is a with a boot entry that says how much memory the system needs.
func needs(mib int, a *Applied) *Applied {
	a.Words += fmt.Sprintf(" memlinux.ram=%d", mib)
	return a
}

func TestBootTooLittleMemory(t *testing.T) {
	big := incompressible("srv/big", 60)
	for _, tc := range []struct {
		name   string
		memory int
		tree   func() *Applied
		want   string
	}{
		{"busybox", 200, func() *Applied { return needs(300, ours(t, Settings{}, big)) },
			`this machine has 200 MiB of RAM and this system needs 300 MiB: only part of it was unpacked; add memory`},
		{"a guest", 200, func() *Applied {
			return needs(300, guest(t, Settings{}, initramfs.Tree{}.With(big)))
		}, `this machine has 200 MiB of RAM and this system needs 300 MiB: only part of it was unpacked; add memory`},
		{"not known how much", 200, func() *Applied { return ours(t, Settings{}, big) },
			`only part of this system was unpacked into this machine's 200 MiB of RAM; add memory`},
		{"enough, so that it must be the archive", 200, func() *Applied { return needs(100, ours(t, Settings{}, big)) },
			`only part of this system was unpacked, though it needs 100 MiB of RAM and this machine has 200 MiB: its initramfs is damaged; write it again`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := boot(t, tc.tree(), tc.memory, noNIC...)
			m.expect(`(?m)^memlinux: ` + regexp.QuoteMeta(tc.want) + `$`)
			m.expect(`(?m)^memlinux: Enter switches the machine off$`)
			m.never(`memlinux: ready|# $|Kernel panic`)
			// What comes before the line is opened is lost.
			for range 20 {
				m.typed("")
				select {
				case <-m.exited:
					return
				case <-time.After(time.Second):
				}
			}
			t.Error("Enter does not switch the machine off")
		})
	}
	t.Run("with enough memory it starts", func(t *testing.T) {
		m := boot(t, needs(300, ours(t, Settings{}, big)), 300, noNIC...)
		m.expect(`memlinux: ready `)
		m.expect(`memlinux:~# `)
		m.typed("poweroff")
		m.expectEnd()
	})
}

// A root with nothing but a shell, as the smallest images of containers are.
func TestBootGuestWithoutInit(t *testing.T) {
	b, size := busyboxFile(t)
	sh := initramfs.Entry{Path: "bin/sh", Mode: 0o755, Content: b, Size: size, Why: "test"}
	app := text("opt/app/run", 0o755, []byte("#!/bin/sh\necho \"app $* $(id -u):$(id -g) $PWD $GREETING $HOME\"\n{ read line || echo no input; env | cut -d= -f1 | sort | xargs; } >/tmp/app\n"), "test")
	m := boot(t, guest(t, Settings{
		Hostname: "tiny", Consoles: []string{"tty0", "ttyS0,115200"}, Services: []Service{{Command: "touch /run/service", Action: "sysinit"}},
		Guest: &Guest{Command: Command{Argv: []string{"run", "it's", "$HOME"}, Env: []string{"GREETING=hello world", "PATH=/opt/app:/bin"}, Dir: "/srv/work", User: "1001:7"}},
	}, initramfs.Tree{}.With(sh, app)), 256, noNIC...)
	m.expect(`(?m)^memlinux: ready build=0123456789abcdef ram=2[0-9]{2} MiB$`)
	m.expect(`~ ?# |memlinux:~# `)
	// It comes when it comes, also between the lines of what is typed.
	m.expect(`(?m)app it's \$HOME 1001:7 /srv/work hello world /$`)
	m.typed(`echo $(hostname) $0 $PATH; ls /bin /run/service; cat /proc/mounts | grep -c " / "; tty`)
	m.expect(`(?m)^tiny -(/bin/)?sh .*:/run/memlinux/bin\n/run/service\n\n/bin:\nsh\n1\n/dev/ttyS0$`)
	m.typed(`until grep -q SHLVL /tmp/app; do sleep 1; done; cat /tmp/app`)
	m.expect(`(?m)^no input\nGREETING HOME OLDPWD PATH PWD SHLVL$`)
	m.typed(`mkdir /mnt; mount -t tmpfs none /mnt && mkdir /mnt/old && cp /bin/sh /mnt && unshare -m sh -c 'mount --make-rprivate /; pivot_root /mnt /mnt/old && echo pivoted'; poweroff`)
	m.expect(`(?m)^pivoted$`)
	m.expectEnd()
}

// A root whose own init takes over, and whose /init is another program.
func TestBootGuestWithInit(t *testing.T) {
	b, size := busyboxFile(t)
	box := initramfs.Entry{Path: "bin/busybox", Mode: 0o755, Content: b, Size: size, Why: "test"}
	first := text("sbin/init", 0o755, []byte(`#!/bin/busybox sh
b=/bin/busybox
echo "the root's own init is $$ with $* $PATH"
$b grep -c " / " /proc/mounts
for d in dev proc sys run; do $b grep -q " /$d " /proc/mounts && echo "has /$d"; done
$b hostname
$b cat /init
$b poweroff -f
`), "test")
	m := boot(t, guest(t, Settings{Hostname: "own", Consoles: []string{"tty0", "ttyS0"}}, initramfs.Tree{}.With(box, first, file("init", "the image's own\n"))), 256, noNIC...)
	m.expectEnd()
	m.expect(`(?m)^memlinux: ready build=0123456789abcdef ram=2[0-9]{2} MiB\nthe root's own init is 1 with  /usr/local/sbin:.*:/bin:/run/memlinux/bin\n1\nhas /dev\nhas /proc\nhas /sys\nhas /run\nown\nthe image's own$`)
}

// debian is a root tree made by mmdebstrap, from the cache.
func debian(t *testing.T, include string) initramfs.Tree {
	t.Helper()
	mmdebstrap := need.Tool(t, "mmdebstrap", "mmdebstrap")
	file := filepath.Join(need.Cache(t), "bookworm-"+strings.ReplaceAll(include, ",", "-")+".tar")
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		if !need.All() {
			t.Skip("skipped: the test needs a root tree made by mmdebstrap; run make test")
		}
		need.Root(t)
		part := strings.TrimSuffix(file, ".tar") + ".part.tar"
		cmd := exec.CommandContext(t.Context(), mmdebstrap, "--quiet", "--mode=root", "--variant=minbase", "--include="+include,
			"--aptopt=Acquire::Languages \"none\"", "bookworm", part)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("mmdebstrap: %v: %s", err, out)
		}
		if err := os.Rename(part, file); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	tree, _, err := initramfs.FromTar(t.Context(), f, st.Size(), "Debian", initramfs.RefuseDuplicates)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func TestBootDebian(t *testing.T) {
	empty := ""
	for _, include := range []string{"systemd-sysv,dbus", "systemd-sysv,dbus,udev,kmod"} {
		t.Run(include, func(t *testing.T) {
			m := boot(t, guest(t, Settings{Hostname: "ramdebian", Timezone: "Asia/Kathmandu", RootPassword: &empty}, debian(t, include)), 2048, noNIC...)
			m.expect(`ramdebian login: `)
			m.expect(`(?m)^memlinux: ready build=0123456789abcdef ram=\d+ MiB$`)
			t.Logf("ready after %.1f s", time.Since(m.start).Seconds())
			m.typed("root")
			m.expect(`root@ramdebian:~# `)
			// No pager, and a terminal on which lines can be told apart.
			m.typed(`export SYSTEMD_PAGER=cat; exec env TERM=dumb bash --noediting`)
			m.expect(`--noediting\n.*root@ramdebian:~# $`)
			m.typed(`echo "$(systemctl is-system-running --wait), failed: $(systemctl --failed --no-legend --plain | wc -l)"`)
			m.expect(`(?s)\nrunning, failed: 0\n.*# $`)
			m.typed(`cat /proc/1/comm /etc/timezone; date -d @0 +%H:%M; which udhcpc`)
			m.expect(`systemd\nAsia/Kathmandu\n05:30\n/run/memlinux/bin/udhcpc\n.*# $`)
			// Units with a view of their own of the files, on a root that is rootfs.
			m.typed(`systemd-run -q --pipe -p PrivateTmp=yes -p ProtectSystem=strict sh -c 'touch /usr/x 2>/dev/null || echo sandboxed' </dev/null`)
			m.expect(`sandboxed\n.*# $`)
			m.typed(`poweroff`)
			m.expectEnd()
		})
	}
}
