// Package grub makes the GRUB 2 boot files of a disk with grub-mkimage alone:
// no grub-install, no mounted file system and no device is needed.
//
// The disk is a GPT disk. A BIOS reads [BIOS]: a boot sector in LBA 0 and
// core.img, which lies in a BIOS boot partition. UEFI reads the program of
// [MakeEFI] as /EFI/BOOT/BOOTX64.EFI from the EFI System Partition, which is
// the disk's second partition. Both find that FAT32 partition by its volume ID
// and show its /boot/grub/menu.lst, on the screen and on the first serial port,
// where there is one.
package grub
