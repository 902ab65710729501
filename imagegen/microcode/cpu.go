package microcode

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
)

// HostCPUs are the kinds of processor of the machine whose proc/cpuinfo and
// sys/devices/system/cpu root has; each once. Where the kernel does not tell an
// Intel processor's platform, as under a hypervisor, its Flags are 0.
func HostCPUs(root fs.FS) ([]CPU, error) {
	f, err := root.Open("proc/cpuinfo")
	if err != nil {
		return nil, fmt.Errorf("find out the processor: %w", err)
	}
	defer f.Close()
	cpus, err := parseCPUInfo(f)
	if err != nil {
		return nil, fmt.Errorf("find out the processor: proc/cpuinfo: %w", err)
	}
	// All processors of a machine are on one platform.
	flags := uint32(0)
	if b, err := fs.ReadFile(root, "sys/devices/system/cpu/cpu0/microcode/processor_flags"); err == nil {
		n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 32)
		if err != nil {
			return nil, fmt.Errorf("find out the processor: processor_flags is %q", b)
		}
		flags = uint32(n)
	}
	for i := range cpus {
		if cpus[i].Vendor == Intel {
			cpus[i].Flags = flags
		}
	}
	return cpus, nil
}

// parseCPUInfo reads proc/cpuinfo: a paragraph of lines "name : value" for each
// processor.
func parseCPUInfo(r io.Reader) ([]CPU, error) {
	var cpus []CPU
	fields := map[string]string{}
	take := func() error {
		if len(fields) == 0 {
			return nil
		}
		c := CPU{Vendor: Vendor(fields["vendor_id"])}
		var err error
		number := func(name string) uint32 {
			n, nerr := strconv.ParseUint(fields[name], 10, 12)
			if nerr != nil && err == nil {
				err = fmt.Errorf("%s is %q", name, fields[name])
			}
			return uint32(n)
		}
		c.Signature = signature(number("cpu family"), number("model"), number("stepping"))
		clear(fields)
		if err == nil && !slices.Contains(cpus, c) {
			cpus = append(cpus, c)
		}
		return err
	}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		name, value, found := strings.Cut(s.Text(), ":")
		if !found {
			if err := take(); err != nil {
				return nil, err
			}
			continue
		}
		fields[strings.TrimSpace(name)] = strings.TrimSpace(value)
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if err := take(); err != nil {
		return nil, err
	}
	if len(cpus) == 0 {
		return nil, errors.New("no processor is in it")
	}
	return cpus, nil
}

// signature is EAX of CPUID leaf 1 (Intel SDM vol. 2A, CPUID, "Version
// Information"; AMD's CPUID specification §2): family and model have an
// extended part there, which Linux has added up.
func signature(family, model, stepping uint32) uint32 {
	s := stepping&0xf | model&0xf<<4 | model>>4&0xf<<16
	if family > 0xf {
		return s | 0xf<<8 | (family-0xf)&0xff<<20
	}
	return s | family<<8
}
