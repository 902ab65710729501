package busybox

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/memlinux/memlinux/testvm/need"
)

// The table that is read from the binary must be what the binary itself says.
func TestInspectAgreesWithTheProgram(t *testing.T) {
	need.File(t, "/bin/busybox", "busybox-static")
	f, err := os.Open("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Inspect(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	list, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Fields(string(list)), got.Applets); diff != "" {
		t.Errorf("applets (-program +ours):\n%s", diff)
	}
	banner, err := exec.Command("/bin/busybox").Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := "BusyBox v" + got.Version + " multi-call"; !strings.HasPrefix(string(banner), want) {
		t.Errorf("version %q, but it says %.60q", got.Version, banner)
	}
}

// tiny is an ELF file of one segment and no code, with data behind it.
func tiny(machine elf.Machine, segment elf.ProgType, data string) []byte {
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	_ = binary.Write(&b, binary.LittleEndian, h)
	_ = binary.Write(&b, binary.LittleEndian, elf.Prog64{Type: uint32(segment), Off: 120, Filesz: uint64(len(data))})
	b.WriteString(data)
	return b.Bytes()
}

func TestInspectRefuses(t *testing.T) {
	good := "--install\x00BusyBox v1.2.3\x00\x00[\x00busybox\x00sh\x00"
	for _, tc := range []struct {
		name string
		file []byte
		want string // in the error; "" for none
	}{
		{"a static one is taken", tiny(elf.EM_X86_64, elf.PT_LOAD, good), ""},
		{"dynamic: names the interpreter and the package", tiny(elf.EM_X86_64, elf.PT_INTERP, "/lib64/ld-linux-x86-64.so.2\x00"), "dynamically linked (interpreter /lib64/ld-linux-x86-64.so.2): memlinux needs a static busybox; apt-get install busybox-static"},
		{"another machine", tiny(elf.EM_AARCH64, elf.PT_LOAD, good), "AARCH64"},
		{"a script", []byte("#!/bin/sh\n"), "not a program"},
		{"empty", nil, "not a program"},
		{"another static program", tiny(elf.EM_X86_64, elf.PT_LOAD, "hello\x00world\x00"), "not a busybox"},
		{"no applets", tiny(elf.EM_X86_64, elf.PT_LOAD, "BusyBox v1\x00"), "no table"},
		{"no installer", tiny(elf.EM_X86_64, elf.PT_LOAD, "BusyBox v1\x00\x00[\x00busybox\x00"), "FEATURE_INSTALLER"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Inspect(bytes.NewReader(tc.file), int64(len(tc.file)))
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
}

func FuzzInspect(f *testing.F) {
	f.Add(tiny(elf.EM_X86_64, elf.PT_LOAD, "--install\x00BusyBox v1.2.3\x00\x00[\x00busybox\x00sh\x00"))
	f.Add(tiny(elf.EM_X86_64, elf.PT_INTERP, "/lib\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if info, err := Inspect(bytes.NewReader(b), int64(len(b))); err == nil && len(info.Applets) == 0 {
			t.Error("taken without applets")
		}
		appletTable(b)
	})
}
