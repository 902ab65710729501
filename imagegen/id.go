package imagegen

import (
	"crypto/sha256"
	"encoding/hex"
)

// SystemID is the ID of the system of a kernel and an initramfs with those
// digests (SHA-256, hex) and that command line: the first 16 hex digits of a
// SHA-256 over the three, each on a line.
func SystemID(kernel, initramfs, cmdline string) string {
	sum := sha256.Sum256([]byte(kernel + "\n" + initramfs + "\n" + cmdline + "\n"))
	return hex.EncodeToString(sum[:8])
}
