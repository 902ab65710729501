// Package busguard stands between the bus and godbus. godbus v5.2.4 panics, in a
// goroutine of its own where nobody can recover, on a message that brings
// descriptors in an array or dictionary of descriptors (ah, a{sh}, also within
// a variant). Everybody on the system bus may send one, so without this any
// user could end the daemon. The guard takes the arguments out of such a
// message; the call then fails for its signature.
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
	"path/filepath"
	"reflect"
	"strings"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// Dial connects to the bus at a unix: address through a guard, which lives as
// long as the connection.
func Dial(address string, options ...dbus.ConnOption) (*dbus.Conn, error) {
	bus, err := dialUnix(address)
	if err != nil {
		return nil, err
	}
	conn, err := through(bus, options)
	if err != nil {
		bus.Close()
		return nil, err
	}
	return conn, nil
}

// through gives godbus a socket to dial, since it takes no connection that
// carries descriptors, and joins that and bus.
func through(bus *net.UnixConn, options []dbus.ConnOption) (*dbus.Conn, error) {
	dir, err := os.MkdirTemp("", "memlinux-guard-") // only we can look into it
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "bus")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		return nil, err
	}
	joined := make(chan error, 1)
	go func() {
		inner, err := listener.AcceptUnix()
		if err == nil {
			go join(bus, inner)
		}
		joined <- err
	}()
	conn, err := dbus.Connect("unix:path="+path, options...)
	listener.Close() // ends an Accept that still waits
	return conn, errors.Join(err, <-joined)
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

// join passes everything on in both directions until one side ends.
func join(bus, inner *net.UnixConn) {
	go func() {
		_ = passOn(inner, bus) // any end is the end
		bus.Close()
		inner.Close()
	}()
	_ = guard(bus, inner)
	bus.Close()
	inner.Close()
}

// maxFiles is the kernel's limit of descriptors in one message (SCM_MAX_FD).
const maxFiles = 253

// passOn copies bytes, and descriptors with the bytes that they came with.
func passOn(from, to *net.UnixConn) error {
	buf := make([]byte, 64<<10)
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	for {
		n, oobn, flags, _, err := from.ReadMsgUnix(buf, oob)
		if err != nil {
			return err
		}
		if n == 0 {
			return io.EOF
		}
		if flags&unix.MSG_CTRUNC != 0 {
			return errors.New("descriptors were lost")
		}
		files, err := descriptors(oob[:oobn])
		if err == nil {
			err = send(to, buf[:n], files)
		}
		closeAll(files)
		if err != nil {
			return err
		}
	}
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

func closeAll(files []int) {
	for _, fd := range files {
		unix.Close(fd)
	}
}

func send(to *net.UnixConn, p []byte, files []int) error {
	var oob []byte
	if len(files) > 0 {
		oob = unix.UnixRights(files...)
	}
	n, _, err := to.WriteMsgUnix(p, oob, nil)
	if err == nil && n < len(p) {
		_, err = to.Write(p[n:])
	}
	return err
}

// reader reads the bytes of a socket and collects the descriptors on the way.
type reader struct {
	from  *net.UnixConn
	files []int
	oob   []byte
}

func (r *reader) Read(p []byte) (int, error) {
	n, oobn, flags, _, err := r.from.ReadMsgUnix(p, r.oob)
	if err != nil {
		return n, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return n, errors.New("descriptors were lost")
	}
	files, err := descriptors(r.oob[:oobn])
	r.files = append(r.files, files...)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// guard passes on what the bus says: lines while it authenticates, then
// messages (D-Bus specification, "Authentication Protocol", "Message Format").
func guard(bus, inner *net.UnixConn) error {
	r := &reader{from: bus, oob: make([]byte, unix.CmsgSpace(4*maxFiles))}
	defer func() { closeAll(r.files) }()
	for {
		unit, err := readUnit(r)
		if err != nil {
			return err
		}
		files := r.files
		if len(files) > 0 && isMessage(unit) {
			// One bad message must not end the connection: it is dropped,
			// and its sender waits in vain.
			unit, files, _ = harmless(unit, files)
		}
		if len(unit) > 0 {
			err = send(inner, unit, files)
		}
		closeAll(r.files)
		r.files = r.files[:0]
		if err != nil {
			return err
		}
	}
}

const (
	fixedHeader = 16
	maxMessage  = 128 << 20 // D-Bus specification, "Message Format"
	maxLine     = 16 << 10
)

// isMessage tells a message, which begins with its byte order, from a line of
// the authentication, all of which begin with a capital but B.
func isMessage(unit []byte) bool { return unit[0] == 'l' || unit[0] == 'B' }

// readUnit reads a line, or a message.
func readUnit(r io.Reader) ([]byte, error) {
	unit := make([]byte, 1)
	if _, err := io.ReadFull(r, unit); err != nil {
		return nil, err
	}
	if !isMessage(unit) {
		for unit[len(unit)-1] != '\n' {
			if len(unit) == maxLine {
				return nil, errors.New("the bus sent a line without end")
			}
			unit = append(unit, 0)
			if _, err := io.ReadFull(r, unit[len(unit)-1:]); err != nil {
				return nil, err
			}
		}
		return unit, nil
	}
	unit = append(unit, make([]byte, fixedHeader-1)...)
	if _, err := io.ReadFull(r, unit[1:]); err != nil {
		return nil, err
	}
	var order binary.ByteOrder = binary.LittleEndian
	if unit[0] == 'B' {
		order = binary.BigEndian
	}
	fields := (uint64(order.Uint32(unit[12:])) + 7) &^ 7
	rest := fields + uint64(order.Uint32(unit[4:]))
	if rest > maxMessage {
		return nil, errors.New("the bus sent a message that is too long")
	}
	unit = append(unit, make([]byte, rest)...)
	_, err := io.ReadFull(r, unit[fixedHeader:])
	return unit, err
}

// harmless gives the message as godbus can take it: as it is, or without its
// arguments and descriptors.
func harmless(message []byte, files []int) ([]byte, []int, error) {
	// Without descriptors at hand godbus decodes their indexes, and does not
	// panic.
	decoded, err := dbus.DecodeMessage(bytes.NewReader(message))
	if err != nil {
		return nil, nil, fmt.Errorf("the bus sent an invalid message: %w", err)
	}
	if !crashes(decoded.Body) {
		return message, files, nil
	}
	decoded.Body = nil
	delete(decoded.Headers, dbus.FieldSignature)
	delete(decoded.Headers, dbus.FieldUnixFDs)
	var bare bytes.Buffer
	if err := decoded.EncodeTo(&bare, binary.LittleEndian); err != nil {
		return nil, nil, fmt.Errorf("strip a message: %w", err)
	}
	return bare.Bytes(), nil, nil
}

// crashes reports whether v holds an array or dictionary whose type has
// descriptors in it.
func crashes(v any) bool {
	switch v := v.(type) {
	case nil:
		return false
	case dbus.Variant:
		return crashes(v.Value())
	case []any: // arguments, or a structure
		for _, e := range v {
			if crashes(e) {
				return true
			}
		}
		return false
	}
	value := reflect.ValueOf(v)
	switch value.Kind() {
	case reflect.Slice:
		if strings.Contains(value.Type().String(), "UnixFDIndex") {
			return true
		}
		if value.Type().Elem().Kind() == reflect.Uint8 {
			return false
		}
		for i := range value.Len() {
			if crashes(value.Index(i).Interface()) {
				return true
			}
		}
	case reflect.Map:
		if strings.Contains(value.Type().String(), "UnixFDIndex") {
			return true
		}
		for _, key := range value.MapKeys() {
			if crashes(value.MapIndex(key).Interface()) {
				return true
			}
		}
	}
	return false
}
