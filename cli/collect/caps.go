package collect

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// capNames are the capabilities by their bits (linux/capability.h), without "cap_".
var capNames = strings.Fields(`chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable
	net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct
	sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap
	mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore`)

// CapsText tells a raw security.capability in words, as in
// "cap_net_bind_service,cap_net_raw=ep" (struct vfs_cap_data of
// linux/capability.h; the notation is that of getcap(8) for files that have the
// same flags on all).
func CapsText(raw []byte) string {
	revision, ok := map[int]uint32{12: 0x01000000, 20: 0x02000000, 24: 0x03000000}[len(raw)]
	if !ok || binary.LittleEndian.Uint32(raw)&0xff000000 != revision {
		return fmt.Sprintf("capabilities in an unknown form (%x)", raw)
	}
	var permitted, inheritable uint64
	for i := 0; i*8+12 <= min(len(raw), 20); i++ {
		permitted |= uint64(binary.LittleEndian.Uint32(raw[4+8*i:])) << (32 * i)
		inheritable |= uint64(binary.LittleEndian.Uint32(raw[8+8*i:])) << (32 * i)
	}
	effective := binary.LittleEndian.Uint32(raw)&1 != 0
	sets := map[string][]string{}
	for bit := range 64 {
		flags := ""
		if effective && (permitted|inheritable)>>bit&1 != 0 {
			flags = "e"
		}
		if inheritable>>bit&1 != 0 {
			flags += "i"
		}
		if permitted>>bit&1 != 0 {
			flags += "p"
		}
		if flags == "" {
			continue
		}
		name := fmt.Sprint(bit)
		if bit < len(capNames) {
			name = "cap_" + capNames[bit]
		}
		sets[flags] = append(sets[flags], name)
	}
	var words []string
	for _, flags := range []string{"p", "i", "ip", "ep", "ei", "eip"} {
		if len(sets[flags]) > 0 {
			words = append(words, strings.Join(sets[flags], ",")+"="+flags)
		}
	}
	if len(words) == 0 {
		return "no capabilities"
	}
	return strings.Join(words, " ")
}
