package settings

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"time"

	"github.com/memlinux/memlinux/imagegen/sandbox"
)

// keymapSize is that of a keymap for loadkmap: a magic, a flag for each of 256
// tables, and 128 keys of 16 bits in those that are there.
const (
	keymapMagic = "bkeymap"
	keymapFlags = 256
	keymapTable = 128 * 2
)

// keymapTime is for each program; they take a fraction of a second.
const keymapTime = time.Minute

// xkbSymbols is where the layouts are.
const xkbSymbols = "/usr/share/X11/xkb/symbols/"

// compileKeymap makes the binary keymap of a layout that Validate took. Its
// errors name the packages that are missing.
func compileKeymap(ctx context.Context, name string) ([]byte, error) {
	m := keymap.FindStringSubmatch(name)
	layout, variant := m[1], m[2]
	for tool, pkg := range map[string]string{"ckbcomp": "console-setup", "loadkeys": "kbd"} {
		if _, err := sandbox.Find(tool, pkg); err != nil {
			return nil, fmt.Errorf("make the keymap %s: %w", name, err)
		}
	}
	symbols, err := os.ReadFile(xkbSymbols + layout)
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat(xkbSymbols); err != nil {
			return nil, fmt.Errorf("make the keymap %s: %w", name, &sandbox.MissingError{What: xkbSymbols, Package: "xkb-data"})
		}
		return nil, fmt.Errorf("%s is no keymap: XKB has no layout of that name (ls %s)", name, xkbSymbols)
	}
	if err != nil {
		return nil, fmt.Errorf("make the keymap %s: %w", name, err)
	}
	// ckbcomp only warns of it.
	if variant != "" && !regexp.MustCompile(`xkb_symbols\s+"`+regexp.QuoteMeta(variant)+`"`).Match(symbols) {
		return nil, fmt.Errorf("%s is no keymap: the layout %s has no variant %s (see %s%s)", name, layout, variant, xkbSymbols, layout)
	}
	argv := []string{"ckbcomp", layout}
	if variant != "" {
		argv = append(argv, variant)
	}
	run := func(argv []string, input []byte) ([]byte, error) {
		var out bytes.Buffer
		err := sandbox.Run(ctx, sandbox.Command{Argv: argv, Stdin: bytes.NewReader(input), Output: &out, Limit: keymapTime})
		return out.Bytes(), err
	}
	source, err := run(argv, nil)
	if err != nil {
		return nil, fmt.Errorf("make the keymap %s by %s: %w%s", name, argv[0], err, lastLine(source))
	}
	// Its warnings are in the same stream, and may stand within a line.
	source = regexp.MustCompile(`WARNING: .*\n`).ReplaceAll(source, nil)
	// -u: the console is in Unicode mode, and most layouts have keys beyond Latin-1.
	binary, err := run([]string{"loadkeys", "-q", "-b", "-u"}, source)
	if err != nil {
		return nil, fmt.Errorf("make the keymap %s by loadkeys: %w%s", name, err, lastLine(binary))
	}
	start := bytes.Index(binary, []byte(keymapMagic))
	if start < 0 {
		return nil, fmt.Errorf("make the keymap %s: loadkeys printed no keymap%s", name, lastLine(binary))
	}
	binary = binary[start:]
	tables := 0
	if len(binary) >= len(keymapMagic)+keymapFlags {
		tables = bytes.Count(binary[len(keymapMagic):len(keymapMagic)+keymapFlags], []byte{1})
	}
	// No table but that: a layout without keys, which would leave a dead keyboard.
	if want := len(keymapMagic) + keymapFlags + tables*keymapTable; tables == 0 || len(binary) != want {
		return nil, fmt.Errorf("make the keymap %s: loadkeys printed %d bytes with %d tables", name, len(binary), tables)
	}
	return binary, nil
}

// lastLine is what a program said last, to be put behind an error.
func lastLine(out []byte) string {
	out = bytes.TrimSpace(out)
	line := out[bytes.LastIndexByte(out, '\n')+1:]
	if len(line) == 0 {
		return ""
	}
	return fmt.Sprintf(": %.200q", line)
}
