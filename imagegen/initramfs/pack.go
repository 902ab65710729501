package initramfs

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Packed says what Pack wrote.
type Packed struct {
	Unpacked int64    // bytes of the archive before compression
	Digests  []string // SHA-256 (hex) of each entry of the tree; "" for folders
}

// Pack writes t to w as one newc archive (Linux
// Documentation/driver-api/early-userspace/buffer-format.rst), compressed by
// "zstd", "gzip" or "none". Everything in it is from the moment epoch, which
// lies in 1970 to 2106. report, which may be nil, is called with the bytes of
// content done so far and their total.
func Pack(ctx context.Context, w io.Writer, t Tree, compression string, epoch time.Time, report func(done, total int64)) (Packed, error) {
	if err := t.Validate(); err != nil {
		return Packed{}, err
	}
	if s := epoch.Unix(); s < 0 || s >= 1<<32 {
		return Packed{}, fmt.Errorf("initramfs: the date %s is not in 1970 to 2106", epoch.UTC().Format(time.DateOnly))
	}
	z, err := compressor(w, compression)
	if err != nil {
		return Packed{}, err
	}
	p, err := archive(ctx, z, t, epoch, report)
	if cerr := z.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return Packed{}, fmt.Errorf("write initramfs: %w", err)
	}
	return p, nil
}

// windowSize is what the kernel's decompressor must keep in memory while the
// initramfs unpacks; 8 MiB is also zstd's own limit for "any decoder".
const windowSize = 8 << 20

func compressor(w io.Writer, name string) (io.WriteCloser, error) {
	switch name {
	case "zstd":
		// One goroutine: the bytes then depend on nothing but the input.
		return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(windowSize), zstd.WithEncoderLevel(zstd.SpeedDefault))
	case "gzip":
		return gzip.NewWriterLevel(w, gzip.DefaultCompression)
	case "none":
		return plain{w}, nil
	}
	return nil, fmt.Errorf("initramfs: %q is no compression; use zstd, gzip or none", name)
}

type plain struct{ io.Writer }

func (plain) Close() error { return nil }

func archive(ctx context.Context, w io.Writer, t Tree, epoch time.Time, report func(done, total int64)) (Packed, error) {
	var total, done int64
	for _, e := range t {
		total += e.Size
	}
	count := &counter{w: w}
	// cpio writes headers and padding in tiny pieces.
	buffered := bufio.NewWriterSize(count, 128<<10)
	out := cpio.NewWriter(buffered)
	p := Packed{Digests: make([]string, len(t))}
	buf := make([]byte, 128<<10)
	for i, e := range t {
		if err := out.WriteHeader(header(e, epoch)); err != nil {
			return Packed{}, fmt.Errorf("%s: %w", e.Path, err)
		}
		if e.Mode.IsDir() {
			continue
		}
		h := sha256.New()
		for off := int64(0); off < e.Size; {
			if err := ctx.Err(); err != nil {
				return Packed{}, err
			}
			part := buf[:min(int64(len(buf)), e.Size-off)]
			if n, err := e.Content.ReadAt(part, off); n < len(part) {
				if err == nil || err == io.EOF {
					err = io.ErrUnexpectedEOF
				}
				return Packed{}, fmt.Errorf("read %s: %w", e.Path, err)
			}
			h.Write(part)
			if _, err := out.Write(part); err != nil {
				return Packed{}, fmt.Errorf("%s: %w", e.Path, err)
			}
			off += int64(len(part))
			done += int64(len(part))
			if report != nil {
				report(done, total)
			}
		}
		p.Digests[i] = hex.EncodeToString(h.Sum(nil))
	}
	if err := out.Close(); err != nil {
		return Packed{}, err
	}
	if err := buffered.Flush(); err != nil {
		return Packed{}, err
	}
	p.Unpacked = count.n
	return p, nil
}

func header(e Entry, epoch time.Time) *cpio.Header {
	h := &cpio.Header{Name: e.Path, ModTime: epoch, Size: e.Size, Links: 1, Mode: cpio.FileMode(e.Mode.Perm())}
	if e.Mode&fs.ModeSticky != 0 {
		h.Mode |= cpio.ModeSticky
	}
	if e.Mode.IsDir() {
		h.Mode |= cpio.TypeDir
		h.Links = 2
	} else {
		h.Mode |= cpio.TypeReg
	}
	return h
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
