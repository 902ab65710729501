// Package debian tests memlinux's Debian package: by lintian, and in a clean
// Debian under real systemd.
package debian

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/nspawn"
)

// build makes the package and returns its path.
func build(t *testing.T) string {
	t.Helper()
	need.Root(t)
	need.Tool(t, "dpkg-buildpackage", "dpkg-dev")
	need.Tool(t, "dh", "debhelper")
	dir := t.TempDir()
	cmd := exec.Command("make", "-C", "..", "--no-print-directory", "deb", "debdir="+dir)
	// What is on the test's way must not be on the package's: flags of make,
	// this run's GOFLAGS.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		return strings.HasPrefix(name, "MAKE") || name == "MFLAGS" || name == "SOURCE_DATE_EPOCH" || name == "VERSION"
	})
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make deb: %v\n%s", err, out)
	}
	found, _ := filepath.Glob(filepath.Join(dir, "memlinux_*.deb")) // the pattern is right
	if len(found) != 1 {
		t.Fatalf("make deb left %q", found)
	}
	return found[0]
}

// The package asks for what the Makefile says that memlinux needs.
func TestDependencies(t *testing.T) {
	makefile, err := os.ReadFile("../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	control, err := os.ReadFile("control")
	if err != nil {
		t.Fatal(err)
	}
	asked := regexp.MustCompile(`(?m)^(Depends|Recommends):(?:.*\n )*.*`).FindAllString(string(control), -1)
	suggested := regexp.MustCompile(`(?m)^Suggests:(?:.*\n )*.*`).FindAllString(string(control), -1)
	for _, c := range []struct {
		list string
		in   string
	}{{"RUN_PACKAGES", strings.Join(asked, " ")}, {"OPTION_PACKAGES", strings.Join(suggested, " ")}} {
		_, rest, _ := strings.Cut(string(makefile), "\n"+c.list+" = ")
		names, _, _ := strings.Cut(rest, "\n")
		words := strings.FieldsFunc(c.in, func(r rune) bool { return r == ' ' || r == ',' || r == '\n' || r == ':' })
		for _, name := range strings.Fields(names) {
			if !slices.Contains(words, name) {
				t.Errorf("%s of %s is not in debian/control", name, c.list)
			}
		}
	}
}

func TestPackage(t *testing.T) {
	deb := build(t)
	t.Run("lintian", func(t *testing.T) {
		t.Parallel()
		out, err := exec.Command(need.Tool(t, "lintian", "lintian"), "--allow-root", "--fail-on", "error,warning", deb).CombinedOutput()
		if err != nil {
			t.Errorf("lintian: %v\n%s", err, out)
		}
	})
	t.Run("in a clean Debian", func(t *testing.T) {
		t.Parallel()
		inDebian(t, deb)
	})
}

// script is what an administrator and a user do. What must be seen in a file of
// its own is checked by inDebian.
const script = `
snapshot() {
	find / -xdev \( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /dev -o -path /var/log -o -path /var/cache/apt -o -path /var/lib/apt \
		-o -path '/var/lib/dpkg/*-old' \) -prune -o -printf '%p %y %m %u %l\n' | sort > "$1"
}
as() { runuser -u "$1" -- "${@:2}"; }
apt() { apt-get -q -y "$@" > /tmp/apt 2>&1 || { cat /tmp/apt; false; }; }
fails() { if "$@"; then echo "this did not fail: $*"; false; fi; }
state() { systemctl show --property=ActiveState --value memlinuxd.service; }
running() { memlinux jobs --json | grep -q '"state":"running"'; }

snapshot /tmp/before
mkdir /etc/memlinux
echo 'memory = 300' > /etc/memlinux/memlinux.toml

# Installed, and not started.
apt install /root/memlinux.deb
[ "$(state)" = inactive ]
dpkg --verify memlinux
for page in man1/memlinux.1 man1/memlinux-write.1 man1/memlinux-doctor.1 man5/memlinux.toml.5 man5/memlinux-recipe.5 man8/memlinuxd.8; do
	[ -e /usr/share/man/$page.gz ]
done
(. /usr/share/bash-completion/completions/memlinux; complete -p memlinux) > /dev/null

# The bus starts it for an ordinary user, who may read.
as anna busctl call org.memlinux.Memlinux1 /org/memlinux/Memlinux1 org.memlinux.Memlinux1.Manager Jobs 'a{sv}' 0
[ "$(state)" = active ]
as anna memlinux devices > devices
as anna memlinux doctor > doctor
as anna memlinux write --yes --no-boot-test DEVICE < /dev/null > /tmp/out 2> refused && exit 1 || echo $? > refused.exit

# Root writes.
memlinux write --yes --no-boot-test DEVICE > written
memlinux jobs > jobs
systemctl status --no-pager memlinuxd.service > status

# No upgrade or removal cuts a job off.
memlinux vm --kernel /boot/vmlinuz-* < /dev/null > /tmp/vm 2>&1 &
for i in {1..300}; do running && break; sleep 0.1; done
running
pid=$(systemctl show --property=MainPID --value memlinuxd.service)
fails apt-get -q -y install --reinstall /root/memlinux.deb > upgrade 2>&1
fails apt-get -q -y remove memlinux > remove 2>&1
running
[ "$pid" = "$(systemctl show --property=MainPID --value memlinuxd.service)" ]
[ "$(dpkg-query -W -f '${Status}' memlinux)" = "install ok installed" ]
kill -INT %1
wait %1 || true

# Without one they end the service, and the next call starts the new one.
apt install --reinstall /root/memlinux.deb
[ "$(state)" = inactive ]
as anna memlinux jobs > /dev/null
[ "$(state)" = active ]

# Purged, nothing runs, and only the configuration is left.
apt purge memlinux
fails grep -q memlinuxd /proc/[0-9]*/comm
[ ! -e /run/memlinux ]
snapshot /tmp/after
diff /tmp/before /tmp/after > left || true
`

func inDebian(t *testing.T, deb string) {
	kernel, config := need.Kernel(t)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 128<<20); err != nil {
		t.Fatal(err)
	}
	device := need.Loop(t, disk, "512")
	got := nspawn.Run(t, nspawn.Debian{
		Files: map[string]string{
			"/root/memlinux.deb":             deb,
			"/boot/" + filepath.Base(kernel): kernel,
			"/boot/" + filepath.Base(config): config,
		},
		Devices: []string{device},
		Script:  strings.ReplaceAll(script, "DEVICE", device),
	})
	const jobRuns = "memlinux: a job is running, and this would cut it off"
	for name, wants := range map[string][]string{
		"devices":      {device},
		"doctor":       {"ok       system bus ", "memlinuxd runs on it", "ok       GRUB for UEFI ", "ok       QEMU ", "  /boot/vmlinuz-"},
		"refused":      {"memlinux: "},
		"refused.exit": {"4\n"},
		"written":      {"read back  the same, from the medium"},
		"jobs":         {"write  succeeded"},
		"status":       {"active (running)"},
		"upgrade":      {jobRuns},
		"remove":       {jobRuns},
	} {
		for _, want := range wants {
			if !strings.Contains(got[name], want) {
				t.Errorf("%s: %q is not in\n%s", name, want, got[name])
			}
		}
	}
	for line := range strings.Lines(got["left"]) {
		if (line[0] == '<' || line[0] == '>') && !strings.HasPrefix(line, "> /etc/memlinux") {
			t.Errorf("the purge left another file, or took one: %s", line)
		}
	}
	if !strings.Contains(got["left"], "/etc/memlinux/memlinux.toml") {
		t.Error("the purge took the user's configuration")
	}
}
