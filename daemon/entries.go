package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/aymanbagabas/go-udiff"
	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/bootloader/bootfs"
	"github.com/memlinux/memlinux/bootloader/install"
	"github.com/memlinux/memlinux/bootloader/local"
	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/jobs"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/testvm"
)

// The phases of jobs on this PC's boot menu.
const (
	phaseCopy = "copy"
	phaseMenu = "menu"
)

// defaultTitle is what an entry is called where nobody names it.
const defaultTitle = "memlinux"

// sessionState is the file that the menu's sessions keep what they must
// remember in.
func (s *Server) sessionState() string { return s.stateDir("boot-menu.json") }

// withMenu runs do with the locked boot menu, and tells the bus what entries
// there are then.
func (s *Server) withMenu(ctx context.Context, report *api.Report, do func(*install.Session) (install.Result, error)) error {
	session, err := install.Open(ctx, local.System{}, s.sessionState())
	if err != nil {
		return err
	}
	defer session.Close()
	res, err := do(session)
	report.Warnings = append(report.Warnings, slices.Concat(session.Warnings, res.Warnings)...)
	if _, readErr := s.readMenu(session.Boot); readErr != nil && err == nil {
		err = readErr
	}
	if err != nil {
		return err
	}
	report.Entry = reportEntry(session.Boot, res)
	return nil
}

// reportEntry says what a change of the menu did.
func reportEntry(b *local.Boot, res install.Result) *api.Entry {
	e := &api.Entry{Loader: b.Name(), ID: res.Entry.ID, Title: res.Entry.Title, Changes: []api.FileChange{},
		Default: res.Entry.ID != "" && res.Ours.Default == res.Entry.ID, Next: res.Entry.ID != "" && res.Ours.Next == res.Entry.ID}
	for _, f := range res.Added {
		e.Changes = append(e.Changes, api.FileChange{Path: filepath.Join(b.Dir, f.Name), Action: api.ActionCreate, Size: f.Size})
	}
	for _, c := range res.Changes {
		e.Changes = append(e.Changes, fileChange(c))
	}
	for _, path := range res.Removed {
		e.Changes = append(e.Changes, api.FileChange{Path: path, Action: api.ActionRemove})
	}
	return e
}

func fileChange(c bootfs.Change) api.FileChange {
	f := api.FileChange{Path: c.Path, Action: api.ActionReplace, Size: int64(len(c.New))}
	old, now := c.Path, c.Path
	switch {
	case c.New == nil:
		f.Action, now = api.ActionRemove, "/dev/null"
	case c.Old == nil:
		f.Action, old = api.ActionCreate, "/dev/null"
	case c.Kind != bootfs.Replace:
		f.Action = api.ActionWrite
	}
	f.Diff = udiff.Unified(old, now, printable(c.Old, c.Kind), printable(c.New, c.Kind))
	return f
}

// printable is a file's content as a diff can show it: what is no text, such as
// an EFI variable, in Go's way of writing bytes.
func printable(content []byte, kind bootfs.Kind) string {
	switch {
	case content == nil:
		return ""
	case kind == bootfs.Variable || !utf8.Valid(content) || strings.ContainsRune(string(content), 0):
		return strconv.QuoteToASCII(string(content)) + "\n"
	}
	return string(content)
}

// readMenu reads the boot menu, and tells the bus what entries of ours are in
// it.
func (s *Server) readMenu(b *local.Boot) (api.BootMenu, error) {
	menu, err := b.Menu()
	if err != nil {
		return api.BootMenu{}, err
	}
	m := api.BootMenu{Loader: b.Name(), Firmware: b.Firmware, Directory: b.Dir, Warnings: menu.Warnings}
	now := map[string]api.BootEntry{}
	for _, e := range menu.Ours.Entries {
		shown := api.BootEntry{ID: e.ID, Title: e.Title, Cmdline: e.Cmdline, Ours: true, Default: e.ID == menu.Ours.Default, Next: e.ID == menu.Ours.Next}
		m.Entries = append(m.Entries, shown)
		now[e.ID] = shown
	}
	for _, e := range menu.Others {
		m.Entries = append(m.Entries, api.BootEntry{Title: e.Title, Default: e.Default, Next: e.Next})
	}
	return m, s.entries.refresh(func() (map[string]api.BootEntry, error) { return now, nil })
}

func (s *Server) bootMenu(c *call) ([]any, error) {
	if err := c.options().end(); err != nil {
		return nil, err
	}
	b, err := local.Find(c.ctx, local.System{})
	if err != nil {
		return nil, err
	}
	m, err := s.readMenu(b)
	if err != nil {
		return nil, err
	}
	return []any{m.Dictionary()}, nil
}

// startMenu begins a job that only changes the menu.
func (s *Server) startMenu(c *call, kind string, do func(context.Context, *install.Session) (install.Result, error)) ([]any, error) {
	if err := c.options().end(); err != nil {
		return nil, err
	}
	return s.start(c, kind, []jobs.Phase{{Name: phaseMenu, Weight: 1}}, nil, func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		report := &api.Report{Kind: kind}
		j.Begin(phaseMenu)
		err := s.withMenu(ctx, report, func(session *install.Session) (install.Result, error) { return do(ctx, session) })
		report.Verified = err == nil
		return report, err
	})
}

func (s *Server) removeEntry(c *call) ([]any, error) {
	id := c.args[0].(string)
	if id == "" {
		return nil, invalidOption("name the entry by its ID; memlinux entries lists them")
	}
	return s.startMenu(c, api.KindRemove, func(ctx context.Context, session *install.Session) (install.Result, error) {
		return session.Remove(ctx, id)
	})
}

func (s *Server) setNextBoot(c *call) ([]any, error) {
	id := c.args[0].(string)
	return s.startMenu(c, api.KindNext, func(ctx context.Context, session *install.Session) (install.Result, error) {
		return session.Next(ctx, id)
	})
}

func (s *Server) rollback(c *call) ([]any, error) {
	return s.startMenu(c, api.KindRollback, func(ctx context.Context, session *install.Session) (install.Result, error) {
		return session.Rollback(ctx)
	})
}

// wishes are an install's options besides those of the system.
type wishes struct {
	title                            string
	next, standard, dryRun, bootTest bool
}

func (s *Server) installEntry(c *call) ([]any, error) {
	o := c.options()
	recipe := s.recipeOf(o)
	w := wishes{
		title:    strings.TrimSpace(stringOr(o, api.OptName, defaultTitle)), // as menus have it
		next:     o.boolean(api.OptNext, false),
		standard: o.boolean(api.OptDefault, false),
		dryRun:   o.boolean(api.OptDryRun, false),
		bootTest: o.boolean(api.OptBootTest, true),
	}
	if w.bootTest {
		wantSerial(o, recipe)
	}
	if w.title == "" {
		o.fail("option %q: an entry needs a title", api.OptName)
	}
	if err := o.end(); err != nil {
		return nil, err
	}
	b, err := s.suitable(c.ctx, &recipe, w)
	if err != nil {
		closeAll(o.files)
		return nil, err
	}
	phases := buildPhases(recipe)
	if !w.dryRun {
		phases = append(phases, jobs.Phase{Name: phaseCopy, Weight: 1}, jobs.Phase{Name: phaseMenu, Weight: 0.5})
		if w.bootTest {
			phases = append(phases, jobs.Phase{Name: bootPhase(testvm.Firmware(b.Firmware)), Weight: 12})
		}
	}
	return s.start(c, api.KindInstall, phases, o.files, s.withCache(func(ctx context.Context, j *jobs.Job) (*api.Report, error) {
		return s.runInstall(ctx, j, recipe, b, w)
	}))
}

// suitable looks, before anything is built, whether this PC can be given such an
// entry. What the recipe leaves open is what this PC has.
func (s *Server) suitable(ctx context.Context, r *imagegen.Recipe, w wishes) (*local.Boot, error) {
	b, err := local.Find(ctx, local.System{})
	if err != nil {
		return nil, err
	}
	const none = "0000000000000000"
	if _, err := install.Preview(b, install.Request{Next: w.next, Default: w.standard, Entry: local.Entry{ID: none, Title: w.title,
		Kernel: "vmlinuz-000000000000", Initrd: "initramfs-000000000000.img", Cmdline: "memlinux.build=" + none}}); err != nil {
		return nil, err
	}
	if w.bootTest && !w.dryRun {
		if b.NoProof != "" {
			return nil, &api.Error{Name: api.ErrVerification, Message: fmt.Sprintf("the new entry can't be tried in a virtual machine: %s; to install it untried, say --no-boot-test", b.NoProof)}
		}
		if err := testvm.Check(testvm.Firmware(b.Firmware)); err != nil {
			return nil, fmt.Errorf("the new entry can't be tried in a virtual machine: %w; to install it untried, say --no-boot-test", err)
		}
	}
	if r.Boot = []string{b.Firmware}; r.RAM == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			return nil, fmt.Errorf("how much memory this PC has: %w", err)
		}
		r.RAM = int64(info.Totalram) * int64(info.Unit)
	}
	return b, nil
}

// runInstall makes the system and its entry in this PC's boot menu.
func (s *Server) runInstall(ctx context.Context, j *jobs.Job, recipe imagegen.Recipe, b *local.Boot, w wishes) (*api.Report, error) {
	report := &api.Report{Kind: api.KindInstall}
	sys, err := s.generate(ctx, j, recipe)
	if err != nil {
		return report, err
	}
	report.System, report.Warnings = reportSystem(sys.Manifest), sys.Warnings
	if err := signedForSecureBoot(b, sys.Kernel.Path); err != nil {
		return report, err
	}
	kernel, initrd := install.PayloadNames(sys.Manifest.Kernel.SHA256, sys.Manifest.Initramfs.SHA256)
	request := install.Request{
		Entry: local.Entry{ID: sys.Manifest.ID, Title: w.title, Kernel: kernel, Initrd: initrd, Cmdline: sys.Manifest.BootLine()},
		Files: []bootfs.Payload{
			{Name: kernel, Source: sys.Kernel.Path, Size: sys.Manifest.Kernel.Size, SHA256: sys.Manifest.Kernel.SHA256},
			{Name: initrd, Source: sys.Initramfs.Path, Size: sys.Manifest.Initramfs.Size, SHA256: sys.Manifest.Initramfs.SHA256},
		},
		Next: w.next, Default: w.standard,
	}
	if w.dryRun {
		res, err := install.Preview(b, request)
		if err != nil {
			return report, err
		}
		report.Warnings = append(report.Warnings, res.Warnings...)
		report.Entry = reportEntry(b, res)
		report.Entry.DryRun = true
		return report, nil
	}
	err = s.withMenu(ctx, report, func(session *install.Session) (install.Result, error) {
		var prove func(context.Context) error
		if w.bootTest {
			prove = func(ctx context.Context) error { return s.proveLocal(ctx, j, report, session.Boot, sys.Manifest) }
		}
		j.Begin(phaseCopy)
		return session.Install(ctx, request, func(done, total int64) {
			j.Progress(done, total)
			if done == total {
				j.Begin(phaseMenu)
			}
		}, prove)
	})
	if err != nil {
		return report, err
	}
	report.Written, report.Verified = true, true
	if !w.bootTest {
		report.Warnings = append(report.Warnings, "not booted in a virtual machine, as was asked for")
	}
	return report, nil
}

// signedForSecureBoot refuses a kernel that this PC's firmware won't let start.
func signedForSecureBoot(b *local.Boot, kernel string) error {
	if !b.SecureBoot {
		return nil
	}
	f, err := os.Open(kernel)
	if err != nil {
		return err
	}
	defer f.Close()
	signed, err := local.SignedKernel(f)
	if err != nil {
		return fmt.Errorf("look for the kernel's signature: %w", err)
	}
	if !signed {
		return &local.UnsupportedError{Reason: "Secure Boot is on, and the kernel is not signed: the firmware would refuse it; use a signed one (--kernel host, or debian:linux-image-amd64), or turn Secure Boot off in the firmware"}
	}
	return nil
}

// proveLocal boots this PC's own disk, under an overlay, through its own boot
// loader into the entry of the system m.
func (s *Server) proveLocal(ctx context.Context, j *jobs.Job, report *api.Report, b *local.Boot, m api.Manifest) error {
	once, err := b.Once(m.ID)
	if err != nil {
		return err
	}
	disk, device, err := s.devices.system.OpenRead(ctx, b.Disk)
	if err != nil {
		return err
	}
	defer disk.Close()
	machine := testvm.Machine{Firmware: testvm.Firmware(b.Firmware), Disk: disk, DiskSize: device.Size, SectorSize: device.LogicalBlockSize, Bus: testvm.AHCI,
		MemoryMiB: max(leastMemory(m, testvm.Firmware(b.Firmware)), s.config().Memory)}
	if device.LogicalBlockSize != 512 {
		machine.Bus = testvm.Virtio // QEMU's AHCI disks have no others
	}
	for _, p := range once.Files {
		patches, err := onDisk(p, b.Volume.Start)
		if err != nil {
			return err
		}
		machine.Patches = append(machine.Patches, patches...)
	}
	for _, v := range slices.Concat(b.Variables, once.Variables) {
		machine.Variables = append(machine.Variables, testvm.Variable(v))
	}
	want := expect(m)
	want.Local = true
	why, err := s.tryBoot(ctx, j, report, machine, want)
	if err != nil {
		return err
	}
	if why != "" {
		return &api.Error{Name: api.ErrVerification, Message: "not installed, and the boot menu is as it was: the new entry did not boot in a virtual machine: " + why}
	}
	return nil
}

// onDisk says where on the disk a file's other content goes. start is that of
// its file system, in bytes.
func onDisk(p local.Patch, start int64) ([]testvm.Patch, error) {
	info, err := os.Stat(p.Path)
	if err != nil {
		return nil, err
	}
	if info.Size() != int64(len(p.New)) {
		return nil, fmt.Errorf("%s has %d bytes, and %d were expected: it was changed meanwhile", p.Path, info.Size(), len(p.New))
	}
	extents, err := bootfs.Extents(p.Path)
	if err != nil {
		return nil, err
	}
	var patches []testvm.Patch
	for _, e := range extents {
		if e.Offset >= int64(len(p.New)) {
			continue
		}
		end := min(e.Offset+e.Length, int64(len(p.New)))
		patches = append(patches, testvm.Patch{Offset: start + e.Physical, Data: p.New[e.Offset:end]})
	}
	return patches, nil
}
