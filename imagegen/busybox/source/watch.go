package source

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// How much of a failed build's log an error shows, in lines.
const (
	firstErrors = 6
	tailLines   = 13
)

const (
	maxLine = 1 << 10  // bytes of a line that are looked at
	maxLog  = 64 << 20 // bytes of a log; a whole build has 100 kB
)

// watcher is what make writes to: it passes on to a log, counts objects, and
// keeps what tells why a build failed.
type watcher struct {
	log    io.Writer
	left   *int64 // bytes that the log may still take
	object func() // called for each object; nil if nobody counts
	line   []byte // so far, without the end of a long one
	errors []string
	tail   []string
}

// objectLine is make's short line of an object (scripts/Kbuild.include in
// busybox's source): "  CC      coreutils/cat.o".
var objectLine = regexp.MustCompile(`^ {2}(?:CC|AS) +\S+\.o$`)

// errorLine is a line that says what is wrong.
var errorLine = regexp.MustCompile(`error:|Error [0-9]|\*\*\*|undefined reference|[Nn]o such file|not found|No rule to make|No space left|Killed|cannot find`)

func (w *watcher) Write(p []byte) (int, error) {
	part := p[:min(int64(len(p)), *w.left)]
	*w.left -= int64(len(part))
	if n, err := w.log.Write(part); err != nil {
		return n, err
	}
	for rest := p; len(rest) > 0; {
		part, after, ended := bytes.Cut(rest, []byte("\n"))
		w.line = append(w.line, part[:min(len(part), maxLine-len(w.line))]...)
		if ended {
			w.take(string(w.line))
			w.line = w.line[:0]
		}
		rest = after
	}
	return len(p), nil
}

func (w *watcher) take(line string) {
	// It goes to somebody's terminal.
	line = strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(strings.TrimRight(line, " \t\r"), "?"))
	if line == "" {
		return
	}
	if w.object != nil && objectLine.MatchString(line) {
		w.object()
	}
	if w.tail = append(w.tail, line); len(w.tail) > tailLines {
		w.tail = w.tail[1:]
	}
	if len(w.errors) < firstErrors && errorLine.MatchString(line) {
		w.errors = append(w.errors, line)
	}
}

// lines are what tells why make failed: the first errors, then the log's end.
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

// BuildError is a build that failed.
type BuildError struct {
	Step  string   // what was done: "compile busybox 1.36.1"
	Lines []string // of the log: the first errors and its end, at most 20
	Log   string   // path of the whole log
	Err   error    // how the program ended: a *sandbox.LimitError, or holds an *exec.ExitError
}

// Error is a sentence that ends with a colon, and the lines below it.
func (e *BuildError) Error() string {
	return fmt.Sprintf("%s: %v; the log says:\n  %s", e.Step, e.Err, strings.Join(e.Lines, "\n  "))
}

// Unwrap is how the program ended.
func (e *BuildError) Unwrap() error { return e.Err }
