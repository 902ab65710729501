package blockdev

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// systemPoints are the mount points without which the running system is no
// more.
var systemPoints = []string{"/", "/boot", "/boot/efi", "/efi", "/usr", "/var", "/home"}

// reasons gives every reason against writing n, the gravest first.
func (v *survey) reasons(n *node) []Reason {
	var all []Reason
	add := func(code, format string, args ...any) {
		r := Reason{code, fmt.Sprintf(format, args...)}
		if !slices.Contains(all, r) {
			all = append(all, r)
		}
	}
	// A file's loop device matters for what the system needs; else its file
	// system is mounted anyway, and that is said.
	for _, name := range standing(n.Name, v.above, v.files) {
		for _, point := range v.mounts[name] {
			if slices.Contains(systemPoints, point) {
				add(ReasonSystem, "the running system's %s is on %s", point, v.describe(n.Name, name))
			}
		}
	}
	for _, name := range standing(n.Name, v.above, v.files) {
		for _, path := range v.swaps[name] {
			add(ReasonSwap, "swap is in use on %s: swapoff %s", v.describe(n.Name, name), Clean(path))
		}
	}
	parts := standing(n.Name, v.above)
	for _, name := range parts {
		var points []string
		for _, point := range v.mounts[name] {
			if !slices.Contains(systemPoints, point) {
				points = append(points, Clean(point))
			}
		}
		if len(points) > 0 {
			where := points[0]
			if len(points) > 1 {
				where += fmt.Sprintf(" and %d more", len(points)-1)
			}
			add(ReasonMounted, "%s is mounted at %s: unmount it first", v.describe(n.Name, name), where)
		}
	}
	for _, name := range parts {
		below := v.nodes[name]
		if below == nil || name != n.Name && below.disk != n.Name {
			continue // held by what is held
		}
		var by []string
		for _, up := range append(slices.Clone(v.above[name]), v.files[name]...) {
			if u := v.nodes[up]; u == nil || u.disk != name {
				by = append(by, v.title(up))
			}
		}
		if len(by) > 0 {
			who := by[0]
			if len(by) > 1 {
				who += fmt.Sprintf(" and %d more", len(by)-1)
			}
			add(ReasonHeld, "%s is in use by %s", name, who)
		}
	}
	if n.partition {
		add(ReasonPartition, "%s is a partition: give the whole disk, %s", n.Name, n.disk)
		if d := v.nodes[n.disk]; d != nil {
			for _, r := range v.reasons(d) {
				add(r.Code, "%s", r.Text)
			}
		} else {
			add(ReasonUnknown, "the kernel does not show the disk %s", n.disk)
		}
	}
	if n.Backing != "" {
		below := v.named(n.Backing)
		if below != nil || strings.HasPrefix(n.Backing, "/dev/") {
			add(ReasonIndirect, "%s is only another name for %s: give that disk", n.Name, Clean(n.Backing))
		}
		if below != nil && below != n {
			for _, r := range v.reasons(below) {
				if r.Code == ReasonSystem {
					add(r.Code, "%s", r.Text)
				}
			}
		}
	}
	if n.ReadOnly {
		add(ReasonReadOnly, "%s is read-only: look for a switch on it", n.Name)
	}
	if n.partition {
		for _, what := range n.unknown {
			add(ReasonUnknown, "the kernel does not tell %s of %s", what, n.Name)
		}
		return all
	}

	if !n.Removable && n.Transport != "loop" {
		add(ReasonNotRemovable, "%s is built in: only USB disks, SD cards, removable media and loop devices are written", n.Name)
	}
	switch {
	case n.raw("device/type") == "5" && n.Transport != "mmc": // SCSI's type of CD and DVD drives
		add(ReasonUnsupported, "%s is an optical drive", n.Name)
	case n.Size == 0 && !slices.Contains(n.unknown, "size"):
		add(ReasonEmpty, "no medium is in %s", n.Name)
	case n.LogicalBlockSize != 0 && n.LogicalBlockSize != 512 && n.LogicalBlockSize != 4096:
		add(ReasonUnsupported, "%s has sectors of %d bytes; 512 and 4096 are supported", n.Name, n.LogicalBlockSize)
	}
	for _, name := range parts {
		if s := v.nodes[name]; s != nil {
			for _, what := range s.unknown {
				add(ReasonUnknown, "the kernel does not tell %s of %s", what, name)
			}
		} else {
			add(ReasonUnknown, "the kernel does not show %s, which is on %s", name, n.Name)
		}
	}
	if n.Transport != "loop" { // it would have been found by its name
		for _, what := range v.unknown {
			add(ReasonUnknown, "%s", what)
		}
	}
	return all
}

// describe names what stands on a disk: "sda3", "dm-0 (root, on sda)".
func (v *survey) describe(disk, name string) string {
	n := v.nodes[name]
	if n == nil || name == disk || n.disk == disk {
		return name
	}
	return fmt.Sprintf("%s, which is on %s", v.title(name), disk)
}

// title is a name with what a person knows the device by.
func (v *survey) title(name string) string {
	n := v.nodes[name]
	if n == nil {
		return name
	}
	switch {
	case n.text("dm/name") != "":
		return fmt.Sprintf("%s (%s)", name, n.text("dm/name"))
	case n.Backing != "":
		return fmt.Sprintf("%s (%s)", name, Clean(n.Backing))
	}
	return name
}

// compareNames orders names as people count: sda, sdb, sdaa; loop2, loop10.
func compareNames(a, b string) int {
	key := func(s string) (kind, stem, number string) {
		stem = strings.TrimRight(s, "0123456789")
		return stem[:min(2, len(stem))], stem, s[len(stem):]
	}
	ak, as, an := key(a)
	bk, bs, bn := key(b)
	return cmp.Or(
		strings.Compare(ak, bk),
		len(as)-len(bs), strings.Compare(as, bs),
		len(an)-len(bn), strings.Compare(an, bn),
	)
}
