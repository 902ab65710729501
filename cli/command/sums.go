package command

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// sumsFile is where distributors put the sums of what lies beside it.
const sumsFile = "SHA256SUMS"

// maxSums bounds how large a file of sums is, in bytes: those of a distribution's whole
// archive have some MiB.
const maxSums = 16 << 20

// findSum looks beside the file at path for its SHA-256, in PATH.sha256 and in
// SHA256SUMS: the sum in hex, and the file that has it; "" where none has. A file that is there and
// can't be read, or says two things, is an error.
func findSum(path string) (sum, from string, err error) {
	name := filepath.Base(path)
	for _, sums := range []string{path + ".sha256", filepath.Join(filepath.Dir(path), sumsFile)} {
		text, err := readSums(sums)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			sum, err = parseSums(text, name, filepath.Base(sums) != sumsFile)
		}
		if err != nil {
			return "", "", fmt.Errorf("%s: %w; or give the sum by --sha256", sums, err)
		}
		if sum != "" {
			return sum, sums, nil
		}
	}
	return "", "", nil
}

func readSums(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fs.ErrNotExist // a folder of that name, say
	}
	text, err := io.ReadAll(io.LimitReader(f, maxSums+1))
	if err == nil && len(text) > maxSums {
		err = fmt.Errorf("it has more than %d MiB", maxSums>>20)
	}
	return text, err
}

// parseSums finds the SHA-256 of the file called name: in the lines of sha256sum, of text and
// binary mode ("HEX  NAME", "HEX *NAME", a backslash in front where NAME is escaped), and in those of
// --tag and of BSD ("SHA256 (NAME) = HEX"). With alone, a line that is nothing but a sum is
// the file's, too. Lines that are none of these, such as a signature's, count for nothing. It returns
// the sum in lower-case hex, or "" if there is none; two that differ are an error.
func parseSums(text []byte, name string, alone bool) (string, error) {
	found := ""
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, maxSums+1)
	for lines.Scan() {
		sum, of := sumLine(strings.TrimSuffix(lines.Text(), "\r"))
		if sum == "" || of == "" && !alone || of != "" && strings.TrimPrefix(of, "./") != name {
			continue
		}
		if found != "" && found != sum {
			return "", fmt.Errorf("it has two sums for %s", name)
		}
		found = sum
	}
	return found, lines.Err()
}

// sumLine reads one line. The sum is "" where it has none, the name where the line is
// nothing but a sum.
func sumLine(line string) (sum, name string) {
	escaped := false
	if rest, ok := strings.CutPrefix(line, `\`); ok {
		escaped, line = true, rest
	}
	if rest, ok := strings.CutPrefix(line, "SHA256"); ok {
		rest, ok = strings.CutPrefix(strings.TrimPrefix(rest, " "), "(")
		end := strings.LastIndex(rest, ")")
		if !ok || end < 0 {
			return "", ""
		}
		after, ok := strings.CutPrefix(strings.TrimLeft(rest[end+1:], " "), "=")
		if !ok {
			return "", ""
		}
		sum, name = strings.TrimSpace(after), rest[:end]
		if name == "" {
			return "", ""
		}
	} else {
		const digits = 64
		if len(line) < digits {
			return "", ""
		}
		sum = line[:digits]
		switch rest := line[digits:]; {
		case strings.TrimSpace(rest) == "":
		case strings.HasPrefix(rest, "  "), strings.HasPrefix(rest, " *"):
			if name = rest[2:]; name == "" {
				return "", ""
			}
		default:
			return "", ""
		}
	}
	if b, err := hex.DecodeString(sum); err != nil || len(b) != 32 {
		return "", ""
	}
	if escaped {
		name = strings.NewReplacer(`\\`, `\`, `\n`, "\n", `\r`, "\r").Replace(name)
	}
	return strings.ToLower(sum), name
}
