package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/testvm/need"
)

// reportsServer keeps reports on a file system that has access control lists, and
// where all may go.
func reportsServer(t *testing.T) *Server {
	t.Helper()
	need.Root(t)
	state, err := os.MkdirTemp("/var/tmp", "memlinux-reports-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	if err := os.Chmod(state, 0o755); err != nil {
		t.Fatal(err)
	}
	s := &Server{jobs: &jobs.Registry{}}
	s.configuration.Store(&config.Config{StateDir: state})
	return s
}

// One user's jobs push out that user's reports and no others'.
func TestReportsAreKept(t *testing.T) {
	s := reportsServer(t)
	job := func(i int, owner uint32) string { return fmt.Sprintf("20260101_%06d_%06d", i, owner) }
	made := map[uint32]int{0: 55, 5: 70, 8: 3}
	for i := range 70 {
		for owner, n := range made {
			if i >= n {
				continue
			}
			if _, err := s.makeReportDir(job(i, owner), owner); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.dropOldReports()
	for owner, kept := range map[uint32]int{0: 50, 5: 20, 8: 3} {
		for i := range made[owner] {
			_, err := os.Stat(s.reportDir(job(i, owner)))
			if want := i >= made[owner]-kept; want != (err == nil) {
				t.Errorf("report %d of %d of user %d: %v", i, made[owner], owner, err)
			}
		}
	}
}

// What a job leaves can be read by root and by its owner, and by nobody else.
func TestReportsAreTheirOwners(t *testing.T) {
	s := reportsServer(t)
	for _, c := range []struct {
		owner   string
		readers map[string]bool
	}{
		{"games", map[string]bool{"root": true, "games": true, "nobody": false}},
		{"root", map[string]bool{"root": true, "games": false, "nobody": false}},
	} {
		dir, err := s.makeReportDir("job-of-"+c.owner, uint32(uidOf(t, c.owner)))
		if err != nil {
			t.Fatal(err)
		}
		log := filepath.Join(dir, "console.log")
		if err := os.WriteFile(log, []byte("it says"), 0o644); err != nil {
			t.Fatal(err)
		}
		for reader, may := range c.readers {
			asUser(t, uidOf(t, reader), func() {
				_, err := os.ReadFile(log)
				if may != (err == nil) || !may && !errors.Is(err, fs.ErrPermission) {
					t.Errorf("%s reads of %s's job: %v", reader, c.owner, err)
				}
				if reader != "root" {
					if err := os.WriteFile(filepath.Join(dir, "planted"), nil, 0o600); err == nil {
						t.Errorf("%s writes into the folder of %s's job", reader, c.owner)
					}
				}
			})
		}
	}
}
