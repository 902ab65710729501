package local

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"unicode/utf16"
)

const (
	// loaderGUID is the vendor of the variables that systemd-boot and systemd
	// talk by (https://systemd.io/BOOT_LOADER_INTERFACE).
	loaderGUID = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
	// globalGUID is the vendor of the variables of the UEFI specification
	// (2.10 §3.3): BootOrder, SecureBoot.
	globalGUID = "8be4df61-93ca-11d2-aa0d-00e098032b8c"

	// keptVariable are the attributes of a variable that outlives a reboot and
	// that the system and its boot loader can read: non-volatile, boot service,
	// runtime (UEFI 2.10 §8.2.1).
	keptVariable = 7

	// maxVariable bounds what is read of a variable, in bytes. Firmware has some
	// tens of KiB for all of them.
	maxVariable = 1 << 20
)

// variablePath is the file of an EFI variable in the folder of efivarfs.
func variablePath(efivars, name, guid string) string {
	return filepath.Join(efivars, name+"-"+guid)
}

// readVariable reads an EFI variable, nil where it is not there.
func readVariable(efivars, name, guid string) (*Variable, error) {
	path := variablePath(efivars, name, guid)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the EFI variable %s: %w", name, err)
	}
	defer f.Close()
	// Its size is not asked for: it may change until it is read.
	data, err := io.ReadAll(io.LimitReader(f, maxVariable+1))
	if err != nil {
		return nil, fmt.Errorf("read the EFI variable %s: %w", name, err)
	}
	if len(data) == 0 {
		return nil, nil // made by a writer that has not written yet
	}
	v, err := parseVariable(data)
	if err != nil {
		return nil, fmt.Errorf("read the EFI variable %s: %w", name, err)
	}
	v.Name, v.GUID = name, guid
	return &v, nil
}

// parseVariable reads what a file of efivarfs holds: four bytes of attributes,
// little-endian, then the data (Linux Documentation/filesystems/efivarfs.rst).
func parseVariable(data []byte) (Variable, error) {
	if len(data) < 4 {
		return Variable{}, fmt.Errorf("it has %d bytes, fewer than its attributes take", len(data))
	}
	if len(data) > maxVariable {
		return Variable{}, fmt.Errorf("it has more than %d bytes", maxVariable)
	}
	return Variable{Attributes: binary.LittleEndian.Uint32(data), Data: data[4:]}, nil
}

// file is the variable as efivarfs has it.
func (v Variable) file() []byte {
	return append(binary.LittleEndian.AppendUint32(nil, v.Attributes), v.Data...)
}

// encodeUTF16 is s as the firmware's char16 string, with its NUL.
func encodeUTF16(s string) []byte {
	var data []byte
	for _, unit := range utf16.Encode([]rune(s + "\x00")) {
		data = binary.LittleEndian.AppendUint16(data, unit)
	}
	return data
}

// decodeUTF16 reads a char16 string up to its first NUL, or its end.
func decodeUTF16(data []byte) (string, error) {
	if len(data)%2 != 0 {
		return "", fmt.Errorf("%d bytes are no UTF-16 string", len(data))
	}
	var units []uint16
	for i := 0; i < len(data); i += 2 {
		unit := binary.LittleEndian.Uint16(data[i:])
		if unit == 0 {
			break
		}
		units = append(units, unit)
	}
	return string(utf16.Decode(units)), nil
}

// decodeUTF16List reads char16 strings that each end in a NUL, or, the last, at
// the end. Empty ones are left out.
func decodeUTF16List(data []byte) ([]string, error) {
	if len(data)%2 != 0 {
		return nil, fmt.Errorf("%d bytes are no UTF-16 strings", len(data))
	}
	var list []string
	for start, i := 0, 0; i < len(data); i += 2 {
		end := i
		switch {
		case data[i] == 0 && data[i+1] == 0:
		case i+2 == len(data):
			end = len(data)
		default:
			continue
		}
		s, err := decodeUTF16(data[start:end])
		if err != nil {
			return nil, err
		}
		if s != "" {
			list = append(list, s)
		}
		start = i + 2
	}
	return list, nil
}
