package modules

import (
	"path"
	"strings"
)

// A set is the modules for a purpose, by patterns of path.Match on their paths
// below kernel/, without .ko and with - for _. A pattern that ends in a slash
// is all below that folder, and one that begins with ! takes away what those
// before it brought. What the modules depend on comes by itself, so only what
// is loaded for a device or by name is here.
type set struct {
	name     string
	patterns []string
}

var (
	usbHosts = []string{"drivers/usb/host/?hci-*"}
	// What virtual machines have their devices on.
	virtio = []string{"drivers/virtio/virtio-pci", "drivers/virtio/virtio-mmio"}
)

var sets = []set{
	{"input", join(usbHosts, virtio, []string{
		"drivers/hid/usbhid/usbhid", "drivers/hid/hid-generic", "drivers/input/evdev",
		// Keyboards that hid-generic drives, but not each key of them.
		"drivers/hid/hid-apple", "drivers/hid/hid-cherry", "drivers/hid/hid-chicony", "drivers/hid/hid-corsair",
		"drivers/hid/hid-cypress", "drivers/hid/hid-holtek-kbd", "drivers/hid/hid-ite", "drivers/hid/hid-kensington",
		"drivers/hid/hid-lenovo", "drivers/hid/hid-logitech*", "drivers/hid/hid-microsoft", "drivers/hid/hid-samsung",
		"drivers/input/keyboard/atkbd", "drivers/input/serio/i8042", "drivers/input/serio/hyperv-keyboard",
		"drivers/virtio/virtio-input",
	})},
	{"usb-storage", join(usbHosts, []string{"drivers/usb/storage/", "drivers/scsi/sd-mod", "drivers/scsi/sr-mod"})},
	{"disk", join(virtio, []string{
		"drivers/ata/", "!drivers/ata/pata-pcmcia", "!drivers/ata/pata-legacy",
		"drivers/nvme/host/nvme", "drivers/pci/controller/vmd",
		"drivers/scsi/sd-mod", "drivers/scsi/sr-mod",
		"drivers/block/virtio-blk", "drivers/scsi/virtio-scsi",
		"drivers/scsi/vmw-pvscsi", "drivers/message/fusion/mptspi", "drivers/message/fusion/mptsas",
		"drivers/scsi/hv-storvsc", "drivers/pci/controller/pci-hyperv", "drivers/block/xen-blkfront",
		"drivers/scsi/sym53c8xx-2/", "drivers/scsi/BusLogic",
		"drivers/scsi/megaraid/", "drivers/scsi/mpt3sas/", "drivers/scsi/aacraid/", "drivers/scsi/hpsa",
		"drivers/scsi/smartpqi/", "drivers/scsi/isci/",
		"drivers/mmc/core/mmc-block", "drivers/mmc/host/", "!drivers/mmc/host/sdricoh-cs",
	})},
	{"filesystems", []string{
		"fs/ext4/", "fs/fat/", "fs/exfat/", "fs/isofs/", "fs/udf/", "fs/xfs/", "fs/btrfs/", "fs/f2fs/", "fs/squashfs/",
		"fs/erofs/", "fs/ntfs3/", "fs/overlayfs/", "fs/fuse/fuse", "drivers/block/loop",
		// The code pages that vfat has by default in one distribution or another.
		"fs/nls/nls-cp437", "fs/nls/nls-cp850", "fs/nls/nls-ascii", "fs/nls/nls-iso8859-1", "fs/nls/nls-iso8859-15", "fs/nls/nls-utf8",
	}},
	{"network", join(virtio, usbHosts, []string{
		"net/packet/af-packet", "net/ipv6/ipv6",
		"drivers/net/virtio-net", "drivers/net/vmxnet3/", "drivers/net/hyperv/", "drivers/pci/controller/pci-hyperv",
		"drivers/net/xen-netfront", "drivers/net/ethernet/amazon/", "drivers/net/ethernet/google/",
		"drivers/net/ethernet/intel/", "drivers/net/ethernet/realtek/", "drivers/net/ethernet/broadcom/",
		"drivers/net/ethernet/atheros/", "drivers/net/ethernet/aquantia/", "drivers/net/ethernet/marvell/sk*",
		"drivers/net/ethernet/mellanox/", "!drivers/net/ethernet/mellanox/mlxsw/", "drivers/net/ethernet/emulex/",
		"drivers/net/ethernet/amd/", "!drivers/net/ethernet/amd/nmclan-cs", "drivers/net/ethernet/dec/", "!drivers/net/ethernet/dec/tulip/xircom-cb",
		"drivers/net/ethernet/nvidia/", "drivers/net/ethernet/via/", "drivers/net/ethernet/3com/3c59x",
		"drivers/net/ethernet/8390/ne2k-pci", "drivers/net/ethernet/jme", "drivers/net/ethernet/stmicro/",
		// A network chip finds its transceiver's driver by the kernel's own modprobe.
		"drivers/net/phy/",
		"drivers/net/usb/", "!drivers/net/usb/hso", "!drivers/net/usb/cdc-phonet", "!drivers/net/usb/qmi-wwan",
		"!drivers/net/usb/cdc-mbim", "!drivers/net/usb/huawei-cdc-ncm", "!drivers/net/usb/sierra-net",
	})},
}

// Default are the sets that stand for an empty choice: what it takes to use a
// keyboard and to find and mount a disk.
var Default = []string{"input", "usb-storage", "disk", "filesystems"}

// SetNames are the names of the sets; "all" is all of them, and "none" alone is
// nothing.
func SetNames() []string {
	var names []string
	for _, s := range sets {
		names = append(names, s.name)
	}
	return append(names, "all", "none")
}

func join(lists ...[]string) (all []string) {
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}

// has reports whether m, or the module that it replaces, is in s.
func (s set) has(m Module) bool {
	p := m.Path
	if m.Place != "" {
		p = m.Place
	}
	p, in := strings.CutPrefix(p, "kernel/")
	if !in {
		return false
	}
	p = strings.ReplaceAll(strings.TrimSuffix(p, ".ko"), "_", "-")
	found := false
	for _, pattern := range s.patterns {
		pattern, not := strings.CutPrefix(pattern, "!")
		if found == not && match(pattern, p) {
			found = !not
		}
	}
	return found
}

func match(pattern, p string) bool {
	if strings.HasSuffix(pattern, "/") {
		return strings.HasPrefix(p, pattern)
	}
	// path.Match takes its time, and all but a few end here.
	i := 0
	for i < len(pattern) && !strings.ContainsRune(`*?[\`, rune(pattern[i])) {
		if i == len(p) || pattern[i] != p[i] {
			return false
		}
		i++
	}
	ok, _ := path.Match(pattern[i:], p[i:]) // a test holds that the patterns are right
	return ok
}

// blockFilesystems are the file systems that mount tries on a device of which it
// is not told the type, in this order: those first whose driver knows its own.
// ext4 also drives ext2 and ext3.
var blockFilesystems = []string{"ext4", "xfs", "btrfs", "f2fs", "squashfs", "erofs", "iso9660", "udf", "exfat", "ntfs3", "vfat"}
