package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// generator is a side that makes an initramfs with modules.
type generator struct {
	*side
	image   string // where it lays it
	modules int
	size    int64
}

// modules packs the modules of Debian's generic kernel. What the peers pack
// besides is their own; each chooses the modules that it thinks a PC needs, and
// how hard it compresses.
func (b bench) modules() error {
	made, err := b.prepare(generic)
	if err != nil {
		return err
	}
	system := made[0]
	us, err := b.generateOurs()
	if err != nil {
		return err
	}
	peers, left, err := b.generators(system)
	if err != nil {
		return err
	}
	all := append([]*generator{us}, peers...)
	sides := make([]*side, len(all))
	for i, g := range all {
		sides[i] = g.side
	}
	if err := inTurn(rounds, sides...); err != nil {
		return err
	}
	fmt.Printf("\nan initramfs for any PC: modules of Linux %s, zstd\n", system.Release)
	fmt.Printf("  %-36s %8s %8s %9s %9s %8s\n", "", "wall s", "CPU s", "peak MiB", "size MiB", "modules")
	for _, g := range all {
		if err := g.inspect(); err != nil {
			return err
		}
		fmt.Printf("  %-36s %8.3f %8.3f %9.1f %9.1f %8d\n", g.name, median(g.wall).Seconds(), median(g.cpu).Seconds(), mib(median(g.peak)), mib(g.size), g.modules)
	}
	for _, line := range left {
		fmt.Printf("  %s\n", line)
	}
	for _, g := range peers {
		ratio := median(us.cpu).Seconds() / median(g.cpu).Seconds()
		name := "CPU, memlinux / " + g.name
		switch goal := goals[g.name]; goal {
		case 0:
			fmt.Printf("  %-44s %7.3f\n", name, ratio)
		default:
			figure(name, "%7.3f", ratio, goal)
		}
	}
	figure("memlinux's peak, MiB", "%7.1f", mib(median(us.peak)), 64)
	return b.peakOfJob()
}

const (
	boosterSame      = "booster, the same modules"
	boosterUniversal = "booster --universal"
	dracut           = "dracut --no-hostonly"
	mkinitramfs      = "mkinitramfs, MODULES=most"
)

// goals are ratios of CPU time to a peer's.
var goals = map[string]float64{boosterSame: 0.5, dracut: 0.05}

// generateOurs makes the initramfs as memlinuxd does when the kernel is in its
// cache and this initramfs is not.
func (b bench) generateOurs() (*generator, error) {
	cache, err := b.scratchCache("cache")
	if err != nil {
		return nil, err
	}
	s, err := ours("modules all, busybox", "system", cache, string(generic))
	if err != nil {
		return nil, err
	}
	g := &generator{side: s, image: b.path("ours.img")}
	s.env = daemonEnv
	s.before = func() error { return forgetInitramfs(cache) }
	s.after = func() error {
		var m built
		if err := json.Unmarshal(s.out, &m); err != nil {
			return err
		}
		_ = os.Remove(g.image)
		return os.Link(m.Initramfs, g.image)
	}
	return g, nil
}

// generators are the peers that are here, and a line on each that is not.
func (b bench) generators(s built) (all []*generator, left []string, err error) {
	root, err := peerKernel(s)
	if err != nil {
		return nil, nil, err
	}
	modules := filepath.Join(root, "lib/modules", s.Release)
	add := func(name string, rounds int, argv ...string) {
		image := b.path(fmt.Sprintf("peer%d.img", len(all)))
		for i, a := range argv {
			if a == "IMAGE" {
				argv[i] = image
			}
		}
		all = append(all, &generator{side: &side{name: name, argv: argv, rounds: rounds}, image: image})
	}
	booster := ""
	for _, name := range []string{"booster", "booster-generator"} {
		if path, err := exec.LookPath(name); err == nil && booster == "" {
			booster = path
		}
	}
	if booster == "" {
		left = append(left, "booster is left out: it is not installed, and Debian has no package of it")
	} else {
		// Its own choice is twice as many modules, so it is also given ours.
		same := b.path("same.yaml")
		names := strings.ReplaceAll(strings.Join(s.Modules, ","), "-", "_") // as the kernel has them
		if err := os.WriteFile(same, []byte("modules: -*,"+names+"\n"), 0o600); err != nil {
			return nil, nil, err
		}
		none := b.path("none.yaml")
		if err := os.WriteFile(none, nil, 0o600); err != nil {
			return nil, nil, err
		}
		for _, of := range []struct{ name, config string }{{boosterSame, same}, {boosterUniversal, none}} {
			add(of.name, 0, booster, "build", "--universal", "--modules-dir", modules, "--kernel-version", s.Release, "--config", of.config,
				"--compression", "zstd", "-f", "IMAGE")
		}
	}
	// Half a minute of CPU each: two rounds will do.
	for _, dir := range []string{"tmp", "confdir", "initramfs-tools/conf.d", "initramfs-tools/scripts", "initramfs-tools/hooks"} {
		if err := os.MkdirAll(b.path(dir), 0o700); err != nil {
			return nil, nil, err
		}
	}
	add(dracut, 2, "dracut", "--quiet", "--force", "--no-hostonly", "--no-hostonly-cmdline", "--no-early-microcode", "--zstd",
		"--conf", "/dev/null", "--confdir", b.path("confdir"), "--tmpdir", b.path("tmp"), "--kmoddir", modules, "IMAGE", s.Release)
	conf := b.path("initramfs-tools")
	for name, text := range map[string]string{"initramfs.conf": "MODULES=most\nBUSYBOX=auto\nCOMPRESS=zstd\n", "modules": ""} {
		if err := os.WriteFile(filepath.Join(conf, name), []byte(text), 0o600); err != nil {
			return nil, nil, err
		}
	}
	// It wants /lib/modules/RELEASE and /boot/config-RELEASE, and gets them in a
	// mount namespace of its own, where /lib need not even have that folder.
	add(mkinitramfs, 2, "unshare", "--mount", "sh", "-euc",
		`mount -t overlay overlay -o "lowerdir=$1/lib:/lib" /lib; mount --bind "$1/boot" /boot; shift; exec mkinitramfs "$@"`,
		"sh", root, "-d", conf, "-o", "IMAGE", s.Release)
	return all, left, nil
}

// inspect looks at the image by initramfs-tools' own program.
func (g *generator) inspect() error {
	info, err := os.Stat(g.image)
	if err != nil {
		return err
	}
	g.size = info.Size()
	list, err := exec.Command("lsinitramfs", g.image).Output()
	if err != nil {
		return fmt.Errorf("%s: lsinitramfs: %w", g.name, err)
	}
	g.modules = len(moduleFile.FindAll(list, -1))
	return nil
}

var moduleFile = regexp.MustCompile(`(?m)\.ko(\.xz|\.zst)?$`)

// fromPackage is how the manifest names a kernel out of a package.
var fromPackage = regexp.MustCompile(`^debian (\S+) (\S+)$`)

// peerKernel is a folder with boot/ and lib/modules/ of the kernel s as its
// package has them, and with depmod's files. It stays for the next time.
func peerKernel(s built) (string, error) {
	m := fromPackage.FindStringSubmatch(s.Source)
	if m == nil {
		return "", fmt.Errorf("the kernel is from %q, not from a package", s.Source)
	}
	keep, err := testCache()
	if err != nil {
		return "", err
	}
	root := filepath.Join(keep, "peer-kernel_"+strings.ReplaceAll(m[2], ":", "_"))
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	old, err := filepath.Glob(filepath.Join(keep, "peer-kernel_*"))
	if err != nil {
		return "", err
	}
	for _, dir := range old {
		if err := os.RemoveAll(dir); err != nil {
			return "", err
		}
	}
	tmp, err := os.MkdirTemp(keep, "part-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	part := filepath.Join(tmp, "root")
	for _, argv := range [][]string{
		{"apt-get", "download", "-qq", m[1] + "=" + m[2]},
		{"sh", "-c", "dpkg-deb -x *.deb root"},
		{"depmod", "-b", part, s.Release},
	} {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir = tmp
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("unpack %s for the peers: %s: %w: %s", m[1], argv[0], err, bytes.TrimSpace(out))
		}
	}
	return root, os.Rename(part, root)
}

// testCache is where the tests, too, keep what is slow to get.
func testCache() (string, error) {
	dir := os.Getenv("MEMLINUX_TEST_CACHE")
	if dir == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(base, "memlinux-test")
	}
	return dir, os.MkdirAll(dir, 0o755) //nolint:gosec // kernels are no secret
}

// peakOfJob makes the same by memlinuxd itself.
func (b bench) peakOfJob() error {
	cache, err := b.scratchCache("cache-of-job")
	if err != nil {
		return err
	}
	kernel, modules := generic.kernel()
	cmd := exec.Command(memlinux, "--private", "build", "--kernel", kernel, "--modules", modules, "-o", b.path("out"))
	cmd.Env = append(os.Environ(), "MEMLINUX_CACHE_DIR="+cache, "MEMLINUX_STATE_DIR="+b.path("state"))
	peak, err := watchPeak(cmd, "memlinuxd")
	if err != nil {
		return err
	}
	figure("memlinuxd's peak as it does this as a job", "%7.1f", mib(peak), 64)
	return nil
}
