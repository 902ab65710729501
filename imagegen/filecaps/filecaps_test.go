package filecaps

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
	"golang.org/x/sys/unix"
)

// value is a security.capability.
func value(magic uint32, words ...uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, magic)
	for _, w := range words {
		b = binary.LittleEndian.AppendUint32(b, w)
	}
	return b
}

var ping = value(revision2|flagEffective, 1<<13, 0, 0, 0)

func TestText(t *testing.T) {
	for _, tc := range []struct {
		name string
		caps []byte
		want string
	}{
		{"as ping has it", ping, "cap_net_raw=ep"},
		{"permitted, not effective", value(revision2, 1<<13, 0, 0, 0), "cap_net_raw=p"},
		{"above 31", value(revision2|flagEffective, 0, 0, 1<<6, 0), "cap_perfmon=ep"},
		{"sets that differ", value(revision2|flagEffective, 3, 6, 0, 0), "cap_chown=ep cap_dac_override=eip cap_dac_read_search=ei"},
		{"all that there are", value(revision2|flagEffective, 0xffffffff, 0, 0x1ff, 0), "=ep"},
		{"one that has no name yet", value(revision2, 0, 0, 1<<31, 0), "63=p"},
		{"none, which is not the same as no capabilities", value(revision2, 0, 0, 0, 0), "="},
		{"of a container's root", value(revision3|flagEffective, 1, 0, 0, 0, 100000), "cap_chown=ep [rootid=100000]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, err := Text(tc.caps); err != nil || got != tc.want {
				t.Errorf("%q, %v, want %q", got, err, tc.want)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	for _, tc := range []struct {
		name string
		file File
		want string
	}{
		{"nothing", File{"/a", nil}, "too short"},
		{"not even a magic number", File{"/a", []byte{1, 0, 0}}, "too short"},
		{"the first revision", File{"/a", value(revision1, 1, 0)}, "setcap"},
		{"a revision to come", File{"/a", value(0x04000000, 0, 0, 0, 0)}, "unknown revision 0x4000000"},
		{"too short", File{"/a", ping[:16]}, "have 20 bytes, not 16"},
		{"revision 3 without its user", File{"/a", value(revision3, 1, 0, 0, 0)}, "revision 3 have 24 bytes, not 20"},
		{"flags that nobody knows", File{"/a", value(revision2|2, 1, 0, 0, 0)}, "unknown flags 0x2"},
		{"a relative path", File{"a", ping}, "no absolute path"},
		{"a path that would end early", File{"/a\x00b", ping}, "no absolute path"},
		{"a path longer than the kernel reads", File{"/" + strings.Repeat("a", 4095), ping}, "no absolute path"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := Program([]File{tc.file}); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
	if _, err := Program(nil); err == nil {
		t.Error("a program for no file")
	}
}

func write(t *testing.T, dir string, files ...File) string {
	t.Helper()
	b, err := Program(files)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "filecaps")
	if err := os.WriteFile(path, b, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// Whether the headers are right is for other readers to say.
func TestIsGoodELF(t *testing.T) {
	path := write(t, t.TempDir(), File{"/usr/bin/ping", ping})
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC || len(f.Progs) != 1 || f.Progs[0].Flags != elf.PF_R|elf.PF_X || f.Entry != f.Progs[0].Vaddr+headerSize {
		t.Errorf("%+v, %+v", f.FileHeader, f.Progs[0].ProgHeader)
	}
	out, err := exec.Command(need.Tool(t, "readelf", "binutils"), "-hlW", path).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("arning")) || bytes.Contains(out, []byte("rror")) {
		t.Errorf("readelf: %v: %s", err, out)
	}
}

// The code must be what its comments say; a disassembler that reads it from the
// entry on must find each of them, with the jumps where the labels are.
func TestCodeIsWhatItSays(t *testing.T) {
	objdump := need.Tool(t, "objdump", "binutils")
	bin := filepath.Join(t.TempDir(), "code")
	if err := os.WriteFile(bin, code, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(objdump, "-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel", bin).CombinedOutput()
	if err != nil {
		t.Fatalf("objdump: %v: %s", err, out)
	}
	var got []string
	for _, m := range regexp.MustCompile(`(?m)^ +([0-9a-f]+):\t[0-9a-f ]+\t(.*)$`).FindAllSubmatch(out, -1) {
		got = append(got, strings.Join(strings.Fields(string(m[1])+": "+string(m[2])), " "))
	}
	want := []string{
		"0: mov ebx,0x11223344", "5: xor ebp,ebp",
		"7: mov rdi,QWORD PTR [rbx]", "a: test rdi,rdi", "d: je 0x49",
		"f: mov esi,0x55667788", "14: lea rdx,[rbx+0x18]", "18: mov r10d,DWORD PTR [rbx+0x14]", "1c: xor r8d,r8d", "1f: mov eax,0xbc", "24: syscall",
		"26: test rax,rax", "29: je 0x43",
		"2b: mov ebp,0x1", "30: mov rsi,QWORD PTR [rbx+0x8]", "34: mov edx,DWORD PTR [rbx+0x10]", "37: mov edi,0x2", "3c: mov eax,0x1", "41: syscall",
		"43: add rbx,0x30", "47: jmp 0x7",
		"49: mov edi,ebp", "4b: mov eax,0x3c", "50: syscall",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
}

// The real thing: files on a tmpfs, as in an initramfs, and getcap's word for
// what they have then.
func TestRun(t *testing.T) {
	need.Root(t)
	getcap := need.Tool(t, "getcap", "libcap2-bin")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	all := []File{
		{"ping", ping},
		{"with a space", value(revision2|flagEffective, 3, 6, 0, 0)},
		{"every", value(revision2|flagEffective, 0xffffffff, 0, 0x1ff, 0)},
		{"container", value(revision3|flagEffective, 1<<10, 0, 0, 0, 100000)},
	}
	for i := range all {
		all[i].Path = filepath.Join(dir, all[i].Path)
		if err := os.WriteFile(all[i].Path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program := write(t, dir, all...)
	if out, err := exec.Command(program).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("%v: %q", err, out)
	}
	for _, f := range all {
		got := make([]byte, 100)
		n, err := unix.Getxattr(f.Path, "security.capability", got)
		if err != nil || !bytes.Equal(got[:n], f.Caps) {
			t.Errorf("%s: %x, %v", f.Path, got[:max(n, 0)], err)
		}
		out, err := exec.Command(getcap, "-n", f.Path).CombinedOutput()
		text, _ := Text(f.Caps)
		if err != nil || strings.TrimSpace(string(out)) != f.Path+" "+text && f.Path != all[1].Path {
			t.Errorf("getcap says %q, %v; we %q", out, err, text)
		}
	}

	// One that is missing does not keep the others from theirs.
	if err := os.Remove(all[0].Path); err != nil {
		t.Fatal(err)
	}
	if err := unix.Removexattr(all[2].Path, "security.capability"); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(program).CombinedOutput()
	want := fmt.Sprintf("memlinux: %s did not get its capabilities, cap_net_raw=ep\n", all[0].Path)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || string(out) != want {
		t.Errorf("%v, %q, want %q", err, out, want)
	}
	if n, err := unix.Getxattr(all[2].Path, "security.capability", make([]byte, 100)); n != size2 {
		t.Errorf("behind one that is missing: %d bytes, %v", n, err)
	}
}

func FuzzText(f *testing.F) {
	f.Add(ping)
	f.Add(value(revision3, 1, 2, 3, 4, 5))
	f.Add(value(revision1, 1, 2))
	f.Fuzz(func(t *testing.T, caps []byte) {
		text, err := Text(caps)
		if err != nil {
			if _, err := Program([]File{{"/f", caps}}); err == nil {
				t.Errorf("%x has no text and is taken", caps)
			}
			return
		}
		if b, err := Program([]File{{"/f", caps}}); err != nil || !bytes.Contains(b, caps) || !bytes.Contains(b, []byte(text)) {
			t.Errorf("%x, %v", caps, err)
		}
	})
}
