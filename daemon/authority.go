package daemon

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/media/blockdev"
)

// Actions, as systemd/org.memlinux.memlinux1.policy describes them to polkit.
const (
	actionPrefix         = "org.memlinux.memlinux1."
	actionBuild          = actionPrefix + "build"
	actionWriteRemovable = actionPrefix + "write-removable"
	actionWriteFixed     = actionPrefix + "write-fixed"
	actionVerify         = actionPrefix + "verify"
	actionVerifyFixed    = actionPrefix + "verify-fixed"
	actionVM             = actionPrefix + "run-vm"
	actionEntry          = actionPrefix + "change-boot-menu"
	actionNext           = actionPrefix + "set-next-boot"
	actionCancelOwn      = actionPrefix + "cancel-own"
	actionCancelOthers   = actionPrefix + "cancel-others"
)

// Question is what an Authority decides on.
type Question struct {
	Sender      string            // the caller's unique name on the bus
	UID         uint32            // and its user
	Action      string            // a polkit action
	Details     map[string]string // what the prompt shows and rules can look at
	Interactive bool              // the caller lets somebody be asked
}

// Authority decides whether the caller may do it: nil is yes. An error that is
// no *api.Error is a denial that gives the reason. It returns when ctx ends.
type Authority func(ctx context.Context, bus *dbus.Conn, q Question) error

// RootOnly is the Authority of a private bus: everything is root's.
func RootOnly(_ context.Context, _ *dbus.Conn, q Question) error {
	if q.UID != 0 {
		return &api.Error{Name: api.ErrNotAuthorized, Message: "this is for root: run the command with sudo"}
	}
	return nil
}

// How long polkit may take: alone, and with a person who looks for a password.
const (
	polkitLimit = 25 * time.Second
	personLimit = 5 * time.Minute
)

const (
	polkitName      = "org.freedesktop.PolicyKit1"
	polkitPath      = dbus.ObjectPath("/org/freedesktop/PolicyKit1/Authority")
	polkitInterface = polkitName + ".Authority"
)

// interactionRequired is what a caller gets that might be allowed if somebody
// could be asked (D-Bus specification, "ALLOW_INTERACTIVE_AUTHORIZATION").
const interactionRequired = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"

// polkitSubject and polkitResult are polkit's Subject and AuthorizationResult
// (polkit reference manual, "The org.freedesktop.PolicyKit1.Authority Interface").
type polkitSubject struct {
	Kind    string
	Details map[string]dbus.Variant
}

type polkitResult struct {
	Authorized, Challenge bool
	Details               map[string]string
}

// checks numbers the checks that can be cancelled.
var checks atomic.Uint64

// Polkit is the Authority of the system bus. What polkit does not allow, for
// whatever reason, is denied; so it is where there is no polkit.
func Polkit(ctx context.Context, bus *dbus.Conn, q Question) error {
	limit, flags := polkitLimit, uint32(0)
	if q.Interactive {
		limit, flags = personLimit, 1 // AllowUserInteraction
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("polkit did not decide within %v", limit))
	defer cancel()
	id := "memlinuxd-" + strconv.FormatUint(checks.Add(1), 10)
	subject := polkitSubject{"system-bus-name", map[string]dbus.Variant{"name": dbus.MakeVariant(q.Sender)}}
	polkit := bus.Object(polkitName, polkitPath)
	var r polkitResult
	err := polkit.CallWithContext(ctx, polkitInterface+".CheckAuthorization", 0, subject, q.Action, q.Details, flags, id).Store(&r)
	switch {
	case ctx.Err() != nil:
		// Nobody waits for the answer any more: the prompt goes away.
		polkit.Go(polkitInterface+".CancelCheckAuthorization", dbus.FlagNoReplyExpected, nil, id)
		return denied("%v", context.Cause(ctx))
	case err != nil && unreachable(err):
		return denied("polkit can't be asked (%v); start it, or as root use --private", err)
	case err != nil:
		return denied("polkit gives no answer (%v); look at its log, or as root use --private", err)
	case r.Authorized:
		return nil
	case r.Challenge && !q.Interactive:
		return dbus.NewError(interactionRequired, []any{"this needs authentication, and the call does not allow to ask for it"})
	case r.Details["polkit.dismissed"] != "":
		return denied("the authentication was dismissed")
	case r.Challenge:
		return denied("this needs authentication, and no agent is there to ask for it; run it in a terminal, or with sudo")
	}
	if q.Interactive {
		return denied("polkit does not allow %s, or the authentication failed; ask who administers this machine for a rule, or use sudo", q.Action)
	}
	return denied("polkit does not allow %s; ask who administers this machine for a rule, or use sudo", q.Action)
}

func denied(format string, args ...any) error {
	return &api.Error{Name: api.ErrNotAuthorized, Message: "not authorized: " + fmt.Sprintf(format, args...)}
}

// unreachable says that there is no polkit to ask.
func unreachable(err error) bool {
	var bus dbus.Error
	if !errors.As(err, &bus) {
		return false
	}
	switch bus.Name {
	case busName + ".Error.ServiceUnknown", busName + ".Error.NameHasNoOwner", busName + ".Error.NoReply":
		return true
	}
	return strings.HasPrefix(bus.Name, busName+".Error.Spawn.")
}

// permission is what a caller must be allowed for a call: the action depends on
// the method and its object, never on options. The details are what this
// machine says, never what the caller does. Nil is what everybody may.
type permission func(*Server, *call) (action string, details map[string]string)

// toRead is the permission to look at what there is.
var toRead permission

func to(action string) permission {
	return func(*Server, *call) (string, map[string]string) { return action, nil }
}

// byDevice depends on the device that is the first argument. One that is not
// there counts as fixed: that it is missing is told to who may know more.
func byDevice(removable, fixed string) permission {
	return func(s *Server, c *call) (string, map[string]string) {
		path, _ := c.args[0].(dbus.ObjectPath)
		d, err := s.lookUp(c.ctx, path)
		if err != nil {
			return fixed, map[string]string{"drive": "a disk that is not there"}
		}
		return deviceAction(d, removable, fixed), deviceDetails(d)
	}
}

func deviceAction(d blockdev.Device, removable, fixed string) string {
	if d.Removable {
		return removable
	}
	return fixed
}

// stillOn fails where the call would need another permission for the device than it
// got: while somebody was asked, it became another one.
func (c *call) stillOn(d blockdev.Device, removable, fixed string) error {
	if deviceAction(d, removable, fixed) != c.action {
		return &api.Error{Name: api.ErrDeviceChanged, Message: d.Path + " is another disk than a moment ago; look again, and run the command again"}
	}
	return nil
}

// deviceDetails are for rules, and "drive" for the prompt.
func deviceDetails(d blockdev.Device) map[string]string {
	details := map[string]string{"device": shown(d.Path), "vendor": shown(d.Vendor), "model": shown(d.Model), "serial": shown(d.Serial)}
	var about []string
	if s := details["serial"]; s != "" {
		about = append(about, "serial "+s)
	}
	about = append(about, details["device"])
	drive := strings.TrimSpace(details["vendor"] + " " + details["model"])
	if drive == "" {
		drive = "the disk"
	}
	details["drive"] = drive + " (" + strings.Join(about, ", ") + ")"
	return details
}

// maxShown is how much of a name is shown, in characters: a disk says what it
// likes about itself.
const maxShown = 64

// shown is text that a disk gives, fit for a prompt.
func shown(s string) string {
	var b strings.Builder
	n := 0
	for _, r := range strings.TrimSpace(s) {
		if n++; n > maxShown {
			b.WriteRune('…')
			break
		}
		// A dollar could begin one of polkit's variables.
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar || r == '$' {
			r = '?'
		}
		b.WriteRune(r)
	}
	return b.String()
}

// byOwner depends on whose job it is.
func byOwner(own, others string) permission {
	return func(s *Server, c *call) (string, map[string]string) {
		id, _ := api.JobID(c.path)
		j, ok := s.jobs.Job(id)
		if !ok {
			return others, nil
		}
		job := j.Snapshot()
		details := map[string]string{"job": job.ID, "kind": job.Kind, "owner": strconv.FormatUint(uint64(job.Owner), 10)}
		if job.Owner == c.uid {
			return own, details
		}
		return others, details
	}
}

// authorize decides whether the call may be done. What can't be found out is
// denied.
func (s *Server) authorize(c *call, may permission) error {
	if may == nil {
		return nil
	}
	q := Question{Sender: c.client.name, UID: c.uid, Interactive: c.interactive}
	q.Action, q.Details = may(s, c)
	c.action = q.Action
	if q.Details == nil {
		q.Details = map[string]string{}
	}
	err := s.authority(c.ctx, s.aside, q)
	switch {
	case s.ctx.Err() != nil:
		return errStopping
	case c.ctx.Err() != nil:
		return denied("the caller is gone")
	}
	return err
}

// userOf finds out whose connection it is, which never changes.
func (s *Server) userOf(c *client) (uint32, error) {
	if c.name == "" {
		return 0, denied("the call has no sender")
	}
	c.asking.Lock()
	defer c.asking.Unlock()
	if c.uid != nil {
		return *c.uid, nil
	}
	ctx, cancel := context.WithTimeout(c.ctx, 10*time.Second)
	defer cancel()
	var uid uint32
	if err := s.aside.BusObject().CallWithContext(ctx, busName+".GetConnectionUnixUser", 0, c.name).Store(&uid); err != nil {
		return 0, denied("who is calling can't be found out: %v", err)
	}
	c.uid = &uid
	return uid, nil
}
