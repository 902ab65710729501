package daemon

import (
	"os"
	"strings"
	"testing"
)

// What programs look for in the journal is in the manual.
func TestManualHasMessageIDs(t *testing.T) {
	text, err := os.ReadFile("../docs/memlinuxd.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{messageBegan, messagePhase, messageEnded, messageInterrupted} {
		if !strings.Contains(string(text), "`"+id+"`") {
			t.Errorf("docs/memlinuxd.md has no %s", id)
		}
	}
}
