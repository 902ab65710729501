package daemon

import (
	"context"
	"testing"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
)

// One user's machines, of whatever kind, leave a place for others'.
func TestOneUserDoesNotHoldAllGuests(t *testing.T) {
	const root, games, mail = 0, 5, 8
	g := newGuests()
	soon, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	enter := func(uid uint32) func() {
		t.Helper()
		ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
		defer stop()
		done, err := g.enter(ctx, uid)
		if err != nil {
			t.Fatal(err)
		}
		return done
	}
	proof := enter(games)
	if _, err := g.enter(soon, games); err == nil {
		t.Fatal("games has both places")
	}
	if _, err := g.enterNow(games); api.ErrorName(err) != api.ErrBusy {
		t.Fatalf("games gets a console besides: %v", err)
	}
	others := enter(mail)
	// The machines of root wait behind those that run, and not behind those that
	// games waits with.
	waiting, cancel := context.WithCancel(t.Context())
	gave := make(chan error)
	go func() {
		_, err := g.enter(waiting, games)
		gave <- err
	}()
	if _, err := g.enterNow(root); api.ErrorName(err) != api.ErrBusy {
		t.Fatalf("a third machine: %v", err)
	}
	others()
	enter(root)()
	cancel()
	if err := <-gave; err == nil {
		t.Fatal("games had two")
	}
	proof()
	// Nothing is lost of what was waited for in vain.
	for range 3 {
		enter(games)()
		enter(root)()
	}
	both := []func(){enter(root), enter(root)}
	if _, err := g.enterNow(mail); api.ErrorName(err) != api.ErrBusy {
		t.Fatalf("mail beside two of root's: %v", err)
	}
	for _, done := range both {
		done()
	}
	enter(mail)()
}
