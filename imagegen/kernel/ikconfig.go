package kernel

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz/lzma"
)

// ErrNoConfig says that a kernel does not carry its configuration
// (CONFIG_IKCONFIG), or not where it can be read.
var ErrNoConfig = errors.New("the kernel does not carry its configuration")

const (
	maxVmlinux = 1 << 30   // of unpacked kernel that is searched, bytes
	maxWindow  = 128 << 20 // what zstd -22 --ultra, the kernel's own choice, needs
	maxConfig  = 8 << 20   // of configuration text, bytes
)

// ikconfig is what kernel/configs.c puts before the configuration, with the
// first bytes of the gzip stream that follows: the marker alone also stands in
// scripts and documentation.
var ikconfig = []byte("IKCFG_ST\x1f\x8b\x08")

// EmbeddedConfig unpacks the kernel in r as far as needed and returns the
// configuration that is in it. It fails with ErrNoConfig where there is none
// or where the kernel's compression can't be read here: LZO, and XZ, which
// x86 kernels use with a branch filter that no Go library knows.
func (im Image) EmbeddedConfig(ctx context.Context, r io.ReaderAt) (Config, error) {
	if im.payloadLength < 8 {
		return nil, ErrNoConfig
	}
	payload := io.NewSectionReader(r, im.payloadOffset, im.payloadLength)
	vmlinux, done, err := decompress(payload, im.payloadLength)
	if err != nil {
		return nil, fmt.Errorf("unpack kernel: %w", err)
	}
	defer done()
	return findConfig(ctx, io.LimitReader(vmlinux, maxVmlinux))
}

// decompress unpacks a bzImage's payload. All formats but gzip have the
// unpacked size behind them, four bytes (scripts/Makefile.lib, size_append).
func decompress(payload io.ReadSeeker, length int64) (r io.Reader, done func(), err error) {
	magic := make([]byte, 4)
	if _, err := io.ReadFull(payload, magic); err != nil {
		return nil, nil, err
	}
	if _, err := payload.Seek(0, io.SeekStart); err != nil {
		return nil, nil, err
	}
	in := bufio.NewReaderSize(io.LimitReader(payload, length-4), 64<<10)
	done = func() {}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		// gzip's own trailer ends with the size.
		z, err := gzip.NewReader(bufio.NewReaderSize(payload, 64<<10))
		if err != nil {
			return nil, nil, err
		}
		z.Multistream(false)
		return z, done, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	case bytes.Equal(magic, []byte{0x02, 0x21, 0x4c, 0x18}):
		return lz4.NewReader(in), done, nil
	case bytes.HasPrefix(magic, []byte("BZh")):
		return bzip2.NewReader(in), done, nil
	case bytes.HasPrefix(magic, []byte{0x5d, 0, 0}):
		z, err := lzma.ReaderConfig{DictCap: maxWindow}.NewReader(in)
		return z, done, err
	case bytes.Equal(magic, []byte{0xfd, '7', 'z', 'X'}):
		return nil, nil, fmt.Errorf("XZ is not read here: %w", ErrNoConfig)
	}
	return nil, nil, fmt.Errorf("payload begins with % x: %w", magic, ErrNoConfig)
}

// findConfig searches a stream for a kernel's configuration and reads it.
func findConfig(ctx context.Context, vmlinux io.Reader) (Config, error) {
	buf := make([]byte, 256<<10)
	have := 0
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n, err := io.ReadFull(vmlinux, buf[have:])
		have += n
		if i := bytes.Index(buf[:have], ikconfig); i >= 0 {
			z, err := gzip.NewReader(io.MultiReader(bytes.NewReader(buf[i+len("IKCFG_ST"):have]), vmlinux))
			if err != nil {
				return nil, fmt.Errorf("read the kernel's configuration: %w", err)
			}
			z.Multistream(false)
			return ParseConfig(z)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, ErrNoConfig
		}
		if err != nil {
			return nil, fmt.Errorf("unpack kernel: %w", err)
		}
		// The marker may lie across two reads.
		have = copy(buf, buf[have-len(ikconfig)+1:have])
	}
}
