package media

import (
	"errors"
	"io"
)

// signatureEnd is how much of a device's end is searched for signatures: GPT's backup
// and RAID superblocks lie in its last 128 KiB, most BIOS RAIDs' in the last 512 KiB,
// ZFS's last two labels in the last 768 KiB, and bcachefs's backup begins 1 MiB from it.
const signatureEnd = 1<<20 + signatureUnit

// signatureUnit is what is erased at a place: no prober takes less than a whole
// sector of this for one.
const signatureUnit = 4096

// signaturePlaces are where, behind its first MiB, on a device of any size some
// prober looks for a signature, as {offset, length}; a negative offset counts from the end.
// Sources: the offsets that libblkid 2.38 reads when probing (seen by strace on a
// device of zeros), mdadm's md_p.h (0.90 and 1.0 superblocks), the LUKS2 on-disk
// format §2.2 (secondary headers), ZFS on-disk specification §1.2, btrfs's on-disk
// format (copies of the superblock), Documentation/filesystems/bcachefs.
var signaturePlaces = [][2]int64{
	{1 << 20, signatureUnit},       // LUKS2's second header, VMFS
	{2 << 20, signatureUnit},       // likewise; bcachefs
	{4 << 20, signatureUnit},       // LUKS2's second header
	{64 << 20, 2 * signatureUnit},  // btrfs, second superblock
	{256 << 30, 2 * signatureUnit}, // btrfs, third superblock
	{-3087 * 512, signatureUnit},   // Promise FastTrak, the farthest of its places
	{-signatureEnd, signatureEnd},  // all others
}

// EraseSignatures adds zeros to the image wherever on the device or partition of
// size bytes that begins at start (both in whole sectors) an old signature could be
// found, and where the image has no data: about 1 MiB, most of it at the end. Its
// first MiB is taken for the image's own and is added in full. What a device held
// before can then not be mistaken for what it holds now: not the backup of an
// old partition table, nor the superblock of a RAID, a volume manager or a file system.
func (im *Image) EraseSignatures(start, size int64) {
	sector := int64(im.SectorSize)
	places := append([][2]int64{{0, min(headSize, size)}}, signaturePlaces...)
	for _, p := range places {
		from := p[0]
		if from < 0 {
			from += size
		}
		to := min(from+p[1], size)
		from = max(0, from) / sector * sector
		im.eraseRange(start+from, start+(to+sector-1)/sector*sector)
	}
}

// eraseRange adds zeros to what of [from, to) is in no extent.
func (im *Image) eraseRange(from, to int64) {
	var all []Extent
	gap := func(end int64) {
		if from < end {
			all = append(all, Extent{from, end - from, zeros(end - from)})
		}
	}
	for _, e := range im.Extents {
		gap(min(to, e.Offset))
		from = max(from, e.End())
		all = append(all, e)
	}
	gap(to)
	im.Extents = all
}

// zeros reads as so many zeros.
type zeros int64

// ReadAt implements io.ReaderAt.
func (z zeros) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("zeros: negative offset")
	}
	n := int(max(0, min(int64(len(p)), int64(z)-off)))
	clear(p[:n])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
