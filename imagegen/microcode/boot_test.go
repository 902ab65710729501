package microcode

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/testvm/need"
)

// TestBoot boots a system whose initramfs follows an early one. Whether the
// processor takes an update can't be seen: QEMU's has no microcode, and only the
// vendors can sign any.
func TestBoot(t *testing.T) {
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	image, _ := need.Kernel(t)
	box, err := os.Open(need.File(t, "/bin/busybox", "busybox-static"))
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	st, err := box.Stat()
	if err != nil {
		t.Fatal(err)
	}
	for _, compression := range []string{"none", "zstd"} {
		t.Run(compression, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "initramfs")
			f, err := os.Create(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := collect(t).All().Pack(f, time.Unix(0, 0)); err != nil {
				t.Fatal(err)
			}
			if _, err := initramfs.Pack(t.Context(), f, initramfs.Base(box, st.Size()), initramfs.Compression{Name: compression}, time.Unix(0, 0), nil); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, qemu, "-accel", "tcg", "-m", "256", "-display", "none", "-nic", "none", "-no-reboot",
				"-monitor", "none", "-serial", "stdio", "-kernel", image, "-initrd", file, "-append", "console=ttyS0 memlinux.build=0123456789abcdef")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { cancel(); _ = cmd.Wait() }()
			end := regexp.MustCompile(`memlinux: ready |memlinux: only part|not syncing`)
			var log bytes.Buffer
			for buf := make([]byte, 4096); !end.Match(log.Bytes()); {
				n, err := out.Read(buf)
				log.Write(buf[:n])
				if err != nil {
					break
				}
			}
			if text := log.String(); !strings.Contains(text, "memlinux: ready ") || strings.Contains(text, "unpacking failed") {
				t.Errorf("it does not boot:\n%s", text)
			}
		})
	}
}
