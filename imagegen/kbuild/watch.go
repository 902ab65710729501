package kbuild

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// How much of a failed build's log an error shows, in lines.
const (
	firstErrors = 6
	tailLines   = 12
)

// maxLine is how much of a line of output is looked at, in bytes.
const maxLine = 1 << 10

// watcher is what make writes to: it passes all on to a log, counts the
// finished objects, and keeps what tells why a build failed.
type watcher struct {
	log     io.Writer
	report  func(done, total int64) // nil if nobody counts
	total   int                     // estimate
	line    []byte                  // so far, without the end of long ones
	objects int
	errors  []string
	tail    []string
}

// objectLine is make's short line of an object that is being made
// (scripts/Kbuild.include): "  CC [M]  drivers/net/tun.o". Programs of the build
// itself, such as objtool, count too.
var objectLine = regexp.MustCompile(`^ {2}[A-Z]+[A-Z0-9_]* (?:\[M\])? *\S+\.o$`)

// errorLine is a line of make, a compiler, the linker or Kconfig that says what
// is wrong.
var errorLine = regexp.MustCompile(`error:|Error:|\*\*\*|undefined reference|No such file|not found|No rule to make|No space left|Killed|internal compiler error`)

func (w *watcher) Write(p []byte) (int, error) {
	if n, err := w.log.Write(p); err != nil {
		return n, err
	}
	for rest := p; len(rest) > 0; {
		part, after, ended := bytes.Cut(rest, []byte("\n"))
		w.line = append(w.line, part[:min(len(part), max(0, maxLine-len(w.line)))]...)
		if ended {
			w.take(string(w.line))
			w.line = w.line[:0]
		}
		rest = after
	}
	return len(p), nil
}

func (w *watcher) take(line string) {
	line = strings.ToValidUTF8(strings.TrimRight(line, " \t\r"), "?")
	if line == "" {
		return
	}
	if objectLine.MatchString(line) {
		w.objects++
		if w.report != nil {
			done := int64(w.objects)
			w.report(done, ahead(done, int64(w.total)))
		}
	}
	if w.tail = append(w.tail, line); len(w.tail) > tailLines {
		w.tail = w.tail[1:]
	}
	if len(w.errors) < firstErrors && errorLine.MatchString(line) {
		w.errors = append(w.errors, line)
	}
}

// ahead is the total to show with done objects: the estimate, and where that
// was too low always some more than is done.
func ahead(done, estimate int64) int64 {
	return max(estimate, done+done/50+1)
}

// lines are what tells why make failed: the first errors and the log's end.
func (w *watcher) lines() []string {
	if len(w.line) > 0 {
		w.take(string(w.line))
		w.line = nil
	}
	var out []string
	for _, e := range w.errors {
		if !slices.Contains(w.tail, e) {
			out = append(out, e)
		}
	}
	if len(out) > 0 {
		out = append(out, "[...]")
	}
	return append(out, w.tail...)
}

// BuildError is a build that make gave up.
type BuildError struct {
	Step  string   // what was done: "compile Linux 6.1.192"
	Lines []string // of the log: the first errors and its end, at most 20
	Log   string   // path of the whole log
	Err   error    // how make ended
}

// Error is a sentence that ends with a colon, and the lines below it.
func (e *BuildError) Error() string {
	return fmt.Sprintf("%s: %v; the log says:\n  %s", e.Step, e.Err, strings.Join(e.Lines, "\n  "))
}

// Unwrap is how make ended.
func (e *BuildError) Unwrap() error { return e.Err }

// Objects of Linux 6.1 for each 100 options that are built in or modules. The
// minimal configuration compiles 1771 for 980 options; from the Makefiles,
// x86_64_defconfig has about 2770 for 1483, and Debian's cloud kernel 2300 for
// 1581 and 2800 for 1119 modules.
const (
	objectsPerOption = 181
	objectsPerModule = 250
)

// estimate guesses the objects of a build from its configuration.
func estimate(v values, modules bool) int {
	y, m := 0, 0
	for _, value := range v {
		switch value {
		case "y":
			y++
		case "m":
			m++
		}
	}
	if !modules {
		m = 0
	}
	return y*objectsPerOption/100 + m*objectsPerModule/100
}
