package initramfs

import (
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Compression says how an initramfs is compressed.
type Compression struct {
	Name  string // "zstd", "gzip" or "none"
	Level int    // 1 (quick) to 22 (small) of zstd, 1 to 9 of gzip; 0 is the standard
}

// Validate reports whether there is such a compression.
func (c Compression) Validate() error {
	levels := map[string]int{"zstd": 22, "gzip": 9, "none": 0}
	highest, known := levels[c.Name]
	switch {
	case !known:
		return fmt.Errorf("%q is no compression; use zstd, gzip or none", c.Name)
	case highest == 0 && c.Level != 0:
		return fmt.Errorf("without compression there is no level %d; leave it out", c.Level)
	case c.Level < 0 || c.Level > highest:
		return fmt.Errorf("%s has no level %d; use 1 to %d, or 0 for the standard", c.Name, c.Level, highest)
	}
	return nil
}

// windowSize is what the kernel's decompressor must keep in memory, besides all
// else, while the initramfs unpacks. With 8 MiB, the most that the kernel takes,
// Debian's modules get 0.01% smaller.
const windowSize = 4 << 20

func (c Compression) writer(w io.Writer) (io.WriteCloser, error) {
	switch c.Name {
	case "zstd":
		level := zstd.SpeedDefault
		if c.Level != 0 {
			level = zstd.EncoderLevelFromZstd(c.Level)
		}
		// One goroutine: the bytes then depend on nothing but the input.
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(windowSize), zstd.WithEncoderLevel(level))
	case "gzip":
		level := gzip.DefaultCompression
		if c.Level != 0 {
			level = c.Level
		}
		return gzip.NewWriterLevel(w, level)
	case "none":
		return plain{w}, nil
	}
	return nil, errors.New("no compression")
}

type plain struct{ io.Writer }

func (plain) Close() error { return nil }
