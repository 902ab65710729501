// Package tarball opens source tarballs: whatever they are compressed with, and
// however hostile, what comes out is files, folders and links in one folder.
package tarball

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/memlinux/memlinux/imagegen/sandbox"
)

// maxWindow bounds the memory that a decompressor takes, in bytes. The largest
// window in use, that of zstd --long and xz -9, has half of it or less.
const maxWindow = 256 << 20

// xzLimit is how long an xz may run. The one who reads from it sets its pace, and that
// may be a slow stick.
const xzLimit = 24 * time.Hour

// The formats that Format tells apart.
const (
	XZ    = "xz"
	Gzip  = "gzip"
	Zstd  = "zstd"
	Bzip2 = "bzip2"
)

// MagicBytes is how many of the first bytes of a file Format needs.
const MagicBytes = 6

// Format is what a file that begins so is compressed with, or "".
func Format(head []byte) string {
	for _, f := range []struct{ magic, name string }{{"\xfd7zXZ\x00", XZ}, {"\x1f\x8b", Gzip}, {"\x28\xb5\x2f\xfd", Zstd}, {"BZh", Bzip2}} {
		if bytes.HasPrefix(head, []byte(f.magic)) {
			return f.name
		}
	}
	return ""
}

// NewReader returns the plain tar, or whatever else, that r is, in xz, gzip, bzip2, zstd or nothing,
// as told by its first bytes. Close it: an xz runs for it, and ends then. A Read
// of r that blocks at that time is not waited for. Data that are damaged or end
// too early are an error of Read that says so. Where xz is needed and not
// installed, the error holds a *sandbox.MissingError.
func NewReader(r io.Reader) (io.ReadCloser, error) {
	src := &source{r: r}
	in := bufio.NewReaderSize(src, 1<<20)
	// A shorter file is none of these; what it is then, the tar reader says.
	magic, _ := in.Peek(MagicBytes)
	if src.err != nil {
		return nil, src.err
	}
	switch Format(magic) {
	case XZ:
		return newXZ(in)
	case Gzip:
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, damaged("gzip", src, err)
		}
		return &decompressor{"gzip", src, z, func() {}}, nil
	case Zstd:
		z, err := zstd.NewReader(in, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, damaged("zstd", src, err)
		}
		return &decompressor{"zstd", src, z, z.Close}, nil
	case Bzip2:
		return &decompressor{"bzip2", src, bzip2.NewReader(in), func() {}}, nil
	}
	return io.NopCloser(in), nil
}

// source remembers that it was what failed, and not what is made of it.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// decompressor gives the errors of a library a sentence.
type decompressor struct {
	format string
	src    *source
	r      io.Reader
	close  func()
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = damaged(d.format, d.src, err)
	}
	return n, err
}

func (d *decompressor) Close() error {
	d.close()
	return nil
}

func damaged(format string, src *source, err error) error {
	switch {
	case src.err != nil:
		return src.err
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fmt.Errorf("the %s data end too early; fetch the file again", format)
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return fmt.Errorf("the %s data want more than %d MiB of memory to be unpacked", format, maxWindow>>20)
	}
	return fmt.Errorf("the %s data are damaged, or other data follow them; fetch the file again: %w", format, err)
}

// xz is the tar that an xz program writes.
type xz struct {
	*io.PipeReader
	cancel context.CancelFunc
	done   chan struct{}
}

// newXZ decompresses by the xz program: on Debian's linux-source-6.1 (132 MiB)
// it takes 5.8 s, and the Go library, ulikunitz/xz 0.5.17, 12.0 s.
func newXZ(in io.Reader) (io.ReadCloser, error) {
	if _, err := sandbox.Find("xz", "xz-utils"); err != nil {
		return nil, fmt.Errorf("unpack xz: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	pr, pw := io.Pipe()
	x := &xz{PipeReader: pr, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(x.done)
		err := sandbox.Run(ctx, sandbox.Command{
			// Twice quiet: its messages would go where the tar goes.
			Argv:  []string{"xz", "--decompress", "--stdout", "--quiet", "--quiet", "--threads=1", fmt.Sprintf("--memlimit-decompress=%d", maxWindow)},
			Stdin: in, Output: pw, Limit: xzLimit,
		})
		var said interface{ ExitCode() int }
		if errors.As(err, &said) && said.ExitCode() == 1 {
			err = errors.New("the xz data are damaged, end too early, are followed by other data or want too much memory; fetch the file again")
		}
		_ = pw.CloseWithError(err) // nil is the end of the file
	}()
	return x, nil
}

func (x *xz) Close() error {
	x.cancel()
	_ = x.PipeReader.Close() // a Write of xz's output may wait for a Read
	<-x.done
	return nil
}
