package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/pc"
)

// local is a world whose /boot, in a mount namespace of its own, is that of a
// PC's disk: what memlinux does to this PC's boot menu it does to that one's,
// and its proof boots that disk.
type local struct {
	*world
	pc     *pc.PC
	holder string // a process that keeps the namespace
	boot   string // its /boot, from outside of the namespace
}

func newLocal(t *testing.T, spec pc.Spec) *local {
	t.Helper()
	w := newWorld(t)
	spec.Kernel, spec.Config = need.SmallKernel(t)
	p := pc.Bare(t, spec)
	device := p.Attach(t)
	part, bind := p.Root, "/boot"
	if p.Boot.Number != 0 {
		part, bind = p.Boot, ""
	}
	disk := w.path("state/mnt")
	w.folder("state/mnt")
	script := fmt.Sprintf("mount -o noatime %sp%d %s; mount --bind %s%s /boot", device, part.Number, disk, disk, bind)
	if p.Firmware == "uefi" {
		// The variables that the firmware of that PC would show.
		script += "; mount -t tmpfs none /sys/firmware; mkdir -p /sys/firmware/efi; cp -r " + efivars(t, w, p.ESP) + " /sys/firmware/efi/"
	}
	cmd := exec.Command("sh", "-ec", script+"; echo mounted; exec sleep infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if line, err := io.ReadAll(io.LimitReader(out, int64(len("mounted\n")))); err != nil || string(line) != "mounted\n" {
		t.Fatalf("mount: %q, %v", line, err)
	}
	l := &local{world: w, pc: p, holder: strconv.Itoa(cmd.Process.Pid)}
	l.boot = "/proc/" + l.holder + "/root/boot"
	return l
}

// efivars makes a folder of EFI variables that says that the firmware started
// GRUB from the partition (UEFI 2.10 §3.1.3 and §10.3.5; each begins with its
// attributes, as efivarfs has it).
func efivars(t *testing.T, w *world, esp pc.Partition) string {
	t.Helper()
	words := func(s string) (b []byte) {
		for _, c := range utf16.Encode([]rune(s + "\x00")) {
			b = binary.LittleEndian.AppendUint16(b, c)
		}
		return b
	}
	guid, err := hex.DecodeString(strings.ReplaceAll(esp.PartUUID, "-", ""))
	if err != nil || len(guid) != 16 {
		t.Fatalf("partition UUID %q: %v", esp.PartUUID, err)
	}
	slices.Reverse(guid[:4])
	slices.Reverse(guid[4:6])
	slices.Reverse(guid[6:8])
	le := binary.LittleEndian
	node := func(kind, subtype byte, data []byte) []byte {
		return append(le.AppendUint16([]byte{kind, subtype}, uint16(4+len(data))), data...)
	}
	drive := le.AppendUint32(nil, uint32(esp.Number))
	drive = le.AppendUint64(drive, uint64(esp.Start/512))
	drive = le.AppendUint64(drive, uint64(esp.Size/512))
	drive = append(append(drive, guid...), 2, 2)
	path := slices.Concat(node(2, 1, []byte{0xd0, 0x41, 3, 0x0a, 0, 0, 0, 0}), // PciRoot(0): of this PC only
		node(4, 1, drive), node(4, 4, words(`\EFI\debian\grubx64.efi`)), node(0x7f, 0xff, nil))
	option := le.AppendUint16(le.AppendUint32(nil, 1), uint16(len(path)))
	option = slices.Concat(option, words("debian"), path)
	dir := w.folder("state/efivars")
	for name, value := range map[string][]byte{"BootCurrent": {3, 0}, "Boot0003": option, "BootOrder": {3, 0}, "SecureBoot": {0}} {
		w.file("state/efivars/"+name+"-8be4df61-93ca-11d2-aa0d-00e098032b8c", string(append([]byte{7, 0, 0, 0}, value...)))
	}
	return dir
}

// inside runs a command in the namespace, and in the root folder of this test: a
// namespace's own may be another one (chroot).
func (l *local) inside(argv ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--target", l.holder, "--mount", "--root", "--"}, argv...)...)
}

func (l *local) command(args ...string) *exec.Cmd {
	outside := l.world.command(args...)
	cmd := l.inside(outside.Args...)
	cmd.Env = outside.Env
	return cmd
}

func (l *local) run(args ...string) outcome {
	l.t.Helper()
	return finish(l.t, l.command(args...))
}

// tree lists all that is in a folder: type, mode, owner, content.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		owner := info.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&b, "%s %v %d:%d", strings.TrimPrefix(path, dir), info.Mode(), owner.Uid, owner.Gid)
		switch {
		case info.Mode().IsRegular():
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %x", sha256.Sum256(text))
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", target)
		}
		b.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// same checks that /boot is as it was.
func (l *local) same(before, when string) {
	l.t.Helper()
	now := strings.Split(tree(l.t, l.boot), "\n")
	was := strings.Split(before, "\n")
	for _, line := range was {
		if !slices.Contains(now, line) {
			l.t.Errorf("%s: /boot has no more %s", when, line)
		}
	}
	for _, line := range now {
		if !slices.Contains(was, line) {
			l.t.Errorf("%s: /boot has now %s", when, line)
		}
	}
}

func (l *local) entries() []api.BootEntry {
	l.t.Helper()
	o := l.run("entries", "--json")
	o.wants(l.t, 0)
	var all []api.BootEntry
	for d := json.NewDecoder(strings.NewReader(o.stdout)); d.More(); {
		var e api.BootEntry
		if err := d.Decode(&e); err != nil {
			l.t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

// ours are the entries of memlinux.
func (l *local) ours() (ours []api.BootEntry) {
	l.t.Helper()
	for _, e := range l.entries() {
		if e.Ours {
			ours = append(ours, e)
		}
	}
	return ours
}

// report is the last line of --json.
func report(t *testing.T, o outcome) *api.Report {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(o.stdout), "\n")
	var last struct{ Report *api.Report }
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || last.Report == nil {
		t.Fatalf("no report: %v: %s", err, o.stdout)
	}
	return last.Report
}

// diskDigest is that of all that is on the disk.
func (l *local) diskDigest() string {
	l.t.Helper()
	sh(l.t, "sync")
	return digest(l.t, l.pc.Disk)
}

// The whole life of entries, on each loader that this machine's kernel can
// mount the /boot of.
func TestEntriesOfThisPC(t *testing.T) {
	for _, c := range []struct {
		name string
		spec pc.Spec
		// file is that of the menu.
		file string
	}{
		{"GRUB 2, /boot on the root", pc.Spec{Loader: pc.GRUB2BIOS}, "grub/custom.cfg"},
		{"GRUB 2 on GPT, /boot apart", pc.Spec{Loader: pc.GRUB2BIOSGPT, SeparateBoot: true}, "grub/custom.cfg"},
		{"GRUB 2, UEFI", pc.Spec{Loader: pc.GRUB2UEFI, SeparateBoot: true}, "grub/custom.cfg"},
		{"GRUB Legacy", pc.Spec{Loader: pc.GRUBLegacy}, "grub/menu.lst"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLocal(t, c.spec)
			pristine := tree(t, l.boot)
			kernel, _ := need.Kernel(t)
			install := func(more ...string) outcome {
				t.Helper()
				return l.run(append([]string{"install", "--json", "--kernel", kernel, "--modules", "none"}, more...)...)
			}

			o := install("--dry-run")
			o.wants(t, 0)
			if r := report(t, o); !r.Entry.DryRun || len(r.Entry.Changes) < 3 {
				t.Errorf("the dry run says %+v", r.Entry)
			}
			l.same(pristine, "after a dry run")

			o = install("--no-boot-test")
			o.wants(t, 0)
			first := report(t, o)
			if e := l.ours(); len(e) != 1 || e[0].ID != first.System.ID || e[0].Title != "memlinux" || e[0].Default || e[0].Next {
				t.Fatalf("entries: %+v", e)
			}
			withFirst := tree(t, l.boot)

			// The same again changes nothing; the proof doesn't, either.
			before := l.diskDigest()
			o = install()
			o.wants(t, 0)
			r := report(t, o)
			if len(r.Entry.Changes) != 0 {
				t.Errorf("installed again, it changed %+v", r.Entry.Changes)
			}
			if len(r.Boots) != 1 || !r.Boots[0].OK || !r.Boots[0].Shell {
				t.Fatalf("boots: %+v", r.Boots)
			}
			if shot, err := os.Stat(r.Boots[0].Screenshot); err != nil || shot.Size() == 0 {
				t.Errorf("screenshot: %v", err)
			}
			if now := l.diskDigest(); now != before {
				t.Errorf("the proof changed the disk: %s, %s before", now, before)
			}
			l.same(withFirst, "after the same install")

			l.run("next", first.System.ID).wants(t, 0)
			if e := l.ours(); len(e) != 1 || !e[0].Next || e[0].Default {
				t.Errorf("next: %+v", e)
			}
			l.run("next", "none").wants(t, 0)
			l.same(withFirst, "after next and next none")

			// Another system of that name takes its place, proven first, and
			// boots by itself.
			o = install("--append", "quiet", "--default")
			o.wants(t, 0)
			second := report(t, o)
			if second.System.ID == first.System.ID || len(second.Boots) != 1 || !second.Boots[0].OK {
				t.Fatalf("second install: %+v", second)
			}
			if e := l.ours(); len(e) != 1 || e[0].ID != second.System.ID || !e[0].Default {
				t.Fatalf("entries: %+v", e)
			}

			l.run("rollback").wants(t, 0)
			l.same(withFirst, "after a rollback")
			l.run("rollback").wants(t, 1, "nothing to roll back")

			// A second entry beside the first.
			install("--no-boot-test", "--append", "quiet", "--name", `Kiosk; $(reboot) & Co > "A"`).wants(t, 0)
			if e := l.ours(); len(e) != 2 || e[1].Title != `Kiosk; $(reboot) & Co > "A"` {
				t.Fatalf("entries: %+v", e)
			}
			l.run("remove", second.System.ID).wants(t, 0)
			l.same(withFirst, "after one of two was removed")
			l.run("remove", first.System.ID).wants(t, 0)
			l.same(pristine, "after all were removed")
			l.run("remove", first.System.ID).wants(t, 2, "not an entry of memlinux")
			l.run("next", "0123456789abcdef").wants(t, 2, "not an entry of memlinux")
			if l.holds(); t.Failed() {
				menu, _ := os.ReadFile(filepath.Join(l.boot, c.file))
				t.Logf("%s:\n%s", c.file, menu)
			}
		})
	}
}

// What can't be done is refused with the reason, and /boot stays as it is.
func TestRefusedEntries(t *testing.T) {
	kernel, _ := need.Kernel(t)
	for _, c := range []struct {
		name   string
		loader pc.Loader
		// spoil changes the PC first.
		spoil func(t *testing.T, l *local)
		args  []string
		code  int
		says  []string
	}{
		{name: "no boot loader", spoil: func(t *testing.T, l *local) {
			if err := os.RemoveAll(filepath.Join(l.boot, "grub")); err != nil {
				t.Fatal(err)
			}
			l.bootSector(t, make([]byte, 440))
		}, code: 3, says: []string{"boot loader"}},
		{name: "two boot loaders and no evidence", spoil: func(t *testing.T, l *local) {
			l.write(t, "grub/menu.lst", "default 0\ntitle old\nkernel /vmlinuz\n")
			l.write(t, "grub/stage2", "stage2")
			l.bootSector(t, make([]byte, 440))
		}, code: 3, says: []string{"GRUB 2", "GRUB Legacy"}},
		{name: "read-only", spoil: func(t *testing.T, l *local) {
			if out, err := l.inside("mount", "-o", "remount,ro,bind", "/boot").CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}, code: 1, says: []string{"read-only"}},
		{name: "full", spoil: func(t *testing.T, l *local) {
			f, err := os.Create(filepath.Join(l.boot, "filler"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for range 256 { // more than it has, and no more than that
				if _, err = f.Write(make([]byte, 1<<20)); err != nil {
					break
				}
			}
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("/boot did not become full: %v", err)
			}
		}, code: 1, says: []string{"MiB"}},
		{name: "a title of two lines", args: []string{"--name", "one\ntwo"}, code: 2, says: []string{"title"}},
		{name: "a title with a control character", args: []string{"--name", "be\all"}, code: 2, says: []string{"title"}},
		{name: "no title", args: []string{"--name", " "}, code: 2, says: []string{"title"}},
		{name: "a command line with quotes", args: []string{"--append", `a="b c"`}, code: 2, says: []string{"append"}},
		{name: "custom.cfg is not read", spoil: func(t *testing.T, l *local) {
			l.edit(t, "grub/grub.cfg", "custom.cfg", "custom.not")
		}, code: 3, says: []string{"custom.cfg"}},
		{name: "GRUB can't start it", spoil: func(t *testing.T, l *local) {
			// The module is there and broken: that shows only when it is tried.
			l.write(t, "grub/i386-pc/legacycfg.mod", "not a module")
		}, args: []string{"--next"}, code: 5, says: []string{"did not boot", "as it was"}},
		{name: "dpkg is at work", spoil: func(t *testing.T, l *local) {
			lockDpkg(t)
		}, args: []string{"--no-boot-test"}, code: 1, says: []string{"again"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLocal(t, pc.Spec{Loader: pc.GRUB2BIOS})
			if c.spoil != nil {
				c.spoil(t, l)
			}
			before := tree(t, l.boot)
			args := append([]string{"install", "--kernel", kernel, "--modules", "none"}, c.args...)
			o := l.run(args...)
			o.wants(t, c.code, c.says...)
			t.Log(o.stderr)
			l.same(before, "after the refusal")
		})
	}
}

func (l *local) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(l.boot, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (l *local) edit(t *testing.T, name, old, new string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(l.boot, name))
	if err != nil || !bytes.Contains(text, []byte(old)) {
		t.Fatalf("%s has no %q: %v", name, old, err)
	}
	l.write(t, name, strings.ReplaceAll(string(text), old, new))
}

// bootSector puts other code in front of the disk's partition table.
func (l *local) bootSector(t *testing.T, code []byte) {
	t.Helper()
	f, err := os.OpenFile(l.pc.Disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(code, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// lockDpkg does as dpkg does while it works.
func lockDpkg(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile(need.File(t, "/var/lib/dpkg/lock-frontend", "dpkg"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	lock := syscall.Flock_t{Type: syscall.F_WRLCK}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		err := syscall.FcntlFlock(f.Fd(), syscall.F_SETLK, &lock)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// Ctrl-C during the proof takes everything back.
func TestCancelledInstallLeavesNoTrace(t *testing.T) {
	l := newLocal(t, pc.Spec{Loader: pc.GRUB2BIOS})
	kernel, _ := need.Kernel(t)
	before := tree(t, l.boot)
	cmd := l.command("install", "--kernel", kernel, "--modules", "none")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if text, err := os.ReadFile(filepath.Join(l.boot, "grub/custom.cfg")); err == nil && bytes.Contains(text, []byte("memlinux")) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no entry appeared: %s", stderr.String())
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit %d: %s", code, stderr.String())
	}
	l.same(before, "after a cancel")
}
