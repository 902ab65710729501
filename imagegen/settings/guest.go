package settings

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/imagegen/initramfs"
)

const linkMode = fs.ModeSymlink | 0o777

// guestInit is the first program of a guest; the zero value is none.
type guestInit struct {
	path    string
	systemd bool
}

// findInit looks where inits are. One that is busybox's counts where its
// inittab could work: images of containers have such a link without anything
// for it to start.
func (t tree) findInit() guestInit {
	for _, p := range []string{"sbin/init", "usr/lib/systemd/systemd", "lib/systemd/systemd"} {
		e, ok := t.find(p)
		if !ok || !e.Mode.IsRegular() || e.Mode&0o111 == 0 {
			continue
		}
		switch path.Base(e.Path) {
		case "systemd":
			return guestInit{path: p, systemd: true}
		case "busybox":
			if !t.inittabWorks() {
				continue
			}
		}
		return guestInit{path: p}
	}
	return guestInit{}
}

// inittabWorks reports whether there is an inittab and what it starts first.
func (t tree) inittabWorks() bool {
	b, err := t.read("etc/inittab")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 4)
		if len(fields) < 4 || strings.HasPrefix(fields[0], "#") || fields[2] != "sysinit" {
			continue
		}
		program, _, _ := strings.Cut(strings.TrimSpace(fields[3]), " ")
		if strings.HasPrefix(program, "/") {
			if _, ok := t.find(program); !ok {
				return false
			}
		}
	}
	return true
}

// guestInit tells /init what to hand over to.
func (a *application) guestInit(context.Context) error {
	if a.init.path == "" {
		return nil
	}
	const why = "memlinux's own: how this root is started"
	if err := a.tree.put(text("etc/memlinux/init", 0o644, []byte("/"+a.init.path+"\n"), why)); err != nil {
		return err
	}
	if !a.init.systemd {
		return nil
	}
	if err := a.flag("ready-by-unit", why); err != nil {
		return err
	}
	unit, _ := files.ReadFile("units/ready.service") // it is compiled in
	if _, ok := a.tree.entries[initramfs.GuestInit]; ok {
		unit = []byte(strings.ReplaceAll(string(unit), "=/init\n", "=/"+initramfs.GuestInit+"\n"))
	}
	const units = "etc/systemd/system/"
	if err := a.tree.put(text(units+"memlinux-ready.service", 0o644, unit, why)); err != nil {
		return err
	}
	wants := initramfs.Entry{Path: units + "multi-user.target.wants/memlinux-ready.service", Mode: linkMode, Link: "../memlinux-ready.service", Why: why}
	if err := a.tree.put(wants); err != nil {
		return err
	}
	// Every start in memory would be the first, on which systemd asks for the
	// language, the time zone and more; an empty file is none (machine-id(5)).
	if id, err := a.tree.read("etc/machine-id"); err != nil || strings.TrimSpace(string(id)) == "uninitialized" {
		if err := a.tree.put(text("etc/machine-id", 0o444, nil, why)); err != nil {
			return err
		}
	}
	_, udev := a.tree.find("usr/lib/systemd/systemd-udevd")
	if !udev {
		_, udev = a.tree.find("lib/systemd/systemd-udevd")
	}
	if udev {
		return nil
	}
	getty, _ := files.ReadFile("units/serial-getty.service")
	return a.tree.put(text(units+"serial-getty@.service", 0o644, getty, why))
}

// shells are programs that a console has anyway.
var shells = []string{"sh", "ash", "bash", "dash", "fish", "ksh", "zsh"}

// isShell reports whether argv is a shell and nothing that it runs.
func isShell(argv []string) bool {
	flags := []string{"-", "-i", "-l", "-il", "-li", "--login"}
	return slices.Contains(shells, path.Base(argv[0])) && !slices.ContainsFunc(argv[1:], func(arg string) bool { return !slices.Contains(flags, arg) })
}

// defaultPath is a container's where its image names none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// command makes an image's command a service of busybox's init.
func (a *application) command(context.Context) error {
	if err := a.imageCommand(); err != nil {
		return err
	}
	if len(a.inittab) == 0 {
		return nil
	}
	return a.tree.put(text("etc/memlinux/inittab", 0o644, []byte(strings.Join(a.inittab, "\n")+"\n"), "services, as the recipe has them"))
}

func (a *application) imageCommand() error {
	if a.Guest == nil || len(a.Guest.Command.Argv) == 0 || isShell(a.Guest.Command.Argv) {
		return nil
	}
	c := a.Guest.Command
	if a.init.path != "" {
		if c.Argv[0] != "/"+a.init.path {
			a.warnings = append(a.warnings, fmt.Sprintf("the image's command (%s) is not started: its root has an init (/%s), which is", strings.Join(c.Argv, " "), a.init.path))
		}
		return nil
	}
	for _, word := range slices.Concat(c.Argv, c.Env, []string{c.Dir, c.User}) {
		if strings.ContainsRune(word, 0) {
			return fmt.Errorf("the image's command has a NUL in %q", word)
		}
	}
	script, err := a.tree.commandScript(c, "/"+a.busybox)
	if err != nil {
		return err
	}
	const why = "the image's command, with its environment"
	a.inittab = append(a.inittab, "::once:/"+scriptDir+"command")
	a.applets = append(a.applets, "env", "start-stop-daemon")
	return a.tree.put(text(scriptDir+"command", 0o755, []byte(script), why))
}

// commandScript starts c as a container would: in its folder, as its user, with
// its environment alone. Input is empty, since a shell reads the console.
func (t tree) commandScript(c Command, busybox string) (string, error) {
	env := slices.Clone(c.Env)
	search, home := "", false
	for _, v := range env {
		name, value, ok := strings.Cut(v, "=")
		if name == "" || !ok {
			return "", fmt.Errorf("the image has %q in its environment, which is no variable", v)
		}
		switch name {
		case "PATH":
			search = value
		case "HOME":
			home = true
		}
	}
	if search == "" {
		search = defaultPath
		env = append(env, "PATH="+search)
	}
	argv := slices.Clone(c.Argv)
	// busybox's shell prefers its applets to programs of their names.
	if !strings.Contains(argv[0], "/") {
		found := ""
		for dir := range strings.SplitSeq(search, ":") {
			if e, ok := t.find(path.Join(dir, argv[0])); ok && e.Mode.IsRegular() && e.Mode&0o111 != 0 {
				found = path.Join("/", dir, argv[0])
				break
			}
		}
		if found == "" {
			return "", fmt.Errorf("the image's command %s is not in its root (PATH is %s)", argv[0], search)
		}
		argv[0] = found
	}
	name := c.User
	if name == "" {
		name = "0"
	}
	u, err := t.user(name)
	if err != nil {
		return "", err
	}
	if !home {
		env = append(env, "HOME="+u.home)
	}
	dir := path.Join("/", c.Dir)
	run := []string{busybox}
	if u.uid != 0 || u.gid != 0 {
		if u.name == "" {
			// start-stop-daemon wants to know the user's groups.
			line := fmt.Sprintf("user%d:x:%d:%d::/:/bin/false", u.uid, u.uid, u.gid)
			if err := t.edit("etc/passwd", 0o644, "the user of the image's command", func(lines []string) []string { return append(lines, line) }); err != nil {
				return "", err
			}
		}
		// The pidfile, which is none, stands for: start it whoever else runs.
		run = []string{busybox, "start-stop-daemon", "-S", "-p", "/run/memlinux/none", "-c", fmt.Sprintf("%d:%d", u.uid, u.gid), "-x", busybox, "--"}
	}
	run = slices.Concat(run, []string{"sh", "-c", `cd "$0" && exec "$@"`, dir}, argv)
	return fmt.Sprintf(`#!%[1]s sh
# What the image's configuration has as its command.

%[1]s mkdir -p %[2]s
exec %[1]s env -i %[3]s \
    %[4]s </dev/null
`, busybox, quote(dir), quote(env...), quote(run...)), nil
}

// quote makes shell words of arbitrary ones.
func quote(words ...string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}
