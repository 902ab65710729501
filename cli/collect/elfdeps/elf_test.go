package elfdeps

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// spec is an ELF file to be made by hand, without any section header.
type spec struct {
	class          elf.Class
	machine        elf.Machine
	interp, soname string
	needed         []string
	rpath, runpath string
	kind           elf.Type
}

func (s spec) bytes() []byte {
	if s.class == 0 {
		s.class = elf.ELFCLASS64
	}
	if s.machine == 0 {
		s.machine = elf.EM_X86_64
	}
	if s.kind == 0 {
		s.kind = elf.ET_DYN
	}
	const base, headers = 0x400000, 64 + 3*56
	var text bytes.Buffer
	text.WriteByte(0)
	str := func(v string) uint64 {
		at := text.Len()
		text.WriteString(v + "\x00")
		return uint64(at)
	}
	interp := str(s.interp)
	var dyn []elf.Dyn64
	add := func(tag elf.DynTag, v string) {
		if v != "" {
			dyn = append(dyn, elf.Dyn64{Tag: int64(tag), Val: str(v)})
		}
	}
	for _, n := range s.needed {
		add(elf.DT_NEEDED, n)
	}
	add(elf.DT_SONAME, s.soname)
	add(elf.DT_RPATH, s.rpath)
	add(elf.DT_RUNPATH, s.runpath)
	dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_STRTAB), Val: base + headers}, elf.Dyn64{Tag: int64(elf.DT_STRSZ), Val: uint64(text.Len())}, elf.Dyn64{})
	size := uint64(headers + text.Len() + len(dyn)*16)
	progs := []elf.Prog64{
		{Type: uint32(elf.PT_LOAD), Vaddr: base, Filesz: size, Memsz: size},
		{Type: uint32(elf.PT_DYNAMIC), Off: headers + uint64(text.Len()), Filesz: uint64(len(dyn) * 16)},
		{Type: uint32(elf.PT_NULL)},
	}
	if s.interp != "" {
		progs[2] = elf.Prog64{Type: uint32(elf.PT_INTERP), Off: headers + interp, Filesz: uint64(len(s.interp) + 1)}
	}
	h := elf.Header64{Type: uint16(s.kind), Machine: uint16(s.machine), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 3}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(s.class), byte(elf.ELFDATA2LSB), 1
	var out bytes.Buffer
	for _, v := range []any{h, progs, text.Bytes(), dyn} {
		_ = binary.Write(&out, binary.LittleEndian, v)
	}
	return out.Bytes()
}

// write lays files into a new root; one whose value is "-> x" is a symlink.
func root(t *testing.T, files map[string]any) string {
	t.Helper()
	dir := t.TempDir()
	for name, v := range files {
		full := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch v := v.(type) {
		case spec:
			err = os.WriteFile(full, v.bytes(), 0o755)
		case string:
			if to, ok := strings.CutPrefix(v, "-> "); ok {
				err = os.Symlink(to, full)
			} else {
				err = os.WriteFile(full, []byte(v), 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestReadSaysWhatIsWrong(t *testing.T) {
	whole := spec{interp: "/lib64/ld.so", needed: []string{"liba.so"}}.bytes()
	cases := []struct {
		name string
		file []byte
		want string
	}{
		{"a text is no ELF file", []byte("#!/bin/sh\n"), "not an ELF file"},
		{"an empty file neither", nil, "not an ELF file"},
		{"an ARM program", spec{machine: elf.EM_AARCH64}.bytes(), "is for aarch64, and the system is for amd64"},
		{"a 32-bit PC program", spec{class: elf.ELFCLASS32, machine: elf.EM_386}.bytes(), "is for i386, and the system is for amd64"},
		{"an x32 program", spec{class: elf.ELFCLASS32}.bytes(), "is for x32, and the system is for amd64"},
		{"an object file", spec{kind: elf.ET_REL}.bytes(), "is neither a program nor a shared library (ELF type ET_REL)"},
		{"cut off in its header", whole[:40], "ELF: the file is cut off"},
		{"cut off in its program headers", whole[:100], "ELF: the file is cut off"},
		{"cut off in front of its names", whole[:64+3*56], "ELF: the loader's name: it has no end"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Read(bytes.NewReader(c.file)); err == nil || err.Error() != c.want {
				t.Errorf("got %v, want %s", err, c.want)
			}
		})
	}
	if _, err := Read(bytes.NewReader(nil)); !errors.Is(err, ErrNotELF) {
		t.Error(err)
	}
}

func TestRunPathReplacesRPath(t *testing.T) {
	o, err := Read(bytes.NewReader(spec{rpath: "/a", runpath: "/b:$ORIGIN/c"}.bytes()))
	if err != nil || o.RPath != nil || strings.Join(o.RunPath, " ") != "/b $ORIGIN/c" {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestParseConf(t *testing.T) {
	text := "# all\n/usr/lib/x/ # there\n\n  /opt/a b=libc6\nrelative\nhwcap 1 nosegneg\ninclude ld.so.conf.d/*.conf  /etc/more\n/last"
	want := []Directive{{Folder: "/usr/lib/x"}, {Folder: "/opt/a b"}, {Include: "ld.so.conf.d/*.conf"}, {Include: "/etc/more"}, {Folder: "/last"}}
	got := ParseConf(text)
	if len(got) != len(want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("got %v, want %v", got[i], want[i])
		}
	}
}

func TestIncludesInACircleEnd(t *testing.T) {
	dir := root(t, map[string]any{
		"etc/ld.so.conf":     "include ld.so.d/*.conf\n/two",
		"etc/ld.so.d/b.conf": "/one\ninclude /etc/ld.so.conf",
	})
	if got := strings.Join(confFolders(dir, "/etc/ld.so.conf"), " "); got != "/one /two" {
		t.Errorf("got %s", got)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(spec{interp: "/lib64/ld.so", needed: []string{"liba.so", "libb.so"}, soname: "libc.so", rpath: "/a", runpath: "/b"}.bytes())
	f.Add(spec{class: elf.ELFCLASS32}.bytes())
	if b, err := os.ReadFile("/bin/true"); err == nil {
		f.Add(b[:min(len(b), 8192)])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := Read(bytes.NewReader(b))
		if (o == nil) == (err == nil) {
			t.Fatalf("%v, %v", o, err)
		}
		if o != nil && len(o.Needed) > maxDynamic {
			t.Fatal("too many names")
		}
	})
}

func FuzzParseConf(f *testing.F) {
	f.Add("include a*.conf b\n/usr/lib # x\n/x=libc6\nhwcap 0 x\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, d := range ParseConf(text) {
			if (d.Folder == "") == (d.Include == "") || d.Folder != "" && !filepath.IsAbs(d.Folder) {
				t.Fatalf("%+v", d)
			}
		}
	})
}
