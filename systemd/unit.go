package systemd

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// Unit is what a program in a service of its own may do. The zero value runs as
// a user that exists only as long as it does, and may compute: it has no rights,
// no devices, no network, nothing that it could write but the descriptors it is
// given, and no memory that it could both write and execute.
type Unit struct {
	Name   string        // what it is, a word for people: "qemu" gives memlinux-qemu-1-2.service
	Memory int64         // bytes that it may use; 0 for as much as there is
	File   int64         // bytes that a file may have that it writes; 0 for as many as there is room for
	Time   time.Duration // after which it is killed; 0 for never

	// User is a user that exists already, by number, or 0 for one of its own.
	// What writes files that outlive it needs one that nobody else is tomorrow.
	User int
	// Folders are absolute paths of what it may write.
	Folders []string
	Network bool // it may reach other machines
	JIT     bool // it may execute what it wrote into memory
	KVM     bool // it may open /dev/kvm
	// GiveAway makes it root, with no more of root's rights than to find what is
	// in Folders and to say whose it is.
	GiveAway bool
}

const kvmDevice = "/dev/kvm"

// property is a setting of a unit as D-Bus wants it (org.freedesktop.systemd1(5),
// "Transient units") and as a unit file says it.
type property struct {
	name  string
	value any
	text  string // lines of the section [Service]; "" where a unit file has none
}

func yes(name string) property { return property{name, true, name + "=yes"} }

func word(name, value string) property { return property{name, value, name + "=" + value} }

func number(name string, n uint64) property {
	return property{name, n, name + "=" + strconv.FormatUint(n, 10)}
}

// noCapabilities is a set of capabilities with none in it.
func noCapabilities(name string) property { return property{name, uint64(0), name + "="} }

// allowed is a list of what is allowed, or with ~ of what is not.
func allowed(name string, allow bool, list ...string) property {
	text := strings.Join(list, " ")
	switch {
	case !allow:
		text = "~" + text
	case len(list) == 0:
		text = "none"
	}
	return property{name, allowList{allow, append([]string{}, list...)}, name + "=" + text}
}

// D-Bus types of properties.
type (
	allowList struct {
		Allow bool
		List  []string
	}
	deviceAllow struct{ Path, Access string }
	ipPrefix    struct {
		Family  int32
		Address []byte
		Length  uint32
	}
	bindPath struct {
		From, To string
		Optional bool
		Flags    uint64
	}
)

// everything is the flag of a bind mount that takes what is mounted below along
// (MS_REC).
const everything = unix.MS_REC

// confinement is all that keeps the program to what u says. It is the same table
// that StartTransientUnit gets and that systemd-analyze security judges.
func (u Unit) confinement() []property {
	p := []property{
		noCapabilities("AmbientCapabilities"),
		word("DevicePolicy", "closed"),
		word("KeyringMode", "private"),
		yes("LockPersonality"),
		yes("NoNewPrivileges"),
		yes("PrivateMounts"),
		yes("PrivateTmp"),
		word("ProcSubset", "pid"),
		yes("ProtectClock"),
		yes("ProtectControlGroups"),
		yes("ProtectHostname"),
		yes("ProtectKernelLogs"),
		yes("ProtectKernelModules"),
		yes("ProtectKernelTunables"),
		word("ProtectProc", "invisible"),
		word("ProtectSystem", "strict"),
		yes("RemoveIPC"),
		{"RestrictNamespaces", uint64(0), "RestrictNamespaces=yes"},
		yes("RestrictRealtime"),
		yes("RestrictSUIDSGID"),
		{"SystemCallArchitectures", []string{"native"}, "SystemCallArchitectures=native"},
		// Who wants to give up more of its rights may: QEMU does.
		allowed("SystemCallFilter", true, "@system-service", "seccomp"),
		// Some try what they can do without, such as a larger stack.
		{"SystemCallErrorNumber", int32(unix.EPERM), "SystemCallErrorNumber=EPERM"},
		{"UMask", uint32(0o077), "UMask=0077"},
		number("LimitCORE", 0),
		number("LimitNOFILE", 8192),
		number("TasksMax", 4096),
	}
	if messageQueues() {
		p = append(p, yes("PrivateIPC"))
	}
	if u.GiveAway {
		p = append(p, property{"CapabilityBoundingSet", uint64(1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_READ_SEARCH), "CapabilityBoundingSet=CAP_CHOWN CAP_DAC_READ_SEARCH"},
			allowed("SystemCallFilter", false, "@clock", "@module", "@raw-io", "@reboot", "@resources", "@setuid", "@swap"))
	} else {
		p = append(p, noCapabilities("CapabilityBoundingSet"), allowed("SystemCallFilter", false, "@privileged", "@resources"))
	}
	switch {
	case u.GiveAway:
	case u.User == 0:
		p = append(p, yes("DynamicUser"))
		if userNamespaces() {
			p = append(p, yes("PrivateUsers"))
		}
	default:
		// make gives each program that it starts the user that it has already
		// (posix_spawn(3), POSIX_SPAWN_RESETIDS), and takes no for an error.
		p = append(p, allowed("SystemCallFilter", true, "@setuid"))
		// Not PrivateUsers: root's files would be nobody's to it, and tar and apt
		// ask whose theirs are.
		p = append(p, word("User", strconv.Itoa(u.User)))
	}
	if u.KVM {
		// PrivateDevices has a /dev without it.
		p = append(p, property{"DeviceAllow", []deviceAllow{{kvmDevice, "rw"}}, "DeviceAllow=" + kvmDevice + " rw"})
		if group := groupOf(kvmDevice); group != "" {
			p = append(p, property{"SupplementaryGroups", []string{group}, "SupplementaryGroups=" + group})
		}
	} else {
		p = append(p, yes("PrivateDevices"))
	}
	if u.Network {
		// Unix sockets and netlink are how the C library finds addresses.
		p = append(p, allowed("RestrictAddressFamilies", true, "AF_UNIX", "AF_NETLINK", "AF_INET", "AF_INET6"))
	} else {
		p = append(p, yes("PrivateNetwork"), allowed("RestrictAddressFamilies", true, "AF_UNIX"),
			property{"IPAddressDeny", []ipPrefix{{unix.AF_INET, make([]byte, 4), 0}, {unix.AF_INET6, make([]byte, 16), 0}}, "IPAddressDeny=any"})
	}
	if !u.JIT {
		p = append(p, yes("MemoryDenyWriteExecute"))
	}
	if u.Memory > 0 {
		p = append(p, number("MemoryMax", uint64(u.Memory)))
	}
	if u.File > 0 {
		p = append(p, number("LimitFSIZE", uint64(u.File)))
	}
	if u.Time > 0 {
		p = append(p, property{"RuntimeMaxUSec", uint64(u.Time.Microseconds()), "RuntimeMaxSec=" + strconv.FormatInt(u.Time.Milliseconds(), 10) + "ms"})
	}
	if len(u.Folders) == 0 {
		p = append(p, word("ProtectHome", "yes"))
	} else {
		// They may lie there, and are brought in.
		p = append(p, word("ProtectHome", "tmpfs"))
	}
	for _, folder := range u.Folders {
		p = append(p, property{"BindPaths", []bindPath{{folder, folder, false, everything}}, "BindPaths=" + folder})
	}
	return p
}

// userNamespaces reports whether there can be any, which PrivateUsers insists on: a
// kernel may be made without (CONFIG_USER_NS), and some administrators allow none
// (namespaces(7), "The /proc/sys/user directory").
func userNamespaces() bool {
	_, err := os.Stat("/proc/self/ns/user")
	most, _ := os.ReadFile("/proc/sys/user/max_user_namespaces")
	return err == nil && strings.TrimSpace(string(most)) != "0"
}

// messageQueues reports whether the kernel has POSIX's, which PrivateIPC mounts
// (CONFIG_POSIX_MQUEUE).
func messageQueues() bool {
	kinds, err := os.ReadFile("/proc/filesystems")
	return err == nil && strings.Contains(string(kinds), "\tmqueue\n")
}

// groupOf is the number of the group that may read and write the file, or "".
func groupOf(path string) string {
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm()&0o060 != 0o060 {
		return ""
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || sys.Gid == 0 {
		return ""
	}
	return strconv.FormatUint(uint64(sys.Gid), 10)
}

// lifetime is what makes the service end, whole and at once, when memlinuxd's
// has, whose unit owner is, and be forgotten when it has ended and we know how.
func lifetime(owner string) []property {
	return []property{
		word("Type", "exec"),
		{"CollectMode", "inactive-or-failed", ""},
		{"AddRef", true, ""},
		{"BindsTo", []string{owner}, ""},
		// What is started first is stopped last: memlinuxd cancels its jobs itself
		// and is not told by their programs' deaths that it is to stop. It has started
		// already, so that this delays nothing.
		{"Before", []string{owner}, ""},
		{"KillSignal", int32(unix.SIGKILL), "KillSignal=SIGKILL"},
		{"TimeoutStopUSec", uint64(10e6), "TimeoutStopSec=10"},
	}
}

// dbusProperty is the argument of StartTransientUnit.
type dbusProperty struct {
	Name  string
	Value dbus.Variant
}

func onBus(properties []property) []dbusProperty {
	var list []dbusProperty
	for _, p := range properties {
		list = append(list, dbusProperty{p.name, dbus.MakeVariant(p.value)})
	}
	return list
}
