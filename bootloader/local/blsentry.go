package local

import (
	"cmp"
	"math"
	"path"
	"strconv"
	"strings"
)

// blsField is a line of an entry or of loader.conf: a key and its value.
type blsField struct{ key, value string }

// parseBLS reads the lines of a Boot Loader Specification file of type 1
// (https://uapi-group.org/specifications/specs/boot_loader_specification) or of
// loader.conf, as systemd-boot 252 does: a key, blanks, and the value up to the
// line's end without blanks around it and without the quotes around all of it.
// What has no value is left out.
func parseBLS(data []byte) []blsField {
	// The loader's strings are C's: a NUL ends the file.
	text, _, _ := strings.Cut(string(data), "\x00")
	var fields []blsField
	for line := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == '\n' || r == '\r' }) {
		line = strings.Trim(line, " \t")
		if strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.IndexAny(line, " \t")
		if at < 0 {
			continue
		}
		fields = append(fields, blsField{line[:at], unquoted(strings.TrimLeft(line[at:], " \t"))})
	}
	return fields
}

func unquoted(value string) string {
	if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
		return value[1 : len(value)-1]
	}
	return value
}

// lastField is the value of a key, the last where there are several.
func lastField(fields []blsField, key string) string {
	for i := len(fields) - 1; i >= 0; i-- {
		if fields[i].key == key {
			return fields[i].value
		}
	}
	return ""
}

// blsEntry is an entry as a boot loader sees it.
type blsEntry struct {
	id     string // the name of its file; auto-windows and its like for one that the loader found by itself
	fields []blsField
}

func (e blsEntry) field(key string) string { return lastField(e.fields, key) }

// title is what the menu shows, as long as no other entry has the same.
func (e blsEntry) title() string {
	if title := e.field("title"); title != "" {
		return title
	}
	return e.id
}

// loads is the path of what the entry starts, from the root of its partition,
// or "". Such an entry no loader shows.
func (e blsEntry) loads() string {
	for i := len(e.fields) - 1; i >= 0; i-- {
		if key := e.fields[i].key; key == "linux" || key == "efi" || key == "uki" {
			return e.fields[i].value
		}
	}
	return ""
}

// plain is the entry's ID without the boot counter that its file's name may
// have: debian+2-1.conf is debian.conf, with 2 tries left. tries is -1 where
// there is none.
func (e blsEntry) plain() (id string, tries int) {
	dot := strings.LastIndexByte(e.id, '.')
	plus := strings.LastIndexByte(e.id, '+')
	if plus < 0 || dot < plus {
		return e.id, -1
	}
	left, done, counted := strings.Cut(e.id[plus+1:dot], "-")
	tries, ok := counter(left)
	if _, okDone := counter(done); !ok || counted && !okDone {
		return e.id, -1
	}
	return e.id[:plus] + e.id[dot:], tries
}

func counter(s string) (int, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return int(n), err == nil && n <= math.MaxInt32
}

// matches says whether a pattern of LoaderEntryDefault, LoaderEntryOneShot or
// loader.conf means the entry. Case does not matter in it.
func (e blsEntry) matches(pattern string) bool {
	if pattern == "" {
		return false
	}
	plain, _ := e.plain()
	for _, id := range []string{e.id, plain} {
		if ok, err := path.Match(strings.ToLower(pattern), strings.ToLower(id)); ok && err == nil {
			return true
		}
	}
	return false
}

// compareBLS is the order in which systemd-boot (since 251, which knows
// sort-key) shows entries; the first one boots where nothing says which.
func compareBLS(a, b blsEntry) int {
	_, triesA := a.plain()
	_, triesB := b.plain()
	keyA, keyB := a.field("sort-key"), b.field("sort-key")
	order := cmp.Or(
		compareBool(triesA == 0, triesB == 0),
		compareBool(keyA == "", keyB == ""),
	)
	if order == 0 && keyA != "" {
		order = cmp.Or(
			strings.Compare(keyA, keyB),
			strings.Compare(a.field("machine-id"), b.field("machine-id")),
			-compareVersions(a.field("version"), b.field("version")),
		)
	}
	return cmp.Or(order,
		-compareVersions(strings.ToLower(a.id), strings.ToLower(b.id)),
		-cmp.Compare(triesA, triesB))
}

// compareBool puts false before true.
func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// compareVersions compares as the UAPI Version Format Specification
// (https://uapi-group.org/specifications/specs/version_format_specification)
// says: less than 0 where a is older.
func compareVersions(a, b string) int {
	for {
		a, b = strings.TrimLeftFunc(a, noVersion), strings.TrimLeftFunc(b, noVersion)
		if order := separator(&a, &b, '~'); order != 0 {
			return order
		}
		if a == "" || b == "" {
			return compareBool(a != "", b != "")
		}
		for _, sign := range []byte("-^.") {
			if order := separator(&a, &b, sign); order != 0 {
				return order
			}
		}
		in, number := letter, digit(first(a)) || digit(first(b))
		if number {
			in = digit
		}
		partA, partB := leading(&a, in), leading(&b, in)
		if !number {
			if order := strings.Compare(partA, partB); order != 0 {
				return order
			}
			continue
		}
		if order := compareBool(partA != "", partB != ""); order != 0 {
			return order
		}
		partA, partB = strings.TrimLeft(partA, "0"), strings.TrimLeft(partB, "0")
		if order := cmp.Or(cmp.Compare(len(partA), len(partB)), strings.Compare(partA, partB)); order != 0 {
			return order
		}
	}
}

// separator takes sign from the front of both. Where one has it, that is older.
func separator(a, b *string, sign byte) int {
	hasA, hasB := first(*a) == sign, first(*b) == sign
	if hasA && hasB {
		*a, *b = (*a)[1:], (*b)[1:]
	}
	return compareBool(!hasA, !hasB)
}

// leading takes the bytes of a kind from the front of s.
func leading(s *string, in func(byte) bool) string {
	n := 0
	for n < len(*s) && in((*s)[n]) {
		n++
	}
	part := (*s)[:n]
	*s = (*s)[n:]
	return part
}

func first(s string) byte {
	if s == "" {
		return 0
	}
	return s[0]
}

func digit(c byte) bool  { return '0' <= c && c <= '9' }
func letter(c byte) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }

func noVersion(r rune) bool {
	return r > 'z' && r != '~' || !digit(byte(r)) && !letter(byte(r)) && !strings.ContainsRune("~-^.", r)
}
