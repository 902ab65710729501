package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/testvm/need"
	"github.com/memlinux/memlinux/testvm/pc"
)

// machine starts a PC without devices but those of args, and with its serial line
// as the console. What it writes on a disk is thrown away.
func machine(t *testing.T, args ...string) *console {
	t.Helper()
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	cmd := exec.Command(qemu, append([]string{
		"-accel", "tcg", "-machine", "q35", "-nodefaults", "-vga", "std", "-display", "none", "-no-reboot", "-monitor", "none", "-serial", "stdio",
	}, args...)...)
	c := &console{t: t, cmd: cmd}
	var err error
	if c.keys, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = c, c
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.off)
	return c
}

// off pulls the plug.
func (c *console) off() {
	if c.cmd.ProcessState == nil {
		c.cmd.Process.Kill()
		c.cmd.Wait()
	}
	if c.t.Failed() {
		c.t.Logf("console:\n%s", c.text.String())
	}
}

// drive is the arguments for a disk with the content of file.
func drive(file, device string, more ...string) []string {
	id := strings.NewReplacer(".", "_").Replace(filepath.Base(file))
	return []string{"-drive", "if=none,id=" + id + ",format=raw,snapshot=on,file=" + file, "-device", strings.Join(append([]string{device, "drive=" + id}, more...), ",")}
}

// usbStick is the arguments for the stick that the machine boots from.
func usbStick(file string) []string {
	return append([]string{"-device", "qemu-xhci"}, drive(file, "usb-storage", "removable=on", "bootindex=0")...)
}

// direct is the arguments that boot what build laid into dir without a boot
// loader.
func direct(t *testing.T, dir string) []string {
	t.Helper()
	return []string{"-kernel", filepath.Join(dir, "vmlinuz"), "-initrd", filepath.Join(dir, "initramfs.img"), "-append", readManifest(t, dir).BootLine()}
}

func readManifest(t *testing.T, dir string) api.Manifest {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, api.FileManifest))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := api.ParseManifest(f)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// answer types a command at the shell and returns what it prints.
func (c *console) answer(command string) string {
	c.t.Helper()
	// The quotes keep the echo of what is typed from looking like an answer.
	c.typed("echo be''gin; " + command + "; echo en''d\r")
	c.expect("begin\r")
	begin := c.seen
	c.expect("\nend\r")
	c.mu.Lock()
	defer c.mu.Unlock()
	said := string(c.text.Bytes()[begin : c.seen-len("\nend\r")])
	return strings.TrimPrefix(strings.ReplaceAll(said, "\r", ""), "\n")
}

// wants checks what a command at the shell prints.
func (c *console) wants(command, pattern string) {
	c.t.Helper()
	if said := c.answer(command); !regexp.MustCompile(`^(?:` + pattern + `)\n?$`).MatchString(said) {
		c.t.Errorf("%s: it says\n%s\nand should\n%s", command, said, pattern)
	}
}

// until waits in the machine until a condition of its shell holds.
func (c *console) until(condition string) {
	c.t.Helper()
	c.wants("n=0; until "+condition+" || [ $n = 600 ]; do sleep 0.1; n=$((n+1)); done; [ $n != 600 ] && echo so it is", "so it is")
}

// folder makes a folder, with those around it.
func (w *world) folder(name string) string {
	w.t.Helper()
	if err := os.MkdirAll(w.path(name), 0o755); err != nil {
		w.t.Fatal(err)
	}
	return w.path(name)
}

// proof is a program that tells with what rights it runs.
const proof = `package main

import (
	"fmt"
	"os"
	"strings"
)

func main() {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "Uid:") || strings.HasPrefix(line, "CapEff:") {
			fmt.Print(line)
		}
	}
}
`

const cgoProof = `package main

// #include <gnu/libc-version.h>
import "C"
import "fmt"

func main() { fmt.Println("glibc", C.GoString(C.gnu_get_libc_version())) }
`

const pythonProof = `#!/usr/bin/python3
import json, ssl
print(json.dumps({"tls": ssl.OPENSSL_VERSION, "sum": 6 * 7}))
`

// goProgram builds a program of one file, the same in each run: the cache keeps
// what it becomes part of.
func (w *world) goProgram(name, source, cgo string) string {
	w.t.Helper()
	out := w.path("state/" + name)
	w.file("state/"+name+".go", source)
	cmd := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-o", out, out+".go")
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if said, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("go build: %v: %s", err, said)
	}
	return out
}

// A kernel that has everything as a module: what is on the machine works by
// itself, and so do programs of all kinds.
func TestModularKernelWithPrograms(t *testing.T) {
	if !need.All() {
		t.Skip("skipped: the test needs Debian's linux-image-amd64, which is large; run make test")
	}
	w := newWorld(t)
	need.File(t, "/usr/bin/curl", "curl")
	need.File(t, "/usr/bin/python3", "python3")
	need.File(t, "/usr/bin/setpriv", "util-linux")
	need.Tool(t, "gcc", "gcc")
	need.File(t, "/usr/include/stdio.h", "libc6-dev")
	w.folder("state")
	w.file("state/script.py", pythonProof)
	static := w.goProgram("static", proof, "0")
	w.goProgram("cgo", cgoProof, "1")
	sh(t, "cp", static, w.path("state/capable"))
	sh(t, need.Tool(t, "setcap", "libcap2-bin"), "cap_net_raw=ep", w.path("state/capable"))
	recipe := w.file("state/memlinux.toml", `
kernel = "debian:linux-image-amd64"
modules = ["usb-storage", "network", "disk", "filesystems"]

[[program]]
from = "/usr/bin/curl"

[[program]]
from = "/usr/bin/setpriv"

[[program]]
from = "cgo"

[[program]]
from = "script.py"
mode = "0755"

[[program]]
from = "static"
to = "/usr/local/bin/setuid"
mode = "4755"

[[program]]
from = "capable"
`)
	stick := w.path("stick.img")
	w.run("write", "--no-boot-test", "--recipe", recipe, stick).wants(t, 0)
	w.holds("stick.img")

	t.Run("every byte is accounted for", func(t *testing.T) {
		out := w.path("state/out")
		w.run("build", "-o", out, "--recipe", recipe).wants(t, 0)
		w.accounts(t, out, "explain", "--json", "--manifest", out)
		for path, why := range map[string]string{
			"/usr/bin/curl":          "program of the recipe (/usr/bin/curl)",
			"/usr/bin/script.py":     "program of the recipe",
			"/usr/bin/python3":       "interpreter",
			"/usr/local/bin/setuid":  "program of the recipe",
			"/etc/memlinux/filecaps": "gives 1 files their capabilities",
			"/lib/modules":           "e1000e",
			"/lib":                   "library that usr/bin/curl needs",
		} {
			if o := w.run("explain", "--manifest", out, path); o.code != 0 || !strings.Contains(o.stdout, why) {
				t.Errorf("explain %s: exit %d, %s%s", path, o.code, o.stdout, o.stderr)
			}
		}
		w.run("explain", "--manifest", out, "/usr/bin/nothere").wants(t, 2, "/usr/bin/nothere")
		capable := ""
		for _, f := range readManifest(t, out).Initramfs.Files {
			if f.Capabilities != "" {
				capable += f.Path + " " + f.Capabilities
			}
		}
		if capable != "usr/bin/capable cap_net_raw=ep" {
			t.Errorf("the manifest tells of the capabilities %q", capable)
		}
	})

	// A file system of each kind, each on a disk of another kind.
	disks := slices.Concat(
		drive(w.ext4(w.proofTree("on the NVMe disk")), "nvme", "serial=1"),
		drive(w.vfat(w.proofTree("on the second stick")), "usb-storage"),
		drive(w.squashfs(w.proofTree("on the AHCI disk")), "ide-hd", "bus=ide.0"),
		drive(w.iso9660(w.proofTree("on the AHCI disc")), "ide-cd", "bus=ide.1"),
	)
	nics := []string{"-netdev", "user,id=n1,restrict=on", "-device", "e1000e,netdev=n1,romfile=", "-netdev", "user,id=n2,restrict=on", "-device", "virtio-net-pci,netdev=n2,romfile="}
	c := machine(t, slices.Concat([]string{"-m", "512"}, usbStick(stick), disks, nics)...)
	c.expect("memlinux: ready build=")
	c.expect("memlinux:~# ")
	c.until("[ -b /dev/nvme0n1 ] && [ -b /dev/sdc ] && [ -b /dev/sr0 ] && [ $(ls /sys/class/net | wc -l) = 3 ]")
	c.wants(`for i in /sys/class/net/*/device/driver; do basename $(readlink -f $i); done | sort | xargs`, "e1000e virtio_net")
	c.answer("mkdir /mnt")
	c.wants(`for d in nvme0n1 sda sdb sdc sr0; do mount /dev/$d /mnt 2>/dev/null && echo $(readlink -f /sys/block/$d | grep -oE "usb|ata|nvme" | head -1) $(grep " /mnt " /proc/mounts | cut -d" " -f3) $(cat /mnt/proof.txt) && umount /mnt; done | sort`,
		"ata iso9660 on the AHCI disc\nata squashfs on the AHCI disk\nnvme ext4 on the NVMe disk\nusb vfat on the second stick")

	c.wants("curl --version | head -1", `curl 7\..*`)
	c.wants("cgo", `glibc 2\..*`)
	c.wants("script.py", `\{"tls": "OpenSSL 3.*", "sum": 42\}`)
	c.wants("ls -l /usr/local/bin/setuid | cut -c1-10", `-rwsr-xr-x`)
	nobody := "/usr/bin/setpriv --reuid 65534 --regid 65534 --clear-groups "
	c.wants("capable", `Uid:\t0\t0\t0\t0\nCapEff:\t0*[1-9a-f]+`)
	c.wants(nobody+"capable", `Uid:\t65534\t65534\t65534\t65534\nCapEff:\t0000000000002000`)
	c.wants(nobody+"setuid", `Uid:\t65534\t0\t0\t0\nCapEff:\t0*[1-9a-f]+`)
	c.typed("poweroff\r")
	c.ends(0)
}

// proofTree is a folder to be made a file system of.
func (w *world) proofTree(text string) string {
	w.t.Helper()
	name := "state/" + strings.ReplaceAll(text, " ", "_")
	tree := w.folder(name)
	w.file(name+"/proof.txt", text+"\n")
	return tree
}

func (w *world) ext4(tree string) string {
	w.t.Helper()
	sh(w.t, need.Tool(w.t, "mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-d", tree, tree+".ext4", "16M")
	return tree + ".ext4"
}

func (w *world) vfat(tree string) string {
	w.t.Helper()
	sh(w.t, need.Tool(w.t, "mkfs.vfat", "dosfstools"), "-C", tree+".vfat", "16384")
	sh(w.t, need.Tool(w.t, "mcopy", "mtools"), "-i", tree+".vfat", tree+"/proof.txt", "::/")
	return tree + ".vfat"
}

func (w *world) squashfs(tree string) string {
	w.t.Helper()
	sh(w.t, need.Tool(w.t, "mksquashfs", "squashfs-tools"), tree, tree+".squashfs", "-quiet", "-no-progress")
	return tree + ".squashfs"
}

func (w *world) iso9660(tree string) string {
	w.t.Helper()
	sh(w.t, need.Tool(w.t, "xorriso", "xorriso"), "-as", "mkisofs", "-quiet", "-R", "-o", tree+".iso", tree)
	return tree + ".iso"
}

const rootUUID = "6b0f0c1e-0d2a-4b7e-9a53-0c6a5a8f0003"

// debianDisk is a disk with a Debian that says so when it is up.
func (w *world) debianDisk() string {
	w.t.Helper()
	tree, disk := w.path("state/debian"), w.path("state/debian.img")
	const units = "state/debian/etc/systemd/system/"
	w.folder(units + "multi-user.target.wants")
	w.file(units+"proof.service", `[Unit]
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo "$$(cat /proc/1/comm): multi-user.target is $$(systemctl is-active multi-user.target), / is $$(findmnt -no SOURCE,FSTYPE /)"'
StandardOutput=tty
TTYPath=/dev/ttyS0
`)
	if err := os.Symlink("../proof.service", w.path(units+"multi-user.target.wants/proof.service")); err != nil {
		w.t.Fatal(err)
	}
	w.file("state/debian/etc/fstab", "UUID="+rootUUID+" / ext4 defaults 0 1\n")
	sh(w.t, "tar", "-x", "--numeric-owner", "--keep-old-files", "--exclude", "./dev/*", "--exclude", "./etc/fstab", "-f", pc.DebianTar(w.t), "-C", tree)
	sh(w.t, need.Tool(w.t, "mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-U", rootUUID, "-d", tree, disk, "512M")
	if err := os.RemoveAll(tree); err != nil {
		w.t.Fatal(err)
	}
	return disk
}

// A stick that starts the system on the machine's disk.
func TestStickStartsDebianOnDisk(t *testing.T) {
	if !need.All() {
		t.Skip("skipped: the test needs Debian's linux-image-amd64, which is large; run make test")
	}
	w := newWorld(t)
	disk := w.debianDisk()
	stick := w.path("stick.img")
	w.run("write", "--no-boot-test", "--kernel", "debian:linux-image-amd64", "--modules", "disk,filesystems",
		"--append", "root=UUID="+rootUUID+" init=/usr/lib/systemd/systemd rootwait=8", stick).wants(t, 0)

	t.Run("the disk is there", func(t *testing.T) {
		c := machine(t, slices.Concat([]string{"-m", "512"}, usbStick(stick), drive(disk, "nvme", "serial=1"))...)
		c.expect("memlinux: starting /usr/lib/systemd/systemd on /dev/nvme0n1")
		c.expect("systemd: multi-user.target is active, / is /dev/nvme0n1 ext4")
	})
	t.Run("the disk is not there", func(t *testing.T) {
		c := machine(t, slices.Concat([]string{"-m", "512"}, usbStick(stick))...)
		c.expect("memlinux: root=UUID=" + rootUUID + " did not appear in 8 s; block devices here: ")
		c.expect("memlinux:~# ")
		c.wants("echo sum $((6*7)); grep -c /newroot /proc/mounts", "sum 42\n0")
		c.typed("poweroff\r")
		c.ends(0)
	})
}

// A root that debootstrap or its like has made, as a system in memory.
func TestDebianInMemory(t *testing.T) {
	w := newWorld(t)
	need.Kernel(t)
	out := w.path("out")
	recipe := w.file("memlinux.toml", "hostname = \"ramdebian\"\nroot-password = \"\"\n")
	w.run("build", "-o", out, "--recipe", recipe, "--rootfs", pc.DebianTar(t)).wants(t, 0)
	w.accounts(t, out, "explain", "--json", "--manifest", out)
	m := readManifest(t, out)
	c := machine(t, append(direct(t, out), "-m", fmt.Sprint(max(m.Memory.BIOS, 1024)))...)
	c.expect("memlinux: ready build=" + m.ID)
	c.typed("\r") // the line may have come behind the prompt
	c.expect("ramdebian login: ")
	c.typed("root\r")
	c.expect("root@ramdebian:~# ")
	c.until("systemctl -q is-active multi-user.target")
	c.wants("cat /proc/1/comm; cut -d. -f1 /etc/debian_version; stat -fc %T /; stat -c %A /bin/su", "systemd\n12\ntmpfs\n-rwsr-xr-x")
}

// ociLayout makes an image of two layers, of which the second takes something
// of the first away.
func (w *world) ociLayout() string {
	w.t.Helper()
	busybox, err := os.ReadFile(need.File(w.t, "/bin/busybox", "busybox-static"))
	if err != nil {
		w.t.Fatal(err)
	}
	layer := func(entries ...tar.Header) v1.Layer {
		var b bytes.Buffer
		out := tar.NewWriter(&b)
		for _, h := range entries {
			content := []byte(nil)
			switch {
			case h.Typeflag == tar.TypeSymlink, h.Typeflag == tar.TypeDir:
			case h.Name == "bin/busybox":
				content = busybox
			default:
				content = []byte("what is in " + h.Name + "\n")
			}
			h.Size = int64(len(content))
			if err := out.WriteHeader(&h); err != nil {
				w.t.Fatal(err)
			}
			if _, err := out.Write(content); err != nil {
				w.t.Fatal(err)
			}
		}
		if err := out.Close(); err != nil {
			w.t.Fatal(err)
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
		if err != nil {
			w.t.Fatal(err)
		}
		return l
	}
	image, err := mutate.AppendLayers(empty.Image,
		layer(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, tar.Header{Name: "bin/sh", Typeflag: tar.TypeSymlink, Linkname: "busybox"},
			tar.Header{Name: "srv/", Typeflag: tar.TypeDir, Mode: 0o755}, tar.Header{Name: "srv/old", Typeflag: tar.TypeReg, Mode: 0o644}, tar.Header{Name: "srv/kept", Typeflag: tar.TypeReg, Mode: 0o644}),
		layer(tar.Header{Name: "srv/.wh.old", Typeflag: tar.TypeReg}, tar.Header{Name: "srv/new", Typeflag: tar.TypeReg, Mode: 0o644}))
	if err == nil {
		image, err = mutate.ConfigFile(image, func() *v1.ConfigFile {
			c, cerr := image.ConfigFile()
			if cerr != nil {
				w.t.Fatal(cerr)
			}
			c = c.DeepCopy()
			c.OS, c.Architecture = "linux", "amd64"
			c.Config = v1.Config{Entrypoint: []string{"/bin/sh", "-c", `echo "$GREETING from $PWD:" *; cat new`}, Env: []string{"GREETING=hello"}, WorkingDir: "/srv"}
			return c
		}())
	}
	if err != nil {
		w.t.Fatal(err)
	}
	dir := w.path("state/layout")
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := l.AppendImage(image); err != nil {
		w.t.Fatal(err)
	}
	return dir
}

// An image of a container as a system in memory, proven by write itself.
func TestContainerImageInMemory(t *testing.T) {
	w := newWorld(t)
	need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	need.File(t, "/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf")
	need.Kernel(t)
	image := w.ociLayout()
	// The last one is /dev/console, where the image's command speaks.
	recipe := w.file("state/memlinux.toml", `consoles = ["tty0", "ttyS0,115200"]`)
	o := w.run("--json", "write", "--recipe", recipe, "--rootfs", image, w.path("stick.img"))
	o.wants(t, 0)
	w.holds("stick.img")
	lines := strings.Split(strings.TrimSpace(o.stdout), "\n")
	var end struct{ Report api.Report }
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &end); err != nil {
		t.Fatal(err)
	}
	if r := end.Report; !r.Verified || len(r.Boots) != 2 {
		t.Fatalf("%+v", r)
	}
	for _, b := range end.Report.Boots {
		said, err := os.ReadFile(b.ConsoleLog)
		if err != nil {
			t.Error(err)
		}
		// The shell speaks in between.
		if !b.OK || !b.Shell || !bytes.Contains(said, []byte("hello from /srv: kept new\r\n")) || !bytes.Contains(said, []byte("what is in srv/new\r\n")) {
			t.Errorf("%+v: %s", b, said)
		}
	}
}
