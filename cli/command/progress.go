package command

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/memlinux/memlinux/daemon/api"
)

// view shows a job as it goes.
type view interface {
	update(api.Job)
	// end is called once, when the job has ended or can't be followed any
	// more; ok tells whether its last phase was finished.
	end(ok bool)
}

// newView picks the view for the output: JSON objects, bars on a terminal,
// lines elsewhere.
func newView(out *os.File, asJSON bool) view {
	return newViews(out, asJSON, "")[0]
}

// newViews are the views of jobs that go on at once, for one output. Where there
// are several, each has a name that is told before its phases.
func newViews(out *os.File, asJSON bool, names ...string) (views []view) {
	bars := !asJSON && term.IsTerminal(int(out.Fd())) && os.Getenv("TERM") != "dumb"
	var all *barViews
	if bars {
		all = &barViews{restore: quietCtrl(out), bars: mpb.New(mpb.WithOutput(out), mpb.WithWidth(64), mpb.WithRefreshRate(100*time.Millisecond))}
		all.open.Store(int32(len(names)))
	}
	encoder := &jsonLines{out: json.NewEncoder(out)}
	for _, name := range names {
		if name != "" {
			name += " "
		}
		switch {
		case asJSON:
			views = append(views, &jsonView{encoder})
		case bars:
			views = append(views, &barView{name: name, all: all})
		default:
			views = append(views, &lineView{name: name, out: out})
		}
	}
	return views
}

// jsonLines keeps the objects of several jobs apart.
type jsonLines struct {
	mu  sync.Mutex
	out *json.Encoder
}

func (l *jsonLines) encode(v any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.out.Encode(v) // the reader is gone if this fails
}

// barViews is the one terminal of all bars.
type barViews struct {
	restore func()
	bars    *mpb.Progress
	open    atomic.Int32 // how many views have not ended
}

// jsonView prints each change as an object on a line.
type jsonView struct{ out *jsonLines }

type progressEvent struct {
	Event    string  `json:"event"`
	Job      string  `json:"job"`
	Phase    string  `json:"phase"`
	Progress float64 `json:"progress"`
	Bytes    uint64  `json:"bytes"`
	Total    uint64  `json:"total"`
	Rate     uint64  `json:"rate"`
	Unit     string  `json:"unit"`
}

func (v *jsonView) update(j api.Job) {
	if j.State == api.StateRunning && j.Phase != "" {
		v.out.encode(progressEvent{"progress", j.ID, j.Phase, j.Progress, j.Bytes, j.Total, j.Rate, j.Unit})
	}
}

func (v *jsonView) end(bool) {}

// phaseClock tells the views when a phase begins.
type phaseClock struct {
	job   api.Job
	begun time.Time
}

// enter reports whether j is in another phase than before.
func (c *phaseClock) enter(j api.Job) bool {
	if j.Phase == c.job.Phase {
		return false
	}
	c.begun = time.Now()
	return true
}

// lineView prints a line when a phase has ended.
type lineView struct {
	name string
	out  io.Writer
	phaseClock
}

func (v *lineView) update(j api.Job) {
	if v.job.Phase != "" && j.Phase != v.job.Phase {
		v.print("")
	}
	v.enter(j)
	v.job = j
}

func (v *lineView) print(outcome string) {
	took := time.Since(v.begun)
	if v.job.Bytes == 0 {
		fmt.Fprintf(v.out, "%s%s:%s %s\n", v.name, v.job.Phase, outcome, seconds(took))
		return
	}
	fmt.Fprintf(v.out, "%s%s:%s %s in %s%s\n", v.name, v.job.Phase, outcome, amount(v.job, v.job.Bytes), seconds(took), average(v.job, took, " (%s)"))
}

func (v *lineView) end(ok bool) {
	switch {
	case v.job.Phase == "":
	case ok:
		v.print("")
	default:
		v.print(" stopped after")
	}
}

// quietCtrl stops the terminal from showing Ctrl-C as ^C: the bars are drawn from
// the column that the cursor is in. What it returns puts that back.
func quietCtrl(out *os.File) (restore func()) {
	fd := int(out.Fd())
	was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return func() {}
	}
	quiet := *was
	quiet.Lflag &^= unix.ECHOCTL
	if unix.IoctlSetTermios(fd, unix.TCSETS, &quiet) != nil {
		return func() {}
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, was) } // the terminal is gone if this fails
}

// barView draws a bar for each phase.
type barView struct {
	name string
	all  *barViews
	bar  *mpb.Bar
	now  *shown
	phaseClock
}

// shown is what a bar's decorators show; the drawing goroutine reads it.
type shown struct {
	job     chan api.Job // holds the latest state
	begun   time.Time
	ended   time.Duration
	ending  chan struct{}
	failing bool
}

func (s *shown) text(decor.Statistics) string {
	j := <-s.job
	s.job <- j
	took := time.Since(s.begun)
	done := false
	select {
	case <-s.ending:
		took, done = s.ended, true
	default:
	}
	switch {
	case s.failing && done:
		return "stopped after " + seconds(took)
	case j.Bytes == 0:
		return seconds(took)
	case done || j.Total == 0:
		return amount(j, j.Bytes) + average(j, took, "  %s") + "  " + seconds(took)
	case j.Rate == 0:
		return of(j)
	}
	left := time.Duration(float64(j.Total-min(j.Bytes, j.Total)) / float64(j.Rate) * float64(time.Second))
	return fmt.Sprintf("%s  %s  %s left", of(j), rate(j, float64(j.Rate)), seconds(left))
}

func (v *barView) update(j api.Job) {
	if j.Phase == "" {
		return
	}
	if v.enter(j) {
		v.finish(true)
		v.now = &shown{job: make(chan api.Job, 1), begun: v.begun, ending: make(chan struct{})}
		v.now.job <- j
		v.bar = v.all.bars.New(0, mpb.BarStyle(),
			mpb.PrependDecorators(decor.Name(v.name+j.Phase, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.Any(v.now.text, decor.WCSyncSpaceR)))
	}
	v.job = j
	<-v.now.job
	v.now.job <- j
	if j.Total > 0 {
		v.bar.SetTotal(int64(j.Total), false)
		v.bar.SetCurrent(int64(j.Bytes))
	}
}

// finish completes the bar of the phase that has ended.
func (v *barView) finish(ok bool) {
	if v.bar == nil {
		return
	}
	v.now.ended, v.now.failing = time.Since(v.now.begun), !ok
	close(v.now.ending)
	if ok {
		if v.job.Total == 0 { // a phase without bytes: full when it is done
			v.bar.SetTotal(1, false)
			v.bar.SetCurrent(1)
		}
		v.bar.SetTotal(-1, true)
	} else {
		v.bar.Abort(false)
	}
	v.bar.Wait()
	v.bar = nil
}

func (v *barView) end(ok bool) {
	v.finish(ok)
	if v.all.open.Add(-1) == 0 {
		v.all.bars.Wait()
		v.all.restore()
	}
}

func size[T int64 | uint64](n T) string { return humanize.IBytes(uint64(n)) }

// amount is n in what the job's progress counts.
func amount(j api.Job, n uint64) string {
	if j.Unit == api.UnitObjects {
		return plural(int(n), "object")
	}
	return size(n)
}

// of is how much of how much is done.
func of(j api.Job) string {
	if j.Unit == api.UnitObjects {
		return fmt.Sprintf("%d of %s", j.Bytes, amount(j, j.Total))
	}
	return amount(j, j.Bytes) + " of " + amount(j, j.Total)
}

// average is the rate of the whole phase in that format, or nothing where it took
// too little time to tell.
func average(j api.Job, took time.Duration, format string) string {
	if took < 50*time.Millisecond {
		return ""
	}
	return fmt.Sprintf(format, rate(j, float64(j.Bytes)/took.Seconds()))
}

func rate(j api.Job, perSecond float64) string {
	if j.Unit == api.UnitObjects {
		return fmt.Sprintf("%.0f/s", perSecond)
	}
	return size(uint64(perSecond)) + "/s"
}

func seconds(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}
