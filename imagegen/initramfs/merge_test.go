package initramfs

import (
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Entries as tests write them. The Why of each is the letter of its tree and
// its path.

func file(path, content string) Entry {
	return Entry{Path: path, Mode: 0o644, Content: strings.NewReader(content), Size: int64(len(content))}
}

func dir(path string, mode fs.FileMode) Entry { return Entry{Path: path, Mode: fs.ModeDir | mode} }
func link(path, to string) Entry              { return Entry{Path: path, Mode: fs.ModeSymlink | 0o777, Link: to} }
func hard(path, to string) Entry              { return Entry{Path: path, Mode: 0o644, HardLink: to} }
func pipe(path string) Entry                  { return Entry{Path: path, Mode: fs.ModeNamedPipe | 0o600} }

func tree(t testing.TB, letter string, entries ...Entry) Tree {
	t.Helper()
	for i := range entries {
		entries[i].Why = letter + ":" + entries[i].Path
	}
	out, err := Tree(nil).Union(entries...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// listing is a tree as text, without folders that nobody described.
func listing(t testing.TB, tree Tree) string {
	t.Helper()
	if err := tree.Validate(); err != nil {
		t.Error(err)
	}
	var b strings.Builder
	for _, e := range tree {
		if e.implied {
			continue
		}
		fmt.Fprintf(&b, "%s %s", e.Mode, e.Path)
		switch {
		case e.Link != "":
			fmt.Fprintf(&b, " -> %s", e.Link)
		case e.HardLink != "":
			fmt.Fprintf(&b, " == %s", e.HardLink)
		case e.Content != nil:
			content, err := io.ReadAll(io.NewSectionReader(e.Content, 0, e.Size))
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&b, " %q", content)
		}
		if e.Order != 0 {
			fmt.Fprintf(&b, " %+d", e.Order)
		}
		fmt.Fprintf(&b, " (%s)\n", e.Why)
	}
	return b.String()
}

func ordered(e Entry, order int) Entry {
	e.Order = order
	return e
}

func TestOverlay(t *testing.T) {
	for _, tc := range []struct {
		name         string
		lower, upper []Entry
		want         string
	}{
		{
			"the upper file counts", []Entry{file("etc/a", "1"), file("etc/b", "2")}, []Entry{file("etc/a", "3")},
			"-rw-r--r-- etc/a \"3\" (u:etc/a)\n-rw-r--r-- etc/b \"2\" (l:etc/b)\n",
		},
		{
			"folders have what both have, and the upper's mode", []Entry{dir("d", 0o755), file("d/a", "1")}, []Entry{dir("d", 0o700), file("d/b", "2")},
			"drwx------ d (u:d)\n-rw-r--r-- d/a \"1\" (l:d/a)\n-rw-r--r-- d/b \"2\" (u:d/b)\n",
		},
		{
			"a folder that upper has only because of what is in it keeps its mode", []Entry{dir("tmp", fs.ModeSticky|0o777)}, []Entry{file("tmp/a", "1")},
			"dtrwxrwxrwx tmp (l:tmp)\n-rw-r--r-- tmp/a \"1\" (u:tmp/a)\n",
		},
		{
			"and one that only lower has so gets the one that upper describes", []Entry{file("tmp/a", "1")}, []Entry{dir("tmp", fs.ModeSticky|0o777)},
			"dtrwxrwxrwx tmp (u:tmp)\n-rw-r--r-- tmp/a \"1\" (l:tmp/a)\n",
		},
		{
			"a link of the lower is where the upper's file goes",
			[]Entry{link("lib", "usr/lib"), file("usr/lib/a", "1")},
			[]Entry{file("lib/a", "2"), file("lib/firmware/b", "3")},
			"Lrwxrwxrwx lib -> usr/lib (l:lib)\n-rw-r--r-- usr/lib/a \"2\" (u:lib/a)\n-rw-r--r-- usr/lib/firmware/b \"3\" (u:lib/firmware/b)\n",
		},
		{
			"a folder that is a link below stays one", []Entry{link("lib", "usr/lib"), dir("usr/lib", 0o755)}, []Entry{dir("lib", 0o750)},
			"Lrwxrwxrwx lib -> usr/lib (l:lib)\ndrwxr-x--- usr/lib (u:lib)\n",
		},
		{
			"links are followed one after the other, to their own folder and from the root",
			[]Entry{link("a/b", "../c"), link("c", "/d/./e"), link("d/e", "f/"), dir("d/f", 0o711)},
			[]Entry{file("a/b/x", "1")},
			"Lrwxrwxrwx a/b -> ../c (l:a/b)\nLrwxrwxrwx c -> /d/./e (l:c)\nLrwxrwxrwx d/e -> f/ (l:d/e)\ndrwx--x--x d/f (l:d/f)\n-rw-r--r-- d/f/x \"1\" (u:a/b/x)\n",
		},
		{
			"a link to nothing gets a folder where it leads", []Entry{link("var/run", "/run")}, []Entry{file("var/run/x", "1")},
			"-rw-r--r-- run/x \"1\" (u:var/run/x)\nLrwxrwxrwx var/run -> /run (l:var/run)\n",
		},
		{
			"a link to the root folder", []Entry{link("root", "/")}, []Entry{dir("root", 0o700), file("root/x", "1")},
			"Lrwxrwxrwx root -> / (l:root)\n-rw-r--r-- x \"1\" (u:root/x)\n",
		},
		{
			"a file in a link's place replaces the link, not what it leads to", []Entry{link("a", "b"), file("b", "1")}, []Entry{file("a", "2")},
			"-rw-r--r-- a \"2\" (u:a)\n-rw-r--r-- b \"1\" (l:b)\n",
		},
		{
			"and a link in a file's place", []Entry{file("a", "1"), pipe("p")}, []Entry{link("a", "p"), file("p", "2")},
			"Lrwxrwxrwx a -> p (u:a)\n-rw-r--r-- p \"2\" (u:p)\n",
		},
		{
			"another name of a replaced file keeps what it was", []Entry{file("a", "1"), hard("b", "a"), hard("c", "a")}, []Entry{file("a", "2")},
			"-rw-r--r-- a \"2\" (u:a)\n-rw-r--r-- b \"1\" (l:b)\n-rw-r--r-- c == b (l:c)\n",
		},
		{
			"a replaced name leaves the file alone", []Entry{file("a", "1"), hard("b", "a"), hard("c", "a")}, []Entry{file("b", "2")},
			"-rw-r--r-- a \"1\" (l:a)\n-rw-r--r-- b \"2\" (u:b)\n-rw-r--r-- c == a (l:c)\n",
		},
		{
			"hard links of the upper are to the upper's file", []Entry{file("a", "1"), hard("b", "a")}, []Entry{file("a", "2"), hard("c", "a")},
			"-rw-r--r-- a \"2\" (u:a)\n-rw-r--r-- b \"1\" (l:b)\n-rw-r--r-- c == a (u:c)\n",
		},
		{
			"and go through the lower's links", []Entry{link("bin", "usr/bin")}, []Entry{file("bin/a", "1"), hard("bin/b", "bin/a")},
			"Lrwxrwxrwx bin -> usr/bin (l:bin)\n-rw-r--r-- usr/bin/a \"1\" (u:bin/a)\n-rw-r--r-- usr/bin/b == usr/bin/a (u:bin/b)\n",
		},
		{
			"all names of a file replaced", []Entry{file("a", "1"), hard("b", "a")}, []Entry{file("a", "2"), file("b", "3")},
			"-rw-r--r-- a \"2\" (u:a)\n-rw-r--r-- b \"3\" (u:b)\n",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			lower, upper := tree(t, "l", tc.lower...), tree(t, "u", tc.upper...)
			before := listing(t, lower) + listing(t, upper)
			got, err := Overlay(lower, upper)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, listing(t, got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(before, listing(t, lower)+listing(t, upper)); diff != "" {
				t.Errorf("what was given has changed:\n%s", diff)
			}
		})
	}
}

func TestOverlayRefuses(t *testing.T) {
	for _, tc := range []struct {
		name         string
		lower, upper []Entry
		want         string
	}{
		{"a folder over a file", []Entry{file("a", "1")}, []Entry{dir("a", 0o755)}, "a is a file (l:a) and a folder (u:a)"},
		{"a folder that nobody described over a file", []Entry{file("a", "1")}, []Entry{file("a/b", "2")}, "a is a file (l:a) and a folder (the folder of a/b)"},
		{"a file over a folder", []Entry{dir("a", 0o755)}, []Entry{file("a", "1")}, "a is a folder (l:a) and a file (u:a)"},
		{"a link over a folder", []Entry{dir("a", 0o755)}, []Entry{link("a", "b")}, "a is a folder (l:a) and a symbolic link (u:a)"},
		{"a link to a file used as a folder", []Entry{link("a", "b"), file("b", "1")}, []Entry{file("a/c", "2")}, "b is a file (l:b) and a folder (the folder of a/c)"},
		{"a circle", []Entry{link("a", "b"), link("b", "a")}, []Entry{file("a/c", "2")}, "leads in a circle"},
		{"a circle through a folder", []Entry{link("a", "d/b"), link("d/b", "../a/x")}, []Entry{file("a/c", "2")}, "leads in a circle"},
		{"a link that leaves the tree", []Entry{link("a/b", "../../c")}, []Entry{file("a/b/x", "1")}, "the symbolic link a/b to ../../c leads out of the tree"},
		{"two that links bring to one path", []Entry{link("lib", "usr/lib")}, []Entry{file("lib/a", "1"), file("usr/lib/a", "2")}, "two files for usr/lib/a: u:lib/a and u:usr/lib/a"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Overlay(tree(t, "l", tc.lower...), tree(t, "u", tc.upper...))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
	var long []Entry
	for i := range 50 {
		long = append(long, link(fmt.Sprintf("l%d", i), fmt.Sprintf("l%d", i+1)))
	}
	if _, err := Overlay(tree(t, "l", long...), tree(t, "u", file("l0/x", "1"))); err == nil {
		t.Error("more links were followed than the kernel follows")
	}
	long = []Entry{link("l", strings.Repeat("d/", 1500)+"e"), dir("d", 0o755)}
	if _, err := Overlay(tree(t, "l", long...), tree(t, "u", file("l/"+strings.Repeat("f/", 1500)+"x", "1"))); err == nil {
		t.Error("a path longer than the kernel's came out")
	}
}

func TestUnion(t *testing.T) {
	base := tree(t, "b", dir("etc", 0o711), file("etc/hostname", "x"), link("lib", "usr/lib"))
	got, err := base.Union(file("lib/modules/6.1/a.ko", "y"), dir("etc", 0o755), ordered(file("etc/z", ""), -1), hard("etc/h", "etc/hostname"),
		ordered(file("new/last", ""), 1))
	if err != nil {
		t.Fatal(err)
	}
	want := `drwx--x--x etc -1 (b:etc)
-rw-r--r-- etc/h == etc/hostname ()
-rw-r--r-- etc/hostname "x" (b:etc/hostname)
-rw-r--r-- etc/z "" -1 ()
Lrwxrwxrwx lib -> usr/lib (b:lib)
-rw-r--r-- new/last "" +1 ()
-rw-r--r-- usr/lib/modules/6.1/a.ko "y" ()
`
	if diff := cmp.Diff(want, listing(t, got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, tc := range []struct {
		name string
		more []Entry
		want string
	}{
		{"a file that is there", []Entry{{Path: "etc/hostname", Mode: 0o644, Content: strings.NewReader(""), Why: "A"}}, "two files for etc/hostname: b:etc/hostname and A"},
		{"a link that is there", []Entry{link("lib", "usr/lib")}, "two files for lib: b:lib and nobody says why"},
		{"the same twice", []Entry{file("x", ""), file("x", "")}, "two files for x"},
		{"the same through a link", []Entry{file("lib/x", ""), file("usr/lib/x", "")}, "two files for usr/lib/x"},
		{"a folder that is a file", []Entry{file("etc/hostname/x", "")}, "etc/hostname is a file (b:etc/hostname), and etc/hostname/x (nobody says why) needs a folder there"},
		{"a hard link to nothing", []Entry{hard("x", "y")}, "x (nobody says why) is a hard link to y, which is not there"},
		{"a hard link to a folder", []Entry{hard("x", "etc")}, "no file"},
		{"a hard link to itself", []Entry{hard("x", "x")}, "x (nobody says why) is a hard link to itself"},
		{"hard links in a circle", []Entry{hard("x", "y"), hard("y", "x")}, "is a hard link to itself"},
		{"no path", []Entry{file("", "")}, "not a usable path"},
		{"a way out", []Entry{file("../x", "")}, "not a usable path"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := base.Union(tc.more...)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
	if _, err := Tree(nil).Union(make([]Entry, maxEntries+1)...); err == nil {
		t.Error("more entries than the limit")
	}
	var deep []Entry
	for i := range 200 {
		deep = append(deep, file(fmt.Sprintf("%d/%sx", i, strings.Repeat("a/", 2000)), ""))
	}
	if _, err := Tree(nil).Union(deep...); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("more folders than the limit: %v", err)
	}
}

// Random trees: what comes out is valid, the order of what is added does not
// matter, and each path of the upper tree is found where a walk of the result
// over its links gets to.
func TestMergeProperties(t *testing.T) {
	for seed := range uint64(3000) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		names := []string{"a", "b", "c"}
		path := func() string {
			p := names[rnd.IntN(3)]
			for rnd.IntN(2) == 0 {
				p += "/" + names[rnd.IntN(3)]
			}
			return p
		}
		some := func() (list []Entry) {
			for range rnd.IntN(6) {
				switch rnd.IntN(5) {
				case 0:
					list = append(list, dir(path(), 0o700))
				case 1:
					list = append(list, link(path(), strings.Repeat("../", rnd.IntN(2))+path()))
				case 2:
					list = append(list, hard(path(), path()))
				default:
					list = append(list, file(path(), fmt.Sprint(len(list))))
				}
			}
			return list
		}
		lower, err := Tree(nil).Union(some()...)
		if err != nil {
			continue
		}
		more := some()
		one, err := lower.Union(more...)
		slices.Reverse(more)
		other, oerr := lower.Union(more...)
		if (err == nil) != (oerr == nil) || err == nil && listing(t, one) != listing(t, other) {
			t.Fatalf("seed %d: order matters: %v, %v\n%s%s", seed, err, oerr, listing(t, one), listing(t, other))
		}
		upper, err := Tree(nil).Union(some()...)
		if err != nil {
			continue
		}
		over, err := Overlay(lower, upper)
		if err != nil {
			continue
		}
		if err := over.Validate(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		r := resolver{lower: over, real: map[string]string{}, ends: map[string]string{}}
		for _, e := range upper {
			p, err := r.file(e.Path)
			if err == nil && e.Mode.IsDir() {
				p, err = r.folder(e.Path)
			}
			i, found := over.index(p)
			if err != nil || !found && p != "" || p != "" && (over[i].Mode.Type() != e.Mode.Type() || e.Content != nil && over[i].HardLink == "" && over[i].Content != e.Content) {
				t.Fatalf("seed %d: %s of the upper is at %q: %v\n%s", seed, e.Path, p, err, listing(t, over))
			}
		}
		if _, p := pack(t, over, "none", epochOfTests); len(p.Costs) != len(over)+1 {
			t.Errorf("%d costs of %d entries", len(p.Costs), len(over))
		}
	}
}

func BenchmarkOverlay(b *testing.B) {
	var lower, upper []Entry
	for i := range 30000 {
		e := file(fmt.Sprintf("usr/share/package%d/locale/file%d", i/10, i), "")
		if lower = append(lower, e); i%3 == 0 {
			upper = append(upper, e)
		}
	}
	l, u := tree(b, "l", lower...), tree(b, "u", upper...)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Overlay(l, u); err != nil {
			b.Fatal(err)
		}
	}
}
