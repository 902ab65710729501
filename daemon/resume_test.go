package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/testvm/need"
)

var someStick = diskID{Serial: "4C53", Vendor: "Sandy", Model: "Blade", Size: 8 << 30, SectorSize: 512, Number: 7, Kernel: "boot"}

// A disk is known again only by what no other disk has.
func TestSameDisk(t *testing.T) {
	for _, c := range []struct {
		name          string
		change        func(*diskID)
		maybe, surely bool
	}{
		{"nothing", func(*diskID) {}, true, true},
		{"plugged in again", func(d *diskID) { d.Number = 8 }, true, true},
		{"after a new start", func(d *diskID) { d.Number, d.Kernel = 3, "later" }, true, true},
		{"another serial", func(d *diskID) { d.Serial = "4C54" }, false, false},
		{"no serial now", func(d *diskID) { d.Serial = "" }, false, false},
		{"the same serial on another model", func(d *diskID) { d.Model = "Edge" }, false, false},
		{"another vendor", func(d *diskID) { d.Vendor = "Andy" }, false, false},
		{"another size", func(d *diskID) { d.Size++ }, false, false},
		{"other sectors", func(d *diskID) { d.SectorSize = 4096 }, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			other := someStick
			c.change(&other)
			if maybe, surely := someStick.is(other); maybe != c.maybe || surely != c.surely {
				t.Errorf("maybe %v, surely %v", maybe, surely)
			}
		})
	}
	nameless := someStick
	nameless.Serial = ""
	for _, c := range []struct {
		name   string
		change func(*diskID)
		surely bool
	}{
		{"no serial, never unplugged", func(*diskID) {}, true},
		{"no serial, plugged in again", func(d *diskID) { d.Number = 8 }, false},
		{"no serial, the same number after a new start", func(d *diskID) { d.Kernel = "later" }, false},
	} {
		other := nameless
		c.change(&other)
		if maybe, surely := nameless.is(other); !maybe || surely != c.surely {
			t.Errorf("%s: maybe %v, surely %v", c.name, maybe, surely)
		}
	}
	nameless.Number = 0
	if _, surely := nameless.is(nameless); surely {
		t.Error("neither serial nor number, and it is sure")
	}
}

func testInterruptions(t *testing.T) *interruptions {
	t.Helper()
	in, err := openInterruptions(filepath.Join(t.TempDir(), "interrupted"))
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func (in *interruptions) put(t *testing.T, job string, disk diskID, ago time.Duration) *writeRecord {
	t.Helper()
	w, err := in.begin(interruption{Job: job, Disk: disk, Began: time.Now().Add(-ago)})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (in *interruptions) names() string {
	var jobs []string
	for _, r := range in.waiting() {
		jobs = append(jobs, r.Job)
	}
	return strings.Join(jobs, " ")
}

func TestRecordsOfWrites(t *testing.T) {
	other := someStick
	other.Serial = "5D64"
	begun, untouched := media.Result{Begun: true}, media.Result{}
	for _, c := range []struct {
		name string
		do   func(t *testing.T, in *interruptions)
		want string // what waits, the latest first
	}{
		{"a write that runs does not wait", func(t *testing.T, in *interruptions) {
			w := in.put(t, "a", someStick, 0)
			t.Cleanup(w.close)
		}, ""},
		{"a daemon that is gone leaves one that waits", func(t *testing.T, in *interruptions) { in.put(t, "a", someStick, 0).close() }, "a"},
		{"one that failed waits", func(t *testing.T, in *interruptions) {
			w := in.put(t, "a", someStick, 0)
			w.wrote(begun)
			w.close()
		}, "a"},
		{"one that changed nothing does not", func(t *testing.T, in *interruptions) {
			w := in.put(t, "a", someStick, 0)
			w.wrote(untouched)
			w.close()
		}, ""},
		{"one that is committed does not", func(t *testing.T, in *interruptions) {
			w := in.put(t, "a", someStick, 0)
			w.wrote(begun)
			w.committed()
			w.close()
		}, ""},
		{"the latest to change the disk counts", func(t *testing.T, in *interruptions) {
			in.put(t, "a", someStick, time.Hour).close()
			w := in.put(t, "b", someStick, 0)
			w.wrote(begun)
			w.close()
		}, "b"},
		{"a later one that changed nothing leaves the older", func(t *testing.T, in *interruptions) {
			in.put(t, "a", someStick, time.Hour).close()
			w := in.put(t, "b", someStick, 0)
			w.wrote(untouched)
			w.close()
		}, "a"},
		{"one killed before it was known leaves both", func(t *testing.T, in *interruptions) {
			in.put(t, "a", someStick, time.Hour).close()
			in.put(t, "b", someStick, 0).close()
		}, "b a"},
		{"another disk's stays", func(t *testing.T, in *interruptions) {
			in.put(t, "a", other, time.Hour).close()
			w := in.put(t, "b", someStick, 0)
			w.wrote(begun)
			w.committed()
			w.close()
		}, "a"},
		{"something else is written on the disk", func(t *testing.T, in *interruptions) {
			in.put(t, "a", other, time.Hour).close()
			in.put(t, "b", someStick, 0).close()
			in.forget(someStick)
		}, "a"},
		{"too old", func(t *testing.T, in *interruptions) { in.put(t, "a", someStick, keepInterrupted+time.Hour).close() }, ""},
		{"a nil one does nothing", func(_ *testing.T, _ *interruptions) {
			var w *writeRecord
			w.wrote(begun)
			w.committed()
			if err := w.advise(os.ErrInvalid); !errors.Is(err, os.ErrInvalid) {
				panic(err)
			}
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := testInterruptions(t)
			c.do(t, in)
			if got := in.names(); got != c.want {
				t.Errorf("%q waits, not %q", got, c.want)
			}
		})
	}
}

// The folder never grows without end, and what is broken in it hurts nobody.
func TestRecordsAreSwept(t *testing.T) {
	in := testInterruptions(t)
	running := in.put(t, "running", someStick, 100*24*time.Hour)
	defer running.close()
	for i := range mostInterrupted + 5 {
		d := someStick
		d.Serial = fmt.Sprint(i)
		in.put(t, fmt.Sprint("job", i), d, time.Duration(i)*time.Minute).close()
	}
	old := time.Now().Add(-2 * time.Hour)
	for name, age := range map[string]time.Time{".a.json123": old, ".b.json456": time.Now(), "broken.json": time.Now()} {
		path := filepath.Join(in.dir, name)
		if err := errors.Join(os.WriteFile(path, []byte("{"), 0o600), os.Chtimes(path, age, age)); err != nil {
			t.Fatal(err)
		}
	}
	if _, surely := in.of(someStick); surely {
		t.Error("one that runs is taken for one that waits")
	}
	in.put(t, "last", someStick, 0).close()
	entries, err := os.ReadDir(in.dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), info.Mode(), err)
		}
	}
	for name, want := range map[string]bool{"running.json": true, "last.json": true, "job0.json": true, fmt.Sprintf("job%d.json", mostInterrupted+4): false,
		".a.json123": false, ".b.json456": true, "broken.json": false} {
		if got := slices.Contains(names, name); got != want {
			t.Errorf("%s is there: %v", name, got)
		}
	}
	if len(in.waiting()) > mostInterrupted+1 {
		t.Errorf("%d records", len(in.waiting()))
	}
	if r, surely := in.of(someStick); r == nil || !surely || r.Job != "last" {
		t.Errorf("found %+v, %v", r, surely)
	}
}

// Bytes from a broken disk or an older memlinuxd never do more than not count.
func FuzzReadInterruption(f *testing.F) {
	f.Add([]byte(`{"job":"a","began":"2026-11-22T19:50:28Z","disk":{"serial":"4C53","size":1,"sector_size":512},"stamp":{"volume_id":1,"guids":{"Disk":"x"},"modified":"2026-11-22T19:50:28Z"}}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "a.json")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := readInterruption(path); err == nil && r.Job != "a" {
			t.Errorf("read as that of the job %q", r.Job)
		}
	})
}

// Advice is given only where it helps: when the disk went away, not when it is
// faulty, nor when nothing was begun.
func TestAdvice(t *testing.T) {
	begun := &writeRecord{begun: true}
	for _, c := range []struct {
		name string
		w    *writeRecord
		err  error
		want bool
	}{
		{"unplugged", begun, &media.DeviceError{Fault: media.FaultGone}, true},
		{"stalled", begun, &media.DeviceError{Fault: media.FaultStalled}, true},
		{"unplugged before anything was written", &writeRecord{}, &media.DeviceError{Fault: media.FaultGone}, false},
		{"a file", nil, &media.DeviceError{Fault: media.FaultGone}, false},
		{"faulty", begun, &media.MismatchError{Fault: media.FaultFlipped}, false},
	} {
		if got := strings.Contains(c.w.advise(c.err).Error(), "--resume"); got != c.want {
			t.Errorf("%s: %v", c.name, c.w.advise(c.err))
		}
	}
}

// Who may go on with a write, and with which: another user's could hold secrets,
// and a disk that only may be the one must still be void.
func TestResumable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(need.Loop(t, path, "512"))
	f, d, err := blockdev.System{}.OpenRead(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	token, err := d.Token(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	disk, err := blockdev.System{}.Open(t.Context(), name, token)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	this := identify(disk.Device())
	before := this // it was plugged in
	before.Number++
	content := make([]byte, 4096)
	for _, c := range []struct {
		name    string
		disk    diskID
		content byte // of its first bytes
		uid     uint32
		want    string // error
	}{
		{"the same disk", this, 0, 1000, ""},
		{"by root", this, 0, 0, ""},
		{"by another user", this, 0, 1001, api.ErrNotAuthorized},
		{"not void any more, and surely the same", this, 1, 1000, ""},
		{"perhaps the same, and void", before, 0, 1000, ""},
		{"perhaps the same, and not void", before, 1, 1000, api.ErrNothing},
		{"another", someStick, 0, 1000, api.ErrNothing},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &Server{interruptions: testInterruptions(t)}
			w, err := s.interruptions.begin(interruption{Job: "a", Owner: 1000, Disk: c.disk, Began: time.Now()})
			if err != nil {
				t.Fatal(err)
			}
			w.close()
			content[5] = c.content
			if _, err := disk.WriteAt(content, 0); err != nil {
				t.Fatal(err)
			}
			r, err := s.resumable(&call{uid: c.uid}, disk)
			if c.want == "" && (err != nil || r.Job != "a") || c.want != "" && (err == nil || api.ErrorName(err) != c.want) {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}
