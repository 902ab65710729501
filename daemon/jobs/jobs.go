// Package jobs runs the daemon's long work: each job has phases, progress that
// reaches 100% only when the work is done, a truthful cancel, and a state on
// disk, so that a job that a crash interrupted is published as failed.
package jobs

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/daemon/api"
)

// MaxRunning is how many jobs may run at once. A job holds memory, a virtual
// machine or a disk: more than a few at once only make each other slow.
const MaxRunning = 8

// What a user but root may have of them.
const (
	MaxRunningOfUser = 4
	MaxEndedOfUser   = 32 // the oldest are forgotten before their time
)

// maxMessage is how long a job's message may be, in bytes.
const maxMessage = 64 << 10

// Phase is a part of a job. Weight is its share of the job's progress, in any
// unit that is the same for all phases of a job.
type Phase struct {
	Name   string
	Weight float64
	Unit   string // what its progress counts; "" for [api.UnitBytes]
}

// Events is told what happens to jobs. Calls for one job come one after the
// other, in order.
type Events interface {
	JobAdded(api.Job)
	JobChanged(api.Job)   // Phase, Progress, Bytes, Total or Rate changed
	JobCompleted(api.Job) // the job has ended; its state and result are final
	JobRemoved(id string)
}

func (p Phase) unit() string {
	if p.Unit == "" {
		return api.UnitBytes
	}
	return p.Unit
}

// Registry holds the jobs of one daemon, and what it found of others' in the
// same state folder.
type Registry struct {
	dir      string
	events   Events
	lock     *os.File // held while this daemon lives, so that others can tell
	instance string

	interrupted []api.Job // that a daemon before us did not end

	mu        sync.Mutex
	retention time.Duration
	jobs      map[string]*Job
	closed    bool
	running   sync.WaitGroup
}

// stored is a job's state on disk.
type stored struct {
	Job      api.Job   `json:"job"`
	Instance string    `json:"instance"` // the daemon that runs it
	Ended    time.Time `json:"ended,omitzero"`
}

// Open makes the registry whose state lies in dir. Jobs there whose daemon
// lives no more are published as failed, with what next says that can be done
// about it; those that ended longer than retention ago are forgotten.
func Open(dir string, retention time.Duration, events Events, next func(api.Job) string) (*Registry, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // holds nothing secret; the files have their own modes
		return nil, fmt.Errorf("job state: %w", err)
	}
	r := &Registry{dir: dir, retention: retention, events: events, jobs: map[string]*Job{}, instance: newID()}
	lock, err := os.OpenFile(r.lockPath(r.instance), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("job state: %w", err)
	}
	r.lock = lock
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("job state: lock: %w", err), lock.Close())
	}
	if err := r.load(next); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func (r *Registry) lockPath(instance string) string {
	return filepath.Join(r.dir, instance+".lock")
}

// alive reports whether the daemon of that instance still holds its lock.
func (r *Registry) alive(instance string) bool {
	f, err := os.OpenFile(r.lockPath(instance), os.O_RDWR, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

func (r *Registry) load(next func(api.Job) string) error {
	locks, err := filepath.Glob(filepath.Join(r.dir, "*.lock"))
	if err != nil {
		return err
	}
	for _, l := range locks {
		if !r.alive(strings.TrimSuffix(filepath.Base(l), ".lock")) {
			if err := os.Remove(l); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("job state: %w", err)
			}
		}
	}
	files, err := filepath.Glob(filepath.Join(r.dir, "*.json"))
	if err != nil {
		return err
	}
	for _, name := range files {
		s, err := readStored(name)
		if err != nil {
			// Written atomically, so this is not our file or a broken disk:
			// a job's history is not worth refusing to start.
			continue
		}
		if s.Job.State == api.StateRunning {
			if r.alive(s.Instance) {
				continue // another daemon's, and it will say how it ends
			}
			s.Job.State, s.Job.Error = api.StateFailed, api.ErrFailed
			s.Job.Message = "interrupted: memlinuxd ended during " + s.Job.Phase + "; " + next(s.Job)
			s.Ended = time.Now()
			if err := r.save(s); err != nil {
				return err
			}
			r.interrupted = append(r.interrupted, s.Job)
		}
		left := r.retention - time.Since(s.Ended)
		if left <= 0 {
			if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("job state: %w", err)
			}
			continue
		}
		j := &Job{registry: r, state: s.Job, done: make(chan struct{})}
		close(j.done)
		r.jobs[s.Job.ID] = j
		r.forgetAfter(j, left)
	}
	return nil
}

func readStored(name string) (stored, error) {
	var s stored
	text, err := os.ReadFile(name)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, err
	}
	if s.Job.ID+".json" != filepath.Base(name) {
		return s, errors.New("the job's id is not the file's name")
	}
	return s, nil
}

func (r *Registry) save(s stored) error {
	text, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("job state: %w", err)
	}
	if err := renameio.WriteFile(filepath.Join(r.dir, s.Job.ID+".json"), text, 0o600); err != nil {
		return fmt.Errorf("job state: %w", err)
	}
	return nil
}

func (r *Registry) forgetAfter(j *Job, d time.Duration) {
	time.AfterFunc(d, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if !r.closed {
			r.forget(j)
		}
	})
}

// forget is for who holds r.mu.
func (r *Registry) forget(j *Job) {
	if r.jobs[j.ID()] != j {
		return // it is already
	}
	delete(r.jobs, j.ID())
	_ = os.Remove(filepath.Join(r.dir, j.ID()+".json")) // load removes what stays
	r.events.JobRemoved(j.ID())
}

// Retain changes how long jobs are kept that end from now on.
func (r *Registry) Retain(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retention = d
}

func (r *Registry) retained() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.retention
}

// Interrupted lists the jobs that Open found to have been interrupted by the end
// of the daemon that ran them, as they are published now.
func (r *Registry) Interrupted() []api.Job { return r.interrupted }

// newID is a fresh name that is valid in an object path and sorts by time.
func newID() string {
	var b [3]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return time.Now().UTC().Format("20060102_150405_") + hex.EncodeToString(b[:])
}

// Jobs lists the jobs that run or ended a short while ago.
func (r *Registry) Jobs() []api.Job {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]api.Job, 0, len(r.jobs))
	for _, j := range r.jobs {
		list = append(list, j.Snapshot())
	}
	return list
}

// Job is the job with that id, and whether there is one.
func (r *Registry) Job(id string) (*Job, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	j, ok := r.jobs[id]
	return j, ok
}

// Run is the work of a job. The report may be returned with an error too: it
// then tells how far the job came.
type Run func(context.Context, *Job) (*api.Report, error)

// Start runs a job in the background. It returns an *api.Error where the
// daemon takes no more.
func (r *Registry) Start(kind string, owner uint32, phases []Phase, run Run) (*Job, error) {
	ctx, cancel := context.WithCancel(context.Background())
	j := &Job{registry: r, phases: phases, cancel: cancel, done: make(chan struct{}), started: time.Now(),
		state: api.Job{ID: newID(), Kind: kind, Owner: owner, Cancelable: true, State: api.StateRunning}}
	if len(phases) > 0 {
		j.state.Phase, j.state.Unit = phases[0].Name, phases[0].unit()
	}
	if err := r.add(j); err != nil {
		cancel()
		return nil, err
	}
	r.events.JobAdded(j.Snapshot())
	go func() {
		defer r.running.Done()
		defer cancel()
		report, err := j.guard(ctx, run)
		j.finish(ctx, report, err)
	}()
	return j, nil
}

func (r *Registry) add(j *Job) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return &api.Error{Name: api.ErrBusy, Message: "memlinuxd is stopping; try again in a moment"}
	}
	n, ofUser := 0, 0
	var ended []*Job
	for _, other := range r.jobs {
		state := other.Snapshot()
		own := state.Owner == j.state.Owner && state.Owner != 0
		switch {
		case state.State == api.StateRunning:
			n++
			if own {
				ofUser++
			}
		case own && other.over():
			ended = append(ended, other)
		}
	}
	if ofUser >= MaxRunningOfUser {
		return &api.Error{Name: api.ErrLimitsExceeded, Message: fmt.Sprintf("%d jobs of your user are running already; wait for one to end, or cancel one (memlinux jobs lists them, memlinux cancel JOB)", ofUser)}
	}
	if n >= MaxRunning {
		return &api.Error{Name: api.ErrBusy, Message: fmt.Sprintf("%d jobs are running already; wait for one to end, or cancel one (memlinux jobs lists them, memlinux cancel JOB)", n)}
	}
	if err := r.save(stored{Job: j.state, Instance: r.instance}); err != nil {
		return err
	}
	if len(ended) >= MaxEndedOfUser {
		slices.SortFunc(ended, func(a, b *Job) int { return strings.Compare(a.ID(), b.ID()) })
		for _, old := range ended[:len(ended)-MaxEndedOfUser+1] {
			r.forget(old)
		}
	}
	r.jobs[j.state.ID] = j
	r.running.Add(1)
	return nil
}

// Close cancels every job, waits until none of them runs, and gives the state
// folder back.
func (r *Registry) Close() {
	r.mu.Lock()
	r.closed = true
	for _, j := range r.jobs {
		if j.cancel != nil {
			j.cancel()
		}
	}
	r.mu.Unlock()
	r.running.Wait()
	_ = os.Remove(r.lock.Name()) // load removes what stays
	_ = r.lock.Close()
}

// Job is one piece of work.
type Job struct {
	registry *Registry
	phases   []Phase
	cancel   context.CancelFunc // nil: it ended under another daemon
	done     chan struct{}
	started  time.Time

	mu      sync.Mutex
	state   api.Job
	meter   meter
	told    time.Time // when JobChanged was last called
	pending bool      // changed since
}

// tellEvery bounds how often a job's progress goes over the bus: often enough
// for a smooth bar, rare enough to cost nothing.
const tellEvery = 200 * time.Millisecond

// ID is the job's name.
func (j *Job) ID() string { return j.state.ID }

// Elapsed is the time since the job's start.
func (j *Job) Elapsed() time.Duration { return time.Since(j.started) }

// Snapshot is the job's state now.
func (j *Job) Snapshot() api.Job {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.state
}

// Begin enters the phase of that name.
func (j *Job) Begin(phase string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.state.Phase == phase && j.state.Bytes == 0 && j.told.IsZero() {
		// The job's first phase, which Start has named already.
		j.tell(true)
		return
	}
	if j.state.Phase == phase {
		return
	}
	j.tell(false)
	j.state.Phase, j.state.Unit, j.state.Bytes, j.state.Total, j.state.Rate = phase, api.UnitBytes, 0, 0, 0
	for _, p := range j.phases {
		if p.Name == phase {
			j.state.Unit = p.unit()
		}
	}
	j.meter = meter{}
	j.state.Progress = max(j.state.Progress, j.before(phase))
	// So that after a crash it is known where. What can't be stored does not
	// stop the work.
	if err := j.registry.save(stored{Job: j.state, Instance: j.registry.instance}); err != nil {
		fmt.Fprintf(os.Stderr, "memlinuxd: job %s: %v\n", j.state.ID, err)
	}
	j.tell(true)
}

// before is the share of the job that lies before the phase.
func (j *Job) before(phase string) float64 {
	var sum, done float64
	found := false
	for _, p := range j.phases {
		found = found || p.Name == phase
		if !found {
			done += p.Weight
		}
		sum += p.Weight
	}
	if sum == 0 || !found {
		return 0
	}
	return done / sum
}

// Progress says how many bytes, or what the phase's unit is, are done, of how
// many (0: not known).
func (j *Job) Progress(done, total int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := time.Now()
	j.state.Bytes, j.state.Total = uint64(max(done, 0)), uint64(max(total, 0))
	j.state.Rate = j.meter.rate(now, done)
	if total > 0 {
		var sum, weight float64
		for _, p := range j.phases {
			sum += p.Weight
			if p.Name == j.state.Phase {
				weight = p.Weight
			}
		}
		if sum > 0 {
			fraction := min(float64(done)/float64(total), 1)
			// 1 is for the job that has succeeded.
			j.state.Progress = min(max(j.state.Progress, j.before(j.state.Phase)+fraction*weight/sum), 0.99)
		}
	}
	j.pending = true
	if now.Sub(j.told) >= tellEvery {
		j.tell(true)
	}
}

// tell passes the state on; where nothing is pending only if always.
func (j *Job) tell(always bool) {
	if !always && !j.pending {
		return
	}
	j.pending = false
	j.told = time.Now()
	j.registry.events.JobChanged(j.state)
}

// Stop cancels the job and does not wait for its end.
func (j *Job) Stop() {
	if j.cancel != nil {
		j.cancel()
	}
}

// Cancel stops the job and returns when nothing of it runs any more, or when
// ctx ends. The state then tells whether it ended before it could be stopped.
func (j *Job) Cancel(ctx context.Context) error {
	j.Stop()
	return j.Wait(ctx)
}

// Wait returns when the job has ended, or ctx has.
func (j *Job) Wait(ctx context.Context) error {
	select {
	case <-j.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// over reports whether the job's end is stored.
func (j *Job) over() bool {
	select {
	case <-j.done:
		return true
	default:
		return false
	}
}

// guard turns a panic in the work into an error: one broken job must not end
// the others'.
func (j *Job) guard(ctx context.Context, run Run) (report *api.Report, err error) {
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(os.Stderr, "memlinuxd: job %s: panic: %v\n%s", j.ID(), p, debug.Stack())
			err = fmt.Errorf("internal error: %v; please report it with the daemon's log", p)
		}
	}()
	return run(ctx, j)
}

func (j *Job) finish(ctx context.Context, report *api.Report, err error) {
	j.mu.Lock()
	j.tell(false)
	if report != nil {
		report.Seconds = j.Elapsed().Seconds()
	}
	j.state.Report = report
	j.state.Rate = 0
	switch {
	case err == nil:
		j.state.State, j.state.Progress = api.StateSucceeded, 1
	case ctx.Err() != nil:
		j.state.State, j.state.Error = api.StateCancelled, api.ErrCancelled
		j.state.Message = "cancelled during " + j.state.Phase
		var told *api.Error
		if errors.As(err, &told) && told.Name == api.ErrCancelled {
			j.state.Message += ": " + told.Message
		}
	default:
		j.state.State, j.state.Error, j.state.Message = api.StateFailed, api.ErrorName(err), api.Words(err.Error(), maxMessage)
	}
	final := j.state
	j.mu.Unlock()

	// What can't be stored is still told: the caller waits for it.
	if err := j.registry.save(stored{Job: final, Instance: j.registry.instance, Ended: time.Now()}); err != nil {
		fmt.Fprintf(os.Stderr, "memlinuxd: job %s: %v\n", final.ID, err)
	}
	close(j.done)
	j.registry.events.JobCompleted(final)
	j.registry.forgetAfter(j, j.registry.retained())
}

// meter measures a rate in bytes per second, smoothed over about three
// seconds, so that it follows a stick that slows down but does not jump.
type meter struct {
	at    time.Time
	bytes int64
	value float64
}

const meterWindow = 3 * time.Second

func (m *meter) rate(now time.Time, bytes int64) uint64 {
	if m.at.IsZero() {
		m.at, m.bytes = now, bytes
		return 0
	}
	dt := now.Sub(m.at)
	if dt < 50*time.Millisecond || bytes < m.bytes {
		return uint64(m.value)
	}
	v := float64(bytes-m.bytes) / dt.Seconds()
	if m.value == 0 {
		m.value = v
	} else {
		k := min(dt.Seconds()/meterWindow.Seconds(), 1)
		m.value += k * (v - m.value)
	}
	m.at, m.bytes = now, bytes
	return uint64(m.value)
}
