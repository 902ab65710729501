// Package filecaps gives files their capabilities where the archive that they
// come in can't: the newc format of an initramfs has no extended attributes,
// and busybox has no program that sets them.
//
// [Program] makes a program, a static ELF executable for x86-64 of a few hundred
// bytes, that knows the files and their capabilities and sets them when it is
// run.
package filecaps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// File is a file and its capabilities.
type File struct {
	Path string // absolute
	Caps []byte // security.capability as the kernel has it: struct vfs_cap_data or vfs_ns_cap_data of linux/capability.h
}

// set is a decoded security.capability.
type set struct {
	effective              bool
	permitted, inheritable uint64 // a bit for each capability
	root                   uint32 // the user that is root in the namespace that they count in; 0 for the machine's
}

// Revisions of the format (linux/capability.h). The first has not been written
// since Linux 2.6.25, and only 32 bits.
const (
	revisionMask  = 0xff000000
	revision1     = 0x01000000
	revision2     = 0x02000000
	revision3     = 0x03000000
	flagEffective = 0x000001

	size2 = 20 // bytes of revision 2
	size3 = 24 // and of revision 3, which adds the user
)

func parse(caps []byte) (set, error) {
	if len(caps) < 4 {
		return set{}, fmt.Errorf("capabilities of %d bytes are too short", len(caps))
	}
	magic := binary.LittleEndian.Uint32(caps)
	want := 0
	switch magic & revisionMask {
	case revision1:
		return set{}, errors.New("the capabilities are in the format of before Linux 2.6.25; set them anew with setcap")
	case revision2:
		want = size2
	case revision3:
		want = size3
	default:
		return set{}, fmt.Errorf("capabilities of the unknown revision %#x", magic&revisionMask)
	}
	if len(caps) != want {
		return set{}, fmt.Errorf("capabilities of revision %d have %d bytes, not %d", magic>>24, want, len(caps))
	}
	if other := magic &^ (revisionMask | flagEffective); other != 0 {
		return set{}, fmt.Errorf("capabilities with the unknown flags %#x", other)
	}
	word := func(i int) uint64 { return uint64(binary.LittleEndian.Uint32(caps[4*i:])) }
	s := set{effective: magic&flagEffective != 0, permitted: word(1) | word(3)<<32, inheritable: word(2) | word(4)<<32}
	if want == size3 {
		s.root = binary.LittleEndian.Uint32(caps[20:])
	}
	return s, nil
}

// names are those of capability.h from 0 on, up to Linux 6.12.
var names = strings.Fields(`chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable
	net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace
	sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control
	setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore`)

// Text is capabilities as getcap(8) prints and setcap(8) takes them, such as
// "cap_net_raw=ep": the letters are for effective, inheritable and permitted,
// and "=" with no name before it speaks of all capabilities.
func Text(caps []byte) (string, error) {
	s, err := parse(caps)
	if err != nil {
		return "", err
	}
	var groups []string
	for _, flags := range []string{"p", "ip", "i"} {
		bits := s.permitted & s.inheritable
		switch flags {
		case "p":
			bits = s.permitted &^ s.inheritable
		case "i":
			bits = s.inheritable &^ s.permitted
		}
		if bits == 0 {
			continue
		}
		if s.effective {
			flags = "e" + flags
		}
		groups = append(groups, strings.Join(list(bits), ",")+"="+flags)
	}
	text := strings.Join(groups, " ")
	if groups == nil {
		text = "="
	}
	if s.root != 0 {
		text += fmt.Sprintf(" [rootid=%d]", s.root)
	}
	return text, nil
}

// list names the capabilities of bits; all that have a name have none.
func list(bits uint64) []string {
	known := uint64(1)<<len(names) - 1
	if bits&known == known {
		return nil
	}
	var l []string
	for i := range 64 {
		switch {
		case bits>>i&1 == 0:
		case i < len(names):
			l = append(l, "cap_"+names[i])
		default:
			l = append(l, strconv.Itoa(i))
		}
	}
	return l
}

// Program is an executable for Linux on x86-64 that gives the files their
// capabilities, in the given order. It ends with status 1 where one of them
// could not be given, and says a line for each on the standard error stream. The
// files must be on a file system with extended attributes: that which an
// initramfs is unpacked into is one where the kernel has CONFIG_TMPFS_XATTR and
// its command line has no root=.
func Program(files []File) ([]byte, error) {
	if len(files) == 0 {
		return nil, errors.New("there is no file to give capabilities to")
	}
	p := program{}
	attribute := p.text("security.capability")
	var table []byte
	for _, f := range files {
		if !strings.HasPrefix(f.Path, "/") || len(f.Path) > 4095 || strings.ContainsRune(f.Path, 0) {
			return nil, fmt.Errorf("capabilities of %q: it is no absolute path", f.Path)
		}
		said, err := Text(f.Caps)
		if err != nil {
			return nil, fmt.Errorf("capabilities of %s: %w", f.Path, err)
		}
		// Other than %q this leaves a path alone that can be printed as it is.
		shown := f.Path
		if q := strconv.Quote(shown); q != `"`+shown+`"` {
			shown = q
		}
		complaint := fmt.Sprintf("memlinux: %s did not get its capabilities, %s\n", shown, said)
		table = binary.LittleEndian.AppendUint64(table, uint64(p.text(f.Path)))
		table = binary.LittleEndian.AppendUint64(table, uint64(p.text(complaint)))
		table = binary.LittleEndian.AppendUint32(table, uint32(len(complaint)))
		table = binary.LittleEndian.AppendUint32(table, uint32(len(f.Caps)))
		table = append(table, f.Caps...)
		table = append(table, make([]byte, size3-len(f.Caps))...)
	}
	table = append(table, make([]byte, recordSize)...)
	return p.link(table, attribute), nil
}

// Addresses and sizes of the program in memory, which is the file as it is.
const (
	base       = 0x400000 // where linkers put a static executable
	headerSize = 64 + 56  // of the file and of its one segment
	recordSize = 48       // of the table: addresses of path and complaint, lengths of complaint and value, value
)

// program is what becomes the executable: headers, code, texts, table.
type program struct {
	texts []byte
}

// text adds s with a zero behind it and returns its address.
func (p *program) text(s string) int {
	at := base + headerSize + len(code) + len(p.texts)
	p.texts = append(append(p.texts, s...), 0)
	return at
}

// code walks the table; 0x11223344 and 0x55667788 stand for the addresses of the
// table and of the attribute's name. The registers of a system call are those of
// syscall(2); setxattr(2), write(2) and exit(2) say the rest.
var code = []byte{
	0xbb, 0x44, 0x33, 0x22, 0x11, //    mov ebx, table
	0x31, 0xed, //                      xor ebp, ebp          the status
	0x48, 0x8b, 0x3b, //          next: mov rdi, [rbx]        the path
	0x48, 0x85, 0xff, //                test rdi, rdi
	0x74, 0x3a, //                      jz end
	0xbe, 0x88, 0x77, 0x66, 0x55, //    mov esi, attribute
	0x48, 0x8d, 0x53, 0x18, //          lea rdx, [rbx+24]     the value
	0x44, 0x8b, 0x53, 0x14, //          mov r10d, [rbx+20]    its length
	0x45, 0x31, 0xc0, //                xor r8d, r8d          no flags
	0xb8, 0xbc, 0x00, 0x00, 0x00, //    mov eax, 188          setxattr
	0x0f, 0x05, //                      syscall
	0x48, 0x85, 0xc0, //                test rax, rax
	0x74, 0x18, //                      jz skip
	0xbd, 0x01, 0x00, 0x00, 0x00, //    mov ebp, 1
	0x48, 0x8b, 0x73, 0x08, //          mov rsi, [rbx+8]      the complaint
	0x8b, 0x53, 0x10, //                mov edx, [rbx+16]     its length
	0xbf, 0x02, 0x00, 0x00, 0x00, //    mov edi, 2            stderr
	0xb8, 0x01, 0x00, 0x00, 0x00, //    mov eax, 1            write
	0x0f, 0x05, //                      syscall
	0x48, 0x83, 0xc3, 0x30, //    skip: add rbx, 48
	0xeb, 0xbe, //                      jmp next
	0x89, 0xef, //                 end: mov edi, ebp
	0xb8, 0x3c, 0x00, 0x00, 0x00, //    mov eax, 60           exit
	0x0f, 0x05, //                      syscall
}

const (
	tableAt     = 1  // offset in code of the table's address
	attributeAt = 16 // and of the attribute's
)

// link makes the file (System V ABI, chapter 4, and its AMD64 supplement).
func (p *program) link(table []byte, attribute int) []byte {
	le := binary.LittleEndian
	text := slices.Clone(code)
	le.PutUint32(text[tableAt:], uint32(base+headerSize+len(code)+len(p.texts)))
	le.PutUint32(text[attributeAt:], uint32(attribute))
	size := uint64(headerSize + len(text) + len(p.texts) + len(table))

	// The file: 64 bits, little-endian, version 1, of System V.
	out := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	out = le.AppendUint16(out, 2)               // executable
	out = le.AppendUint16(out, 62)              // x86-64
	out = le.AppendUint32(out, 1)               // version
	out = le.AppendUint64(out, base+headerSize) // where it begins
	out = le.AppendUint64(out, 64)              // the segments' headers
	out = le.AppendUint64(out, 0)               // no sections
	out = le.AppendUint32(out, 0)               // no flags
	out = le.AppendUint16(out, 64)              // the size of this
	out = le.AppendUint16(out, 56)              // and of a segment's header,
	out = le.AppendUint16(out, 1)               // of which there is one;
	out = le.AppendUint16(out, 64)              // of a section's,
	out = le.AppendUint16(out, 0)               // of which there is none,
	out = le.AppendUint16(out, 0)               // nor one with names
	// The segment: all of the file.
	out = le.AppendUint32(out, 1)    // to be loaded,
	out = le.AppendUint32(out, 4|1)  // read and executed
	out = le.AppendUint64(out, 0)    // from the file's begin
	out = le.AppendUint64(out, base) // to this address
	out = le.AppendUint64(out, base)
	out = le.AppendUint64(out, size)
	out = le.AppendUint64(out, size)
	out = le.AppendUint64(out, 4096) // its alignment
	return slices.Concat(out, text, p.texts, table)
}
