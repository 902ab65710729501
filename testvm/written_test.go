package testvm

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// What a guest writes on its disk takes only so much of ours. Then the disk has
// errors, and the machine goes on.
func TestGuestFillsItsDisk(t *testing.T) {
	before := maxWritten
	maxWritten = 8 << 20
	t.Cleanup(func() { maxWritten = before })
	m := directKernel(t, "")
	small, _ := need.SmallKernel(t) // it has drivers of disks
	m.Kernel = open(t, small, os.O_RDONLY)
	path := make1(t, "large.img", func(t *testing.T, path string) {
		write(t, path, "")
		if err := os.Truncate(path, 1<<30); err != nil {
			t.Fatal(err)
		}
	})
	m.Disk, m.DiskSize, m.SectorSize, m.Bus = open(t, path, os.O_RDONLY), 1<<30, 512, Virtio
	vm, err := Start(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.close()
	console(t, vm, "memlinux: ready")
	for _, c := range []struct{ command, want string }{
		{"dd if=/dev/zero bs=64k count=16 conv=fsync of=/dev/vda; echo a=$?", "a=0"},
		{"dd if=/dev/zero bs=64k count=1024 seek=16 conv=fsync of=/dev/vda; echo b=$?", "b=1"},
		{"echo sum=$((6*7))", "sum=42"},
	} {
		if _, err := vm.Console().WriteString(c.command + "\n"); err != nil {
			t.Fatal(err)
		}
		console(t, vm, c.want)
	}
}

// A small disk of ours is not filled.
func TestMayWrite(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	for _, c := range []struct {
		size string
		want int64
	}{{"64m", 32 << 20}, {"1m", leastWritten}, {"16g", maxWritten}} {
		if err := unix.Mount("none", dir, "tmpfs", 0, "size="+c.size); err != nil {
			t.Fatal(err)
		}
		got, err := Machine{Dir: dir}.mayWrite()
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
		if err != nil || got != c.want {
			t.Errorf("on a disk of %s: %d bytes, %v", c.size, got, err)
		}
	}
}
