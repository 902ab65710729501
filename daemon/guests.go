package daemon

import (
	"context"
	"fmt"
	"sync"

	"github.com/memlinux/memlinux/daemon/api"
)

// maxGuests is how many virtual machines may run at once: without KVM each
// takes a whole core, and a third on two cores runs into the time limits.
const maxGuests = 2

// maxGuestsOfUser is how many of them are of one user but root, so that others'
// get on.
const maxGuestsOfUser = maxGuests - 1

// maxConsoles leaves a place for proofs, which end by themselves.
const maxConsoles = maxGuests - 1

// places are a number of things that can be had at once. Who waits for one gets
// it in turn.
type places chan struct{}

// guests are the places in which virtual machines run.
type guests struct {
	all places

	mu    sync.Mutex
	users map[uint32]places // of each user but root who ever had one
}

func newGuests() *guests {
	return &guests{all: make(places, maxGuests), users: map[uint32]places{}}
}

// of is what a machine of the user takes one of each of. A user's own come first:
// who waits for them is in nobody else's way.
func (g *guests) of(uid uint32) []places {
	if uid == 0 {
		return []places{g.all}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.users[uid] == nil {
		g.users[uid] = make(places, maxGuestsOfUser)
	}
	return []places{g.users[uid], g.all}
}

func leave(taken []places) {
	for _, p := range taken {
		<-p
	}
}

// enter waits for a place for a machine of the user until ctx ends, whose error
// it then returns. done gives the place back.
func (g *guests) enter(ctx context.Context, uid uint32) (done func(), err error) {
	wanted := g.of(uid)
	for i, p := range wanted {
		select {
		case p <- struct{}{}:
		case <-ctx.Done():
			leave(wanted[:i])
			return nil, ctx.Err()
		}
	}
	return func() { leave(wanted) }, nil
}

// enterNow is enter for a person, who is told why there is no place.
func (g *guests) enterNow(uid uint32) (done func(), err error) {
	wanted := g.of(uid)
	for i, p := range wanted {
		select {
		case p <- struct{}{}:
			continue
		default:
		}
		leave(wanted[:i])
		if i < len(wanted)-1 {
			return nil, &api.Error{Name: api.ErrBusy, Message: "a virtual machine of yours runs already; wait for it to end"}
		}
		return nil, &api.Error{Name: api.ErrBusy, Message: fmt.Sprintf("%d virtual machines run already; wait for one to end", maxGuests)}
	}
	return func() { leave(wanted) }, nil
}
