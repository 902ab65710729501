package blockdev

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/memlinux/memlinux/testvm/need"
)

// What a person may lift, and that nothing else is ever lifted. Where there is no
// reason left, there is still no node that could be opened.
func TestTerms(t *testing.T) {
	const nvme = "S4ENNX1R123456"
	for _, c := range []struct {
		what, machine, disk string
		terms               Terms
		refused             []string // codes; nil: admitted
	}{
		{"a fixed disk by its serial", "arch-iso", "nvme0n1", Terms{Serial: nvme}, nil},
		{"a fixed disk without", "arch-iso", "nvme0n1", Terms{}, []string{"not-removable"}},
		{"another serial", "arch-iso", "nvme0n1", Terms{Serial: "S4ENNX1R123457"}, []string{"not-removable"}},
		{"a serial in small letters", "arch-iso", "nvme0n1", Terms{Serial: strings.ToLower(nvme)}, []string{"not-removable"}},
		{"the serial's beginning", "arch-iso", "nvme0n1", Terms{Serial: nvme[:5]}, []string{"not-removable"}},
		{"the serial and a blank", "arch-iso", "nvme0n1", Terms{Serial: nvme + " "}, []string{"not-removable"}},
		{"the name instead", "arch-iso", "nvme0n1", Terms{Serial: "nvme0n1"}, []string{"not-removable"}},
		{"no serial has nothing to type", "virtio", "vdb", Terms{}, []string{"not-removable"}},
		{"a serial of blanks is none", "hostile-names", "sdb", Terms{Serial: "   ", Unmount: []string{"/media/ann/\xe2\x80\xaeolleh"}}, nil},
		{"a large disk by its serial", "usb-disks", "sda", Terms{Serial: "0123456789ABCDEF"}, nil},
		{"a large disk without", "usb-disks", "sda", Terms{}, []string{"too-large"}},
		{"large and fixed", "thirty-disks", "sdd", Terms{Serial: "ZA100003"}, nil},
		{"the neighbour's serial", "thirty-disks", "sdd", Terms{Serial: "ZA100002"}, []string{"not-removable", "too-large"}},
		{"the system's disk by its serial", "laptop", "nvme0n1", Terms{Serial: nvme, Unmount: []string{"/", "/boot/efi"}}, []string{"system", "swap", "held", "not-removable"}},
		{"a RAID's member by its serial", "thirty-disks", "sdc", Terms{Serial: "ZA100002"}, []string{"held", "not-removable", "too-large"}},
		{"mounted, by its serial alone", "thirty-disks", "sdb", Terms{Serial: "ZA100001"}, []string{"mounted", "not-removable", "too-large"}},
		{"zones", "sectors", "sdh", Terms{Serial: "x"}, []string{"not-removable", "too-large", "unsupported"}},
		{"ZFS's disk by its serial", "zfs-root", "sda", Terms{Serial: "S3Z1NB0K"}, []string{"unknown", "not-removable"}},
		{"automounted", "fedora-btrfs", "sda", Terms{Unmount: []string{"/run/media/ann/STICK"}}, nil},
		{"one of two mount points", "laptop", "sdaa", Terms{Unmount: []string{"/media/ann/PHOTOS"}}, []string{"mounted", "held"}},
		{"mounted, and held by a file's loop device", "laptop", "sdaa", Terms{Unmount: []string{"/media/ann/PHOTOS", "/media/ann/two words"}}, []string{"held"}},
		{"mounted through LUKS", "unlocked-stick", "sda", Terms{Unmount: []string{"/media/ann/SECRET"}}, []string{"held"}},
		{"a live system's medium", "debian-live", "sdb", Terms{Unmount: []string{"/run/live/medium"}}, []string{"system", "held"}},
		{"a live system's medium below /media", "alpine-diskless", "sda", Terms{Unmount: []string{"/media/usb"}}, []string{"system", "held"}},
		{"an overlay's layer", "overlay-root", "mmcblk0", Terms{Unmount: []string{"/card"}}, []string{"system"}},
		{"the layer of what is no system", "overlay-root", "sda", Terms{Unmount: []string{"/data"}}, nil},
		{"home", "other-namespace", "sdd", Terms{Unmount: []string{"/home"}}, []string{"system"}},
		{"swap on what may be unmounted", "other-namespace", "sdc", Terms{Unmount: []string{"/data"}}, []string{"swap"}},
		{"in both namespaces", "other-namespace", "sdb", Terms{Unmount: []string{"/media/ann/STICK"}}, nil},
		{"a partition", "laptop", "sda1", Terms{Serial: "4C530001230101117391"}, []string{"partition"}},
		{"a write-protected card", "read-only", "mmcblk0", Terms{}, []string{"read-only"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := machine(t, c.machine)
			_, err := s.OpenOn(t.Context(), c.disk, "", c.terms)
			if c.refused == nil {
				if !errors.Is(err, ErrNoDevice) {
					t.Errorf("not admitted: %v", err)
				}
				return
			}
			var refused *RefusedError
			if !errors.As(err, &refused) {
				t.Fatalf("error %v", err)
			}
			if got := codes(refused.Reasons); !slices.Equal(got, c.refused) {
				t.Errorf("refused for %v: %v", got, err)
			}
		})
	}
}

// On every machine: whatever is typed and agreed to, a hard reason that is not a
// mount stays one, and all reasons are told.
func TestHardReasonsStay(t *testing.T) {
	recorded, err := filepath.Glob("testdata/machines/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	disks, hard, soft, free := 0, 0, 0, 0
	for _, path := range recorded {
		name := strings.TrimSuffix(filepath.Base(path), ".txt")
		s := machine(t, name)
		v, err := s.look()
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range v.nodes {
			if n.partition || n.hidden {
				continue
			}
			disks++
			d := v.device(n)
			all := Terms{Serial: d.Serial}
			for _, p := range v.places(n) {
				all.Unmount = append(all.Unmount, p.point)
			}
			asAgreed := *v
			asAgreed.mounts = maps.Clone(v.mounts)
			_, err := asAgreed.admit(n, all, all.Unmount)
			var refused *RefusedError
			stays := slices.ContainsFunc(d.Reasons, func(r Reason) bool { return !r.Soft && r.Code != ReasonMounted })
			onlySoft := !stays && slices.ContainsFunc(d.Reasons, func(r Reason) bool { return r.Soft })
			switch {
			case stays:
				hard++
				if !errors.As(err, &refused) {
					t.Errorf("%s: %s is not refused, with %v: %v", name, d.Name, d.Reasons, err)
				}
			case onlySoft && d.Serial == "":
				soft++
				if !errors.As(err, &refused) {
					t.Errorf("%s: %s has no serial and is not refused, with %v: %v", name, d.Name, d.Reasons, err)
				}
			default:
				free++
				if err != nil {
					t.Errorf("%s: %s: %v", name, d.Name, err)
				}
			}
			for _, r := range d.Reasons {
				if r.Soft != (r.Code == ReasonNotRemovable || r.Code == ReasonTooLarge) {
					t.Errorf("%s: %s: %+v", name, d.Name, r)
				}
			}
		}
	}
	t.Logf("%d machines, %d disks: %d never written, %d for want of a serial, %d with all agreed to", len(recorded), disks, hard, soft, free)
}

// This machine's own disk, by every name that leads to it. A name is resolved by
// device number, as the command line does, since links can be anything.
func TestOwnDiskByEveryName(t *testing.T) {
	need.Root(t)
	v, err := System{}.look()
	if err != nil {
		t.Fatal(err)
	}
	own := map[devNum]string{} // the disks of the system and what is on them
	for name, n := range v.nodes {
		for _, up := range standing(name, v.above, v.files) {
			if len(v.essential[up]) > 0 && !n.hidden {
				own[devNum{n.Major, n.Minor}] = name
				for _, part := range standing(name, v.above) {
					if p := v.nodes[part]; p != nil {
						own[devNum{p.Major, p.Minor}] = part
					}
				}
			}
		}
	}
	if len(own) == 0 {
		t.Skip("skipped: the system is on no disk that the kernel shows, as in a container")
	}

	links := t.TempDir()
	var paths []string
	for num, name := range own {
		node := filepath.Join(links, fmt.Sprintf("a node of %s", strings.ReplaceAll(name, "/", "!")))
		if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(num.major, num.minor))); err != nil {
			t.Fatal(err)
		}
		link := filepath.Join(links, "usb-Stick_"+strings.ReplaceAll(name, "/", "!"))
		if err := os.Symlink("/dev/"+name, link); err != nil {
			t.Fatal(err)
		}
		twice := link + "-link"
		if err := os.Symlink(link, twice); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, node, link, twice, "/dev/../dev/"+name, "//dev//"+name, "/proc/self/root/dev/"+name)
	}
	// by-id, by-path, by-uuid, block/254:0, root, mapper/…: whatever udev made.
	err = filepath.WalkDir("/dev", func(path string, e fs.DirEntry, err error) error {
		if err == nil && (e.Type()&fs.ModeSymlink != 0 || e.Type()&fs.ModeDevice != 0 && e.Type()&fs.ModeCharDevice == 0) {
			paths = append(paths, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, path := range paths {
		num, ok := nodeNumber(path)
		if !ok || own[num] == "" {
			continue
		}
		target, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%s", num))
		if err != nil {
			t.Fatal(err)
		}
		name := devName(filepath.Base(target))
		seen[name]++
		d, err := System{}.Device(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if d.Major != num.major || d.Minor != num.minor {
			t.Errorf("%s leads to %+v", path, d)
		}
		var all []string
		for _, m := range slices.Concat(v.spaces...) {
			all = append(all, m.point)
		}
		for _, terms := range []Terms{{}, {Serial: d.Serial}, {Serial: d.Serial, Unmount: all}} {
			// Dev has no nodes: what is refused need not be opened.
			if _, err := (System{Dev: t.TempDir()}).OpenOn(t.Context(), name, "", terms); !isRefused(err, ReasonSystem) {
				t.Errorf("%s, by %s: %v", name, path, err)
			}
		}
		// A path is no name.
		if _, err := (System{}).OpenOn(t.Context(), path, "", Terms{}); !errors.Is(err, ErrNoDevice) {
			t.Errorf("%s as a name: %v", path, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(seen)) {
		t.Logf("%s was refused under %d names", name, seen[name])
	}
	if len(seen) < len(own) {
		t.Errorf("of %v only %v were tried", own, seen)
	}
}

// A stick with the header of an encrypted file system that is not unlocked can be
// written, and a person is told what is on it.
func TestLUKSHeader(t *testing.T) {
	name := loop(t, 16*mib, "512")
	// LUKS on-disk format 1.2.3 §2.1: magic, version, cipher, mode, hash, …, UUID at 168.
	header := make([]byte, 592)
	copy(header, "LUKS\xba\xbe\x00\x01aes")
	copy(header[40:], "xts-plain64")
	copy(header[72:], "sha256")
	copy(header[168:], "0a1b2c3d-1111-2222-3333-444455556666")
	if err := os.WriteFile("/dev/"+name, header, 0); err != nil {
		t.Fatal(err)
	}
	d, err := System{}.Device(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Reasons) != 0 || d.Contents[0].Type != "crypto_LUKS" || d.Contents[0].UUID != "0a1b2c3d-1111-2222-3333-444455556666" {
		t.Errorf("device %+v", d)
	}
	disk, err := System{}.Open(t.Context(), name, token(t, name))
	if err != nil {
		t.Fatal(err)
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
}

// dd asks nobody: it must not find us writing the same stick.
func TestOtherWriter(t *testing.T) {
	sleep := need.Tool(t, "sleep", "coreutils")
	name := loop(t, 4*mib, "512")
	tok := token(t, name)
	for flags, refused := range map[int]bool{os.O_RDONLY: false, os.O_WRONLY: true, os.O_RDWR: true} {
		f, err := os.OpenFile("/dev/"+name, flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(sleep, "1000")
		cmd.ExtraFiles = []*os.File{f}
		stop := background(t, cmd)
		f.Close()
		d, err := System{}.Open(t.Context(), name, tok)
		switch {
		case refused:
			if !isRefused(err, ReasonBusy) || !strings.Contains(err.Error(), fmt.Sprintf("sleep (%d)", cmd.Process.Pid)) {
				t.Errorf("open with flags %d by another: %v", flags, err)
			}
		case err != nil:
			t.Errorf("open for reading by another: %v", err)
		default:
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
		stop()
	}
}

func TestSource(t *testing.T) {
	name, point := mountedLoop(t)
	image := filepath.Join(point, "image")
	if err := os.WriteFile(image, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(path string) *os.File {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	onDisk := open(image)
	_, err := System{}.OpenOn(t.Context(), name, token(t, name), Terms{Unmount: []string{point}, Source: onDisk})
	if !isRefused(err, ReasonSource) || !isMounted(t, point) {
		t.Errorf("a file on the disk: %v", err)
	}
	onDisk.Close()
	elsewhere := open(os.Args[0])
	d, err := System{}.OpenOn(t.Context(), name, token(t, name), Terms{Unmount: []string{point}, Source: elsewhere})
	if err != nil {
		t.Fatalf("a file elsewhere: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	disk := open("/dev/" + name)
	if _, err := (System{}).OpenOn(t.Context(), name, token(t, name), Terms{Source: disk}); !isRefused(err, ReasonSource) {
		t.Errorf("the disk itself: %v", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	d, err = System{}.OpenOn(t.Context(), name, token(t, name), Terms{Source: r})
	if err != nil {
		t.Fatalf("a pipe: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// A device can have a node under any path; the loop device over it tells that
// path alone.
func TestLoopOverOddNode(t *testing.T) {
	lower := loop(t, 4*mib, "512")
	num, _ := nodeNumber("/dev/" + lower)
	node := filepath.Join(t.TempDir(), "disk.img")
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(num.major, num.minor))); err != nil {
		t.Fatal(err)
	}
	upper := filepath.Base(need.Loop(t, node, "512"))
	wantRefused(t, lower, ReasonHeld)
	wantRefused(t, upper, ReasonIndirect)
	if err := os.Remove(node); err != nil {
		t.Fatal(err)
	}
	if _, err := (System{}).Open(t.Context(), upper, token(t, upper)); !isRefused(err, ReasonIndirect) {
		t.Errorf("with its path gone: %v", err)
	}
}

func TestSwapFile(t *testing.T) {
	mkswap, swapon, swapoff := need.Tool(t, "mkswap", "util-linux"), need.Tool(t, "swapon", "mount"), need.Tool(t, "swapoff", "mount")
	name, point := mountedLoop(t)
	file := filepath.Join(point, "a swap file")
	if err := os.WriteFile(file, bytes.Repeat([]byte{1}, 2*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, mkswap, file)
	run(t, swapon, file)
	undo(t, swapoff, file)
	wantRefused(t, name, ReasonSwap, ReasonMounted)
	if _, err := (System{}).OpenOn(t.Context(), name, token(t, name), Terms{Unmount: []string{point}}); !isRefused(err, ReasonSwap) || !isMounted(t, point) {
		t.Errorf("unmounting with swap on it: %v", err)
	}
}
