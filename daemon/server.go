// Package daemon is memlinuxd: it composes the rooms of memlinux (imagegen,
// bootloader, media, testvm) into jobs and offers them on D-Bus by the contract
// of daemon/api.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/busguard"
	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/systemd"
)

// Server is memlinuxd on one bus.
type Server struct {
	conn    *dbus.Conn
	aside   *dbus.Conn // for our own questions: the bus drops answers when its queue for conn is full of others' calls
	version string
	jobs    *jobs.Registry
	devices *deviceList
	entries *published[api.BootEntry]
	opened  chan struct{}  // closed when calls may be answered
	units   *systemd.Units // nil where there is no systemd that runs us
	checks  singleflight.Group
	checkup atomic.Pointer[checkup]
	ctx     context.Context

	guests   *guests
	consoles chan struct{} // one place for each virtual machine that may run on the console of a user but root
	looks    chan struct{} // one for each look at a disk, which starts a program

	interruptions *interruptions
	authority     Authority
	gate          *gate
	refusals      chan *dbus.Message

	configuration atomic.Pointer[config.Config]
	life          *life
	service       *service // nil: nobody's
	story         story
}

// config is how the daemon works now.
func (s *Server) config() config.Config { return *s.configuration.Load() }

// maxLooks is how many disks may be looked at at once.
const maxLooks = 4

// Serve offers the service on the bus at address (the system bus where it is
// empty) until ctx ends or the bus goes away. The authority decides who may do
// what. ready is called when the name is ours. On return no job runs any more.
func Serve(ctx context.Context, address string, authority Authority, c config.Config, version string, ready func() error, options ...Option) error {
	s := &Server{version: version, guests: newGuests(), consoles: make(chan struct{}, maxConsoles), looks: make(chan struct{}, maxLooks),
		opened: make(chan struct{}), ctx: ctx, authority: authority, gate: newGate(), refusals: make(chan *dbus.Message, maxRefusals), life: newLife()}
	s.configuration.Store(&c)
	for _, option := range options {
		option(s)
	}
	conn, err := connect(address, dbus.TypeMethodCall, s.arrive, dbus.WithHandler(s))
	if err != nil {
		return err
	}
	defer conn.Close()
	s.conn = conn
	s.life.is(conn.Names()[0])
	if address == "" { // a bus of our own has no systemd on it
		if s.units, err = systemd.OwnUnits(ctx, busguard.SystemBus()); err != nil {
			return err
		}
		if s.units != nil {
			defer s.units.Close()
			sandbox.Use(s.compile)
		}
	}
	if s.aside, err = connect(address, 0, s.overhear); err != nil {
		return err
	}
	defer s.aside.Close()
	refusing := make(chan struct{})
	refuse, stopRefusing := context.WithCancel(ctx)
	defer func() { stopRefusing(); <-refusing }()
	go func() {
		defer close(refusing)
		s.refuse(refuse)
	}()
	if err := s.watchCallers(ctx); err != nil {
		return err
	}
	var disks blockdev.System
	if s.service != nil {
		disks.Unmount = systemd.Unmount
	}
	s.devices = newDeviceList(disks, s)
	s.entries = &published[api.BootEntry]{server: s, iface: api.EntryInterface, path: api.EntryPath}
	if s.interruptions, err = openInterruptions(s.stateDir("interrupted")); err != nil {
		return err
	}
	if s.jobs, err = jobs.Open(s.stateDir("jobs"), c.JobRetention, s, s.afterCrash); err != nil {
		return err
	}
	defer s.jobs.Close()
	s.dropOldReports()

	watching := make(chan struct{})
	watch, stop := context.WithCancel(ctx)
	defer func() { stop(); <-watching }()
	go func() {
		defer close(watching)
		s.devices.watch(watch)
	}()

	close(s.opened)
	if err := s.own(); err != nil {
		return err
	}
	if err := ready(); err != nil {
		return err
	}
	s.story.interrupted(s.jobs.Interrupted())
	left := make(chan error, 1)
	if s.service != nil {
		served, end := context.WithCancel(ctx)
		ended := make(chan struct{})
		defer func() { end(); <-ended }()
		go func() {
			defer close(ended)
			left <- s.live(served)
		}()
	}
	select {
	case <-ctx.Done():
		if s.service != nil {
			// For a signal that is not systemd's.
			soon, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			_ = systemd.NotifyStopping(soon)
			cancel()
		}
		return nil
	case err := <-left:
		return err
	case <-conn.Context().Done():
	case <-s.aside.Context().Done():
	}
	return errors.New("the bus went away")
}

// own takes the service's name on the bus.
func (s *Server) own() error {
	reply, err := s.conn.RequestName(api.BusName, dbus.NameFlagDoNotQueue)
	if err != nil {
		return fmt.Errorf("request the name %s: %w", api.BusName, err)
	}
	if reply != dbus.RequestNameReplyPrimaryOwner {
		return fmt.Errorf("another memlinuxd owns %s on this bus; stop it first", api.BusName)
	}
	return nil
}

func connect(address string, takes dbus.Type, arrive busguard.Arrive, options ...dbus.ConnOption) (*dbus.Conn, error) {
	if address == "" {
		address = busguard.SystemBus()
	}
	conn, err := busguard.Dial(address, takes, arrive, options...)
	if err != nil {
		return nil, fmt.Errorf("connect to the bus: %w", err)
	}
	return conn, nil
}

// Where a method can be called.
type place int

const (
	anywhere place = iota
	onManager
	onJob
	onDevice
	onEntry
)

// method is a row of the dispatcher's table.
type method struct {
	iface, member string
	place         place
	in            string // D-Bus signature of the arguments
	may           permission
	run           func(*Server, *call) ([]any, error)
}

// methods is every method that there is. One that is not in it is denied.
var methods []method

func init() { // not a literal: Introspect reads the table that it stands in
	methods = []method{
		{api.PeerInterface, "Ping", anywhere, "", toRead, (*Server).ping},
		{api.PeerInterface, "GetMachineId", anywhere, "", toRead, (*Server).machineID},
		{api.IntrospectableInterface, "Introspect", anywhere, "", toRead, (*Server).introspect},
		{api.PropertiesInterface, "Get", anywhere, "ss", toRead, (*Server).getProperty},
		{api.PropertiesInterface, "GetAll", anywhere, "s", toRead, (*Server).getProperties},
		{api.PropertiesInterface, "Set", anywhere, "ssv", toRead, (*Server).setProperty},
		{api.ObjectManagerInterface, "GetManagedObjects", onManager, "", toRead, (*Server).managedObjects},
		{api.ManagerInterface, "Build", onManager, "a{sv}", to(actionBuild), (*Server).build},
		{api.ManagerInterface, "Plan", onManager, "oa{sv}", toRead, (*Server).plan},
		{api.ManagerInterface, "Write", onManager, "osa{sv}", byDevice(actionWriteRemovable, actionWriteFixed), (*Server).write},
		{api.ManagerInterface, "CheckCapacity", onManager, "osa{sv}", byDevice(actionWriteRemovable, actionWriteFixed), (*Server).checkCapacity},
		{api.ManagerInterface, "WriteFile", onManager, "ha{sv}", to(actionBuild), (*Server).writeFile},
		{api.ManagerInterface, "Verify", onManager, "oa{sv}", byDevice(actionVerify, actionVerifyFixed), (*Server).verify},
		{api.ManagerInterface, "VerifyFile", onManager, "ha{sv}", to(actionVerify), (*Server).verifyFile},
		{api.ManagerInterface, "StartVM", onManager, "ha{sv}", to(actionVM), (*Server).startVM},
		{api.ManagerInterface, "InstallEntry", onManager, "a{sv}", to(actionEntry), (*Server).installEntry},
		{api.ManagerInterface, "RemoveEntry", onManager, "sa{sv}", to(actionEntry), (*Server).removeEntry},
		{api.ManagerInterface, "SetNextBoot", onManager, "sa{sv}", to(actionNext), (*Server).setNextBoot},
		{api.ManagerInterface, "Rollback", onManager, "a{sv}", to(actionEntry), (*Server).rollback},
		{api.ManagerInterface, "BootMenu", onManager, "a{sv}", toRead, (*Server).bootMenu},
		{api.ManagerInterface, "Doctor", onManager, "a{sv}", toRead, (*Server).doctor},
		{api.ManagerInterface, "Devices", onManager, "a{sv}", toRead, (*Server).listDevices},
		{api.ManagerInterface, "Jobs", onManager, "a{sv}", toRead, (*Server).listJobs},
		{api.JobInterface, "Cancel", onJob, "a{sv}", byOwner(actionCancelOwn, actionCancelOthers), (*Server).cancelJob},
	}
}

// LookupObject makes the Server a dbus.Handler: godbus asks it for the method
// behind each call, and every answer leads to dispatch.
func (s *Server) LookupObject(path dbus.ObjectPath) (dbus.ServerObject, bool) {
	return object{s, path}, true
}

type object struct {
	server *Server
	path   dbus.ObjectPath
}

func (o object) LookupInterface(name string) (dbus.Interface, bool) {
	return boundInterface{o, name}, true
}

type boundInterface struct {
	object
	name string
}

func (i boundInterface) LookupMethod(member string) (dbus.Method, bool) {
	return boundMethod{i, member}, true
}

type boundMethod struct {
	boundInterface
	member string
}

// DecodeArguments hands the whole message on: its sender, its flags and its
// descriptors matter too.
func (m boundMethod) DecodeArguments(_ *dbus.Conn, _ string, msg *dbus.Message, _ []any) ([]any, error) {
	return []any{msg}, nil
}

func (m boundMethod) Call(args ...any) ([]any, error) {
	return m.server.dispatch(m.path, m.name, m.member, args[0].(*dbus.Message))
}

// These four describe methods that godbus decodes by itself; dispatch does.
func (boundMethod) NumArguments() int     { return 0 }
func (boundMethod) NumReturns() int       { return 0 }
func (boundMethod) ArgumentValue(int) any { return nil }
func (boundMethod) ReturnValue(int) any   { return nil }

// call is one method call that was let through.
type call struct {
	ctx         context.Context // ends with the caller's connection
	path        dbus.ObjectPath
	client      *client
	uid         uint32
	interactive bool   // somebody may be asked
	action      string // that was allowed; "" for reading
	args        []any
	files       []int           // the descriptors; -1 for those that were taken
	looks       *sync.WaitGroup // at descriptors that are still under way
	target      *api.Target     // what it is about, for the journal; nil for nothing
}

// take gives the caller of take the descriptor, to close it.
func (c *call) take(fd dbus.UnixFDIndex) (*os.File, error) {
	if int64(fd) >= int64(len(c.files)) {
		return nil, invalidOption("the call names descriptor %d and brings %d", fd, len(c.files))
	}
	n := c.files[fd]
	if n < 0 {
		return nil, invalidOption("one descriptor was given for two things; give each its own")
	}
	c.files[fd] = -1
	return os.NewFile(uintptr(n), "the given file"), nil
}

var errStopping = &api.Error{Name: api.ErrBusy, Message: "memlinuxd is stopping; try again in a moment"}

// dispatch is the one way to every method.
func (s *Server) dispatch(path dbus.ObjectPath, iface, member string, msg *dbus.Message) (ret []any, err error) {
	a := s.gate.taken(msg)
	var looks sync.WaitGroup
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(os.Stderr, "memlinuxd: %s.%s: panic: %v\n%s", iface, member, p, debug.Stack())
			ret, err = nil, &api.Error{Name: api.ErrFailed, Message: fmt.Sprintf("internal error: %v; please report it with the daemon's log", p)}
		}
		// The program that serves a descriptor (FUSE) may let all that concerns
		// it wait: the call counts as long as it does, and its answer goes out.
		finish := func() {
			for _, fd := range a.files {
				if fd >= 0 {
					_ = unix.Close(fd)
				}
			}
			looks.Wait()
			s.gate.answered(msg)
			s.life.answered(a.client.name)
		}
		if len(a.files) > 0 {
			go finish()
		} else {
			finish()
		}
		err = bounded(err)
	}()
	select { // a call to our unique name can come before we are ready
	case <-s.opened:
	case <-a.client.ctx.Done():
		return nil, errStopping
	}
	m, err := s.lookup(path, iface, member)
	if err != nil {
		return nil, err
	}
	signature, _ := msg.Headers[dbus.FieldSignature].Value().(dbus.Signature)
	if signature.String() != m.in {
		return nil, dbus.NewError("org.freedesktop.DBus.Error.InvalidArgs",
			[]any{fmt.Sprintf("%s takes arguments of the signature %q, not %q", member, m.in, signature.String())})
	}
	c := &call{ctx: a.client.ctx, path: path, client: a.client, args: msg.Body, files: a.files, looks: &looks,
		interactive: msg.Flags&dbus.FlagAllowInteractiveAuthorization != 0}
	if c.uid, err = s.userOf(a.client); err != nil {
		return nil, err
	}
	if err := s.gate.count(a, c.uid); err != nil {
		return nil, err
	}
	if err := s.authorize(c, m.may); err != nil {
		return nil, contractError(err)
	}
	ret, err = m.run(s, c)
	if err != nil {
		return nil, contractError(err)
	}
	return ret, nil
}

func (s *Server) lookup(path dbus.ObjectPath, iface, member string) (method, error) {
	here, _ := s.resolve(path)
	if here == nowhere {
		return method{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownObject", []any{fmt.Sprintf("no object at %s", path)})
	}
	known := false
	for _, m := range methods {
		if m.place != anywhere && m.place != here {
			continue
		}
		// The specification lets a caller leave the interface out.
		if m.iface == iface || iface == "" {
			known = true
			if m.member == member {
				return m, nil
			}
		}
	}
	if !known {
		return method{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownInterface", []any{fmt.Sprintf("%s has no interface %s", path, iface)})
	}
	return method{}, dbus.NewError("org.freedesktop.DBus.Error.UnknownMethod", []any{fmt.Sprintf("%s has no method %s.%s", path, iface, member)})
}

// maxWords is how long an error's text may be, in bytes. Most of them quote what
// the caller gave.
const maxWords = 16 << 10

// bounded is err with no longer a text than that, as the bus takes it.
func bounded(err error) error {
	var bus *dbus.Error
	var contract *api.Error
	switch {
	case errors.As(err, &bus) && len(bus.Body) == 1:
		text, _ := bus.Body[0].(string)
		return dbus.NewError(bus.Name, []any{api.Words(text, maxWords)})
	case errors.As(err, &contract):
		return &api.Error{Name: contract.Name, Message: api.Words(err.Error(), maxWords)}
	}
	return err
}

// contractError gives every error a name of the contract.
func contractError(err error) error {
	var contract *api.Error
	var bus *dbus.Error
	if errors.As(err, &contract) || errors.As(err, &bus) {
		return err
	}
	return api.NewError(errorName(err), err)
}

const (
	nowhere place = -1 - iota // no object
	onNode                    // on the way to the objects
)

// resolve says what lies at path, and which nodes are below it.
func (s *Server) resolve(path dbus.ObjectPath) (place, []string) {
	if path == api.ManagerPath {
		return onManager, []string{"devices", "entries", "jobs"}
	}
	if name, ok := api.DeviceName(path); ok {
		if _, ok := s.devices.get(name); ok {
			return onDevice, nil
		}
		return nowhere, nil
	}
	if id, ok := api.JobID(path); ok {
		if _, ok := s.jobs.Job(id); ok {
			return onJob, nil
		}
		return nowhere, nil
	}
	if id, ok := api.EntryID(path); ok {
		if _, ok := s.entries.get(id); ok {
			return onEntry, nil
		}
		return nowhere, nil
	}
	prefix := strings.TrimSuffix(string(path), "/") + "/"
	objects := s.objects(0)
	for _, empty := range []dbus.ObjectPath{"devices", "entries", "jobs"} { // there even when they are
		objects[api.ManagerPath+"/"+empty+"/"] = nil
	}
	here, children := nowhere, []string{}
	for p := range objects {
		if rest, ok := strings.CutPrefix(string(p), prefix); ok {
			here = onNode
			child, _, _ := strings.Cut(rest, "/")
			if child != "" && !slices.Contains(children, child) {
				children = append(children, child)
			}
		}
	}
	slices.Sort(children)
	return here, children
}

// objects is everything on the bus, as the user may see it: path, interface,
// properties.
func (s *Server) objects(uid uint32) map[dbus.ObjectPath]map[string]api.Properties {
	all := map[dbus.ObjectPath]map[string]api.Properties{
		api.ManagerPath: {api.ManagerInterface: s.managerProperties()},
	}
	for path, props := range s.devices.all() {
		all[path] = map[string]api.Properties{api.DeviceInterface: props}
	}
	for path, props := range s.entries.all() {
		all[path] = map[string]api.Properties{api.EntryInterface: props}
	}
	for _, j := range s.jobs.Jobs() {
		if uid != 0 && uid != j.Owner {
			j = j.ForOthers()
		}
		all[api.JobPath(j.ID)] = map[string]api.Properties{api.JobInterface: j.Properties()}
	}
	return all
}

func (s *Server) managerProperties() api.Properties {
	return api.Properties{"Version": dbus.MakeVariant(s.version)}
}

func (s *Server) introspect(c *call) ([]any, error) {
	here, children := s.resolve(c.path)
	iface := map[place]string{onManager: api.ManagerInterface, onJob: api.JobInterface, onDevice: api.DeviceInterface, onEntry: api.EntryInterface}[here]
	return []any{api.Introspect(iface, children)}, nil
}

func (s *Server) ping(*call) ([]any, error) { return nil, nil }

// machineID is that of machine-id(5).
func (s *Server) machineID(*call) ([]any, error) {
	text, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		return nil, err
	}
	return []any{strings.TrimSpace(string(text))}, nil
}

// managedObjects leaves the manager itself out: it is the root that is asked.
func (s *Server) managedObjects(c *call) ([]any, error) {
	all := s.objects(c.uid)
	delete(all, api.ManagerPath)
	return []any{all}, nil
}

func (s *Server) propertiesOf(c *call, iface string) (api.Properties, error) {
	if c.path == api.ManagerPath && iface == api.ManagerInterface {
		return s.managerProperties(), nil
	}
	props, ok := s.objects(c.uid)[c.path][iface]
	if !ok {
		return nil, dbus.NewError("org.freedesktop.DBus.Error.UnknownInterface", []any{fmt.Sprintf("%s has no properties of %q", c.path, iface)})
	}
	return props, nil
}

func (s *Server) getProperty(c *call) ([]any, error) {
	iface, name := c.args[0].(string), c.args[1].(string)
	props, err := s.propertiesOf(c, iface)
	if err != nil {
		return nil, err
	}
	v, ok := props[name]
	if !ok {
		return nil, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", []any{fmt.Sprintf("%s has no property %s", iface, name)})
	}
	return []any{v}, nil
}

func (s *Server) getProperties(c *call) ([]any, error) {
	props, err := s.propertiesOf(c, c.args[0].(string))
	if err != nil {
		return nil, err
	}
	return []any{props}, nil
}

func (s *Server) setProperty(c *call) ([]any, error) {
	return nil, dbus.NewError("org.freedesktop.DBus.Error.PropertyReadOnly", []any{fmt.Sprintf("%s is read-only", c.args[1])})
}

// emit sends a signal. It can only fail when the bus is gone, which ends Serve.
func (s *Server) emit(path dbus.ObjectPath, name string, values ...any) {
	_ = s.conn.Emit(path, name, values...)
}

// emitChanged tells what changed, and of what the new value must be asked for.
func (s *Server) emitChanged(path dbus.ObjectPath, iface string, changed api.Properties, invalidated ...string) {
	s.emit(path, api.PropertiesInterface+".PropertiesChanged", iface, changed, append([]string{}, invalidated...))
}

func (s *Server) emitAdded(path dbus.ObjectPath, iface string, props api.Properties) {
	s.emit(api.ManagerPath, api.ObjectManagerInterface+".InterfacesAdded", path, map[string]api.Properties{iface: props})
}

func (s *Server) emitRemoved(path dbus.ObjectPath, iface string) {
	s.emit(api.ManagerPath, api.ObjectManagerInterface+".InterfacesRemoved", path, []string{iface})
}

// JobAdded tells that a job began. With JobChanged, JobCompleted and JobRemoved
// it makes the Server the jobs.Events of its registry.
func (s *Server) JobAdded(j api.Job) {
	s.emitAdded(api.JobPath(j.ID), api.JobInterface, j.Properties())
}

// JobChanged tells the properties that change while a job runs.
func (s *Server) JobChanged(j api.Job) {
	props := j.Properties()
	changed := api.Properties{}
	for _, key := range []string{"Phase", "Progress", "Bytes", "Total", "Rate", "Unit"} {
		changed[key] = props[key]
	}
	s.emitChanged(api.JobPath(j.ID), api.JobInterface, changed)
	s.story.phase(j)
}

// JobCompleted tells a job's end to all, as others may see it; its report, and why it
// failed, are there for those who may ask.
func (s *Server) JobCompleted(j api.Job) {
	seen := j.ForOthers()
	props := seen.Properties()
	changed := api.Properties{}
	for _, key := range []string{"State", "Phase", "Progress", "Bytes", "Total", "Rate", "Unit", "Message"} {
		changed[key] = props[key]
	}
	path := api.JobPath(j.ID)
	s.emitChanged(path, api.JobInterface, changed, "Result")
	s.emit(path, api.JobInterface+".Completed", j.State == api.StateSucceeded, seen.Message, seen.Result())
	s.story.ended(j)
	debug.FreeOSMemory() // a service that waits should be small
	s.life.end()
}

// JobRemoved tells that an ended job was forgotten.
func (s *Server) JobRemoved(id string) { s.emitRemoved(api.JobPath(id), api.JobInterface) }
