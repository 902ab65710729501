package grub

import "context"

// MakeEFI makes BOOTX64.EFI: GRUB for UEFI on x86-64, not signed for Secure
// Boot. It shows the menu.lst of the FAT32 partition with that volume ID. The
// same volume ID and GRUB version give the same bytes. The error is a
// *[MissingError] where a piece of GRUB is not installed.
func MakeEFI(ctx context.Context, launch Launcher, volumeID uint32) ([]byte, error) {
	return image{"x86_64-efi", efiDir, "grub-efi-amd64-bin", "/boot/grub", efiConfig(volumeID), efiModules}.make(ctx, launch)
}
