// Package settings turns what a recipe says of the system itself (its name,
// keymap, time zone, consoles, services, password, addresses) into files of the
// initramfs and words of the kernel's command line.
//
// It holds for both kinds of systems: busybox with files beside it, and a whole
// root tree of another make, called a guest. Whatever starts services there
// keeps doing so; a guest without any gets busybox's init.
//
// /init learns from these files in /etc/memlinux what to do; all but complete
// are optional.
//
//	complete       an empty file, the last of the archive: all of it was unpacked
//	filecaps       a program that gives files their capabilities
//	keymap         a binary keymap, as busybox's loadkmap reads it
//	inittab        lines for busybox's inittab: services
//	login          an empty file: consoles ask for a password
//	init           the path of the guest's init
//	ready-by-unit  an empty file: a unit of the guest's systemd says when it is ready
package settings

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Settings say how the system is to be. The zero value changes nothing.
type Settings struct {
	Hostname string
	// Keymap is a layout of XKB (/usr/share/X11/xkb/symbols), "de", or one with a
	// variant, "de(nodeadkeys)". It is for the screen's keyboard.
	Keymap   string
	Timezone string // a name in /usr/share/zoneinfo: Europe/Berlin
	// Consoles are what stands behind console= on the command line; the last one
	// is /dev/console. nil is StandardConsoles.
	Consoles []string
	// Services are started by busybox's init, thus not in a guest with an init.
	Services []Service
	// RootPassword is a hash as in shadow(5). "" is an empty password. nil changes
	// nothing: a system of busybox has a shell without login, a guest keeps what
	// its own shadow has.
	RootPassword *string
	// DHCP are the links that get their address by DHCP as they appear, AllLinks
	// alone for every wired Ethernet link. Like Services it is busybox's.
	DHCP  []string
	Guest *Guest // nil: a system of busybox
}

// AllLinks in Settings.DHCP stands for every wired Ethernet link.
const AllLinks = "*"

// StandardConsoles are the serial line and the screen. One without its hardware
// does not count.
var StandardConsoles = []string{"ttyS0,115200", "tty0"}

// Service is a line of busybox's inittab.
type Service struct {
	// Command is split at spaces, or given to /bin/sh where it has characters that
	// mean something there.
	Command string
	// Action is one of Actions; "" is respawn. What sysinit and wait start must
	// end before the system is ready.
	Action  string
	Console string // a terminal's name in /dev, which then has no shell where the action stays on it; "" is /dev/console
}

// Actions are those of busybox's init.
var Actions = []string{"sysinit", "wait", "once", "respawn", "askfirst", "shutdown", "restart", "ctrlaltdel"}

// Guest is what is known of a root tree besides its files.
type Guest struct {
	// Command is what a container's image starts; the zero value is nothing. A
	// shell alone is nothing, too: each console has one.
	Command Command
}

// Command is a program as an OCI image's configuration has it
// (image-spec, config.md: Entrypoint and Cmd, Env, WorkingDir, User).
type Command struct {
	Argv []string
	Env  []string // "NAME=value"
	Dir  string   // "" is /
	User string   // name or number, optionally a colon and a group's; "" is root
}

var (
	hostLabel = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?$`)
	keymap    = regexp.MustCompile(`^([a-z][a-z0-9_]*)(?:\(([A-Za-z0-9_.+-]+)\))?$`)
	timezone  = regexp.MustCompile(`^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,3}$`)
	console   = regexp.MustCompile(`^([A-Za-z][A-Za-z0-9]*)(,[A-Za-z0-9]+)?$`)
	terminal  = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]*$`)
	link      = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]*$`)
	// Those of crypt(5) that busybox's own crypt knows.
	plainHash = regexp.MustCompile(`^\$[156]\$(rounds=[0-9]+\$)?[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]+$`)
	anyHash   = regexp.MustCompile(`^\$[0-9a-z]+\$[^\s:!*]+$`)
)

// Limits of Linux and of busybox's init.
const (
	maxHostname = 64  // HOST_NAME_MAX
	maxLabel    = 63  // RFC 1123
	maxLink     = 15  // IFNAMSIZ - 1
	maxCommand  = 240 // what init has room for, with the exec that it puts before
)

// Validate checks all that can be known without the tree and without this
// machine's files. The error is a sentence about the first thing that can't be.
func (s Settings) Validate() error {
	for _, check := range []func() error{s.validateHostname, s.validateNames, s.validateConsoles, s.validateServices, s.validatePassword, s.validateDHCP} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (s Settings) validateHostname() error {
	if s.Hostname == "" {
		return nil
	}
	if len(s.Hostname) > maxHostname {
		return fmt.Errorf("the hostname %s has %d characters, and Linux takes %d", s.Hostname, len(s.Hostname), maxHostname)
	}
	for label := range strings.SplitSeq(s.Hostname, ".") {
		if len(label) > maxLabel || !hostLabel.MatchString(label) {
			return fmt.Errorf("%q is no hostname: between its dots are letters, digits and hyphens, with no hyphen first or last", s.Hostname)
		}
	}
	return nil
}

func (s Settings) validateNames() error {
	if s.Keymap != "" && !keymap.MatchString(s.Keymap) {
		return fmt.Errorf(`%q is no keymap; give a layout such as de, or one with a variant such as "de(nodeadkeys)"`, s.Keymap)
	}
	if s.Timezone != "" && !timezone.MatchString(s.Timezone) {
		return fmt.Errorf("%q is no time zone; give a name such as Europe/Berlin", s.Timezone)
	}
	return nil
}

func (s Settings) validateConsoles() error {
	if s.Consoles != nil && len(s.Consoles) == 0 {
		return errors.New("the list of consoles is empty, and the system would have nowhere to speak; leave it out for " + strings.Join(StandardConsoles, " and "))
	}
	seen := map[string]bool{}
	for _, c := range s.Consoles {
		parts := console.FindStringSubmatch(c)
		if parts == nil {
			return fmt.Errorf("%q is no console; give tty0, ttyS0,115200, hvc0 and the like", c)
		}
		if seen[parts[1]] {
			return fmt.Errorf("the console %s is there twice", parts[1])
		}
		seen[parts[1]] = true
	}
	return nil
}

func (s Settings) validateServices() error {
	for _, v := range s.Services {
		command := strings.TrimSpace(v.Command)
		switch {
		case command == "":
			return errors.New("a service has no command")
		case strings.ContainsFunc(v.Command, func(r rune) bool { return r < ' ' || r == 0x7f }):
			return fmt.Errorf("the command of the service %q has a line break or another control character; put it into a script of yours", v.Command)
		case strings.Contains(v.Command, "#"):
			return fmt.Errorf("the command of the service %q has a #, where busybox's inittab ends a line; put it into a script of yours", v.Command)
		case len(command) > maxCommand:
			return fmt.Errorf("the command of the service %.40q… has %d bytes, and busybox's init takes %d; put it into a script of yours", v.Command, len(command), maxCommand)
		case v.Action != "" && !slices.Contains(Actions, v.Action):
			return fmt.Errorf("the service %q has the action %q; use %s", v.Command, v.Action, strings.Join(Actions, ", "))
		case v.Console != "" && !terminal.MatchString(v.Console):
			return fmt.Errorf("the service %q has the console %q; give a terminal's name in /dev, such as tty1", v.Command, v.Console)
		}
	}
	return nil
}

func (s Settings) validatePassword() error {
	if s.RootPassword == nil || *s.RootPassword == "" {
		return nil
	}
	if s.Guest == nil && !plainHash.MatchString(*s.RootPassword) || !anyHash.MatchString(*s.RootPassword) {
		// The value may be the password itself: it is not repeated.
		return errors.New("root's password must be a hash that the system can check; make one by: openssl passwd -6")
	}
	return nil
}

func (s Settings) validateDHCP() error {
	for _, name := range s.DHCP {
		if name == AllLinks && len(s.DHCP) == 1 {
			continue
		}
		if len(name) > maxLink || !link.MatchString(name) {
			return fmt.Errorf("%q is no network link for dhcp; give names such as eth0", name)
		}
	}
	return nil
}
