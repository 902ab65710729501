package local

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/testvm/need"
)

// needSystemdBoot is a folder with Debian's systemd-boot: the loader and bootctl.
func needSystemdBoot(t *testing.T) string {
	t.Helper()
	return need.Package(t, "systemd-boot", "systemd-boot-efi")
}

// systemd's own bootctl must see in our entries what we meant.
func TestBLSAsBootctlReads(t *testing.T) {
	need.Root(t)
	need.Tool(t, "systemctl", "systemd") // has the library that bootctl needs
	bootctl := filepath.Join(needSystemdBoot(t), "usr/bin/bootctl")

	m := archMachine(t)
	a, b := ourEntry(1), ourEntry(2)
	b.Cmdline = `quiet a="b  c" d='e f' g=\h $i ; # ` + b.Cmdline + ` "`
	m.want(Ours{Entries: []Entry{a, b}, Default: a.ID})

	// bootctl wants a file system of its own: in a mount namespace of a thread,
	// which ends with the test.
	out := make(chan string, 1)
	go func() {
		runtime.LockOSThread()
		esp := t.TempDir()
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = unix.Mount("tmpfs", esp, "tmpfs", 0, "")
		}
		if err != nil {
			out <- "mount: " + err.Error()
			return
		}
		if err := os.CopyFS(esp, os.DirFS(m.dir)); err != nil {
			out <- err.Error()
			return
		}
		cmd := exec.Command(bootctl, "--no-pager", "--json=short", "--esp-path="+esp, "list")
		cmd.Env = append(os.Environ(), "SYSTEMD_RELAX_ESP_CHECKS=1")
		var messages bytes.Buffer
		cmd.Stderr = &messages
		list, err := cmd.Output()
		if err != nil || messages.Len() > 0 {
			out <- fmt.Sprintf("bootctl list: %v: %s", err, messages.String())
			return
		}
		out <- string(list)
	}()
	text := <-out
	type entry struct {
		ID, Title, Version, Linux, Options string
		Initrd                             []string
	}
	var got []entry
	for list := json.NewDecoder(strings.NewReader(text)); list.More(); {
		var e entry
		if err := list.Decode(&e); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		got = append(got, e)
	}
	var want []entry
	for _, e := range []Entry{b, a} {
		want = append(want, entry{blsPrefix + e.ID + ".conf", e.Title, e.ID, "/memlinux/" + e.Kernel, e.Cmdline, []string{"/memlinux/" + e.Initrd}})
	}
	if len(got) < 2 || !cmp.Equal(got[len(got)-2:], want) {
		t.Errorf("bootctl's list does not end in ours:\n%s", cmp.Diff(want, got))
	}
}

// sdDisk is a disk with an ESP that systemd-boot is on.
const (
	sdDiskSize  = 96 << 20
	sdPartition = 1 << 20
)

// makeSDDisk makes the disk of a PC with systemd-boot, whose ESP has all that
// is in folder.
func makeSDDisk(t *testing.T, path, folder string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, sdDiskSize); err != nil {
		t.Fatal(err)
	}
	run(t, need.Tool(t, "sgdisk", "gdisk"), "--new=1:2048:0", "--typecode=1:ef00", path)
	// The backup GPT has the last 33 sectors.
	kib := (sdDiskSize-sdPartition)/1024 - 17
	run(t, need.Tool(t, "mkfs.vfat", "dosfstools"), "-F32", "-s1", "--offset", strconv.Itoa(sdPartition/512), path, strconv.Itoa(kib))
	files, err := filepath.Glob(filepath.Join(folder, "*"))
	if err != nil {
		t.Fatal(err)
	}
	run(t, need.Tool(t, "mcopy", "mtools"), append(append([]string{"-s", "-Q", "-i", fmt.Sprintf("%s@@%d", path, sdPartition)}, files...), "::/")...)
}

// sdInit is the first program of the old system and of ours, on this machine
// that has no other: it writes the EFI variables of the step that it is at, and
// has the machine start anew.
const sdInit = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox insmod /efivarfs.ko
/bin/busybox mount -t efivarfs efivarfs /sys/firmware/efi/efivars
vars=/sys/firmware/efi/efivars
test=6d656d6c-696e-7578-0000-000000000001
step=0
while [ -e $vars/Step$step-$test ]; do step=$((step+1)); done
printf '\007\000\000\000x' > $vars/Step$step-$test
echo "TEST step=$step system=$(/bin/busybox sed 's/.*system=\([^ ]*\).*/\1/' /proc/cmdline)"
echo "TEST cmdline=$(/bin/busybox cat /proc/cmdline)"
echo "TEST oneshot=$(/bin/busybox ls $vars | /bin/busybox grep -c LoaderEntryOneShot)"
for file in /steps/$step/*; do
	[ -e "$file" ] || continue
	var=$vars/${file##*/}
	[ ! -e "$var" ] || /bin/chattr -i "$var"
	if [ -s "$file" ]; then /bin/busybox cat "$file" > "$var"; else /bin/busybox rm -f "$var"; fi ||
		{ echo "TEST failed: $var"; /bin/busybox poweroff -f; }
done
if [ $step = STEPS ]; then
	echo "TEST done"
	/bin/busybox poweroff -f
fi
/bin/busybox reboot -f
`

// A real systemd-boot must boot, step by step, what our plans say, and the old
// system where they say nothing.
func TestSystemdBootBootsOurs(t *testing.T) {
	loader := filepath.Join(needSystemdBoot(t), "usr/lib/systemd/boot/efi/systemd-bootx64.efi")
	kernel, _ := need.Kernel(t)
	m := archMachine(t)
	a, b := ourEntry(1), ourEntry(2)
	b.Initrd = a.Initrd
	for i, e := range []*Entry{&a, &b} {
		e.Cmdline = fmt.Sprintf(`system=ours%d panic=-1 quiet x="a  b" y=$root;z|&<>'q' ä \ %s`, i+1, e.Cmdline)
	}
	m.write(filepath.Join(m.dir, "loader/loader.conf"), []byte("timeout 2\n"))
	m.write(filepath.Join(m.dir, "loader/entries/arch.conf"),
		[]byte("title Old\nlinux /vmlinuz-linux\ninitrd /memlinux/"+a.Initrd+"\noptions system=old panic=-1 quiet console=ttyS0,115200\n"))
	m.want(Ours{Entries: []Entry{a, b}})

	// What each step writes.
	steps := make([]map[string][]byte, 6)
	write := func(step int, changes []bootfs.Change) {
		steps[step] = map[string][]byte{}
		for _, c := range changes {
			if c.Kind == bootfs.Variable {
				steps[step][filepath.Base(c.Path)] = c.New
			}
		}
	}
	write(0, m.want(Ours{Entries: []Entry{a, b}, Next: b.ID}))
	if err := os.Remove(variablePath(m.efivars(), loaderOneShot, loaderGUID)); err != nil {
		t.Fatal(err)
	}
	write(2, m.want(Ours{Entries: []Entry{a, b}, Default: a.ID}))
	write(3, m.want(Ours{Entries: []Entry{a, b}}))
	once, err := m.loader().Once(b.ID)
	if err != nil {
		t.Fatal(err)
	}
	steps[4] = map[string][]byte{}
	for _, v := range once.Variables {
		steps[4][filepath.Base(variablePath("", v.Name, v.GUID))] = v.file()
	}

	// The system's files.
	tree := t.TempDir()
	chattr := need.Tool(t, "chattr", "e2fsprogs")
	system := map[string]string{
		"bin/busybox": need.File(t, "/bin/busybox", "busybox-static"),
		"bin/chattr":  chattr, // Linux protects these variables from being removed; busybox has none
		"efivarfs.ko": efivarfs(t, kernel),
	}
	libraries, err := exec.Command(need.Tool(t, "ldd", "libc-bin"), chattr).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range strings.Fields(string(libraries)) {
		if strings.HasPrefix(word, "/") {
			system[word] = word
		}
	}
	for name, from := range system {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		m.write(filepath.Join(tree, name), data)
	}
	m.write(filepath.Join(tree, "init"), []byte(strings.ReplaceAll(sdInit, "STEPS", strconv.Itoa(len(steps)-1))))
	for step, files := range steps {
		for name, data := range files {
			m.write(filepath.Join(tree, "steps", strconv.Itoa(step), name), data)
		}
	}
	var names strings.Builder
	if err := filepath.WalkDir(tree, func(path string, _ os.DirEntry, err error) error {
		if rel, _ := filepath.Rel(tree, path); rel != "." {
			fmt.Fprintln(&names, rel)
		}
		if err == nil {
			err = os.Chmod(path, 0o755)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	cpio := exec.Command(need.Tool(t, "cpio", "cpio"), "--quiet", "-o", "-H", "newc")
	cpio.Dir, cpio.Stdin = tree, strings.NewReader(names.String())
	initramfs, err := cpio.Output()
	if err != nil {
		t.Fatal(err)
	}
	m.write(filepath.Join(m.dir, "memlinux", a.Initrd), initramfs)
	for name, from := range map[string]string{"vmlinuz-linux": kernel, "memlinux/" + a.Kernel: kernel, "EFI/BOOT/BOOTX64.EFI": loader, "EFI/systemd/systemd-bootx64.efi": loader} {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		m.write(filepath.Join(m.dir, name), data)
	}
	disk := filepath.Join(t.TempDir(), "disk.img")
	makeSDDisk(t, disk, m.dir)

	log := bootSD(t, disk)
	var got []string
	for line := range strings.Lines(log) {
		if _, said, ok := strings.Cut(strings.TrimRight(line, "\r\n"), "TEST "); ok && !strings.HasPrefix(said, "cmdline=") {
			got = append(got, said)
		}
	}
	want := []string{
		"step=0 system=old", "oneshot=0", // nobody asked for ours
		"step=1 system=ours2", "oneshot=0", // once
		"step=2 system=old", "oneshot=0", // and never again
		"step=3 system=ours1", "oneshot=0", // the default
		"step=4 system=old", "oneshot=0", // as before
		"step=5 system=ours2", "oneshot=0", // a copy that is to be tried
		"done",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s\n%q", diff, log)
	}
	for _, e := range []Entry{a, b} {
		if !strings.Contains(log, `TEST cmdline=initrd=\memlinux\`+e.Initrd+" "+e.Cmdline+"\r\n") {
			t.Errorf("the kernel did not read the command line %q", e.Cmdline)
		}
	}
	if t.Failed() {
		return
	}
	t.Log(strings.Join(got, "; "))
}

// efivarfs is the module that belongs to the kernel.
func efivarfs(t *testing.T, kernel string) string {
	t.Helper()
	release := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	return need.File(t, filepath.Join(filepath.Dir(filepath.Dir(kernel)), "lib/modules", release, "kernel/fs/efivarfs/efivarfs.ko"), "linux-image-cloud-amd64")
}

// bootSD runs the disk under OVMF until the machine is switched off, and
// returns what its serial console said.
func bootSD(t *testing.T, disk string) string {
	t.Helper()
	code := need.File(t, "/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf")
	data, err := os.ReadFile(need.File(t, "/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"))
	if err != nil {
		t.Fatal(err)
	}
	vars := filepath.Join(t.TempDir(), "vars.fd")
	if err := os.WriteFile(vars, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return console(t, 12*time.Minute, never, "-M", "q35", "-m", "512",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+code, "-drive", "if=pflash,unit=1,format=raw,file="+vars,
		"-drive", "if=virtio,format=raw,snapshot=on,file="+disk)
}
