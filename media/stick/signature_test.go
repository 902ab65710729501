package stick

import (
	"bytes"
	"context"
	"encoding/binary"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/fat32"
	"github.com/memlinux/memlinux/testvm/need"
)

// region is the disk, or a partition on it.
type region struct {
	f    *os.File
	path string // a device that shows it
	off  int64
	size int64
}

// put writes p into the region; a negative offset counts from its end.
func (r region) put(t *testing.T, off int64, p []byte) {
	t.Helper()
	if off < 0 {
		off += r.size
	}
	if _, err := r.f.WriteAt(p, r.off+off); err != nil {
		t.Fatal(err)
	}
}

// oldSignatures are what a stick may have held before, made by the field's own
// tools, or by hand where those are rare. type is what wipefs calls it.
func oldSignatures() []struct {
	name, kind string
	least      int64 // bytes of what it can be on; 0: any
	make       func(t *testing.T, r region)
} {
	mk := func(tool, pkg string, args ...string) func(*testing.T, region) {
		return func(t *testing.T, r region) { run(t, need.Tool(t, tool, pkg), append(args, r.path)...) }
	}
	at := func(off int64, text string) func(*testing.T, region) {
		return func(t *testing.T, r region) { r.put(t, off, []byte(text)) }
	}
	mdOne := func(off func(size int64) int64) func(*testing.T, region) {
		return func(t *testing.T, r region) {
			at := off(r.size)
			p := make([]byte, 4096)
			le.PutUint32(p, 0xa92b4efc)
			le.PutUint32(p[4:], 1)
			le.PutUint64(p[144:], uint64(at/512)) // where it lies itself, in sectors
			r.put(t, at, p)
		}
	}
	luks2 := func(off int64) func(*testing.T, region) {
		return func(t *testing.T, r region) {
			p := make([]byte, 4096)
			copy(p, "SKUL\xba\xbe\x00\x02")
			binary.BigEndian.PutUint64(p[8:], 16384)
			copy(p[168:], "11111111-aaaa-4bbb-8ccc-000000000009")
			binary.BigEndian.PutUint64(p[256:], uint64(off))
			r.put(t, off, p)
		}
	}
	return []struct {
		name, kind string
		least      int64
		make       func(t *testing.T, r region)
	}{
		{"ext4", "ext4", 0, mk("mkfs.ext4", "e2fsprogs", "-q", "-F")},
		{"XFS", "xfs", 301 * mib, mk("mkfs.xfs", "xfsprogs", "-q", "-f")},
		{"btrfs", "btrfs", 110 * mib, mk("mkfs.btrfs", "btrfs-progs", "-q", "-f")},
		{"swap", "swap", 0, mk("mkswap", "util-linux")},
		{"GPT with its backup", "gpt", 0, mk("sgdisk", "gdisk", "-o", "-n", "1:4M:8M")},
		{"MD 0.90", "linux_raid_member", 0, func(t *testing.T, r region) {
			p := make([]byte, 4096)
			le.PutUint32(p, 0xa92b4efc)
			le.PutUint32(p[8:], 90)
			r.put(t, r.size/65536*65536-65536, p)
		}},
		{"MD 1.0", "linux_raid_member", 0, mdOne(func(size int64) int64 { return (size/512 - 16) / 8 * 8 * 512 })},
		{"MD 1.1", "linux_raid_member", 0, mdOne(func(int64) int64 { return 0 })},
		{"MD 1.2", "linux_raid_member", 0, mdOne(func(int64) int64 { return 4096 })},
		{"LVM2", "LVM2_member", 0, func(t *testing.T, r region) {
			p := make([]byte, 512)
			copy(p, "LABELONE")
			le.PutUint64(p[8:], 1)
			le.PutUint32(p[20:], 32)
			copy(p[24:], "LVM2 001"+"abcdefghijklmnopqrstuvwxyz012345")
			le.PutUint32(p[16:], ^crc32.Update(^uint32(0xf597a6cf), crc32.IEEETable, p[20:]))
			r.put(t, 512, p)
		}},
		{"ZFS, the last label", "zfs_member", 64 * mib, func(t *testing.T, r region) {
			label := r.size/(256<<10)*(256<<10) - 256<<10
			for i := range int64(8) {
				p := make([]byte, 1024)
				le.PutUint64(p, 0x00bab10c)
				le.PutUint64(p[8:], 28)
				r.put(t, label+128<<10+i*1024, p)
			}
		}},
		{"ZFS, the last label but one", "zfs_member", 64 * mib, func(t *testing.T, r region) {
			label := r.size/(256<<10)*(256<<10) - 512<<10
			for i := range int64(8) {
				p := make([]byte, 1024)
				le.PutUint64(p, 0x00bab10c)
				le.PutUint64(p[8:], 28)
				r.put(t, label+128<<10+i*1024, p)
			}
		}},
		{"LUKS1", "crypto_LUKS", 0, at(0, "LUKS\xba\xbe\x00\x01aes")},
		{"LUKS2, second header at 16 KiB", "crypto_LUKS", 0, luks2(16 << 10)},
		{"LUKS2, second header at 1 MiB", "crypto_LUKS", 0, luks2(1 << 20)},
		{"LUKS2, second header at 2 MiB", "crypto_LUKS", 0, luks2(2 << 20)},
		{"LUKS2, second header at 4 MiB", "crypto_LUKS", 0, luks2(4 << 20)},
		{"VMFS", "VMFS", 0, func(t *testing.T, r region) { r.put(t, 2<<20, []byte{0x5e, 0xf1, 0xab, 0x2f}) }},
		{"VMFS volume", "VMFS_volume_member", 0, func(t *testing.T, r region) { r.put(t, 1<<20, []byte{0x0d, 0xd0, 0x01, 0xc0}) }},
		{"Intel RAID", "isw_raid_member", 0, at(-1024, "Intel Raid ISM Cfg Sig. 1.1.00")},
		{"LSI RAID", "lsi_mega_raid_member", 0, at(-512, "$XIDE$")},
		{"Promise RAID, near", "promise_fasttrack_raid_member", 0, at(-63*512, "Promise Technology, Inc.")},
		{"Promise RAID, far", "promise_fasttrack_raid_member", 0, at(-3087*512, "Promise Technology, Inc.")},
		{"ISO 9660", "iso9660", 0, func(t *testing.T, r region) {
			r.put(t, 32<<10, []byte("\x01CD001\x01"))
			r.put(t, 34<<10, []byte("\xffCD001\x01"))
		}},
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// kinds are the types of all signatures that wipefs sees.
func kinds(t *testing.T, dev string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	for _, k := range strings.Fields(run(t, need.Tool(t, "wipefs", "util-linux"), "-n", "--noheadings", "--output", "TYPE", dev)) {
		found[k] = true
	}
	return found
}

// loopPart shows a part of a device as a device of its own.
func loopPart(t *testing.T, dev string, off, size int64) string {
	t.Helper()
	tool := need.Tool(t, "losetup", "mount")
	part := strings.TrimSpace(run(t, tool, "--find", "--show", "--offset", itoa(off), "--sizelimit", itoa(size), dev))
	t.Cleanup(func() { run(t, tool, "--detach", part) })
	return part
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// Whatever a disk held before, the field's tools see only ours on what we have
// written, on the disk and in its partition.
func TestOldSignaturesAreGone(t *testing.T) {
	need.Root(t)
	blkid, sgdisk := need.Tool(t, "blkid", "util-linux"), need.Tool(t, "sgdisk", "gdisk")
	const size = 400*mib + 37*512
	s := spec(size, 512)
	s.Files = []fat32.File{{Path: "boot/vmlinuz", Size: 3, Content: bytes.NewReader([]byte("abc")), ModTime: madeAt}}
	im := image(t, s)
	if n := im.DataBytes(); n > 5*mib {
		t.Errorf("%d bytes for a stick without content", n)
	}
	layout, err := Inspect(im, im.Size, im.SectorSize)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	dev := need.Loop(t, path, "512")
	disk := open(t, dev)
	part := loopPart(t, dev, layout.ESP.Offset, layout.ESP.Size)
	partition := open(t, part)

	for _, c := range oldSignatures() {
		for _, r := range []region{{disk, dev, 0, size}, {partition, part, 0, layout.ESP.Size}} {
			if r.size < c.least {
				continue
			}
			t.Run(c.name+", "+map[bool]string{true: "on the disk", false: "in the partition"}[r.path == dev], func(t *testing.T) {
				// Nothing but what is put there is on the disk.
				if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size); err != nil {
					t.Fatal(err)
				}
				dropCache(t, disk, partition)
				c.make(t, r)
				dropCache(t, disk, partition)
				if !kinds(t, r.path)[c.kind] {
					t.Fatalf("the test's own signature is not seen: %v", kinds(t, r.path))
				}
				if _, err := media.Write(context.Background(), disk, im, nil); err != nil {
					t.Fatal(err)
				}
				dropCache(t, disk, partition)
				if got := kinds(t, dev); len(got) != 2 || !got["gpt"] || !got["PMBR"] {
					t.Errorf("wipefs sees %v on the disk", got)
				}
				if got := kinds(t, part); len(got) != 1 || !got["vfat"] {
					t.Errorf("wipefs sees %v in the partition", got)
				}
				if out := run(t, blkid, "-p", dev); !strings.Contains(out, `PTTYPE="gpt"`) || strings.Contains(out, ` TYPE=`) {
					t.Errorf("blkid of the disk: %s", out)
				}
				if out := run(t, blkid, "-p", part); !strings.Contains(out, ` TYPE="vfat"`) || !strings.Contains(out, `LABEL="MEMLINUX"`) {
					t.Errorf("blkid of the partition: %s", out)
				}
				if out := run(t, sgdisk, "-v", dev); !strings.Contains(out, "No problems found") {
					t.Errorf("sgdisk: %s", out)
				}
			})
		}
	}
}

// open opens a device to be written in whole.
func open(t *testing.T, dev string) *os.File {
	t.Helper()
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// dropCache makes what was written through one device seen through the others.
func dropCache(t *testing.T, devices ...*os.File) {
	t.Helper()
	for _, f := range devices {
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range devices {
		if _, err := unix.IoctlRetInt(int(f.Fd()), unix.BLKFLSBUF); err != nil {
			t.Fatal(err)
		}
	}
}
