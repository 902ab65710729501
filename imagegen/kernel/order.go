package kernel

import "strings"

// CompareReleases orders kernel releases by age as far as their names tell:
// numbers count as numbers, and a release candidate comes before its release.
// It returns -1, 0 or 1.
func CompareReleases(a, b string) int {
	for a != "" || b != "" {
		var x, y string
		x, a = cutRun(a, false)
		y, b = cutRun(b, false)
		if x != y {
			// "-rc1" is older than the end of the name and than "-amd64".
			if rx, ry := strings.HasPrefix(x, "-rc"), strings.HasPrefix(y, "-rc"); rx != ry {
				if rx {
					return -1
				}
				return 1
			}
			return strings.Compare(x, y)
		}
		x, a = cutRun(a, true)
		y, b = cutRun(b, true)
		x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
		if len(x) != len(y) {
			if len(x) < len(y) {
				return -1
			}
			return 1
		}
		if x != y {
			return strings.Compare(x, y)
		}
	}
	return 0
}

// cutRun cuts the digits, or what is no digit, off the front of s.
func cutRun(s string, digits bool) (run, rest string) {
	n := 0
	for n < len(s) && (s[n] >= '0' && s[n] <= '9') == digits {
		n++
	}
	return s[:n], s[n:]
}
