package menulst

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// The lines that our block stands between. Other programs' blocks, such as
// Debian's AUTOMAGIC KERNELS LIST, begin otherwise.
const (
	blockBegin = "### BEGIN memlinux"
	blockEnd   = "### END memlinux"
)

// undoMark begins the comment that keeps an [Undo].
const undoMark = "changed by memlinux: "

// Block is what memlinux has in a menu.lst that is not its own: lines between
// two marker lines, which GRUB reads as comments. It is for GRUB Legacy: unlike
// [Render] it takes lock in an entry.
type Block struct {
	Comments []string // its first lines, without the #
	Undo     []Undo   // globals that memlinux changed, with what they were
	Entries  []Entry
}

// BlockError says what is wrong with the lines of memlinux's block in a
// menu.lst. A block that was changed by hand may hold what nobody else has: it
// is neither read nor replaced.
type BlockError struct {
	Line   int // from 1
	Reason string
}

// Error names the line, and what to do.
func (e *BlockError) Error() string {
	return fmt.Sprintf("menu.lst: line %d: %s; undo that by hand, or move lines of your own above %q", e.Line, e.Reason, blockBegin)
}

// Block returns memlinux's block, or nil where the file has none. The error is
// a *[BlockError]: a marker without its other half, a second block, or lines
// that memlinux did not write so.
func (f *File) Block() (*Block, error) {
	p, err := f.findBlock()
	if err != nil || p == nil {
		return nil, err
	}
	return f.readBlock(p)
}

// SetBlock returns the file with b in place of the block that it has, or, where
// it has none, with b behind its last line and a blank line. All other bytes
// stay as they are; line ends, and a missing last newline, are carried on.
// [File.RemoveBlock] gives back the bytes from before. The error is an
// *[InvalidError] or a *[BlockError].
func (f *File) SetBlock(b Block) (*File, error) {
	lines, err := b.lines()
	if err != nil {
		return nil, err
	}
	p, err := f.findBlock()
	switch {
	case err != nil:
		return nil, err
	case p != nil:
		if _, err := f.readBlock(p); err != nil {
			return nil, err
		}
		text := strings.Join(lines, p.newline)
		if p.closed {
			text += p.newline
		}
		return f.splice(p.start, p.end, text), nil
	case len(f.data) == 0:
		return Parse([]byte(strings.Join(lines, "\n") + "\n")), nil
	}
	nl := f.newline()
	text := nl + strings.Join(lines, nl) + nl
	if !bytes.HasSuffix(f.data, []byte("\n")) {
		text = nl + strings.TrimSuffix(text, nl)
	}
	return f.splice(len(f.data), len(f.data), text), nil
}

// RemoveBlock returns the file without memlinux's block and the blank line
// before it. A file without a block is returned as it is. The error is a
// *[BlockError].
func (f *File) RemoveBlock() (*File, error) {
	p, err := f.findBlock()
	if err != nil {
		return nil, err
	}
	if p == nil {
		return f, nil
	}
	if _, err := f.readBlock(p); err != nil {
		return nil, err
	}
	kept, nl := f.data[:p.start], []byte(p.newline)
	// The blank line may be the end of a line that goes on by a backslash, so
	// it is looked for in the bytes.
	before, found := bytes.CutSuffix(kept, nl)
	if found && (len(before) == 0 || bytes.HasSuffix(before, []byte("\n"))) {
		kept = before
		if !p.closed {
			kept = bytes.TrimSuffix(kept, nl)
		}
	}
	return f.splice(len(kept), p.end, ""), nil
}

// place is where a block stands in a file.
type place struct {
	start, end  int // bytes, both marker lines included
	first, last int // indices of the marker lines
	newline     string
	closed      bool // its last line has a newline
}

func (f *File) findBlock() (*place, error) {
	var p *place
	open := false
	for i, l := range f.lines {
		raw := f.data[l.start:l.end]
		begin, end := isMarker(l, raw, blockBegin), isMarker(l, raw, blockEnd)
		wrong := ""
		switch {
		case begin && open:
			wrong = fmt.Sprintf("%q follows on line %d without %q between", blockBegin, f.lines[p.first].num, blockEnd)
		case begin && p != nil:
			wrong = fmt.Sprintf("a second %q", blockBegin)
		case end && !open:
			wrong = fmt.Sprintf("%q without %q before it", blockEnd, blockBegin)
		case begin:
			p, open = &place{start: l.start, first: i, newline: "\n"}, true
			if bytes.HasSuffix(raw, []byte("\r\n")) {
				p.newline = "\r\n"
			}
		case end:
			p.end, p.last, open = l.end, i, false
			p.closed = bytes.HasSuffix(raw, []byte("\n"))
		}
		if wrong != "" {
			return nil, &BlockError{l.num, wrong}
		}
	}
	if open {
		return nil, &BlockError{f.lines[p.first].num, fmt.Sprintf("%q without %q behind it", blockBegin, blockEnd)}
	}
	return p, nil
}

// isMarker takes a marker with any text behind it, so that a marker that was
// written over is noticed.
func isMarker(l line, raw []byte, marker string) bool {
	rest, ok := strings.CutPrefix(strings.TrimLeft(string(raw), " \t"), marker)
	return l.kind == comment && ok && (rest == "" || !isWord(rest[0]))
}

func isWord(c byte) bool {
	return c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// readBlock reads the values of a block, and holds its bytes against those that
// the values make: nothing in it may be another's.
func (f *File) readBlock(p *place) (*Block, error) {
	b := &Block{}
	for _, l := range f.lines[p.first+1 : p.last] {
		switch l.kind {
		case comment:
			if len(b.Entries) > 0 {
				return nil, &BlockError{l.num, "a comment within memlinux's entries is not memlinux's"}
			}
			text := strings.TrimSuffix(string(f.data[l.start:l.end]), p.newline)
			text = strings.TrimPrefix(strings.TrimPrefix(text, "#"), " ")
			if u, ok := parseUndo(text); ok {
				b.Undo = append(b.Undo, u)
			} else {
				b.Comments = append(b.Comments, text)
			}
		case title:
			b.Entries = append(b.Entries, Entry{Title: l.args, Line: l.num})
		case command:
			if len(b.Entries) == 0 {
				return nil, &BlockError{l.num, fmt.Sprintf("%s in memlinux's block is not memlinux's", strconv.Quote(l.name))}
			}
			e := &b.Entries[len(b.Entries)-1]
			e.Commands = append(e.Commands, Command{Name: l.name, Args: l.args, Line: l.num})
		}
	}
	lines, err := b.lines()
	if err != nil {
		return nil, &BlockError{f.lines[p.first].num, "the block of memlinux was changed: " + err.Error()}
	}
	want := strings.Join(lines, p.newline)
	if p.closed {
		want += p.newline
	}
	got := string(f.data[p.start:p.end])
	if want != got {
		at := 0
		for at < len(want) && at < len(got) && want[at] == got[at] {
			at++
		}
		return nil, &BlockError{f.lines[p.first].num + strings.Count(got[:at], "\n"), "this line of memlinux's block was changed by someone else"}
	}
	return b, nil
}

// lines are the block's lines, the markers included.
func (b Block) lines() ([]string, error) {
	out := []string{blockBegin}
	for _, c := range b.Comments {
		if err := checkText("comment", c); err != nil {
			return nil, err
		}
		if strings.HasPrefix(c, undoMark) {
			return nil, &InvalidError{"comment", c, "reads like a note of memlinux's"}
		}
		out = append(out, strings.TrimRight("# "+c, " "))
	}
	for _, u := range b.Undo {
		if !commandName.MatchString(u.Name) {
			return nil, &InvalidError{"command", u.Name, "is not a word of small letters"}
		}
		out = append(out, "# "+u.comment())
	}
	for _, e := range b.Entries {
		lines, err := e.lines(true)
		if err != nil {
			return nil, err
		}
		out = append(append(out, ""), lines...)
	}
	return append(out, blockEnd), nil
}

// comment is the note that keeps u. Go's quoting keeps every byte, in ASCII and
// on one line.
func (u Undo) comment() string {
	return fmt.Sprintf("%s%s is %s and was %s", undoMark, u.Name, strconv.QuoteToASCII(u.Is), strconv.QuoteToASCII(u.Was))
}

func parseUndo(text string) (Undo, bool) {
	rest, ok := strings.CutPrefix(text, undoMark)
	if !ok {
		return Undo{}, false
	}
	name, rest, _ := strings.Cut(rest, " is ")
	is, err := strconv.QuotedPrefix(rest)
	if err != nil {
		return Undo{}, false
	}
	was, found := strings.CutPrefix(rest[len(is):], " and was ")
	if !found {
		return Undo{}, false
	}
	u := Undo{Name: name}
	for _, part := range []struct {
		to   *string
		from string
	}{{&u.Is, is}, {&u.Was, was}} {
		if *part.to, err = strconv.Unquote(part.from); err != nil {
			return Undo{}, false
		}
	}
	return u, true
}

// BlockEntries returns the indices, among those of [File.Entries], of the first
// entry of memlinux's block and of the first one behind it. Both are the number
// of entries where there is no block. The error is a *[BlockError].
func (f *File) BlockEntries() (first, behind int, err error) {
	p, err := f.findBlock()
	if err != nil {
		return 0, 0, err
	}
	titles := func(lines []line) int {
		return len(slices.DeleteFunc(slices.Clone(lines), func(l line) bool { return l.kind != title }))
	}
	if p == nil {
		n := titles(f.lines)
		return n, n, nil
	}
	return titles(f.lines[:p.first]), titles(f.lines[:p.last]), nil
}
