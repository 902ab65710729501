package main

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"github.com/cpuguy83/go-md2man/v2/md2man"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/memlinux/memlinux/cli/command"
)

// roff is a manual page in the macros of man(7).
type roff struct{ strings.Builder }

// ragged keeps names and options from being hyphenated and pulled apart.
const ragged = ".nh\n.ad l\n"

func newRoff(name string, section int, manual string) *roff {
	r := &roff{}
	// No date: the same source is to give the same page, and a date of the
	// commands' descriptions nobody keeps.
	r.macro("TH", strings.ToUpper(name), fmt.Sprint(section), "", "memlinux "+command.Version, manual)
	r.WriteString(ragged)
	return r
}

// quoted is text of which no character is a command of roff's.
func quoted(text string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", "\\`").Replace(text)
}

func (r *roff) macro(name string, args ...string) {
	r.WriteString("." + name)
	for _, a := range args {
		fmt.Fprintf(r, ` "%s"`, strings.ReplaceAll(quoted(a), `"`, `\(dq`))
	}
	r.WriteString("\n")
}

// text writes paragraphs that blank lines part.
func (r *roff) text(text string) {
	for i, paragraph := range strings.Split(strings.TrimSpace(text), "\n\n") {
		if i > 0 {
			r.macro("PP")
		}
		r.lines(paragraph)
	}
}

func (r *roff) lines(text string) {
	for line := range strings.Lines(text) {
		line = quoted(strings.TrimRight(line, "\n"))
		if strings.HasPrefix(line, ".") {
			line = `\&` + line
		}
		r.WriteString(line + "\n")
	}
}

// verbatim writes lines as they are, indented.
func (r *roff) verbatim(text string) {
	r.WriteString(".RS 4\n.nf\n")
	r.lines(text)
	r.WriteString(".fi\n.RE\n")
}

// item writes a tagged paragraph.
func (r *roff) item(tag, text string) {
	r.WriteString(".TP\n\\fB" + quoted(tag) + "\\fR\n")
	r.text(text)
}

func (r *roff) items(list []command.Item) {
	for _, i := range list {
		r.item(i.Name, i.Text)
	}
}

// option writes a flag as pflag describes it.
func (r *roff) option(f *pflag.Flag) {
	value, usage := pflag.UnquoteUsage(f)
	switch value {
	case "strings":
		value = "LIST"
	case "string":
		value = "TEXT"
	case "uint":
		value = "NUMBER"
	}
	// What the value is often stands in the description, in capitals.
	if f.Value.Type() == "string" || f.Value.Type() == "stringArray" {
		for _, kind := range []string{"FOLDER", "FILE"} {
			if strings.HasPrefix(usage, kind) || strings.Contains(usage, "this "+kind) || strings.HasSuffix(usage, " "+kind) {
				value = kind
			}
		}
	}
	tag := "\\fB" + quoted("--"+f.Name) + "\\fR"
	if f.Shorthand != "" {
		tag = "\\fB" + quoted("-"+f.Shorthand) + "\\fR, " + tag
	}
	if value != "" {
		tag += " \\fI" + quoted(value) + "\\fR"
	}
	if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "[]" {
		usage += " (default: " + f.DefValue + ")"
	}
	r.WriteString(".TP\n" + tag + "\n")
	r.text(usage)
}

func pageName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// commandPage is the manual page of a command.
func commandPage(c *cobra.Command) []byte {
	c.InitDefaultHelpFlag()
	r := newRoff(pageName(c), 1, "memlinux")
	r.macro("SH", "NAME")
	r.lines(pageName(c) + " - " + lowerFirst(c.Short))
	r.macro("SH", "SYNOPSIS")
	if c.HasAvailableSubCommands() {
		r.macro("B", c.CommandPath()+" COMMAND [flags]")
	} else {
		if c.Name() == "memlinux-write" {
			r.macro("B", "memlinux write [flags] [DEVICE...|FILE]")
			r.macro("br")
		}
		r.macro("B", c.UseLine())
	}
	r.macro("SH", "DESCRIPTION")
	description := c.Long
	if description == "" {
		description = c.Short + "."
	}
	r.text(description)
	if c.HasAvailableSubCommands() {
		r.macro("SH", "COMMANDS")
		for _, sub := range c.Commands() {
			if sub.IsAvailableCommand() && sub.Name() != "help" {
				r.item(sub.Use, sub.Short)
			}
		}
	}
	r.macro("SH", "OPTIONS")
	c.NonInheritedFlags().VisitAll(r.option)
	c.InheritedFlags().VisitAll(r.option)
	if c.Example != "" {
		r.macro("SH", "EXAMPLES")
		r.verbatim(unindent(c.Example))
	}
	r.macro("SH", "EXIT STATUS")
	for _, e := range command.ExitCodes {
		r.item(fmt.Sprint(e.Code), e.Meaning)
	}
	if !c.HasParent() {
		r.macro("SH", "ENVIRONMENT")
		r.items(command.Environment)
	}
	if c.Name() == "memlinux" {
		r.macro("SH", "JSON")
		r.text(command.JSONAbout)
		r.items(command.JSON)
	}
	var also []string
	if c.HasParent() {
		also = append(also, pageName(c.Parent())+"(1)")
	} else if c.Name() != "memlinux" {
		also = append(also, "memlinux(1)")
	}
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" && sub.Name() != "completion" {
			also = append(also, pageName(sub)+"(1)")
		}
	}
	r.macro("SH", "SEE ALSO")
	r.lines(strings.Join(append(also, "memlinux-recipe(5)", "memlinux.toml(5)", "memlinuxd(8)"), ", "))
	return []byte(r.String())
}

// lowerFirst makes a sentence what comes behind a page's name: "Print" becomes
// "print".
func lowerFirst(s string) string { return strings.ToLower(s[:1]) + s[1:] }

// unindent takes away what all lines begin with two blanks for.
func unindent(s string) string {
	return strings.TrimPrefix(strings.ReplaceAll(s, "\n  ", "\n"), "  ")
}

// page is a manual page that is a Markdown file.
type page struct {
	file    string
	name    string
	section int
	manual  string // the part of the manual
	is      string // in a few words
}

// render makes the page of the file's text. What is a README's way to say
// something becomes a manual page's: the title is the page's name, sections are
// in capitals, and a table of keys is a list of tagged paragraphs.
func (p page) render(text string) []byte {
	text = strings.TrimSpace(text)
	if _, rest, ok := strings.Cut(text, "\n"); ok && strings.HasPrefix(text, "# ") {
		text = rest
	}
	text = keyTables(text)
	text = regexp.MustCompile(`\[([^\]\n]+)\]\((https?://[^)]+)\)`).ReplaceAllString(text, "$1 ($2)")
	head := fmt.Sprintf("%% %q %q %q %q %q\n# NAME\n%s - %s\n\n# DESCRIPTION\n",
		strings.ToUpper(p.name), fmt.Sprint(p.section), "", "memlinux "+command.Version, p.manual, p.name, p.is)
	var b strings.Builder
	b.WriteString(head)
	code := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "```") {
			code = !code
		}
		if title, ok := strings.CutPrefix(line, "## "); ok && !code {
			if !strings.Contains(title, "`") {
				title = strings.ToUpper(title)
			}
			line = "# " + title
		}
		b.WriteString(line)
	}
	b.WriteString("\n\n") // blackfriday reads past the end of a list that ends the text
	return bytes.Replace(md2man.Render([]byte(b.String())), []byte("\n.SH"), []byte("\n"+ragged+".SH"), 1)
}

// keyTables makes lists of the tables whose first column is a key: five columns
// do not fit on a terminal.
func keyTables(text string) string {
	var b strings.Builder
	var columns []string
	for line := range strings.Lines(text) {
		row, isRow := cells(line)
		switch {
		case !isRow:
			columns = nil
			b.WriteString(line)
		case columns == nil && row[0] == "Key":
			columns = row
		case columns == nil:
			b.WriteString(line)
		case strings.HasPrefix(row[0], "---"):
		case len(row) != len(columns):
			panic("a row of a table has not as many cells as its head: " + line)
		default:
			cell := map[string]string{}
			for i, c := range columns {
				cell[c] = row[i]
			}
			fmt.Fprintf(&b, "%s (%s, standard: %s)\n:   %s. Example: %s\n\n", cell["Key"], cell["Type"], cell["Standard"], cell["What it does"], cell["Example"])
		}
	}
	return b.String()
}

// cells splits a row of a table. A bar between backquotes parts nothing.
func cells(line string) ([]string, bool) {
	line = strings.TrimSpace(line)
	if !strings.HasPrefix(line, "|") {
		return nil, false
	}
	var row []string
	for cell := range strings.SplitSeq(strings.Trim(line, "|"), "|") {
		row = append(row, strings.TrimSpace(cell))
	}
	return row, true
}
