package daemon

import (
	"os/exec"
	"strings"
	"testing"
)

// The rooms of the design: the daemon composes them, they don't know each
// other, and the command line knows only the contract.
func TestRoomsDoNotImportEachOther(t *testing.T) {
	const module = "github.com/memlinux/memlinux/"
	out, err := exec.Command("go", "list", "-f", "{{.ImportPath}} {{join .Imports \" \"}}", module+"...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	room := func(pkg string) string {
		name, _, _ := strings.Cut(strings.TrimPrefix(pkg, module), "/")
		return name
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		from := room(words[0])
		seen[from] = true
		for _, to := range words[1:] {
			if !strings.HasPrefix(to, module) || room(to) == from || from == "daemon" {
				continue
			}
			if from == "cli" && (to == module+"daemon/api" || to == module+"daemon/api/recipe") {
				continue
			}
			if (from == "cli" || from == "systemd") && to == module+"daemon/busguard" { // whoever is on the bus
				continue
			}
			if to == module+"testvm/need" && strings.HasSuffix(words[0], "test") { // a package for tests
				continue
			}
			t.Errorf("%s imports %s", words[0], to)
		}
	}
	for _, name := range []string{"bootloader", "cli", "daemon", "imagegen", "media", "systemd", "testvm"} {
		if !seen[name] {
			t.Errorf("the room %s is empty", name)
		}
	}
}
