// Package modules chooses the loadable modules of a kernel that go into an
// initramfs.
//
// A [Library] is all that one kernel has, imported once from its folder
// lib/modules/RELEASE: what each module says of itself, in an index, and their
// bytes, compressed one by one, in an archive. [Library.Select] closes the
// modules that are asked for, by purpose or by name, over what they depend on.
// Everything comes from the module files themselves: nothing of the running
// kernel is asked, neither depmod nor modprobe is run, and a package that was
// never installed, so that nobody ran depmod for it, is as good as any other.
package modules

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/gob"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// Library is the index of all modules of a kernel.
type Library struct {
	Release string
	Modules []Module // sorted by path; each name once
	BuiltIn []string // names of what other kernels have as modules; sorted
	Archive string   // SHA-256 (hex) of the archive with the modules' bytes
	// Checked says that the archive has a checksum of each module, without which
	// a Reader gives none of its bytes.
	Checked bool
}

// Module is a module in a Library.
type Module struct {
	Path   string // below lib/modules/RELEASE, as in "kernel/fs/ext4/ext4.ko"
	Size   int64  // bytes
	SHA256 string // of its bytes, hex
	Offset int64  // of its compressed bytes in the archive
	Packed int64  // bytes that it has there
	// Place is where in kernel/ the module was that this one, out of updates/,
	// replaces; "" if it replaces none.
	Place string
	// Bad says why the file is no module that can be used; "" if it is one.
	Bad string
	Info
}

// Name is the module's name as the kernel has it.
func (m Module) Name() string { return Name(m.Path) }

// MaxSize is the largest module that is taken, in bytes; the largest of
// Debian's, amdgpu, has 19 MiB.
const MaxSize = 128 << 20

// Writer makes a Library of the files of a lib/modules/RELEASE. Several modules
// are worked on at once; the archive has them in the order of the calls.
type Writer struct {
	archive io.Writer
	ctx     context.Context
	cancel  context.CancelFunc
	order   chan chan packed
	limit   chan struct{}
	done    chan struct{}

	builtIn []string
	modules map[string]Module // by name; the appender's until done is closed
	offset  int64
	err     error
}

// packed is a module that a worker is through with.
type packed struct {
	module Module
	bytes  []byte
}

// NewWriter makes a Writer that writes the archive to w. Close it in any case.
func NewWriter(ctx context.Context, w io.Writer) *Writer {
	ctx, cancel := context.WithCancel(ctx)
	out := &Writer{
		archive: w, ctx: ctx, cancel: cancel, modules: map[string]Module{},
		order: make(chan chan packed, runtime.GOMAXPROCS(0)),
		limit: make(chan struct{}, runtime.GOMAXPROCS(0)),
		done:  make(chan struct{}),
	}
	go out.append()
	return out
}

// compressions are the suffixes behind .ko; all three are the kernel's own
// (CONFIG_MODULE_COMPRESS_…).
var compressions = []string{"", ".gz", ".xz", ".zst"}

// Wants reports whether Add has a use for the file called name.
func Wants(name string) bool {
	if name == "modules.builtin" {
		return true
	}
	// A path is a word in modules.dep.
	if strings.ContainsAny(name, " \t\r\n:\\#") {
		return false
	}
	for _, suffix := range compressions {
		if base, ok := strings.CutSuffix(name, ".ko"+suffix); ok && base != "" && !strings.HasSuffix(base, "/") {
			return true
		}
	}
	return false
}

// Add takes a file of lib/modules/RELEASE that Wants wants, by its path below
// that folder and its content, which the Writer keeps. It fails when the context
// is done, or the archive can't be written; Close then says why.
func (w *Writer) Add(name string, content []byte) error {
	if name == "modules.builtin" {
		for line := range strings.FieldsSeq(string(content)) {
			w.builtIn = append(w.builtIn, Name(line))
		}
		return w.ctx.Err()
	}
	select {
	case w.limit <- struct{}{}:
	case <-w.ctx.Done():
		return w.ctx.Err()
	}
	result := make(chan packed, 1)
	go func() {
		defer func() { <-w.limit }()
		result <- pack(name, content)
	}()
	select {
	case w.order <- result:
		return nil
	case <-w.ctx.Done():
		<-result
		return w.ctx.Err()
	}
}

func (w *Writer) append() {
	defer close(w.done)
	for result := range w.order {
		p := <-result
		if w.err != nil {
			continue
		}
		if w.err = w.put(p); w.err != nil {
			w.cancel()
		}
	}
}

func (w *Writer) put(p packed) error {
	name := p.module.Name()
	if other, ok := w.modules[name]; ok {
		if before(other.Path, p.module.Path) {
			if other.Place == "" && strings.HasPrefix(p.module.Path, "kernel/") {
				other.Place = p.module.Path
				w.modules[name] = other
			}
			return nil
		}
		p.module.Place = other.Path
	}
	p.module.Offset = w.offset
	n, err := w.archive.Write(p.bytes)
	w.offset += int64(n)
	w.modules[name] = p.module
	return err
}

// before reports whether of two modules with one name that at path a counts:
// what was put into updates/ is there to replace what is in kernel/ (depmod.d(5)).
func before(a, b string) bool {
	ua, ub := strings.HasPrefix(a, "updates/"), strings.HasPrefix(b, "updates/")
	if ua != ub {
		return ua
	}
	return a < b
}

// Close ends the archive and returns the index, to which the archive's digest
// is still to be added.
func (w *Writer) Close(release string) (*Library, error) {
	close(w.order)
	<-w.done
	canceled := w.ctx.Err()
	w.cancel()
	if w.err == nil {
		w.err = canceled
	}
	if w.err != nil {
		return nil, w.err
	}
	l := &Library{Release: release, BuiltIn: w.builtIn, Checked: true}
	for _, m := range w.modules {
		l.Modules = append(l.Modules, m)
	}
	slices.SortFunc(l.Modules, func(a, b Module) int { return strings.Compare(a.Path, b.Path) })
	slices.Sort(l.BuiltIn)
	l.BuiltIn = slices.Compact(l.BuiltIn)
	return l, nil
}

// packer compresses on the goroutine that calls it, and quickly: the bytes are
// packed once more, into the initramfs, and there better.
var packer = sync.OnceValues(func() (*zstd.Encoder, error) {
	return zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(true), zstd.WithWindowSize(1<<20))
})

// pack makes of a file what the index and the archive have. A file that can't
// be used is in the index alone: nobody may ever ask for it.
func pack(name string, content []byte) packed {
	m := Module{Path: name[:strings.LastIndex(name, ".ko")] + ".ko"}
	file, err := plain(name, content)
	if err == nil {
		m.Info, err = ReadInfo(bytes.NewReader(file))
	}
	var z *zstd.Encoder
	if err == nil {
		z, err = packer()
	}
	if err != nil {
		m.Bad = err.Error()
		return packed{module: m}
	}
	sum := sha256.Sum256(file)
	small := z.EncodeAll(file, make([]byte, 0, len(file)/2))
	m.Size, m.SHA256, m.Packed = int64(len(file)), hex.EncodeToString(sum[:]), int64(len(small))
	return packed{module: m, bytes: small}
}

// plain decompresses a module by its name's suffix.
func plain(name string, content []byte) ([]byte, error) {
	var r io.Reader = bytes.NewReader(content)
	var err error
	switch path.Ext(name) {
	case ".gz":
		r, err = gzip.NewReader(r)
	case ".xz":
		r, err = xz.NewReader(r)
	case ".zst":
		var z *zstd.Decoder
		if z, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxSize)); err == nil {
			defer z.Close()
			r = z
		}
	default:
		return content, nil
	}
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if len(b) > MaxSize {
		return nil, fmt.Errorf("decompressed it has more than %d MiB", MaxSize>>20)
	}
	return b, nil
}

// Write writes l for Parse, as encoding/gob has it: to read thousands of modules
// as JSON would take longer than to choose among them.
func (l *Library) Write(w io.Writer) error {
	if err := gob.NewEncoder(w).Encode(l); err != nil {
		return fmt.Errorf("write the index of modules: %w", err)
	}
	return nil
}

// Parse reads what Write wrote.
func Parse(r io.Reader) (*Library, error) {
	var l Library
	if err := gob.NewDecoder(r).Decode(&l); err != nil {
		return nil, fmt.Errorf("read the index of modules: %w", err)
	}
	return &l, nil
}

// Reader reads modules out of an archive. It keeps the one that it read last
// decompressed, so that reading them one after the other costs the memory of
// one. It may be used by several goroutines.
type Reader struct {
	archive io.ReaderAt
	z       *zstd.Decoder

	mu     sync.Mutex
	have   string // SHA-256 of what plain holds
	packed []byte
	plain  []byte
}

// NewReader reads from the archive of a Library.
func NewReader(archive io.ReaderAt) (*Reader, error) {
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(MaxSize))
	if err != nil {
		return nil, err
	}
	return &Reader{archive: archive, z: z}, nil
}

// Open is the content of m. What damages it in the archive is found by a
// checksum (xxHash, as RFC 8878 has it), which is much quicker than m.SHA256.
func (r *Reader) Open(m Module) io.ReaderAt { return &content{r, m} }

type content struct {
	r *Reader
	m Module
}

func (c *content) ReadAt(p []byte, off int64) (int, error) {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	if err := c.r.load(c.m); err != nil {
		return 0, err
	}
	return bytes.NewReader(c.r.plain).ReadAt(p, off)
}

func (r *Reader) load(m Module) error {
	if r.have == m.SHA256 {
		return nil
	}
	r.have = ""
	if m.Packed < 0 || m.Packed > MaxSize {
		return errors.New("the index of modules is damaged; empty the cache")
	}
	r.packed = slices.Grow(r.packed[:0], int(m.Packed))[:m.Packed]
	if _, err := r.archive.ReadAt(r.packed, m.Offset); err != nil {
		return fmt.Errorf("read the archive of modules: %w", err)
	}
	var err error
	if r.plain, err = r.z.DecodeAll(r.packed, r.plain[:0]); err != nil {
		return fmt.Errorf("read the archive of modules: %w", err)
	}
	if int64(len(r.plain)) != m.Size {
		return errors.New("the archive of modules is damaged; empty the cache")
	}
	r.have = m.SHA256
	return nil
}
