package local

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// legacyPackage is where Debian's grub-legacy lies: it can't be installed beside
// GRUB 2.
func legacyPackage(t *testing.T) string {
	t.Helper()
	return filepath.Join(need.Package(t, "grub-legacy"), "usr/lib/grub/x86_64-pc")
}

func legacyRun(t *testing.T, in string, argv ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	cmd.Dir = in
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return out
}

// legacyDisk is a disk of a PC with a BIOS and real GRUB Legacy 0.97, whose one
// ext3 partition is filled from tree.
type legacyDisk struct{ tree, image string }

const (
	legacyStart = 1 << 20
	legacySize  = 64 << 20
	saysLegacy  = "old=legacy"
)

// legacyPC makes the tree of a PC with that menu. Its kernels find no init,
// panic and reboot.
func legacyPC(t *testing.T, menu string, saved []byte) (legacyDisk, *legacy) {
	t.Helper()
	dir := t.TempDir()
	d := legacyDisk{filepath.Join(dir, "root"), filepath.Join(dir, "disk.img")}
	grub := filepath.Join(d.tree, "boot/grub")
	payload := filepath.Join(d.tree, "boot/memlinux")
	for _, dir := range []string{grub, payload} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	stage2, err := os.ReadFile(filepath.Join(legacyPackage(t), "stage2"))
	if err != nil {
		t.Fatal(err)
	}
	copy(stage2[0x217:], "/boot/grub/menu.lst\x00")
	image, _ := need.SmallKernel(t)
	kernel, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	empty := []byte("070701" + strings.Repeat("0", 8*11) + "0000000B" + "00000000" + "TRAILER!!!\x00\x00\x00\x00")
	for path, data := range map[string][]byte{
		filepath.Join(grub, "stage2"):                   stage2,
		filepath.Join(grub, "menu.lst"):                 []byte(menu),
		filepath.Join(grub, "default"):                  saved,
		filepath.Join(d.tree, "boot/vmlinuz"):           kernel,
		filepath.Join(payload, legacyQEMUEntry.Kernel):  kernel,
		filepath.Join(payload, legacyQEMUEntry.Initrd):  empty,
		filepath.Join(d.tree, "boot/initrd-of-nothing"): empty,
	} {
		if data == nil {
			continue
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l, err := newLegacy(&Boot{Dir: payload, Volume: Volume{MountPoint: d.tree, Root: "/", Type: "ext3", Device: "sda1"}},
		filepath.Join(grub, "menu.lst"), "hd0", 1)
	if err != nil {
		t.Fatal(err)
	}
	return d, l.(*legacy)
}

// make makes the disk anew from the tree, as GRUB's own setup would leave it.
func (d legacyDisk) make(t *testing.T) {
	t.Helper()
	legacyRun(t, "", need.Tool(t, "mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext3", "-I", "128", "-O", "^resize_inode,^dir_index,^large_file",
		"-d", d.tree, "-E", fmt.Sprintf("offset=%d,root_owner=0:0", legacyStart), d.image, fmt.Sprintf("%dk", (legacySize-legacyStart)>>10))
	from := legacyPackage(t)
	stage1, err := os.ReadFile(filepath.Join(from, "stage1"))
	if err != nil {
		t.Fatal(err)
	}
	core, err := os.ReadFile(filepath.Join(from, "e2fs_stage1_5"))
	if err != nil {
		t.Fatal(err)
	}
	core = append(core, make([]byte, 511-(len(core)-1)%512)...)
	le := binary.LittleEndian
	le.PutUint16(stage1[0x42:], 0x2000)
	le.PutUint32(stage1[0x44:], 1)
	le.PutUint16(stage1[0x48:], 0x200)
	stage1[0x4b], stage1[0x4c] = 0x90, 0x90
	clear(stage1[0x1b8:0x1fe])
	stage1[0x1be], stage1[0x1c2] = 0x80, 0x83
	le.PutUint32(stage1[0x1c6:], legacyStart/512)
	le.PutUint32(stage1[0x1ca:], (legacySize-legacyStart)/512)
	le.PutUint32(core[0x1f8:], 2)
	le.PutUint16(core[0x1fc:], uint16(len(core)/512-1))
	le.PutUint16(core[0x1fe:], 0x220)
	copy(core[0x217:], "\xff\xff\x00\xff/boot/grub/stage2 /boot/grub/menu.lst\x00")
	f, err := os.OpenFile(d.image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at, data := range map[int64][]byte{0: stage1, 512: core} {
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
}

// boots starts the PC and waits until as many kernels have said their command
// lines on the serial console, which must have those in it, in this order. It
// returns what stood there.
func (d legacyDisk) boots(t *testing.T, want ...string) string {
	t.Helper()
	var got []string
	log := console(t, 400*time.Second, func(log string) bool {
		got = nil
		for line := range strings.Lines(log) {
			if _, cmdline, ok := strings.Cut(line, "] Command line: "); ok && strings.HasSuffix(line, "\n") {
				got = append(got, strings.TrimSpace(cmdline))
			}
		}
		return len(got) >= len(want)
	}, "-m", "256", "-drive", "if=ide,format=raw,file="+d.image)
	if len(got) < len(want) {
		t.Fatalf("%d boots of %d:\n%s", len(got), len(want), log)
	}
	for i := range want {
		if !strings.Contains(got[i], want[i]) {
			t.Fatalf("boot %d has the command line %q, not %q", i+1, got[i], want[i])
		}
	}
	return log
}

// takeBack puts a file of the disk, as GRUB left it, into the tree.
func (d legacyDisk) takeBack(t *testing.T, name string) {
	t.Helper()
	part := filepath.Join(t.TempDir(), "part")
	image, err := os.ReadFile(d.image)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(part, image[legacyStart:], 0o600); err != nil {
		t.Fatal(err)
	}
	data := legacyRun(t, "", need.Tool(t, "debugfs", "e2fsprogs"), "-R", "cat /"+name, part)
	if err := os.WriteFile(filepath.Join(d.tree, name), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

var legacyQEMUEntry = Entry{ID: "0123456789abcdef", Title: `It's a "test" & more; #1`, Kernel: "vmlinuz-aa", Initrd: "initramfs-bb.img",
	Cmdline: "console=ttyS0,115200 panic=-1 x=$root y=${z};a|b&c <d> (e) #f *? memlinux.build=0123456789abcdef"}

// legacyQEMUMenu has an entry that GRUB skips, and boots the one behind it.
const legacyQEMUMenu = "# menu.lst\r\nserial --unit=0 --speed=115200\nterminal --timeout=1 serial console\ndefault\t\t1\ntimeout\t\t1\n\n" +
	"title\t\tnot this\nroot (hd0,0)\nkernel /boot/vmlinuz console=ttyS0,115200 panic=-1 old=wrong\n\n" +
	"title skipped\nno such command\n\n" +
	"title\t\told\nroot\t\t(hd0,0)\nkernel\t\t/boot/vmlinuz console=ttyS0,115200 panic=-1 " + saysLegacy + "\ninitrd /boot/initrd-of-nothing"

func TestLegacyBootsOnce(t *testing.T) {
	tests := []struct {
		name, menu string
		saved      []byte
	}{
		{"no file default", legacyQEMUMenu, nil},
		{"default saved", strings.Replace(legacyQEMUMenu, "default\t\t1", "default\t\tsaved", 1), []byte("1\n" + savedTail)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d, l := legacyPC(t, test.menu, test.saved)
			if l.uuid {
				t.Error("Debian's stage2 has no command uuid")
			}
			want := Ours{Entries: []Entry{legacyQEMUEntry}, Next: legacyQEMUEntry.ID}
			l.set(t, want)
			d.make(t)
			d.boots(t, legacyQEMUEntry.Cmdline, saysLegacy, saysLegacy)
			d.takeBack(t, "boot/grub/default")
			if saved := l.files(t).saved; !bytes.HasPrefix(saved, savedHead(1, 0)) {
				t.Errorf("GRUB saved %q", saved)
			}
			m, err := l.Menu()
			if err != nil || m.Ours.Next != "" || !m.Others[1].Default || len(m.Warnings) != 2 {
				t.Errorf("%+v, %v", m, err)
			}
			l.set(t, Ours{Entries: want.Entries})
			l.set(t, Ours{})
			if f := l.files(t); string(f.menu) != test.menu || !bytes.Equal(f.saved, test.saved) {
				t.Errorf("in the end %q and %q", f.menu, f.saved)
			}
		})
	}
}

// TestLegacyBootsDefault proves how GRUB counts, and the copy that Once makes
// of a menu that would wait.
func TestLegacyBootsDefault(t *testing.T) {
	waiting := strings.NewReplacer("terminal --timeout=1", "terminal", "timeout\t\t1", "timeout\t\t1000\npassword x", "old\nroot", "old\nlock\nroot").Replace(legacyQEMUMenu)
	d, l := legacyPC(t, waiting, nil)
	l.set(t, Ours{Entries: []Entry{legacyQEMUEntry}})
	once, err := l.Once(legacyQEMUEntry.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.menu, once.Files[0].New, 0o644); err != nil {
		t.Fatal(err)
	}
	d.make(t)
	d.boots(t, legacyQEMUEntry.Cmdline)

	if err := os.WriteFile(l.menu, []byte(legacyQEMUMenu), 0o644); err != nil {
		t.Fatal(err)
	}
	l.set(t, Ours{Entries: []Entry{legacyQEMUEntry}, Default: legacyQEMUEntry.ID})
	d.make(t)
	if log := d.boots(t, legacyQEMUEntry.Cmdline, legacyQEMUEntry.Cmdline); !strings.Contains(log, legacyQEMUEntry.Title) {
		t.Errorf("the menu does not show %q:\n%s", legacyQEMUEntry.Title, log)
	}
}

// TestLegacyBootsDefaultWithABlank proves that GRUB does not take "saved " for saved.
func TestLegacyBootsDefaultWithABlank(t *testing.T) {
	d, l := legacyPC(t, strings.Replace(legacyQEMUMenu, "default\t\t1", "default\t\tsaved ", 1), []byte("1\n"+savedTail))
	if m, err := l.Menu(); err != nil || !m.Others[0].Default {
		t.Errorf("%+v, %v", m, err)
	}
	d.make(t)
	d.boots(t, "old=wrong")
}
