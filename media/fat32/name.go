package fat32

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	maxNameUnits = 255 // UTF-16 code units of a long name
	longUnits    = 13  // of them in one directory entry
)

// checkName refuses what a long name on FAT can't hold, and what drivers
// change silently.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("the path has an empty part: write it without a leading, trailing or double slash")
	case name == "." || name == "..":
		return fmt.Errorf("the path has the part %q, which is no name: write it without", name)
	case !utf8.ValidString(name):
		return fmt.Errorf("the name %q is not UTF-8: rename it", name)
	case strings.HasSuffix(name, ".") || strings.HasSuffix(name, " "):
		return fmt.Errorf("FAT can't keep the dot or space at the end of %q: rename it", name)
	}
	for _, r := range name {
		// U+FFFF fills the unused part of a long name's last entry.
		if unicode.IsControl(r) || r == 0xffff || strings.ContainsRune(`"*/:<>?\|`, r) {
			return fmt.Errorf("FAT can't hold the character %q in %q: rename it", r, name)
		}
	}
	if n := len(utf16.Encode([]rune(name))); n > maxNameUnits {
		return fmt.Errorf("the name %q has %d UTF-16 units and FAT allows %d: shorten it", name, n, maxNameUnits)
	}
	return nil
}

// fold maps names to the same string that any driver could take for the same.
func fold(name string) string { return strings.ToUpper(strings.ToLower(name)) }

// isShortChar tells the characters of a short name, besides those above 127,
// whose meaning depends on the reader's code page and which are not used here.
func isShortChar(c rune) bool {
	return 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c < 0x80 && strings.ContainsRune("$%'-_@~`!(){}^#&", c)
}

func checkLabel(label string) error {
	for _, c := range label {
		if c != ' ' && !isShortChar(c) {
			return fmt.Errorf("FAT32: the volume label %q has the character %q: use A-Z, 0-9, - and _", label, c)
		}
	}
	if len(label) > 11 {
		return fmt.Errorf("FAT32: the volume label %q has %d characters and FAT allows 11: shorten it", label, len(label))
	}
	if label != strings.Trim(label, " ") {
		return fmt.Errorf("FAT32: the volume label %q begins or ends with a space: write it without", label)
	}
	return nil
}

// shortBasis makes of a name the eight and three characters that its short name
// starts from (fatgen103, "The Basis-Name Generation Algorithm"). whole says
// that they are all of the name but for its case.
func shortBasis(name string) (base, ext string, whole bool) {
	upper := strings.ToUpper(name)
	stem := strings.TrimLeft(strings.ReplaceAll(upper, " ", ""), ".")
	whole = stem == upper
	if i := strings.LastIndexByte(stem, '.'); i >= 0 {
		stem, ext = stem[:i], stem[i+1:]
	}
	clean := func(s string, limit int) string {
		var b strings.Builder
		for _, c := range s {
			switch {
			case c == '.' || b.Len() == limit:
				whole = false
				continue
			case !isShortChar(c):
				whole = false
				c = '_'
			}
			b.WriteByte(byte(c))
		}
		return b.String()
	}
	base, ext = clean(stem, 8), clean(ext, 3)
	if base == "" {
		base, whole = "_", false
	}
	return base, ext, whole
}

func shortName(base, ext string) [11]byte {
	s := [11]byte{' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ', ' ', ' '}
	copy(s[:8], base)
	copy(s[8:], ext)
	return s
}

// setShortNames gives all names of a folder short names that are unique in it,
// and long names where the short one does not say all. A lower-case name gets a
// long one: the case bits that Windows NT has for it are not read everywhere.
func setShortNames(nodes []*node) {
	taken := make(map[[11]byte]bool, len(nodes))
	// Names that are short already keep theirs: a made-up one must not be
	// another file's real name.
	var rest []*node
	for _, n := range nodes {
		base, ext, whole := shortBasis(n.name)
		if !whole {
			rest = append(rest, n)
			continue
		}
		n.short = shortName(base, ext)
		taken[n.short] = true
		if strings.ToUpper(n.name) != n.name {
			n.long = utf16.Encode([]rune(n.name))
		}
	}
	// Names that become alike when they are cut for a tail share a counter, so
	// that no tail is tried for each of thousands of names.
	type tail struct {
		stem, ext string
		digits    int
	}
	next := make(map[tail]int)
	unused := func(base, ext string) [11]byte {
		for digits, first := 1, 1; ; digits, first = digits+1, first*10 {
			t := tail{stem: base[:min(len(base), 7-digits)], ext: ext, digits: digits}
			for i := max(first, next[t]); i < first*10; i++ {
				next[t] = i + 1
				if s := shortName(t.stem+"~"+strconv.Itoa(i), ext); !taken[s] {
					return s
				}
			}
		}
	}
	for _, n := range rest {
		base, ext, _ := shortBasis(n.name)
		n.short = unused(base, ext)
		n.long = utf16.Encode([]rune(n.name))
		taken[n.short] = true
	}
}
