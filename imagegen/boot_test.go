package imagegen

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// testSystem builds a system for the tests that boot one.
func testSystem(t *testing.T) *System {
	t.Helper()
	s, err := Generator{CacheDir: need.Cache(t)}.Build(t.Context(), testRecipe(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func testRecipe(t testing.TB) Recipe {
	t.Helper()
	image, config := need.Kernel(t)
	open := func(path string) *os.File {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	return Recipe{Kernel: KernelSource{File: open(image), Configs: map[string]io.ReaderAt{filepath.Base(config): open(config)}}}
}

// machine is a QEMU that boots a system directly, with its serial line.
type machine struct {
	t      *testing.T
	keys   io.Writer
	exited chan struct{}
	qmp    string

	mu   sync.Mutex
	log  bytes.Buffer
	more chan struct{} // closed and replaced as the log grows
}

// patience is for one step under TCG on a busy machine.
const patience = 60 * time.Second

func boot(t *testing.T, s *System, words string, args ...string) *machine {
	t.Helper()
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	m := &machine{t: t, exited: make(chan struct{}), more: make(chan struct{})}
	// Not t.TempDir: its name has what QEMU's options can't hold.
	dir, err := os.MkdirTemp("", "memlinux-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	m.qmp = filepath.Join(dir, "qmp")
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, qemu, append([]string{
		"-accel", "tcg", "-m", "256", "-display", "none", "-nic", "none", "-no-reboot", "-monitor", "none",
		"-serial", "stdio", "-qmp", "unix:" + m.qmp + ",server=on,wait=off",
		"-kernel", s.Kernel.Path, "-initrd", s.Initramfs.Path,
		"-append", s.Cmdline + " memlinux.build=" + s.ID + " " + words,
	}, args...)...)
	keys, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	m.keys = keys
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
		if t.Failed() {
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

func (m *machine) expectEnd() {
	m.t.Helper()
	select {
	case <-m.exited:
	case <-time.After(patience):
		m.t.Fatalf("the machine still runs after %s", patience)
	}
}

// execute runs one QMP command.
func (m *machine) execute(command string, arguments any) {
	m.t.Helper()
	c, err := net.Dial("unix", m.qmp)
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	call := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			m.t.Fatal(err)
		}
		if _, err := c.Write(append(b, '\n')); err != nil {
			m.t.Fatal(err)
		}
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				m.t.Fatal(err)
			}
			if strings.Contains(line, `"return"`) || strings.Contains(line, `"error"`) {
				return line
			}
		}
	}
	call(map[string]any{"execute": "qmp_capabilities"})
	if got := call(map[string]any{"execute": command, "arguments": arguments}); strings.Contains(got, `"error"`) {
		m.t.Fatal(got)
	}
}

// serialLast makes the serial line /dev/console, where the first process speaks.
const serialLast = "console=ttyS0,115200"

func TestBootStaysInMemory(t *testing.T) {
	s := testSystem(t)
	m := boot(t, s, "")
	m.expect(`Linux version ` + regexp.QuoteMeta(s.Manifest.Kernel.Release))
	m.expect(`(?m)^memlinux: ready build=` + s.ID + ` ram=2[0-9]{2} MiB$`)
	m.expect(`memlinux:~# `)
	m.typed(`echo answer $((6*7))`)
	m.expect(`(?m)^answer 42$`)
	// Job control: a background job is listed, and Ctrl-Z stops one in front.
	m.typed(`sleep 100 & jobs`)
	m.expect(`(?m)^\[1\]\+? +Running +sleep 100`)
	m.typed(`sleep 200`)
	time.Sleep(time.Second)
	if _, err := io.WriteString(m.keys, "\x1a"); err != nil {
		t.Fatal(err)
	}
	m.expect(`\[2\]\+ +Stopped +sleep 200`)
	m.typed(`whoami; tty; hostname`)
	m.expect(`(?m)^root\n/dev/ttyS0\nmemlinux$`)
	// The screen has the same line, no complaint of /init, and a shell of its own.
	m.typed(`grep -c "ready build=` + s.ID + `" /dev/vcs1; grep -cE "No such|can.t open|not found" /dev/vcs1; ls -l /proc/[0-9]*/fd/0 2>/dev/null | grep -c "/dev/tty1$"; stat -c %a:%F /dev/null /tmp /dev/ttyS0 | xargs`)
	m.expect(`(?m)^1\n0\n1\n666:character special file 1777:directory 620:character special file$`)
	if strings.Contains(m.text(), "can't access tty") {
		t.Error("the shell has no job control")
	}
	m.typed(`poweroff`)
	m.expectEnd()
}

func TestBootCtrlAltDelReboots(t *testing.T) {
	m := boot(t, testSystem(t), "root=/dev/ram0")
	m.expect(`memlinux: ready `)
	m.expect(`memlinux:~# `)
	key := func(name string) map[string]any { return map[string]any{"type": "qcode", "data": name} }
	m.execute("send-key", map[string]any{"keys": []any{key("ctrl"), key("alt"), key("delete")}})
	m.expectEnd() // -no-reboot makes a reboot an end
	if !strings.Contains(m.text(), "reboot: Restarting system") {
		t.Error("the machine ended without a reboot")
	}
}

func TestBootInitInMemory(t *testing.T) {
	m := boot(t, testSystem(t), "init=/bin/sh "+serialLast)
	m.expect(`memlinux: ready `)
	m.typed(`echo process $$; poweroff -f`)
	m.expect(`(?m)^process 1$`)
	m.expectEnd()
}

// rootDisk is an ext4 file system with a system that has busybox and an
// /sbin/init that tells what it finds. init's links are absolute, as Debian's
// to /lib/systemd/systemd.
func rootDisk(t *testing.T, extra ...string) string {
	t.Helper()
	mke2fs := need.Tool(t, "mke2fs", "e2fsprogs")
	busybox, err := os.ReadFile(need.File(t, "/bin/busybox", "busybox-static"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	for _, d := range []string{"bin", "usr/lib/init", "usr/sbin", "dev", "proc", "sys", "run"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script := `#!/bin/busybox sh
b=/bin/busybox
echo "the real init is $$ with $*"
$b grep -q '^/dev/[a-z0-9]* / ext4 ro' /proc/mounts && echo root is read-only
for d in dev proc sys run; do $b grep -q " /$d " /proc/mounts && echo "has /$d"; done
read -r level rest </proc/sys/kernel/printk
echo "level $level"
$b poweroff -f
`
	for path, content := range map[string][]byte{"bin/busybox": busybox, "usr/lib/init/first": []byte(script)} {
		if err := os.WriteFile(filepath.Join(tree, path), content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"lib": "/usr/lib", "sbin": "usr/sbin", "usr/sbin/init": "/lib/init/first"} {
		if err := os.Symlink(to, filepath.Join(tree, link)); err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(dir, "disk.img")
	args := append([]string{"-q", "-t", "ext4", "-U", "6b0f0c1e-0d2a-4b7e-9a53-0c6a5a8f0001", "-L", "rootdisk", "-d", tree}, extra...)
	if out, err := exec.Command(mke2fs, append(args, disk, "16M")...).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	return disk
}

func nvme(disk string) []string {
	return []string{"-drive", "if=none,id=d,format=raw,snapshot=on,file=" + disk, "-device", "nvme,drive=d,serial=root"}
}

// partitioned is a disk with the given partition table of sfdisk, whose second
// partition, of 16 MiB, holds fs.
func partitioned(t *testing.T, table, fs string) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "partitioned.img")
	sfdisk := exec.Command(need.Tool(t, "sfdisk", "fdisk"), "--quiet", disk)
	sfdisk.Stdin = strings.NewReader(table)
	b, err := os.ReadFile(fs)
	if err == nil {
		err = os.WriteFile(disk, make([]byte, 20<<20), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := sfdisk.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 2<<20); err != nil {
		t.Fatal(err)
	}
	return disk
}

func TestBootSwitchesRoot(t *testing.T) {
	s := testSystem(t)
	whole := rootDisk(t)
	mbr := partitioned(t, "label: dos\nlabel-id: 0x0badcafe\nstart=2048, size=2048, type=83\nstart=4096, size=32768, type=83\n", whole)
	gpt := partitioned(t, "label: gpt\nstart=2048, size=2048\nstart=4096, size=32768, uuid=D80C1329-E48D-4043-9077-1098EFA30167, name=the-root\n", whole)
	for _, c := range []struct{ root, disk, device string }{
		{"/dev/nvme0n1", whole, "nvme0n1"},
		{"UUID=6b0f0c1e-0d2a-4b7e-9a53-0c6a5a8f0001", whole, "nvme0n1"},
		{"PARTUUID=0BADCAFE-02", mbr, "nvme0n1p2"},
		{"PARTUUID=d80c1329-e48d-4043-9077-1098efa30167", gpt, "nvme0n1p2"},
		{"PARTLABEL=the-root", gpt, "nvme0n1p2"},
	} {
		t.Run(strings.ReplaceAll(c.root, "/", "_"), func(t *testing.T) {
			m := boot(t, s, "root="+c.root+" "+serialLast+" single", nvme(c.disk)...)
			m.expect(`(?m)^memlinux: starting /sbin/init on /dev/` + c.device + `$`)
			m.expectEnd()
			// Each by itself: the kernel talks in between.
			for _, line := range []string{"the real init is 1 with single", "root is read-only", "has /dev", "has /proc", "has /sys", "has /run", "level [2-7]"} {
				m.expect(`(?m)^` + line + `$`)
			}
			if strings.Contains(m.text(), "memlinux: ready") {
				t.Error("the ready line came though the system left memory")
			}
		})
	}
}

func TestBootSaysWhyRootFails(t *testing.T) {
	s := testSystem(t)
	disk := rootDisk(t)
	blank := filepath.Join(t.TempDir(), "blank.img")
	if err := os.WriteFile(blank, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, words, disk, why string
	}{
		{"a device that never comes: the wait is bounded", "root=/dev/nothere rootwait=2", blank, `root=/dev/nothere did not appear in 2 s; block devices here: nvme0n1`},
		{"no file system", "root=/dev/nvme0n1", blank, `root=/dev/nvme0n1 could not be mounted (has it a file system that this kernel knows?): mount: `},
		{"no such init", "root=LABEL=rootdisk init=/sbin/nothere", disk, `root=LABEL=rootdisk has no executable /sbin/nothere`},
		{"no device at all", "root=nfs:/x", blank, `root=nfs:/x is not a device: use /dev/NAME, `},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := boot(t, s, tc.words, nvme(tc.disk)...)
			m.expect(`(?m)^memlinux: ` + regexp.QuoteMeta(tc.why))
			m.expect(`memlinux:~# `)
			m.typed(`echo $((6*7)) $(grep -c "memlinux: root=" /dev/vcs1); grep -c " /newroot " /proc/mounts; poweroff`)
			m.expect(`(?m)^42 1\n0$`)
			m.expectEnd()
			if strings.Contains(m.text(), "memlinux: ready") {
				t.Error("the ready line came though root= failed")
			}
		})
	}
}

// modularSystem is a system of Debian's generic kernel, which has nearly all of
// its drivers as modules.
func modularSystem(t *testing.T, modules ...string) *System {
	t.Helper()
	if !need.All() {
		t.Skip("skipped: the test needs Debian's linux-image-amd64, which is large; run make test")
	}
	need.Tool(t, "apt-get", "apt")
	s, err := Generator{CacheDir: need.Cache(t)}.Build(t.Context(), Recipe{Kernel: KernelSource{Debian: "linux-image-amd64"}, Modules: modules}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Warnings) > 0 {
		t.Errorf("warnings: %q", s.Warnings)
	}
	return s
}

// Drivers must come by themselves for what is there at boot, for what is plugged
// in later, and for what is asked for by name: file systems and loop devices.
func TestBootLoadsModules(t *testing.T) {
	s := modularSystem(t, "all")
	vfat := filepath.Join(t.TempDir(), "vfat.img")
	if out, err := exec.Command(need.Tool(t, "mkfs.vfat", "dosfstools"), "-C", vfat, "8192").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.vfat: %v: %s", err, out)
	}
	disk := rootDisk(t)
	m := boot(t, s, "", "-machine", "q35", "-m", "512", "-device", "qemu-xhci,id=xhci", "-device", "usb-kbd",
		"-drive", "if=virtio,format=raw,snapshot=on,file="+vfat,
		"-drive", "if=none,id=stick,format=raw,snapshot=on,file="+disk,
		"-netdev", "user,id=a,restrict=on", "-device", "e1000e,netdev=a", "-netdev", "user,id=b,restrict=on", "-device", "virtio-net-pci,netdev=b")
	m.expect(`memlinux:~# `)
	m.typed(`n=0; until grep -q "USB Keyboard" /proc/bus/input/devices || [ $n = 100 ]; do sleep 0.1; n=$((n+1)); done; for m in xhci_pci usbhid hid_generic e1000e virtio_net; do grep -c "^$m " /proc/modules; done | xargs; grep -c "QEMU USB Keyboard" /proc/bus/input/devices; ls /sys/class/net | xargs`)
	m.expect(`(?m)^1 1 1 1 1\n1\neth0 eth1 lo$`)
	m.typed(`mkdir /mnt; mount /dev/vda /mnt && echo hello >/mnt/a && grep -c "^/dev/vda /mnt vfat " /proc/mounts; losetup -f; stat -c %a /dev/vda`)
	m.expect(`(?m)^1\n/dev/loop0\n660$`)
	m.execute("device_add", map[string]any{"driver": "usb-storage", "drive": "stick", "bus": "xhci.0", "serial": "late"})
	m.typed(`n=0; until [ -b /dev/sda ] || [ $n = 200 ]; do sleep 0.1; n=$((n+1)); done; umount /mnt; mount -o ro /dev/sda /mnt; ls /mnt/bin; grep -c "^/dev/sda /mnt ext4 " /proc/mounts`)
	m.expect(`(?m)^busybox\n1$`)
	m.typed(`poweroff`)
	m.expectEnd()
}

func TestBootSwitchesRootByModules(t *testing.T) {
	s := modularSystem(t)
	disk := rootDisk(t)
	for _, tc := range []struct {
		name, on string
		device   []string
	}{
		{"a USB stick", "sda", []string{"-device", "qemu-xhci", "-device", "usb-storage,drive=d"}},
		{"a USB disk with UAS", "sda", []string{"-device", "qemu-xhci", "-device", "usb-uas,id=u", "-device", "scsi-hd,bus=u.0,drive=d"}},
		{"SATA", "sda", []string{"-device", "ich9-ahci,id=s", "-device", "ide-hd,bus=s.0,drive=d"}},
		{"NVMe", "nvme0n1", []string{"-device", "nvme,drive=d,serial=root"}},
		{"virtio", "vda", []string{"-device", "virtio-blk-pci,drive=d"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			args := append([]string{"-machine", "q35", "-nodefaults", "-m", "512", "-drive", "if=none,id=d,format=raw,snapshot=on,file=" + disk}, tc.device...)
			m := boot(t, s, "root=UUID=6b0f0c1e-0d2a-4b7e-9a53-0c6a5a8f0001 "+serialLast+" single", args...)
			m.expect(`(?m)^memlinux: starting /sbin/init on /dev/` + tc.on + `$`)
			m.expectEnd()
			for _, line := range []string{"the real init is 1 with single", "root is read-only", "has /dev", "has /proc", "has /sys", "has /run"} {
				m.expect(`(?m)^` + line + `$`)
			}
		})
	}
}

// intelUpdate is an update of microcode as Intel's manual has it (SDM vol. 3A,
// 10.11.1), of zeros and for no processor there is.
func intelUpdate() []byte {
	b := make([]byte, 2048)
	for i, v := range []uint32{1, 0x77, 0x01022020, 0x000906ea, 0, 1, 0x22, 2000, 2048} {
		binary.LittleEndian.PutUint32(b[4*i:], v)
	}
	sum := uint32(0)
	for i := 0; i < len(b); i += 4 {
		sum += binary.LittleEndian.Uint32(b[i:])
	}
	binary.LittleEndian.PutUint32(b[16:], -sum)
	return b
}

func TestBootWithMicrocode(t *testing.T) {
	root := t.TempDir()
	// As Debian has it: one folder by two names.
	ucode := filepath.Join(root, "usr/lib/firmware/intel-ucode/06-9e-0a")
	if err := os.Symlink("usr/lib", filepath.Join(root, "lib")); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(ucode), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(ucode, intelUpdate(), 0o600); err != nil {
		t.Fatal(err)
	}
	r := testRecipe(t)
	r.Microcode = "all"
	box, err := os.Open(need.File(t, "/bin/busybox", "busybox-static"))
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	r.Busybox.File = box
	s, err := Generator{CacheDir: need.Cache(t), Root: root}.Build(t.Context(), r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if u := s.Manifest.Microcode.Updates; len(u) != 1 || u[0].Revision != "00000077" || s.Manifest.Microcode.Size == 0 {
		t.Errorf("the manifest has %+v", s.Manifest.Microcode)
	}
	if _, err := s.Manifest.Explain("/"); err != nil {
		t.Error(err)
	}
	m := boot(t, s, "")
	m.expect(`(?m)^memlinux: ready `)
	m.expect(`memlinux:~# `)
	m.typed("ls -d /kernel || echo $((40+2)) gone")
	m.expect(`(?m)^42 gone$`)
	m.typed("poweroff")
	<-m.exited
}
