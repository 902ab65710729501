package local

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/testvm/need"
)

// box is a machine in a folder.
type box struct {
	t      testing.TB
	root   string
	mounts []string
	blkid  map[string]map[string]string // by device name
}

func newBox(t testing.TB) *box {
	x := &box{t: t, root: t.TempDir(), blkid: map[string]map[string]string{}}
	x.mount("0:5", "/", "/proc", "proc", "proc", "rw")
	x.mount("0:6", "/", "/dev", "devtmpfs", "dev", "rw")
	return x
}

func (x *box) file(name, text string) *box {
	x.t.Helper()
	path := filepath.Join(x.root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		x.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		x.t.Fatal(err)
	}
	return x
}

func (x *box) dir(name string) *box {
	x.t.Helper()
	if err := os.MkdirAll(filepath.Join(x.root, name), 0o755); err != nil {
		x.t.Fatal(err)
	}
	return x
}

func (x *box) link(to, name string) *box {
	x.t.Helper()
	x.dir(filepath.Dir(name))
	if err := os.Symlink(to, filepath.Join(x.root, name)); err != nil {
		x.t.Fatal(err)
	}
	return x
}

// disk is a whole disk with that boot sector.
func (x *box) disk(name, number string, sector []byte) *box {
	x.t.Helper()
	x.dir("sys/devices/" + name)
	x.link("../../devices/"+name, "sys/class/block/"+name)
	x.link("../../devices/"+name, "sys/dev/block/"+number)
	x.file("dev/"+name, string(sector)+strings.Repeat("\x00", 1<<16))
	return x
}

// part is a partition that begins at a sector; content is what blkid says.
func (x *box) part(disk string, n int, number string, start int, content ...string) *box {
	x.t.Helper()
	name := fmt.Sprintf("%s%d", disk, n)
	x.file("sys/devices/"+disk+"/"+name+"/partition", fmt.Sprintln(n))
	x.file("sys/devices/"+disk+"/"+name+"/start", fmt.Sprintln(start))
	x.link("../../devices/"+disk+"/"+name, "sys/class/block/"+name)
	x.link("../../devices/"+disk+"/"+name, "sys/dev/block/"+number)
	x.file("dev/"+name, "")
	return x.content(name, content...)
}

func (x *box) content(name string, content ...string) *box {
	x.blkid[name] = map[string]string{}
	for _, c := range content {
		key, value, _ := strings.Cut(c, "=")
		x.blkid[name][key] = value
	}
	return x
}

// mapped is a device over others: kind is a file of sysfs that tells it.
func (x *box) mapped(name, number, kind, text string, slaves ...string) *box {
	x.t.Helper()
	x.disk(name, number, nil)
	x.file("sys/devices/"+name+"/"+kind, text)
	for _, slave := range slaves {
		disk := strings.TrimRight(slave, "0123456789")
		to := "../../" + disk + "/" + slave
		if disk == slave || strings.HasPrefix(slave, "md") || strings.HasPrefix(slave, "dm-") {
			to = "../../" + slave
		}
		x.link(to, "sys/devices/"+name+"/slaves/"+slave)
	}
	return x
}

func (x *box) mount(number, root, point, kind, source, options string) *box {
	x.mounts = append(x.mounts, fmt.Sprintf("%d 1 %s %s %s %s,relatime shared:1 - %s %s %s", 20+len(x.mounts), number, root, point, options, kind, source, options))
	if point != "/" {
		x.dir(point)
	}
	return x
}

func (x *box) efivar(name, guid string, data []byte) *box {
	return x.file("sys/firmware/efi/efivars/"+name+"-"+guid, string(Variable{Attributes: 7, Data: data}.file()))
}

// booted has the firmware say that it started a file of a GPT partition.
func (x *box) booted(n int, start uint64, uuid, file string) *box {
	x.efivar("BootCurrent", globalGUID, []byte{2, 0})
	return x.efivar("Boot0002", globalGUID, option(nil, n, start, uuid, file, nil))
}

// option makes the data of a Boot#### variable.
func option(before []byte, n int, start uint64, uuid, file string, optional []byte) []byte {
	le := binary.LittleEndian
	g, _ := hex.DecodeString(strings.ReplaceAll(uuid, "-", ""))
	disk := le.AppendUint32([]byte{4, 1, 42, 0}, uint32(n))
	disk = le.AppendUint64(disk, start)
	disk = le.AppendUint64(disk, 204800)
	disk = append(disk, g[3], g[2], g[1], g[0], g[5], g[4], g[7], g[6])
	disk = append(disk, g[8:]...)
	disk = append(disk, 2, 2)
	name := encodeUTF16(file)
	node := append(le.AppendUint16([]byte{4, 4}, uint16(len(name)+4)), name...)
	nodes := bytes.Join([][]byte{before, disk, node, {0x7f, 0xff, 4, 0}}, nil)
	data := le.AppendUint16([]byte{1, 0, 0, 0}, uint16(len(nodes)))
	return bytes.Join([][]byte{data, encodeUTF16("debian"), nodes, optional}, nil)
}

func (x *box) system() System {
	x.file("proc/self/mountinfo", strings.Join(x.mounts, "\n")+"\n")
	return System{Root: x.root, blkid: func(_ context.Context, device string) (map[string]string, error) {
		return x.blkid[filepath.Base(device)], nil
	}}
}

// describe prints what Find says.
func (x *box) describe() string {
	b, err := Find(x.t.Context(), x.system())
	var out strings.Builder
	if err != nil {
		if refused := (*UnsupportedError)(nil); errors.As(err, &refused) {
			fmt.Fprintf(&out, "unsupported: %s\n", err)
		} else {
			fmt.Fprintf(&out, "error: %s\n", err)
		}
	} else {
		v := b.Volume
		fmt.Fprintf(&out, "%s, %s, secure boot %v\n", b.Name(), b.Firmware, b.SecureBoot)
		fmt.Fprintf(&out, "payload %s, files in %s\n", b.Dir, strings.Join(b.Folders(), " "))
		fmt.Fprintf(&out, "volume %s root %s type %s device %q uuid %q start %d read-only %v\n", v.MountPoint, v.Root, v.Type, v.Device, v.UUID, v.Start, v.ReadOnly)
		if seen, err := v.LoaderPath(filepath.Join(b.Dir, "x")); err == nil {
			fmt.Fprintf(&out, "the loader sees %s\n", seen)
		}
		if l, ok := b.Loader.(*legacy); ok {
			fmt.Fprintf(&out, "menu %s root %s\n", l.menu, l.root)
		}
		fmt.Fprintf(&out, "disk %q, no proof %q\n", b.Disk, b.NoProof)
		for _, e := range b.Variables {
			fmt.Fprintf(&out, "variable %s %s %d %x\n", e.Name, e.GUID, e.Attributes, e.Data)
		}
	}
	return strings.ReplaceAll(strings.ReplaceAll(out.String(), x.root+"/", "/"), x.root, "/")
}

// sector is a boot sector with those bytes.
func sector(at int, text string) []byte {
	s := make([]byte, 512)
	copy(s[at:], text)
	s[510], s[511] = 0x55, 0xaa
	return s
}

func grub2Sector() []byte {
	s := sector(0x180, "GRUB \x00Geom\x00Hard Disk\x00Read\x00 Error\r\n")
	s[0], s[1] = 0xeb, 0x63
	return s
}

func legacySector() []byte {
	s := sector(0x17f, "GRUB \x00Geom\x00Hard Disk\x00Read\x00 Error\x00")
	s[0], s[1], s[0x3e], s[0x3f] = 0xeb, 0x48, 3, 2
	return s
}

const (
	espUUID  = "PART_ENTRY_UUID=3f5ad593-4546-4a94-a374-bcfb68aa11f7"
	espGUID  = "3f5ad593-4546-4a94-a374-bcfb68aa11f7"
	isESP    = "PART_ENTRY_TYPE=" + espType
	ext4UUID = "UUID=0a3407de-014b-458b-b5c1-848e92a327a3"
	fatUUID  = "UUID=7A3B-11F7"
)

const (
	mkconfigCfg = "set default=\"0\"\nmenuentry 'Debian GNU/Linux' {\n\tlinux /vmlinuz\n}\nif [ -f  ${config_directory}/custom.cfg ]; then\n  source ${config_directory}/custom.cfg\nfi\n"
	stubCfg     = "search.fs_uuid 0a3407de-014b-458b-b5c1-848e92a327a3 root hd0,gpt2 \nset prefix=($root)'/boot/grub'\nconfigfile $prefix/grub.cfg\n"
	oldMenu     = "default 0\ntimeout 5\n\ntitle Debian\nroot (hd0,0)\nkernel /boot/vmlinuz root=/dev/sda1 ro\ninitrd /boot/initrd.img\n"
)

// esp is a disk sda with an EFI System Partition at /boot/efi and / on sda2.
func (x *box) esp(point string) *box {
	x.disk("sda", "8:0", nil).part("sda", 1, "8:1", 2048, fatUUID, espUUID, isESP, "TYPE=vfat").part("sda", 2, "8:2", 206848, ext4UUID, "TYPE=ext4")
	x.mount("8:2", "/", "/", "ext4", "/dev/sda2", "rw")
	x.mount("8:1", "/", point, "vfat", "/dev/sda1", "rw")
	return x.dir("sys/firmware/efi/efivars")
}

func TestFind(t *testing.T) {
	bios := func(x *box, s []byte) *box {
		return x.disk("sda", "8:0", s).part("sda", 1, "8:1", 2048, ext4UUID, "TYPE=ext4").
			mount("8:1", "/", "/", "ext4", "/dev/sda1", "rw").dir("boot")
	}
	tests := []struct {
		name  string
		build func(x *box)
	}{
		{"Debian, BIOS, /boot on /", func(x *box) { bios(x, grub2Sector()).file("boot/grub/grub.cfg", mkconfigCfg) }},
		{"Debian, BIOS, /boot of its own", func(x *box) {
			bios(x, grub2Sector()).part("sda", 5, "8:5", 4096, "UUID=11111111-2222-3333-4444-555555555555").
				mount("8:5", "/", "/boot", "ext4", "/dev/sda5", "rw").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"a read-only /boot on NVMe", func(x *box) {
			x.disk("nvme0n1", "259:0", grub2Sector())
			x.file("sys/devices/nvme0n1/nvme0n1p2/partition", "2\n").file("sys/devices/nvme0n1/nvme0n1p2/start", "8192\n")
			x.link("../../devices/nvme0n1/nvme0n1p2", "sys/dev/block/259:2").content("nvme0n1p2", ext4UUID)
			x.mount("259:2", "/", "/", "ext4", "/dev/nvme0n1p2", "ro").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"Debian, UEFI", func(x *box) {
			x.esp("/boot/efi").file("boot/grub/grub.cfg", mkconfigCfg).file("boot/efi/EFI/debian/grub.cfg", stubCfg)
			x.booted(1, 2048, espGUID, `\EFI\debian\shimx64.efi`).efivar("SecureBoot", globalGUID, []byte{1})
		}},
		{"Debian, UEFI, the ESP not mounted and not in fstab", func(x *box) {
			x.esp("/mnt").file("boot/grub/grub.cfg", mkconfigCfg).booted(1, 2048, espGUID, `\EFI\debian\grubx64.efi`)
			x.mounts = x.mounts[:len(x.mounts)-1]
		}},
		{"UEFI, the ESP on another disk", func(x *box) {
			x.esp("/mnt").file("boot/grub/grub.cfg", mkconfigCfg).booted(1, 2048, "11111111-2222-3333-4444-555555555555", `\EFI\debian\grubx64.efi`)
			x.disk("sdb", "8:16", nil).part("sdb", 1, "8:17", 2048, fatUUID, "PART_ENTRY_UUID=11111111-2222-3333-4444-555555555555").mount("8:17", "/", "/boot/efi", "vfat", "/dev/sdb1", "rw")
		}},
		{"UEFI, from the default path", func(x *box) {
			x.esp("/boot/efi").file("boot/grub/grub.cfg", mkconfigCfg).booted(1, 2048, espGUID, `\EFI\BOOT\BOOTX64.EFI`)
		}},
		{"UEFI without variables", func(x *box) { x.esp("/boot/efi").file("boot/grub/grub.cfg", mkconfigCfg) }},
		{"CentOS 7, UEFI: grub.cfg on the ESP", func(x *box) {
			x.esp("/boot/efi").file("boot/efi/EFI/centos/grub.cfg", mkconfigCfg).dir("boot/grub2").booted(1, 2048, espGUID, `\EFI\centos\shimx64.efi`)
		}},
		{"two grub.cfg: the one that the started program reads", func(x *box) {
			x.esp("/boot/efi").file("boot/grub/grub.cfg", mkconfigCfg).file("boot/grub2/grub.cfg", mkconfigCfg).file("boot/efi/EFI/debian/grub.cfg", stubCfg)
			x.booted(1, 2048, espGUID, `\EFI\debian\grubx64.efi`)
		}},
		{"Fedora, BIOS, entries by BLS", func(x *box) {
			bios(x, grub2Sector()).file("boot/grub2/grub.cfg", "load_env\ninsmod blscfg\nblscfg\n").dir("boot/loader/entries")
		}},
		{"Fedora, UEFI, entries by BLS", func(x *box) {
			x.esp("/boot/efi").file("boot/grub2/grub.cfg", "load_env\ninsmod blscfg\nblscfg\n").dir("boot/loader/entries").file("boot/efi/EFI/fedora/grub.cfg", strings.ReplaceAll(stubCfg, "grub'", "grub2'"))
			x.booted(1, 2048, espGUID, `\EFI\fedora\shimx64.efi`)
		}},
		{"systemd-boot on /efi, an automount", func(x *box) {
			x.esp("/efi").dir("efi/loader/entries").file("efi/EFI/systemd/systemd-bootx64.efi", "")
			last := len(x.mounts) - 1
			x.mounts = append(x.mounts[:last], "40 1 0:40 / /efi rw - autofs systemd-1 rw", x.mounts[last])
			x.booted(1, 2048, espGUID, `\EFI\systemd\systemd-bootx64.efi`).efivar("LoaderInfo", loaderGUID, encodeUTF16("systemd-boot 252.39-1~deb12u1"))
		}},
		{"systemd-boot on /boot, as Arch has it", func(x *box) {
			x.esp("/boot").dir("boot/loader/entries").file("boot/loader/loader.conf", "").booted(1, 2048, espGUID, `\EFI\BOOT\BOOTX64.EFI`)
			x.efivar("LoaderInfo", loaderGUID, encodeUTF16("systemd-boot 256"))
		}},
		{"systemd-boot on /efi with XBOOTLDR on /boot", func(x *box) {
			x.esp("/efi").file("efi/EFI/systemd/systemd-bootx64.efi", "").part("sda", 3, "8:3", 999424, ext4UUID, "PART_ENTRY_TYPE="+xbootldrType)
			x.mount("8:3", "/", "/boot", "ext4", "/dev/sda3", "rw").dir("boot/loader/entries").booted(1, 2048, espGUID, `\EFI\systemd\systemd-bootx64.efi`)
		}},
		{"systemd-boot beside an old grub.cfg", func(x *box) {
			x.esp("/efi").dir("efi/loader/entries").file("efi/loader/loader.conf", "").file("boot/grub/grub.cfg", mkconfigCfg)
			x.efivar("LoaderInfo", loaderGUID, encodeUTF16("systemd-boot 252"))
		}},
		{"Arch, BIOS, GRUB 2", func(x *box) {
			bios(x, grub2Sector()).file("boot/grub/grub.cfg", mkconfigCfg).file("boot/grub/i386-pc/normal.mod", "")
		}},
		{"openSUSE, btrfs with subvolumes", func(x *box) {
			x.disk("vda", "254:0", grub2Sector()).part("vda", 2, "254:2", 18432, "UUID=5f1a3b2c-0d1e-4f5a-8b9c-7d6e5f4a3b2c", "TYPE=btrfs")
			x.mount("0:30", "/@/.snapshots/1/snapshot", "/", "btrfs", "/dev/vda2", "rw").mount("0:30", "/@/boot/grub2/i386-pc", "/boot/grub2/i386-pc", "btrfs", "/dev/vda2", "rw")
			x.file("boot/grub2/grub.cfg", mkconfigCfg)
		}},
		{"btrfs over two disks", func(x *box) {
			x.disk("sda", "8:0", grub2Sector()).part("sda", 1, "8:1", 2048, "UUID=5f1a3b2c-0d1e-4f5a-8b9c-7d6e5f4a3b2c").disk("sdb", "8:16", nil).part("sdb", 1, "8:17", 2048)
			x.dir("sys/fs/btrfs/5f1a3b2c-0d1e-4f5a-8b9c-7d6e5f4a3b2c/devices/sda1").dir("sys/fs/btrfs/5f1a3b2c-0d1e-4f5a-8b9c-7d6e5f4a3b2c/devices/sdb1")
			x.mount("0:30", "/@", "/", "btrfs", "/dev/sda1", "rw").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"/boot on LVM", func(x *box) {
			bios(x, grub2Sector()).mapped("dm-0", "253:0", "dm/uuid", "LVM-abc\n", "sda1").content("dm-0", ext4UUID)
			x.mount("253:0", "/", "/", "ext4", "/dev/mapper/vg-root", "rw").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"/boot on RAID 1", func(x *box) {
			bios(x, grub2Sector()).disk("sdb", "8:16", grub2Sector()).part("sdb", 1, "8:17", 2048).mapped("md0", "9:0", "md/level", "raid1\n", "sda1", "sdb1").content("md0", ext4UUID)
			x.mount("9:0", "/", "/boot", "ext4", "/dev/md0", "rw").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"/boot in an encrypted LVM", func(x *box) {
			bios(x, grub2Sector()).mapped("dm-0", "253:0", "dm/uuid", "CRYPT-LUKS1-x\n", "sda1").mapped("dm-1", "253:1", "dm/uuid", "LVM-abc\n", "dm-0").content("dm-1", ext4UUID)
			x.mount("253:1", "/", "/", "ext4", "/dev/mapper/vg-root", "rw").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"GRUB Legacy, Debian", func(x *box) {
			bios(x, legacySector()).file("boot/grub/menu.lst", oldMenu).file("boot/grub/stage2", "").file("boot/vmlinuz", "")
		}},
		{"GRUB Legacy, CentOS 6: grub.conf, menu.lst a link, /boot of its own on the second disk by the menu", func(x *box) {
			bios(x, legacySector()).disk("sdb", "8:16", legacySector()).part("sdb", 2, "8:18", 4096, ext4UUID).mount("8:18", "/", "/boot", "ext3", "/dev/sdb2", "rw")
			x.file("boot/grub/grub.conf", "default=0\ntitle CentOS\n\troot (hd1,1)\n\tkernel /vmlinuz ro\n").link("./grub.conf", "boot/grub/menu.lst").file("boot/grub/stage2", "").file("boot/vmlinuz", "")
		}},
		{"GRUB Legacy, by device.map", func(x *box) {
			bios(x, legacySector()).disk("sdb", "8:16", nil).file("boot/grub/menu.lst", "title x\nkernel /gone\n").file("boot/grub/stage2", "")
			x.file("boot/grub/device.map", "(fd0)\t/dev/fd0\n(hd1)\t/dev/disk/by-id/ata-x\n(hd0)\t/dev/sdb\n").link("../../sda", "dev/disk/by-id/ata-x")
		}},
		{"GRUB Legacy, by the BIOS", func(x *box) {
			s := legacySector()
			s[0x1b8] = 0x42
			bios(x, s).disk("sdb", "8:16", nil).file("boot/grub/menu.lst", "").file("boot/grub/stage2", "")
			x.file("sys/firmware/edd/int13_dev80/mbr_signature", "0x00000041\n").file("sys/firmware/edd/int13_dev81/mbr_signature", "0x00000042\n")
		}},
		{"GRUB Legacy, device.map against the BIOS", func(x *box) {
			s := legacySector()
			s[0x1b8] = 0x42
			bios(x, s).disk("sdb", "8:16", nil).file("boot/grub/menu.lst", "").file("boot/grub/stage2", "")
			x.file("sys/firmware/edd/int13_dev81/mbr_signature", "0x00000042\n").file("boot/grub/device.map", "(hd0)\t/dev/sda\n")
		}},
		{"GRUB Legacy, its menu against itself", func(x *box) {
			bios(x, legacySector()).file("boot/grub/menu.lst", oldMenu+strings.ReplaceAll(oldMenu, "hd0", "hd1")).file("boot/grub/stage2", "").file("boot/vmlinuz", "")
		}},
		{"GRUB Legacy, one of two disks, and nothing says which", func(x *box) {
			bios(x, legacySector()).disk("sdb", "8:16", nil).file("boot/grub/menu.lst", "").file("boot/grub/stage2", "")
		}},
		{"GRUB 2 in the boot sector, the old menu.lst beside", func(x *box) {
			bios(x, grub2Sector()).file("boot/grub/menu.lst", oldMenu).file("boot/grub/stage2", "").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"GRUB Legacy in the boot sector, only grub.cfg there", func(x *box) { bios(x, legacySector()).file("boot/grub/grub.cfg", mkconfigCfg) }},
		{"LILO", func(x *box) { bios(x, sector(6, "LILO")).file("etc/lilo.conf", "") }},
		{"LILO's file and an unknown boot sector", func(x *box) { bios(x, nil).file("etc/lilo.conf", "") }},
		{"EXTLINUX in the active partition", func(x *box) {
			s := sector(0, "")
			s[0x1be], s[0x1c2], s[0x1c6] = 0x80, 0x83, 64
			bios(x, s).file("boot/extlinux/extlinux.conf", "")
			f, err := os.OpenFile(filepath.Join(x.root, "dev/sda"), os.O_RDWR, 0)
			if err != nil {
				x.t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(sector(3, "SYSLINUX"), 64*512); err != nil {
				x.t.Fatal(err)
			}
		}},
		{"rEFInd", func(x *box) {
			x.esp("/boot/efi").file("boot/grub/grub.cfg", mkconfigCfg).booted(1, 2048, espGUID, `\EFI\refind\refind_x64.efi`)
		}},
		{"an old systemd-boot beside GRUB 2, which the default path started", func(x *box) {
			x.esp("/boot/efi").file("boot/grub/grub.cfg", mkconfigCfg).file("boot/efi/loader/loader.conf", "").booted(1, 2048, espGUID, `\EFI\BOOT\BOOTX64.EFI`)
		}},
		{"the firmware starts Linux", func(x *box) { x.esp("/boot/efi").booted(1, 2048, espGUID, `\EFI\Linux\arch.efi`) }},
		{"nothing", func(x *box) { bios(x, nil) }},
		{"two, and no word of the disk", func(x *box) {
			bios(x, nil).file("boot/grub/menu.lst", oldMenu).file("boot/grub/stage2", "").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"one, and no word of the disk", func(x *box) { bios(x, nil).file("boot/grub/grub.cfg", mkconfigCfg) }},
		{"a container", func(x *box) {
			x.mount("0:50", "/", "/", "overlay", "overlay", "rw").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"/boot not mounted", func(x *box) {
			bios(x, grub2Sector()).file("etc/fstab", "# x\nUUID=a / ext4 defaults 0 1\nUUID=b /boot/ ext4 noauto 0 2\n").file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"systemd-boot, its partition not mounted", func(x *box) {
			x.esp("/mnt").file("etc/fstab", "UUID=b /efi vfat noauto 0 2\n").booted(1, 2048, espGUID, `\EFI\systemd\systemd-bootx64.efi`)
		}},
		{"GRUB 2, the ESP of fstab not mounted", func(x *box) {
			x.esp("/mnt").file("etc/fstab", "UUID=b /boot/efi vfat noauto 0 2\n").booted(1, 2048, espGUID, `\EFI\debian\grubx64.efi`).file("boot/grub/grub.cfg", mkconfigCfg)
		}},
		{"an automount of /boot that did not mount", func(x *box) {
			bios(x, grub2Sector()).mount("0:40", "/", "/boot", "autofs", "systemd-1", "rw").file("etc/fstab", "UUID=b /boot ext4 x-systemd.automount 0 2\n")
		}},
		{"no /boot at all", func(x *box) {
			x.disk("sda", "8:0", nil).part("sda", 1, "8:1", 2048).mount("8:1", "/", "/", "ext4", "/dev/sda1", "rw")
		}},
	}
	var out strings.Builder
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			x := newBox(t)
			test.build(x)
			fmt.Fprintf(&out, "# %s\n%s\n", test.name, x.describe())
		})
	}
	sameAsGolden(t, "testdata/find.golden", out.String())
}

var updateFind = flag.Bool("update-find", false, "write the golden files of Find and GRUB 2 anew")

func sameAsGolden(t *testing.T, path, got string) {
	t.Helper()
	if *updateFind {
		write(t, path, got)
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func TestFindGivesUpWhenCancelled(t *testing.T) {
	x := newBox(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Find(ctx, x.system()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// The running machine is looked at, and whatever it is, nothing is wrong with that.
func TestFindHere(t *testing.T) {
	b, err := Find(t.Context(), System{})
	t.Logf("%+v, %v", b, err)
}

func TestLoaderPath(t *testing.T) {
	tests := []struct{ name, point, root, file, want string }{
		{"/boot of its own", "/boot", "/", "/boot/memlinux/x", "/memlinux/x"},
		{"/boot on /", "/", "/", "/boot/memlinux/x", "/boot/memlinux/x"},
		{"a subvolume", "/", "/@", "/boot/x", "/@/boot/x"},
		{"a subvolume of /boot", "/boot", "/@boot", "/boot/x", "/@boot/x"},
		{"the mount point itself", "/boot", "/", "/boot", "/"},
		{"not below", "/boot", "/", "/bootx/y", ""},
		{"above", "/boot", "/", "/", ""},
	}
	for _, test := range tests {
		got, err := Volume{MountPoint: test.point, Root: test.root}.LoaderPath(test.file)
		if got != test.want || (err == nil) != (test.want != "") {
			t.Errorf("%s: %q, %v", test.name, got, err)
		}
	}
}

func TestBootSectors(t *testing.T) {
	read := func(path, pkg string) []byte {
		data, err := os.ReadFile(need.File(t, path, pkg))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	installed := read("/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin")
	binary.LittleEndian.PutUint64(installed[0x5c:], 2048)
	for i := 3; i < 0x3e; i++ {
		installed[i] = byte(i) // grub-bios-setup keeps what a FAT has here
	}
	tests := []struct {
		name   string
		sector []byte
		want   string
	}{
		{"GRUB 2's boot.img", read("/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin"), loaderGRUB2},
		{"GRUB 2's in a disk", installed, loaderGRUB2},
		{"GRUB Legacy", legacySector(), loaderLegacy},
		{"LILO 22", sector(6, "LILO"), "LILO"},
		{"SYSLINUX", sector(3, "SYSLINUX"), "SYSLINUX"},
		{"EXTLINUX 3", sector(3, "EXTLINUX"), "EXTLINUX"},
		{"zeros", make([]byte, 512), ""},
		{"short", []byte{1}, ""},
		{"without a signature", append(grub2Sector()[:510], 0, 0), ""},
		{"another", sector(0, "Missing operating system"), ""},
	}
	for _, test := range tests {
		if got := bootSectorOf(test.sector); got != test.want {
			t.Errorf("%s: %q, not %q", test.name, got, test.want)
		}
	}
}

func TestLoadOption(t *testing.T) {
	before := []byte{2, 1, 12, 0, 0xd0, 0x41, 3, 10, 0, 0, 0, 0, 1, 1, 6, 0, 2, 0x1f} // PciRoot(0)/Pci(1f,2)
	full := option(before, 1, 2048, espGUID, `\EFI\debian\shimx64.efi`, []byte("opt"))
	short := option(nil, 1, 2048, espGUID, `\EFI\debian\shimx64.efi`, []byte("opt"))
	o, err := parseLoadOption(full)
	if err != nil {
		t.Fatal(err)
	}
	if o.description != "debian" || o.file != `\EFI\debian\shimx64.efi` || o.partition != 1 || o.start != 2048 || o.partUUID != espGUID || o.attributes != 1 {
		t.Errorf("read %+v", o)
	}
	if !bytes.Equal(o.raw, short) {
		t.Errorf("another machine could not follow %x", o.raw)
	}
	if o, err := parseLoadOption(short); err != nil || !bytes.Equal(o.raw, short) {
		t.Errorf("a short path changed: %x, %v", o.raw, err)
	}
	for i := range full[:len(full)-3] {
		if _, err := parseLoadOption(full[:i]); err == nil {
			t.Errorf("%d bytes of it are taken", i)
		}
	}
}

func FuzzLoadOption(f *testing.F) {
	f.Add(option(nil, 1, 2048, espGUID, `\EFI\debian\shimx64.efi`, nil))
	f.Add(option([]byte{1, 1, 6, 0, 0, 0}, 128, 1<<40, espGUID, `EFI\x`, []byte("WINDOWS\x00")))
	f.Fuzz(func(t *testing.T, data []byte) {
		o, err := parseLoadOption(data)
		if err != nil {
			return
		}
		again, err := parseLoadOption(o.raw)
		if err != nil {
			t.Fatalf("what was made of %x can't be read: %v", data, err)
		}
		if again.file != o.file && o.partition == 0 || again.description != o.description || !bytes.Equal(again.raw, o.raw) {
			t.Fatalf("%+v and %+v differ", o, again)
		}
		loaderOf(o.file)
	})
}

func FuzzMounts(f *testing.F) {
	f.Add([]byte("22 27 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n23 22 0:30 /@ /boot rw - btrfs /dev/sda2 rw\n"), "/boot/grub")
	f.Add([]byte("22 27 8:1 / /a\\040b ro - autofs systemd-1 rw\n"), "/a b/c")
	f.Fuzz(func(t *testing.T, data []byte, file string) {
		mounts, err := parseMounts(data)
		if err != nil || !filepath.IsAbs(file) {
			return
		}
		file = filepath.Clean(file)
		m, ok := mountOf(mounts, file)
		if !ok {
			return
		}
		if _, err := (Volume{MountPoint: m.point, Root: m.root}).LoaderPath(file); err != nil {
			t.Fatalf("%s on %+v: %v", file, m, err)
		}
	})
}

func TestParseBlkid(t *testing.T) {
	got := parseBlkid("DEVNAME=/dev/sda1\nUUID=7A3B-11F7\nLABEL=a\\ b\nPART_ENTRY_TYPE=0xef\n\n=x\n")
	want := map[string]string{"DEVNAME": "/dev/sda1", "UUID": "7A3B-11F7", "LABEL": "a b", "PART_ENTRY_TYPE": "0xef"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
