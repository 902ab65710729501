package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/memlinux/memlinux/media"
)

const writeBytes = 256 << 20

func (b bench) write() error {
	source, copied := b.path("source"), b.path("copied")
	fill := side{name: "fill", argv: []string{"dd", "if=/dev/urandom", "of=" + source, "bs=1M", "count=" + strconv.Itoa(writeBytes>>20), "status=none"}}
	if err := fill.once(); err != nil {
		return err
	}
	us, err := ours("write and read back, with hashes", "write", source, b.path("written"))
	if err != nil {
		return err
	}
	peer := &side{name: "dd conv=fsync, then cmp", argv: []string{"sh", "-c",
		"dd if=" + source + " of=" + copied + " bs=4M conv=fsync status=none && dd of=" + copied + " oflag=nocache conv=notrunc,fdatasync count=0 status=none && cmp " + source + " " + copied}}
	return compare(fmt.Sprintf("write %d MiB into a file and read it back from the disk", writeBytes>>20), us, peer)
}

// writeImage writes the whole of the file FROM as the one extent of an image
// into the file TO.
func writeImage(args []string, _ io.Writer) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	im := &media.Image{Size: info.Size(), SectorSize: 512, Extents: []media.Extent{{Length: info.Size(), Content: f}}}
	out, err := os.OpenFile(args[1], os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
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

// memory writes a 2 GiB image through the daemon, and 2 GiB of data through the
// writer, and looks at the peak of the memory in use.
func (b bench) memory() error {
	fmt.Printf("\npeak memory (VmHWM)\n")
	cmd := exec.Command(memlinux, "--private", "write", "--size", "2GiB", "--no-boot-test", "--force", b.path("stick.img"))
	peak, err := watchPeak(cmd, "memlinuxd")
	if err != nil {
		return err
	}
	fmt.Printf("  %-44s %7.1f MiB\n", "memlinuxd, writing a 2 GiB image", mib(peak))

	source := b.path("large")
	if err := os.WriteFile(source, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(source, 2<<30); err != nil {
		return err
	}
	us, err := ours("", "write", source, b.path("large.out"))
	if err != nil {
		return err
	}
	peak, err = watchPeak(exec.Command(us.argv[0], us.argv[1:]...), filepath.Base(us.argv[0]))
	if err != nil {
		return err
	}
	fmt.Printf("  %-44s %7.1f MiB\n", "the writer alone, 2 GiB of data", mib(peak))
	return nil
}

// memlinux is the client's program.
const memlinux = "bin/memlinux"

// watchPeak runs cmd and returns the largest VmHWM, in bytes, that its process
// or a child of it, whichever is called name, has on the way.
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
			peak = max(peak, highWater(name, strconv.Itoa(cmd.Process.Pid)))
		}
	}
}

func highWater(name, pid string) int64 {
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
		if values["Name"] != name || values["Pid"] != pid && values["PPid"] != pid {
			continue
		}
		kib, _ := strconv.ParseInt(strings.TrimSuffix(values["VmHWM"], " kB"), 10, 64)
		peak = max(peak, kib<<10)
	}
	return peak
}
