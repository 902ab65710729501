package systemd

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/memlinux/memlinux/testvm/need"
)

// What each service may do is judged by systemd itself, from the same table that
// StartTransientUnit gets. exposed are all of its complaints.
func TestExposureOfTheMachinery(t *testing.T) {
	analyze := need.Tool(t, "systemd-analyze", "systemd")
	const limit = "20" // 2.0
	// Of all: they need programs of the system, and its clock may be read.
	always := []string{"DeviceAllow=", "RootDirectory=/RootImage="}
	// To find addresses, and to fetch from them.
	network := []string{"IPAddressDeny=", "PrivateNetwork=", "RestrictAddressFamilies=~AF_(INET|INET6)", "RestrictAddressFamilies=~AF_NETLINK"}
	// Not a user of its own that is gone with it: its files stay. The folders may
	// lie in a home.
	static := []string{"PrivateUsers="}
	// make says who it is.
	make := []string{"SystemCallFilter=~@privileged"}
	folders := []string{"ProtectHome="}
	for name, c := range map[string]struct {
		unit    Unit
		exposed [][]string
	}{
		"QEMU without KVM: but for what it writes and executes": {Unit{Name: "qemu", Memory: 1 << 30, Time: time.Hour, JIT: true}, [][]string{{"MemoryDenyWriteExecute="}}},
		"QEMU with KVM: but for /dev/kvm":                       {Unit{Name: "qemu", Memory: 1 << 30, Time: time.Hour, KVM: true}, [][]string{{"PrivateDevices="}}},
		"grub-mkimage and unpackers":                            {Unit{Name: "grub", Time: time.Minute}, nil},
		"compilers":                                             {Unit{Name: "build", Time: time.Minute, User: 990, Folders: []string{"/var/cache/memlinux/tmp/dir"}}, [][]string{static, folders, make}},
		"apt-get: but for the network":                          {Unit{Name: "fetch", Time: time.Minute, User: 42, Network: true}, [][]string{static, make, network}},
		"what gives files away: but for that": {Unit{Name: "chown", Time: time.Minute, Folders: []string{"/var/cache/memlinux/tmp/dir"}, GiveAway: true}, [][]string{static, folders,
			{"CapabilityBoundingSet=~CAP_(CHOWN|FSETID|SETFCAP)", "CapabilityBoundingSet=~CAP_(DAC_*|FOWNER|IPC_OWNER)", "SystemCallFilter=~@privileged", "User=/DynamicUser="}}},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "memlinux-test.service")
			if err := os.WriteFile(file, []byte(unitFile("/usr/libexec/memlinuxd", append(c.unit.confinement(), lifetime("memlinuxd.service")...))), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(analyze, "security", "--offline=true", "--no-pager", "--threshold="+limit, file)
			cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v:\n%s", err, out)
			}
			var got []string
			for line := range strings.Lines(string(out)) {
				if f := strings.Fields(line); len(f) > 1 && f[0] == "✗" && f[1] != "SupplementaryGroups=" { // of /dev/kvm, where there is one
					got = append(got, f[1])
				}
				if strings.Contains(line, "exposure level") {
					t.Log(strings.TrimSpace(line))
				}
				if strings.Contains(line, "nknown") || strings.Contains(line, "Failed") {
					t.Error(line)
				}
			}
			want := append(slices.Concat(c.exposed...), always...)
			// An address family for descriptors between the program and itself.
			want = append(want, "RestrictAddressFamilies=~AF_UNIX")
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("exposed by\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

// unitFile is the properties as the section [Service] of a unit file.
func unitFile(program string, properties []property) string {
	var b strings.Builder
	fmt.Fprintf(&b, "[Service]\nExecStart=%s\n", program)
	for _, p := range properties {
		if p.text != "" {
			b.WriteString(p.text + "\n")
		}
	}
	return b.String()
}
