package testvm

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// memory is a file that grows.
type memory struct{ p []byte }

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	if n := int(at) + len(p); n > len(m.p) {
		m.p = append(m.p, make([]byte, n-len(m.p))...)
	}
	return copy(m.p[at:], p), nil
}

// noise is a disk that differs everywhere.
func noise(size int) []byte {
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(p)
	return p
}

func applied(disk []byte, patches []Patch) []byte {
	want := bytes.Clone(disk)
	for _, p := range patches {
		copy(want[p.Offset:], p.Data)
	}
	return want
}

var patchCases = map[string]struct {
	size    int64
	patches []Patch
}{
	"no patch":                           {3 << 20, nil},
	"an empty patch":                     {1 << 20, []Patch{{77, nil}}},
	"a byte in the middle of a sector":   {1 << 20, []Patch{{1001, []byte("x")}}},
	"two sectors across a cluster's end": {1 << 20, []Patch{{cluster - 512, bytes.Repeat([]byte("g"), 1024)}}},
	"several clusters":                   {1 << 20, []Patch{{cluster - 1, bytes.Repeat([]byte("g"), 3*cluster)}}},
	"a disk that ends in a cluster":      {cluster + 1536, []Patch{{cluster + 1535, []byte("z")}}},
	"a disk smaller than a cluster":      {512, []Patch{{0, []byte("first")}, {507, []byte("last!")}}},
	"the later of two is on top":         {1 << 20, []Patch{{100, []byte("aaaa")}, {102, []byte("bbbb")}}},
	"the end of a disk of 4 TB":          {4000787030016, []Patch{{4000787030016 - 7, []byte("the end")}}},
	"on both sides of a table's end":     {cluster*l2Entries + cluster, []Patch{{cluster*l2Entries - 2, []byte("abcd")}}},
}

// TestOverlay has QEMU's own tool read what the guest would.
func TestOverlay(t *testing.T) {
	qemuImg := need.Tool(t, "qemu-img", "qemu-utils")
	for name, c := range patchCases {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			base, over, want := filepath.Join(dir, "base"), filepath.Join(dir, "over"), filepath.Join(dir, "want")
			makeDisk(t, base, c.size, nil)
			makeDisk(t, want, c.size, c.patches)
			f, err := os.Create(over)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := writeOverlay(f, open(t, base, os.O_RDONLY), c.size, c.patches); err != nil {
				t.Fatal(err)
			}
			run(t, qemuImg, "check", "-f", "qcow2", over)
			run(t, qemuImg, "compare", "--image-opts",
				"driver=qcow2,file.filename="+over+",backing.driver=raw,backing.file.filename="+base, "driver=raw,file.filename="+want)
		})
	}
}

// makeDisk makes a file of noise, then a hole, with the patches.
func makeDisk(t *testing.T, path string, size int64, patches []Patch) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range slices.Concat([]Patch{{0, noise(int(min(size, 4<<20)))}}, patches) {
		if _, err := f.WriteAt(p.Data, p.Offset); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

func TestOverlayRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		size    int64
		patches []Patch
		want    string
	}{
		"no size":                     {0, nil, "can't have 0 bytes"},
		"a disk beyond QEMU's limit":  {1<<51 + 512, nil, "can't have"},
		"the largest number of all":   {1<<63 - 1, nil, "can't have"},
		"a patch beyond the end":      {512, []Patch{{512, []byte("x")}}, "reaches beyond"},
		"an offset near the overflow": {512, []Patch{{1<<63 - 1, []byte("x")}}, "reaches beyond"},
		"a disk shorter than it says": {4096, []Patch{{3000, []byte("x")}}, "read the disk at byte 0"},
	} {
		t.Run(name, func(t *testing.T) {
			err := writeOverlay(&memory{}, bytes.NewReader(noise(512)), c.size, c.patches)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// readOverlay is what a guest reads, as the format says: a second opinion that
// is fast enough for fuzzing.
func readOverlay(t *testing.T, file, disk []byte) []byte {
	t.Helper()
	be := binary.BigEndian
	got := bytes.Clone(disk)
	const at = 1<<56 - 1<<9
	l1 := file[be.Uint64(file[40:]):]
	for table := range int(be.Uint32(file[36:])) {
		l2 := be.Uint64(l1[table*8:]) & at
		if l2 == 0 {
			continue
		}
		for i := range l2Entries {
			if c := be.Uint64(file[l2+uint64(i)*8:]) & at; c != 0 {
				copy(got[(table*l2Entries+i)*cluster:], file[c:c+cluster])
			}
		}
	}
	return got
}

func FuzzOverlay(f *testing.F) {
	f.Add(uint32(1<<20), uint32(1001), uint32(5), uint32(cluster-1), uint32(cluster+2))
	f.Add(uint32(512), uint32(0), uint32(512), uint32(511), uint32(1))
	f.Fuzz(func(t *testing.T, size, at1, n1, at2, n2 uint32) {
		size = size%(4*cluster)/512*512 + 512
		disk := noise(int(size))
		patches := []Patch{{int64(at1 % size), bytes.Repeat([]byte("1"), int(n1%size))}, {int64(at2 % size), bytes.Repeat([]byte("2"), int(n2%size))}}
		var m memory
		err := writeOverlay(&m, bytes.NewReader(disk), int64(size), patches)
		fits := patches[0].validate(int64(size)) == nil && patches[1].validate(int64(size)) == nil
		if (err == nil) != fits {
			t.Fatalf("error %v, fits %v", err, fits)
		}
		if fits && !bytes.Equal(readOverlay(t, m.p, disk), applied(disk, patches)) {
			t.Error("the guest would read something else")
		}
	})
}
