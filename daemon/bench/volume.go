package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/memlinux/memlinux/media/fat32"
)

func (b bench) fat32() error {
	tree, image, theirs := b.path("files"), b.path("ours.fat"), b.path("theirs.fat")
	for i := range 1000 {
		sub := filepath.Join(tree, fmt.Sprintf("folder%d", i/100))
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("file number %d.conf", i)), []byte(strings.Repeat(strconv.Itoa(i), 1000)), 0o600); err != nil {
			return err
		}
	}
	us, err := ours("FAT32 of 1000 files", "fat32", tree, image)
	if err != nil {
		return err
	}
	peer := &side{name: "mkfs.vfat + mcopy -s", argv: []string{"sh", "-c",
		"rm -f " + theirs + " && mkfs.vfat -F 32 -C " + theirs + " 65536 >/dev/null && mcopy -s -m -i " + theirs + " " + tree + "/* ::/"}}
	if err := compare("a 64 MiB FAT32 image of 1000 files", us, peer); err != nil {
		return err
	}
	check := side{name: "fsck.vfat", argv: []string{"fsck.vfat", "-n", image}}
	return check.once()
}

// makeVolume packs the files of the folder TREE into the volume TO.
func makeVolume(args []string, _ io.Writer) error {
	tree, to := args[0], args[1]
	const size = 64 << 20
	var files []fat32.File
	root := os.DirFS(tree)
	err := fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		f, err := os.Open(filepath.Join(tree, path))
		if err != nil {
			return err
		}
		files = append(files, fat32.File{Path: path, Size: info.Size(), Content: f, ModTime: info.ModTime()})
		return nil
	})
	if err != nil {
		return err
	}
	extents, err := fat32.Volume{Size: size, SectorSize: 512, ID: 1, Label: "BENCH"}.Build(files)
	if err != nil {
		return err
	}
	// Anew, as the peer does.
	if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	if err := out.Truncate(size); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for _, e := range extents {
		if _, err := io.CopyBuffer(io.NewOffsetWriter(out, e.Offset), io.NewSectionReader(e.Content, 0, e.Length), buf); err != nil {
			return err
		}
	}
	return out.Close()
}
