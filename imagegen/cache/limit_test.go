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
	s, err := Open(dir)
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
	if err := Trim(dir, 0); err != nil || !has(shas[1]) {
		t.Errorf("while it is used: %v", err)
	}
	done()
	if err := Trim(dir, 2500); err != nil || !has(shas[0]) || has(shas[1]) || !has(shas[2]) {
		t.Errorf("Trim: %v; kept %v %v %v", err, has(shas[0]), has(shas[1]), has(shas[2]))
	}
	if err := Trim(filepath.Join(dir, "none"), 1); err != nil {
		t.Errorf("where there is no cache yet: %v", err)
	}
}

func TestRoom(t *testing.T) {
	s, err := Open(t.TempDir())
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
