package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/memlinux/memlinux/daemon/config"
	"github.com/memlinux/memlinux/testvm/need"
)

// What a job leaves can be read by root and by its owner, and by nobody else.
func TestReportsAreTheirOwners(t *testing.T) {
	need.Root(t)
	state, err := os.MkdirTemp("/var/tmp", "memlinux-reports-") // whose file system has access control lists, and all may go there
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	if err := os.Chmod(state, 0o755); err != nil {
		t.Fatal(err)
	}
	s := &Server{}
	s.configuration.Store(&config.Config{StateDir: state})
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
