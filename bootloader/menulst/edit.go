package menulst

import (
	"bytes"
	"fmt"
	"strings"
)

// Append returns the file with e behind its last line, after a blank line. All
// bytes of f stay as they are; its line ends, and a missing last newline, are
// carried on. (Where f ends in a backslash, that becomes a continuation into the
// blank line.) The error is an *[InvalidError].
func (f *File) Append(e Entry) (*File, error) {
	lines, err := e.lines()
	if err != nil {
		return nil, err
	}
	if len(f.data) == 0 {
		return Parse([]byte(strings.Join(lines, "\n") + "\n")), nil
	}
	nl := f.newline()
	text := nl + strings.Join(lines, nl) + nl
	if !bytes.HasSuffix(f.data, []byte("\n")) {
		text = nl + strings.TrimSuffix(text, nl)
	}
	return Parse(append(f.Bytes(), text...)), nil
}

// Remove returns the file without the entry of that index: without the lines
// from its title to its last command, and without the blank line before the
// title. What stands behind its last command, as comments and markers of
// other programs do, stays. Removing an entry that Append wrote gives back the
// bytes from before.
func (f *File) Remove(index int) (*File, error) {
	first, last, found := -1, -1, -1
	for i, l := range f.lines {
		if l.kind == title {
			if found++; found > index {
				break
			}
			if found == index {
				first, last = i, i
			}
		}
		if first >= 0 && l.kind == command {
			last = i
		}
	}
	if first < 0 {
		return nil, fmt.Errorf("menu.lst: there is no entry %d to remove: the file has %d", index, found+1)
	}
	start, end := f.lines[first].start, f.lines[last].end
	// A blank line may also be the end of a line that goes on by a backslash.
	// It can go only where nothing comes after it.
	before := f.data[:start]
	if i := bytes.LastIndexByte(bytes.TrimSuffix(before, []byte("\n")), '\n') + 1; i < start &&
		len(bytes.Trim(before[i:], " \t\r\n")) == 0 &&
		(f.lines[first-1].start == i || end == len(f.data)) {
		start = i
	}
	kept := f.Bytes()[:start]
	if end == len(f.data) && !bytes.HasSuffix(f.data, []byte("\n")) {
		kept = bytes.TrimSuffix(kept, []byte(f.newline()))
	}
	return Parse(append(kept, f.data[end:]...)), nil
}

// SetGlobal returns the file with the global command name set to value. Of
// several such commands the last one, which counts, is changed, and only
// behind its name. A new one goes before the first global command, or at the
// top. The error is an *[InvalidError].
func (f *File) SetGlobal(name, value string) (*File, error) {
	text, err := Command{Name: name, Args: value}.line()
	if err != nil {
		return nil, err
	}
	value = strings.Trim(value, " ")
	var first, last *line
	for i := range f.lines {
		l := &f.lines[i]
		if l.kind == title {
			break
		}
		if l.kind == command && first == nil {
			first = l
		}
		if l.kind == command && l.name == name {
			last = l
		}
	}
	switch {
	case last != nil && last.args == value:
		return f, nil
	case last != nil:
		raw := f.data[last.start:last.end]
		body := bytes.TrimRight(raw, "\r\n")
		if head, ok := globalHead(body, name); ok && value != "" {
			text = head + value
		}
		return f.splice(last.start, last.start+len(body), text), nil
	case first != nil:
		return f.splice(first.start, first.start, text+f.newline()), nil
	default:
		return f.splice(0, 0, text+f.newline()), nil
	}
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

// newline is how the file's first line ends, since that stays the same
// whatever is appended.
func (f *File) newline() string {
	first, _, _ := bytes.Cut(f.data, []byte("\n"))
	if bytes.HasSuffix(first, []byte("\r")) {
		return "\r\n"
	}
	return "\n"
}
