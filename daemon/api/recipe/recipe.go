// Package recipe is the recipe file memlinux.toml: what it can say, what it
// means where it says nothing, and what is wrong with one, each with its line.
//
// It looks at no file that a recipe names: the client, which reads those with
// its user's rights, finds them by [Recipe.Paths]. The daemon reads the same
// text again by [Parse] and so depends on no check of a client.
package recipe

import (
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"strings"
)

// FileName is what a recipe is called where no other name is given.
const FileName = "memlinux.toml"

// Recipe is what a recipe file says, with the standard value of each key that
// it leaves out. [Recipe.Line] tells the one from the other. Paths are relative
// to the folder of the recipe until [Recipe.Rebase].
type Recipe struct {
	Kernel       KernelSource  `mapstructure:"kernel"`
	KernelBuild  KernelBuild   `mapstructure:"kernel-build"`
	Modules      []string      `mapstructure:"modules"`   // sets or names of kernel modules; "none" alone for none; never empty
	Microcode    string        `mapstructure:"microcode"` // none, all, or host for this machine's CPU
	Busybox      BusyboxSource `mapstructure:"busybox"`
	BusyboxBuild BusyboxBuild  `mapstructure:"busybox-build"`
	Rootfs       string        `mapstructure:"rootfs"` // a folder, tar or OCI layout that becomes the root; "" for memlinux's own

	Hostname     string   `mapstructure:"hostname"`
	Keymap       string   `mapstructure:"keymap"`        // a layout of XKB, such as de or de(nodeadkeys); "" for the kernel's, which is us
	Timezone     string   `mapstructure:"timezone"`      // such as Europe/Berlin
	Append       string   `mapstructure:"append"`        // more words for the kernel's command line
	Consoles     []string `mapstructure:"consoles"`      // as console= takes them; the last one is /dev/console; never empty
	DHCP         bool     `mapstructure:"dhcp"`          // on all Ethernet links
	RootPassword *string  `mapstructure:"root-password"` // a crypt(5) hash; "" lets root in without one; nil says nothing about it

	Compression      string   `mapstructure:"compression"`       // of the initramfs: auto, zstd, gzip or none
	CompressionLevel int      `mapstructure:"compression-level"` // zstd 1 to 22, gzip 1 to 9; 0 is the standard one
	Boot             []string `mapstructure:"boot"`              // firmware to boot from: bios, uefi; never empty
	RAM              Size     `mapstructure:"ram"`               // of the machine that it is for; 0 is unknown

	Programs []Program `mapstructure:"program"`
	Files    []File    `mapstructure:"file"`
	Overlays []Overlay `mapstructure:"overlay"`
	Services []Service `mapstructure:"service"`

	name  string         // of the recipe file
	lines map[string]int // of each key that the file gives, by its path (file[0].to)
}

// KernelBuild says how a kernel is built from source.
type KernelBuild struct {
	Config    string   `mapstructure:"config"`    // minimal, defconfig or a .config file
	Fragments []string `mapstructure:"fragments"` // files with more options, merged in this order
	SHA256    string   `mapstructure:"sha256"`    // of the source as it is, 64 hex digits in lower case; "" is not checked
	Keyring   string   `mapstructure:"keyring"`   // file of OpenPGP keys, one of which must have signed
	Signature string   `mapstructure:"signature"` // file with a signature of the uncompressed tar; "" is beside a URL
}

// BusyboxBuild says how busybox is built from source.
type BusyboxBuild struct {
	Fragments []string `mapstructure:"fragments"` // files with more options, merged in this order
	SHA256    string   `mapstructure:"sha256"`    // of the source as it is, 64 hex digits in lower case; "" is not checked
}

// Program is an executable that comes with the libraries or the interpreter
// that it needs.
type Program struct {
	From string `mapstructure:"from"`
	To   string `mapstructure:"to"`   // absolute; never empty
	Mode *Mode  `mapstructure:"mode"` // nil for that of From
}

// File is one file of the system: either a copy of From or the text itself.
type File struct {
	From  string  `mapstructure:"from"` // "" where there is Text
	Text  *string `mapstructure:"text"`
	To    string  `mapstructure:"to"`   // absolute
	Mode  *Mode   `mapstructure:"mode"` // nil for that of From, 0644 for Text
	Owner Owner   `mapstructure:"owner"`
}

// Overlay is a folder whose content goes over the system.
type Overlay struct {
	From string `mapstructure:"from"`
	To   string `mapstructure:"to"` // absolute
}

// Service is a command that busybox's init runs (busybox, examples/inittab).
type Service struct {
	Command string `mapstructure:"command"`
	Action  string `mapstructure:"action"`  // one of [Actions]
	Console string `mapstructure:"console"` // such as tty2; "" for init's own
}

// What is not left to the zero value where a recipe says nothing. The modules
// are those sets that it takes to use a keyboard and to find and mount a disk.
var standards = map[string]any{
	"kernel":              "auto",
	"kernel-build.config": "minimal",
	"modules":             []string{"input", "usb-storage", "disk", "filesystems"},
	"microcode":           "none",
	"busybox":             "auto",
	"hostname":            "memlinux",
	"timezone":            "UTC",
	"consoles":            []string{"ttyS0,115200", "tty0"},
	"compression":         "auto",
	"boot":                []string{"bios", "uefi"},
}

// settle fills in what depends on other keys, and what viper does not fill in:
// the standard values within lists of tables.
func (r *Recipe) settle() {
	if len(r.Modules) == 0 {
		r.Modules = []string{"none"}
	}
	r.KernelBuild.SHA256 = strings.ToLower(r.KernelBuild.SHA256)
	r.BusyboxBuild.SHA256 = strings.ToLower(r.BusyboxBuild.SHA256)
	for i := range r.Programs {
		p := &r.Programs[i]
		switch {
		case p.To != "" || p.From == "" || r.Line(fmt.Sprintf("program[%d].to", i)) != 0:
		case filepath.IsAbs(p.From):
			p.To = filepath.Clean(p.From)
		default:
			p.To = "/usr/bin/" + filepath.Base(p.From)
		}
	}
	for i := range r.Overlays {
		if o := &r.Overlays[i]; o.To == "" && r.Line(fmt.Sprintf("overlay[%d].to", i)) == 0 {
			o.To = "/"
		}
	}
	for i := range r.Services {
		if s := &r.Services[i]; s.Action == "" && r.Line(fmt.Sprintf("service[%d].action", i)) == 0 {
			s.Action = "respawn"
		}
	}
}

// Line is the line of the recipe file where key is given, counted from 1, and 0
// where it is left out. A key is as in hostname, kernel-build.config, file[0]
// and file[0].to.
func (r *Recipe) Line(key string) int { return r.lines[key] }

// Forget makes [Recipe.Line] 0 for key and all that is in it: for a value that
// has been replaced by one from elsewhere, which no line is to blame for.
func (r *Recipe) Forget(key string) {
	maps.DeleteFunc(r.lines, func(k string, _ int) bool {
		rest, ok := strings.CutPrefix(k, key)
		return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

// Problem is one thing that is wrong with a recipe.
type Problem struct {
	File string `json:"file"`          // the name of the recipe file
	Line int    `json:"line"`          // from 1; 0 where no line is to blame
	Key  string `json:"key,omitempty"` // such as file.to; "" where it is no key's
	Text string `json:"text"`          // a sentence without full stop
}

// String is the problem as compilers and editors write one:
// memlinux.toml:12: modules: the reason.
func (p Problem) String() string {
	s := p.File
	if p.Line > 0 {
		s += fmt.Sprintf(":%d", p.Line)
	}
	if p.Key != "" {
		s += ": " + p.Key
	}
	return s + ": " + p.Text
}

// Want is what has to be at a path.
type Want int

// What has to be at a path.
const (
	WantFile   Want = iota // a regular file
	WantFolder             // a folder
	WantEither             // one of the two
)

// Path is a file or folder that a recipe names.
type Path struct {
	Line int    // of the recipe file
	Key  string // such as file[0].from
	Path string
	Want Want
}

// Paths lists the files and folders that the recipe names, in the order of
// their kinds.
func (r *Recipe) Paths() []Path {
	var all []Path
	r.paths(func(key string, path *string, want Want) {
		all = append(all, Path{r.nearest(key), key, *path, want})
	})
	return all
}

// Rebase makes every path that is relative one below dir, the folder of the
// recipe.
func (r *Recipe) Rebase(dir string) {
	r.paths(func(_ string, path *string, _ Want) {
		if !filepath.IsAbs(*path) {
			*path = filepath.Join(dir, *path)
		}
	})
}

// Blame makes a problem of what somebody else found wrong with the value of
// key, which is as in [Path].
func (r *Recipe) Blame(key, text string) Problem {
	return Problem{File: r.name, Line: r.nearest(key), Key: shown(key), Text: text}
}

func (r *Recipe) paths(f func(key string, path *string, want Want)) {
	one := func(key string, path *string, want Want) {
		if *path != "" {
			f(key, path, want)
		}
	}
	source := func(key string, s *Source) {
		switch s.Kind {
		case KindFile:
			one(key, &s.Value, WantFile)
		case KindSourcePath:
			one(key, &s.Value, WantEither)
		}
	}
	list := func(key string, paths []string) {
		for i := range paths {
			one(fmt.Sprintf("%s[%d]", key, i), &paths[i], WantFile)
		}
	}
	source("kernel", &r.Kernel.Source)
	if c := &r.KernelBuild.Config; *c != "minimal" && *c != "defconfig" {
		one("kernel-build.config", c, WantFile)
	}
	list("kernel-build.fragments", r.KernelBuild.Fragments)
	one("kernel-build.keyring", &r.KernelBuild.Keyring, WantFile)
	one("kernel-build.signature", &r.KernelBuild.Signature, WantFile)
	source("busybox", &r.Busybox.Source)
	list("busybox-build.fragments", r.BusyboxBuild.Fragments)
	one("rootfs", &r.Rootfs, WantEither)
	for i := range r.Programs {
		one(fmt.Sprintf("program[%d].from", i), &r.Programs[i].From, WantFile)
	}
	for i := range r.Files {
		one(fmt.Sprintf("file[%d].from", i), &r.Files[i].From, WantFile)
	}
	for i := range r.Overlays {
		one(fmt.Sprintf("overlay[%d].from", i), &r.Overlays[i].From, WantFolder)
	}
}

// nearest is the line of key or, where that has none of its own, of what it is
// in.
func (r *Recipe) nearest(key string) int {
	for key != "" {
		if line := r.lines[key]; line != 0 {
			return line
		}
		key = key[:max(strings.LastIndexAny(key, ".["), 0)]
	}
	return 0
}

// Mode is the permissions of a file with setuid, setgid and sticky, as
// [fs.FileMode] has them. A recipe writes it in octal, in quotes: "0644".
type Mode fs.FileMode

// UnmarshalText reads an octal mode of three or four digits.
func (m *Mode) UnmarshalText(text []byte) error {
	n, bad := 0, len(text) != 3 && len(text) != 4
	for _, c := range text {
		if c < '0' || c > '7' {
			bad = true
			break
		}
		n = n<<3 | int(c-'0')
	}
	if bad {
		return fmt.Errorf(`%q is no mode; write it in octal, like "0644" or "4755"`, text)
	}
	mode := fs.FileMode(n & 0o777)
	for bit, special := range map[int]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if n&bit != 0 {
			mode |= special
		}
	}
	*m = Mode(mode)
	return nil
}
