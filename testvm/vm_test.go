package testvm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image/png"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// childVariable makes the test binary a daemon that will be killed.
const childVariable = "MEMLINUX_TESTVM_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		runChild(dir)
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "testvm-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	fixture.dir, fixture.made = dir, map[string]bool{}
	return m.Run()
}

// logDir is a folder that only we can reach: QEMU's user can't.
func logDir(t *testing.T) string {
	t.Helper()
	closed := filepath.Join(t.TempDir(), "closed")
	dir := filepath.Join(closed, "logs")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func needQEMU(t *testing.T) {
	t.Helper()
	need.Tool(t, qemuProgram, "qemu-system-x86")
	need.File(t, ovmfCode, "ovmf")
}

func directKernel(t *testing.T, words string) Machine {
	t.Helper()
	needQEMU(t)
	return Machine{
		Firmware: BIOS, Dir: logDir(t), MemoryMiB: 256,
		Kernel: open(t, testKernel(t), os.O_RDONLY), Initrd: open(t, testInitrd(t), os.O_RDONLY),
		Append: testAppend + " build=" + testBuild + " " + words,
	}
}

func diskMachine(t *testing.T, fw Firmware, bus Bus, path string, sectorSize int) Machine {
	t.Helper()
	needQEMU(t)
	f := open(t, path, os.O_RDONLY)
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	return Machine{Firmware: fw, Disk: f, DiskSize: size, SectorSize: sectorSize, Bus: bus, Dir: logDir(t)}
}

// checkProven checks all that a good verdict promises.
func checkProven(t *testing.T, m Machine, v Verdict, stages []string) {
	t.Helper()
	if !v.OK || v.Skipped || v.Reason != "" || !v.Shell || v.RAMMiB < 128 || v.QEMUVersion == "" || v.ToReady == 0 || v.Firmware != m.Firmware {
		t.Fatalf("verdict %+v\n%s", v, read(t, v.ConsoleLog))
	}
	if log := read(t, v.ConsoleLog); !bytes.Contains(log, []byte("memlinux: ready build="+testBuild)) {
		t.Errorf("the log misses the ready line:\n%s", log)
	}
	checkScreenshot(t, v.Screenshot)
	want := []string{StageFirmware, StageKernel, StageReady}
	if m.Kernel == nil {
		want = []string{StageFirmware, StageGRUB, StageKernel, StageReady}
		if !(0 < v.ToGRUB && v.ToGRUB < v.ToKernel && v.ToKernel < v.ToReady) {
			t.Errorf("times %+v", v)
		}
	}
	if got := strings.Join(stages, " "); m.Kernel == nil && got != strings.Join(want, " ") {
		t.Errorf("stages %s", got)
	}
	checkFolder(t, m.Dir, v.ConsoleLog, v.Screenshot)
	t.Logf("GRUB %.1f s, kernel %.1f s, ready %.1f s by %s of QEMU %s", v.ToGRUB, v.ToKernel, v.ToReady, v.Accelerator, v.QEMUVersion)
}

func checkScreenshot(t *testing.T, path string) {
	t.Helper()
	img, err := png.Decode(open(t, path, os.O_RDONLY))
	if err != nil {
		t.Fatalf("screenshot: %v", err)
	}
	lit, size := 0, img.Bounds()
	for y := range size.Dy() {
		for x := range size.Dx() {
			if r, _, _, _ := img.At(x, y).RGBA(); r > 0x4000 {
				lit++
			}
		}
	}
	if lit < 100 {
		t.Errorf("screenshot of %v shows %d light pixels", size, lit)
	}
}

// checkFolder checks that only the named files are in dir.
func checkFolder(t *testing.T, dir string, want ...string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	hidden, _ := filepath.Glob(filepath.Join(dir, ".*"))
	if left = append(left, hidden...); err != nil || strings.Join(left, " ") != strings.Join(want, " ") {
		t.Errorf("in the folder: %v, %v; want %v", left, err, want)
	}
}

// checkNoQEMU checks that no QEMU of ours runs.
func checkNoQEMU(t *testing.T) {
	t.Helper()
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, s := range stats {
		stat, err := os.ReadFile(s)
		if err != nil {
			continue // it has just ended
		}
		name, rest, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(rest); strings.Contains(name, "(qemu-system") && fields[1] == strconv.Itoa(os.Getpid()) {
			t.Errorf("still there: %s", stat)
		}
	}
}

// TestProveBoots boots real disks by real firmware. Two at a time: more
// guests than processors time out under emulation.
func TestProveBoots(t *testing.T) {
	for _, c := range []struct {
		name   string
		fw     Firmware
		bus    Bus
		disk   func(*testing.T) string
		sector int
	}{
		{"BIOS from USB", BIOS, USB, gptDisk, 512},
		{"UEFI from USB", UEFI, USB, gptDisk, 512},
		{"BIOS from virtio", BIOS, Virtio, gptDisk, 512},
		{"UEFI from USB with 4096-byte sectors", UEFI, USB, largeSectorDisk, 4096},
		{"BIOS from AHCI", BIOS, AHCI, gptDisk, 512},
		{"UEFI from virtio", UEFI, Virtio, gptDisk, 512},
		{"BIOS from a block device", BIOS, USB, func(t *testing.T) string { return need.Loop(t, gptDisk(t), "512") }, 512},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := c.disk(t)
			m := diskMachine(t, c.fw, c.bus, path, c.sector)
			before := state(t, path)
			var stages []string
			v, err := Prove(t.Context(), m, Expect{Build: testBuild, Shell: true}, func(s string) { stages = append(stages, s) })
			if err != nil {
				t.Fatal(err)
			}
			checkProven(t, m, v, stages)
			if state(t, path) != before {
				t.Error("the proof changed the disk")
			}
		})
	}
}

func TestProveKernel(t *testing.T) {
	for _, fw := range []Firmware{BIOS, UEFI} {
		t.Run(string(fw), func(t *testing.T) {
			t.Parallel()
			m := directKernel(t, "")
			m.Firmware = fw
			v, err := Prove(t.Context(), m, Expect{Build: testBuild, Shell: true}, nil)
			if err != nil {
				t.Fatal(err)
			}
			checkProven(t, m, v, nil)
		})
	}
}

func TestProveSaysWhyNot(t *testing.T) {
	for _, c := range []struct {
		name, want string
		machine    func(t *testing.T) Machine
	}{
		{"another build", "booted build " + testBuild + ", expected other: memlinux: ready", func(t *testing.T) Machine { return directKernel(t, "") }},
		{"a panic", "the kernel panicked: ", func(t *testing.T) Machine { return directKernel(t, "mode=panic") }},
		{"a reset", "the machine reset itself; the boot came as far as the kernel; ", func(t *testing.T) Machine { return directKernel(t, "mode=reset") }},
		{"a power off", "the machine powered itself off; the boot came as far as the kernel; ", func(t *testing.T) Machine { return directKernel(t, "mode=off") }},
		{"garbage for BIOS", "the firmware found nothing to boot on the disk: ", func(t *testing.T) Machine { return diskMachine(t, BIOS, USB, garbageDisk(t), 512) }},
		{"garbage for UEFI", "the firmware found nothing to boot on the disk: ", func(t *testing.T) Machine { return diskMachine(t, UEFI, USB, garbageDisk(t), 512) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := c.machine(t)
			begin := time.Now()
			v, err := Prove(t.Context(), m, Expect{Build: "other"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if v.OK || !strings.HasPrefix(v.Reason, c.want) {
				t.Errorf("verdict %+v", v)
			}
			if d := time.Since(begin); d > 60*time.Second {
				t.Errorf("it took %v to say so", d)
			}
			t.Logf("%.1f s: %s", time.Since(begin).Seconds(), v.Reason)
		})
	}
}

func TestTimeout(t *testing.T) {
	m := directKernel(t, "mode=mute")
	vm, err := launch(t.Context(), m, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.close()
	vm.firmwareLog = open(t, "/dev/null", os.O_RDONLY) // launched for a person, it has none
	log, err := os.Create(filepath.Join(m.Dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	w := watch{vm: vm, detector: detector{buildID: testBuild}, log: log, progress: func(string) {}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w.listen(ctx)
	reason, err := w.untilReady(ctx, 50*time.Millisecond)
	if err != nil || reason != "no ready line within 50ms; the boot came as far as the firmware; the console stayed empty" {
		t.Errorf("reason %q, error %v", reason, err)
	}
}

func TestCancelLeavesNothing(t *testing.T) {
	for _, at := range []string{StageFirmware, StageReady} {
		t.Run(at, func(t *testing.T) {
			m := directKernel(t, "")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			begin := time.Now()
			_, err := Prove(ctx, m, Expect{Build: testBuild, Shell: true}, func(s string) {
				if s == at {
					begin = time.Now()
					cancel()
				}
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
			if d := time.Since(begin); d > 2*time.Second {
				t.Errorf("cancelling took %v", d)
			}
			checkNoQEMU(t)
			checkFolder(t, m.Dir, filepath.Join(m.Dir, "bios-console.log"))
		})
	}
}

// console reads from the machine until want is there.
func console(t *testing.T, vm *VM, want string) {
	t.Helper()
	var got strings.Builder
	buf := make([]byte, 4096)
	if err := vm.Console().SetReadDeadline(time.Now().Add(biosLimit)); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(got.String(), want) {
		n, err := vm.Console().Read(buf)
		got.Write(buf[:n])
		if err != nil {
			t.Fatalf("no %q but %v in\n%s", want, err, got.String())
		}
	}
}

func TestStart(t *testing.T) {
	m := directKernel(t, "")
	m.DataDisc = open(t, garbageDisk(t), os.O_RDONLY)
	vm, err := Start(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.close()
	checkFolder(t, m.Dir)
	checkUnprivileged(t, vm.process.pid)
	if drives, err := vm.monitor.Run(t.Context(), "query-block", nil); err != nil || !bytes.Contains(drives, []byte(`"device": "disc"`)) {
		t.Errorf("drives %s, %v", drives, err)
	}

	console(t, vm, "memlinux: ready")
	if _, err := vm.Console().WriteString("echo sum=$((6*7))\n"); err != nil {
		t.Fatal(err)
	}
	console(t, vm, "sum=42")
	if _, err := vm.Console().WriteString("poweroff -f\n"); err != nil {
		t.Fatal(err)
	}
	if err := vm.Wait(); err != nil {
		t.Errorf("Wait: %v", err)
	}
	if _, err := io.Copy(io.Discard, vm.Console()); err != nil {
		t.Errorf("the console behind the end: %v", err)
	}
	vm.Stop() // does nothing
}

// checkUnprivileged checks what the kernel says about QEMU.
func checkUnprivileged(t *testing.T, pid int) {
	t.Helper()
	status := string(read(t, fmt.Sprintf("/proc/%d/status", pid)))
	cred, err := credential(nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"\nSeccomp:\t2\n"}
	if cred != nil {
		want = append(want, fmt.Sprintf("\nUid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\n", cred.Uid), "\nCapEff:\t0000000000000000\n", "\nCapPrm:\t0000000000000000\n", "\nGroups:\t \n")
	}
	for _, w := range want {
		if !strings.Contains(status, w) {
			t.Errorf("QEMU's status misses %q:\n%s", w, status)
		}
	}
	if pgid, err := syscall.Getpgid(pid); err != nil || pgid != pid {
		t.Errorf("process group %d of %d: %v", pgid, pid, err)
	}
}

func TestStopAndCancelEndTheMachine(t *testing.T) {
	for name, end := range map[string]func(vm *VM, cancel func()){
		"Stop":   func(vm *VM, _ func()) { vm.Stop(); vm.Stop() },
		"cancel": func(_ *VM, cancel func()) { cancel() },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			vm, err := Start(ctx, directKernel(t, ""))
			if err != nil {
				t.Fatal(err)
			}
			defer vm.close()
			end(vm, cancel)
			if err := vm.Wait(); err == nil {
				t.Error("Wait says that the machine powered itself off")
			}
			checkNoQEMU(t)
		})
	}
}

func TestScreenshotWithoutPNG(t *testing.T) {
	m := directKernel(t, "")
	path := filepath.Join(m.Dir, "screen")
	f, err := createAnew(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	vm, err := launch(t.Context(), m, f)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.close()
	go io.Copy(io.Discard, vm.firmwareLog)
	console(t, vm, "memlinux: ready")
	args := map[string]any{"filename": fmt.Sprintf("/dev/fdset/%d", fdsetScreenshot)}
	if _, err := vm.monitor.Run(t.Context(), "screendump", args); err != nil {
		t.Fatal(err)
	}
	if err := ppmToPNG(path); err != nil {
		t.Fatal(err)
	}
	checkScreenshot(t, path)
}

func TestQEMUThatRefusesToStart(t *testing.T) {
	m := directKernel(t, "")
	m.MemoryMiB = 1 << 40 // more than any processor can address
	_, err := Start(t.Context(), m)
	if err == nil || !strings.Contains(err.Error(), "exit status") {
		t.Errorf("error %v", err)
	}
	checkFolder(t, m.Dir)
}

// TestProbeKVM shows only that the probe comes to an end, and leaves nothing.
func TestProbeKVM(t *testing.T) {
	needQEMU(t)
	begin := time.Now()
	works := probeKVM(t.Context(), nil)
	if d := time.Since(begin); d > kvmProbeLimit+2*time.Second {
		t.Errorf("the probe took %v", d)
	}
	t.Logf("KVM works: %v", works)
	checkNoQEMU(t)
}

// TestKilledParentTakesQEMUAlong kills a daemon in the middle of a machine's
// life, when it has no chance to clean up.
func TestKilledParentTakesQEMUAlong(t *testing.T) {
	m := directKernel(t, "")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childVariable+"="+m.Dir)
	cmd.ExtraFiles = []*os.File{m.Kernel, m.Initrd}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if err := json.Unmarshal([]byte(line), &pid); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, 0); err != nil {
		t.Fatalf("QEMU %d does not run: %v", pid, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); alive(pid); time.Sleep(20 * time.Millisecond) {
		if time.Since(begin) > 5*time.Second {
			t.Fatalf("QEMU %d outlives its parent", pid)
		}
	}
	checkFolder(t, m.Dir)
}

// alive says whether pid runs; a zombie that nobody reaps does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

// runChild starts a machine, prints QEMU's process ID, and waits to be killed.
func runChild(dir string) {
	m := Machine{Firmware: BIOS, Dir: dir, Append: testAppend, Kernel: os.NewFile(3, "kernel"), Initrd: os.NewFile(4, "initrd")}
	vm, err := Start(context.Background(), m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(vm.process.pid)
	select {}
}

// TestGuestWritesGoToAnUnlinkedOverlay holds the one thing that keeps a guest's
// writes both off the disk and out of sight.
func TestGuestWritesGoToAnUnlinkedOverlay(t *testing.T) {
	m := diskMachine(t, BIOS, USB, garbageDisk(t), 512)
	vm, err := Start(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.close()
	overlay := false
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", vm.process.pid))
	for _, l := range links {
		target, err := os.Readlink(l)
		if err != nil {
			continue
		}
		info := string(read(t, strings.Replace(l, "/fd/", "/fdinfo/", 1)))
		var flags int
		if _, err := fmt.Sscanf(info[strings.Index(info, "flags:"):], "flags:\t%o", &flags); err != nil {
			t.Fatalf("%v in %s", err, info)
		}
		if target == m.Disk.Name() && flags&syscall.O_ACCMODE != syscall.O_RDONLY {
			t.Errorf("QEMU has the disk open with flags %o", flags)
		}
		if strings.HasPrefix(target, m.Dir) && strings.HasSuffix(target, " (deleted)") && flags&syscall.O_ACCMODE == syscall.O_RDWR {
			overlay = true
		}
	}
	if !overlay {
		t.Errorf("no overlay in the scratch folder among %v", links)
	}
	checkFolder(t, m.Dir)
}

// TestFirmwareLogThatNobodyReadsYet guards against a deadlock: a QEMU that
// waits for the log's reader does not answer on its monitor, and before it did
// that nobody reads.
func TestFirmwareLogThatNobodyReadsYet(t *testing.T) {
	m := diskMachine(t, BIOS, USB, garbageDisk(t), 512)
	f, err := createAnew(filepath.Join(m.Dir, "screen"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	vm, err := launch(t.Context(), m, f)
	if err != nil {
		t.Fatal(err)
	}
	defer vm.close()
	time.Sleep(2 * time.Second) // SeaBIOS writes its 4 KiB in half of that
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := vm.monitor.Run(ctx, "query-status", nil); err != nil {
		t.Error(err)
	}
	if err := vm.firmwareLog.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if log, _ := io.ReadAll(vm.firmwareLog); !bytes.Contains(log, []byte("No bootable device")) {
		t.Errorf("the log is\n%s", log)
	}
}
