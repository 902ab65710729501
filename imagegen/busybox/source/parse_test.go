package source

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

func TestSourceEntries(t *testing.T) {
	for name, c := range map[string]struct {
		deb822   bool
		in, want string
	}{
		"one line": {false, "# the main one\ndeb http://mirror.example.org/debian bookworm main\n", "# the main one\ndeb-src http://mirror.example.org/debian bookworm main\n"},
		"one line with options": {false, "deb [arch=amd64 signed-by=/k.gpg] http://x bookworm main # c\n  deb\thttp://y ./\n",
			"deb-src [arch=amd64 signed-by=/k.gpg] http://x bookworm main # c\n  deb-src\thttp://y ./\n"},
		"one that has sources already": {false, "deb http://x y z\ndeb-src http://x y z\n", "deb-src http://x y z\n"},
		"one that is switched off":     {false, "# deb http://x y z\n", "# deb http://x y z\n"},
		"deb822": {true, "Types: deb\nURIs: http://x\nSuites: bookworm\nComponents: main\nSigned-By: /k.gpg\n\nTypes: deb deb-src\nURIs: http://y\n",
			"Types: deb-src\nURIs: http://x\nSuites: bookworm\nComponents: main\nSigned-By: /k.gpg\n\nTypes: deb-src\nURIs: http://y\n"},
		"deb822 in other writing": {true, "types:\n deb\n deb-src\nURIs: http://x\nSigned-By:\n -----BEGIN\n .\n Types: deb\n", "Types: deb-src\nURIs: http://x\nSigned-By:\n -----BEGIN\n .\n Types: deb\n"},
	} {
		got := strings.TrimSuffix(string(sourceEntries([]byte(c.in), c.deb822)), "\n")
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func FuzzSourceEntries(f *testing.F) {
	f.Add([]byte("deb http://x y z\ndeb-src http://x y z\n"), false)
	f.Add([]byte("Types: deb\n deb-src\nURIs: x\n"), true)
	f.Fuzz(func(t *testing.T, b []byte, deb822 bool) {
		once := sourceEntries(b, deb822)
		for line := range strings.Lines(string(once)) {
			if !deb822 && (strings.HasPrefix(line, "deb ") || strings.HasPrefix(line, "deb\t")) || deb822 && strings.HasPrefix(line, "Types: deb\n") {
				t.Errorf("%q stays", line)
			}
		}
	})
}

const sha256Hex = "9c01fe128b0eeded371c70e37d474fdb5055f71b5d0a778db44c6b0c62d3a7fa"

func TestParseURIs(t *testing.T) {
	text := "Reading package lists...\nNOTICE: 'busybox' packaging is maintained\n'http://d/busybox_1.35.0-4%2bdeb12u1.dsc' busybox_1.35.0-4+deb12u1.dsc 2321 SHA256:" + sha256Hex +
		"\n'http://d/o.tar.bz2' busybox_1.35.0.orig.tar.bz2 2480624 SHA512:" + sha256Hex + sha256Hex + "\n"
	got, err := parseURIs([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []remoteFile{{"busybox_1.35.0-4+deb12u1.dsc", 2321, "SHA256", sha256Hex}, {"busybox_1.35.0.orig.tar.bz2", 2480624, "SHA512", sha256Hex + sha256Hex}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(remoteFile{})); diff != "" {
		t.Error(diff)
	}
	for name, text := range map[string]string{
		"nothing":               "",
		"no .dsc":               "'http://d/x' x.tar 1 SHA256:" + sha256Hex + "\n",
		"a weak digest":         "'http://d/x' x.dsc 1 MD5Sum:970920cff0835a594e89c4a00b56fac4\n",
		"no digest":             "'http://d/x' x.dsc 1 \n",
		"a name that is a path": "'http://d/x' ../x.dsc 1 SHA256:" + sha256Hex + "\n",
		"two sources":           strings.Repeat("'http://d/x' x.dsc 1 SHA256:"+sha256Hex+"\n", 2),
	} {
		if got, err := parseURIs([]byte(text)); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func FuzzParseURIs(f *testing.F) {
	f.Add([]byte("'http://d/x' x.dsc 1 SHA256:" + sha256Hex + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		files, err := parseURIs(b)
		for _, f := range files {
			if err == nil && (strings.ContainsAny(f.name, "/\x00") || f.name[0] == '.' || f.size < 0) {
				t.Errorf("taken: %+v", f)
			}
		}
	})
}

func TestDscVersion(t *testing.T) {
	if v, err := dscVersion(strings.NewReader("-----BEGIN PGP SIGNED MESSAGE-----\nFormat: 3.0 (quilt)\nVersion: 1:1.35.0-4+deb12u1\n")); v != "1:1.35.0-4+deb12u1" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
	for _, text := range []string{"", "Version:\n", "Version: $(reboot)\n", "Standards-Version: 4\n"} {
		if v, err := dscVersion(strings.NewReader(text)); err == nil {
			t.Errorf("%q: %q", text, v)
		}
	}
}

func TestParseOptions(t *testing.T) {
	got, err := parseOptions("it", []byte("#\n# CONFIG_B is not set\r\n  CONFIG_A=y\n# CONFIG_C is nice\nCONFIG_D=\"a \\\"b\\\" # c\"\nCONFIG_E=-5\n"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "# CONFIG_B is not set\nCONFIG_A=y\nCONFIG_D=\"a \\\"b\\\" # c\"\nCONFIG_E=-5\n"; string(format(got)) != want {
		t.Errorf("%s", format(got))
	}
	for name, line := range map[string]string{
		"no prefix": "A=y", "no value": "CONFIG_A=", "a space in the name": "CONFIG_A B=y", "two words": "CONFIG_A=y # because",
		"an open quote": `CONFIG_A="b`, "more behind a quote": `CONFIG_A="b"c`, "a quote that is escaped": `CONFIG_A="b\"`, "a control character": "CONFIG_A=\"b\x01\"",
	} {
		if o, err := parseOptions("it", []byte("CONFIG_OK=y\n"+line)); err == nil || !strings.Contains(err.Error(), "it: line 2 is not") {
			t.Errorf("%s: %v, %v", name, o, err)
		}
	}
	if own, err := parseOptions("own", fragment); err != nil || len(own) < 30 {
		t.Errorf("our own fragment: %d options, %v", len(own), err)
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add([]byte("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=\"a\"\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		options, err := parseOptions("it", b)
		if err != nil {
			return
		}
		again, err := parseOptions("it", format(options))
		if err != nil || !cmp.Equal(format(options), format(again)) {
			t.Errorf("%q becomes %q: %v", format(options), format(again), err)
		}
	})
}

func TestWishes(t *testing.T) {
	base := []option{{"A", "n"}, {"SH_IS_HUSH", "y"}, {"B", "y"}}
	ws := wishes([]option{{"A", "y"}, {"C", "y"}}, [][]option{{{"C", "n"}, {"D", "y"}}, {{"E", "7"}}}, []string{"one", "two"})
	var wanted []option
	for _, w := range ws {
		wanted = append(wanted, w.option)
	}
	// A member of a choice counts where it is read last.
	if got, want := string(format(merge(base, wanted))), "CONFIG_SH_IS_HUSH=y\nCONFIG_B=y\nCONFIG_A=y\n# CONFIG_C is not set\nCONFIG_D=y\nCONFIG_E=7\n"; got != want {
		t.Errorf("%q", got)
	}
	tree := fstest.MapFS{
		"Config.in":           {Data: []byte("config A\n\tbool \"a\"\nmenu \"x\"\n\tdepends on NOT_OF_A\nmenuconfig D\n\tbool\n\tdepends on A && X\n\tdepends on Y\n\thelp\n\t  config Z\n")},
		"shell/Config.in":     {Data: []byte("config E\n\tint\n")},
		"shell/Config.in.bak": {Data: []byte("config F\n")},
	}
	known, err := readSymbols(tree)
	if err != nil {
		t.Fatal(err)
	}
	got := values{"A": "y", "E": "6"}
	var lines []string
	for _, w := range lost(ws, got) {
		lines = append(lines, w.of+" "+w.String()+" "+known.why(w, got))
	}
	if diff := cmp.Diff([]string{"one CONFIG_D=y it depends on A && X and on Y", "two CONFIG_E=7 it is 6"}, lines); diff != "" {
		t.Error(diff)
	}
	if why := known.why(wish{option: option{"F", "y"}}, got); why != "this busybox has no such option" {
		t.Error(why)
	}
}

func TestObjects(t *testing.T) {
	tree := fstest.MapFS{
		"coreutils/Kbuild": {Data: []byte("lib-y:=\nlib-$(CONFIG_CAT) += cat.o\nlib-$(CONFIG_MORE)  += cat.o more.o # x\nlib-$(CONFIG_LS) += ls.o\nhostprogs-y += usage.o\n")},
		"applets/Kbuild":   {Data: []byte("obj-y :=\nobj-y += applets.o\n")},
	}
	if n, err := objects(tree, values{"CAT": "y", "MORE": "y"}); n != 3 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

func FuzzConfigured(f *testing.F) {
	f.Add([]byte("config A\n\tdepends on B\n"), []byte("lib-$(CONFIG_A) += a.o b.o\n"))
	f.Fuzz(func(t *testing.T, config, kbuild []byte) {
		tree := fstest.MapFS{"a/Config.in": {Data: config}, "a/Kbuild": {Data: kbuild}}
		if _, err := readSymbols(tree); err != nil {
			t.Error(err)
		}
		if n, err := objects(tree, values{"A": "y"}); err != nil || n < 0 {
			t.Error(n, err)
		}
	})
}

func TestLogIsBounded(t *testing.T) {
	var log bytes.Buffer
	left := int64(10)
	w := &watcher{log: &log, left: &left}
	for range 3 {
		if n, err := io.WriteString(w, "12345678\n"); n != 9 || err != nil {
			t.Fatal(n, err)
		}
	}
	if log.String() != "12345678\n1" || len(w.lines()) != 3 {
		t.Errorf("%q, %q", log.String(), w.lines())
	}
	if _, err := io.WriteString(w, strings.Repeat("x", 3*maxLine)); err != nil || len(w.line) != maxLine {
		t.Errorf("a line without end: %d bytes, %v", len(w.line), err)
	}
}

func FuzzWatcher(f *testing.F) {
	f.Add([]byte("  CC      a/b.o\nerror: x\n\x1b[31m\n"), 3)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		left := int64(20)
		count := 0
		w := &watcher{log: io.Discard, left: &left, object: func() { count++ }}
		cut = max(0, min(cut, len(b)))
		_, _ = w.Write(b[:cut])
		_, _ = w.Write(b[cut:])
		for _, line := range w.lines() {
			if strings.ContainsAny(line, "\n\x1b\x00") || len(w.lines()) > 20 {
				t.Errorf("%q", line)
			}
		}
	})
}
