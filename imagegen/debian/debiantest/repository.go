// Package debiantest makes a Debian repository on disk, so that tests run the
// real apt without the network and without the machine's own lists.
package debiantest

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/testvm/need"
)

// Repository is a flat repository and an apt configuration that knows no other.
type Repository struct {
	t        testing.TB
	dir      string
	packages map[string]string // name → paragraph in the list
}

// New makes an empty repository that goes away with the test.
func New(t testing.TB) *Repository {
	t.Helper()
	need.Tool(t, "apt-get", "apt")
	need.Tool(t, "dpkg-deb", "dpkg")
	// Not t.TempDir: its folders are closed to apt's own user.
	dir, err := os.MkdirTemp("", "memlinux-repository-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &Repository{t: t, dir: dir, packages: map[string]string{}}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"repo", "etc/apt.conf.d", "etc/preferences.d", "lists/partial", "cache/archives/partial", "log"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.write("sources.list", "deb [trusted=yes] file:"+dir+"/repo ./\n")
	r.write("status", "")
	r.write("apt.conf", fmt.Sprintf(`Dir::Etc "%[1]s/etc"; Dir::Etc::sourcelist "%[1]s/sources.list"; Dir::Etc::sourceparts "-";
Dir::State::lists "%[1]s/lists"; Dir::State::status "%[1]s/status"; Dir::Cache "%[1]s/cache"; Dir::Log "%[1]s/log";
APT::Architecture "amd64"; APT::Architectures "amd64"; Acquire::Languages "none";
`, dir))
	r.list()
	return r
}

// Apt is the apt that knows this repository alone.
func (r *Repository) Apt() debian.Apt { return debian.Apt{Config: filepath.Join(r.dir, "apt.conf")} }

// Deb is the path of a package in the repository.
func (r *Repository) Deb(name, version string) string {
	return filepath.Join(r.dir, "repo", name+"_"+version+"_amd64.deb")
}

// Add builds a package of the given files (path → content) and lists it in
// place of an older version. depends is its Depends field, "" for none.
func (r *Repository) Add(name, version, depends string, files map[string]string) {
	r.t.Helper()
	tree, err := os.MkdirTemp(r.dir, "tree-")
	if err != nil {
		r.t.Fatal(err)
	}
	if err := os.Chmod(tree, 0o755); err != nil {
		r.t.Fatal(err)
	}
	control := fmt.Sprintf("Package: %s\nVersion: %s\nArchitecture: amd64\nMaintainer: nobody <nobody@localhost>\nDescription: test\n", name, version)
	if depends != "" {
		control += "Depends: " + depends + "\n"
	}
	rel := filepath.Base(tree)
	r.write(filepath.Join(rel, "DEBIAN/control"), control)
	for path, content := range files {
		r.write(filepath.Join(rel, path), content)
	}
	deb := r.Deb(name, version)
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, deb).CombinedOutput(); err != nil {
		r.t.Fatalf("dpkg-deb: %v: %s", err, out)
	}
	b, err := os.ReadFile(deb)
	if err != nil {
		r.t.Fatal(err)
	}
	r.packages[name] = control + fmt.Sprintf("Filename: ./%s\nSize: %d\nSHA256: %x\n", filepath.Base(deb), len(b), sha256.Sum256(b))
	r.list()
}

func (r *Repository) list() {
	var all []string
	for _, p := range r.packages {
		all = append(all, p)
	}
	r.write("repo/Packages", strings.Join(all, "\n"))
}

func (r *Repository) write(path, content string) {
	r.t.Helper()
	path = filepath.Join(r.dir, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		r.t.Fatal(err)
	}
}
