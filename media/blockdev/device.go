package blockdev

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoDevice says that the kernel shows no such disk.
var ErrNoDevice = errors.New("no such disk: memlinux devices lists what is there")

// Devices lists every disk with what is on it and each reason not to write it.
// What is made of disks (partitions, device mapper, md) is not listed, nor
// memory disks and loop devices without a file.
func (s System) Devices(ctx context.Context) ([]Device, error) {
	v, err := s.look()
	if err != nil {
		return nil, err
	}
	var devices []Device
	for _, n := range v.nodes {
		switch {
		case n.hidden, n.partition, len(n.slaves) > 0,
			n.Transport == "device-mapper", n.Transport == "md",
			n.virtual && n.Size == 0 && len(n.unknown) == 0,
			n.virtual && n.Major == 1: // /dev/ram
			continue
		}
		devices = append(devices, v.device(n))
	}
	slices.SortFunc(devices, func(a, b Device) int { return compareNames(a.Name, b.Name) })
	for i := range devices {
		if devices[i].Contents, err = v.contents(ctx, devices[i].Name); err != nil {
			return nil, err
		}
	}
	return devices, nil
}

// Device looks at one disk by the kernel's name for it (sda). A partition's
// name gives a Device with ReasonPartition, which says what disk it is on. The
// error is ErrNoDevice if there is nothing of that name.
func (s System) Device(ctx context.Context, name string) (Device, error) {
	v, err := s.look()
	if err != nil {
		return Device{}, err
	}
	n, err := v.find(name)
	if err != nil {
		return Device{}, err
	}
	d := v.device(n)
	d.Contents, err = v.contents(ctx, name)
	return d, err
}

func (v *survey) find(name string) (*node, error) {
	n := v.nodes[name]
	if n == nil || n.hidden {
		return nil, fmt.Errorf("%s: %w", Clean(name), ErrNoDevice)
	}
	return n, nil
}

// device is the node's Device with its reasons.
func (v *survey) device(n *node) Device {
	d := n.Device
	d.Backing = Clean(d.Backing)
	d.mounted = len(v.mounts[n.Name]) > 0
	d.Reasons = v.reasons(n)
	if disk := v.nodes[n.disk]; n.partition && disk != nil {
		d.LogicalBlockSize = disk.LogicalBlockSize
		d.Transport, d.Removable, d.DiskSeq = disk.Transport, disk.Removable, disk.DiskSeq
		d.Vendor, d.Model, d.Serial = disk.Vendor, disk.Model, disk.Serial
	}
	return d
}

// contents probes the disk and its partitions.
func (v *survey) contents(ctx context.Context, name string) ([]Content, error) {
	names := []string{name}
	for _, up := range v.above[name] {
		if u := v.nodes[up]; u != nil && u.partition && u.disk == name {
			names = append(names, up)
		}
	}
	var all []Content
	for _, name := range names {
		c := Content{Name: name, Size: v.nodes[name].Size}
		path := filepath.Join(v.system.dev(), name)
		if _, ok := nodeNumber(path); ok && c.Size > 0 {
			if err := c.probe(ctx, path); err != nil {
				return nil, fmt.Errorf("see what is on %s: %w", name, err)
			}
		}
		all = append(all, c)
	}
	return all, nil
}

// probe asks libblkid, the library by which udev and mount know file systems
// too. A device that does not answer within seconds is left unknown.
func (c *Content) probe(ctx context.Context, path string) error {
	blkid, err := exec.LookPath("blkid")
	if err != nil {
		// An administrator's tool can be outside of PATH.
		if blkid, err = exec.LookPath("/usr/sbin/blkid"); err != nil {
			return errors.New("blkid is missing: install util-linux")
		}
	}
	limited, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	cmd := exec.CommandContext(limited, blkid, "-p", "-o", "export", path)
	cmd.Env = []string{"LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit) && exit.ExitCode() == 8:
		c.Type = "ambivalent" // blkid's word for several signatures at once
		return nil
	case errors.As(err, &exit): // 2: nothing known, or it could not be read
		return nil
	default:
		return fmt.Errorf("run blkid: %w", err)
	}
	found := parseExport(string(out))
	c.Type = Clean(orElse(found["TYPE"], found["PTTYPE"]))
	c.Label = Clean(orElse(found["LABEL"], found["LABEL_FATBOOT"]))
	c.UUID = Clean(orElse(found["UUID"], found["PTUUID"]))
	c.PartLabel = Clean(found["PART_ENTRY_NAME"])
	return nil
}

// nodeNumber is the device number of a block device's node.
func nodeNumber(path string) (devNum, bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return devNum{}, false
	}
	return devNum{unix.Major(st.Rdev), unix.Minor(st.Rdev)}, true
}

// RefusedError says that a disk must not be written, with every reason.
type RefusedError struct {
	Name    string
	Reasons []Reason
}

func (e *RefusedError) Error() string {
	texts := make([]string, len(e.Reasons))
	for i, r := range e.Reasons {
		texts[i] = r.Text
	}
	return fmt.Sprintf("%s is not written: %s", e.Name, strings.Join(texts, "; "))
}

// Has reports whether one of the reasons has the code.
func (e *RefusedError) Has(code string) bool {
	return slices.ContainsFunc(e.Reasons, func(r Reason) bool { return r.Code == code })
}

// ChangedError says that a disk is no longer the one that a token was made of.
type ChangedError struct {
	Name string
	What string // what differs: "size", "partition table or identity", …
}

func (e *ChangedError) Error() string {
	return fmt.Sprintf("%s is not the disk that was looked at, its %s changed: look at it again before writing", e.Name, e.What)
}
