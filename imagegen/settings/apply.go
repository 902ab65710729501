package settings

import (
	"context"
	"embed"
	"fmt"
	"strings"

	"github.com/memlinux/memlinux/imagegen/initramfs"
)

//go:embed scripts units
var files embed.FS

// scriptDir is where our scripts are in the tree.
const scriptDir = "usr/lib/memlinux/"

// Applied is a tree with settings.
type Applied struct {
	Tree     initramfs.Tree
	Words    string   // of the kernel's command line: consoles first
	Applets  []string // of busybox, needed besides initramfs.Applets
	Warnings []string // sentences without full stop
}

// Apply lays the settings over a tree: over that of initramfs.Base where Guest
// is nil, else over that of initramfs.Guest. Files of the settings take the
// place of those of initramfs.Base and of a guest's; that the recipe names
// another file for the same path of a system of busybox is an error. root is this machine's /, for its time zones;
// keymaps are always the machine's own. The error is a sentence; it holds a
// *sandbox.MissingError where a package must be installed.
func (s Settings) Apply(ctx context.Context, t initramfs.Tree, root string) (*Applied, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	a := application{Settings: s, tree: open(t, s.Guest != nil), busybox: initramfs.Busybox, root: root}
	if s.Guest != nil {
		a.busybox = initramfs.GuestBusybox
		a.applets = append(a.applets, "chroot", "id")
		a.init = a.tree.findInit()
	}
	for _, step := range []func(context.Context) error{
		a.hostname, a.keymap, a.timezone, a.password, a.services, a.guestInit, a.command,
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	merged, err := a.tree.merged()
	if err != nil {
		return nil, err
	}
	return &Applied{Tree: merged, Words: a.words(), Applets: a.applets, Warnings: a.warnings}, nil
}

// application is one run of Apply.
type application struct {
	Settings
	tree     tree
	busybox  string // its path in the tree
	root     string
	init     guestInit
	inittab  []string
	applets  []string
	warnings []string
}

// words are those of the kernel's command line.
func (a *application) words() string {
	consoles := a.Consoles
	if consoles == nil {
		consoles = StandardConsoles
	}
	var words []string
	for _, c := range consoles {
		words = append(words, "console="+c)
	}
	if _, ok := a.tree.entries[initramfs.GuestInit]; ok {
		words = append(words, "rdinit=/"+initramfs.GuestInit)
	}
	return strings.Join(words, " ")
}

// script puts one of our scripts into the tree.
func (a *application) script(name, why string) error {
	b, _ := files.ReadFile("scripts/" + name) // it is compiled in
	return a.tree.put(text(scriptDir+name, 0o755, initramfs.Script(b, a.busybox), why))
}

// flag puts an empty file for /init into the tree.
func (a *application) flag(name, why string) error {
	return a.tree.put(text("etc/memlinux/"+name, 0o644, nil, why))
}

func (a *application) hostname(context.Context) error {
	if a.Hostname == "" {
		return nil
	}
	const why = "the hostname, as the recipe has it"
	if err := a.tree.put(text("etc/hostname", 0o644, []byte(a.Hostname+"\n"), why)); err != nil {
		return err
	}
	if hosts, ok := a.tree.has("etc/hosts"); a.Guest != nil || ok && !isOurs(hosts) {
		// It may say more.
		return nil
	}
	names := a.Hostname
	if short, _, dotted := strings.Cut(a.Hostname, "."); dotted {
		names += " " + short
	}
	return a.tree.put(text("etc/hosts", 0o644, []byte("127.0.0.1 localhost "+names+"\n::1 localhost\n"), why))
}

func (a *application) keymap(ctx context.Context) error {
	if a.Keymap == "" {
		return nil
	}
	binary, err := compileKeymap(ctx, a.Keymap)
	if err != nil {
		return err
	}
	a.applets = append(a.applets, "loadkmap")
	return a.tree.put(text("etc/memlinux/keymap", 0o644, binary, "the keymap "+a.Keymap+", as the recipe has it"))
}

func (a *application) timezone(context.Context) error {
	if a.Timezone == "" {
		return nil
	}
	why := "the time zone " + a.Timezone + ", as the recipe has it"
	var zone initramfs.Entry
	if e, ok := a.tree.find(zoneinfo + "/" + a.Timezone); ok && e.Mode.IsRegular() {
		// A guest's own file is the one that its C library understands, and by the
		// link timedatectl knows the name.
		zone = initramfs.Entry{Path: "etc/localtime", Mode: linkMode, Link: "/" + zoneinfo + "/" + a.Timezone, Why: why}
	} else {
		b, err := readZone(a.root, a.Timezone)
		if err != nil {
			return err
		}
		zone = text("etc/localtime", 0o644, b, why)
	}
	if err := a.tree.put(zone); err != nil {
		return err
	}
	return a.tree.put(text("etc/timezone", 0o644, []byte(a.Timezone+"\n"), why))
}

func (a *application) password(context.Context) error {
	if a.RootPassword == nil {
		return nil
	}
	empty := *a.RootPassword == ""
	if empty && a.Guest == nil {
		// A shell without login asks for as much.
		return nil
	}
	if err := a.tree.setPassword(*a.RootPassword); err != nil {
		return err
	}
	if empty || a.init.path != "" {
		return nil
	}
	if login, ok := a.tree.find("bin/login"); a.Guest != nil && (!ok || login.Mode&0o111 == 0) && !plainHash.MatchString(*a.RootPassword) {
		return fmt.Errorf("this root has no login of its own, and busybox's can't check root's password: make its hash by openssl passwd -6")
	}
	a.applets = append(a.applets, "getty", "login")
	return a.flag("login", whyPassword)
}

// services makes the inittab of what busybox's init starts.
func (a *application) services(context.Context) error {
	if a.init.path != "" {
		if len(a.Services) > 0 {
			return fmt.Errorf("services are busybox's to start, and this root has an init of its own (/%s); leave them out and set them up in that root", a.init.path)
		}
		if len(a.DHCP) > 0 {
			return fmt.Errorf("dhcp is for systems that busybox starts, and this root has an init of its own (/%s); leave it out and set it up in that root", a.init.path)
		}
		return nil
	}
	for _, v := range a.Services {
		action, console := v.Action, v.Console
		if action == "" {
			action = "respawn"
		}
		if console == "tty0" {
			// As with the shells: tty0 is whichever screen is in front.
			console = "tty1"
		}
		a.inittab = append(a.inittab, console+"::"+action+":"+strings.TrimSpace(v.Command))
	}
	if len(a.DHCP) == 0 {
		return nil
	}
	const why = "addresses by DHCP, as the recipe has it"
	line := "::respawn:/" + scriptDir + "dhcp"
	if a.DHCP[0] != AllLinks {
		line += " " + strings.Join(a.DHCP, " ")
	}
	a.inittab = append(a.inittab, line)
	a.applets = append(a.applets, "ip", "mv", "rm", "udhcpc")
	if err := a.script("dhcp", why); err != nil {
		return err
	}
	return a.script("lease", why)
}
