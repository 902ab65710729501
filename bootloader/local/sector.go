package local

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/memlinux/memlinux/bootloader/menulst"
)

// bootSectorOf names the boot loader whose code a boot sector holds, or "". The
// bytes are those of GRUB 2.06's boot.img, GRUB Legacy 0.97's stage1, SYSLINUX
// and EXTLINUX 3 to 6, and LILO 20 to 24.
func bootSectorOf(sector []byte) string {
	if len(sector) < 512 || sector[510] != 0x55 || sector[511] != 0xaa {
		return ""
	}
	code := sector[:440]
	switch {
	case bytes.Contains(code, []byte("GRUB \x00Geom\x00Hard Disk\x00Read\x00 Error")):
		// Both GRUBs have these words. stage1 jumps over a shorter table and has
		// its version behind the BIOS's parameters, 3.x.
		if code[0] == 0xeb && code[1] == 0x48 && code[0x3e] == 3 {
			return loaderLegacy
		}
		return loaderGRUB2
	case bytes.Equal(code[6:10], []byte("LILO")), bytes.Equal(code[2:6], []byte("LILO")):
		return "LILO"
	case bytes.Equal(code[3:11], []byte("SYSLINUX")), bytes.Equal(code[3:11], []byte("EXTLINUX")):
		return strings.TrimSpace(string(code[3:11]))
	}
	return ""
}

// askDisk looks at the boot sectors of the disk that /boot lies on: the disk's
// own, that of its active partition, and /boot's.
func (f *finder) askDisk(boot place) {
	for _, disk := range boot.disks {
		dev, err := os.Open(f.path("dev", strings.ReplaceAll(disk, "!", "/")))
		if err != nil {
			continue
		}
		defer dev.Close()
		sector := make([]byte, 512)
		if _, err := dev.ReadAt(sector, 0); err != nil {
			continue
		}
		places := []int64{0}
		for n := range 4 {
			entry := sector[0x1be+16*n:][:16]
			if entry[0] == 0x80 && entry[4] != 0 {
				places = append(places, int64(binary.LittleEndian.Uint32(entry[8:]))*512)
			}
		}
		if len(boot.layers) == 0 {
			places = append(places, boot.Start)
		}
		for _, at := range places {
			if _, err := dev.ReadAt(sector, at); err != nil {
				continue
			}
			if name := bootSectorOf(sector); name != "" {
				from := "by the boot sector of " + disk
				if at != 0 {
					from = fmt.Sprintf("by the boot sector of the partition at %d of %s", at, disk)
				}
				f.evidence = evidence{loader: name, from: from, disk: disk}
				return
			}
		}
	}
}

// legacyDrive is the name that GRUB Legacy has for the disk of its menu, as
// "hd0": by the menu's own entries, which boot; else by what is told about the
// disks.
func (f *finder) legacyDrive(c configuration, p place) (string, error) {
	if len(p.disks) != 1 || p.Device == "" || p.partition == 0 {
		return "", unsupported("GRUB Legacy's menu %s does not lie on one partition of one disk, so that it can't be named in an entry: move /boot to one", c.menu)
	}
	disk := p.disks[0]
	data, err := os.ReadFile(c.menu)
	if err != nil {
		return "", fmt.Errorf("read GRUB's menu: %w", err)
	}
	var drives []string
	for _, e := range menulst.Parse(data).Entries() {
		kernel, _ := e.Kernel()
		root := e.Root()
		if strings.HasPrefix(kernel, "(") {
			root, kernel, _ = strings.Cut(kernel, ")")
			root += ")"
		}
		hd, partition, ok := strings.Cut(strings.Trim(root, "()"), ",")
		n, err := strconv.Atoi(partition)
		rel, below := below(kernel, p.Root)
		if !ok || err != nil || n+1 != p.partition || !below || !strings.HasPrefix(hd, "hd") {
			continue
		}
		if _, err := os.Stat(p.MountPoint + "/" + rel); err == nil && !slices.Contains(drives, hd) {
			drives = append(drives, hd)
		}
	}
	if len(drives) > 1 {
		return "", unsupported("the entries of %s name the disk of %s in several ways (%s): correct those that do not boot", c.menu, p.MountPoint, strings.Join(drives, ", "))
	}
	if len(drives) == 1 {
		return drives[0], nil
	}
	mapped, edd := f.deviceMap(c.dir, disk), f.eddDrive(disk)
	switch {
	case mapped != "" && edd != "" && mapped != edd:
		return "", unsupported("%s/device.map calls %s %s, and the BIOS says that it is %s: correct the file", c.dir, disk, mapped, edd)
	case edd != "":
		return edd, nil
	case mapped != "":
		return mapped, nil
	}
	if all := f.wholeDisks(); len(all) == 1 && all[0] == disk {
		return "hd0", nil
	}
	return "", unsupported("which number the BIOS gives to %s is not known, since there are several disks: add a line like (hd0) /dev/%s to %s/device.map", disk, disk, c.dir)
}

// deviceMap is the disk's name in GRUB's device.map.
func (f *finder) deviceMap(dir, disk string) string {
	data, err := os.ReadFile(dir + "/device.map")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) != 2 || !strings.HasPrefix(fields[0], "(hd") {
			continue
		}
		if device, err := f.resolveDevice(fields[1]); err == nil && device == disk {
			return strings.Trim(fields[0], "()")
		}
	}
	return ""
}

// resolveDevice is the kernel's name of a device, by any of its paths.
func (f *finder) resolveDevice(device string) (string, error) {
	file := f.path(device)
	for range 5 {
		to, err := os.Readlink(file)
		if err != nil {
			break
		}
		if strings.HasPrefix(to, "/") {
			file = f.path(to)
		} else {
			file = file[:strings.LastIndexByte(file, '/')+1] + to
		}
	}
	if _, err := os.Stat(file); err != nil {
		return "", err
	}
	return file[strings.LastIndexByte(file, '/')+1:], nil
}

// eddDrive is the disk's number by the signature that the BIOS read from it
// (Linux, drivers/firmware/edd.c).
func (f *finder) eddDrive(disk string) string {
	dev, err := os.Open(f.path("dev", strings.ReplaceAll(disk, "!", "/")))
	if err != nil {
		return ""
	}
	defer dev.Close()
	sector := make([]byte, 512)
	if _, err := dev.ReadAt(sector, 0); err != nil {
		return ""
	}
	signature := binary.LittleEndian.Uint32(sector[0x1b8:])
	found := ""
	for n := range 16 {
		data, err := os.ReadFile(f.path("sys/firmware/edd", fmt.Sprintf("int13_dev8%x", n), "mbr_signature"))
		if err != nil {
			continue
		}
		if v, err := strconv.ParseUint(strings.TrimSpace(string(data)), 0, 32); err == nil && signature != 0 && uint32(v) == signature {
			if found != "" {
				return "" // two disks with one signature
			}
			found = fmt.Sprintf("hd%d", n)
		}
	}
	return found
}

// wholeDisks are the machine's disks that a BIOS could see.
func (f *finder) wholeDisks() []string {
	entries, _ := os.ReadDir(f.path("sys/class/block"))
	var disks []string
	for _, e := range entries {
		node := f.block(e.Name())
		if _, err := os.Stat(node + "/partition"); node == "" || err == nil || layerOf(node) != "" {
			continue
		}
		virtual := false
		for _, prefix := range []string{"loop", "ram", "zram", "sr", "fd", "nbd", "dm-", "md"} {
			virtual = virtual || strings.HasPrefix(e.Name(), prefix)
		}
		if !virtual {
			disks = append(disks, e.Name())
		}
	}
	return disks
}
