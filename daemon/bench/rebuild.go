package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// recipeText is a recipe with a bit of everything: a program with its shared
// libraries, files and a folder.
const recipeText = `kernel = %q
modules = [%q]
compression = "zstd"
hostname = "bench"

[[program]]
from = "/bin/bash"

[[file]]
from = "version"
to = "/etc/version"

[[file]]
text = "nothing is kept here\n"
to = "/etc/motd"

[[overlay]]
from = "overlay"
to = "/opt/app"
`

// rebuild builds a recipe by the client, as a person does who changes a file of
// it, and once more. Each build starts the client, a bus and a daemon.
func (b bench) rebuild() error {
	if _, err := b.prepare(generic, minimal); err != nil {
		return err
	}
	for _, s := range []struct {
		what  system
		title string
	}{{generic, "Debian's kernel for any PC and all sets of its modules"}, {minimal, "our minimal kernel, from source"}} {
		if err := b.rebuildWith(s.what, s.title); err != nil {
			return err
		}
	}
	return nil
}

func (b bench) rebuildWith(what system, title string) error {
	dir := b.path(string(what))
	overlay := filepath.Join(dir, "overlay", "bin")
	if err := os.MkdirAll(overlay, 0o755); err != nil { //nolint:gosec // as a recipe's folder is
		return err
	}
	cache, err := b.scratchCache("cache-" + string(what))
	if err != nil {
		return err
	}
	kernel, modules := what.kernel()
	recipe, version := filepath.Join(dir, "memlinux.toml"), filepath.Join(dir, "version")
	for path, text := range map[string]string{
		recipe: fmt.Sprintf(recipeText, kernel, modules), version: "0\n", filepath.Join(overlay, "app"): "#!/bin/bash\necho app\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil { //nolint:gosec // as a recipe's files are
			return err
		}
	}
	build := func(name string) *side {
		return &side{name: name, argv: []string{memlinux, "--private", "build", "-r", recipe, "-o", filepath.Join(dir, "out")},
			env: []string{"MEMLINUX_CACHE_DIR=" + cache, "MEMLINUX_STATE_DIR=" + b.path("state")}}
	}
	first, changed, unchanged := build("first, with the kernel in the cache"), build("one file changed"), build("nothing changed")
	count := 0
	changed.before = func() error {
		count++
		return os.WriteFile(version, []byte(strconv.Itoa(count)+"\n"), 0o600)
	}
	if err := first.once(); err != nil {
		return err
	}
	if err := inTurn(rounds, changed, unchanged); err != nil {
		return err
	}
	fmt.Printf("\nmemlinux build -r memlinux.toml: %s\n", title)
	for _, s := range []*side{first, changed, unchanged} {
		fmt.Printf("  %-44s wall %7.3f s   CPU %7.3f s\n", s.name, median(s.wall).Seconds(), median(s.cpu).Seconds())
	}
	figure("one file changed, wall s", "%7.3f", median(changed.wall).Seconds(), 1)
	figure("nothing changed, wall s", "%7.3f", median(unchanged.wall).Seconds(), 0.2)
	return nil
}
