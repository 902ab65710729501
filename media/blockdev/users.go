package blockdev

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process is a running program, named for a person: "nautilus (1234)".
type process struct {
	pid  int
	name string
}

func (p process) String() string { return fmt.Sprintf("%s (%d)", orElse(p.name, "a process"), p.pid) }

// several names the first of a list of processes and counts the others.
func several(all []process) string {
	const most = 3
	var names []string
	for _, p := range all[:min(len(all), most)] {
		names = append(names, p.String())
	}
	text := strings.Join(names, ", ")
	if len(all) > most {
		text += fmt.Sprintf(" and %d more", len(all)-most)
	}
	return text
}

// processes lists those that match. What ended meanwhile, or can't be looked
// at without root, is left out: only what is found is told.
func (s System) processes(match func(dir string) bool) []process {
	var found []process
	entries, _ := os.ReadDir(s.proc())
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join(s.proc(), e.Name())
		if match(dir) {
			name, _ := os.ReadFile(filepath.Join(dir, "comm")) // the number alone will do
			found = append(found, process{pid, Clean(string(name))})
		}
	}
	return found
}

// usersOf lists the processes that keep the mounts from being unmounted: by an
// open file, their working or root folder, their program or a mapped file
// (proc(5)).
func (s System) usersOf(mounts []mount) []process {
	uses := func(path string) bool {
		st, ok := statx(path)
		if !ok {
			return false
		}
		for _, m := range mounts {
			if st.Mask&unix.STATX_MNT_ID != 0 && st.Mnt_id == m.id ||
				m.dev.major != 0 && m.dev == (devNum{st.Dev_major, st.Dev_minor}) {
				return true
			}
		}
		return false
	}
	return s.processes(func(dir string) bool {
		for _, link := range []string{"cwd", "root", "exe"} {
			if uses(filepath.Join(dir, link)) {
				return true
			}
		}
		for _, fd := range children(filepath.Join(dir, "fd")) {
			if uses(fd) {
				return true
			}
		}
		text, _ := os.ReadFile(filepath.Join(dir, "maps")) // none: the process ended
		for line := range strings.Lines(string(text)) {
			// FROM-TO MODE OFFSET MAJOR:MINOR INODE PATH, the numbers in hexadecimal
			f := strings.Fields(line)
			if len(f) < 5 || f[4] == "0" {
				continue
			}
			for _, m := range mounts {
				if f[3] == fmt.Sprintf("%02x:%02x", m.dev.major, m.dev.minor) {
					return true
				}
			}
		}
		return false
	})
}

// openers lists the processes but our own that have one of the block devices
// open, or only those that have it open for writing.
func (s System) openers(devices map[devNum]bool, writers bool) []process {
	own := filepath.Join(s.proc(), strconv.Itoa(os.Getpid()))
	return s.processes(func(dir string) bool {
		if dir == own {
			return false
		}
		for _, fd := range children(filepath.Join(dir, "fd")) {
			st, ok := statx(fd)
			if !ok || st.Mode&unix.S_IFMT != unix.S_IFBLK || !devices[devNum{st.Rdev_major, st.Rdev_minor}] {
				continue
			}
			if !writers || opensForWriting(filepath.Join(dir, "fdinfo", filepath.Base(fd))) {
				return true
			}
		}
		return false
	})
}

// opensForWriting reads the flags out of /proc/PID/fdinfo/N. They are octal,
// and the lowest two bits are O_WRONLY and O_RDWR (proc(5)).
func opensForWriting(fdinfo string) bool {
	text, _ := os.ReadFile(fdinfo) // none: it was closed meanwhile
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(value), 8, 64)
			return err == nil && flags&unix.O_ACCMODE != unix.O_RDONLY
		}
	}
	return false
}

// sees lists processes in whose mount namespace, neither ours nor the first
// process's, one of the devices is mounted.
func (s System) sees(devices map[devNum]bool) []process {
	asked := map[string]bool{} // by namespace: many processes share one
	for _, known := range []string{"self", "1"} {
		if space, err := os.Readlink(filepath.Join(s.proc(), known, "ns/mnt")); err == nil {
			asked[space] = true
		}
	}
	return s.processes(func(dir string) bool {
		space, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
		if err != nil || asked[space] {
			return false
		}
		asked[space] = true
		text, _ := os.ReadFile(filepath.Join(dir, "mountinfo")) // none: the process ended
		mounts, _ := parseMountinfo(string(text))               // it is only for a hint
		for _, m := range mounts {
			if devices[m.dev] {
				return true
			}
		}
		return false
	})
}

// children gives the paths of what is in a folder, none where it can't be read.
func children(dir string) []string {
	entries, _ := os.ReadDir(dir)
	var paths []string
	for _, e := range entries {
		paths = append(paths, filepath.Join(dir, e.Name()))
	}
	return paths
}

// statx is what a path leads to, without asking a server or a program of it: a
// file system that hangs must not hang us.
func statx(path string) (st unix.Statx_t, ok bool) {
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE|unix.STATX_MNT_ID, &st)
	return st, err == nil
}
