package bootable

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

func run1(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", argv, err, out)
	}
}

// image is a file of that many MiB.
func image(t *testing.T, mib int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, mib<<20); err != nil {
		t.Fatal(err)
	}
	return path
}

// addLoader puts BOOTX64.EFI behind many other files, so that chains are followed.
func addLoader(t *testing.T, at string, more int) {
	t.Helper()
	mmd, mcopy := need.Tool(t, "mmd", "mtools"), need.Tool(t, "mcopy", "mtools")
	dir := t.TempDir()
	args := []string{mcopy, "-i", at}
	for i := range more {
		path := fmt.Sprintf("%s/F%d", dir, i)
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, path)
	}
	loader := dir + "/bootx64.efi"
	if err := os.WriteFile(loader, []byte("MZ"), 0o600); err != nil {
		t.Fatal(err)
	}
	run1(t, mmd, "-i", at, "::/EFI", "::/EFI/BOOT")
	run1(t, append(args, loader, "::/EFI/BOOT/")...)
}

func look(t *testing.T, path string, sector int) Found {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	found, err := Look(f, info.Size(), sector)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// What the field's own tools make is seen for what it is.
func TestLook(t *testing.T) {
	const (
		noCode   = "there is no boot code in its first sector"
		noLoader = "there is no EFI/BOOT/BOOTX64.EFI on it"
	)
	t.Run("zeros", func(t *testing.T) {
		if f := look(t, image(t, 4), 512); f != (Found{BIOS: noCode, UEFI: noLoader}) {
			t.Errorf("%+v", f)
		}
	})
	t.Run("smaller than a sector", func(t *testing.T) {
		f, err := Look(bytes.NewReader([]byte("hi")), 2, 512)
		if err != nil || f.BIOS == "" || f.UEFI == "" {
			t.Errorf("%+v, %v", f, err)
		}
	})
	mkfs := func(t *testing.T, path string, args ...string) {
		run1(t, append([]string{need.Tool(t, "mkfs.vfat", "dosfstools"), path}, args...)...)
	}
	for _, c := range []struct {
		name string
		mib  int64
		args []string
	}{
		{"FAT12", 2, []string{"-F", "12", "-s", "1"}}, {"FAT16", 16, []string{"-F", "16", "-s", "1"}}, {"FAT32", 40, []string{"-F", "32", "-s", "1"}},
	} {
		t.Run(c.name+" without a partition", func(t *testing.T) {
			path := image(t, c.mib)
			mkfs(t, path, c.args...)
			if f := look(t, path, 512); f.BIOS != "its boot sector only says that it is not bootable" || f.UEFI != noLoader || f.Table != "" {
				t.Errorf("empty: %+v", f)
			}
			addLoader(t, path, 100)
			if f := look(t, path, 512); f.UEFI != "" {
				t.Errorf("with a loader: %+v", f)
			}
		})
	}
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("GPT with an ESP, %d", sector), func(t *testing.T) {
			path := image(t, 300)
			// Its partition at 1 MiB, in both.
			size := 290 << 20
			script := fmt.Sprintf("label: gpt\nstart=%d, size=%d, type=U\n", 1<<20/sector, size/sector)
			dev := need.Loop(t, path, fmt.Sprint(sector))
			cmd := exec.Command(need.Tool(t, "sfdisk", "fdisk"), "-q", "--no-reread", "--no-tell-kernel", dev)
			cmd.Stdin = bytes.NewReader([]byte(script))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			run1(t, need.Tool(t, "mkfs.vfat", "dosfstools"), "-F", "32", "-S", fmt.Sprint(sector), "-s", "1", "--offset", fmt.Sprint(1<<20/sector), path, fmt.Sprint(size>>10))
			addLoader(t, path+"@@1M", 5)
			if f := look(t, path, sector); f != (Found{BIOS: noCode, Table: "GPT", End: 291 << 20}) {
				t.Errorf("%+v", f)
			}
			other := 4096 + 512 - sector
			if f := look(t, path, other); f.Table == "GPT" || f.OtherSectors != sector {
				t.Errorf("read with %d: %+v", other, f)
			}
		})
	}
	t.Run("MBR with a FAT", func(t *testing.T) {
		path := image(t, 40)
		cmd := exec.Command(need.Tool(t, "sfdisk", "fdisk"), "-q", path)
		cmd.Stdin = bytes.NewReader([]byte("label: dos\nstart=2048, type=e\n"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		run1(t, need.Tool(t, "mkfs.vfat", "dosfstools"), "--offset", "2048", path, fmt.Sprint(39<<10))
		addLoader(t, path+"@@1M", 0)
		if f := look(t, path, 512); f != (Found{BIOS: noCode, Table: "MBR", End: 40 << 20}) {
			t.Errorf("%+v", f)
		}
	})
	t.Run("ISO", func(t *testing.T) {
		dir := t.TempDir()
		tree := filepath.Join(dir, "tree")
		if err := os.Mkdir(tree, 0o700); err != nil {
			t.Fatal(err)
		}
		for name, p := range map[string][]byte{"boot.img": bytes.Repeat([]byte{0xf4}, 2048), "efi.img": make([]byte, 1440<<10)} {
			if err := os.WriteFile(filepath.Join(tree, name), p, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		mkfs(t, tree+"/efi.img")
		addLoader(t, tree+"/efi.img", 0)
		xorriso := need.Tool(t, "xorriso", "xorriso")
		iso := filepath.Join(dir, "disc.iso")
		run1(t, xorriso, "-as", "mkisofs", "-quiet", "-o", iso, "-b", "boot.img", "-no-emul-boot", "-boot-load-size", "4",
			"-eltorito-alt-boot", "-e", "efi.img", "-no-emul-boot", tree)
		if f := look(t, iso, 512); f.UEFI != "" || f.BIOS == "" || f.BIOS == noCode {
			t.Errorf("%+v", f)
		}
		plain := filepath.Join(dir, "plain.iso")
		run1(t, xorriso, "-as", "mkisofs", "-quiet", "-o", plain, tree)
		if f := look(t, plain, 512); f != (Found{BIOS: noCode, UEFI: noLoader}) {
			t.Errorf("data only: %+v", f)
		}
	})
	t.Run("boot code", func(t *testing.T) {
		p := make([]byte, 1<<20)
		p[0], p[510], p[511] = 0xfa, 0x55, 0xaa
		if f, err := Look(bytes.NewReader(p), 1<<20, 512); f.BIOS != "" || err != nil {
			t.Errorf("%+v, %v", f, err)
		}
	})
	t.Run("a disk that fails", func(t *testing.T) {
		if _, err := Look(failing{}, 1<<20, 512); !errors.Is(err, errUnreadable) {
			t.Errorf("error %v", err)
		}
	})
}

type failing struct{}

func (failing) ReadAt([]byte, int64) (int, error) { return 0, errors.New("input/output error") }

// Whatever a disk holds, looking at it ends, without a panic.
func FuzzLook(f *testing.F) {
	mbr := make([]byte, 8192)
	mbr[510], mbr[511] = 0x55, 0xaa
	mbr[mbrEntries+4], mbr[mbrEntries+8], mbr[mbrEntries+12] = 0xef, 1, 8
	f.Add(mbr, false)
	gpt := bytes.Clone(mbr)
	copy(gpt[512:], "EFI PART")
	gpt[512+72], gpt[512+80], gpt[512+84] = 2, 4, 128
	copy(gpt[1024:], bytes.Repeat([]byte{1}, 16))
	gpt[1024+32], gpt[1024+40] = 4, 15
	// A FAT12 of one cluster a sector in the partition, with a folder.
	b := gpt[4*512:]
	copy(b[11:], []byte{0, 2, 1, 1, 0, 1, 16, 0, 16, 0, 0xf8, 1, 0})
	b[510], b[511] = 0x55, 0xaa
	copy(b[1024:], "EFI        \x10")
	b[1024+26] = 2
	f.Add(gpt, false)
	disc := make([]byte, 20*discSector)
	copy(disc[17*discSector:], "\x00CD001\x01EL TORITO SPECIFICATION")
	disc[17*discSector+71] = 18
	copy(disc[18*discSector:], []byte{1, 0xef, 30: 0x55, 31: 0xaa, 32: 0x88, 40: 19})
	f.Add(disc, true)
	f.Fuzz(func(t *testing.T, p []byte, large bool) {
		sector := 512
		if large {
			sector = 4096
		}
		if _, err := Look(bytes.NewReader(p), int64(len(p)), sector); err != nil {
			t.Error(err)
		}
	})
}
