package kbuild

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestWatcherCounts(t *testing.T) {
	var log bytes.Buffer
	var seen []int64
	w := &watcher{log: &log, total: 3, report: func(done, total int64) {
		if done >= total {
			t.Errorf("%d of %d while it runs", done, total)
		}
		seen = append(seen, done)
	}}
	text := "make[1]: Entering directory '/x'\n  SYNC    include/config/auto.conf\n  CC      init/main.o\n  AS [M]  arch/x86/a.o\n  AR      init/built-in.a\n" +
		"  HOSTCC  scripts/basic/fixdep\n  CC      /w/tools/objtool/check.o\n  LD      vmlinux.o\n  LD [M]  a.ko\nnote: x.o\n  CC      last.o"
	for i := 0; i < len(text); i += 7 {
		if _, err := w.Write([]byte(text[i:min(len(text), i+7)])); err != nil {
			t.Fatal(err)
		}
	}
	if w.objects != 4 {
		t.Errorf("%d objects", w.objects)
	}
	if log.String() != text {
		t.Error("the log is not what came")
	}
	if lines := w.lines(); w.objects != 5 || lines[len(lines)-1] != "  CC      last.o" {
		t.Errorf("the last line without its end: %d, %q", w.objects, lines)
	}
	if diff := cmp.Diff([]int64{1, 2, 3, 4, 5}, seen); diff != "" {
		t.Error(diff)
	}
}

func TestWatcherLines(t *testing.T) {
	w := &watcher{log: &bytes.Buffer{}}
	for i := range 30 {
		fmt.Fprintf(w, "a.c:%d:1: error: number %d\n", i, i)
	}
	for i := range 100 {
		fmt.Fprintf(w, "  CC      %d.o\n\n", i)
	}
	fmt.Fprintf(w, "make: *** [Makefile:1: all] Error 2\nlong %s\n\xff", strings.Repeat("x", 1<<20))
	got := w.lines()
	if len(got) > 20 || got[0] != "a.c:0:1: error: number 0" || got[len(got)-3] != "make: *** [Makefile:1: all] Error 2" || got[len(got)-1] != "?" {
		t.Errorf("%.200q", got)
	}
	for _, line := range got {
		if len(line) > maxLine {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
}

func FuzzWatcher(f *testing.F) {
	f.Add([]byte("  CC      a.o\n  CC [M]  b.o\nerror: c\n"), 3)
	f.Fuzz(func(t *testing.T, text []byte, cut int) {
		var log bytes.Buffer
		w := &watcher{log: &log, report: func(done, total int64) {
			if done >= total {
				t.Errorf("%d of %d", done, total)
			}
		}}
		cut = min(max(cut, 0), len(text))
		_, _ = w.Write(text[:cut])
		_, _ = w.Write(text[cut:])
		if lines := w.lines(); len(lines) > 20 || !bytes.Equal(log.Bytes(), text) {
			t.Errorf("%d lines", len(lines))
		}
	})
}
