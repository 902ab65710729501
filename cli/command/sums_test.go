package command

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var (
	sumA = strings.Repeat("0a", 32)
	sumB = strings.Repeat("b1", 32)
)

func TestParseSums(t *testing.T) {
	for name, c := range map[string]struct {
		text, file string
		alone      bool
		want       string
		fails      bool
	}{
		"text mode":                            {text: sumB + "  other.iso\n" + sumA + "  x.iso\n", file: "x.iso", want: sumA},
		"binary mode":                          {text: sumA + " *x.iso\n", file: "x.iso", want: sumA},
		"upper case":                           {text: strings.ToUpper(sumA) + "  x.iso\n", file: "x.iso", want: sumA},
		"BSD":                                  {text: "SHA256 (x.iso) = " + sumA + "\n", file: "x.iso", want: sumA},
		"openssl's":                            {text: "SHA256(x.iso)= " + sumA + "\n", file: "x.iso", want: sumA},
		"BSD with brackets in the name":        {text: "SHA256 (x (1).iso) = " + sumA + "\n", file: "x (1).iso", want: sumA},
		"another algorithm's line":             {text: "SHA512 (x.iso) = " + sumA + sumA + "\n" + "MD5 (x.iso) = 00\n", file: "x.iso"},
		"a name with blanks":                   {text: sumA + "  my image.iso\n", file: "my image.iso", want: sumA},
		"a name that begins with a blank":      {text: sumA + "   x.iso\n", file: " x.iso", want: sumA},
		"a longer name is another":             {text: sumA + "  x.iso.xz\n" + sumB + "  ax.iso\n", file: "x.iso"},
		"a dot in front":                       {text: sumA + "  ./x.iso\n", file: "x.iso", want: sumA},
		"a folder's file of that name":         {text: sumA + "  old/x.iso\n", file: "x.iso"},
		"an escaped name":                      {text: `\` + sumA + `  a\\b\nc` + "\n", file: "a\\b\nc", want: sumA},
		"DOS line ends, and none at the end":   {text: sumB + "  y\r\n" + sumA + "  x.iso", file: "x.iso", want: sumA},
		"within a signature":                   {text: "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA512\n\n" + sumA + "  x.iso\n-----BEGIN PGP SIGNATURE-----\n", file: "x.iso", want: sumA},
		"twice the same":                       {text: sumA + "  x.iso\n" + strings.ToUpper(sumA) + " *x.iso\n", file: "x.iso", want: sumA},
		"two that differ":                      {text: sumA + "  x.iso\n" + sumB + "  x.iso\n", file: "x.iso", fails: true},
		"a sum that is too long":               {text: sumA + "00  x.iso\n", file: "x.iso"},
		"a sum that is too short":              {text: sumA[:62] + "  x.iso\n", file: "x.iso"},
		"no sum at all":                        {text: strings.Repeat("xy", 32) + "  x.iso\n", file: "x.iso"},
		"nothing but a sum, in its own file":   {text: sumA + "\n", file: "x.iso", alone: true, want: sumA},
		"nothing but a sum, in the list":       {text: sumA + "\n", file: "x.iso"},
		"its own file names another":           {text: sumA + "  y.iso\n", file: "x.iso", alone: true},
		"BSD without a name":                   {text: "SHA256 () = " + sumA + "\n", file: "x.iso", alone: true},
		"nothing":                              {file: "x.iso", alone: true},
		"a sum and blanks where a name is due": {text: sumA + "  \n", file: "x.iso"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseSums([]byte(c.text), c.file, c.alone)
			if got != c.want || (err != nil) != c.fails {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

func TestFindSum(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "x.iso")
	put := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	wants := func(sum, from string) {
		t.Helper()
		if from != "" {
			from = filepath.Join(dir, from)
		}
		got, file, err := findSum(image)
		if err != nil || got != sum || file != from {
			t.Errorf("%q of %q, %v", got, file, err)
		}
	}
	wants("", "")
	put(sumsFile, sumB+"  y.iso\n")
	wants("", "")
	put(sumsFile, sumB+"  x.iso\n")
	wants(sumB, sumsFile)
	put("x.iso.sha256", sumA+"\n")
	wants(sumA, "x.iso.sha256")
	put("x.iso.sha256", sumA+"  x.iso\n"+sumB+"  x.iso\n")
	if _, _, err := findSum(image); err == nil || !strings.Contains(err.Error(), "two sums") {
		t.Errorf("error %v", err)
	}
}

// Whatever the file says, a sum is 64 hexadecimal digits that are in it.
func FuzzParseSums(f *testing.F) {
	f.Add([]byte(sumA+"  x.iso\n"), "x.iso", false)
	f.Add([]byte(`\`+sumA+` *a\nb`), "a\nb", false)
	f.Add([]byte("SHA256 (x.iso) = "+sumA+"\r\n"), "x.iso", false)
	f.Add([]byte(sumA), "", true)
	f.Fuzz(func(t *testing.T, text []byte, name string, alone bool) {
		sum, err := parseSums(text, name, alone)
		if sum == "" {
			return
		}
		if err != nil || len(sum) != 64 || strings.Trim(sum, "0123456789abcdef") != "" || !strings.Contains(strings.ToLower(string(text)), sum) {
			t.Errorf("%q, %v", sum, err)
		}
	})
}
