package systemd

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// laidDown is the unit as make install lays it down.
func laidDown(t *testing.T, name, libexecdir string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, bytes.ReplaceAll(text, []byte("@libexecdir@"), []byte(libexecdir)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// What an attacker could do who has taken memlinuxd over stays little: systemd's
// own judgement, from 0 (safe) to 10.
func TestExposureOfTheDaemon(t *testing.T) {
	analyze := need.Tool(t, "systemd-analyze", "systemd")
	const most = 2.0
	out, err := exec.Command(analyze, "security", "--no-pager", "--offline=true", fmt.Sprintf("--threshold=%.0f", most*10), laidDown(t, "memlinuxd.service", "/usr/libexec")).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if found := regexp.MustCompile(`exposure level for memlinuxd.service: (\S+)`).FindSubmatch(out); found == nil {
		t.Errorf("systemd-analyze says\n%s", out)
	} else {
		t.Logf("the exposure is %s, and %.1f is the most", found[1], most)
	}
}

// systemd knows every directive, as it is in Debian 12.
func TestUnitIsUnderstood(t *testing.T) {
	analyze := need.Tool(t, "systemd-analyze", "systemd")
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "memlinuxd"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(analyze, "verify", "--man=no", "--recursive-errors=no", laidDown(t, "memlinuxd.service", bin)).CombinedOutput()
	if text := strings.TrimSpace(string(out)); err != nil || text != "" {
		t.Errorf("%v: %s", err, text)
	}
}
