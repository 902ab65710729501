package local

import (
	"strings"
)

// script is what of a GRUB 2 configuration can be read without running it: the
// menu and the commands around it (GRUB manual 2.06 §6 "Writing your own
// configuration file"; the words as grub-core/script/yylex.l splits them). It
// is meant for what grub-mkconfig writes: no condition is judged but the one
// that corrects an old default.
type script struct {
	items    []menuItem
	commands []scriptCommand // outside of entries, in their order
	open     bool            // it ends within a quote, a block or a line that goes on
}

// menuItem is a menuentry or submenu.
type menuItem struct {
	title, id    string
	submenu      bool
	unrestricted bool       // it boots without a password where superusers are set
	items        []menuItem // of a submenu
	commands     [][]string // of its body, as words
}

// scriptCommand is a command outside of entries.
type scriptCommand struct {
	words    []string // variables stand as they are written
	function bool     // within a function's body
	before   int      // how many items of the menu stand before it
}

// parseScript can't fail: what it does not understand is a command of that name.
func parseScript(data []byte) script {
	type block struct {
		menuItem
		function bool
	}
	stack := []block{{}}
	var commands []scriptCommand
	var words []string
	functions := 0
	end := func() {
		command := words
		words = nil
		for len(command) > 0 && leads[command[0]] {
			command = command[1:]
		}
		if len(command) == 0 {
			return
		}
		if len(stack) > 1 {
			inEntry := false
			for _, b := range stack[1:] {
				inEntry = inEntry || b.id != "" || b.title != ""
			}
			if inEntry {
				top := &stack[len(stack)-1]
				top.commands = append(top.commands, command)
				return
			}
		}
		commands = append(commands, scriptCommand{command, functions > 0, len(stack[0].items)})
	}
	for lex := (lexer{data: data}); ; {
		word, kind := lex.next()
		switch kind {
		case lexWord:
			words = append(words, word)
			continue
		case lexEnd, lexStop:
			end()
		case lexOpen:
			for len(words) > 0 && leads[words[0]] {
				words = words[1:]
			}
			b := block{}
			switch {
			case len(words) > 1 && (words[0] == "menuentry" || words[0] == "submenu"):
				b.menuItem = readItem(words)
				words = nil
			case len(words) > 0 && words[0] == "function":
				b.function = true
				functions++
				words = nil
			default:
				end()
			}
			stack = append(stack, b)
		case lexClose:
			end()
			if len(stack) > 1 {
				top := stack[len(stack)-1]
				stack = stack[:len(stack)-1]
				below := &stack[len(stack)-1]
				switch {
				case top.function:
					functions--
				case top.title != "" || top.id != "":
					below.items = append(below.items, top.menuItem)
				default: // a group: what it holds is the surroundings'
					below.items = append(below.items, top.items...)
					below.commands = append(below.commands, top.commands...)
				}
			}
		}
		if kind == lexStop {
			// What was left open counts, as far as it goes.
			return script{stack[0].items, commands, lex.open || len(stack) > 1}
		}
	}
}

// leads are the words that may stand before a command on its line.
var leads = map[string]bool{
	"if": true, "then": true, "else": true, "elif": true, "fi": true, "while": true, "until": true, "do": true, "done": true, "!": true,
}

// readItem reads the words of a menuentry or submenu up to its {.
func readItem(words []string) menuItem {
	item := menuItem{submenu: words[0] == "submenu"}
	restricted, titled := false, false
	for i := 1; i < len(words); i++ {
		w := words[i]
		name, value, joined := strings.Cut(w, "=")
		argument := func() string {
			if !joined && i+1 < len(words) {
				i++
				return words[i]
			}
			return value
		}
		switch {
		case w == "--unrestricted":
			item.unrestricted = true
		case name == "--users":
			argument()
			restricted = true
		case name == "--id", titled && (w == "$menuentry_id_option" || w == "${menuentry_id_option}"):
			item.id = argument()
		case name == "--class", name == "--hotkey", name == "--source":
			argument()
		case strings.HasPrefix(w, "--"), strings.HasPrefix(w, "$") && titled: // such as ${CLASS}
		case !titled:
			item.title, titled = w, true
		}
	}
	item.unrestricted = item.unrestricted && !restricted
	if item.id == "" {
		item.id = item.title // as GRUB does
	}
	return item
}

// assignments calls f for each value given to a variable outside of functions.
func (s script) assignments(name string, f func(value string, condition []string, before int)) {
	var condition []string
	for _, c := range s.commands {
		if c.function {
			continue
		}
		words := c.words
		if words[0] == "[" || words[0] == "test" {
			condition = words
			continue
		}
		if words[0] == "set" && len(words) > 1 {
			words = words[1:]
		}
		if key, value, ok := strings.Cut(words[0], "="); ok && key == name {
			f(value, condition, c.before)
		}
	}
}

// has says whether a command of that name stands outside of entries.
func (s script) has(name string) bool {
	for _, c := range s.commands {
		if c.words[0] == name {
			return true
		}
	}
	return false
}

type lexKind int

const (
	lexWord  lexKind = iota
	lexEnd           // of a command: a newline, ;, | or &
	lexOpen          // {
	lexClose         // }
	lexStop          // the file ends
)

// lexer splits GRUB script into words.
type lexer struct {
	data []byte
	at   int
	open bool // the data ended within a quote or behind a \
}

// next is the next word, without its quotes and escapes, or what else stands
// there.
func (l *lexer) next() (string, lexKind) {
	for l.at < len(l.data) && (l.data[l.at] == ' ' || l.data[l.at] == '\t' || l.data[l.at] == '\r') {
		l.at++
	}
	if l.at >= len(l.data) {
		return "", lexStop
	}
	switch l.data[l.at] {
	case '\n', ';', '|', '&', '<', '>':
		l.at++
		return "", lexEnd
	case '{':
		l.at++
		return "", lexOpen
	case '}':
		l.at++
		return "", lexClose
	case '#':
		for l.at < len(l.data) && l.data[l.at] != '\n' {
			l.at++
		}
		return l.next0()
	}
	var word []byte
	for l.at < len(l.data) {
		switch c := l.data[l.at]; c {
		case ' ', '\t', '\r', '\n', ';', '|', '&', '<', '>', '{', '}':
			return string(word), lexWord
		case '\\':
			l.at++
			newline := l.at >= len(l.data) || l.data[l.at] == '\n' // a line that goes on
			if !newline {
				word = append(word, l.data[l.at])
			}
			l.at++
			l.open = newline && l.at >= len(l.data)
		case '\'':
			l.at++
			for l.at < len(l.data) && l.data[l.at] != '\'' {
				word = append(word, l.data[l.at])
				l.at++
			}
			l.open = l.at >= len(l.data)
			l.at++
		case '"':
			word = l.double(word)
		case '$':
			word = l.variable(word)
		default:
			word = append(word, c)
			l.at++
		}
	}
	return string(word), lexWord
}

// next0 goes on behind a comment, without a recursion for each of many.
func (l *lexer) next0() (string, lexKind) {
	if l.at >= len(l.data) {
		return "", lexStop
	}
	l.at++
	return "", lexEnd
}

// double reads what stands in double quotes, where \ keeps its place before
// all but $, ", \ and a newline.
func (l *lexer) double(word []byte) []byte {
	for l.at++; l.at < len(l.data); {
		switch c := l.data[l.at]; c {
		case '"':
			l.at++
			return word
		case '\\':
			l.at++
			if l.at >= len(l.data) {
				l.open = true
				return word
			}
			switch c := l.data[l.at]; c {
			case '$', '"', '\\':
				word = append(word, c)
			case '\n':
			default:
				word = append(word, '\\', c)
			}
			l.at++
		default:
			word = append(word, c)
			l.at++
		}
	}
	l.open = true
	return word
}

// variable reads $name or ${name}, whose braces are no block.
func (l *lexer) variable(word []byte) []byte {
	word = append(word, '$')
	l.at++
	if l.at >= len(l.data) || l.data[l.at] != '{' {
		return word
	}
	for l.at < len(l.data) {
		c := l.data[l.at]
		if c == '\n' {
			return word
		}
		word = append(word, c)
		l.at++
		if c == '}' {
			return word
		}
	}
	return word
}

// quoteScript writes text as one word of GRUB script that stays as it is.
// It must not hold a newline.
func quoteScript(text string) string {
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
