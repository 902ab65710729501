// Package install changes what memlinux has in this PC's boot menu: it adds an
// entry with its kernel and initramfs, removes one, chooses what boots next,
// and takes the last install back.
//
// The order is what keeps the PC booting. A new entry's files are durable
// before the menu names them; the menu names the entry before anything boots it
// by itself; an entry boots by itself only after it was proven, where that is
// asked for; what an entry replaces goes last. A failure takes all of it back. A
// kill leaves a menu that boots, and the next [Open] takes back what was not
// finished.
package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/google/renameio/v2"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/bootloader/local"
)

// ErrNoEntry says that memlinux has no entry with that ID in the menu.
var ErrNoEntry = errors.New("not an entry of memlinux in this PC's boot menu; memlinux entries lists them")

// ErrNothingToRollBack says that there is no install to take back.
var ErrNothingToRollBack = errors.New("there is nothing to roll back: no install stands since the last rollback, remove or other change of memlinux's entries")

// Session is the boot menu of this PC, locked for us. It must be closed.
type Session struct {
	Boot     *local.Boot
	Warnings []string // what the menu's reader and the recovery had to say

	fs    *bootfs.FS
	lock  *bootfs.Locked
	path  string // of the state
	state state
}

// state is what the menu itself can't tell.
type state struct {
	// Pending is what ours were before an install that is under way.
	Pending *local.Ours `json:"pending,omitempty"`
	// Undo is the last install.
	Undo *undo `json:"undo,omitempty"`
}

type undo struct {
	Before local.Ours `json:"before"`
	After  local.Ours `json:"after"`
}

// Result is what was changed, or would be.
type Result struct {
	Entry    local.Entry
	Ours     local.Ours      // as it is now
	Changes  []bootfs.Change // of the menu's files
	Added    []bootfs.Payload
	Removed  []string // kernels and initramfs files that no entry uses any more
	Warnings []string
}

// Open finds the boot loader, locks the menu against other programs, and takes
// back what a killed run has left. The state is kept in the file at path.
func Open(ctx context.Context, sys local.System, path string) (s *Session, err error) {
	s = &Session{path: path}
	if s.lock, err = bootfs.Lock(ctx, sys.Root); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Close()
			s = nil
		}
	}()
	if s.Boot, err = local.Find(ctx, sys); err != nil {
		return s, err
	}
	if s.fs, err = bootfs.Open(filepath.Dir(s.Boot.Dir)); err != nil {
		return s, err
	}
	if s.state, err = readState(path); err != nil {
		return s, err
	}
	if err := s.fs.Recover(append(s.Boot.Folders(), s.Boot.Dir)...); err != nil {
		return s, fmt.Errorf("clean up after an interrupted run: %w", err)
	}
	if s.state.Pending != nil {
		if err := s.restore(ctx, *s.state.Pending); err != nil {
			return s, fmt.Errorf("take back an interrupted install: %w", err)
		}
		s.Warnings = append(s.Warnings, "an install that was interrupted has been taken back")
	}
	// Also what a kill left of a loader's own small files.
	menu, err := s.Boot.Menu()
	if err != nil {
		return s, err
	}
	var unsupported *local.UnsupportedError
	if err := s.reach(ctx, menu.Ours); err != nil && !errors.As(err, &unsupported) {
		return s, fmt.Errorf("clean up after an interrupted run: %w", err)
	}
	_, err = s.tidy()
	return s, err
}

// Close gives the menu free.
func (s *Session) Close() { s.lock.Unlock() }

func readState(path string) (state, error) {
	var st state
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return st, nil
	}
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(text, &st); err != nil {
		return st, fmt.Errorf("%s can't be read (%w): remove it; only rollback needs it", path, err)
	}
	return st, nil
}

func (s *Session) save() error {
	if s.state == (state{}) {
		if err := os.Remove(s.path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	text, err := json.MarshalIndent(s.state, "", "  ")
	if err != nil {
		return err
	}
	if before, err := os.ReadFile(s.path); err == nil && string(before) == string(text)+"\n" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(s.path), 0o755); err != nil { //nolint:gosec // holds nothing secret
		return err
	}
	return renameio.WriteFile(s.path, append(text, '\n'), 0o600)
}

// Request is an entry to be installed.
type Request struct {
	Entry         local.Entry
	Files         []bootfs.Payload // its kernel and initramfs
	Next, Default bool             // boot it once, or by itself, when it is proven
}

// Preview says what Install would change, and whether this loader can be given
// it at all. It changes nothing and needs no lock.
func Preview(b *local.Boot, r Request) (Result, error) {
	menu, err := b.Menu()
	if err != nil {
		return Result{}, err
	}
	want := wanted(menu.Ours, r)
	res := Result{Entry: r.Entry, Ours: want, Warnings: menu.Warnings}
	if res.Changes, err = b.Plan(want); err != nil {
		return res, err
	}
	for _, f := range r.Files {
		if info, err := os.Stat(filepath.Join(b.Dir, f.Name)); err != nil || info.Size() != f.Size {
			res.Added = append(res.Added, f)
		}
	}
	return res, nil
}

// wanted is what ours shall be with the entry. It takes the place of the one
// with its title.
func wanted(now local.Ours, r Request) local.Ours {
	want := local.Ours{Default: now.Default, Next: now.Next}
	for _, e := range now.Entries {
		if e.ID == r.Entry.ID || e.Title != r.Entry.Title {
			want.Entries = append(want.Entries, e)
			continue
		}
		if want.Default == e.ID {
			want.Default = r.Entry.ID
		}
		if want.Next == e.ID {
			want.Next = r.Entry.ID
		}
	}
	want = with(want, r.Entry)
	if r.Default {
		want.Default = r.Entry.ID
	}
	if r.Next {
		want.Next = r.Entry.ID
	}
	return want
}

// with adds an entry, or gives the one with its ID its values.
func with(o local.Ours, e local.Entry) local.Ours {
	o.Entries = slices.Clone(o.Entries)
	if i := find(o, e.ID); i >= 0 {
		o.Entries[i] = e
	} else {
		o.Entries = append(o.Entries, e)
	}
	return o
}

func without(o local.Ours, id string) local.Ours {
	o.Entries = slices.DeleteFunc(slices.Clone(o.Entries), func(e local.Entry) bool { return e.ID == id })
	return selectable(o)
}

// selectable drops choices of entries that are not there.
func selectable(o local.Ours) local.Ours {
	if find(o, o.Default) < 0 {
		o.Default = ""
	}
	if find(o, o.Next) < 0 {
		o.Next = ""
	}
	return o
}

func find(o local.Ours, id string) int {
	return slices.IndexFunc(o.Entries, func(e local.Entry) bool { return e.ID == id })
}

// Install makes the entry stand in the menu. prove, if not nil, is called when
// all is on the disk and nothing boots the entry by itself yet: its error takes
// the install back, and is returned. What is so already is not done again.
func (s *Session) Install(ctx context.Context, r Request, progress func(done, total int64), prove func(context.Context) error) (Result, error) {
	res, err := Preview(s.Boot, r)
	if err != nil {
		return res, err
	}
	menu, err := s.Boot.Menu()
	if err != nil {
		return res, err
	}
	before := menu.Ours
	s.state.Pending = &before
	if err := s.save(); err != nil {
		return res, fmt.Errorf("remember the menu from before: %w", err)
	}
	err = s.fs.AddPayload(ctx, s.Boot.Dir, r.Files, progress)
	if err == nil {
		err = s.reach(ctx, with(before, r.Entry))
	}
	if err == nil && prove != nil {
		err = prove(ctx)
	}
	if err == nil {
		err = s.reach(ctx, res.Ours)
	}
	if err != nil {
		// Also when ctx has ended.
		if back := s.restore(context.WithoutCancel(ctx), before); back != nil {
			return res, errors.Join(err, fmt.Errorf("and the menu from before could not be restored: %w", back))
		}
		return res, err
	}
	if len(res.Changes) > 0 {
		// As it is read back: a loader has an order of its own.
		if menu, err = s.Boot.Menu(); err != nil {
			return res, err
		}
		s.state.Undo = &undo{Before: before, After: menu.Ours}
	}
	return s.finish(res)
}

// reach makes ours what is wanted.
func (s *Session) reach(ctx context.Context, want local.Ours) error {
	changes, err := s.Boot.Plan(want)
	if err != nil {
		return err
	}
	return s.fs.Apply(ctx, changes)
}

// restore takes back what an install did to the menu and the folder.
func (s *Session) restore(ctx context.Context, before local.Ours) error {
	menu, err := s.Boot.Menu()
	if err != nil {
		return err
	}
	if before.Next != menu.Ours.Next {
		before.Next = "" // it has been used since
	}
	if err := s.reach(ctx, before); err != nil {
		return err
	}
	_, err = s.finish(Result{})
	return err
}

// finish ends a change of the menu.
func (s *Session) finish(res Result) (Result, error) {
	s.state.Pending = nil
	menu, err := s.Boot.Menu()
	if err != nil {
		return res, err
	}
	res.Ours = menu.Ours
	res.Removed, err = s.tidy()
	return res, err
}

// tidy removes the files that no entry uses, nor the last install's way back,
// and remembers what there is to remember.
func (s *Session) tidy() (removed []string, err error) {
	menu, err := s.Boot.Menu()
	if err != nil {
		return nil, err
	}
	used := slices.Clone(menu.Ours.Entries)
	if u := s.state.Undo; u != nil && !slices.Equal(u.After.Entries, menu.Ours.Entries) {
		s.state.Undo = nil // the menu was changed since
	} else if u != nil {
		used = append(used, u.Before.Entries...)
	}
	if removed, err = s.collect(used); err != nil {
		return removed, fmt.Errorf("remove old boot files: %w", err)
	}
	if err := s.save(); err != nil {
		return removed, fmt.Errorf("remember the last install: %w", err)
	}
	return removed, nil
}

// payloadName is what the names of kernels and initramfs files look like.
var payloadName = regexp.MustCompile(`^(vmlinuz-[0-9a-f]{12}|initramfs-[0-9a-f]{12}\.img)$`)

// PayloadNames are the names that kernel and initramfs with these digests (hex)
// get.
func PayloadNames(kernel, initramfs string) (string, string) {
	return "vmlinuz-" + kernel[:12], "initramfs-" + initramfs[:12] + ".img"
}

func (s *Session) collect(used []local.Entry) (removed []string, err error) {
	files, err := os.ReadDir(s.Boot.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		name := f.Name()
		if payloadName.MatchString(name) && !slices.ContainsFunc(used, func(e local.Entry) bool { return e.Kernel == name || e.Initrd == name }) {
			removed = append(removed, filepath.Join(s.Boot.Dir, name))
		}
	}
	if err := s.fs.Remove(removed...); err != nil {
		return nil, err
	}
	return removed, s.fs.RemoveDir(s.Boot.Dir)
}

// change makes ours what is wanted, without a way back.
func (s *Session) change(ctx context.Context, res Result, want local.Ours) (Result, error) {
	var err error
	if res.Changes, err = s.Boot.Plan(want); err != nil {
		return res, err
	}
	if err := s.fs.Apply(ctx, res.Changes); err != nil {
		return res, err
	}
	return s.finish(res)
}

// Remove takes the entry with that ID out of the menu, and its files away.
func (s *Session) Remove(ctx context.Context, id string) (Result, error) {
	res, ours, err := s.entry(id)
	if err != nil {
		return res, err
	}
	s.state.Undo = nil
	return s.change(ctx, res, without(ours, id))
}

// Next makes the next boot, and only that, take the entry with that ID; with ""
// it takes none of ours.
func (s *Session) Next(ctx context.Context, id string) (Result, error) {
	res, ours, err := s.entry(id)
	if err != nil {
		return res, err
	}
	ours.Next = id
	return s.change(ctx, res, ours)
}

func (s *Session) entry(id string) (Result, local.Ours, error) {
	menu, err := s.Boot.Menu()
	if err != nil {
		return Result{}, menu.Ours, err
	}
	res := Result{Warnings: menu.Warnings}
	if id == "" {
		return res, menu.Ours, nil
	}
	i := find(menu.Ours, id)
	if i < 0 {
		return res, menu.Ours, fmt.Errorf("%s is %w", id, ErrNoEntry)
	}
	res.Entry = menu.Ours.Entries[i]
	return res, menu.Ours, nil
}

// Rollback takes the last install back: what it replaced stands again, and
// boots by itself if it did.
func (s *Session) Rollback(ctx context.Context) (Result, error) {
	menu, err := s.Boot.Menu()
	if err != nil {
		return Result{}, err
	}
	u := s.state.Undo // tidy dropped it where the menu was changed since
	if u == nil {
		return Result{}, ErrNothingToRollBack
	}
	want := u.Before
	want.Next = menu.Ours.Next
	for _, e := range want.Entries {
		for _, name := range []string{e.Kernel, e.Initrd} {
			if _, err := os.Stat(filepath.Join(s.Boot.Dir, name)); err != nil {
				return Result{}, fmt.Errorf("%s of the entry %q is gone, so the last install can't be taken back: %w", name, e.Title, err)
			}
		}
	}
	res := Result{Warnings: menu.Warnings}
	if i := slices.IndexFunc(u.After.Entries, func(e local.Entry) bool { return !slices.Contains(want.Entries, e) }); i >= 0 {
		res.Entry = u.After.Entries[i]
	}
	s.state.Undo = nil
	return s.change(ctx, res, selectable(want))
}
