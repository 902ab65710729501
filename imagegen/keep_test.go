package imagegen

import (
	"errors"
	"os"
	"reflect"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// A system that was kept is the same when it is loaded again, byte for byte, and
// is gone when a part of it is.
func TestKeptSystem(t *testing.T) {
	kernel, _ := need.Kernel(t)
	f, err := os.Open(kernel)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	g := Generator{CacheDir: t.TempDir()}
	s, err := g.Build(t.Context(), Recipe{Kernel: KernelSource{File: f}, Busybox: BusyboxSource{Host: true}, Modules: []string{"none"}, Boot: []string{"uefi"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := g.Keep(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	got, err := g.Load(t.Context(), kept)
	if err != nil {
		t.Fatal(err)
	}
	want, errWant := s.Manifest.JSON()
	text, err := got.Manifest.JSON()
	if err != nil || errWant != nil || string(text) != string(want) {
		t.Errorf("the manifest is another: %v, %v", errWant, err)
	}
	s.Warnings, s.Manifest = nil, got.Manifest
	if !reflect.DeepEqual(got, s) {
		t.Errorf("loaded %+v, kept %+v", got, s)
	}
	if again, err := g.Keep(t.Context(), got); err != nil || again != kept {
		t.Errorf("kept once more it is %s, %v, not %s", again, err, kept)
	}
	if err := os.Remove(s.Initramfs.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Load(t.Context(), kept); !errors.Is(err, ErrGone) {
		t.Errorf("without its initramfs: %v", err)
	}
	if _, err := (Generator{CacheDir: t.TempDir()}).Load(t.Context(), kept); !errors.Is(err, ErrGone) {
		t.Errorf("from an empty cache: %v", err)
	}
}
