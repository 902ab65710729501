package kbuild_test

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
	"github.com/memlinux/memlinux/imagegen/kbuild/kbuildtest"
	"github.com/memlinux/memlinux/imagegen/kernel"
	"github.com/memlinux/memlinux/testvm/need"
)

// Sizes that a stick of 8 MiB leaves to the kernel: an EFI GRUB has 0.75 MiB, an
// initramfs of busybox 1.1.
const maxImage = 6 << 20

func TestMinimalKernel(t *testing.T) {
	image, config := kbuildtest.Kernel(t)
	f, err := os.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := kernel.ParseConfig(f)
	if err != nil {
		t.Fatal(err)
	}
	if found := c.Check("zstd", nil); len(found) > 0 {
		t.Errorf("what the minimal kernel lacks: %v", found)
	}
	k, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	st, err := k.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > maxImage {
		t.Errorf("the minimal kernel has %d bytes", st.Size())
	}
	im, err := kernel.ParseImage(k, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^6\.1\.[0-9]+-memlinux$`).MatchString(im.Release) || !strings.Contains(im.Version, "(memlinux@memlinux) #1 SMP") {
		t.Errorf("release %q, version %q", im.Release, im.Version)
	}
	embedded, err := im.EmbeddedConfig(t.Context(), k)
	if err != nil || embedded["LOCALVERSION"] != c["LOCALVERSION"] {
		t.Errorf("configuration in the kernel: %d options, %v", len(embedded), err)
	}
}

// A system in memory with nothing but busybox must reach its shell with 48 MiB.
func TestMinimalKernelBootsIn48MiB(t *testing.T) {
	image, _ := kbuildtest.Kernel(t)
	said, took := boot(t, image, pack(t), "48", nil)
	if took == 0 {
		t.Fatalf("the system was not ready in 48 MiB:\n%s", said)
	}
	t.Logf("ready after %.1f s", took.Seconds())
}

// pack makes the initramfs and returns its path.
func pack(t testing.TB) string {
	t.Helper()
	box, err := os.Open(need.File(t, "/bin/busybox", "busybox-static"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { box.Close() })
	st, err := box.Stat()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "initramfs")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := initramfs.Pack(t.Context(), f, initramfs.Base(box, st.Size()), initramfs.Compression{Name: "zstd"}, time.Unix(0, 0), nil); err != nil {
		t.Fatal(err)
	}
	return path
}

// boot boots a kernel and returns its console and the time until the shell
// answered; 0 if it did not.
func boot(t testing.TB, image, initrd, mib string, args []string) (said string, ready time.Duration) {
	t.Helper()
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	// The shell's answer is 42; what is typed is not.
	cmd := exec.CommandContext(ctx, qemu, append([]string{
		"-accel", "tcg", "-m", mib, "-display", "none", "-nic", "none", "-no-reboot", "-monitor", "none", "-serial", "stdio",
		"-kernel", image, "-initrd", initrd, "-append", "console=tty0 console=ttyS0,115200 panic=-1 memlinux.build=0123456789abcdef",
	}, args...)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }()
	var log bytes.Buffer
	buf := make([]byte, 4096)
	asked := false
	for {
		n, err := out.Read(buf)
		log.Write(buf[:n])
		if ready == 0 && bytes.Contains(log.Bytes(), []byte("memlinux: ready build=0123456789abcdef")) {
			ready = time.Since(start)
		}
		if !asked && bytes.Contains(log.Bytes(), []byte("memlinux:~# ")) {
			asked = true
			if _, err := in.Write([]byte("echo answer $((6*7)); free -k\n")); err != nil {
				t.Fatal(err)
			}
		}
		if bytes.Contains(log.Bytes(), []byte("answer 42\r")) && ready != 0 && bytes.Contains(log.Bytes(), []byte("Swap:")) {
			return log.String(), ready
		}
		if err != nil {
			return log.String(), 0
		}
	}
}
