// Package bootloader is the room of everything that starts a memlinux system
// from a disk. It holds no code of its own:
//
//   - menulst reads, edits and writes GRUB Legacy's menu.lst, the one source of
//     boot entries;
//   - grub makes the GRUB 2 boot files that read such a menu.lst under a BIOS
//     and under UEFI.
package bootloader
