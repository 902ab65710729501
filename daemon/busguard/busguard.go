// Package busguard stands between the bus and godbus, which on the system bus
// meets the messages of everybody: whoever is connected to it can be sent signals
// and calls by any user, by its unique name.
//
// Left alone with them, godbus v5.2.4 panics on arrays of descriptors, in a
// goroutine of its own where nobody can recover; it closes the connection when a
// message does not decode, though the bus found it valid (a variant in a variant,
// 64 deep); descriptors that no argument points at, or that come with a signal,
// stay open for ever; and it takes minutes to decode what the bus lets through in
// one message. So godbus gets no descriptors here and no long messages: the guard
// keeps the descriptors, hands them over beside the decoded message, and drops
// what godbus can't decode.
//
// A descriptor may be of a file that a hostile program serves (FUSE), which then
// lets close(2) wait for as long as it likes, without a way to kill who waits. So
// those that are not wanted are left in the kernel, which drops them without
// asking that program, and [Discard] closes the rest.
package busguard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// Arrive is called for each message, in the order in which they come, before
// godbus does anything with it; with a Type of 0 godbus goes no further. The files
// are the message's descriptors, which are now the callee's to close, by [Discard]
// or where nobody waits for it; in the message's body each descriptor is a
// dbus.UnixFDIndex into them, which may point beyond them. The size is the
// message's on the bus, in bytes; beyond [MaxMessage] there is nothing but the
// header. It must not wait for another message.
type Arrive func(msg *dbus.Message, size int, files []int)

// MaxMessage is the most of a message in bytes that is decoded, replies aside,
// which the bus lets only come from who was asked. To decode that much can take a
// tenth of a second.
const MaxMessage = 256 << 10

// Dial connects to the bus at a unix: address. Descriptors come in with messages
// of the type takes, 0 for none. They go out as a dbus.UnixFD among the arguments
// or in a variant in them, and must stay open until the message is sent.
func Dial(address string, takes dbus.Type, arrive Arrive, options ...dbus.ConnOption) (*dbus.Conn, error) {
	bus, err := dialUnix(address)
	if err != nil {
		return nil, err
	}
	g := newGuard(bus, takes)
	conn, err := dbus.NewConn(g, append(options,
		dbus.WithIncomingInterceptor(func(msg *dbus.Message) { arrive(msg, g.size, g.takeFiles()) }),
		dbus.WithOutgoingInterceptor(g.lift))...)
	if err != nil {
		bus.Close()
		return nil, err
	}
	if err := conn.Auth(nil); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if err := conn.Hello(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// SystemBus is the address of the system bus (D-Bus specification, "Well-known
// Message Bus Instances").
func SystemBus() string {
	if address := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"); address != "" {
		return address
	}
	return "unix:path=/var/run/dbus/system_bus_socket"
}

// dialUnix connects to the first unix: address of the list (D-Bus
// specification, "Server Addresses").
func dialUnix(addresses string) (*net.UnixConn, error) {
	for _, address := range strings.Split(addresses, ";") {
		keys, ok := strings.CutPrefix(address, "unix:")
		if !ok {
			continue
		}
		for _, key := range strings.Split(keys, ",") {
			name, value, _ := strings.Cut(key, "=")
			value, err := url.PathUnescape(value) // the same %xx
			if err != nil {
				return nil, fmt.Errorf("bus address %q: %w", address, err)
			}
			switch name {
			case "path":
				return net.DialUnix("unix", nil, &net.UnixAddr{Name: value})
			case "abstract":
				return net.DialUnix("unix", nil, &net.UnixAddr{Name: "@" + value})
			}
		}
	}
	return nil, fmt.Errorf("bus address %q: only sockets (unix:path=, unix:abstract=) are supported", addresses)
}

// guard is the connection as godbus sees it. Only one goroutine of godbus reads,
// and calls the interceptor of what comes in.
type guard struct {
	bus     *reader
	socket  *net.UnixConn
	takes   dbus.Type
	begun   bool // authentication is over
	left    []byte
	size    int
	arrived []int // descriptors of the message that godbus reads

	mu    sync.Mutex
	going map[uint32][]int // descriptors of messages that are being sent, by serial number
}

func newGuard(bus *net.UnixConn, takes dbus.Type) *guard {
	return &guard{bus: &reader{from: bus, oob: make([]byte, unix.CmsgSpace(4*maxFiles))}, socket: bus, takes: takes, going: map[uint32][]int{}}
}

// begin is godbus' last line of the authentication.
const begin = "BEGIN\r\n"

// Write passes on what godbus says. It asks for no descriptors, since it takes
// none from such a connection, so we do (D-Bus specification, "Authentication
// Protocol").
func (g *guard) Write(p []byte) (int, error) {
	if !g.begun && string(p) == begin {
		if _, err := g.socket.Write([]byte("NEGOTIATE_UNIX_FD\r\n")); err != nil {
			return 0, err
		}
		line, err := readLine(g.bus)
		if err != nil {
			return 0, err
		}
		if !strings.HasPrefix(line, "AGREE_UNIX_FD") {
			return 0, fmt.Errorf("the bus passes no descriptors: %q", line)
		}
		g.begun = true
	}
	files := g.filesOf(p)
	if len(files) == 0 {
		return g.socket.Write(p)
	}
	n, _, err := g.socket.WriteMsgUnix(p, unix.UnixRights(files...), nil)
	if err != nil || n == len(p) {
		return n, err
	}
	more, err := g.socket.Write(p[n:])
	return n + more, err
}

// lift takes the descriptors out of a message that is to be sent: godbus sends
// none over such a connection.
func (g *guard) lift(msg *dbus.Message) {
	if n, err := msg.CountFds(); n == 0 || err != nil {
		return
	}
	var files []int
	body := make([]any, len(msg.Body))
	for i, v := range msg.Body {
		body[i] = lifted(v, &files)
	}
	msg.Body = body
	msg.Headers[dbus.FieldUnixFDs] = dbus.MakeVariant(uint32(len(files)))
	g.mu.Lock()
	g.going[msg.Serial()] = files
	g.mu.Unlock()
}

// lifted is v with indexes instead of descriptors, which come to the files.
func lifted(v any, files *[]int) any {
	if fd, ok := v.(dbus.UnixFD); ok {
		*files = append(*files, int(fd))
		return dbus.UnixFDIndex(len(*files) - 1)
	}
	return inVariants(reflect.ValueOf(v), files).Interface()
}

// inVariants is a copy of v, of the same type, with each variant in it lifted.
func inVariants(v reflect.Value, files *[]int) reflect.Value {
	if variant, ok := v.Interface().(dbus.Variant); ok {
		return reflect.ValueOf(dbus.MakeVariantWithSignature(lifted(variant.Value(), files), variant.Signature()))
	}
	to := reflect.New(v.Type()).Elem()
	switch v.Kind() {
	case reflect.Map:
		to.Set(reflect.MakeMapWithSize(v.Type(), v.Len()))
		for key, value := range v.Seq2() {
			to.SetMapIndex(key, inVariants(value, files))
		}
	case reflect.Slice:
		to.Set(reflect.MakeSlice(v.Type(), v.Len(), v.Len()))
		for i := range v.Len() {
			to.Index(i).Set(inVariants(v.Index(i), files))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			to.Field(i).Set(inVariants(v.Field(i), files))
		}
	default:
		return v
	}
	return to
}

// filesOf takes what lift found in the message.
func (g *guard) filesOf(message []byte) []int {
	if len(message) < fixedHeader {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	serial := binary.NativeEndian.Uint32(message[8:]) // as godbus encodes
	files := g.going[serial]
	delete(g.going, serial)
	return files
}

// Read gives lines while godbus authenticates, and then whole messages that it
// can decode.
func (g *guard) Read(p []byte) (int, error) {
	if !g.begun {
		return g.bus.Read(p)
	}
	for len(g.left) == 0 {
		kind, err := g.bus.peek()
		if err != nil {
			return 0, err
		}
		g.bus.room = g.takes != 0 && (kind == g.takes || kind == 0) && discarding.Load() < maxDiscarding
		message, size, err := readMessage(g.bus)
		files := g.bus.takeFiles()
		if err != nil {
			Discard(files)
			return 0, err
		}
		if decodes(message) != nil {
			// One bad message must not end the connection: it is dropped, and
			// its sender waits in vain.
			Discard(files)
			continue
		}
		Discard(g.arrived) // of a message that godbus dropped
		g.left, g.size, g.arrived = message, size, files
	}
	n := copy(p, g.left)
	g.left = g.left[n:]
	return n, nil
}

// Close ends the connection.
func (g *guard) Close() error { return g.socket.Close() }

func (g *guard) takeFiles() []int {
	files := g.arrived
	g.arrived = nil
	return files
}

// discarding is how many descriptors are being closed. From maxDiscarding on no
// more are taken from the bus: each of them may hold a thread up for good, and the
// program may not have ten thousand.
var discarding atomic.Int64

const maxDiscarding = 256

// Discard closes descriptors, and does not wait for it.
func Discard(files []int) {
	if len(files) == 0 {
		return
	}
	discarding.Add(int64(len(files)))
	go func() {
		for _, fd := range files {
			_ = unix.Close(fd)
			discarding.Add(-1)
		}
	}()
}

// decodes says whether godbus can decode the message.
func decodes(message []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	if message == nil {
		return errors.New("there is none")
	}
	rest := bytes.NewReader(message)
	if _, err := dbus.DecodeMessage(rest); err != nil {
		return err
	}
	if rest.Len() > 0 {
		return errors.New("it is longer than it says")
	}
	return nil
}

// reader reads the bytes of a socket, and collects the descriptors on the way
// where there is room for them.
type reader struct {
	from  *net.UnixConn
	files []int
	room  bool
	oob   []byte
}

// maxFiles is the kernel's limit of descriptors in one message (SCM_MAX_FD).
const maxFiles = 253

// peek waits for a message, and tells its type: 0 where that is not there yet.
func (r *reader) peek() (dbus.Type, error) {
	raw, err := r.from.SyscallConn()
	if err != nil {
		return 0, err
	}
	var p [2]byte // D-Bus specification, "Message Format": byte order and type
	var n int
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, _, failed = unix.Recvfrom(int(fd), p[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if failed != unix.EINTR {
				return failed != unix.EAGAIN
			}
		}
	})
	switch err = errors.Join(err, failed); {
	case err != nil:
		return 0, err
	case n == 0:
		return 0, io.EOF
	case n == 1:
		return 0, nil
	}
	return dbus.Type(p[1]), nil
}

func (r *reader) Read(p []byte) (int, error) {
	var oob []byte
	if r.room {
		oob = r.oob
	}
	n, oobn, flags, _, err := r.from.ReadMsgUnix(p, oob)
	if err != nil {
		return n, err
	}
	files, err := descriptors(oob[:oobn])
	r.files = append(r.files, files...)
	if r.room && flags&unix.MSG_CTRUNC != 0 {
		return n, errors.New("descriptors were lost")
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (r *reader) takeFiles() []int {
	files := r.files
	r.files = nil
	return files
}

func descriptors(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var all []int
	for i := range messages {
		if messages[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return all, err
		}
		all = append(all, fds...)
	}
	return all, nil
}

const (
	fixedHeader = 16
	maxMessage  = 128 << 20 // D-Bus specification, "Message Format"
	maxHeader   = 2 << 20   // bytes of a header that is answered
	maxLine     = 16 << 10
	// chunk is what a message may claim before its bytes are there.
	chunk = 64 << 10
)

func readLine(r io.Reader) (string, error) {
	var line []byte
	for !bytes.HasSuffix(line, []byte("\n")) {
		if len(line) == maxLine {
			return "", errors.New("the bus sent a line without end")
		}
		line = append(line, 0)
		if _, err := io.ReadFull(r, line[len(line)-1:]); err != nil {
			return "", err
		}
	}
	return string(line), nil
}

// readMessage reads the bytes of a message (D-Bus specification, "Message
// Format"), and tells its size. Of one that is too long it keeps the header, and
// nothing of one with too long a header.
func readMessage(r io.Reader) (message []byte, size int, err error) {
	message = make([]byte, fixedHeader)
	if _, err := io.ReadFull(r, message); err != nil {
		return nil, 0, err
	}
	var order binary.ByteOrder
	switch message[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return nil, 0, errors.New("the bus sent what is no message")
	}
	fields := (uint64(order.Uint32(message[12:])) + 7) &^ 7
	rest := fields + uint64(order.Uint32(message[4:]))
	if rest > maxMessage {
		return nil, 0, errors.New("the bus sent a message that is too long")
	}
	size = fixedHeader + int(rest)
	if size <= MaxMessage || dbus.Type(message[1]) == dbus.TypeMethodReply {
		message, err = readMore(r, message, rest)
		return message, size, err
	}
	if fields > maxHeader {
		return nil, size, discard(r, rest)
	}
	if message, err = readMore(r, message, fields); err != nil {
		return nil, size, err
	}
	return withoutBody(message, order), size, discard(r, rest-fields)
}

func readMore(r io.Reader, message []byte, rest uint64) ([]byte, error) {
	for rest > 0 {
		n := len(message)
		message = append(message, make([]byte, min(rest, uint64(max(n, chunk))))...)
		if _, err := io.ReadFull(r, message[n:]); err != nil {
			return nil, err
		}
		rest -= uint64(len(message) - n)
	}
	return message, nil
}

func discard(r io.Reader, n uint64) error {
	// Not io.Discard, which asks the reader for pieces of its own size.
	_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(r, int64(n)), make([]byte, chunk))
	return err
}

// withoutBody is the message that has that header, and no arguments; nil where the
// header is wrong.
func withoutBody(header []byte, order binary.ByteOrder) []byte {
	fields, err := fieldsOf(header, order)
	if err != nil {
		return nil
	}
	delete(fields, dbus.FieldSignature)
	delete(fields, dbus.FieldUnixFDs)
	var b bytes.Buffer
	if err := (&dbus.Message{Type: dbus.Type(header[1]), Flags: dbus.Flags(header[2]), Headers: fields}).EncodeTo(&b, order); err != nil {
		return nil
	}
	copy(b.Bytes()[8:12], header[8:12]) // the serial number
	return b.Bytes()
}

// fieldsOf reads the header fields: an array of a byte and a variant (D-Bus
// specification, "Header Fields"), all of which are strings or numbers.
func fieldsOf(header []byte, order binary.ByteOrder) (map[dbus.HeaderField]dbus.Variant, error) {
	errWrong := errors.New("the header of the message is wrong")
	fields := map[dbus.HeaderField]dbus.Variant{}
	end := fixedHeader + int(order.Uint32(header[12:]))
	if end > len(header) {
		return nil, errWrong
	}
	at := fixedHeader
	take := func(n, align int) []byte {
		at = (at + align - 1) &^ (align - 1)
		if n < 0 || at > end || n > end-at {
			return nil
		}
		at += n
		return header[at-n : at]
	}
	text := func(length int) (string, bool) {
		b := take(length+1, 1)
		if len(b) == 0 || b[length] != 0 {
			return "", false
		}
		return string(b[:length]), true
	}
	for at < end {
		start := take(4, 8) // the field, and the signature of its value
		if start == nil || start[1] != 1 || start[3] != 0 {
			return nil, errWrong
		}
		var value any
		ok := true
		switch start[2] {
		case 'u', 's', 'o':
			b := take(4, 4)
			if b == nil {
				return nil, errWrong
			}
			value = order.Uint32(b)
			if start[2] != 'u' {
				value, ok = text(int(order.Uint32(b)))
			}
			if s, is := value.(string); is && start[2] == 'o' {
				value = dbus.ObjectPath(s)
			}
		case 'g':
			b := take(1, 1)
			if b == nil {
				return nil, errWrong
			}
			// Whose value nobody needs.
			_, ok = text(int(b[0]))
			value = dbus.Signature{}
		default:
			return nil, errWrong
		}
		if !ok {
			return nil, errWrong
		}
		fields[dbus.HeaderField(start[0])] = dbus.MakeVariant(value)
	}
	return fields, nil
}
