package source

import (
	"bytes"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
)

// maxConfig is how much configuration is read, in bytes: a whole one has 40 kB.
const maxConfig = 1 << 20

// option is a line of a configuration: CONFIG_NAME=value, or "# CONFIG_NAME is
// not set", which is the value "n".
type option struct{ name, value string }

func (o option) String() string {
	if o.value == "n" {
		return "# CONFIG_" + o.name + " is not set"
	}
	return "CONFIG_" + o.name + "=" + o.value
}

var (
	optionLine = regexp.MustCompile(`^CONFIG_([A-Za-z0-9_]+)=(-?[A-Za-z0-9_]+|"(?:[^"\\[:cntrl:]]|\\[^[:cntrl:]])*")$`)
	unsetLine  = regexp.MustCompile(`^# CONFIG_([A-Za-z0-9_]+) is not set$`)
)

// parseOptions reads a configuration or a part of one, as busybox's Kconfig
// writes it (docs/Kconfig-language.txt in its source). title names it in errors.
func parseOptions(title string, text []byte) ([]option, error) {
	if len(text) > maxConfig {
		return nil, fmt.Errorf("%s has %d KiB, and no busybox configuration has more than %d", title, len(text)>>10, maxConfig>>10)
	}
	var options []option
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if m := unsetLine.FindStringSubmatch(line); m != nil {
			options = append(options, option{m[1], "n"})
			continue
		}
		if line == "" || line[0] == '#' {
			continue
		}
		m := optionLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("%s: line %d is not CONFIG_NAME=VALUE: %q", title, i+1, line)
		}
		options = append(options, option{m[1], m[2]})
	}
	return options, nil
}

// merge makes one configuration of several: of two lines for one option the
// later counts, at its place, since of two members of a choice Kconfig takes the
// one that it reads last.
func merge(parts ...[]option) []option {
	all := slices.Concat(parts...)
	last := map[string]int{}
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

// values are the options of a whole configuration; one that is not in it is "n".
type values map[string]string

func parseValues(text []byte) (values, error) {
	options, err := parseOptions("busybox's configuration", text)
	if err != nil {
		return nil, err
	}
	v := values{}
	for _, o := range options {
		v[o.name] = o.value
	}
	return v, nil
}

func (v values) get(name string) string {
	if s := v[name]; s != "" {
		return s
	}
	return "n"
}

// wish is an option that somebody wants.
type wish struct {
	option
	of  string // the fragment's name
	own bool   // it is of the fragment in this package
}

// wishes are those of our own fragment and of the others behind it; of two for
// one option the later counts.
func wishes(own []option, fragments [][]option, names []string) []wish {
	var all []wish
	for _, o := range own {
		all = append(all, wish{o, "memlinux", true})
	}
	for i, options := range fragments {
		for _, o := range options {
			all = append(all, wish{o, names[i], false})
		}
	}
	last := map[string]int{}
	for i, w := range all {
		last[w.name] = i
	}
	var out []wish
	for i, w := range all {
		if last[w.name] == i {
			out = append(out, w)
		}
	}
	return out
}

// lost returns the wishes that got does not fulfil, sorted by name.
func lost(wishes []wish, got values) []wish {
	var out []wish
	for _, w := range wishes {
		if got.get(w.name) != w.value {
			out = append(out, w)
		}
	}
	slices.SortFunc(out, func(a, b wish) int { return strings.Compare(a.name, b.name) })
	return out
}

// symbols are the options that a source knows, with what each depends on.
type symbols map[string][]string

// why says why a wish was not taken.
func (s symbols) why(w wish, got values) string {
	depends, known := s[w.name]
	switch {
	case !known:
		return "this busybox has no such option"
	case len(depends) > 0 && got.get(w.name) == "n":
		return "it depends on " + strings.Join(depends, " and on ")
	}
	return "it is " + got.get(w.name)
}

var (
	symbolLine  = regexp.MustCompile(`^(?:menu)?config\s+([A-Za-z0-9_]+)\s*$`)
	dependsLine = regexp.MustCompile(`^\s+depends on\s+(.+?)\s*$`)
	otherLine   = regexp.MustCompile(`^\s*(?:menu|endmenu|choice|endchoice|if|endif|comment|source|mainmenu)\b`)
)

// readSymbols reads the Config.in files of a source tree that is configured.
func readSymbols(tree fs.FS) (symbols, error) {
	s := symbols{}
	err := eachFile(tree, "Config.in", func(_ string, text string) {
		now := ""
		for line := range strings.Lines(text) {
			if m := symbolLine.FindStringSubmatch(line); m != nil {
				now = m[1]
				s[now] = append(s[now], []string{}...)
			} else if otherLine.MatchString(line) {
				now = ""
			} else if m := dependsLine.FindStringSubmatch(line); m != nil && now != "" {
				s[now] = append(s[now], m[1])
			}
		}
	})
	return s, err
}

var kbuildLine = regexp.MustCompile(`^(?:lib|obj)-(?:y|\$\(CONFIG_([A-Za-z0-9_]+)\))\s*[:+]?=(.*)$`)

// objects counts the objects that a configured source tree is made of.
func objects(tree fs.FS, got values) (int64, error) {
	names := map[string]bool{}
	err := eachFile(tree, "Kbuild", func(dir, text string) {
		for line := range strings.Lines(text) {
			m := kbuildLine.FindStringSubmatch(strings.TrimRight(line, "\n"))
			if m == nil || m[1] != "" && got.get(m[1]) == "n" {
				continue
			}
			for _, word := range strings.Fields(m[2]) {
				if strings.HasSuffix(word, ".o") {
					names[path.Join(dir, word)] = true
				}
			}
		}
	})
	return int64(len(names)), err
}

// eachFile calls take for every regular file of that name in a tree, with its
// folder.
func eachFile(tree fs.FS, name string, take func(dir, text string)) error {
	return fs.WalkDir(tree, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != name || !d.Type().IsRegular() {
			return err
		}
		if info, err := d.Info(); err != nil || info.Size() > maxConfig {
			return err
		}
		text, err := fs.ReadFile(tree, p)
		if err == nil {
			take(path.Dir(p), string(text))
		}
		return err
	})
}
