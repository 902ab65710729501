package daemon

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

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
			g := &given{in: r, size: -1, hash: sha256.New()}
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
	g := &given{in: f, size: size, hash: sha256.New()}
	if err := f.Truncate(900); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(g); err == nil || !strings.Contains(err.Error(), "changed meanwhile") {
		t.Errorf("error %v", err)
	}
}

// An image that comes slowly is written; one that does not come does not keep its disk.
func TestImageThatDoesNotCome(t *testing.T) {
	need.Root(t)
	standard := patience
	defer func() { patience = standard }()
	patience = time.Second
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	device := need.Loop(t, file, "512")
	address := startBus(t)
	serve(t, address, func(context.Context, *dbus.Conn, Question) error { return nil })
	conn := dial(t, address)
	begin := func(t *testing.T, image int) dbus.ObjectPath {
		t.Helper()
		path := api.DevicePath(filepath.Base(device))
		var props api.Properties
		if err := invoke(conn, api.ManagerPath, api.ManagerInterface+".Plan", path, api.Properties{}).Store(&props); err != nil {
			t.Fatal(err)
		}
		plan, err := api.PlanFrom(props)
		if err != nil {
			t.Fatal(err)
		}
		var job dbus.ObjectPath
		if err := invoke(conn, api.ManagerPath, api.ManagerInterface+".Write", path, plan.Token,
			api.Properties{api.OptImage: dbus.MakeVariant(dbus.UnixFD(image)), api.OptBootTest: dbus.MakeVariant(false)}).Store(&job); err != nil {
			t.Fatal(err)
		}
		return job
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	theirs, ours := socketPair(t)
	makeWait(t, theirs)
	for _, c := range []struct {
		name      string
		from, end int
	}{{"pipe", pipe[0], pipe[1]}, {"socket", theirs, ours}} {
		t.Run(c.name, func(t *testing.T) {
			job := begin(t, c.from)
			for range 5 {
				if _, err := unix.Write(c.end, bytes.Repeat([]byte("x"), 50_000)); err != nil {
					t.Fatal(err)
				}
				time.Sleep(patience / 2)
			}
			awaitState(t, conn, job, api.StateFailed)
			var props api.Properties
			if err := invoke(conn, job, api.PropertiesInterface+".GetAll", api.JobInterface).Store(&props); err != nil {
				t.Fatal(err)
			}
			var said api.Job
			if err := said.Update(props); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(said.Message, "the client sent nothing for 1s") || said.Report.Image.Source.Bytes != 250_000 {
				t.Errorf("it ends after %d bytes so: %s", said.Report.Image.Source.Bytes, said.Message)
			}
			if flags, err := unix.FcntlInt(uintptr(c.from), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
				t.Errorf("the descriptor's flags are %#x, %v", flags, err)
			}
			f, err := os.OpenFile(device, os.O_RDWR|unix.O_EXCL, 0)
			if err != nil {
				t.Fatalf("the disk is not free: %v", err)
			}
			f.Close()
		})
	}
}
