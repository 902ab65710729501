package imagegen

import (
	"context"
	"io"
	"os"
	"path/filepath"
)

// HostKernel finds the kernel of this machine that a build takes where the
// recipe names none: its path and its release. Both are "" where /boot has none
// that fits; Debian's [DefaultKernelPackage] is taken then. The error is that of
// ctx.
func (g Generator) HostKernel(ctx context.Context) (path, release string, err error) {
	boot := filepath.Join(g.Root, "/boot")
	for _, name := range g.bootKernels(boot) {
		path := filepath.Join(boot, name)
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		st, err := f.Stat()
		if err == nil {
			var k kernelFile
			k, err = inspectKernel(ctx, f, st.Size(), "boot", func(name string) (io.ReadCloser, error) {
				return os.Open(filepath.Join(boot, name))
			})
			release = k.image.Release
		}
		_ = f.Close()
		if ctx.Err() != nil {
			return "", "", ctx.Err()
		}
		if err == nil {
			return path, release, nil
		}
	}
	return "", "", nil
}

// HostBusybox finds the busybox of this machine that a build takes where the
// recipe names none, "" where none fits; Debian's is fetched then.
func (g Generator) HostBusybox() string {
	for _, path := range hostBusyboxes {
		f, err := os.Open(g.Root + path)
		if err != nil {
			continue
		}
		st, err := f.Stat()
		if err == nil {
			_, err = inspectBusybox(f, st.Size())
		}
		_ = f.Close()
		if err == nil {
			return path
		}
	}
	return ""
}
