package fat32

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/diskfs/go-diskfs/backend/file"
	diskfat32 "github.com/diskfs/go-diskfs/filesystem/fat32"

	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/testvm/need"
)

const mib = 1 << 20

var someTime = time.Date(2026, 11, 5, 13, 14, 16, 0, time.UTC)

// pattern is endless content that differs from file to file and from place to
// place, without memory.
type pattern uint64

func (s pattern) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		at := uint64(off) + uint64(i)
		p[i] = byte((at>>3*0x9e3779b97f4a7c15 + uint64(s)) >> (at & 7 * 8))
	}
	return len(p), nil
}

func patterned(path string, size int64) File {
	sum := sha256.Sum256([]byte(path))
	return File{Path: path, Size: size, ModTime: someTime, Content: pattern(le.Uint64(sum[:]))}
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// withParents is what a volume of these files holds: each path, true for a folder.
func withParents(files []File) map[string]File {
	all := map[string]File{}
	for _, f := range files {
		for i, c := range f.Path {
			if c == '/' {
				if _, ok := all[f.Path[:i]]; !ok {
					all[f.Path[:i]] = File{Path: f.Path[:i], Dir: true, ModTime: someTime}
				}
			}
		}
		all[f.Path] = f
	}
	return all
}

func hashOf(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// trees are the file lists that every geometry is tried with. They fit the
// smallest volumes.
func trees() map[string][]File {
	bootFiles := []File{
		patterned("boot/grub/menu.lst", 900),
		patterned("boot/vmlinuz", 7*mib+123),
		patterned("boot/initramfs.img", 3*mib),
		patterned("EFI/BOOT/BOOTX64.EFI", 741376),
		patterned("loader.conf", 1),
	}
	var thousand, colliding, deep, mixed []File
	for i := range 1000 {
		thousand = append(thousand, patterned(fmt.Sprintf("files/file number %04d.text", i), int64(i*7)))
		colliding = append(colliding, patterned(fmt.Sprintf("a folder with a long name/configuration %d.conf", i*i), int64(i%3)))
	}
	for i := range 9 { // these have the short names that colliding names would get
		colliding = append(colliding, patterned(fmt.Sprintf("a folder with a long name/CONFIG~%d.CON", 3*i), 10))
	}
	path := ""
	for i := range 30 {
		path += fmt.Sprintf("level %d/", i)
		deep = append(deep, patterned(path+"file", int64(i*600)), File{Path: path + "empty folder", Dir: true, ModTime: someTime})
	}
	for _, name := range []string{
		"UPPER.TXT", "lower.txt", "Mixed.Txt", "noext", ".profile", "..two dots", "a.b.c.d", "with space", "plus+comma,semi;eq=[br]",
		"ÄÖÜ äöü.txt", "Привет мир.conf", "日本語.txt", "\u00e9", "e\u0301", "TILDE~1", "tilde~1.txt", "tilde~1.text", "thirteen char",
		"fourteen chars", "CON", "%$'-_@~`!(){}^#&", strings.Repeat("x", 255), strings.Repeat("y", 247) + ".longext", strings.Repeat("日", 85),
	} {
		mixed = append(mixed, patterned("names/"+name, int64(len(name)*11)))
	}
	return map[string][]File{
		"no file at all":                  nil,
		"the files of a stick":            bootFiles,
		"1000 files in one folder":        thousand,
		"1009 names that collide":         colliding,
		"30 folders deep, empty ones too": deep,
		"odd and long names":              mixed,
		"names beyond 16 bits":            {patterned("emoji 😀.png", 5), patterned("😀😀😀😀😀😀.conf", 5), patterned("twelve chars😀", 6)},
		"empty files":                     {patterned("empty", 0), patterned("b/empty", 0), {Path: "no folder", Dir: true, ModTime: someTime}},
	}
}

// writeSparse writes extents into a new sparse file.
func writeSparse(t testing.TB, size int64, extents []media.Extent) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "volume.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, mib)
	zeros := make([]byte, mib)
	for _, e := range extents {
		for at := int64(0); at < e.Length; at += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), e.Length-at)]
			if _, err := e.Content.ReadAt(p, at); err != nil && err != io.EOF {
				t.Fatalf("extent at %d: %v", e.Offset, err)
			}
			if bytes.Equal(p, zeros[:len(p)]) {
				continue
			}
			if _, err := f.WriteAt(p, e.Offset+at); err != nil {
				t.Fatal(err)
			}
		}
	}
	return path
}

// fsck fails the test unless fsck.vfat says that all is well and not a word more.
func fsck(t testing.TB, path string, files, clusters int) {
	t.Helper()
	out, err := exec.Command(need.Tool(t, "fsck.vfat", "dosfstools"), "-n", path).CombinedOutput()
	if err != nil {
		t.Fatalf("fsck.vfat: %v\n%s", err, out)
	}
	m := regexp.MustCompile(`^fsck\.fat [^\n]*\n[^\n]*: (\d+) files, (\d+)/(\d+) clusters\n$`).FindSubmatch(out)
	if m == nil {
		t.Fatalf("fsck.vfat complains:\n%s", out)
	}
	if string(m[1]) != fmt.Sprint(files) || string(m[3]) != fmt.Sprint(clusters) {
		t.Errorf("fsck.vfat counts %s files, %s clusters; want %d, %d", m[1], m[3], files, clusters)
	}
}

// compareMtools copies all files out by mcopy and compares them.
func compareMtools(t testing.TB, path string, want map[string]File) {
	t.Helper()
	out := t.TempDir()
	cmd := exec.Command(need.Tool(t, "mcopy", "mtools"), "-s", "-n", "-m", "-i", path, "::/", out)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "TZ=UTC")
	if msg, err := cmd.CombinedOutput(); err != nil || len(msg) > 0 {
		t.Fatalf("mcopy: %v: %s", err, msg)
	}
	got := map[string]bool{}
	err := filepath.WalkDir(out, func(p string, d fs.DirEntry, err error) error {
		name := strings.TrimPrefix(strings.TrimPrefix(p, out), "/")
		if err != nil || name == "" {
			return err
		}
		got[name] = true
		w, ok := want[name]
		if !ok || w.Dir != d.IsDir() {
			t.Errorf("mcopy brings %q, which is not on the list", name)
			return nil
		}
		info, err := d.Info()
		if err != nil || w.Dir {
			return err
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		if info.Size() != w.Size || !info.ModTime().Equal(w.ModTime) || hashOf(t, f) != hashOf(t, io.NewSectionReader(w.Content, 0, w.Size)) {
			t.Errorf("mcopy: %q differs: %d bytes of %v, want %d of %v", name, info.Size(), info.ModTime(), w.Size, w.ModTime)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range want {
		if !got[name] {
			t.Errorf("mcopy does not bring %q", name)
		}
	}
}

// compareDiskfs reads every file by go-diskfs and compares it.
func compareDiskfs(t testing.TB, path string, v Volume, want map[string]File) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	vol, err := diskfat32.Read(file.New(f, true), v.Size, 0, 512)
	if err != nil {
		t.Fatalf("go-diskfs: %v", err)
	}
	if label := strings.TrimRight(vol.Label(), " "); label != v.Label {
		t.Errorf("go-diskfs: label %q, want %q", label, v.Label)
	}
	seen := 0
	dirs := []string{"."}
	for len(dirs) > 0 {
		dir := dirs[0]
		dirs = dirs[1:]
		list, err := vol.ReadDir(dir)
		if err != nil {
			t.Fatalf("go-diskfs: %q: %v", dir, err)
		}
		for _, d := range list {
			if d.Name() == "." || d.Name() == ".." {
				continue
			}
			name := strings.TrimPrefix(dir+"/"+d.Name(), "./")
			w, ok := want[name]
			if !ok || w.Dir != d.IsDir() {
				t.Errorf("go-diskfs finds %q, which is not on the list", name)
				continue
			}
			seen++
			if w.Dir {
				dirs = append(dirs, name)
				continue
			}
			info, err := d.Info()
			if err != nil {
				t.Fatal(err)
			}
			if info.Size() != w.Size {
				t.Errorf("go-diskfs: %q has %d bytes, want %d", name, info.Size(), w.Size)
			}
			if w.Size == 0 {
				continue
			}
			r, err := vol.OpenFile(name, os.O_RDONLY)
			if err != nil {
				t.Errorf("go-diskfs: %q: %v", name, err)
				continue
			}
			if hashOf(t, r) != hashOf(t, io.NewSectionReader(w.Content, 0, w.Size)) {
				t.Errorf("go-diskfs: %q has other bytes", name)
			}
			r.Close()
		}
	}
	if seen != len(want) {
		t.Errorf("go-diskfs finds %d files and folders, want %d", seen, len(want))
	}
}

// compareCheck holds the own checker's findings against the list.
func compareCheck(t testing.TB, c *volumeCheck, want map[string]File) {
	t.Helper()
	if got, want := sortedKeys(c.items), sortedKeys(want); !slices.Equal(got, want) {
		t.Fatalf("the volume holds\n%q, want\n%q", got, want)
	}
	for name, w := range want {
		it := c.items[name]
		if it.dir != w.Dir || it.size != w.Size || !it.modTime.Equal(w.ModTime) {
			t.Errorf("%q is %+v, want %+v", name, it, w)
		}
		if w.Size > 0 && hashOf(t, c.content(name)) != hashOf(t, io.NewSectionReader(w.Content, 0, w.Size)) {
			t.Errorf("%q has other bytes", name)
		}
	}
}

func TestFieldToolsAgree(t *testing.T) {
	sizes := map[int][]int64{
		512:  {33 * mib, 64 * mib, 129 * mib, 194 * mib, 259 * mib, 4096 * mib, 32 << 30},
		1024: {67 * mib, 300 * mib},
		2048: {133 * mib},
		4096: {259 * mib, 300 * mib, 4096 * mib, 32 << 30},
	}
	all := trees()
	for _, sector := range []int{512, 1024, 2048, 4096} {
		for _, size := range sizes[sector] {
			for _, name := range sortedKeys(all) {
				files := all[name]
				t.Run(fmt.Sprintf("%d MiB of %d-byte sectors, %s", size/mib, sector, name), func(t *testing.T) {
					t.Parallel()
					v := Volume{Size: size, SectorSize: sector, HiddenSectors: 2048, ID: 0x1234abcd, Label: "MEMLINUX", ModTime: someTime}
					extents, err := v.Build(files)
					if err != nil {
						t.Fatal(err)
					}
					want := withParents(files)
					c, err := checkVolume(v, extents)
					if err != nil {
						t.Fatal(err)
					}
					path := writeSparse(t, size, extents)
					entries := len(want) + 1 // fsck counts the label
					fsck(t, path, entries, int(c.clusters))
					forMany := sector == 512 && size == 33*mib || sector == 4096 && size == 300*mib
					if len(files) > 500 && !forMany {
						return // comparing many files takes seconds; once for either sector size is enough
					}
					compareCheck(t, c, want)
					if name == "names beyond 16 bits" {
						return // neither mtools 4.0.32 nor go-diskfs 1.9.4 reads surrogates
					}
					compareMtools(t, path, want)
					if len(files) < 500 || sector == 512 {
						compareDiskfs(t, path, v, want)
					}
				})
			}
		}
	}
}

// The root has room for a label even where there is none: that room must be
// written too.
func TestRootWithoutLabelIsWrittenToItsEnd(t *testing.T) {
	for _, count := range []int{0, 15, 16, 17, 31, 32} { // 16 entries fill a cluster
		v := Volume{Size: 33 * mib, SectorSize: 512, ModTime: someTime}
		var files []File
		for i := range count {
			files = append(files, patterned(fmt.Sprintf("F%d", i), 0))
		}
		extents, err := v.Build(files)
		if err != nil {
			t.Fatal(err)
		}
		c, err := checkVolume(v, extents)
		if err != nil {
			t.Errorf("%d files: %v", count, err)
		} else if len(c.items) != count {
			t.Errorf("%d files: the volume holds %d", count, len(c.items))
		}
	}
}

func TestMdirListsLabelAndSerial(t *testing.T) {
	mdir := need.Tool(t, "mdir", "mtools")
	v := Volume{Size: 40 * mib, SectorSize: 512, ID: 0xcafe0042, Label: "MY STICK-1", ModTime: someTime}
	extents, err := v.Build([]File{patterned("boot/grub/menu.lst", 77)})
	if err != nil {
		t.Fatal(err)
	}
	path := writeSparse(t, v.Size, extents)
	out, err := exec.Command(mdir, "-i", path, "::/boot/grub").CombinedOutput()
	for _, want := range []string{"Volume in drive : is MY STICK-1", "Volume Serial Number is CAFE-0042", "MENU     LST        77 2026-11-05  13:14  menu.lst"} {
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("mdir does not print %q: %v\n%s", want, err, out)
		}
	}
}

func TestFullVolume(t *testing.T) {
	for _, c := range []struct {
		sector int
		size   int64
	}{{512, 33 * mib}, {512, 64 * mib}, {512, 100*mib + 512*7}, {512, 300 * mib}, {2048, 200 * mib}, {4096, 300 * mib}, {512, 32 << 30}, {4096, 64 << 30}} {
		t.Run(fmt.Sprintf("%d bytes of %d-byte sectors", c.size, c.sector), func(t *testing.T) {
			v := Volume{Size: c.size, SectorSize: c.sector, ModTime: someTime}
			files := []File{patterned("some file", 1000), {Path: "folder", Dir: true, ModTime: someTime}}
			var room int64
			for {
				f := patterned(fmt.Sprintf("fill %d", len(files)), 0)
				room = int64(sort.Search(maxFileSize, func(n int) bool {
					f.Size = int64(n)
					min, err := MinSize(c.sector, append(files[:len(files):len(files)], f))
					return err != nil || min > c.size
				})) - 1
				f.Size = room
				if room == maxFileSize-1 {
					f.Size = maxFileSize - 5*mib
				}
				files = append(files, f)
				if f.Size == room {
					break
				}
			}
			extents, err := v.Build(files)
			if err != nil {
				t.Fatalf("exactly full: %v", err)
			}
			check, err := checkVolume(v, extents)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d of %d clusters of %d bytes", check.used, check.clusters, check.cluster)
			if free := check.clusters - check.used; free != 0 {
				t.Errorf("%d clusters are free on a full volume", free)
			}
			if c.size <= 100*mib+512*7 {
				path := writeSparse(t, v.Size, extents)
				fsck(t, path, len(files), int(check.clusters))
				compareMtools(t, path, withParents(files))
			}

			files[len(files)-1].Size++
			_, err = v.Build(files)
			var full *NoSpaceError
			if !errors.As(err, &full) {
				t.Fatalf("one byte too much: %v, want a NoSpaceError", err)
			}
			if full.Have != c.size || full.Need <= c.size || full.Need > c.size+256<<10 {
				t.Errorf("one byte too much: needs %d, has %d", full.Need, full.Have)
			}
			v.Size = full.Need
			if extents, err = v.Build(files); err != nil {
				t.Fatalf("with what the error says is needed: %v", err)
			}
			if _, err := checkVolume(v, extents); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestMinSizeIsLeastAndMoreIsNeverTooLittle(t *testing.T) {
	manySmall := []File{}
	for i := range 10000 {
		manySmall = append(manySmall, patterned(fmt.Sprintf("d%d/f%d", i%7, i), 1))
	}
	for _, sector := range []int{512, 1024, 2048, 4096} {
		for name, files := range map[string][]File{"nothing": nil, "many small files": manySmall, "one large file": {patterned("f", 3<<30)}} {
			t.Run(fmt.Sprintf("%s, %d-byte sectors", name, sector), func(t *testing.T) {
				least, err := MinSize(sector, files)
				if err != nil {
					t.Fatal(err)
				}
				v := Volume{Size: least - int64(sector), SectorSize: sector}
				var full *NoSpaceError
				if _, err := v.Build(files); !errors.As(err, &full) || full.Need != least {
					t.Errorf("one sector less: %v, want a NoSpaceError that needs %d", err, least)
				}
				rng := rand.New(rand.NewPCG(1, 2))
				for i := range 40 {
					v.Size = least + int64(i*sector)
					if i >= 20 {
						v.Size = least + rng.Int64N(8<<30)/int64(sector)*int64(sector)
					}
					v.Label = []string{"", "LABEL"}[i%2]
					if _, err := v.Build(files); err != nil {
						t.Fatalf("%d bytes more: %v", v.Size-least, err)
					}
				}
			})
		}
	}
}

func TestGeometryOfAllSizes(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	empty, err := newTree(nil, someTime)
	if err != nil {
		t.Fatal(err)
	}
	for _, sector := range []int64{512, 1024, 2048, 4096} {
		least, _ := empty.minSize(sector)
		for i := range 20000 {
			sectors := least/sector + int64(i)
			if i > 5000 {
				sectors = min(maxSectors, least/sector+rng.Int64N(1<<(10+rng.IntN(23))))
			}
			g, err := empty.fit(sector, sectors*sector)
			if err != nil {
				t.Fatalf("%d sectors of %d bytes: %v", sectors, sector, err)
			}
			perCluster := g.cluster / sector
			switch {
			case g.clusters < minClusters || g.clusters > maxClusters,
				(g.clusters+2)*4 > g.fatSectors*sector || (g.fatSectors-1)*sector >= (g.clusters+2)*4,
				g.sectors() > sectors || g.reserved < 32 || g.reserved > 32+perCluster,
				(g.sectors()-g.reserved-2*g.fatSectors)/perCluster != g.clusters,
				g.clusters < maxClusters && sectors-g.sectors() >= 2*perCluster+2:
				t.Fatalf("%d sectors of %d bytes: %+v", sectors, sector, g)
			}
		}
	}
	for _, c := range []struct{ sector, size, cluster int64 }{
		{512, 33 * mib, 512}, {512, 64 * mib, 512}, {512, 128 * mib, 1024}, {512, 200 * mib, 2048}, {512, 512 * mib, 4096}, {512, 8 << 30, 4096},
		{512, 16 << 30, 8192}, {512, 32 << 30, 16384}, {512, 33 << 30, 32768}, {512, maxSectors * 512, 32768}, {4096, 300 * mib, 4096}, {4096, 8 << 40, 32768},
	} {
		if g, err := empty.fit(c.sector, c.size); err != nil || g.cluster != c.cluster {
			t.Errorf("%d MiB of %d-byte sectors: clusters of %d bytes, %v; want %d", c.size/mib, c.sector, g.cluster, err, c.cluster)
		}
	}
}

func TestRefused(t *testing.T) {
	var crowd []File
	for i := range 32768 {
		crowd = append(crowd, patterned(fmt.Sprintf("crowd/long name %05d", i), 0))
	}
	for _, c := range []struct {
		name  string
		v     Volume // zero fields: 64 MiB of 512-byte sectors
		files []File
		want  []string // all in the error
	}{
		{"too small for FAT32", Volume{Size: 32 * mib}, nil, []string{"needs 33 MiB", "has 32 MiB", "use a larger device"}},
		{"too small with 4096-byte sectors", Volume{Size: 64 * mib, SectorSize: 4096}, nil, []string{"needs 257 MiB", "has 64 MiB"}},
		{"too much for the volume", Volume{}, []File{patterned("a", 70*mib)}, []string{"needs 71 MiB", "has 64 MiB"}},
		{"more than FAT32 can address", Volume{Size: 1 << 42}, nil, []string{"at most 4294967295"}},
		{"a size that is no multiple of the sector", Volume{Size: 64*mib + 1}, nil, []string{"not a multiple of its 512-byte"}},
		{"an odd sector size", Volume{SectorSize: 520}, nil, []string{"520, not 512"}},
		{"a lower-case label", Volume{Label: "stick"}, nil, []string{`"stick"`, `'s'`}},
		{"a long label", Volume{Label: "ABCDEFGHIJKL"}, nil, []string{"12 characters"}},
		{"a label that ends with a space", Volume{Label: "A "}, nil, []string{"space"}},
		{"a file of 4 GiB", Volume{Size: 8 << 30}, []File{patterned("boot/initramfs", 4<<30)}, []string{`"boot/initramfs"`, "smaller than 4 GiB"}},
		{"a negative size", Volume{}, []File{patterned("a", -1)}, []string{"negative"}},
		{"no content", Volume{}, []File{{Path: "a", Size: 1}}, []string{"no content"}},
		{"a folder with a size", Volume{}, []File{{Path: "a", Size: 1, Dir: true}}, []string{"no size"}},
		{"a colon", Volume{}, []File{patterned("etc/a:b", 1)}, []string{`"etc/a:b"`, `':'`}},
		{"a backslash", Volume{}, []File{patterned(`a\b`, 1)}, []string{`'\\'`}},
		{"a control character", Volume{}, []File{patterned("a\nb/c", 1)}, []string{`'\n'`}},
		{"DEL", Volume{}, []File{patterned("a\x7f", 1)}, []string{`'\x7f'`}},
		{"the noncharacter that fills long names", Volume{}, []File{patterned("a\uffff", 1)}, []string{`'\uffff'`}},
		{"bytes that are not UTF-8", Volume{}, []File{patterned("a\xff", 1)}, []string{"UTF-8"}},
		{"a dot at the end", Volume{}, []File{patterned("a./b", 1)}, []string{`"a."`, "dot or space"}},
		{"a space at the end", Volume{}, []File{patterned("a ", 1)}, []string{"dot or space"}},
		{"a leading slash", Volume{}, []File{patterned("/a", 1)}, []string{"empty part"}},
		{"a trailing slash", Volume{}, []File{{Path: "a/", Dir: true}}, []string{"empty part"}},
		{"no path", Volume{}, []File{patterned("", 1)}, []string{"empty part"}},
		{"the parent folder", Volume{}, []File{patterned("a/../b", 1)}, []string{`".."`}},
		{"256 units", Volume{}, []File{patterned(strings.Repeat("a", 256), 1)}, []string{"256 UTF-16 units"}},
		{"256 units by surrogates", Volume{}, []File{patterned(strings.Repeat("😀", 128), 1)}, []string{"256 UTF-16 units"}},
		{"files that differ in case", Volume{}, []File{patterned("d/Readme", 1), patterned("d/README", 1)}, []string{`"d/Readme"`, `"d/README"`, "upper and lower case"}},
		{"folders that differ in case", Volume{}, []File{patterned("Boot/a", 1), patterned("boot/b", 1)}, []string{`"Boot"`, `"boot"`}},
		{"other letters that differ in case", Volume{}, []File{patterned("Ä", 1), patterned("ä", 1)}, []string{`"Ä"`, `"ä"`}},
		{"a file twice", Volume{}, []File{patterned("a", 1), patterned("a", 2)}, []string{`"a" is listed twice`}},
		{"a file in a file", Volume{}, []File{patterned("a", 1), patterned("a/b", 1)}, []string{`"a" and "a/b"`}},
		{"a folder that is a file", Volume{}, []File{patterned("a/b/c", 1), patterned("a/b", 1)}, []string{`"a/b" and "a/b/c"`}},
		{"more than 65536 directory entries", Volume{}, crowd, []string{`"/crowd"`, "98306 directory entries", "65536"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.v.Size == 0 {
				c.v.Size = 64 * mib
			}
			if c.v.SectorSize == 0 {
				c.v.SectorSize = 512
			}
			extents, err := c.v.Build(c.files)
			if err == nil || extents != nil {
				t.Fatalf("Build accepts it")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
		})
	}
}

func TestLargestFolder(t *testing.T) {
	var files []File
	for i := range 21844 { // 2 + 3×21844 = 65534 entries, and two short ones
		files = append(files, patterned(fmt.Sprintf("d/a long name %05d", i), 0))
	}
	files = append(files, patterned("d/SHORT1", 0), patterned("d/SHORT2", 0))
	v := Volume{Size: 64 * mib, SectorSize: 512, ModTime: someTime}
	extents, err := v.Build(files)
	if err != nil {
		t.Fatal(err)
	}
	c, err := checkVolume(v, extents)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.items) != len(files)+1 {
		t.Errorf("%d items, want %d", len(c.items), len(files)+1)
	}
	if _, err := v.Build(append(files, patterned("d/SHORT3", 0))); err == nil {
		t.Error("65537 entries are accepted")
	}
}

func TestShortNames(t *testing.T) {
	for _, c := range []struct {
		why   string
		names []string // sorted
		want  []string
	}{
		{"a name that is short stays, without a long one", []string{"BOOTX64.EFI"}, []string{"BOOTX64 EFI"}},
		{"lower case loses nothing", []string{"menu.lst", "vmlinuz"}, []string{"MENU    LST+", "VMLINUZ    +"}},
		{"a long extension needs a tail", []string{"loader.conf"}, []string{"LOADER~1CON+"}},
		{"a long base needs a tail", []string{"initramfs.img"}, []string{"INITRA~1IMG+"}},
		{"tails count", []string{"long name 1", "long name 2", "long name 3"}, []string{"LONGNA~1   +", "LONGNA~2   +", "LONGNA~3   +"}},
		{"a real name is never taken", []string{"LONGNA~1", "long name 1", "longna~2"}, []string{"LONGNA~1   ", "LONGNA~3   +", "LONGNA~2   +"}},
		{"dots before and between", []string{"..x", ".profile", "a.b.c"}, []string{"X~1        +", "PROFIL~1   +", "AB~1    C  +"}},
		{"characters of long names only", []string{"a+b,c;d", "ä"}, []string{"A_B_C_~1   +", "_~1        +"}},
		{"nothing left of the name", []string{" .a"}, []string{"A~1        +"}},
	} {
		t.Run(c.why, func(t *testing.T) {
			var nodes []*node
			for _, name := range c.names {
				nodes = append(nodes, &node{name: name})
			}
			setShortNames(nodes)
			for i, n := range nodes {
				got := string(n.short[:])
				if n.long != nil {
					got += "+"
				}
				if got != c.want[i] {
					t.Errorf("%q gets %q, want %q", n.name, got, c.want[i])
				}
			}
		})
	}
}

func TestManyTails(t *testing.T) {
	var nodes []*node
	for i := range 20000 { // many bases that become the same as the tails get longer
		nodes = append(nodes, &node{name: fmt.Sprintf("file%04d with a long name %d", i%1000, i)})
	}
	start := time.Now()
	setShortNames(nodes)
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("20000 names took %v", took)
	}
	seen := map[[11]byte]bool{}
	for _, n := range nodes {
		if seen[n.short] {
			t.Fatalf("%q twice", n.short)
		}
		seen[n.short] = true
	}
}

func TestTimesAreClampedAndInUTC(t *testing.T) {
	east := time.FixedZone("", 5*3600)
	for _, c := range []struct {
		why      string
		in, want time.Time
	}{
		{"the zero time", time.Time{}, firstTime},
		{"1970", time.Unix(0, 0), firstTime},
		{"another zone", time.Date(2000, 1, 1, 3, 0, 1, 0, east), time.Date(1999, 12, 31, 22, 0, 0, 0, time.UTC)},
		{"odd seconds", time.Date(2026, 2, 28, 23, 59, 59, 999, time.UTC), time.Date(2026, 2, 28, 23, 59, 58, 0, time.UTC)},
		{"after 2107", time.Date(2200, 5, 5, 5, 5, 5, 0, time.UTC), lastTime},
	} {
		v := Volume{Size: 33 * mib, SectorSize: 512, ModTime: c.in}
		extents, err := v.Build([]File{{Path: "made/file", ModTime: c.in}})
		if err != nil {
			t.Fatal(err)
		}
		check, err := checkVolume(v, extents)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{"made", "made/file"} {
			if got := check.items[p].modTime; !got.Equal(c.want) {
				t.Errorf("%s: %q is of %v, want %v", c.why, p, got, c.want)
			}
		}
	}
}

func TestSameFilesInAnyOrderGiveTheSameBytes(t *testing.T) {
	files := trees()["1009 names that collide"]
	v := Volume{Size: 40 * mib, SectorSize: 512, ModTime: someTime}
	digest := func() string {
		extents, err := v.Build(files)
		if err != nil {
			t.Fatal(err)
		}
		im := media.Image{Size: v.Size, SectorSize: v.SectorSize, Extents: extents}
		if err := im.Validate(); err != nil {
			t.Fatal(err)
		}
		d, err := im.Digest(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := digest()
	if digest() != first {
		t.Error("built twice, the bytes differ")
	}
	files = slices.Clone(files)
	rand.New(rand.NewPCG(5, 6)).Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
	if digest() != first {
		t.Error("in another order the bytes differ")
	}
}

func TestBuildReadsNoContentAndLittleMemory(t *testing.T) {
	v := Volume{Size: 1 << 40, SectorSize: 512}
	var files []File
	for i := range 100 {
		files = append(files, File{Path: fmt.Sprint(i), Size: 4<<30 - 1, Content: unreadable{t}})
	}
	allocated := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			if _, err := v.Build(files); err != nil {
				b.Fatal(err)
			}
		}
	}).AllocedBytesPerOp()
	if allocated > mib {
		t.Errorf("Build of a 1 TiB volume allocates %d bytes", allocated)
	}
}

type unreadable struct{ t testing.TB }

func (u unreadable) ReadAt([]byte, int64) (int, error) {
	u.t.Error("Build reads a file")
	return 0, io.ErrUnexpectedEOF
}

func TestTruncatedFileIsAnErrorNotZeros(t *testing.T) {
	v := Volume{Size: 33 * mib, SectorSize: 512}
	extents, err := v.Build([]File{{Path: "f", Size: 1000, Content: bytes.NewReader(make([]byte, 999))}})
	if err != nil {
		t.Fatal(err)
	}
	im := media.Image{Size: v.Size, SectorSize: 512, Extents: extents}
	if _, err := im.Digest(t.Context()); !errors.Is(err, media.ErrShortContent) {
		t.Errorf("a file that became shorter: %v", err)
	}
}

// A reader may ask for any piece of an extent, in any order.
func TestExtentsReadTheSameInAnyPieces(t *testing.T) {
	v := Volume{Size: 40 * mib, SectorSize: 512, ModTime: someTime}
	extents, err := v.Build(trees()["1000 files in one folder"])
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(7, 8))
	for i, e := range extents {
		whole := make([]byte, e.Length)
		if n, err := e.Content.ReadAt(whole, 0); n != len(whole) || err != nil {
			t.Fatalf("extent %d: %d bytes, %v", i, n, err)
		}
		for range 20 {
			from := rng.Int64N(e.Length)
			p := make([]byte, 1+rng.Int64N(3000))
			n, err := e.Content.ReadAt(p, from)
			if want := whole[from:min(e.Length, from+int64(len(p)))]; !bytes.Equal(p[:n], want) || (n < len(p)) != (err == io.EOF) {
				t.Fatalf("extent %d: %d bytes at %d read otherwise than at once: %d, %v", i, len(p), from, n, err)
			}
		}
		if n, err := e.Content.ReadAt(make([]byte, 1), e.Length); n != 0 || err != io.EOF {
			t.Fatalf("extent %d goes on behind its end: %d, %v", i, n, err)
		}
	}
}
