package pc

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	sector = 512
	mib    = 1 << 20
)

// partition makes the disk with its partitions, which are still empty.
func (p *PC) partition(t testing.TB, s Spec, size sizes) {
	t.Helper()
	gpt := s.Loader == GRUB2BIOSGPT || p.Firmware == uefi
	fs := "ext4"
	if s.Loader == GRUBLegacy {
		fs = "ext3"
	}
	script := "label: dos\nlabel-id: 0x" + p.diskID + "\n"
	if gpt {
		script = "label: gpt\nfirst-lba: 34\n"
	}
	number, at := 0, int64(mib)
	if s.Loader == GRUB2BIOSGPT {
		number++
		script += "start=34, size=2014, type=21686148-6449-6E6F-744E-656564454649\n"
	}
	add := func(kind, fs string, sizeMiB int64) Partition {
		number++
		part := Partition{Number: number, Start: at, Size: sizeMiB * mib, Type: fs, UUID: randomUUID(), PartUUID: fmt.Sprintf("%s-%02x", p.diskID, number)}
		at += part.Size
		line := fmt.Sprintf("start=%d, size=%d, type=%s", part.Start/sector, part.Size/sector, kind)
		if gpt {
			part.PartUUID = randomUUID()
			line += ", uuid=" + part.PartUUID
		}
		script += line + "\n"
		return part
	}
	linux := "83"
	if gpt {
		linux = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
	}
	if p.Firmware == uefi {
		p.ESP = add("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "vfat", size.esp)
		id := strings.ToUpper(random(4))
		p.ESP.UUID = id[:4] + "-" + id[4:]
		switch {
		case s.Loader == GRUB2UEFI:
			p.ESPMount = "/boot/efi"
		case s.SeparateBoot:
			p.ESPMount = "/boot"
		default:
			p.ESPMount = "/efi"
		}
	}
	if s.SeparateBoot && s.Loader != SystemdBoot {
		p.Boot = add(linux, fs, size.boot)
	}
	p.Root = add(linux, fs, size.root)

	f, err := os.Create(p.Disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(at + mib); err != nil { // the last MiB holds the second GPT
		t.Fatal(err)
	}
	runWith(t, nil, script, "sfdisk", "--quiet", p.Disk)
}

// fill makes the file systems out of the tree at root.
func (p *PC) fill(t testing.TB, root string) {
	t.Helper()
	// The folders that something is mounted on go out of the tree one by one,
	// the innermost first.
	take := func(mount string) string {
		dir := filepath.Join(t.TempDir(), "part")
		inside := filepath.Join(root, mount)
		if err := os.MkdirAll(inside, 0o755); err != nil { //nolint:gosec // a part of the PC's tree
			t.Fatal(err)
		}
		if err := os.Rename(inside, dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(inside, 0o755); err != nil { //nolint:gosec // a part of the PC's tree
			t.Fatal(err)
		}
		return dir
	}
	if p.ESP.Number != 0 {
		p.fat(t, p.ESP, take(p.ESPMount))
	}
	if p.Boot.Number != 0 {
		p.ext(t, p.Boot, take("/boot"))
	}
	p.ext(t, p.Root, root)
}

func (p *PC) ext(t testing.TB, part Partition, dir string) {
	t.Helper()
	argv := []string{"mke2fs", "-q", "-F", "-t", part.Type, "-b", "4096", "-m", "0", "-U", part.UUID, "-d", dir}
	if part.Type == "ext3" {
		// What e2fs_stage1_5 of 2007 knows.
		argv = append(argv, "-I", "128", "-O", "^resize_inode,^dir_index,^large_file")
	}
	run(t, nil, append(argv, "-E", fmt.Sprintf("offset=%d", part.Start), p.Disk, fmt.Sprintf("%dk", part.Size/1024))...)
}

func (p *PC) fat(t testing.TB, part Partition, dir string) {
	t.Helper()
	run(t, nil, "mkfs.vfat", "-F", "32", "-s", "1", "-i", strings.ReplaceAll(part.UUID, "-", ""),
		"--offset", fmt.Sprint(part.Start/sector), p.Disk, fmt.Sprint(part.Size/1024))
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	argv := []string{"mcopy", "-i", fmt.Sprintf("%s@@%d", p.Disk, part.Start), "-s", "-Q"}
	for _, e := range entries {
		argv = append(argv, filepath.Join(dir, e.Name()))
	}
	run(t, []string{"MTOOLS_SKIP_CHECK=1"}, append(argv, "::/")...)
}

// sectors writes what boots a BIOS PC: code over the MBR's, but for what is the
// disk's own, and more from LBA lba on.
func (p *PC) sectors(t testing.TB, mbr []byte, keep [2]int, lba int64, more []byte) {
	t.Helper()
	f, err := os.OpenFile(p.Disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	own := make([]byte, sector)
	if _, err := io.ReadFull(f, own); err != nil {
		t.Fatal(err)
	}
	first := append([]byte(nil), mbr[:sector]...)
	copy(first[keep[0]:keep[1]], own[keep[0]:keep[1]])
	copy(first[0x1b8:], own[0x1b8:0x1fe]) // disk signature and partition table
	first[0x1fe], first[0x1ff] = 0x55, 0xaa
	if lba*sector+int64(len(more)) > mib {
		t.Fatalf("%d bytes of boot loader do not fit before the first partition", len(more))
	}
	for off, b := range map[int64][]byte{0: first, lba * sector: more} {
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
}

// whole pads b to whole sectors.
func whole(b []byte) []byte {
	return append(b, make([]byte, (sector-len(b)%sector)%sector)...)
}
