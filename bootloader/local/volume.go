package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
)

// Volume is a mounted file system on the way to a boot loader.
type Volume struct {
	MountPoint string // /boot
	Root       string // of the mount within the file system: "/" or a btrfs subvolume's path (mountinfo field 4)
	Type       string // ext4, ext3, vfat, xfs, btrfs, as mountinfo says
	Device     string // kernel name: sda1; "" where it is not one partition
	UUID       string // the file system's, as blkid and GRUB's search --fs-uuid write it
	Start      int64  // bytes from the disk's start to the partition's; 0 for a whole disk
	ReadOnly   bool
}

// LoaderPath is a path below MountPoint as a boot loader sees it from the file
// system's root: /boot/memlinux/x is /memlinux/x where /boot is a partition of
// its own, and /@/boot/memlinux/x where it lies on btrfs's subvolume @. The
// error says that the path is not below MountPoint.
func (v Volume) LoaderPath(file string) (string, error) {
	rel, ok := below(file, v.MountPoint)
	if !ok {
		return "", fmt.Errorf("%s is not below %s, where its file system is mounted", file, v.MountPoint)
	}
	return path.Join("/", v.Root, rel), nil
}

// below is the path from dir to file, and whether file is dir or in it.
func below(file, dir string) (string, bool) {
	file, dir = path.Clean(file), path.Clean(dir)
	switch {
	case file == dir:
		return "", true
	case dir == "/":
		return strings.TrimPrefix(file, "/"), strings.HasPrefix(file, "/")
	}
	return strings.CutPrefix(file, dir+"/")
}

// mount is a mounted file system.
type mount struct {
	point, root, kind, source string
	major, minor              int
	readOnly                  bool
}

// parseMounts reads /proc/self/mountinfo (Linux,
// Documentation/filesystems/proc.rst §3.5).
func parseMounts(data []byte) ([]mount, error) {
	infos, err := mountinfo.GetMountsFromReader(bytes.NewReader(data), nil)
	if err != nil {
		return nil, err
	}
	mounts := make([]mount, 0, len(infos))
	for _, m := range infos {
		readOnly := slices.Contains(strings.Split(m.Options, ","), "ro") || slices.Contains(strings.Split(m.VFSOptions, ","), "ro")
		mounts = append(mounts, mount{m.Mountpoint, m.Root, m.FSType, m.Source, m.Major, m.Minor, readOnly})
	}
	return mounts, nil
}

// mountOf is the mount that a path of the machine lies on: the one with the
// longest mount point, and of those the last, which covers the others. An
// automount is only a place to wait at.
func mountOf(mounts []mount, file string) (mount, bool) {
	var best mount
	found := false
	for _, m := range mounts {
		if _, ok := below(file, m.point); !ok || m.kind == "autofs" || !path.IsAbs(m.point) {
			continue
		}
		if !found || len(path.Clean(m.point)) >= len(path.Clean(best.point)) {
			best, found = m, true
		}
	}
	return best, found
}

// place is a volume and what it lies on.
type place struct {
	Volume
	partition          int      // 1-based; 0 for a whole disk
	disks              []string // whole disks, sorted; of several for RAID and volume groups
	layers             []string // "LVM (dm-0)": what lies between it and the disks, from the top
	partUUID, partType string   // of its partition, in small letters
}

// place finds the volume that an existing path, Root included, lies on.
func (f *finder) place(file string) (place, error) {
	inside := "/" + strings.TrimPrefix(strings.TrimPrefix(path.Clean(file), path.Clean("/"+f.sys.Root)), "/")
	m, ok := mountOf(f.mounts, inside)
	if !ok {
		return place{}, fmt.Errorf("find the file system of %s: nothing is mounted there", file)
	}
	p := place{Volume: Volume{MountPoint: f.path(m.point), Root: m.root, Type: m.kind, ReadOnly: m.readOnly}}
	node := f.node(m)
	if node == "" {
		return p, nil
	}
	name := filepath.Base(node)
	f.stack(node, &p)
	slices.Sort(p.disks)
	p.disks = slices.Compact(p.disks)
	if len(p.layers) == 0 {
		p.Device = name
		p.partition = readNumber(filepath.Join(node, "partition"))
		p.Start = int64(readNumber(filepath.Join(node, "start"))) * 512 // sysfs counts so, whatever the disk's sectors are
	}
	found, err := f.sys.blkid(f.ctx, f.path("dev", strings.ReplaceAll(name, "!", "/")))
	if err != nil {
		return place{}, fmt.Errorf("see what is on %s: %w", name, err)
	}
	p.UUID = found["UUID"]
	p.partUUID, p.partType = strings.ToLower(found["PART_ENTRY_UUID"]), strings.ToLower(found["PART_ENTRY_TYPE"])
	if m.kind == "btrfs" {
		// A file system over several devices shows one of them.
		members, _ := os.ReadDir(f.path("sys/fs/btrfs", p.UUID, "devices"))
		if p.UUID != "" && len(members) > 1 {
			p.Device, p.Start, p.partition = "", 0, 0
			for _, member := range members {
				if node := f.block(member.Name()); node != "" {
					f.stack(node, &p)
				}
			}
			slices.Sort(p.disks)
			p.disks = slices.Compact(p.disks)
		}
	}
	return p, nil
}

// node is the folder in sysfs of a mount's device, or "".
func (f *finder) node(m mount) string {
	if m.major != 0 {
		node, err := filepath.EvalSymlinks(f.path("sys/dev/block", fmt.Sprintf("%d:%d", m.major, m.minor)))
		if err != nil {
			return ""
		}
		return node
	}
	// btrfs has a number of its own; its source is one of the devices.
	if !strings.HasPrefix(m.source, "/dev/") {
		return ""
	}
	device, err := filepath.EvalSymlinks(f.path(m.source))
	if err != nil {
		return ""
	}
	name, ok := below(device, f.path("dev"))
	if !ok {
		return ""
	}
	return f.block(strings.ReplaceAll(name, "/", "!"))
}

// block is the folder in sysfs of a block device by its name, or "".
func (f *finder) block(name string) string {
	node, err := filepath.EvalSymlinks(f.path("sys/class/block", name))
	if err != nil {
		return ""
	}
	return node
}

// stack walks from a device down to the whole disks.
func (f *finder) stack(node string, p *place) {
	_, err := os.Stat(filepath.Join(node, "partition"))
	partition := err == nil
	if partition {
		node = filepath.Dir(node)
	}
	name := filepath.Base(node)
	// A loop device with partitions is the image of a whole disk, and as good as
	// one. Without them, its file lies on a file system of which a loader knows
	// nothing.
	if layer := layerOf(node); layer != "" && (layer != "loop" || !partition) {
		layer += " (" + name + ")"
		if slices.Contains(p.layers, layer) {
			return
		}
		p.layers = append(p.layers, layer)
	}
	slaves, _ := os.ReadDir(filepath.Join(node, "slaves"))
	if len(slaves) == 0 {
		p.disks = append(p.disks, name)
		return
	}
	for _, slave := range slaves {
		if below, err := filepath.EvalSymlinks(filepath.Join(node, "slaves", slave.Name())); err == nil {
			f.stack(below, p)
		}
	}
}

// layerOf names what a device is that is no disk.
func layerOf(node string) string {
	if _, err := os.Stat(filepath.Join(node, "md")); err == nil {
		return "RAID"
	}
	if _, err := os.Stat(filepath.Join(node, "dm")); err == nil {
		uuid, _ := os.ReadFile(filepath.Join(node, "dm/uuid"))
		switch {
		case bytes.HasPrefix(uuid, []byte("LVM-")):
			return "LVM"
		case bytes.HasPrefix(uuid, []byte("CRYPT-")):
			return "an encrypted volume"
		case bytes.Contains(uuid, []byte("mpath-")):
			return "a multipath device"
		}
		return "a device mapper's volume"
	}
	for _, kind := range []string{"bcache", "loop"} {
		if _, err := os.Stat(filepath.Join(node, kind, "backing_file")); err == nil || kind == "bcache" && strings.HasPrefix(filepath.Base(node), kind) {
			return kind
		}
	}
	return ""
}

// readNumber is the number in a file of sysfs, and 0 where it has none.
func readNumber(file string) int {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0
	}
	return n
}

// runBlkid asks libblkid, by whose word mount and udev go too. Nothing is what
// is not known.
func runBlkid(ctx context.Context, device string) (map[string]string, error) {
	blkid, err := exec.LookPath("blkid")
	if err != nil {
		// An administrator's tool can be outside of PATH.
		if blkid, err = exec.LookPath("/usr/sbin/blkid"); err != nil {
			return nil, errors.New("blkid is missing: install util-linux")
		}
	}
	limited, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	cmd := exec.CommandContext(limited, blkid, "-p", "-o", "export", device)
	cmd.Env = []string{"LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.Output()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case errors.As(err, &exit): // 2: nothing known, or it can't be read; 8: several things at once
		return map[string]string{}, nil
	case err != nil:
		return nil, fmt.Errorf("run blkid: %w", err)
	}
	return parseBlkid(string(out)), nil
}

// parseBlkid reads the output of blkid -o export: KEY=value lines, with shell
// escapes in the values.
func parseBlkid(text string) map[string]string {
	found := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		if !ok || key == "" {
			continue
		}
		var b strings.Builder
		for i := 0; i < len(value); i++ {
			if value[i] == '\\' && i+1 < len(value) {
				i++
			}
			b.WriteByte(value[i])
		}
		found[key] = b.String()
	}
	return found
}
