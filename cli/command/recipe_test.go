package command

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/daemon/api"
)

func TestInitWritesWhatCheckTakes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "memlinux.toml")
	g := &global{}
	var out bytes.Buffer
	if err := g.initRecipe(&out, path); err != nil || strings.Count(out.String(), "\n") != 1 {
		t.Fatalf("init: %q, %v", out.String(), err)
	}
	out.Reset()
	if err := g.checkRecipe(&out, path); err != nil || out.String() != path+" is right\n" {
		t.Errorf("check: %q, %v", out.String(), err)
	}
	written, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}

	// With all of it in use, only the files are missing that it names.
	if err := os.WriteFile(path, regexp.MustCompile(`(?m)^#([a-z\[])`).ReplaceAll(written, []byte("$1")), 0o600); err != nil {
		t.Fatal(err)
	}
	err = g.checkRecipe(&out, path)
	for l := range strings.Lines(err.Error()) {
		if l = strings.TrimSuffix(l, "\n"); !strings.HasSuffix(l, " does not exist") && !strings.HasSuffix(l, " problems:") {
			t.Errorf("check of all examples: %s", l)
		}
	}

	before, _ := os.ReadFile(path)
	if err := g.initRecipe(&out, path); exitCode(err) != exitRefused {
		t.Errorf("init over a file: %v", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("init changed a file that was there")
	}
}

func TestCheckNamesEveryProblem(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "r.toml")
	for _, name := range []string{"folder", "file"} {
		var err error
		if name == "folder" {
			err = os.Mkdir(filepath.Join(dir, name), 0o700)
		} else {
			err = os.WriteFile(filepath.Join(dir, name), nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name, text string
		want       []string // behind the path, in this order
	}{
		{"files beside the recipe are found", "rootfs = 'folder'\n[[file]]\nfrom = 'file'\nto = '/a'\n[[overlay]]\nfrom = 'folder'", nil},
		{"what is missing has its line", "hostname = '-'\nkernel = 'none'\n[[program]]\nfrom = 'tool'\n",
			[]string{":1: hostname: ", ":2: kernel: " + dir + "/none does not exist", ":4: program.from: " + dir + "/tool does not exist"}},
		{"a folder for a file", "[[file]]\nfrom = 'folder'\nto = '/a'", []string{":2: file.from: " + dir + "/folder is a folder; [[overlay]] takes those"}},
		{"a file for a folder", "[[overlay]]\nfrom = 'file'", []string{":2: overlay.from: " + dir + "/file is no folder"}},
		{"a device", "rootfs = '/dev/null'", []string{":1: rootfs: /dev/null is no regular file"}},
		{"a path is told of once", "rootfs = \"a\\nb\"", []string{":1: rootfs: the path"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			err := (&global{json: true}).checkRecipe(&out, path)
			events := strings.Split(strings.TrimSpace(out.String()), "\n")
			if len(events) != len(c.want)+1 {
				t.Fatalf("events %q", events)
			}
			for i, want := range c.want {
				var e problemEvent
				if jerr := json.Unmarshal([]byte(events[i]), &e); jerr != nil || e.Event != "problem" || !strings.HasPrefix(e.String(), path+want) {
					t.Errorf("got %s, want %s", events[i], want)
				}
				if !strings.Contains("\n"+err.Error(), "\n"+path+want) {
					t.Errorf("%q is not in\n%v", want, err)
				}
			}
			var end finalEvent
			if jerr := json.Unmarshal([]byte(events[len(events)-1]), &end); jerr != nil {
				t.Fatal(jerr)
			}
			switch {
			case len(c.want) == 0 && (err != nil || end.Exit != exitDone || end.State != api.StateSucceeded):
				t.Errorf("%+v, %v", end, err)
			case len(c.want) > 0 && (exitCode(err) != exitUsage || end.Exit != exitUsage || end.State != api.StateFailed || end.Error != api.ErrInvalidRecipe):
				t.Errorf("%+v, %v", end, err)
			}
		})
	}
	if err := (&global{}).checkRecipe(&bytes.Buffer{}, filepath.Join(dir, "no.toml")); exitCode(err) != exitUsage || !strings.Contains(err.Error(), "memlinux recipe init") {
		t.Errorf("no recipe: %v", err)
	}
	if err := (&global{}).checkRecipe(&bytes.Buffer{}, dir); exitCode(err) != exitUsage {
		t.Errorf("a folder as recipe: %v", err)
	}
}
