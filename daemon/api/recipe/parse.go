package recipe

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/go-viper/mapstructure/v2"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
	"github.com/spf13/viper"
)

// MaxSize is how many bytes a recipe may have. The TOML parser takes stack for
// each level of nested lists, so that a hostile text must not be long.
const MaxSize = 64 << 10

// maxSyntax is after how many statements that are no TOML the rest is not
// looked at: it is another kind of file then.
const maxSyntax = 20

// Parse reads the text of a recipe file and finds all that is wrong with it but
// for the files that it names. name is the file's, for the problems, which are
// sorted by line. With problems the Recipe is what could be understood; without,
// it is complete and valid.
func Parse(text []byte, name string) (Recipe, []Problem) {
	p := &parser{
		recipe: &Recipe{name: name, lines: map[string]int{}},
		broken: map[string]bool{},
		tables: map[string]int{},
		dotted: map[string]bool{},
		counts: map[string]int{},
	}
	if len(text) > MaxSize {
		p.problem(0, "", "is larger than %d KiB, which no recipe needs; name large files by from =", MaxSize>>10)
		text = nil
	}
	p.read(text)
	decoded := p.decode()
	p.recipe.settle()
	if decoded {
		c := checker{recipe: p.recipe, broken: p.broken}
		c.check()
		p.problems = append(p.problems, c.problems...)
	}
	slices.SortStableFunc(p.problems, func(a, b Problem) int { return a.Line - b.Line })
	return *p.recipe, p.problems
}

// parser goes through the statements of a recipe with go-toml's parser, which
// knows where each stands, and blanks those out of clean that are wrong. What
// is left is for viper to read, so that one mistake hides no other.
type parser struct {
	recipe   *Recipe
	problems []Problem
	text     []byte
	clean    []byte
	newlines []int           // offsets in text
	broken   map[string]bool // keys that were given in a way that could not be understood

	table  string          // where keys belong now: "", "kernel-build", "file[0]"
	skip   bool            // the table is wrong, and so nothing in it can be right
	tables map[string]int  // lines of tables that can't be given again
	dotted map[string]bool // tables of which keys were given as table.key
	counts map[string]int  // how many [[file]] there are
}

func (p *parser) problem(line int, key, format string, args ...any) {
	p.problems = append(p.problems, Problem{p.recipe.name, line, shown(key), fmt.Sprintf(format, args...)})
}

var index = regexp.MustCompile(`\[[0-9]+\]`)

// shown is a key as people know it: the line says which of many it is.
func shown(key string) string { return index.ReplaceAllString(key, "") }

func (p *parser) line(offset int) int {
	n, _ := slices.BinarySearch(p.newlines, offset)
	return n + 1
}

// lineStart and lineEnd are the bounds of the line that offset is in, without
// its newline.
func (p *parser) lineStart(offset int) int { return bytes.LastIndexByte(p.text[:offset], '\n') + 1 }
func (p *parser) lineEnd(offset int) int {
	if n := bytes.IndexByte(p.text[offset:], '\n'); n >= 0 {
		return offset + n
	}
	return len(p.text)
}

// blank takes text[from:to] out of what viper reads. Lines stay where they are.
func (p *parser) blank(from, to int) {
	for i := from; i < to; i++ {
		if c := p.clean[i]; c != '\n' && c != '\r' {
			p.clean[i] = ' '
		}
	}
}

func (p *parser) read(text []byte) {
	// The byte more keeps go-toml's empty slices at the end of the text within
	// it, so that they have a position.
	p.text = append(make([]byte, 0, len(text)+1), text...)
	p.clean = slices.Clone(text)
	for i, c := range text {
		if c == '\n' {
			p.newlines = append(p.newlines, i)
		}
	}
	failed := 0
	for offset := 0; offset < len(p.text); {
		next, err := p.statements(offset)
		if err == nil {
			return
		}
		if failed++; failed == maxSyntax {
			p.problem(p.line(next), "", "there are more lines that are no TOML; the rest was not looked at")
			p.blank(next, len(p.text))
			return
		}
		offset = next
	}
}

// statements goes through the statements from offset on to the first that is no
// TOML, of which it makes a problem, and returns where to go on after that.
func (p *parser) statements(offset int) (next int, err error) {
	var toml unstable.Parser
	toml.Reset(p.text[offset:])
	good, bad := -1, -1 // where the last statement begins, and the one to be blanked
	for toml.NextExpression() {
		node := toml.Expression()
		keys := node.Key()
		keys.Next()
		start := p.lineStart(offset + int(keys.Node().Raw.Offset))
		if bad >= 0 {
			p.blank(bad, start)
			bad = -1
		}
		good = start
		if !p.statement(&toml, offset, node) {
			bad = start
		}
	}
	err = toml.Error()
	if err == nil {
		if bad >= 0 {
			p.blank(bad, len(p.text))
		}
		return len(p.text), nil
	}

	at, message := offset, err.Error()
	var perr *unstable.ParserError
	if errors.As(err, &perr) && perr.Highlight != nil {
		at += int(toml.Range(perr.Highlight).Offset)
	}
	start := offset
	switch end := p.end(good); {
	case good < 0:
	case at > end:
		start = end + 1
	default: // more stands on the last line of what seemed to be good
		start, bad = good, -1
		if !p.skip && p.recipe.lines[p.table] == p.line(good) && strings.HasSuffix(p.table, "]") {
			delete(p.recipe.lines, p.table)
			p.counts[shown(p.table)]--
		}
	}
	if bad >= 0 {
		p.blank(bad, start)
	}
	return p.syntax(start, at, message), err
}

// end is the offset of the end of the line on which the statement that begins
// at start ends.
func (p *parser) end(start int) int {
	if start < 0 {
		return start
	}
	ends := p.newlines[p.line(start)-1:]
	n, _ := slices.BinarySearchFunc(ends, true, func(end int, _ bool) int {
		var toml unstable.Parser
		toml.Reset(p.text[start : end+1])
		if toml.NextExpression() {
			return 0
		}
		return -1
	})
	if n == len(ends) {
		return len(p.text)
	}
	return ends[n]
}

var (
	comment = regexp.MustCompile(`^[ \t\r]*(#|$)`)
	keyLine = regexp.MustCompile(`^[ \t]*([A-Za-z0-9_-]+)[ \t]*=`)
	header  = regexp.MustCompile(`^[ \t]*\[`)
	begin   = regexp.MustCompile(`^[ \t]*(\[\[?[ \t]*[A-Za-z]|[A-Za-z0-9_-]+[ \t]*=)`)
)

// syntax makes a problem of the statement that begins at the first line from
// start on that is not empty, and which go-toml stopped in at the offset at. It
// blanks it and returns where the next one seems to begin.
func (p *parser) syntax(start, at int, message string) (next int) {
	line := func(i int) []byte { return p.text[i:p.lineEnd(i)] }
	for start = p.lineStart(start); p.lineEnd(start) < at && comment.Match(line(start)); {
		start = p.lineEnd(start) + 1
	}
	first := line(start)
	key := ""
	if m := keyLine.FindSubmatch(first); m != nil {
		key = join(p.table, string(m[1]))
		p.broken[key] = true
		if p.recipe.lines[key] == 0 {
			p.recipe.lines[key] = p.line(start)
		}
	} else if header.Match(first) {
		p.skip = true
	}
	message = plain(message)
	if message == "incomplete number" { // go-toml takes every bare word for a number
		message = "a value must stand here; a text stands in quotes"
	}
	where := p.line(at)
	if at >= len(p.text) {
		where = p.line(start)
	} else if begun := p.line(start); begun < where {
		message += fmt.Sprintf(" (in what begins on line %d)", begun)
	}
	if !p.skip || key == "" {
		p.problem(where, key, "this is no TOML: %s", message)
	}

	next = min(p.lineEnd(start)+1, len(p.text))
	// Within a long text each line can look like a statement.
	if value := p.text[start:max(at, p.lineEnd(start))]; bytes.Contains(value, []byte(`"""`)) || bytes.Contains(value, []byte("'''")) {
		next = len(p.text)
	}
	for next < len(p.text) && !begin.Match(line(next)) {
		next = min(p.lineEnd(next)+1, len(p.text))
	}
	p.blank(start, next)
	return next
}

// plain is s without what would spoil a line of output.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

var bare = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// key is a dotted key: its name, its parts, and where it stands.
func (p *parser) key(offset int, it unstable.Iterator) (parts []string, line int) {
	for it.Next() {
		n := it.Node()
		if line == 0 {
			line = p.line(offset + int(n.Raw.Offset))
		}
		part := string(n.Data)
		if !bare.MatchString(part) {
			part = strconv.Quote(part) // so that its dots are none
		}
		parts = append(parts, part)
	}
	return parts, line
}

func join(table, key string) string {
	if table == "" {
		return key
	}
	return table + "." + key
}

// statement reports whether the statement is right. offset is that of the text
// that toml reads.
func (p *parser) statement(toml *unstable.Parser, offset int, node *unstable.Node) bool {
	switch node.Kind {
	case unstable.KeyValue:
		return !p.skip && p.keyValue(toml, offset, p.table, node)
	case unstable.Table, unstable.ArrayTable:
		parts, line := p.key(offset, node.Key())
		p.skip = !p.header(strings.Join(parts, "."), line, node.Kind == unstable.ArrayTable)
		return !p.skip
	}
	return true
}

// header begins the table [name], or one of [[name]].
func (p *parser) header(name string, line int, many bool) bool {
	t, known := schema[name]
	if many {
		name = "[[" + name + "]]"
	} else {
		name = "[" + name + "]"
	}
	key := strings.Trim(name, "[]")
	switch {
	case !known:
		p.problem(line, "", "%s is not known here%s", name, suggest(key, ""))
	case isTable(t) && many:
		p.problem(line, key, "there can be only one; write [%s]", key)
	case isTables(t) && !many:
		p.problem(line, key, "there can be many of it; write [[%s]]", key)
	case !isTable(t) && !isTables(t):
		p.problem(line, key, "it is no table; write %s = %s", key[strings.LastIndexByte(key, '.')+1:], example(t))
	case p.tables[key] != 0 || p.dotted[key]:
		p.problem(line, key, "it is given twice; the first is on line %d", p.recipe.lines[key])
	case many:
		p.table = fmt.Sprintf("%s[%d]", key, p.counts[key])
		p.counts[key]++
		p.note(key, line)
		p.note(p.table, line)
		return true
	default:
		p.table = key
		p.tables[key] = line
		p.note(key, line)
		return true
	}
	p.note(key, line)
	p.broken[key] = true
	return false
}

func (p *parser) note(key string, line int) {
	if p.recipe.lines[key] == 0 {
		p.recipe.lines[key] = line
	}
}

// keyValue checks key = value in a table.
func (p *parser) keyValue(toml *unstable.Parser, offset int, table string, node *unstable.Node) bool {
	parts, line := p.key(offset, node.Key())
	name := join(table, strings.Join(parts, "."))
	for i := 1; i < len(parts); i++ {
		part := join(table, strings.Join(parts[:i], "."))
		t, known := schema[shown(part)]
		switch {
		case known && isTable(t):
			if first := p.recipe.lines[part]; first != 0 && p.tables[part] != 0 {
				p.problem(line, part, "it is given twice; the first is on line %d", first)
				return false
			}
			p.note(part, line)
			p.dotted[part] = true
		case known && isTables(t):
			p.problem(line, part, "there can be many of it; write [[%s]]", shown(part))
			return false
		default:
			p.unknown(line, table, strings.Join(parts, "."))
			return false
		}
	}
	t, known := schema[shown(name)]
	if !known {
		p.unknown(line, table, strings.Join(parts, "."))
		return false
	}
	if first := p.recipe.lines[name]; first != 0 {
		p.problem(line, name, "it is given twice; the first is on line %d", first)
		return false
	}
	p.note(name, line)
	if !p.value(toml, offset, name, line, t, node.Value()) {
		p.broken[name] = true
		return false
	}
	if isTable(t) || isTables(t) {
		p.tables[name] = line // TOML closes what is given as a value
	}
	return true
}

func (p *parser) unknown(line int, table, key string) {
	p.problem(line, join(table, key), "this key is not known here%s", suggest(key, shown(table)))
}

var unmarshaler = reflect.TypeFor[encoding.TextUnmarshaler]()

// value checks that node is a value for t.
func (p *parser) value(toml *unstable.Parser, offset int, name string, line int, t reflect.Type, node *unstable.Node) bool {
	if node.Raw.Length > 0 {
		line = p.line(offset + int(node.Raw.Offset))
		p.note(name, line)
	}
	wrong := func() bool {
		p.problem(line, name, "it must be %s, like %s", typeName(t), example(t))
		return false
	}
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case reflect.PointerTo(t).Implements(unmarshaler):
		if node.Kind != unstable.String {
			return wrong()
		}
		v, _ := reflect.New(t).Interface().(encoding.TextUnmarshaler)
		if err := v.UnmarshalText(node.Data); err != nil {
			p.problem(line, name, "%s", err)
			return false
		}
	case t.Kind() == reflect.String:
		if node.Kind != unstable.String {
			return wrong()
		}
	case t.Kind() == reflect.Bool:
		if node.Kind != unstable.Bool {
			return wrong()
		}
	case t.Kind() == reflect.Int:
		if node.Kind != unstable.Integer {
			return wrong()
		}
		if _, err := strconv.ParseInt(strings.ReplaceAll(string(node.Data), "_", ""), 0, 64); err != nil {
			p.problem(line, name, "%s is too large a number", node.Data)
			return false
		}
	case t.Kind() == reflect.Slice:
		if node.Kind != unstable.Array {
			return wrong()
		}
		right := true
		for i, it := 0, node.Children(); it.Next(); i++ {
			right = p.value(toml, offset, fmt.Sprintf("%s[%d]", name, i), line, t.Elem(), it.Node()) && right
		}
		return right
	case t.Kind() == reflect.Struct:
		if node.Kind != unstable.InlineTable {
			return wrong()
		}
		right := true
		for it := node.Children(); it.Next(); {
			right = p.keyValue(toml, offset, name, it.Node()) && right
		}
		return right
	}
	return true
}

// decode has viper read what is left, and reports whether it could.
func (p *parser) decode() bool {
	err := decode(p.clean, p.recipe)
	if err == nil {
		return true
	}
	line := 0
	var de *toml.DecodeError
	if errors.As(err, &de) {
		line, _ = de.Position()
		err = errors.New(strings.TrimPrefix(de.Error(), "toml: "))
	}
	p.problem(line, "", "this is no TOML: %s", plain(err.Error()))
	return false
}

func decode(text []byte, r *Recipe) error {
	v := viper.New()
	v.SetConfigType("toml")
	for key, value := range standards {
		v.SetDefault(key, value)
	}
	if err := v.ReadConfig(bytes.NewReader(text)); err != nil {
		return err
	}
	return v.UnmarshalExact(r, viper.DecodeHook(mapstructure.TextUnmarshallerHookFunc()))
}
