package menulst

import (
	"bytes"
	"strings"
)

// Undo gives a global command back as it was before [File.SetGlobal].
type Undo struct {
	Name string
	Was  string // the bytes of its line, newline included; "" where there was none
	Is   string // the arguments that SetGlobal gave it
}

// SetGlobal returns the file with the global command name set to value, and
// what [File.UndoGlobal] needs to give back the bytes from before. Of several
// such commands the last one, which counts, is changed, and only behind its
// name. A new one goes before the first global command, or at the top where that
// stands in another program's marked block, which is written anew at any time.
// Where nothing had to change the Undo is empty. The error is an *[InvalidError].
func (f *File) SetGlobal(name, value string) (*File, Undo, error) {
	text, err := Command{Name: name, Args: value}.line()
	if err != nil {
		return nil, Undo{}, err
	}
	value = strings.Trim(value, " ")
	undo := Undo{Name: name, Is: value}
	first, last := f.global(name)
	switch {
	case last != nil && last.args == value && !last.blanks:
		return f, Undo{}, nil
	case last != nil:
		raw := f.data[last.start:last.end]
		body := raw[:len(raw)-len(lastNewline(raw))]
		if head, ok := globalHead(body, name); ok && value != "" {
			text = head + value
		}
		undo.Was = string(raw)
		return f.splice(last.start, last.start+len(body), text), undo, nil
	case first != nil:
		return f.splice(first.start, first.start, text+f.newline()), undo, nil
	default:
		return f.splice(0, 0, text+f.newline()), undo, nil
	}
}

// UndoGlobal returns the file with a global command as it was before the
// SetGlobal that gave u. Where the command has other arguments by now they are
// someone's later choice, and f is returned as it is, as for an empty Undo.
func (f *File) UndoGlobal(u Undo) *File {
	_, last := f.global(u.Name)
	if u.Name == "" || last == nil || last.args != u.Is {
		return f
	}
	was := u.Was
	if was != "" && !strings.HasSuffix(was, "\n") {
		// It was the last line, and is not any more.
		was += lastNewline(f.data[last.start:last.end])
	}
	return f.splice(last.start, last.end, was)
}

// global finds the first global command that is in no marked block, and the last
// one of that name.
func (f *File) global(name string) (first, last *line) {
	marked := false
	for i := range f.lines {
		l := &f.lines[i]
		if l.kind == title {
			break
		}
		marked = marked || l.kind == comment && bytes.HasPrefix(f.data[l.start:], []byte("### BEGIN"))
		if l.kind == command && first == nil && !marked {
			first = l
		}
		if l.kind == command && l.name == name {
			last = l
		}
	}
	return first, last
}

// globalHead is what stands before a command's arguments on its line. It is
// not there where the line is more than its bytes: where it has continuations,
// inner carriage returns or a NUL.
func globalHead(body []byte, name string) (string, bool) {
	if bytes.ContainsAny(body, "\r\n\x00") {
		return "", false
	}
	indent := len(body) - len(bytes.TrimLeft(body, " \t"))
	rest := body[indent+len(name):]
	gap := len(rest) - len(bytes.TrimLeft(rest, " \t="))
	if gap == 0 {
		return "", false
	}
	return string(body[:indent+len(name)+gap]), true
}

// splice replaces the bytes from start to end.
func (f *File) splice(start, end int, text string) *File {
	data := make([]byte, 0, len(f.data)+len(text))
	data = append(data, f.data[:start]...)
	data = append(data, text...)
	return Parse(append(data, f.data[end:]...))
}

// newline is how the file's first line ends.
func (f *File) newline() string {
	first, _, _ := bytes.Cut(f.data, []byte("\n"))
	if bytes.HasSuffix(first, []byte("\r")) {
		return "\r\n"
	}
	return "\n"
}

// lastNewline is the line end of raw, with all its carriage returns, or "".
func lastNewline(raw []byte) string {
	body, ok := bytes.CutSuffix(raw, []byte("\n"))
	if !ok {
		return ""
	}
	return string(raw[len(bytes.TrimRight(body, "\r")):])
}
