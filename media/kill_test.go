package media

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// killedChild is set for a test binary that is to write an image on the disk it names,
// over and over, until it is killed.
const killedChild = "MEMLINUX_TEST_KILLED_WRITER"

const killSize = 5 * mib

// killImage is a stick of which the seed is in every sector.
func killImage(seed uint64) *Image {
	im := &Image{Size: killSize, SectorSize: 512}
	for i, e := range [][2]int64{{0, mib}, {mib, mib + 512}, {3 * mib, 512}, {killSize - mib/2, mib / 2}} {
		p := make([]byte, e[1])
		fillMark(p, seed<<8+uint64(i))
		im.Extents = append(im.Extents, Extent{e[0], e[1], bytes.NewReader(p)})
	}
	return im
}

// rawDisk is a disk without our checks and without the page cache.
type rawDisk struct{ *os.File }

func openRaw(path string) (rawDisk, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	return rawDisk{f}, err
}

func writeUntilKilled(path string) {
	d, err := openRaw(path)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for seed := uint64(rand.Uint32()); ; seed++ {
		im := killImage(seed)
		fmt.Println(seed)
		if _, err := Write(context.Background(), d, im, nil); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
}

// A writer that is killed at any moment leaves either a void head or a whole
// image, and the next write succeeds.
func TestKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short")
	}
	kills := 10 // on each
	if need.All() {
		kills = 100
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, make([]byte, killSize), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, disk := range map[string]func(*testing.T) string{
		"a file":        file,
		"a loop device": func(t *testing.T) string { return need.Loop(t, file(t), "512") },
	} {
		t.Run(name, func(t *testing.T) {
			path := disk(t)
			d, err := openRaw(path)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			began := time.Now()
			if _, err := Write(t.Context(), d, killImage(0), nil); err != nil {
				t.Fatal(err)
			}
			most := 3 * time.Since(began)
			void, whole, seeds := 0, 0, []uint64{0}
			for range kills {
				seeds = append(seeds, killWriter(t, self, path, rand.N(most))...)
				if wholeImage(t, path, seeds) {
					whole++
				} else {
					void++
				}
			}
			t.Logf("killed %d times: %d void, %d whole", kills, void, whole)
			if void < kills/10 {
				t.Errorf("only %d kills met a write", void)
			}
			if _, err := Write(t.Context(), d, killImage(1), nil); err != nil {
				t.Error(err)
			}
			if !wholeImage(t, path, []uint64{1}) {
				t.Error("the next write did not make the disk whole")
			}
		})
	}
}

// killWriter lets a writer run for so long, and returns the seeds that it has
// begun with.
func killWriter(t *testing.T, self, path string, after time.Duration) (seeds []uint64) {
	t.Helper()
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), killedChild+"="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for first := true; lines.Scan(); first = false {
		var seed uint64
		if _, err := fmt.Sscan(lines.Text(), &seed); err != nil {
			t.Errorf("the writer says %q", lines.Text())
		}
		seeds = append(seeds, seed)
		if first {
			time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
	}
	_ = cmd.Wait() // killed
	return seeds
}

// wholeImage tells whether the disk boots, by its first sector, and fails if it
// does so without being all of the image of one of the seeds.
func wholeImage(t *testing.T, path string, seeds []uint64) bool {
	t.Helper()
	d, err := openRaw(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := alignedBuffer(killSize)
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if allZero(got[:512]) {
		return false
	}
	first := make([]byte, 512)
	for _, s := range seeds {
		if fillMark(first, s<<8); !bytes.Equal(first, got[:512]) {
			continue
		}
		for _, e := range killImage(s).Extents {
			want := make([]byte, e.Length)
			_, _ = e.Content.ReadAt(want, 0)
			if i := firstDifference(got[e.Offset:e.End()], want); i >= 0 {
				t.Errorf("the first sector is there, and the image is wrong at %d", e.Offset+int64(i))
			}
		}
		return true
	}
	t.Error("the first sector is nobody's")
	return true
}
