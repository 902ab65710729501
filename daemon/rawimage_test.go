package daemon

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/imagegen/tarball"
	"github.com/memlinux/memlinux/testvm/need"
)

func TestGuess(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		name                     string
		given, size, plain, want int64
	}{
		{"a pipe", 20 * mib, -1, 60 * mib, 0},
		{"too early", 7 * mib, 100 * mib, 7 * mib, 0},
		{"a quarter is read", 25 * mib, 100 * mib, 75 * mib, 300 * mib},
		{"all is read", 100 * mib, 100 * mib, 310 * mib, 310 * mib},
		{"all of a small one", 3 * mib, 3 * mib, 9 * mib, 9 * mib},
		{"more than it had", 101 * mib, 100 * mib, 310 * mib, 310 * mib},
	} {
		if got := guess(c.given, c.size, c.plain); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

func TestNoImage(t *testing.T) {
	sector := func(magic string, at int) []byte {
		p := make([]byte, 512)
		copy(p[at:], magic)
		return p
	}
	for name, c := range map[string]struct {
		head []byte
		says string // "": it may be one
	}{
		"empty":                       {nil, "empty"},
		"one byte":                    {[]byte{0}, ""},
		"zeros":                       {make([]byte, 4096), ""},
		"a boot sector":               {sector("\xeb\x63\x90", 0), ""},
		"a web page":                  {[]byte("<!DOCTYPE HTML PUBLIC>"), "web page"},
		"behind a mark and blanks":    {[]byte("\ufeff\r\n\t<html lang=en>"), "web page"},
		"XML":                         {[]byte("<?xml version='1.0'?><Error>"), "web page"},
		"text that is data":           {[]byte("hello <html>"), ""},
		"a tar":                       {sector("ustar\x0000", 257), "tar archive"},
		"a zip":                       {sector("PK\x03\x04", 0), "zip archive"},
		"a qcow2":                     {sector("QFI\xfb", 0), "qemu-img convert"},
		"a VDI":                       {sector("\x7f\x10\xda\xbe", 64), "VDI"},
		"compressed twice":            {sector("\xfd7zXZ\x00", 0), "xz within"},
		"lz4, which is not unpacked":  {sector("\x04\x22\x4d\x18", 0), "lz4 -d"},
		"shorter than where tar says": {[]byte("x"), ""},
	} {
		err := noImage(c.head)
		if (err == nil) != (c.says == "") || err != nil && (!strings.Contains(err.Error(), c.says) || api.ErrorName(err) != api.ErrInvalidOption) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is given through a pipe is counted and summed up, whoever decompresses it, and
// the image ends only where the sum is right.
func TestCheckedImage(t *testing.T) {
	plain := bytes.Repeat([]byte("some image, "), 100_000)
	cmd := exec.Command(need.Tool(t, "xz", "xz-utils"), "-c", "-0")
	cmd.Stdin = bytes.NewReader(plain)
	archive, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	of := func(p []byte) string {
		s := sha256.Sum256(p)
		return hex.EncodeToString(s[:])
	}
	for _, c := range []struct {
		name        string
		given       []byte
		want, fails string
	}{
		{"raw", plain, of(plain), ""},
		{"raw without a sum", plain, "", ""},
		{"raw with another sum", plain, of(archive), "must have " + of(archive)},
		{"xz", archive, of(archive), ""},
		{"xz with the sum of what is in it", archive, of(plain), "must have " + of(plain)},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			go func() {
				_, _ = w.Write(c.given)
				w.Close()
			}()
			g := &given{ctx: t.Context(), f: r, size: -1, hash: sha256.New()}
			z, err := tarball.NewReader(bufio.NewReader(g))
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			image := &checked{given: g, plain: z, want: c.want}
			got, err := io.ReadAll(image)
			if !bytes.Equal(got, plain) || image.bytes() != int64(len(plain)) {
				t.Errorf("%d bytes came, of %d", len(got), len(plain))
			}
			if (err == nil) != (c.fails == "") || err != nil && (!strings.Contains(err.Error(), c.fails) || api.ErrorName(err) != api.ErrVerification) {
				t.Errorf("error %v", err)
			}
			if n, sum := g.result(); n != int64(len(c.given)) || sum != of(c.given) || g.bytes() != n {
				t.Errorf("%d bytes given, %s", n, sum)
			}
		})
	}
}

// One who waits for a pipe ends with its context, and leaves the pipe's descriptor as
// it was.
func TestGivenEndsWithItsContext(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	g := &given{ctx: ctx, f: r, size: -1, hash: sha256.New()}
	time.AfterFunc(20*time.Millisecond, cancel)
	if n, err := g.Read(make([]byte, 10)); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d, %v", n, err)
	}
}

func TestFileThatChangesWhileItIsRead(t *testing.T) {
	f, err := os.Create(t.TempDir() + "/image")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1000); err != nil {
		t.Fatal(err)
	}
	size, err := imageSize(f)
	if err != nil || size != 1000 {
		t.Fatalf("%d, %v", size, err)
	}
	g := &given{ctx: t.Context(), f: f, size: size, hash: sha256.New()}
	if err := f.Truncate(900); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(g); err == nil || !strings.Contains(err.Error(), "changed meanwhile") {
		t.Errorf("error %v", err)
	}
}
