// Package elfdeps finds the shared libraries that a program needs, by reading
// ELF files as the dynamic loader does. Nothing that it reads is ever run.
package elfdeps

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Object is what an ELF file of amd64 says to the dynamic loader.
type Object struct {
	Interp  string   // PT_INTERP: the loader's absolute path; "" for a library or a static program
	Soname  string   // DT_SONAME
	Needed  []string // DT_NEEDED, in order
	RPath   []string // DT_RPATH, split; nil where there is a DT_RUNPATH, which replaces it
	RunPath []string // DT_RUNPATH, split

	hasRunPath  bool
	endsThreads bool // it names functions of glibc that end a thread
}

// ErrNotELF is what Read returns for a file that does not begin as an ELF file.
var ErrNotELF = errors.New("not an ELF file")

// ArchError says that an ELF file is for another machine than amd64.
type ArchError struct {
	Arch string // as in "aarch64" or "i386"
}

func (e *ArchError) Error() string { return "is for " + e.Arch + ", and the system is for amd64" }

// Bounds of what is read of a file; real ones are far below.
const (
	maxString  = 4096    // bytes of a path or name, PATH_MAX
	maxDynamic = 65536   // entries of the dynamic section
	maxNames   = 4 << 20 // bytes of the dynamic strings, where functions are looked for
)

// Read reads the ELF file r by its program headers alone, as the loader does: the
// section headers may be stripped or wrong. It returns ErrNotELF, an *ArchError,
// or an error that says what is broken. The format is that of the System V ABI
// and of elf(5).
func Read(r io.ReaderAt) (*Object, error) {
	var ident [elf.EI_NIDENT]byte
	if _, err := r.ReadAt(ident[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if string(ident[:4]) != elf.ELFMAG {
		return nil, ErrNotELF
	}
	var order binary.ByteOrder = binary.LittleEndian
	if elf.Data(ident[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	// Type and machine stand at the same place in both classes.
	var kind [4]byte
	if err := readAt(r, kind[:], elf.EI_NIDENT); err != nil {
		return nil, err
	}
	class, machine := elf.Class(ident[elf.EI_CLASS]), elf.Machine(order.Uint16(kind[2:]))
	if class != elf.ELFCLASS64 || machine != elf.EM_X86_64 || order != binary.LittleEndian {
		return nil, &ArchError{arch(class, machine)}
	}
	if t := elf.Type(order.Uint16(kind[:])); t != elf.ET_EXEC && t != elf.ET_DYN {
		return nil, fmt.Errorf("is neither a program nor a shared library (ELF type %s)", t)
	}
	var h elf.Header64
	if err := readStruct(r, 0, &h); err != nil {
		return nil, err
	}
	if h.Phnum > 0 && h.Phentsize != 56 {
		return nil, fmt.Errorf("ELF: a program header of %d bytes", h.Phentsize)
	}
	headers := make([]elf.Prog64, h.Phnum)
	if h.Phnum > 0 {
		if err := readStruct(r, h.Phoff, headers); err != nil {
			return nil, err
		}
	}
	o := &Object{}
	for _, p := range headers {
		switch elf.ProgType(p.Type) {
		case elf.PT_INTERP:
			s, err := readString(r, p.Off, p.Filesz)
			if err != nil {
				return nil, fmt.Errorf("ELF: the loader's name: %w", err)
			}
			o.Interp = s
		case elf.PT_DYNAMIC:
			if err := o.dynamic(r, p, headers); err != nil {
				return nil, err
			}
		}
	}
	return o, nil
}

func arch(class elf.Class, machine elf.Machine) string {
	switch {
	case machine == elf.EM_386:
		return "i386"
	case machine == elf.EM_X86_64 && class == elf.ELFCLASS32:
		return "x32"
	}
	return strings.ToLower(strings.TrimPrefix(machine.String(), "EM_"))
}

// dynamic reads the dynamic section that p describes.
func (o *Object) dynamic(r io.ReaderAt, p elf.Prog64, headers []elf.Prog64) error {
	var table, size uint64
	var entries []elf.Dyn64
	section := io.NewSectionReader(r, int64(p.Off&(1<<63-1)), int64(min(p.Filesz, maxDynamic*16)))
	for {
		var d elf.Dyn64
		if err := binary.Read(section, binary.LittleEndian, &d); errors.Is(err, io.EOF) {
			break // a section without DT_NULL ends where it ends
		} else if err != nil {
			return fmt.Errorf("ELF: the dynamic section: %w", err)
		}
		tag := elf.DynTag(d.Tag)
		if tag == elf.DT_NULL {
			break
		}
		switch tag {
		case elf.DT_STRTAB:
			table = d.Val
		case elf.DT_STRSZ:
			size = d.Val
		case elf.DT_NEEDED, elf.DT_SONAME, elf.DT_RPATH, elf.DT_RUNPATH:
			entries = append(entries, d)
		}
	}
	if len(entries) == 0 {
		return nil
	}
	offset, ok := fileOffset(headers, table)
	if !ok {
		return errors.New("ELF: the dynamic strings are in no segment")
	}
	for _, d := range entries {
		if d.Val >= size {
			return errors.New("ELF: a name lies outside of the dynamic strings")
		}
		s, err := readString(r, offset+d.Val, size-d.Val)
		if err != nil {
			return fmt.Errorf("ELF: a dynamic string: %w", err)
		}
		switch elf.DynTag(d.Tag) {
		case elf.DT_NEEDED:
			if s != "" {
				o.Needed = append(o.Needed, s)
			}
		case elf.DT_SONAME:
			o.Soname = s
		case elf.DT_RPATH:
			o.RPath = strings.Split(s, ":")
		case elf.DT_RUNPATH:
			o.RunPath, o.hasRunPath = strings.Split(s, ":"), true
		}
	}
	if o.hasRunPath {
		o.RPath = nil
	}
	names := make([]byte, min(size, maxNames))
	n, err := r.ReadAt(names, int64(offset))
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for _, name := range []string{"\x00pthread_exit\x00", "\x00pthread_cancel\x00"} {
		o.endsThreads = o.endsThreads || bytes.Contains(names[:n], []byte(name))
	}
	return nil
}

// fileOffset is where in the file the byte is that is loaded at the address.
func fileOffset(headers []elf.Prog64, address uint64) (uint64, bool) {
	for _, p := range headers {
		if elf.ProgType(p.Type) == elf.PT_LOAD && address >= p.Vaddr && address-p.Vaddr < p.Filesz {
			offset := p.Off + (address - p.Vaddr)
			return offset, offset <= 1<<62
		}
	}
	return 0, false
}

func readAt(r io.ReaderAt, b []byte, offset uint64) error {
	if offset > 1<<62 {
		return errors.New("ELF: an offset beyond any file")
	}
	if n, err := r.ReadAt(b, int64(offset)); n < len(b) {
		if errors.Is(err, io.EOF) {
			return errors.New("ELF: the file is cut off")
		}
		return err
	}
	return nil
}

func readStruct(r io.ReaderAt, offset uint64, to any) error {
	b := make([]byte, binary.Size(to))
	if err := readAt(r, b, offset); err != nil {
		return err
	}
	_, err := binary.Decode(b, binary.LittleEndian, to)
	return err
}

// readString reads a string that ends with a NUL within limit bytes.
func readString(r io.ReaderAt, offset, limit uint64) (string, error) {
	if offset > 1<<62 {
		return "", errors.New("an offset beyond any file")
	}
	b := make([]byte, min(limit, maxString))
	n, err := r.ReadAt(b, int64(offset))
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	end := bytes.IndexByte(b[:n], 0)
	if end < 0 {
		return "", errors.New("it has no end")
	}
	return string(b[:end]), nil
}
