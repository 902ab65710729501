// Package compressed reads files of lib/firmware, which distributions also ship
// compressed, as the kernel's firmware loader knows them: FILE.zst and FILE.xz
// (CONFIG_FW_LOADER_COMPRESS, Linux drivers/base/firmware_loader/main.c).
package compressed

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// Suffixes are what a file's name may have behind it, in the order in which the
// kernel looks: the plain file first.
var Suffixes = []string{"", ".zst", ".xz"}

// Trim is a file's name without the suffix of its compression.
func Trim(name string) string {
	for _, suffix := range Suffixes[1:] {
		if base, ok := strings.CutSuffix(name, suffix); ok {
			return base
		}
	}
	return name
}

// ErrTooLarge says that a file has more bytes than were allowed.
var ErrTooLarge = errors.New("it is too large")

// ReadAll reads r, the content of the file called name, and decompresses it by
// the name's suffix. Of more than limit bytes, before or after, it fails with
// ErrTooLarge without having read them all.
func ReadAll(name string, r io.Reader, limit int64) ([]byte, error) {
	raw, err := readAll(r, limit)
	if err != nil {
		return nil, err
	}
	var plain io.Reader
	switch {
	case strings.HasSuffix(name, ".zst"):
		z, err := zstd.NewReader(bytes.NewReader(raw), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(uint64(max(limit, 8<<20))))
		if err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
		defer z.Close()
		plain = z
	case strings.HasSuffix(name, ".xz"):
		if plain, err = (xz.ReaderConfig{}).NewReader(bytes.NewReader(raw)); err != nil {
			return nil, fmt.Errorf("decompress: %w", err)
		}
	default:
		return raw, nil
	}
	b, err := readAll(plain, limit)
	if err != nil && !errors.Is(err, ErrTooLarge) {
		err = fmt.Errorf("decompress: %w", err)
	}
	return b, err
}

func readAll(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%w: more than %d MiB", ErrTooLarge, limit>>20)
	}
	return b, nil
}
