package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/blockdev"
)

// interruption is the record of a write to a disk, from before the first byte
// until all of it was read back. What stays of it after that is an interrupted
// write, which can be gone on with: the same system and the same stamp make the
// same image, and of that only what the disk lacks is written.
type interruption struct {
	Job      string    `json:"job"`
	Owner    uint32    `json:"owner"` // uid
	Began    time.Time `json:"began"`
	Disk     diskID    `json:"disk"`
	System   string    `json:"system"` // SHA-256 of its manifest in the cache
	Warnings []string  `json:"warnings,omitempty"`
	Stamp    stamp     `json:"stamp"`
	Image    string    `json:"image"` // its digest
	BootTest bool      `json:"boot_test"`
}

// diskID is what a disk is known again by.
type diskID struct {
	Serial     string `json:"serial"`
	Vendor     string `json:"vendor"`
	Model      string `json:"model"`
	Size       int64  `json:"size"`
	SectorSize int    `json:"sector_size"`
	// No two disks have the same number until the kernel is started anew; one that is
	// plugged in again gets another. 0: not known.
	Number uint64 `json:"number"`
	Kernel string `json:"kernel"` // its boot ID
}

func identify(d blockdev.Device) diskID {
	id := diskID{Serial: d.Serial, Vendor: d.Vendor, Model: d.Model, Size: d.Size, SectorSize: d.LogicalBlockSize}
	if boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		id.Kernel, id.Number = strings.TrimSpace(string(boot)), d.DiskSeq
	}
	return id
}

// is compares two disks: they may be the same, and they surely are.
func (d diskID) is(other diskID) (maybe, surely bool) {
	maybe = d.Serial == other.Serial && d.Vendor == other.Vendor && d.Model == other.Model && d.Size == other.Size && d.SectorSize == other.SectorSize
	plugged := d.Number != 0 && d.Number == other.Number && d.Kernel == other.Kernel
	return maybe, maybe && (d.Serial != "" || plugged)
}

func (d diskID) String() string {
	s := strings.TrimSpace(d.Vendor + " " + d.Model)
	if d.Serial != "" {
		s = strings.TrimSpace(s + " serial " + d.Serial)
	}
	return s
}

const (
	// keepInterrupted is how long a write can be gone on with. Who comes later
	// is served as well by a new one.
	keepInterrupted = 30 * 24 * time.Hour
	// mostInterrupted bounds the records.
	mostInterrupted = 100
)

// interruptions is a folder with a record for each write to a disk that runs or
// was interrupted, named by its job. A daemon that runs the write holds the
// file's lock (flock), so that others can tell.
type interruptions struct{ dir string }

func openInterruptions(dir string) (*interruptions, error) {
	// Root's alone: serials are nobody else's business.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("records of writes: %w", err)
	}
	return &interruptions{dir}, nil
}

func (in *interruptions) path(job string) string { return filepath.Join(in.dir, job+".json") }

// waiting lists what was interrupted, the latest first.
func (in *interruptions) waiting() []interruption {
	names, _ := filepath.Glob(filepath.Join(in.dir, "*.json")) // the pattern is right
	var found []interruption
	for _, name := range names {
		// One that can't be read is not worth failing for.
		if r, err := readInterruption(name); err == nil && time.Since(r.Began) < keepInterrupted {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, func(a, b interruption) int { return b.Began.Compare(a.Began) })
	return found
}

var errRunning = errors.New("that write runs")

func readInterruption(name string) (r interruption, err error) {
	f, err := os.Open(name)
	if err != nil {
		return r, err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return r, errRunning
	}
	if err := json.NewDecoder(f).Decode(&r); err != nil {
		return r, err
	}
	if r.Job+".json" != filepath.Base(name) {
		return r, errors.New("the job is not the file's name")
	}
	return r, nil
}

// of finds the latest interrupted write to the disk: one that surely was to it,
// else one that may have been.
func (in *interruptions) of(disk diskID) (r *interruption, surely bool) {
	for _, w := range in.waiting() {
		maybe, sure := disk.is(w.Disk)
		if sure {
			return &w, true
		}
		if maybe && r == nil {
			r = &w
		}
	}
	return r, false
}

// begin stores the record durably and locks it.
func (in *interruptions) begin(r interruption) (*writeRecord, error) {
	in.sweep()
	w := &writeRecord{in: in, job: r.Job}
	for _, old := range in.waiting() {
		if _, surely := r.Disk.is(old.Disk); surely {
			w.older = append(w.older, old.Job)
		}
	}
	text, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	pending, err := renameio.NewPendingFile(in.path(r.Job), renameio.WithPermissions(0o600))
	if err != nil {
		return nil, err
	}
	defer pending.Cleanup() //nolint:errcheck // nothing is left to do where it was kept
	// The lock is of the open file, which the second descriptor keeps.
	fd, err := unix.FcntlInt(pending.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	w.lock = os.NewFile(uintptr(fd), pending.Name())
	err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		_, err = pending.Write(text)
	}
	if err == nil {
		err = pending.CloseAtomicallyReplace()
	}
	if err == nil {
		err = in.sync()
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

// forget drops what was interrupted of writes to a disk on which now something else is
// written.
func (in *interruptions) forget(disk diskID) {
	w := writeRecord{in: in}
	for _, old := range in.waiting() {
		if _, surely := disk.is(old.Disk); surely {
			w.remove(old.Job)
		}
	}
}

// sync makes the folder's names durable.
func (in *interruptions) sync() error {
	d, err := os.Open(in.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// sweep removes the records that are too old or too many, and what daemons left
// that were killed while they stored one.
func (in *interruptions) sweep() {
	keep := map[string]bool{}
	for i, r := range in.waiting() {
		keep[r.Job+".json"] = i < mostInterrupted
	}
	entries, _ := os.ReadDir(in.dir)
	for _, e := range entries {
		name := filepath.Join(in.dir, e.Name())
		if _, err := readInterruption(name); keep[e.Name()] || errors.Is(err, errRunning) {
			continue
		}
		// What is not a whole record may be one in a moment.
		if info, err := e.Info(); err == nil && (filepath.Ext(name) == ".json" || time.Since(info.ModTime()) > time.Hour) {
			_ = os.Remove(name) // the next one tries again
		}
	}
}

// writeRecord is the record of a write that runs. A nil one does nothing.
type writeRecord struct {
	in    *interruptions
	job   string
	older []string // jobs whose writes to the same disk were interrupted
	lock  *os.File
	begun bool // to change the disk
}

// wrote takes in how far the write came: of the old writes and the new one, only
// that can be gone on with which was the last to change the disk.
func (w *writeRecord) wrote(r media.Result) {
	if w == nil {
		return
	}
	if w.begun = r.Begun; w.begun {
		w.remove(w.older...)
	} else {
		w.remove(w.job)
	}
}

// committed forgets the write: all of it is on the disk.
func (w *writeRecord) committed() {
	if w != nil {
		w.remove(w.job)
	}
}

func (w *writeRecord) remove(jobs ...string) {
	for _, job := range jobs {
		// One that stays is found again; then the delta finds nothing to write.
		_ = os.Remove(w.in.path(job))
	}
	_ = w.in.sync()
}

// close gives the lock free: from now on the write counts as interrupted, if its
// record is still there.
func (w *writeRecord) close() {
	_ = w.lock.Close() // what was written is durable already
}

// advise adds to an error what can be done about it.
func (w *writeRecord) advise(err error) error {
	if w == nil || !w.begun {
		return err
	}
	switch media.FaultOf(err) {
	case media.FaultGone, media.FaultStalled:
		return fmt.Errorf("%w; memlinux write --resume goes on with it", err)
	}
	return err
}

// beginWrite records that the disk is about to be written. That it can't be is a
// warning: the write itself does not need it.
func (s *Server) beginWrite(ctx context.Context, j *jobs.Job, report *api.Report, sys *imagegen.System, st stamp, to destination, bootTest bool, before *interruption) *writeRecord {
	if to.device == nil {
		return nil
	}
	r := interruption{Job: j.ID(), Owner: j.Snapshot().Owner, Began: time.Now(), Disk: identify(*to.device), Warnings: sys.Warnings,
		Stamp: st, Image: report.Image.SHA256Planned, BootTest: bootTest}
	var record *writeRecord
	var err error
	if r.System, err = s.generator(j).Keep(ctx, sys); err == nil {
		record, err = s.interruptions.begin(r)
	}
	if err != nil {
		report.Warnings = append(report.Warnings, fmt.Sprintf("if this write is interrupted it can't be resumed: %v", err))
		return nil
	}
	if before != nil && !slices.Contains(record.older, before.Job) {
		record.older = append(record.older, before.Job)
	}
	return record
}

// endWrite has the bus told whether an interrupted write waits now.
func (s *Server) endWrite(record *writeRecord) {
	if record != nil {
		record.close()
		s.devices.lookAgain()
	}
}

// resume goes on with the interrupted write to a device.
func (s *Server) resume(c *call, o *options) ([]any, error) {
	bootTest := o.boolean(api.OptBootTest, true)
	terms := termsOf(o)
	if err := o.end(); err != nil {
		return nil, err
	}
	dev, disk, err := s.openDevice(c, terms)
	if err != nil {
		return nil, err
	}
	before, err := s.resumable(c, disk)
	if err != nil {
		disk.Close()
		return nil, err
	}
	bootTest = bootTest && before.BootTest
	phases := slices.Clone(writePhases)
	if bootTest {
		phases = append(phases, bootPhases...)
	}
	ret, err := s.start(c, api.KindWrite, phases, nil, s.withCache(func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		defer disk.Close()
		to := s.toDevice(dev, disk)
		report := &api.Report{Kind: api.KindWrite, Target: to.target, Resumed: before.Job}
		j.Begin(phaseImage)
		sys, err := s.generator(j).Load(ctx, before.System)
		switch {
		case errors.Is(err, imagegen.ErrGone):
			return report, &api.Error{Name: api.ErrNothing, Message: fmt.Sprintf("what was being written to %s is no longer in the cache; a plain memlinux write makes it anew", dev.Path)}
		case err != nil:
			return report, err
		}
		sys.Warnings = before.Warnings
		return s.put(ctx, j, report, sys, before.Stamp, to, bootTest, before)
	}))
	if err != nil {
		disk.Close()
	}
	return ret, err
}

// resumable is the interrupted write to the open disk that the caller may go on
// with: what was being written can hold the secrets of who began.
func (s *Server) resumable(c *call, disk *blockdev.Disk) (*interruption, error) {
	d := disk.Device()
	before, surely := s.interruptions.of(identify(d))
	if before != nil && !surely {
		void, err := media.Void(disk, disk.Size())
		if err != nil {
			return nil, err
		}
		if !void {
			before = nil
		}
	}
	switch {
	case before == nil:
		return nil, &api.Error{Name: api.ErrNothing, Message: fmt.Sprintf("no interrupted write to %s is known; memlinux write %s begins one", d.Path, d.Path)}
	case c.uid != 0 && c.uid != before.Owner:
		return nil, &api.Error{Name: api.ErrNotAuthorized, Message: fmt.Sprintf("another user's write to %s was interrupted; memlinux write %s begins one of your own", d.Path, d.Path)}
	}
	return before, nil
}

// interrupted finds the interrupted write to a disk that nobody writes now, and
// whether it surely was to this disk. void: the disk is still as empty as that
// write left it. A disk that is neither has most likely nothing to do with it.
func (s *Server) interrupted(ctx context.Context, d blockdev.Device) (job string, surely, void bool) {
	before, surely := s.interruptions.of(identify(d))
	if before == nil {
		return "", false, false
	}
	return before.Job, surely, s.void(ctx, d.Name)
}

// void tells whether the disk's first MiB is known to be zeros. A disk that does
// not answer is not waited for.
func (s *Server) void(ctx context.Context, name string) bool {
	ctx, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	found := make(chan bool, 1)
	go func() {
		f, d, err := s.devices.system.OpenRead(ctx, name)
		if err != nil {
			found <- false
			return
		}
		defer f.Close()
		void, err := media.Void(f, d.Size)
		found <- void && err == nil
	}()
	select {
	case void := <-found:
		return void
	case <-ctx.Done():
		return false
	}
}

// afterCrash says what to do about a job that a daemon's end interrupted.
func (s *Server) afterCrash(j api.Job) string {
	if r, err := readInterruption(s.interruptions.path(j.ID)); err == nil {
		what := "the same disk"
		if name := r.Disk.String(); name != "" {
			what += ", " + name
		}
		return "memlinux write --resume goes on with " + what
	}
	return "run the command again"
}
