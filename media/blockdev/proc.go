package blockdev

import (
	"fmt"
	"strconv"
	"strings"
)

// devNum is a device number as the kernel prints it, "8:1".
type devNum struct{ major, minor uint32 }

func (n devNum) String() string { return fmt.Sprintf("%d:%d", n.major, n.minor) }

func parseDevNum(s string) (devNum, error) {
	major, minor, ok := strings.Cut(strings.TrimSpace(s), ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return devNum{}, fmt.Errorf("%q is not a device number", s)
	}
	return devNum{uint32(a), uint32(b)}, nil
}

// mount is a line of mountinfo (Linux, Documentation/filesystems/proc.rst §3.5).
type mount struct {
	id     uint64 // tells mounts of all namespaces apart
	dev    devNum // of the file system; the major is 0 where it is not on one device, as with btrfs
	point  string // where it is mounted
	fstype string
	source string
	super  string // the file system's own options, still escaped
}

// parseMountinfo reads /proc/PID/mountinfo. A line that can't be understood
// is an error: a mount that goes unseen is a disk that gets overwritten.
func parseMountinfo(text string) ([]mount, error) {
	var mounts []mount
	for i, line := range strings.Split(text, "\n") {
		if line == "" {
			continue
		}
		// ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAG…] - FSTYPE SOURCE SUPEROPTIONS
		f := strings.Split(line, " ")
		dash := 6
		for dash < len(f) && f[dash] != "-" {
			dash++
		}
		if dash+2 >= len(f) {
			return nil, fmt.Errorf("mountinfo line %d: too few fields", i+1)
		}
		id, err := strconv.ParseUint(f[0], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("mountinfo line %d: %q is not a mount's number", i+1, f[0])
		}
		dev, err := parseDevNum(f[2])
		if err != nil {
			return nil, fmt.Errorf("mountinfo line %d: %w", i+1, err)
		}
		m := mount{
			id:     id,
			dev:    dev,
			point:  unescape(f[4]),
			fstype: f[dash+1],
			source: unescape(f[dash+2]),
		}
		if len(f) > dash+3 { // else it has no options, which are no mount's loss
			m.super = f[dash+3]
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// paths gives the paths that the file system's options name: an overlay's
// layers, XFS's devices for log and data. An overlay's lower layers are listed
// with colons between them, "::" before those for data only; what belongs to a
// path has a backslash before it (Linux, Documentation/filesystems/overlayfs.rst).
func (m mount) paths() []string {
	var all []string
	for _, option := range split(m.super, ',') {
		_, value, ok := strings.Cut(option, "=")
		if !ok {
			continue
		}
		for _, path := range split(unescape(value), ':') {
			path = strings.NewReplacer(`\\`, `\`, `\:`, ":", `\,`, ",").Replace(path)
			if strings.HasPrefix(path, "/") {
				all = append(all, path)
			}
		}
	}
	return all
}

// split cuts s at each separator that has no backslash before it.
func split(s string, separator byte) []string {
	var parts []string
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case separator:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

// swap is a line of /proc/swaps.
type swap struct {
	path string
	file bool // a file in a file system, not a device
}

// parseSwaps reads /proc/swaps.
func parseSwaps(text string) ([]swap, error) {
	var swaps []swap
	for i, line := range strings.Split(text, "\n") {
		f := strings.Fields(line)
		if len(f) == 0 || i == 0 && f[0] == "Filename" {
			continue
		}
		// A path's own blanks are escaped; " (deleted)" may follow it, escaped too.
		if len(f) < 2 || !strings.HasPrefix(f[0], "/") || f[1] != "partition" && f[1] != "file" {
			return nil, fmt.Errorf("/proc/swaps line %d is not understood: %q", i+1, line)
		}
		path := strings.TrimSuffix(unescape(f[0]), " (deleted)")
		swaps = append(swaps, swap{path, f[1] == "file"})
	}
	return swaps, nil
}

// unescape undoes the kernel's \ooo for blanks, tabs, newlines and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// parseExport reads the output of `blkid -o export`: one KEY=value a line, the
// value with shell escapes (util-linux, blkid(8)).
func parseExport(text string) map[string]string {
	m := map[string]string{}
	for _, line := range strings.Split(text, "\n") {
		key, value, ok := strings.Cut(line, "=")
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
		m[key] = b.String()
	}
	return m
}
