package systemd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	systemddbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/busguard"
)

// Units starts programs as services of their own, which systemd keeps apart
// from the system and ends with memlinuxd's.
type Units struct {
	conn  *dbus.Conn
	owner string // memlinuxd's own unit
	self  string // the path of this program

	mu      sync.Mutex
	changed map[dbus.ObjectPath]chan struct{} // of each service that runs: told when something of it changed
}

const (
	busName          = "org.freedesktop.systemd1"
	managerPath      = "/org/freedesktop/systemd1"
	managerInterface = "org.freedesktop.systemd1.Manager"
	unitInterface    = "org.freedesktop.systemd1.Unit"
	serviceInterface = "org.freedesktop.systemd1.Service"
	propsInterface   = "org.freedesktop.DBus.Properties"
)

// OwnUnits connects to systemd over the bus at address. It returns nil where
// this process is no service of systemd: then programs can only be children.
func OwnUnits(ctx context.Context, address string) (*Units, error) {
	// systemd sets it for each service (systemd.exec(5)); what a person starts
	// in a terminal has it at most from a user's own systemd.
	if os.Getenv("INVOCATION_ID") == "" || os.Geteuid() != 0 {
		return nil, nil
	}
	if _, err := os.Stat("/run/systemd/system"); err != nil { // sd_booted(3)
		return nil, nil
	}
	conn, err := busguard.Dial(address, 0, func(msg *dbus.Message, _ int, _ []int) {
		if msg.Type == dbus.TypeMethodCall {
			msg.Type = 0 // nobody has a reason to call
		}
	}, dbus.WithContext(context.WithoutCancel(ctx)))
	if err != nil {
		return nil, fmt.Errorf("connect to the bus of systemd: %w", err)
	}
	u := &Units{conn: conn, changed: map[dbus.ObjectPath]chan struct{}{}}
	if err := u.open(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("ask systemd for services for compilers and virtual machines: %w", err)
	}
	if u.owner == "" {
		conn.Close()
		return nil, nil
	}
	return u, nil
}

func (u *Units) open(ctx context.Context) error {
	var path dbus.ObjectPath
	if err := u.manager().CallWithContext(ctx, managerInterface+".GetUnitByPID", 0, uint32(os.Getpid())).Store(&path); err != nil {
		return err
	}
	var id dbus.Variant
	if err := u.conn.Object(busName, path).CallWithContext(ctx, propsInterface+".Get", 0, unitInterface, "Id").Store(&id); err != nil {
		return err
	}
	if name, _ := id.Value().(string); strings.HasSuffix(name, ".service") {
		u.owner = name
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// A package that was upgraded meanwhile has a new file there.
	u.self = strings.TrimSuffix(self, " (deleted)")
	if err := u.conn.AddMatchSignalContext(ctx, dbus.WithMatchSender(busName), dbus.WithMatchInterface(propsInterface),
		dbus.WithMatchMember("PropertiesChanged"), dbus.WithMatchPathNamespace(managerPath+"/unit")); err != nil {
		return err
	}
	signals := make(chan *dbus.Signal, 64)
	u.conn.Signal(signals)
	go u.listen(signals)
	return nil
}

// Close lets go of systemd. No program may run any more.
func (u *Units) Close() error { return u.conn.Close() }

func (u *Units) manager() dbus.BusObject { return u.conn.Object(busName, managerPath) }

// listen ends with the connection.
func (u *Units) listen(signals <-chan *dbus.Signal) {
	for s := range signals {
		u.mu.Lock()
		c := u.changed[s.Path]
		u.mu.Unlock()
		select {
		case c <- struct{}{}:
		default: // told already, or none of ours
		}
	}
}

// ExitError says how a program in a service ended that did not end well.
type ExitError struct {
	Unit   string
	Result string // systemd's word: "exit-code", "signal", "oom-kill", "timeout", …; "" where it does not know any more
	Status int    // the exit code, or the signal's number
}

// ExitCode is the program's exit code, or -1 where it did not exit, as
// [os.ProcessState.ExitCode] has it.
func (e *ExitError) ExitCode() int {
	if e.Result == "exit-code" {
		return e.Status
	}
	return -1
}

func (e *ExitError) Error() string {
	switch e.Result {
	case "exit-code":
		// systemd.exec(5), "Process Exit Codes": it could not make the service.
		if e.Status >= 200 && e.Status < 250 {
			return fmt.Sprintf("systemd could not start the service (%d/%s); journalctl -u %s says why", e.Status, exitNames[e.Status], e.Unit)
		}
		return fmt.Sprintf("exit status %d", e.Status)
	case "signal", "core-dump":
		return "signal: " + syscall.Signal(e.Status).String()
	case "oom-kill":
		return "it needed more memory than it may have, and was killed"
	case "timeout":
		return "it ran for longer than it may, and was killed"
	case "":
		return "nothing is known of its service " + e.Unit + " any more"
	}
	return fmt.Sprintf("its service %s failed: %s", e.Unit, e.Result)
}

// exitNames are the statuses of systemd itself that are met.
var exitNames = map[int]string{203: "EXEC", 208: "STDIN", 217: "USER", 218: "CAPABILITIES", 225: "NETWORK", 226: "NAMESPACE", 228: "SECCOMP"}

// serial tells this process's services apart.
var serial atomic.Int64

// Start starts cmd as a service, with its Path, Args, Env, Dir, Stdin, Stdout,
// Stderr and ExtraFiles; Stdin must be nil or an *os.File. When ctx ends, it and
// all that it started are killed. wait returns when nothing of it runs any more
// and all of its output was taken: nil if it ended well, ctx's error, an
// [*ExitError], or that of writing its output. It must be called, once.
func (u *Units) Start(ctx context.Context, cmd *exec.Cmd, unit Unit) (wait func() error, err error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	name := fmt.Sprintf("memlinux-%s-%d-%d.service", unit.Name, os.Getpid(), serial.Add(1))
	s, err := newStreams(cmd)
	if err != nil {
		return nil, err
	}
	complaint, socket, err := send(program{Path: cmd.Path, Argv: cmd.Args, Env: cmd.Env, Dir: cmd.Dir}, s.theirs)
	s.closeTheirs()
	if err != nil {
		s.close()
		return nil, err
	}
	defer complaint.Close()
	path := dbus.ObjectPath(managerPath + "/unit/" + systemddbus.PathBusEscape(name))
	changed := make(chan struct{}, 1)
	u.mu.Lock()
	u.changed[path] = changed
	u.mu.Unlock()
	forget := func() {
		u.mu.Lock()
		delete(u.changed, path)
		u.mu.Unlock()
	}
	properties := append(unit.confinement(), lifetime(u.owner)...)
	properties = append(properties,
		word("Description", "memlinux's "+unit.Name),
		property{"ExecStart", []execStart{{u.self, []string{programName}, false}}, ""},
		property{"StandardInputFileDescriptor", dbus.UnixFD(socket.Fd()), ""},
		word("StandardOutput", "null"))
	// Not given up when ctx ends: what was asked for must be ended, too.
	var job dbus.ObjectPath
	err = u.manager().Call(managerInterface+".StartTransientUnit", 0, name, "fail", onBus(properties), []aux{}).Store(&job)
	socket.Close() // its end is the end of what lies in it
	if err != nil {
		forget()
		s.close()
		return nil, fmt.Errorf("ask systemd for the service %s: %w", name, err)
	}
	r := &running{units: u, name: name, path: path, changed: changed, forget: forget, streams: s, ended: make(chan error, 1)}
	go r.watch(ctx)
	// It ends when the program begins, or when it can't.
	said, _ := io.ReadAll(io.LimitReader(complaint, 4096))
	if len(said) > 0 {
		_ = r.wait()
		return nil, errors.New(string(said))
	}
	return r.wait, nil
}

type execStart struct {
	Path          string
	Argv          []string
	IgnoreFailure bool
}

// aux is an auxiliary unit of StartTransientUnit, of which there are none.
type aux struct {
	Name       string
	Properties []dbusProperty
}

// running is a service.
type running struct {
	units   *Units
	name    string
	path    dbus.ObjectPath
	changed <-chan struct{}
	forget  func()
	streams *streams
	ended   chan error // gets one
}

func (r *running) wait() error {
	err := <-r.ended
	r.forget()
	// systemd forgets it now, and says so to nobody.
	_ = r.units.conn.Object(busName, r.path).Call(unitInterface+".Unref", 0).Err
	// Then it was for that that it was killed.
	if werr := r.streams.wait(); werr != nil {
		return werr
	}
	return err
}

// lookAgain is how often a service is looked at of which nothing is heard: a
// signal that the bus dropped must not make us wait for ever.
const lookAgain = 30 * time.Second

// watch waits until the service is gone, and ends it when ctx does or its output
// can't be taken.
func (r *running) watch(ctx context.Context) {
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	done, failed := ctx.Done(), r.streams.failed
	for {
		over, err := r.look()
		if over {
			if ctx.Err() != nil && err != nil {
				err = ctx.Err()
			}
			r.ended <- err
			return
		}
		select {
		case <-r.changed:
		case <-tick.C:
		case <-done:
			done = nil
			r.stop()
		case <-failed:
			failed = nil
			r.stop()
		case <-r.units.conn.Context().Done():
			r.ended <- errors.New("the bus of systemd went away")
			return
		}
	}
}

// stop has it killed; watch sees when it is. While memlinuxd itself is stopped, the
// job to stop it waits for that; but until there was a process, nothing but the
// job keeps it from starting.
func (r *running) stop() {
	_ = r.units.manager().Call(managerInterface+".KillUnit", 0, r.name, "all", int32(syscall.SIGKILL)).Err
	_ = r.units.manager().Call(managerInterface+".StopUnit", 0, r.name, "replace").Err
}

// look asks whether the service is over, and how it ended.
func (r *running) look() (over bool, err error) {
	object := r.units.conn.Object(busName, r.path)
	var unit, service map[string]dbus.Variant
	if object.Call(propsInterface+".GetAll", 0, unitInterface).Store(&unit) != nil {
		return true, &ExitError{Unit: r.name}
	}
	switch unit["ActiveState"].Value() {
	case "inactive", "failed":
	default:
		return false, nil
	}
	// A job that waits will start it yet; or it ran, and the job is to stop it.
	job, _ := unit["Job"].Value().([]any)
	began, _ := unit["InactiveExitTimestampMonotonic"].Value().(uint64)
	if len(job) == 2 && job[0] != uint32(0) && began == 0 {
		return false, nil
	}
	if unit["LoadState"].Value() != "loaded" || object.Call(propsInterface+".GetAll", 0, serviceInterface).Store(&service) != nil {
		return true, &ExitError{Unit: r.name}
	}
	result, _ := service["Result"].Value().(string)
	status, _ := service["ExecMainStatus"].Value().(int32)
	code, _ := service["ExecMainCode"].Value().(int32)
	if result == "success" {
		// The end by SIGTERM and the like is a good one to systemd.
		if code != cldKilled {
			return true, nil
		}
		result = "signal"
	}
	return true, &ExitError{Unit: r.name, Result: result, Status: int(status)}
}

// cldKilled is the code of a process that a signal ended (CLD_KILLED of
// waitid(2)).
const cldKilled = 2

// send lays into a socket, for the program at its other end, what it is to turn
// into. It returns that end, and where the program then says why it could not.
//
// That is no answer over the socket: systemd holds the service's standard input
// open as long as there is the service, so it would have no end.
func send(p program, files []*os.File) (complaint, socket *os.File, err error) {
	fail := func(err error) (*os.File, *os.File, error) { return nil, nil, fmt.Errorf("start %s: %w", p.Path, err) }
	if len(files)+2 > maxDescriptors {
		return fail(fmt.Errorf("%d open files are too many", len(files)))
	}
	text, err := json.Marshal(p)
	if err != nil {
		return fail(err)
	}
	// A file: a message has a limit that an argument list may exceed.
	fd, err := unix.MemfdCreate("program", unix.MFD_CLOEXEC)
	if err != nil {
		return fail(err)
	}
	spec := os.NewFile(uintptr(fd), "program")
	defer spec.Close()
	if _, err := spec.Write(text); err != nil {
		return fail(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	ours, socket := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer ours.Close()
	complaint, complaints, err := os.Pipe()
	if err != nil {
		socket.Close()
		return fail(err)
	}
	defer complaints.Close()
	var fds []int
	for _, f := range append([]*os.File{spec, complaints}, files...) {
		fds = append(fds, int(f.Fd()))
	}
	if err := unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fds...), nil, 0); err != nil {
		socket.Close()
		complaint.Close()
		return fail(err)
	}
	return complaint, socket, nil
}
