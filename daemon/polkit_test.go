package daemon

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
)

// The rules of the tests. Of Debian's users, games may do everything but cancel,
// and mail may write one disk.
const rulesOfTests = `polkit.addRule(function (action, subject) {
    if (action.id.indexOf("org.memlinux.memlinux1.") != 0 || action.id.indexOf(".cancel-") > 0)
        return polkit.Result.NOT_HANDLED;
    if (subject.user == "games")
        return polkit.Result.YES;
    if (subject.user == "mail" && action.id == "org.memlinux.memlinux1.write-fixed" && action.lookup("device") == "%s" &&
        action.lookup("drive").indexOf("%[1]s") > 0 && action.lookup("serial") != undefined)
        return polkit.Result.YES;
    if (subject.user == "sync")
        return polkit.Result.AUTH_SELF;
    return polkit.Result.NOT_HANDLED;
});
`

// startPolkit runs polkitd on the bus, with our policy and rules that nobody but
// it sees. What it returns kills it.
func startPolkit(t *testing.T, address, rules string) (kill func()) {
	t.Helper()
	need.Root(t)
	unshare := need.Tool(t, "unshare", "util-linux")
	polkitd := need.File(t, "/usr/lib/polkit-1/polkitd", "polkitd")
	actions, ruleDir := t.TempDir(), t.TempDir()
	policy, err := os.ReadFile("../systemd/org.memlinux.memlinux1.policy")
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string][]byte{
		filepath.Join(actions, "org.memlinux.memlinux1.policy"): policy,
		filepath.Join(ruleDir, "50-test.rules"):                 []byte(rules),
	} {
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{actions, ruleDir} { // it runs as polkitd
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var words bytes.Buffer
	cmd := exec.Command(unshare, "--mount", "--propagation", "private", "sh", "-c",
		`mount --bind "$1" /usr/share/polkit-1/actions && mount --bind "$2" /etc/polkit-1/rules.d && exec "$3" --no-debug`,
		"sh", actions, ruleDir, polkitd)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+address)
	cmd.Stderr = &words
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { cmd.Wait(); close(done) }()
	kill = func() { cmd.Process.Kill(); <-done }
	t.Cleanup(kill)
	conn := dial(t, address)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var has bool
		if err := conn.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, polkitName).Store(&has); err != nil {
			t.Fatal(err)
		}
		if has {
			return kill
		}
		select {
		case <-done:
			t.Fatalf("polkitd ended: %s", words.Bytes())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("polkitd does not take its name")
		}
	}
}

func uidOf(t *testing.T, name string) int {
	t.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		t.Fatal(err)
	}
	return uid
}

// asUser does something on a thread of the user's.
func asUser(t *testing.T, uid int, do func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread ends with us
		_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
		if errno == 0 {
			do()
			_, _, errno = unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), 0, ^uintptr(0))
		}
		if errno != 0 {
			done <- errno
			return
		}
		done <- nil
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// dialAs connects to the bus as another user.
func dialAs(t *testing.T, address, name string) *dbus.Conn {
	t.Helper()
	uid := uidOf(t, name)
	var conn *dbus.Conn
	var err error
	asUser(t, uid, func() { conn, err = dbus.Dial(address) })
	if err == nil {
		err = conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(uid))})
	}
	if err == nil {
		err = conn.Hello()
	}
	if err != nil {
		t.Fatalf("connect as %s: %v", name, err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// invokeInteractively lets somebody be asked, which godbus' Call does not.
func invokeInteractively(conn *dbus.Conn, path dbus.ObjectPath, method string, args ...any) *dbus.Call {
	return <-sendInteractively(conn, path, method, args...).Done
}

func sendInteractively(conn *dbus.Conn, path dbus.ObjectPath, method string, args ...any) *dbus.Call {
	at := strings.LastIndex(method, ".")
	return conn.Send(&dbus.Message{Type: dbus.TypeMethodCall, Flags: dbus.FlagAllowInteractiveAuthorization, Body: args, Headers: map[dbus.HeaderField]dbus.Variant{
		dbus.FieldDestination: dbus.MakeVariant(api.BusName),
		dbus.FieldPath:        dbus.MakeVariant(path),
		dbus.FieldInterface:   dbus.MakeVariant(method[:at]),
		dbus.FieldMember:      dbus.MakeVariant(method[at+1:]),
		dbus.FieldSignature:   dbus.MakeVariant(dbus.SignatureOf(args...)),
	}}, nil)
}

// introspected is a method as introspection has it.
type introspected struct {
	path   dbus.ObjectPath
	method string
	in     string
}

// walk reads the introspection of every object.
func walk(t *testing.T, conn *dbus.Conn, path dbus.ObjectPath) (all []introspected) {
	t.Helper()
	var text string
	if err := invoke(conn, path, api.IntrospectableInterface+".Introspect").Store(&text); err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	collect(t, text, found)
	for method, in := range found {
		all = append(all, introspected{path, method, in})
	}
	var node struct {
		Nodes []struct {
			Name string `xml:"name,attr"`
		} `xml:"node"`
	}
	if err := xml.Unmarshal([]byte(text), &node); err != nil {
		t.Fatal(err)
	}
	for _, child := range node.Nodes {
		all = append(all, walk(t, conn, path+"/"+dbus.ObjectPath(child.Name))...)
	}
	return all
}

// argumentsFor makes arguments of the signature that do no harm where the call is
// allowed: an option that nobody knows.
func argumentsFor(t *testing.T, in string, file *os.File) (args []any) {
	t.Helper()
	for in != "" {
		for signature, value := range map[string]any{"s": "x", "o": dbus.ObjectPath("/"), "h": dbus.UnixFD(file.Fd()), "v": dbus.MakeVariant("x"),
			"a{sv}": map[string]dbus.Variant{"nonsense": dbus.MakeVariant(true)}} {
			if rest, ok := strings.CutPrefix(in, signature); ok {
				args, in = append(args, value), rest
				break
			}
		}
	}
	return args
}

// mayOf is the permission of a method.
func mayOf(t *testing.T, name string) permission {
	t.Helper()
	for _, m := range methods {
		if m.iface+"."+m.member == name {
			return m.may
		}
	}
	t.Fatalf("%s is not in the table", name)
	return nil
}

// startWaiting starts a job of the connection's user that waits for a pipe. It
// returns the pipe's other end, too, which stays open.
func startWaiting(t *testing.T, conn *dbus.Conn) (dbus.ObjectPath, *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	t.Cleanup(func() { w.Close() })
	return startMachine(t, conn, map[string]dbus.Variant{api.OptData: dbus.MakeVariant(dbus.UnixFD(r.Fd()))}), w
}

// startMachine starts a virtual machine of the connection's user that finds nothing
// to boot, with more options.
func startMachine(t *testing.T, conn *dbus.Conn, options map[string]dbus.Variant) dbus.ObjectPath {
	t.Helper()
	theirs, _ := socketPair(t)
	return startMachineOn(t, conn, theirs, nil, options)
}

// socketPair is two ends of a stream, open until the test's end.
func socketPair(t *testing.T) (a, b int) {
	t.Helper()
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Close(ends[0])
		unix.Close(ends[1])
	})
	return ends[0], ends[1]
}

// startMachineOn is startMachine with a console, and with code in the boot sector.
func startMachineOn(t *testing.T, conn *dbus.Conn, console int, code []byte, options map[string]dbus.Variant) dbus.ObjectPath {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	content := make([]byte, 1<<20)
	if copy(content, code) > 0 {
		copy(content[510:], "\x55\xaa")
	}
	if err := os.WriteFile(disk, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	options[api.OptFile] = dbus.MakeVariant(dbus.UnixFD(f.Fd()))
	var job dbus.ObjectPath
	if err := invoke(conn, api.ManagerPath, api.ManagerInterface+".StartVM", dbus.UnixFD(console), options).Store(&job); err != nil {
		t.Fatal(err)
	}
	return job
}

// awaitState waits until the job is in the state.
func awaitState(t *testing.T, conn *dbus.Conn, job dbus.ObjectPath, state string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var v dbus.Variant
		if err := invoke(conn, job, api.PropertiesInterface+".Get", api.JobInterface, "State").Store(&v); err != nil {
			t.Fatal(err)
		}
		if v.Value() == state {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the job is %v, not %s", v, state)
		}
	}
}

func TestPolkitDecides(t *testing.T) {
	need.Root(t)
	need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	var loops []string
	for range 2 {
		file := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		loops = append(loops, need.Loop(t, file, "512"))
	}
	address := startBus(t)
	kill := startPolkit(t, address, fmt.Sprintf(rulesOfTests, loops[0]))
	serve(t, address, Polkit)
	root, nobody, games := dial(t, address), dialAs(t, address, "nobody"), dialAs(t, address, "games")
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	job, _ := startWaiting(t, games)
	objects := walk(t, root, api.ManagerPath)
	each := func(t *testing.T, conn *dbus.Conn, call func(*dbus.Conn, dbus.ObjectPath, string, ...any) *dbus.Call, check func(t *testing.T, m introspected, may bool, err error)) {
		t.Helper()
		for _, m := range objects {
			err := call(conn, m.path, m.method, argumentsFor(t, m.in, null)...).Err
			check(t, m, mayOf(t, m.method) == nil, err)
		}
	}

	t.Run("the policy is what polkit knows", func(t *testing.T) {
		type action struct {
			ID, Description, Message, Vendor, VendorURL, Icon string
			Any, Inactive, Active                             uint32
			Annotations                                       map[string]string
		}
		var known []action
		if err := root.Object(polkitName, polkitPath).Call(polkitInterface+".EnumerateActions", 0, "de_DE").Store(&known); err != nil {
			t.Fatal(err)
		}
		ids := map[string]bool{}
		for _, a := range known {
			ids[a.ID] = true
			if !strings.Contains(a.Message, "Anmeldung") {
				t.Errorf("%s is not translated: %q", a.ID, a.Message)
			}
		}
		for _, id := range []string{actionBuild, actionWriteRemovable, actionWriteFixed, actionVerify, actionVerifyFixed, actionVM, actionEntry, actionNext, actionCancelOwn, actionCancelOthers} {
			if !ids[id] {
				t.Errorf("polkit does not know %s", id)
			}
			delete(ids, id)
		}
		for id := range ids {
			t.Errorf("%s is in the policy, and the daemon does not use it", id)
		}
	})
	t.Run("another user may only read", func(t *testing.T) {
		denied := 0
		each(t, nobody, invoke, func(t *testing.T, m introspected, read bool, err error) {
			if is := api.ErrorName(err) == interactionRequired; is == read {
				t.Errorf("%s of %s: %v", m.method, m.path, err)
			} else if is {
				denied++
			}
		})
		if denied < 12 {
			t.Errorf("only %d methods were denied", denied)
		}
	})
	t.Run("where nobody can ask, asking does not help", func(t *testing.T) {
		each(t, nobody, invokeInteractively, func(t *testing.T, m introspected, read bool, err error) {
			if is := api.ErrorName(err) == api.ErrNotAuthorized; is == read {
				t.Errorf("%s of %s: %v", m.method, m.path, err)
			}
		})
	})
	t.Run("a rule allows", func(t *testing.T) {
		each(t, games, invoke, func(t *testing.T, m introspected, read bool, err error) {
			if strings.HasSuffix(m.in, "a{sv}") && api.ErrorName(err) != api.ErrInvalidOption {
				t.Errorf("%s of %s: %v", m.method, m.path, err)
			}
		})
	})
	t.Run("a rule looks at the device", func(t *testing.T) {
		mail := dialAs(t, address, "mail")
		for i, want := range []string{api.ErrInvalidOption, interactionRequired} {
			for _, method := range []string{"Write", "CheckCapacity"} {
				err := invoke(mail, api.ManagerPath, api.ManagerInterface+"."+method, api.DevicePath(filepath.Base(loops[i])), "token", map[string]dbus.Variant{"nonsense": dbus.MakeVariant(true)}).Err
				if api.ErrorName(err) != want {
					t.Errorf("%s %s: %v, want %s", method, loops[i], err, want)
				}
			}
		}
	})
	none := map[string]dbus.Variant{}
	t.Run("one's own job can be cancelled, another's not", func(t *testing.T) {
		if err := invoke(nobody, job, api.JobInterface+".Cancel", none).Err; api.ErrorName(err) != interactionRequired {
			t.Errorf("nobody cancels games' job: %v", err)
		}
		awaitState(t, root, job, api.StateRunning)
		if err := invoke(dialAs(t, address, "games"), job, api.JobInterface+".Cancel", none).Err; err != nil {
			t.Errorf("games cancels their job: %v", err)
		}
		awaitState(t, root, job, api.StateCancelled)
	})
	t.Run("a job that feeds on its client ends with it", func(t *testing.T) {
		conn := dialAs(t, address, "games")
		job, _ := startWaiting(t, conn)
		awaitState(t, root, job, api.StateRunning)
		conn.Close()
		awaitState(t, root, job, api.StateCancelled)
	})
	t.Run("a job's report, and why it failed, are its owner's and root's", func(t *testing.T) {
		const reason = "too small for the layout"
		file := filepath.Join(t.TempDir(), "no stick")
		if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		told := make(chan *dbus.Signal, 100)
		nobody.Signal(told)
		defer nobody.RemoveSignal(told)
		if err := nobody.AddMatchSignal(dbus.WithMatchPathNamespace(api.ManagerPath)); err != nil {
			t.Fatal(err)
		}
		var job dbus.ObjectPath
		if err := invoke(games, api.ManagerPath, api.ManagerInterface+".VerifyFile", dbus.UnixFD(f.Fd()), map[string]dbus.Variant{api.OptBootTest: dbus.MakeVariant(false)}).Store(&job); err != nil {
			t.Fatal(err)
		}
		awaitState(t, root, job, api.StateFailed)
		for name, conn := range map[string]*dbus.Conn{"games": games, "root": root, "nobody": nobody} {
			var one map[string]dbus.Variant
			if err := invoke(conn, job, api.PropertiesInterface+".GetAll", api.JobInterface).Store(&one); err != nil {
				t.Fatal(err)
			}
			var all map[dbus.ObjectPath]map[string]map[string]dbus.Variant
			if err := invoke(conn, api.ManagerPath, api.ObjectManagerInterface+".GetManagedObjects").Store(&all); err != nil {
				t.Fatal(err)
			}
			var result, message dbus.Variant
			if err := invoke(conn, job, api.PropertiesInterface+".Get", api.JobInterface, "Result").Store(&result); err != nil {
				t.Fatal(err)
			}
			if err := invoke(conn, job, api.PropertiesInterface+".Get", api.JobInterface, "Message").Store(&message); err != nil {
				t.Fatal(err)
			}
			for _, v := range []dbus.Variant{one["Message"], all[job][api.JobInterface]["Message"], message} {
				if said, _ := v.Value().(string); strings.Contains(said, reason) != (name != "nobody") || said == "" {
					t.Errorf("%s sees the message %q", name, said)
				}
			}
			for _, v := range []dbus.Variant{one["Result"], all[job][api.JobInterface]["Result"], result} {
				got, _ := v.Value().(map[string]dbus.Variant)
				if _, report := got[api.ResultReport]; report != (name != "nobody") || got[api.ResultError].Value() != api.ErrVerification {
					t.Errorf("%s sees the result %v", name, got)
				}
			}
		}
		for {
			select {
			case s := <-told:
				if text := fmt.Sprint(s.Body...); strings.Contains(text, "sector_size") || strings.Contains(text, reason) {
					t.Errorf("all are told %v", s)
				}
				if s.Path == job && s.Name == api.JobInterface+".Completed" {
					return
				}
			case <-time.After(20 * time.Second):
				t.Fatal("nobody is told of the job's end")
			}
		}
	})
	t.Run("a user may have so many jobs", func(t *testing.T) {
		conn := dialAs(t, address, "games")
		for range 4 {
			startWaiting(t, conn)
		}
		err := invoke(conn, api.ManagerPath, api.ManagerInterface+".SetNextBoot", "", none).Err
		if api.ErrorName(err) != api.ErrLimitsExceeded {
			t.Errorf("the fifth: %v", err)
		}
		conn.Close()
	})
	t.Run("a prompt", func(t *testing.T) { prompts(t, address) })
	t.Run("without polkit nobody may, root neither", func(t *testing.T) {
		kill()
		each(t, root, invokeInteractively, func(t *testing.T, m introspected, read bool, err error) {
			if is := api.ErrorName(err) == api.ErrNotAuthorized && strings.Contains(err.Error(), "--private"); is == read {
				t.Errorf("%s of %s: %v", m.method, m.path, err)
			}
		})
	})
}

// Users do not keep root, or each other's proofs, from working: their jobs end, and
// of the places for machines their consoles take all but one.
func TestUsersLeaveRoom(t *testing.T) {
	need.Root(t)
	need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	standard := userTime
	defer func() { userTime = standard }()
	address := startBus(t)
	serve(t, address, func(context.Context, *dbus.Conn, Question) error { return nil })
	root, games, mail := dial(t, address), dialAs(t, address, "games"), dialAs(t, address, "mail")
	get := func(job dbus.ObjectPath, property string) string {
		var v dbus.Variant
		if err := invoke(root, job, api.PropertiesInterface+".Get", api.JobInterface, property).Store(&v); err != nil {
			t.Fatal(err)
		}
		return v.Value().(string)
	}
	cancel := func(job dbus.ObjectPath) {
		if err := invoke(root, job, api.JobInterface+".Cancel", map[string]dbus.Variant{}).Err; err != nil {
			t.Error(err)
		}
		awaitState(t, root, job, api.StateCancelled)
	}

	userTime = time.Second
	long, _ := startWaiting(t, games)
	roots, _ := startWaiting(t, root)
	awaitState(t, root, long, api.StateFailed)
	if said := get(long, "Message"); !strings.Contains(said, "only root's jobs may") {
		t.Errorf("a user's job that takes too long ends so: %q", said)
	}
	awaitState(t, root, roots, api.StateRunning)
	cancel(roots)

	userTime = standard
	consoles := []dbus.ObjectPath{startMachine(t, games, map[string]dbus.Variant{}), startMachine(t, mail, map[string]dbus.Variant{})}
	for get(consoles[0], "State") == api.StateRunning && get(consoles[1], "State") == api.StateRunning {
		time.Sleep(10 * time.Millisecond) // or the test's limit ends it
	}
	if get(consoles[0], "State") == api.StateRunning {
		slices.Reverse(consoles)
	}
	if said := get(consoles[0], "Message"); !strings.Contains(said, "a user's console runs already") {
		t.Errorf("one user's console too many ends so: %q", said)
	}
	roots = startMachine(t, root, map[string]dbus.Variant{})
	awaitState(t, root, consoles[1], api.StateRunning)
	awaitState(t, root, roots, api.StateRunning)
	cancel(consoles[1])
	cancel(roots)
}

// agent is an authentication agent: it is asked, and its person decides.
type agent struct {
	asked     chan string // messages
	cancelled chan struct{}
	answer    chan *dbus.Error
}

func (a agent) BeginAuthentication(_, message, _ string, _ map[string]string, _ string, _ []struct {
	Kind    string
	Details map[string]dbus.Variant
}) *dbus.Error {
	a.asked <- message
	return <-a.answer
}

func (a agent) CancelAuthentication(string) *dbus.Error {
	select {
	case a.cancelled <- struct{}{}:
	default: // polkit says it more than once
	}
	return nil
}

// startTime is this process's, in clock ticks (proc_pid_stat(5)).
func startTime(t *testing.T) uint64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	n, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// prompts has a person dismiss one, and vanish in the middle of the other.
func prompts(t *testing.T, address string) {
	conn := dial(t, address) // whose process is asked for: this one, root's
	a := agent{make(chan string, 1), make(chan struct{}, 1), make(chan *dbus.Error, 1)}
	if err := conn.Export(a, "/agent", polkitName+".AuthenticationAgent"); err != nil {
		t.Fatal(err)
	}
	subject := polkitSubject{"unix-process", map[string]dbus.Variant{"pid": dbus.MakeVariant(uint32(os.Getpid())), "start-time": dbus.MakeVariant(startTime(t))}}
	if err := conn.Object(polkitName, polkitPath).Call(polkitInterface+".RegisterAuthenticationAgent", 0, subject, "de_DE", "/agent").Err; err != nil {
		t.Fatal(err)
	}
	for _, vanish := range []bool{false, true} {
		caller := dialAs(t, address, "sync")
		ended := make(chan error, 1)
		call := sendInteractively(caller, api.ManagerPath, api.ManagerInterface+".Build", map[string]dbus.Variant{"nonsense": dbus.MakeVariant(true)})
		go func() { ended <- (<-call.Done).Err }()
		select {
		case message := <-a.asked:
			if !strings.Contains(message, "Zum Bauen eines Systems") {
				t.Errorf("asked: %q", message)
			}
		case err := <-ended:
			t.Fatalf("nobody was asked: %v", err)
		}
		// Others are not held up meanwhile.
		if err := invoke(caller, api.ManagerPath, api.ManagerInterface+".Jobs", map[string]dbus.Variant{}).Err; err != nil {
			t.Error(err)
		}
		if vanish {
			caller.Close()
			<-a.cancelled // or the test's limit ends it
			a.answer <- nil
			continue
		}
		a.answer <- dbus.NewError(polkitName+".Error.Cancelled", []any{"dismissed"})
		if err := <-ended; api.ErrorName(err) != api.ErrNotAuthorized || !strings.Contains(err.Error(), "dismissed") {
			t.Errorf("dismissed: %v", err)
		}
	}
}
