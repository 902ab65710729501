package modules

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Info is what a module says of itself.
type Info struct {
	Depends  []string // names of the modules that it can't be loaded without
	Softdeps []string // names or aliases of modules that it would have loaded before or after it
	Aliases  []string // patterns of fnmatch(3) for what it is loaded for
	Firmware []string // paths below /lib/firmware
	Release  string   // the kernel's that it was built for; "" if it does not say
}

// maxModinfo is many times what the largest .modinfo has.
const maxModinfo = 4 << 20

// ReadInfo reads the section .modinfo of a module for amd64, an ELF file (Linux
// include/linux/moduleinfo.h, scripts/mod/modpost.c).
func ReadInfo(r io.ReaderAt) (Info, error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return Info{}, fmt.Errorf("it is no module: %w", err)
	}
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_REL {
		return Info{}, fmt.Errorf("it is no module for amd64 but %s of %s", f.Type, f.Machine)
	}
	s := f.Section(".modinfo")
	switch {
	case s == nil:
		return Info{}, errors.New("it is no module: it has no section .modinfo")
	case s.Size > maxModinfo || s.Type == elf.SHT_NOBITS:
		return Info{}, fmt.Errorf("its section .modinfo of %d bytes can't be", s.Size)
	}
	b, err := s.Data()
	if err != nil {
		return Info{}, fmt.Errorf("read .modinfo: %w", err)
	}
	return parseInfo(b), nil
}

// parseInfo reads pieces of the form key=value that end with a NUL each. A
// piece of another form says nothing to us, nor does it to the kernel.
func parseInfo(b []byte) Info {
	var info Info
	for piece := range bytes.SplitSeq(b, []byte{0}) {
		key, value, _ := strings.Cut(string(piece), "=")
		if value == "" {
			continue
		}
		switch key {
		case "depends":
			for dep := range strings.SplitSeq(value, ",") {
				if dep = Name(dep); dep != "" {
					info.Depends = append(info.Depends, dep)
				}
			}
		case "softdep":
			for dep := range strings.FieldsSeq(value) {
				if dep != "pre:" && dep != "post:" {
					info.Softdeps = append(info.Softdeps, dep)
				}
			}
		case "alias":
			// It becomes a line of words in modules.alias.
			if !strings.ContainsAny(value, " \t\r\n") {
				info.Aliases = append(info.Aliases, value)
			}
		case "firmware":
			info.Firmware = append(info.Firmware, value)
		case "vermagic":
			info.Release, _, _ = strings.Cut(value, " ")
		}
	}
	return info
}

// Name is a module's name as the kernel has it: without folder and suffixes,
// and with _ where the file's name may have a dash.
func Name(file string) string {
	file = file[strings.LastIndexByte(file, '/')+1:]
	file, _, _ = strings.Cut(file, ".ko")
	return strings.ReplaceAll(file, "-", "_")
}
