package local

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The marks of our block in GRUB 2's custom.cfg.
const (
	blockBegin = "### BEGIN memlinux ###\n"
	blockEnd   = "### END memlinux ###\n"
	// blockRoom is a comment whose bytes become commands in the copy of the disk
	// on which an entry is proven: nothing there may move.
	blockRoom = "# memlinux wrote the lines between BEGIN and END, and memlinux remove takes\n" +
		"# them out again. What is changed in them by hand is lost with the next install:\n" +
		"# copy an entry to above this block, and give it another --id, to make it yours.\n"
	blockMade = "# made by memlinux:"
)

// customFile is custom.cfg, split at our block.
type customFile struct {
	bytes         []byte // nil where there is no file
	before, after []byte
	present       bool // our block is in it
	made          made
	script        script // of the block
}

// made is what memlinux made beside the block, so that it goes with it.
type made struct {
	file      bool // custom.cfg
	newline   bool // the newline before the block
	grubenv   bool // the file grubenv
	nextEntry bool // the line next_entry in it
}

var errDamagedBlock = errors.New("the marks of memlinux's block, \"" + strings.TrimSpace(blockBegin) + "\" and \"" +
	strings.TrimSpace(blockEnd) + "\", do not stand there once each and in this order: restore them, or delete both and what is between them")

// parseCustom finds our block. The error is about marks that are no pair.
func parseCustom(data []byte) (customFile, error) {
	c := customFile{bytes: bytes.Clone(data), before: bytes.Clone(data)}
	begins, ends := marks(data, blockBegin), marks(data, blockEnd)
	if len(begins) == 0 && len(ends) == 0 {
		return c, nil
	}
	if len(begins) != 1 || len(ends) != 1 || begins[0] > ends[0] {
		return customFile{}, errDamagedBlock
	}
	c.present = true
	c.before = bytes.Clone(data[:begins[0]])
	end := min(ends[0]+len(blockEnd), len(data)) // the last newline may be gone
	c.after = bytes.Clone(data[end:])
	block := data[begins[0]:end]
	c.script = parseScript(block)
	for line := range strings.Lines(string(block)) {
		if words, ok := strings.CutPrefix(strings.TrimSpace(line), blockMade); ok {
			has := func(name string) bool { return slices.Contains(strings.Fields(words), name) }
			c.made = made{has("custom.cfg"), has("newline"), has("grubenv"), has("next_entry")}
		}
	}
	return c, nil
}

// marks are the offsets of the lines that are the mark.
func marks(data []byte, mark string) []int {
	var at []int
	for start := 0; start < len(data); {
		end := len(data)
		if i := bytes.IndexByte(data[start:], '\n'); i >= 0 {
			end = start + i + 1
		}
		if line := string(data[start:end]); line == mark || line == strings.TrimSuffix(mark, "\n") {
			at = append(at, start)
		}
		start = end
	}
	return at
}

// with is the file with a block of those entries, where the block is now or at
// the end. Those named ids fall back to the menu's entry number fallback when
// they fail; def, if it is not empty, boots by itself.
func (c customFile) with(entries string, ids []string, def string, fallback int, m made) []byte {
	var b strings.Builder
	b.Write(c.before)
	if !c.present && m.newline {
		b.WriteByte('\n')
	}
	b.WriteString(blockBegin + entries)
	if def != "" {
		// boot_once says that grub.cfg has taken next_entry.
		fmt.Fprintf(&b, "if [ \"${boot_once}\" != true ]; then\n\tset default=%s\nfi\n", quoteScript(idPrefix+def))
	}
	var tests []string
	for _, id := range ids {
		tests = append(tests, "\"${default}\" = "+quoteScript(idPrefix+id))
	}
	if len(tests) > 0 {
		// GRUB 2.06 knows fallbacks by number only. It must not be stuck in its
		// menu when an entry that was to boot once fails.
		fmt.Fprintf(&b, "if [ %s ]; then\n\tset fallback=%d\nfi\n", strings.Join(tests, " -o "), fallback)
	}
	b.WriteString(blockRoom)
	names := ""
	for _, n := range []struct {
		is   bool
		name string
	}{{m.file, "custom.cfg"}, {m.newline, "newline"}, {m.grubenv, "grubenv"}, {m.nextEntry, "next_entry"}} {
		if n.is {
			names += " " + n.name
		}
	}
	b.WriteString(blockMade + names + "\n" + blockEnd)
	b.Write(c.after)
	return []byte(b.String())
}

// without is the file without our block: nil where there was none before it.
func (c customFile) without() []byte {
	if !c.present {
		return c.bytes
	}
	before := c.before
	if c.made.newline {
		before = bytes.TrimSuffix(before, []byte("\n"))
	}
	rest := slices.Concat(before, c.after)
	if c.made.file && len(rest) == 0 {
		return nil
	}
	if rest == nil {
		rest = []byte{}
	}
	return rest
}
