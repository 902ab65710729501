package kernel

import (
	"slices"
	"strings"
)

// Finding is something that does not work with a kernel's configuration.
type Finding struct {
	Fatal  bool     // the system would not come up at all
	Breaks string   // what does not work, as a clause: "a USB keyboard does not work"
	Why    []string // each option that is missing, as a clause: "CONFIG_USB_HID is not set"
}

// String is a sentence without its full stop.
func (f Finding) String() string { return f.Breaks + ": " + strings.Join(f.Why, ", ") }

// modules are the options of drivers that do their work as well when /init
// loads them, and the module that each makes. Everything else must be built in.
var modules = map[string]string{
	"KEYBOARD_ATKBD": "atkbd", "SERIO_I8042": "i8042",
	"USB_HID": "usbhid", "HID_GENERIC": "hid_generic", "USB_XHCI_HCD": "xhci_hcd",
}

// feature is something that works only if all of the options are there; of
// options with a | between them one is enough.
type feature struct {
	breaks  string
	options []string
}

// fatal is what no system in memory starts without.
var fatal = []feature{
	{"the kernel is not an amd64 one", []string{"64BIT"}},
	{"the kernel does not load an initramfs, which is all of the system", []string{"BLK_DEV_INITRD"}},
	{"no program can run", []string{"BINFMT_ELF"}},
	{"/init is a script and can't run", []string{"BINFMT_SCRIPT"}},
	{"/init can't read the command line", []string{"PROC_FS"}},
	{"there is no console and no shell", []string{"TTY"}},
}

// useful is what a system in memory starts without, but lamely.
var useful = []feature{
	{"the kernel says nothing on any console", []string{"PRINTK"}},
	{"consoles and devices are not found", []string{"SYSFS"}},
	{"device nodes are made by mdev alone", []string{"DEVTMPFS"}},
	{"/tmp and /run can fill all of the memory", []string{"TMPFS"}},
	{"there are no pseudo-terminals (ssh, screen, script)", []string{"UNIX98_PTYS"}},
	{"there is nothing on the screen", []string{"VT", "VT_CONSOLE"}},
	{"the screen stays dark on a PC with BIOS", []string{"VGA_CONSOLE|FRAMEBUFFER_CONSOLE"}},
	{"the screen stays dark on a PC with UEFI", []string{"FRAMEBUFFER_CONSOLE", "FB_EFI|FB_SIMPLE|DRM_SIMPLEDRM"}},
	{"a PS/2 keyboard, as most laptops have, does not work", []string{"KEYBOARD_ATKBD", "SERIO_I8042"}},
	{"a USB keyboard does not work", []string{"USB_HID", "HID_GENERIC", "USB_XHCI_HCD"}},
	{"there is no serial console, on which verification listens", []string{"SERIAL_8250", "SERIAL_8250_CONSOLE"}},
	{"a PC with UEFI can't start the kernel", []string{"EFI", "EFI_STUB"}},
	{"poweroff does not switch the PC off", []string{"ACPI"}},
}

// decompressors says which option lets a kernel unpack which initramfs.
var decompressors = map[string]string{"zstd": "RD_ZSTD", "gzip": "RD_GZIP"}

// Compression is the best of "zstd", "gzip" and "none" that the kernel can
// unpack.
func (c Config) Compression() string {
	for _, name := range []string{"zstd", "gzip"} {
		if c.BuiltIn(decompressors[name]) {
			return name
		}
	}
	return "none"
}

// Check lists what does not work with c in a system whose initramfs is
// compressed by "zstd", "gzip" or "none" and holds the modules of which loadable
// reports true (their names have _ for -); nil is none. What is fatal comes first.
func (c Config) Check(compression string, loadable func(module string) bool) []Finding {
	var out []Finding
	add := func(isFatal bool, n feature) {
		if why := c.missing(n.options, loadable); why != nil {
			out = append(out, Finding{Fatal: isFatal, Breaks: n.breaks, Why: why})
		}
	}
	for _, n := range fatal {
		add(true, n)
	}
	if option, ok := decompressors[compression]; ok && c.BuiltIn("BLK_DEV_INITRD") {
		add(true, feature{"the kernel can't unpack an initramfs compressed by " + compression, []string{option}})
	}
	for _, n := range useful {
		add(false, n)
	}
	return out
}

// missing says of each of the options that is not there what it is instead.
func (c Config) missing(options []string, loadable func(string) bool) (why []string) {
	there := func(option string) bool {
		module := modules[option]
		return c.BuiltIn(option) || c[option] == "m" && module != "" && loadable != nil && loadable(module)
	}
	for _, alternatives := range options {
		names := strings.Split(alternatives, "|")
		if slices.ContainsFunc(names, there) {
			continue
		}
		for _, name := range names {
			state := "not set"
			if c[name] == "m" {
				state = "a module that is not in the initramfs"
				if modules[name] == "" {
					state = "a module, which comes too late"
				}
			}
			why = append(why, "CONFIG_"+name+" is "+state)
		}
	}
	return why
}
