// Command licences writes debian/copyright with a paragraph more for each Go
// module that a program is linked with, and for Go's standard library: the
// programs hold their code, so the package must hold their licences. What is
// linked, the programs say themselves; the texts come from the modules' source.
package main

import (
	"bytes"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: licences COPYRIGHT PROGRAM...")
		os.Exit(2)
	}
	if err := write(os.Stdout, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "licences: %v\n", err)
		os.Exit(1)
	}
}

// write writes the file own and the paragraphs of what the programs are linked
// with to out (Debian's copyright format 1.0).
func write(out io.Writer, own string, programs []string) error {
	text, err := os.ReadFile(own)
	if err != nil {
		return err
	}
	goVersion, modules, err := linked(programs)
	if err != nil {
		return err
	}
	root, err := output("go", "env", "GOROOT")
	if err != nil {
		return err
	}
	paragraphs := []string{}
	add := func(name, dir string) error {
		p, err := paragraph(name, dir)
		paragraphs = append(paragraphs, p)
		return err
	}
	if err := add("go/"+goVersion, root); err != nil {
		return err
	}
	for _, m := range modules {
		path, _, _ := strings.Cut(m, "@")
		dir, err := output("go", "list", "-m", "-f", "{{.Dir}}", path)
		if err == nil {
			err = add(m, dir)
		}
		if err != nil {
			return err
		}
	}
	last := "License: Apache-2.0\n On Debian systems, the text of the Apache License, version 2.0, is in\n /usr/share/common-licenses/Apache-2.0.\n"
	_, err = fmt.Fprintf(out, "%s\n%s\n%s", text, strings.Join(paragraphs, "\n"), last)
	return err
}

// linked is Go's version and the sorted modules, as PATH@VERSION, that the
// programs are linked with.
func linked(programs []string) (goVersion string, modules []string, err error) {
	for _, p := range programs {
		info, err := buildinfo.ReadFile(p)
		if err != nil {
			return "", nil, err
		}
		goVersion = info.GoVersion
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			modules = append(modules, m.Path+"@"+m.Version)
		}
	}
	slices.Sort(modules)
	return goVersion, slices.Compact(modules), nil
}

// kinds are the licences that are known, by what their text says. A module with
// another one stops the packaging: somebody has to look at it.
var kinds = []struct{ name, says string }{
	{"Apache-2.0", `Apache License,?\s+Version 2\.0`},
	{"BSD-3-clause", `Redistribution and use in source and binary forms[\s\S]*Neither the names? of`},
	{"BSD-3-clause", `Redistribution and use in source and binary forms[\s\S]*names? of (its|any) contributors`},
	{"BSD-2-clause", `Redistribution and use in source and binary forms`},
	{"Unlicense", `This is free and unencumbered software released into the public domain`},
	{"Expat", `Permission is hereby granted, free of charge, to any person`},
}

// apache is the license's whole text, which Debian has in one place.
var apache = regexp.MustCompile(`\s+Apache License\s+Version 2\.0, January 2004[\s\S]*?END OF TERMS AND CONDITIONS`)

// paragraph is the one about the module whose source is in dir.
func paragraph(name, dir string) (string, error) {
	var text, notice []byte
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		kind := strings.ToUpper(e.Name())
		licence := strings.HasPrefix(kind, "LICEN") || strings.HasPrefix(kind, "UNLICENSE") || strings.HasPrefix(kind, "COPYING")
		if e.IsDir() || !licence && !strings.HasPrefix(kind, "NOTICE") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return "", err
		}
		if licence {
			text = append(append(text, b...), '\n')
		} else {
			notice = append(notice, b...)
		}
	}
	var names []string
	for _, k := range kinds {
		if slices.Contains(names, k.name) || k.name == "BSD-2-clause" && slices.Contains(names, "BSD-3-clause") {
			continue
		}
		if regexp.MustCompile(k.says).Match(text) {
			names = append(names, k.name)
		}
	}
	if len(names) == 0 {
		return "", fmt.Errorf("%s has no licence in %s that is known here; look at it, and add it to debian/licences", name, dir)
	}
	// Text in front of an Apache license's head is about who has the rights.
	holders := regexp.MustCompile(`(?im)^[ #*]*copyright\b.*(\d{4}|authors|\(c\)|©).*$`).FindAllString(string(text), -1)
	for i, h := range holders {
		holders[i] = strings.Trim(h, " #*")
	}
	slices.Sort(holders)
	if holders = slices.Compact(holders); len(holders) == 0 || len(names) == 1 && names[0] == "Apache-2.0" {
		path, _, _ := strings.Cut(name, "@")
		holders = []string{"The authors of " + path}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Files: %s/*\nCopyright: %s\n", name, strings.Join(holders, "\n "))
	if len(notice) > 0 {
		fmt.Fprintf(&b, "Comment: Its NOTICE says:\n%s", folded(notice))
	}
	fmt.Fprintf(&b, "License: %s\n", strings.Join(names, " and "))
	if !slices.Equal(names, []string{"Apache-2.0"}) { // that stands once, at the end
		b.WriteString(folded(apache.ReplaceAll(text, []byte("\n(the Apache License, version 2.0: /usr/share/common-licenses/Apache-2.0)\n"))))
	}
	return b.String(), nil
}

// folded is text as the lines that continue a field.
func folded(text []byte) string {
	var b strings.Builder
	for line := range bytes.Lines(bytes.TrimSpace(text)) {
		line = bytes.TrimRight(bytes.ReplaceAll(line, []byte("\t"), []byte("    ")), " \r\n")
		if len(line) == 0 {
			line = []byte(".")
		}
		fmt.Fprintf(&b, " %s\n", line)
	}
	return b.String()
}

func output(argv ...string) (string, error) {
	out, err := exec.Command(argv[0], argv[1:]...).Output() //nolint:gosec // it is go, by argv
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(exit.Stderr))
	}
	return strings.TrimSpace(string(out)), err
}
