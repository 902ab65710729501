// Command manual writes what the commands' own descriptions say as manual pages
// and shell completions into a folder, and the manual pages of docs/. It runs in
// the source's top folder as memlinux is packaged.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/cli/command"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: manual DIR")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintf(os.Stderr, "manual: %v\n", err)
		os.Exit(1)
	}
}

// pages are the manual pages that are written by hand.
var pages = []page{
	{file: "docs/recipe.md", name: "memlinux-recipe", section: 5, manual: "File formats", is: "what goes into a system of memlinux"},
	{file: "docs/config.md", name: "memlinux.toml", section: 5, manual: "File formats", is: "the configuration of memlinuxd"},
	{file: "docs/memlinuxd.md", name: "memlinuxd", section: 8, manual: "System administration", is: "the service behind memlinux"},
}

// write writes man/NAME.SECTION, and bash/NAME, zsh/_NAME and fish/NAME.fish.
func write(dir string) error {
	for _, sub := range []string{"man", "bash", "zsh", "fish"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil { //nolint:gosec // they are for all to read
			return err
		}
	}
	put := func(name string, content []byte) error {
		return os.WriteFile(filepath.Join(dir, name), content, 0o644) //nolint:gosec // they are for all to read
	}
	for _, p := range pages {
		text, err := os.ReadFile(p.file)
		if err != nil {
			return err
		}
		if err := put(fmt.Sprintf("man/%s.%d", p.name, p.section), p.render(string(text))); err != nil {
			return err
		}
	}
	for _, c := range command.Trees() {
		if err := putCommand(put, c); err != nil {
			return err
		}
		name := c.Name()
		// A cobra command writes each for the program that it is the root of.
		if err := errors.Join(
			c.GenBashCompletionFileV2(filepath.Join(dir, "bash", name), true),
			c.GenZshCompletionFile(filepath.Join(dir, "zsh", "_"+name)),
			c.GenFishCompletionFile(filepath.Join(dir, "fish", name+".fish"), true)); err != nil {
			return err
		}
	}
	return nil
}

// putCommand writes the page of c and of each command below it.
func putCommand(put func(string, []byte) error, c *cobra.Command) error {
	// memlinux write and memlinux-write are one page, under one name.
	if c.CommandPath() != "memlinux write" {
		if err := put("man/"+pageName(c)+".1", commandPage(c)); err != nil {
			return err
		}
	}
	for _, sub := range c.Commands() {
		if !sub.IsAvailableCommand() || sub.Name() == "help" || sub.Name() == "completion" {
			continue
		}
		if err := putCommand(put, sub); err != nil {
			return err
		}
	}
	return nil
}
