package pc

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// Patience is how long a machine may take for one step, under TCG on a machine
// with other work to do.
const Patience = 6 * time.Minute

// Guest is how a PC is run.
type Guest struct {
	MemoryMiB int  // 0 means 1024
	NVMe      bool // the disk is nvme0n1, not sda on AHCI
	Boots     []string
	Sticks    []Stick // that can be plugged in and unplugged
}

// Machine is a PC that runs. One QEMU goes on over all reboots, so that
// firmware, boot loader and what they keep from boot to boot are real.
type Machine struct {
	t    testing.TB
	cmd  *exec.Cmd
	keys io.WriteCloser
	dir  string
	over chan struct{} // closed when QEMU is gone

	mu   sync.Mutex
	text []byte
	more chan struct{} // closed and replaced as text grows
	seen int           // what was expected lies before
}

// Start powers the PC on. It writes on its disk; the variables of UEFI are kept
// beside the disk's image from one Start to the next. The n-th of g.Boots is a
// bash script for the n-th boot of the PC's Debian; what it writes into its
// working directory comes out with [Machine.Boot]. Then that Debian reboots, and
// behind the last script, or one that fails, it powers off.
//
// It is killed, and waited for, at the end of the test.
func Start(t testing.TB, p *PC, g Guest) *Machine {
	t.Helper()
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	memory := g.MemoryMiB
	if memory == 0 {
		memory = 1024
	}
	m := &Machine{t: t, dir: t.TempDir(), over: make(chan struct{}), more: make(chan struct{})}
	args := []string{
		"-accel", "tcg", "-machine", "q35", "-smp", "1", "-m", fmt.Sprint(memory), "-nodefaults", "-no-user-config", "-nic", "none",
		"-vga", "std", "-display", "none", "-monitor", "none", "-serial", "stdio",
		"-drive", "if=none,id=disk,format=raw,cache=unsafe,file=" + quoted(p.Disk),
	}
	if g.NVMe {
		args = append(args, "-device", "nvme,serial=1,drive=disk,bootindex=0")
	} else {
		args = append(args, "-device", "ide-hd,bus=ide.0,drive=disk,bootindex=0")
	}
	if len(g.Boots) > 0 {
		args = append(args, "-drive", "if=none,id=in,format=raw,readonly=on,file="+quoted(m.scripts(g.Boots)), "-device", "ide-cd,bus=ide.1,drive=in",
			"-device", "virtio-serial-pci,max_ports="+fmt.Sprint(len(g.Boots)+1))
		for n := range g.Boots {
			args = append(args, "-chardev", fmt.Sprintf("file,id=out%d,path=%s", n+1, quoted(m.out(n+1))),
				"-device", fmt.Sprintf("virtserialport,name=out%d,chardev=out%d", n+1, n+1))
		}
	}
	if len(g.Sticks) > 0 {
		args = append(args, m.sticks(g.Sticks)...)
	}
	if p.Firmware == uefi {
		code := need.File(t, "/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf")
		args = append(args, "-drive", "if=pflash,format=raw,readonly=on,file="+code, "-drive", "if=pflash,format=raw,file="+quoted(p.variables(t)))
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.cmd = exec.CommandContext(ctx, qemu, args...)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	m.cmd.Cancel = func() error { return syscall.Kill(-m.cmd.Process.Pid, syscall.SIGKILL) }
	m.cmd.WaitDelay = 5 * time.Second
	var err error
	if m.keys, err = m.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	m.cmd.Stdout, m.cmd.Stderr = m, m
	started := make(chan error)
	go func() {
		// The kernel sends the death signal when the thread that forked ends,
		// not the process: keep that thread until QEMU is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(m.over)
		err := m.cmd.Start()
		started <- err
		if err == nil {
			_ = m.cmd.Wait() // how it ended is in the console
		}
	}()
	if err := <-started; err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		<-m.over
		if t.Failed() || os.Getenv("MEMLINUX_CONSOLE") != "" {
			t.Logf("console:\n%s", strings.ReplaceAll(string(m.text), "\r", ""))
		}
	})
	return m
}

// quoted is a path for QEMU's options, in which a comma ends a value.
func quoted(path string) string { return strings.ReplaceAll(path, ",", ",,") }

func (p *PC) variables(t testing.TB) string {
	t.Helper()
	file := p.Disk + ".vars"
	if _, err := os.Stat(file); err == nil {
		return file
	}
	if err := os.WriteFile(file, read(t, need.File(t, "/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf")), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func (m *Machine) out(n int) string { return filepath.Join(m.dir, fmt.Sprintf("out%d.tar", n)) }

// scripts is a disc with the scripts in a tar.
func (m *Machine) scripts(boots []string) string {
	m.t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for n, script := range boots {
		err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("boot%d", n+1), Mode: 0o755, Size: int64(len(script))})
		if err == nil {
			_, err = io.WriteString(w, script)
		}
		if err != nil {
			m.t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		m.t.Fatal(err)
	}
	b.Write(make([]byte, 2048-b.Len()%2048+64<<10)) // a CD-ROM's sectors; what reads ahead may do so
	file := filepath.Join(m.dir, "in.tar")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return file
}

// Write takes what QEMU says; it is not for tests.
func (m *Machine) Write(b []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.text = append(m.text, b...)
	close(m.more)
	m.more = make(chan struct{})
	return len(b), nil
}

// Expect waits until the serial line, behind what was expected before, has a
// match of the regular expression, and returns it with its submatches. It fails
// the test after [Patience], or when the kernel panics or the power is off.
func (m *Machine) Expect(pattern string) []string {
	m.t.Helper()
	re := regexp.MustCompile(pattern)
	timeout := time.After(Patience)
	for off := false; ; {
		m.mu.Lock()
		rest, more := m.text[m.seen:], m.more
		if found := re.FindSubmatchIndex(rest); found != nil {
			var said []string
			for i := 0; i < len(found); i += 2 {
				said = append(said, string(rest[max(found[i], 0):max(found[i+1], 0)]))
			}
			m.seen += found[1]
			m.mu.Unlock()
			return said
		}
		panics := bytes.Contains(rest, []byte("Kernel panic"))
		m.mu.Unlock()
		if panics {
			m.t.Fatalf("the kernel panicked before the serial line said %q; see the console below", pattern)
		}
		if off {
			m.t.Fatalf("the machine is off and its serial line never said %q; see the console below", pattern)
		}
		select {
		case <-more:
		case <-m.over:
			off = true // and look once more
		case <-timeout:
			m.t.Fatalf("the serial line did not say %q within %s; see the console below", pattern, Patience)
		}
	}
}

// Type types a line on the serial line.
func (m *Machine) Type(line string) {
	m.t.Helper()
	if _, err := io.WriteString(m.keys, line+"\r"); err != nil {
		m.t.Fatal(err)
	}
}

// Boot waits for the end of the script of the PC's n-th Debian, and returns the
// files that it left in its working directory, and all it said under the name
// "said". A script that fails fails the test.
func (m *Machine) Boot(n int) map[string]string {
	m.t.Helper()
	m.Expect(fmt.Sprintf(`pc: boot %d ended`, n))
	files := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(read(m.t, m.out(n)))); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		var b []byte
		if err == nil {
			b, err = io.ReadAll(r)
		}
		if err != nil {
			m.t.Fatalf("the results of boot %d: %v", n, err)
		}
		if h.Typeflag == tar.TypeReg {
			files[path.Clean(h.Name)] = string(b)
		}
	}
	if status := strings.TrimSpace(files["status"]); status != "0" {
		m.t.Fatalf("the script of boot %d ended with status %s; it said:\n%s", n, status, files["said"])
	}
	delete(files, "status")
	return files
}

// Off waits until the machine is powered off.
func (m *Machine) Off() {
	m.t.Helper()
	select {
	case <-m.over:
	case <-time.After(Patience):
		m.t.Fatalf("the machine was not powered off within %s", Patience)
	}
}
