package testvm

import (
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"slices"
)

// Patch is other content for a piece of a disk, in the eyes of the guest.
type Patch struct {
	Offset int64  // bytes from the disk's start, of any alignment
	Data   []byte // what is there instead
}

// The guest's disk is a qcow2 file (version 3; QEMU's docs/interop/qcow2) over
// the disk itself: what the guest writes goes into it, and the patches are in
// it before QEMU starts. QEMU could write them itself before the guest's first
// instruction (its monitor's "qemu-io disk write"), but a write that failed
// looks there like one that did not: its complaint goes to QEMU's output.
//
// A cluster is 64 KiB, QEMU's own choice. One cluster each is enough for the
// table of reference counts (16 TiB of overlay) and for the one block of them
// that is filled here; QEMU makes more where the guest writes more.
const (
	clusterBits = 16
	cluster     = 1 << clusterBits
	l2Entries   = cluster / 8
	refcounts   = cluster / 2 // in a block; of 16 bits each

	// maxTables is QEMU's limit: the table of tables has 32 MiB, and so a disk
	// 2 PiB.
	maxTables = 32 << 20 / 8

	// notShared marks an entry whose cluster nothing else uses: QEMU writes to
	// it in place.
	notShared = 1 << 63

	headerSize = 104
)

// writeOverlay makes w, which is empty, a qcow2 file of size bytes: disk with
// the patches, the later of two that overlap on top. disk is read where a patch
// covers only a part of a cluster.
func writeOverlay(w io.WriterAt, disk io.ReaderAt, size int64, patches []Patch) error {
	tables := (size-1)/(cluster*l2Entries) + 1
	if size <= 0 || tables > maxTables {
		return fmt.Errorf("a virtual machine's disk can't have %d bytes", size)
	}
	content, err := patched(disk, size, patches)
	if err != nil {
		return err
	}
	numbers := slices.Sorted(maps.Keys(content))
	l1 := make([]byte, roundUp(tables*8, cluster))

	const refTable, refBlock, l1Table = 1 * cluster, 2 * cluster, 3 * cluster
	end := int64(l1Table + len(l1)) // of the file so far
	write := func(p []byte) (at int64) {
		at = end
		if err == nil {
			_, err = w.WriteAt(p, at)
		}
		end += int64(len(p))
		return at
	}
	for i := 0; i < len(numbers); {
		table := numbers[i] / l2Entries
		l2 := make([]byte, cluster)
		for ; i < len(numbers) && numbers[i]/l2Entries == table; i++ {
			at := write(content[numbers[i]])
			binary.BigEndian.PutUint64(l2[numbers[i]%l2Entries*8:], notShared|uint64(at))
		}
		binary.BigEndian.PutUint64(l1[table*8:], notShared|uint64(write(l2)))
	}
	if end > refcounts*cluster {
		return fmt.Errorf("the patches fill %d MiB of the overlay, more than %d", end>>20, refcounts*cluster>>20)
	}

	counts := make([]byte, cluster)
	for i := range end / cluster {
		binary.BigEndian.PutUint16(counts[i*2:], 1)
	}
	head := make([]byte, l1Table)
	copy(head, "QFI\xfb")
	be := binary.BigEndian
	be.PutUint32(head[4:], 3) // version
	be.PutUint32(head[20:], clusterBits)
	be.PutUint64(head[24:], uint64(size))
	be.PutUint32(head[36:], uint32(tables))
	be.PutUint64(head[40:], l1Table)
	be.PutUint64(head[48:], refTable)
	be.PutUint32(head[56:], 1)           // clusters of the table of reference counts
	be.PutUint32(head[96:], 4)           // 1<<4 bits a count
	be.PutUint32(head[100:], headerSize) // no extensions behind it: the base is named on QEMU's command line
	be.PutUint64(head[refTable:], refBlock)
	copy(head[refBlock:], counts)
	for at, p := range map[int64][]byte{0: head, l1Table: l1} {
		if err == nil {
			_, err = w.WriteAt(p, at)
		}
	}
	if err != nil {
		return fmt.Errorf("write the overlay: %w", err)
	}
	return nil
}

// patched is the content of each cluster that a patch touches, by its number.
// Behind the disk's end it is zeros.
func patched(disk io.ReaderAt, size int64, patches []Patch) (map[int64][]byte, error) {
	content := map[int64][]byte{}
	for _, p := range patches {
		if err := p.validate(size); err != nil {
			return nil, err
		}
		for at := p.Offset; at < p.Offset+int64(len(p.Data)); {
			n := at / cluster
			if content[n] == nil {
				c := make([]byte, cluster)
				length := min(cluster, size-n*cluster)
				if _, err := io.ReadFull(io.NewSectionReader(disk, n*cluster, length), c[:length]); err != nil {
					return nil, fmt.Errorf("read the disk at byte %d: %w", n*cluster, err)
				}
				content[n] = c
			}
			at += int64(copy(content[n][at%cluster:], p.Data[at-p.Offset:]))
		}
	}
	return content, nil
}

func (p Patch) validate(size int64) error {
	if p.Offset < 0 || p.Offset > size || int64(len(p.Data)) > size-p.Offset {
		return fmt.Errorf("a patch of %d bytes at byte %d reaches beyond the disk's %d", len(p.Data), p.Offset, size)
	}
	return nil
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }
