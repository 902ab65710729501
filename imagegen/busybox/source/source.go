// Package source makes a static busybox from its source, by busybox's own build
// system.
//
// It promises that the same request gives the same bytes in any folder, with or
// without ccache; that everything of the source runs unprivileged and without
// network; and that a missing compiler or an option that the configuration did
// not take is named before the long compile.
package source

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/memlinux/memlinux/imagegen/busybox"
	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/imagegen/sandbox"
	"github.com/memlinux/memlinux/imagegen/tarball"
)

// Request says which busybox to make.
type Request struct {
	// Source is a tar of busybox's source, plain or compressed by xz, gz, bz2 or
	// zst, of Size bytes. It is read by ReadAt only. SourceSHA256 is of the file
	// as it is, hex. A nil Source means Debian's source with its patches.
	Source       *os.File
	Size         int64
	SourceSHA256 string
	// Apt fetches Debian's source. Its callers must not use it elsewhere at the
	// same time.
	Apt debian.Apt
	// Fragments are merged in their order over busybox's defconfig and our own
	// fragment.
	Fragments []Fragment
	// WorkDir is the absolute path of an empty folder where all is unpacked and made, that other users
	// can reach; Build lets them through it. CcacheDir is a folder for ccache,
	// where that is installed, to keep objects in; "" for none. What one source's
	// Makefiles put there, builds of others that use it believe. The caller made
	// both, and removes WorkDir when it has taken the result.
	WorkDir, CcacheDir string
}

// Fragment is some lines of configuration.
type Fragment struct {
	Name string // for errors
	Text []byte
}

// Result is a busybox that was made. Its paths are in WorkDir.
type Result struct {
	Binary   string // the stripped, static program
	Config   string // the whole .config
	Log      string // what make said
	Info     busybox.Info
	Source   string   // "busybox 1.36.1" or "Debian busybox 1:1.35.0-4"
	Objects  int64    // that were compiled
	Warnings []string // sentences without full stop
}

//go:embed fragment.config
var fragment []byte

// keyVersion changes where the same request gives other bytes than before for
// what this package does.
const keyVersion = "busybox 1"

// Limits of what runs and what is unpacked; busybox 1.36 has 30 MB in 5500 files,
// and a defconfig takes 104 s of CPU.
const (
	unpackLimit = 5 * time.Minute
	configLimit = 15 * time.Minute
	makeLimit   = time.Hour
)

var treeLimits = tarball.Limits{Bytes: 512 << 20, Files: 50_000}

// tools are what every build needs, with their Debian packages.
var tools = [][2]string{
	{"make", "make"}, {"gcc", "gcc"}, {"ld", "binutils"}, {"ar", "binutils"}, {"strip", "binutils"}, {"objcopy", "binutils"},
	{"bzip2", "bzip2"}, {"awk", "mawk"}, {"sed", "sed"}, {"find", "findutils"}, {"xargs", "findutils"}, {"cmp", "diffutils"}, {"od", "coreutils"},
}

// debianTools are what Debian's source needs besides.
var debianTools = [][2]string{{"dpkg-source", "dpkg-dev"}, {"patch", "patch"}, {"xz", "xz-utils"}, {"tar", "tar"}}

// Key is a digest, hex, over everything that decides about the bytes of the
// result: source, configuration, compiler and C library. For Debian's source
// that is the version of busybox-static that apt's lists offer; where they are
// empty, they are updated.
func (r Request) Key(ctx context.Context) (string, error) {
	if err := r.missing(); err != nil {
		return "", err
	}
	h := sha256.New()
	add := func(what, value string) { fmt.Fprintf(h, "%s %d\n%s\n", what, len(value), value) }
	add("by", keyVersion)
	if r.Source != nil {
		add("source", r.SourceSHA256)
	} else {
		version, err := candidate(ctx, r.Apt)
		if err != nil {
			return "", err
		}
		add("debian", version)
	}
	add("fragment", string(fragment))
	for _, f := range r.Fragments {
		add("fragment", string(f.Text))
	}
	for _, argv := range [][]string{{"gcc", "--version"}, {"ld", "--version"}, {"make", "--version"}} {
		out, err := output(ctx, argv...)
		if err != nil {
			return "", err
		}
		add(argv[0], out)
	}
	// What comes into a static program is in these, whatever their version is.
	for _, name := range []string{"libc.a", "libm.a", "libcrypt.a", "libresolv.a", "libgcc.a", "crt1.o"} {
		path, err := library(ctx, name)
		if err != nil {
			return "", err
		}
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("look at the C library: %w", err)
		}
		lib := sha256.New()
		_, err = io.Copy(lib, f)
		_ = f.Close()
		if err != nil {
			return "", fmt.Errorf("look at the C library: %w", err)
		}
		add(name, hex.EncodeToString(lib.Sum(nil)))
	}
	headers, _ := os.ReadFile("/usr/include/linux/version.h")
	add("headers", string(headers))
	return hex.EncodeToString(h.Sum(nil)), nil
}

// library is the path of a file that gcc links with, or just its name where it
// has none.
func library(ctx context.Context, name string) (string, error) {
	out, err := output(ctx, "gcc", "-print-file-name="+name)
	return strings.TrimSpace(out), err
}

func output(ctx context.Context, argv ...string) (string, error) {
	var out bytes.Buffer
	err := sandbox.Run(ctx, sandbox.Command{Argv: argv, Output: &out, Limit: time.Minute})
	if err != nil {
		return "", fmt.Errorf("look at the compiler: %w", err)
	}
	return out.String(), nil
}

// missing fails with one *sandbox.MissingError for all that is missing.
func (r Request) missing() error {
	wanted := tools
	if r.Source == nil {
		wanted = slices.Concat(tools, debianTools)
	}
	var names, packages []string
	for _, t := range wanted {
		if _, err := sandbox.Find(t[0], t[1]); err != nil {
			names = append(names, t[0])
			if !slices.Contains(packages, t[1]) {
				packages = append(packages, t[1])
			}
		}
	}
	if names != nil {
		return fmt.Errorf("busybox can't be built here: %w", &sandbox.MissingError{What: strings.Join(names, ", "), Package: strings.Join(packages, " ")})
	}
	return nil
}

// Build makes the busybox that r describes. progress, which may be nil, is told
// how far the steps "fetch" (bytes of Debian's source), "unpack" (bytes of the
// source's file) and "compile" (objects; the total is an estimate) are. A missing
// program is one *sandbox.MissingError for all that is missing; a build that
// failed is a *BuildError.
func Build(ctx context.Context, r Request, progress func(step string, done, total int64)) (*Result, error) {
	if progress == nil {
		progress = func(string, int64, int64) {}
	}
	b := &build{r: r, progress: progress, base: "defconfig", limit: makeLimit}
	return b.run(ctx)
}

// build is one run of Build.
type build struct {
	r        Request
	progress func(step string, done, total int64)
	base     string        // the target of make that makes the first configuration
	limit    time.Duration // of compiling
	wishes   []wish
	tree     string   // the folder with busybox's Makefile
	root     *os.Root // the same; nothing in it leads out of it
	name     string   // for errors: "busybox 1.36.1"
	debian   string   // version of Debian's source; "" for a tarball
	env      []string
	compiler string
	log      *os.File
	logLeft  int64
	result   Result
}

func (b *build) path(name string) string { return filepath.Join(b.r.WorkDir, name) }

func (b *build) run(ctx context.Context) (*Result, error) {
	if err := b.prepare(ctx); err != nil {
		return nil, err
	}
	defer b.log.Close()
	var err error
	if b.r.Source == nil {
		b.tree, err = b.unpackDebian(ctx)
	} else {
		b.tree, err = b.unpack(ctx)
	}
	if err != nil {
		return nil, err
	}
	if b.root, err = os.OpenRoot(b.tree); err != nil {
		return nil, fmt.Errorf("open busybox's source: %w", err)
	}
	defer b.root.Close()
	if err := b.identify(); err != nil {
		return nil, err
	}
	got, err := b.configure(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.compile(ctx, got); err != nil {
		return nil, err
	}
	if err := b.take(); err != nil {
		return nil, err
	}
	return &b.result, nil
}

// prepare checks all that can be checked first, and makes the folders.
func (b *build) prepare(ctx context.Context) error {
	own, err := parseOptions("memlinux's own fragment", fragment)
	if err != nil {
		return err
	}
	var fragments [][]option
	var names []string
	for _, f := range b.r.Fragments {
		options, err := parseOptions("fragment "+f.Name, f.Text)
		if err != nil {
			return err
		}
		fragments, names = append(fragments, options), append(names, f.Name)
	}
	b.wishes = wishes(own, fragments, names)
	if err := b.r.missing(); err != nil {
		return err
	}
	if path, err := library(ctx, "libc.a"); err != nil {
		return err
	} else if !filepath.IsAbs(path) {
		return fmt.Errorf("busybox can't be built here: %w", &sandbox.MissingError{What: "the static C library (libc.a)", Package: "libc6-dev"})
	}
	b.compiler = "gcc"
	if b.r.CcacheDir != "" {
		if _, err := sandbox.Find("ccache", "ccache"); err == nil {
			b.compiler = "ccache gcc"
		}
	}
	// The folder stays ours, so that what runs in those below it can't swap them.
	if err := os.Chmod(b.r.WorkDir, 0o711); err != nil { //nolint:gosec // its user goes through it
		return fmt.Errorf("build busybox: %w", err)
	}
	for _, dir := range []string{"source", "tmp"} {
		if err := os.Mkdir(b.path(dir), 0o755); err != nil { //nolint:gosec // its user works in it
			return fmt.Errorf("build busybox: %w", err)
		}
	}
	b.env = []string{"TMPDIR=" + b.path("tmp")}
	b.logLeft = maxLog
	b.result.Log = b.path("build.log")
	if b.log, err = os.OpenFile(b.result.Log, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644); err != nil { //nolint:gosec // a log is no secret
		return fmt.Errorf("build busybox: %w", err)
	}
	return nil
}

// unpack unpacks the tarball and returns the folder with the Makefile in it.
func (b *build) unpack(ctx context.Context) (string, error) {
	count := &counter{r: io.NewSectionReader(b.r.Source, 0, b.r.Size), report: func(done int64) { b.progress("unpack", done, b.r.Size) }}
	plain, err := tarball.NewReader(count)
	if err != nil {
		return "", fmt.Errorf("unpack busybox's source: %w", err)
	}
	defer plain.Close()
	if err := tarball.Unpack(ctx, plain, b.path("source"), treeLimits, nil); err != nil {
		return "", fmt.Errorf("unpack busybox's source: %w", err)
	}
	entries, err := os.ReadDir(b.path("source"))
	if err != nil {
		return "", fmt.Errorf("unpack busybox's source: %w", err)
	}
	if err := b.give(); err != nil {
		return "", err
	}
	if len(entries) == 1 && entries[0].IsDir() {
		return filepath.Join(b.path("source"), entries[0].Name()), nil
	}
	return b.path("source"), nil
}

type counter struct {
	r      io.Reader
	done   int64
	report func(done int64)
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.done += int64(n)
	c.report(c.done)
	return n, err
}

// unpackDebian fetches Debian's source and unpacks it, with its patches.
func (b *build) unpackDebian(ctx context.Context) (string, error) {
	b.progress("fetch", 0, 0)
	for _, dir := range []string{"apt", "source/debian"} {
		if err := os.Mkdir(b.path(dir), 0o755); err != nil { //nolint:gosec // other users work in it
			return "", fmt.Errorf("fetch Debian's source of busybox: %w", err)
		}
	}
	dsc, err := aptSources{b.r.Apt, b.path("apt")}.fetch(ctx, b.path("source/debian"), func(done, total int64) { b.progress("fetch", done, total) })
	if err != nil {
		return "", fmt.Errorf("fetch Debian's source of busybox: %w", err)
	}
	f, err := os.Open(dsc)
	if err != nil {
		return "", fmt.Errorf("fetch Debian's source of busybox: %w", err)
	}
	defer f.Close()
	if b.debian, err = dscVersion(f); err != nil {
		return "", err
	}
	b.name = "Debian's busybox " + b.debian
	if err := b.give(); err != nil {
		return "", err
	}
	// Without --no-check it looks for Debian developers' keys; the signed lists
	// vouch for the files already.
	err = b.sandboxed(ctx, "unpack "+b.name, unpackLimit, nil, nil, b.path("source"),
		"dpkg-source", "--no-check", "--no-copy", "-x", dsc, b.path("source/busybox"))
	return b.path("source/busybox"), err
}

// give gives the compilers' user the folders that it works in. In a ccache that
// has been used, that user's files may be hard links to anything.
func (b *build) give() error {
	for _, dir := range []string{b.path("source"), b.path("tmp"), b.r.CcacheDir} {
		if dir == "" {
			continue
		}
		if dir == b.r.CcacheDir {
			if used, err := os.ReadDir(dir); err != nil {
				return fmt.Errorf("open the compiler's cache: %w", err)
			} else if len(used) > 0 {
				continue
			}
		}
		if err := sandbox.Give(dir); err != nil {
			return err
		}
	}
	return nil
}

var versionLine = regexp.MustCompile(`(?m)^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION)[ \t]*=[ \t]*([A-Za-z0-9._-]*)[ \t]*$`)

// identify checks that the tree is busybox's and sets what makes its build
// reproducible.
func (b *build) identify() error {
	makefile, err := b.read("Makefile", maxConfig)
	if err == nil {
		_, err = b.root.Lstat("applets/applet_tables.c")
	}
	if err != nil {
		return fmt.Errorf("this is not busybox's source, which has a Makefile and applets/applet_tables.c: %w", err)
	}
	part := map[string]string{}
	for _, m := range versionLine.FindAllStringSubmatch(string(makefile), -1) {
		if _, twice := part[m[1]]; !twice {
			part[m[1]] = m[2]
		}
	}
	if part["VERSION"] == "" || part["PATCHLEVEL"] == "" {
		return errors.New("this is not busybox's source: its Makefile names no version")
	}
	version := part["VERSION"] + "." + part["PATCHLEVEL"]
	if part["SUBLEVEL"] != "" {
		version += "." + part["SUBLEVEL"]
	}
	dated := "Makefile"
	if b.debian == "" {
		b.name = "busybox " + version + part["EXTRAVERSION"]
		b.result.Source = b.name
	} else {
		// dpkg-source gives files that it patches the time of day.
		dated = "debian/changelog"
		b.result.Source = "Debian busybox " + b.debian
	}
	st, err := b.root.Lstat(dated)
	if err != nil {
		return fmt.Errorf("look at the source of %s: %w", b.name, err)
	}
	// The banner has the time of the configuration in it, which this replaces.
	b.env = append(b.env, "SOURCE_DATE_EPOCH="+strconv.FormatInt(st.ModTime().Unix(), 10))
	if kconfig, err := b.read("scripts/kconfig/confdata.c", maxConfig); err == nil && !bytes.Contains(kconfig, []byte("SOURCE_DATE_EPOCH")) {
		b.env = append(b.env, "KCONFIG_NOTIMESTAMP=1") // an older busybox; it then says nothing
	}
	if b.compiler != "gcc" {
		b.env = append(b.env, "CCACHE_DIR="+b.r.CcacheDir, "CCACHE_BASEDIR="+b.tree, "CCACHE_NOHASHDIR=1", "CCACHE_COMPILERCHECK=content", "CCACHE_MAXSIZE=2G")
	}
	return nil
}

// read reads a regular file of the tree, of at most limit bytes.
func (b *build) read(name string, limit int64) ([]byte, error) {
	// Not Stat: the source's Makefiles could have put a link or a pipe there.
	st, err := b.root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > limit {
		return nil, fmt.Errorf("%s is no file of at most %d KiB", name, limit>>10)
	}
	return b.root.ReadFile(name)
}

// vital are the options without which the result is of no use, with what they
// are for.
var vital = []struct{ name, why string }{
	{"STATIC", "there are no libraries in the initramfs"},
	{"BUSYBOX", "/init calls busybox by its name"},
	{"FEATURE_INSTALLER", "/init makes the applets' links by it"},
}

// configure makes the .config and checks that the wishes came true in it.
func (b *build) configure(ctx context.Context) (values, error) {
	step := "configure " + b.name
	if err := b.make(ctx, step, configLimit, nil, nil, b.base); err != nil {
		return nil, err
	}
	base, err := b.read(".config", maxConfig)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, err)
	}
	options, err := parseOptions("busybox's "+b.base, base)
	if err != nil {
		return nil, err
	}
	var wanted []option
	for _, w := range b.wishes {
		wanted = append(wanted, w.option)
	}
	if err := b.replace(".config", format(merge(options, wanted))); err != nil {
		return nil, fmt.Errorf("%s: %w", step, err)
	}
	// It asks about what is new; an empty line is its default.
	if err := b.make(ctx, step, configLimit, emptyLines{}, nil, "oldconfig"); err != nil {
		return nil, err
	}
	text, err := b.read(".config", maxConfig)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, err)
	}
	got, err := parseValues(text)
	if err != nil {
		return nil, err
	}
	for _, v := range vital {
		if got.get(v.name) != "y" {
			return nil, fmt.Errorf("%s: CONFIG_%s=y is not in the configuration, but %s; remove what switches it off", step, v.name, v.why)
		}
	}
	return got, b.checkWishes(step, got)
}

// checkWishes fails with the options that others wanted and the configuration
// did not take; of our own fragment, those are worth a warning.
func (b *build) checkWishes(step string, got values) error {
	missed := lost(b.wishes, got)
	if len(missed) == 0 {
		return nil
	}
	known, err := readSymbols(b.root.FS())
	if err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	var own, others []string
	for _, w := range missed {
		if w.own {
			own = append(own, fmt.Sprintf("%s (%s)", w.option, known.why(w, got)))
		} else {
			others = append(others, fmt.Sprintf("%s (%s): %s", w.option, w.of, known.why(w, got)))
		}
	}
	if others != nil {
		return fmt.Errorf("%s: it did not take what its configuration should have: %s", step, strings.Join(others, "; "))
	}
	b.result.Warnings = append(b.result.Warnings, fmt.Sprintf("%s did not take all of memlinux's own configuration: %s", b.name, strings.Join(own, "; ")))
	return nil
}

// replace writes a file of the tree. It may stay ours: Kconfig replaces it.
func (b *build) replace(name string, text []byte) error {
	if err := b.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := b.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Chmod(0o644), f.Close())
}

func (b *build) compile(ctx context.Context, got values) error {
	total, err := objects(b.root.FS(), got)
	if err != nil {
		return fmt.Errorf("compile %s: %w", b.name, err)
	}
	b.progress("compile", 0, total)
	object := func() {
		b.result.Objects++
		// It is said when it begins, and what follows is linking.
		b.progress("compile", b.result.Objects, max(total, b.result.Objects+1))
	}
	args := []string{"-j" + strconv.Itoa(runtime.NumCPU()), "busybox"}
	if b.debian != "" {
		args = append(args, "BB_EXTRA_VERSION=Debian "+b.debian) // for its patched banner
	}
	if err := b.make(ctx, "compile "+b.name, b.limit, nil, object, args...); err != nil {
		return err
	}
	b.progress("compile", b.result.Objects, b.result.Objects)
	return nil
}

// take copies the results to where nothing of the source has ever run.
func (b *build) take() error {
	for name, to := range map[string]*string{"busybox": &b.result.Binary, ".config": &b.result.Config} {
		content, err := b.read(name, busybox.MaxSize)
		if err != nil {
			return fmt.Errorf("the build of %s made no %s: %w", b.name, name, err)
		}
		mode := fs.FileMode(0o644)
		if name == "busybox" {
			mode = 0o755
			if b.result.Info, err = busybox.Inspect(bytes.NewReader(content), int64(len(content))); err != nil {
				return fmt.Errorf("the busybox that was built from %s: %w", b.name, err)
			}
		}
		*to = b.path(strings.TrimPrefix(name, "."))
		if err := os.WriteFile(*to, content, mode); err != nil {
			return fmt.Errorf("take the result of %s: %w", b.name, err)
		}
		if err := os.Chmod(*to, mode); err != nil { // whatever our umask is
			return fmt.Errorf("take the result of %s: %w", b.name, err)
		}
	}
	return nil
}

func (b *build) make(ctx context.Context, step string, limit time.Duration, stdin io.Reader, object func(), args ...string) error {
	return b.sandboxed(ctx, step, limit, stdin, object, b.tree, append([]string{"make", "CC=" + b.compiler}, args...)...)
}

// sandboxed runs a program with its output in the log.
func (b *build) sandboxed(ctx context.Context, step string, limit time.Duration, stdin io.Reader, object func(), dir string, argv ...string) error {
	w := &watcher{log: b.log, left: &b.logLeft, object: object}
	folders := []string{b.r.WorkDir}
	if b.r.CcacheDir != "" {
		folders = append(folders, b.r.CcacheDir)
	}
	err := sandbox.Run(ctx, sandbox.Command{Argv: argv, Dir: dir, Folders: folders, Env: b.env, Stdin: stdin, Output: w, Limit: limit})
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", step, ctx.Err())
	}
	return &BuildError{Step: step, Lines: w.lines(), Log: b.log.Name(), Err: err}
}

// emptyLines is an endless input of empty lines.
type emptyLines struct{}

func (emptyLines) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '\n'
	}
	return len(p), nil
}
