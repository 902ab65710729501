package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
)

// memlinuxd is the daemon's program.
const memlinuxd = "bin/memlinuxd"

// service measures what the daemon costs as a service: the time from a call to
// its answer where the bus has to start it, its memory when it has nothing to
// do, and what could be done by who has taken it over, beside the like.
func (b bench) service() error {
	fmt.Printf("\nthe service\n")
	started, err := b.activate()
	if err != nil {
		return err
	}
	figure("from a call to its answer, started by the bus, ms", "%6.0f", median(started).Seconds()*1000, 100)
	if err := b.idle(); err != nil {
		return err
	}
	return b.exposure()
}

// busOfOurOwn is a system bus of our own that starts memlinuxd for who calls it: it knows
// no policy but that all may all.
const busOfOurOwn = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path=%[1]s/bus</listen><auth>EXTERNAL</auth><servicedir>%[1]s</servicedir>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>
`

// activate takes the time of the first call again and again.
func (b bench) activate() ([]time.Duration, error) {
	program, err := filepath.Abs(memlinuxd)
	if err != nil {
		return nil, err
	}
	for name, text := range map[string]string{
		"bus.conf":                       fmt.Sprintf(busOfOurOwn, b.dir),
		"org.memlinux.Memlinux1.service": "[D-BUS Service]\nName=" + api.BusName + "\nExec=" + program + "\n",
	} {
		if err := os.WriteFile(b.path(name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	daemon := exec.Command("dbus-daemon", "--config-file="+b.path("bus.conf"), "--nofork", "--nopidfile", "--nosyslog", "--print-address")
	daemon.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+b.path("bus"), "MEMLINUX_STATE_DIR="+b.path("state"), "MEMLINUX_CACHE_DIR="+b.path("cache"))
	out, err := daemon.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := daemon.Start(); err != nil {
		return nil, err
	}
	defer func() { _ = daemon.Process.Kill(); _ = daemon.Wait() }()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return nil, fmt.Errorf("dbus-daemon: %w", err)
	}
	var took []time.Duration
	for range rounds {
		conn, err := dbus.Connect("unix:path=" + b.path("bus"))
		if err != nil {
			return nil, err
		}
		begin := time.Now()
		_, err = conn.Object(api.BusName, api.ManagerPath).GetProperty(api.ManagerInterface + ".Version")
		took = append(took, time.Since(begin))
		if err == nil {
			err = endOwner(conn)
		}
		conn.Close()
		if err != nil {
			return nil, err
		}
	}
	return took, nil
}

// endOwner ends the memlinuxd on the bus, and waits for that.
func endOwner(conn *dbus.Conn) error {
	var pid uint32
	if err := conn.BusObject().Call("org.freedesktop.DBus.GetConnectionUnixProcessID", 0, api.BusName).Store(&pid); err != nil {
		return err
	}
	process, err := os.FindProcess(int(pid))
	if err != nil {
		return err
	}
	if err := process.Signal(os.Interrupt); err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		var there bool
		if err := conn.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, api.BusName).Store(&there); err != nil || !there {
			return err
		}
	}
	return errors.New("memlinuxd does not end")
}

// idle looks at the memory of a daemon that has just started, and of one that
// has listed the disks and made a system.
func (b bench) idle() error {
	cmd := exec.Command(memlinuxd, "--private")
	cmd.Env = append(os.Environ(), "MEMLINUX_STATE_DIR="+b.path("state"), "MEMLINUX_CACHE_DIR="+b.cache)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { in.Close(); _ = cmd.Wait() }()
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return err
	}
	conn, err := dbus.Connect(strings.TrimSpace(address))
	if err != nil {
		return err
	}
	defer conn.Close()
	pid := cmd.Process.Pid
	show := func(when string) error {
		// What was freed last goes back to the kernel a moment later.
		time.Sleep(time.Second)
		use, err := inUse(pid)
		if err == nil {
			figure("idle memory "+when+", MiB (PSS)", "%6.1f", mib(use), 20)
		}
		return err
	}
	if err := show("after the start"); err != nil {
		return err
	}
	manager := conn.Object(api.BusName, api.ManagerPath)
	signals := make(chan *dbus.Signal, 1000)
	conn.Signal(signals)
	if err := conn.AddMatchSignal(dbus.WithMatchInterface(api.JobInterface), dbus.WithMatchMember("Completed")); err != nil {
		return err
	}
	if err := manager.Call(api.ManagerInterface+".Devices", 0, map[string]dbus.Variant{}).Err; err != nil {
		return err
	}
	if err := manager.Call(api.ManagerInterface+".Build", 0, map[string]dbus.Variant{}).Err; err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	for {
		select {
		case s := <-signals:
			if s.Name != api.JobInterface+".Completed" {
				continue
			}
			if s.Body[0] != true {
				return fmt.Errorf("the build failed: %v", s.Body[1])
			}
			return show("after a build")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// inUse is a process's memory, what it shares divided by those that share it
// (Linux, Documentation/filesystems/proc.rst, smaps_rollup), in bytes.
func inUse(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, found := strings.CutPrefix(line, "Pss:"); found {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("the kernel does not tell how much memory a process uses")
}

// likeServices are services of Debian that do as root what users ask for by the
// bus, by their packages.
var likeServices = map[string]string{"udisks2.service": "udisks2", "fwupd.service": "fwupd", "rauc.service": "rauc-service"}

// exposure has systemd judge the unit beside those of likeServices, as their
// packages have them.
func (b bench) exposure() error {
	text, err := os.ReadFile("systemd/memlinuxd.service")
	if err != nil {
		return err
	}
	units := []string{b.path("memlinuxd.service")}
	if err := os.WriteFile(units[0], []byte(strings.ReplaceAll(string(text), "@libexecdir@", "/usr/libexec")), 0o600); err != nil {
		return err
	}
	for unit, pkg := range likeServices {
		download := exec.Command("apt-get", "download", "-qq", pkg)
		download.Dir = b.dir
		if out, err := download.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get download %s: %w: %s", pkg, err, out)
		}
		deb, err := filepath.Glob(b.path(pkg + "_*.deb"))
		if err != nil || len(deb) != 1 {
			return fmt.Errorf("apt-get left %q", deb)
		}
		if out, err := exec.Command("dpkg-deb", "-x", deb[0], b.path(pkg)).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w: %s", pkg, err, out)
		}
		units = append(units, b.path(pkg+"/lib/systemd/system/"+unit))
	}
	slices.Sort(units[1:])
	fmt.Printf("\nhow exposed systemd finds the service, from 0 (safe) to 10 (systemd-analyze security --offline=true)\n")
	level := regexp.MustCompile(`exposure level for (\S+): (\S+)`)
	for i, unit := range units {
		out, err := exec.Command("systemd-analyze", "security", "--no-pager", "--offline=true", unit).CombinedOutput()
		found := level.FindSubmatch(out)
		if found == nil {
			return fmt.Errorf("systemd-analyze %s: %w: %s", unit, err, out)
		}
		value, err := strconv.ParseFloat(string(found[2]), 64)
		if err != nil {
			return err
		}
		if i == 0 {
			figure(string(found[1]), "%6.1f", value, 2)
		} else {
			fmt.Printf("  %-44s %6.1f\n", found[1], value)
		}
	}
	return nil
}
