package settings

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

const whyPassword = "root's password, as the recipe has it"

// setPassword puts hash into root's line of shadow(5), and makes passwd(5) look
// there.
func (t tree) setPassword(hash string) error {
	err := t.edit("etc/passwd", 0o644, whyPassword, func(lines []string) []string {
		return changeRoot(lines, "root:x:0:0:root:/root:/bin/sh", func(f []string) { f[1] = "x" })
	})
	if err != nil {
		return err
	}
	const unaged = "root:*:1:0:99999:7:::"
	return t.edit("etc/shadow", 0o600, whyPassword, func(lines []string) []string {
		return changeRoot(lines, unaged, func(f []string) {
			f[1] = hash
			// busybox passes over a line in which these are empty.
			for i, value := range strings.Split(unaged, ":") {
				if f[i] == "" && i != 1 {
					f[i] = value
				}
			}
		})
	})
}

// changeRoot changes the fields of root's line. Where that is missing or short,
// full completes it.
func changeRoot(lines []string, full string, change func(fields []string)) []string {
	lines = slices.Clone(lines)
	i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "root:") })
	if i < 0 {
		i = 0
		lines = slices.Insert(lines, 0, full)
	}
	fields := strings.Split(lines[i], ":")
	if whole := strings.Split(full, ":"); len(fields) < len(whole) {
		fields = append(fields, whole[len(fields):]...)
	}
	change(fields)
	lines[i] = strings.Join(fields, ":")
	return lines
}

// user is a line of passwd(5).
type user struct {
	name     string
	uid, gid int
	home     string
}

// user looks up s, "user" or "user:group", each a name or a number, in the
// tree's etc/passwd and etc/group. A number that has no line there is user
// without a name; its group is 0, as the OCI runtimes have it.
func (t tree) user(s string) (user, error) {
	name, group, hasGroup := strings.Cut(s, ":")
	u := user{home: "/"}
	number, err := strconv.ParseUint(name, 10, 31)
	numeric := err == nil
	found := false
	for _, f := range t.table("etc/passwd", 7) {
		uid, uerr := strconv.Atoi(f[2])
		gid, gerr := strconv.Atoi(f[3])
		if uerr == nil && gerr == nil && (f[0] == name || numeric && uid == int(number)) {
			u, found = user{f[0], uid, gid, f[5]}, true
			break
		}
	}
	if !found {
		if !numeric {
			return user{}, fmt.Errorf("the image's command runs as the user %q, who is not in its etc/passwd", name)
		}
		u.uid = int(number)
	}
	if !hasGroup {
		return u, nil
	}
	if gid, err := strconv.ParseUint(group, 10, 31); err == nil {
		u.gid = int(gid)
		return u, nil
	}
	for _, f := range t.table("etc/group", 4) {
		if gid, err := strconv.Atoi(f[2]); err == nil && f[0] == group {
			u.gid = gid
			return u, nil
		}
	}
	return user{}, fmt.Errorf("the image's command runs as the group %q, which is not in its etc/group", group)
}

// table is the lines of a file that have at least n fields.
func (t tree) table(name string, n int) (rows [][]string) {
	b, err := t.read(name)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Split(strings.TrimRight(line, "\n"), ":"); len(f) >= n {
			rows = append(rows, f)
		}
	}
	return rows
}
