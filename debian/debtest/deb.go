// Package debtest gives tests memlinux's Debian package.
package debtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// Build makes the package out of the source in the folder source, as make deb
// does, in the folder dir, which it empties, and returns the package's path. Where
// Go's cache has the programs it takes two CPUs six seconds.
func Build(t testing.TB, source, dir string) string {
	t.Helper()
	need.Root(t)
	need.Tool(t, "dpkg-buildpackage", "dpkg-dev")
	need.Tool(t, "dh", "debhelper")
	cmd := exec.CommandContext(t.Context(), need.Tool(t, "make", "make"), "-C", source, "--no-print-directory", "deb", "debdir="+dir)
	// What is on the test's way must not be on the package's: flags of make,
	// this run's GOFLAGS.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return strings.HasPrefix(name, "MAKE") || name == "MFLAGS" || name == "SOURCE_DATE_EPOCH" || name == "VERSION"
	})
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make deb: %v\n%s", err, out)
	}
	found, _ := filepath.Glob(filepath.Join(dir, "memlinux_*.deb")) // the pattern is right
	if len(found) != 1 {
		t.Fatalf("make deb left %q", found)
	}
	return found[0]
}
