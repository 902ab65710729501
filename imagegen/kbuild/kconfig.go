package kbuild

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// kconfig is what a kernel tree's Kconfig files say of options, as far as it is
// needed to tell why one can't be had: not types, defaults or ranges. The
// language is that of Documentation/kbuild/kconfig-language.rst.
type kconfig struct {
	symbols map[string]*symbol
	choices int
}

// symbol is an option of the tree. It may be defined in several places.
type symbol struct {
	places    []place
	selectors []selector
}

// place is one definition of a symbol.
type place struct {
	conditions []string // expressions that must all be true for it to be seen
	prompt     bool     // a user can set it
	choice     int      // the number of the choice that it belongs to; 0 for none
}

// selector is an option that switches on another, where its condition holds.
type selector struct{ by, condition string }

// Limits of what is read of a tree that somebody gave us. Linux 6.12 has 1,700
// files with 6 MB.
const (
	maxKconfigFiles = 20000
	maxKconfigFile  = 2 << 20 // bytes
	maxKconfigDepth = 64
)

// readKconfig reads the Kconfig files of a tree, from its top on, for x86.
func readKconfig(ctx context.Context, tree fs.FS) (*kconfig, error) {
	p := &kconfigParser{ctx: ctx, tree: tree, k: &kconfig{symbols: map[string]*symbol{}}}
	if err := p.file("Kconfig", 0); err != nil {
		return nil, fmt.Errorf("read the kernel's Kconfig: %w", err)
	}
	return p.k, nil
}

type kconfigParser struct {
	ctx    context.Context
	tree   fs.FS
	k      *kconfig
	files  int
	scopes []scope
}

// scope is an "if", "menu" or "choice" that is open.
type scope struct {
	kind       string
	conditions []string
	choice     int
}

func (p *kconfigParser) file(name string, depth int) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	if p.files++; p.files > maxKconfigFiles || depth > maxKconfigDepth {
		return fmt.Errorf("%s: more files than a kernel has", name)
	}
	f, err := p.tree.Open(name)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKconfigFile))
	_ = f.Close()
	if err != nil {
		return err
	}
	return p.text(string(text), path.Dir(name), depth)
}

// text reads one file's text; dir is where the file is.
func (p *kconfigParser) text(text, dir string, depth int) error {
	lines := strings.Split(strings.ReplaceAll(text, "\\\n", " "), "\n")
	current := "" // the symbol whose properties follow
	for i := 0; i < len(lines); i++ {
		line := strings.TrimSpace(uncomment(lines[i]))
		word, rest := cutWord(line)
		switch word {
		case "config", "menuconfig":
			current = ""
			if validOption(rest) {
				current = rest
				p.define(rest)
			}
		case "if":
			p.scopes, current = append(p.scopes, scope{kind: "if", conditions: []string{rest}}), ""
		case "menu":
			p.scopes, current = append(p.scopes, scope{kind: "menu"}), ""
		case "choice":
			p.k.choices++
			p.scopes, current = append(p.scopes, scope{kind: "choice", choice: p.k.choices}), ""
		case "endif", "endmenu", "endchoice":
			current = ""
			if n := len(p.scopes); n > 0 && p.scopes[n-1].kind == word[len("end"):] {
				p.scopes = p.scopes[:n-1]
			}
		case "comment", "mainmenu":
			current = "#" // its "depends on" is of no symbol and no scope
		case "source", "rsource", "osource", "orsource":
			current = ""
			if err := p.source(word, unquote(rest), dir, depth); err != nil {
				return err
			}
		case "help", "---help---":
			i = skipHelp(lines, i)
		default:
			p.property(current, word, rest)
		}
	}
	return nil
}

// source reads a file that another names. One that is not there is skipped: it
// is of another architecture, or make will say so better.
func (p *kconfigParser) source(word, name, dir string, depth int) error {
	name = strings.NewReplacer("$(SRCARCH)", "x86", "$SRCARCH", "x86", "$(HEADER_ARCH)", "x86", "$(srctree)/", "").Replace(name)
	if strings.Contains(word, "rs") {
		name = path.Join(dir, name)
	}
	name = path.Clean(name)
	if !fs.ValidPath(name) || strings.Contains(name, "$") {
		return nil
	}
	if st, err := fs.Stat(p.tree, name); err != nil || !st.Mode().IsRegular() {
		return nil
	}
	return p.file(name, depth+1)
}

// define adds a place of a symbol, with the conditions that are around it.
func (p *kconfigParser) define(name string) {
	at := place{}
	for _, s := range p.scopes {
		at.conditions = append(at.conditions, s.conditions...)
		if s.choice > 0 {
			at.choice = s.choice
		}
	}
	s := p.symbol(name)
	s.places = append(s.places, at)
}

func (p *kconfigParser) symbol(name string) *symbol {
	s := p.k.symbols[name]
	if s == nil {
		s = &symbol{}
		p.k.symbols[name] = s
	}
	return s
}

// property reads a line below a config, or below a menu or choice if current
// is "".
func (p *kconfigParser) property(current, word, rest string) {
	switch word {
	case "depends":
		on, expression := cutWord(rest)
		if on != "on" {
			return
		}
		if current == "" {
			if n := len(p.scopes); n > 0 && p.scopes[n-1].kind != "if" {
				p.scopes[n-1].conditions = append(p.scopes[n-1].conditions, expression)
			}
			return
		}
		if at := p.last(current); at != nil {
			at.conditions = append(at.conditions, expression)
		}
	case "visible":
		if _, expression := cutWord(rest); current == "" && len(p.scopes) > 0 && p.scopes[len(p.scopes)-1].kind == "menu" {
			n := len(p.scopes) - 1
			p.scopes[n].conditions = append(p.scopes[n].conditions, expression)
		}
	case "bool", "boolean", "tristate", "string", "int", "hex", "prompt":
		at := p.last(current)
		if at == nil || rest == "" || rest[0] != '"' && rest[0] != '\'' {
			return
		}
		at.prompt = true
		if condition := afterIf(rest); condition != "" {
			at.conditions = append(at.conditions, condition)
		}
	case "select":
		name, _ := cutWord(rest)
		if at := p.last(current); at != nil && validOption(name) {
			s := p.symbol(name)
			s.selectors = append(s.selectors, selector{current, afterIf(rest)})
		}
	}
}

// last is the newest place of a symbol, nil if there is none.
func (p *kconfigParser) last(name string) *place {
	s := p.k.symbols[name]
	if s == nil || len(s.places) == 0 {
		return nil
	}
	return &s.places[len(s.places)-1]
}

// outside returns the first place in s, outside of quotes, at which found is
// true; -1 if there is none.
func outside(s string, found func(i int) bool) int {
	var quote byte
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quote != 0 && c == '\\':
			i++
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
		case c == '"' || c == '\'':
			quote = c
		case found(i):
			return i
		}
	}
	return -1
}

// uncomment cuts the comment off a line; a # in quotes or a macro is none.
func uncomment(line string) string {
	depth := 0
	end := outside(line, func(i int) bool {
		switch line[i] {
		case '(':
			depth++
		case ')':
			depth--
		}
		return line[i] == '#' && depth <= 0
	})
	if end < 0 {
		return line
	}
	return line[:end]
}

// cutWord cuts the first word off s.
func cutWord(s string) (word, rest string) {
	n := strings.IndexAny(s, " \t")
	if n < 0 {
		return s, ""
	}
	return s[:n], strings.TrimSpace(s[n:])
}

func unquote(s string) string { return strings.Trim(s, `"'`) }

// afterIf is the condition behind a property: the expression after an "if"
// outside of quotes.
func afterIf(s string) string {
	at := outside(s, func(i int) bool {
		return i > 0 && i+2 < len(s) && s[i:i+2] == "if" && strings.IndexByte(" \t\"'", s[i-1]) >= 0 && strings.IndexByte(" \t(!", s[i+2]) >= 0
	})
	if at < 0 {
		return ""
	}
	return strings.TrimSpace(s[at+2:])
}

// skipHelp returns the number of the last line of the help text that follows
// line i: it ends before a line that is indented less than its first one.
func skipHelp(lines []string, i int) int {
	indent := -1
	for ; i+1 < len(lines); i++ {
		next := lines[i+1]
		if strings.TrimSpace(next) == "" {
			continue
		}
		n := column(next)
		if indent < 0 {
			indent = n
		}
		if n < indent || n == 0 {
			break
		}
	}
	return i
}

// column is how far a line is indented; tabs go to multiples of 8.
func column(line string) int {
	n := 0
	for _, c := range []byte(line) {
		switch c {
		case '\t':
			n = n&^7 + 8
		case ' ':
			n++
		default:
			return n
		}
	}
	return n
}

// settable reports whether the tree has an option that can be set by hand.
func (k *kconfig) settable(name string) bool {
	s := k.symbols[name]
	return s != nil && slices.ContainsFunc(s.places, func(at place) bool { return at.prompt })
}

// why says as a clause why the configuration has not what w wants.
func (k *kconfig) why(w wish, got values) string {
	s := k.symbols[w.name]
	if s == nil || len(s.places) == 0 {
		return "this kernel has no such option"
	}
	have := got.get(w.name)
	if w.value == "n" {
		if by := s.selectedBy(got); by != "" {
			return "it is selected by " + by
		}
		return "it is " + have + " by itself and can't be switched off"
	}
	level := tristate(w.value)
	if level == 0 {
		level = 2 // a number or text is there or not
	}
	var best []string
	choice, visible, prompt := 0, false, false
	for _, at := range s.places {
		if !at.prompt {
			continue
		}
		var lacks []string
		for _, c := range at.conditions {
			for _, l := range lacking(c, got, level) {
				if !slices.Contains(lacks, l) {
					lacks = append(lacks, l)
				}
			}
		}
		if !prompt || len(lacks) < len(best) {
			best, choice, visible = lacks, at.choice, len(lacks) == 0
		}
		prompt = true
	}
	switch {
	case !prompt:
		if by := s.known(); by != "" {
			return "it can't be set by itself, only by " + by
		}
		return "it can't be set by hand"
	case !visible:
		return "it needs " + strings.Join(best, " and ")
	case choice > 0:
		for _, name := range k.members(choice) {
			if name != w.name && got.get(name) == "y" {
				return "CONFIG_" + name + " of the same choice is set"
			}
		}
	}
	if have == "n" {
		return "the kernel's configuration dropped it"
	}
	return "the kernel's configuration made it " + have
}

// members are the symbols of a choice, sorted.
func (k *kconfig) members(choice int) []string {
	var names []string
	for name, s := range k.symbols {
		for _, at := range s.places {
			if at.choice == choice {
				names = append(names, name)
				break
			}
		}
	}
	slices.Sort(names)
	return names
}

// maxNamed is how many options a sentence names.
const maxNamed = 4

// selectedBy names the options that are set and select s.
func (s *symbol) selectedBy(got values) string {
	var names []string
	for _, by := range s.selectors {
		if got.get(by.by) != "n" && len(lacking(by.condition, got, 1)) == 0 {
			names = append(names, "CONFIG_"+by.by)
		}
	}
	return named(names)
}

// known names the options that can select s.
func (s *symbol) known() string {
	var names []string
	for _, by := range s.selectors {
		names = append(names, "CONFIG_"+by.by)
	}
	return named(names)
}

func named(names []string) string {
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) > maxNamed {
		names = append(names[:maxNamed:maxNamed], "others")
	}
	return strings.Join(names, ", ")
}

// lacking lists, as clauses, the parts of an expression that keep it below
// level (1 for m, 2 for y) in a configuration; nil if there are none. What
// can't be judged here, macros that ask the compiler, counts as true.
func lacking(expression string, got values, level int) []string {
	p := expressionParser{rest: expression, got: got, level: level}
	e := p.or(0)
	if p.failed || strings.TrimSpace(p.rest) != "" {
		return nil
	}
	if e.value >= level {
		return nil
	}
	return e.lacks
}

// expr is an expression's value (0 to 2) and, where that is too low, why.
type expr struct {
	value int
	lacks []string
}

// expressionParser reads an expression of Kconfig: symbols, constants, = != < >
// <= >=, !, &&, || and parentheses.
type expressionParser struct {
	rest   string
	got    values
	level  int
	failed bool
}

// maxNesting bounds the parser's stack; the kernel's expressions nest 5 deep.
const maxNesting = 100

func (p *expressionParser) or(depth int) expr {
	e := p.and(depth)
	alternatives := [][]string{e.lacks}
	for p.take("||") {
		next := p.and(depth)
		e.value = max(e.value, next.value)
		alternatives = append(alternatives, next.lacks)
	}
	if len(alternatives) == 1 {
		return e
	}
	if e.lacks = nil; e.value < p.level {
		var parts []string
		for _, a := range alternatives {
			if part := strings.Join(a, " and "); part != "" && !slices.Contains(parts, part) {
				parts = append(parts, part)
			}
		}
		if len(parts) > maxNamed {
			parts = append(parts[:maxNamed], "another option")
		}
		e.lacks = []string{strings.Join(parts, " or ")}
		if len(parts) > 1 {
			e.lacks[0] = "either " + e.lacks[0]
		}
	}
	return e
}

func (p *expressionParser) and(depth int) expr {
	e := p.term(depth)
	for p.take("&&") {
		next := p.term(depth)
		e.value = min(e.value, next.value)
		e.lacks = append(e.lacks, next.lacks...)
	}
	return e
}

func (p *expressionParser) term(depth int) expr {
	if depth++; depth > maxNesting || p.failed {
		p.failed = true
		return expr{}
	}
	switch {
	case p.peek("!") && !p.peek("!="):
		p.take("!")
		before := p.rest
		e := p.term(depth)
		text := strings.TrimSpace(strings.TrimSuffix(before, p.rest))
		e = expr{value: 2 - e.value}
		if e.value < p.level {
			if validOption(text) {
				e.lacks = []string{"CONFIG_" + text + " to be off"}
			} else {
				e.lacks = []string{"not " + text}
			}
		}
		return e
	case p.take("("):
		e := p.or(depth)
		if !p.take(")") {
			p.failed = true
		}
		return e
	}
	name, known := p.word()
	for _, op := range []string{"!=", "<=", ">=", "=", "<", ">"} {
		if !p.take(op) {
			continue
		}
		other, otherKnown := p.word()
		if !known || !otherKnown || compare(p.value(name), op, p.value(other)) {
			return expr{value: 2}
		}
		return expr{lacks: []string{display(name) + op + display(other)}}
	}
	if !known {
		return expr{value: 2}
	}
	e := expr{value: tristate(p.value(name))}
	if e.value < p.level {
		state := "not set"
		if e.value == 1 {
			state = "a module"
		}
		if isConstant(name) {
			e.lacks = []string{"what never is"}
		} else {
			e.lacks = []string{"CONFIG_" + name + " (" + state + ")"}
		}
	}
	return e
}

func (p *expressionParser) peek(token string) bool {
	p.rest = strings.TrimLeft(p.rest, " \t")
	return strings.HasPrefix(p.rest, token)
}

func (p *expressionParser) take(token string) bool {
	if !p.peek(token) {
		return false
	}
	p.rest = p.rest[len(token):]
	return true
}

// word reads a symbol, a constant with its quotes, or a macro, which is not
// known.
func (p *expressionParser) word() (word string, known bool) {
	p.peek("")
	switch {
	case strings.HasPrefix(p.rest, "$("):
		depth := 0
		for i := 1; i < len(p.rest); i++ {
			switch p.rest[i] {
			case '(':
				depth++
			case ')':
				depth--
			}
			if depth == 0 {
				p.rest = p.rest[i+1:]
				return "", false
			}
		}
	case p.rest != "" && (p.rest[0] == '"' || p.rest[0] == '\''):
		if end := strings.IndexByte(p.rest[1:], p.rest[0]); end >= 0 {
			word, p.rest = p.rest[:end+2], p.rest[end+2:]
			if strings.Contains(word, "$(") {
				return "", false
			}
			return `"` + unquote(word) + `"`, true
		}
	default:
		n := 0
		for n < len(p.rest) && (validOption(p.rest[n:n+1]) || p.rest[n] == '-' || p.rest[n] == '.') {
			n++
		}
		if n > 0 {
			word, p.rest = p.rest[:n], p.rest[n:]
			return word, true
		}
	}
	p.failed = true
	return "", false
}

// isConstant reports whether a word of an expression stands for itself.
func isConstant(word string) bool {
	return word == "y" || word == "m" || word == "n" || strings.HasPrefix(word, `"`) || word != "" && word[0] >= '0' && word[0] <= '9'
}

func display(word string) string {
	if isConstant(word) {
		return word
	}
	return "CONFIG_" + word
}

func (p *expressionParser) value(word string) string {
	if isConstant(word) {
		return unquote(word)
	}
	return unquote(p.got.get(word))
}

func tristate(value string) int {
	switch value {
	case "y":
		return 2
	case "m":
		return 1
	}
	return 0
}

// compare compares as Kconfig does: numbers as such where both are, else texts.
func compare(a, op, b string) bool {
	c := strings.Compare(a, b)
	x, xerr := strconv.ParseInt(a, 0, 64)
	y, yerr := strconv.ParseInt(b, 0, 64)
	if xerr == nil && yerr == nil {
		c = 0
		if x < y {
			c = -1
		} else if x > y {
			c = 1
		}
	}
	switch op {
	case "=":
		return c == 0
	case "!=":
		return c != 0
	case "<":
		return c < 0
	case ">":
		return c > 0
	case "<=":
		return c <= 0
	}
	return c >= 0
}
