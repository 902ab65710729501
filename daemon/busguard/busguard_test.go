package busguard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/godbus/dbus/v5"
)

func call(t testing.TB, args ...any) []byte {
	t.Helper()
	msg := &dbus.Message{Type: dbus.TypeMethodCall, Body: args, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath("/a")),
		dbus.FieldMember:    dbus.MakeVariant("Test"),
		dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(args...)),
		dbus.FieldUnixFDs:   dbus.MakeVariant(uint32(1)),
	}}
	var buf bytes.Buffer
	if _, err := msg.EncodeToWithFDs(&buf, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestArraysOfDescriptorsAreTakenOut(t *testing.T) {
	fd := dbus.UnixFD(0)
	variant := dbus.MakeVariant
	for _, c := range []struct {
		name  string
		args  []any
		taken bool
	}{
		{"a descriptor", []any{fd, "x"}, false},
		{"in a variant", []any{map[string]dbus.Variant{"f": variant(fd)}}, false},
		{"in a dictionary in a variant", []any{map[string]dbus.Variant{"f": variant(map[string]dbus.Variant{"g": variant(fd)})}}, false},
		{"no descriptor, many bytes", []any{make([]byte, 1000)}, false},
		{"ah", []any{[]dbus.UnixFD{fd}}, true},
		{"a{sh}", []any{map[string]dbus.UnixFD{"f": fd}}, true},
		{"aah", []any{[][]dbus.UnixFD{{fd}}}, true},
		{"ah in a variant", []any{variant([]dbus.UnixFD{fd})}, true},
		{"a{sh} in a variant in a dictionary", []any{map[string]dbus.Variant{"f": variant(map[string]dbus.UnixFD{"g": fd})}}, true},
		{"ah in an array of variants", []any{[]dbus.Variant{variant([]dbus.UnixFD{fd})}}, true},
	} {
		in := call(t, c.args...)
		out, files, err := harmless(in, []int{7})
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if same := bytes.Equal(in, out); same == c.taken || (len(files) == 0) != c.taken {
			t.Errorf("%s: taken out: %v, descriptors %v", c.name, !same, files)
		}
		if msg, err := dbus.DecodeMessage(bytes.NewReader(out)); err != nil || c.taken && len(msg.Body) != 0 {
			t.Errorf("%s: became %v, %v", c.name, msg, err)
		}
	}
}

func TestUnits(t *testing.T) {
	message := call(t, "x")
	stream := io.MultiReader(bytes.NewReader([]byte("OK 1234\r\nAGREE_UNIX_FD\r\n")), bytes.NewReader(message), bytes.NewReader(message))
	for _, want := range [][]byte{[]byte("OK 1234\r\n"), []byte("AGREE_UNIX_FD\r\n"), message, message} {
		got, err := readUnit(stream)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
	if _, err := readUnit(stream); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	long := bytes.Clone(message)
	binary.LittleEndian.PutUint32(long[4:], 1<<31)
	if _, err := readUnit(bytes.NewReader(long)); err == nil {
		t.Error("a message of 2 GiB was taken")
	}
}

func FuzzHarmless(f *testing.F) {
	f.Add(call(f, []dbus.UnixFD{0}))
	f.Add(call(f, dbus.MakeVariant(map[string]dbus.UnixFD{"a": 0})))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 {
			return
		}
		unit, err := readUnit(bytes.NewReader(data))
		if err != nil || !isMessage(unit) {
			return
		}
		_, _, _ = harmless(unit, []int{int(os.Stdin.Fd())})
	})
}

func TestOnlySockets(t *testing.T) {
	for _, address := range []string{"", "tcp:host=localhost,port=1", "unix:tmpdir=/tmp", "unix:path=%zz"} {
		if _, err := Dial(address); err == nil {
			t.Errorf("%q was dialled", address)
		}
	}
}
