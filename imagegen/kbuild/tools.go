package kbuild

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/imagegen/sandbox"
)

// tool is a program or file that a build needs, and the Debian package that
// brings it.
type tool struct{ name, pkg string }

// tools are what every build needs: Documentation/process/changes.rst, and what
// the Makefiles call besides.
var tools = []tool{
	{"make", "make"}, {"gcc", "gcc"}, {"ld", "binutils"}, {"as", "binutils"}, {"ar", "binutils"}, {"nm", "binutils"},
	{"objcopy", "binutils"}, {"strip", "binutils"}, {"readelf", "binutils"},
	{"flex", "flex"}, {"bison", "bison"}, {"m4", "m4"}, {"bc", "bc"}, {"perl", "perl"}, {"gzip", "gzip"},
	{"awk", "mawk"}, {"sed", "sed"}, {"grep", "grep"}, {"find", "findutils"}, {"xargs", "findutils"}, {"cmp", "diffutils"},
	{"/usr/include/stdio.h", "libc6-dev"}, {"/usr/include/gelf.h", "libelf-dev"},
}

// optionTools are what a build needs where an option is set.
var optionTools = []struct {
	option string
	tool
}{
	{"KERNEL_ZSTD", tool{"zstd", "zstd"}}, {"KERNEL_XZ", tool{"xz", "xz-utils"}}, {"KERNEL_LZMA", tool{"xz", "xz-utils"}},
	{"KERNEL_LZ4", tool{"lz4", "lz4"}}, {"KERNEL_LZO", tool{"lzop", "lzop"}}, {"KERNEL_BZIP2", tool{"bzip2", "bzip2"}},
	{"SYSTEM_TRUSTED_KEYRING", tool{"/usr/include/openssl/opensslv.h", "libssl-dev"}}, {"MODULE_SIG", tool{"/usr/include/openssl/opensslv.h", "libssl-dev"}},
	{"MODULE_SIG", tool{"openssl", "openssl"}}, {"DEBUG_INFO_BTF", tool{"pahole", "dwarves"}},
	{"MODULE_COMPRESS_XZ", tool{"xz", "xz-utils"}}, {"MODULE_COMPRESS_ZSTD", tool{"zstd", "zstd"}},
	{"IKHEADERS", tool{"cpio", "cpio"}}, {"IKHEADERS", tool{"xz", "xz-utils"}},
}

// checkTools fails with one *sandbox.MissingError for all that is missing of
// what any build needs and what is needed where is says that an option is set.
func checkTools(is func(option string) bool) error {
	wanted := slices.Clone(tools)
	for _, t := range optionTools {
		if is(t.option) {
			wanted = append(wanted, t.tool)
		}
	}
	return missing(wanted)
}

func missing(wanted []tool) error {
	var names, packages []string
	for _, t := range wanted {
		if strings.HasPrefix(t.name, "/") {
			if _, err := os.Stat(t.name); err == nil {
				continue
			}
		} else if _, err := sandbox.Find(t.name, t.pkg); err == nil {
			continue
		}
		if !slices.Contains(names, t.name) {
			names = append(names, t.name)
		}
		if !slices.Contains(packages, t.pkg) {
			packages = append(packages, t.pkg)
		}
	}
	if names == nil {
		return nil
	}
	return &sandbox.MissingError{What: strings.Join(names, ", "), Package: strings.Join(packages, " ")}
}

// deciding are the programs that decide about the bytes of a kernel or of the
// tables in it.
var deciding = []string{"gcc", "ld", "as", "objcopy", "strip", "make", "perl", "bc", "flex", "bison", "awk", "gzip", "zstd", "xz", "lz4", "lzop", "bzip2", "pahole"}

// toolchain tells those programs from others of their names, one a line; one
// that is missing is "none". It asks the file system and not the programs for
// their versions: to start them all takes longer than the rest of a build of
// which everything is in the cache.
func toolchain() (string, error) {
	lines := make([]string, len(deciding))
	for i, name := range deciding {
		path, err := sandbox.Find(name, "")
		if err != nil {
			lines[i] = name + ": none"
			continue
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return "", err
		}
		st, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		lines[i] = fmt.Sprintf("%s: %s %d %d", name, path, st.Size(), st.ModTime().UnixNano())
	}
	return strings.Join(lines, "\n"), nil
}
