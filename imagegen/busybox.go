package imagegen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/memlinux/memlinux/imagegen/busybox"
	"github.com/memlinux/memlinux/imagegen/initramfs"
)

// BusyboxSource says where busybox comes from. The zero value is auto: the
// host's static one, else Debian's [BusyboxPackage].
type BusyboxSource struct {
	Host   bool     // the host's and no other
	Debian bool     // Debian's and no other
	File   *os.File // an open static busybox, which is read by descriptor only

	// Source is compiled, or Debian's own source with its patches; Fragments are
	// merged over our configuration, by the order of their names.
	Source       SourceCode
	DebianSource bool
	Fragments    map[string][]byte
}

// BusyboxPackage is the Debian package of the busybox where the host has no
// static one.
const BusyboxPackage = "busybox-static"

// FromSource reports whether it is compiled.
func (s BusyboxSource) FromSource() bool { return s.DebianSource || !s.Source.isZero() }

func (s BusyboxSource) validate() error {
	given := 0
	for _, is := range []bool{s.Host, s.Debian, s.File != nil, s.DebianSource, !s.Source.isZero()} {
		if is {
			given++
		}
	}
	switch {
	case given > 1:
		return errors.New("busybox can come from one place only: this machine, Debian, a file or source")
	case len(s.Fragments) > 0 && !s.FromSource():
		return errors.New("a busybox's configuration is for one that is made from source; name its source, or leave the configuration out")
	}
	return s.Source.validate("busybox")
}

// busyboxFile is a busybox that was inspected.
type busyboxFile struct {
	file   File
	info   busybox.Info
	source string // for the manifest
}

func (b *build) busybox(ctx context.Context, s BusyboxSource) (box busyboxFile, err error) {
	switch {
	case s.File != nil:
		if box, err = b.takeBusybox(ctx, s.File, "file"); err != nil {
			err = fmt.Errorf("%s: %w", s.File.Name(), err)
		}
	case s.FromSource():
		box, err = b.sourceBusybox(ctx, s)
	case s.Debian:
		box, err = b.debianBusybox(ctx)
	default:
		if box, err = b.hostBusybox(ctx); errors.Is(err, errNoBusybox) && !s.Host {
			if box, err = b.debianBusybox(ctx); err != nil && ctx.Err() == nil {
				err = fmt.Errorf("no static busybox on this machine, and Debian's could not be fetched: %w", err)
			}
		}
	}
	if err != nil && ctx.Err() == nil {
		err = unfit{ErrBusybox, err}
	}
	return box, err
}

var errNoBusybox = errors.New("no static busybox is on this machine; run apt-get install " + BusyboxPackage)

// hostBusyboxes are where a machine has its busybox.
var hostBusyboxes = []string{"/bin/busybox", "/usr/bin/busybox"}

func (b *build) hostBusybox(ctx context.Context) (busyboxFile, error) {
	for _, path := range hostBusyboxes {
		f, err := os.Open(b.g.Root + path)
		if err != nil {
			continue
		}
		box, err := b.takeBusybox(ctx, f, "host")
		_ = f.Close()
		if err == nil || ctx.Err() != nil {
			return box, err
		}
	}
	return busyboxFile{}, errNoBusybox
}

func (b *build) debianBusybox(ctx context.Context) (busyboxFile, error) {
	got, err := b.fetch(ctx, PhaseBusybox, BusyboxPackage, nil, false, "bin/busybox", "usr/bin/busybox")
	if err != nil {
		return busyboxFile{}, err
	}
	for _, file := range got.files {
		f, err := os.Open(file.Path)
		if err != nil {
			return busyboxFile{}, err
		}
		defer f.Close()
		box, err := b.takeBusybox(ctx, f, "debian "+got.from.Name+" "+got.from.Version)
		if err != nil {
			return busyboxFile{}, fmt.Errorf("package %s: %w", BusyboxPackage, err)
		}
		return box, nil
	}
	return busyboxFile{}, fmt.Errorf("no busybox is in Debian's %s", BusyboxPackage)
}

// takeBusybox copies f into the cache and inspects the copy.
func (b *build) takeBusybox(ctx context.Context, f *os.File, source string) (busyboxFile, error) {
	staged, err := b.take(ctx, f, busybox.MaxSize, nil)
	if err != nil {
		return busyboxFile{}, err
	}
	defer staged.Discard()
	info, err := inspectBusybox(staged, staged.Size())
	if err != nil {
		return busyboxFile{}, err
	}
	file, err := staged.Commit(ctx)
	return busyboxFile{file: file, info: info, source: source}, err
}

// inspectBusybox says what the busybox r is; one that lacks what /init needs is
// an error.
func inspectBusybox(r io.ReaderAt, size int64) (busybox.Info, error) {
	info, err := busybox.Inspect(r, size)
	if err != nil {
		return busybox.Info{}, err
	}
	for _, applet := range initramfs.Applets {
		if !slices.Contains(info.Applets, applet) {
			return busybox.Info{}, fmt.Errorf("this busybox lacks the applet %s, which /init needs", applet)
		}
	}
	return info, nil
}
