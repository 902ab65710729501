package cache

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Store, content string) File {
	t.Helper()
	st, err := s.Stage()
	if err != nil {
		t.Fatal(err)
	}
	defer st.Discard()
	if err := st.Fill(t.Context(), strings.NewReader(content), nil); err != nil {
		t.Fatal(err)
	}
	f, err := st.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func leftovers(t *testing.T, s *Store) int {
	t.Helper()
	tmp, err := os.ReadDir(filepath.Join(s.dir, "tmp"))
	if err != nil {
		t.Fatal(err)
	}
	return len(tmp)
}

func TestStoreKeepsFilesByContent(t *testing.T) {
	s := open(t)
	a := put(t, s, "abc")
	if a.Size != 3 || a.SHA256 != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" {
		t.Errorf("%+v", a)
	}
	if b := put(t, s, "abc"); b != a {
		t.Errorf("the same bytes again: %+v, not %+v", b, a)
	}
	if got, err := s.Lookup(t.Context(), a.SHA256); err != nil || got != a {
		t.Errorf("%+v, %v", got, err)
	}
	if n := leftovers(t, s); n != 0 {
		t.Errorf("%d files stay in tmp", n)
	}
}

// A system holds what its author may read and others may not.
func TestStoreIsItsOwnersAlone(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"files", "records"} { // an older version's
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Open(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := put(t, s, "secret")
	if err := s.SetRecord("r", f); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fs.FileMode{f.Path: 0o600, filepath.Dir(f.Path): fs.ModeDir | 0o700,
		s.record("r"): 0o600, filepath.Dir(s.record("r")): fs.ModeDir | 0o700, filepath.Join(dir, "tmp"): fs.ModeDir | 0o711} {
		if st, err := os.Stat(path); err != nil || st.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", path, st.Mode(), err, want)
		}
	}
}

func TestStoreHealsDamage(t *testing.T) {
	s := open(t)
	a := put(t, s, "abc")
	if err := os.WriteFile(a.Path, []byte("abd"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Lookup(t.Context(), a.SHA256); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a damaged file: %v", err)
	}
	put(t, s, "abc")
	if _, err := s.Lookup(t.Context(), a.SHA256); err != nil {
		t.Errorf("after putting it again: %v", err)
	}
}

func TestLookupRefusesPaths(t *testing.T) {
	for _, name := range []string{"", "..", "../../etc/passwd", strings.Repeat("g", 64)} {
		if _, err := open(t).Lookup(t.Context(), name); err == nil {
			t.Errorf("%q was looked up", name)
		}
	}
}

func TestDiscardAndCancelLeaveNothing(t *testing.T) {
	s := open(t)
	st, err := s.Stage()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := st.Fill(ctx, strings.NewReader("abc"), nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	st.Discard()
	st.Discard()
	if _, err := st.Commit(t.Context()); err == nil {
		t.Error("committed after Discard")
	}
	if n := leftovers(t, s); n != 0 {
		t.Errorf("%d files stay in tmp", n)
	}
}

// What a killed process left goes away, but not under a living one.
func TestOpenRemovesOldLeftovers(t *testing.T) {
	s := open(t)
	for name, age := range map[string]time.Duration{"old": 25 * time.Hour, "new": time.Hour} {
		path := filepath.Join(s.dir, "tmp", name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(s.dir, 0); err != nil {
		t.Fatal(err)
	}
	if n := leftovers(t, s); n != 1 {
		t.Errorf("%d files in tmp, want the new one", n)
	}
}

func TestTwoWritersOfOneFile(t *testing.T) {
	s := open(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			other, err := Open(s.dir, 0)
			if err != nil {
				t.Error(err)
				return
			}
			st, err := other.Stage()
			if err != nil {
				t.Error(err)
				return
			}
			defer st.Discard()
			if err := st.Fill(t.Context(), strings.NewReader(strings.Repeat("abc", 1<<16)), nil); err != nil {
				t.Error(err)
			}
			f, err := st.Commit(t.Context())
			if err != nil {
				t.Error(err)
			}
			if _, err := s.Lookup(t.Context(), f.SHA256); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestRecord(t *testing.T) {
	s := open(t)
	var got map[string]int
	if err := s.Record("r", &got); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing record: %v", err)
	}
	if err := s.SetRecord("r", map[string]int{"a": 1}); err != nil {
		t.Fatal(err)
	}
	if err := s.Record("r", &got); err != nil || got["a"] != 1 {
		t.Errorf("%v, %v", got, err)
	}
}

func TestLockIsExclusiveAndCancellable(t *testing.T) {
	s := open(t)
	unlock, err := s.Lock(t.Context(), "l")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Lock(ctx, "l"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the second holder: %v", err)
	}
	unlock()
	again, err := s.Lock(t.Context(), "l")
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func TestOpenReadsNothing(t *testing.T) {
	s := open(t)
	st, err := s.Stage()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	f, err := st.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	in, err := s.Open(f.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	in.Close()
	if err := os.Remove(f.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(f.SHA256); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	if _, err := s.Open("../records"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a name that is no digest: %v", err)
	}
}
