package compressed

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/testvm/need"
)

// by compresses b with a program of the field.
func by(t testing.TB, b []byte, argv ...string) []byte {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestReadAll(t *testing.T) {
	plain := []byte(strings.Repeat("firmware ", 1000))
	// As linux-firmware's copy-firmware.sh does it.
	zst := by(t, plain, need.Tool(t, "zstd", "zstd"), "--ultra", "-19", "-c")
	xz := by(t, plain, need.Tool(t, "xz", "xz-utils"), "--check=crc32", "-c")
	bomb := by(t, make([]byte, 1<<20), need.Tool(t, "xz", "xz-utils"), "-c")
	for _, tc := range []struct {
		name    string
		file    string
		content []byte
		limit   int64
		want    string // in the error; "" for none
	}{
		{"plain", "a.bin", plain, 1 << 20, ""},
		{"zstd", "a.bin.zst", zst, 1 << 20, ""},
		{"xz with the checksum that the kernel knows", "a.bin.xz", xz, 1 << 20, ""},
		{"exactly the limit", "a.bin.xz", xz, int64(len(plain)), ""},
		{"a plain file above the limit", "a.bin", plain, 1000, "too large"},
		{"a bomb", "a.bin.xz", bomb, 1 << 19, "too large"},
		{"a zstd file cut short", "a.bin.zst", zst[:len(zst)-3], 1 << 20, "decompress"},
		{"an xz file cut short", "a.bin.xz", xz[:len(xz)-9], 1 << 20, "decompress"},
		{"another file by that name", "a.bin.xz", plain, 1 << 20, "decompress"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ReadAll(tc.file, bytes.NewReader(tc.content), tc.limit)
			switch {
			case tc.want == "" && (err != nil || !bytes.Equal(got, plain)):
				t.Errorf("%d bytes, %v", len(got), err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, want %q in it", err, tc.want)
			}
		})
	}
	if _, err := ReadAll("x", bytes.NewReader(plain), 1); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	for in, want := range map[string]string{"a": "a", "a.xz": "a", "a.zst": "a", "a.gz": "a.gz"} {
		if got := Trim(in); got != want {
			t.Errorf("%s: %s", in, got)
		}
	}
}

func FuzzReadAll(f *testing.F) {
	f.Add(false, []byte("\xfd7zXZ\x00\x00\x01"))
	f.Add(true, []byte("\x28\xb5\x2f\xfd\x04\x58\x29\x00\x00hello"))
	f.Fuzz(func(t *testing.T, zst bool, b []byte) {
		name := "a.xz"
		if zst {
			name = "a.zst"
		}
		if got, err := ReadAll(name, bytes.NewReader(b), 1<<16); err == nil && len(got) > 1<<16 {
			t.Error("above the limit")
		}
	})
}
