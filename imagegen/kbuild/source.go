package kbuild

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"strings"

	"github.com/memlinux/memlinux/imagegen/tarball"
	"golang.org/x/sys/unix"
)

// sourceLimits bound what a tar may unpack to. Linux 6.12 has 87,000 files with
// 1.5 GB.
var sourceLimits = tarball.Limits{Bytes: 4 << 30, Files: 200_000}

// outFolder is where objects go, in the tree: kbuild then calls every file by a
// path that does not tell where the tree is, so that it is in no object either.
const outFolder = "out"

// unpack unpacks the kernel's source into dir and returns the folder of its
// Makefile, relative to dir. report is told the bytes read of the file.
func unpack(ctx context.Context, r Request, dir string, report func(done, total int64)) (top string, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil { //nolint:gosec // kernels are no secret
		return "", notKernel(err)
	}
	counted := &countingReader{r: io.NewSectionReader(r.Source, 0, r.Size), report: func(n int64) { report(n, r.Size) }}
	plain, err := tarball.NewReader(counted)
	if err != nil {
		return "", notKernel(err)
	}
	defer plain.Close()
	sieve := &sieve{assumeNoAMD: r.noAMDGPU()}
	out, in := io.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = in.CloseWithError(sieve.copy(ctx, plain, tar.NewWriter(in)))
	}()
	err = tarball.Unpack(ctx, out, dir, sourceLimits, nil)
	_ = out.CloseWithError(errStopped)
	<-ended
	if sieve.err != nil && !errors.Is(sieve.err, errStopped) {
		err = sieve.err
	}
	if err != nil {
		return "", notKernel(err)
	}
	if err := sieve.kernel(); err != nil {
		return "", notKernel(err)
	}
	report(r.Size, r.Size)
	return sieve.top, nil
}

var errStopped = errors.New("nobody unpacks any more")

func notKernel(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, unix.ENOSPC):
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("unpack the kernel's source: it is truncated; fetch it again")
	}
	return fmt.Errorf("unpack the kernel's source: %w", err)
}

// sieve copies a kernel's tar without what an x86 kernel is not built from, a
// third of its bytes: the rest of the way is disk.
type sieve struct {
	assumeNoAMD bool // amdgpu is not built, whose register lists are a fourth of all of Linux
	top         string
	topKnown    bool
	seen        map[string]bool
	err         error
}

// folders are those of Linux's top: where the first name in a tar is one, the
// tar has no folder around them.
var folders = map[string]bool{}

func init() {
	for _, name := range strings.Fields("LICENSES Documentation arch block certs crypto drivers fs include init io_uring ipc kernel lib mm net rust samples scripts security sound tools usr virt") {
		folders[name] = true
	}
}

// landmarks are what every kernel tree has.
var landmarks = []string{"Makefile", "Kbuild", "Kconfig", "arch/x86/Makefile"}

func (s *sieve) copy(ctx context.Context, plain io.Reader, to *tar.Writer) error {
	s.seen = map[string]bool{}
	s.err = s.entries(ctx, &zeroCounter{r: &capped{ctx, plain, sourceLimits.Bytes}}, to)
	return s.err
}

func (s *sieve) entries(ctx context.Context, plain *zeroCounter, to *tar.Writer) error {
	from := tar.NewReader(plain)
	buffer := make([]byte, 128<<10)
	familiar := false // a folder of Linux came by
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		plain.zeros = 0
		h, err := from.Next()
		if errors.Is(err, io.EOF) {
			if n == 0 {
				return errors.New("nothing is in it")
			}
			if err := plain.end(); err != nil {
				return err
			}
			return to.Close()
		}
		if errors.Is(err, tar.ErrHeader) {
			return errors.New("it is not a tar")
		}
		if err != nil {
			return err
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		rel, err := s.relative(h)
		if err != nil {
			return err
		}
		familiar = familiar || folders[first(rel)]
		if n > 1000 && !familiar {
			return s.kernel()
		}
		if s.needless(rel, h.Typeflag) {
			continue
		}
		for _, l := range landmarks {
			if rel == l {
				s.seen[l] = h.Typeflag == tar.TypeReg
			}
		}
		// What else a header can say, owners or holes, is of no use here and not
		// always fit to be written.
		plain := &tar.Header{Typeflag: h.Typeflag, Name: h.Name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode, ModTime: h.ModTime}
		if err := to.WriteHeader(plain); err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if _, err := io.CopyBuffer(to, from, buffer); err != nil { //nolint:gosec // Unpack has the limits
			return err
		}
	}
}

// zeroCounter counts the zero bytes at the end of what was read so far.
type zeroCounter struct {
	r     io.Reader
	zeros int
}

func (z *zeroCounter) Read(p []byte) (int, error) {
	n, err := z.r.Read(p)
	if rest := len(bytes.TrimRight(p[:n], "\x00")); rest > 0 {
		z.zeros = n - rest
	} else {
		z.zeros += n
	}
	return n, err
}

// end fails unless a tar's end mark, a block of zeros, was just read and nothing
// else follows: the tar reader takes the end of the data for the end of the tar,
// and the checksum of compressed data comes last.
func (z *zeroCounter) end() error {
	if z.zeros < 512 {
		return io.ErrUnexpectedEOF
	}
	buffer := make([]byte, 64<<10)
	for {
		n, err := z.Read(buffer)
		if z.zeros < n {
			return errors.New("it goes on behind its end; it is damaged, or two were joined")
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// relative is an entry's path in the tree; "." for the tree's folder.
func (s *sieve) relative(h *tar.Header) (string, error) {
	name := path.Clean(h.Name)
	if path.IsAbs(h.Name) || name == ".." || strings.HasPrefix(name, "../") {
		return "", fmt.Errorf("%q would leave the folder that it is unpacked in; this tar is not to be trusted", h.Name)
	}
	if name == "." {
		return name, nil
	}
	if !s.topKnown {
		s.topKnown, s.top = true, "."
		if f := first(name); (f != name || h.Typeflag == tar.TypeDir) && !folders[f] {
			s.top = f
		}
	}
	if s.top == "." {
		return name, nil
	}
	if name == s.top {
		return ".", nil
	}
	rel, inside := strings.CutPrefix(name, s.top+"/")
	if !inside {
		return "", fmt.Errorf("it is no Linux kernel's source: %q is beside the folder %q, and a kernel is in one folder", h.Name, s.top)
	}
	return rel, nil
}

func first(name string) string {
	f, _, _ := strings.Cut(name, "/")
	return f
}

// needless reports whether no x86 kernel is built from a file. Makefiles and
// Kconfig files stay everywhere, since others read them.
func (s *sieve) needless(rel string, kind byte) bool {
	if kind == tar.TypeDir {
		return false
	}
	part := strings.Split(rel, "/")
	base := part[len(part)-1]
	switch {
	// What a former build left behind would be taken for this one's.
	case part[0] == outFolder && len(part) > 1,
		rel == ".config", rel == ".config.old",
		strings.HasPrefix(rel, "include/config/"), strings.HasPrefix(rel, "include/generated/"),
		strings.HasPrefix(rel, "arch/x86/include/generated/"),
		part[0] == ".git":
		return true
	case strings.HasPrefix(base, "Kconfig"), strings.HasPrefix(base, "Makefile"), strings.HasPrefix(base, "Kbuild"):
		return false
	case part[0] == "Documentation", part[0] == "LICENSES":
		return true
	case part[0] == "arch" && len(part) > 2:
		return part[1] != "x86"
	case part[0] == "tools" && len(part) > 2:
		return part[1] == "testing" || part[1] == "perf"
	}
	return s.assumeNoAMD && strings.HasPrefix(rel, "drivers/gpu/drm/amd/include/asic_reg/")
}

// kernel fails if what came by is no kernel's source.
func (s *sieve) kernel() error {
	for _, l := range landmarks {
		if !s.seen[l] {
			return fmt.Errorf("it is no Linux kernel's source: it has no %s; give a linux-*.tar of kernel.org, or Debian's linux-source", l)
		}
	}
	return nil
}

// noAMDGPU reports whether the driver amdgpu can't come to be switched on: it is
// by nothing but its own line.
func (r Request) noAMDGPU() bool {
	if r.Base == "defconfig" {
		return false
	}
	texts := []string{string(r.Config)}
	for _, f := range r.Fragments {
		texts = append(texts, string(f.Text))
	}
	return !strings.Contains(strings.Join(texts, "\n"), "CONFIG_DRM_AMDGPU=")
}

type countingReader struct {
	r      io.Reader
	n      int64
	told   int64
	report func(n int64)
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.n-c.told >= 1<<20 {
		c.told = c.n
		c.report(c.n)
	}
	return n, err
}

var versionLine = regexp.MustCompile(`(?m)^(VERSION|PATCHLEVEL|SUBLEVEL)[ \t]*=[ \t]*([0-9]*)[ \t]*$`)

// version reads the kernel's version from its top Makefile: "6.1.192". A
// Makefile that tells none is not a kernel's.
func version(tree fs.FS) (string, error) {
	f, err := tree.Open("Makefile")
	if err != nil {
		return "", fmt.Errorf("read the kernel's version: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return "", fmt.Errorf("read the kernel's version: %w", err)
	}
	found := map[string]string{}
	for _, m := range versionLine.FindAllStringSubmatch(string(text), -1) {
		if _, have := found[m[1]]; !have {
			found[m[1]] = m[2]
		}
	}
	if found["VERSION"] == "" || found["PATCHLEVEL"] == "" {
		return "", errors.New("it is no Linux kernel's source: its Makefile tells no VERSION and PATCHLEVEL")
	}
	v := found["VERSION"] + "." + found["PATCHLEVEL"]
	if found["SUBLEVEL"] != "" {
		v += "." + found["SUBLEVEL"]
	}
	return v, nil
}

// room fails if the file system of dir has not need bytes left.
func room(dir string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("see how much space %s has: %w", dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	if free < need {
		return fmt.Errorf("building this kernel takes about %.1f GB in %s, and %.1f GB are free there: %w", float64(need)/1e9, dir, float64(free)/1e9, os.NewSyscallError("statfs", unix.ENOSPC))
	}
	return nil
}

// capped ends with the context and behind what a source may unpack to: what
// the sieve drops never comes to Unpack, which has the limits.
type capped struct {
	ctx  context.Context
	r    io.Reader
	left int64
}

func (c *capped) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.r.Read(p)
	if c.left -= int64(n); c.left < 0 {
		return 0, fmt.Errorf("it unpacks to more than %d MiB, and no kernel does; fetch it again from where you trust", sourceLimits.Bytes>>20)
	}
	return n, err
}
