package daemon

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/memlinux/memlinux/bootloader/grub"
	"github.com/memlinux/memlinux/bootloader/menulst"
	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/media"
	"github.com/memlinux/memlinux/media/fat32"
	"github.com/memlinux/memlinux/media/stick"
	"github.com/memlinux/memlinux/testvm"
)

// Where things lie in the volume of a stick.
const (
	stickKernel    = "boot/" + api.FileKernel
	stickInitramfs = "boot/" + api.FileInitramfs
	stickManifest  = "boot/" + api.FileManifest
	stickMenu      = "boot/grub/menu.lst"
	stickEFI       = "EFI/BOOT/BOOTX64.EFI"
	stickLabel     = "MEMLINUX"
)

// menuTimeout is how long the menu waits for a key, in seconds.
const menuTimeout = "3"

// generate makes the system.
func (s *Server) generate(ctx context.Context, j *jobs.Job, r imagegen.Recipe) (*imagegen.System, error) {
	return s.generator(j).Build(ctx, r, tell(j))
}

// generator makes the systems of a job. Logs of compilations go where the job's
// other reports are.
func (s *Server) generator(j *jobs.Job) imagegen.Generator {
	return imagegen.Generator{CacheDir: s.config().CacheDir, LogDir: s.reportDir(j.ID()), Owner: j.Snapshot().Owner,
		Apt: debian.Apt{Dir: filepath.Join(s.config().CacheDir, "apt")}}
}

func reportSystem(m api.Manifest) *api.System {
	return &api.System{ID: m.ID, Cmdline: m.BootLine(), KernelRelease: m.Kernel.Release, KernelSource: m.Kernel.Source,
		KernelSize: m.Kernel.Size, KernelSHA256: m.Kernel.SHA256, InitramfsSize: m.Initramfs.Size, InitramfsSHA256: m.Initramfs.SHA256,
		MemoryBIOS: m.Memory.BIOS, MemoryUEFI: m.Memory.UEFI}
}

// menu is the menu.lst for the system. A stick's names its volume: the entry is
// then right whatever number the loader gives the disk. Without a volume the
// entry is for the partition that the menu is on.
func menu(sys *imagegen.System, volume string) ([]byte, error) {
	e := menulst.Entry{Title: "memlinux, Linux " + sys.Manifest.Kernel.Release}
	if volume != "" {
		e.Commands = append(e.Commands, menulst.Command{Name: "uuid", Args: volume})
	}
	e.Commands = append(e.Commands,
		menulst.Command{Name: "kernel", Args: "/" + stickKernel + " " + sys.Manifest.BootLine()},
		menulst.Command{Name: "initrd", Args: "/" + stickInitramfs})
	text, err := menulst.Render(menulst.Menu{
		Globals: []menulst.Command{{Name: "default", Args: "0"}, {Name: "timeout", Args: menuTimeout}},
		Entries: []menulst.Entry{e},
	})
	if err != nil {
		return nil, fmt.Errorf("boot menu: %w", err)
	}
	return text, nil
}

// composed is an image and the open files that it reads from.
type composed struct {
	image  *media.Image
	volume string
	files  []*os.File
}

func (c *composed) Close() { closeAll(c.files) }

// stamp is all that an image has beside its system and its size: the same
// stamp makes the same image.
type stamp struct {
	VolumeID uint32      `json:"volume_id"`
	GUIDs    stick.GUIDs `json:"guids"`
	Modified time.Time   `json:"modified"` // of all files
}

// newStamp is one that no other stick has, for files of that time (zero: now).
func newStamp(modified time.Time) (stamp, error) {
	id, err := freshVolumeID()
	if modified.IsZero() {
		modified = time.Now()
	}
	return stamp{VolumeID: id, GUIDs: stick.RandomGUIDs(), Modified: modified.UTC()}, err
}

// compose lays the system out as a disk of that size (0: the least that fits)
// and sector size. mkimage starts grub-mkimage.
func compose(ctx context.Context, mkimage grub.Launcher, sys *imagegen.System, size int64, sectorSize int, st stamp) (c *composed, err error) {
	c = &composed{}
	defer func() {
		if err != nil {
			c.Close()
			c = nil
		}
	}()
	id := st.VolumeID
	c.volume = grub.VolumeUUID(id)
	m := sys.Manifest
	m.Loaders = map[string]string{}
	spec := stick.Spec{Size: size, SectorSize: sectorSize, VolumeID: id, GUIDs: st.GUIDs, Label: stickLabel, ModTime: st.Modified}
	if slices.Contains(sys.Manifest.Boot, string(testvm.BIOS)) && sectorSize == 512 { // a PC BIOS can't boot others
		bios, err := grub.MakeBIOS(ctx, mkimage, id)
		if err != nil {
			return c, err
		}
		if spec.BootSector, spec.Core, err = bios.Embed(stick.CoreLBA); err != nil {
			return c, err
		}
		head := make([]byte, stick.CoreLBA*512+stick.MaxCore)
		copy(head, spec.BootSector)
		copy(head[stick.CoreLBA*512:], spec.Core)
		if m.Loaders[string(testvm.BIOS)], err = sha256Of(stick.LoaderForBIOS(bytes.NewReader(head))); err != nil {
			return c, err
		}
	}
	menuText, err := menu(sys, c.volume)
	if err != nil {
		return c, err
	}
	add := func(path string, size int64, content io.ReaderAt) {
		spec.Files = append(spec.Files, fat32.File{Path: path, Size: size, Content: content, ModTime: st.Modified})
	}
	if slices.Contains(sys.Manifest.Boot, string(testvm.UEFI)) {
		efi, err := grub.MakeEFI(ctx, mkimage, id)
		if err != nil {
			return c, err
		}
		add(stickEFI, int64(len(efi)), bytes.NewReader(efi))
		if m.Loaders[string(testvm.UEFI)], err = sha256Of(bytes.NewReader(efi)); err != nil {
			return c, err
		}
	}
	manifest, err := m.JSON()
	if err != nil {
		return c, err
	}
	add(stickMenu, int64(len(menuText)), bytes.NewReader(menuText))
	add(stickManifest, int64(len(manifest)), bytes.NewReader(manifest))
	for _, part := range []struct {
		path string
		file imagegen.File
	}{{stickKernel, sys.Kernel}, {stickInitramfs, sys.Initramfs}} {
		f, err := os.Open(part.file.Path)
		if err != nil {
			return c, fmt.Errorf("compose the image: %w", err)
		}
		c.files = append(c.files, f)
		add(part.path, part.file.Size, f)
	}
	c.image, err = spec.Image()
	return c, err
}

// freshVolumeID is a random FAT volume ID: GRUB finds the stick by it, so two
// sticks in one PC must not share it.
func freshVolumeID() (uint32, error) {
	var b [4]byte
	for {
		if _, err := rand.Read(b[:]); err != nil {
			return 0, fmt.Errorf("volume ID: %w", err)
		}
		if id := binary.LittleEndian.Uint32(b[:]); id != 0 {
			return id, nil
		}
	}
}

func reportImage(im *media.Image, volume string) *api.Image {
	r := &api.Image{Size: im.Size, Bytes: im.DataBytes(), VolumeID: volume}
	for _, e := range im.Extents {
		r.Extents = append(r.Extents, api.Extent{Offset: e.Offset, Length: e.Length})
	}
	return r
}
