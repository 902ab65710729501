package local

import (
	"debug/pe"
	"errors"
	"fmt"
	"io"
)

// SignedKernel says whether a kernel image carries a signature, without which
// nothing boots under Secure Boot: a PE image with a certificate table
// (Microsoft PE Format, "Optional Header Data Directories"). Whether the firmware trusts
// it only a boot shows. The error is of reading.
func SignedKernel(r io.ReaderAt) (bool, error) {
	magic := make([]byte, 2)
	if _, err := r.ReadAt(magic, 0); err != nil && !errors.Is(err, io.EOF) {
		return false, fmt.Errorf("read the kernel: %w", err)
	}
	if string(magic) != "MZ" {
		return false, nil
	}
	f, err := pe.NewFile(r)
	if err != nil {
		return false, nil // no PE image that a firmware would start
	}
	var table pe.DataDirectory
	switch h := f.OptionalHeader.(type) {
	case *pe.OptionalHeader64:
		table = h.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_SECURITY]
	case *pe.OptionalHeader32:
		table = h.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_SECURITY]
	}
	return table.VirtualAddress != 0 && table.Size != 0, nil
}
