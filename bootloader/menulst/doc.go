// Package menulst reads, edits and writes menu.lst, the menu of GRUB Legacy.
//
// A [File] keeps every byte of what was parsed: values are derived from it,
// and an edit gives a new File in which only the edited lines differ. In a file
// that is not its own memlinux has one [Block], at the end, and it can take all
// that it did back, byte for byte. [Render] makes a new file from values.
//
// # Grammar
//
// It is the one of GRUB Legacy 0.97 (manual §"Configuration", stage2's reader):
//
//   - Carriage returns are dropped, tabs are blanks, and a NUL ends its line.
//   - A line that ends in a backslash goes on in the next one, comments too.
//     (GRUB 2 knows no such continuation. Render writes none.)
//   - A line whose first byte behind the blanks is # is a comment. A # further
//     on is text.
//   - The first word, up to a blank or =, is the command. Blanks and = behind
//     it are skipped, so "timeout 5", "timeout=5" and "timeout = 5" are one.
//   - What stands before the first title is global; each title begins an entry.
//   - There is no quoting and no escape: quotes are text.
//
// # menu.lst under GRUB 2
//
// GRUB 2's legacy_configfile (grub-core/lib/legacy_parse.c and
// grub-core/commands/legacycfg.c of 2.06, and grub-menulst2cfg, which shares
// the first) turns each line into GRUB 2 script:
//
//   - Every word of a command line is put between single quotes, so $, ;, |,
//     &, {, <, * and # reach the command as they are and are never expanded.
//     A title is never expanded either.
//   - The script passes ', " and \ through as well, but GRUB 2's linux and
//     linux16 then write a \ before each of the three into the kernel's command
//     line, which spoils it. A kernel command line for both GRUBs can't hold
//     them, so an argument can't hold a blank. [CheckCommandLine] refuses them.
//   - Runs of blanks between words become one.
//   - lock and password in an entry become broken script, so that the entry
//     can't be started. Render refuses them.
//   - An unknown command becomes a comment, without a word.
//   - An entry without any command crashes it; GRUB Legacy skips such an entry.
//     Render and SetBlock refuse it.
//   - timeout takes digits only: -1 reads as 0, and 010 is octal.
//   - kernel becomes linux16 under a BIOS and linux under UEFI; (hd0,0) becomes
//     (hd0,1); uuid becomes search --fs-uuid.
package menulst
