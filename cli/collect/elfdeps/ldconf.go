package elfdeps

import (
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Directive is a line of an ld.so.conf: a folder, or a pattern of files to
// include.
type Directive struct {
	Folder  string // absolute, clean
	Include string // as it stands; where relative, below the file's own folder
}

// ParseConf reads the text of an ld.so.conf (ldconfig(8)). As ldconfig does, it
// passes over what it can't use: relative folders, and the hwcap lines of old.
func ParseConf(text string) []Directive {
	var all []Directive
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "hwcap" {
			continue
		}
		if words[0] == "include" {
			for _, pattern := range words[1:] {
				all = append(all, Directive{Include: pattern})
			}
			continue
		}
		// A folder's name may hold spaces. Behind it may stand =libc6, of old.
		folder, _, _ := strings.Cut(strings.TrimSpace(line), "=")
		if folder = strings.TrimSpace(folder); path.IsAbs(folder) {
			all = append(all, Directive{Folder: path.Clean(folder)})
		}
	}
	return all
}

// maxIncludes bounds how deep files may include each other.
const maxIncludes = 10

// confFolders lists the folders of root's file conf and of all that it
// includes, each once. A file that can't be read has none, as for ldconfig.
func confFolders(root, conf string) []string {
	var folders []string
	var read func(name string, depth int)
	read = func(name string, depth int) {
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || depth > maxIncludes {
			return
		}
		for _, d := range ParseConf(string(b)) {
			if d.Folder != "" {
				if !slices.Contains(folders, d.Folder) {
					folders = append(folders, d.Folder)
				}
				continue
			}
			pattern := d.Include
			if !path.IsAbs(pattern) {
				pattern = path.Join(path.Dir(name), pattern)
			}
			files, _ := filepath.Glob(filepath.Join(root, pattern)) // a bad pattern matches nothing
			for _, file := range files {
				if below, err := filepath.Rel(filepath.Join("/", root), file); err == nil {
					read("/"+below, depth+1)
				}
			}
		}
	}
	read(conf, 0)
	return folders
}
