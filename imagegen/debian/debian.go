// Package debian brings single files out of Debian packages: apt finds,
// fetches and verifies the package, dpkg-deb opens it, and nothing is
// installed.
package debian

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/memlinux/memlinux/imagegen/sandbox"
)

// ErrNoCandidate says that apt's lists know no such package, or that it can't
// be fetched from anywhere.
var ErrNoCandidate = errors.New("apt knows no such package")

// Apt is the machine's apt.
type Apt struct {
	// Config is an apt.conf(5) file that is read before the system's own
	// (APT_CONFIG); "" for none.
	Config string
	// Dir is a folder for lists of our own, which Update fetches where programs
	// run apart from this process (sandbox.Use) and so can't renew the system's.
	// They count as long as they are newer. The folder is made when needed, below
	// one that exists.
	Dir string
}

// apart reports whether apt-get, which works on what comes over the network, runs
// apart from this process.
func (a Apt) apart() bool { return sandbox.Apart() != nil && a.Dir != "" }

// ownLists are options for apt to take its lists from Dir.
func (a Apt) ownLists() []string {
	return []string{"-oDir::State::lists=" + a.Dir + "/lists", "-oDir::Cache=" + a.Dir + "/cache"}
}

// stamp is the file in Dir that is as old as the lists there.
const stamp = "updated"

// freshest are the options for apt to take the newest lists that there are.
func (a Apt) freshest(ctx context.Context) ([]string, error) {
	if !a.apart() {
		return nil, nil
	}
	own, err := os.Stat(filepath.Join(a.Dir, stamp))
	if err != nil {
		return nil, nil // never fetched
	}
	out, err := a.run(ctx, "", "apt-config", "shell", "lists", "Dir::State::lists/d")
	if err != nil {
		return nil, err
	}
	_, dir, _ := strings.Cut(strings.TrimSpace(string(out)), "=")
	if system, err := os.Stat(strings.Trim(dir, "'")); err == nil && system.ModTime().After(own.ModTime()) {
		return nil, nil
	}
	return a.ownLists(), nil
}

// fetchTime bounds one run of apt-get.
const fetchTime = 2 * time.Hour

// User is who apt fetches as, or 0 where it has no user of its own.
func User() int {
	u, err := user.Lookup("_apt")
	if err != nil {
		return 0
	}
	uid, _ := strconv.Atoi(u.Uid)
	return uid
}

// GiveToApt makes the folder belong to the user that apt fetches as.
func GiveToApt(folder string) error {
	uid := User()
	if uid == 0 {
		return errors.New("apt has no user _apt here; this needs a Debian system, or give a file instead")
	}
	return sandbox.GiveTo(folder, uid, 65534) // its group is nogroup
}

// Apart starts cmd, an apt-get that writes only the folders, which are its user's,
// by the sandbox's Launcher, and waits for it.
func Apart(ctx context.Context, cmd *exec.Cmd, folders ...string) error {
	path, err := sandbox.Find(cmd.Args[0], "apt")
	if err != nil {
		return err
	}
	cmd.Path = path
	// Of the daemon's environment it gets no more than where the network is.
	cmd.Env = slices.DeleteFunc(cmd.Env, func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		switch strings.ToLower(name) {
		case "http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy", "apt_config", "lc_all", "debian_frontend":
			return false
		}
		return true
	})
	cmd.Env = append(cmd.Env, "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	wait, err := sandbox.Apart()(ctx, cmd, sandbox.Needs{User: User(), Folders: folders, Limit: fetchTime, Network: true})
	if err != nil {
		return err
	}
	return wait()
}

// Package is the version of a package that apt would fetch.
type Package struct {
	Name    string
	Version string
	Size    int64    // of the .deb, bytes
	SHA256  string   // of the .deb, hex
	Depends []string // names only; of alternatives the first
}

// Debian policy §5.6.7, which allows no upper case.
var packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)

// ValidName reports whether name can be a package's name. One that begins with
// a dash, or holds a slash or equals sign, would be more than a name to apt.
func ValidName(name string) bool { return len(name) <= 200 && packageName.MatchString(name) }

// Candidate asks apt's lists, without the network, which version of a package
// it would fetch. It fails with ErrNoCandidate when there is none.
func (a Apt) Candidate(ctx context.Context, name string) (Package, error) {
	if !ValidName(name) {
		return Package{}, fmt.Errorf("%q is not a Debian package name", name)
	}
	lists, err := a.freshest(ctx)
	if err != nil {
		return Package{}, err
	}
	out, err := a.run(ctx, "", "apt-cache", append(lists, "show", "--no-all-versions", "--", name)...)
	var failed *commandError
	if errors.As(err, &failed) {
		return Package{}, fmt.Errorf("%s: %w", name, ErrNoCandidate)
	}
	if err != nil {
		return Package{}, err
	}
	p, err := parsePackage(out)
	if err != nil {
		return Package{}, fmt.Errorf("%s: %w", name, err)
	}
	return p, nil
}

// parsePackage reads the first paragraph of what apt-cache show prints, which
// is deb822(5).
func parsePackage(paragraph []byte) (Package, error) {
	var p Package
	fetchable := false
	for _, line := range strings.Split(string(paragraph), "\n") {
		if line == "" && p.Name != "" {
			break
		}
		key, value, found := strings.Cut(line, ":")
		if !found || strings.HasPrefix(line, " ") {
			continue
		}
		value = strings.TrimSpace(value)
		switch key {
		case "Package":
			p.Name = value
		case "Version":
			p.Version = value
		case "Size":
			size, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return Package{}, fmt.Errorf("apt's lists give the size %q", value)
			}
			p.Size = size
		case "SHA256":
			p.SHA256 = value
		case "Filename":
			fetchable = true
		case "Depends", "Pre-Depends":
			for _, dep := range strings.Split(value, ",") {
				if f := strings.FieldsFunc(dep, func(r rune) bool { return strings.ContainsRune(" \t(|[:", r) }); len(f) > 0 {
					p.Depends = append(p.Depends, f[0])
				}
			}
		}
	}
	// A package that is installed but in no list has no Filename.
	if p.Name == "" || p.Version == "" || p.SHA256 == "" || !fetchable {
		return Package{}, ErrNoCandidate
	}
	return p, nil
}

// State is a digest over what apt's answers depend on, its lists and its
// configuration: while it stays the same, so do they. To take it is much
// quicker than to ask apt.
func (a Apt) State(ctx context.Context) (string, error) {
	fresh, err := a.freshest(ctx)
	if err != nil {
		return "", err
	}
	out, err := a.run(ctx, "", "apt-config", append(fresh, "shell", "lists", "Dir::State::lists/d", "etc", "Dir::Etc/d", "sources", "Dir::Etc::sourcelist/f")...)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	for line := range strings.Lines(string(out)) {
		_, dir, _ := strings.Cut(strings.TrimSpace(line), "=")
		dir = strings.Trim(dir, "'")
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) || err == nil && d.IsDir() {
				return nil
			}
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			fmt.Fprintf(h, "%q %d %d\n", path, info.Size(), info.ModTime().UnixNano())
			return nil
		})
		if err != nil {
			return "", fmt.Errorf("look at apt's lists: %w", err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Update makes apt fetch its lists anew. It needs root and the network.
func (a Apt) Update(ctx context.Context) error {
	args := []string{"-q", "update", "--error-on=any"}
	if !a.apart() {
		_, err := a.run(ctx, "", "apt-get", args...)
		return err
	}
	var folders []string
	for _, name := range []string{"lists", "cache"} {
		folder := filepath.Join(a.Dir, name)
		if err := os.MkdirAll(folder, 0o755); err != nil { //nolint:gosec // what the lists say is public
			return fmt.Errorf("renew apt's lists: %w", err)
		}
		if err := GiveToApt(folder); err != nil {
			return fmt.Errorf("renew apt's lists: %w", err)
		}
		folders = append(folders, folder)
	}
	if _, err := a.get(ctx, "", append(a.ownLists(), args...), folders...); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(a.Dir, stamp), nil, 0o644) //nolint:gosec // it is empty
}

// Download fetches p into the empty folder dir and returns the open .deb; the
// caller closes it. Its bytes are those that apt's signed lists promise.
// report, which may be nil, is called with the bytes fetched so far.
func (a Apt) Download(ctx context.Context, p Package, dir string, report func(done int64)) (*os.File, error) {
	lists, err := a.freshest(ctx)
	if err == nil && a.apart() {
		err = GiveToApt(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", p.Name, err)
	}
	// As root, apt fetches as its own user where that may write in dir.
	if u, err := user.Lookup("_apt"); err == nil && os.Geteuid() == 0 && !a.apart() {
		if uid, err := strconv.Atoi(u.Uid); err == nil {
			if err := os.Chown(dir, uid, -1); err != nil {
				return nil, fmt.Errorf("fetch %s: %w", p.Name, err)
			}
		}
	}
	stop := watch(dir, report)
	_, err = a.get(ctx, dir, append(lists, "-q", "download", p.Name+"="+p.Version))
	stop()
	if err != nil {
		return nil, fmt.Errorf("fetch %s %s: %w", p.Name, p.Version, err)
	}
	debs, _ := filepath.Glob(filepath.Join(dir, "*.deb"))
	if len(debs) != 1 {
		return nil, fmt.Errorf("fetch %s %s: apt-get left %d packages, not one", p.Name, p.Version, len(debs))
	}
	f, err := os.Open(debs[0])
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", p.Name, err)
	}
	// apt has verified it, but in a folder that its own user may write to.
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("fetch %s: %w", p.Name, err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != p.SHA256 {
		_ = f.Close()
		return nil, fmt.Errorf("fetch %s %s: the package's SHA-256 is %s, but apt's lists say %s", p.Name, p.Version, got, p.SHA256)
	}
	return f, nil
}

// watch reports the bytes of all files in dir until it is stopped.
func watch(dir string, report func(int64)) (stop func()) {
	if report == nil {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
			}
			var size int64
			_ = filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
				if err == nil && d.Type().IsRegular() {
					if info, err := d.Info(); err == nil {
						size += info.Size()
					}
				}
				return nil
			})
			report(size)
		}
	}()
	return func() { close(quit); <-done }
}

// ErrStop ends Files early without an error.
var ErrStop = errors.New("enough files")

// Files calls take for every regular file of a .deb with its path, as in
// "boot/vmlinuz-6.1.0", its size in bytes and its content, until the end, an
// error, or ErrStop from take.
func Files(ctx context.Context, deb *os.File, take func(name string, size int64, content io.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// By descriptor: the name in the folder may be another file by now.
	cmd, stderr := command(ctx, "dpkg-deb", "--fsys-tarfile", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{deb}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return explain("dpkg-deb", err, nil)
	}
	werr := walk(tar.NewReader(bufio.NewReaderSize(stdout, 64<<10)), take)
	if werr != nil {
		cancel() // dpkg-deb has more to say, but nobody listens
	} else {
		_, werr = io.Copy(io.Discard, stdout)
	}
	err = cmd.Wait()
	if errors.Is(werr, ErrStop) {
		return nil
	}
	if err != nil && (werr == nil || errors.Is(werr, io.ErrUnexpectedEOF) || errors.Is(werr, tar.ErrHeader)) {
		werr = explain("dpkg-deb", err, stderr.Bytes())
	}
	return werr
}

func walk(r *tar.Reader, take func(string, int64, io.Reader) error) error {
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unpack package: %w", err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if err := take(strings.TrimPrefix(path.Clean("/"+h.Name), "/"), h.Size, r); err != nil {
			return err
		}
	}
}

// commandError is a program that ran and said no.
type commandError struct {
	name string
	said string
}

func (e *commandError) Error() string { return e.name + ": " + e.said }

func (a Apt) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	return a.output(ctx, dir, name, args, func(cmd *exec.Cmd) error { return cmd.Run() })
}

// get runs apt-get in dir, which writes there and in the folders alone where it
// runs apart.
func (a Apt) get(ctx context.Context, dir string, args []string, folders ...string) ([]byte, error) {
	if !a.apart() {
		return a.run(ctx, dir, "apt-get", args...)
	}
	if dir != "" {
		folders = append(folders, dir)
	}
	return a.output(ctx, dir, "apt-get", args, func(cmd *exec.Cmd) error { return Apart(ctx, cmd, folders...) })
}

func (a Apt) output(ctx context.Context, dir, name string, args []string, run func(*exec.Cmd) error) ([]byte, error) {
	cmd, stderr := command(ctx, name, args...)
	cmd.Dir = dir
	if a.Config != "" {
		cmd.Env = append(cmd.Env, "APT_CONFIG="+a.Config)
	}
	var out bytes.Buffer
	cmd.Stdout = &out
	err := run(cmd)
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", name, ctx.Err())
	}
	if err != nil {
		return nil, explain(name, err, stderr.Bytes())
	}
	return out.Bytes(), nil
}

// command prepares a program in a process group of its own, so that cancelling
// ends its helpers (apt's methods) with it.
func command(ctx context.Context, name string, args ...string) (*exec.Cmd, *bytes.Buffer) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	return cmd, &stderr
}

func explain(name string, err error, stderr []byte) error {
	var exit interface{ ExitCode() int }
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("%s is not installed; this needs a Debian system, or give a file instead: %w", name, err)
	case errors.As(err, &exit):
		lines := strings.Split(strings.TrimSpace(string(stderr)), "\n")
		said := strings.TrimPrefix(lines[len(lines)-1], "E: ")
		if said == "" {
			said = err.Error()
		}
		return &commandError{name: name, said: said}
	}
	return fmt.Errorf("%s: %w", name, err)
}
