package testvm

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

const kvmDevice = "/dev/kvm"

// kvmProbeLimit bounds the probe guest: SeaBIOS greets in well under a second
// where KVM works.
const kvmProbeLimit = 5 * time.Second

var kvmProbe struct {
	sync.Mutex
	done, works bool
}

// kvmWorks reports whether KVM runs guests here. /dev/kvm may exist, open and
// still not do that (nested virtualization that is half there), so a guest has
// to answer. The answer is kept for the life of the process; an error is that
// of ctx.
func kvmWorks(ctx context.Context, launch Launcher) (bool, error) {
	kvmProbe.Lock()
	defer kvmProbe.Unlock()
	if kvmProbe.done {
		return kvmProbe.works, nil
	}
	works := false
	if cpuinfo, err := os.ReadFile("/proc/cpuinfo"); err == nil && hasVirtualization(string(cpuinfo)) {
		if works = probeKVM(ctx, launch); ctx.Err() != nil {
			return false, ctx.Err()
		}
	}
	kvmProbe.done, kvmProbe.works = true, works
	return works, nil
}

// hasVirtualization looks for Intel's or AMD's processor flag.
func hasVirtualization(cpuinfo string) bool {
	for line := range strings.Lines(cpuinfo) {
		name, value, _ := strings.Cut(line, ":")
		if strings.TrimSpace(name) != "flags" {
			continue
		}
		for flag := range strings.FieldsSeq(value) {
			if flag == "vmx" || flag == "svm" {
				return true
			}
		}
	}
	return false
}

// probeKVM runs a guest of nothing but SeaBIOS, as the real machines are run,
// and waits for its greeting on the debug port.
func probeKVM(ctx context.Context, launch Launcher) bool {
	// Not opened: QEMU may be allowed what we are not.
	if _, err := os.Stat(kvmDevice); err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, kvmProbeLimit)
	defer cancel()
	ours, theirs, err := os.Pipe()
	if err != nil {
		return false
	}
	defer ours.Close()
	var fds descriptors
	args := append(append(bareMachine(true), "-vga", "none"), firmwareLogTo(fds.add(theirs))...)
	p, err := spawn(ctx, launch, args, fds.files, Needs{Memory: Machine{}.memoryBound(), File: maxWritten, KVM: true})
	theirs.Close()
	if err != nil {
		return false
	}
	defer p.kill()
	// The pipe ends when QEMU does, and that no later than the limit.
	line, _ := bufio.NewReader(ours).ReadBytes('\n')
	return bytes.Contains(line, []byte("SeaBIOS (version"))
}

// kvmGroups are the groups that an unprivileged QEMU needs to open /dev/kvm:
// the device's own, unless that is root's.
func kvmGroups() []uint32 {
	st, err := os.Stat(kvmDevice)
	if err != nil {
		return nil
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || sys.Gid == 0 || st.Mode().Perm()&0o060 != 0o060 {
		return nil
	}
	return []uint32{sys.Gid}
}
