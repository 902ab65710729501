package microcode

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// The format of an Intel update, Intel SDM vol. 3A §10.11.1 "Microcode Update"
// and §10.11.2 "Optional Extended Signature Table"; all is little-endian. A
// header of intelHeader bytes:
//
//	 0 header version, 1        16 checksum            32 total size, 0 for 2048
//	 4 revision                 20 loader revision, 1  36 reserved
//	 8 date, BCD mmddyyyy       24 processor flags
//	12 processor signature      28 data size, 0 for 2000
//
// then the data, then, where the total size has room for it, the table of more
// processors: their count, a checksum, 12 reserved bytes; of each a signature,
// flags and the checksum that the header would have with these two in it.
const (
	intelHeader    = 48
	intelData      = 2000 // what a data size of 0 means
	intelTable     = 20   // the extended table before its first entry
	intelSignature = 12   // an entry
)

// target is a kind of processor that an update is for.
type target struct{ signature, flags uint32 }

// intelUpdate is one update, with its header.
type intelUpdate struct {
	file     string
	bytes    []byte
	revision uint32
	date     uint32
	targets  []target // the header's, then those of the extended table
}

// parseIntel reads the updates that a file consists of, one behind the other.
func parseIntel(file string, b []byte) ([]intelUpdate, error) {
	if len(b) == 0 {
		return nil, errors.New("it is empty")
	}
	var updates []intelUpdate
	for at := 0; at < len(b); {
		u, err := parseIntelUpdate(b[at:])
		if err != nil {
			return nil, fmt.Errorf("the update at byte %d: %w", at, err)
		}
		u.file = file
		updates = append(updates, u)
		at += len(u.bytes)
	}
	return updates, nil
}

func parseIntelUpdate(b []byte) (intelUpdate, error) {
	if len(b) < intelHeader {
		return intelUpdate{}, fmt.Errorf("it is cut short in the header: %d bytes", len(b))
	}
	field := func(at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
	if field(0) != 1 || field(20) != 1 {
		return intelUpdate{}, fmt.Errorf("it is no Intel microcode: header version %d, loader revision %d", field(0), field(20))
	}
	data, total := int64(field(28)), int64(field(32))
	if data == 0 {
		data, total = intelData, intelHeader+intelData
	}
	switch {
	case data%4 != 0 || total%4 != 0 || intelHeader+data > total:
		return intelUpdate{}, fmt.Errorf("its header has a size of %d bytes with %d of data, which can't be", total, data)
	case total > int64(len(b)):
		return intelUpdate{}, fmt.Errorf("it is cut short: its header speaks of %d bytes, and %d are there", total, len(b))
	}
	u := intelUpdate{
		bytes: b[:total:total], revision: field(4), date: field(8),
		targets: []target{{field(12), field(24)}},
	}
	table := u.bytes[intelHeader+data:]
	if sum(u.bytes[:intelHeader+data]) != 0 {
		return intelUpdate{}, errors.New("its checksum is wrong")
	}
	if len(table) == 0 {
		return u, nil
	}
	if len(table) < intelTable || int64(len(table)) != intelTable+intelSignature*int64(binary.LittleEndian.Uint32(table)) {
		return intelUpdate{}, fmt.Errorf("its table of more processors has %d bytes, which can't be", len(table))
	}
	if sum(table) != 0 {
		return intelUpdate{}, errors.New("the checksum of its table of more processors is wrong")
	}
	for entry := range slices.Chunk(table[intelTable:], intelSignature) {
		t := target{binary.LittleEndian.Uint32(entry), binary.LittleEndian.Uint32(entry[4:])}
		// With the entry's three in place of the header's the sum stays.
		if t.signature+t.flags+binary.LittleEndian.Uint32(entry[8:]) != field(12)+field(24)+field(16) {
			return intelUpdate{}, fmt.Errorf("the checksum for the processor %08x is wrong", t.signature)
		}
		u.targets = append(u.targets, t)
	}
	return u, nil
}

// sum adds up the 32-bit words of b.
func sum(b []byte) (s uint32) {
	for word := range slices.Chunk(b, 4) {
		s += binary.LittleEndian.Uint32(word)
	}
	return s
}

// fits reports whether a processor can use the update, as the kernel's
// intel_cpu_signatures_match does where the flags are known.
func (u intelUpdate) fits(c CPU) bool {
	return c.Vendor == Intel && slices.ContainsFunc(u.targets, func(t target) bool {
		return t.signature == c.Signature && (c.Flags == 0 || t.flags == 0 || t.flags&c.Flags != 0)
	})
}

func (u intelUpdate) update() Update {
	return Update{
		Vendor: Intel, Signatures: hexes(u.targets), Revision: fmt.Sprintf("%08x", u.revision), Date: bcd(u.date),
		Size: int64(len(u.bytes)), File: u.file,
	}
}

func hexes(targets []target) []string {
	var out []string
	for _, t := range targets {
		out = append(out, fmt.Sprintf("%08x", t.signature))
	}
	slices.Sort(out)
	return slices.Compact(out)
}
