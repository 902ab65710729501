package jobs

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
)

type recorder struct {
	mu                      sync.Mutex
	changes                 []api.Job
	added, ended, forgotten int
}

func (r *recorder) JobAdded(api.Job) { r.mu.Lock(); r.added++; r.mu.Unlock() }
func (r *recorder) JobChanged(j api.Job) {
	r.mu.Lock()
	r.changes = append(r.changes, j)
	r.mu.Unlock()
}
func (r *recorder) JobCompleted(api.Job) { r.mu.Lock(); r.ended++; r.mu.Unlock() }
func (r *recorder) JobRemoved(string)    { r.mu.Lock(); r.forgotten++; r.mu.Unlock() }

func open(t *testing.T, dir string, retention time.Duration) (*Registry, *recorder) {
	t.Helper()
	rec := &recorder{}
	r, err := Open(dir, retention, rec, func(api.Job) string { return "run the command again" })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r, rec
}

func await(t *testing.T, j *Job) api.Job {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := j.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	return j.Snapshot()
}

var twoPhases = []Phase{{Name: "write", Weight: 3}, {Name: "read back", Weight: 1}}

func TestProgressGrowsAndReachesOneOnlyAtTheEnd(t *testing.T) {
	r, rec := open(t, t.TempDir(), time.Minute)
	j, err := r.Start(api.KindWrite, 7, twoPhases, func(_ context.Context, j *Job) (*api.Report, error) {
		j.Begin("write")
		for i := int64(0); i <= 4; i++ {
			j.Progress(i, 4)
		}
		j.Begin("read back")
		j.Progress(4, 4)
		return &api.Report{Kind: api.KindWrite}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	end := await(t, j)
	if end.State != api.StateSucceeded || end.Progress != 1 || end.Report == nil || end.Owner != 7 {
		t.Errorf("ended as %+v", end)
	}
	last := -1.0
	sawFullWrite := false
	for _, c := range rec.changes {
		if c.Progress < last || c.Progress >= 1 {
			t.Errorf("progress went from %v to %v before the end", last, c.Progress)
		}
		last = c.Progress
		sawFullWrite = sawFullWrite || c.Phase == "write" && c.Bytes == 4
	}
	if !sawFullWrite {
		t.Error("the last figure of the first phase was never told")
	}
}

func TestCancelWaitsForTheWorkToEnd(t *testing.T) {
	r, _ := open(t, t.TempDir(), time.Minute)
	var ended bool
	j, err := r.Start(api.KindWrite, 0, twoPhases, func(ctx context.Context, _ *Job) (*api.Report, error) {
		<-ctx.Done()
		time.Sleep(50 * time.Millisecond)
		ended = true
		return nil, errors.New("signal: killed")
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Cancel(context.Background()); err != nil || !ended {
		t.Errorf("Cancel returned %v while the work had ended: %v", err, ended)
	}
	if s := j.Snapshot(); s.State != api.StateCancelled || s.Error != api.ErrCancelled || !strings.Contains(s.Message, "write") {
		t.Errorf("ended as %+v", s)
	}
}

func TestPanicFailsOneJobOnly(t *testing.T) {
	r, _ := open(t, t.TempDir(), time.Minute)
	j, err := r.Start(api.KindBuild, 0, nil, func(context.Context, *Job) (*api.Report, error) { panic("boom") })
	if err != nil {
		t.Fatal(err)
	}
	if s := await(t, j); s.State != api.StateFailed || !strings.Contains(s.Message, "boom") {
		t.Errorf("ended as %+v", s)
	}
}

func TestTooManyJobsAreRefused(t *testing.T) {
	r, _ := open(t, t.TempDir(), time.Minute)
	block := func(ctx context.Context, _ *Job) (*api.Report, error) { <-ctx.Done(); return nil, ctx.Err() }
	for range MaxRunning {
		if _, err := r.Start(api.KindVM, 0, nil, block); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Start(api.KindVM, 0, nil, block); api.ErrorName(err) != api.ErrBusy {
		t.Errorf("one more job gave %v", err)
	}
}

func TestCrashIsPublishedAsFailed(t *testing.T) {
	dir := t.TempDir()
	dead, _ := open(t, dir, time.Minute)
	started := make(chan struct{})
	j, err := dead.Start(api.KindWrite, 0, twoPhases, func(ctx context.Context, j *Job) (*api.Report, error) {
		j.Begin("write")
		j.Begin("read back")
		close(started)
		<-ctx.Done()
		return nil, ctx.Err()
	})
	if err != nil {
		t.Fatal(err)
	}
	<-started

	// While that daemon lives, its job is not ours to judge.
	other, _ := open(t, dir, time.Minute)
	if _, ok := other.Job(j.ID()); ok {
		t.Error("a living daemon's job was taken over")
	}
	other.Close()

	// A killed daemon's lock is released by the kernel; its file stays.
	if err := dead.lock.Close(); err != nil {
		t.Fatal(err)
	}
	next, _ := open(t, dir, time.Minute)
	found, ok := next.Job(j.ID())
	if !ok {
		t.Fatal("the interrupted job is not published")
	}
	if s := found.Snapshot(); s.State != api.StateFailed || !strings.Contains(s.Message, "interrupted") || !strings.Contains(s.Message, "read back") {
		t.Errorf("published as %+v", s)
	}
	if err := found.Cancel(context.Background()); err != nil {
		t.Errorf("cancelling a job that ended long ago: %v", err)
	}
}

func TestEndedJobStaysForAWhile(t *testing.T) {
	dir := t.TempDir()
	r, rec := open(t, dir, 100*time.Millisecond)
	j, err := r.Start(api.KindBuild, 0, nil, func(context.Context, *Job) (*api.Report, error) { return nil, nil })
	if err != nil {
		t.Fatal(err)
	}
	await(t, j)
	if _, ok := r.Job(j.ID()); !ok {
		t.Error("the job was gone at once")
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, ok := r.Job(j.ID()); !ok {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the job was never forgotten")
		}
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if left, _ := filepath.Glob(filepath.Join(dir, "*.json")); len(left) != 0 || rec.forgotten != 1 || rec.added != 1 || rec.ended != 1 {
		t.Errorf("left %v, events %+v", left, rec)
	}
}

func TestMeterFollowsTheRate(t *testing.T) {
	var m meter
	now := time.Unix(0, 0)
	var got uint64
	for i := range 100 {
		got = m.rate(now.Add(time.Duration(i)*100*time.Millisecond), int64(i)*1000)
	}
	if got < 9900 || got > 10100 {
		t.Errorf("10 kB/s measured as %d B/s", got)
	}
}

// A user's ended jobs are bounded; root's, and who else's, stay their time.
func TestEndedJobsOfAUserAreBounded(t *testing.T) {
	dir := t.TempDir()
	r, _ := open(t, dir, time.Minute)
	for _, uid := range []uint32{0, 7, 8} {
		for range MaxEndedOfUser + 5 {
			j, err := r.Start(api.KindBuild, uid, nil, func(context.Context, *Job) (*api.Report, error) { return nil, errors.New("at once") })
			if err != nil {
				t.Fatal(err)
			}
			await(t, j)
		}
	}
	of := map[uint32]int{}
	for _, j := range r.Jobs() {
		of[j.Owner]++
	}
	// The last to begin came in when as many as are kept had ended.
	if of[0] != MaxEndedOfUser+5 || of[7] != MaxEndedOfUser || of[8] != MaxEndedOfUser {
		t.Errorf("kept: %v", of)
	}
	if files, err := filepath.Glob(filepath.Join(dir, "*.json")); err != nil || len(files) != of[0]+of[7]+of[8] {
		t.Errorf("%d files, %v", len(files), err)
	}
}
