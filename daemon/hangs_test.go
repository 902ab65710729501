package daemon

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/godbus/dbus/v5"
	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
)

// hangs serves one file by FUSE that holds up who closes it, or asks what it is, if
// that is the process of that number.
type hangs struct {
	fuse.RawFileSystem
	pid     int
	waiting atomic.Int64
	release chan struct{}
}

func (h *hangs) hold(thread uint32) {
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", h.pid, thread)); err == nil {
		h.waiting.Add(1)
		<-h.release
	}
}

func (h *hangs) Flush(cancel <-chan struct{}, in *fuse.FlushIn) fuse.Status {
	h.hold(in.Pid)
	return h.RawFileSystem.Flush(cancel, in)
}

func (h *hangs) StatFs(cancel <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	h.hold(in.Pid)
	return h.RawFileSystem.StatFs(cancel, in, out)
}

type emptyFile struct{ fs.Inode }

func (*emptyFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

// newHangs returns an open descriptor of the file. What waits for it goes on at the
// end of the test.
func newHangs(t *testing.T, pid int) (h *hangs, fd int) {
	t.Helper()
	dir := t.TempDir()
	connection := need.FUSE(t)
	// The server closes its own.
	control, err := unix.FcntlInt(connection.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	connection.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("memlinux-test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", control)); err != nil {
		t.Fatalf("mount FUSE at %s: %v", dir, err)
	}
	root := &fs.Inode{}
	h = &hangs{pid: pid, release: make(chan struct{}), RawFileSystem: fs.NewNodeFS(root, &fs.Options{OnAdd: func(ctx context.Context) {
		root.AddChild("file", root.NewPersistentInode(ctx, &emptyFile{}, fs.StableAttr{Mode: fuse.S_IFREG}), false)
	}})}
	server, err := fuse.NewServer(h, fmt.Sprintf("/dev/fd/%d", control), &fuse.MountOptions{Logger: log.New(io.Discard, "", 0)})
	if err != nil {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		t.Fatalf("serve FUSE: %v", err)
	}
	go server.Serve()
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
		server.Wait()
	})
	fd, err = unix.Open(filepath.Join(dir, "file"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	t.Cleanup(func() { close(h.release) })
	return h, fd
}

// Whoever opens a file that they serve themselves may hold up for ever whoever
// closes it, who can't even be killed. That costs a thread each, of a bounded
// number, and nobody else an answer.
func TestFilesThatHoldUp(t *testing.T) {
	need.Root(t)
	address := startBus(t)
	startPolkit(t, address, fmt.Sprintf(rulesOfTests, "none"))
	p := startRaceDetector(t, address)
	root := dial(t, address)
	alive := func(after string) {
		t.Helper()
		if err := p.answers(root); err != nil {
			t.Fatalf("after %s: %v", after, err)
		}
	}
	alive("the start")
	before := p.descriptors()
	t.Run("hung", func(t *testing.T) {
		held, fd := newHangs(t, p.cmd.Process.Pid)
		nobody, games := dialHostile(t, address, "nobody"), dialHostile(t, address, "games") // games may do all

		ping := member(api.ManagerPath, api.PeerInterface+".Ping", "", 1)
		var signal bytes.Buffer
		if err := (&dbus.Message{Type: dbus.TypeSignal, Headers: ping}).EncodeTo(&signal, binary.LittleEndian); err != nil {
			t.Fatal(err)
		}
		for range 1000 {
			if err := nobody.sendRaw(signal.Bytes(), []int{fd}, nil); err != nil {
				t.Fatal(err)
			}
		}
		alive("signals")
		if n := held.waiting.Load(); n > 0 {
			t.Errorf("%d of the signals' descriptors were taken", n)
		}
		// It is said at once what it is, and the call counts until it is let go.
		verify := member(api.ManagerPath, api.ManagerInterface+".VerifyFile", "ha{sv}", 1)
		if msg := games.call(verify, []any{dbus.UnixFDIndex(0), map[string]dbus.Variant{}}, []int{fd}); errorOf(msg) != api.ErrInvalidOption {
			t.Errorf("a file that does not answer: %v", msg.Body)
		}
		alive("a file that does not answer")
		for range 1000 {
			if err := nobody.send(ping, nil, []int{fd}, nil); err != nil {
				t.Fatal(err)
			}
		}
		alive("calls")
		// Two for the file, one for each call of the connection, and as many as are
		// closed of those that were refused.
		if n := held.waiting.Load(); n < callsPerClient || n > 2+callsPerClient+256 {
			t.Errorf("%d threads wait", n)
		}
		if msg := games.call(member(api.ManagerPath, api.ManagerInterface+".Jobs", "a{sv}", 0), []any{map[string]dbus.Variant{}}, nil); errorOf(msg) != "" {
			t.Errorf("a call of another user: %v", msg.Body)
		}
	})
	p.settles(before)
	alive("the end")
}

// Arrays of descriptors, which godbus panics on, go to every connection that the
// daemon has, and leave nothing open.
func TestSignalsToEachConnection(t *testing.T) {
	need.Root(t)
	address := startBus(t)
	startPolkit(t, address, fmt.Sprintf(rulesOfTests, "none"))
	p := startRaceDetector(t, address)
	root := dial(t, address)
	before := p.descriptors()
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	var names []string
	if err := root.BusObject().Call(busName+".ListNames", 0).Store(&names); err != nil {
		t.Fatal(err)
	}
	h, sent := dialHostile(t, address, "nobody"), 0
	for _, name := range names {
		var pid uint32
		if root.BusObject().Call(busName+".GetConnectionUnixProcessID", 0, name).Store(&pid) != nil || int(pid) != p.cmd.Process.Pid || name[0] != ':' {
			continue
		}
		sent++
		headers := member(api.ManagerPath, api.ManagerInterface+".X", "aha{sh}", 2)
		headers[dbus.FieldDestination] = dbus.MakeVariant(name)
		var signal bytes.Buffer
		if err := (&dbus.Message{Type: dbus.TypeSignal, Headers: headers, Body: []any{[]dbus.UnixFDIndex{0, 1}, map[string]dbus.UnixFDIndex{"a": 0}}}).EncodeTo(&signal, binary.LittleEndian); err != nil {
			t.Fatal(err)
		}
		for range 300 {
			if err := h.sendRaw(signal.Bytes(), []int{null, null}, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	if sent != 2 {
		t.Errorf("the daemon has %d connections", sent)
	}
	if err := p.answers(root); err != nil {
		t.Fatal(err)
	}
	p.settles(before)
}
