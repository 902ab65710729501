package local

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestReadVariable(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, data []byte) {
		if err := os.WriteFile(variablePath(dir, name, loaderGUID), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("Good", []byte("\x07\x00\x00\x00a\x00\x00\x00"))
	write("NoData", []byte("\x06\x00\x00\x00"))
	write("Empty", nil)
	write("Short", []byte("\x07\x00\x00"))
	write("Huge", make([]byte, maxVariable+1))

	for name, want := range map[string]*Variable{
		"Good":   {Name: "Good", GUID: loaderGUID, Attributes: 7, Data: []byte("a\x00\x00\x00")},
		"NoData": {Name: "NoData", GUID: loaderGUID, Attributes: 6, Data: []byte{}},
		"Empty":  nil, // made, and not yet written
		"Absent": nil,
	} {
		got, err := readVariable(dir, name, loaderGUID)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", name, diff)
		}
	}
	for _, name := range []string{"Short", "Huge"} {
		if v, err := readVariable(dir, name, loaderGUID); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v, %v; want an error that names it", name, v, err)
		}
	}
	if v, err := readVariable(filepath.Join(dir, "nowhere"), "Good", loaderGUID); v != nil || err != nil {
		t.Errorf("no efivarfs: %v, %v", v, err)
	}
}

func TestUTF16(t *testing.T) {
	utf16 := func(units ...uint16) (data []byte) {
		for _, u := range units {
			data = binary.LittleEndian.AppendUint16(data, u)
		}
		return data
	}
	for _, tt := range []struct {
		name string
		data []byte
		text string
		list []string
	}{
		{"nothing", nil, "", nil},
		{"only a NUL", utf16(0), "", nil},
		{"its end is a NUL", utf16('a', 0xe4, 0), "aä", []string{"aä"}},
		{"its end is the data's", utf16('a', 'b'), "ab", []string{"ab"}},
		{"a surrogate pair", utf16(0xd83d, 0xde00, 0), "😀", []string{"😀"}},
		{"half a surrogate pair", utf16(0xd83d, 0), "\ufffd", []string{"\ufffd"}},
		{"several", utf16('a', 0, 0, 'b', 'c', 0), "a", []string{"a", "bc"}},
		{"the last one without a NUL", utf16('a', 0, 'b'), "a", []string{"a", "b"}},
		{"a unit with a zero byte", utf16(0x100, 0x1, 0), "\u0100\u0001", []string{"\u0100\u0001"}},
	} {
		if got, err := decodeUTF16(tt.data); got != tt.text || err != nil {
			t.Errorf("%s: %q, %v; want %q", tt.name, got, err, tt.text)
		}
		got, err := decodeUTF16List(tt.data)
		if diff := cmp.Diff(tt.list, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got)\n%s", tt.name, err, diff)
		}
	}
	for _, data := range [][]byte{{0}, []byte("a\x00b")} {
		if _, err := decodeUTF16(data); err == nil {
			t.Errorf("%q was taken for a string", data)
		}
		if _, err := decodeUTF16List(data); err == nil {
			t.Errorf("%q was taken for strings", data)
		}
	}
	if got, want := encodeUTF16("aä😀"), utf16('a', 0xe4, 0xd83d, 0xde00, 0); !bytes.Equal(got, want) {
		t.Errorf("encoded: % x, want % x", got, want)
	}
}

func FuzzVariable(f *testing.F) {
	f.Add([]byte("\x07\x00\x00\x00a\x00.\x00c\x00o\x00n\x00f\x00\x00\x00"))
	f.Add([]byte("\x06\x00\x00\x00a\x00\x00\x00b\x00\x00\x00"))
	f.Add([]byte("\x06\x00\x00\x00\x3d\xd8\x00"))
	f.Add([]byte("\x06\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := parseVariable(data)
		if err != nil {
			return
		}
		if !bytes.Equal(v.file(), data) {
			t.Errorf("%q became %q", data, v.file())
		}
		text, err := decodeUTF16(v.Data)
		list, errList := decodeUTF16List(v.Data)
		if (err == nil) != (errList == nil) {
			t.Fatalf("a string: %v; strings: %v", err, errList)
		}
		if err != nil {
			return
		}
		if !utf8.ValidString(text) {
			t.Errorf("%q is no UTF-8", text)
		}
		if text != "" && (len(list) == 0 || list[0] != text) {
			t.Errorf("the string %q, but strings %q", text, list)
		}
		for _, s := range list {
			if again, err := decodeUTF16(encodeUTF16(s)); again != s || err != nil {
				t.Errorf("%q became %q, %v", s, again, err)
			}
		}
	})
}
