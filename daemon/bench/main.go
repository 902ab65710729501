// Command bench measures memlinux against its peers, both in one run, and
// prints ratios. Each side runs as processes of its own, several times in turn;
// the figures are medians. Timings never decide a test: this is for people.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/fat32"
)

const rounds = 7

func main() {
	var err error
	if len(os.Args) > 2 {
		err = child(os.Args[1], os.Args[2:])
	} else {
		err = run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// child is one side's work, in a process of its own so that its start and its
// memory count.
func child(what string, args []string) error {
	switch what {
	case "initramfs":
		return packInitramfs(args[0], args[1])
	case "fat32":
		return makeVolume(args[0], args[1])
	case "write":
		return writeImage(args[0], args[1])
	}
	return fmt.Errorf("no benchmark %q", what)
}

func run() error {
	dir, err := os.MkdirTemp("", "memlinux-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, bench := range []func(string) error{benchInitramfs, benchFAT32, benchWrite, benchMemory} {
		if err := bench(dir); err != nil {
			return err
		}
	}
	return nil
}

// side is one of the two that are compared.
type side struct {
	name string
	argv []string
	dir  string // its working folder

	wall, cpu []time.Duration
}

func ours(name string, args ...string) (*side, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return &side{name: "memlinux: " + name, argv: append([]string{self}, args...)}, nil
}

// once runs the side and takes its figures. A process's times include those of
// its children.
func (s *side) once() error {
	cmd := exec.Command(s.argv[0], s.argv[1:]...)
	cmd.Dir = s.dir
	begin := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", s.name, err, out)
	}
	s.wall = append(s.wall, time.Since(begin))
	s.cpu = append(s.cpu, cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime())
	return nil
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

// compare runs us and the peer in turn and prints both and the ratios.
func compare(title string, us, peer *side) error {
	for range rounds {
		if err := us.once(); err != nil {
			return err
		}
		if err := peer.once(); err != nil {
			return err
		}
	}
	fmt.Printf("\n%s\n", title)
	for _, s := range []*side{us, peer} {
		fmt.Printf("  %-44s wall %7.3f s   CPU %7.3f s\n", s.name, median(s.wall).Seconds(), median(s.cpu).Seconds())
	}
	fmt.Printf("  %-44s wall %7.2f     CPU %7.2f\n", "ratio (below 1: memlinux takes less)",
		float64(median(us.wall))/float64(median(peer.wall)), float64(median(us.cpu))/float64(median(peer.cpu)))
	return nil
}

const busybox = "/bin/busybox"

func benchInitramfs(dir string) error {
	packed := filepath.Join(dir, "initramfs.img")
	us, err := ours("initramfs, zstd", "initramfs", busybox, packed)
	if err != nil {
		return err
	}
	// The peer packs the very tree that we make.
	if err := us.once(); err != nil {
		return err
	}
	us.wall, us.cpu = nil, nil
	tree := filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o700); err != nil {
		return err
	}
	unpack := side{name: "unpack", argv: []string{"sh", "-c", "zstd -dc " + packed + " | cpio -idm --quiet"}, dir: tree}
	if err := unpack.once(); err != nil {
		return err
	}
	peer := &side{name: "find | cpio -H newc -o | gzip", argv: []string{"sh", "-c", "find . | cpio -H newc -o --quiet | gzip > ../peer.img"}, dir: tree}
	if err := compare("initramfs of busybox and /init", us, peer); err != nil {
		return err
	}
	a, err := os.Stat(packed)
	if err != nil {
		return err
	}
	b, err := os.Stat(filepath.Join(dir, "peer.img"))
	if err != nil {
		return err
	}
	fmt.Printf("  size %d bytes, the peer's %d\n", a.Size(), b.Size())
	return nil
}

func packInitramfs(box, to string) error {
	f, err := os.Open(box)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = initramfs.Pack(context.Background(), out, initramfs.Base(f, info.Size()), "zstd", time.Unix(0, 0), nil)
	return errors.Join(err, out.Close())
}

func benchFAT32(dir string) error {
	tree := filepath.Join(dir, "files")
	for i := range 1000 {
		sub := filepath.Join(tree, fmt.Sprintf("folder%d", i/100))
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file number %d.conf", i)), []byte(strings.Repeat(strconv.Itoa(i), 1000)), 0o600); err != nil {
			return err
		}
	}
	us, err := ours("FAT32 of 1000 files", "fat32", tree, filepath.Join(dir, "ours.fat"))
	if err != nil {
		return err
	}
	theirs := filepath.Join(dir, "theirs.fat")
	peer := &side{name: "mkfs.vfat + mcopy -s", argv: []string{"sh", "-c",
		"rm -f " + theirs + " && mkfs.vfat -F 32 -C " + theirs + " 65536 >/dev/null && mcopy -s -m -i " + theirs + " " + tree + "/* ::/"}}
	if err := compare("a 64 MiB FAT32 image of 1000 files", us, peer); err != nil {
		return err
	}
	check := side{name: "fsck.vfat", argv: []string{"fsck.vfat", "-n", filepath.Join(dir, "ours.fat")}}
	return check.once()
}

func makeVolume(tree, to string) error {
	const size = 64 << 20
	var files []fat32.File
	root := os.DirFS(tree)
	err := fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		f, err := os.Open(filepath.Join(tree, path))
		if err != nil {
			return err
		}
		files = append(files, fat32.File{Path: path, Size: info.Size(), Content: f, ModTime: info.ModTime()})
		return nil
	})
	if err != nil {
		return err
	}
	extents, err := fat32.Volume{Size: size, SectorSize: 512, ID: 1, Label: "BENCH"}.Build(files)
	if err != nil {
		return err
	}
	// Anew, as the peer does.
	if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	if err := out.Truncate(size); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for _, e := range extents {
		if _, err := io.CopyBuffer(io.NewOffsetWriter(out, e.Offset), io.NewSectionReader(e.Content, 0, e.Length), buf); err != nil {
			return err
		}
	}
	return out.Close()
}

const writeBytes = 256 << 20

func benchWrite(dir string) error {
	source := filepath.Join(dir, "source")
	fill := side{name: "fill", argv: []string{"dd", "if=/dev/urandom", "of=" + source, "bs=1M", "count=" + strconv.Itoa(writeBytes>>20), "status=none"}}
	if err := fill.once(); err != nil {
		return err
	}
	us, err := ours("write and read back, with hashes", "write", source, filepath.Join(dir, "written"))
	if err != nil {
		return err
	}
	copied := filepath.Join(dir, "copied")
	peer := &side{name: "dd conv=fsync, then cmp", argv: []string{"sh", "-c",
		"dd if=" + source + " of=" + copied + " bs=4M conv=fsync status=none && dd of=" + copied + " oflag=nocache conv=notrunc,fdatasync count=0 status=none && cmp " + source + " " + copied}}
	return compare(fmt.Sprintf("write %d MiB into a file and read it back from the disk", writeBytes>>20), us, peer)
}

// writeImage writes the whole of a file as the one extent of an image.
func writeImage(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	im := &media.Image{Size: info.Size(), SectorSize: 512, Extents: []media.Extent{{Length: info.Size(), Content: f}}}
	out, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	disk, err := media.NewFileDisk(out, im)
	if err != nil {
		return err
	}
	_, err = media.Write(context.Background(), disk, im, nil)
	return err
}

// benchMemory writes a 2 GiB image through the daemon, and 2 GiB of data
// through the writer, and looks at the peak of the memory in use.
func benchMemory(dir string) error {
	fmt.Printf("\npeak memory (VmHWM)\n")
	cmd := exec.Command("bin/memlinux", "--private", "write", "--size", "2GiB", "--no-boot-test", "--force", filepath.Join(dir, "stick.img"))
	peak, err := watchPeak(cmd, "memlinuxd")
	if err != nil {
		return err
	}
	fmt.Printf("  %-44s %7.1f MiB\n", "memlinuxd, writing a 2 GiB image", float64(peak)/(1<<20))

	source := filepath.Join(dir, "large")
	if err := os.WriteFile(source, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(source, 2<<30); err != nil {
		return err
	}
	us, err := ours("", "write", source, filepath.Join(dir, "large.out"))
	if err != nil {
		return err
	}
	peak, err = watchPeak(exec.Command(us.argv[0], us.argv[1:]...), filepath.Base(us.argv[0]))
	if err != nil {
		return err
	}
	fmt.Printf("  %-44s %7.1f MiB\n", "the writer alone, 2 GiB of data", float64(peak)/(1<<20))
	return nil
}

// watchPeak runs cmd and returns the largest VmHWM, in bytes, that a process
// called name has on the way.
func watchPeak(cmd *exec.Cmd, name string) (int64, error) {
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var peak int64
	for {
		select {
		case err := <-ended:
			if err != nil {
				return 0, fmt.Errorf("%s: %w: %s", cmd.Path, err, out.String())
			}
			if peak == 0 {
				return 0, fmt.Errorf("no process %s was seen", name)
			}
			return peak, nil
		case <-time.After(5 * time.Millisecond):
			peak = max(peak, highWater(name))
		}
	}
}

func highWater(name string) int64 {
	var peak int64
	files, _ := filepath.Glob("/proc/[0-9]*/status")
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it ended
		}
		values := map[string]string{}
		for line := range strings.Lines(string(text)) {
			key, value, _ := strings.Cut(line, ":")
			values[key] = strings.TrimSpace(value)
		}
		// The kernel keeps 15 bytes of a name.
		if len(name) > 15 {
			name = name[:15]
		}
		if values["Name"] != name {
			continue
		}
		kib, _ := strconv.ParseInt(strings.TrimSuffix(values["VmHWM"], " kB"), 10, 64)
		peak = max(peak, kib<<10)
	}
	return peak
}
