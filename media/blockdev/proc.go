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
	dev    devNum // of the file system; the major is 0 where it is not on one device, as with btrfs
	point  string // where it is mounted
	fstype string
	source string
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
		dev, err := parseDevNum(f[2])
		if err != nil {
			return nil, fmt.Errorf("mountinfo line %d: %w", i+1, err)
		}
		mounts = append(mounts, mount{
			dev:    dev,
			point:  unescape(f[4]),
			fstype: f[dash+1],
			source: unescape(f[dash+2]),
		})
	}
	return mounts, nil
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
