package blockdev

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
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
	var nodes []*node
	for _, n := range v.nodes {
		switch {
		case n.hidden, n.partition, len(n.slaves) > 0,
			n.Transport == "device-mapper", n.Transport == "md",
			n.virtual && n.Size == 0 && len(n.unknown) == 0,
			n.virtual && n.Major == 1: // /dev/ram
			continue
		}
		nodes = append(nodes, n)
	}
	slices.SortFunc(nodes, func(a, b *node) int { return compareNames(a.Name, b.Name) })
	devices := make([]Device, len(nodes))
	// At once: one that does not answer holds up no other.
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(maxProbes)
	for i, n := range nodes {
		group.Go(func() (err error) {
			devices[i], err = v.probed(ctx, n)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
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
	return v.probed(ctx, n)
}

// probed is the node's Device with its contents.
func (v *survey) probed(ctx context.Context, n *node) (Device, error) {
	contents, silent, err := v.contents(ctx, n.Name)
	d := v.device(n)
	d.Contents = contents
	if r := v.silence(n); silent && !slices.Contains(d.Reasons, r) {
		d.Reasons = append(d.Reasons, r)
	}
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
	if v.isSilent(n) {
		d.Reasons = append(d.Reasons, v.silence(n))
	}
	if disk := v.nodes[n.disk]; n.partition && disk != nil {
		d.LogicalBlockSize = disk.LogicalBlockSize
		d.Transport, d.Removable, d.DiskSeq = disk.Transport, disk.Removable, disk.DiskSeq
		d.Vendor, d.Model, d.Serial = disk.Vendor, disk.Model, disk.Serial
	}
	return d
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
