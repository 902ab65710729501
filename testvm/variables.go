package testvm

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Variable is a UEFI variable (UEFI specification 2.10, §8.2).
type Variable struct {
	Name       string
	GUID       string // its vendor's, as 8be4df61-93ca-11d2-aa0d-00e098032b8c
	Attributes uint32 // with the bits NON_VOLATILE (1) and BOOTSERVICE_ACCESS (2)
	Data       []byte
}

// The store of variables as EDK II lays it down in flash memory: a firmware
// volume (UEFI Platform Initialization specification, volume 3, §3.2.1) with
// one store, and in it the variables, each on a multiple of 4 bytes
// (MdeModulePkg/Include/Guid/VariableFormat.h). All numbers are little-endian.
const (
	volumeHeader   = 72 // bytes; with the two entries of its block map
	storeHeader    = 28
	variableHeader = 60
	variableAlign  = 4

	storeFormatted = 0x5a
	storeHealthy   = 0xfe

	variableStart = 0x55aa
	// The states, of which a flash memory clears one bit after the other.
	variableAdded    = 0x3f
	variableReplaced = 0x3e // it holds until there is another of its name

	nonVolatile, bootService = 1, 2
)

// gEfiSystemNvDataFvGuid and gEfiAuthenticatedVariableGuid.
var (
	volumeGUID = mustGUID("fff12b8d-7696-4c8b-a985-2747075b4f50")
	storeGUID  = mustGUID("aaf32c78-947b-439a-a180-2e144ec37792")
)

// varStore is a flash memory with a store of variables.
type varStore struct {
	flash      []byte
	start, end int // of the variables within flash
	records    []record
}

// record is a variable as it is stored.
type record struct {
	key   string // the vendor's GUID and the name, as stored
	bytes []byte // header, name and data, without padding
}

// setVariables gives the flash memory these variables, in place of those of
// the same name and vendor; an error where it is no such memory or too small.
func setVariables(flash []byte, vars []Variable) ([]byte, error) {
	s, err := parseStore(flash)
	if err != nil {
		return nil, fmt.Errorf("the firmware's memory for variables: %w", err)
	}
	for _, v := range vars {
		r, err := v.encode()
		if err != nil {
			return nil, err
		}
		s.put(r)
	}
	return s.encode()
}

// parseStore reads the variables of a flash memory that are valid.
func parseStore(flash []byte) (*varStore, error) {
	le := binary.LittleEndian
	if len(flash) < volumeHeader+storeHeader {
		return nil, fmt.Errorf("%d bytes can't hold a store", len(flash))
	}
	// The header's length is of a fixed block map, as EDK II writes it; its
	// 16-bit words add up to zero.
	var sum uint16
	for i := 0; i < volumeHeader; i += 2 {
		sum += le.Uint16(flash[i:])
	}
	volume := le.Uint64(flash[32:])
	switch {
	case !bytes.Equal(flash[16:32], volumeGUID[:]) || string(flash[40:44]) != "_FVH":
		return nil, errors.New("it does not begin with a firmware volume for variables")
	case le.Uint16(flash[48:]) != volumeHeader || sum != 0:
		return nil, errors.New("the firmware volume's header is damaged")
	case volume < volumeHeader+storeHeader || volume > uint64(len(flash)):
		return nil, fmt.Errorf("the firmware volume says that it has %d bytes, of %d", volume, len(flash))
	}
	store := flash[volumeHeader:volume]
	size := le.Uint32(store[16:])
	switch {
	case !bytes.Equal(store[:16], storeGUID[:]):
		return nil, errors.New("it has no store of authenticated variables")
	case size < storeHeader || int64(size) > int64(len(store)):
		return nil, fmt.Errorf("the store says that it has %d bytes, of %d", size, len(store))
	case store[20] != storeFormatted || store[21] != storeHealthy:
		return nil, errors.New("the store is not formatted, or not healthy")
	}

	s := &varStore{flash: flash, start: volumeHeader + storeHeader, end: volumeHeader + int(size)}
	for at := s.start; at+variableHeader <= s.end && le.Uint16(flash[at:]) == variableStart; {
		h := flash[at : at+variableHeader]
		nameSize, dataSize := le.Uint32(h[36:]), le.Uint32(h[40:])
		if h[2] == 0xff || le.Uint32(h[4:]) == ^uint32(0) || nameSize == ^uint32(0) || dataSize == ^uint32(0) {
			nameSize, dataSize = 0, 0 // a header that was not finished
		}
		length := variableHeader + int64(nameSize) + int64(dataSize)
		if length > int64(s.end-at) {
			return nil, fmt.Errorf("the variable at byte %d is longer than the store", at)
		}
		r := record{string(flash[at+44:at+variableHeader]) + string(flash[at+variableHeader:at+variableHeader+int(nameSize)]),
			slices.Clone(flash[at : at+int(length)])}
		switch h[2] {
		case variableAdded:
			s.put(r)
		case variableReplaced:
			r.bytes[2] = variableAdded
			if !slices.ContainsFunc(s.records, func(o record) bool { return o.key == r.key }) {
				s.put(r)
			}
		}
		at = int(roundUp(int64(at)+length, variableAlign))
	}
	return s, nil
}

// put adds a variable, in place of that of the same name and vendor.
func (s *varStore) put(r record) {
	s.records = slices.DeleteFunc(s.records, func(o record) bool { return o.key == r.key })
	s.records = append(s.records, r)
}

// encode is the flash memory with the variables one behind the other, and the
// rest of their store erased.
func (s *varStore) encode() ([]byte, error) {
	flash := slices.Clone(s.flash)
	for i := s.start; i < s.end; i++ {
		flash[i] = 0xff
	}
	at := s.start
	for _, r := range s.records {
		if len(r.bytes) > s.end-at {
			return nil, fmt.Errorf("the UEFI variables need more than the %d bytes that the virtual machine's firmware has for them", s.end-s.start)
		}
		copy(flash[at:], r.bytes)
		at = int(roundUp(int64(at+len(r.bytes)), variableAlign))
	}
	return flash, nil
}

// validate refuses what the firmware would not find or would never have stored.
func (v Variable) validate() error {
	_, err := v.encode()
	return err
}

func (v Variable) encode() (record, error) {
	guid, err := parseGUID(v.GUID)
	switch {
	case err != nil:
		return record{}, fmt.Errorf("UEFI variable %q: %w", v.Name, err)
	case v.Name == "" || strings.ContainsRune(v.Name, 0) || !utf8.ValidString(v.Name):
		return record{}, fmt.Errorf("UEFI variable %q: that is no name", v.Name)
	case v.Attributes&nonVolatile == 0 || v.Attributes&bootService == 0:
		return record{}, fmt.Errorf("UEFI variable %s: with attributes %#x it does not outlast a start of the firmware", v.Name, v.Attributes)
	case len(v.Data) == 0:
		return record{}, fmt.Errorf("UEFI variable %s: without data there is none", v.Name)
	}
	var name []byte
	for _, c := range append(utf16.Encode([]rune(v.Name)), 0) {
		name = binary.LittleEndian.AppendUint16(name, c)
	}
	// The counter, time and key of an authenticated variable stay zero.
	b := make([]byte, variableHeader)
	le := binary.LittleEndian
	le.PutUint16(b, variableStart)
	b[2] = variableAdded
	le.PutUint32(b[4:], v.Attributes)
	le.PutUint32(b[36:], uint32(len(name)))
	le.PutUint32(b[40:], uint32(len(v.Data)))
	copy(b[44:], guid[:])
	return record{string(guid[:]) + string(name), slices.Concat(b, name, v.Data)}, nil
}

// parseGUID reads a GUID in its usual spelling, of which the first three groups
// are numbers, so that their bytes turn around (UEFI specification 2.10,
// appendix A).
func parseGUID(s string) (guid [16]byte, err error) {
	groups := strings.Split(s, "-")
	raw, err := hex.DecodeString(strings.Join(groups, ""))
	if err != nil || len(s) != 36 || len(groups) != 5 || len(groups[0]) != 8 || len(groups[1]) != 4 || len(groups[2]) != 4 || len(groups[3]) != 4 {
		return guid, fmt.Errorf("%q is not a GUID", s)
	}
	copy(guid[:], raw)
	slices.Reverse(guid[0:4])
	slices.Reverse(guid[4:6])
	slices.Reverse(guid[6:8])
	return guid, nil
}

func mustGUID(s string) [16]byte {
	guid, err := parseGUID(s)
	if err != nil {
		panic(err)
	}
	return guid
}
