package daemon

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/busguard"
	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/systemd"
)

// The kinds of entries in the journal (MESSAGE_ID).
const (
	messageBegan       = "adfbf67cc0544b88ba1878b82d8d8a51"
	messagePhase       = "0019eb2e56e84b689f1fc528fff6b535"
	messageEnded       = "cd40d4cc970f43419dbd33397a285d4c"
	messageInterrupted = "d05ce5cfccaa45fa8cc79fbe390dd2ca"
)

// story tells the journal what becomes of each job, and keeps the machine up as
// long as one must not be interrupted. The zero story only does the latter.
type story struct {
	journal *systemd.Journal // nil: nobody listens

	mu    sync.Mutex
	about map[string]*subject // running jobs, by ID
}

// subject is what a job is about.
type subject struct {
	target api.Target
	phase  string // the last that was told
}

// keepsUp is what people are shown as the reason why the machine must not go
// down, for the kinds of jobs that leave something half done.
var keepsUp = map[string]string{
	api.KindWrite:    "a system is being written%s",
	api.KindCapacity: "it is tried how much a disk holds%s",
	api.KindInstall:  "this PC's boot menu is being changed%s",
	api.KindRemove:   "this PC's boot menu is being changed%s",
	api.KindNext:     "this PC's boot menu is being changed%s",
	api.KindRollback: "this PC's boot menu is being changed%s",
}

// began tells of a job's begin. What it returns is for its end.
func (s *story) began(ctx context.Context, j api.Job, target *api.Target) (end func()) {
	about := &subject{}
	if target != nil {
		about.target = *target
	}
	s.mu.Lock()
	if s.about == nil {
		s.about = map[string]*subject{}
	}
	s.about[j.ID] = about
	s.mu.Unlock()
	s.write(messageBegan, systemd.Info, j, "begins"+about.where(" on ")+fmt.Sprintf(", for the user %d", j.Owner))

	why, ok := keepsUp[j.Kind]
	if !ok {
		return func() {}
	}
	release, err := systemd.Inhibit(ctx, busguard.SystemBus(), fmt.Sprintf(why, about.where(" on ")))
	if err != nil {
		s.write("", systemd.Info, j, "does not keep the machine up: "+err.Error())
		return func() {}
	}
	return release
}

// where names the disk, after a word.
func (a *subject) where(word string) string {
	if a.target.Name == "" {
		return ""
	}
	text := word + a.target.Name
	if more := blockdev.Clean(strings.TrimSpace(a.target.Model + " " + a.target.Serial)); more != "" {
		text += " (" + more + ")"
	}
	return text
}

// phase tells of a job's phase once.
func (s *story) phase(j api.Job) {
	s.mu.Lock()
	about := s.about[j.ID]
	news := about != nil && about.phase != j.Phase
	if news {
		about.phase = j.Phase
	}
	s.mu.Unlock()
	if news {
		s.write(messagePhase, systemd.Info, j, "phase "+j.Phase)
	}
}

// ended tells how a job ended.
func (s *story) ended(j api.Job) {
	switch j.State {
	case api.StateSucceeded:
		text := "succeeded"
		if j.Report != nil {
			text += fmt.Sprintf(" in %.1f s", j.Report.Seconds)
		}
		s.write(messageEnded, systemd.Notice, j, text)
	case api.StateCancelled:
		s.write(messageEnded, systemd.Notice, j, j.Message)
	default:
		s.write(messageEnded, systemd.Error, j, "failed: "+j.Message)
	}
	s.mu.Lock()
	delete(s.about, j.ID)
	s.mu.Unlock()
}

// interrupted tells of jobs that another daemon did not bring to an end.
func (s *story) interrupted(jobs []api.Job) {
	for _, j := range jobs {
		s.write(messageInterrupted, systemd.Error, j, "failed: "+j.Message)
	}
}

func (s *story) write(id string, p systemd.Priority, j api.Job, text string) {
	if s.journal == nil {
		return
	}
	var target api.Target
	s.mu.Lock()
	if about := s.about[j.ID]; about != nil {
		target = about.target
	}
	s.mu.Unlock()
	fields := map[string]string{
		"MEMLINUX_JOB":    j.ID,
		"MEMLINUX_KIND":   j.Kind,
		"MEMLINUX_USER":   strconv.FormatUint(uint64(j.Owner), 10),
		"MEMLINUX_DEVICE": target.Name,
		"MEMLINUX_SERIAL": target.Serial,
		"MEMLINUX_PHASE":  j.Phase,
	}
	if j.State != api.StateRunning {
		fields["MEMLINUX_RESULT"] = j.State
	}
	if j.Error != "" {
		fields["MEMLINUX_ERROR"] = j.Error
	}
	s.journal.Write(systemd.Entry{Message: fmt.Sprintf("%s %s: %s", j.Kind, j.ID, text), Priority: p, ID: id, Fields: fields})
}
