package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
)

const imageMiB = 8

// someImage is a disk image of data and holes that ends within a MiB.
func someImage() []byte {
	p := make([]byte, imageMiB<<20-3<<10)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(p[:1500<<10])
	_, _ = r.Read(p[4<<20+512 : 5<<20])
	_, _ = r.Read(p[len(p)-1024:])
	return p
}

// stale makes the disk hold what must not show through the holes of an image.
func stale(t *testing.T, backing string, mib int) {
	t.Helper()
	if err := os.WriteFile(backing, bytes.Repeat([]byte{0xA5}, mib<<20), 0o644); err != nil {
		t.Fatal(err)
	}
}

// startsWith checks the device's content, and returns the rest of it.
func startsWith(t *testing.T, backing string, want []byte) []byte {
	t.Helper()
	got, err := os.ReadFile(backing)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:len(want)], want) {
		t.Error("the device does not hold the image")
		return nil
	}
	return got[len(want):]
}

func wantVoid(t *testing.T, backing string) {
	t.Helper()
	startsWith(t, backing, make([]byte, 1<<20))
}

func packed(t *testing.T, path string, argv ...string) string {
	t.Helper()
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout = out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %v", argv, err)
	}
	return path
}

func sum(p []byte) string {
	s := sha256.Sum256(p)
	return hex.EncodeToString(s[:])
}

// Somebody else's image, however it is packed, is on the device as it is, its holes
// too, and nothing of what was there before can be mistaken for its own.
func TestForeignImage(t *testing.T) {
	w := newWorld(t)
	dev, backing := w.loop(16, "512")
	image := someImage()
	raw := w.file("state-image", string(image))
	defer os.Remove(raw)
	write := func(args ...string) outcome {
		return w.run(append([]string{"--json", "write", "--yes", "--no-boot-test", "--image"}, args...)...)
	}
	for _, c := range []struct {
		format, ext string
		argv        []string
	}{
		{"raw", "img", []string{"cat"}},
		{"gzip", "gz", []string{need.Tool(t, "gzip", "gzip"), "-c", "-1"}},
		{"xz", "xz", []string{need.Tool(t, "xz", "xz-utils"), "-c", "-0"}},
		{"zstd", "zst", []string{need.Tool(t, "zstd", "zstd"), "-c", "-q"}},
		{"bzip2", "bz2", []string{need.Tool(t, "bzip2", "bzip2"), "-c", "-1"}},
	} {
		t.Run(c.format, func(t *testing.T) {
			stale(t, backing, 16)
			file := packed(t, filepath.Join(t.TempDir(), "image."+c.ext), append(c.argv, raw)...)
			given, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			o := write(file, dev)
			o.wants(t, 0)
			rest := startsWith(t, backing, image)
			if end := rest[len(rest)-1<<20:]; len(bytes.Trim(end, "\x00")) != 0 {
				t.Error("old signatures may be left at the disk's end")
			}
			im := report(t, o).Image
			if im.Size != int64(len(image)) || im.SHA256Written != sum(image) || im.SHA256Read != sum(image) ||
				*im.Source != (api.Source{Name: filepath.Base(file), Format: c.format, Bytes: int64(len(given)), SHA256: sum(given)}) {
				t.Errorf("%+v of %+v", im, im.Source)
			}
			if im.Written+im.Unchanged != im.Bytes {
				t.Errorf("%d bytes written, %d were so already, of %d", im.Written, im.Unchanged, im.Bytes)
			}
			if c.format == "raw" {
				return
			}

			for name, spoiled := range map[string]struct {
				p    []byte
				says string
			}{
				"cut short":       {given[:len(given)*3/4], "end too early"},
				"garbage follows": {append(bytes.Clone(given), "garbage, and more of it"...), "other data follow"},
			} {
				file := filepath.Join(t.TempDir(), "image."+c.ext)
				if err := os.WriteFile(file, spoiled.p, 0o600); err != nil {
					t.Fatal(err)
				}
				o := write(file, dev)
				o.wants(t, 1)
				if !strings.Contains(o.stderr, spoiled.says) && !strings.Contains(o.stderr, "damaged") {
					t.Errorf("%s: it says %s", name, o.stderr)
				}
				wantVoid(t, backing)
			}
		})
	}
	t.Run("stdin, once more", func(t *testing.T) {
		stale(t, backing, 16)
		for i := range 2 {
			cmd := w.command("--json", "write", "--yes", "--no-boot-test", "--sha256", strings.ToUpper(sum(image)), "--image", "-", dev)
			cmd.Stdin = io.MultiReader(bytes.NewReader(image)) // a pipe
			o := finish(t, cmd)
			o.wants(t, 0)
			startsWith(t, backing, image)
			im := report(t, o).Image
			if im.Source.Name != "stdin" || im.Source.From != "--sha256" || im.Source.Expected != sum(image) {
				t.Errorf("%+v", im.Source)
			}
			if i > 0 && im.Written != 1<<20 {
				t.Errorf("%d bytes were written of an image that was there but for the first MiB", im.Written)
			}
		}
	})
	t.Run("hybrid ISO", func(t *testing.T) {
		need.Tool(t, "xorriso", "xorriso")
		dir := t.TempDir()
		if err := os.WriteFile(dir+"/file", image[:1<<20], 0o600); err != nil {
			t.Fatal(err)
		}
		iso := filepath.Join(t.TempDir(), "disc.iso")
		sh(t, need.Tool(t, "grub-mkrescue", "grub-common"), "-d", "/usr/lib/grub/i386-pc", "-o", iso, dir)
		p, err := os.ReadFile(iso)
		if err != nil {
			t.Fatal(err)
		}
		w.run("write", "--yes", "--no-boot-test", "--image", iso, dev).wants(t, 0)
		startsWith(t, backing, p)
	})
	t.Run("two devices", func(t *testing.T) {
		second := filepath.Join(t.TempDir(), "second")
		for _, file := range []string{backing, second} {
			stale(t, file, 16)
		}
		other := need.Loop(t, second, "512")
		w.run("write", "--yes", "--no-boot-test", "--image", raw, "--sha256", sum(image), dev, other).wants(t, 0)
		startsWith(t, backing, image)
		startsWith(t, second, image)
	})
	t.Run("a sum that is another", func(t *testing.T) {
		stale(t, backing, 16)
		o := write(raw, "--sha256", strings.Repeat("0", 64), dev)
		o.wants(t, 5, sum(image), strings.Repeat("0", 64))
		wantVoid(t, backing)
	})
	t.Run("sums beside it", func(t *testing.T) {
		dir := t.TempDir()
		file := filepath.Join(dir, "my.img")
		put := func(name, text string) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		put("my.img", string(image))
		put("SHA256SUMS", strings.Repeat("1", 64)+"  other.img\n"+sum(image)+" *my.img\n")
		o := w.run("write", "--yes", "--no-boot-test", "--image", file, dev)
		o.wants(t, 0)
		if !strings.Contains(o.stdout, sum(image)+", as "+dir+"/SHA256SUMS says") {
			t.Errorf("it says %s", o.stdout)
		}
		put("SHA256SUMS", "SHA256 (my.img) = "+strings.Repeat("1", 64)+"\n")
		write(file, dev).wants(t, 5, strings.Repeat("1", 64))
		wantVoid(t, backing)
		o = write(file, "--sha256", sum(image), dev) // what the command says wins
		o.wants(t, 0)
		put("SHA256SUMS", strings.Repeat("1", 64)+"  other.img\n")
		o = w.run("write", "--yes", "--no-boot-test", "--image", file, dev)
		o.wants(t, 0)
		if !strings.Contains(o.stdout, "held against no sum") {
			t.Errorf("it says %s", o.stdout)
		}
	})
	t.Run("refused with the device as it was", func(t *testing.T) {
		stale(t, backing, 16)
		before := digest(t, backing)
		large := w.file("state-large", "")
		defer os.Remove(large)
		if err := os.Truncate(large, 17<<20); err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			args []string
			code int
			says string
		}{
			"too large":                 {[]string{large, dev}, 1, "needs 17 MiB, has 16 MiB"},
			"a web page":                {[]string{w.file("state/page", "\n<!DOCTYPE html>\n<html>Not found"), dev}, 2, "web page"},
			"a zip":                     {[]string{w.file("state/zip", "PK\x03\x04..."), dev}, 2, "zip"},
			"nothing":                   {[]string{w.file("state/empty", ""), dev}, 2, "empty"},
			"a short one, and its sum":  {[]string{w.file("state/short", "hello"), "--sha256", strings.Repeat("0", 64), dev}, 5, "must have"},
			"a folder":                  {[]string{w.dir, dev}, 2, "folder"},
			"no such file":              {[]string{w.path("none"), dev}, 2, "none does not exist"},
			"the device's own file":     {[]string{backing, dev}, 3, "the file that"},
			"a kernel as well":          {[]string{raw, "--kernel", "host", dev}, 2, "--kernel"},
			"into a file":               {[]string{raw, w.path("x.img")}, 2, "is a file"},
			"stdin on two devices":      {[]string{"-", dev, need.Loop(t, raw, "512")}, 2, "one device only"},
			"a sum that is none":        {[]string{raw, "--sha256", "abc", dev}, 2, "64 hexadecimal"},
			"and the capacity":          {[]string{raw, "--check-capacity", dev}, 2, "--check-capacity"},
			"a disk's node as an image": {[]string{dev, dev}, 2, "not a regular file"},
		} {
			t.Run(name, func(t *testing.T) {
				cmd := w.command(append([]string{"write", "--yes", "--no-boot-test", "--image"}, c.args...)...)
				cmd.Stdin = strings.NewReader("")
				finish(t, cmd).wants(t, c.code, c.says)
			})
		}
		cmd := w.command("write", "--image", "-", dev)
		cmd.Stdin = strings.NewReader("x")
		finish(t, cmd).wants(t, 2, "--yes")
		w.run("write", "--sha256", sum(image), dev).wants(t, 2, "--image")
		if digest(t, backing) != before {
			t.Error("the device was changed")
		}
	})
	t.Run("larger than the device, which shows late", func(t *testing.T) {
		file := packed(t, filepath.Join(t.TempDir(), "zeros.gz"), "sh", "-c", "head -c 17M /dev/zero | gzip")
		write(file, dev).wants(t, 1, "has 16 MiB, and more is needed")
		wantVoid(t, backing)
	})
	t.Run("Ctrl-C while the pipe stalls", func(t *testing.T) {
		for _, n := range []int{100 << 10, 3 << 20} {
			stale(t, backing, 16)
			r, pipe, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer pipe.Close()
			cmd := w.command("--json", "write", "--yes", "--image", "-", dev)
			cmd.Stdin = r
			go func() { _, _ = pipe.Write(image[:n]) }()
			cancelled(t, w, cmd, "write")
			r.Close()
			if n >= 1<<20 {
				continue // void or as it was: the phase begins before the first byte
			}
			startsWith(t, backing, bytes.Repeat([]byte{0xA5}, 16<<20))
		}
		sh(t, "flock", "--nonblock", dev, "true")
	})
	w.holds("disk", "state-image")
}

// An image can't be written on the disk that it is read from.
func TestForeignImageOnItsOwnDisk(t *testing.T) {
	w := newWorld(t)
	dev, _ := w.loop(64, "512")
	sh(t, need.Tool(t, "mke2fs", "e2fsprogs"), "-q", "-t", "ext4", dev)
	mnt := t.TempDir()
	sh(t, "mount", dev, mnt)
	defer sh(t, "umount", mnt)
	if err := os.WriteFile(mnt+"/x.img", someImage(), 0o644); err != nil {
		t.Fatal(err)
	}
	w.run("write", "--yes", "--image", mnt+"/x.img", dev).wants(t, 3, "refused")
}

// Somebody else's system is booted as far as it can be seen, under the firmware that
// would start it.
func TestForeignImageBoots(t *testing.T) {
	w := newWorld(t)
	img := w.path("state-stick.img")
	w.run("write", "--no-boot-test", img).wants(t, 0)
	defer os.Remove(img)
	sh(t, need.Tool(t, "mdel", "mtools"), "-i", img+"@@1M", "::/EFI/BOOT/BOOTX64.EFI")
	dev, _ := w.loop(64, "512")
	o := w.run("--json", "write", "--yes", "--image", img, dev)
	o.wants(t, 0)
	r := report(t, o)
	if len(r.Boots) != 2 || !r.Verified {
		t.Fatalf("%+v", r)
	}
	if b := r.Boots[0]; !b.OK || b.Reached != "login" || b.Screenshot == "" || b.GRUB == 0 || b.Kernel == 0 {
		t.Errorf("BIOS: %+v", b)
	}
	if b := r.Boots[1]; !b.Skipped || !strings.Contains(b.Reason, "BOOTX64.EFI") {
		t.Errorf("UEFI: %+v", b)
	}
	t.Run("a table for other sectors", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 64<<20); err != nil {
			t.Fatal(err)
		}
		o := w.run("write", "--yes", "--no-boot-test", "--image", img, need.Loop(t, path, "4096"))
		o.wants(t, 0)
		if !strings.Contains(o.stdout, "for sectors of 512 bytes, and the disk has 4096") {
			t.Errorf("it says %s", o.stdout)
		}
	})
	t.Run("nothing to boot", func(t *testing.T) {
		file := w.file("state/data", fmt.Sprint(strings.Repeat("data ", 1000)))
		o := w.run("--json", "write", "--yes", "--image", file, dev)
		o.wants(t, 0)
		r := report(t, o)
		if len(r.Boots) != 2 || !r.Boots[0].Skipped || !r.Boots[1].Skipped || !r.Verified {
			t.Errorf("%+v", r.Boots)
		}
		if all := strings.Join(r.Warnings, "; "); !strings.Contains(all, "nothing in it that a firmware would start") || !strings.Contains(all, "within a sector") {
			t.Errorf("warnings: %s", all)
		}
	})
}
