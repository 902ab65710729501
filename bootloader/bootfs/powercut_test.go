package bootfs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/memlinux/memlinux/testvm/need"
)

// cutKinds are the file systems whose power is cut, in a virtual machine, so
// that FAT is among them whatever kernel the tests run on.
var cutKinds = []struct {
	name    string
	size    int64
	mkfs    string
	pkg     string
	args    []string
	modules []string // of Debian's cloud kernel, which has ext4 built in
	subsets int      // random states for each piece of the log between two flushes
	after   bool     // judge each third also after the journal is replayed, by e2fsck
}{
	{"ext4", 32 << 20, "mkfs.ext4", "e2fsprogs", []string{"-q", "-F"}, nil, 12, true},
	{"vfat", 32 << 20, "mkfs.vfat", "dosfstools", []string{"-F", "16"}, []string{"fat", "vfat", "nls_cp437", "nls_ascii", "nls_utf8"}, 24, false},
	{"xfs", 320 << 20, "mkfs.xfs", "xfsprogs", []string{"-q", "-f"}, []string{"xfs", "libcrc32c"}, 2, false},
	{"btrfs", 128 << 20, "mkfs.btrfs", "btrfs-progs", []string{"-q", "-f"}, []string{"btrfs", "zstd_compress", "raid6_pq", "xor", "libcrc32c"}, 2, false},
}

// The power is cut at any moment of an installation and a removal: what the
// disk holds is then each prefix of what was written, and since the last flush
// any part of it. GRUB's own file system code reads each of these states.
func TestPowerCuts(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short")
	}
	need.Root(t)
	fstest := need.Tool(t, "grub-fstest", "grub-common")
	kernel, _ := need.Kernel(t)
	steps := buildSteps(t)
	for _, k := range cutKinds {
		t.Run(k.name, func(t *testing.T) {
			memory := t.TempDir()
			run(t, "mount", "-t", "tmpfs", "tmpfs", memory)
			t.Cleanup(func() { run(t, "umount", "--lazy", memory) })
			image := filepath.Join(memory, "image")
			makeImage(t, image, k.name, k.size, need.Tool(t, k.mkfs, k.pkg), k.args)
			before, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			initrd := filepath.Join(memory, "initrd")
			makeInitrd(t, initrd, steps, filepath.Dir(filepath.Dir(kernel)), k.modules)
			log := filepath.Join(memory, "log")
			runGuest(t, kernel, initrd, image, log, k.name)
			entries := readLog(t, log)
			booted := time.Since(start)

			// From here on image is the disk as it was, and becomes each state.
			if err := os.WriteFile(image, before, 0o600); err != nil {
				t.Fatal(err)
			}
			r := &replay{disk: before, seed: maphash.MakeSeed(), seen: map[uint64]bool{}, file: image}
			r.judge = func() error {
				grub := func(name string) ([]byte, error) { return grubRead(t.Context(), fstest, image, name) }
				if err := judge(parallel(grub)); err != nil {
					return err
				}
				if !k.after || r.states%3 > 0 {
					return nil
				}
				fixed := image + ".fsck"
				defer os.Remove(fixed)
				if err := exec.Command("cp", "--sparse=always", image, fixed).Run(); err != nil {
					return err
				}
				out, err := exec.Command("e2fsck", "-fy", fixed).CombinedOutput()
				if code := new(exec.ExitError); err != nil && (!errors.As(err, &code) || code.ExitCode() > 1) {
					return fmt.Errorf("e2fsck: %w: %s", err, out)
				}
				grub = func(name string) ([]byte, error) { return grubRead(t.Context(), fstest, fixed, name) }
				if err := judge(parallel(grub)); err != nil {
					return fmt.Errorf("with the journal replayed: %w", err)
				}
				return nil
			}
			r.run(t, entries, k.subsets)
			t.Logf("%s: %d states, %d of them distinct, of %d writes and %d flushes; %v in the guest, %v in all",
				k.name, r.states, len(r.seen), r.writes, r.flushes, booted.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
			if r.flushes < 20 || r.writes < 50 {
				t.Errorf("the log is too short for what was done")
			}
		})
	}
}

func makeImage(t *testing.T, image, kind string, size int64, mkfs string, args []string) {
	t.Helper()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	run(t, mkfs, append(args, image)...)
	files := t.TempDir()
	if kind == "vfat" {
		putAll(t, files, foreign())
		mcopy := need.Tool(t, "mcopy", "mtools")
		run(t, mcopy, "-s", "-i", image, filepath.Join(files, "grub"), filepath.Join(files, "vmlinuz-6.1"), "::/")
		return
	}
	run(t, "mount", "-o", "loop", "-t", kind, image, files)
	defer run(t, "umount", files)
	putAll(t, files, foreign())
}

// makeInitrd makes an initramfs of the program, its sources and modules.
func makeInitrd(t *testing.T, path, steps, kernelRoot string, modules []string) {
	t.Helper()
	var buf bytes.Buffer
	w := cpio.NewWriter(&buf)
	put := func(name string, mode cpio.FileMode, data []byte) {
		if err := w.WriteHeader(&cpio.Header{Name: name, Mode: mode, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"dev", "proc", "boot", "modules", "source"} {
		put(dir, cpio.TypeDir|0o755, nil)
	}
	program, err := os.ReadFile(steps)
	if err != nil {
		t.Fatal(err)
	}
	put("init", cpio.TypeReg|0o755, program)
	for name, data := range sources() {
		put("source/"+name, cpio.TypeReg|0o644, data)
	}
	wanted := map[string]bool{}
	for _, m := range append([]string{"virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"}, modules...) {
		wanted[m+".ko"] = true
	}
	err = filepath.WalkDir(filepath.Join(kernelRoot, "lib/modules"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !wanted[e.Name()] {
			return err
		}
		delete(wanted, e.Name())
		data, err := os.ReadFile(path)
		put("modules/"+e.Name(), cpio.TypeReg|0o644, data)
		return err
	})
	if err != nil || len(wanted) > 0 {
		t.Fatalf("the kernel has no modules %v, %v", wanted, err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// runGuest runs the steps on the image; QEMU writes what reaches the disk, and
// when it is flushed, into log.
func runGuest(t *testing.T, kernel, initrd, image, log, kind string) {
	t.Helper()
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	boot(t, kernel, initrd, kind,
		"-blockdev", "driver=file,node-name=f,filename="+image,
		"-blockdev", "driver=file,node-name=l,filename="+log,
		"-blockdev", "driver=blklogwrites,node-name=blw,file=f,log=l,log-sector-size=512",
		"-device", "virtio-blk-pci,drive=blw")
}

// boot runs the guest until it has done its steps.
func boot(t *testing.T, kernel, initrd, kind string, args ...string) {
	t.Helper()
	qemu := need.Tool(t, "qemu-system-x86_64", "qemu-system-x86")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, append([]string{"-accel", "tcg", "-M", "q35", "-m", "512", "-nodefaults", "-no-user-config", "-no-reboot",
		"-nic", "none", "-display", "none", "-serial", "stdio", "-kernel", kernel, "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1 steps.type=" + kind}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "STEPS done") {
		t.Fatalf("the guest: %v\n%s", err, out)
	}
}

// A variable is made, changed and removed in a real UEFI's efivarfs.
func TestVariableInFirmware(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short")
	}
	kernel, _ := need.Kernel(t)
	code := need.File(t, "/usr/share/OVMF/OVMF_CODE_4M.fd", "ovmf")
	dir := t.TempDir()
	initrd, vars := filepath.Join(dir, "initrd"), filepath.Join(dir, "vars")
	makeInitrd(t, initrd, buildSteps(t), filepath.Dir(filepath.Dir(kernel)), []string{"efivarfs"})
	run(t, "cp", need.File(t, "/usr/share/OVMF/OVMF_VARS_4M.fd", "ovmf"), vars)
	boot(t, kernel, initrd, "efivarfs",
		"-drive", "if=pflash,format=raw,unit=0,readonly=on,file="+code,
		"-drive", "if=pflash,format=raw,unit=1,file="+vars)
}

// logEntry is a write, or a flush of all writes before it.
type logEntry struct {
	flush  bool
	offset int64
	data   []byte
}

// readLog reads the log of QEMU's blklogwrites, which is dm-log-writes' (Linux'
// Documentation/admin-guide/device-mapper/log-writes.rst).
func readLog(t *testing.T, path string) []logEntry {
	t.Helper()
	log, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := parseLog(log)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func parseLog(log []byte) ([]logEntry, error) {
	const magic, sector = 0x6a736677736872, 512
	const flagFlush, flagFUA, flagDiscard = 1, 2, 4
	if len(log) < sector || binary.LittleEndian.Uint64(log) != magic {
		return nil, errors.New("not a log of writes")
	}
	count, size := binary.LittleEndian.Uint64(log[16:]), binary.LittleEndian.Uint32(log[24:])
	if size != sector {
		return nil, fmt.Errorf("a log with sectors of %d bytes", size)
	}
	var entries []logEntry
	at := uint64(sector)
	for i := range count {
		if at+sector > uint64(len(log)) {
			return nil, fmt.Errorf("the log ends before entry %d of %d", i, count)
		}
		where, sectors, flags := binary.LittleEndian.Uint64(log[at:]), binary.LittleEndian.Uint64(log[at+8:]), binary.LittleEndian.Uint64(log[at+16:])
		at += sector
		if flags&flagFlush != 0 {
			entries = append(entries, logEntry{flush: true})
		}
		if flags&flagDiscard != 0 {
			return nil, errors.New("a discard, which nothing here does")
		}
		if sectors == 0 {
			continue
		}
		if sectors > (uint64(len(log))-at)/sector || where > 1<<40 {
			return nil, fmt.Errorf("the log ends within entry %d", i)
		}
		entries = append(entries, logEntry{offset: int64(where * sector), data: log[at : at+sectors*sector]})
		at += sectors * sector
		if flags&flagFUA != 0 {
			// Durable is only this write; as a flush it would make the others so.
			return nil, errors.New("a write by FUA, which virtio does not have")
		}
	}
	return entries, nil
}

// replay brings a file through the states of a disk.
type replay struct {
	disk  []byte // as it is at the last flush
	file  string // what judge looks at
	judge func() error
	seed  maphash.Seed
	seen  map[uint64]bool // states that were judged, by the sum of their sectors' hashes

	states, writes, flushes int
}

func (r *replay) run(t *testing.T, entries []logEntry, subsets int) {
	t.Helper()
	f, err := os.OpenFile(r.file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	put := func(p []byte, offset int64) {
		if _, err := f.WriteAt(p, offset); err != nil {
			t.Fatal(err)
		}
	}
	look := func(sum uint64, what string, args ...any) {
		r.states++
		if r.seen[sum] {
			return
		}
		r.seen[sum] = true
		if err := r.judge(); err != nil {
			// The first few say it.
			t.Errorf("%s: %v", fmt.Sprintf(what, args...), err)
			if kept := os.Getenv("MEMLINUX_TEST_KEEP"); kept != "" {
				_ = exec.Command("cp", "--sparse=always", r.file, filepath.Join(kept, fmt.Sprintf("state%d", r.states))).Run()
			}
		}
	}
	const sector = 512
	hash := func(at int64, p []byte) uint64 {
		var h maphash.Hash
		h.SetSeed(r.seed)
		_ = binary.Write(&h, binary.LittleEndian, at)
		_, _ = h.Write(p)
		return h.Sum64()
	}
	random := rand.New(rand.NewPCG(1, 2)) // the same states in each run
	var durable uint64                    // hash of the state at the last flush
	look(durable, "before")
	for i := 0; i < len(entries); {
		if entries[i].flush {
			r.flushes++
			i++
			continue
		}
		end := i
		for end < len(entries) && !entries[end].flush {
			end++
		}
		// now is what the file holds where it is not as at the last flush.
		now := map[int64][]byte{}
		sum := durable
		set := func(at int64, p []byte) {
			was := now[at]
			if was == nil {
				was = r.disk[at : at+sector]
			}
			sum ^= hash(at, was) ^ hash(at, p)
			now[at] = p
			put(p, at)
		}
		reset := func() {
			for at := range now {
				put(r.disk[at:at+sector], at)
			}
			clear(now)
			sum = durable
		}
		total := 0
		for _, e := range entries[i:end] {
			total += len(e.data) / sector
		}
		for range subsets {
			if total < 2 {
				break // it is there or not: prefixes
			}
			share := random.Float64()
			for _, e := range entries[i:end] {
				for at := 0; at < len(e.data); at += sector {
					if random.Float64() < share {
						set(e.offset+int64(at), e.data[at:at+sector])
					}
				}
			}
			look(sum, "a part of the writes %d to %d", i, end)
			reset()
			if t.Failed() && r.states > 20 {
				break
			}
		}
		for j, e := range entries[i:end] {
			r.writes++
			for at := 0; at < len(e.data); at += sector {
				set(e.offset+int64(at), e.data[at:at+sector])
			}
			look(sum, "all up to write %d", i+j)
		}
		for at, p := range now {
			copy(r.disk[at:], p)
		}
		durable = sum
		i = end
	}
}

// grubRead reads a file from an image as GRUB does.
func grubRead(ctx context.Context, fstest, image, name string) ([]byte, error) {
	var out, complaint bytes.Buffer
	cmd := exec.CommandContext(ctx, fstest, image, "cat", "/"+name)
	cmd.Stdout, cmd.Stderr = &out, &complaint
	err := cmd.Run()
	if strings.Contains(complaint.String(), "not found") {
		return nil, fmt.Errorf("%w: %s", os.ErrNotExist, complaint.Bytes())
	}
	if err == nil && complaint.Len() > 0 {
		err = errors.New("it complains")
	}
	if err != nil {
		return nil, fmt.Errorf("grub-fstest: %w: %s", err, complaint.Bytes())
	}
	return out.Bytes(), nil
}

// parallel reads all files that judge may ask for at once.
func parallel(read func(string) ([]byte, error)) func(string) ([]byte, error) {
	type result struct {
		data []byte
		err  error
	}
	results := map[string]*result{}
	var wg sync.WaitGroup
	limit := make(chan struct{}, 2)
	for name := range installed() {
		r := &result{}
		results[name] = r
		wg.Go(func() {
			limit <- struct{}{}
			r.data, r.err = read(name)
			<-limit
		})
	}
	wg.Wait()
	return func(name string) ([]byte, error) { return results[name].data, results[name].err }
}

func FuzzParseLog(f *testing.F) {
	head := func(count uint64) []byte {
		p := make([]byte, 512)
		binary.LittleEndian.PutUint64(p, 0x6a736677736872)
		binary.LittleEndian.PutUint64(p[16:], count)
		binary.LittleEndian.PutUint32(p[24:], 512)
		return p
	}
	f.Add(head(0))
	f.Add(append(append(head(1), 0, 0, 0, 0, 0, 0, 0, 0, 1), make([]byte, 1015)...))
	f.Add(append(head(1<<60), make([]byte, 512)...))
	f.Fuzz(func(t *testing.T, log []byte) {
		entries, err := parseLog(log)
		if err == nil && len(entries) > len(log) {
			t.Error("more entries than bytes")
		}
	})
}

// The judge must find what is wrong.
func TestJudge(t *testing.T) {
	s := sources()
	for _, c := range []struct {
		name   string
		change func(files map[string][]byte)
		ok     bool
	}{
		{"nothing done", func(f map[string][]byte) {}, true},
		{"a payload half done, unnamed", func(f map[string][]byte) { f["memlinux/vmlinuz"] = []byte("half") }, true},
		{"all done", func(f map[string][]byte) { clear(f); merge(f, installed()) }, true},
		{"the menu missing", func(f map[string][]byte) { delete(f, "grub/menu.lst") }, false},
		{"the menu empty", func(f map[string][]byte) { f["grub/menu.lst"] = nil }, false},
		{"the menu cut", func(f map[string][]byte) { f["grub/menu.lst"] = f["grub/menu.lst"][:512] }, false},
		{"a new file empty", func(f map[string][]byte) { f["grub/custom.cfg"] = []byte{} }, false},
		{"the menu before its kernel", func(f map[string][]byte) {
			merge(f, installed())
			delete(f, "memlinux/vmlinuz")
			f["grub/grubenv"] = s["grubenv.old"]
		}, false},
		{"the menu with a broken initramfs", func(f map[string][]byte) {
			merge(f, installed())
			f["memlinux/initramfs"] = append(bytes.Clone(s["initramfs"][:699_999]), 0)
		}, false},
		{"next before the menu", func(f map[string][]byte) { f["grub/grubenv"] = s["grubenv.new"] }, false},
		{"a foreign file broken", func(f map[string][]byte) { f["grub/grub.cfg"] = nil }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			files := foreign()
			c.change(files)
			err := judge(func(name string) ([]byte, error) {
				data, there := files[name]
				if !there {
					return nil, os.ErrNotExist
				}
				return data, nil
			})
			if (err == nil) != c.ok {
				t.Errorf("got %v", err)
			}
		})
	}
}

func merge(to, from map[string][]byte) {
	for name, data := range from {
		to[name] = data
	}
}
