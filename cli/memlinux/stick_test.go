package main

import (
	"bytes"
	"fmt"
	"io"
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

// One image, looked at by other people's tools, by memlinux, damaged, and run.
func TestStick(t *testing.T) {
	w := newWorld(t)
	img := w.path("stick.img")
	w.run("write", "--no-boot-test", img).wants(t, 0)
	w.holds("stick.img")
	before := digest(t, img)

	t.Run("others read it", func(t *testing.T) {
		if out := sh(t, need.Tool(t, "sgdisk", "gdisk"), "-v", img); !strings.Contains(out, "No problems found") {
			t.Error(out)
		}
		menu := sh(t, need.Tool(t, "mtype", "mtools"), "-i", img+"@@1M", "::/boot/grub/menu.lst")
		if !strings.Contains(menu, "kernel /boot/vmlinuz ") || !strings.Contains(menu, "uuid "+volumeID(t, img)) {
			t.Error(menu)
		}
		info, err := os.Stat(img)
		if err != nil {
			t.Fatal(err)
		}
		volume := w.path("state/volume")
		sh(t, "dd", "if="+img, "of="+volume, "bs=1M", "skip=1", fmt.Sprint("count=", info.Size()>>20-2), "status=none")
		sh(t, need.Tool(t, "fsck.vfat", "dosfstools"), "-n", volume)
	})
	t.Run("verify", func(t *testing.T) {
		w.run("verify", "--no-boot-test", img).wants(t, 0)
	})
	read := func(path string) []byte {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	taken := func(path string) []byte { // from the stick
		t.Helper()
		to := w.path("state/taken")
		sh(t, need.Tool(t, "mcopy", "mtools"), "-n", "-o", "-i", img+"@@1M", "::"+path, to)
		return read(to)
	}
	whole, packed, loader := read(img), taken("/boot/initramfs.img"), taken("/EFI/BOOT/BOOTX64.EFI")
	// The last bit of the first place that holds what is looked for is another.
	damage := func(find string) (path string) {
		t.Helper()
		b := bytes.Clone(whole)
		i := bytes.Index(b, []byte(find))
		if i < 0 {
			t.Fatalf("no %q in the image", find)
		}
		b[i+len(find)-1] ^= 1
		path = w.path("state/damaged.img")
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, c := range []struct {
		name, find, says string
	}{
		{"a flipped bit in GRUB's boot code", string(whole[:128]), "the boot loader for BIOS is not what was written"},
		{"a flipped bit in GRUB's core image", string(whole[34*512 : 34*512+8192]), "the boot loader for BIOS is not what was written"},
		{"a flipped bit in GRUB for UEFI", string(loader[:8192]), "the boot loader for UEFI is not what was written"},
		{"a flipped bit in the initramfs", string(packed[:512]), "boot/initramfs.img is not what was written"},
		{"another command line in the menu", "console=ttyS0,115200 console=tty0 memlinux.build", "menu.lst has the command line"},
		{"a broken partition table", "EFI PART\x00\x00\x01\x00", "partition table"},
	} {
		t.Run("verify: "+c.name, func(t *testing.T) {
			w.run("verify", "--no-boot-test", damage(c.find)).wants(t, 5, c.says)
		})
	}
	t.Run("verify: a stick of a memlinux that kept no digests of boot loaders", func(t *testing.T) {
		o := w.run("verify", "--no-boot-test", damage(`"loaders`))
		if o.wants(t, 0); !strings.Contains(o.stdout, "boot loaders were compared with nothing") {
			t.Error(o.stdout)
		}
	})
	for _, c := range []struct {
		name, key, says string
	}{
		{"a system that is said to be very large", "unpacked", "unpacks to 999999999999, which can't be"},
		{"a system that is said to need much memory", "uefi_mib", "needs 999999999999 MiB of memory with UEFI"},
	} {
		t.Run("verify: "+c.name, func(t *testing.T) {
			changed, manifest := w.path("state/changed.img"), w.path("state/manifest.json")
			sh(t, "cp", img, changed)
			sh(t, "mcopy", "-n", "-o", "-i", img+"@@1M", "::/boot/manifest.json", manifest)
			text, err := os.ReadFile(manifest)
			if err != nil {
				t.Fatal(err)
			}
			number := regexp.MustCompile(`("` + c.key + `": )\d+`)
			if err := os.WriteFile(manifest, number.ReplaceAll(text, []byte("${1}999999999999")), 0o644); err != nil {
				t.Fatal(err)
			}
			sh(t, "mcopy", "-o", "-i", changed+"@@1M", manifest, "::/boot/manifest.json")
			w.run("verify", "--no-boot-test", changed).wants(t, 5, c.says)
		})
	}
	t.Run("verify: not a stick", func(t *testing.T) {
		empty := w.path("state/empty.img")
		if err := os.WriteFile(empty, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(empty, 64<<20); err != nil {
			t.Fatal(err)
		}
		w.run("verify", "--no-boot-test", empty).wants(t, 5)
		w.run("verify", w.path("none.img")).wants(t, 2, "none.img does not exist")
	})
	t.Run("each stick has a volume ID of its own", func(t *testing.T) {
		w.run("write", "--no-boot-test", "--force", w.path("state/second.img")).wants(t, 0)
		if a, b := volumeID(t, img), volumeID(t, w.path("state/second.img")); a == b {
			t.Errorf("both have %s", a)
		}
	})
	t.Run("--force replaces a file", func(t *testing.T) {
		f := w.file("state/old.img", "old")
		w.run("write", "--no-boot-test", "--force", "--size", "64MiB", f).wants(t, 0)
		if info, err := os.Stat(f); err != nil || info.Size() != 64<<20 {
			t.Errorf("%v, %v", info.Size(), err)
		}
	})

	t.Run("vm", func(t *testing.T) {
		c := w.console(t, "vm", img)
		c.expect("memlinux: ready build=")
		c.expect("memlinux:~# ")
		c.typed("echo sum $((6*7))\r")
		c.expect("\nsum 42")
		c.typed("poweroff\r")
		c.ends(0)
	})
	t.Run("vm: Ctrl-A X leaves", func(t *testing.T) {
		c := w.console(t, "vm", img)
		c.expect("Booting")
		c.typed("\x01x")
		c.ends(0)
	})
	t.Run("vm: a folder as a disc, read by GRUB under UEFI", func(t *testing.T) {
		data := w.path("state/payload")
		if err := os.MkdirAll(filepath.Join(data, "folder"), 0o755); err != nil {
			t.Fatal(err)
		}
		w.file("state/payload/folder/hello.txt", "greetings from the disc\n")
		// On a machine where nothing was ever built.
		w.env = []string{"MEMLINUX_CACHE_DIR=" + w.path("state/fresh")}
		defer func() { w.env = nil }()
		c := w.console(t, "vm", "--firmware", "uefi", "--data", data, img)
		c.expect("memlinux, Linux")
		c.typed("c")
		c.expect("grub>")
		// One by one: OVMF and GRUB both read the serial line, and what
		// comes at once reaches the prompt out of order.
		for _, key := range "cat (cd0)/folder/hello.txt\r" {
			c.typed(string(key))
			time.Sleep(300 * time.Millisecond)
		}
		// GRUB says it on both of its consoles, which are one line here.
		c.expect("ggrreeeettiinnggss  ffrroomm  tthhee  ddiisscc")
		c.typed("\x01x")
		c.ends(0)
	})
	t.Run("vm: a kernel directly", func(t *testing.T) {
		out := w.path("state/out")
		w.run("build", "-o", out).wants(t, 0)
		c := w.console(t, "vm", "--kernel", filepath.Join(out, "vmlinuz"), "--initrd", filepath.Join(out, "initramfs.img"), "--append", "console=ttyS0 memlinux.build=mine")
		c.expect("memlinux: ready build=mine")
		c.expect("memlinux:~# ")
		c.typed("poweroff\r")
		c.ends(0)
	})
	t.Run("vm: a name that a disc can't hold", func(t *testing.T) {
		data := w.path("state/bad")
		if err := os.MkdirAll(data, 0o755); err != nil {
			t.Fatal(err)
		}
		w.file("state/bad/Upper Case", "x")
		w.run("vm", "--data", data, img).wants(t, 1, "Upper Case")
	})
	if digest(t, img) != before {
		t.Error("looking at the image and running it changed it")
	}
}

func volumeID(t *testing.T, img string) string {
	t.Helper()
	out := sh(t, "mdir", "-i", img+"@@1M", "::/")
	_, rest, _ := strings.Cut(out, "Serial Number is ")
	id, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(id)
}

// console is a running memlinux vm.
type console struct {
	t    *testing.T
	cmd  *exec.Cmd
	keys io.WriteCloser

	mu   sync.Mutex
	text bytes.Buffer
	seen int // what was expected lies before
}

func (w *world) console(t *testing.T, args ...string) *console {
	t.Helper()
	c := &console{t: t, cmd: w.command(args...)}
	keys, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.keys = keys
	c.cmd.Stdout = c
	c.cmd.Stderr = c
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			c.cmd.Process.Kill()
			c.cmd.Wait()
		}
	})
	return c
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(p)
}

// expect waits until the machine says the text, behind what was seen before.
func (c *console) expect(text string) {
	c.t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		c.mu.Lock()
		all := c.text.Bytes()
		i := bytes.Index(all[c.seen:], []byte(text))
		if i >= 0 {
			c.seen += i + len(text)
			c.mu.Unlock()
			return
		}
		last := string(all[max(len(all)-800, 0):])
		c.mu.Unlock()
		if time.Now().After(deadline) {
			c.t.Fatalf("it never said %q; last: %q", text, last)
		}
	}
}

func (c *console) typed(keys string) {
	c.t.Helper()
	if _, err := io.WriteString(c.keys, keys); err != nil {
		c.t.Fatal(err)
	}
}

func (c *console) ends(code int) {
	c.t.Helper()
	stuck := time.AfterFunc(time.Minute, func() { c.cmd.Process.Kill() })
	defer stuck.Stop()
	c.cmd.Wait()
	if got := c.cmd.ProcessState.ExitCode(); got != code {
		c.t.Errorf("exit %d, want %d: %s", got, code, c.text.String()[max(c.text.Len()-400, 0):])
	}
}
