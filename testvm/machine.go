package testvm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// Firmware is what the machine starts with.
type Firmware string

// The firmwares: BIOS is SeaBIOS, which QEMU brings along; UEFI is OVMF for
// x64, without Secure Boot.
const (
	BIOS Firmware = "bios"
	UEFI Firmware = "uefi"
)

// Bus is how the disk is attached.
type Bus string

// The buses: USB is a removable USB mass storage device on an xHCI controller
// (EHCI boots too, but slowly), Virtio is virtio-blk on PCI, AHCI a SATA disk.
const (
	USB    Bus = "usb"
	Virtio Bus = "virtio"
	AHCI   Bus = "ahci"
)

// Machine is a PC to be run: q35, one processor, a VGA screen, one serial port,
// no network. It boots Kernel, if there is one, else Disk, else DataDisc. The
// files stay the caller's, who closes them after [Prove] or [Start] returned.
type Machine struct {
	Firmware Firmware

	// Disk is a block device or raw image, opened read-only; or nil. Of a
	// device with file systems in use, what they wrote must be on the disk, and
	// what memory holds of the disk dropped (posix_fadvise) after that: they
	// write past the device's page cache, through which it is read here.
	Disk       *os.File
	DiskSize   int64 // bytes, a multiple of SectorSize; a larger file is cut there
	SectorSize int   // logical sector size in bytes: 512 or 4096
	Bus        Bus
	Patches    []Patch // what the guest sees differently on Disk

	// Variables are in the firmware's store when a UEFI machine starts. A
	// Boot#### needs a device path that begins with HD(), the partition: a
	// longer one leads to a device of another machine.
	Variables []Variable

	Kernel, Initrd *os.File // boot directly, without the disk's boot loader; or nil
	Append         string   // the command line of Kernel

	DataDisc *os.File // an ISO image, opened read-only, as a SATA CD-ROM on AHCI; or nil

	MemoryMiB int // 0 means 512

	Dir string // an existing folder, for log and screenshot; scratch goes to its disk too

	Launch Launcher // starts QEMU; nil for a process of ours
}

const defaultMemoryMiB = 512

func (m Machine) memoryMiB() int {
	if m.MemoryMiB == 0 {
		return defaultMemoryMiB
	}
	return m.MemoryMiB
}

// qemuMemory is what QEMU takes besides the guest's memory, in bytes: without
// KVM it keeps up to 1 GiB of code that it translated (its accel/tcg, "tb-size").
const qemuMemory = 1<<30 + 512<<20

// maxWritten is how many bytes a guest may write on its disk, about: they go into
// a file on a disk of ours. A system in memory writes nothing, one that grows its
// file systems over a large disk when it first boots, some hundred MiB. For more
// the guest sees a disk with errors: the threads of QEMU that write have all
// signals blocked, SIGXFSZ, too (setrlimit(2), RLIMIT_FSIZE). Tests have less.
var maxWritten int64 = 2 << 30

// leastWritten is what a guest may write in any case, in bytes: firmware keeps its
// variables in such a file, too.
const leastWritten = 8 << 20

// mayWrite is maxWritten, or half of what is free where m's scratch goes.
func (m Machine) mayWrite() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(m.Dir, &st); err != nil {
		return 0, fmt.Errorf("ask for the free space of %s: %w", m.Dir, err)
	}
	return max(leastWritten, min(maxWritten, int64(st.Bavail)*st.Bsize/2)), nil
}

// memoryBound is the most that QEMU needs, in bytes.
func (m Machine) memoryBound() int64 { return int64(m.memoryMiB())<<20 + qemuMemory }

// MissingError says that something on this machine must be installed first.
type MissingError struct {
	What    string // the program or file
	Package string // the Debian package that brings it
}

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s is not installed; run apt-get install %s", e.What, e.Package)
}

const (
	qemuProgram = "qemu-system-x86_64"
	// As Debian's package ovmf lays them down. The 4M build is the only one
	// that Debian 13 still has.
	ovmfCode = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	ovmfVars = "/usr/share/OVMF/OVMF_VARS_4M.fd"
)

// Check reports whether machines with fw can run here: nil, or a
// [*MissingError] that names what to install.
func Check(fw Firmware) error {
	if _, err := exec.LookPath(qemuProgram); err != nil {
		return &MissingError{What: qemuProgram, Package: "qemu-system-x86"}
	}
	if fw != UEFI {
		return nil
	}
	for _, file := range []string{ovmfCode, ovmfVars} {
		if _, err := os.Stat(file); err != nil {
			return &MissingError{What: file, Package: "ovmf"}
		}
	}
	return nil
}

// validate refuses what QEMU would misunderstand or refuse less clearly, and
// every descriptor that the guest could write through.
func (m Machine) validate() error {
	switch m.Firmware {
	case BIOS, UEFI:
	default:
		return fmt.Errorf("machine: firmware %q is neither %s nor %s", m.Firmware, BIOS, UEFI)
	}
	switch {
	case m.Disk == nil && m.Kernel == nil && m.DataDisc == nil:
		return errors.New("machine: nothing to boot: no disk, kernel or disc")
	case m.Kernel == nil && (m.Initrd != nil || m.Append != ""):
		return errors.New("machine: an initramfs or command line without a kernel")
	case m.Disk == nil && len(m.Patches) > 0:
		return errors.New("machine: patches without a disk")
	case m.Firmware != UEFI && len(m.Variables) > 0:
		return fmt.Errorf("machine: UEFI variables with %s", m.Firmware)
	case m.MemoryMiB < 0:
		return fmt.Errorf("machine: %d MiB of memory", m.MemoryMiB)
	}
	if st, err := os.Stat(m.Dir); err != nil || !st.IsDir() {
		return fmt.Errorf("machine: the folder for logs, %q, does not exist", m.Dir)
	}
	if m.DataDisc != nil {
		if _, err := blockDriver(m.DataDisc); err != nil {
			return fmt.Errorf("machine: disc: %w", err)
		}
	}
	for _, v := range m.Variables {
		if err := v.validate(); err != nil {
			return fmt.Errorf("machine: %w", err)
		}
	}
	if m.Disk == nil {
		return nil
	}
	for _, p := range m.Patches {
		if err := p.validate(m.DiskSize); err != nil {
			return fmt.Errorf("machine: %w", err)
		}
	}
	switch m.Bus {
	case USB, Virtio, AHCI:
	default:
		return fmt.Errorf("machine: bus %q is neither %s, %s nor %s", m.Bus, USB, Virtio, AHCI)
	}
	switch {
	case m.SectorSize != 512 && m.SectorSize != 4096:
		return fmt.Errorf("machine: sector size %d is neither 512 nor 4096", m.SectorSize)
	case m.Bus == AHCI && m.SectorSize != 512:
		return fmt.Errorf("machine: QEMU's AHCI disks have sectors of 512 bytes, not %d", m.SectorSize)
	case m.DiskSize <= 0 || m.DiskSize%int64(m.SectorSize) != 0:
		return fmt.Errorf("machine: disk size %d is not a positive multiple of %d", m.DiskSize, m.SectorSize)
	}
	if _, err := blockDriver(m.Disk); err != nil {
		return fmt.Errorf("machine: disk: %w", err)
	}
	if st, err := m.Disk.Stat(); err == nil && st.Mode().IsRegular() && st.Size() < m.DiskSize {
		return fmt.Errorf("machine: disk: %s has %d bytes, fewer than the disk's %d", m.Disk.Name(), st.Size(), m.DiskSize)
	}
	return nil
}

// blockDriver checks that f can only be read, and names the QEMU block driver
// for it: QEMU wants to be told files and devices apart.
func blockDriver(f *os.File) (string, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return "", err
	}
	var flags int
	var flagsErr error
	if err := raw.Control(func(fd uintptr) { flags, flagsErr = unix.FcntlInt(fd, unix.F_GETFL, 0) }); err != nil {
		return "", err
	}
	if flagsErr != nil {
		return "", fmt.Errorf("read the flags of %s: %w", f.Name(), flagsErr)
	}
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		return "", fmt.Errorf("%s is not open read-only: a machine must not be able to write what it boots", f.Name())
	}
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	switch mode := st.Mode(); {
	case mode.IsRegular():
		return "file", nil
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		return "host_device", nil
	}
	return "", fmt.Errorf("%s is neither a file nor a block device", f.Name())
}
