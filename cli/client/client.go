// Package client talks to memlinuxd by the contract of daemon/api: on the
// system bus, or on a private one that it starts for the one command.
package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/busguard"
)

// Client is a connection to memlinuxd.
type Client struct {
	conn    *dbus.Conn
	private *privateDaemon // nil on the system bus

	daemons sync.Map // unique names that have been memlinuxd's; such a name never comes again

	mu        sync.Mutex
	following map[dbus.ObjectPath]chan *dbus.Signal // of each job that is followed
}

// ErrNotRoot says that there is no service and that the caller can't start a
// private one.
var ErrNotRoot = &api.Error{Name: api.ErrNotAuthorized,
	Message: "memlinuxd is not on the system bus, and only root can start a private one: run this with sudo, or install and start the service"}

// ErrPrivateIsRoots says that the caller asked for a private one and can't start it.
var ErrPrivateIsRoots = &api.Error{Name: api.ErrNotAuthorized, Message: "--private is for root: use sudo"}

// Connect reaches memlinuxd. With private it starts one on a bus of its own for
// this process; without, it does so only where no system bus or no memlinuxd is
// there and the caller is root.
func Connect(ctx context.Context, private bool) (*Client, error) {
	if !private {
		c, err := connectSystem(ctx)
		if c != nil || err != nil {
			return c, err
		}
	}
	switch {
	case os.Geteuid() == 0:
	case private:
		return nil, ErrPrivateIsRoots
	default:
		return nil, ErrNotRoot
	}
	daemon, address, err := startPrivate(ctx)
	if err != nil {
		return nil, err
	}
	c, err := dial(ctx, address)
	if err != nil {
		daemon.stop()
		return nil, fmt.Errorf("connect to the private bus: %w", err)
	}
	c.private = daemon
	return c, nil
}

// connectSystem returns nil and no error where there is no service to reach.
func connectSystem(ctx context.Context) (*Client, error) {
	c, err := dial(ctx, busguard.SystemBus())
	if err != nil {
		return nil, nil //nolint:nilerr // no system bus: a private one may do
	}
	var names, activatable []string
	bus := c.conn.BusObject()
	err = errors.Join(
		bus.CallWithContext(ctx, "org.freedesktop.DBus.ListNames", 0).Store(&names),
		bus.CallWithContext(ctx, "org.freedesktop.DBus.ListActivatableNames", 0).Store(&activatable))
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("ask the system bus for its names: %w", err)
	}
	if !slices.Contains(names, api.BusName) && !slices.Contains(activatable, api.BusName) {
		c.Close()
		return nil, nil
	}
	return c, nil
}

func dial(ctx context.Context, address string) (*Client, error) {
	c := &Client{following: map[dbus.ObjectPath]chan *dbus.Signal{}}
	// The default handler may deliver signals out of order.
	conn, err := busguard.Dial(address, 0, c.hear, dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
	if err != nil {
		return nil, err
	}
	c.conn = conn
	signals := make(chan *dbus.Signal, 64)
	conn.Signal(signals)
	go c.route(signals)
	err = errors.Join(
		conn.AddMatchSignalContext(ctx, dbus.WithMatchSender(api.BusName), dbus.WithMatchPathNamespace(api.ManagerPath)),
		conn.AddMatchSignalContext(ctx, dbus.WithMatchSender(busName), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, api.BusName)))
	if err != nil {
		c.Close()
		return nil, err
	}
	var owner string
	if conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.GetNameOwner", 0, api.BusName).Store(&owner) == nil { // else it is started yet
		c.daemons.Store(owner, true)
	}
	return c, nil
}

// hear is the guard's: calls, and signals of anybody but the bus and memlinuxd, go
// no further. Every user can send them to us.
func (c *Client) hear(msg *dbus.Message, _ int, _ []int) {
	sender, _ := msg.Headers[dbus.FieldSender].Value().(string)
	switch {
	case msg.Type == dbus.TypeMethodCall:
		msg.Type = 0
	case msg.Type != dbus.TypeSignal:
	case sender == busName:
		if msg.Headers[dbus.FieldMember].Value() == "NameOwnerChanged" && len(msg.Body) == 3 && msg.Body[0] == api.BusName {
			c.daemons.Store(msg.Body[2], true)
		}
	default:
		if _, ours := c.daemons.Load(sender); !ours {
			msg.Type = 0
		}
	}
}

// busName is the bus itself.
const busName = "org.freedesktop.DBus"

// Close ends the connection, and the private daemon where there is one; it
// waits until that has ended.
func (c *Client) Close() {
	_ = c.conn.Close() // nothing is left to lose
	if c.private != nil {
		c.private.stop()
	}
}

// route hands each signal to who follows its object, and the daemon's own going
// to all, until the connection ends.
func (c *Client) route(signals <-chan *dbus.Signal) {
	for {
		var s *dbus.Signal
		select {
		case s = <-signals:
		case <-c.conn.Context().Done():
		}
		if s == nil {
			return // Follow sees the connection's end itself
		}
		c.mu.Lock()
		for path, to := range c.following {
			if s.Path == path || s.Name == "org.freedesktop.DBus.NameOwnerChanged" {
				to <- s // its reader is in Follow
			}
		}
		c.mu.Unlock()
	}
}

// follow registers for the signals of an object; what it returns ends that.
func (c *Client) follow(path dbus.ObjectPath) (signals <-chan *dbus.Signal, end func()) {
	to := make(chan *dbus.Signal, 64)
	c.mu.Lock()
	c.following[path] = to
	c.mu.Unlock()
	return to, func() {
		stop := make(chan struct{})
		go func() { // route may just be handing one over
			for {
				select {
				case <-to:
				case <-stop:
					return
				}
			}
		}()
		c.mu.Lock()
		delete(c.following, path)
		c.mu.Unlock()
		close(stop)
	}
}

// call calls a method of the contract and stores what it returns. Whoever must
// allow it may be asked: godbus' Call drops that flag, so the message is made
// here.
func (c *Client) call(ctx context.Context, path dbus.ObjectPath, method string, args []any, ret ...any) error {
	return c.callWith(ctx, dbus.FlagAllowInteractiveAuthorization, path, method, args, ret...)
}

// callRunning is call for what is over when memlinuxd is: that is not started for it,
// least of all while it is being stopped.
func (c *Client) callRunning(ctx context.Context, path dbus.ObjectPath, method string, args []any, ret ...any) error {
	return c.callWith(ctx, dbus.FlagAllowInteractiveAuthorization|dbus.FlagNoAutoStart, path, method, args, ret...)
}

func (c *Client) callWith(ctx context.Context, flags dbus.Flags, path dbus.ObjectPath, method string, args []any, ret ...any) error {
	dot := strings.LastIndex(method, ".")
	msg := &dbus.Message{Type: dbus.TypeMethodCall, Flags: flags, Body: args, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(api.BusName),
		dbus.FieldPath:        dbus.MakeVariant(path),
		dbus.FieldInterface:   dbus.MakeVariant(method[:dot]),
		dbus.FieldMember:      dbus.MakeVariant(method[dot+1:]),
	}}
	if len(args) > 0 {
		msg.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(args...))
	}
	call := <-c.conn.SendWithContext(ctx, msg, nil).Done
	if call.Err != nil {
		return c.explain(call.Err)
	}
	return call.Store(ret...)
}

// explain makes an error of the bus one of the contract.
func (c *Client) explain(err error) error {
	var d dbus.Error
	if !errors.As(err, &d) {
		return err
	}
	switch d.Name {
	case "org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired":
		return &api.Error{Name: api.ErrNotAuthorized, Message: d.Error()}
	case "org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.NameHasNoOwner":
		return c.gone("")
	}
	return &api.Error{Name: d.Name, Message: d.Error()}
}

// gone is the error of a job of that kind whose daemon has ended.
func (c *Client) gone(kind string) error {
	msg := "memlinuxd went away during the job; look at its log, then run the command again"
	if kind == api.KindWrite {
		msg += ", with --resume if it was writing a disk"
	}
	if c.private != nil {
		if last := c.private.lastWords(); last != "" {
			msg += " (" + last + ")"
		}
	}
	return &api.Error{Name: api.ErrFailed, Message: msg}
}

// objects reads all objects that have the interface iface.
func (c *Client) objects(ctx context.Context, iface string) ([]api.Properties, error) {
	var all map[dbus.ObjectPath]map[string]api.Properties
	if err := c.call(ctx, api.ManagerPath, api.ObjectManagerInterface+".GetManagedObjects", nil, &all); err != nil {
		return nil, err
	}
	var found []api.Properties
	for _, o := range all {
		if p, ok := o[iface]; ok {
			found = append(found, p)
		}
	}
	return found, nil
}

// Devices lists the disks, sorted by name.
func (c *Client) Devices(ctx context.Context) ([]api.Device, error) {
	// Devices looks at the machine anew.
	var paths []dbus.ObjectPath
	if err := c.call(ctx, api.ManagerPath, api.ManagerInterface+".Devices", []any{api.Properties{}}, &paths); err != nil {
		return nil, err
	}
	objects, err := c.objects(ctx, api.DeviceInterface)
	if err != nil {
		return nil, err
	}
	list := make([]api.Device, len(objects))
	for i, p := range objects {
		if list[i], err = api.DeviceFrom(p); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(list, func(a, b api.Device) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

// Device reads one disk.
func (c *Client) Device(ctx context.Context, name string) (api.Device, error) {
	var p api.Properties
	if err := c.call(ctx, api.DevicePath(name), api.PropertiesInterface+".GetAll", []any{api.DeviceInterface}, &p); err != nil {
		return api.Device{}, err
	}
	return api.DeviceFrom(p)
}

// Jobs lists the jobs, oldest first.
func (c *Client) Jobs(ctx context.Context) ([]api.Job, error) {
	objects, err := c.objects(ctx, api.JobInterface)
	if err != nil {
		return nil, err
	}
	list := make([]api.Job, len(objects))
	for i, p := range objects {
		if err := list[i].Update(p); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(list, func(a, b api.Job) int { return strings.Compare(a.ID, b.ID) })
	return list, nil
}

// BootMenu reads this PC's boot menu.
func (c *Client) BootMenu(ctx context.Context) (api.BootMenu, error) {
	var p api.Properties
	if err := c.call(ctx, api.ManagerPath, api.ManagerInterface+".BootMenu", []any{api.Properties{}}, &p); err != nil {
		return api.BootMenu{}, err
	}
	return api.BootMenuFrom(p)
}

// Plan asks what a write to the device would do.
func (c *Client) Plan(ctx context.Context, device string) (api.Plan, error) {
	var p api.Properties
	if err := c.call(ctx, api.ManagerPath, api.ManagerInterface+".Plan", []any{api.DevicePath(device), api.Properties{}}, &p); err != nil {
		return api.Plan{}, err
	}
	return api.PlanFrom(p)
}

// startGrace is how long a start may go on when it is cancelled.
const startGrace = 3 * time.Second

// Start calls a method of the manager that starts a job, and returns the job's
// path. On a terminal an agent asks there for a password, if one is needed and no
// other agent asks for it. When ctx ends, a job that has just begun is still
// returned, to be followed to its end; one that waits for somebody to allow it
// never begins.
func (c *Client) Start(ctx context.Context, method string, args ...any) (dbus.ObjectPath, error) {
	defer c.letAsk(ctx)()
	var job dbus.ObjectPath
	started := make(chan error, 1)
	go func() {
		started <- c.call(context.WithoutCancel(ctx), api.ManagerPath, api.ManagerInterface+"."+method, args, &job)
	}()
	select {
	case err := <-started:
		if err == nil || ctx.Err() == nil {
			return job, err
		}
		return "", ctx.Err() // what came of a Ctrl-C
	case <-ctx.Done():
	}
	select {
	case err := <-started:
		if err == nil {
			return job, nil
		}
	case <-time.After(startGrace):
		_ = c.conn.Close() // the daemon gives up what it does for us
		if err := <-started; err == nil {
			return job, nil
		}
	}
	return "", ctx.Err()
}

// letAsk lets polkit ask on this terminal, where it may have to, until stop is
// called.
func (c *Client) letAsk(ctx context.Context) (stop func()) {
	if c.private != nil || os.Geteuid() == 0 {
		return func() {}
	}
	return startAgent(ctx)
}

// CancelJob cancels a job, waits until nothing of it runs any more, and returns
// how it ended, which may have been before. Who must allow it is asked as by
// [Client.Start].
func (c *Client) CancelJob(ctx context.Context, id string) (job api.Job, err error) {
	path := api.JobPath(id)
	if !path.IsValid() { // for which the bus would close the connection
		return job, noJob(id)
	}
	defer c.letAsk(ctx)()
	var props api.Properties
	err = c.call(ctx, path, api.JobInterface+".Cancel", []any{api.Properties{}})
	if err == nil {
		err = c.call(ctx, path, api.PropertiesInterface+".GetAll", []any{api.JobInterface}, &props)
	}
	if api.ErrorName(err) == "org.freedesktop.DBus.Error.UnknownObject" {
		return job, noJob(id)
	}
	if err != nil {
		return job, err
	}
	return job, job.Update(props)
}

func noJob(id string) error {
	return &api.Error{Name: api.ErrNoSuchJob, Message: fmt.Sprintf("there is no job %q; memlinux jobs lists them", id)}
}

// Follow reports every change of the job until it has ended, and returns its
// last state. When ctx ends it cancels the job, and still waits: on return the
// job has ended, or the daemon has.
func (c *Client) Follow(ctx context.Context, path dbus.ObjectPath, each func(api.Job)) (api.Job, error) {
	var job api.Job
	signals, end := c.follow(path)
	defer end()
	// What was signalled before this call is in its answer.
	var props api.Properties
	if err := c.callRunning(context.WithoutCancel(ctx), path, api.PropertiesInterface+".GetAll", []any{api.JobInterface}, &props); err != nil {
		return job, err
	}
	if err := job.Update(props); err != nil {
		return job, err
	}
	each(job)
	cancel := ctx.Done()
	cancelled := make(chan error, 1)
	for ended := job.State != api.StateRunning; !ended; {
		select {
		case <-cancel:
			cancel = nil
			go func() {
				cancelled <- c.callRunning(context.WithoutCancel(ctx), path, api.JobInterface+".Cancel", []any{api.Properties{}})
			}()
		case err := <-cancelled:
			if err != nil {
				return job, err
			}
		case <-c.conn.Context().Done():
			return job, c.gone(job.Kind)
		case s := <-signals:
			if s.Name == "org.freedesktop.DBus.NameOwnerChanged" && len(s.Body) == 3 && s.Body[2] == "" {
				return job, c.gone(job.Kind)
			}
			news, last := newsOf(s, path)
			if err := job.Update(news); err != nil {
				return job, err
			}
			if ended = last; last {
				// All hear of the end, and only some may have the report. A daemon that
				// was stopped does not answer any more.
				err := c.callRunning(context.WithoutCancel(ctx), path, api.PropertiesInterface+".GetAll", []any{api.JobInterface}, &props)
				switch {
				case err == nil:
					if err := job.Update(props); err != nil {
						return job, err
					}
				case job.State == api.StateSucceeded:
					return job, err
				}
			}
			if news != nil {
				each(job)
			}
		}
	}
	return job, nil
}

// newsOf is what the signal tells of the job at path, nil for nothing, and
// whether it is its last.
func newsOf(s *dbus.Signal, path dbus.ObjectPath) (news api.Properties, last bool) {
	if s.Path != path || len(s.Body) != 3 {
		return nil, false
	}
	switch s.Name {
	case api.PropertiesInterface + ".PropertiesChanged":
		news, _ = s.Body[1].(map[string]dbus.Variant)
	case api.JobInterface + ".Completed":
		news, last = api.Properties{"Result": dbus.MakeVariant(s.Body[2])}, true
	}
	return news, last
}

// privateDaemon is a memlinuxd with a bus of its own. It lives as long as its
// standard input is open, so that it never outlives this process.
type privateDaemon struct {
	cmd   *exec.Cmd
	stdin io.Closer
	words *tail
}

// ConfigError says that the daemon did not start for its configuration.
type ConfigError struct{ Message string }

func (e *ConfigError) Error() string { return e.Message }

func startPrivate(ctx context.Context) (*privateDaemon, string, error) {
	program, err := findDaemon()
	if err != nil {
		return nil, "", err
	}
	words := &tail{}
	cmd := exec.Command(program, "--private")
	// Its own process group: a Ctrl-C at the terminal is for us, and we
	// cancel the job.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stderr = words
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, "", fmt.Errorf("start memlinuxd: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, "", fmt.Errorf("start memlinuxd: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, "", fmt.Errorf("start memlinuxd: %w", err)
	}
	d := &privateDaemon{cmd, stdin, words}
	line := make(chan string, 1)
	go func() {
		// A daemon that ends before it is ready gives an empty line.
		s, _ := bufio.NewReader(stdout).ReadString('\n')
		line <- strings.TrimSpace(s)
	}()
	select {
	case address := <-line:
		if address != "" {
			return d, address, nil
		}
		_ = stdin.Close()
		err := cmd.Wait()
		message := words.last()
		if message == "" {
			message = fmt.Sprintf("memlinuxd ended at once: %v", err)
		}
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 2 {
			return nil, "", &ConfigError{strings.TrimPrefix(message, "memlinuxd: ")}
		}
		return nil, "", errors.New(strings.TrimPrefix(message, "memlinuxd: "))
	case <-ctx.Done():
		d.stop()
		return nil, "", ctx.Err()
	}
}

// findDaemon finds memlinuxd as make and make install lay it.
func findDaemon() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find memlinuxd: %w", err)
	}
	dir := filepath.Dir(self)
	places := []string{filepath.Join(dir, "memlinuxd"), filepath.Join(dir, "..", "libexec", "memlinuxd")}
	for _, p := range places {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("memlinuxd is not at %s; run make, or make install", strings.Join(places, " or "))
}

// stop asks the daemon to end, which cancels its jobs, and waits for it; but not for
// a thread that the kernel does not give back, since a disk does not answer.
func (d *privateDaemon) stop() {
	_ = d.stdin.Close()
	ended := make(chan struct{})
	go func() {
		_ = d.cmd.Wait() // how it ended matters no more
		close(ended)
	}()
	kill := time.After(time.Minute)
	look := time.NewTicker(500 * time.Millisecond)
	defer look.Stop()
	for stuck := 0; stuck < 3; {
		select {
		case <-ended:
			return
		case <-kill:
			_ = d.cmd.Process.Kill()
		case <-look.C:
			if d.exited() {
				stuck++
			}
		}
	}
}

// exited tells whether the daemon's first thread has ended: with it, all that can.
func (d *privateDaemon) exited() bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.cmd.Process.Pid)) // proc(5): PID (NAME) STATE
	if err != nil {
		return false
	}
	_, rest, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
	return len(rest) > 0 && rest[0] == 'Z'
}

func (d *privateDaemon) lastWords() string { return d.words.last() }

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailBytes = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - tailBytes; n > 0 {
		t.buf = t.buf[n:]
	}
	return len(p), nil
}

// last is the last line that is not empty.
func (t *tail) last() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := bytes.TrimSpace(t.buf)
	return string(text[bytes.LastIndexByte(text, '\n')+1:])
}
