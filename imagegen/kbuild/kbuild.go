// Package kbuild makes a Linux kernel for amd64 from its source, by the kernel's
// own build system.
//
// It promises that the same request gives the same bytes in any folder, with or
// without ccache; that everything of the source runs unprivileged and without
// network; and that what can't work is refused before the long compile, in a
// sentence that says what to do: no kernel, no compiler, no space, or an option
// that the kernel's configuration did not take.
package kbuild

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/memlinux/memlinux/imagegen/kernel"
	"github.com/memlinux/memlinux/imagegen/sandbox"
)

// Request says which kernel to make.
type Request struct {
	// Source is a tar of a kernel's source, plain or compressed by xz, gz, bz2 or
	// zst, of Size bytes. It is read by ReadAt only. SourceSHA256 is of the file
	// as it is, hex.
	Source       *os.File
	Size         int64
	SourceSHA256 string
	// Base is what the configuration begins with: "minimal", which is tinyconfig
	// and our fragment; "defconfig", the kernel's own for x86_64; or "" for Config,
	// a whole .config.
	Base   string
	Config []byte
	// Fragments are merged over it in their order.
	Fragments []Fragment
	// Modules says to make the modules, too, where the configuration has them.
	Modules bool
	// WorkDir is an empty folder where all is unpacked and made; all of it then
	// belongs to the user that compilers run as. CcacheDir is a folder for
	// ccache to keep objects in, "" for none. The caller made both, and removes
	// WorkDir when it has taken the result.
	WorkDir, CcacheDir string
}

// Fragment is some lines of configuration.
type Fragment struct {
	Name string // for errors
	Text []byte
}

// Result is a kernel that was made. Its paths are absolute if WorkDir is, and
// below it.
type Result struct {
	Image      string   // the bzImage
	Config     string   // the whole .config
	Log        string   // what make said
	ModulesDir string   // what belongs in lib/modules/Release; "" where there are no modules
	Release    string   // as uname -r says it: "6.1.192-memlinux"
	Objects    int      // that were compiled
	Warnings   []string // sentences without full stop
}

// minimal is the fragment over tinyconfig that makes the base "minimal".
//
//go:embed minimal.config
var minimal []byte

// keyVersion changes where the same request gives other bytes than before for
// what this package does.
const keyVersion = "kbuild 2"

// identity replaces what a kernel otherwise says of who made it, when and where
// (Documentation/kbuild/reproducible-builds.rst).
var identity = []string{
	"KBUILD_BUILD_TIMESTAMP=Thu Jan  1 00:00:00 UTC 1970",
	"KBUILD_BUILD_USER=memlinux",
	"KBUILD_BUILD_HOST=memlinux",
	"KBUILD_BUILD_VERSION=1",
}

// Limits of time. A distribution's configuration with all its modules takes two
// CPUs about three hours.
const (
	configLimit  = 15 * time.Minute
	compileLimit = 8 * time.Hour
)

// Key is a digest, hex, over everything that decides about the bytes of the
// result: source, configuration, and the tools. Two requests
// with one key give the same bytes.
func (r Request) Key(ctx context.Context) (string, error) {
	versions, err := toolchain()
	if err != nil {
		return "", fmt.Errorf("look at the compiler: %w", err)
	}
	h := sha256.New()
	add := func(what, value string) { fmt.Fprintf(h, "%s %d\n%s\n", what, len(value), value) }
	add("by", keyVersion)
	add("identity", strings.Join(identity, "\n"))
	add("source", r.SourceSHA256)
	add("base", r.Base)
	if r.Base == "minimal" {
		add("minimal", string(minimal))
	}
	add("config", string(r.Config))
	for _, f := range r.Fragments {
		add("fragment", string(f.Text))
	}
	add("modules", fmt.Sprint(r.Modules))
	add("tools", versions)
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Build makes the kernel that r describes. progress, which may be nil, is told
// how far the steps "unpack" (bytes of the source's file) and "compile" (objects;
// the total is an estimate, which grows where it was too low) are. A missing
// program is one *sandbox.MissingError for all that is missing; a build that make
// gave up is a *BuildError.
func Build(ctx context.Context, r Request, progress func(step string, done, total int64)) (*Result, error) {
	if progress == nil {
		progress = func(string, int64, int64) {}
	}
	b := &build{r: r, progress: progress}
	if err := b.prepare(); err != nil {
		return nil, err
	}
	top, err := unpack(ctx, r, filepath.Join(r.WorkDir, "source"), func(done, total int64) { progress("unpack", done, total) })
	if err != nil {
		return nil, err
	}
	b.tree = filepath.Join(r.WorkDir, "source", top)
	return b.make(ctx)
}

// build is one run of Build.
type build struct {
	r        Request
	progress func(step string, done, total int64)
	wishes   []wish
	base     []option // of Config
	tree     string   // the folder with the kernel's Makefile
	root     *os.Root // the same; nothing in it leads out of it
	version  string
	ccache   bool
	log      *os.File
	warnings []string
}

func (b *build) warn(format string, args ...any) {
	b.warnings = append(b.warnings, fmt.Sprintf(format, args...))
}

// prepare checks all that can be checked before anything is unpacked.
func (b *build) prepare() error {
	r := b.r
	switch {
	case r.Base != "" && r.Base != "minimal" && r.Base != "defconfig":
		return fmt.Errorf("%q is no kernel configuration to begin with; use minimal, defconfig or a .config file", r.Base)
	case r.Base == "" && len(r.Config) == 0:
		return errors.New("there is no kernel configuration to begin with; use minimal, defconfig or a .config file")
	case r.Base != "" && len(r.Config) > 0:
		return fmt.Errorf("a kernel configuration can't begin with %s and with a .config file at once", r.Base)
	case r.Size == 0:
		return errors.New("the kernel's source is an empty file")
	}
	var own []option
	var err error
	if r.Base == "minimal" {
		if own, err = parseOptions("minimal", minimal); err != nil {
			return err
		}
	}
	if b.base, err = parseOptions("the kernel's configuration", r.Config); err != nil {
		return err
	}
	if r.Base == "" && len(b.base) == 0 {
		return errors.New("the kernel's configuration has no option in it; it should be a .config file")
	}
	var fragments [][]option
	var names []string
	for _, f := range r.Fragments {
		options, err := parseOptions("fragment "+f.Name, f.Text)
		if err != nil {
			return err
		}
		fragments, names = append(fragments, options), append(names, f.Name)
	}
	b.wishes = wishes(own, fragments, names)

	asked := values{}
	for _, o := range b.base {
		asked[o.name] = o.value
	}
	for _, w := range b.wishes {
		asked[w.name] = w.value
	}
	if asked["BLK_DEV_INITRD"] == "n" {
		return errors.New("the configuration switches CONFIG_BLK_DEV_INITRD off, without which the kernel does not load an initramfs, and that is all of the system; remove that line")
	}
	if err := checkTools(func(option string) bool { return asked.get(option) == "y" }); err != nil {
		return fmt.Errorf("a kernel can't be built here: %w", err)
	}
	if r.CcacheDir != "" {
		_, err := sandbox.Find("ccache", "ccache")
		b.ccache = err == nil
	}
	return room(r.WorkDir, spaceFor(r.Base, asked))
}

// Space that a build takes, in bytes: source and minimal are measured with Linux
// 6.1 and 6.12 and rounded up, the others are guesses on the high side.
const (
	spaceSource  = 1_200_000_000
	spaceMinimal = 400_000_000
	spaceFull    = 3_000_000_000
	spaceDebug   = 20_000_000_000 // all of Debian's modules with debug information
)

func spaceFor(base string, asked values) int64 {
	switch {
	case asked.get("DEBUG_INFO") == "y":
		return spaceSource + spaceDebug
	case base == "minimal":
		return spaceSource + spaceMinimal
	}
	return spaceSource + spaceFull
}

// make makes the kernel of the tree that was unpacked.
func (b *build) make(ctx context.Context) (*Result, error) {
	var err error
	if b.root, err = os.OpenRoot(b.tree); err != nil {
		return nil, fmt.Errorf("open the kernel's source: %w", err)
	}
	defer b.root.Close()
	if b.version, err = version(b.root.FS()); err != nil {
		return nil, err
	}
	if err := b.root.Mkdir(outFolder, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("build Linux %s: %w", b.version, err)
	}
	out := filepath.Join(b.tree, outFolder)
	result := &Result{Log: filepath.Join(b.r.WorkDir, "build.log"), Config: filepath.Join(out, ".config"), Image: filepath.Join(out, "arch/x86/boot/bzImage")}
	if b.log, err = os.OpenFile(result.Log, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644); err != nil { //nolint:gosec // a log is no secret
		return nil, fmt.Errorf("build Linux %s: %w", b.version, err)
	}
	defer b.log.Close()
	if err := b.give(); err != nil {
		return nil, err
	}
	got, err := b.configure(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.checkConfigured(got); err != nil {
		return nil, err
	}
	withModules := b.r.Modules && got.get("MODULES") == "y"
	if result.Objects, err = b.compile(ctx, got, withModules); err != nil {
		return nil, err
	}
	release, err := b.read("include/config/kernel.release", 1<<10)
	if err != nil {
		return nil, fmt.Errorf("read the release of the new kernel: %w", err)
	}
	if result.Release = strings.TrimSpace(string(release)); !releaseName.MatchString(result.Release) {
		return nil, fmt.Errorf("the new kernel calls itself %q, which is no release", result.Release)
	}
	if withModules {
		if result.ModulesDir, err = b.installModules(ctx, result.Release); err != nil {
			return nil, err
		}
	}
	for _, path := range []string{result.Image, result.Config, result.Log} {
		if err := own(b.r.WorkDir, path); err != nil {
			return nil, err
		}
	}
	result.Warnings = b.warnings
	return result, nil
}

// releaseName is a release that can be a file's name.
var releaseName = regexp.MustCompile(`^[0-9][A-Za-z0-9._+~-]*$`)

// give gives the compilers' user the folders that it works in. In a ccache that
// has been used, that user's files may be hard links to anything.
func (b *build) give() error {
	if err := sandbox.Give(b.r.WorkDir); err != nil || b.r.CcacheDir == "" {
		return err
	}
	used, err := os.ReadDir(b.r.CcacheDir)
	if err != nil {
		return fmt.Errorf("open the compiler's cache: %w", err)
	}
	if len(used) > 0 {
		return nil
	}
	return sandbox.Give(b.r.CcacheDir)
}

// read reads a file of the output folder: what the kernel's own Makefiles made
// of it may be a link to what only root may read.
func (b *build) read(name string, limit int64) ([]byte, error) {
	f, err := b.root.Open(path.Join(outFolder, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is not a file", name))
	}
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return text, err
}

// own fails unless path is a file in dir that no link leads to: the caller, who
// may be root, is going to read it.
func own(dir, path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("the kernel's build made no %s: %w", filepath.Base(path), err)
	}
	top, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	rel, err := filepath.Rel(dir, path)
	if err != nil {
		return err
	}
	if st, err := os.Lstat(real); err != nil || !st.Mode().IsRegular() || real != filepath.Join(top, rel) {
		return fmt.Errorf("the kernel's build made %s something else than a file; do not trust this source", path)
	}
	return nil
}

// configure makes the .config and checks that every wish came true in it.
func (b *build) configure(ctx context.Context) (values, error) {
	step := "configure Linux " + b.version
	base := b.base
	if b.r.Base != "" {
		target := map[string]string{"minimal": "tinyconfig", "defconfig": "x86_64_defconfig"}[b.r.Base]
		if _, err := b.run(ctx, step, configLimit, nil, 0, target); err != nil {
			return nil, err
		}
		text, err := b.read(".config", maxConfig)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", step, err)
		}
		if base, err = parseOptions("the kernel's "+target, text); err != nil {
			return nil, err
		}
	}
	var wanted []option
	for _, w := range b.wishes {
		wanted = append(wanted, w.option)
	}
	if err := b.replaceConfig(format(merge(base, wanted))); err != nil {
		return nil, fmt.Errorf("%s: %w", step, err)
	}
	if _, err := b.run(ctx, step, configLimit, nil, 0, "olddefconfig"); err != nil {
		return nil, err
	}
	text, err := b.read(".config", maxConfig)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, err)
	}
	got, err := parseValues("the kernel's configuration", text)
	if err != nil {
		return nil, err
	}
	return got, b.checkWishes(ctx, got)
}

// replaceConfig writes the .config. It may stay ours: Kconfig replaces it.
func (b *build) replaceConfig(text []byte) error {
	name := path.Join(outFolder, ".config")
	if err := b.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := b.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Close())
}

// checkWishes names each wish that the configuration did not take, and why. Of
// our own fragment that is only worth a warning: another version of Linux knows
// other options, and a user's fragment may have switched off what they need.
func (b *build) checkWishes(ctx context.Context, got values) error {
	missed := lost(b.wishes, got)
	if len(missed) == 0 {
		return nil
	}
	k, err := readKconfig(ctx, b.root.FS())
	if err != nil {
		return err
	}
	var unknown, ours, theirs []string
	for _, w := range missed {
		reason := fmt.Sprintf("%s (%s): %s", w.option, w.of, k.why(w, got))
		switch {
		case !w.own:
			theirs = append(theirs, reason)
		case k.settable(w.name):
			ours = append(ours, reason)
		default:
			unknown = append(unknown, "CONFIG_"+w.name)
		}
	}
	if unknown != nil {
		b.warn("Linux %s does not know these options of the minimal configuration, which go by other names there: %s", b.version, strings.Join(unknown, ", "))
	}
	if ours != nil {
		b.warn("Linux %s did not take these options of the minimal configuration: %s", b.version, strings.Join(ours, "; "))
	}
	if theirs != nil {
		return fmt.Errorf("configure Linux %s: it did not take what its configuration should have: %s", b.version, strings.Join(theirs, "; "))
	}
	return nil
}

// checkConfigured checks what can only be told of the whole configuration.
func (b *build) checkConfigured(got values) error {
	if got.get("BLK_DEV_INITRD") != "y" {
		return errors.New("the configuration has no CONFIG_BLK_DEV_INITRD, without which the kernel does not load an initramfs, and that is all of the system; add CONFIG_BLK_DEV_INITRD=y")
	}
	if got.get("X86_64") != "y" {
		return errors.New("the configuration is not for amd64; add CONFIG_64BIT=y, or take one of an amd64 kernel")
	}
	// What imagegen would refuse of the kernel is known before the long compile.
	for _, f := range kernel.Config(got).Check("none", nil) {
		if f.Fatal {
			return fmt.Errorf("with this configuration no system in memory starts: %s", f)
		}
	}
	if err := checkTools(func(option string) bool { return got.get(option) == "y" }); err != nil {
		return fmt.Errorf("this kernel can't be built here: %w", err)
	}
	// Debian's own configuration names a file that only its package has.
	if keys := strings.Trim(got["SYSTEM_TRUSTED_KEYS"], `"`); keys != "" {
		if _, err := b.root.Stat(keys); err != nil {
			return fmt.Errorf("the configuration takes trusted keys from %q, which is not in the kernel's source; add a fragment with CONFIG_SYSTEM_TRUSTED_KEYS=\"\"", keys)
		}
	}
	if got.get("MODULE_SIG") == "y" {
		b.warn("CONFIG_MODULE_SIG makes a new key for each build, so two builds are not the same bytes")
	}
	if got.get("RANDSTRUCT_FULL") == "y" || got.get("RANDSTRUCT_PERFORMANCE") == "y" {
		b.warn("CONFIG_RANDSTRUCT makes a new seed for each build, so two builds are not the same bytes")
	}
	return nil
}

// compile makes the kernel and returns the number of objects.
func (b *build) compile(ctx context.Context, got values, withModules bool) (int, error) {
	targets := []string{"bzImage"}
	if withModules {
		targets = append(targets, "modules")
	}
	if got.get("DEBUG_INFO") == "y" {
		// Debug information names folders, and its digest gets into the kernel.
		targets = append(targets, "KCFLAGS=-fdebug-prefix-map="+b.tree+"=.", "KAFLAGS=-fdebug-prefix-map="+b.tree+"=.")
	}
	report := func(done, total int64) { b.progress("compile", done, total) }
	total := estimate(got, withModules)
	report(0, int64(total))
	objects, err := b.run(ctx, "compile Linux "+b.version, compileLimit, report, total, append([]string{fmt.Sprintf("-j%d", runtime.NumCPU())}, targets...)...)
	if err == nil {
		report(int64(objects), int64(objects))
	}
	return objects, err
}

// installModules lays the modules out as /lib/modules/RELEASE, without debug
// information and without the indexes that depmod makes.
func (b *build) installModules(ctx context.Context, release string) (string, error) {
	to := filepath.Join(b.r.WorkDir, "modules")
	if _, err := b.run(ctx, "install the modules of Linux "+b.version, configLimit, nil, 0,
		"modules_install", "INSTALL_MOD_PATH="+to, "INSTALL_MOD_STRIP=1", "DEPMOD=true"); err != nil {
		return "", err
	}
	root, err := os.OpenRoot(b.r.WorkDir)
	if err != nil {
		return "", fmt.Errorf("install the modules: %w", err)
	}
	defer root.Close()
	const modules = "modules/lib/modules"
	for _, link := range []string{"build", "source"} {
		if err := root.Remove(path.Join(modules, release, link)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("install the modules: %w", err)
		}
	}
	dir := filepath.Join(b.r.WorkDir, modules, release)
	return dir, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return own(b.r.WorkDir, path)
	})
}

// folders are those that compilers write.
func (b *build) folders() []string {
	if b.ccache {
		return []string{b.r.WorkDir, b.r.CcacheDir}
	}
	return []string{b.r.WorkDir}
}

// run runs make in the tree, with its output in the log, and returns the number
// of objects that it made.
func (b *build) run(ctx context.Context, step string, limit time.Duration, report func(done, total int64), total int, args ...string) (int, error) {
	w := &watcher{log: b.log, report: report, total: total}
	compiler := "gcc"
	// A compiler that is killed leaves its temporary files behind.
	env := append([]string{"TMPDIR=" + b.r.WorkDir}, identity...)
	if b.ccache {
		compiler = "ccache gcc"
		env = append(env, "CCACHE_DIR="+b.r.CcacheDir, "CCACHE_BASEDIR="+b.tree, "CCACHE_NOHASHDIR=1", "CCACHE_COMPILERCHECK=content", "CCACHE_DEPEND=1", "CCACHE_MAXSIZE=2G")
	}
	argv := append([]string{"make", "O=" + outFolder, "ARCH=x86_64", "CC=" + compiler}, args...)
	err := sandbox.Run(ctx, sandbox.Command{Argv: argv, Dir: b.tree, Folders: b.folders(), Env: env, Output: w, Limit: limit})
	switch {
	case err == nil:
		return w.objects, nil
	case ctx.Err() != nil:
		return 0, fmt.Errorf("%s: %w", step, ctx.Err())
	}
	return 0, &BuildError{Step: step, Lines: w.lines(), Log: b.log.Name(), Err: err}
}
