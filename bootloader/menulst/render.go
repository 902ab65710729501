package menulst

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxLine is the longest line in bytes that GRUB Legacy reads whole (stage2's
// NEW_HEAPSIZE). It also keeps a kernel command line under Linux's 2048 bytes
// on x86, behind which GRUB 2 drops arguments without a word.
const MaxLine = 1500

// Menu is what a new menu.lst says.
type Menu struct {
	Comments []string  // lines at the top of the file, without the #
	Globals  []Command // in their order
	Entries  []Entry   // in their order
}

// InvalidError says which value can't stand in a menu.lst, and why.
type InvalidError struct {
	What   string // "title", "comment", "command" or a command's name
	Value  string
	Reason string
}

// Error names the value and what is wrong with it.
func (e *InvalidError) Error() string {
	return fmt.Sprintf("menu.lst: the %s %q %s", e.What, e.Value, e.Reason)
}

// Render writes a menu.lst that GRUB Legacy and GRUB 2 read alike. Blanks
// around titles and arguments are dropped. A value that the two would not both
// take as it is meant is refused with an *[InvalidError].
func Render(m Menu) ([]byte, error) {
	var out []string
	for _, c := range m.Comments {
		if err := checkText("comment", c); err != nil {
			return nil, err
		}
		out = append(out, strings.TrimRight("# "+c, " "))
	}
	for _, c := range m.Globals {
		text, err := c.line()
		if err != nil {
			return nil, err
		}
		out = append(out, text)
	}
	for _, e := range m.Entries {
		lines, err := e.lines(false)
		if err != nil {
			return nil, err
		}
		if len(out) > 0 {
			out = append(out, "")
		}
		out = append(out, lines...)
	}
	if len(out) == 0 {
		return nil, nil
	}
	return []byte(strings.Join(out, "\n") + "\n"), nil
}

// CheckCommandLine says by an *[InvalidError] why a kernel command line would
// not reach the kernel unharmed through both GRUBs, or returns nil. It may hold
// anything printable but ', " and \. Runs of blanks reach the kernel as one.
func CheckCommandLine(cmdline string) error {
	if err := checkText("kernel command line", cmdline); err != nil {
		return err
	}
	if i := strings.IndexAny(cmdline, `'"\`); i >= 0 {
		return &InvalidError{"kernel command line", cmdline, fmt.Sprintf(
			"has a %c, before which GRUB 2 puts a backslash: leave it out", cmdline[i])}
	}
	return nil
}

// lines are the entry's lines. GRUB 2 knows no lock; GRUB Legacy does.
func (e Entry) lines(legacy bool) ([]string, error) {
	if err := checkText("title", e.Title); err != nil {
		return nil, err
	}
	text := strings.Trim(e.Title, " ")
	switch {
	case text == "":
		return nil, &InvalidError{"title", e.Title, "is empty: the menu would show an empty line"}
	case text[0] == '=':
		return nil, &InvalidError{"title", e.Title, "begins with =, which GRUB skips"}
	case len(e.Commands) == 0:
		return nil, &InvalidError{"title", e.Title, "has no command under it: GRUB 2 crashes on that"}
	}
	lines := []string{"title " + text}
	if err := checkLength("title", lines[0]); err != nil {
		return nil, err
	}
	for _, c := range e.Commands {
		if c.Name == "password" || c.Name == "lock" && !legacy {
			return nil, &InvalidError{c.Name, c.Args, "in an entry is a syntax error for GRUB 2"}
		}
		text, err := c.line()
		if err != nil {
			return nil, err
		}
		lines = append(lines, text)
	}
	return lines, nil
}

var (
	commandName = regexp.MustCompile(`^[a-z][a-z0-9_-]*$`)
	number      = regexp.MustCompile(`^(0|[1-9][0-9]{0,8})$`)
	fsUUID      = regexp.MustCompile(`^[0-9A-Fa-f-]+$`)
)

func (c Command) line() (string, error) {
	if !commandName.MatchString(c.Name) {
		return "", &InvalidError{"command", c.Name, "is not a word of small letters"}
	}
	invalid := func(reason string) (string, error) {
		return "", &InvalidError{c.Name, c.Args, reason}
	}
	if c.Name == "title" {
		return invalid("begins an entry and is no command in one")
	}
	if err := checkText(c.Name, c.Args); err != nil {
		return "", err
	}
	args := strings.Trim(c.Args, " ")
	if strings.HasPrefix(args, "=") {
		return invalid("begins with =, which GRUB skips")
	}
	switch c.Name {
	case "kernel", "module", "initrd":
		path, cmdline := splitKernel(args)
		if !strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "(") {
			return invalid("does not begin with a path like /vmlinuz or (hd0,0)/vmlinuz")
		}
		if strings.ContainsAny(path, `'"\`) {
			return invalid(`has one of ' " \ in its path, which GRUB 2 changes: rename the file`)
		}
		if c.Name != "initrd" {
			if err := CheckCommandLine(cmdline); err != nil {
				return "", err
			}
		}
	case "uuid":
		if !fsUUID.MatchString(args) {
			return invalid("is not a file system's UUID, as 1234-ABCD")
		}
	case "timeout":
		if !number.MatchString(args) {
			return invalid("is not a number of seconds; leave timeout out to wait for ever")
		}
	case "default":
		if args != "saved" && !number.MatchString(args) {
			return invalid("is neither an entry's number, from 0, nor saved")
		}
	}
	text := strings.TrimRight(c.Name+" "+args, " ")
	return text, checkLength(c.Name, text)
}

// checkText refuses what a line of a menu.lst can't hold at all.
func checkText(what, value string) error {
	if !utf8.ValidString(value) {
		return &InvalidError{what, value, "is not UTF-8"}
	}
	for _, r := range value {
		if unicode.IsControl(r) {
			return &InvalidError{what, value, fmt.Sprintf("has the control character %U", r)}
		}
	}
	if strings.HasSuffix(strings.TrimRight(value, " "), `\`) {
		return &InvalidError{what, value, "ends in a backslash, behind which GRUB Legacy goes on in the next line"}
	}
	return nil
}

func checkLength(what, text string) error {
	if len(text) > MaxLine {
		return &InvalidError{what, text, fmt.Sprintf("makes a line of %d bytes; GRUB Legacy reads %d", len(text), MaxLine)}
	}
	return nil
}
