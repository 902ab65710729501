package microcode

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// The format of AMD's files, as Linux arch/x86/kernel/cpu/microcode/amd.c and
// arch/x86/include/asm/microcode_amd.h read it; all is little-endian. A file is
// one container or several. A container is its magic and sections, each of a
// type, the size of its content and that. The first is the equivalence table:
// entries of 16 bytes, of which the first four are a processor's signature and
// the two at 12 the short ID under which patches know it; one with a signature
// of 0 ends it. The others are patches, whose header of 64 bytes begins with
//
//	0 date, BCD mmddyyyy   4 patch ID, the revision   24 the short ID (16 bits)
//
// A patch carries a signature that only the processor can check.
const (
	amdMagic        = 0x00414d44
	amdTable        = 0  // type of the section
	amdPatch        = 1  // type of the section
	amdSection      = 8  // bytes of type and size
	amdEntry        = 16 // bytes of an entry of the equivalence table
	amdPatchHeader  = 64
	amdShortID      = 24   // in a patch
	amdEntryShortID = 12   // in an entry
	amdMaxEntries   = 4096 // real ones have up to 40
)

// amdContainer is one container, taken apart.
type amdContainer struct {
	file    string
	at      int // where it is in the file
	entries []amdProcessor
	patches []amdUpdate
}

type amdProcessor struct {
	signature uint32
	shortID   uint16
	bytes     []byte
}

type amdUpdate struct {
	shortID  uint16
	revision uint32
	date     uint32
	bytes    []byte // without the section's type and size
}

// parseAMD reads the containers that a file consists of.
func parseAMD(file string, b []byte) ([]amdContainer, error) {
	if len(b) == 0 {
		return nil, errors.New("it is empty")
	}
	var containers []amdContainer
	for at := 0; at < len(b); {
		c, n, err := parseContainer(b[at:])
		if err != nil {
			return nil, fmt.Errorf("the container at byte %d: %w", at, err)
		}
		c.file, c.at = file, at
		containers = append(containers, c)
		at += n
	}
	return containers, nil
}

// parseContainer reads the container at the begin of b and returns how many
// bytes it has.
func parseContainer(b []byte) (amdContainer, int, error) {
	le := binary.LittleEndian
	if len(b) < 4 || le.Uint32(b) != amdMagic {
		return amdContainer{}, 0, errors.New("it is no AMD microcode: its magic is missing")
	}
	at := 4
	section := func() (kind uint32, content []byte, err error) {
		if len(b)-at < amdSection {
			return 0, nil, errors.New("it is cut short")
		}
		kind, size := le.Uint32(b[at:]), int64(le.Uint32(b[at+4:]))
		if at += amdSection; size > int64(len(b)-at) {
			return 0, nil, fmt.Errorf("it is cut short: a section of %d bytes, and %d are there", size, len(b)-at)
		}
		content = b[at : at+int(size) : at+int(size)]
		at += int(size)
		return kind, content, nil
	}
	kind, table, err := section()
	if err != nil {
		return amdContainer{}, 0, err
	}
	if kind != amdTable || len(table)%amdEntry != 0 || len(table) == 0 || len(table) > amdMaxEntries*amdEntry {
		return amdContainer{}, 0, fmt.Errorf("its table of processors is none: type %d, %d bytes", kind, len(table))
	}
	var c amdContainer
	for entry := range slices.Chunk(table, amdEntry) {
		p := amdProcessor{le.Uint32(entry), le.Uint16(entry[amdEntryShortID:]), entry}
		if p.signature == 0 {
			break
		}
		c.entries = append(c.entries, p)
	}
	for at < len(b) {
		if len(b)-at >= 4 && le.Uint32(b[at:]) == amdMagic {
			break // the next container
		}
		kind, patch, err := section()
		if err != nil {
			return amdContainer{}, 0, err
		}
		if kind != amdPatch || len(patch) < amdPatchHeader {
			return amdContainer{}, 0, fmt.Errorf("a patch of it is none: type %d, %d bytes", kind, len(patch))
		}
		c.patches = append(c.patches, amdUpdate{le.Uint16(patch[amdShortID:]), le.Uint32(patch[4:]), le.Uint32(patch), patch})
	}
	return c, at, nil
}

// trim is the container with the patches for the wanted processors alone, and
// what these are; they may be none.
func (c amdContainer) trim(wanted func(signature uint32) bool) ([]byte, []Update) {
	var entries []amdProcessor
	var table, patches []byte
	for _, p := range c.entries {
		if wanted(p.signature) && slices.ContainsFunc(c.patches, func(u amdUpdate) bool { return u.shortID == p.shortID }) {
			entries = append(entries, p)
			table = append(table, p.bytes...)
		}
	}
	table = append(table, make([]byte, amdEntry)...)
	var updates []Update
	for _, u := range c.patches {
		var targets []target
		for _, p := range entries {
			if p.shortID == u.shortID {
				targets = append(targets, target{signature: p.signature})
			}
		}
		if targets == nil {
			continue
		}
		patches = slices.Concat(patches, words(amdPatch, len(u.bytes)), u.bytes)
		updates = append(updates, Update{
			Vendor: AMD, Signatures: hexes(targets), Revision: fmt.Sprintf("%08x", u.revision), Date: bcd(u.date),
			Size: int64(len(u.bytes)), File: c.file,
		})
	}
	return bytes.Join([][]byte{words(amdMagic, amdTable, len(table)), table, patches}, nil), updates
}

// words are 32-bit numbers as a container has them.
func words(numbers ...int) []byte {
	var b []byte
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint32(b, uint32(n))
	}
	return b
}
