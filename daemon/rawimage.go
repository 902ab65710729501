package daemon

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/imagegen/tarball"
	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/blockdev"
	"github.com/memlinux/memlinux/media/bootable"
	"github.com/memlinux/memlinux/testvm"
)

// foreignMemory is what a machine has that boots somebody else's image, in MiB: enough for
// most installers. What is not touched costs nothing here.
const foreignMemory = 1024

// writeImage is Write with somebody else's image.
func (s *Server) writeImage(c *call, o *options) ([]any, error) {
	f := o.stream(api.OptImage)
	sum := get[string](o, api.OptSHA256)
	bootTest := o.boolean(api.OptBootTest, true)
	terms := termsOf(o)
	if b, err := hex.DecodeString(sum); sum != "" && (err != nil || len(b) != sha256.Size) {
		o.fail("option %q must be 64 hexadecimal digits, not %q", api.OptSHA256, sum)
	}
	size, err := imageSize(f)
	if f != nil && err != nil {
		o.fail("option %q: %v", api.OptImage, err)
	}
	if err := o.end(); err != nil {
		return nil, err
	}
	terms.Source = f
	dev, disk, err := s.openDevice(c, terms)
	if err != nil {
		closeAll(o.files)
		return nil, err
	}
	phases := []jobs.Phase{{Name: phaseWrite, Weight: 4}, {Name: phaseReadBack, Weight: 3}}
	if bootTest {
		phases = append(phases, bootPhases...)
	}
	ret, err := s.start(c, api.KindWrite, phases, o.files, func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		// Held to the end, as with an image of ours.
		defer disk.Close()
		report := &api.Report{Kind: api.KindWrite, Target: deviceTarget(dev)}
		if err := streamImage(ctx, j, report, f, size, strings.ToLower(sum), disk, func() {
			s.interruptions.forget(identify(dev))
			s.devices.lookAgain()
		}); err != nil {
			return report, err
		}
		back, _, err := s.devices.system.OpenRead(ctx, dev.Name)
		if err != nil {
			return report, err
		}
		defer back.Close()
		return report, s.proveForeign(ctx, j, report, back, bootTest)
	})
	if err != nil {
		disk.Close()
	}
	return ret, err
}

// imageSize is how many bytes are left to be read of a regular file, -1 of what can't
// say.
func imageSize(f *os.File) (int64, error) {
	if f == nil {
		return 0, errors.New("no descriptor")
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	switch mode := info.Mode(); {
	case mode.IsDir():
		return 0, errors.New("it is a folder, not a disk image")
	case mode&(os.ModeNamedPipe|os.ModeSocket) != 0:
		return -1, nil
	case !mode.IsRegular():
		return 0, errors.New("it is neither a file nor a pipe: a disk is copied by a pipe from it")
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	return max(0, info.Size()-at), nil
}

// streamImage writes the image that f gives on the disk, and reads it back. begin is called
// just before the disk is changed.
func streamImage(ctx context.Context, j *jobs.Job, report *api.Report, f *os.File, size int64, sum string, disk *blockdev.Disk, begin func()) error {
	j.Begin(phaseWrite)
	reading, stop := context.WithCancel(ctx)
	defer stop() // what reads ahead, too
	stream, err := openStream(reading, f)
	if err != nil {
		return fmt.Errorf("read the image: %w", err)
	}
	defer stream.Close()
	given := &given{in: stream, size: size, hash: sha256.New()}
	source := &api.Source{Format: "raw", Expected: sum}
	report.Image = &api.Image{Source: source}
	defer func() { source.Bytes, source.SHA256 = given.result() }()

	in := bufio.NewReaderSize(given, 64<<10)
	magic, err := in.Peek(tarball.MagicBytes)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the image: %w", err)
	}
	image := &checked{given: given, want: sum}
	var plain io.Reader = in
	if format := tarball.Format(magic); format != "" {
		source.Format = format
		z, err := tarball.NewReader(in)
		if err != nil {
			return fmt.Errorf("read the image: %w", err)
		}
		plain = z
		defer func() {
			stop()
			image.close(z)
		}()
	} else if size > disk.Size() {
		return &media.NoSpaceError{Where: "the disk", Need: size, Have: disk.Size()}
	}
	image.plain = plain
	// The first MiB is looked at before anything is erased.
	first := bufio.NewReaderSize(image, 1<<20)
	head, err := first.Peek(first.Size())
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the image: %w", err)
	}
	if err := noImage(head); err != nil {
		return err
	}

	begin()
	result, err := media.WriteStream(ctx, disk, media.Stream{Reader: first, Expected: func() int64 {
		if source.Format == "raw" {
			return max(0, size)
		}
		return guess(given.bytes(), size, image.bytes())
	}}, tell(j))
	im := report.Image
	im.Size, im.Bytes = result.Length, result.Bytes
	im.SHA256Written, im.SHA256Read = result.DigestWritten, result.DigestRead
	im.Written, im.Unchanged, im.Rewritten = result.Written+result.Zeroed+result.Head, result.Skipped, result.Rewritten
	if err != nil {
		im.Fault = string(media.FaultOf(err))
		return err
	}
	if im.SHA256Written != im.SHA256Read {
		return &api.Error{Name: api.ErrVerification, Message: "what was read back is not what was written; this machine's memory may be faulty"}
	}
	im.Extents = []api.Extent{{Length: result.Length}}
	if short := result.Length % int64(disk.SectorSize()); short != 0 {
		report.Warnings = append(report.Warnings, fmt.Sprintf("the image ends within a sector of %d bytes, which was filled up with zeros: if it was downloaded, it may be cut short", disk.SectorSize()))
	}
	if result.Rewritten > 0 {
		report.Warnings = append(report.Warnings, fmt.Sprintf("%d bytes could be written only at the second try: the disk is not to be trusted", result.Rewritten))
	}
	report.Written = true
	return nil
}

// leastGuessed is how much of an archive must have been read for a guess: what is read
// and not yet decompressed counts in it.
const leastGuessed = 8 << 20

// guess is how long an image will be that is read out of an archive of size bytes, if the
// rest of it is packed as what was read until now: plain bytes out of given ones. Done by that is the share
// of the archive that is durable on the disk, not a share of the image's bytes, which the
// archive does not tell: gzip has them modulo 4 GiB, and all formats can have several
// streams. 0 is no guess.
func guess(given, size, plain int64) int64 {
	if size <= 0 || given < min(leastGuessed, size) {
		return 0
	}
	return int64(float64(plain) / float64(given) * float64(max(size, given)))
}

// noImage says why nobody wants a file that begins so on a disk as it is, or nil.
func noImage(head []byte) error {
	at := func(offset int, magic string) bool {
		return len(head) >= offset && bytes.HasPrefix(head[offset:], []byte(magic))
	}
	refuse := func(format string, args ...any) error {
		return &api.Error{Name: api.ErrInvalidOption, Message: "nothing was written: " + fmt.Sprintf(format, args...)}
	}
	text := strings.ToLower(strings.TrimLeft(strings.TrimPrefix(string(head[:min(len(head), 1024)]), "\ufeff"), " \t\r\n"))
	switch {
	case len(head) == 0:
		return refuse("the image is empty")
	case strings.HasPrefix(text, "<!doctype") || strings.HasPrefix(text, "<html") || strings.HasPrefix(text, "<?xml"):
		return refuse("the image is a web page: the download failed, fetch it again")
	case tarball.Format(head) != "":
		return refuse("the image is compressed twice (%s within): decompress it once", tarball.Format(head))
	}
	for _, k := range []struct {
		offset            int
		magic, what, hint string
	}{
		{0, "PK\x03\x04", "a zip archive", "unpack it and give the image that is in it"},
		{0, "7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give the image that is in it"},
		{0, "Rar!\x1a\x07", "a rar archive", "unpack it and give the image that is in it"},
		{257, "ustar", "a tar archive", "unpack it and give the image that is in it"},
		{0, "\x04\x22\x4d\x18", "compressed by lz4", "decompress it by lz4 -d"},
		{0, "LZIP", "compressed by lzip", "decompress it by lzip -d"},
		{0, "QFI\xfb", "a qcow2 disk", "convert it by qemu-img convert -O raw"},
		{0, "KDMV", "a VMDK disk", "convert it by qemu-img convert -O raw"},
		{0, "vhdxfile", "a VHDX disk", "convert it by qemu-img convert -O raw"},
		{64, "\x7f\x10\xda\xbe", "a VDI disk", "convert it by qemu-img convert -O raw"},
		{0, "\x3a\xff\x26\xed", "an Android sparse image", "convert it by simg2img"},
		{0, "MSWIM\x00\x00\x00", "a WIM archive", "it can't be written as it is"},
	} {
		if at(k.offset, k.magic) {
			return refuse("the image is %s: %s", k.what, k.hint)
		}
	}
	return nil
}

// proveForeign looks at what is on the disk, and boots it under each firmware that would
// find something to start.
func (s *Server) proveForeign(ctx context.Context, j *jobs.Job, report *api.Report, f *os.File, bootTest bool) error {
	warn := func(format string, args ...any) {
		report.Warnings = append(report.Warnings, fmt.Sprintf(format, args...))
	}
	size, sector := report.Target.Size, report.Target.SectorSize
	found, err := bootable.Look(f, size, sector)
	if err != nil {
		return fmt.Errorf("look at what was written: %w", err)
	}
	if found.OtherSectors != 0 {
		warn("the image's partition table is for sectors of %d bytes, and the disk has %d: no system finds its partitions there", found.OtherSectors, sector)
	}
	// Partition tables of discs are rounded to whole MiB.
	if length := report.Image.Size; found.End > length+1<<20 {
		warn("the image has %d MiB, and its partitions reach to %d MiB: it may be cut short", length>>20, found.End>>20)
	}
	reasons := map[testvm.Firmware]string{testvm.BIOS: found.BIOS, testvm.UEFI: found.UEFI}
	if found.BIOS != "" && found.UEFI != "" {
		what := "there is nothing in it that a firmware would start"
		if found.Table == "" {
			what = "it has no partition table and no boot code; " + what
		}
		warn("%s", what)
	}
	if !bootTest {
		warn("not booted in a virtual machine, as was asked for")
		report.Verified = true
		return nil
	}
	var failed []string
	for _, fw := range firmwares {
		if reasons[fw] != "" {
			report.Boots = append(report.Boots, api.Boot{Firmware: string(fw), Skipped: true, Reason: reasons[fw]})
			continue
		}
		why, err := s.tryBoot(ctx, j, report, testvm.Machine{Firmware: fw, Disk: f, DiskSize: size, SectorSize: sector, Bus: testvm.USB, MemoryMiB: foreignMemory},
			testvm.Expect{Foreign: true})
		if err != nil {
			return err
		}
		if why != "" {
			failed = append(failed, why)
		}
	}
	if len(failed) > 0 {
		return &api.Error{Name: api.ErrVerification, Message: "written and read back, but it is not proven that it boots: " + strings.Join(failed, "; ")}
	}
	report.Verified = true
	return nil
}

// given is the file or pipe, as it is given. Reading it counts and hashes.
type given struct {
	in   io.Reader
	size int64 // that it must have; -1: what it has

	mu    sync.Mutex
	hash  hash.Hash
	n     int64
	ended bool
}

// Read is that of an io.Reader.
func (g *given) Read(p []byte) (n int, err error) {
	n, err = g.in.Read(p)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hash.Write(p[:n])
	g.n += int64(n)
	if errors.Is(err, io.EOF) {
		if g.size >= 0 && g.n != g.size {
			return n, fmt.Errorf("the image had %d bytes and %d could be read: it was changed meanwhile, try again", g.size, g.n)
		}
		g.ended = true
	}
	return n, err
}

func (g *given) bytes() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

// result is how many bytes were read, and their sum if that is all of them.
func (g *given) result() (n int64, sum string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.ended {
		return g.n, ""
	}
	return g.n, hex.EncodeToString(g.hash.Sum(nil))
}

// checked is the image. It ends with io.EOF only if all that was given has the sum
// that it must have.
type checked struct {
	given *given
	plain io.Reader
	want  string // hex; "" for none

	reading sync.Mutex // held by Read

	mu sync.Mutex
	n  int64
}

// closePatience is how long one waits for a file on a file system that does not answer.
const closePatience = 5 * time.Second

// close closes the decompressor, which a Read may still use that nobody waits for any more:
// after a disk has failed while a pipe gave nothing.
func (c *checked) close(z io.Closer) {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		c.reading.Lock()
		defer c.reading.Unlock()
		_ = z.Close() // it was read from
	}()
	select {
	case <-closed:
	case <-time.After(closePatience):
	}
}

func (c *checked) Read(p []byte) (n int, err error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	n, err = c.plain.Read(p)
	c.mu.Lock()
	c.n += int64(n)
	c.mu.Unlock()
	if !errors.Is(err, io.EOF) {
		return n, err
	}
	// A decompressor has seen the end of what is given; this is for one that has not.
	if _, err := io.Copy(io.Discard, c.given); err != nil {
		return n, err
	}
	if _, sum := c.given.result(); c.want != "" && sum != c.want {
		return n, &api.Error{Name: api.ErrVerification, Message: fmt.Sprintf("the image has the sha256 %s and must have %s: it is damaged or another one, fetch it again", sum, c.want)}
	}
	return n, io.EOF
}

func (c *checked) bytes() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}
