package stick

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"testing/iotest"
	"time"

	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/fat32"
	"github.com/memlinux/memlinux/testvm/need"
)

var madeAt = time.Date(2026, 11, 22, 10, 30, 0, 0, time.UTC)

func random(n int, seed byte) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(p)
	return p
}

// content is what the test sticks hold.
func content() map[string][]byte {
	return map[string][]byte{
		"boot/grub/menu.lst":            []byte("title memlinux\nkernel /boot/vmlinuz quiet\n"),
		"boot/vmlinuz":                  random(5*mib+123, 1),
		"boot/initramfs.img":            random(2*mib, 2),
		"EFI/BOOT/BOOTX64.EFI":          random(700_001, 3),
		"EFI/debian/grub.cfg":           []byte("configfile"),
		"empty":                         nil,
		"a long name with Größe 東京.txt": []byte("x"),
	}
}

func files() []fat32.File {
	var all []fat32.File
	for name, data := range content() {
		all = append(all, fat32.File{Path: name, Size: int64(len(data)), Content: bytes.NewReader(data), ModTime: madeAt})
	}
	return append(all, fat32.File{Path: "an empty folder", Dir: true, ModTime: madeAt})
}

// spec is a stick that BIOS boots too if its sectors allow that.
func spec(size int64, sector int) Spec {
	s := Spec{
		Size: size, SectorSize: sector, Files: files(), VolumeID: 0xCAFE1234, Label: "MEMLINUX", ModTime: madeAt,
		GUIDs: GUIDs{
			Disk:     "11111111-AAAA-4BBB-8CCC-000000000001",
			BIOSBoot: "11111111-AAAA-4BBB-8CCC-000000000002",
			ESP:      "11111111-AAAA-4BBB-8CCC-000000000003",
		},
	}
	if sector == 512 {
		s.BootSector, s.Core = random(512, 4), random(161_004, 5)
	}
	return s
}

func image(t testing.TB, s Spec) *media.Image {
	t.Helper()
	im, err := s.Image()
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// write puts an image into a sparse file.
func write(t *testing.T, im *media.Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "stick.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, err := media.NewFileDisk(f, im)
	if errors.Is(err, syscall.EFBIG) {
		t.Skipf("skipped: the file system has no files that large: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := media.Write(t.Context(), d, im, nil); err != nil {
		t.Fatal(err)
	}
	return path
}

func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "MTOOLS_SKIP_CHECK=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// The field's own tools must find no fault, whatever the disk's size.
func TestFieldToolsAgree(t *testing.T) {
	sgdisk, sfdisk := need.Tool(t, "sgdisk", "gdisk"), need.Tool(t, "sfdisk", "fdisk")
	mdir, mtype := need.Tool(t, "mdir", "mtools"), need.Tool(t, "mtype", "mtools")
	for _, c := range []struct {
		name string
		size int64
	}{
		{"least", 0},
		{"64 MiB", 64 * mib},
		{"64 MiB and a sector", 64*mib + 512},
		{"odd size of a real stick", 15_728_640_000 - 512},
		{"2 TiB", 2 << 40},
		{"3 TiB, more than an MBR can say", 3 << 40},
	} {
		t.Run(c.name, func(t *testing.T) {
			im := image(t, spec(c.size, 512))
			if max := int64(60 * mib); im.DataBytes() > max {
				t.Errorf("%d bytes to write", im.DataBytes())
			}
			path := write(t, im)
			if out := tool(t, sgdisk, "-v", path); !strings.Contains(out, "No problems found") {
				t.Errorf("sgdisk: %s", out)
			}
			if out := tool(t, sfdisk, "--verify", path); !strings.Contains(out, "No errors detected") {
				t.Errorf("sfdisk: %s", out)
			}
			out := tool(t, sgdisk, "-p", "-i", "1", "-i", "2", path)
			for _, want := range []string{"EF02  BIOS boot", "EF00  EFI system", "First sector: 34 ", "Last sector: 2047 ", "First sector: 2048 ", "000000000002"} {
				if !strings.Contains(out, want) {
					t.Errorf("sgdisk -p lacks %q:\n%s", want, out)
				}
			}
			checkESP(t, im, path)
			at := path + "@@1M"
			if out := tool(t, mdir, "-i", at, "-/", "-b", "::"); !strings.Contains(out, "::/boot/grub/menu.lst") {
				t.Errorf("mdir: %s", out)
			}
			if out := tool(t, mtype, "-i", at, "::/boot/grub/menu.lst"); out != string(content()["boot/grub/menu.lst"]) {
				t.Errorf("mtype: %q", out)
			}
			checkInspect(t, path, im, 512)
		})
	}
}

// checkESP lets fsck look at the partition alone.
func checkESP(t *testing.T, im *media.Image, path string) {
	t.Helper()
	fsck := need.Tool(t, "fsck.vfat", "dosfstools")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := Inspect(f, im.Size, im.SectorSize)
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "esp"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := out.Truncate(s.ESP.Size); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, io.NewSectionReader(f, s.ESP.Offset, s.ESP.Size)); err != nil {
		t.Fatal(err)
	}
	tool(t, fsck, "-n", "-v", out.Name())
}

func checkInspect(t *testing.T, path string, im *media.Image, sector int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s, err := Inspect(f, im.Size, sector)
	if err != nil {
		t.Fatal(err)
	}
	if s.VolumeID != 0xCAFE1234 || s.Label != "MEMLINUX" || s.BIOS != (sector == 512) || s.DiskGUID != "11111111-AAAA-4BBB-8CCC-000000000001" ||
		s.ESP.Offset != mib || s.ESP.Name != "EFI system" || s.ESP.Number != len(s.Partitions) {
		t.Errorf("stick %+v", s)
	}
	checkFiles(t, s)
}

func checkFiles(t *testing.T, s *Stick) {
	t.Helper()
	found := map[string]bool{}
	err := fs.WalkDir(s.FS(), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		found[path] = true
		got, err := fs.ReadFile(s.FS(), path)
		if err != nil {
			return err
		}
		if want, ok := content()[path]; !ok || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, want %d", path, len(got), len(want))
		}
		if info, err := d.Info(); err != nil || !info.ModTime().Equal(madeAt) {
			t.Errorf("%s: %v, %v", path, info.ModTime(), err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if len(found) != len(content()) {
		t.Errorf("found %v", found)
	}
}

func TestSectorsOf4096(t *testing.T) {
	sgdisk, sfdisk := need.Tool(t, "sgdisk", "gdisk"), need.Tool(t, "sfdisk", "fdisk")
	for _, size := range []int64{0, 2 << 30} {
		im := image(t, spec(size, 4096))
		path := write(t, im)
		checkESP(t, im, path)
		checkInspect(t, path, im, 4096)
		dev := need.Loop(t, path, "4096")
		if out := tool(t, sgdisk, "-v", dev); !strings.Contains(out, "No problems found") {
			t.Errorf("sgdisk: %s", out)
		}
		if out := tool(t, sfdisk, "--verify", dev); !strings.Contains(out, "No errors detected") {
			t.Errorf("sfdisk: %s", out)
		}
	}
}

func TestFSRules(t *testing.T) {
	im := image(t, spec(0, 512))
	s, err := Inspect(im, im.Size, 512)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range content() {
		names = append(names, name)
	}
	if err := fstest.TestFS(s.FS(), append(names, "an empty folder")...); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"BOOT/Grub/MENU.LST", "efi/boot/bootx64.efi"} {
		if _, err := fs.Stat(s.FS(), name); err != nil {
			t.Errorf("names differ in case only: %v", err)
		}
	}
	if _, err := s.FS().Open("boot/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no such file: %v", err)
	}
	// Reads that begin and end anywhere, as the library's own do not bear.
	f, err := s.FS().Open("EFI/BOOT/BOOTX64.EFI")
	if err != nil {
		t.Fatal(err)
	}
	want, r := content()["EFI/BOOT/BOOTX64.EFI"], f.(io.ReaderAt)
	for _, c := range []struct{ off, n int64 }{{0, 1}, {511, 2}, {600, 1000}, {700_000, 1}, {699_900, 101}, {0, 700_001}} {
		p := make([]byte, c.n)
		if n, err := r.ReadAt(p, c.off); int64(n) != c.n || err != nil && err != io.EOF || !bytes.Equal(p, want[c.off:c.off+c.n]) {
			t.Errorf("ReadAt %d at %d: %d, %v", c.n, c.off, n, err)
		}
	}
	small, err := s.FS().Open("boot/grub/menu.lst")
	if err != nil {
		t.Fatal(err)
	}
	if err := iotest.TestReader(small, content()["boot/grub/menu.lst"]); err != nil {
		t.Error(err)
	}
}

func TestSpecRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Spec)
		want   string
	}{
		{"sectors of a CD", func(s *Spec) { s.SectorSize = 2048 }, "2048"},
		{"half a sector", func(s *Spec) { s.Size = 100*mib + 100 }, "whole sectors"},
		{"negative size", func(s *Spec) { s.Size = -512 }, "whole sectors"},
		{"BIOS on 4096", func(s *Spec) { s.SectorSize = 4096 }, "512-byte sectors"},
		{"boot sector without core", func(s *Spec) { s.Core = nil }, "go together"},
		{"core without boot sector", func(s *Spec) { s.BootSector = nil }, "go together"},
		{"half a boot sector", func(s *Spec) { s.BootSector = s.BootSector[:440] }, "go together"},
		{"core that is too large", func(s *Spec) { s.Core = make([]byte, MaxCore+1) }, "room for 1031168"},
		{"no volume ID", func(s *Spec) { s.VolumeID = 0 }, "volume ID"},
		{"a name that FAT can't hold", func(s *Spec) { s.Files[0].Path = "a:b" }, "a:b"},
		{"a GUID that is none", func(s *Spec) { s.GUIDs.Disk = "x" }, "UUID"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := spec(0, 512)
			c.change(&s)
			if _, err := s.Image(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// The least size that is named must do, one sector less must not.
func TestTooSmall(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		s := spec(int64(sector), sector)
		_, err := s.Image()
		var space *media.NoSpaceError
		if !errors.As(err, &space) || space.Have != int64(sector) {
			t.Fatalf("%d: error %v", sector, err)
		}
		if !strings.Contains(err.Error(), " MiB, has 0 MiB") {
			t.Errorf("error %q", err)
		}
		s.Size = space.Need - int64(sector)
		if _, err := s.Image(); !errors.As(err, &space) {
			t.Errorf("%d: a sector less than needed: error %v", sector, err)
		}
		for extra := int64(0); extra < 9*mib; extra += 700 * 4096 {
			s.Size = space.Need + extra
			im := image(t, s)
			if _, err := Inspect(im, im.Size, sector); err != nil {
				t.Errorf("%d: %d bytes more than needed: %v", sector, extra, err)
			}
		}
	}
}

func TestLayout(t *testing.T) {
	im := image(t, spec(0, 512))
	first := make([]byte, mib)
	if _, err := im.ReadAt(first, 0); err != nil {
		t.Fatal(err)
	}
	s := spec(0, 512)
	if !bytes.Equal(first[:0x1b8], s.BootSector[:0x1b8]) || !zero(first[0x1b8:0x1be]) {
		t.Error("the boot code is not in the MBR, or more of the boot sector is")
	}
	if !bytes.Equal(first[CoreLBA*512:CoreLBA*512+len(s.Core)], s.Core) || !zero(first[CoreLBA*512+len(s.Core):]) {
		t.Error("the core image is not at LBA 34, or something is behind it")
	}
	if e := im.Extents[0]; e.Offset != 0 || e.Length != mib {
		t.Errorf("the first MiB is not in the image in full: %d at %d", e.Length, e.Offset)
	}
	if e := im.Extents[len(im.Extents)-1]; e.End() != im.Size || e.Length != mib {
		t.Errorf("the last MiB is not in the image in full: %d at %d", e.Length, e.Offset)
	}
	if im.Size%mib != 0 {
		t.Errorf("size %d", im.Size)
	}

	// The same Spec gives the same image, but for GUIDs that are not given.
	digest := func(s Spec) string {
		sum, err := image(t, s).Digest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return sum
	}
	if digest(s) != digest(spec(0, 512)) {
		t.Error("two images of one Spec differ")
	}
	s.GUIDs = GUIDs{}
	one, two := digest(s), digest(s)
	if one == two {
		t.Error("the random GUIDs of two sticks are the same")
	}

	// Without a core image only UEFI boots, and the ESP is the only partition.
	s.BootSector, s.Core = nil, nil
	im = image(t, s)
	in, err := Inspect(im, im.Size, 512)
	if err != nil || len(in.Partitions) != 1 || in.ESP.Number != 1 || in.BIOS {
		t.Errorf("UEFI only: %+v, %v", in, err)
	}
}

// damaged is an image with some bytes changed and, if asked for, checksums that agree
// with the changes.
type damaged struct {
	im      *media.Image
	patches map[int64][]byte
}

func (d *damaged) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.im.ReadAt(p, off)
	for at, patch := range d.patches {
		from, to := max(at, off), min(at+int64(len(patch)), off+int64(n))
		if from < to {
			copy(p[from-off:to-off], patch[from-at:])
		}
	}
	return n, err
}

func TestInspectFindsDamage(t *testing.T) {
	im := image(t, spec(0, 512))
	end := im.Size
	boot := make([]byte, 512)
	if _, err := im.ReadAt(boot, mib); err != nil {
		t.Fatal(err)
	}
	fat1 := mib + int64(le.Uint16(boot[14:]))*512
	fatSize := int64(le.Uint32(boot[36:])) * 512
	root := fat1 + 2*fatSize
	folder := make([]byte, 512)
	if _, err := im.ReadAt(folder, root); err != nil {
		t.Fatal(err)
	}
	efi := bytes.Index(folder, []byte("EFI        \x10"))
	if efi < 0 {
		t.Fatal("there is no /EFI in the root folder")
	}
	entry := func(cluster, value uint32) map[int64][]byte {
		p := le.AppendUint32(nil, value)
		return map[int64][]byte{fat1 + int64(cluster)*4: p, fat1 + fatSize + int64(cluster)*4: p}
	}
	for _, c := range []struct {
		name    string
		patches map[int64][]byte
		want    string
	}{
		{"no boot signature", map[int64][]byte{510: {0}}, "not a boot sector"},
		{"MBR of another type", map[int64][]byte{0x1be + 4: {0x0c}}, "0xEE"},
		{"MBR for another size", map[int64][]byte{0x1be + 12: {1}}, "cover the disk"},
		{"hybrid MBR", map[int64][]byte{0x1ce + 4: {0x83}}, "more than one entry"},
		{"primary header gone", map[int64][]byte{512: {0}}, "no GPT header at LBA 1"},
		{"a bit of the primary header", map[int64][]byte{512 + 60: {0}}, "primary partition table: the header's checksum"},
		{"a bit of the primary entries", map[int64][]byte{1024 + 50: {7}}, "primary partition table: the entries' checksum"},
		{"a bit of the backup header", map[int64][]byte{end - 512 + 60: {0}}, "backup partition table: the header's checksum"},
		{"a bit of the backup entries", map[int64][]byte{end - 512 - 1<<14 + 50: {7}}, "backup partition table: the entries' checksum"},
		{"no boot sector in the ESP", map[int64][]byte{mib + 510: {0}}, "does not begin with a boot sector"},
		{"FAT16", map[int64][]byte{mib + 22: {1}}, "not FAT32"},
		{"volume larger than its partition", map[int64][]byte{mib + 32: {0, 0, 0, 2}}, "the partition"},
		{"a FAT of 2 TiB", map[int64][]byte{mib + 36: {0, 0, 0, 0xff}}, "at most 16"},
		{"a FAT that is too short", map[int64][]byte{mib + 36: {1, 0, 0, 0}}, "clusters"},
		{"clusters of no sectors", map[int64][]byte{mib + 13: {0}}, "clusters of 0 sectors"},
		{"the FATs differ", map[int64][]byte{fat1 + 8: {9}}, "two FATs differ"},
		{"the root folder is a ring", entry(2, 2), "ring"},
		{"a chain turns back", entry(2000, 2000), "meet"},
		{"a chain leaves the volume", entry(60000, 0x0ffffff0), "which there is not"},
		{"a chain goes on in a free cluster", entry(60000, 60001), "not in use"},
		{"the root folder is free", entry(2, 0), "root folder"},
		{"a folder's name is a path", map[int64][]byte{root + int64(efi): []byte("A/B")}, "is not a name"},
		{"two folders are one", map[int64][]byte{root + int64(efi) + 26: {2, 0}}, "are one"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := Inspect(&damaged{im, c.patches}, im.Size, 512)
			if err == nil && c.want != "" || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q; %+v", err, c.want, s)
			}
		})
	}
	if _, err := Inspect(im, im.Size-512, 512); err == nil {
		t.Error("a disk of another size: no error")
	}
	if _, err := Inspect(im, im.Size, 4096); err == nil {
		t.Error("another sector size: no error")
	}
	for _, size := range []int64{-512, 0, 512, mib} {
		if _, err := Inspect(im, size, 512); err == nil {
			t.Errorf("size %d: no error", size)
		}
	}
}

// failing is a disk that can't read one byte.
type failing struct {
	io.ReaderAt
	at int64
}

func (f failing) ReadAt(p []byte, off int64) (int, error) {
	if f.at >= off && f.at < off+int64(len(p)) {
		return 0, syscall.EIO
	}
	return f.ReaderAt.ReadAt(p, off)
}

// The library ignores errors of the disk; Inspect must not.
func TestInspectHearsTheDisk(t *testing.T) {
	im := image(t, spec(0, 512))
	s, err := Inspect(im, im.Size, 512)
	if err != nil {
		t.Fatal(err)
	}
	boot := make([]byte, 512)
	if _, err := im.ReadAt(boot, mib); err != nil {
		t.Fatal(err)
	}
	fat1 := mib + int64(le.Uint16(boot[14:]))*512
	root := fat1 + 2*int64(le.Uint32(boot[36:]))*512
	for name, at := range map[string]int64{
		"MBR": 0, "primary header": 512, "primary entries": 1024, "backup header": im.Size - 1, "backup entries": im.Size - 600,
		"boot sector": mib, "FSInfo": mib + 512, "first FAT": fat1 + 100, "second FAT": root - 100, "root folder": root + 10,
	} {
		if _, err := Inspect(failing{im, at}, im.Size, 512); !errors.Is(err, syscall.EIO) {
			t.Errorf("%s can't be read: error %v", name, err)
		}
	}

	// A file in the middle of which the disk fails.
	ranges, err := s.files.ranges(s.files.files["boot/vmlinuz"])
	if err != nil || len(ranges) != 1 {
		t.Fatal(ranges, err)
	}
	s, err = Inspect(failing{im, ranges[0].off + 3*mib}, im.Size, 512)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := fs.ReadFile(s.FS(), "boot/vmlinuz"); !errors.Is(err, syscall.EIO) {
		t.Errorf("%d bytes and error %v", len(got), err)
	}
}

func TestManyFiles(t *testing.T) {
	s := spec(0, 512)
	for i := range 1000 {
		s.Files = append(s.Files, fat32.File{Path: fmt.Sprintf("many/a file with a long name, number %d", i), Size: 1000, Content: bytes.NewReader(random(1000, byte(i)))})
	}
	im := image(t, s)
	began := time.Now()
	in, err := Inspect(im, im.Size, 512)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := fs.ReadDir(in.FS(), "many")
	if err != nil || len(entries) != 1000 {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	for _, i := range []int{0, 7, 999} {
		got, err := fs.ReadFile(in.FS(), fmt.Sprintf("many/a file with a long name, number %d", i))
		if err != nil || !bytes.Equal(got, random(1000, byte(i))) {
			t.Errorf("file %d: %v", i, err)
		}
	}
	t.Logf("took %v", time.Since(began))
}

// FuzzInspect changes bytes of a good stick; checksums are set right again if
// fix says so, for what lies behind them to be reached.
func FuzzInspect(f *testing.F) {
	s := spec(0, 512)
	s.Files = files()[:0]
	for _, name := range []string{"boot/grub/menu.lst", "EFI/BOOT/BOOTX64.EFI", "a long name that needs entries of its own"} {
		s.Files = append(s.Files, fat32.File{Path: name, Size: 3000, Content: bytes.NewReader(random(3000, 9))})
	}
	im := image(f, s)
	// All metadata in one piece of memory, so that a run is fast.
	flat := make([]byte, 4*mib)
	if _, err := im.ReadAt(flat, 0); err != nil {
		f.Fatal(err)
	}
	tail := make([]byte, mib)
	if _, err := im.ReadAt(tail, im.Size-mib); err != nil {
		f.Fatal(err)
	}
	fat1 := mib + int(le.Uint16(flat[mib+14:]))*512
	fatSize := int(le.Uint32(flat[mib+36:])) * 512
	root := fat1 + 2*fatSize
	// Where a patch can begin: everything that has a meaning.
	areas := []struct{ at, n int }{{0x1be, 66}, {512, 92}, {1024, 256}, {mib, 1024}, {fat1, 256}, {root, 4096}}

	f.Add([]byte{0, 4, 0x0c}, false)
	f.Add([]byte{1, 72, 0xff, 1, 80, 0xff}, true)
	f.Add([]byte{3, 13, 0, 3, 36, 0xff}, true)
	f.Add([]byte{4, 8, 2, 4, 9, 0, 4, 10, 0, 4, 11, 0}, true)
	f.Add([]byte{5, 26, 2, 5, 11, 0x0f}, true)
	f.Fuzz(func(t *testing.T, patches []byte, fix bool) {
		disk := &patched{im: im, flat: bytes.Clone(flat), tail: bytes.Clone(tail)}
		for ; len(patches) >= 3; patches = patches[3:] {
			a := areas[int(patches[0])%len(areas)]
			// The first byte's upper bits reach what is behind 256 bytes.
			at := a.at + (int(patches[0])/len(areas)*256+int(patches[1]))%a.n
			disk.flat[at] = patches[2]
			if fix && at >= fat1 && at < fat1+fatSize {
				disk.flat[at+fatSize] = patches[2]
			}
		}
		if fix {
			disk.fix()
		}
		began := time.Now()
		s, err := Inspect(disk, im.Size, 512)
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("took %v", took)
		}
		if err != nil {
			return
		}
		_ = fs.WalkDir(s.FS(), ".", func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				var file fs.File
				if file, err = s.FS().Open(path); err == nil {
					var n int64
					n, err = io.Copy(io.Discard, io.LimitReader(file, mib))
					if info, _ := file.Stat(); err == nil && n != min(info.Size(), mib) {
						t.Errorf("%q: %d bytes of %d without an error", path, n, info.Size())
					}
				}
			}
			return nil
		})
	})
}

type patched struct {
	im         *media.Image
	flat, tail []byte
}

func (d *patched) ReadAt(p []byte, off int64) (int, error) {
	tail := d.im.Size - int64(len(d.tail))
	if end := off + int64(len(p)); end <= int64(len(d.flat)) {
		return copy(p, d.flat[off:]), nil
	} else if off >= tail && end <= d.im.Size {
		return copy(p, d.tail[off-tail:]), nil
	}
	return d.im.ReadAt(p, off)
}

// fix makes both partition tables agree with the primary one's entries.
func (d *patched) fix() {
	entries := d.flat[1024 : 1024+entryCount*entrySize]
	backup := d.tail[len(d.tail)-512:]
	copy(d.tail[len(d.tail)-512-len(entries):], entries)
	for _, h := range [][]byte{d.flat[512:1024], backup} {
		le.PutUint32(h[88:], crc32.ChecksumIEEE(entries))
		clear(h[16:20])
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	}
}
