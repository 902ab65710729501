package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
)

const (
	killMiB   = 40
	headBytes = 1 << 20 // is void while the rest is written

	// killsOnEach of two disks: more than 200 in all.
	killsOnEach = 102
)

// The daemon is killed (SIGKILL) in every phase, at every step of a write that
// the disk shows, and at random, while it writes over another system. Whatever
// the moment, the disk then has that system untouched, or nothing that boots, or
// all of the new one; the next daemon tells of the job, and the next write
// succeeds.
func TestKilledDaemon(t *testing.T) {
	w := newWorld(t)
	need.Kernel(t)
	old := w.path("old.img")
	w.run("write", "--no-boot-test", "--size", fmt.Sprint(killMiB, "MiB"), old).wants(t, 0)
	image, err := os.ReadFile(old)
	if err != nil {
		t.Fatal(err)
	}
	for _, firmware := range []string{"bios", "uefi"} {
		t.Run(firmware, func(t *testing.T) {
			t.Parallel()
			newVictim(t, image, firmware).suffer()
		})
	}
}

// victim is a disk whose writers are killed.
type victim struct {
	*world
	device   string
	disk     []byte // what the device has now
	old      []byte // the system that was there before
	firmware string // that the new one is for
	recipe   string
	image    *api.Image // of a whole write of it

	all, end time.Duration       // that a whole job takes, and of that from its record on
	outcomes map[string]int      // what kills left
	hit      map[string][]string // by kind of moment, what they left
}

func newVictim(t *testing.T, old []byte, firmware string) *victim {
	w := newWorld(t)
	// In memory, so that it is quick.
	sh(t, "mount", "-t", "tmpfs", "-o", "size=256m", "none", w.dir)
	t.Cleanup(func() { sh(t, "umount", w.dir) })
	v := &victim{world: w, old: old, firmware: firmware, recipe: fmt.Sprintf("boot = [%q]\nmodules = [\"none\"]\n", firmware), outcomes: map[string]int{}, hit: map[string][]string{}}
	var backing string
	v.device, backing = w.loop(killMiB, "512")
	f, err := os.OpenFile(backing, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if v.disk, err = unix.Mmap(int(f.Fd()), 0, killMiB<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(v.disk) })
	return v
}

// moment is when the daemon is killed: so long after reached says yes, which is
// asked again and again, or after the write was asked for.
type moment struct {
	name    string
	reached func(*killedRun) bool
	after   time.Duration
	anew    bool // in a write from the start: a resumed one has no such phase
	boot    bool // and with the boot test
}

// moments are all that are named, and as many more at random as are wanted.
func (v *victim) moments() []moment {
	var all []moment
	phase := func(name string) moment {
		return moment{name: "phase " + name, reached: func(r *killedRun) bool { return r.entered(name) }}
	}
	show := func(name string, is func(*killedRun) bool) moment { return moment{name: name, reached: is} }
	void := func(off int) bool { return allZero(v.disk[off : off+512]) }
	changed := func(off int) bool { return !bytes.Equal(v.disk[off:off+512], v.old[off:off+512]) }
	for range 4 {
		for _, name := range []string{"kernel", "initramfs", "image", "write", "read back"} {
			m := phase(name)
			m.anew = name == "kernel" || name == "initramfs"
			all = append(all, m)
		}
		all = append(all,
			show("the record is there", v.recorded),
			show("the head is void", func(*killedRun) bool { return void(0) && void(headBytes-512) }),
			show("the file system is there", func(*killedRun) bool { return changed(headBytes) }),
			show("the last bytes are there", func(*killedRun) bool { return changed(killMiB<<20 - 512) }),
			show("the partition table is there", func(*killedRun) bool { return void(0) && !void(512) }),
			show("the first sector is there", func(*killedRun) bool { return !void(0) && !void(512) && changed(512) }),
			show("it has ended", (*killedRun).ended))
	}
	for range 2 {
		boot := phase("boot " + strings.ToUpper(v.firmware))
		boot.anew, boot.boot = true, true
		all = append(all, boot)
	}
	for len(all) < killsOnEach {
		all = append(all, moment{name: "random", after: rand.N(v.all)},
			moment{name: "random in the write", reached: v.recorded, after: rand.N(v.end)},
			moment{name: "random in the write", reached: v.recorded, after: rand.N(v.end)})
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// suffer has the daemon killed at all moments.
func (v *victim) suffer() {
	v.measure()
	v.measure()   // the shorter one is less the others' doing
	fresh := true // the disk has the old system
	v.restore()
	var r *killedRun
	var left string // by the last kill
	kills, resumed, again, spared := 0, 0, 0, int64(0)
	for i, m := range v.moments() {
		options := v.options(m.boot)
		resuming := !fresh && !m.anew
		if resuming {
			options = api.Properties{api.OptResume: dbus.MakeVariant(true)}
		} else if !fresh {
			v.restore()
		}
		d := v.start()
		if r != nil {
			d.tellsOf(r, left, resuming)
		}
		r = d.write(options)
		v.wait(r, m)
		d.kill()
		kills++

		left = v.judge(r, resuming)
		v.outcomes[left]++
		v.hit[m.name] = append(v.hit[m.name], left)
		if v.t.Failed() {
			v.t.Fatalf("kill %d at %s, resuming %v: %s", i, m.name, resuming, left)
		}
		switch n := v.outcomes[left]; {
		case left == "commit", left == "void" && n%4 == 0:
			spared += v.resume(r, left)
			resumed++
		case left == "void" && n%4 != 1:
			fresh = false // the next one goes on with it, and is killed, too
			continue
		case left == "old" && n%8 == 0, left == "new" && n%8 == 0:
			v.run("write", "--yes", "--no-boot-test", "--recipe", v.file("memlinux.toml", v.recipe), v.device).wants(v.t, 0)
			if wrong := v.whole(); wrong != "" {
				v.t.Errorf("the next write: %s", wrong)
			}
			again++
		}
		v.restore()
		fresh = true
	}
	awaitProcesses(v.t, func() bool { return v.left() == "" })
	v.t.Logf("a write takes %v; %d kills: %v; %d times resumed, which spared %d MiB, %d times written anew", v.all.Round(time.Millisecond), kills, v.outcomes, resumed, spared>>20, again)
	for name, left := range v.hit {
		slices.Sort(left)
		v.t.Logf("%s: %s", name, strings.Join(left, " "))
	}
	if resumed < 3 || again < 1 || v.outcomes["void"] < kills/10 || spared == 0 {
		v.t.Error("too little of what is to be tried came about")
	}
}

// options are those of a write from the start.
func (v *victim) options(boot bool) api.Properties {
	return api.Properties{api.OptBootTest: dbus.MakeVariant(boot), api.OptRecipe: dbus.MakeVariant(v.recipe)}
}

// measure writes once to the end.
func (v *victim) measure() {
	v.restore()
	d := v.start()
	defer d.stop()
	began := time.Now()
	r := d.write(v.options(false))
	v.wait(r, moment{reached: v.recorded})
	recorded := time.Now()
	v.wait(r, moment{reached: (*killedRun).ended})
	if all := time.Since(began); v.all == 0 || all < v.all {
		v.all, v.end = all, time.Since(recorded)
	}
	job, err := d.job(r.path)
	if err != nil || job.State != api.StateSucceeded {
		v.t.Fatalf("a write that nobody disturbs: %+v, %v", job, err)
	}
	v.image = job.Report.Image
	if digest, wrong := v.digest(v.image), v.whole(); digest != v.image.SHA256Planned || r.image != "" && r.image != digest || wrong != "" {
		v.t.Fatalf("a write that nobody disturbs: %s, not %s or %s: %s", digest, v.image.SHA256Planned, r.image, wrong)
	}
}

// wait returns at the moment, or when the job has ended. What image is written it
// learns on the way.
func (v *victim) wait(r *killedRun, m moment) {
	var reached time.Time
	for pause := time.Millisecond; !r.ended(); time.Sleep(pause) {
		if r.image == "" {
			if record := v.record(r.id); record != nil {
				r.image, pause = record.Image, 50*time.Microsecond // now it goes fast
			}
		}
		if reached.IsZero() && (m.reached == nil || m.reached(r)) {
			reached = time.Now()
		}
		if !reached.IsZero() && time.Since(reached) >= m.after {
			break
		}
	}
	if m.boot {
		awaitProcesses(v.t, func() bool { return strings.Contains(v.left(), "qemu-system") })
	}
}

// restore puts the old system on the disk.
func (v *victim) restore() {
	v.t.Helper()
	for off := 0; off < len(v.old); off += headBytes {
		if was := v.old[off : off+headBytes]; !bytes.Equal(v.disk[off:off+headBytes], was) {
			copy(v.disk[off:], was)
		}
	}
	f, err := os.Open(v.device)
	if err != nil {
		v.t.Fatal(err)
	}
	defer f.Close()
	// What memory has of the device is another's.
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
		v.t.Fatal(err)
	}
}

// judge tells what a kill has left: "old", "void", "commit" (all but the first
// sector) or "new". Anything else is an error.
func (v *victim) judge(r *killedRun, resuming bool) string {
	head := v.disk[:headBytes]
	record := v.record(r.id)
	r.recorded = record != nil
	switch {
	case allZero(head):
		if record == nil && !resuming { // else it may still be that of the write before
			v.t.Error("void, and nothing is known of the write")
		}
		return "void"
	case allZero(head[:512]):
		if record == nil {
			v.t.Error("all but the first sector is there, and nothing is known of the write")
		}
		return "commit"
	case bytes.Equal(v.disk, v.old):
		return "old"
	}
	// What is written has the same extents every time.
	if r.image != "" {
		if digest := v.digest(v.image); digest != r.image {
			v.t.Errorf("half of a system: %s, not %s", digest, r.image)
		}
	} else if wrong := v.whole(); wrong != "" {
		v.t.Errorf("half of a system: %s", wrong)
	}
	return "new"
}

// whole is empty if the disk has all of a system, else what is wrong.
func (v *victim) whole() string {
	o := v.run("verify", "--no-boot-test", v.device)
	if o.code == 0 {
		return ""
	}
	return o.stderr
}

func (v *victim) recorded(r *killedRun) bool {
	_, err := os.Lstat(v.recordPath(r.id))
	return err == nil
}

func (v *victim) recordPath(job string) string {
	return filepath.Join(v.path("state"), "interrupted", job+".json")
}

// record is what is known of the job's write, nil for nothing.
func (v *victim) record(job string) (r *struct{ Image string }) {
	text, err := os.ReadFile(v.recordPath(job))
	if err != nil {
		return nil
	}
	if err := json.Unmarshal(text, &r); err != nil {
		v.t.Errorf("%q: %v", text, err)
	}
	return r
}

// tellsOf makes sure that the next daemon tells of the job as it was. still: the
// disk is as the kill has left it.
func (d *killable) tellsOf(r *killedRun, left string, still bool) {
	v := d.v
	job, err := d.job(r.path)
	if err != nil {
		v.t.Errorf("the killed daemon's job: %v", err)
		return
	}
	switch job.State {
	case api.StateSucceeded:
		if left != "new" {
			v.t.Errorf("succeeded, and the disk is %s", left)
		}
	case api.StateFailed:
		// A resumed write was told of by the daemon that did it.
		resumable := r.recorded
		if job.Phase == "" || !strings.Contains(job.Message, "ended during "+job.Phase+";") || strings.Contains(job.Message, "write --resume") != resumable {
			v.t.Errorf("%+v; resumable: %v", job, resumable)
		}
		if r.ended() {
			v.t.Errorf("it had ended, and is told as %+v", job)
		}
	default:
		v.t.Errorf("the killed daemon's job is %+v", job)
	}
	plan := d.plan()
	if void := still && left == "void"; plan.Agreed != void || void && plan.Interrupted == "" {
		v.t.Errorf("void: %v, and the plan is %+v", void, plan)
	}
}

// resume has the command line go on with the write, and returns how many bytes
// it found on the disk.
func (v *victim) resume(r *killedRun, left string) (spared int64) {
	v.t.Helper()
	want := v.record(r.id)
	before := bytes.Clone(v.disk)
	args := []string{"--json", "write", "--resume"} // the disk is found, and nothing is asked
	if left != "void" {
		args = append(args, "--yes", v.device) // what is there could be somebody's
	}
	o := v.run(args...)
	o.wants(v.t, 0)
	lines := strings.Split(strings.TrimSpace(o.stdout), "\n")
	var last struct{ Report api.Report }
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || last.Report.Image == nil {
		v.t.Fatalf("%q: %v", o.stdout, err)
	}
	im := last.Report.Image
	if digest := v.digest(im); digest != im.SHA256Planned || digest != im.SHA256Read {
		v.t.Errorf("the disk has %s: %+v", digest, im)
	}
	if want != nil && (im.SHA256Planned != want.Image || last.Report.Resumed != r.id) {
		v.t.Errorf("resumed %s with the image %s, not %s with %s", last.Report.Resumed, im.SHA256Planned, r.id, want.Image)
	}
	if left := v.whole(); left != "" {
		v.t.Errorf("resumed: %s", left)
	}
	// Nothing can be spared that was not there; all of it is where all was there.
	var rest, there int64
	for _, e := range im.Extents {
		for off := max(e.Offset, headBytes); off < e.Offset+e.Length; {
			end := min((off>>20+1)<<20, e.Offset+e.Length)
			rest += end - off
			if bytes.Equal(before[off:end], v.disk[off:end]) {
				there += end - off
			}
			off = end
		}
	}
	if im.Unchanged > there || left == "commit" && there != rest || there == rest && im.Unchanged != rest || im.Written+im.Unchanged != im.Bytes {
		v.t.Errorf("%s: of %d bytes behind the head %d were there, and %d were left alone, %d written", left, rest, there, im.Unchanged, im.Written)
	}
	if v.record(r.id) != nil {
		v.t.Error("after it was resumed, its record is still there")
	}
	return im.Unchanged
}

// digest is that of media.Image.Digest, of what the disk has.
func (v *victim) digest(im *api.Image) string {
	h := sha256.New()
	words := []int64{im.Size, 512}
	for _, e := range im.Extents {
		words = append(words, e.Offset, e.Length)
	}
	if err := binary.Write(h, binary.LittleEndian, words); err != nil {
		v.t.Fatal(err)
	}
	for _, e := range im.Extents {
		h.Write(v.disk[e.Offset:][:e.Length])
	}
	return hex.EncodeToString(h.Sum(nil))
}

func allZero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

// killable is a running memlinuxd.
type killable struct {
	v     *victim
	cmd   *exec.Cmd
	stdin io.Closer
	conn  *dbus.Conn
}

func (v *victim) start() *killable {
	v.t.Helper()
	d := &killable{v: v, cmd: exec.Command(filepath.Join(bin, "memlinuxd"), "--private")}
	d.cmd.Env = v.command().Env
	d.cmd.Stderr = os.Stderr
	stdin, err := d.cmd.StdinPipe()
	if err != nil {
		v.t.Fatal(err)
	}
	d.stdin = stdin
	stdout, err := d.cmd.StdoutPipe()
	if err != nil {
		v.t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(d.kill)
	address, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		v.t.Fatal(err)
	}
	if d.conn, err = dbus.Connect(strings.TrimSpace(address), dbus.WithSignalHandler(dbus.NewSequentialSignalHandler())); err != nil {
		v.t.Fatal(err)
	}
	return d
}

// kill is what the test is about.
func (d *killable) kill() {
	if d.cmd.ProcessState == nil {
		_ = d.cmd.Process.Kill()
	}
	d.end()
}

// stop ends it as its command does.
func (d *killable) stop() {
	_ = d.stdin.Close()
	d.end()
}

func (d *killable) end() {
	if d.cmd.ProcessState == nil {
		_ = d.cmd.Wait() // killed
	}
	if d.conn != nil {
		_ = d.conn.Close()
	}
}

func (d *killable) call(path dbus.ObjectPath, method string, args []any, ret ...any) error {
	return d.conn.Object(api.BusName, path).CallWithContext(context.Background(), method, 0, args...).Store(ret...)
}

func (d *killable) job(path dbus.ObjectPath) (j api.Job, err error) {
	var props api.Properties
	if err := d.call(path, api.PropertiesInterface+".GetAll", []any{api.JobInterface}, &props); err != nil {
		return j, err
	}
	return j, j.Update(props)
}

func (d *killable) plan() api.Plan {
	d.v.t.Helper()
	var props api.Properties
	err := d.call(api.ManagerPath, api.ManagerInterface+".Plan", []any{api.DevicePath(filepath.Base(d.v.device)), api.Properties{}}, &props)
	if err != nil {
		d.v.t.Fatal(err)
	}
	plan, err := api.PlanFrom(props)
	if err != nil {
		d.v.t.Fatal(err)
	}
	return plan
}

// killedRun is a job whose daemon is to be killed.
type killedRun struct {
	id   string
	path dbus.ObjectPath

	signals <-chan *dbus.Signal
	state   api.Job
	phases  map[string]bool // that it has begun
	image   string          // the digest of what is written

	recorded bool // its write could be resumed when it was killed
}

// write begins to write the disk.
func (d *killable) write(options api.Properties) *killedRun {
	d.v.t.Helper()
	signals := make(chan *dbus.Signal, 256)
	d.conn.Signal(signals)
	if err := d.conn.AddMatchSignal(dbus.WithMatchSender(api.BusName), dbus.WithMatchInterface(api.PropertiesInterface)); err != nil {
		d.v.t.Fatal(err)
	}
	r := &killedRun{signals: signals, phases: map[string]bool{}}
	if err := d.call(api.ManagerPath, api.ManagerInterface+".Write", []any{api.DevicePath(filepath.Base(d.v.device)), d.plan().Token, options}, &r.path); err != nil {
		d.v.t.Fatal(err)
	}
	r.id, _ = api.JobID(r.path)
	r.state.State = api.StateRunning
	if r.phases["kernel"] = true; options[api.OptResume].Value() != nil {
		r.phases = map[string]bool{"image": true}
	}
	return r
}

// look takes in what the daemon has told.
func (r *killedRun) look() {
	for {
		select {
		case s := <-r.signals:
			if s == nil {
				return
			}
			if s.Path == r.path && len(s.Body) == 3 {
				if changed, ok := s.Body[1].(api.Properties); ok {
					_ = r.state.Update(changed) // looked at with the next daemon
					r.phases[r.state.Phase] = true
				}
			}
		default:
			return
		}
	}
}

func (r *killedRun) entered(phase string) bool { r.look(); return r.phases[phase] }
func (r *killedRun) ended() bool               { r.look(); return r.state.State != api.StateRunning }
