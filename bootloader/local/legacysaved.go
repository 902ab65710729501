package local

import (
	"bytes"
	"strconv"
	"strings"

	"github.com/memlinux/memlinux/bootloader/menulst"
)

// The file default beside GRUB Legacy's menu holds the number of the saved
// entry. GRUB reads its first ten bytes, and "savedefault" writes all ten, by
// their place on the disk: the number, a NUL, and newlines. It refuses a shorter
// file, which is why grub-set-default fills it with comments (stage2/stage2.c
// and stage2/builtins.c of 0.97).
const savedSize = 10

// Notes of our block about the file default: what its first bytes were, or that
// there was no file.
const (
	savedNote   = "saved-entry"
	noSavedNote = "no-saved-entry"
)

// savedTail makes a file of ours long enough.
var savedTail = strings.Repeat("#\n", savedSize) +
	"# GRUB writes over the first ten bytes of this file as it boots. Change it with\n" +
	"# grub-set-default, not with an editor: a shorter file keeps GRUB from booting.\n"

// savedNumber is the entry that GRUB takes from the file. ok is false where
// there is no number; GRUB then takes 0.
func savedNumber(saved []byte) (n int, ok bool) {
	head, _, _ := bytes.Cut(saved[:min(len(saved), savedSize-1)], []byte{0})
	return menulst.Number(string(head))
}

// withSaved is the file saved, which may be nil, with the number n.
func withSaved(saved []byte, n int) []byte {
	if len(saved) < savedSize {
		return []byte(strconv.Itoa(n) + "\n" + savedTail)
	}
	out := bytes.Clone(saved)
	copy(out, savedHead(n, '\n'))
	return out
}

// savedHead is a number as it is written over the file's first bytes, and what
// stands behind its digits first.
func savedHead(n int, behind byte) []byte {
	head := bytes.Repeat([]byte("\n"), savedSize)
	head[copy(head, strconv.Itoa(n))] = behind
	return head
}

// noteSaved keeps what the file was before it held n.
func noteSaved(saved []byte, n int) menulst.Undo {
	if saved == nil {
		return menulst.Undo{Name: noSavedNote, Is: strconv.Itoa(n)}
	}
	return menulst.Undo{Name: savedNote, Was: string(saved[:min(len(saved), savedSize)]), Is: strconv.Itoa(n)}
}

// undoSaved is the file as it was before memlinux wrote a number into it. Where
// its first bytes are neither memlinux's nor what GRUB wrote for an entry of
// ours, which is one of olds, someone else chose since, and it stays.
func undoSaved(saved []byte, u menulst.Undo, olds []int) []byte {
	n, ok := menulst.Number(u.Is)
	if !ok || len(saved) < savedSize || len(u.Was) > savedSize {
		return saved
	}
	head, tail := saved[:savedSize], saved[savedSize:]
	whole := withSaved(nil, n)
	ours := bytes.Equal(head, whole[:savedSize])
	for _, n := range append(olds, n) {
		ours = ours || bytes.Equal(head, savedHead(n, 0)) || bytes.Equal(head, savedHead(n, '\n'))
	}
	switch made := bytes.Equal(tail, whole[savedSize:]); {
	case !ours:
		return saved
	case u.Name == savedNote && len(u.Was) == savedSize:
		return append([]byte(u.Was), tail...)
	case !made:
		return saved
	case u.Name == noSavedNote:
		return nil
	default:
		return []byte(u.Was)
	}
}
