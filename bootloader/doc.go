// Package bootloader is the room of everything that starts a memlinux system
// from a disk. It holds no code of its own:
//
//   - menulst reads, edits and writes GRUB Legacy's menu.lst, the one source of
//     boot entries;
//   - grub makes the GRUB 2 boot files that read such a menu.lst under a BIOS
//     and under UEFI;
//   - local finds this PC's own boot loader, reads its menu, and plans what has
//     to change in it;
//   - bootfs makes such changes so that no power cut breaks the PC's boot;
//   - install puts them in the order that keeps the PC booting: entries are
//     added, removed, chosen and taken back.
package bootloader
