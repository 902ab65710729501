package settings

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/memlinux/memlinux/imagegen/sandbox"
)

const zoneinfo = "usr/share/zoneinfo"

// maxZone bounds a time zone's file, bytes; the largest has some thousand.
const maxZone = 64 << 10

// readZone is the file of a time zone that Validate took, in the format of
// tzfile(5), from the machine whose / is root.
func readZone(root, name string) ([]byte, error) {
	dir := filepath.Join(root, zoneinfo)
	file := filepath.Join(dir, name)
	st, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(dir); err != nil {
			return nil, fmt.Errorf("set the time zone %s: %w", name, &sandbox.MissingError{What: dir, Package: "tzdata"})
		}
		return nil, fmt.Errorf("there is no time zone %s in %s; give a name such as Europe/Berlin", name, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("set the time zone: %w", err)
	}
	if !st.Mode().IsRegular() || st.Size() > maxZone {
		return nil, fmt.Errorf("%s in %s is no time zone; give a name such as Europe/Berlin", name, dir)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("set the time zone: %w", err)
	}
	if !bytes.HasPrefix(b, []byte("TZif")) {
		return nil, fmt.Errorf("%s in %s is no time zone; give a name such as Europe/Berlin", name, dir)
	}
	return b, nil
}
