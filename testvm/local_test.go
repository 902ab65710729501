package testvm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/memlinux/memlinux/testvm/need"
)

// A PC's own disk: a GRUB that speaks on the screen alone, its grub.cfg and
// grubenv on ext4, and an EFI system partition with two loaders.
const (
	rootUUID  = "0b1e55ed-0000-4000-8000-000000000001"
	espGUID   = "0b1e55ed-0000-4000-8000-0000000000e5"
	espMiB    = 8
	newAppend = testAppend + " build=" + testBuild + " memlinux.build=" + testBuild

	envHead = "# GRUB Environment Block\n"

	pcMenu = `load_env
set default=old
if [ "${next_entry}" ]; then
  set default="${next_entry}"
  set next_entry=
  save_env next_entry
fi
set timeout=1
menuentry old --id old { linux /vmlinuz ` + testAppend + ` mode=login
 initrd /initrd
}
menuentry new --id new { linux /vmlinuz ` + newAppend + `
 initrd /initrd
}
menuentry gone --id gone { linux /memlinux/vmlinuz-0123456789ab ` + newAppend + `
 initrd /initrd
}
`
)

// environment is GRUB's environment block, which has always 1024 bytes.
func environment(lines string) []byte {
	return append([]byte(envHead+lines), bytes.Repeat([]byte("#"), 1024-len(envHead+lines))...)
}

// espLBA is where the EFI system partition of pcDisk begins, its last.
func espLBA(size int64) int64 { return size/512 - espMiB<<11 - 2048 }

func pcDisk(t *testing.T) string {
	diskTools(t)
	mke2fs := need.Tool(t, "mke2fs", "e2fsprogs")
	kernel, initrd := testKernel(t), testInitrd(t)
	return make1(t, "pc.img", func(t *testing.T, path string) {
		root := filepath.Join(t.TempDir(), "root")
		if err := os.MkdirAll(filepath.Join(root, "boot/grub"), 0o755); err != nil {
			t.Fatal(err)
		}
		run(t, "cp", kernel, filepath.Join(root, "vmlinuz"))
		run(t, "cp", initrd, filepath.Join(root, "initrd"))
		write(t, filepath.Join(root, "boot/grub/grub.cfg"), pcMenu)
		write(t, filepath.Join(root, "boot/grub/grubenv"), string(environment("")))
		st, err := os.Stat(kernel)
		if err != nil {
			t.Fatal(err)
		}
		size := (st.Size()>>20 + 24 + espMiB) << 20
		esp := espLBA(size)
		write(t, path, "")
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		run(t, "sgdisk", "-a", "1", "-n", "1:34:2047", "-t", "1:ef02", "-n", fmt.Sprintf("2:2048:%d", esp-1),
			"-n", fmt.Sprintf("3:%d:+%dM", esp, espMiB), "-t", "3:ef00", "-u", "3:"+espGUID, path)
		run(t, mke2fs, "-q", "-t", "ext4", "-U", rootUUID, "-d", root, "-E", "offset=1048576", path, fmt.Sprintf("%dk", (esp-2048)/2))
		embedGRUB(t, path, "-p", "(,gpt2)/boot/grub", "biosdisk", "part_gpt", "ext2", "normal", "configfile", "loadenv", "linux", "test", "echo")

		run(t, "mkfs.vfat", "-i", volumeID, "--offset", fmt.Sprint(esp), path, fmt.Sprint(espMiB<<10))
		fs := fmt.Sprintf("%s@@%d", path, esp*512)
		run(t, "mmd", "-i", fs, "::EFI", "::EFI/BOOT", "::EFI/new")
		for to, words := range map[string]string{"::EFI/BOOT/BOOTX64.EFI": testAppend + " mode=login", "::EFI/new/grubx64.efi": newAppend} {
			dir := t.TempDir()
			cfg, efi := filepath.Join(dir, "cfg"), filepath.Join(dir, "efi")
			write(t, cfg, "search --no-floppy --set=root --fs-uuid "+rootUUID+"\nlinux /vmlinuz "+words+"\ninitrd /initrd\nboot\n")
			run(t, "grub-mkimage", "-O", "x86_64-efi", "-o", efi, "-c", cfg, "-p", "/boot/grub",
				"part_gpt", "ext2", "search", "search_fs_uuid", "linux", "boot")
			run(t, "mcopy", "-i", fs, efi, to)
		}
	})
}

// nextEntry has GRUB boot the entry with that ID once, as grub-reboot does.
func nextEntry(t *testing.T, path, id string) []Patch {
	t.Helper()
	disk := read(t, path)
	at := bytes.Index(disk, environment(""))
	if at < 0 || at != bytes.LastIndex(disk, environment("")) {
		t.Fatalf("the environment block is at %d, or there are several", at)
	}
	return []Patch{{int64(at), environment("next_entry=" + id + "\n")}}
}

// bootEntry is a BootOrder of one entry, which is that file on pcDisk's EFI
// system partition (UEFI specification 2.10, §3.1.3, §10.3.5.1 and .4).
func bootEntry(t *testing.T, disk, file string) []Variable {
	t.Helper()
	st, err := os.Stat(disk)
	if err != nil {
		t.Fatal(err)
	}
	guid, err := parseGUID(espGUID)
	if err != nil {
		t.Fatal(err)
	}
	wide := func(s string) (p []byte) {
		for _, c := range append(utf16.Encode([]rune(s)), 0) {
			p = binary.LittleEndian.AppendUint16(p, c)
		}
		return p
	}
	le := binary.LittleEndian
	hd := []byte{4, 1, 42, 0, 3, 0, 0, 0}
	hd = le.AppendUint64(hd, uint64(espLBA(st.Size())))
	hd = le.AppendUint64(hd, espMiB<<11)
	hd = append(append(hd, guid[:]...), 2, 2)
	name := wide(file)
	path := slices.Concat(hd, le.AppendUint16([]byte{4, 4}, uint16(4+len(name))), name, []byte{0x7f, 0xff, 4, 0})
	option := slices.Concat(le.AppendUint16([]byte{1, 0, 0, 0}, uint16(len(path))), wide("this PC"), path)
	return []Variable{{"Boot0000", globalGUID, 7, option}, bootOrder}
}

// TestProveLocal boots a PC's own disk as it is, but for what makes its loader
// take the entry.
func TestProveLocal(t *testing.T) {
	loop := func(t *testing.T) string { return need.Loop(t, pcDisk(t), "512") }
	for _, c := range []struct {
		name      string
		fw        Firmware
		disk      func(*testing.T) string
		patches   func(t *testing.T, disk string) []Patch
		variables func(t *testing.T, disk string) []Variable
		want      []string // parts of the reason; none: it boots
	}{
		{"GRUB that is silent on the serial line takes the entry of a patched grubenv", BIOS, pcDisk,
			func(t *testing.T, disk string) []Patch { return nextEntry(t, disk, "new") }, nil, nil},
		{"the same from a block device", BIOS, loop,
			func(t *testing.T, disk string) []Patch { return nextEntry(t, disk, "new") }, nil, nil},
		{"without a patch it is the old system", BIOS, pcDisk, nil, nil,
			[]string{otherSystem + ": Linux version "}},
		{"an entry without its kernel is told from the screen", BIOS, pcDisk,
			func(t *testing.T, disk string) []Patch { return nextEntry(t, disk, "gone") }, nil,
			[]string{"GRUB could not load the kernel: error: you need to load the kernel first.; ", "the screen says: ", "error: file `/memlinux/vmlinuz-0123456789ab' not found."}},
		{"UEFI boots the entry of BootOrder", UEFI, pcDisk, nil,
			func(t *testing.T, disk string) []Variable { return bootEntry(t, disk, `\EFI\new\grubx64.efi`) }, nil},
		{"UEFI without variables boots the disk's default loader", UEFI, pcDisk, nil, nil,
			[]string{otherSystem + ": Linux version "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := c.disk(t)
			m := diskMachine(t, c.fw, AHCI, path, 512)
			if c.patches != nil {
				m.Patches = c.patches(t, path)
			}
			if c.variables != nil {
				m.Variables = c.variables(t, path)
			}
			before := state(t, path)
			var stages []string
			begin := time.Now()
			v, err := Prove(t.Context(), m, Expect{Build: testBuild, Shell: true, Local: true, Extra: 10 * time.Second}, func(s string) { stages = append(stages, s) })
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%.1f s, %v: %s", time.Since(begin).Seconds(), stages, v.Reason)
			if state(t, path) != before {
				t.Error("the proof changed the disk")
			}
			checkScreenshot(t, v.Screenshot)
			checkFolder(t, m.Dir, v.ConsoleLog, v.Screenshot)
			if c.variables != nil && !bytes.Contains(read(t, v.ConsoleLog), []byte(`starting Boot0000 "this PC" from HD(3,GPT,`)) {
				t.Errorf("OVMF did not start Boot0000:\n%s", read(t, v.ConsoleLog))
			}
			if c.want == nil && (!v.OK || !v.Shell || v.Reason != "") {
				t.Errorf("verdict %+v\n%s", v, read(t, v.ConsoleLog))
			}
			for _, w := range c.want {
				if v.OK || !strings.Contains(v.Reason, w) {
					t.Errorf("the reason misses %q", w)
				}
			}
			if d := time.Since(begin); d > biosLimit {
				t.Errorf("it took %v", d)
			}
		})
	}
}
