package grub

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/bootloader/menulst"
	"github.com/memlinux/memlinux/testvm/need"
)

const (
	bootTitle = "It's a $test; \"booted\" {here}"
	// All that GRUB's script could trip over and CheckCommandLine lets through.
	bootCmdline = "console=ttyS0,115200 panic=-1 x=$root y=${z};a|b&c <d> (e) #f *? =g ~!@%^+[1] h=i,j:k`l`"
)

// stick makes a disk that boots from everything here, and returns it with what
// its serial console must say.
func stick(t *testing.T) (path string, want []string) {
	t.Helper()
	mkfs, mcopy, mmd := need.Tool(t, "mkfs.vfat", "dosfstools"), need.Tool(t, "mcopy", "mtools"), need.Tool(t, "mmd", "mtools")
	bios, efi := needGRUB(t)
	dir := t.TempDir()
	path = filepath.Join(dir, "stick.img")
	gptDisk(t, path)
	embed(t, bios, path)

	entry := menulst.Entry{Title: bootTitle, Commands: []menulst.Command{{Name: "uuid", Args: VolumeUUID(volumeID)}}}
	files := map[string][]byte{"EFI/BOOT/BOOTX64.EFI": efi}
	want = []string{bootTitle}
	kernel, _ := need.Kernel(t)
	data, err := os.ReadFile(kernel)
	if err != nil {
		t.Fatal(err)
	}
	files["boot/vmlinuz"] = data
	entry.Commands = append(entry.Commands, menulst.Command{Name: "kernel", Args: "/boot/vmlinuz " + bootCmdline})
	want = append(want, "Kernel command line: BOOT_IMAGE=/boot/vmlinuz "+bootCmdline+"\r")
	menu, err := menulst.Render(menulst.Menu{
		Globals: []menulst.Command{{Name: "default", Args: "0"}, {Name: "timeout", Args: "2"}},
		Entries: []menulst.Entry{entry},
	})
	if err != nil {
		t.Fatal(err)
	}
	files["boot/grub/menu.lst"] = menu

	// The backup GPT has the last 33 sectors.
	kib := (diskBytes/sectorSize - espLBA - 33) / 2
	run(t, mkfs, "-F32", "-s1", "-i", strings.ReplaceAll(VolumeUUID(volumeID), "-", ""),
		"--offset", strconv.Itoa(espLBA), path, strconv.Itoa(kib))
	partition := path + "@@" + strconv.Itoa(espLBA*sectorSize)
	run(t, mmd, "-i", partition, "::EFI", "::EFI/BOOT", "::boot", "::boot/grub")
	for name, data := range files {
		file := filepath.Join(dir, "file")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, mcopy, "-i", partition, file, "::"+name)
	}
	return path, want
}

// boot starts QEMU with the stick on USB, and waits until the serial console
// has said all of want in that order.
func boot(t *testing.T, path string, want []string, firmware ...string) {
	t.Helper()
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	ctx, cancel := context.WithTimeout(t.Context(), 180*time.Second)
	defer cancel()
	serial := filepath.Join(t.TempDir(), "serial.log")
	cmd := exec.CommandContext(ctx, qemu, append(firmware,
		"-accel", "tcg", "-m", "512", "-display", "none", "-nic", "none", "-no-reboot",
		"-serial", "file:"+serial, "-device", "qemu-xhci",
		"-drive", "if=none,id=stick,format=raw,snapshot=on,file="+path,
		"-device", "usb-storage,drive=stick,bootindex=0")...)
	var messages bytes.Buffer
	cmd.Stderr = &messages
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for ended := false; ; {
		log, _ := os.ReadFile(serial)
		rest, found := string(log), true
		for _, w := range want {
			if _, rest, found = strings.Cut(rest, w); !found {
				break
			}
		}
		if found {
			t.Logf("seen after %.1f s", time.Since(start).Seconds())
			cancel()
			if !ended {
				<-done
			}
			return
		}
		if ended {
			t.Fatalf("QEMU ended: %s; the serial console never said, in this order, %q:\n%q", messages.String(), want, log)
		}
		select {
		case <-done:
			ended = true
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func TestBootsUnderSeaBIOS(t *testing.T) {
	path, want := stick(t)
	boot(t, path, want)
}

func TestBootsUnderOVMF(t *testing.T) {
	code := need.File(t, "/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf")
	data, err := os.ReadFile(need.File(t, "/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"))
	if err != nil {
		t.Fatal(err)
	}
	vars := filepath.Join(t.TempDir(), "vars.fd")
	if err := os.WriteFile(vars, data, 0o600); err != nil {
		t.Fatal(err)
	}
	path, want := stick(t)
	boot(t, path, want, "-M", "q35",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file="+code,
		"-drive", "if=pflash,unit=1,format=raw,file="+vars)
}
