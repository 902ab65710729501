package daemon

import (
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/daemon/privatebus"
	"github.com/memlinux/memlinux/systemd"
	"github.com/memlinux/memlinux/testvm/need"
)

func TestIdle(t *testing.T) {
	const never, soon = -1, time.Hour
	for name, c := range map[string]struct {
		period time.Duration
		happen func(*life)
		want   time.Duration // never, 0, or soon for some of the period
	}{
		"started a moment ago":             {time.Hour, func(*life) {}, soon},
		"long enough":                      {time.Nanosecond, func(*life) {}, 0},
		"never wanted":                     {0, func(*life) {}, never},
		"a call is not answered":           {time.Nanosecond, func(l *life) { l.arrive("a") }, never},
		"answered, but the client stays":   {time.Nanosecond, func(l *life) { l.arrive("a"); l.answered("a") }, never},
		"answered, and the client is gone": {time.Nanosecond, func(l *life) { l.arrive("a"); l.answered("a"); l.gone("a") }, 0},
		"gone before the answer":           {time.Nanosecond, func(l *life) { l.arrive("a"); l.gone("a") }, never},
		"another client goes":              {time.Nanosecond, func(l *life) { l.arrive("a"); l.answered("a"); l.gone("b") }, never},
		"our own call":                     {time.Nanosecond, func(l *life) { l.is("us"); l.arrive("us") }, 0},
		"a job runs":                       {time.Nanosecond, func(l *life) { l.begin() }, never},
		"a job has ended":                  {time.Nanosecond, func(l *life) { l.begin(); l.end() }, 0},
		"replaced, though a client stays":  {0, func(l *life) { l.arrive("a"); l.answered("a"); l.hasten() }, 0},
		"replaced, but a job runs":         {time.Nanosecond, func(l *life) { l.begin(); l.hasten() }, never},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLife()
			c.happen(l)
			wait, ok := l.idle(c.period)
			switch {
			case c.want == never && ok, c.want != never && !ok, c.want == 0 && wait != 0, c.want == soon && (wait <= 0 || wait > c.period):
				t.Errorf("it waits %v, %v; want %v", wait, ok, c.want)
			}
		})
	}
}

// A call that comes when the daemon has begun to leave is answered, and the job
// that it may have begun is waited for.
func TestCallWhileLeaving(t *testing.T) {
	need.Root(t)
	need.Tool(t, "dbus-daemon", "dbus-daemon")
	runtime.LockOSThread() // the bus lives as long as the thread that started it
	bus, err := privatebus.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer bus.Stop()
	client, err := dbus.Connect(bus.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()

	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", socket.LocalAddr().String())
	var told []string
	listened := make(chan struct{})
	go func() {
		defer close(listened)
		buf, oob := make([]byte, 4096), make([]byte, 1024)
		for {
			n, oobn, _, _, err := socket.ReadMsgUnix(buf, oob)
			if err != nil {
				return
			}
			said := string(buf[:n])
			if told = append(told, said); said == "BARRIER=1" {
				// It waits for us: the call is in its queue when it goes on.
				if err := invoke(client, api.ManagerPath, api.ManagerInterface+".Jobs", map[string]dbus.Variant{}).Err; err != nil {
					t.Errorf("the call: %v", err)
				}
				if owner := nameOwner(client); owner == "" {
					t.Error("the name was given up before systemd knew")
				}
			}
			if strings.HasPrefix(said, "EXTEND_TIMEOUT_USEC=") && nameOwner(client) == "" {
				t.Error("the name was not taken back")
			}
			messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
			for _, m := range messages {
				fds, _ := unix.ParseUnixRights(&m)
				for _, fd := range fds {
					unix.Close(fd)
				}
			}
		}
	}()

	c := config.Config{CacheDir: t.TempDir(), StateDir: t.TempDir(), Kernel: "auto", Memory: 512, JobRetention: time.Minute, IdleExit: time.Nanosecond}
	if err := Serve(t.Context(), bus.Address, RootOnly, c, "test", systemd.NotifyReady, AsService(func() (config.Config, error) { return c, nil }, nil)); err != nil {
		t.Errorf("Serve: %v", err)
	}
	socket.Close()
	<-listened
	if want := []string{"READY=1", "STOPPING=1", "BARRIER=1", "EXTEND_TIMEOUT_USEC=60000000"}; len(told) < len(want) || !slices.Equal(told[:len(want)], want) {
		t.Errorf("systemd was told %q, want %q and perhaps more", told, want)
	}
}

func nameOwner(conn *dbus.Conn) (owner string) {
	_ = conn.BusObject().Call("org.freedesktop.DBus.GetNameOwner", 0, api.BusName).Store(&owner) // an error is that there is none
	return owner
}
