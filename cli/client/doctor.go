package client

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/busguard"
)

// Doctor asks the daemon what it needs of this machine, and how it is with it.
func (c *Client) Doctor(ctx context.Context) ([]api.Check, error) {
	var found []api.Properties
	if err := c.call(ctx, api.ManagerPath, api.ManagerInterface+".Doctor", []any{api.Properties{}}, &found); err != nil {
		return nil, err
	}
	checks := make([]api.Check, len(found))
	for i, p := range found {
		var err error
		if checks[i], err = api.CheckFrom(p); err != nil {
			return nil, err
		}
	}
	return checks, nil
}

// busLimit bounds how long the bus and polkit may take to answer.
const busLimit = 30 * time.Second

const (
	polkitName  = "org.freedesktop.PolicyKit1"
	reinstall   = "sudo apt install --reinstall memlinux"
	ourActions  = "org.memlinux." // begins the ids of our polkit actions
	polkitCheck = "polkit"
)

// CheckBus looks at the system bus as this process sees it: whether it answers,
// has memlinuxd, and a polkit that knows our actions.
func CheckBus(ctx context.Context) []api.Check {
	ctx, cancel := context.WithTimeout(ctx, busLimit)
	defer cancel()
	conn, err := busguard.Dial(busguard.SystemBus(), 0, func(msg *dbus.Message, _ int, _ []int) {
		if msg.Type != dbus.TypeMethodReply && msg.Type != dbus.TypeError {
			msg.Type = 0
		}
	})
	if err != nil {
		c := api.Check{Name: "system bus", State: api.CheckFailed, Text: "it can't be reached: " + err.Error(), Mend: "sudo apt install dbus, and start the machine again; or run the command as root, which then brings a bus of its own"}
		if os.Geteuid() == 0 {
			c.State, c.Text = api.CheckWarning, "there is none; root's commands bring a bus of their own"
			c.Mend = ""
			if _, err := exec.LookPath("dbus-daemon"); err != nil {
				c.State, c.Text, c.Mend = api.CheckFailed, "there is none, and no dbus-daemon for one of our own", "sudo apt install dbus-daemon"
			}
		}
		return []api.Check{c, {Name: polkitCheck, State: api.CheckUnknown, Text: "it is reached by the system bus"}}
	}
	defer conn.Close()
	return []api.Check{checkName(ctx, conn), checkPolkit(ctx, conn)}
}

// checkName tells whether the bus has memlinuxd, or can start it.
func checkName(ctx context.Context, conn *dbus.Conn) api.Check {
	c := api.Check{Name: "system bus", State: api.CheckOK, Text: "memlinuxd runs on it"}
	owned, activatable, err := names(ctx, conn)
	switch {
	case err != nil:
		c.State, c.Text = api.CheckFailed, "it does not tell its names: "+err.Error()
	case slices.Contains(owned, api.BusName):
	case slices.Contains(activatable, api.BusName):
		c.Text = "it starts memlinuxd when that is wanted"
	default:
		c.State, c.Text, c.Mend = api.CheckFailed, "it does not know memlinuxd", "install memlinux's package, or run the command as root"
		if os.Geteuid() == 0 {
			c.State, c.Text, c.Mend = api.CheckWarning, c.Text+"; root's commands bring a bus of their own", "install memlinux's package"
		}
	}
	return c
}

func names(ctx context.Context, conn *dbus.Conn) (owned, activatable []string, err error) {
	if err = conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.ListNames", 0).Store(&owned); err == nil {
		err = conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.ListActivatableNames", 0).Store(&activatable)
	}
	return owned, activatable, err
}

// checkPolkit tells whether polkit answers, knows our actions, and can ask for a
// password here.
func checkPolkit(ctx context.Context, conn *dbus.Conn) api.Check {
	c := api.Check{Name: polkitCheck, State: api.CheckOK, Text: "it answers, and knows memlinux's actions"}
	// org.freedesktop.PolicyKit1.Authority.EnumerateActions(locale) → a(ssssssuuua{ss}),
	// of which each begins with the action's id.
	call := conn.Object(polkitName, "/org/freedesktop/PolicyKit1/Authority").CallWithContext(ctx, polkitName+".Authority.EnumerateActions", 0, "C")
	if call.Err != nil {
		c.State, c.Text, c.Mend = api.CheckFailed, fmt.Sprintf("it does not answer, so nobody may do anything: %v", call.Err), "sudo apt install polkitd"
		return c
	}
	var actions [][]any
	if err := call.Store(&actions); err != nil {
		c.State, c.Text = api.CheckFailed, "its answer can't be understood: "+err.Error()
		return c
	}
	if !slices.ContainsFunc(actions, func(a []any) bool {
		id, _ := a[0].(string)
		return strings.HasPrefix(id, ourActions)
	}) {
		c.State, c.Text, c.Mend = api.CheckWarning, "it answers, and knows none of memlinux's actions", reinstall
	} else if _, err := exec.LookPath("pkttyagent"); err != nil && os.Geteuid() != 0 {
		c.State, c.Text, c.Mend = api.CheckWarning, "it answers, and has no way to ask for a password in a terminal: pkttyagent is missing", "sudo apt install polkitd"
	}
	return c
}
