package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/systemd"
)

// life knows whether the daemon has anything to do.
type life struct {
	mu      sync.Mutex
	work    int                 // calls that are not answered and jobs that have not ended
	calls   uint64              // that came in all
	clients map[string]struct{} // connections that called and are still there
	self    string              // our own name on the bus, whose calls do not count
	quiet   time.Time           // when the last work ended
	hurry   bool                // nobody but work is waited for
	changed chan struct{}       // gets a value when there may be nothing to do any more
}

func newLife() *life {
	return &life{clients: map[string]struct{}{}, quiet: time.Now(), changed: make(chan struct{}, 1)}
}

// is says our own name on the bus.
func (l *life) is(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.self = name
}

// arrive counts a call of that connection, until answered is told.
func (l *life) arrive(client string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if client == l.self {
		return
	}
	l.work++
	l.calls++
	l.clients[client] = struct{}{}
}

func (l *life) answered(client string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if client != l.self {
		l.done()
	}
}

// begin counts a job, until end is told.
func (l *life) begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.work++
}

func (l *life) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.done()
}

// done is for who holds l.mu, and so is tell.
func (l *life) done() {
	l.work--
	l.quiet = time.Now()
	l.tell()
}

// gone says that a connection to the bus ended.
func (l *life) gone(client string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.clients[client]; ok {
		delete(l.clients, client)
		l.tell()
	}
}

// hasten says that clients are no reason to stay: another process will answer
// them.
func (l *life) hasten() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hurry = true
	l.tell()
}

func (l *life) tell() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// idle says how long to wait until there has been nothing to do for that long;
// false where that is not to be seen.
func (l *life) idle(period time.Duration) (time.Duration, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.work > 0:
		return 0, false
	case l.hurry:
		return 0, true
	case period == 0 || len(l.clients) > 0:
		return 0, false
	}
	return max(0, period-time.Since(l.quiet)), true
}

// calm is for how long there was no work.
func (l *life) calm() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.work > 0 {
		return 0
	}
	return time.Since(l.quiet)
}

// count is how many calls ever came.
func (l *life) count() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.calls
}

// Option is one of Serve's.
type Option func(*Server)

// AsService makes the daemon a service of systemd: it says how it is, tells each
// job's story in the journal, and leaves when there has been nothing to do for
// the configuration's IdleExit; bus activation brings it back. A value from
// reloads makes it read the configuration anew, by load.
func AsService(load func() (config.Config, error), reloads <-chan os.Signal) Option {
	return func(s *Server) {
		journal := systemd.OpenJournal()
		s.service = &service{load: load, reloads: reloads, journal: journal}
		s.story.journal = &journal
	}
}

// service is what a Server is to systemd.
type service struct {
	load    func() (config.Config, error)
	reloads <-chan os.Signal
	journal systemd.Journal
}

// live does what a service does beside its work, until ctx ends or it has left
// the bus because there was nothing to do. The name is ours.
func (s *Server) live(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	var others sync.WaitGroup
	defer func() { stop(); others.Wait() }()
	others.Go(func() {
		if err := systemd.Watchdog(ctx, s.alive, s.complain); err != nil {
			s.complain(err)
		}
	})
	for {
		var due <-chan time.Time
		if wait, ok := s.life.idle(s.config().IdleExit); ok {
			due = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.service.reloads:
			s.reload()
		case <-s.life.changed:
		case <-due:
			if wait, ok := s.life.idle(s.config().IdleExit); !ok || wait > 0 {
				continue
			}
			return s.leave(ctx)
		}
	}
}

func (s *Server) complain(err error) {
	s.service.journal.Write(systemd.Entry{Message: err.Error(), Priority: systemd.Warning})
}

// alive asks the daemon over the bus, as a client does, for what goes through
// the dispatcher and its locks.
func (s *Server) alive(ctx context.Context) error {
	return s.conn.Object(s.conn.Names()[0], api.ManagerPath).CallWithContext(ctx, api.ManagerInterface+".Jobs", 0, map[string]dbus.Variant{}).Err
}

// reload takes the configuration as it is now. What is in work keeps the old one.
func (s *Server) reload() {
	defer func() {
		if err := systemd.NotifyReady(); err != nil {
			s.complain(err)
		}
	}()
	if err := systemd.NotifyReloading(); err != nil {
		s.complain(err)
	}
	// Replaced by another version: that comes with the next call.
	if program, err := os.Readlink("/proc/self/exe"); err == nil && strings.HasSuffix(program, " (deleted)") {
		s.life.hasten()
	}
	c, err := s.service.load()
	if err != nil {
		s.complain(fmt.Errorf("the configuration stays as it was: %w", err))
		return
	}
	if old := s.config(); c.StateDir != old.StateDir {
		s.complain(errors.New("another state-dir is taken when the service is started anew: systemctl restart memlinuxd"))
		c.StateDir = old.StateDir
	}
	s.configuration.Store(&c)
	s.jobs.Retain(c.JobRetention)
}

// settle is how long it must be quiet before a name is given up that was taken
// back.
const settle = time.Second

// leave gives up the bus name so that no call is lost, and returns when there is
// nothing to do any more.
//
// systemd is told first. It then queues the start for a call that comes when the
// name is free, instead of taking it as done since we still run. What reached us
// before the name was free is in our queue before the bus' answer. If there is
// such, it may have begun a job, so we take the name back, which nobody else can
// have got, and end when that is done.
func (s *Server) leave(ctx context.Context) error {
	before := s.life.count()
	if err := systemd.NotifyStopping(ctx); err != nil {
		return err
	}
	for {
		if _, err := s.conn.ReleaseName(api.BusName); err != nil {
			return fmt.Errorf("give up the name %s: %w", api.BusName, err)
		}
		if s.life.count() == before {
			return nil
		}
		if err := s.own(); err != nil {
			return err
		}
		for quiet := false; !quiet; {
			if err := systemd.NotifyBusy(time.Minute); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(settle / 2):
			}
			quiet = s.life.calm() >= settle
		}
		before = s.life.count()
	}
}
