package cache

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestTrimTakesWhatWasUsedLongestAgo(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	var shas []string
	for i, content := range []string{"a", "b", "c"} {
		st, err := s.Stage()
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Fill(t.Context(), strings.NewReader(strings.Repeat(content, 1000)), nil); err != nil {
			t.Fatal(err)
		}
		f, err := st.Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		shas = append(shas, f.SHA256)
		then := time.Now().Add(time.Duration(i-10) * time.Hour)
		if err := os.Chtimes(f.Path, then, then); err != nil {
			t.Fatal(err)
		}
	}
	has := func(sha string) bool {
		_, err := os.Stat(filepath.Join(dir, "files", sha))
		return err == nil
	}
	if _, err := s.Lookup(t.Context(), shas[0]); err != nil { // the oldest is used
		t.Fatal(err)
	}
	done, err := Use(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := Trim(dir, 0, 0); err != nil || !has(shas[1]) {
		t.Errorf("while it is used: %v", err)
	}
	done()
	if err := Trim(dir, 2500, 0); err != nil || !has(shas[0]) || has(shas[1]) || !has(shas[2]) {
		t.Errorf("Trim: %v; kept %v %v %v", err, has(shas[0]), has(shas[1]), has(shas[2]))
	}
	if err := Trim(filepath.Join(dir, "none"), 1, 1); err != nil {
		t.Errorf("where there is no cache yet: %v", err)
	}
}

// Of a user who fills the cache goes what is above their share, and nothing of
// others; what is of two counts in the share of who brought it.
func TestTrimHoldsUsersToTheirShare(t *testing.T) {
	dir := t.TempDir()
	at := time.Now().Add(-time.Hour)
	bring := func(owner uint32, content string) string {
		t.Helper()
		s, err := Open(dir, owner)
		if err != nil {
			t.Fatal(err)
		}
		f := put(t, s, strings.Repeat(content, 1000))
		at = at.Add(time.Minute)
		if err := os.Chtimes(f.Path, at, at); err != nil {
			t.Fatal(err)
		}
		return f.SHA256
	}
	root, other := bring(0, "root"), bring(33, "other")
	var flood []string
	for _, content := range []string{"a", "b", "c", "d"} {
		flood = append(flood, bring(1000, content))
	}
	bring(1000, "root")
	has := func(sha string) bool {
		_, err := os.Stat(filepath.Join(dir, "files", sha))
		return err == nil
	}
	if err := Trim(dir, 1<<30, 5000); err != nil || !has(flood[0]) {
		t.Errorf("%v; below the share a file went", err)
	}
	if err := Trim(dir, 1<<30, 2500); err != nil || has(flood[0]) || has(flood[1]) || !has(flood[2]) || !has(flood[3]) || !has(root) {
		t.Errorf("%v; the wrong files went", err)
	}
	if has(other) {
		t.Error("of another user, who had 5000 bytes, nothing went")
	}
	// What ages away elsewhere leaves no note for long.
	if err := os.Remove(filepath.Join(dir, "files", flood[2])); err != nil {
		t.Fatal(err)
	}
	if err := Trim(dir, 1<<30, 2500); err != nil {
		t.Fatal(err)
	}
	if notes, err := os.ReadDir(filepath.Join(dir, "owners")); err != nil || len(notes) != 1 || notes[0].Name() != flood[3]+".1000" {
		t.Errorf("the notes are %v, %v", notes, err)
	}
}

func TestRoom(t *testing.T) {
	s, err := Open(t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Room(0); err != nil {
		t.Skipf("the disk is full: %v", err)
	}
	if err := s.Room(1 << 60); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("an EiB: %v", err)
	}
}
