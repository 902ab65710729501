// Package busguard stands between the bus and godbus, which on the system bus
// meets the messages of everybody.
//
// Left alone with them, godbus v5.2.4 panics on arrays of descriptors, in a
// goroutine of its own where nobody can recover; it closes the connection when a
// message does not decode, though the bus found it valid (a variant in a variant,
// 64 deep); and descriptors that no argument points at, or that come with a
// signal, stay open for ever. So godbus gets no descriptors here: the guard keeps
// them, hands them over beside the decoded message, and drops what godbus can't
// decode.
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
	"strings"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// Arrive is called for each message, in the order in which they come, before
// godbus does anything with it. The files are the message's descriptors, which
// are now the callee's to close; in the message's body each descriptor is a
// dbus.UnixFDIndex into them, which may point beyond them. The size is the
// message's on the bus, in bytes. It must not wait for another message.
type Arrive func(msg *dbus.Message, size int, files []*os.File)

// Dial connects to the bus at a unix: address.
func Dial(address string, arrive Arrive, options ...dbus.ConnOption) (*dbus.Conn, error) {
	bus, err := dialUnix(address)
	if err != nil {
		return nil, err
	}
	g := &guard{bus: &reader{from: bus, oob: make([]byte, unix.CmsgSpace(4*maxFiles))}, socket: bus}
	intercept := dbus.WithIncomingInterceptor(func(msg *dbus.Message) {
		arrive(msg, g.size, g.takeFiles())
	})
	conn, err := dbus.NewConn(g, append(options, intercept)...)
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
// and calls the interceptor.
type guard struct {
	bus     *reader
	socket  *net.UnixConn
	begun   bool // authentication is over
	left    []byte
	size    int
	arrived []int // descriptors of the message that godbus reads
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
	return g.socket.Write(p)
}

// Read gives lines while godbus authenticates, and then whole messages that it
// can decode.
func (g *guard) Read(p []byte) (int, error) {
	if !g.begun {
		return g.bus.Read(p)
	}
	for len(g.left) == 0 {
		message, err := readMessage(g.bus)
		files := g.bus.takeFiles()
		if err != nil {
			closeAll(files)
			return 0, err
		}
		if decodes(message) != nil {
			// One bad message must not end the connection: it is dropped, and
			// its sender waits in vain.
			closeAll(files)
			continue
		}
		closeAll(g.arrived) // of a message that godbus dropped
		g.left, g.size, g.arrived = message, len(message), files
	}
	n := copy(p, g.left)
	g.left = g.left[n:]
	return n, nil
}

// Close ends the connection.
func (g *guard) Close() error { return g.socket.Close() }

func (g *guard) takeFiles() []*os.File {
	var files []*os.File
	for _, fd := range g.arrived {
		files = append(files, os.NewFile(uintptr(fd), "the given file"))
	}
	g.arrived = nil
	return files
}

// decodes says whether godbus can decode the message.
func decodes(message []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	rest := bytes.NewReader(message)
	if _, err := dbus.DecodeMessage(rest); err != nil {
		return err
	}
	if rest.Len() > 0 {
		return errors.New("it is longer than it says")
	}
	return nil
}

// reader reads the bytes of a socket and collects the descriptors on the way.
type reader struct {
	from  *net.UnixConn
	files []int
	oob   []byte
}

// maxFiles is the kernel's limit of descriptors in one message (SCM_MAX_FD).
const maxFiles = 253

func (r *reader) Read(p []byte) (int, error) {
	n, oobn, flags, _, err := r.from.ReadMsgUnix(p, r.oob)
	if err != nil {
		return n, err
	}
	files, err := descriptors(r.oob[:oobn])
	r.files = append(r.files, files...)
	if flags&unix.MSG_CTRUNC != 0 {
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

func closeAll(files []int) {
	for _, fd := range files {
		_ = unix.Close(fd)
	}
}

const (
	fixedHeader = 16
	maxMessage  = 128 << 20 // D-Bus specification, "Message Format"
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
// Format").
func readMessage(r io.Reader) ([]byte, error) {
	message := make([]byte, fixedHeader)
	if _, err := io.ReadFull(r, message); err != nil {
		return nil, err
	}
	var order binary.ByteOrder
	switch message[0] {
	case 'l':
		order = binary.LittleEndian
	case 'B':
		order = binary.BigEndian
	default:
		return nil, errors.New("the bus sent what is no message")
	}
	fields := (uint64(order.Uint32(message[12:])) + 7) &^ 7
	rest := fields + uint64(order.Uint32(message[4:]))
	if rest > maxMessage {
		return nil, errors.New("the bus sent a message that is too long")
	}
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
