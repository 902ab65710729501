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

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/testvm/need"
)

// grubHeader runs grub-mkconfig's own scripts: what stands before and behind
// the entries in a real grub.cfg.
func grubHeader(t *testing.T, settings ...string) (header, custom string) {
	t.Helper()
	run := func(script string) string {
		cmd := exec.Command("sh", need.File(t, script, "grub-common"))
		cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "pkgdatadir=/usr/share/grub", "grub_probe=true", "LANG=C"}, settings...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", script, err)
		}
		return fmt.Sprintf("### BEGIN %s ###\n%s### END %s ###\n\n", script, out, script)
	}
	return run("/etc/grub.d/00_header"), run("/etc/grub.d/41_custom")
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// pcDisk is the disk of a PC with a BIOS and GRUB 2 on one ext4 partition,
// whose files are those of tree.
type pcDisk struct{ tree, image string }

const (
	pcUUID  = "6d656d6c-696e-7578-0000-000000000001"
	pcStart = 1 << 20
	pcSize  = 96 << 20
)

// make makes the disk anew from the tree, without mounting anything: as
// grub-install and mke2fs would leave it.
func (d pcDisk) make(t *testing.T) {
	t.Helper()
	run(t, need.Tool(t, "mke2fs", "e2fsprogs"), "-q", "-F", "-t", "ext4", "-U", pcUUID, "-d", d.tree,
		"-E", fmt.Sprintf("offset=%d,root_owner=0:0", pcStart), d.image, fmt.Sprintf("%dk", (pcSize-pcStart)>>10))
	boot, err := os.ReadFile(need.File(t, "/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin"))
	if err != nil {
		t.Fatal(err)
	}
	coreFile := filepath.Join(t.TempDir(), "core.img")
	run(t, need.Tool(t, "grub-mkimage", "grub-common"), "-O", "i386-pc", "-o", coreFile, "-p", "(hd0,msdos1)/boot/grub", "biosdisk", "part_msdos", "ext2")
	core, err := os.ReadFile(coreFile)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	le.PutUint64(boot[0x5c:], 1)
	boot[0x64], boot[0x66], boot[0x67] = 0xff, 0x90, 0x90
	clear(boot[0x1b8:0x1fe])
	boot[0x1be], boot[0x1c2] = 0x80, 0x83
	le.PutUint32(boot[0x1c6:], pcStart/512)
	le.PutUint32(boot[0x1ca:], (pcSize-pcStart)/512)
	clear(core[0x1e8:0x1f4])
	le.PutUint64(core[0x1f4:], 2)
	le.PutUint16(core[0x1fc:], uint16((len(core)+511)/512-1))
	le.PutUint16(core[0x1fe:], 0x820)
	f, err := os.OpenFile(d.image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at, data := range map[int64][]byte{0: boot, 512: core} {
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
}

// boots starts the PC, whose kernels all panic and reboot, and waits until its
// serial console has said all of want in this order.
func (d pcDisk) boots(t *testing.T, want ...string) {
	t.Helper()
	d.bootsUnder(t, nil, want...)
}

// bootsUnder is boots with another firmware.
func (d pcDisk) bootsUnder(t *testing.T, firmware []string, want ...string) {
	t.Helper()
	missing := ""
	log := console(t, 480*time.Second, func(log string) bool {
		for _, missing = range want {
			var found bool
			if _, log, found = strings.Cut(log, missing); !found {
				return false
			}
		}
		missing = ""
		return true
	}, append(firmware, "-m", "512", "-drive", "if=virtio,format=raw,file="+d.image)...)
	if missing != "" {
		t.Fatalf("the serial console never said %q of %q:\n%s", missing, want, log)
	}
}

// pc makes the tree of a PC with a Debian whose kernel shows which entry it was
// booted by, and finds its GRUB. The kernels are one file under two names.
func pc(t *testing.T, plain bool, settings ...string) (pcDisk, *grub2) {
	t.Helper()
	dir := t.TempDir()
	d := pcDisk{filepath.Join(dir, "root"), filepath.Join(dir, "disk.img")}
	grub := filepath.Join(d.tree, "boot/grub")
	modules := filepath.Join(grub, "i386-pc")
	for _, path := range []string{modules, filepath.Join(d.tree, "boot/memlinux")} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	from := filepath.Dir(need.File(t, "/usr/lib/grub/i386-pc/legacycfg.mod", "grub-pc-bin"))
	found, _ := filepath.Glob(from + "/*.[ml][os][dt]")
	for _, module := range found {
		if plain && strings.HasSuffix(module, "/legacycfg.mod") {
			continue
		}
		data, err := os.ReadFile(module)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(modules, filepath.Base(module)), string(data))
	}
	header, custom := grubHeader(t, append(settings, "GRUB_TIMEOUT=2", "GRUB_TERMINAL_INPUT=serial console", "GRUB_TERMINAL_OUTPUT=serial console", "GRUB_SERIAL_COMMAND=serial --speed=115200")...)
	write(t, filepath.Join(grub, "grub.cfg"), header+debianEntries+custom)
	write(t, filepath.Join(grub, "grubenv"), string(newGrubenv().bytes()))
	kernel, _ := need.SmallKernel(t)
	data, err := os.ReadFile(kernel)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(d.tree, "boot/vmlinuz-6.1"), string(data))
	// An archive of nothing: the kernel finds no init and panics.
	trailer := "070701" + strings.Repeat("0", 8*11) + "0000000b" + strings.Repeat("0", 8) + "TRAILER!!!\x00"
	trailer += strings.Repeat("\x00", 512-len(trailer))
	write(t, filepath.Join(d.tree, "boot/initrd.img-6.1"), trailer)
	if err := os.Link(filepath.Join(d.tree, "boot/vmlinuz-6.1"), filepath.Join(d.tree, "boot/memlinux/vmlinuz-aa")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(d.tree, "boot/memlinux/initramfs-aa.img"), trailer)
	b := &Boot{Dir: filepath.Join(d.tree, "boot/memlinux"), Firmware: "bios",
		Volume: Volume{MountPoint: d.tree, Root: "/", Type: "ext4", Device: "sda1", UUID: pcUUID, Start: pcStart}}
	l, err := newGRUB2(b, grub)
	if err != nil {
		t.Fatal(err)
	}
	return d, l.(*grub2)
}

// debianEntries are entries as Debian's 10_linux writes them; the simple one
// is the default, the advanced one is within a submenu.
const debianEntries = `### BEGIN /etc/grub.d/10_linux ###
function gfxmode {
	set gfxpayload="${1}"
}
set linux_gfx_mode=
export linux_gfx_mode
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux --class gnu --class os $menuentry_id_option 'gnulinux-simple-` + pcUUID + `' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	insmod part_msdos
	insmod ext2
	search --no-floppy --fs-uuid --set=root ` + pcUUID + `
	echo	'Loading Linux 6.1 ...'
	linux	/boot/vmlinuz-6.1 root=UUID=` + pcUUID + ` ro  console=ttyS0,115200 panic=-1 old=simple
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.1
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-` + pcUUID + `' {
	menuentry 'Debian GNU/Linux, with Linux 6.1' --class debian --class gnu-linux --class gnu --class os $menuentry_id_option 'gnulinux-6.1-advanced-` + pcUUID + `' {
		savedefault
		load_video
		insmod gzio
		search --no-floppy --fs-uuid --set=root ` + pcUUID + `
		linux	/boot/vmlinuz-6.1 root=UUID=` + pcUUID + ` ro  console=ttyS0,115200 panic=-1 old=advanced
		initrd	/boot/initrd.img-6.1
	}
}
### END /etc/grub.d/10_linux ###

`

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// apply does what bootfs does, without its care, and holds that each change
// begins with what is there.
func apply(t *testing.T, changes []bootfs.Change) {
	t.Helper()
	for _, c := range changes {
		now, err := readIf(c.Path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(now, c.Old) || (now == nil) != (c.Old == nil) {
			t.Errorf("%s: the plan begins with %q, there is %q", c.Path, c.Old, now)
		}
		if c.Kind == bootfs.InPlace && len(c.Old) != len(c.New) {
			t.Errorf("%s: %d bytes in place of %d", c.Path, len(c.New), len(c.Old))
		}
		if c.New == nil {
			if err := os.Remove(c.Path); err != nil {
				t.Fatal(err)
			}
			continue
		}
		write(t, c.Path, string(c.New))
	}
}

const qemuID = "0123456789abcdef"

// oddTitle has what GRUB's script, its menu and menu.lst could trip over.
const oddTitle = `It's a "$test"; {odd} > | & \o/ #1 ${x} für`

// shownTitle is what of it a serial console without UTF-8 shows.
var shownTitle = strings.TrimSuffix(oddTitle, "für")

var qemuEntry = Entry{ID: qemuID, Title: oddTitle, Kernel: "vmlinuz-aa", Initrd: "initramfs-aa.img",
	Cmdline: "console=ttyS0,115200 panic=-1 x=$root y=${z};a|b&c <d> (e) #f *? memlinux.build=" + qemuID}

// The kernel says its command line on the serial console.
const (
	saysOld  = "old=simple"
	saysOurs = "x=$root y=${z};a|b&c <d> (e) #f *? memlinux.build=" + qemuID
)

func plan(t *testing.T, l Loader, want Ours) []bootfs.Change {
	t.Helper()
	changes, err := l.Plan(want)
	if err != nil {
		t.Fatal(err)
	}
	return changes
}

// brokenEntry is one whose kernel is not there.
var brokenEntry = Entry{ID: "fedcba9876543210", Title: "broken", Kernel: "vmlinuz-gone", Initrd: "initramfs-aa.img", Cmdline: "memlinux.build=fedcba9876543210"}

// What was to boot once and can't gives way to the old system, as does a default.
func TestGRUB2BootsAndFallsBack(t *testing.T) {
	both := []Entry{qemuEntry, brokenEntry}
	tests := []struct {
		name  string
		plain bool
		want  Ours
		says  []string
	}{
		{"by legacy_configfile", false, Ours{Entries: both, Next: brokenEntry.ID, Default: qemuID}, []string{"files of this entry are gone", saysOld, shownTitle, saysOurs}},
		{"plain entries", true, Ours{Entries: both, Next: qemuID, Default: brokenEntry.ID}, []string{saysOurs, "vmlinuz-gone' not found", saysOld}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d, g := pc(t, test.plain, "GRUB_DEFAULT=gnulinux-advanced-"+pcUUID+">gnulinux-6.1-advanced-"+pcUUID)
			if g.plain != test.plain {
				t.Fatalf("plain is %v", g.plain)
			}
			apply(t, plan(t, g, test.want))
			d.make(t)
			d.boots(t, test.says...)
		})
	}
}

// A copy of the disk boots the entry by itself and at once; by next_entry, if
// it can, for once.
func TestGRUB2Once(t *testing.T) {
	for _, noEnv := range []bool{false, true} {
		t.Run(fmt.Sprintf("without grubenv=%v", noEnv), func(t *testing.T) {
			d, g := pc(t, false, "GRUB_DEFAULT=0", "GRUB_TIMEOUT=100")
			if noEnv {
				if err := os.Remove(g.file("grubenv")); err != nil {
					t.Fatal(err)
				}
			}
			write(t, g.file("custom.cfg"), "set timeout=-1\nset superusers=root\npassword root x\n")
			apply(t, plan(t, g, Ours{Entries: []Entry{qemuEntry}}))
			once, err := g.Once(qemuID)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range once.Files {
				old, err := os.ReadFile(p.Path)
				if err != nil || len(old) != len(p.New) {
					t.Fatalf("%s: %d bytes for %d, %v", p.Path, len(p.New), len(old), err)
				}
				write(t, p.Path, string(p.New))
			}
			if diff := cmp.Diff(len(once.Files), map[bool]int{false: 2, true: 1}[noEnv]); diff != "" {
				t.Errorf("patches: %s", diff)
			}
			d.make(t)
			if noEnv {
				d.boots(t, saysOurs)
			} else {
				d.boots(t, saysOurs, saysOld)
			}
		})
	}
}

// UEFI, with everything on one FAT file system: GRUB writes its grubenv there, too.
func TestGRUB2UnderUEFI(t *testing.T) {
	const fatUUID = "6D65-6D6C"
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("plain=%v", plain), func(t *testing.T) {
			code := need.File(t, "/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf")
			vars, err := os.ReadFile(need.File(t, "/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"))
			if err != nil {
				t.Fatal(err)
			}
			d, bios := pc(t, false)
			cfg, err := os.ReadFile(bios.file("grub.cfg"))
			if err != nil {
				t.Fatal(err)
			}
			write(t, bios.file("grub.cfg"), strings.ReplaceAll(string(cfg), "--set=root "+pcUUID, "--set=root "+fatUUID))
			if err := os.RemoveAll(bios.file("i386-pc")); err != nil {
				t.Fatal(err)
			}
			found, _ := filepath.Glob(filepath.Dir(need.File(t, "/usr/lib/grub/x86_64-efi/legacycfg.mod", "grub-efi-amd64-bin")) + "/*.[ml][os][dt]")
			for _, module := range found {
				if plain && strings.HasSuffix(module, "/legacycfg.mod") {
					continue
				}
				data, err := os.ReadFile(module)
				if err != nil {
					t.Fatal(err)
				}
				write(t, bios.file("x86_64-efi/"+filepath.Base(module)), string(data))
			}
			b := bios.boot
			b.Firmware, b.Volume.Type, b.Volume.UUID = "uefi", "vfat", fatUUID
			l, err := newGRUB2(b, bios.dir)
			if err != nil {
				t.Fatal(err)
			}
			if g := l.(*grub2); g.plain != plain || !g.video {
				t.Fatalf("plain %v, video %v", g.plain, g.video)
			}
			apply(t, plan(t, l, Ours{Entries: []Entry{qemuEntry}, Next: qemuID}))
			efi := filepath.Join(d.tree, "EFI/BOOT/BOOTX64.EFI")
			write(t, efi, "")
			run(t, need.Tool(t, "grub-mkimage", "grub-common"), "-O", "x86_64-efi", "-o", efi, "-p", "/boot/grub", "fat", "part_gpt", "part_msdos")
			run(t, "truncate", "-s", fmt.Sprint(pcSize), d.image)
			run(t, need.Tool(t, "mkfs.vfat", "dosfstools"), "-F32", "-s1", "-i", strings.ReplaceAll(fatUUID, "-", ""), d.image)
			run(t, need.Tool(t, "mcopy", "mtools"), "-s", "-i", d.image, filepath.Join(d.tree, "boot"), filepath.Join(d.tree, "EFI"), "::")
			store := filepath.Join(t.TempDir(), "vars.fd")
			write(t, store, string(vars))
			d.bootsUnder(t, []string{"-M", "q35",
				"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + code,
				"-drive", "if=pflash,unit=1,format=raw,file=" + store}, saysOurs, saysOld)
		})
	}
}
