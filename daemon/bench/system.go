package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/manifest"
)

// system names one of the systems that are measured.
type system string

const (
	generic system = "generic" // Debian's kernel for any PC, with all sets of modules
	cloud   system = "cloud"   // Debian's for virtual machines, without modules
	minimal system = "minimal" // our own configuration of Debian's source, which has no modules
)

func (s system) recipe() imagegen.Recipe {
	r := imagegen.Recipe{Modules: []string{"none"}, Compression: initramfs.Compression{Name: "zstd"}}
	switch s {
	case generic:
		r.Kernel.Debian, r.Modules = "linux-image-amd64", []string{"all"}
	case cloud:
		r.Kernel.Debian = imagegen.DefaultKernelPackage
	case minimal:
		r.Kernel.Source.Debian, r.Kernel.Base = "linux-source-6.1", "minimal"
	}
	return r
}

// kernel is the same kernel and modules as words of a recipe file.
func (s system) kernel() (kernel, modules string) {
	r := s.recipe()
	kernel = "debian:" + r.Kernel.Debian
	if r.Kernel.FromSource() {
		kernel = "debian-source:" + strings.TrimPrefix(r.Kernel.Source.Debian, "linux-source-")
	}
	return kernel, r.Modules[0]
}

// built is a system that was made.
type built struct {
	ID                string
	Kernel, Initramfs string // paths
	Size              int64  // bytes of Initramfs
	Unpacked          int64  // bytes
	BootLine          string
	Release           string
	Source            string   // of the kernel, as in the manifest
	Modules           []string // names
	Memory            manifest.Memory
}

// makeSystem makes the system WHAT with the cache CACHE and prints it as JSON.
func makeSystem(args []string, out io.Writer) error {
	var slow sync.Once
	s, err := imagegen.Generator{CacheDir: args[0]}.Build(context.Background(), system(args[1]).recipe(), func(phase string, _, _ int64) {
		if phase == imagegen.PhaseCompile {
			slow.Do(func() {
				fmt.Fprintln(os.Stderr, "bench: compiles a kernel, this one time: about 10 minutes on two cores")
			})
		}
	})
	if err != nil {
		return err
	}
	m := s.Manifest
	b := built{ID: s.ID, Kernel: s.Kernel.Path, Initramfs: s.Initramfs.Path, Size: s.Initramfs.Size, Unpacked: m.Initramfs.Unpacked,
		BootLine: m.BootLine(), Release: m.Kernel.Release, Source: m.Kernel.Source, Memory: m.Memory}
	for _, f := range m.Initramfs.Files {
		if name, is := strings.CutSuffix(filepath.Base(f.Path), ".ko"); is {
			b.Modules = append(b.Modules, name)
		}
	}
	return json.NewEncoder(out).Encode(b)
}

// prepare makes systems with the cache that stays: what they need is then in
// there. It is not measured, and this process stays small, see [side.once].
func (b bench) prepare(all ...system) ([]built, error) {
	var made []built
	for _, what := range all {
		s, err := ours("make the system "+string(what), "system", b.cache, string(what))
		if err != nil {
			return nil, err
		}
		s.stderr = os.Stderr
		if err := s.once(); err != nil {
			return nil, err
		}
		var m built
		if err := json.Unmarshal(s.out, &m); err != nil {
			return nil, err
		}
		made = append(made, m)
	}
	return made, nil
}

// scratchCache is a cache with the kernels and modules of the one that stays,
// but with no initramfs: what is packed is packed anew, and goes at the end.
func (b bench) scratchCache(name string) (string, error) {
	dir := b.path(name)
	for _, sub := range []string{"files", "records"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return "", err
		}
	}
	files, err := filepath.Glob(filepath.Join(b.cache, "files", "*"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if err := os.Symlink(f, filepath.Join(dir, "files", filepath.Base(f))); err != nil {
			return "", err
		}
	}
	if err := os.CopyFS(filepath.Join(dir, "records"), os.DirFS(filepath.Join(b.cache, "records"))); err != nil {
		return "", err
	}
	return dir, forgetInitramfs(dir)
}

// forgetInitramfs makes a cache forget what it packed.
func forgetInitramfs(cache string) error {
	records, err := filepath.Glob(filepath.Join(cache, "records", "initramfs-*"))
	if err != nil {
		return err
	}
	for _, record := range records {
		var packed struct{ SHA256 string }
		text, err := os.ReadFile(record)
		if err == nil {
			err = json.Unmarshal(text, &packed)
		}
		if err == nil {
			err = os.Remove(record)
		}
		if err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(cache, "files", packed.SHA256)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// daemonEnv are the limits that memlinuxd sets itself, for a side that does its
// work without it.
var daemonEnv = []string{"GOMEMLIMIT=40MiB"}
