// Package qmp speaks the QEMU Machine Protocol with one virtual machine.
//
// It knows the framing only: one JSON object a line, as docs/interop/qmp-spec
// in QEMU's sources says. Which commands exist is QEMU's matter (its
// qemu-qmp-ref).
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// MaxLine is the longest line in bytes that a [Client] accepts. QEMU's longest
// answer by far, query-qmp-schema, has about 200 KiB.
const MaxLine = 1 << 20

// Conn is what a [Client] needs of its connection: a socket has it, and so has
// an [os.File] of one.
type Conn interface {
	io.ReadWriteCloser
	SetWriteDeadline(time.Time) error
}

// Version is QEMU's version as its greeting tells it.
type Version struct {
	Major, Minor, Micro int
	Package             string // the distribution's own version, or ""
}

func (v Version) String() string {
	s := fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
	if v.Package != "" {
		s += " (" + v.Package + ")"
	}
	return s
}

// Event is something that QEMU tells unasked, such as SHUTDOWN.
type Event struct {
	Name string
	Data json.RawMessage // an object, or nil
}

// Error is QEMU's refusal of a command.
type Error struct {
	Class string // such as GenericError or CommandNotFound
	Desc  string // for a person
}

func (e *Error) Error() string { return e.Desc }

// ErrClosed says that QEMU closed the connection, as it does when it exits.
var ErrClosed = errors.New("the QMP connection is closed")

type kind int

const (
	kindGreeting kind = iota
	kindReturn
	kindError
	kindEvent
)

// message is one line from QEMU; which fields are set depends on its kind.
type message struct {
	kind    kind
	version Version
	id      uint64
	result  json.RawMessage
	err     Error
	event   Event
}

// parse reads one line. An object that is not exactly one of the four kinds
// is an error: to guess would be to take an answer for another one.
func parse(line []byte) (message, error) {
	var raw struct {
		QMP *struct {
			Version struct {
				QEMU    struct{ Major, Minor, Micro int }
				Package string
			}
		}
		Return json.RawMessage
		Error  *struct{ Class, Desc string }
		Event  *string
		Data   json.RawMessage
		ID     uint64
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return message{}, fmt.Errorf("QMP line %.80q: %w", line, err)
	}
	kinds := 0
	m := message{id: raw.ID}
	if raw.QMP != nil {
		kinds++
		m.kind = kindGreeting
		v := raw.QMP.Version
		m.version = Version{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, v.Package}
	}
	if raw.Return != nil {
		kinds++
		m.kind, m.result = kindReturn, raw.Return
	}
	if raw.Error != nil {
		kinds++
		m.kind, m.err = kindError, Error{raw.Error.Class, raw.Error.Desc}
	}
	if raw.Event != nil {
		kinds++
		m.kind, m.event = kindEvent, Event{*raw.Event, raw.Data}
	}
	if kinds != 1 {
		return message{}, fmt.Errorf("QMP line %.80q is neither greeting, answer, error nor event", line)
	}
	return m, nil
}

// Client is one QMP connection, ready for commands. Its methods may be called
// from several goroutines.
type Client struct {
	conn    Conn
	version Version
	done    chan struct{} // closed when nothing more will be read

	mu      sync.Mutex
	nextID  uint64
	waiting map[uint64]chan message
	err     error // why done is closed
}

// Open reads the greeting on conn and leaves the negotiation mode, after which
// QEMU takes commands. onEvent, if not nil, is called for each event in order,
// from the goroutine that reads: it must not block and not call the client.
// The client owns conn from here on, also when Open fails; on cancel of ctx
// Open closes it.
func Open(ctx context.Context, conn Conn, onEvent func(Event)) (*Client, error) {
	c := &Client{conn: conn, done: make(chan struct{}), waiting: map[uint64]chan message{}}
	greeting := make(chan Version, 1)
	go c.read(greeting, onEvent)
	select {
	case c.version = <-greeting:
	case <-c.done:
		return nil, fmt.Errorf("QMP greeting: %w", c.err)
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("QMP greeting: %w", ctx.Err())
	}
	if _, err := c.Run(ctx, "qmp_capabilities", nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Version is the QEMU's at the other end.
func (c *Client) Version() Version { return c.version }

// Close closes the connection and waits for the reader to end. QEMU itself
// runs on.
func (c *Client) Close() {
	c.conn.Close()
	<-c.done
}

// Done is closed when the connection has ended, by either side, and the last
// event was delivered.
func (c *Client) Done() <-chan struct{} { return c.done }

// Run runs one command and returns its result. args is anything that marshals
// to a JSON object, or nil. A refusal is an [*Error], a connection that ended
// wraps [ErrClosed].
func (c *Client) Run(ctx context.Context, command string, args any) (json.RawMessage, error) {
	result, err := c.run(ctx, command, args)
	if err != nil {
		return nil, fmt.Errorf("QMP %s: %w", command, err)
	}
	return result, nil
}

func (c *Client) run(ctx context.Context, command string, args any) (json.RawMessage, error) {
	answer := make(chan message, 1)
	c.mu.Lock()
	c.nextID++
	id := c.nextID
	c.waiting[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
	}()

	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return nil, err
	}
	if err := c.write(ctx, append(line, '\n')); err != nil {
		return nil, err
	}
	select {
	case m := <-answer:
		if m.kind == kindError {
			return nil, &m.err
		}
		return m.result, nil
	case <-c.done:
		return nil, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// write sends one line whole; on cancel it gives up, as a stopped QEMU does
// not read.
func (c *Client) write(ctx context.Context, line []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.conn.SetWriteDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := c.conn.Write(line); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return nil
}

// read is the only reader of conn, until it ends.
func (c *Client) read(greeting chan<- Version, onEvent func(Event)) {
	err := c.readLines(greeting, onEvent)
	if err == nil {
		err = ErrClosed
	} else {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	c.err = err // before close(done), which publishes it
	c.conn.Close()
	close(c.done)
}

func (c *Client) readLines(greeting chan<- Version, onEvent func(Event)) error {
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(make([]byte, 0, 4096), MaxLine)
	greeted := false
	for lines.Scan() {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		m, err := parse(bytes.Clone(lines.Bytes()))
		if err != nil {
			return err
		}
		switch m.kind {
		case kindGreeting:
			if greeted {
				return errors.New("QEMU greeted twice")
			}
			greeted = true
			greeting <- m.version
		case kindEvent:
			if onEvent != nil {
				onEvent(m.event)
			}
		case kindReturn, kindError:
			// An answer that nobody waits for belongs to a cancelled command.
			c.mu.Lock()
			answer := c.waiting[m.id]
			delete(c.waiting, m.id)
			c.mu.Unlock()
			if answer != nil {
				answer <- m
			}
		}
	}
	return lines.Err()
}
