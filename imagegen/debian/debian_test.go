package debian

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/testvm/need"
)

func TestParsePackage(t *testing.T) {
	const text = `Package: linux-image-cloud-amd64
Version: 6.1.192-2
Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), kmod | kmod-fork, libc6:any
Description: Linux
 Depends: not this
Filename: pool/x.deb
Size: 1504
SHA256: 00be

Package: linux-image-cloud-amd64
Version: 6.1.176-1
`
	got, err := parsePackage([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := Package{Name: "linux-image-cloud-amd64", Version: "6.1.192-2", Size: 1504, SHA256: "00be", Depends: []string{"linux-image-6.1.0-56-cloud-amd64", "kmod", "libc6"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for name, text := range map[string]string{
		"nothing":                           "",
		"installed, but nowhere to be had":  "Package: x\nVersion: 1\nSHA256: 00\n",
		"without a digest to hold it up to": "Package: x\nVersion: 1\nFilename: x.deb\n",
	} {
		if _, err := parsePackage([]byte(text)); !errors.Is(err, ErrNoCandidate) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := parsePackage([]byte("Package: x\nSize: huge\n")); err == nil {
		t.Error("a size that is no number was taken")
	}
}

func FuzzParsePackage(f *testing.F) {
	f.Add([]byte("Package: x\nVersion: 1\nFilename: x\nSHA256: 00\nDepends: a (= 1) | b, c:any\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parsePackage(b); err == nil && (p.Name == "" || p.Version == "" || p.SHA256 == "") {
			t.Errorf("taken: %+v", p)
		}
	})
}

func TestValidName(t *testing.T) {
	for name, want := range map[string]bool{
		"linux-image-6.1.0-56-cloud-amd64": true, "g++": true, "0ad": true,
		"": false, "a": false, "-oDebug=1": false, "../x": false, "x=1": false, "x/sid": false, "Linux": false, "a b": false, "x\n": false, "x:i386": false,
	} {
		if ValidName(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
}

func TestFilesNamesABrokenPackage(t *testing.T) {
	need.Tool(t, "dpkg-deb", "dpkg")
	path := filepath.Join(t.TempDir(), "x.deb")
	if err := os.WriteFile(path, []byte("no package"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Files(t.Context(), f, nil); err == nil || !strings.Contains(err.Error(), "dpkg-deb") {
		t.Errorf("%v", err)
	}
}

// Cancelling must end the helpers of a program too, and wait for them.
func TestCancelEndsTheWholeGroup(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	mark := filepath.Join(t.TempDir(), "mark")
	start := time.Now()
	_, err := Apt{}.run(ctx, "", "sh", "-c", "(sleep 1; touch "+mark+") & wait")
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 900*time.Millisecond {
		t.Errorf("%v after %s", err, time.Since(start))
	}
	time.Sleep(time.Until(start.Add(1300 * time.Millisecond)))
	if _, err := os.Stat(mark); err == nil {
		t.Error("the helper went on")
	}
}

func TestMissingAptSaysWhatToDo(t *testing.T) {
	_, err := Apt{}.run(t.Context(), "", "no-such-apt")
	if !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), "not installed") {
		t.Error(err)
	}
}
