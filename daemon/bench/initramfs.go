package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/memlinux/memlinux/imagegen/initramfs"
)

const busybox = "/bin/busybox"

func (b bench) initramfs() error {
	packed, tree := b.path("initramfs.img"), b.path("tree")
	us, err := ours("initramfs, zstd", "initramfs", busybox, packed)
	if err != nil {
		return err
	}
	// The peer packs the very tree that we make.
	if err := us.once(); err != nil {
		return err
	}
	us.wall, us.cpu = nil, nil
	if err := os.Mkdir(tree, 0o700); err != nil {
		return err
	}
	unpack := side{name: "unpack", argv: []string{"sh", "-c", "zstd -dc " + packed + " | cpio -idm --quiet"}, dir: tree}
	if err := unpack.once(); err != nil {
		return err
	}
	peer := &side{name: "find | cpio -H newc -o | gzip", argv: []string{"sh", "-c", "find . | cpio -H newc -o --quiet | gzip > ../peer.img"}, dir: tree}
	if err := compare("initramfs of busybox and /init", us, peer); err != nil {
		return err
	}
	ourFile, err := os.Stat(packed)
	if err != nil {
		return err
	}
	peerFile, err := os.Stat(b.path("peer.img"))
	if err != nil {
		return err
	}
	fmt.Printf("  size %d bytes, the peer's %d\n", ourFile.Size(), peerFile.Size())
	return nil
}

// packInitramfs packs BUSYBOX into the file TO.
func packInitramfs(args []string, _ io.Writer) error {
	f, err := os.Open(args[0])
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	out, err := os.Create(args[1])
	if err != nil {
		return err
	}
	_, err = initramfs.Pack(context.Background(), out, initramfs.Base(f, info.Size()), initramfs.Compression{Name: "zstd"}, time.Unix(0, 0), nil)
	return errors.Join(err, out.Close())
}
