package source

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/imagegen/sandbox"
)

const (
	sourcePackage = "busybox"
	// binaryPackage is in every list, also where no sources are.
	binaryPackage = "busybox-static"
)

// aptSources is apt's knowledge of source packages. A system's own lists
// seldom have them, and are not ours to change: so this is a state of apt by
// itself, with the system's keys, proxies and repositories, of which it takes
// the sources.
type aptSources struct {
	apt debian.Apt
	dir string // of its state; apt's own user must be able to reach it
}

// prepare derives the entries for sources from the system's.
func (a aptSources) prepare(ctx context.Context) error {
	for _, d := range []string{"sources", "lists/partial", "cache/archives/partial", "files"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil { //nolint:gosec // apt's own user reads it
			return err
		}
	}
	out, err := a.output(ctx, "", "apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d")
	if err != nil {
		return err
	}
	var files []string
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		value = strings.Trim(value, "'")
		if name == "LIST" {
			files = append(files, value)
			continue
		}
		parts, _ := os.ReadDir(value) // a folder that need not be there
		for _, p := range parts {
			files = append(files, filepath.Join(value, p.Name()))
		}
	}
	found := 0
	for i, path := range files {
		ext := filepath.Ext(path)
		if ext != ".list" && ext != ".sources" {
			continue
		}
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		text = sourceEntries(text, ext == ".sources")
		if err := os.WriteFile(filepath.Join(a.dir, "sources", strconv.Itoa(i)+ext), text, 0o644); err != nil { //nolint:gosec // apt's own user reads it
			return err
		}
		found++
	}
	if found == 0 {
		return errors.New("apt has no repositories (/etc/apt/sources.list.d is empty); give busybox's source as a file instead")
	}
	return nil
}

var (
	oneLineEntry = regexp.MustCompile(`^(\s*)deb(?:-src)?(\s.*)$`)
	typesField   = regexp.MustCompile(`(?i)^Types\s*:`)
)

// sourceEntries turns the entries of a sources.list(5), in its deb822 style or
// the one-line style, into entries for sources.
func sourceEntries(text []byte, deb822 bool) []byte {
	var out bytes.Buffer
	have := map[string]bool{}
	inTypes := false
	for line := range strings.SplitSeq(string(text), "\n") {
		switch {
		case !deb822:
			// One that has its sources in another line has them once.
			if m := oneLineEntry.FindStringSubmatch(line); m != nil {
				if line = m[1] + "deb-src" + m[2]; have[line] {
					continue
				}
				have[line] = true
			}
		case inTypes && strings.TrimLeft(line, " \t") != line && strings.TrimSpace(line) != "":
			continue // the field goes on
		default:
			if inTypes = typesField.MatchString(line); inTypes {
				line = "Types: deb-src"
			}
		}
		out.WriteString(line)
		out.WriteByte('\n')
	}
	return out.Bytes()
}

// remoteFile is a file that apt's signed lists promise.
type remoteFile struct {
	name   string
	size   int64
	algo   string // "SHA256" or "SHA512"
	digest string // hex
}

var uriLine = regexp.MustCompile(`^'[^']*' ([A-Za-z0-9][A-Za-z0-9.+~_-]*) ([0-9]{1,12}) (SHA256|SHA512):([0-9a-f]+)$`)

// parseURIs reads what apt-get source --print-uris prints, which is the files
// of a source package, one of them its .dsc.
func parseURIs(out []byte) ([]remoteFile, error) {
	var files []remoteFile
	dscs := 0
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "'") || strings.HasPrefix(line, "'"+sourcePackage+"' packaging") {
			continue
		}
		m := uriLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("apt gives no SHA-256 or SHA-512 for a file of the source: %q", line)
		}
		size, err := strconv.ParseInt(m[2], 10, 64)
		if err != nil {
			return nil, err
		}
		files = append(files, remoteFile{m[1], size, m[3], m[4]})
		if strings.HasSuffix(m[1], ".dsc") {
			dscs++
		}
	}
	if dscs != 1 {
		return nil, fmt.Errorf("apt names %d descriptions (.dsc) of the source, not one", dscs)
	}
	return files, nil
}

// fetch brings the newest source of busybox into the folder to and returns the
// path of its .dsc. All files are those that the signed lists promise.
func (a aptSources) fetch(ctx context.Context, to string, report func(done, total int64)) (dsc string, err error) {
	if err := a.prepare(ctx); err != nil {
		return "", err
	}
	if sandbox.Apart() != nil {
		for _, name := range []string{"lists", "cache", "files"} {
			if err := debian.GiveToApt(filepath.Join(a.dir, name)); err != nil {
				return "", err
			}
		}
	}
	// Other people's repositories have no sources, and that is an error of update.
	_, updateErr := a.output(ctx, "", "apt-get", "-q", "update")
	if ctx.Err() != nil {
		return "", updateErr
	}
	files := filepath.Join(a.dir, "files")
	source := []string{"-q", "source", "--download-only", "--only-source"}
	out, err := a.output(ctx, files, "apt-get", append(source, "--print-uris", sourcePackage)...)
	if err != nil {
		return "", errors.Join(err, updateErr)
	}
	promised, err := parseURIs(out)
	if err != nil {
		return "", err
	}
	var total int64
	for _, f := range promised {
		total += f.size
	}
	report(0, total)
	// As root, apt fetches as its own user where that may write in the folder.
	if u, err := user.Lookup("_apt"); err == nil && os.Geteuid() == 0 && sandbox.Apart() == nil {
		if uid, err := strconv.Atoi(u.Uid); err == nil {
			if err := os.Chown(files, uid, -1); err != nil {
				return "", err
			}
		}
	}
	if _, err := a.output(ctx, files, "apt-get", append(source, sourcePackage)...); err != nil {
		return "", err
	}
	root, err := os.OpenRoot(files)
	if err != nil {
		return "", err
	}
	defer root.Close()
	for _, f := range promised {
		if err := f.take(root, to); err != nil {
			return "", err
		}
		if strings.HasSuffix(f.name, ".dsc") {
			dsc = filepath.Join(to, f.name)
		}
	}
	report(total, total)
	return dsc, nil
}

// take copies the file into the folder to. apt has verified it, but in a folder
// that its own user may write to.
func (f remoteFile) take(from *os.Root, to string) error {
	st, err := from.Lstat(f.name)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Size() != f.size {
		return fmt.Errorf("%s has %d bytes, but apt's lists say %d", f.name, st.Size(), f.size)
	}
	in, err := from.Open(f.name)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(filepath.Join(to, f.name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644) //nolint:gosec // public
	if err != nil {
		return err
	}
	defer out.Close()
	h := map[string]func() hash.Hash{"SHA256": sha256.New, "SHA512": sha512.New}[f.algo]()
	if _, err := io.Copy(io.MultiWriter(out, h), io.LimitReader(in, f.size+1)); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != f.digest {
		return fmt.Errorf("the %s of %s is %s, but apt's lists say %s", f.algo, f.name, got, f.digest)
	}
	return out.Close()
}

// output runs a program of apt on this state and returns what it prints.
func (a aptSources) output(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	if _, err := sandbox.Find(name, "apt"); err != nil {
		return nil, fmt.Errorf("this needs a Debian system, or give busybox's source as a file instead: %w", err)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	if name == "apt-get" {
		cmd.Args = append([]string{name,
			"-oDir::Etc::sourcelist=/dev/null", "-oDir::Etc::sourceparts=" + a.dir + "/sources",
			"-oDir::State::lists=" + a.dir + "/lists", "-oDir::Cache=" + a.dir + "/cache", "-oAcquire::Languages=none"}, args...)
	}
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	if a.apt.Config != "" {
		cmd.Env = append(cmd.Env, "APT_CONFIG="+a.apt.Config)
	}
	// A group of its own, so that cancelling ends apt's methods with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	var err error
	if name == "apt-get" && sandbox.Apart() != nil {
		err = debian.Apart(ctx, cmd, a.dir)
	} else {
		err = cmd.Run()
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", name, ctx.Err())
	}
	if err != nil {
		said := err.Error()
		for line := range strings.Lines(complaints.String()) {
			if e, is := strings.CutPrefix(strings.TrimSpace(line), "E: "); is {
				said = e
				break
			}
		}
		return nil, fmt.Errorf("%s: %s", name, said)
	}
	return out.Bytes(), nil
}

// dscVersion reads the version of a source package from its .dsc (deb-src-control(5)).
func dscVersion(r io.Reader) (string, error) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if v, is := strings.CutPrefix(lines.Text(), "Version:"); is {
			if v = strings.TrimSpace(v); debianVersion.MatchString(v) {
				return v, nil
			}
		}
	}
	return "", errors.New("the description (.dsc) of Debian's source names no version")
}

// Debian policy §5.6.12.
var debianVersion = regexp.MustCompile(`^[0-9A-Za-z.+:~-]{1,100}$`)

// candidate is the version of busybox that apt's own lists offer, updated if
// they are empty.
func candidate(ctx context.Context, apt debian.Apt) (string, error) {
	p, err := apt.Candidate(ctx, binaryPackage)
	if errors.Is(err, debian.ErrNoCandidate) {
		if err = apt.Update(ctx); err == nil {
			p, err = apt.Candidate(ctx, binaryPackage)
		}
	}
	if err != nil {
		return "", fmt.Errorf("ask for the version of Debian's busybox: %w", err)
	}
	return p.Version, nil
}
