package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/blockdev"
)

// A stick's image as they are: mostly holes.
const (
	stickBytes = 512 << 20
	stickData  = 60 << 20
	stickPiece = 5 << 20
	slowRate   = 30_000_000 // bytes a second, what a cheap stick takes
	throttle   = "/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device"
)

// stick writes an image with holes on a loop device, as fast as that is and
// slowed down, beside those who write sticks.
func (b bench) stick() error {
	image := b.path("holes.img")
	if err := makeHoles(image); err != nil {
		return err
	}
	bmap := b.path("holes.bmap")
	if out, err := exec.Command("bmaptool", "create", "-o", bmap, image).CombinedOutput(); err != nil {
		return fmt.Errorf("bmaptool create: %w: %s", err, out)
	}
	backing := b.path("stick.disk")
	if err := os.WriteFile(backing, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(backing, stickBytes); err != nil {
		return err
	}
	out, err := exec.Command("losetup", "--find", "--show", backing).Output()
	if err != nil {
		return fmt.Errorf("losetup: %w", err)
	}
	device := strings.TrimSpace(string(out))
	defer exec.Command("losetup", "--detach", device).Run() //nolint:errcheck // it goes with its file at the latest

	etcherArgv, noEtcher := etcherSDK()
	sides := func() (us, dd, bmaptool, both *side, others []*side, err error) {
		// What was on the stick before is in nobody's way to be left there.
		stale := func() error { return fill(device, 0xa5) }
		if us, err = ours("extents, with read-back", "stick", image, device); err != nil {
			return nil, nil, nil, nil, nil, err
		}
		if both, err = ours("", "bmap", bmap, image, device); err != nil {
			return nil, nil, nil, nil, nil, err
		}
		both.name = "bmaptool copy, then a read-back"
		dd = &side{name: "dd oflag=direct, all 512 MiB", argv: []string{"dd", "if=" + image, "of=" + device, "bs=4M", "oflag=direct", "conv=fsync", "status=none"}}
		bmaptool = &side{name: "bmaptool copy, no read-back", argv: []string{"bmaptool", "--quiet", "copy", "--bmap", bmap, image, device}}
		if noEtcher == nil {
			others = []*side{{name: "etcher-sdk, all 512 MiB, with read-back", argv: append(etcherArgv, image, device, fmt.Sprint(stickBytes)), rounds: 2}}
		}
		for _, s := range append(others, us, dd, bmaptool, both) {
			s.before = stale
		}
		return us, dd, bmaptool, both, others, nil
	}
	show := func(title string, all ...*side) {
		fmt.Printf("\n%s\n  %-40s %8s %8s %9s\n", title, "", "wall s", "CPU s", "peak MiB")
		for _, s := range all {
			fmt.Printf("  %-40s %8.3f %8.3f %9.1f\n", s.name, median(s.wall).Seconds(), median(s.cpu).Seconds(), mib(median(s.peak)))
		}
	}

	us, dd, bmaptool, both, others, err := sides()
	if err != nil {
		return err
	}
	all := append([]*side{us, dd, bmaptool, both}, others...)
	if err := inTurn(5, all...); err != nil {
		return err
	}
	show("512 MiB with 60 MiB of data on a loop device", all...)
	if noEtcher != nil {
		fmt.Printf("  etcher-sdk is left out: %v\n", noEtcher)
	}
	figure("wall, memlinux / dd", "%.2f", float64(median(us.wall))/float64(median(dd.wall)), 1)
	figure("memlinux's peak, MiB", "%.1f", mib(median(us.peak)), 32)
	holes := func(s *side) {
		if exec.Command("cmp", "--silent", image, device).Run() != nil {
			fmt.Printf("  after %s the holes still have what was on the device before\n", s.name)
		}
	}
	holes(bmaptool)
	if err := us.once(); err != nil {
		return err
	}
	if err := equalData(image, device); err != nil {
		return err
	}
	holes(us)
	us.before = nil
	if err := us.once(); err != nil {
		return err
	}
	fmt.Printf("  the same image once more: %s\n", strings.TrimSpace(string(us.out)))

	if us, dd, bmaptool, both, others, err = sides(); err != nil {
		return err
	}
	all = append([]*side{us, dd, bmaptool, both}, others...)
	slow, err := slowDown(device)
	if err != nil {
		fmt.Printf("\nthe slow device is left out: %v\n", err)
		return nil
	}
	defer slow()
	// The stale bytes need not come slowly.
	for _, s := range all {
		s.before = func() error {
			slow()
			if err := fill(device, 0xa5); err != nil {
				return err
			}
			_, err := slowDown(device)
			return err
		}
	}
	for _, s := range append(others, dd) {
		s.rounds = 1
	}
	if err := inTurn(3, all...); err != nil {
		return err
	}
	show("the same, and the device takes 30 MB/s", all...)
	figure("wall, memlinux / (60 MiB / rate)", "%.3f", median(us.wall).Seconds()/(float64(stickData)/slowRate), 1.05)
	figure("wall, memlinux / bmaptool", "%.2f", float64(median(us.wall))/float64(median(bmaptool.wall)), 1)
	figure("wall, memlinux / bmaptool and a read-back", "%.2f", float64(median(us.wall))/float64(median(both.wall)), 1)
	return nil
}

// makeHoles makes a file with pieces of random data spread over it.
func makeHoles(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(stickBytes); err != nil {
		return err
	}
	const pieces = stickData / stickPiece
	random := rand.NewChaCha8([32]byte{}) // the same in each run
	piece := make([]byte, stickPiece)
	for i := range int64(pieces) {
		if _, err := random.Read(piece); err != nil {
			return err
		}
		if _, err := f.WriteAt(piece, i*(stickBytes/pieces)>>20<<20); err != nil {
			return err
		}
	}
	return f.Sync()
}

// fill puts one byte everywhere.
func fill(device string, value byte) error {
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	chunk := bytes.Repeat([]byte{value}, 4<<20)
	for range stickBytes / len(chunk) {
		if _, err := f.Write(chunk); err != nil {
			return err
		}
	}
	return f.Sync()
}

// slowDown makes the device take slowRate; what it returns takes that back.
func slowDown(device string) (func(), error) {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return nil, err
	}
	set := func(rate int) error {
		return os.WriteFile(throttle, fmt.Appendf(nil, "%d:%d %d", unix.Major(st.Rdev), unix.Minor(st.Rdev), rate), 0)
	}
	if err := set(slowRate); err != nil {
		return nil, fmt.Errorf("the block cgroup (version 1) is not there: %w", err)
	}
	return func() { _ = set(0) }, nil
}

// copyAndCompare copies by the map BMAP the file FROM on the device TO with
// bmaptool, and then reads from the device what it wrote.
func copyAndCompare(args []string, out io.Writer) error {
	cmd := exec.Command("bmaptool", "--quiet", "copy", "--bmap", args[0], args[1], args[2]) //nolint:gosec // it is this program that gives them
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("bmaptool: %w", err)
	}
	device, err := os.Open(args[2])
	if err != nil {
		return err
	}
	defer device.Close()
	// Not out of memory.
	if err := unix.Fadvise(int(device.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	return equalData(args[1], args[2])
}

// equalData holds the image's data against the device.
func equalData(image, device string) error {
	from, err := os.Open(image)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.Open(device)
	if err != nil {
		return err
	}
	defer to.Close()
	extents, err := dataOf(from)
	if err != nil {
		return err
	}
	for _, e := range extents {
		a, b := make([]byte, e.Length), make([]byte, e.Length)
		if _, err := io.ReadFull(io.NewSectionReader(from, e.Offset, e.Length), a); err != nil {
			return err
		}
		if _, err := io.ReadFull(io.NewSectionReader(to, e.Offset, e.Length), b); err != nil {
			return err
		}
		if !bytes.Equal(a, b) {
			return fmt.Errorf("the extent at %d is another on the device", e.Offset)
		}
	}
	return nil
}

// dataOf are the extents of a file that are not holes.
func dataOf(f *os.File) (extents []media.Extent, err error) {
	for at := int64(0); ; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return extents, nil
		}
		if err != nil {
			return nil, err
		}
		to, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		extents = append(extents, media.Extent{Offset: from, Length: to - from, Content: io.NewSectionReader(f, from, to-from)})
		at = to
	}
}

// writeStick writes the data of the file FROM on the device TO, as memlinuxd
// does.
func writeStick(args []string, out io.Writer) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	im := &media.Image{Size: stickBytes, SectorSize: 512}
	if im.Extents, err = dataOf(f); err != nil {
		return err
	}
	ctx, system, name := context.Background(), blockdev.System{}, filepath.Base(args[1])
	read, d, err := system.OpenRead(ctx, name)
	if err != nil {
		return err
	}
	token, err := d.Token(read)
	if err := errors.Join(err, read.Close()); err != nil {
		return err
	}
	disk, err := system.Open(ctx, name, token)
	if err != nil {
		return err
	}
	begin := time.Now()
	res, err := media.Write(ctx, disk, im, nil)
	if err := errors.Join(err, disk.Close()); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "%d bytes of data written, %d were so already, %d bytes of the first MiB written, in %.3f s\n", res.Written+res.Zeroed, res.Skipped, res.Head, time.Since(begin).Seconds())
	return err
}
