package recipe

import (
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// Actions are what a service can be for busybox's init: respawn is started
// again whenever it ends, once is started and left alone, wait and sysinit are
// waited for before anything else starts (sysinit comes first), askfirst is
// respawn after a press of Enter, shutdown runs before power-off and
// ctrlaltdel on these keys.
func Actions() []string {
	return []string{"respawn", "once", "wait", "sysinit", "askfirst", "shutdown", "ctrlaltdel"}
}

// Validate finds what is wrong with the recipe but for the files that it names.
// [Parse] has done it already; it is for a recipe whose values were changed
// since.
func (r *Recipe) Validate() []Problem {
	c := checker{recipe: r}
	c.check()
	return c.problems
}

// checker finds what is wrong with values that have the right type.
type checker struct {
	recipe   *Recipe
	broken   map[string]bool // keys whose values could not be understood, and have been told of
	problems []Problem
}

func (c *checker) bad(key, format string, args ...any) {
	c.problems = append(c.problems, c.recipe.Blame(key, fmt.Sprintf(format, args...)))
}

// given reports whether the file has a key, be its value right or not.
func (c *checker) given(key string) bool { return c.recipe.lines[key] != 0 }

func (c *checker) check() {
	c.kernel()
	c.busybox()
	c.oneOf("microcode", c.recipe.Microcode, "none", "all", "host")
	c.system()
	c.password()
	c.image()
	c.tables()
	for _, p := range c.recipe.Paths() {
		if strings.ContainsFunc(p.Path, unicode.IsControl) {
			c.bad(p.Key, "the path %q has a control character", p.Path)
		}
	}
}

func (c *checker) oneOf(key, value string, can ...string) {
	if !slices.Contains(can, value) {
		c.bad(key, "%q is not known; it can be %s", value, list(can, "or"))
	}
}

// list is words as a sentence has them.
func list(words []string, and string) string {
	n := len(words)
	if n < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:n-1], ", ") + " " + and + " " + words[n-1]
}

var (
	moduleName = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
	digest     = regexp.MustCompile(`^[0-9a-fA-F]{64}$`)
)

func (c *checker) kernel() {
	r := c.recipe
	for i, m := range r.Modules {
		key := fmt.Sprintf("modules[%d]", i)
		switch {
		case !moduleName.MatchString(m):
			c.bad(key, "%q is no name of a module or set; write it as modprobe takes it, without folder and .ko", m)
		case m == "none" && len(r.Modules) > 1:
			c.bad(key, `"none" can't stand beside others`)
		}
	}

	build, source := r.KernelBuild, r.Kernel.Source
	if !source.Built() && c.given("kernel-build") && !c.broken["kernel"] {
		c.bad("kernel-build", "kernel is %q, which is not built; make it debian-source:VERSION or source:…, or leave [kernel-build] out", source)
	}
	if build.Config == "" {
		c.bad("kernel-build.config", "it is empty; it can be minimal, defconfig or a file")
	}
	c.empty("kernel-build.fragments", build.Fragments)
	c.sha256("kernel-build.sha256", build.SHA256)
	switch {
	case (build.Keyring == "") == (build.Signature == ""):
	case build.Keyring == "" && !c.broken["kernel-build.keyring"]:
		c.bad("kernel-build.signature", "keyring is missing: the file with the keys that may have signed")
	case build.Signature == "" && !c.broken["kernel-build.signature"] && source.Kind != KindSourceURL && !c.broken["kernel"]:
		c.bad("kernel-build.keyring", "signature is missing: the file that linux-*.tar.sign is")
	}
	if source.Kind == KindDebianSource {
		for _, key := range []string{"kernel-build.keyring", "kernel-build.signature"} {
			if c.given(key) {
				c.bad(key, "it is for source:…; what comes from Debian is verified by apt")
			}
		}
	}
	signed := build.Keyring != "" || c.broken["kernel-build.keyring"]
	c.insecure("kernel", source, build.SHA256 != "" || c.broken["kernel-build.sha256"] || signed, "sha256 or keyring in [kernel-build]")
}

func (c *checker) busybox() {
	build, source := c.recipe.BusyboxBuild, c.recipe.Busybox.Source
	if !source.Built() && c.given("busybox-build") && !c.broken["busybox"] {
		c.bad("busybox-build", "busybox is %q, which is not built; make it debian-source or source:…, or leave [busybox-build] out", source)
	}
	c.empty("busybox-build.fragments", build.Fragments)
	c.sha256("busybox-build.sha256", build.SHA256)
	c.insecure("busybox", source, build.SHA256 != "" || c.broken["busybox-build.sha256"], "sha256 in [busybox-build]")
}

func (c *checker) empty(key string, paths []string) {
	for i, p := range paths {
		if p == "" {
			c.bad(fmt.Sprintf("%s[%d]", key, i), "it is empty; name a file")
		}
	}
}

func (c *checker) sha256(key, value string) {
	if value != "" && !digest.MatchString(value) {
		c.bad(key, "%q is no SHA-256; it has 64 hex digits, as sha256sum prints them", value)
	}
}

// insecure refuses code that anybody on the way could exchange.
func (c *checker) insecure(key string, s Source, checked bool, by string) {
	if s.Kind == KindSourceURL && strings.HasPrefix(strings.ToLower(s.Value), "http:") && !checked {
		c.bad(key, "http can be forged on its way; use https, or give %s", by)
	}
}

// What a name can be: a label of RFC 1123 (2.1), a layout of XKB with or
// without a variant, a zone as in tzdata, and a console as the kernel's console= has it
// (Linux Documentation/admin-guide/serial-console.rst) on a PC.
var (
	label    = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)
	keymap   = regexp.MustCompile(`^[a-z][a-z0-9_]*(\([A-Za-z0-9_.+-]+\))?$`)
	timezone = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9][A-Za-z0-9_+-]*){0,2}$`)
	console  = regexp.MustCompile(`^(tty[0-9]{1,2}|tty(S|USB)[0-9]{1,2}(,[1-9][0-9]{2,6}([noe]([5-8]r?)?)?)?|hvc[0-9]{1,2})$`)
)

// maxHostname is Linux's __NEW_UTS_LEN, in bytes.
const maxHostname = 64

func (c *checker) system() {
	r := c.recipe
	if h := r.Hostname; len(h) > maxHostname || slices.ContainsFunc(strings.Split(h, "."), func(l string) bool { return !label.MatchString(l) }) {
		c.bad("hostname", "%q is no host name; it is made of letters, digits and inner hyphens, at most %d", h, maxHostname)
	}
	if r.Keymap != "" && !keymap.MatchString(r.Keymap) {
		c.bad("keymap", "%q is no name of a keymap; write it like de or de(nodeadkeys)", r.Keymap)
	}
	if !timezone.MatchString(r.Timezone) {
		c.bad("timezone", "%q is no time zone; write it like Europe/Berlin or UTC", r.Timezone)
	}
	// Both GRUBs must hand the line on as it is; the whole line's length is
	// checked where it is put together.
	if i := strings.IndexFunc(r.Append, func(x rune) bool { return x < ' ' || x > '~' }); i >= 0 {
		c.bad("append", "it has %q; only printable ASCII reaches the kernel unharmed", []rune(r.Append[i:])[0])
	} else if i := strings.IndexAny(r.Append, `'"\`); i >= 0 {
		c.bad("append", "it has a %c, before which GRUB 2 puts a backslash: leave it out", r.Append[i])
	}
	if len(r.Consoles) == 0 {
		c.bad("consoles", "it names none, and so nobody could see the system boot; name one, like tty0")
	}
	devices := map[string]bool{}
	for i, name := range r.Consoles {
		key := fmt.Sprintf("consoles[%d]", i)
		device, _, _ := strings.Cut(name, ",")
		switch {
		case !console.MatchString(name):
			c.bad(key, "%q is no console; write it like tty0, ttyS0,115200 or hvc0", name)
		case devices[device]:
			c.bad(key, "%s is there twice", device)
		}
		devices[device] = true
	}
}

// Hashes as crypt(5) writes them: those that busybox's login can check, too, and
// those that it can't. Tried with Debian 12's: yescrypt and bcrypt keep root out.
var (
	busyboxCrypt = regexp.MustCompile(`^\$[156]\$(rounds=[0-9]+\$)?[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]{22,86}$`)
	otherCrypt   = regexp.MustCompile(`^\$(y|gy|7|2[aby])\$[./0-9A-Za-z$]{20,}$`)
)

const makeHash = "make one with: openssl passwd -6"

func (c *checker) password() {
	p := c.recipe.RootPassword
	switch {
	case p == nil || *p == "" || busyboxCrypt.MatchString(*p):
	case !otherCrypt.MatchString(*p): // which is not repeated: it may be a password
		c.bad("root-password", "it is no hash, and a password does not belong into a recipe; "+makeHash)
	case c.recipe.Rootfs == "" && !c.broken["rootfs"]:
		kind, _, _ := strings.Cut((*p)[1:], "$")
		c.bad("root-password", "busybox's login can't check a hash of the kind $%s$; "+makeHash, kind)
	}
}

func (c *checker) image() {
	r := c.recipe
	c.oneOf("compression", r.Compression, "auto", "zstd", "gzip", "none")
	if level := r.CompressionLevel; level != 0 && !c.broken["compression"] {
		switch most := map[string]int{"zstd": 22, "gzip": 9}[r.Compression]; {
		case most == 0:
			c.bad("compression-level", "compression is %q; a level is for zstd or gzip", r.Compression)
		case level < 0 || level > most:
			c.bad("compression-level", "%d is no level of %s; it can be 1 to %d, or 0 for the standard one", level, r.Compression, most)
		}
	}
	if len(r.Boot) == 0 {
		c.bad("boot", "it names none; it can be bios, uefi or both")
	}
	for i, b := range r.Boot {
		key := fmt.Sprintf("boot[%d]", i)
		c.oneOf(key, b, "bios", "uefi")
		if slices.Contains(r.Boot[:i], b) {
			c.bad(key, "%s is there twice", b)
		}
	}
}

// maxCommand is what every busybox's init has room for, in bytes; newer ones take
// more.
const maxCommand = 240

// tables checks the programs, files, overlays and services.
func (c *checker) tables() {
	r := c.recipe
	targets := targets{}
	for i, p := range r.Programs {
		key := fmt.Sprintf("program[%d]", i)
		c.needs(key, "from", p.From)
		if p.To != "" || c.given(key+".to") {
			c.target(targets, key, p.To)
		}
	}
	for i, f := range r.Files {
		key := fmt.Sprintf("file[%d]", i)
		from, text := c.given(key+".from") || f.From != "", c.given(key+".text") || f.Text != nil
		switch {
		case from && text:
			c.bad(key, "it has both from and text; leave one out")
		case !from && !text:
			c.bad(key, `it has neither from = "FILE" nor text = "CONTENT"`)
		case from:
			c.needs(key, "from", f.From)
		}
		c.needs(key, "to", f.To)
		if f.To != "" {
			c.target(targets, key, f.To)
		}
	}
	for i, o := range r.Overlays {
		key := fmt.Sprintf("overlay[%d]", i)
		c.needs(key, "from", o.From)
		if o.To != "/" && !c.broken[key+".to"] {
			c.place(key, o.To)
		}
	}
	targets.check(c)
	for i, s := range r.Services {
		key := fmt.Sprintf("service[%d]", i)
		c.needs(key, "command", s.Command)
		switch {
		case len(s.Command) > maxCommand:
			c.bad(key+".command", "it has %d bytes; busybox's init takes %d: put it into a script", len(s.Command), maxCommand)
		case strings.ContainsFunc(s.Command, unicode.IsControl):
			c.bad(key+".command", "%q has a line break or another control character; put what is longer than a line into a script", s.Command)
		case strings.Contains(s.Command, "#"):
			c.bad(key+".command", "it has a #, behind which busybox's init takes all for a comment; put it into a script")
		}
		if !c.broken[key+".action"] {
			c.oneOf(key+".action", s.Action, Actions()...)
		}
		if s.Console != "" && (!console.MatchString(s.Console) || strings.Contains(s.Console, ",")) {
			c.bad(key+".console", "%q is no console; write it like tty2 or ttyS0", s.Console)
		}
	}
}

// needs wants the key of a table to have a value.
func (c *checker) needs(table, key, value string) {
	full := table + "." + key
	switch {
	case c.broken[full] || strings.TrimSpace(value) != "":
	case c.given(full):
		c.bad(full, "it is empty")
	default:
		c.bad(table, "%s is missing", key)
	}
}

// hidden are the folders over which /init mounts file systems: what lies there
// could never be seen.
var hidden = []string{"/dev", "/proc", "/run", "/sys"}

// maxPath is Linux's PATH_MAX with room for its end, in bytes.
const maxPath = 4095

// place checks where in the system something shall lie.
func (c *checker) place(key, to string) bool {
	switch {
	case c.broken[key+".to"]:
		return false
	case strings.ContainsFunc(to, unicode.IsControl):
		c.bad(key+".to", "the path %q has a control character", to)
	case len(to) > maxPath:
		c.bad(key+".to", "the path has %d bytes; Linux takes %d", len(to), maxPath)
	case !path.IsAbs(to) || path.Clean(to) != to || to == "/":
		c.bad(key+".to", "%q is no place; write the whole path, like /usr/bin/tool, without .. and without a / at its end", to)
	case slices.ContainsFunc(hidden, func(dir string) bool { return to == dir || strings.HasPrefix(to, dir+"/") }):
		c.bad(key+".to", "%s would be hidden: the system mounts a file system on /%s as it boots", to, strings.Split(to, "/")[1])
	default:
		return true
	}
	return false
}

// targets are the tables that put a file somewhere, by place.
type targets map[string][]string

func (c *checker) target(t targets, key, to string) {
	if c.place(key, to) {
		t[to] = append(t[to], key)
	}
}

// check finds two files in one place, and a file where another needs a folder.
func (t targets) check(c *checker) {
	for _, to := range slices.Sorted(maps.Keys(t)) {
		keys := t[to]
		for _, key := range keys[1:] {
			c.bad(key+".to", "%s is taken by [[%s]] on line %d", to, shown(keys[0]), c.recipe.nearest(keys[0]))
		}
		for dir := path.Dir(to); dir != "/"; dir = path.Dir(dir) {
			if other := t[dir]; len(other) > 0 {
				c.bad(keys[0]+".to", "%s is a file, by [[%s]] on line %d, and can't be a folder", dir, shown(other[0]), c.recipe.nearest(other[0]))
			}
		}
	}
}
