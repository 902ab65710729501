// Package api is the D-Bus contract between memlinuxd and its clients: names,
// option keys, errors, introspection data and the report that a job ends with.
// Both sides import it, and a client imports nothing else of memlinux.
//
// All methods end in an options dictionary a{sv}; a key that a method does not
// know is an error ([ErrInvalidOption]), so that a typo never passes silently.
// The daemon opens no path that a client names: files come as descriptors (h),
// devices as object paths.
package api

import (
	"fmt"
	"strings"

	"github.com/godbus/dbus/v5"
)

// Names on the bus.
const (
	BusName = "org.memlinux.Memlinux1"

	ManagerPath = dbus.ObjectPath("/org/memlinux/Memlinux1")
	devicePath  = ManagerPath + "/devices/"
	jobPath     = ManagerPath + "/jobs/"
	entryPath   = ManagerPath + "/entries/"

	ManagerInterface = "org.memlinux.Memlinux1.Manager"
	JobInterface     = "org.memlinux.Memlinux1.Job"
	DeviceInterface  = "org.memlinux.Memlinux1.Device"
	EntryInterface   = "org.memlinux.Memlinux1.BootEntry"

	PropertiesInterface     = "org.freedesktop.DBus.Properties"
	ObjectManagerInterface  = "org.freedesktop.DBus.ObjectManager"
	IntrospectableInterface = "org.freedesktop.DBus.Introspectable"
	PeerInterface           = "org.freedesktop.DBus.Peer"
)

// Option keys. The D-Bus type of each value is in the comment. Descriptors never
// stand in arrays or structures of their own type (ah, a{sh}): godbus v5.2.4
// panics as it decodes them.
const (
	// What system to make. The recipe says it; an option that is given, too,
	// wins over the recipe's key of that name.
	OptRecipe           = "recipe"            // s: the text of a recipe file (daemon/api/recipe)
	OptKernel           = "kernel"            // s: auto, host, debian:PACKAGE, debian-source:VERSION, source:URL; h: an open kernel file
	OptKernelConfigs    = "kernel-configs"    // a{sv} of h: config-* files that lie beside the kernel file, by name
	OptKernelSource     = "kernel-source"     // h: a tar of a kernel's source, also compressed, instead of kernel
	OptKernelConfig     = "kernel-config"     // s: minimal or defconfig; h: an open .config
	OptKernelFragments  = "kernel-fragments"  // a{sv} of h: fragments of a configuration, by name; merged in the order of their names
	OptKernelSHA256     = "kernel-sha256"     // s: that the source must have, hex
	OptKernelKeyring    = "kernel-keyring"    // h: OpenPGP keys, one of which must have signed the source's plain tar
	OptKernelSignature  = "kernel-signature"  // h: the signature; without it, it is fetched from beside the URL
	OptModules          = "modules"           // as: sets of kernel modules, or names of modules; empty is the standard
	OptMicrocode        = "microcode"         // s: none, host or all
	OptBusybox          = "busybox"           // s: auto, host, debian, debian-source, source:URL; h: an open static busybox
	OptBusyboxSource    = "busybox-source"    // h: a tar of busybox's source, also compressed, instead of busybox
	OptBusyboxFragments = "busybox-fragments" // a{sv} of h: as kernel-fragments
	OptBusyboxSHA256    = "busybox-sha256"    // s: that the source must have, hex
	OptPayload          = "payload"           // h: a tar of the recipe's programs, files and overlays
	OptRootfs           = "rootfs"            // h: a tar of the whole root
	OptRootfsCommand    = "rootfs-command"    // as: what an image of a container runs
	OptRootfsEnv        = "rootfs-env"        // as: NAME=VALUE, with what
	OptRootfsDir        = "rootfs-dir"        // s: and where
	OptRootfsUser       = "rootfs-user"       // s: and as whom
	OptCompression      = "compression"       // s: auto, zstd, gzip or none
	OptAppend           = "append"            // s: more kernel command line
	OptRAM              = "ram"               // t: bytes of RAM of the machine that it is for; 0: not known
	OptSourceDateEpoch  = "source-date-epoch" // t: seconds since 1970, the time of every file in the result

	OptFiles    = "files"     // a{sv} of h: files that Build writes its results into, by the names below
	OptSize     = "size"      // t: bytes of the image that goes into a file; 0 is the least that fits
	OptBootTest = "boot-test" // b: boot what was written (true)

	OptImage  = "image"  // h: a disk image, also compressed, that Write puts on a device as it is: a regular file or a pipe, read once from where it stands
	OptSHA256 = "sha256" // s: that the image must have as it is given, hex
	// OptResume goes on with the write to the device that was interrupted; no option
	// that says what system to make goes with it.
	OptResume = "resume" // b

	OptSerial  = "serial"  // s: the device's, as a person typed it; lifts the soft reasons against writing it
	OptUnmount = "unmount" // aay: mount points of the device that a person agreed to have unmounted

	OptName    = "name"    // s: the title of a boot entry of this PC; an entry of ours with that title is replaced
	OptNext    = "next"    // b: the next boot takes the entry, once
	OptDefault = "default" // b: the entry boots by itself
	OptDryRun  = "dry-run" // b: only say what would change

	OptDevice   = "device"   // o: the disk a virtual machine boots
	OptFile     = "file"     // h: the disk image a virtual machine boots
	OptInitrd   = "initrd"   // h: the initramfs of a direct kernel boot
	OptData     = "data"     // h: a tar stream that becomes a data disc
	OptFirmware = "firmware" // s: bios or uefi
	OptMemory   = "memory"   // t: MiB of the virtual machine
)

// Names of the files that Build writes into, and of those on a stick.
const (
	FileKernel    = "vmlinuz"
	FileInitramfs = "initramfs.img"
	FileMenu      = "menu.lst"
	FileManifest  = "manifest.json"
)

// BuildFiles lists the names that Build takes in [OptFiles].
func BuildFiles() []string {
	return []string{FileKernel, FileInitramfs, FileMenu, FileManifest}
}

// Job states.
const (
	StateRunning   = "running"
	StateSucceeded = "succeeded"
	StateFailed    = "failed"
	StateCancelled = "cancelled"
)

// What a job's progress counts.
const (
	UnitBytes   = "bytes"
	UnitObjects = "objects" // files that were compiled
)

// Job kinds.
const (
	KindBuild    = "build"
	KindWrite    = "write"
	KindVerify   = "verify"
	KindVM       = "vm"
	KindInstall  = "install"
	KindRemove   = "remove"
	KindNext     = "next"
	KindRollback = "rollback"
	KindCapacity = "capacity"
)

// Keys of a job's Result.
const (
	ResultError  = "error"  // s: the name of the error that ended the job
	ResultReport = "report" // s: a [Report] as JSON
)

// States of a [Check].
const (
	CheckOK      = "ok"
	CheckWarning = "warning" // something that is not the main job can't be done, or takes longer
	CheckFailed  = "failed"  // no stick can be made and proven
	CheckUnknown = "unknown" // it could not be looked at
)

// DevicePath is the object of the block device with the given kernel name
// (sda). Every byte but a letter or digit becomes _ and two hex digits.
func DevicePath(name string) dbus.ObjectPath {
	var b strings.Builder
	for _, c := range []byte(name) {
		if isAlnum(c) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "_%02x", c)
		}
	}
	return devicePath + dbus.ObjectPath(b.String())
}

// DeviceName is the kernel name behind a path that [DevicePath] made, and
// whether the path is one.
func DeviceName(path dbus.ObjectPath) (string, bool) {
	s, ok := strings.CutPrefix(string(path), string(devicePath))
	if !ok || s == "" {
		return "", false
	}
	var name []byte
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case isAlnum(c):
			name = append(name, c)
		case c == '_' && i+2 < len(s):
			var v byte
			if _, err := fmt.Sscanf(s[i+1:i+3], "%02x", &v); err != nil {
				return "", false
			}
			name = append(name, v)
			i += 2
		default:
			return "", false
		}
	}
	// Only the one spelling that DevicePath gives is a name.
	return string(name), DevicePath(string(name)) == path
}

func isAlnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// EntryPath is the object of the boot entry of ours with the given id.
func EntryPath(id string) dbus.ObjectPath { return entryPath + dbus.ObjectPath(id) }

// EntryID is the id behind a path that [EntryPath] made, and whether it is one.
func EntryID(path dbus.ObjectPath) (string, bool) {
	id, ok := strings.CutPrefix(string(path), string(entryPath))
	return id, ok && id != "" && !strings.Contains(id, "/")
}

// JobPath is the object of the job with the given id.
func JobPath(id string) dbus.ObjectPath { return jobPath + dbus.ObjectPath(id) }

// JobID is the id behind a path that [JobPath] made, and whether it is one.
func JobID(path dbus.ObjectPath) (string, bool) {
	id, ok := strings.CutPrefix(string(path), string(jobPath))
	return id, ok && id != "" && !strings.Contains(id, "/")
}
