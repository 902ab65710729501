package testvm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/google/go-cmp/cmp"

	"github.com/memlinux/memlinux/testvm/need"
)

const globalGUID = "8be4df61-93ca-11d2-aa0d-00e098032b8c"

var bootOrder = Variable{"BootOrder", globalGUID, 7, []byte{0, 0}}

// names are the variables of a flash memory, "name=data".
func names(t *testing.T, flash []byte) (list []string) {
	t.Helper()
	s, err := parseStore(flash)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range s.records {
		var units []uint16
		for name := r.key[16:]; name != "\x00\x00"; name = name[2:] {
			units = append(units, binary.LittleEndian.Uint16([]byte(name)))
		}
		list = append(list, fmt.Sprintf("%s=%x", string(utf16.Decode(units)), r.bytes[variableHeader+len(r.key)-16:]))
	}
	return list
}

func emptyStore(t testing.TB) []byte {
	t.Helper()
	return read(t, need.File(t, ovmfVars, "ovmf"))
}

func TestSetVariables(t *testing.T) {
	other := Variable{"BootOrder", "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", 7, []byte{9}}
	for name, c := range map[string]struct {
		vars []Variable
		want []string
	}{
		"none":                        {nil, nil},
		"one":                         {[]Variable{bootOrder}, []string{"BootOrder=0000"}},
		"an odd length, then another": {[]Variable{{"A", globalGUID, 7, []byte{1}}, {"B", globalGUID, 3, []byte{2, 3, 4}}}, []string{"A=01", "B=020304"}},
		"the same name is replaced":   {[]Variable{bootOrder, {"BootOrder", globalGUID, 7, []byte{1, 0, 0, 0}}}, []string{"BootOrder=01000000"}},
		"another vendor's of the same name stays":   {[]Variable{bootOrder, other}, []string{"BootOrder=0000", "BootOrder=09"}},
		"a GUID in capitals is the same":            {[]Variable{bootOrder, {"BootOrder", strings.ToUpper(globalGUID), 7, []byte{5}}}, []string{"BootOrder=05"}},
		"names differ by case":                      {[]Variable{{"a", globalGUID, 7, []byte{1}}, {"A", globalGUID, 7, []byte{2}}}, []string{"a=01", "A=02"}},
		"a name outside the first plane of Unicode": {[]Variable{{"😀é", globalGUID, 7, []byte{1}}}, []string{"😀é=01"}},
	} {
		t.Run(name, func(t *testing.T) {
			empty := emptyStore(t)
			got, err := setVariables(empty, c.vars)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, names(t, got)); d != "" {
				t.Error(d)
			}
			if len(got) != len(empty) || !bytes.Equal(got[0x40000:], empty[0x40000:]) || !bytes.Equal(got[:100], empty[:100]) {
				t.Error("what is not the store's content changed")
			}
		})
	}
}

func TestSetVariablesRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		v    Variable
		want string
	}{
		"no name":              {Variable{"", globalGUID, 7, []byte{1}}, "that is no name"},
		"a NUL in the name":    {Variable{"a\x00b", globalGUID, 7, []byte{1}}, "that is no name"},
		"a name in Latin-1":    {Variable{"a\xe9", globalGUID, 7, []byte{1}}, "that is no name"},
		"no GUID":              {Variable{"A", "", 7, []byte{1}}, "not a GUID"},
		"a GUID cut short":     {Variable{"A", globalGUID[:35], 7, []byte{1}}, "not a GUID"},
		"dashes in odd places": {Variable{"A", "8be4df6-193ca-11d2-aa0d-00e098032b8c", 7, []byte{1}}, "not a GUID"},
		"a volatile one":       {Variable{"BootCurrent", globalGUID, 6, []byte{1}}, "does not outlast"},
		"no access at boot":    {Variable{"A", globalGUID, 1, []byte{1}}, "does not outlast"},
		"no data":              {Variable{"A", globalGUID, 7, nil}, "without data"},
		"more than fits":       {Variable{"A", globalGUID, 7, make([]byte, 0x3ffb8)}, "need more than the 262044 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := setVariables(emptyStore(t), []Variable{c.v}); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestStoreIsFilledToTheLastByte guards the bounds of "full".
func TestStoreIsFilledToTheLastByte(t *testing.T) {
	room := 0x3ffb8 - storeHeader - variableHeader - 4 // "A" and its NUL
	full := Variable{"A", globalGUID, 7, bytes.Repeat([]byte{0xaa}, room)}
	got, err := setVariables(emptyStore(t), []Variable{full})
	if err != nil {
		t.Fatal(err)
	}
	if n := names(t, got); len(n) != 1 {
		t.Errorf("%d variables", len(n))
	}
	if _, err := setVariables(got, []Variable{{"B", globalGUID, 7, []byte{1}}}); err == nil {
		t.Error("there was room in a full store")
	}
	if got, err = setVariables(got, []Variable{{"A", globalGUID, 7, []byte{1}}, {"B", globalGUID, 7, []byte{1}}}); err != nil {
		t.Errorf("what is replaced makes no room: %v", err)
	} else if n := names(t, got); len(n) != 2 {
		t.Errorf("variables %v", n)
	}
}

func TestParseStore(t *testing.T) {
	change := func(at int, p ...byte) func([]byte) { return func(f []byte) { copy(f[at:], p) } }
	two := []Variable{{"A", globalGUID, 7, []byte{1}}, {"A", "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", 7, []byte{2}}}
	const second = 100 + 68 // A's header, name, data and padding
	for name, c := range map[string]struct {
		change func(flash []byte)
		vars   []string
		err    string
	}{
		"as it was":                              {change(0), []string{"A=01", "A=02"}, ""},
		"one deleted":                            {change(102, 0x3d), []string{"A=02"}, ""},
		"one whose writing was cut off":          {change(102, 0x7f), []string{"A=02"}, ""},
		"a header that was not finished ends it": {change(102, 0xff), nil, ""},
		"being replaced, without the other":      {change(102, 0x3e), []string{"A=01", "A=02"}, ""},
		"being replaced, with the other": {func(f []byte) {
			f[102] = 0x3e
			copy(f[second+44:], f[100+44:100+60]) // the same vendor
		}, []string{"A=02"}, ""},
		"a length beyond the store": {change(140, 0xff, 0xff, 0xff, 0x7f), nil, "is longer than the store"},
		"no firmware volume":        {change(40, 'x'), nil, "does not begin with a firmware volume"},
		"another file system":       {change(16, 0), nil, "does not begin with a firmware volume"},
		"a wrong checksum":          {change(50, 0), nil, "damaged"},
		"no authenticated store":    {change(72, 0), nil, "no store of authenticated variables"},
		"a store longer than all":   {change(72+16, 0xff, 0xff, 0xff, 0xff), nil, "the store says"},
		"a store that is no store":  {change(72+16, 0, 0, 0, 0), nil, "the store says"},
		"not formatted":             {change(72+20, 0xff), nil, "not formatted"},
	} {
		t.Run(name, func(t *testing.T) {
			flash, err := setVariables(emptyStore(t), two)
			if err != nil {
				t.Fatal(err)
			}
			c.change(flash)
			_, err = parseStore(flash)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.vars, names(t, flash)); d != "" {
				t.Error(d)
			}
		})
	}
	for _, n := range []int{0, 71, 99, 100, 1000} {
		if _, err := parseStore(emptyStore(t)[:n]); err == nil {
			t.Errorf("no error for %d bytes", n)
		}
	}
}

// TestParseOVMFsOwn reads a store that OVMF itself wrote: Debian's with
// Microsoft's keys.
func TestParseOVMFsOwn(t *testing.T) {
	flash := read(t, need.File(t, "/usr/share/OVMF/OVMF_VARS_4M.ms.fd", "ovmf"))
	before := names(t, flash)
	for _, want := range []string{"PK=", "KEK=", "db=", "dbx=", "SecureBootEnable=01"} {
		if !slices.ContainsFunc(before, func(n string) bool { return strings.HasPrefix(n, want) }) {
			t.Errorf("no %s", want)
		}
	}
	again, err := setVariables(flash, []Variable{bootOrder})
	if err != nil {
		t.Fatal(err)
	}
	before = slices.DeleteFunc(before, func(n string) bool { return strings.HasPrefix(n, "BootOrder=") })
	if d := cmp.Diff(append(before, "BootOrder=0000"), names(t, again)); d != "" {
		t.Errorf("the others' changed: %s", d)
	}
}

// FuzzStore holds the editor to this: what it makes of any store that it reads
// is a store with the same variables and the new one.
func FuzzStore(f *testing.F) {
	// A small store stands for the large one, that the fuzzer may reach its end.
	small := make([]byte, 1024)
	copy(small, emptyStore(f)[:100])
	for i := 100; i < len(small); i++ {
		small[i] = 0xff
	}
	binary.LittleEndian.PutUint64(small[32:], 1024)
	binary.LittleEndian.PutUint32(small[88:], 1024-72)
	sum := func(p []byte) {
		binary.LittleEndian.PutUint16(p[50:], 0)
		var s uint16
		for i := 0; i < volumeHeader; i += 2 {
			s += binary.LittleEndian.Uint16(p[i:])
		}
		binary.LittleEndian.PutUint16(p[50:], -s)
	}
	sum(small)
	two, err := setVariables(small, []Variable{bootOrder, {"A", globalGUID, 7, []byte{1}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(small, "B", []byte{1, 2, 3})
	f.Add(two, "A", []byte{1, 2, 3})
	f.Add(two, "BootOrder", make([]byte, 700))
	f.Fuzz(func(t *testing.T, flash []byte, name string, data []byte) {
		flash = bytes.Clone(flash)
		if len(flash) >= volumeHeader {
			sum(flash)
		}
		before, err := parseStore(flash)
		if err != nil {
			return
		}
		after, err := setVariables(flash, []Variable{{name, globalGUID, 7, data}})
		if err != nil {
			return
		}
		if len(after) != len(flash) {
			t.Fatalf("%d bytes became %d", len(flash), len(after))
		}
		s, err := parseStore(after)
		if err != nil {
			t.Fatalf("what it wrote it can't read: %v", err)
		}
		r, _ := Variable{name, globalGUID, 7, data}.encode()
		before.put(r)
		if len(before.records) != len(s.records) {
			t.Fatalf("%d variables, not %d", len(s.records), len(before.records))
		}
		for i := range s.records {
			if s.records[i].key != before.records[i].key || !bytes.Equal(s.records[i].bytes, before.records[i].bytes) {
				t.Errorf("variable %d changed", i)
			}
		}
	})
}
