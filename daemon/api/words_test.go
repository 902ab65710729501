package api

import "testing"

func TestWords(t *testing.T) {
	for in, want := range map[string]string{
		"as it is":      "as it is",
		"a\x00b\xffc":   "a\uFFFDb\uFFFDc",
		"0123456789a":   "0123456789…",
		"012345678ä":    "012345678\uFFFD…",
		"ä\tb\n\u00a0c": "ä\tb\n\u00a0c",
		"\x1b[2J\u009b": "\uFFFD[2J\uFFFD",
		"a\u202eb":      "a\uFFFDb",
	} {
		if got := Words(in, 10); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}
