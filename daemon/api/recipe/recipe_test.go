package recipe

import (
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pelletier/go-toml/v2"
)

func texts(problems []Problem) []string {
	var all []string
	for _, p := range problems {
		all = append(all, p.String())
	}
	return all
}

// parsed is a recipe that has no problems.
func parsed(t *testing.T, text string) Recipe {
	t.Helper()
	r, problems := Parse([]byte(text), "r")
	if len(problems) > 0 {
		t.Fatalf("problems:\n%s\nin\n%s", strings.Join(texts(problems), "\n"), text)
	}
	return r
}

func same(t *testing.T, what string, got, want Recipe) {
	t.Helper()
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Recipe{}), cmpopts.EquateEmpty()); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func ptr[T any](v T) *T { return &v }

func TestStandardValues(t *testing.T) {
	same(t, "an empty file", parsed(t, ""), Recipe{
		Kernel:      KernelSource{Source{Kind: KindAuto}},
		KernelBuild: KernelBuild{Config: "minimal"},
		Modules:     []string{"input", "usb-storage", "disk", "filesystems"},
		Microcode:   "none",
		Busybox:     BusyboxSource{Source{Kind: KindAuto}},
		Hostname:    "memlinux",
		Timezone:    "UTC",
		Consoles:    []string{"ttyS0,115200", "tty0"},
		Compression: "auto",
		Boot:        []string{"bios", "uefi"},
	})
	for key := range standards {
		if _, ok := schema[key]; !ok {
			t.Errorf("a standard value for %s, which is no key", key)
		}
	}
}

var sampleHash = regexp.MustCompile(`\$6\$memlinux\$[./A-Za-z0-9]{86}`).FindString(Sample)

func TestSampleIsTrue(t *testing.T) {
	same(t, "the sample as it is", parsed(t, Sample), parsed(t, ""))

	var standard []string
	for _, m := range regexp.MustCompile(`(?m)^# Standard: (.* = .*)$`).FindAllStringSubmatch(Sample, -1) {
		standard = append(standard, m[1])
	}
	same(t, "its standard values without those of what is built", parsed(t, strings.Join(slices.DeleteFunc(slices.Clone(standard), func(s string) bool {
		return strings.Contains(s, "-build.")
	}), "\n")), parsed(t, ""))
	same(t, "all its standard values, where all is built",
		parsed(t, "kernel = 'debian-source:6.1'\nbusybox = 'debian-source'\n"+strings.Join(slices.DeleteFunc(standard, func(s string) bool {
			// A kernel from Debian has no signature of its own.
			return strings.HasPrefix(s, "kernel = ") || strings.HasPrefix(s, "busybox = ") || strings.Contains(s, "keyring") || strings.Contains(s, "signature")
		}), "\n")),
		parsed(t, "kernel = 'debian-source:6.1'\nbusybox = 'debian-source'\n"))

	all := regexp.MustCompile(`(?m)^#([a-z\[])`).ReplaceAllString(Sample, "$1")
	sum := strings.Repeat("0123456789abcdef", 4)
	r := parsed(t, all)
	same(t, "the sample without comment marks", r, Recipe{
		Kernel:           KernelSource{Source{KindSourcePath, "linux-6.12.1.tar.xz"}},
		KernelBuild:      KernelBuild{"defconfig", []string{"wifi.config", "debug.config"}, sum, "kernel-keys.gpg", "linux-6.12.1.tar.sign"},
		Modules:          []string{"usb-storage", "network", "wireguard"},
		Microcode:        "all",
		Busybox:          BusyboxSource{Source{KindSourcePath, "busybox-1.36.1.tar.bz2"}},
		BusyboxBuild:     BusyboxBuild{[]string{"busybox.config"}, sum},
		Rootfs:           "debian.tar",
		Hostname:         "kiosk-7",
		Keymap:           "de",
		Timezone:         "Europe/Berlin",
		Append:           "mitigations=auto panic=10",
		Consoles:         []string{"tty0", "ttyS0,115200"},
		DHCP:             true,
		RootPassword:     &sampleHash,
		Compression:      "zstd",
		CompressionLevel: 19,
		Boot:             []string{"uefi"},
		RAM:              512 << 20,
		Programs:         []Program{{From: "/usr/bin/curl", To: "/usr/bin/curl"}, {From: "agent", To: "/usr/local/bin/agent", Mode: ptr(Mode(0o755))}},
		Files:            []File{{From: "motd", To: "/etc/motd"}, {Text: ptr("nameserver 192.0.2.53\n"), To: "/etc/resolv.conf", Mode: ptr(Mode(0o600)), Owner: Owner{1000, 1000}}},
		Overlays:         []Overlay{{From: "overlay", To: "/opt/app"}},
		Services:         []Service{{"/usr/local/bin/agent --verbose", "respawn", "tty2"}},
	})
	for key, t2 := range schema {
		if isTables(t2) {
			key += "[0]"
		}
		// Keys of lists of tables may be in any of them.
		found := r.Line(key) != 0
		for i := range 2 {
			if table, leaf, ok := strings.Cut(key, "."); ok {
				found = found || r.Line(fmt.Sprintf("%s[%d].%s", table, i, leaf)) != 0
			}
		}
		if !found {
			t.Errorf("the sample does not show %s", key)
		}
	}
}

// docs/recipe.md has a row | `key` | type | `standard` | ... for each key.
func TestReferenceNamesEveryKey(t *testing.T) {
	b, err := os.ReadFile("../../../docs/recipe.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string][]string{}
	section := ""
	for l := range strings.Lines(string(b)) {
		if h, ok := strings.CutPrefix(l, "## "); ok {
			section = strings.Trim(strings.TrimSpace(h), "`[]") + "."
			if !strings.HasPrefix(h, "`[") {
				section = ""
			}
			continue
		}
		if cells := strings.Split(strings.TrimSpace(l), " | "); len(cells) == 5 && strings.HasPrefix(cells[0], "| `") {
			rows[section+strings.Trim(cells[0], "| `")] = cells
		}
	}
	for key, typ := range schema {
		if isTable(typ) || isTables(typ) {
			continue
		}
		row, ok := rows[key]
		if !ok {
			t.Errorf("docs/recipe.md has no row for %s", key)
			continue
		}
		delete(rows, key)
		if want, ok := standards[key]; ok {
			text := fmt.Sprintf("%q", want)
			if list, ok := want.([]string); ok {
				text = `["` + strings.Join(list, `", "`) + `"]`
			}
			if row[2] != "`"+text+"`" {
				t.Errorf("docs/recipe.md says that %s is %s where it is not given; it is %s", key, row[2], text)
			}
		}
		example := strings.Trim(strings.TrimSuffix(row[4], " |"), "`")
		if _, problems := Parse([]byte(tableOf(key)+strings.ReplaceAll(example, `\|`, "|")), "r"); slices.ContainsFunc(problems, func(p Problem) bool {
			return !strings.Contains(p.Text, "missing") && !strings.Contains(p.Text, "neither") && !strings.Contains(p.Text, "not built") && !strings.Contains(p.Text, "a level is for")
		}) {
			t.Errorf("the example of %s in docs/recipe.md: %s", key, texts(problems))
		}
	}
	for key := range rows {
		t.Errorf("docs/recipe.md has a row for %s, which is no key", key)
	}
}

func tableOf(key string) string {
	table, _, ok := strings.Cut(key, ".")
	switch {
	case !ok:
		return ""
	case isTables(schema[table]):
		return "[[" + table + "]]\n"
	}
	return "[" + table + "]\n"
}

func TestProblems(t *testing.T) {
	hash := "$6$saltsalt$" + strings.Repeat("a", 86)
	for _, c := range []struct {
		name, text string
		want       []string // how each problem begins, in order
	}{
		{"unknown key, near another", "hostnme = 'x'", []string{"r:1: hostnme: this key is not known here; do you mean hostname?"}},
		{"unknown key, like none", "zzz = 1", []string{"r:1: zzz: this key is not known here; known are append, boot,"}},
		{"keys have one spelling", "Hostname = 'x'\nroot_password = ''", []string{"r:1: Hostname: this key is not known here; do you mean hostname?", "r:2: root_password: this key is not known here; do you mean root-password?"}},
		{"many for one", "[[files]]\nto = '/a'", []string{"r:1: [[files]] is not known here; do you mean [[file]]?"}},
		{"a key below a table it does not belong to", "[[overlay]]\nfrom = 'a'\nhostname = 'x'", []string{"r:3: overlay.hostname: this key is not known here; it belongs above the first [table]"}},
		{"a key without its table", "fragments = []", []string{"r:1: fragments: this key is not known here; it belongs under [busybox-build] or under [kernel-build]"}},
		{"a key in quotes with a dot", "'kernel-build.config' = 'x'", []string{`r:1: "kernel-build.config": this key is not known here`}},
		{"a key with a line break", `"a\nb" = 1`, []string{`r:1: "a\nb": this key`}},
		{"a dotted key into a list", "file.to = '/a'", []string{"r:1: file: there can be many of it; write [[file]]"}},
		{"a dotted key into a text", "kernel.x = 1", []string{"r:1: kernel.x: this key is not known"}},
		{"an unknown table with what is in it", "[network]\nhostname = 5\nx = 1\n[[file]]\nfrom = 'a'", []string{"r:1: [network] is not known here", "r:4: file: to is missing"}},
		{"a table where a value is meant", "[hostname]\nx = 1", []string{`r:1: hostname: it is no table; write hostname = "text"`}},
		{"one bracket too few", "[file]\nto = '/a'", []string{"r:1: file: there can be many of it; write [[file]]"}},
		{"one bracket too many", "[[kernel-build]]\nconfig = 'minimal'", []string{"r:1: kernel-build: there can be only one; write [kernel-build]", "r:1: kernel-build: kernel is \"auto\", which is not built"}},

		{"wrong types", "hostname = 5\nmodules = 'disk'\ndhcp = 'yes'\ncompression-level = '3'\nboot = [1]\nkernel-build = 'minimal'\nkernel = true\nappend = ['a']\nfile = 'x'\n",
			[]string{`r:1: hostname: it must be a text in quotes, like "text"`, `r:2: modules: it must be a list of texts, like ["a", "b"]`, "r:3: dhcp: it must be true or false",
				"r:4: compression-level: it must be a whole number", "r:5: boot: it must be a text", "r:6: kernel-build: it must be a table", "r:7: kernel: it must be a text", "r:8: append: it must be a text", "r:9: file: it must be a list of tables"}},
		{"a mode without quotes", "[[file]]\ntext = ''\nto = '/a'\nmode = 0o644", []string{`r:4: file.mode: it must be a text in quotes, like "0644"`}},
		{"a wrong element has its own line", "modules = [\n  'disk',\n  5,\n]", []string{"r:3: modules: it must be a text"}},
		{"a date", "ram = 2026-01-01", []string{"r:1: ram: it must be a text in quotes, like \"512MiB\""}},
		{"too large a number", "compression-level = 99999999999999999999", []string{"r:1: compression-level: 99999999999999999999 is too large"}},
		{"a list of lists", "modules = [['a']]", []string{"r:1: modules: it must be a text"}},

		{"twice", "hostname = 'a'\nhostname = 'b'", []string{"r:2: hostname: it is given twice; the first is on line 1"}},
		{"a table twice", "kernel = 'debian-source:6.1'\n[kernel-build]\nconfig = 'defconfig'\n[kernel-build]\nfragments = []", []string{"r:4: kernel-build: it is given twice; the first is on line 2"}},
		{"a table and dotted keys", "kernel = 'debian-source:6.1'\nkernel-build.config = 'defconfig'\n[kernel-build]\nfragments = []", []string{"r:3: kernel-build: it is given twice; the first is on line 2"}},
		{"a table as a value and dotted keys", "kernel = 'debian-source:6.1'\nkernel-build = { config = 'defconfig' }\nkernel-build.fragments = []", []string{"r:3: kernel-build: it is given twice; the first is on line 2"}},
		{"a list as a value and tables", "file = [{ text = '', to = '/a' }]\n[[file]]\ntext = ''\nto = '/b'", []string{"r:2: file: it is given twice; the first is on line 1"}},

		{"a text without quotes", "hostname = box\nkeymap = de", []string{"r:1: hostname: this is no TOML: a value must stand here; a text stands in quotes", "r:2: keymap: this is no TOML"}},
		{"no value", "hostname =\nzz = 1", []string{"r:1: hostname: this is no TOML", "r:2: zz: this key"}},
		{"two on a line", "hostname = 'a' keymap = 'b'\ntimezone = 'a b'", []string{"r:1: hostname: this is no TOML", "r:2: timezone: "}},
		{"a list that does not end", "modules = ['disk',\n\nhostname = '-'\n", []string{"r:3: modules: this is no TOML: a value must stand here; a text stands in quotes (in what begins on line 1)", "r:3: hostname: \"-\" is no host name"}},
		{"a text that does not end", "hostname = 'x\nkeymap = '-'\n", []string{"r:1: hostname: this is no TOML", "r:2: keymap: "}},
		{"a long text that does not end hides what follows", "[[file]]\nto = '/a'\ntext = '''\nx = 1\ny = 2\n", []string{"r:3: file.text: this is no TOML"}},
		{"a header that does not end, and what is in it", "[[file\nhostname = 5\n[[overlay]]\n", []string{"r:1: this is no TOML", "r:3: overlay: from is missing"}},
		{"behind a header", "[[file]] x\nfrom = 'a'\n[[file]]\nto = '/b'\n", []string{"r:1: this is no TOML", "r:3: file: it has neither"}},
		{"behind a comment with a list", "modules = [ # first\n 'a', # ]\n] x\nhostname = '-'", []string{"r:3: modules: this is no TOML", "r:4: hostname"}},
		{"a control character in a comment", "hostname = 'x'\n# \x01\nkeymap = '-'", []string{"r:2: this is no TOML", "r:3: keymap"}},
		{"no UTF-8", "hostname = '\xff'\n", []string{"r:1: hostname: this is no TOML"}},
		{"another kind of file", strings.Repeat("<x/>\n", 500), []string{"r:1: this is no TOML: invalid character at start of key: <"}},
		{"another kind of file with much like a key", strings.Repeat("x = y;\n", 500), slices.Repeat([]string{"r:"}, maxSyntax+1)},
		{"Windows' line ends", "hostname = '-'\r\n\r\nzz = 1\r\n", []string{"r:1: hostname", "r:3: zz"}},
		{"too large", "#" + strings.Repeat("x", MaxSize), []string{"r: is larger than 64 KiB"}},
		{"what only TOML's fine print forbids", "compression = 'zstd'\ncompression-level = 03", []string{"r:2: this is no TOML"}},
		{"one mistake hides no other", "hostname = 5\nzz = 1\nkernel = 'debain:x'\nram = '5'\n[[service]]\naction = 'x'\n",
			[]string{"r:1: hostname", "r:2: zz", "r:3: kernel", "r:4: ram", "r:5: service: command is missing", "r:6: service.action"}},
		{"a wrong value is not missing too", "[[file]]\nfrom = 5\nto = 6\n[[service]]\ncommand = 7\n[[program]]\nfrom = x\n[[overlay]]\nfrom = {}", []string{"r:2: ", "r:3: ", "r:5: ", "r:7: ", "r:9: "}},

		{"kernels", "kernel = 'debian:'", []string{`r:1: kernel: "" is no name of a package`}},
		{"an empty kernel", "kernel = ''", []string{"r:1: kernel: it is empty; it can be auto,"}},
		{"a kernel series", "kernel = 'debian-source:6.1.2'", []string{"r:1: kernel: \"6.1.2\" is no version"}},
		{"a kernel's URL without source", "kernel = 'https://x/linux.tar.xz'", []string{`r:1: kernel: a URL of a source begins with source:, as in "source:https://x/linux.tar.xz"`}},
		{"not every URL", "kernel = 'source:ftp://x/linux.tar.xz'", []string{"r:1: kernel: \"ftp://x/linux.tar.xz\" is no https or http URL"}},
		{"http without a hash", "kernel = 'source:http://x/linux.tar.xz'", []string{"r:1: kernel: http can be forged"}},
		{"busybox by http without a hash", "busybox = 'source:http://x/b.tar'", []string{"r:1: busybox: http can be forged"}},
		{"debian of a kernel lacks the package", "kernel = 'debian'", []string{`r:1: kernel: "debian" lacks what; write debian:PACKAGE`}},
		{"a signature without keys does not make http safe", "kernel = 'source:http://x/l.tar.xz'\n[kernel-build]\nsignature = 'a'", []string{"r:1: kernel: http can be forged", "r:3: kernel-build.signature: keyring"}},
		{"what is built, but not from source", "[kernel-build]\nconfig = 'defconfig'\n[busybox-build]\n", []string{"r:1: kernel-build: kernel is \"auto\", which is not built", "r:3: busybox-build: busybox is \"auto\""}},
		{"the same in other words", "kernel-build.config = 'defconfig'\nbusybox-build = {}", []string{"r:1: kernel-build: ", "r:2: busybox-build: "}},
		{"a kernel that is wrong is told of once", "kernel = 'debain-source:6.1'\n[kernel-build]\nconfig = 'defconfig'", []string{"r:1: kernel: "}},
		{"hashes", "kernel = 'source:a'\n[kernel-build]\nsha256 = 'ab'", []string{"r:3: kernel-build.sha256: "}},
		{"a signature without keys", "kernel = 'source:a'\n[kernel-build]\nsignature = 'a'", []string{"r:3: kernel-build.signature: keyring is missing"}},
		{"keys without a signature", "kernel = 'source:a'\n[kernel-build]\nkeyring = 'a'", []string{"r:3: kernel-build.keyring: signature is missing"}},
		{"a signature of Debian's source", "kernel = 'debian-source:6.1'\n[kernel-build]\nkeyring = 'a'\nsignature = 'b'", []string{"r:3: kernel-build.keyring: it is for source:", "r:4: kernel-build.signature: it is for source:"}},
		{"empty names of files", "kernel = 'source:a'\n[kernel-build]\nconfig = ''\nfragments = [\n 'a',\n '']", []string{"r:3: kernel-build.config: it is empty", "r:6: kernel-build.fragments: it is empty"}},

		{"modules", "modules = [\n'e1000.ko',\n'disk',\n'none']", []string{"r:2: modules: \"e1000.ko\" is no name", "r:4: modules: \"none\" can't stand beside others"}},
		{"microcode", "microcode = 'intel'", []string{"r:1: microcode: \"intel\" is not known; it can be none, all or host"}},
		{"host names", "hostname = 'a_b'", []string{"r:1: hostname: "}},
		{"a host name that ends in a hyphen", "hostname = 'a-.b'", []string{"r:1: hostname: "}},
		{"an empty host name", "hostname = ''", []string{"r:1: hostname: "}},
		{"a long host name", "hostname = '" + strings.Repeat("abcdefg.", 8) + "x'", []string{"r:1: hostname: "}},
		{"keymaps are no paths", "keymap = '../de'", []string{"r:1: keymap: "}},
		{"keymaps are layouts", "keymap = 'de-latin1'", []string{"r:1: keymap: "}},
		{"time zones are no paths", "timezone = '../../etc/passwd'", []string{"r:1: timezone: "}},
		{"time zones are no rules", "timezone = 'CET-1CEST,M3.5.0'", []string{"r:1: timezone: "}},
		{"command lines with quotes", "append = 'a=\"b c\"'", []string{"r:1: append: it has a \", before which GRUB 2"}},
		{"command lines with letters of their own", "append = 'ä'", []string{"r:1: append: it has 'ä'; only printable ASCII"}},
		{"command lines of two lines", `append = "a\nb"`, []string{`r:1: append: it has '\n'; only`}},
		{"consoles", "consoles = ['ttyS0,fast', 'tty0', 'tty0', '/dev/tty1']", []string{"r:1: consoles: \"ttyS0,fast\"", "r:1: consoles: tty0 is there twice", "r:1: consoles: \"/dev/tty1\""}},
		{"no console", "consoles = []", []string{"r:1: consoles: it names none"}},
		{"a password is not repeated", "root-password = 'hunter2'", []string{"r:1: root-password: it is no hash, and a password does not belong into a recipe; make one with: openssl passwd -6"}},
		{"a hash that busybox does not know", "root-password = '$y$j9T$abcdefghijklmnop$3dL1LkYnZM.OVXuVdnnaKVDlLYT92dRwOzDZ5XiVCe.'", []string{"r:1: root-password: busybox's login can't check a hash of the kind $y$"}},
		{"half a hash", "root-password = '$6$salt$'", []string{"r:1: root-password: it is no hash"}},
		{"compression", "compression = 'xz'", []string{"r:1: compression: \"xz\" is not known; it can be auto, zstd, gzip or none"}},
		{"a level of what", "compression-level = 3", []string{"r:1: compression-level: compression is \"auto\"; a level is for zstd or gzip"}},
		{"a level of gzip", "compression = 'gzip'\ncompression-level = 12", []string{"r:2: compression-level: 12 is no level of gzip; it can be 1 to 9"}},
		{"firmware", "boot = ['bios', 'efi', 'bios']", []string{"r:1: boot: \"efi\" is not known", "r:1: boot: bios is there twice"}},
		{"no firmware", "boot = []", []string{"r:1: boot: it names none"}},
		{"sizes", "ram = '512'", []string{"r:1: ram: \"512\" is 512 bytes, which is no PC's RAM"}},
		{"sizes in words", "ram = 'much'", []string{"r:1: ram: \"much\" is no size"}},
		{"sizes below zero", "ram = '-1GiB'", []string{"r:1: ram: "}},

		{"modes", "[[program]]\nfrom = 'a'\nmode = '0999'\n[[file]]\ntext = ''\nto = '/a'\nmode = 'rw-r--r--'", []string{`r:3: program.mode: "0999" is no mode; write it in octal`, "r:7: file.mode"}},
		{"owners", "[[file]]\ntext = ''\nto = '/a'\nowner = 'www-data:www-data'\n[[file]]\ntext = ''\nto = '/b'\nowner = '0'\n[[file]]\ntext = ''\nto = '/c'\nowner = '0:4294967295'", []string{"r:4: file.owner", "r:8: file.owner", "r:12: file.owner"}},
		{"from and text", "[[file]]\nfrom = 'a'\ntext = ''\nto = '/a'\n", []string{"r:1: file: it has both from and text"}},
		{"neither from nor text", "[[file]]\nto = '/a'\n", []string{"r:1: file: it has neither"}},
		{"empty values", "[[file]]\nfrom = ''\nto = ''\n[[program]]\nfrom = ' '\nto = ''\n[[overlay]]\nfrom = ''\nto = ''\n[[service]]\ncommand = ' '\nconsole = ''", []string{"r:2: file.from: it is empty", "r:3: file.to: it is empty", "r:5: program.from: it is empty", "r:6: program.to: \"\" is no place", "r:8: overlay.from: it is empty", "r:9: overlay.to: \"\" is no place", "r:11: service.command: it is empty"}},
		{"places", "[[file]]\ntext = ''\nto = 'etc/x'\n[[file]]\ntext = ''\nto = '/a/../b'\n[[file]]\ntext = ''\nto = '/a/'\n[[file]]\ntext = ''\nto = '/'\n[[file]]\ntext = ''\nto = \"/a\\nb\"", []string{"r:3: file.to", "r:6: file.to", "r:9: file.to", "r:12: file.to", `r:15: file.to: the path "/a\nb" has a control character`}},
		{"long places", "[[file]]\ntext = ''\nto = '" + strings.Repeat("/a", 3000) + "'", []string{"r:3: file.to: the path has 6000 bytes"}},
		{"hidden places", "[[file]]\ntext = ''\nto = '/run/x'\n[[overlay]]\nfrom = 'a'\nto = '/dev'", []string{"r:3: file.to: /run/x would be hidden", "r:6: overlay.to: /dev would be hidden"}},
		{"two in one place", "[[program]]\nfrom = '/usr/bin/curl'\n[[file]]\ntext = ''\nto = '/usr/bin/curl'", []string{"r:5: file.to: /usr/bin/curl is taken by [[program]] on line 1"}},
		{"two programs of one name", "[[program]]\nfrom = 'a/tool'\n[[program]]\nfrom = 'b/tool'", []string{"r:3: program.to: /usr/bin/tool is taken by [[program]] on line 1"}},
		{"a file where a folder must be", "[[file]]\ntext = ''\nto = '/etc/a/b'\n[[file]]\ntext = ''\nto = '/etc/a'", []string{"r:3: file.to: /etc/a is a file, by [[file]] on line 4, and can't be a folder"}},
		{"a path with a line break", `rootfs = "a\nb"`, []string{"r:1: rootfs: the path"}},
		{"services", "[[service]]\ncommand = 'a # b'\naction = 'always'\nconsole = 'ttyS0,115200'\n[[service]]\ncommand = \"a\\nb\"", []string{"r:2: service.command: it has a #", "r:3: service.action: \"always\" is not known; it can be respawn, once,", "r:4: service.console", "r:6: service.command"}},

		{"a long command", "[[service]]\ncommand = '" + strings.Repeat("x", 241) + "'", []string{"r:2: service.command: it has 241 bytes"}},

		{"right: kernels", "kernel = 'debian:linux-image-amd64'", nil},
		{"right: the signature beside a URL", "kernel = 'source:http://x/l.tar.xz'\n[kernel-build]\nkeyring = 'a'", nil},
		{"right: a file with a colon", "kernel = './a:b'", nil},
		{"right: http with a hash", "kernel = 'source:http://x/l.tar.xz'\n[kernel-build]\nsha256 = '" + strings.Repeat("Ab", 32) + "'", nil},
		{"right: no modules", "modules = []", nil},
		{"right: consoles", "consoles = ['hvc0', 'ttyS1', 'ttyS0,9600n8r', 'tty63', 'ttyUSB0,115200']", nil},
		{"right: hashes", "root-password = '" + hash + "'", nil},
		{"right: rounds", "root-password = '$5$rounds=1000$saltsalt$" + strings.Repeat("a", 43) + "'", nil},
		{"right: a root with its own login", "rootfs = 'a'\nroot-password = '$y$j9T$abcdefghijklmnop$3dL1LkYnZM.OVXuVdnnaKVDlLYT92dRwOzDZ5XiVCe.'", nil},
		{"right: no password", "root-password = ''", nil},
		{"right: a layout's variant", "keymap = 'de(nodeadkeys)'", nil},
		{"right: time zones", "timezone = 'America/Argentina/Buenos_Aires'", nil},
		{"right: time zones with signs", "timezone = 'Etc/GMT+3'", nil},
		{"right: a name with dots", "hostname = '7.Example.org'", nil},
		{"right: a list of tables as a value", "file = [\n  { text = 'a', to = '/a' },\n  { text = 'b', to = '/b', mode = '4755' },\n]", nil},
		{"right: two overlays in one place", "[[overlay]]\nfrom = 'a'\n[[overlay]]\nfrom = 'b'", nil},
		{"right: /runit is not in /run", "[[file]]\ntext = ''\nto = '/runit/x'", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, problems := Parse([]byte(c.text), "r")
			got := texts(problems)
			ok := len(got) == len(c.want)
			for i := 0; ok && i < len(got); i++ {
				ok = strings.HasPrefix(got[i], c.want[i])
			}
			if !ok {
				t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(c.want, "\n  "))
			}
		})
	}
}

func TestLinesOfWhatIsGiven(t *testing.T) {
	r := parsed(t, "kernel = 'debian-source:6.1'\nmodules = [\n 'disk',\n 'input',\n]\n\n[kernel-build]\nconfig = 'my.config'\n\n[[file]]\ntext = 'a'\nto = '/a'\n[[file]]\nto = '/b'\ntext = 'b'\n")
	for key, want := range map[string]int{"kernel": 1, "modules": 2, "modules[1]": 4, "kernel-build": 7, "kernel-build.config": 8, "file[0]": 10, "file[1]": 13, "file[1].to": 14, "hostname": 0, "file[1].mode": 0} {
		if got := r.Line(key); got != want {
			t.Errorf("%s is on line %d, not %d", key, got, want)
		}
	}
	if p := r.Blame("file[1].mode", "x"); p != (Problem{"r", 13, "file.mode", "x"}) {
		t.Errorf("blamed %+v", p)
	}
	if r.Kernel.Kind = KindAuto; len(r.Validate()) != 1 {
		t.Errorf("a kernel by a flag: %v", texts(r.Validate()))
	}
	if r.Forget("kernel-build"); r.Line("kernel-build.config") != 0 || r.Line("kernel") != 1 || len(r.Validate()) != 0 {
		t.Errorf("after [kernel-build] was forgotten: %v", texts(r.Validate()))
	}
}

func TestPathsFromTheRecipesFolder(t *testing.T) {
	text := `kernel = "source:linux.tar"
busybox = "bin/busybox"
rootfs = "/srv/root"
[kernel-build]
config = ".config"
fragments = ["a", "/b"]
keyring = "k"
signature = "s"
[[program]]
from = "tool"
[[file]]
from = "f"
to = "/f"
[[file]]
text = "t"
to = "/t"
[[overlay]]
from = "o"
`
	r := parsed(t, text)
	r.Rebase("/r")
	want := []Path{
		{1, "kernel", "/r/linux.tar", WantEither}, {5, "kernel-build.config", "/r/.config", WantFile},
		{6, "kernel-build.fragments[0]", "/r/a", WantFile}, {6, "kernel-build.fragments[1]", "/b", WantFile},
		{7, "kernel-build.keyring", "/r/k", WantFile}, {8, "kernel-build.signature", "/r/s", WantFile},
		{2, "busybox", "/r/bin/busybox", WantFile}, {3, "rootfs", "/srv/root", WantEither},
		{10, "program[0].from", "/r/tool", WantFile}, {12, "file[0].from", "/r/f", WantFile}, {18, "overlay[0].from", "/r/o", WantFolder},
	}
	if d := cmp.Diff(want, r.Paths()); d != "" {
		t.Error(d)
	}
	if r.Programs[0].To != "/usr/bin/tool" {
		t.Errorf("the program goes to %s", r.Programs[0].To)
	}
	none := parsed(t, "kernel = 'source:https://x/linux.tar.xz'")
	if p := none.Paths(); len(p) != 0 {
		t.Errorf("paths %v", p)
	}
}

func TestSourcesAsTheyAreWritten(t *testing.T) {
	for _, s := range []string{"auto", "host", "debian:linux-image-amd64", "debian-source:6.12", "source:a.tar", "source:https://x/a.tar", "/boot/vmlinuz"} {
		var k KernelSource
		if err := k.UnmarshalText([]byte(s)); err != nil || k.String() != s {
			t.Errorf("%s became %s, %v", s, k, err)
		}
	}
	for _, s := range []string{"auto", "host", "debian", "debian-source", "source:a.tar", "./busybox"} {
		var b BusyboxSource
		if err := b.UnmarshalText([]byte(s)); err != nil || b.String() != s {
			t.Errorf("%s became %s, %v", s, b, err)
		}
	}
}

func TestModes(t *testing.T) {
	for text, want := range map[string]fs.FileMode{"644": 0o644, "0755": 0o755, "4755": 0o755 | fs.ModeSetuid, "6711": 0o711 | fs.ModeSetuid | fs.ModeSetgid, "1777": 0o777 | fs.ModeSticky} {
		var m Mode
		if err := m.UnmarshalText([]byte(text)); err != nil || fs.FileMode(m) != want {
			t.Errorf("%s is %v, %v", text, fs.FileMode(m), err)
		}
	}
}

// A recipe comes to the root daemon from anybody who may call it.
func TestHostileTextsAreQuick(t *testing.T) {
	for name, text := range map[string]string{
		"lists in lists":        "a = " + strings.Repeat("[", MaxSize-4),
		"tables in tables":      "a = " + strings.Repeat("{a=", MaxSize/3-2),
		"a long dotted key":     strings.Repeat("a.", MaxSize/2-4) + "a = 1",
		"a long dotted header":  "[" + strings.Repeat("a.", MaxSize/2-4) + "a]",
		"lists that do not end": strings.Repeat("a=[\n", MaxSize/4),
		"much before an error":  "modules = [\n" + strings.Repeat("'a',\n", MaxSize/5-10) + "] x",
		"many deep places":      strings.Repeat("[[file]]\ntext=''\nto='"+strings.Repeat("/a", 2000)+"'\n", MaxSize/4100),
		"unknown keys":          strings.Repeat("ab=1\n", MaxSize/5),
	} {
		if len(text) > MaxSize {
			t.Fatalf("%s: %d bytes", name, len(text))
		}
		start := time.Now()
		Parse([]byte(text), "r")
		t.Logf("%s: %s", name, time.Since(start).Round(time.Millisecond))
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(Sample))
	f.Add([]byte(regexp.MustCompile(`(?m)^#([a-z\[])`).ReplaceAllString(Sample, "$1")))
	for _, s := range []string{"modules = ['a',\nhostname = 'b'", "[[file]] x\n[[file]]\nto='/a'", "a = \"\"\"\n\\", "kernel-build.config='a'\n[kernel-build]", "file = [{to='/a',text=''}]\nx", "a = [ # '''\n]\r\n= ="} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		r, problems := Parse(text, "r")
		lines := strings.Count(string(text), "\n") + 1
		for i, p := range problems {
			if p.Line < 1 && len(text) <= MaxSize || p.Line > lines || p.Text == "" || strings.ContainsFunc(p.String(), func(c rune) bool { return c < ' ' }) {
				t.Errorf("problem %q on line %d of %d", p, p.Line, lines)
			}
			if i > 0 && p.Line < problems[i-1].Line {
				t.Errorf("%q comes after %q", p, problems[i-1])
			}
		}
		if again := r.Validate(); len(problems) == 0 && len(again) > 0 {
			t.Errorf("found only the second time: %q", texts(again))
		}
		// What is wrong with it, TOML's own rules included, is never missed.
		if err := decode(text, &Recipe{}); err != nil && len(problems) == 0 && len(text) <= MaxSize {
			t.Errorf("viper: %v", err)
		}
		// What is TOML is not called something else.
		var any map[string]any
		if toml.Unmarshal(text, &any) == nil && slices.ContainsFunc(problems, func(p Problem) bool { return strings.Contains(p.Text, "no TOML") }) {
			t.Errorf("go-toml reads it: %q", texts(problems))
		}
		for _, p := range r.Paths() {
			if p.Line == 0 && len(problems) == 0 {
				t.Errorf("%+v has no line", p)
			}
		}
	})
}
