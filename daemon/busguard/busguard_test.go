package busguard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
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

// deep is a call with a variant in a variant, depth times, which godbus can't
// encode.
func deep(t testing.TB, depth int) []byte {
	message := call(t, dbus.MakeVariant(byte(7)))
	const body = 4 // bytes: the signature "y" and the byte
	more := bytes.Repeat([]byte("\x01v\x00"), depth-1)
	message = append(message[:len(message)-body], append(more, message[len(message)-body:]...)...)
	binary.LittleEndian.PutUint32(message[4:], uint32(body+len(more)))
	return message
}

// afterAuth is a guard on one end of a socket, and the other end.
func afterAuth(t *testing.T) (*guard, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return &guard{bus: &reader{from: ends[0], oob: make([]byte, unix.CmsgSpace(4*maxFiles))}, socket: ends[0], begun: true}, ends[1]
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// What godbus would panic on, leak or close the connection for reaches it as a
// message whose descriptors are beside it, or not at all.
func TestHostileMessages(t *testing.T) {
	fd := dbus.UnixFD(0)
	variant := dbus.MakeVariant
	g, bus := afterAuth(t)
	before := openFiles(t)
	for _, c := range []struct {
		name    string
		args    []any
		files   int
		dropped bool
	}{
		{"a descriptor", []any{fd, "x"}, 1, false},
		{"more descriptors than arguments", []any{fd}, 5, false},
		{"descriptors and no arguments", nil, 3, false},
		{"an index without a descriptor", []any{fd}, 0, false},
		{"ah", []any{[]dbus.UnixFD{fd}}, 1, false},
		{"a{sh}", []any{map[string]dbus.UnixFD{"f": fd}}, 1, false},
		{"ah in a variant in an array", []any{[]dbus.Variant{variant([]dbus.UnixFD{fd})}}, 1, false},
		{"deeper than godbus goes", nil, 2, true},
		{"many descriptors", []any{fd}, 200, false},
	} {
		var sent []int
		for range c.files {
			sent = append(sent, 0)
		}
		message := call(t, c.args...)
		if c.dropped {
			message = deep(t, 70)
		}
		if _, _, err := bus.WriteMsgUnix(message, unix.UnixRights(sent...), nil); err != nil {
			t.Fatal(err)
		}
		if c.dropped {
			message = call(t, "the next one")
			if _, err := bus.Write(message); err != nil {
				t.Fatal(err)
			}
		}
		msg, err := dbus.DecodeMessage(g)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if c.dropped != (len(msg.Body) > 0 && msg.Body[0] == "the next one") {
			t.Errorf("%s: got %v", c.name, msg)
		}
		files := g.takeFiles()
		if !c.dropped && len(files) != c.files {
			t.Errorf("%s: %d descriptors, want %d", c.name, len(files), c.files)
		}
		for _, f := range files {
			f.Close()
		}
		if n := openFiles(t); n != before {
			t.Errorf("%s: %d descriptors are open, %d were", c.name, n, before)
		}
	}
	// What godbus drops before anybody takes its files.
	if _, _, err := bus.WriteMsgUnix(call(t, fd), unix.UnixRights(0), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := bus.Write(call(t, "x")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := dbus.DecodeMessage(g); err != nil {
			t.Fatal(err)
		}
	}
	if n := openFiles(t); n != before {
		t.Errorf("a message that nobody took: %d descriptors are open, %d were", n, before)
	}
}

func TestMessagesAreWhole(t *testing.T) {
	message := call(t, strings.Repeat("x", 1<<20))
	stream := io.MultiReader(bytes.NewReader(message), bytes.NewReader(message))
	for range 2 {
		if got, err := readMessage(stream); err != nil || !bytes.Equal(got, message) {
			t.Errorf("got %d bytes, %v, want %d", len(got), err, len(message))
		}
	}
	if _, err := readMessage(stream); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	long := bytes.Clone(message)
	binary.LittleEndian.PutUint32(long[4:], 1<<31)
	if _, err := readMessage(bytes.NewReader(long)); err == nil {
		t.Error("a message of 2 GiB was taken")
	}
	if _, err := readMessage(bytes.NewReader(make([]byte, 100))); err == nil {
		t.Error("zeros were taken for a message")
	}
}

// What passes decodes in godbus, whatever the bus sends.
func FuzzMessage(f *testing.F) {
	f.Add(call(f, []dbus.UnixFD{0}))
	f.Add(call(f, dbus.MakeVariant(map[string]dbus.UnixFD{"a": 0})))
	f.Add(call(f, map[string]dbus.Variant{"a": dbus.MakeVariant(dbus.MakeVariant("x"))}, []string{"x", ""}))
	f.Add(deep(f, 63))
	f.Add(deep(f, 70))
	f.Fuzz(func(t *testing.T, data []byte) {
		message, err := readMessage(bytes.NewReader(data))
		if err != nil || decodes(message) != nil {
			return
		}
		if _, err := dbus.DecodeMessage(bytes.NewReader(message)); err != nil {
			t.Errorf("passed, and then: %v", err)
		}
	})
}

func TestOnlySockets(t *testing.T) {
	for _, address := range []string{"", "tcp:host=localhost,port=1", "unix:tmpdir=/tmp", "unix:path=%zz"} {
		if _, err := Dial(address, nil); err == nil {
			t.Errorf("%q was dialled", address)
		}
	}
}
