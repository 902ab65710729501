package pc

import (
	"os/exec"
	"testing"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// Attach makes the disk a loop device of this machine, with its partitions, and
// returns the path of the device: /dev/loop0, whose first partition is
// /dev/loop0p1. It is detached when the test ends.
//
// It must be mounted in a mount namespace of the test's own only: other tests
// that make namespaces would take the mount along, and hold the device.
func (p *PC) Attach(t testing.TB) string {
	t.Helper()
	partx := need.Tool(t, "partx", "fdisk")
	device := need.Loop(t, p.Disk, "512")
	// The device's last user may have left partitions behind.
	_ = exec.Command(partx, "--delete", device).Run()
	run(t, nil, partx, "--add", device)
	t.Cleanup(func() {
		// Whoever looks at all disks of the machine may have one open for a moment.
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			out, err := exec.Command(partx, "--delete", device).CombinedOutput()
			if err == nil {
				return
			}
			if time.Now().After(end) {
				t.Errorf("partx --delete %s: %v: %s", device, err, out)
				return
			}
		}
	})
	return device
}
