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
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

func call(t testing.TB, args ...any) []byte {
	t.Helper()
	msg := &dbus.Message{Type: dbus.TypeMethodCall, Body: args, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldPath:      dbus.MakeVariant(dbus.ObjectPath("/a")),
		dbus.FieldInterface: dbus.MakeVariant("a.b"), // so that it can be made a signal
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
	g := newGuard(ends[0], dbus.TypeMethodCall)
	g.begun = true
	return g, ends[1]
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
		Discard(files)
		settles(t, c.name, before)
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
	settles(t, "a message that nobody took", before)
}

// settles waits until as many descriptors are open as were before.
func settles(t *testing.T, name string, before int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); openFiles(t) != before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: %d descriptors are open, %d were", name, openFiles(t), before)
		}
	}
}

// Descriptors are taken only with what may bring them, and no more of them than
// can be closed again.
func TestUnwantedDescriptors(t *testing.T) {
	g, bus := afterAuth(t)
	before := openFiles(t)
	signal := call(t, dbus.UnixFD(0))
	signal[1] = byte(dbus.TypeSignal)
	for _, c := range []struct {
		name    string
		message []byte
		closing int64 // already
		takes   dbus.Type
		want    int
	}{
		{"a call", call(t, dbus.UnixFD(0)), 0, dbus.TypeMethodCall, 3},
		{"a signal", signal, 0, dbus.TypeMethodCall, 0},
		{"a call where nobody calls", call(t, dbus.UnixFD(0)), 0, 0, 0},
		{"a call of who has too many", call(t, dbus.UnixFD(0)), maxDiscarding, dbus.TypeMethodCall, 0},
		{"a call after that", call(t, dbus.UnixFD(0)), 0, dbus.TypeMethodCall, 3},
	} {
		g.takes = c.takes
		discarding.Add(c.closing)
		if _, _, err := bus.WriteMsgUnix(c.message, unix.UnixRights(0, 0, 0), nil); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(c.message))
		if _, err := io.ReadFull(g, got); err != nil || !bytes.Equal(got, c.message) {
			t.Errorf("%s: got %x, %v", c.name, got, err)
		}
		discarding.Add(-c.closing)
		files := g.takeFiles()
		if len(files) != c.want || openFiles(t) != before+c.want {
			t.Errorf("%s: %d descriptors, want %d; %d are open, %d were", c.name, len(files), c.want, openFiles(t), before)
		}
		Discard(files)
		settles(t, c.name, before)
	}
}

// Of what is too long, the header is there, so that it can be answered; a reply may
// be long.
func TestLongMessages(t *testing.T) {
	g, bus := afterAuth(t)
	long := strings.Repeat("x", MaxMessage)
	reply := call(t, long)
	reply[1] = byte(dbus.TypeMethodReply)
	tooLong := call(t, long, dbus.UnixFD(0))
	binary.LittleEndian.PutUint32(tooLong[8:], 4711)
	path := dbus.MakeVariant(dbus.ObjectPath("/" + strings.Repeat("x", maxHeader)))
	var noHeader bytes.Buffer
	if err := (&dbus.Message{Type: dbus.TypeMethodCall, Headers: map[dbus.HeaderField]dbus.Variant{dbus.FieldPath: path, dbus.FieldMember: dbus.MakeVariant("Test")}}).EncodeTo(&noHeader, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	go func() {
		for _, message := range [][]byte{tooLong, noHeader.Bytes(), call(t, "next")} {
			_, _ = bus.Write(message) // what is missing is seen
		}
	}()
	msg, err := dbus.DecodeMessage(g)
	if err != nil {
		t.Fatal(err)
	}
	if g.size != len(tooLong) || msg.Type != dbus.TypeMethodCall || msg.Serial() != 4711 || len(msg.Body) != 0 || msg.Headers[dbus.FieldMember].Value() != "Test" || msg.Headers[dbus.FieldPath].Value() != dbus.ObjectPath("/a") {
		t.Errorf("got %d bytes for %d, and %v", g.size, len(tooLong), msg)
	}
	if msg, err := dbus.DecodeMessage(g); err != nil || len(msg.Body) != 1 || msg.Body[0] != "next" {
		t.Errorf("behind them: %v, %v", msg, err)
	}
	if got, size, err := readMessage(bytes.NewReader(reply)); err != nil || size != len(reply) || !bytes.Equal(got, reply) {
		t.Errorf("a long reply: %d bytes, %d, %v", len(got), size, err)
	}
}

// Descriptors go out wherever a caller lays them.
func TestDescriptorsGoOut(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	fd := dbus.UnixFD(w.Fd())
	type property struct {
		Name  string
		Value dbus.Variant
	}
	for _, c := range []struct {
		name      string
		body      []any
		signature string
		files     int
	}{
		{"an argument", []any{"x", fd}, "sh", 1},
		{"in an option", []any{map[string]dbus.Variant{"a": dbus.MakeVariant(fd), "b": dbus.MakeVariant(map[string]dbus.Variant{"c": dbus.MakeVariant(fd)})}, fd}, "a{sv}h", 3},
		{"in a property", []any{[]property{{"a", dbus.MakeVariant(true)}, {"b", dbus.MakeVariant(fd)}}}, "a(sv)", 1},
		{"none", []any{"x", []byte("y"), map[string]dbus.Variant{}}, "saya{sv}", 0},
	} {
		g, bus := afterAuth(t)
		msg := &dbus.Message{Type: dbus.TypeMethodCall, Body: c.body, Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath("/a")), dbus.FieldMember: dbus.MakeVariant("Test"), dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(c.body...))}}
		g.lift(msg)
		if n, err := msg.CountFds(); n != 0 || err != nil {
			t.Errorf("%s: godbus would not send it: %d, %v", c.name, n, err)
		}
		var sent bytes.Buffer
		if err := msg.EncodeTo(&sent, binary.LittleEndian); err != nil {
			t.Fatal(err)
		}
		if n, err := g.Write(sent.Bytes()); err != nil || n != sent.Len() {
			t.Fatalf("%s: %d bytes, %v", c.name, n, err)
		}
		in := &reader{from: bus, room: true, oob: make([]byte, unix.CmsgSpace(4*maxFiles))}
		got, _, err := readMessage(in)
		if err != nil {
			t.Fatal(err)
		}
		files := in.takeFiles()
		there, err := dbus.DecodeMessage(bytes.NewReader(got))
		if err != nil {
			t.Fatal(err)
		}
		if s := there.Headers[dbus.FieldSignature].Value().(dbus.Signature).String(); len(files) != c.files || s != c.signature {
			t.Errorf("%s: %d descriptors with %s, want %d with %s", c.name, len(files), s, c.files, c.signature)
		}
		if n, _ := there.Headers[dbus.FieldUnixFDs].Value().(uint32); int(n) != c.files {
			t.Errorf("%s: the header says %d descriptors", c.name, n)
		}
		var a, b unix.Stat_t
		for _, f := range files {
			if err := errors.Join(unix.Fstat(f, &a), unix.Fstat(int(fd), &b)); err != nil || a.Ino != b.Ino {
				t.Errorf("%s: another file: %v", c.name, err)
			}
			unix.Close(f)
		}
		if len(g.going) != 0 {
			t.Errorf("%s: %v are still to be sent", c.name, g.going)
		}
	}
}

func TestMessagesAreWhole(t *testing.T) {
	message := call(t, strings.Repeat("x", MaxMessage-1<<10))
	stream := io.MultiReader(bytes.NewReader(message), bytes.NewReader(message))
	for range 2 {
		if got, _, err := readMessage(stream); err != nil || !bytes.Equal(got, message) {
			t.Errorf("got %d bytes, %v, want %d", len(got), err, len(message))
		}
	}
	if _, _, err := readMessage(stream); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	long := bytes.Clone(message)
	binary.LittleEndian.PutUint32(long[4:], 1<<31)
	if _, _, err := readMessage(bytes.NewReader(long)); err == nil {
		t.Error("a message of 2 GiB was taken")
	}
	if _, _, err := readMessage(bytes.NewReader(make([]byte, 100))); err == nil {
		t.Error("zeros were taken for a message")
	}
}

// What is read of a header is what godbus reads.
func FuzzHeader(f *testing.F) {
	f.Add(call(f, "x"))
	f.Add(deep(f, 3))
	f.Fuzz(func(t *testing.T, message []byte) {
		if len(message) < fixedHeader || message[0] != 'l' {
			return
		}
		fields, err := fieldsOf(message, binary.LittleEndian)
		if err != nil || decodes(message) != nil {
			return // godbus also takes what is no message: fields behind the end of the header
		}
		msg, err := dbus.DecodeMessage(bytes.NewReader(message))
		if err != nil {
			t.Fatal(err)
		}
		for field, value := range msg.Headers {
			if field != dbus.FieldSignature && fields[field].Value() != value.Value() {
				t.Errorf("field %d is %v, want %v", field, fields[field], value)
			}
		}
		short := withoutBody(message[:fixedHeader+int(binary.LittleEndian.Uint32(message[12:])+7)&^7], binary.LittleEndian)
		if short != nil && decodes(short) != nil { // the bus sends no strings that are not UTF-8, and godbus decodes and does not encode them
			t.Errorf("without its body it does not decode: %x", short)
		}
	})
}

// What passes decodes in godbus, whatever the bus sends.
func FuzzMessage(f *testing.F) {
	f.Add(call(f, []dbus.UnixFD{0}))
	f.Add(call(f, dbus.MakeVariant(map[string]dbus.UnixFD{"a": 0})))
	f.Add(call(f, map[string]dbus.Variant{"a": dbus.MakeVariant(dbus.MakeVariant("x"))}, []string{"x", ""}))
	f.Add(deep(f, 63))
	f.Add(deep(f, 70))
	f.Fuzz(func(t *testing.T, data []byte) {
		message, _, err := readMessage(bytes.NewReader(data))
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
		if _, err := Dial(address, 0, nil); err == nil {
			t.Errorf("%q was dialled", address)
		}
	}
}
