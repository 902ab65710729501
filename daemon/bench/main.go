// Command bench measures memlinux against its peers, both in one run, and
// prints ratios. Each side runs as processes of its own, several times in turn;
// the figures are medians. Timings never decide a test: this is for people.
//
// It runs as root, in the folder with bin/. Words on its command line are the
// names of the benchmarks to run; without any, all are run.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/daemon/config"
)

// benchmarks are run in this order.
var benchmarks = []struct {
	name string
	run  func(bench) error
}{
	{"initramfs", bench.initramfs},
	{"fat32", bench.fat32},
	{"write", bench.write},
	{"stick", bench.stick},
	{"memory", bench.memory},
	{"modules", bench.modules},
	{"kernel", bench.kernel},
	{"rebuild", bench.rebuild},
	{"service", bench.service},
}

// works are what one side does in a process of its own, so that its start and
// its memory count, by name. What they write to out is for the side that waits.
var works = map[string]func(args []string, out io.Writer) error{
	"initramfs": packInitramfs,
	"fat32":     makeVolume,
	"write":     writeImage,
	"stick":     writeStick,
	"bmap":      copyAndCompare,
	"system":    makeSystem,
	"boot":      bootSystem,
}

func main() {
	var err error
	if len(os.Args) > 2 && os.Args[1] == "work" {
		work, known := works[os.Args[2]]
		if !known {
			panic("no work " + os.Args[2]) // it is this program that starts them
		}
		err = work(os.Args[3:], os.Stdout)
	} else {
		err = run(os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run of the benchmarks.
type bench struct {
	dir   string // its own folder, which goes at the end
	cache string // memlinuxd's, where what is slow to get stays for the next run
}

func run(names []string) error {
	var known []string
	for _, b := range benchmarks {
		known = append(known, b.name)
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			return fmt.Errorf("no benchmark %q; there are %s", name, strings.Join(known, ", "))
		}
	}
	if os.Geteuid() != 0 {
		return errors.New("run it as root, by make bench: it mounts and starts memlinuxd")
	}
	c, err := config.Load(config.DefaultPath)
	if err != nil {
		return err
	}
	cache, err := filepath.Abs(c.CacheDir)
	if err != nil {
		return err
	}
	root, err := os.MkdirTemp("", "memlinux-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(root)
	for _, b := range benchmarks {
		if len(names) > 0 && !slices.Contains(names, b.name) {
			continue
		}
		dir := filepath.Join(root, b.name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		if err := b.run(bench{dir: dir, cache: cache}); err != nil {
			return fmt.Errorf("%s: %w", b.name, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// path is a file in the benchmark's folder.
func (b bench) path(name string) string { return filepath.Join(b.dir, name) }
