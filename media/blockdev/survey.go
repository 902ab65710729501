package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// node is a block device as sysfs shows it: a disk, a partition, or something
// that the kernel makes of others.
type node struct {
	Device
	dir       string // its folder in /sys/devices
	virtual   bool   // no hardware is behind it
	hidden    bool   // a path of a multipath device: it has no node in /dev
	partition bool
	disk      string // the disk that a partition is on
	holders   []string
	unknown   []string // attributes that could not be read
}

// survey is everything at one moment.
type survey struct {
	system System
	nodes  map[string]*node
	byNum  map[devNum]*node

	mounts map[string][]string // node → where it, or what is on it alone, is mounted
	swaps  map[string][]string // node → swap files or itself
	// above tells what stands on a node: partitions, holders, loop devices.
	// files tells the loop devices behind which a file on the node is.
	above, files map[string][]string

	unknown []string // what could be on any disk
}

// look reads sysfs, mountinfo and swaps.
func (s System) look() (*survey, error) {
	v := &survey{
		system: s,
		nodes:  map[string]*node{},
		byNum:  map[devNum]*node{},
		mounts: map[string][]string{},
		swaps:  map[string][]string{},
		above:  map[string][]string{},
		files:  map[string][]string{},
	}
	class := filepath.Join(s.sys(), "class/block")
	names, err := os.ReadDir(class)
	if err != nil {
		return nil, fmt.Errorf("list the block devices: %w", err)
	}
	for _, e := range names {
		n, err := readNode(class, e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // unplugged while we read
		}
		if err != nil {
			return nil, fmt.Errorf("look at %s: %w", e.Name(), err)
		}
		n.Path = "/dev/" + n.Name
		v.nodes[n.Name] = n
		if !n.hidden {
			v.byNum[devNum{n.Major, n.Minor}] = n
		}
	}

	mounts, err := s.readMounts()
	if err != nil {
		return nil, err
	}
	v.stack(mounts)
	for _, m := range mounts {
		for _, n := range v.mounted(m) {
			if !slices.Contains(v.mounts[n.Name], m.point) {
				v.mounts[n.Name] = append(v.mounts[n.Name], m.point)
			}
		}
	}
	return v, v.readSwaps(mounts)
}

// readNode reads /sys/class/block/NAME.
func readNode(class, name string) (*node, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(class, name))
	if err != nil {
		return nil, err
	}
	n := &node{dir: dir}
	// The kernel writes the slash of names such as cciss/c0d0 as an exclamation mark.
	n.Name = strings.ReplaceAll(name, "!", "/")
	num, err := os.ReadFile(filepath.Join(dir, "dev"))
	if errors.Is(err, fs.ErrNotExist) && n.number("hidden", 0) == 1 {
		n.hidden = true // NVMe multipath: its paths have no device number
		return n, nil
	}
	if err != nil {
		return nil, err
	}
	dev, err := parseDevNum(string(num))
	if err != nil {
		return nil, err
	}
	n.Major, n.Minor = dev.major, dev.minor
	n.hidden = n.number("hidden", 0) == 1
	n.virtual = strings.Contains(dir, "/devices/virtual/")

	if n.exists("partition") {
		n.partition = true
		n.disk = strings.ReplaceAll(filepath.Base(filepath.Dir(dir)), "!", "/")
	}
	n.Size = n.number("size", -1) * 512 // sysfs counts in 512 bytes whatever the sector size
	if n.Size < 0 || n.Size > 1<<62 {
		n.Size = 0
		n.unknown = append(n.unknown, "size")
	}
	n.ReadOnly = n.flag("ro")
	n.holders = n.list("holders")
	if n.partition {
		return n, nil
	}
	removable := n.flag("removable")
	n.LogicalBlockSize = int(n.number("queue/logical_block_size", 0))
	if n.LogicalBlockSize <= 0 {
		n.LogicalBlockSize = 0
		n.unknown = append(n.unknown, "queue/logical_block_size")
	}
	n.DiskSeq = uint64(max(n.number("diskseq", 0), 0))
	n.Transport = n.transport()
	n.Removable = removable || n.Transport == "usb" ||
		n.Transport == "mmc" && n.text("device/type") == "SD" // type MMC is soldered in
	n.Vendor, n.Model, n.Serial = n.identity()
	if n.Transport == "loop" {
		n.Backing = n.raw("loop/backing_file")
	}
	return n, nil
}

func (n *node) exists(attr string) bool {
	_, err := os.Stat(filepath.Join(n.dir, attr))
	return err == nil
}

// raw is an attribute without its newline, "" where there is none.
func (n *node) raw(attr string) string {
	b, _ := os.ReadFile(filepath.Join(n.dir, attr)) // none is the common case
	return strings.TrimSuffix(string(b), "\n")
}

// text is an attribute fit to be printed.
func (n *node) text(attr string) string { return Clean(n.raw(attr)) }

func (n *node) number(attr string, otherwise int64) int64 {
	v, err := strconv.ParseInt(n.raw(attr), 10, 64)
	if err != nil {
		return otherwise
	}
	return v
}

// flag is an attribute that must be 0 or 1.
func (n *node) flag(attr string) bool {
	switch n.raw(attr) {
	case "0":
	case "1":
		return true
	default:
		n.unknown = append(n.unknown, attr)
	}
	return false
}

func (n *node) list(attr string) []string {
	entries, err := os.ReadDir(filepath.Join(n.dir, attr))
	if err != nil {
		n.unknown = append(n.unknown, attr)
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.ReplaceAll(e.Name(), "!", "/"))
	}
	return names
}

// transport tells the bus by the device's place in the tree, and by its driver's
// name where the place does not tell. The outermost bus counts: a SATA disk
// in a USB case is a USB disk.
func (n *node) transport() string {
	place := strings.Split(n.dir, "/")
	has := func(prefix string) bool {
		return slices.ContainsFunc(place, func(p string) bool {
			rest, ok := strings.CutPrefix(p, prefix)
			return ok && rest != "" && strings.Trim(rest, "0123456789") == ""
		})
	}
	name := func(prefix string) bool { return strings.HasPrefix(n.Name, prefix) }
	switch {
	case has("usb"):
		return "usb"
	case n.virtual && n.exists("loop"), n.virtual && n.Major == 7:
		return "loop"
	case n.virtual && n.exists("dm"):
		return "device-mapper"
	case n.virtual && n.exists("md"):
		return "md"
	case n.virtual && name("zram"):
		return "zram"
	case name("nvme"):
		return "nvme"
	case has("mmc"):
		return "mmc"
	case has("ata"):
		return "ata"
	case has("virtio"):
		return "virtio"
	case name("sd"), name("sr"):
		return "scsi"
	}
	return ""
}

// identity finds vendor, model and serial where each kind of disk has them.
func (n *node) identity() (vendor, model, serial string) {
	vendor = n.text("device/vendor")
	if strings.HasPrefix(vendor, "0x") { // the number of a PCI device, not a name
		vendor = ""
	}
	if vendor == "ATA" { // the SCSI layer's word for "no vendor"
		vendor = ""
	}
	model = orElse(n.text("device/model"), n.text("device/name"))
	serial = orElse(n.text("device/serial"), n.text("serial"))
	if serial == "" {
		// SCSI's page 0x80, unit serial number: four bytes of header, then text (SPC-4 §7.8.15).
		if page := n.raw("device/vpd_pg80"); len(page) > 4 {
			serial = Clean(page[4:])
		}
	}
	if n.Transport == "usb" {
		// The stick's own serial is the USB device's: the nearest folder above
		// that has a vendor number.
		for dir := filepath.Dir(n.dir); len(dir) > 1; dir = filepath.Dir(dir) {
			if _, err := os.Stat(filepath.Join(dir, "idVendor")); err != nil {
				continue
			}
			usb := node{dir: dir}
			vendor = orElse(vendor, usb.text("manufacturer"))
			model = orElse(model, usb.text("product"))
			serial = orElse(usb.text("serial"), serial)
			break
		}
	}
	return vendor, model, serial
}

// readMounts reads our own mounts and, where we may, those of the first
// process, which can be in another mount namespace. Opening with O_EXCL finds
// what is mounted in yet other ones.
func (s System) readMounts() ([]mount, error) {
	text, err := os.ReadFile(filepath.Join(s.proc(), "self/mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("read the mounts: %w", err)
	}
	mounts, err := parseMountinfo(string(text))
	if err != nil {
		return nil, err
	}
	first, err := os.ReadFile(filepath.Join(s.proc(), "1/mountinfo"))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return mounts, nil
	case err != nil:
		return nil, fmt.Errorf("read the first process's mounts: %w", err)
	case string(first) == string(text):
		return mounts, nil
	}
	more, err := parseMountinfo(string(first))
	return append(mounts, more...), err
}

// stack fills in what stands on what.
func (v *survey) stack(mounts []mount) {
	for _, name := range slices.SortedFunc(maps.Keys(v.nodes), compareNames) {
		n := v.nodes[name]
		if n.partition {
			v.above[n.disk] = append(v.above[n.disk], name)
		}
		v.above[name] = append(v.above[name], n.holders...)
		if n.Backing == "" {
			continue
		}
		if b := v.named(n.Backing); b != nil {
			v.above[b.Name] = append(v.above[b.Name], name)
			continue
		}
		for _, b := range v.mounted(holding(mounts, n.Backing)) {
			v.files[b.Name] = append(v.files[b.Name], name)
		}
	}
}

// holding is the mount that the file at path lies on, as far as its name tells;
// the zero mount if none.
func holding(mounts []mount, path string) (m mount) {
	for _, c := range mounts {
		under := c.point == "/" || path == c.point || strings.HasPrefix(path, c.point+"/")
		if under && len(c.point) >= len(m.point) { // of mounts on one point the last one covers
			m = c
		}
	}
	return m
}

// mounted returns the nodes that a mounted file system is on.
func (v *survey) mounted(m mount) []*node {
	if m.dev.major != 0 {
		if n := v.byNum[m.dev]; n != nil {
			return []*node{n}
		}
		return nil
	}
	// Without a device number of its own (btrfs) only the source tells.
	n := v.named(m.source)
	if n == nil {
		return nil
	}
	nodes := []*node{n}
	if m.fstype == "btrfs" {
		// The source is one of the file system's devices; sysfs lists all.
		found, _ := filepath.Glob(filepath.Join(v.system.sys(), "fs/btrfs/*/devices", strings.ReplaceAll(n.Name, "/", "!")))
		for _, f := range found {
			peers, _ := os.ReadDir(filepath.Dir(f))
			for _, p := range peers {
				if peer := v.nodes[strings.ReplaceAll(p.Name(), "!", "/")]; peer != nil && peer != n {
					nodes = append(nodes, peer)
				}
			}
		}
	}
	return nodes
}

// named finds the node of a path in /dev, through symbolic links such as
// /dev/mapper/root; nil if it is none.
func (v *survey) named(path string) *node {
	rel, ok := strings.CutPrefix(path, "/dev/")
	if !ok {
		return nil
	}
	real, err := filepath.EvalSymlinks(filepath.Join(v.system.dev(), rel))
	if err == nil {
		if num, ok := nodeNumber(real); ok {
			return v.byNum[num]
		}
		if r, err := filepath.Rel(v.system.dev(), real); err == nil {
			rel = r
		}
	}
	return v.nodes[rel]
}

func (v *survey) readSwaps(mounts []mount) error {
	text, err := os.ReadFile(filepath.Join(v.system.proc(), "swaps"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel without swap
	}
	if err != nil {
		return fmt.Errorf("read the swap areas: %w", err)
	}
	swaps, err := parseSwaps(string(text))
	if err != nil {
		return err
	}
	for _, s := range swaps {
		var on []*node
		if s.file {
			on = v.mounted(holding(mounts, s.path))
		} else if n := v.named(s.path); n != nil {
			on = []*node{n}
		}
		// A file whose file system can't be traced, as a host's seen from a
		// container, is no reason against every disk: its file system is
		// mounted, so the exclusive open fails on its disk.
		if on == nil && !s.file {
			v.unknown = append(v.unknown, fmt.Sprintf("the disk of the swap area %s was not found", Clean(s.path)))
		}
		for _, n := range on {
			v.swaps[n.Name] = append(v.swaps[n.Name], s.path)
		}
	}
	return nil
}

// standing lists what stands on a node by the given edges, itself first, each
// once.
func standing(name string, edges ...map[string][]string) []string {
	all := []string{name}
	for i := 0; i < len(all); i++ {
		for _, above := range edges {
			for _, up := range above[all[i]] {
				if !slices.Contains(all, up) {
					all = append(all, up)
				}
			}
		}
	}
	return all
}
