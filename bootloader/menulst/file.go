package menulst

import (
	"bytes"
	"strconv"
	"strings"
)

// Command is one command of a menu.lst.
type Command struct {
	Name string // the first word, as "kernel"; case matters
	Args string // the rest, without the blanks and = before it and the blanks behind
	Line int    // the line it begins on, from 1; ignored by Render and the edits
}

// Entry is a title and the commands under it.
type Entry struct {
	Title    string
	Commands []Command
	Line     int // the title's line, from 1; ignored by Render and the edits
}

// Arg returns the arguments of the entry's last command of that name, which is
// the one that counts, and whether there is one.
func (e Entry) Arg(name string) (args string, ok bool) {
	return lastArg(e.Commands, name)
}

// Kernel returns the path given to kernel, as "/vmlinuz" or
// "(hd0,0)/vmlinuz", and the kernel's command line. The options --type= and
// --no-mem-option before the path are left out. Both are empty where the entry
// loads no kernel.
func (e Entry) Kernel() (path, cmdline string) {
	args, _ := e.Arg("kernel")
	return splitKernel(args)
}

// Initrd returns the path of the initramfs, or "".
func (e Entry) Initrd() string {
	args, _ := e.Arg("initrd")
	path, _, _ := strings.Cut(args, " ")
	return path
}

// Root returns the device that root or rootnoverify names, whichever stands
// last, as GRUB Legacy counts: the second partition of the first disk is
// "(hd0,1)". It is "" where the entry takes the root it is given.
func (e Entry) Root() string {
	for i := len(e.Commands) - 1; i >= 0; i-- {
		if c := e.Commands[i]; c.Name == "root" || c.Name == "rootnoverify" {
			device, _, _ := strings.Cut(c.Args, " ")
			return device
		}
	}
	return ""
}

// UUID returns the file system UUID that uuid names, or "".
func (e Entry) UUID() string {
	uuid, _ := e.Arg("uuid")
	return uuid
}

func splitKernel(args string) (path, cmdline string) {
	for strings.HasPrefix(args, "--type=") || strings.HasPrefix(args, "--no-mem-option") {
		_, args, _ = strings.Cut(args, " ")
		args = strings.TrimLeft(args, " ")
	}
	path, cmdline, _ = strings.Cut(args, " ")
	return path, strings.TrimLeft(cmdline, " ")
}

func lastArg(commands []Command, name string) (string, bool) {
	for i := len(commands) - 1; i >= 0; i-- {
		if commands[i].Name == name {
			return commands[i].Args, true
		}
	}
	return "", false
}

// File is a parsed menu.lst. It never changes: the edits return a new one.
type File struct {
	data  []byte
	lines []line
}

// line is one line as GRUB Legacy sees it: with its continuations.
type line struct {
	start, end int // its bytes in data, the newline included
	num        int // the number of its first physical line, from 1
	kind       kind
	name, args string // for a command; for a title, args is the title
	blanks     bool   // there are blanks behind args
}

type kind int

const (
	blank kind = iota
	comment
	command
	title
)

// Parse reads a menu.lst. It can't fail: what GRUB would not understand is
// kept as a command of that name.
func Parse(data []byte) *File {
	f := &File{data: bytes.Clone(data)}
	for start, num := 0, 1; start < len(data); {
		end := lineEnd(data, start)
		physical := 1
		for end < len(data) && continues(data[start:end]) {
			end = lineEnd(data, end)
			physical++
		}
		l := readLine(data[start:end])
		l.start, l.end, l.num = start, end, num
		f.lines = append(f.lines, l)
		start, num = end, num+physical
	}
	return f
}

// lineEnd is the offset behind the newline of the line that start is in.
func lineEnd(data []byte, start int) int {
	if i := bytes.IndexByte(data[start:], '\n'); i >= 0 {
		return start + i + 1
	}
	return len(data)
}

// continues says whether a line, newline included, ends in a backslash.
func continues(raw []byte) bool {
	body, ok := bytes.CutSuffix(raw, []byte("\n"))
	return ok && bytes.HasSuffix(bytes.TrimRight(body, "\r"), []byte(`\`))
}

func readLine(raw []byte) line {
	text := strings.ReplaceAll(string(raw), "\r", "")
	text = strings.ReplaceAll(text, "\\\n", " ")
	text = strings.TrimSuffix(text, "\n")
	text = strings.ReplaceAll(text, "\t", " ")
	text = strings.TrimLeft(text, " ")
	if strings.HasPrefix(text, "#") {
		return line{kind: comment}
	}
	text, _, _ = strings.Cut(text, "\x00")
	blanks := len(text)
	text = strings.TrimRight(text, " ")
	blanks -= len(text)
	if text == "" {
		return line{kind: blank}
	}
	l := line{kind: command, name: text, blanks: blanks > 0}
	if i := strings.IndexAny(text, " ="); i >= 0 {
		l.name, l.args = text[:i], strings.TrimLeft(text[i:], " =")
	}
	if l.name == "title" {
		l.kind = title
	}
	return l
}

// Bytes returns the file. Parse(x).Bytes() equals x for every x.
func (f *File) Bytes() []byte { return bytes.Clone(f.data) }

// Globals returns the commands before the first title, in their order.
func (f *File) Globals() []Command {
	var commands []Command
	for _, l := range f.lines {
		switch l.kind {
		case title:
			return commands
		case command:
			commands = append(commands, Command{Name: l.name, Args: l.args, Line: l.num})
		}
	}
	return commands
}

// Global returns the arguments of the last global command of that name, which
// is the one that counts, and whether there is one.
func (f *File) Global(name string) (args string, ok bool) {
	return lastArg(f.Globals(), name)
}

// Entries returns the entries in their order. An entry without a command,
// which GRUB Legacy skips in its menu and its count, is among them.
func (f *File) Entries() []Entry {
	var entries []Entry
	for _, l := range f.lines {
		switch {
		case l.kind == title:
			entries = append(entries, Entry{Title: l.args, Line: l.num})
		case l.kind == command && len(entries) > 0:
			e := &entries[len(entries)-1]
			e.Commands = append(e.Commands, Command{Name: l.name, Args: l.args, Line: l.num})
		}
	}
	return entries
}

// Default returns the index of the entry that boots by itself, 0 where the
// file names none. It is not held against the number of entries, and counts as
// GRUB Legacy does: without entries that have no command. ok is false for
// "default saved", where GRUB remembers the entry outside of the file.
func (f *File) Default() (index int, ok bool) {
	ok = true
	for _, l := range f.lines {
		if l.kind == title {
			break
		}
		if l.kind != command || l.name != "default" {
			continue
		}
		// GRUB compares the whole rest of the line with "saved".
		if l.args == "saved" && !l.blanks {
			index, ok = 0, false
		} else if n, isNumber := Number(l.args); isNumber {
			index, ok = n, true
		}
	}
	return index, ok
}

// Number reads a number as GRUB Legacy does: its first digits, or hexadecimal
// ones behind 0x, and it does not look at what follows them. ok is false where
// there are none or the number is 2^31 or more; GRUB then leaves what the number
// is for as it was.
func Number(text string) (n int, ok bool) {
	base, digits := 10, "0123456789"
	if len(text) > 1 && text[0] == '0' && (text[1] == 'x' || text[1] == 'X') {
		text, base, digits = text[2:], 16, "0123456789abcdefABCDEF"
	}
	text = text[:len(text)-len(strings.TrimLeft(text, digits))]
	v, err := strconv.ParseInt(text, base, 32)
	return int(v), err == nil
}
