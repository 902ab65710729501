package kbuild

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

func TestParseOptions(t *testing.T) {
	text := "#\n# Automatically generated\nCONFIG_A=y\n\n  CONFIG_B=m\r\n# CONFIG_C is not set\n# CONFIG_D is nice\nCONFIG_E=\"a \\\"b\\\" # c\"\nCONFIG_F=0x10\nCONFIG_G=-5\nCONFIG_H=n\n"
	got, err := parseOptions("it", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, o := range got {
		lines = append(lines, o.String())
	}
	want := []string{"CONFIG_A=y", "CONFIG_B=m", "# CONFIG_C is not set", `CONFIG_E="a \"b\" # c"`, "CONFIG_F=0x10", "CONFIG_G=-5", "# CONFIG_H is not set"}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Error(diff)
	}
	for name, text := range map[string]string{
		"no prefix":                    "A=y",
		"no value":                     "CONFIG_A=",
		"no sign":                      "CONFIG_A y",
		"a space in the name":          "CONFIG_A B=y",
		"two words":                    "CONFIG_A=y # because",
		"an open quote":                `CONFIG_A="b`,
		"more behind a quote":          `CONFIG_A="b"c`,
		"a quote that is escaped":      `CONFIG_A="b\"`,
		"a line end in another's text": "CONFIG_A=\"b\x00\"",
	} {
		if o, err := parseOptions("it", []byte("CONFIG_OK=y\n"+text)); err == nil || !strings.Contains(err.Error(), "it: line 2") {
			t.Errorf("%s: %v, %v", name, o, err)
		}
	}
}

func TestMerge(t *testing.T) {
	a := []option{{"SIZE", "y"}, {"A", "y"}, {"SPEED", "n"}}
	b := []option{{"SPEED", "y"}, {"A", "n"}, {"A", "m"}}
	// SPEED=y must come behind SIZE=y, or the choice between them stays.
	want := "CONFIG_SIZE=y\nCONFIG_SPEED=y\nCONFIG_A=m\n"
	if got := string(format(merge(a, b))); got != want {
		t.Errorf("%q", got)
	}
}

func TestLost(t *testing.T) {
	ws := wishes([]option{{"A", "y"}, {"B", "y"}, {"C", "n"}, {"HEX", "0x0010"}, {"TEXT", `"a"`}},
		[][]option{{{"B", "n"}, {"M", "m"}}, {{"N", "m"}, {"Q", "y"}}}, []string{"one", "two"})
	got := lost(ws, values{"A": "m", "C": "y", "HEX": "0x10", "TEXT": `"a"`, "M": "y", "B": "n"})
	var names []string
	for _, w := range got {
		names = append(names, fmt.Sprint(w.name, " ", w.of, " ", w.own))
	}
	want := []string{"A minimal true", "C minimal true", "N two false", "Q two false"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Error(diff)
	}
}

func TestMinimalIsGood(t *testing.T) {
	options, err := parseOptions("minimal", minimal)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, o := range options {
		if seen[o.name] {
			t.Errorf("%s is there twice", o.name)
		}
		seen[o.name] = true
	}
	for _, name := range []string{"BLK_DEV_INITRD", "CPU_MITIGATIONS", "IKCONFIG", "BINFMT_SCRIPT"} {
		if !slices.Contains(options, option{name, "y"}) {
			t.Errorf("%s is not in it", name)
		}
	}
}

const someKconfig = `# SPDX
mainmenu "Linux/$(ARCH) $(KERNELVERSION) Kernel Configuration"
source "scripts/Kconfig.include"
source "drivers/Kconfig"
source "not/here/Kconfig"
orsource "$(X)/Kconfig"

config EXPERT
	bool "Expert" # if NOTHING

menuconfig NET
	bool "Networking" if EXPERT
	default y

if NET
menu "Cards"
	depends on PCI || USB
	visible if EXPERT

comment "Cards need this"
	depends on NOTHING

config CARD
	tristate "Card"
	depends on FIRM = y && \
		   !SLOW
	select HELPER if NOTHING
	select LIB
	help
	    Text with
	      config FAKE
	    and depends on NOTHING

	    more
	depends on LAST
endmenu
endif # NET

config HELPER
	bool
config LIB
	bool
config ORPHAN
	def_bool y
choice
	prompt "Speed"
	depends on NET
config FAST
	bool "Fast"
config SMALL
	bool 'Small'
endchoice
config TWICE
	bool "Twice"
	depends on ARM
config TWICE
	bool "Twice"
	depends on X86
config NUMBER
	int "Number"
	depends on BITS >= 64 && $(cc-option,-mfoo && "#(a)") && NAME != "x#y" && (A || B && C)
config BAD
	bool "Bad"
	depends on (((
config NEVER
	bool "Never"
	depends on n
`

func someTree() fstest.MapFS {
	return fstest.MapFS{
		"Kconfig":                 {Data: []byte(someKconfig)},
		"scripts/Kconfig.include": {Data: []byte("comma := ,\ncc-option = $(success,$(CC) -Werror $(1))\n")},
		"drivers/Kconfig":         {Data: []byte("rsource \"a/Kconfig\"\n")},
		"drivers/a/Kconfig":       {Data: []byte("config DEEP\n\tbool \"Deep\"\n\tdepends on DEEPER\n")},
	}
}

func TestWhy(t *testing.T) {
	k, err := readKconfig(context.Background(), someTree())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		want string // option=value
		got  values
		why  string
	}{
		{"no such option", "FAKE=y", nil, "this kernel has no such option"},
		{"all that is around it", "CARD=m", values{}, "it needs CONFIG_NET (not set) and either CONFIG_PCI (not set) or CONFIG_USB (not set) and CONFIG_EXPERT (not set) and CONFIG_FIRM=y and CONFIG_LAST (not set)"},
		{"only what is missing", "CARD=y", values{"NET": "y", "USB": "y", "EXPERT": "y", "FIRM": "y", "LAST": "y", "SLOW": "y"}, "it needs CONFIG_SLOW to be off"},
		{"a module is not enough for what is built in", "CARD=y", values{"NET": "y", "PCI": "m", "EXPERT": "y", "FIRM": "y", "LAST": "y"}, "it needs either CONFIG_PCI (a module) or CONFIG_USB (not set)"},
		{"a module is enough for a module", "CARD=m", values{"NET": "y", "PCI": "m", "EXPERT": "y", "FIRM": "y", "LAST": "y"}, "the kernel's configuration dropped it"},
		{"the prompt's own condition", "NET=y", values{}, "it needs CONFIG_EXPERT (not set)"},
		{"only by others", "LIB=y", values{}, "it can't be set by itself, only by CONFIG_CARD"},
		{"by nobody", "ORPHAN=y", values{}, "it can't be set by hand"},
		{"selected", "LIB=n", values{"CARD": "y", "LIB": "y"}, "it is selected by CONFIG_CARD"},
		{"the selection's condition is not true", "HELPER=n", values{"CARD": "y", "HELPER": "y"}, "it is y by itself and can't be switched off"},
		{"another of the choice", "FAST=y", values{"NET": "y", "SMALL": "y"}, "CONFIG_SMALL of the same choice is set"},
		{"a choice that is not there", "FAST=y", values{}, "it needs CONFIG_NET (not set)"},
		{"the nearest of two places", "TWICE=y", values{"X86": "y"}, "the kernel's configuration dropped it"},
		{"comparisons, macros and quotes", "NUMBER=5", values{"BITS": "32", "NAME": `"x#y"`, "B": "y"}, `it needs CONFIG_BITS>=64 and CONFIG_NAME!="x#y" and either CONFIG_A (not set) or CONFIG_C (not set)`},
		{"another number", "NUMBER=5", values{"BITS": "64", "NAME": `"a"`, "A": "y", "NUMBER": "4"}, "the kernel's configuration made it 4"},
		{"an expression that can't be read", "BAD=y", values{}, "the kernel's configuration dropped it"},
		{"never", "NEVER=y", values{}, "it needs what never is"},
		{"a file beside", "DEEP=y", values{}, "it needs CONFIG_DEEPER (not set)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			name, value, _ := strings.Cut(tc.want, "=")
			if got := k.why(wish{option: option{name, value}}, tc.got); got != tc.why {
				t.Errorf("got  %s\nwant %s", got, tc.why)
			}
		})
	}
}

func TestKconfigIsBounded(t *testing.T) {
	loop := fstest.MapFS{"Kconfig": {Data: []byte("source \"Kconfig\"\nsource \"Kconfig\"\n")}}
	if _, err := readKconfig(context.Background(), loop); err == nil || !strings.Contains(err.Error(), "more files") {
		t.Error(err)
	}
	if lacking(strings.Repeat("(", 1e6), nil, 2) != nil || lacking(strings.Repeat("!", 1e6)+"A", nil, 2) != nil {
		t.Error("a judgement about nonsense")
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add([]byte("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"d\\\"\"\n"))
	f.Add(minimal)
	f.Fuzz(func(t *testing.T, text []byte) {
		options, err := parseOptions("it", text)
		if err != nil {
			return
		}
		once := merge(options)
		again, err := parseOptions("it", format(once))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(once, merge(again)) {
			t.Errorf("%q became %q", once, again)
		}
		if bytes.Contains(format(once), []byte{0}) {
			t.Error("a null byte")
		}
	})
}

func FuzzKconfig(f *testing.F) {
	f.Add(someKconfig, "A && !B || C = \"x\" && $(y,z)")
	f.Add("config A\n\tbool \"a\" if B\n\tselect C if !D\n", "((A))")
	f.Add("config A\nhelp\n\n \thelp\nendif\nendmenu\nchoice\ndepends on A\n", "A >= 5")
	f.Fuzz(func(t *testing.T, text, expression string) {
		tree := someTree()
		tree["Kconfig"].Data = []byte(text)
		k, err := readKconfig(context.Background(), tree)
		if err == nil {
			for name := range k.symbols {
				for _, value := range []string{"y", "m", "n", "5"} {
					if k.why(wish{option: option{name, value}}, values{"A": "y", "B": "m"}) == "" {
						t.Errorf("nothing about %s", name)
					}
				}
			}
		}
		for _, level := range []int{1, 2} {
			for _, l := range lacking(expression, values{"A": "y", "B": "m"}, level) {
				if l == "" {
					t.Errorf("%q lacks nothing named", expression)
				}
			}
		}
	})
}
