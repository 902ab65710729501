package daemon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/godbus/dbus/v5"

	"github.com/memlinux/memlinux/bootloader/grub"
	"github.com/memlinux/memlinux/bootloader/menulst"
	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/media/stick"
	"github.com/memlinux/memlinux/testvm"
)

func (s *Server) verify(c *call) ([]any, error) {
	return s.startVerify(c, func(*options) (*source, error) { return s.openToVerify(c) })
}

// openToVerify opens the device that the call is allowed to verify.
func (s *Server) openToVerify(c *call) (*source, error) {
	disk, err := s.openToRead(c.ctx, nil, c.args[0].(dbus.ObjectPath))
	if err != nil {
		return nil, err
	}
	if err := c.stillOn(*disk.device, actionVerify, actionVerifyFixed); err != nil {
		disk.file.Close()
		return nil, err
	}
	return disk, nil
}

func (s *Server) verifyFile(c *call) ([]any, error) {
	return s.startVerify(c, func(o *options) (*source, error) {
		f := o.argument(toBeRead)
		if f == nil {
			return nil, o.err
		}
		return s.openToRead(c.ctx, f, "")
	})
}

func (s *Server) startVerify(c *call, open func(*options) (*source, error)) ([]any, error) {
	o := c.options()
	bootTest := o.boolean(api.OptBootTest, true)
	if err := o.end(); err != nil {
		return nil, err
	}
	disk, err := open(o)
	if err != nil {
		closeAll(o.files)
		return nil, err
	}
	phases := []jobs.Phase{{Name: phaseCheck, Weight: 3}}
	if bootTest {
		phases = append(phases, bootPhases...)
	}
	c.target = disk.target
	before, err := fingerprintOf(disk.file)
	if err != nil {
		closeAll(append(o.files, disk.file))
		return nil, err
	}
	return s.start(c, api.KindVerify, phases, append(o.files, disk.file), func(ctx context.Context, j *jobs.Job) (_ *api.Report, err error) {
		report := &api.Report{Kind: api.KindVerify, Target: disk.target}
		defer func() {
			// Its owner can write a file while we read it.
			if after, ferr := fingerprintOf(disk.file); err == nil && disk.target.Kind == "file" && (ferr != nil || after != before) {
				report.Verified = false
				err = &api.Error{Name: api.ErrVerification, Message: "the file was changed while it was verified; run it again when nothing writes it"}
			}
		}()
		j.Begin(phaseCheck)
		m, err := check(ctx, disk, report, j.Progress)
		if err != nil {
			if ctx.Err() != nil {
				return report, ctx.Err()
			}
			return report, &api.Error{Name: api.ErrVerification, Message: err.Error()}
		}
		if !bootTest {
			report.Verified = true
			return report, nil
		}
		available, err := availableMemory()
		if err != nil {
			return report, err
		}
		if err := tooLarge(m, available, s.config().Memory); err != nil {
			return report, &api.Error{Name: api.ErrVerification, Message: err.Error()}
		}
		return report, s.prove(ctx, j, report, disk.file, m)
	})
}

// check reads a stick that memlinux wrote: its partition tables, its
// filesystem, every file that the manifest has a digest of, and whether what the
// manifest says of them can be.
func check(ctx context.Context, disk *source, report *api.Report, progress func(done, total int64)) (api.Manifest, error) {
	found, err := stick.Inspect(disk.file, disk.size, disk.sectorSize)
	if err != nil {
		return api.Manifest{}, err
	}
	volume := grub.VolumeUUID(found.VolumeID)
	report.Image = &api.Image{Size: disk.size, VolumeID: volume}
	text, err := readSmall(found.FS(), stickManifest)
	if err != nil {
		return api.Manifest{}, err
	}
	m, err := api.ParseManifest(bytes.NewReader(text))
	if err != nil {
		return m, fmt.Errorf("%s: %w", stickManifest, err)
	}
	report.System = reportSystem(m)
	if id := imagegen.SystemID(m.Kernel.SHA256, m.Initramfs.SHA256, m.Cmdline); id != m.ID {
		return m, fmt.Errorf("%s says build %s, but its digests make build %s: it was changed", stickManifest, m.ID, id)
	}
	total := m.Kernel.Size + m.Initramfs.Size
	var done int64
	for _, f := range []struct {
		path, digest string
		size         int64
	}{{stickKernel, m.Kernel.SHA256, m.Kernel.Size}, {stickInitramfs, m.Initramfs.SHA256, m.Initramfs.Size}} {
		before := done
		digest, n, err := digestFile(ctx, found.FS(), f.path, f.size, func(n int64) { progress(before+n, total) })
		if err != nil {
			return m, err
		}
		if n != f.size || digest != f.digest {
			return m, fmt.Errorf("%s is not what was written: sha256 %s of %d bytes, expected %s of %d; write the stick again", f.path, digest, n, f.digest, f.size)
		}
		done += n
		report.Image.Bytes += n
	}
	k, err := stickImage(found.FS(), m.Kernel.Size)
	if err != nil {
		return m, err
	}
	if err := implausible(m, k); err != nil {
		return m, err
	}
	if err := checkMenu(found.FS(), volume, report.System.Cmdline); err != nil {
		return m, err
	}
	return m, checkLoaders(disk.file, found.FS(), m, report)
}

// checkLoaders compares the boot loaders with the digests that the manifest has of
// them.
func checkLoaders(disk io.ReaderAt, files fs.FS, m api.Manifest, report *api.Report) error {
	same := func(fw testvm.Firmware, from io.Reader) error {
		want, ok := m.Loaders[string(fw)]
		digest, err := sha256Of(from)
		if err == nil && ok && digest != want {
			err = fmt.Errorf("sha256 %s, expected %s; write the stick again", digest, want)
		}
		if err != nil {
			return fmt.Errorf("the boot loader for %s is not what was written: %w", strings.ToUpper(string(fw)), err)
		}
		return nil
	}
	if err := same(testvm.BIOS, stick.LoaderForBIOS(disk)); err != nil {
		return err
	}
	if slices.Contains(m.Boot, string(testvm.UEFI)) {
		text, err := readSmall(files, stickEFI)
		if err != nil {
			return err
		}
		if err := same(testvm.UEFI, bytes.NewReader(text)); err != nil {
			return err
		}
	}
	if len(m.Loaders) == 0 {
		report.Warnings = append(report.Warnings, "its boot loaders were compared with nothing: an older memlinux wrote it, which kept no digests of them")
	}
	return nil
}

// sha256Of is the SHA-256 of all that r gives, in hex.
func sha256Of(r io.Reader) (string, error) {
	h := sha256.New()
	_, err := io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), err
}

// checkMenu wants an entry that boots this volume's kernel with the command
// line.
func checkMenu(files fs.FS, volume, cmdline string) error {
	text, err := readSmall(files, stickMenu)
	if err != nil {
		return err
	}
	menu := menulst.Parse(text)
	entries := menu.Entries()
	i, ok := menu.Default()
	if !ok || i >= len(entries) {
		return fmt.Errorf("%s has no entry to boot by itself", stickMenu)
	}
	kernel, line := entries[i].Kernel()
	switch {
	case entries[i].UUID() != volume:
		return fmt.Errorf("%s boots from the volume %q, but this one is %s", stickMenu, entries[i].UUID(), volume)
	case kernel != "/"+stickKernel || entries[i].Initrd() != "/"+stickInitramfs:
		return fmt.Errorf("%s boots %s with %s, not memlinux's own files", stickMenu, kernel, entries[i].Initrd())
	case !slices.Equal(strings.Fields(line), strings.Fields(cmdline)):
		return fmt.Errorf("%s has the command line %q, expected %q", stickMenu, line, cmdline)
	}
	return nil
}

// maxSmall bounds the files that are read whole.
const maxSmall = 16 << 20

func readSmall(files fs.FS, path string) ([]byte, error) {
	f, err := files.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: this is not a stick that memlinux wrote", path)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSmall+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(text) > maxSmall {
		return nil, fmt.Errorf("%s is larger than %d MiB: it was changed", path, maxSmall>>20)
	}
	return text, nil
}

// digestFile is the SHA-256 of a file, and its size, which is at most one byte
// more than it should have.
func digestFile(ctx context.Context, files fs.FS, path string, size int64, progress func(int64)) (string, int64, error) {
	f, err := files.Open(path)
	if err != nil {
		return "", 0, fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	h := sha256.New()
	var n int64
	_, err = io.Copy(h, io.LimitReader(readerFunc(func(p []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		m, err := f.Read(p)
		n += int64(m)
		progress(n)
		return m, err
	}), size+1))
	if err != nil {
		return "", n, fmt.Errorf("%s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), n, nil
}
