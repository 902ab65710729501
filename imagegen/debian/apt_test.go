package debian_test

import (
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/imagegen/debian/debiantest"
)

// The real apt, on a repository of our own, without the network.
func TestFetchWithRealApt(t *testing.T) {
	repo := debiantest.New(t)
	repo.Add("hello", "1.0", "", map[string]string{"boot/vmlinuz-1": "kernel", "boot/config-1": "config", "usr/share/doc/x": "doc"})
	apt := repo.Apt()
	ctx := t.Context()

	if _, err := apt.Candidate(ctx, "hello"); !errors.Is(err, debian.ErrNoCandidate) {
		t.Fatalf("before update: %v", err)
	}
	if err := apt.Update(ctx); err != nil {
		t.Fatal(err)
	}
	p, err := apt.Candidate(ctx, "hello")
	if err != nil || p.Version != "1.0" {
		t.Fatalf("%+v, %v", p, err)
	}
	fetch := func() (*os.File, error) { return apt.Download(ctx, p, t.TempDir(), func(int64) {}) }
	deb, err := fetch()
	if err != nil {
		t.Fatal(err)
	}
	defer deb.Close()
	got := map[string]string{}
	take := func(name string, size int64, content io.Reader) error {
		b, err := io.ReadAll(content)
		got[name] = string(b)
		return err
	}
	if err := debian.Files(ctx, deb, take); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"boot/vmlinuz-1": "kernel", "boot/config-1": "config", "usr/share/doc/x": "doc"}, got); diff != "" {
		t.Error(diff)
	}
	n := 0
	if err := debian.Files(ctx, deb, func(string, int64, io.Reader) error { n++; return debian.ErrStop }); err != nil || n != 1 {
		t.Errorf("stopped after %d files: %v", n, err)
	}
	wrong := errors.New("wrong")
	if err := debian.Files(ctx, deb, func(string, int64, io.Reader) error { return wrong }); !errors.Is(err, wrong) {
		t.Errorf("an error from take: %v", err)
	}

	if err := os.WriteFile(repo.Deb("hello", "1.0"), []byte("not what the list promised"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := fetch(); err == nil {
		t.Error("a package that is not what the list says was taken")
	}
	if err := os.Remove(repo.Deb("hello", "1.0")); err != nil {
		t.Fatal(err)
	}
	if _, err := fetch(); err == nil || !strings.Contains(err.Error(), "fetch hello 1.0: apt-get: ") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a package that is gone: %v", err)
	}
}
