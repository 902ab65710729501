package testvm

import (
	"context"
	"fmt"
	"os"
)

// Version starts a machine with an empty disk, in the folder m.Dir, and is the
// version of its QEMU, as in "8.2.0". The error is a [*MissingError], or says why
// machines can't run here. m is what machines here have in common.
func Version(ctx context.Context, m Machine) (string, error) {
	if err := Check(BIOS); err != nil {
		return "", err
	}
	const size = 1 << 20
	disk, err := os.CreateTemp(m.Dir, "empty-")
	if err != nil {
		return "", fmt.Errorf("make a disk: %w", err)
	}
	defer os.Remove(disk.Name())
	defer disk.Close()
	if err := disk.Truncate(size); err != nil {
		return "", fmt.Errorf("make a disk: %w", err)
	}
	m.Firmware, m.Bus, m.DiskSize, m.SectorSize = BIOS, Virtio, size, 512
	if m.Disk, err = os.Open(disk.Name()); err != nil {
		return "", fmt.Errorf("make a disk: %w", err)
	}
	defer m.Disk.Close()
	vm, err := Start(ctx, m)
	if err != nil {
		return "", err
	}
	defer vm.close()
	v := vm.monitor.Version()
	return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro), nil
}

// KVM says why machines can't use the processor's virtualization here, and so
// take several times as long; "" where they do. The error is that of ctx.
func KVM(ctx context.Context, launch Launcher) (why string, err error) {
	works, err := kvmWorks(ctx, launch)
	if works || err != nil {
		return "", err
	}
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !hasVirtualization(string(cpuinfo)) {
		return "the processor has no virtualization, or the firmware or the hypervisor above keeps it back", nil
	}
	if _, err := os.Stat(kvmDevice); err != nil {
		return kvmDevice + " is missing: the kernel module kvm-intel or kvm-amd is not loaded", nil
	}
	return kvmDevice + " is there, and a machine that uses it does not start", nil
}
