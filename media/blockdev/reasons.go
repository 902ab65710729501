package blockdev

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
)

// The mount points without which the running system, as it was started, is no
// more. Those of live systems are where these keep the medium that they were
// started from: Debian's live-boot and its forerunner, Ubuntu's casper, Arch's
// archiso and Manjaro's copy of it, dracut's dmsquash-live, NixOS, Kiwi, Alpine.
var (
	systemTrees = []string{"/bin", "/boot", "/efi", "/etc", "/gnu", "/lib", "/lib32", "/lib64", "/nix", "/ostree", "/sbin", "/sysroot", "/usr", "/var",
		"/run/live", "/lib/live", "/cdrom", "/isodevice", "/rofs", "/run/archiso", "/run/miso", "/run/initramfs", "/run/rootfsbase",
		"/iso", "/run/overlay", "/.modloop", "/initrd", "/media/root-ro", "/media/root-rw"}
	systemPoints = []string{"/", "/home", "/root", "/opt", "/srv", "/tmp", "/run", "/dev", "/proc", "/sys"}
	// Where /mnt and /media are links, as where /usr alone is the system.
	otherTrees = []string{"/var/mnt", "/var/media", "/var/run/media"}
)

// isSystem reports whether the running system needs what is mounted at point.
func isSystem(point string) bool {
	below := func(dir string) bool { return isBelow(point, dir) }
	switch {
	case slices.ContainsFunc(otherTrees, below):
		return false
	case slices.ContainsFunc(systemTrees, below), slices.Contains(systemPoints, point):
		return true
	}
	// /home/ann, but not what ann mounts below.
	return path.Dir(point) == "/home" || path.Dir(point) == "/var/home"
}

// sizeCap is the size in bytes up to which a disk is taken for a stick or a card.
// Those of "1 TB" stay below it; of what is larger nearly all are disks in USB
// cases, which people keep their backups on.
const sizeCap = 1 << 40

const floppyMajor = 2 // Linux, Documentation/admin-guide/devices.txt

// reasons gives every reason against writing n, the gravest first.
func (v *survey) reasons(n *node) []Reason {
	var all []Reason
	put := func(r Reason) {
		if !slices.Contains(all, r) {
			all = append(all, r)
		}
	}
	add := func(code, format string, args ...any) { put(Reason{Code: code, Text: fmt.Sprintf(format, args...)}) }
	soft := func(code, format string, args ...any) {
		put(Reason{Code: code, Text: fmt.Sprintf(format, args...), Soft: true})
	}
	// A file's loop device matters for what the system needs; else its file
	// system is mounted anyway, and that is said.
	everything := standing(n.Name, v.above, v.files)
	for _, name := range everything {
		if points := v.essential[name]; len(points) > 0 {
			add(ReasonSystem, "the running system's %s on %s", enumerate(points), v.describe(n.Name, name))
		}
	}
	if !n.Removable && !n.partition && n.Transport != "loop" {
		for _, what := range v.untraced {
			add(ReasonUnknown, "%s: only removable disks are written here", what)
		}
	}
	for _, name := range everything {
		for _, area := range v.swaps[name] {
			add(ReasonSwap, "swap is in use on %s: swapoff %s", v.describe(n.Name, name), Clean(area))
		}
	}
	parts := standing(n.Name, v.above)
	for _, name := range parts {
		var points []string
		for _, m := range v.mounts[name] {
			if !isSystem(m.point) {
				points = append(points, Clean(m.point))
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
				put(r)
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
					put(r)
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
		soft(ReasonNotRemovable, "%s is built in: only USB disks, SD cards, removable media and loop devices are written", n.Name)
	}
	if n.Size > sizeCap && n.Transport != "loop" {
		soft(ReasonTooLarge, "%s has %d GB, more than sticks and cards have: it may be a backup disk", n.Name, n.Size/1e9)
	}
	switch scsi := n.raw("device/type"); {
	case scsi == "5" && n.Transport != "mmc": // SCSI's type of CD and DVD drives
		add(ReasonUnsupported, "%s is an optical drive", n.Name)
	case n.Major == floppyMajor:
		add(ReasonUnsupported, "%s is a floppy drive", n.Name)
	case n.raw("queue/zoned") == "host-managed":
		add(ReasonUnsupported, "%s has zones that must be written in their order", n.Name)
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

// enumerate lists mount points with their verb, those nearest to the root first:
// a machine with containers has hundreds.
func enumerate(points []string) string {
	points = slices.SortedFunc(slices.Values(points), func(a, b string) int {
		return cmp.Or(strings.Count(a, "/")-strings.Count(b, "/"), len(a)-len(b), strings.Compare(a, b))
	})
	for i, p := range points {
		points[i] = Clean(p)
	}
	const most = 3
	if len(points) > most {
		points = append(points[:most:most], fmt.Sprintf("%d more", len(points)-most))
	}
	last := len(points) - 1
	if last == 0 {
		return points[0] + " is"
	}
	return strings.Join(points[:last], ", ") + " and " + points[last] + " are"
}

// describe names what stands on a disk: "sda3", "dm-0 (root) on sda".
func (v *survey) describe(disk, name string) string {
	n := v.nodes[name]
	if n == nil || name == disk || n.disk == disk {
		return name
	}
	return fmt.Sprintf("%s on %s", v.title(name), disk)
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
