package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Boot is how this machine boots.
type Boot struct {
	Loader
	Dir        string     // where payload goes, absolute: /boot/memlinux, /efi/memlinux; made by the first install
	Volume     Volume     // the file system that Dir lies on
	Firmware   string     // "bios" or "uefi"
	SecureBoot bool       // the firmware enforces it
	Disk       string     // kernel name (sda) of the one whole disk that firmware, loader and Dir all start from; "" where there is none
	NoProof    string     // why this PC's boot can't be tried in a virtual machine; "" where it can
	Variables  []Variable // UEFI: what the firmware's copy needs to start the same loader
}

// System is the machine to look at. All is read below Root, and every path that
// is found includes it; "" is the running machine.
type System struct {
	Root string
	// blkid says what lies on a device, as blkid -p -o export does. Nil is that
	// program.
	blkid func(ctx context.Context, device string) (map[string]string, error)
}

// The loaders that boot sectors, the firmware and files tell of.
const (
	loaderGRUB2       = "GRUB 2"
	loaderLegacy      = "GRUB Legacy"
	loaderSystemdBoot = systemdBoot
)

// finder is one look at a machine.
type finder struct {
	ctx      context.Context // of the one call of Find that makes it
	sys      System
	mounts   []mount
	uefi     bool
	efivars  string
	evidence evidence
	// unmounted is the EFI System Partition's place, where fstab has one that is
	// not mounted. GRUB 2 often needs nothing of it.
	unmounted string
}

// evidence is what the firmware or the disk say about the boot loader.
type evidence struct {
	loader string      // one of the loaders, another's name, or "": nothing is known
	from   string      // what says so, for a person
	disk   string      // BIOS: the disk with the boot sector
	option *loadOption // UEFI: what the firmware started
	esp    *place      // UEFI: the partition that the loader started from, where it is mounted
	dir    string      // UEFI: the folder that the loader started from, as it is mounted; or ""
	onDisk string      // UEFI: the disk of that partition, mounted or not
	silent bool        // UEFI: the loader has left no LoaderInfo, as systemd-boot always does
}

// configuration is a boot loader's menu.
type configuration struct {
	loader string
	path   string // for a person
	dir    string // GRUB 2: of grub.cfg; GRUB Legacy: of the menu; systemd-boot: with loader/entries
	menu   string // GRUB Legacy: the menu, symbolic links resolved
	// fedora says that grub.cfg shows the entries below loader/entries.
	fedora bool
}

// Find looks at the machine: what booted it, by the firmware's and the boot
// sector's word first, and where that loader's menu is. The error is an
// *[UnsupportedError] with the reason and the way out where memlinux can't add
// an entry: no boot loader, several of them, one that it does not know, or /boot
// not mounted.
func Find(ctx context.Context, sys System) (*Boot, error) {
	if sys.blkid == nil {
		sys.blkid = runBlkid
	}
	f := &finder{ctx: ctx, sys: sys}
	b, err := f.find()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return b, err
}

// path is a path of the machine below Root.
func (f *finder) path(elem ...string) string {
	return filepath.Join(append([]string{f.sys.Root, "/"}, elem...)...)
}

func (f *finder) find() (*Boot, error) {
	for _, dir := range []string{"boot", "efi", "boot/efi"} {
		// An automount takes place when somebody looks.
		if d, err := os.Open(f.path(dir, ".")); err == nil {
			_, _ = d.Readdirnames(1)
			d.Close()
		}
	}
	data, err := os.ReadFile(f.path("proc/self/mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("read the mounted file systems: %w", err)
	}
	if f.mounts, err = parseMounts(data); err != nil {
		return nil, fmt.Errorf("read the mounted file systems: %w", err)
	}
	if st, err := os.Stat(f.path("sys/firmware/efi")); err == nil && st.IsDir() {
		f.uefi, f.efivars = true, f.path("sys/firmware/efi/efivars")
	}
	if err := f.bootMounted(); err != nil {
		return nil, err
	}
	boot, err := f.place(f.path("boot"))
	if err != nil {
		return nil, err
	}
	if f.uefi {
		err = f.askFirmware()
	} else {
		f.askDisk(boot)
	}
	if err != nil {
		return nil, err
	}
	c, err := f.choose()
	if err != nil {
		return nil, err
	}
	return f.boot(c, boot)
}

// bootMounted refuses a /boot that fstab has and that is not mounted: what lies
// in the folder then is hidden from the boot loader.
func (f *finder) bootMounted() error {
	points := []string{"/boot"}
	if f.uefi {
		points = append(points, "/efi", "/boot/efi")
	}
	fstab, err := os.ReadFile(f.path("etc/fstab"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read fstab: %w", err)
	}
	for line := range strings.Lines(string(fstab)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || strings.HasPrefix(fields[0], "#") || !slices.Contains(points, path.Clean(fields[1])) {
			continue
		}
		point := path.Clean(fields[1])
		switch {
		case slices.ContainsFunc(f.mounts, func(m mount) bool { return m.point == point && m.kind != "autofs" }):
		case point == "/boot":
			return notMounted(point)
		default:
			f.unmounted = point
		}
	}
	return nil
}

func notMounted(point string) error {
	return unsupported("%s is not mounted, but /etc/fstab has it: run mount %s, and again", point, point)
}

// looked is what a machine without a known boot loader is told.
const looked = "/boot/grub/grub.cfg, /boot/grub2/grub.cfg and /boot/efi/EFI/*/grub.cfg (GRUB 2), /boot/grub/menu.lst and grub.conf (GRUB Legacy), and loader/entries on the EFI System Partition at /efi, /boot or /boot/efi (systemd-boot)"

// choose says which configuration is the one that this machine boots by.
func (f *finder) choose() (configuration, error) {
	found, err := f.configurations()
	if err != nil {
		return configuration{}, err
	}
	e := f.evidence
	var fitting []configuration
	for _, c := range found {
		if c.loader == e.loader || e.loader == "" && (!e.silent || c.loader != loaderSystemdBoot) {
			fitting = append(fitting, c)
		}
	}
	if len(fitting) > 1 && e.loader == loaderGRUB2 {
		if c, ok := f.started(fitting); ok {
			fitting = []configuration{c}
		}
	}
	ways := "install GRUB 2 (grub-install, update-grub)"
	if f.uefi {
		ways += " or systemd-boot (bootctl install)"
	}
	ways += ", or write the system on a stick: memlinux write"
	known := slices.Contains([]string{"", loaderGRUB2, loaderLegacy, loaderSystemdBoot}, e.loader)
	switch {
	case !known:
		return configuration{}, unsupported("this machine boots by %s (%s), to which memlinux can't add an entry: %s", e.loader, e.from, ways)
	case len(fitting) == 1:
		return fitting[0], nil
	case len(fitting) == 0 && f.unmounted != "":
		return configuration{}, notMounted(f.unmounted)
	case len(fitting) > 1:
		names := make([]string, len(fitting))
		for i, c := range fitting {
			names[i] = c.loader + " (" + c.path + ")"
		}
		return configuration{}, unsupported("this machine may boot by any of %s, and nothing says by which: move the configuration of those that are no longer used away", strings.Join(names, ", "))
	case e.loader != "" && len(found) > 0:
		return configuration{}, unsupported("this machine boots by %s (%s), but of %s there is no configuration, only of %s (%s): mount the file system that has it, or install that boot loader anew", e.loader, e.from, e.loader, found[0].loader, found[0].path)
	case e.loader != "":
		return configuration{}, unsupported("this machine boots by %s (%s), but its configuration was not found; looked for %s: mount the file system that has it", e.loader, e.from, looked)
	}
	for _, other := range []struct{ name, path string }{
		{"LILO", "etc/lilo.conf"}, {"EXTLINUX", "boot/extlinux/extlinux.conf"}, {"EXTLINUX", "boot/extlinux.conf"},
		{"SYSLINUX", "boot/syslinux/syslinux.cfg"}, {"rEFInd", "boot/efi/EFI/refind/refind.conf"}, {"rEFInd", "efi/EFI/refind/refind.conf"},
	} {
		if _, err := os.Stat(f.path(other.path)); err == nil {
			return configuration{}, unsupported("this machine seems to boot by %s (/%s), to which memlinux can't add an entry: %s", other.name, other.path, ways)
		}
	}
	return configuration{}, unsupported("no boot loader was found; looked for %s: %s", looked, ways)
}

// configurations are all menus that are there.
func (f *finder) configurations() ([]configuration, error) {
	var all []configuration
	dirs := []string{f.path("boot/grub"), f.path("boot/grub2")}
	if f.uefi {
		more, _ := filepath.Glob(globEscape(f.path("boot/efi/EFI")) + "/*") // the pattern is right
		dirs = append(dirs, more...)
	}
	var seen []os.FileInfo
	for _, dir := range dirs {
		file := filepath.Join(dir, "grub.cfg")
		st, err := os.Stat(file)
		if err != nil || slices.ContainsFunc(seen, func(s os.FileInfo) bool { return os.SameFile(s, st) }) {
			continue
		}
		seen = append(seen, st)
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read GRUB's configuration: %w", err)
		}
		s := parseScript(data)
		fedora := s.has("blscfg")
		if len(s.items) == 0 && !fedora && s.has("configfile") {
			continue // it leads to the real one
		}
		if entries, err := os.Stat(f.path("boot/loader/entries")); fedora && (err != nil || !entries.IsDir()) {
			fedora = false
		}
		all = append(all, configuration{loader: loaderGRUB2, path: file, dir: dir, fedora: fedora})
	}
	for _, dir := range []string{f.path("boot/grub"), f.path("boot/boot/grub")} {
		if _, err := os.Stat(filepath.Join(dir, "stage2")); err != nil {
			continue
		}
		// Red Hat's is grub.conf, with menu.lst a link to it.
		for _, name := range []string{"menu.lst", "grub.conf"} {
			menu, err := f.resolve(filepath.Join(dir, name))
			if err != nil {
				continue
			}
			c := configuration{loader: loaderLegacy, path: menu, dir: dir, menu: menu}
			if !slices.ContainsFunc(all, func(o configuration) bool { return o.menu == menu }) {
				all = append(all, c)
			}
		}
	}
	if f.uefi {
		dir, err := f.bootPartition()
		if err != nil {
			return nil, err
		}
		if dir != "" {
			all = append(all, configuration{loader: loaderSystemdBoot, path: filepath.Join(dir, "loader/entries"), dir: dir})
		}
	}
	return all, nil
}

// resolve is the regular file behind a path, within the same machine.
func (f *finder) resolve(file string) (string, error) {
	for range 10 {
		st, err := os.Lstat(file)
		if err != nil {
			return "", err
		}
		if st.Mode()&fs.ModeSymlink == 0 {
			if !st.Mode().IsRegular() {
				return "", fmt.Errorf("%s is no regular file", file)
			}
			return file, nil
		}
		to, err := os.Readlink(file)
		if err != nil {
			return "", err
		}
		if filepath.IsAbs(to) {
			file = f.path(to)
		} else {
			file = filepath.Join(filepath.Dir(file), to)
		}
	}
	return "", fmt.Errorf("%s: too many symbolic links", file)
}

// Types of partitions (UEFI 2.10 §5.3.3, and the Boot Loader Specification).
const (
	espType      = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	xbootldrType = "bc13c2ff-59e6-4262-a352-b275fd6f7172"
)

// bootPartition is where the Boot Loader Specification has systemd-boot's
// entries: the XBOOTLDR partition, else the EFI System Partition; "" where
// systemd-boot is on neither.
func (f *finder) bootPartition() (string, error) {
	esp, xbootldr := "", ""
	for _, dir := range []string{"/efi", "/boot", "/boot/efi"} {
		if !slices.ContainsFunc(f.mounts, func(m mount) bool { return m.point == dir && m.kind != "autofs" }) {
			continue
		}
		p, err := f.place(f.path(dir))
		if err != nil {
			return "", err
		}
		at := f.path(dir)
		exists := func(name string) bool { _, err := os.Stat(filepath.Join(at, name)); return err == nil }
		switch {
		case p.partType == xbootldrType:
			xbootldr = at
		case p.Type != "vfat" && p.Type != "msdos":
		case exists("EFI/systemd/systemd-bootx64.efi"), exists("loader/loader.conf"), exists("loader/entries"):
			if esp == "" {
				esp = at
			}
		}
	}
	if esp != "" && xbootldr != "" {
		return xbootldr, nil
	}
	return esp, nil
}

// started picks, of several configurations of GRUB 2, the one that the program
// that the firmware started reads.
func (f *finder) started(all []configuration) (configuration, bool) {
	if f.evidence.dir == "" {
		return configuration{}, false
	}
	for _, c := range all {
		if c.dir == f.evidence.dir {
			return c, true
		}
	}
	data, err := os.ReadFile(filepath.Join(f.evidence.dir, "grub.cfg"))
	if err != nil {
		return configuration{}, false
	}
	prefix := ""
	parseScript(data).assignments("prefix", func(value string, _ []string, _ int) { prefix = value })
	prefix = prefix[strings.LastIndexByte(prefix, ')')+1:]
	for _, c := range all {
		if p, err := f.place(c.dir); err == nil {
			if seen, err := p.LoaderPath(c.dir); err == nil && seen == prefix {
				return c, true
			}
		}
	}
	return configuration{}, false
}

// boot puts together what is known.
func (f *finder) boot(c configuration, boot place) (*Boot, error) {
	b := &Boot{Firmware: "bios"}
	p, err := f.place(c.dir)
	if err != nil {
		return nil, err
	}
	b.Volume = p.Volume
	b.Dir = filepath.Join(p.MountPoint, "memlinux")
	if _, ok := below(c.dir, f.path("boot")); ok && boot.MountPoint == p.MountPoint {
		b.Dir = f.path("boot/memlinux")
	}
	if f.uefi {
		b.Firmware = "uefi"
		b.Variables = f.evidence.option.variables()
		v, err := readVariable(f.efivars, "SecureBoot", globalGUID)
		if err != nil {
			return nil, err
		}
		b.SecureBoot = v != nil && len(v.Data) > 0 && v.Data[0] == 1
	}
	b.Disk, b.NoProof = f.proof(p)
	switch {
	case c.fedora:
		b.Loader, err = newBLS(b, f.path("boot"), grubBLS, f.efivars)
	case c.loader == loaderGRUB2:
		b.Loader, err = newGRUB2(b, c.dir)
	case c.loader == loaderSystemdBoot:
		b.Loader, err = newBLS(b, c.dir, systemdBoot, f.efivars)
	default:
		var hd string
		if hd, err = f.legacyDrive(c, p); err == nil {
			b.Loader, err = newLegacy(b, c.menu, hd, p.partition)
		}
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// proof is the one disk that everything starts from, or why that can't be tried
// in a virtual machine.
func (f *finder) proof(p place) (disk, why string) {
	var reasons []string
	add := func(format string, args ...any) { reasons = append(reasons, fmt.Sprintf(format, args...)) }
	e := f.evidence
	switch {
	case len(p.disks) == 0:
		add("%s lies on no disk that can be seen here", p.MountPoint)
	case len(p.disks) > 1:
		add("%s lies on several disks (%s)", p.MountPoint, strings.Join(p.disks, ", "))
	default:
		disk = p.disks[0]
	}
	if len(p.layers) > 0 {
		add("%s lies on %s", p.MountPoint, strings.Join(p.layers, " on "))
	}
	if p.Type == "btrfs" || p.Type == "zfs" || p.Type == "bcachefs" {
		add("%s is %s, and where its files lie on the disk can't be told", p.MountPoint, p.Type)
	}
	switch {
	case disk == "":
	case !f.uefi && e.disk != disk:
		add("there is no boot loader that memlinux knows in the boot sectors of %s", disk)
		disk = ""
	case f.uefi && e.option == nil:
		add("the firmware does not say what it started")
	case f.uefi && e.onDisk == "":
		add("the partition that the firmware started from was not found")
	case f.uefi && e.onDisk != disk:
		add("the firmware starts from %s, and %s lies on %s", e.onDisk, p.MountPoint, disk)
		disk = ""
	}
	return disk, strings.Join(reasons, "; ")
}
