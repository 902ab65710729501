package kbuild

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// maxConfig is how much configuration is read, in bytes: Debian's has 270 kB.
const maxConfig = 8 << 20

// option is a line of a configuration or fragment: CONFIG_NAME=value, or
// "# CONFIG_NAME is not set", which is the value "n".
type option struct{ name, value string }

func (o option) String() string {
	if o.value == "n" {
		return "# CONFIG_" + o.name + " is not set"
	}
	return "CONFIG_" + o.name + "=" + o.value
}

// parseOptions reads a configuration or a part of one, as Kconfig writes it
// (Documentation/kbuild/kconfig.rst). title names it in errors.
func parseOptions(title string, text []byte) ([]option, error) {
	if len(text) > maxConfig {
		return nil, fmt.Errorf("%s has %d MiB, and no kernel configuration has more than %d", title, len(text)>>20, maxConfig>>20)
	}
	var options []option
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if rest, is := strings.CutPrefix(line, "# CONFIG_"); is {
			if name, is := strings.CutSuffix(rest, " is not set"); is && validOption(name) {
				options = append(options, option{name, "n"})
			}
			continue
		}
		if line == "" || line[0] == '#' {
			continue
		}
		rest, is := strings.CutPrefix(line, "CONFIG_")
		name, value, found := strings.Cut(rest, "=")
		if !is || !found || value == "" || !validOption(name) || !validValue(value) {
			return nil, fmt.Errorf("%s: line %d is not CONFIG_NAME=VALUE: %q", title, i+1, line)
		}
		options = append(options, option{name, value})
	}
	return options, nil
}

func validOption(s string) bool {
	for _, c := range []byte(s) {
		if c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return s != ""
}

// validValue reports whether s is one word or one text in quotes: Kconfig takes
// anything else for less than it says, with a warning that nobody reads.
func validValue(s string) bool {
	if s[0] != '"' {
		return validOption(strings.TrimPrefix(s, "-"))
	}
	escaped, closed := false, false
	for _, c := range []byte(s[1:]) {
		switch {
		case closed, c < ' ' && c != '\t', c == 0x7f:
			return false
		case escaped:
			escaped = false
		case c == '\\':
			escaped = true
		case c == '"':
			closed = true
		}
	}
	return closed
}

// merge makes one configuration of several; of two lines for one option the
// later counts, and it moves to the end: of two members of a choice, Kconfig
// takes the one that it reads last.
func merge(parts ...[]option) []option {
	last := map[string]int{}
	all := slices.Concat(parts...)
	for i, o := range all {
		last[o.name] = i
	}
	var merged []option
	for i, o := range all {
		if last[o.name] == i {
			merged = append(merged, o)
		}
	}
	return merged
}

func format(options []option) []byte {
	var b bytes.Buffer
	for _, o := range options {
		b.WriteString(o.String())
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// values are the options of a configuration.
type values map[string]string

// get is an option's value, "n" if it has none.
func (v values) get(name string) string {
	if s := v[name]; s != "" {
		return s
	}
	return "n"
}

// parseValues reads a whole configuration.
func parseValues(title string, text []byte) (values, error) {
	options, err := parseOptions(title, text)
	if err != nil {
		return nil, err
	}
	v := values{}
	for _, o := range options {
		v[o.name] = o.value
	}
	return v, nil
}

// wish is an option that somebody wants.
type wish struct {
	option
	of  string // whose wish: a fragment's name
	own bool   // it is of the fragment that is in this package
}

// lost returns the wishes that the configuration does not fulfil, sorted by
// name. A driver that is wanted as a module is also there when it is built in.
func lost(wishes []wish, got values) []wish {
	var out []wish
	for _, w := range wishes {
		have := got.get(w.name)
		if have == w.value || w.value == "m" && have == "y" || sameNumber(have, w.value) {
			continue
		}
		out = append(out, w)
	}
	slices.SortFunc(out, func(a, b wish) int { return strings.Compare(a.name, b.name) })
	return out
}

// sameNumber reports whether a and b are one number: Kconfig writes hex as it
// was given.
func sameNumber(a, b string) bool {
	x, xok := strings.CutPrefix(strings.ToLower(a), "0x")
	y, yok := strings.CutPrefix(strings.ToLower(b), "0x")
	return xok && yok && strings.TrimLeft(x, "0") == strings.TrimLeft(y, "0")
}

// wishes are the last wishes of several fragments, the first of which may be
// our own.
func wishes(own []option, fragments [][]option, names []string) []wish {
	at := map[string]int{}
	var out []wish
	add := func(o option, of string, isOwn bool) {
		w := wish{o, of, isOwn}
		if i, have := at[o.name]; have {
			out[i] = w
			return
		}
		at[o.name] = len(out)
		out = append(out, w)
	}
	for _, o := range own {
		add(o, "minimal", true)
	}
	for i, options := range fragments {
		for _, o := range options {
			add(o, names[i], false)
		}
	}
	return out
}
