package testvm

import (
	"math"
	"testing"
	"time"
)

// A system that is large is waited for longer, and none for ever.
func TestPatience(t *testing.T) {
	for name, c := range map[string]struct {
		fw   Firmware
		want Expect
		is   time.Duration
	}{
		"a small one":                      {BIOS, Expect{Content: 10 << 20}, 130 * time.Second},
		"a small one by UEFI":              {UEFI, Expect{Content: 10 << 20}, 190 * time.Second},
		"a menu that waits":                {BIOS, Expect{Extra: 10 * time.Second}, 130 * time.Second},
		"1 GiB":                            {BIOS, Expect{Content: 1 << 30}, 1144 * time.Second},
		"3 GiB":                            {BIOS, Expect{Content: 3 << 30}, 30 * time.Minute},
		"as much as a liar says":           {UEFI, Expect{Content: 999999999999}, 30 * time.Minute},
		"more than there are microseconds": {UEFI, Expect{Content: math.MaxInt64}, 30 * time.Minute},
	} {
		if got := patience(c.fw, c.want); got != c.is {
			t.Errorf("%s: %v, want %v", name, got, c.is)
		}
	}
}
