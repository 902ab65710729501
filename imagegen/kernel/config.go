package kernel

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// Config is a kernel's configuration: an option's name without CONFIG_ → its
// value as the file has it, "y", "m", "100" or "\"text\"". An option that is
// not set is not in it.
type Config map[string]string

// ParseConfig reads a configuration as Kconfig writes it (.config,
// /boot/config-RELEASE, /proc/config.gz unpacked). Text without a single
// option, or with a line that is neither an option nor a comment, is an error.
func ParseConfig(r io.Reader) (Config, error) {
	c := Config{}
	s := bufio.NewScanner(io.LimitReader(r, maxConfig+1))
	s.Buffer(nil, 64<<10)
	read := 0
	for n := 1; s.Scan(); n++ {
		if read += len(s.Bytes()) + 1; read > maxConfig {
			return nil, fmt.Errorf("kernel configuration is larger than %d MiB", maxConfig>>20)
		}
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, found := strings.Cut(line, "=")
		name, is := strings.CutPrefix(name, "CONFIG_")
		if !found || !is || name == "" || value == "" || !optionName(name) {
			return nil, fmt.Errorf("kernel configuration: line %d is not CONFIG_NAME=VALUE", n)
		}
		if value == "n" {
			delete(c, name)
			continue
		}
		c[name] = value
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("kernel configuration: %w", err)
	}
	if len(c) == 0 {
		return nil, fmt.Errorf("kernel configuration: no option is in it")
	}
	return c, nil
}

func optionName(s string) bool {
	for _, c := range []byte(s) {
		if c != '_' && (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return true
}

// BuiltIn reports whether an option is built into the kernel itself.
func (c Config) BuiltIn(option string) bool { return c[option] == "y" }
