package api

// Report is what a job has proven. It is the one schema of the result, on the
// bus (as JSON under [ResultReport]) as well as for --json. Sizes are bytes.
type Report struct {
	Kind     string    `json:"kind"`             // the job's kind
	Target   *Target   `json:"target,omitempty"` // what was written or verified
	System   *System   `json:"system,omitempty"`
	Entry    *Entry    `json:"entry,omitempty"` // of this PC's boot menu: what was installed or removed
	Image    *Image    `json:"image,omitempty"`
	Capacity *Capacity `json:"capacity,omitempty"`
	Boots    []Boot    `json:"boots,omitempty"`
	Written  bool      `json:"written"`  // the whole image is on the target and was read back
	Verified bool      `json:"verified"` // every check that was asked for was run and passed
	Warnings []string  `json:"warnings,omitempty"`
	Seconds  float64   `json:"seconds"` // from the job's start

	Resumed string `json:"resumed,omitempty"` // the job whose interrupted write this one went on with
}

// Target is the disk or file that a job is about.
type Target struct {
	Kind       string `json:"kind"` // device or file
	Name       string `json:"name,omitempty"`
	Model      string `json:"model,omitempty"`
	Serial     string `json:"serial,omitempty"`
	Transport  string `json:"transport,omitempty"`
	Size       int64  `json:"size"`
	SectorSize int    `json:"sector_size"`
}

// System is the generated in-memory system.
type System struct {
	ID              string `json:"id"`      // the System's digest
	Cmdline         string `json:"cmdline"` // as the boot entry gives it to the kernel
	KernelRelease   string `json:"kernel_release"`
	KernelSource    string `json:"kernel_source,omitempty"`
	KernelSize      int64  `json:"kernel_size"`
	KernelSHA256    string `json:"kernel_sha256"`
	InitramfsSize   int64  `json:"initramfs_size"`
	InitramfsSHA256 string `json:"initramfs_sha256"`
	MemoryBIOS      int    `json:"memory_bios_mib"` // the least RAM it comes up in, in MiB
	MemoryUEFI      int    `json:"memory_uefi_mib"`
}

// Image is the disk image that was written or found.
type Image struct {
	Size          int64    `json:"size"`
	Bytes         int64    `json:"bytes"` // in all extents
	Extents       []Extent `json:"extents"`
	VolumeID      string   `json:"volume_id"`        // of the EFI System Partition, XXXX-XXXX
	SHA256Planned string   `json:"sha256_planned"`   // the image's digest before a byte was written
	SHA256Written string   `json:"sha256_written"`   // of what was written
	SHA256Read    string   `json:"sha256_read"`      // of what was read back
	Written       int64    `json:"written"`          // bytes that went to the disk
	Unchanged     int64    `json:"unchanged"`        // bytes that it had already
	Rewritten     int64    `json:"rewritten"`        // bytes that came back wrong and were written again
	Source        *Source  `json:"source,omitempty"` // of somebody else's image; its digests are then the SHA-256 of its bytes alone, and SHA256Planned is empty
	Fault         string   `json:"fault,omitempty"`  // what is wrong with the disk: flipped, dropped, wraps, unstable, read-error, write-error, unplugged, read-only, short, stalled
}

// Source is what an image was made of that is not ours.
type Source struct {
	Name     string `json:"name,omitempty"`     // as the user named it; the client fills it in
	Format   string `json:"format"`             // raw, gzip, xz, zstd or bzip2
	Bytes    int64  `json:"bytes"`              // as it was given
	SHA256   string `json:"sha256,omitempty"`   // of these; "" if not all of it was read
	Expected string `json:"expected,omitempty"` // the SHA-256 that it had to have; "" if it was held against none
	From     string `json:"from,omitempty"`     // where Expected is from; the client fills it in
}

// Capacity is what a disk says that it holds, and what it does.
type Capacity struct {
	Claimed int64  `json:"claimed"`         // bytes
	Real    int64  `json:"real"`            // bytes, to within a MiB
	Fault   string `json:"fault,omitempty"` // what it does with the rest: wraps, dropped, short or flipped
	At      int64  `json:"at,omitempty"`    // the lowest byte that does not hold what it is given
	Places  int    `json:"places"`          // that were tried
}

// Extent is a run of bytes on a disk.
type Extent struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// Entry is what a job did to this PC's boot menu.
type Entry struct {
	Loader  string       `json:"loader"` // GRUB 2, GRUB Legacy, systemd-boot, …
	ID      string       `json:"id,omitempty"`
	Title   string       `json:"title,omitempty"`
	Default bool         `json:"default"` // it boots by itself
	Next    bool         `json:"next"`    // the next boot takes it, once
	DryRun  bool         `json:"dry_run,omitempty"`
	Changes []FileChange `json:"changes"` // in their order; none: all was so already
}

// What happens to a file.
const (
	ActionCreate  = "create"
	ActionReplace = "replace" // by a new file, in one step
	ActionWrite   = "write"   // over its bytes, where they are
	ActionRemove  = "remove"
)

// FileChange is a boot file that was, or would be, changed.
type FileChange struct {
	Path   string `json:"path"`
	Action string `json:"action"`
	Size   int64  `json:"size"`           // bytes, afterwards
	Diff   string `json:"diff,omitempty"` // unified, of text
}

// BootMenu is this PC's boot menu.
type BootMenu struct {
	Loader    string      `json:"loader"`
	Firmware  string      `json:"firmware"`  // bios or uefi
	Directory string      `json:"directory"` // where our kernels and initramfs files lie
	Entries   []BootEntry `json:"entries"`
	Warnings  []string    `json:"warnings,omitempty"`
}

// BootEntry is an entry of this PC's boot menu.
type BootEntry struct {
	ID      string `json:"id,omitempty"` // only of ours
	Title   string `json:"title"`
	Cmdline string `json:"cmdline,omitempty"` // only of ours
	Ours    bool   `json:"ours"`
	Default bool   `json:"default"` // it boots by itself
	Next    bool   `json:"next"`    // the next boot takes it, once
}

// Boot is the verdict on one firmware. Seconds are host time from the start of
// QEMU; 0 means not reached.
type Boot struct {
	Firmware   string  `json:"firmware"` // bios or uefi
	OK         bool    `json:"ok"`
	Skipped    bool    `json:"skipped,omitempty"` // this disk can't boot so on any machine; Reason says why
	Reason     string  `json:"reason,omitempty"`  // why it is not OK
	Reached    string  `json:"reached,omitempty"` // of a system that is not ours: how far it was seen: boot loader, kernel, login
	GRUB       float64 `json:"seconds_to_grub"`
	Kernel     float64 `json:"seconds_to_kernel"`
	Ready      float64 `json:"seconds_to_ready"`
	RAM        int     `json:"ram_mib,omitempty"` // as the booted system saw it
	Shell      bool    `json:"shell"`             // the shell on the serial console answered
	Accel      string  `json:"accelerator,omitempty"`
	QEMU       string  `json:"qemu,omitempty"` // version
	ConsoleLog string  `json:"console_log,omitempty"`
	Screenshot string  `json:"screenshot,omitempty"`
}

// Plan is what a write would do to a device.
type Plan struct {
	Token   string   // proves to Write that the device is still this one; "" where nothing can lift a reason
	Refused []Reason // every reason against writing it; empty when it may be written
	Mounts  []Mount  // where the device, or something on it, is mounted
	Erases  []Content

	// Interrupted is the job whose write to the device was interrupted, which
	// [OptResume] goes on with; "" for none.
	Interrupted string
	// Agreed: it is surely that device, and nothing has come on it since, so that
	// what a person agreed to then still holds.
	Agreed bool
}

// Mount is a place where a device is mounted.
type Mount struct {
	Device string // the kernel's name of what is mounted
	Point  string // any bytes but NUL
	Type   string // of the file system
	ByUser bool   // where desktops mount what is plugged in: it can be offered to unmount it
}

// Reason is why a device may not be written.
type Reason struct {
	Code string `json:"code"`
	Text string `json:"text"`
	Soft bool   `json:"soft,omitempty"` // the device's serial, as [OptSerial], lifts it
}

// ReasonMounted is the Code of a Reason that [OptUnmount] can lift.
const ReasonMounted = "mounted"

// Content is something that a device holds: a filesystem, a partition table, a
// partition.
type Content struct {
	Name  string `json:"name"` // the device or partition it is on
	Size  int64  `json:"size"`
	Type  string `json:"type"`
	Label string `json:"label,omitempty"`
}

// Device is a disk as the bus shows it.
type Device struct {
	Name       string    `json:"name"` // kernel name
	Path       string    `json:"path"` // device node
	Size       int64     `json:"size"`
	SectorSize int       `json:"sector_size"`
	Vendor     string    `json:"vendor,omitempty"`
	Model      string    `json:"model,omitempty"`
	Serial     string    `json:"serial,omitempty"`
	Transport  string    `json:"transport,omitempty"`
	Removable  bool      `json:"removable"`
	ReadOnly   bool      `json:"read_only"`
	Contents   []Content `json:"contents,omitempty"`
	Refused    []Reason  `json:"refused,omitempty"`

	// Interrupted is the job whose write to the device was interrupted, which
	// [OptResume] goes on with.
	Interrupted string `json:"interrupted,omitempty"`
}

// Job is a job as the bus shows it.
type Job struct {
	ID         string  `json:"id"`
	Kind       string  `json:"kind"`
	Owner      uint32  `json:"owner"` // uid
	Cancelable bool    `json:"cancelable"`
	State      string  `json:"state"`
	Phase      string  `json:"phase"`
	Progress   float64 `json:"progress"` // of the whole job, 0 to 1; 1 only when it succeeded
	Bytes      uint64  `json:"bytes"`    // done in this phase; or another Unit
	Total      uint64  `json:"total"`    // of this phase; 0 if unknown
	Rate       uint64  `json:"rate"`     // per second
	Unit       string  `json:"unit"`     // of these three: bytes or objects
	Message    string  `json:"message,omitempty"`
	Error      string  `json:"error,omitempty"` // the name of the error that ended it
	Report     *Report `json:"report,omitempty"`
}
