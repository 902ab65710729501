package testvm

import (
	"fmt"
	"os"
	"strconv"
)

// fdset is the number of QEMU's descriptor set for each file; the paths
// /dev/fdset/N are QEMU's own.
const (
	fdsetDisk       = 1
	fdsetDisc       = 2
	fdsetScreenshot = 3
	fdsetFirmware   = 4
)

// wiring is what of the host a machine's QEMU is connected to.
type wiring struct {
	kvm                    bool
	monitor, serial        *os.File // its ends of two socket pairs
	scratch                scratch
	diskDriver, discDriver string   // of blockDriver
	firmwareLog            *os.File // of a proof only: the writing end of a pipe
	screenshot             *os.File // of a proof only: a file open for writing only
	screen                 *os.File // of a proof only: a file in memory
}

// descriptors hands out the numbers by which the child will know files.
type descriptors struct{ files []*os.File }

// add returns f's number in the child: os/exec puts ExtraFiles behind the
// three standard descriptors.
func (d *descriptors) add(f *os.File) string {
	d.files = append(d.files, f)
	return strconv.Itoa(len(d.files) + 2)
}

// command is QEMU's argument list, without the program, and the files that it
// inherits, as for [os/exec.Cmd.ExtraFiles].
//
// No path of the caller is in it. Each file is passed open, because QEMU's
// user may not open it by name, or reach the folder that it is in.
func (m Machine) command(w wiring) (args []string, files []*os.File) {
	var fds descriptors
	add := func(a ...string) { args = append(args, a...) }
	addFile := func(f *os.File, set int) { add("-add-fd", fmt.Sprintf("fd=%s,set=%d", fds.add(f), set)) }
	add(bareMachine(w.kvm)...)
	add("-m", strconv.Itoa(m.memoryMiB()), "-vga", "std")
	// A proof is one try: a kernel that resets the machine would loop. A person
	// at the console may reboot.
	if w.screenshot != nil {
		add("-no-reboot")
	}
	add("-chardev", "socket,id=monitor,fd="+fds.add(w.monitor), "-mon", "chardev=monitor,mode=control")
	add("-chardev", "socket,id=serial,fd="+fds.add(w.serial), "-serial", "chardev:serial")
	if w.firmwareLog != nil {
		add(firmwareLogTo(fds.add(w.firmwareLog))...)
	}
	if w.screenshot != nil {
		addFile(w.screenshot, fdsetScreenshot)
	}
	if w.screen != nil {
		fds.add(w.screen) // as inheritedPath names it, once the machine runs
	}
	if m.Firmware == UEFI {
		add("-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+ovmfCode,
			"-drive", "if=pflash,unit=1,format=raw,file="+inheritedPath(fds.add(w.scratch.variables)))
	}
	if m.Kernel != nil {
		add("-kernel", inheritedPath(fds.add(w.scratch.kernel)))
		if m.Initrd != nil {
			add("-initrd", inheritedPath(fds.add(w.scratch.initrd)))
		}
		if m.Append != "" {
			add("-append", m.Append)
		}
	}
	if m.Disk != nil {
		addFile(m.Disk, fdsetDisk)
		// An overlay that has no more room is the guest's to see: QEMU would stop the
		// machine, and nobody would let it go on.
		add("-drive", fmt.Sprintf("if=none,id=disk,cache=unsafe,werror=report,driver=qcow2,file.driver=file,file.filename=%s,backing.driver=raw,backing.size=%d,%s",
			inheritedPath(fds.add(w.scratch.overlay)), m.DiskSize, base("backing.", w.diskDriver, fdsetDisk)))
		add(m.diskDevice()...)
	}
	if m.DataDisc != nil {
		addFile(m.DataDisc, fdsetDisc)
		add("-drive", fmt.Sprintf("if=none,id=disc,readonly=on,driver=raw,%s", base("", w.discDriver, fdsetDisc)),
			"-device", "ide-cd,bus=ide.1,drive=disc,bootindex=1")
	}
	return args, fds.files
}

// bareMachine is what the real machines and the probe for KVM share.
func bareMachine(kvm bool) []string {
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-nic", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "q35",
	}
	if kvm {
		return append(args, "-accel", "kvm", "-cpu", "host")
	}
	return append(args, "-accel", "tcg")
}

// firmwareLogTo connects SeaBIOS's debug port with the pipe fd. It has to be a
// pipe: QEMU waits for the reader with the whole machine and its monitor
// locked, and SeaBIOS writes byte by byte, of which a pipe holds 65,536 and a
// Unix socket fewer than 300.
func firmwareLogTo(fd string) []string {
	return []string{
		"-add-fd", fmt.Sprintf("fd=%s,set=%d", fd, fdsetFirmware),
		// Else it would truncate, which a pipe refuses.
		"-chardev", fmt.Sprintf("file,id=firmware,append=on,path=/dev/fdset/%d", fdsetFirmware),
		"-device", "isa-debugcon,iobase=0x402,chardev=firmware",
	}
}

// inheritedPath is where QEMU can open once more what it inherited as that
// number, if the file's mode lets its user.
func inheritedPath(fd string) string { return "/proc/self/fd/" + fd }

// base opens a descriptor set as the lowest layer of a drive, which the prefix
// names. Locking is off since the lock would sit on the open file that QEMU
// shares with the caller, and outlive QEMU; and a reader of an overlay's base
// needs none. Nor does it read around the page cache, which would be the
// caller's flag as well: who hands over a disk whose file systems are in use,
// and written past its page cache, drops that first.
func base(prefix, driver string, set int) string {
	return fmt.Sprintf("%[1]sfile.driver=%[2]s,%[1]sfile.filename=/dev/fdset/%[3]d,%[1]sfile.locking=off", prefix, driver, set)
}

// diskDevice attaches the drive "disk" as the first boot device, which a kernel
// that is booted directly is already: SeaBIOS hangs on a first disk that has no
// boot code.
func (m Machine) diskDevice() []string {
	opts := fmt.Sprintf("drive=disk,logical_block_size=%d,physical_block_size=%d", m.SectorSize, m.SectorSize)
	if m.Kernel == nil {
		opts += ",bootindex=0"
	}
	switch m.Bus {
	case USB:
		// usb-storage, which is these two devices in one, ignores the sector
		// size (QEMU 7.2).
		return []string{"-device", "qemu-xhci,id=xhci", "-device", "usb-bot,id=stick,bus=xhci.0",
			"-device", "scsi-hd,bus=stick.0,lun=0,removable=on," + opts}
	case Virtio:
		return []string{"-device", "virtio-blk-pci," + opts}
	default:
		return []string{"-device", "ide-hd,bus=ide.0," + opts}
	}
}
