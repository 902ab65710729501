package grub

import (
	"fmt"
	"strings"
)

// biosModules drive a BIOS disk and everything a menu.lst can ask for on it.
var biosModules = append([]string{"biosdisk", "linux16"}, modules...)

// efiModules have the video drivers too: the kernel under UEFI draws on the
// frame buffer that GRUB leaves it.
var efiModules = append([]string{"efi_gop", "efi_uga", "all_video"}, modules...)

// modules are those of both firmwares. Nothing is loaded from the disk later,
// so each command of config and of a converted menu.lst needs its module here:
// minicmd has exit, sleep is for hiddenmenu, loadenv for default saved.
var modules = []string{
	"part_gpt", "part_msdos", "fat", "iso9660",
	"search", "search_fs_uuid", "search_label",
	"serial", "terminal", "terminfo",
	"normal", "legacycfg", "configfile", "test", "echo", "sleep", "loadenv", "minicmd",
	"linux", "chain", "halt", "reboot",
}

// VolumeUUID is a FAT volume ID as GRUB's search --fs-uuid and Linux's blkid
// write it, as "1234-ABCD".
func VolumeUUID(volumeID uint32) string {
	return fmt.Sprintf("%04X-%04X", volumeID>>16, volumeID&0xffff)
}

// config is the script that GRUB runs before it has a menu. GRUB reads it with
// its rescue parser: one command a line, no if, and an error in one line does
// not stop the next.
//
// It appends the serial port to the terminals, so that where there is none the
// screen and keyboard stay. The hint makes GRUB look at the partition it
// started from first: faster where there are many disks, and right where a
// copied stick has the same volume ID.
func config(volumeID uint32, setup ...string) string {
	lines := []string{
		"serial --unit=0 --speed=115200",
		"terminal_input --append serial",
		"terminal_output --append serial",
		"search --no-floppy --fs-uuid --set=root --hint=$root " + VolumeUUID(volumeID),
	}
	lines = append(lines, setup...)
	lines = append(lines,
		"legacy_configfile ($root)/boot/grub/menu.lst",
		// Seen when there is no menu, and when somebody leaves it with Esc.
		"echo",
		"echo 'memlinux: the boot menu was left, or it was not found.'",
		"echo 'It is the file /boot/grub/menu.lst on the volume "+VolumeUUID(volumeID)+".'",
		"echo 'If it was not found, the disk was changed or is damaged: write it anew.'",
		"echo 'The next boot device is tried in 60 seconds, or when you press Esc.'",
		"sleep --interruptible 60",
		"exit",
	)
	return strings.Join(lines, "\n") + "\n"
}

// biosPrefix is the disk's second partition, whatever number the BIOS gave to
// the disk: where GRUB stays when the search fails.
const biosPrefix = "(,gpt2)/boot/grub"

func biosConfig(volumeID uint32) string { return config(volumeID) }

func efiConfig(volumeID uint32) string {
	return config(volumeID, "set prefix=($root)/boot/grub")
}
