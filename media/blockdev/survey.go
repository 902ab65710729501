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

	"golang.org/x/sys/unix"
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
	slaves    []string // what it is made of
	unknown   []string // attributes that could not be read
}

// survey is everything at one moment.
type survey struct {
	system System
	nodes  map[string]*node
	byNum  map[devNum]*node

	spaces    [][]mount           // of each mount namespace that is read, our own last
	mounts    map[string][]mount  // node → where it, or what is on it alone, is mounted
	essential map[string][]string // node → the running system's mount points that need it
	swaps     map[string][]string // node → swap files or itself
	// above tells what stands on a node: partitions, holders, loop devices.
	// files tells the loop devices behind which a file on the node is.
	above, files map[string][]string

	unknown []string // what could be on any disk
	// untraced tells what the running system is on without saying which disks, as
	// ZFS does. It claims its disks, so that opening one fails; but that is no reason
	// to try.
	untraced []string
}

// look reads sysfs, mountinfo and swaps.
func (s System) look() (*survey, error) {
	v := &survey{
		system:    s,
		nodes:     map[string]*node{},
		byNum:     map[devNum]*node{},
		mounts:    map[string][]mount{},
		essential: map[string][]string{},
		swaps:     map[string][]string{},
		above:     map[string][]string{},
		files:     map[string][]string{},
	}
	class := filepath.Join(s.sys(), "class/block")
	names, err := os.ReadDir(class)
	if err != nil {
		return nil, fmt.Errorf("list the block devices: %w", err)
	}
	for _, e := range names {
		n, err := readNode(class, e.Name())
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
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

	if v.spaces, err = s.readMounts(); err != nil {
		return nil, err
	}
	v.stack()
	for _, space := range v.spaces {
		for _, m := range space {
			for _, n := range v.mounted(m) {
				if !slices.ContainsFunc(v.mounts[n.Name], func(o mount) bool { return o.point == m.point }) {
					v.mounts[n.Name] = append(v.mounts[n.Name], m)
				}
			}
			if isSystem(m.point) {
				v.need(m, m.point)
			}
		}
	}
	return v, v.readSwaps()
}

// need notes that the running system's mount point needs what the mount m is
// on, through the layers of an overlay.
func (v *survey) need(m mount, point string) {
	nodes := v.mounted(m)
	if hasDisk := m.dev.major != 0 || slices.Contains([]string{"zfs", "btrfs", "bcachefs"}, m.fstype); hasDisk && len(nodes) == 0 {
		v.untraced = append(v.untraced, fmt.Sprintf("the kernel does not tell on which disks the running system's %s (%s) is", Clean(point), Clean(m.fstype)))
	}
	if m.fstype == "overlay" {
		for _, path := range m.paths() {
			nodes = append(nodes, v.filesystem(path)...)
		}
	}
	for _, n := range nodes {
		if !slices.Contains(v.essential[n.Name], point) {
			v.essential[n.Name] = append(v.essential[n.Name], point)
		}
	}
}

// readNode reads /sys/class/block/NAME.
func readNode(class, name string) (*node, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(class, name))
	if err != nil {
		return nil, err
	}
	n := &node{dir: dir}
	n.Name = devName(name)
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
		n.disk = devName(filepath.Base(filepath.Dir(dir)))
	}
	n.Size = n.number("size", -1) * 512 // sysfs counts in 512 bytes whatever the sector size
	if n.Size < 0 || n.Size > 1<<62 {
		n.Size = 0
		n.unknown = append(n.unknown, "size")
	}
	n.ReadOnly = n.flag("ro")
	n.holders = n.list("holders")
	if n.exists("slaves") {
		n.slaves = n.list("slaves")
	}
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
	if n.exists("device/type") && n.raw("device/type") == "" {
		n.unknown = append(n.unknown, "device/type")
	}
	n.Vendor, n.Model, n.Serial = n.identity()
	if n.Transport == "loop" {
		if n.Backing = n.raw("loop/backing_file"); n.Backing == "" && n.Size > 0 {
			n.unknown = append(n.unknown, "loop/backing_file")
		}
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
		names = append(names, devName(e.Name()))
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
	case n.virtual && (name("zram") || name("nbd") || name("drbd") || name("bcache")):
		return strings.TrimRight(n.Name, "0123456789")
	case name("xvd"):
		return "xen"
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

// readMounts reads the mounts of the first process, where we may and where it
// is in another mount namespace, and then our own. Opening with O_EXCL finds what
// is mounted in yet other namespaces.
func (s System) readMounts() ([][]mount, error) {
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
		return [][]mount{mounts}, nil
	case err != nil:
		return nil, fmt.Errorf("read the first process's mounts: %w", err)
	case string(first) == string(text):
		return [][]mount{mounts}, nil
	}
	more, err := parseMountinfo(string(first))
	if err != nil {
		return nil, fmt.Errorf("the first process's %w", err)
	}
	return [][]mount{more, mounts}, nil
}

// stack fills in what stands on what.
func (v *survey) stack() {
	put := func(on map[string][]string, below, above string) {
		if below != above && !slices.Contains(on[below], above) {
			on[below] = append(on[below], above)
		}
	}
	for _, name := range slices.SortedFunc(maps.Keys(v.nodes), compareNames) {
		n := v.nodes[name]
		if n.partition {
			put(v.above, n.disk, name)
		}
		for _, up := range n.holders {
			put(v.above, name, up)
		}
		for _, down := range n.slaves {
			put(v.above, down, name)
		}
		if n.Backing == "" {
			continue
		}
		if b := v.named(n.Backing); b != nil {
			put(v.above, b.Name, name)
			continue
		}
		for _, b := range v.filesystem(n.Backing) {
			put(v.files, b.Name, name)
		}
	}
}

// filesystem gives the nodes of the file system that the file at path lies on,
// as far as its name tells. Of the namespaces the one with the deepest mount on
// the way counts: to the others, the file lies below a folder of their own.
func (v *survey) filesystem(path string) []*node {
	var best []mount
	for _, space := range v.spaces {
		m := holding(space, path)
		switch {
		case len(best) == 0 || len(m.point) > len(best[0].point):
			best = []mount{m}
		case len(m.point) == len(best[0].point):
			best = append(best, m)
		}
	}
	var nodes []*node
	for _, m := range best {
		for _, n := range v.mounted(m) {
			if !slices.Contains(nodes, n) {
				nodes = append(nodes, n)
			}
		}
	}
	return nodes
}

// holding is the mount that the file at path lies on, as far as its name tells;
// the zero mount if none.
func holding(mounts []mount, path string) (m mount) {
	for _, c := range mounts {
		if isBelow(path, c.point) && len(c.point) >= len(m.point) { // of mounts on one point the last one covers
			m = c
		}
	}
	return m
}

// isBelow reports whether path is dir or below it.
func isBelow(path, dir string) bool {
	return dir == "/" || path == dir || strings.HasPrefix(path, dir+"/")
}

// mounted returns the nodes that a mounted file system is on.
func (v *survey) mounted(m mount) []*node {
	var nodes []*node
	add := func(n *node) {
		if n != nil && !slices.Contains(nodes, n) {
			nodes = append(nodes, n)
		}
	}
	if m.dev.major != 0 {
		add(v.byNum[m.dev])
	} else { // without a device number of its own (btrfs) only the source tells
		add(v.named(m.source))
	}
	switch m.fstype {
	case "btrfs":
		// The source is one of the file system's devices; sysfs lists all. A source
		// that is no more, such as the /dev/root by which the kernel itself
		// mounted, can be any of those that are mounted.
		which := "*"
		if len(nodes) > 0 {
			which = sysName(nodes[0].Name)
		}
		found, _ := filepath.Glob(filepath.Join(v.system.sys(), "fs/btrfs/*/devices", which))
		for _, f := range found {
			peers, _ := os.ReadDir(filepath.Dir(f))
			for _, p := range peers {
				add(v.nodes[devName(p.Name())])
			}
		}
	case "bcachefs": // the source lists all devices
		for _, path := range strings.Split(m.source, ":") {
			add(v.named(path))
		}
	case "xfs": // its log or data can be on devices of their own
		for _, path := range m.paths() {
			add(v.named(path))
		}
	}
	return nodes
}

// devName is the name of a device as it is below /dev: sysfs writes the slash of
// names such as cciss/c0d0 as an exclamation mark.
func devName(sys string) string { return strings.ReplaceAll(sys, "!", "/") }

func sysName(dev string) string { return strings.ReplaceAll(dev, "/", "!") }

// named finds the node that a path is of, through symbolic links such as
// /dev/mapper/root; nil if it is none.
func (v *survey) named(path string) *node {
	if !filepath.IsAbs(path) {
		return nil
	}
	rel, ok := strings.CutPrefix(path, "/dev/")
	if !ok {
		// A node can be made anywhere; it is the number that counts.
		if num, ok := nodeNumber(path); ok && v.system.Dev == "" {
			return v.byNum[num]
		}
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

func (v *survey) readSwaps() error {
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
			on = v.filesystem(s.path)
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
