package testvm

import (
	"os"
	"testing"

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
