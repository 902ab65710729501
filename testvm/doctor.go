package testvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// versionLimit bounds how long QEMU may take to tell its version.
const versionLimit = 30 * time.Second

// Version starts QEMU, as machines are run: first for its version, as in
// "8.2.0", then for a guest that is nothing but firmware. The error is a
// [*MissingError], or says how QEMU failed.
func Version(ctx context.Context) (string, error) {
	if err := Check(BIOS); err != nil {
		return "", err
	}
	cred, err := credential(nil)
	if err != nil {
		return "", err
	}
	limited, cancel := context.WithTimeout(ctx, versionLimit)
	defer cancel()
	cmd := exec.CommandContext(limited, qemuProgram, "--version")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: cred}
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return "", fmt.Errorf("%s does not start: %w", qemuProgram, err)
	}
	if !probeGuest(ctx, false) {
		return "", errors.Join(fmt.Errorf("%s starts, and a machine in it does not", qemuProgram), ctx.Err())
	}
	if v := regexp.MustCompile(`version ([0-9][0-9.]*)`).FindSubmatch(out); v != nil {
		return string(v[1]), nil
	}
	return "unknown", nil
}

// KVM says why machines can't use the processor's virtualization here, and so
// take several times as long; "" where they do. The error is that of ctx.
func KVM(ctx context.Context) (why string, err error) {
	works, err := kvmWorks(ctx)
	if works || err != nil {
		return "", err
	}
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !hasVirtualization(string(cpuinfo)) {
		return "the processor has no virtualization, or the firmware or the hypervisor above keeps it back", nil
	}
	if _, err := os.Stat(kvmDevice); err != nil {
		return kvmDevice + " is missing: the kernel module kvm-intel or kvm-amd is not loaded", nil
	}
	return kvmDevice + " is there, and a machine that uses it does not start", nil
}
