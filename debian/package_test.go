// Package debian tests memlinux's Debian package: by lintian, and in a clean
// Debian under real systemd.
package debian

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/memlinux/memlinux/debian/debtest"
	"github.com/memlinux/memlinux/media/mediatest"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/nspawn"
	"github.com/memlinux/memlinux/testvm/pc"
)

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

// A service is stopped only where it says that no job runs.
func TestPrermStopsNoJob(t *testing.T) {
	for name, c := range map[string]struct {
		jobs string // what memlinux jobs does
		ends bool   // the service
		says string
	}{
		"no job":              {`echo '{"id":"a","state":"succeeded"}'`, true, ""},
		"a job":               {`printf '%s\n' '{"id":"a","state":"succeeded"}' '{"id":"b","state":"running"}'`, false, "a job is running"},
		"no answer":           {"exit 1", false, "does not say whether a job is running"},
		"half an answer":      {`echo '{"id":"a","state":"succeeded"}'; exit 1`, false, "does not say whether a job is running"},
		"an answer too late":  {"exit 124", false, "stop the service yourself ("},
		"killed in the midst": {"kill -9 $$", false, "does not say whether a job is running"},
	} {
		t.Run(name, func(t *testing.T) {
			service := exec.Command("sleep", "1000")
			if err := service.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- service.Wait() }()
			defer service.Process.Kill()
			dir := t.TempDir()
			for program, does := range map[string]string{
				"dbus-send":          fmt.Sprintf("echo '   uint32 %d'", service.Process.Pid),
				"deb-systemd-invoke": fmt.Sprintf("kill %d", service.Process.Pid),
				"memlinux":           c.jobs,
			} {
				if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\n"+does+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("/bin/sh", "memlinux.prerm", "upgrade", "2")
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
			out, err := cmd.CombinedOutput()
			if (err == nil) != c.ends || !strings.Contains(string(out), c.says) {
				t.Errorf("%v: %s", err, out)
			}
			if c.ends {
				<-ended // or the test's limit ends it
				return
			}
			select {
			case <-ended:
				t.Error("the service was stopped")
			case <-time.After(100 * time.Millisecond):
			}
		})
	}
}

func TestPackage(t *testing.T) {
	deb := debtest.Build(t, "..", t.TempDir())
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
until_so() {
	local end=$((SECONDS + 60))
	until "$@"; do
		if [ $SECONDS -ge $end ]; then echo "this never was so: $*"; return 1; fi
		sleep 0.05
	done
}
# A command of the user's in a session and on a terminal of its own, whose
# keyboard is descriptor 3, and how it ends.
terminal() {
	exec 3<> /tmp/keys
	su --login anna --command "loginctl show-session self --property=Name; script --quiet --flush --return --command '$1' /dev/null" < /tmp/keys > $2 2>&1 3>&- &
	on_terminal=$!
}
there() { kill -0 $on_terminal 2> /dev/null; }
left_terminal() {
	local code=0
	exec 3>&-
	wait $on_terminal || code=$?
	[ $code = $1 ] || { echo "on the terminal: $code, not $1"; cat asked cancelled; return 1; }
}
password='of root'
echo "root:$password" | chpasswd

mkdir /disk
mount -o noatime ROOT /disk
mount --bind /disk/boot /boot
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

# Where nobody can be asked, they may do no more.
denied() { as anna memlinux "${@:2}" < /dev/null > /tmp/out 2> denied-$1 && exit 1 || [ $? = 4 ]; [ ! -s /tmp/out ]; }
denied write write --yes --no-boot-test STICK
denied install install --no-boot-test
denied remove rollback

# On a terminal polkit asks them, and they type root's password. What is typed
# before the prompt is there for good is lost, as with a person who is too quick.
mkfifo -m 666 /tmp/keys
terminal "memlinux write --yes --no-boot-test STICK" asked
until_so grep -q Password: asked
while there; do echo "$password" >&3; sleep 0.5; done
left_terminal 0

# With a rule for them nobody is asked.
cat > /etc/polkit-1/rules.d/50-anna.rules <<'END'
polkit.addRule(function (action, subject) {
    if (subject.user == "anna" && action.id.indexOf("org.memlinux.memlinux1.") == 0) return polkit.Result.YES;
});
END
systemctl restart polkit
as anna memlinux write --yes --no-boot-test STICK < /dev/null > written
boot() { find /boot -printf '%y %m %U:%G %p\n' -type f -exec sha256sum {} + | sort; }
boot > boot-before
as anna memlinux install --no-boot-test --next < /dev/null > installed
boot > boot-installed
as anna memlinux rollback < /dev/null > rolled-back
boot > boot-after

# Ctrl-C cancels what they began, on a slow stick.
terminal "memlinux write --yes --no-boot-test SLOW" cancelled
until_so eval 'memlinux jobs --json | grep -q "\"state\":\"running\",\"phase\":\"write\""'
printf '\003' >&3
until_so eval '! there'
left_terminal 130
fails running
systemctl list-units --plain --no-legend --all 'memlinux-*' > still

# So do they from another terminal; and nobody else.
as anna memlinux write --yes --no-boot-test SLOW < /dev/null > /tmp/slow 2>&1 &
until_so eval 'memlinux jobs --json | grep -q "\"state\":\"running\",\"phase\":\"write\""'
id=$(memlinux jobs --json | sed -n '/"state":"running"/s/^{"id":"\([^"]*\)".*/\1/p')
runuser -u nobody -- memlinux cancel $id < /dev/null > /tmp/out 2> denied-cancel && exit 1 || [ $? = 4 ]
running
as anna memlinux cancel $id > cancel
wait $! && exit 1 || [ $? = 130 ]
id=$(memlinux jobs --json | sed -n '/"state":"succeeded"/s/^{"id":"\([^"]*\)".*/\1/p' | tail -n 1)
as anna memlinux cancel $id > /tmp/out 2>> cancel && exit 1 || [ $? = 1 ]

# Its unit's device filter holds for all in it: disks are let through, and what
# makes loop devices is not.
mknod /dev/control c 10 237
inside() { bash -c 'echo $$ > /sys/fs/cgroup/system.slice/memlinuxd.service/cgroup.procs; exec 3<> "$1"' bash "$1"; }
inside STICK
true 3<> /dev/control
fails inside /dev/control 2> filter
rm /dev/control

memlinux jobs > jobs
journalctl --unit memlinuxd --output json MEMLINUX_USER=$(id -u anna) > story
systemctl status --no-pager memlinuxd.service > status
rm /etc/polkit-1/rules.d/50-anna.rules

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
mkdir -p /efi/memlinux
touch /efi/memlinux/vmlinuz
apt purge memlinux
grep "its entries stay in this PC's boot menu" /tmp/apt > stays
rm -r /efi
fails grep -q memlinuxd /proc/[0-9]*/comm
[ ! -e /run/memlinux ]
snapshot /tmp/after
diff /tmp/before /tmp/after > left || true
`

func inDebian(t *testing.T, deb string) {
	kernel, config := need.Kernel(t)
	p := pc.Bare(t, pc.Spec{Loader: pc.GRUB2BIOS, Kernel: kernel, Config: config})
	hard := p.Attach(t)
	root := fmt.Sprintf("%sp%d", hard, p.Root.Number)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 128<<20); err != nil {
		t.Fatal(err)
	}
	stick := need.Loop(t, disk, "512")
	// To write it all takes much longer than to press Ctrl-C.
	slow := mediatest.New(t, 128<<20, 512)
	slow.Break(mediatest.Faults{Fail: func(c mediatest.Call) syscall.Errno {
		if c.Write && c.Off >= 4<<20 {
			time.Sleep(100 * time.Millisecond)
		}
		return 0
	}})
	got := nspawn.Run(t, nspawn.Debian{
		Files:   map[string]string{"/root/memlinux.deb": deb},
		Devices: []string{hard, root, stick, slow.Path},
		Script:  strings.NewReplacer("STICK", stick, "SLOW", slow.Path, "ROOT", root).Replace(script),
	})
	const jobRuns = "memlinux: a job is running, and this would cut it off"
	for name, wants := range map[string][]string{
		"devices":        {stick},
		"doctor":         {"ok       system bus ", "memlinuxd runs on it", "ok       GRUB for UEFI ", "ok       QEMU ", "  /boot/vmlinuz-"},
		"denied-write":   {"memlinux: not authorized: "},
		"denied-install": {"memlinux: not authorized: "},
		"denied-remove":  {"memlinux: not authorized: "},
		"denied-cancel":  {"memlinux: not authorized: "},
		"cancel":         {": cancelled during write\n", "can't be cancelled: it has ended before, and succeeded"},
		"asked":          {"Name=anna\n", "Authentication is required to overwrite the disk (" + stick + ")", "read back  the same, from the medium"},
		"written":        {"read back  the same, from the medium"},
		"installed":      {"/boot/memlinux/vmlinuz-"},
		"boot-installed": {"/boot/memlinux/vmlinuz-"},
		"rolled-back":    {"taken back"},
		"cancelled":      {"cancelled during write"},
		"jobs":           {"rollback  anna  succeeded"},
		"status":         {"active (running)"},
		"upgrade":        {jobRuns},
		"remove":         {jobRuns},
		"filter":         {"Operation not permitted"},
	} {
		for _, want := range wants {
			if !strings.Contains(got[name], want) {
				t.Errorf("%s: %q is not in\n%s", name, want, got[name])
			}
		}
		if strings.HasPrefix(name, "denied-") && strings.Count(got[name], "\n") != 1 {
			t.Errorf("%s is not one sentence:\n%s", name, got[name])
		}
	}
	if strings.Contains(got["cancelled"], "unplug") {
		t.Errorf("a slow stick was taken for one that does not answer:\n%s", got["cancelled"])
	}
	if got["boot-before"] != got["boot-after"] {
		t.Errorf("/boot was\n%s\nthen\n%s\nand after the rollback\n%s", got["boot-before"], got["boot-installed"], got["boot-after"])
	}
	if got["still"] != "" {
		t.Errorf("after a cancel there are still\n%s", got["still"])
	}
	if end := slow.Holds(510, 2); end[0] == 0x55 && end[1] == 0xAA {
		t.Error("a write was cancelled, and the stick has a boot sector")
	}
	checkStory(t, got["story"], filepath.Base(stick), filepath.Base(slow.Path))
	for line := range strings.Lines(got["left"]) {
		if (line[0] == '<' || line[0] == '>') && !strings.HasPrefix(line, "> /etc/memlinux") {
			t.Errorf("the purge left another file, or took one: %s", line)
		}
	}
	if !strings.Contains(got["left"], "/etc/memlinux/memlinux.toml") {
		t.Error("the purge took the user's configuration")
	}
}

// checkStory reads what the journal tells of the user's jobs.
func checkStory(t *testing.T, story, stick, slow string) {
	t.Helper()
	var ends []string
	begun := map[string]bool{}
	for line := range strings.Lines(story) {
		var e struct {
			Job    string `json:"MEMLINUX_JOB"`
			Kind   string `json:"MEMLINUX_KIND"`
			Device string `json:"MEMLINUX_DEVICE"`
			Phase  string `json:"MEMLINUX_PHASE"`
			Result string `json:"MEMLINUX_RESULT"`
			ID     string `json:"MESSAGE_ID"`
			Text   string `json:"MESSAGE"`
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e.Job == "" || e.ID == "" || !strings.Contains(e.Text, e.Job) {
			t.Errorf("an entry of the journal is %s", line)
		}
		if e.Result != "" {
			if !begun[e.Job] {
				t.Errorf("the journal does not tell of the job's begin: %s", line)
			}
			ends = append(ends, strings.Join([]string{e.Kind, e.Device, e.Result}, " "))
		}
		begun[e.Job] = true
	}
	want := []string{"write " + stick + " succeeded", "write " + stick + " succeeded", "install  succeeded", "rollback  succeeded", "write " + slow + " cancelled", "write " + slow + " cancelled"}
	if !slices.Equal(ends, want) {
		t.Errorf("by the journal the user's jobs ended\n%q, want\n%q:\n%s", ends, want, story)
	}
}
