package local

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/memlinux/memlinux/bootloader/bootfs"
)

var updateBLS = flag.Bool("update-bls", false, "write the golden files of BLS entries anew")

// blsMachine is a machine in a folder.
type blsMachine struct {
	t    *testing.T
	root string
	dir  string // with loader/entries
	kind string
	vol  Volume
}

// newBLSMachine has the files, by their path below the root; those of efivars
// are EFI variables of systemd-boot, by name.
func newBLSMachine(t *testing.T, kind, dir string, files, efivars map[string]string) *blsMachine {
	t.Helper()
	m := &blsMachine{t: t, root: t.TempDir(), kind: kind}
	m.dir = filepath.Join(m.root, dir)
	m.vol = Volume{MountPoint: m.dir, Root: "/", Type: "vfat", Device: "sda1"}
	if err := os.MkdirAll(filepath.Join(m.dir, "loader/entries"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(m.efivars(), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range files {
		m.write(filepath.Join(m.root, name), []byte(data))
	}
	for name, data := range efivars {
		m.setVariable(name, []byte(data))
	}
	return m
}

func (m *blsMachine) efivars() string { return filepath.Join(m.root, "sys/firmware/efi/efivars") }

func (m *blsMachine) setVariable(name string, data []byte) {
	m.write(variablePath(m.efivars(), name, loaderGUID), Variable{Attributes: keptVariable, Data: data}.file())
}

func (m *blsMachine) write(path string, data []byte) {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		m.t.Fatal(err)
	}
}

func (m *blsMachine) loader() Loader {
	m.t.Helper()
	l, err := newBLS(&Boot{Dir: filepath.Join(m.dir, "memlinux"), Volume: m.vol}, m.dir, m.kind, m.efivars())
	if err != nil {
		m.t.Fatal(err)
	}
	return l
}

func (m *blsMachine) menu() Menu {
	m.t.Helper()
	menu, err := m.loader().Menu()
	if err != nil {
		m.t.Fatal(err)
	}
	return menu
}

// files is all that the machine has.
func (m *blsMachine) files() map[string]string {
	m.t.Helper()
	all := map[string]string{}
	if err := filepath.WalkDir(m.root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			data, errRead := os.ReadFile(path)
			all[strings.TrimPrefix(path, m.root)], err = string(data), errRead
		}
		return err
	}); err != nil {
		m.t.Fatal(err)
	}
	return all
}

// want gives the machine what is wanted, step by step, with its payload. After
// each step what is to boot must be there, and was or will be what is chosen.
func (m *blsMachine) want(want Ours) []bootfs.Change {
	m.t.Helper()
	for _, e := range want.Entries {
		m.write(filepath.Join(m.dir, "memlinux", e.Kernel), []byte("kernel"))
		m.write(filepath.Join(m.dir, "memlinux", e.Initrd), []byte("initramfs"))
	}
	before := m.menu()
	changes, err := m.loader().Plan(want)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, c := range changes {
		old, err := os.ReadFile(c.Path)
		if errors.Is(err, fs.ErrNotExist) {
			old = nil
		} else if err != nil {
			m.t.Fatal(err)
		}
		if (c.Old == nil) != (old == nil) || !bytes.Equal(c.Old, old) {
			m.t.Fatalf("%s is %q, but the plan says it is %q", c.Path, old, c.Old)
		}
		switch {
		case c.Kind == bootfs.InPlace && len(c.Old) != len(c.New):
			m.t.Fatalf("%s changes its length", c.Path)
		case c.New == nil:
			if err := os.Remove(c.Path); err != nil {
				m.t.Fatal(err)
			}
		default:
			m.write(c.Path, c.New)
		}
		now := m.menu()
		for _, id := range []string{now.Ours.Default, now.Ours.Next} {
			if id != "" && !slices.Contains([]string{before.Ours.Default, before.Ours.Next, want.Default, want.Next}, id) {
				m.t.Errorf("after %s %s would boot, which nobody asked for", c.Path, id)
			}
		}
		if before.Ours.Default == "" && want.Default == "" {
			if diff := cmp.Diff(before.Others, now.Others, cmpopts.IgnoreFields(Other{}, "Next")); diff != "" {
				m.t.Errorf("after %s the others differ (-before +now)\n%s", c.Path, diff)
			}
		}
	}
	got := m.menu().Ours
	sortEntries := cmpopts.SortSlices(func(a, b Entry) bool { return a.ID < b.ID })
	if diff := cmp.Diff(want, got, sortEntries, cmpopts.EquateEmpty()); diff != "" {
		m.t.Errorf("(-want +got)\n%s", diff)
	}
	if again, err := m.loader().Plan(got); err != nil || len(again) > 0 {
		m.t.Errorf("the same again: %v, %v", again, err)
	}
	return changes
}

// text is data as the loader keeps strings.
func text(s string) string { return string(encodeUTF16(s)) }

func texts(list ...string) string {
	var all []byte
	for _, s := range list {
		all = append(all, encodeUTF16(s)...)
	}
	return string(all)
}

func features(bits uint64) string { return string(binary.LittleEndian.AppendUint64(nil, bits)) }

// sdBoot252 is what systemd-boot 252 says that it can do.
var sdBoot252 = features(0x7ff)

func ourEntry(n int) Entry {
	id := fmt.Sprintf("%016x", 0xa1b2c3d4e5f60000+uint64(n))
	return Entry{
		ID: id, Title: fmt.Sprintf("memlinux %d, \"quoted\" und schön", n),
		Kernel: "vmlinuz-0123456789ab", Initrd: fmt.Sprintf("initramfs-%012x.img", n),
		Cmdline: "console=tty0 console=ttyS0,115200 memlinux.build=" + id,
	}
}

const archEntry = "title\tArch Linux\r\nlinux /vmlinuz-linux\r\ninitrd /ucode.img\r\ninitrd /initramfs-linux.img\r\n\r\n# the last\r\noptions root=LABEL=root rw\r\n"

var archFiles = map[string]string{
	"efi/loader/loader.conf":                "#timeout 3\n#default 0123-*\n",
	"efi/loader/entries/arch.conf":          archEntry,
	"efi/loader/entries/Arch-fallback.conf": "title Arch Linux\nversion fallback\nlinux /vmlinuz-linux",
	"efi/vmlinuz-linux":                     "",
	"efi/EFI/systemd/systemd-bootx64.efi":   "",
	"efi/loader/entries/auto-mine.conf":     "title not shown\nlinux /vmlinuz-linux\n",
	"efi/loader/entries/.hidden.conf":       "title not shown\nlinux /vmlinuz-linux\n",
	"efi/loader/entries/readme.txt":         "title not shown\nlinux /vmlinuz-linux\n",
}

const fedoraID = "a3f5b8d0c1e24f6f8a9b0c1d2e3f4a5b" // begins with a letter before m

var fedoraFiles = map[string]string{
	"boot/grub2/grub.cfg": "if [ \"${next_entry}\" ] ; then\n   set default=\"${next_entry}\"\n   set next_entry=\n   save_env next_entry\n   set boot_once=true\nelse\n   set default=\"${saved_entry}\"\nfi\ninsmod blscfg\nblscfg\n",
	"boot/grub2/grubenv":  environment("saved_entry=" + fedoraID + "-6.17.4-300.fc43.x86_64"),
	"boot/loader/entries/" + fedoraID + "-6.17.4-300.fc43.x86_64.conf": "title Fedora Linux (6.17.4-300.fc43.x86_64) 43 (Forty Three)\nversion 6.17.4-300.fc43.x86_64\nlinux /vmlinuz-6.17.4-300.fc43.x86_64\ninitrd /initramfs-6.17.4-300.fc43.x86_64.img $tuned_initrd\noptions root=UUID=1 ro rhgb quiet $tuned_params\ngrub_users $grub_users\ngrub_arg --unrestricted\ngrub_class fedora\n",
	"boot/loader/entries/" + fedoraID + "-0-rescue.conf":               "title Fedora Linux (0-rescue)\nversion 0-rescue\nlinux /vmlinuz-0-rescue\n",
}

func environment(lines ...string) string {
	all := grubenvSignature
	for _, line := range lines {
		all += line + "\n"
	}
	return all + strings.Repeat("#", grubenvSize-len(all))
}

func archMachine(t *testing.T) *blsMachine {
	return newBLSMachine(t, systemdBoot, "efi", archFiles, map[string]string{
		"LoaderFeatures": sdBoot252, "LoaderInfo": text("systemd-boot 252.39-1~deb12u2"),
	})
}

func fedoraMachine(t *testing.T) *blsMachine {
	m := newBLSMachine(t, grubBLS, "boot", fedoraFiles, nil)
	m.vol.Type = "ext4"
	return m
}

func TestBLSPlan(t *testing.T) {
	a, b, c := ourEntry(1), ourEntry(2), ourEntry(3)
	renamed := a
	renamed.Title = "another name"
	machines := map[string]func(*testing.T) *blsMachine{
		"systemd-boot": archMachine,
		"systemd-boot, with a default": func(t *testing.T) *blsMachine {
			m := archMachine(t)
			m.setVariable(loaderDefault, encodeUTF16("arch.conf"))
			return m
		},
		"GRUB": fedoraMachine,
		"GRUB, with an empty next_entry": func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.write(filepath.Join(m.dir, "grub2/grubenv"), []byte(environment("boot_success=1", "next_entry=", "saved_entry=x")))
			return m
		},
		"GRUB, without a saved entry": func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.write(filepath.Join(m.dir, "grub2/grubenv"), []byte(environment("kernelopts=a=\\\\b")))
			return m
		},
	}
	for name, machine := range machines {
		for _, tt := range []struct {
			name  string
			steps []Ours
		}{
			{"one", []Ours{{Entries: []Entry{a}}}},
			{"one, as default and next", []Ours{{Entries: []Entry{a}, Default: a.ID, Next: a.ID}}},
			{"the default goes on", []Ours{
				{Entries: []Entry{a, b}, Default: a.ID},
				{Entries: []Entry{a, b}, Default: b.ID},
				{Entries: []Entry{b, c}, Default: c.ID},
				{Entries: []Entry{b, c}},
				{Entries: []Entry{b, c}, Default: b.ID},
			}},
			{"next goes on", []Ours{
				{Entries: []Entry{a, b}, Next: a.ID},
				{Entries: []Entry{a, b}, Next: b.ID},
				{Entries: []Entry{b}, Next: b.ID},
				{Entries: []Entry{b}},
				{Entries: []Entry{a, b}, Next: a.ID},
				{Entries: []Entry{b}},
				{Entries: []Entry{b}, Next: b.ID},
			}},
			{"both, by turns", []Ours{
				{Entries: []Entry{a, b}, Default: a.ID, Next: b.ID},
				{Entries: []Entry{a, b}, Default: b.ID, Next: a.ID},
				{Entries: []Entry{a}, Default: a.ID},
			}},
			{"another title", []Ours{{Entries: []Entry{a}, Default: a.ID}, {Entries: []Entry{renamed}, Default: a.ID}, {Entries: []Entry{a}}}},
		} {
			t.Run(name+"/"+tt.name, func(t *testing.T) {
				m := machine(t)
				before := m.files()
				for _, want := range tt.steps {
					m.want(want)
				}
				m.want(Ours{})
				after := m.files()
				maps.DeleteFunc(after, func(path, _ string) bool {
					return strings.Contains(path, "/memlinux/") // the payload is not the plan's
				})
				if diff := cmp.Diff(before, after); diff != "" {
					t.Errorf("added and removed (-before +after)\n%s", diff)
				}
			})
		}
	}
}

// What a boot leaves behind must not stay behind.
func TestBLSPlanAfterBoot(t *testing.T) {
	a, b := ourEntry(1), ourEntry(2)
	for _, tt := range []struct {
		name    string
		machine func(*testing.T) *blsMachine
		boot    func(*blsMachine)
	}{
		{"systemd-boot", archMachine, func(m *blsMachine) {
			if err := os.Remove(variablePath(m.efivars(), loaderOneShot, loaderGUID)); err != nil {
				m.t.Fatal(err)
			}
		}},
		{"GRUB", fedoraMachine, func(m *blsMachine) {
			path := filepath.Join(m.dir, "grub2/grubenv")
			data, err := os.ReadFile(path)
			if err != nil {
				m.t.Fatal(err)
			}
			env, err := parseGrubenv(data)
			if err != nil {
				m.t.Fatal(err)
			}
			if env, err = env.set("next_entry", ""); err != nil {
				m.t.Fatal(err)
			}
			m.write(path, env.bytes())
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := tt.machine(t)
			before := m.files()
			m.want(Ours{Entries: []Entry{a, b}, Next: a.ID})
			tt.boot(m)
			if got := m.menu().Ours; got.Next != "" || len(got.Entries) != 2 {
				t.Errorf("after the boot: %+v", got)
			}
			m.want(Ours{Entries: []Entry{a, b}})
			m.want(Ours{Entries: []Entry{a, b}, Next: b.ID})
			tt.boot(m)
			m.want(Ours{Entries: []Entry{b}})
			m.want(Ours{})
			after := m.files()
			maps.DeleteFunc(after, func(path, _ string) bool { return strings.Contains(path, "/memlinux/") })
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("(-before +after)\n%s", diff)
			}
		})
	}
}

// Somebody else's later choice is not undone.
func TestBLSForeignChoice(t *testing.T) {
	a := ourEntry(1)
	m := archMachine(t)
	m.setVariable(loaderDefault, encodeUTF16("arch.conf"))
	m.want(Ours{Entries: []Entry{a}, Default: a.ID, Next: a.ID})
	m.setVariable(loaderDefault, encodeUTF16("arch-fallback.conf"))
	m.setVariable(loaderOneShot, encodeUTF16("arch.conf"))
	before := m.files()
	m.want(Ours{Entries: []Entry{a}})
	m.want(Ours{})
	for _, name := range []string{loaderDefault, loaderOneShot} {
		path := strings.TrimPrefix(variablePath(m.efivars(), name, loaderGUID), m.root)
		if m.files()[path] != before[path] {
			t.Errorf("%s was %q and is %q", name, before[path], m.files()[path])
		}
	}

	// A default that is ours by the user's own hand is none before, for us.
	m = archMachine(t)
	m.want(Ours{Entries: []Entry{a}})
	m.setVariable(loaderDefault, encodeUTF16(blsPrefix+a.ID+".conf"))
	if got := m.menu().Ours.Default; got != a.ID {
		t.Errorf("the default is %q", got)
	}
	m.want(Ours{Entries: []Entry{a}})
	if _, ok := m.files()["/sys/firmware/efi/efivars/LoaderEntryDefault-"+loaderGUID]; ok {
		t.Error("the default stays")
	}
}

func TestBLSGolden(t *testing.T) {
	a, b := ourEntry(1), ourEntry(2)
	for name, m := range map[string]*blsMachine{"bls-systemd-boot": archMachine(t), "bls-grub": fedoraMachine(t)} {
		m.setVariable(loaderDefault, encodeUTF16("arch.conf"))
		if m.kind == grubBLS {
			m.vol = Volume{MountPoint: m.root, Root: "/@", Type: "ext4", Device: "sda2"}
		}
		var out strings.Builder
		for _, c := range m.want(Ours{Entries: []Entry{a, b}, Default: a.ID, Next: b.ID}) {
			fmt.Fprintf(&out, "== %s\n", strings.TrimPrefix(c.Path, m.root))
			if c.Kind == bootfs.Variable {
				fmt.Fprintf(&out, "%q\n", c.New)
			} else {
				out.WriteString(strings.TrimRight(string(c.New), "#"))
			}
		}
		golden := filepath.Join("testdata", name+".golden")
		if *updateBLS {
			if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), out.String()); diff != "" {
			t.Errorf("%s (-want +got)\n%s", name, diff)
		}
	}
}

func TestBLSMenu(t *testing.T) {
	debian := func(version string) string {
		return "title Debian GNU/Linux 12 (bookworm)\nversion " + version + "\nmachine-id 1\nsort-key debian\nlinux /vmlinuz-linux\n"
	}
	with := func(extra map[string]string) map[string]string {
		all := maps.Clone(archFiles)
		for name, data := range extra {
			if data == "-" {
				delete(all, name)
			} else {
				all[name] = data
			}
		}
		return all
	}
	arch, fallback := Other{Title: "Arch Linux"}, Other{Title: "Arch Linux (fallback)"}
	booting := func(o Other) Other { o.Default = true; return o }
	next := func(o Other) Other { o.Next = true; return o }
	for _, tt := range []struct {
		name       string
		kind, dir  string
		files, efi map[string]string
		want       Menu
	}{
		{"nothing says what boots: the first", systemdBoot, "efi", archFiles, nil,
			Menu{Others: []Other{booting(arch), fallback}}},
		{"old names come first without sort-key", systemdBoot, "efi", with(map[string]string{
			"efi/loader/entries/zz.conf": "title Z\nlinux /vmlinuz-linux\n"}), nil,
			Menu{Others: []Other{booting(Other{Title: "Z"}), arch, fallback}}},
		{"sort-key before none, the newest first, no tries left last", systemdBoot, "efi", with(map[string]string{
			"efi/loader/entries/1-6.1.0-9.conf":      debian("6.1.0-9"),
			"efi/loader/entries/1-6.1.0-10.conf":     debian("6.1.0-10"),
			"efi/loader/entries/1-6.1.0-12+0-3.conf": debian("6.1.0-12"),
		}), nil, Menu{Others: []Other{booting(Other{Title: "Debian GNU/Linux 12 (bookworm) (6.1.0-10)"}),
			{Title: "Debian GNU/Linux 12 (bookworm) (6.1.0-9)"}, arch, fallback, {Title: "Debian GNU/Linux 12 (bookworm) (6.1.0-12)"}}}},
		{"loader.conf has a pattern, with CRLF and a tab", systemdBoot, "efi", with(map[string]string{
			"efi/loader/loader.conf": "timeout 3\r\ndefault\tARCH-[f]*\r\n"}), nil,
			Menu{Others: []Other{arch, booting(fallback)}}},
		{"loader.conf means an entry that counts its boots", systemdBoot, "efi", with(map[string]string{
			"efi/loader/loader.conf":            "default a.conf\n",
			"efi/loader/entries/a+2-1.conf":     "title A\nlinux /vmlinuz-linux\n",
			"efi/loader/entries/b+2-1.conf.bak": "title not shown\nlinux /vmlinuz-linux\n"}), nil,
			Menu{Others: []Other{arch, fallback, booting(Other{Title: "A"})}}},
		{"the variable wins over loader.conf", systemdBoot, "efi", with(map[string]string{
			"efi/loader/loader.conf": "default arch.conf\n"}), map[string]string{loaderDefault: text("Arch-fallback.conf")},
			Menu{Others: []Other{arch, booting(fallback)}}},
		{"a variable that means nothing does not", systemdBoot, "efi", with(map[string]string{
			"efi/loader/loader.conf": "default arch-fallback.conf\n"}), map[string]string{loaderDefault: text("gone.conf")},
			Menu{Others: []Other{arch, booting(fallback)}}},
		{"the last one booted", systemdBoot, "efi", with(map[string]string{
			"efi/loader/loader.conf": "default @saved\n"}), map[string]string{"LoaderEntryLastBooted": text("arch-fallback.conf")},
			Menu{Others: []Other{arch, booting(fallback)}}},
		{"once, another", systemdBoot, "efi", archFiles, map[string]string{loaderOneShot: text("arch-fallback.conf")},
			Menu{Others: []Other{booting(arch), next(fallback)}}},
		{"what the loader found, and no more what is gone", systemdBoot, "efi", archFiles, map[string]string{
			"LoaderEntries": texts("linux.efi", "arch.conf", "gone.conf", "arch-fallback.conf", "auto-windows", "auto-reboot-to-firmware-setup")},
			Menu{Others: []Other{booting(Other{Title: "linux.efi"}), arch, fallback, {Title: "Windows Boot Manager"}, {Title: "Reboot Into Firmware Interface"}}}},
		{"a loader that names entries without .conf", systemdBoot, "efi", archFiles, map[string]string{
			"LoaderEntries": texts("arch", "arch-fallback"), loaderDefault: text("arch-fallback")},
			Menu{Others: []Other{arch, booting(fallback)}}},
		{"entries on XBOOTLDR, loader.conf and others on the ESP", systemdBoot, "boot", with(map[string]string{
			"boot/loader/entries/1-6.1.0-9.conf": debian("6.1.0-9"), "boot/vmlinuz-linux": "",
			"efi/loader/loader.conf": "default arch.conf"}), nil,
			Menu{Others: []Other{{Title: "Debian GNU/Linux 12 (bookworm)"}, booting(arch), fallback}}},
		{"what the loader leaves out", systemdBoot, "efi", with(map[string]string{
			"efi/loader/entries/a.conf": "title A\noptions x\n", "efi/loader/entries/b.conf": "title B\nlinux /gone\n"}), nil,
			Menu{Others: []Other{booting(arch), fallback}, Warnings: []string{
				"ROOT/efi/loader/entries/a.conf names nothing to boot: the loader leaves it out",
				"ROOT/efi/loader/entries/b.conf names /gone, which is not there: the loader leaves it out"}}},
		{"ours with loader.conf's pattern for it", systemdBoot, "efi", with(map[string]string{
			"efi/loader/loader.conf":                              "default _-memlinux-*\n",
			"efi/loader/entries/_-memlinux-0123456789abcdef.conf": "title T\nlinux /memlinux/k\ninitrd /memlinux/i\noptions o\n", "efi/memlinux/k": ""}), nil,
			Menu{Ours: Ours{Entries: []Entry{{ID: "0123456789abcdef", Title: "T", Kernel: "k", Initrd: "i", Cmdline: "o"}}, Default: "0123456789abcdef"},
				Others: []Other{arch, fallback}}},
		{"an entry without a title", systemdBoot, "efi", with(map[string]string{
			"efi/loader/entries/arch.conf": "-", "efi/loader/entries/Arch-fallback.conf": "linux /vmlinuz-linux"}), nil,
			Menu{Others: []Other{{Title: "Arch-fallback.conf", Default: true}}}},
		{"no entries", systemdBoot, "efi", nil, nil, Menu{}},
		{"Fedora", grubBLS, "boot", fedoraFiles, nil,
			Menu{Others: []Other{{Title: "Fedora Linux (6.17.4-300.fc43.x86_64) 43 (Forty Three)", Default: true}, {Title: "Fedora Linux (0-rescue)"}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newBLSMachine(t, tt.kind, tt.dir, tt.files, tt.efi)
			got := m.menu()
			for i := range got.Warnings {
				got.Warnings[i] = strings.ReplaceAll(got.Warnings[i], m.root, "ROOT")
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestBLSRefuses(t *testing.T) {
	a := ourEntry(1)
	entry := func(change func(*Entry)) Ours {
		e := a
		change(&e)
		return Ours{Entries: []Entry{e}}
	}
	for _, tt := range []struct {
		name    string
		machine func(*testing.T) *blsMachine
		want    Ours
		says    string
	}{
		{"a title of two lines", archMachine, entry(func(e *Entry) { e.Title = "a\nlinux /b" }), `'\n'`},
		{"a title with a control character", archMachine, entry(func(e *Entry) { e.Title = "a\x1bb" }), `'\x1b'`},
		{"a title that turns the text around", archMachine, entry(func(e *Entry) { e.Title = "a\u202eb" }), `'\u202e'`},
		{"a title that the firmware has no letters for", archMachine, entry(func(e *Entry) { e.Title = "😀" }), "title"},
		{"a title in no encoding", archMachine, entry(func(e *Entry) { e.Title = "a\xff" }), "UTF-8"},
		{"an empty title", archMachine, entry(func(e *Entry) { e.Title = "" }), "empty"},
		{"a title in quotes", archMachine, entry(func(e *Entry) { e.Title = `"a"` }), "quotes"},
		{"a title with a blank behind it", archMachine, entry(func(e *Entry) { e.Title = "a " }), "blank"},
		{"a command line of two lines", archMachine, entry(func(e *Entry) { e.Cmdline = "a\rinitrd /b" }), `'\r'`},
		{"a command line with a tab", archMachine, entry(func(e *Entry) { e.Cmdline = "a\tb" }), `'\t'`},
		{"a command line with a NUL", archMachine, entry(func(e *Entry) { e.Cmdline = "a\x00b" }), `'\x00'`},
		{"a command line in quotes", archMachine, entry(func(e *Entry) { e.Cmdline = `"a" "b"` }), "quotes"},
		{"no command line", archMachine, entry(func(e *Entry) { e.Cmdline = "" }), "empty"},
		{"a command line longer than Linux reads", archMachine, entry(func(e *Entry) { e.Cmdline = strings.Repeat("x", 2000) }), "too long"},
		{"a command line that GRUB would run", fedoraMachine, entry(func(e *Entry) { e.Cmdline = "a;reboot" }), ";"},
		{"a command line with GRUB's variable", fedoraMachine, entry(func(e *Entry) { e.Cmdline = "a=$root" }), "$"},
		{"a command line with quotes, for GRUB", fedoraMachine, entry(func(e *Entry) { e.Cmdline = `a="b c" d` }), `"`},
		{"a command line with GRUB's comment", fedoraMachine, entry(func(e *Entry) { e.Cmdline = "a #b" }), "#"},
		{"next, without a word of what the loader can", func(t *testing.T) *blsMachine {
			return newBLSMachine(t, systemdBoot, "efi", archFiles, nil)
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "another loader"},
		{"next, with a loader that can't", func(t *testing.T) *blsMachine {
			return newBLSMachine(t, systemdBoot, "efi", archFiles, map[string]string{"LoaderFeatures": features(0x1f7)})
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "bootctl update"},
		{"next, without EFI variables", func(t *testing.T) *blsMachine {
			m := archMachine(t)
			if err := os.RemoveAll(m.efivars()); err != nil {
				t.Fatal(err)
			}
			return m
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "efivarfs"},
		{"next, which is another's already", func(t *testing.T) *blsMachine {
			m := archMachine(t)
			m.setVariable(loaderOneShot, encodeUTF16("arch.conf"))
			return m
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "arch.conf"},
		{"default, with a loader that can't", func(t *testing.T) *blsMachine {
			return newBLSMachine(t, systemdBoot, "efi", archFiles, map[string]string{"LoaderFeatures": features(0x1fb)})
		}, Ours{Entries: []Entry{a}, Default: a.ID}, "loader.conf"},
		{"an old loader that would boot ours by itself", func(t *testing.T) *blsMachine {
			return newBLSMachine(t, systemdBoot, "efi", archFiles, map[string]string{"LoaderFeatures": features(0x7f)})
		}, Ours{Entries: []Entry{a}}, "bootctl set-default"},
		{"GRUB can't write its environment on btrfs", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.vol.Type = "btrfs"
			return m
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "again and again"},
		{"GRUB can't write its environment on LVM", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.vol.Device = ""
			return m
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "again and again"},
		{"GRUB has no environment", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			if err := os.Remove(filepath.Join(m.dir, "grub2/grubenv")); err != nil {
				t.Fatal(err)
			}
			return m
		}, Ours{Entries: []Entry{a}, Default: a.ID}, "grub2-editenv"},
		{"GRUB's environment is broken", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.write(filepath.Join(m.dir, "grub2/grubenv"), []byte("x"))
			return m
		}, Ours{Entries: []Entry{a}}, "1024"},
		{"GRUB's menu knows no next entry", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.write(filepath.Join(m.dir, "grub2/grub.cfg"), []byte("set default=\"0\"\nblscfg\n"))
			return m
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "grub2-mkconfig"},
		{"GRUB's default is not saved", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.write(filepath.Join(m.dir, "grub2/grub.cfg"), []byte("set default=\"0\"\nblscfg\n"))
			return m
		}, Ours{Entries: []Entry{a}, Default: a.ID}, "GRUB_DEFAULT=saved"},
		{"GRUB's default is a number that would be ours", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.write(filepath.Join(m.dir, "grub2/grubenv"), []byte(environment("saved_entry=2")))
			return m
		}, Ours{Entries: []Entry{a}}, "grub2-set-default"},
		{"GRUB's next entry is another's already", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.write(filepath.Join(m.dir, "grub2/grubenv"), []byte(environment("next_entry=memtest")))
			return m
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "memtest"},
		{"GRUB's environment is full", func(t *testing.T) *blsMachine {
			m := fedoraMachine(t)
			m.write(filepath.Join(m.dir, "grub2/grubenv"), []byte(environment("x="+strings.Repeat("y", 990))))
			return m
		}, Ours{Entries: []Entry{a}, Next: a.ID}, "no room"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := tt.machine(t)
			changes, err := m.loader().Plan(tt.want)
			var unsupported *UnsupportedError
			if !errors.As(err, &unsupported) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v, %v; want an UnsupportedError that says %s", changes, err, tt.says)
			}
		})
	}
	for name, want := range map[string]Ours{
		"an ID that is none":          entry(func(e *Entry) { e.ID = "x" }),
		"a payload outside":           entry(func(e *Entry) { e.Kernel = "../vmlinuz" }),
		"no initramfs":                entry(func(e *Entry) { e.Initrd = "" }),
		"twice the same":              {Entries: []Entry{a, a}},
		"a default that is not there": {Entries: []Entry{a}, Default: ourEntry(2).ID},
		"a next that is not there":    {Next: a.ID},
	} {
		if changes, err := archMachine(t).loader().Plan(want); err == nil {
			t.Errorf("%s: %v", name, changes)
		}
	}
	if _, err := newBLS(&Boot{}, t.TempDir(), systemdBoot, ""); err == nil {
		t.Error("a folder without loader/entries was taken")
	}
}

// An old loader is told by others' choices, and by ours where we are asked to be
// the default.
func TestBLSOldLoader(t *testing.T) {
	a := ourEntry(1)
	old := func(t *testing.T) *blsMachine {
		return newBLSMachine(t, systemdBoot, "efi", archFiles, map[string]string{
			"LoaderFeatures": features(0x7f), "LoaderEntries": texts("arch-fallback", "arch"), loaderDefault: text("arch")})
	}
	m := old(t)
	m.want(Ours{Entries: []Entry{a}, Default: a.ID, Next: a.ID})
	v, err := readVariable(m.efivars(), loaderDefault, loaderGUID)
	if err != nil || v == nil {
		t.Fatal(v, err)
	}
	if got, _ := decodeUTF16(v.Data); got != blsPrefix+a.ID {
		t.Errorf("the default is %q", got)
	}
}

func TestBLSOnce(t *testing.T) {
	a := ourEntry(1)
	m := archMachine(t)
	m.want(Ours{Entries: []Entry{a}})
	once, err := m.loader().Once(a.ID)
	if err != nil {
		t.Fatal(err)
	}
	name := blsPrefix + a.ID + ".conf"
	want := Once{Variables: []Variable{
		{loaderOneShot, loaderGUID, 7, encodeUTF16(name)},
		{loaderDefault, loaderGUID, 7, encodeUTF16(name)},
		{"LoaderConfigTimeout", loaderGUID, 7, encodeUTF16("0")},
	}}
	if diff := cmp.Diff(want, once); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if _, err := m.loader().Once(ourEntry(2).ID); err == nil {
		t.Error("an entry that is not there")
	}

	m = fedoraMachine(t)
	m.want(Ours{Entries: []Entry{a}})
	if once, err = m.loader().Once(a.ID); err != nil {
		t.Fatal(err)
	}
	if len(once.Files) != 1 || once.Files[0].Path != filepath.Join(m.dir, "grub2/grubenv") || len(once.Files[0].New) != grubenvSize {
		t.Fatalf("%+v", once)
	}
	env, err := parseGrubenv(once.Files[0].New)
	if err != nil {
		t.Fatal(err)
	}
	if next, _ := env.get("next_entry"); next != blsPrefix+a.ID {
		t.Errorf("next_entry is %q", next)
	}
}
