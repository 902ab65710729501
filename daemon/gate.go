package daemon

import (
	"context"
	"fmt"
	"sync"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/busguard"
)

// What callers may have in work at once. A person's command has one call; these
// bound what a program can cost that calls and calls. The size of one call is
// bounded by busguard.MaxMessage.
const (
	callsPerClient = 32 // a connection's
	callsPerUser   = 64 // all connections' of a user but root
	callsInAll     = 512

	bytesPerUser = 8 << 20
	bytesInAll   = 32 << 20

	filesPerUser = 256
	filesInAll   = 2048
)

// gate counts what is in work, and knows who of the callers is still there.
type gate struct {
	mu      sync.Mutex
	all     load
	users   map[uint32]*load
	clients map[string]*client // who have something in work, by unique name
	arrived map[*dbus.Message]*arrival
}

// load is what calls hold as long as they are in work.
type load struct{ calls, bytes, files int }

func (l *load) add(o load)      { l.calls += o.calls; l.bytes += o.bytes; l.files += o.files }
func (l *load) subtract(o load) { l.add(load{-o.calls, -o.bytes, -o.files}) }

// client is a connection to the bus that has something in work here.
type client struct {
	name  string
	calls int
	uses  int // calls and jobs that end with it
	ctx   context.Context
	gone  context.CancelFunc

	asking sync.Mutex // for its user, once for all calls
	uid    *uint32
}

// arrival is a call between its arrival and its answer.
type arrival struct {
	client *client
	load   load
	files  []int   // descriptors; -1 for those that were taken
	uid    *uint32 // once it counts for a user
}

func newGate() *gate {
	return &gate{users: map[uint32]*load{}, clients: map[string]*client{}, arrived: map[*dbus.Message]*arrival{}}
}

// limitError is an error of a caller that wants too much at once.
func limitError(format string, args ...any) error {
	return &api.Error{Name: api.ErrLimitsExceeded, Message: fmt.Sprintf(format, args...)}
}

// enter lets a call in, or says why not. Then its descriptors are closed.
func (g *gate) enter(ctx context.Context, msg *dbus.Message, size int, files []int) error {
	sender, _ := msg.Headers[dbus.FieldSender].Value().(string)
	l := load{1, size, len(files)}
	g.mu.Lock()
	defer g.mu.Unlock()
	var err error
	switch c := g.clients[sender]; {
	case size > busguard.MaxMessage:
		err = limitError("the call has %d KiB, and %d are the most; send large things as files", size>>10, busguard.MaxMessage>>10)
	case c != nil && c.calls >= callsPerClient:
		err = limitError("%d calls of this connection are not answered yet; wait for their answers", c.calls)
	case g.all.calls >= callsInAll || g.all.bytes+size > bytesInAll || g.all.files+len(files) > filesInAll:
		err = limitError("memlinuxd has %d calls to answer; try again in a moment", g.all.calls)
	}
	if err != nil {
		busguard.Discard(files)
		return err
	}
	c := g.hold(ctx, sender)
	c.calls++
	g.all.add(l)
	g.arrived[msg] = &arrival{client: c, load: l, files: files}
	return nil
}

// hold gets the client, to be released. g.mu is held.
func (g *gate) hold(ctx context.Context, sender string) *client {
	c, ok := g.clients[sender]
	if !ok {
		c = &client{name: sender}
		c.ctx, c.gone = context.WithCancel(ctx)
		g.clients[sender] = c
	}
	c.uses++
	return c
}

// stay keeps the client known until leave is called.
func (g *gate) stay(c *client) (leave func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c.uses++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.release(c)
	}
}

// release is without g.mu for who holds it.
func (g *gate) release(c *client) {
	c.uses--
	if c.uses == 0 {
		c.gone()
		if g.clients[c.name] == c {
			delete(g.clients, c.name)
		}
	}
}

// taken is the arrival of a message that entered; nil for one that did not.
func (g *gate) taken(msg *dbus.Message) *arrival {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.arrived[msg]
}

// count makes the call one of the user's, or says that they have too many. Root
// has none.
func (g *gate) count(a *arrival, uid uint32) error {
	if uid == 0 {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	u, ok := g.users[uid]
	if !ok {
		u = &load{}
	}
	if u.calls >= callsPerUser || u.bytes+a.load.bytes > bytesPerUser || u.files+a.load.files > filesPerUser {
		return limitError("%d calls of your user are not answered yet; wait for their answers", u.calls)
	}
	u.add(a.load)
	g.users[uid], a.uid = u, &uid
	return nil
}

// answered ends a call.
func (g *gate) answered(msg *dbus.Message) {
	g.mu.Lock()
	defer g.mu.Unlock()
	a := g.arrived[msg]
	if a == nil {
		return
	}
	delete(g.arrived, msg)
	g.all.subtract(a.load)
	if a.uid != nil {
		u := g.users[*a.uid]
		if u.subtract(a.load); u.calls == 0 {
			delete(g.users, *a.uid)
		}
	}
	a.client.calls--
	g.release(a.client)
}

// left ends everything of a connection that is no more.
func (g *gate) left(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c, ok := g.clients[name]; ok {
		c.gone()
		delete(g.clients, name) // a name never comes again (D-Bus specification, "Unique connection name")
	}
}

// arrive is the guard's: it lets calls in, in the order in which they come, and
// refuses at once what is too much. It waits for nothing: the bus drops calls when
// its queue for us is full.
func (s *Server) arrive(msg *dbus.Message, size int, files []int) {
	if msg.Type != dbus.TypeMethodCall {
		busguard.Discard(files)
		if name, ok := lostName(msg); ok {
			s.life.gone(name) // behind its calls, as they come here in order
		}
		return
	}
	if msg.Headers[dbus.FieldInterface].Value() == api.PeerInterface {
		// godbus answers these itself, without a bound. Without the interface,
		// which a caller may leave out, they are in our table.
		delete(msg.Headers, dbus.FieldInterface)
	}
	err := s.gate.enter(s.ctx, msg, size, files)
	if err == nil {
		sender, _ := msg.Headers[dbus.FieldSender].Value().(string)
		s.life.arrive(sender)
		return
	}
	msg.Type = 0 // godbus goes no further
	if msg.Flags&dbus.FlagNoReplyExpected != 0 {
		return
	}
	select {
	case s.refusals <- &dbus.Message{Type: dbus.TypeError, Flags: dbus.FlagNoReplyExpected, Body: []any{err.Error()}, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: msg.Headers[dbus.FieldSender],
		dbus.FieldErrorName:   dbus.MakeVariant(api.ErrorName(err)),
		dbus.FieldReplySerial: dbus.MakeVariant(msg.Serial()),
		dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf("")),
	}}:
	default: // who has so many refused does not listen
	}
}

// maxRefusals is how many refusals may wait to be sent.
const maxRefusals = 16 << 10

// refuse sends the refusals until ctx ends.
func (s *Server) refuse(ctx context.Context) {
	for {
		select {
		case msg := <-s.refusals:
			s.conn.Send(msg, nil)
		case <-ctx.Done():
			return
		}
	}
}

// overhear is the guard's of the connection for our own questions. Nobody has a
// reason to call that.
func (s *Server) overhear(msg *dbus.Message, _ int, _ []int) {
	if name, ok := lostName(msg); ok {
		s.gate.left(name)
	}
	if msg.Type == dbus.TypeMethodCall {
		msg.Type = 0 // godbus goes no further
	}
}

// watchCallers asks the bus to say which connections end: on the connection for
// our own questions at once, on the other one behind their calls.
func (s *Server) watchCallers(ctx context.Context) error {
	for _, conn := range []*dbus.Conn{s.aside, s.conn} {
		err := conn.AddMatchSignalContext(ctx, dbus.WithMatchSender(busName), dbus.WithMatchInterface(busName), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchOption("arg2", ""))
		if err != nil {
			return fmt.Errorf("watch who leaves the bus: %w", err)
		}
	}
	return nil
}

// busName is the bus itself.
const busName = "org.freedesktop.DBus"

func lostName(msg *dbus.Message) (string, bool) {
	if msg.Type != dbus.TypeSignal || msg.Headers[dbus.FieldSender].Value() != busName || msg.Headers[dbus.FieldMember].Value() != "NameOwnerChanged" || len(msg.Body) != 3 {
		return "", false
	}
	name, _ := msg.Body[0].(string)
	return name, msg.Body[2] == ""
}
