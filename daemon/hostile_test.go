package daemon

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/busguard"
	"github.com/memlinux/memlinux/testvm/need"
)

// What the hostile clients may make the daemon take. It is built with the race
// detector, which takes five to ten times the memory.
const (
	maxPeakKiB  = 400 << 10
	maxMoreFDs  = 8
	floodCalls  = 10000
	crowd       = 200
	crowdsCalls = 10
)

// hostile is a client that sends what it likes.
type hostile struct {
	t      *testing.T
	conn   *net.UnixConn
	mu     sync.Mutex
	serial uint32
	wait   map[uint32]chan *dbus.Message
}

func dialHostile(t *testing.T, address, name string) *hostile {
	t.Helper()
	uid := uidOf(t, name)
	h := &hostile{t: t, wait: map[uint32]chan *dbus.Message{}}
	path, _ := strings.CutPrefix(address, "unix:path=")
	var err error
	asUser(t, uid, func() { h.conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path}) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.conn.Close() })
	in := bufio.NewReader(h.conn)
	for _, line := range []struct{ say, want string }{
		{"\x00AUTH EXTERNAL " + hex.EncodeToString([]byte(strconv.Itoa(uid))) + "\r\n", "OK"},
		{"NEGOTIATE_UNIX_FD\r\n", "AGREE"},
	} {
		if _, err := io.WriteString(h.conn, line.say); err != nil {
			t.Fatal(err)
		}
		if answer, err := in.ReadString('\n'); err != nil || !strings.HasPrefix(answer, line.want) {
			t.Fatalf("%q: %v", answer, err)
		}
	}
	if _, err := io.WriteString(h.conn, "BEGIN\r\n"); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			msg, err := dbus.DecodeMessage(in)
			if err != nil {
				return
			}
			serial, _ := msg.Headers[dbus.FieldReplySerial].Value().(uint32)
			h.mu.Lock()
			to := h.wait[serial]
			delete(h.wait, serial)
			h.mu.Unlock()
			if to != nil {
				to <- msg
			}
		}
	}()
	hello := dbus.MakeVariant(busName)
	if msg := h.call(map[dbus.HeaderField]dbus.Variant{dbus.FieldDestination: hello, dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath("/org/freedesktop/DBus")),
		dbus.FieldInterface: hello, dbus.FieldMember: dbus.MakeVariant("Hello")}, nil, nil); msg.Type != dbus.TypeMethodReply {
		t.Fatalf("Hello: %v", msg)
	}
	return h
}

// send sends a call with its headers as they are, and descriptors.
func (h *hostile) send(headers map[dbus.HeaderField]dbus.Variant, body []any, files []int, to chan *dbus.Message) error {
	var raw bytes.Buffer
	if err := (&dbus.Message{Type: dbus.TypeMethodCall, Headers: headers, Body: body}).EncodeTo(&raw, binary.LittleEndian); err != nil {
		return err
	}
	return h.sendRaw(raw.Bytes(), files, to)
}

func (h *hostile) sendRaw(message []byte, files []int, to chan *dbus.Message) error {
	h.mu.Lock()
	h.serial++
	binary.LittleEndian.PutUint32(message[8:], h.serial)
	if to != nil {
		h.wait[h.serial] = to
	}
	h.mu.Unlock()
	var oob []byte
	if len(files) > 0 {
		oob = unix.UnixRights(files...)
	}
	n, _, err := h.conn.WriteMsgUnix(message, oob, nil)
	if err == nil && n < len(message) {
		_, err = h.conn.Write(message[n:])
	}
	return err
}

// call sends a call and waits for the answer.
func (h *hostile) call(headers map[dbus.HeaderField]dbus.Variant, body []any, files []int) *dbus.Message {
	h.t.Helper()
	to := make(chan *dbus.Message, 1)
	if err := h.send(headers, body, files, to); err != nil {
		h.t.Fatal(err)
	}
	select {
	case msg := <-to:
		return msg
	case <-time.After(time.Minute):
		h.t.Fatalf("no answer to %v", headers)
		return nil
	}
}

// member is the headers of a call of a method of ours.
func member(path dbus.ObjectPath, method, signature string, files int) map[dbus.HeaderField]dbus.Variant {
	dot := strings.LastIndex(method, ".")
	headers := map[dbus.HeaderField]dbus.Variant{dbus.FieldDestination: dbus.MakeVariant(api.BusName), dbus.FieldPath: dbus.MakeVariant(path),
		dbus.FieldInterface: dbus.MakeVariant(method[:dot]), dbus.FieldMember: dbus.MakeVariant(method[dot+1:])}
	if signature != "" {
		headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.ParseSignatureMust(signature))
	}
	if files > 0 {
		headers[dbus.FieldUnixFDs] = dbus.MakeVariant(uint32(files))
	}
	return headers
}

func errorOf(msg *dbus.Message) string {
	name, _ := msg.Headers[dbus.FieldErrorName].Value().(string)
	return name
}

// index is a descriptor in an option, by its index.
func index(i uint32) dbus.Variant {
	return dbus.MakeVariantWithSignature(dbus.UnixFDIndex(i), dbus.ParseSignatureMust("h"))
}

// process is a memlinuxd on a bus.
type process struct {
	t          *testing.T
	cmd        *exec.Cmd
	dir, words string
}

// startRaceDetector builds memlinuxd with the race detector and serves the bus.
func startRaceDetector(t *testing.T, address string) *process {
	t.Helper()
	need.Tool(t, "gcc", "gcc") // for the race detector
	p := &process{t: t, dir: t.TempDir()}
	program := filepath.Join(p.dir, "memlinuxd")
	build := exec.Command("go", "build", "-race", "-buildvcs=false", "-o", program, "./memlinuxd")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build -race: %v: %s", err, out)
	}
	p.words = filepath.Join(p.dir, "words")
	words, err := os.Create(p.words)
	if err != nil {
		t.Fatal(err)
	}
	defer words.Close()
	p.cmd = exec.Command(program)
	p.cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+address, "MEMLINUX_CACHE_DIR="+filepath.Join(p.dir, "cache"), "MEMLINUX_STATE_DIR="+filepath.Join(p.dir, "state"))
	p.cmd.Stderr = words
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.cmd.Wait() }()
	t.Cleanup(func() {
		p.cmd.Process.Signal(unix.SIGTERM)
		if err := <-ended; err != nil {
			t.Errorf("memlinuxd: %v", err) // the race detector makes it 66
		}
		text, err := os.ReadFile(p.words)
		if err != nil || bytes.Contains(text, []byte("DATA RACE")) || bytes.Contains(text, []byte("panic")) || len(text) > 16<<10 {
			t.Errorf("memlinuxd said: %v\n%.20000s", err, text)
		}
	})
	conn := dial(t, address)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var has bool
		if err := conn.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, api.BusName).Store(&has); err != nil {
			t.Fatal(err)
		}
		if has {
			return p
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("memlinuxd ended: %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("memlinuxd does not take its name")
		}
	}
}

// answers is an error if it does not answer. What its goroutines do is then in its
// words.
func (p *process) answers(conn *dbus.Conn) error {
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	err := conn.Object(api.BusName, api.ManagerPath).CallWithContext(ctx, api.ManagerInterface+".Jobs", 0, map[string]dbus.Variant{}).Err
	if err != nil {
		_ = p.cmd.Process.Signal(unix.SIGQUIT)
	}
	return err
}

func (p *process) descriptors() int {
	p.t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	return len(entries)
}

// peak is the most memory that it has had, in KiB (proc_pid_status(5)).
func (p *process) peak() int {
	p.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		p.t.Fatal(err)
	}
	return kib
}

// files lists what it has written.
func (p *process) files() (all []string) {
	p.t.Helper()
	for _, dir := range []string{"state", "cache"} {
		err := filepath.WalkDir(filepath.Join(p.dir, dir), func(path string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				all = append(all, path)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		})
		if err != nil {
			p.t.Fatal(err)
		}
	}
	return all
}

// settles waits until no more descriptors are open than before, but for few.
func (p *process) settles(before int) {
	p.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); p.descriptors() > before+maxMoreFDs; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%d descriptors are open, %d were", p.descriptors(), before)
		}
	}
}

// oddFiles are descriptors that are no file to be read, by what they are.
func oddFiles(t *testing.T) map[string]int {
	t.Helper()
	dir := t.TempDir()
	fifo, file := filepath.Join(dir, "fifo"), filepath.Join(dir, "file")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	odd := map[string]int{}
	for name, open := range map[string]struct {
		path  string
		flags int
	}{
		"directory": {dir, unix.O_RDONLY}, "FIFO": {fifo, unix.O_RDWR}, "device": {"/dev/zero", unix.O_RDWR}, "terminal": {"/dev/ptmx", unix.O_RDWR | unix.O_NOCTTY},
		"mere path": {file, unix.O_PATH}, "shadow by path": {"/etc/shadow", unix.O_PATH}, "write-only file": {file, unix.O_WRONLY}, "proc": {"/proc/self", unix.O_RDONLY},
	} {
		fd, err := unix.Open(open.path, open.flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatalf("%s: %v", open.path, err)
		}
		odd[name] = fd
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	unix.Close(p[1])
	odd["pipe that was closed"] = p[0]
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(pair[1])
	odd["datagram socket"] = pair[0]
	if odd["epoll"], err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if odd["eventfd"], err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, fd := range odd {
			unix.Close(fd)
		}
	})
	return odd
}

// Clients that do what they can against the daemon.
func TestHostileClients(t *testing.T) {
	need.Root(t)
	address := startBus(t)
	startPolkit(t, address, fmt.Sprintf(rulesOfTests, "none"))
	p := startRaceDetector(t, address)
	root := dial(t, address)
	alive := func(t *testing.T) {
		t.Helper()
		if err := p.answers(root); err != nil {
			t.Fatal(err)
		}
	}
	alive(t)
	before, written := p.descriptors(), len(p.files())
	defer func() { t.Logf("peak %d KiB, %d descriptors, %d before", p.peak(), p.descriptors(), before) }()
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(null)
	none := map[string]dbus.Variant{}
	manager := api.ManagerInterface + "."
	build := func(signature string, files int) map[dbus.HeaderField]dbus.Variant {
		return member(api.ManagerPath, manager+"Build", signature, files)
	}

	for _, who := range []string{"nobody", "games"} { // games may do all
		t.Run("messages of "+who, func(t *testing.T) {
			h := dialHostile(t, address, who)
			const most = busguard.MaxMessage - 1<<10
			large, huge := strings.Repeat("A", most), strings.Repeat("A", 1<<20)
			denied := func(allowed string) string {
				if who == "nobody" {
					return interactionRequired
				}
				return allowed
			}
			for _, c := range []struct {
				name    string
				headers map[dbus.HeaderField]dbus.Variant
				body    []any
				files   int
				want    string
			}{
				{"an index beyond the descriptors", build("a{sv}", 1), []any{map[string]dbus.Variant{api.OptPayload: index(5)}}, 1, denied(api.ErrInvalidOption)},
				{"a negative index", build("a{sv}", 1), []any{map[string]dbus.Variant{api.OptPayload: index(0xffffffff)}}, 1, denied(api.ErrInvalidOption)},
				{"an index and no descriptors", build("a{sv}", 0), []any{map[string]dbus.Variant{api.OptPayload: index(0)}}, 0, denied(api.ErrInvalidOption)},
				{"a negative index as the argument", member(api.ManagerPath, manager+"WriteFile", "ha{sv}", 1), []any{dbus.UnixFDIndex(0xffffffff), none}, 1, denied(api.ErrInvalidOption)},
				{"one descriptor for two things", build("a{sv}", 1), []any{map[string]dbus.Variant{api.OptPayload: index(0), api.OptRootfs: index(0)}}, 1, denied(api.ErrInvalidOption)},
				{"descriptors that nothing names", build("a{sv}", 16), []any{map[string]dbus.Variant{"nonsense": dbus.MakeVariant(true)}}, 16, denied(api.ErrInvalidOption)},
				{"descriptors and no arguments", build("", 16), nil, 16, "org.freedesktop.DBus.Error.InvalidArgs"},
				{"an array of descriptors", build("ah", 2), []any{[]dbus.UnixFDIndex{0, 1}}, 2, "org.freedesktop.DBus.Error.InvalidArgs"},
				{"a dictionary of descriptors", build("a{sh}", 1), []any{map[string]dbus.UnixFDIndex{"a": 0}}, 1, "org.freedesktop.DBus.Error.InvalidArgs"},
				{"a large string for a recipe", build("a{sv}", 0), []any{map[string]dbus.Variant{api.OptRecipe: dbus.MakeVariant(large)}}, 0, denied(api.ErrInvalidOption)},
				{"a large name", build("a{sv}", 0), []any{map[string]dbus.Variant{large: dbus.MakeVariant(large[:100])}}, 0, denied(api.ErrInvalidOption)},
				{"a large entry", member(api.ManagerPath, manager+"RemoveEntry", "sa{sv}", 0), []any{large, map[string]dbus.Variant{"nonsense": dbus.MakeVariant(1)}}, 0, denied(api.ErrInvalidOption)},
				{"a large object", member(api.ManagerPath+"/jobs/"+dbus.ObjectPath(large), api.JobInterface+".Cancel", "a{sv}", 0), []any{none}, 0, "org.freedesktop.DBus.Error.UnknownObject"},
				{"a large device", member(api.ManagerPath, manager+"Plan", "oa{sv}", 0), []any{api.DevicePath(large), none}, 0, api.ErrNoSuchDevice},
				{"a string of 1 MiB for a recipe", build("a{sv}", 0), []any{map[string]dbus.Variant{api.OptRecipe: dbus.MakeVariant(huge)}}, 0, api.ErrLimitsExceeded},
				{"a name of 1 MiB", build("a{sv}", 0), []any{map[string]dbus.Variant{huge: dbus.MakeVariant(huge[:100])}}, 0, api.ErrLimitsExceeded},
				{"an object of 1 MiB", member(api.ManagerPath+"/jobs/"+dbus.ObjectPath(huge), api.JobInterface+".Cancel", "a{sv}", 0), []any{none}, 0, api.ErrLimitsExceeded},
				{"30 MiB", build("as", 0), []any{[]string{strings.Repeat(huge, 30)}}, 0, api.ErrLimitsExceeded},
				{"a method without its interface", map[dbus.HeaderField]dbus.Variant{dbus.FieldDestination: dbus.MakeVariant(api.BusName), dbus.FieldPath: dbus.MakeVariant(api.ManagerPath),
					dbus.FieldMember: dbus.MakeVariant("Build"), dbus.FieldSignature: dbus.MakeVariant(dbus.ParseSignatureMust("a{sv}"))}, []any{map[string]dbus.Variant{"nonsense": dbus.MakeVariant(1)}}, 0, denied(api.ErrInvalidOption)},
				{"a method under another interface", member(api.ManagerPath, api.PeerInterface+".Build", "a{sv}", 0), []any{map[string]dbus.Variant{"nonsense": dbus.MakeVariant(1)}}, 0, denied(api.ErrInvalidOption)},
			} {
				var files []int
				for range c.files {
					files = append(files, null)
				}
				msg := h.call(c.headers, c.body, files)
				if got := errorOf(msg); got != c.want {
					t.Errorf("%s: %s, want %s: %.200v", c.name, got, c.want, msg.Body)
				}
				if text, _ := msg.Body[0].(string); len(text) > maxWords+8 {
					t.Errorf("%s: the error has %d bytes", c.name, len(text))
				}
			}
			for _, m := range methods {
				if m.place != onManager {
					continue
				}
				for _, wrong := range []struct {
					signature string
					body      []any
				}{{"i", []any{int32(-1)}}, {"a{sv}a{sv}", []any{none, none}}, {"sssss", []any{"", "", "", "", ""}}, {"a(iv)", []any{[]struct {
					I int32
					V dbus.Variant
				}{{1, dbus.MakeVariant(1)}}}}} {
					if msg := h.call(member(api.ManagerPath, m.iface+"."+m.member, wrong.signature, 0), wrong.body, nil); errorOf(msg) != "org.freedesktop.DBus.Error.InvalidArgs" {
						t.Errorf("%s(%s): %v", m.member, wrong.signature, msg.Body)
					}
				}
			}
			// As deep as the bus lets through: no answer, and nobody else minds.
			deep := &bytes.Buffer{}
			if err := (&dbus.Message{Type: dbus.TypeMethodCall, Headers: build("v", 0), Body: []any{dbus.MakeVariant(byte(1))}}).EncodeTo(deep, binary.LittleEndian); err != nil {
				t.Fatal(err)
			}
			for _, depth := range []int{60, 62, 63} {
				message, more := bytes.Clone(deep.Bytes()), bytes.Repeat([]byte("\x01v\x00"), depth)
				message = append(message[:len(message)-4], append(more, message[len(message)-4:]...)...)
				binary.LittleEndian.PutUint32(message[4:], uint32(4+len(more)))
				if err := h.sendRaw(message, nil, nil); err != nil {
					t.Fatal(err)
				}
			}
			// A signal with descriptors, straight to the daemon.
			signal := &bytes.Buffer{}
			headers := build("h", 4)
			if err := (&dbus.Message{Type: dbus.TypeSignal, Headers: headers, Body: []any{dbus.UnixFDIndex(0)}}).EncodeTo(signal, binary.LittleEndian); err != nil {
				t.Fatal(err)
			}
			for range 100 {
				if err := h.sendRaw(signal.Bytes(), []int{null, null, null, null}, nil); err != nil {
					t.Fatal(err)
				}
			}
			alive(t)
			p.settles(before)
		})
	}
	if now := len(p.files()); now != written {
		t.Errorf("%d files were written: %v", now-written, p.files())
	}

	t.Run("descriptors that are no files", func(t *testing.T) {
		h := dialHostile(t, address, "games")
		for what, fd := range oddFiles(t) {
			for _, key := range []string{api.OptPayload, api.OptRootfs, api.OptKernel, api.OptBusybox, api.OptKernelSource, api.OptKernelConfig, api.OptBusyboxSource} {
				if msg := h.call(build("a{sv}", 1), []any{map[string]dbus.Variant{key: index(0)}}, []int{fd}); errorOf(msg) != api.ErrInvalidOption {
					t.Errorf("%s for %s: %v", what, key, msg.Body)
				}
			}
			for _, key := range []string{api.OptKernelConfigs, api.OptKernelFragments, api.OptFiles} {
				if what == "write-only file" && key == api.OptFiles {
					continue // that is one
				}
				inner := dbus.MakeVariant(map[string]dbus.Variant{api.FileManifest: index(0)})
				if msg := h.call(build("a{sv}", 1), []any{map[string]dbus.Variant{key: inner}}, []int{fd}); errorOf(msg) != api.ErrInvalidOption {
					t.Errorf("%s for %s: %v", what, key, msg.Body)
				}
			}
			for _, method := range []string{"WriteFile", "VerifyFile", "StartVM"} {
				if msg := h.call(member(api.ManagerPath, manager+method, "ha{sv}", 1), []any{dbus.UnixFDIndex(0), none}, []int{fd}); errorOf(msg) != api.ErrInvalidOption {
					t.Errorf("%s for %s: %v", what, method, msg.Body)
				}
			}
		}
		p.settles(before)
		if now := len(p.files()); now != written {
			t.Errorf("%d files were written: %v", now-written, p.files())
		}
	})

	t.Run("a file that grows", func(t *testing.T) {
		h := dialHostile(t, address, "games")
		f, err := os.Create(filepath.Join(t.TempDir(), "grows"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for block := make([]byte, 64<<10); ; {
				select {
				case <-stop:
					return
				default:
					f.Write(block)
				}
				if info, err := f.Stat(); err == nil && info.Size() > 256<<20 {
					f.Truncate(0)
				}
			}
		}()
		msg := h.call(build("a{sv}", 1), []any{map[string]dbus.Variant{api.OptKernel: index(0)}}, []int{int(f.Fd())})
		if job, ok := msg.Body[0].(dbus.ObjectPath); ok {
			awaitState(t, root, job, api.StateFailed)
		} else {
			t.Errorf("refused: %v", msg.Body)
		}
		close(stop)
		<-stopped
		p.settles(before)
	})

	t.Run("10,000 calls", func(t *testing.T) {
		h := dialHostile(t, address, "nobody")
		calls := []func(chan *dbus.Message) error{
			func(to chan *dbus.Message) error {
				return h.send(build("a{sv}", 2), []any{none}, []int{null, null}, to)
			},
			func(to chan *dbus.Message) error {
				return h.send(member(api.ManagerPath, manager+"Jobs", "a{sv}", 0), []any{none}, nil, to)
			},
			func(to chan *dbus.Message) error {
				return h.send(member(api.ManagerPath, api.PeerInterface+".Ping", "", 0), nil, nil, to)
			},
			func(to chan *dbus.Message) error {
				return h.send(member(api.ManagerPath, api.ObjectManagerInterface+".GetManagedObjects", "", 0), nil, nil, to)
			},
		}
		answers, names := make(chan *dbus.Message, floodCalls), map[string]int{}
		for i := range floodCalls {
			if err := calls[i%len(calls)](answers); err != nil {
				t.Fatal(err)
			}
		}
		for range floodCalls {
			select {
			case msg := <-answers:
				names[errorOf(msg)]++
			case <-time.After(time.Minute):
				t.Fatalf("an answer is missing: %v", names)
			}
		}
		t.Logf("answers: %v", names)
		alive(t)
		p.settles(before)
	})

	t.Run("200 clients, of which half vanish", func(t *testing.T) {
		answers := make(chan *dbus.Message, crowd*crowdsCalls)
		waiting := 0
		for i := range crowd {
			h := dialHostile(t, address, []string{"nobody", "games", "mail", "sync"}[i%4])
			for range crowdsCalls {
				to := answers
				if i%2 == 0 {
					to = nil
				} else {
					waiting++
				}
				if err := h.send(build("a{sv}", 4), []any{map[string]dbus.Variant{"nonsense": index(3)}}, []int{null, null, null, null}, to); err != nil {
					t.Fatal(err)
				}
			}
			if i%2 == 0 {
				h.conn.Close()
			}
		}
		for range waiting {
			select {
			case msg := <-answers:
				if errorOf(msg) == "" {
					t.Errorf("answered: %v", msg)
				}
			case <-time.After(time.Minute):
				t.Fatal("an answer is missing")
			}
		}
		alive(t)
		p.settles(before)
	})
	if peak := p.peak(); peak > maxPeakKiB {
		t.Errorf("it took %d KiB", peak)
	}
	for _, f := range p.files() { // those of the jobs of games, and the cache's own
		if name := filepath.Base(filepath.Dir(f)); name != "jobs" && name != "cache" && name != "records" {
			t.Errorf("it wrote %s", f)
		}
	}
}

// makeWait takes O_NONBLOCK away from a socket again and again, until the test's end.
func makeWait(t *testing.T, fd int) {
	t.Helper()
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Microsecond):
				_ = unix.SetNonblock(fd, false)
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-stopped
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // lets go of a daemon that waits in it
	})
}

// A client that makes a socket wait that it shares with the daemon, while that reads or
// writes it, does not keep its job from being cancelled.
func TestSocketsThatAreMadeToWait(t *testing.T) {
	need.Root(t)
	need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	address := startBus(t)
	serve(t, address, func(context.Context, *dbus.Conn, Question) error { return nil })
	root := dial(t, address)
	queued := func(fd int, request uint) int {
		n, err := unix.IoctlGetInt(fd, request)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	cancel := func(t *testing.T, job dbus.ObjectPath) {
		ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
		defer stop()
		if err := root.Object(api.BusName, job).CallWithContext(ctx, api.JobInterface+".Cancel", 0, map[string]dbus.Variant{}).Err; err != nil {
			t.Fatalf("cancel: %v", err)
		}
		awaitState(t, root, job, api.StateCancelled)
	}
	t.Run("data that does not come", func(t *testing.T) {
		theirs, ours := socketPair(t)
		makeWait(t, theirs)
		job := startMachine(t, root, map[string]dbus.Variant{api.OptData: dbus.MakeVariant(dbus.UnixFD(theirs))})
		for range 3 { // each is read, and the next one waited for
			if _, err := unix.Write(ours, []byte("x")); err != nil {
				t.Fatal(err)
			}
			for time.Sleep(20 * time.Millisecond); queued(ours, unix.SIOCOUTQ) > 0; {
				time.Sleep(20 * time.Millisecond) // or the test's limit ends it
			}
		}
		cancel(t, job)
	})
	t.Run("a console that nobody reads", func(t *testing.T) {
		theirs, ours := socketPair(t)
		makeWait(t, theirs)
		// mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp to the out
		job := startMachineOn(t, root, theirs, []byte("\xba\xf8\x03\xb0\x78\xee\xeb\xfd"), map[string]dbus.Variant{})
		for before := 0; ; time.Sleep(500 * time.Millisecond) { // or the test's limit ends it
			n := queued(ours, unix.SIOCINQ)
			if n > 0 && n == before {
				break // full
			}
			before = n
		}
		cancel(t, job)
	})
}
