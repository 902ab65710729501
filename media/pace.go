package media

import "time"

const (
	// mostInFlight writes keep a device's queue full; more only make a cancel
	// wait longer.
	mostInFlight = 8

	// firstInFlight writes show how fast the device is.
	firstInFlight = 2

	// A write that takes slowWrite waits behind others or the device is busy
	// with itself. One in quickWrite is what a device in good order needs.
	slowWrite  = 2 * time.Second
	quickWrite = 500 * time.Millisecond

	// quickInRow quick writes in a row show that the device bears one more.
	quickInRow = 16
)

// pace says how many writes may be in flight. It begins with firstInFlight and
// adds one for each quick write, halves them when the device needs seconds for one, and then
// adds one only after a run of quick ones: what is in flight is what a cancel has to
// wait for.
type pace struct {
	limit   int
	quick   int       // quick writes in a row
	slowed  bool      // the device was slow once
	changed time.Time // when the limit was halved: what began before tells nothing about it
}

func newPace() pace { return pace{limit: firstInFlight} }

// wrote tells of a write that went from began to ended.
func (p *pace) wrote(began, ended time.Time) {
	switch took := ended.Sub(began); {
	case took >= slowWrite:
		p.quick, p.slowed = 0, true
		if p.limit > 1 && !began.Before(p.changed) {
			p.limit /= 2
			p.changed = ended
		}
	case took >= quickWrite:
		p.quick = 0
	default:
		if p.quick++; p.limit < mostInFlight && (!p.slowed || p.quick >= quickInRow) {
			p.limit++
			p.quick = 0
		}
	}
}

const (
	// missesInRow chunks that differ make it likely that all do.
	missesInRow = 4

	// mostSkipped bounds how many chunks are written unseen before the next is
	// looked at.
	mostSkipped = 64
)

// delta says which chunks are compared with the disk before they are written.
// All are, until missesInRow in a row differ; then one in 2, in 4, and so on up
// to one in mostSkipped, so that a disk with other content costs next to
// nothing. A chunk that is there already brings full comparing back.
type delta struct {
	misses int // in a row
	gap    int // chunks between two that are compared
	wait   int // chunks until the next one that is
}

// next tells whether to compare the next chunk.
func (d *delta) next() bool {
	if d.wait > 0 {
		d.wait--
		return false
	}
	d.wait = d.gap
	return true
}

// saw tells of a chunk that was compared.
func (d *delta) saw(same bool) {
	if same {
		*d = delta{}
		return
	}
	if d.misses++; d.misses >= missesInRow {
		d.gap = min(2*d.gap+1, mostSkipped-1)
		d.wait = max(d.wait, d.gap)
	}
}

const (
	leastFlushGap = 300 * time.Millisecond
	flushShare    = 10 // flushing takes at most one part in so many of the time
)

// flushGap is how long to write after a flush that took so long: progress
// counts what is flushed, so flushes must be frequent, and yet cost little.
func flushGap(took time.Duration) time.Duration { return max(leastFlushGap, (flushShare-1)*took) }
