package local

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// loadOption is one of the firmware's boot entries, EFI_LOAD_OPTION (UEFI 2.10
// §3.1.3), as far as it starts a file of a partition.
type loadOption struct {
	attributes  uint32
	description string
	file        string // as the firmware writes it: \EFI\debian\shimx64.efi; "" where it starts something else
	partition   int    // 1-based; 0 where no partition is named
	start       uint64 // LBA
	partUUID    string // GPT: in small letters; ""
	raw         []byte // the option with a device path that any machine can follow
}

// Types of device path nodes (UEFI 2.10 §10.3).
const (
	nodeMedia    = 4
	nodeDisk     = 1 // subtypes of nodeMedia
	nodeFile     = 4
	nodeEnd      = 0x7f
	diskNodeSize = 42
)

var errLoadOption = errors.New("it is no boot entry of the firmware's")

// parseLoadOption reads the data of a variable Boot####.
func parseLoadOption(data []byte) (loadOption, error) {
	if len(data) < 8 {
		return loadOption{}, errLoadOption
	}
	o := loadOption{attributes: binary.LittleEndian.Uint32(data)}
	length := int(binary.LittleEndian.Uint16(data[4:]))
	end := 6
	for ; ; end += 2 {
		if end+2 > len(data) {
			return loadOption{}, errLoadOption
		}
		if data[end] == 0 && data[end+1] == 0 {
			break
		}
	}
	var err error
	if o.description, err = decodeUTF16(data[6:end]); err != nil {
		return loadOption{}, errLoadOption
	}
	nodes := data[end+2:]
	if length > len(nodes) {
		return loadOption{}, errLoadOption
	}
	optional := nodes[length:]
	nodes = nodes[:length]
	short := nodes // from the partition on: the path to a disk differs between machines
	for at := 0; at < len(nodes); {
		if at+4 > len(nodes) {
			return loadOption{}, errLoadOption
		}
		size := int(binary.LittleEndian.Uint16(nodes[at+2:]))
		if size < 4 || at+size > len(nodes) {
			return loadOption{}, errLoadOption
		}
		node := nodes[at : at+size]
		switch {
		case node[0] == nodeEnd:
			at = len(nodes) // more instances are other ways to the same
			continue
		case node[0] == nodeMedia && node[1] == nodeDisk && size >= diskNodeSize:
			o.partition = int(binary.LittleEndian.Uint32(node[4:]))
			o.start = binary.LittleEndian.Uint64(node[8:])
			if node[41] == 2 {
				o.partUUID = guidString(node[24:40])
			}
			short = nodes[at:]
		case node[0] == nodeMedia && node[1] == nodeFile:
			name, err := decodeUTF16(node[4:])
			if err != nil {
				return loadOption{}, errLoadOption
			}
			// A path may go over several nodes.
			o.file = strings.TrimSuffix(o.file, `\`)
			if o.file != "" && !strings.HasPrefix(name, `\`) {
				name = `\` + name
			}
			o.file += name
		}
		at += size
	}
	o.raw = slices.Concat(data[:4], binary.LittleEndian.AppendUint16(nil, uint16(len(short))), data[6:end+2], short, optional)
	return o, nil
}

// guidString writes a GUID as it lies in memory: the first three parts are
// little-endian.
func guidString(g []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%s-%s", le.Uint32(g), le.Uint16(g[4:]), le.Uint16(g[6:]), hex.EncodeToString(g[8:10]), hex.EncodeToString(g[10:16]))
}

// variables make another firmware start the same.
func (o *loadOption) variables() []Variable {
	if o == nil {
		return nil
	}
	return []Variable{
		{Name: "Boot0000", GUID: globalGUID, Attributes: keptVariable, Data: o.raw},
		{Name: "BootOrder", GUID: globalGUID, Attributes: keptVariable, Data: []byte{0, 0}},
	}
}

// loaderOf names the boot loader by the file that the firmware started, or "":
// \EFI\BOOT\BOOTX64.EFI is any.
func loaderOf(file string) string {
	lower := strings.ToLower(strings.ReplaceAll(file, `\`, "/"))
	base := path.Base(lower)
	for _, known := range []struct{ part, name string }{
		{"systemd-boot", loaderSystemdBoot}, {"grub", loaderGRUB2}, {"shim", loaderGRUB2},
		{"refind", "rEFInd"}, {"elilo", "ELILO"}, {"limine", "Limine"}, {"syslinux", "SYSLINUX"}, {"bootmgfw", "the Windows boot manager"},
		{"vmlinuz", "the firmware alone, which starts Linux itself"}, {"linux", "the firmware alone, which starts Linux itself"},
	} {
		if strings.Contains(base, known.part) {
			return known.name
		}
	}
	if path.Dir(lower) == "/efi/linux" {
		return "the firmware alone, which starts Linux itself"
	}
	return ""
}

// askFirmware reads the EFI variables: which entry was started, and what the
// loader says about itself.
func (f *finder) askFirmware() error {
	e := &f.evidence
	current, err := readVariable(f.efivars, "BootCurrent", globalGUID)
	if err != nil {
		return err
	}
	if current != nil && len(current.Data) >= 2 {
		name := fmt.Sprintf("Boot%04X", binary.LittleEndian.Uint16(current.Data))
		v, err := readVariable(f.efivars, name, globalGUID)
		if err != nil {
			return err
		}
		if v != nil {
			if o, err := parseLoadOption(v.Data); err == nil && o.file != "" {
				e.option, e.loader = &o, loaderOf(o.file)
				e.from = fmt.Sprintf("by the firmware's entry %s, %s", name, o.file)
			}
		}
	}
	info, err := readVariable(f.efivars, "LoaderInfo", loaderGUID)
	if err != nil {
		return err
	}
	e.silent = current != nil && info == nil
	if info != nil {
		text, err := decodeUTF16(info.Data)
		switch {
		case err != nil:
		case strings.HasPrefix(text, "systemd-boot"):
			e.loader, e.from = loaderSystemdBoot, "as it says itself: "+text
		case strings.HasPrefix(text, "GRUB"):
			e.loader, e.from = loaderGRUB2, "as it says itself: "+text
		}
	}
	return f.findESP()
}

// findESP finds the partition that the firmware started from.
func (f *finder) findESP() error {
	e := &f.evidence
	if e.option == nil {
		return nil
	}
	for _, m := range f.mounts {
		if m.kind != "vfat" && m.kind != "msdos" {
			continue
		}
		p, err := f.place(f.path(m.point))
		if err != nil {
			return err
		}
		same := p.partUUID != "" && p.partUUID == e.option.partUUID
		if e.option.partUUID == "" {
			same = p.partition == e.option.partition && p.partition != 0 && p.Start == int64(e.option.start)*512
		}
		if same && len(p.disks) == 1 {
			e.esp, e.onDisk = &p, p.disks[0]
			e.dir = filepath.Join(p.MountPoint, path.Dir(strings.ReplaceAll(e.option.file, `\`, "/")))
			return nil
		}
	}
	// It is not mounted: GRUB's partition often is not.
	entries, _ := os.ReadDir(f.path("sys/class/block"))
	found := ""
	for _, entry := range entries {
		node := f.block(entry.Name())
		if node == "" || e.option.partition == 0 || readNumber(filepath.Join(node, "partition")) != e.option.partition {
			continue
		}
		disk := filepath.Dir(node)
		sectors := max(readNumber(filepath.Join(disk, "queue/logical_block_size")), 512) / 512
		if uint64(readNumber(filepath.Join(node, "start"))) == e.option.start*uint64(sectors) {
			if found != "" {
				return nil // several disks look alike
			}
			found = filepath.Base(disk)
		}
	}
	e.onDisk = found
	return nil
}
