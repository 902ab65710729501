package collect

import (
	"bytes"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/memlinux/memlinux/cli/collect/elfdeps"
)

// shebangSize is how much of a script the kernel reads for its first line
// (BINPRM_BUF_SIZE), and maxScripts how often an interpreter may be a script.
const (
	shebangSize = 256
	maxScripts  = 4
)

// Shebang reads the first line of a script, of which start is the beginning, as the
// kernel does (execve(2)): the interpreter, and all that follows as one argument.
func Shebang(start []byte) (interpreter, argument string, ok bool) {
	start, ok = bytes.CutPrefix(start[:min(len(start), shebangSize)], []byte("#!"))
	if !ok {
		return "", "", false
	}
	line, _, whole := bytes.Cut(start, []byte("\n"))
	if end := bytes.IndexByte(line, 0); end >= 0 {
		line, whole = line[:end], true
	}
	text := strings.Trim(string(line), " \t")
	interpreter = text
	if end := strings.IndexAny(text, " \t"); end >= 0 {
		interpreter, argument = text[:end], strings.Trim(text[end:], " \t")
	} else if !whole && len(start) == shebangSize-2 && !strings.ContainsAny(string(line[len(line)-1:]), " \t") {
		return "", "", false // cut off within its name
	}
	return interpreter, argument, interpreter != ""
}

// shebangOf reads the first line of the script at host.
func shebangOf(host string) (interpreter, argument string, ok bool) {
	f, err := os.OpenFile(host, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return "", "", false
	}
	defer f.Close()
	b := make([]byte, shebangSize)
	n, _ := io.ReadFull(f, b) // a shorter one ends in an error
	return Shebang(b[:n])
}

// searchPath is PATH in the system, from which env starts what it is asked to.
var searchPath = []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// ofBusybox are the interpreters that the system's busybox is, at the paths where
// it is them.
var ofBusybox = []string{"/bin/sh", "/bin/ash", "/bin/sed", "/usr/bin/awk", "/usr/bin/env"}

// envProgram is the program that env starts by an argument of a first line: the
// first word that is neither an option nor a variable.
func envProgram(argument string) string {
	for word := range strings.FieldsSeq(argument) {
		if !strings.HasPrefix(word, "-") && !strings.Contains(word, "=") {
			return word
		}
	}
	return ""
}

// script brings what a script is run by.
func (c *collector) script(p program, depth int) {
	interpreter, argument, ok := shebangOf(p.Host)
	switch {
	case !ok:
		c.problem("%s: %v", p.source, changed(p.Host))
		return
	case depth >= maxScripts:
		c.problem("%s: the interpreter of %s is a script again and again, and Linux follows %d", p.source, p.name, maxScripts)
		return
	case !path.IsAbs(interpreter):
		c.problem("%s: the interpreter of %s, %q, is no absolute path", p.source, p.name, interpreter)
		return
	}
	at := path.Clean(interpreter)
	if at == "/usr/bin/env" || at == "/bin/env" {
		c.byEnv(p, argument, depth)
	}
	if slices.Contains(ofBusybox, at) {
		return
	}
	c.interpreter(p, at, depth)
}

// byEnv brings the program that env finds in the system by its name.
func (c *collector) byEnv(p program, argument string, depth int) {
	if strings.HasPrefix(argument, "-S") {
		c.note("%s is run by env -S, which busybox's env does not have: bring another one by a [[program]]", p.name)
	}
	name := envProgram(strings.TrimPrefix(argument, "-S"))
	if path.IsAbs(name) {
		c.interpreter(p, path.Clean(name), depth)
		return
	}
	if name == "" || strings.Contains(name, "/") {
		c.problem("%s: %s is run by env, which is told no program that it could find", p.source, p.name)
		return
	}
	for _, dir := range searchPath {
		at := dir + "/" + name
		if _, ok := c.file(at); ok || slices.Contains(ofBusybox, at) {
			return
		}
	}
	for _, dir := range searchPath {
		at := dir + "/" + name
		if info, err := os.Stat(at); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			c.interpreter(p, at, depth)
			return
		}
	}
	c.problem("%s: %s, by which %s is run, is in none of %s: install it, or bring it by a [[program]]", p.source, name, p.name, strings.Join(searchPath, ", "))
}

// interpreter brings the program at an absolute path, unless the recipe does.
func (c *collector) interpreter(p program, at string, depth int) {
	if _, ok := c.file(at); ok {
		return
	}
	o := origin{why: "interpreter of " + p.name, source: p.source + " (" + at + ", the interpreter of " + p.name + ")", with: p.name, as: "interpreter"}
	if _, err := os.Stat(at); err != nil {
		c.problem("%s: %s, the interpreter of %s, is nowhere: install it, or bring it by a [[program]]", p.source, at, p.name)
		return
	}
	if found, ok := c.bring(elfdeps.Place{Host: at, Target: at}, nil, o, p.source); ok {
		c.needs(found, depth+1)
	}
}
