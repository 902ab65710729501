package initramfs

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// Union is t with more entries and the folders that these are in, which are
// root's with mode 0755 where nobody describes them. A path where two have
// something is an error that names both, except for folders: of those the first
// that was described counts. As in a running system, a path that goes through a symbolic link
// to a folder is where the link leads.
func (t Tree) Union(more ...Entry) (Tree, error) {
	return merge(t, slices.Clone(more), nil, nobodyWins)
}

// Overlay lays upper over lower. An entry of upper takes the place of what
// lower has at its path. A folder in both has what both have in it; mode and
// owner are upper's, unless that has the folder only because of what is in it. A
// path of upper that goes through a symbolic link of lower is where the link
// leads, which must be in the tree. A folder where the other has something else
// is an error that names both. Other names of a file that is replaced keep what
// it was.
func Overlay(lower, upper Tree) (Tree, error) {
	return merge(lower, slices.Clone(upper), nil, upperWins)
}

// winner says which of two entries of one path counts.
type winner int

const (
	nobodyWins winner = iota // it is an error
	upperWins                // that of the upper tree; two of the upper tree are an error
	lastWins                 // the last one, even where it is of another type
)

// maxEntries bounds what a tree is made of: a full desktop has about as many.
const maxEntries = 1 << 18

// merge makes a tree of lower and of the entries of upper, which become its
// own. files says of hard links in upper which of its entries they are a name
// of; of those that are not in it their path tells.
func merge(lower Tree, upper []Entry, files map[int]int, wins winner) (Tree, error) {
	if len(lower)+len(upper) > maxEntries {
		return nil, fmt.Errorf("initramfs: there are more than %d files and folders", maxEntries)
	}
	all, err := arrange(lower, upper, wins)
	if err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	m := merging{all: all, upper: len(lower), wins: wins, place: make([]int32, len(all)), gone: map[int]Entry{}}
	for _, step := range []func() error{func() error { return m.findFiles(files) }, m.choose, m.relink, m.addFolders} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("initramfs: %w", err)
		}
	}
	return m.out, m.out.Validate()
}

// arrange puts the entries of upper behind those of lower and resolves their
// paths.
func arrange(lower Tree, upper []Entry, wins winner) ([]Entry, error) {
	r := resolver{lower: lower, upper: map[string]string{}, real: map[string]string{}, ends: map[string]string{}}
	for _, e := range upper {
		if !usable(e.Path) {
			return nil, fmt.Errorf("%q is not a usable path", e.Path)
		}
		switch {
		case e.Mode&fs.ModeSymlink != 0:
			r.upper[e.Path] = e.Link
		case (wins == lastWins || !e.Mode.IsDir()) && r.link(e.Path) != "":
			r.upper[e.Path] = "" // no link any more
		}
	}
	all := upper
	if len(lower) > 0 {
		all = slices.Concat(lower, upper)
	}
	kept := all[:len(lower)]
	for _, e := range all[len(lower):] {
		var err error
		path := e.Path
		if e.Mode.IsDir() {
			e.Path, err = r.folder(e.Path)
		} else {
			e.Path, err = r.file(e.Path)
		}
		if err != nil {
			return nil, fmt.Errorf("%s (%s): %w", shortened(path), e.reason(), err)
		}
		if e.HardLink != "" {
			if e.HardLink, err = r.file(strings.Trim(e.HardLink, "/")); err != nil {
				return nil, fmt.Errorf("%s (%s), a hard link: %w", shortened(path), e.reason(), err)
			}
		}
		kept = append(kept, e)
	}
	return kept, nil
}

func (e Entry) reason() string {
	if e.Why == "" {
		return "nobody says why"
	}
	return e.Why
}

func (e Entry) kind() string {
	switch {
	case e.Mode.IsDir():
		return "a folder"
	case e.Mode&fs.ModeSymlink != 0:
		return "a symbolic link"
	case e.Mode&fs.ModeNamedPipe != 0:
		return "a named pipe"
	}
	return "a file"
}

// merging is one run of merge. It names entries by their place in all as it was
// at first.
type merging struct {
	all   []Entry
	upper int // where in all the upper tree begins
	wins  winner
	file  map[int]int   // hard links → the file that they are a name of
	place []int32       // of entries in out; -1 for those that are not in it
	gone  map[int]Entry // those that another has replaced
	out   Tree          // in the memory of all
}

// findFiles fills file. A hard link is a name of what its own tree has at that
// path, and only else of what the lower one has.
func (m *merging) findFiles(given map[int]int) error {
	at := map[string]int{} // files that links speak of, to the last entry there
	for _, e := range m.all {
		if e.HardLink != "" {
			at[e.HardLink] = -1
		}
	}
	if len(at) == 0 {
		return nil
	}
	m.file = map[int]int{}
	bind := func(from, to int) {
		for i := from; i < to; i++ {
			if _, wanted := at[m.all[i].Path]; wanted {
				at[m.all[i].Path] = i
			}
		}
		for i := from; i < to; i++ {
			if e := m.all[i]; e.HardLink != "" {
				m.file[i] = at[e.HardLink]
			}
		}
	}
	bind(0, m.upper)
	bind(m.upper, len(m.all))
	for link, file := range given {
		m.file[m.upper+link] = m.upper + file
	}
	for i, f := range m.file {
		e := m.all[i]
		links := []int{i}
		for f >= 0 && m.all[f].HardLink != "" {
			if len(links) > len(m.file) {
				return fmt.Errorf("%s (%s) is a hard link to itself", e.Path, e.reason())
			}
			links = append(links, f)
			f = m.file[f]
		}
		if f < 0 || !m.all[f].Mode.IsRegular() {
			return fmt.Errorf("%s (%s) is a hard link to %s, which is not there or no file", e.Path, e.reason(), e.HardLink)
		}
		for _, i := range links {
			m.file[i] = f // and nobody goes a long way twice
		}
	}
	return nil
}

// choose makes out of all: sorted, with one entry for each path. It does so in
// place, since a root tree has many.
func (m *merging) choose() error {
	first := m.sort()
	m.out = m.all[:0]
	from := 0 // what the last one of out was
	for k, i := range first {
		e := m.all[k]
		last := len(m.out) - 1
		switch {
		case e.Path == "": // a folder that is a link to the root
			continue
		case last < 0 || m.out[last].Path != e.Path:
			m.out = append(m.out, e)
		case e.Mode.IsDir() && m.out[last].Mode.IsDir():
			order := min(e.Order, m.out[last].Order)
			if m.out[last].implied || m.wins != nobodyWins && !e.implied {
				m.out[last] = e
			}
			m.out[last].Order = order
		case m.wins == lastWins,
			m.wins == upperWins && from < m.upper && i >= m.upper && !e.Mode.IsDir() && !m.out[last].Mode.IsDir():
			m.place[from], m.gone[from] = -1, m.out[last]
			m.out[last] = e
		case e.Mode.IsDir() != m.out[last].Mode.IsDir():
			return fmt.Errorf("%s is %s (%s) and %s (%s)", e.Path, m.out[last].kind(), m.out[last].reason(), e.kind(), e.reason())
		default:
			return fmt.Errorf("two files for %s: %s and %s", e.Path, m.out[last].reason(), e.reason())
		}
		from = i
		m.place[i] = int32(len(m.out) - 1)
	}
	return nil
}

// sort sorts all by path, entries of one path as they came, and returns where
// each was before.
func (m *merging) sort() []int {
	order := make([]int, len(m.all))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		if c := strings.Compare(m.all[a].Path, m.all[b].Path); c != 0 {
			return c
		}
		return a - b
	})
	done := make([]bool, len(order))
	for begin := range order {
		// A cycle: the entry at k gives way to the one that belongs there.
		e := m.all[begin]
		for k := begin; !done[k]; k = order[k] {
			done[k] = true
			if order[k] == begin {
				m.all[k] = e
			} else {
				m.all[k] = m.all[order[k]]
			}
		}
	}
	return order
}

// relink tells hard links the path of their file. Where that was replaced, the
// first of its other names becomes the file.
func (m *merging) relink() error {
	names := map[int][]int32{} // of a file: places of its other names
	for i, f := range m.file {
		if m.place[i] >= 0 {
			names[f] = append(names[f], m.place[i])
		}
	}
	for f, places := range names {
		slices.Sort(places)
		file, replaced := m.gone[f]
		if replaced {
			e := &m.out[places[0]]
			file.Path, file.Why, file.Order = e.Path, e.Why, e.Order
			*e = file
			places = places[1:]
		} else {
			file = m.out[m.place[f]]
		}
		for _, p := range places {
			e := &m.out[p]
			e.HardLink, e.Mode, e.UID, e.GID = file.Path, file.Mode, file.UID, file.GID
		}
	}
	return nil
}

// addFolders adds the folders that nobody described, and lets none come behind
// what is in it.
func (m *merging) addFolders() error {
	folders := map[string]int{"": -1} // to their place in out
	for i, e := range m.out {
		if e.Mode.IsDir() {
			folders[e.Path] = i
		}
	}
	sorted := m.out
	for i := 0; i < len(m.out); i++ { // which grows
		e := m.out[i]
		dir := parent(e.Path)
		if _, have := folders[dir]; have {
			continue
		}
		if j, there := sorted.index(dir); there {
			return fmt.Errorf("%s is %s (%s), and %s (%s) needs a folder there", dir, sorted[j].kind(), sorted[j].reason(), e.Path, e.reason())
		}
		if len(m.out) >= maxEntries {
			return fmt.Errorf("there are more than %d files and folders", maxEntries)
		}
		folders[dir] = 0 // its place comes when all have theirs
		m.out = append(m.out, impliedBy(e))
	}
	slices.SortFunc(m.out, byPath)
	for i, e := range m.out {
		if e.Mode.IsDir() {
			folders[e.Path] = i
		}
	}
	for i := len(m.out) - 1; i >= 0; i-- {
		if j := folders[parent(m.out[i].Path)]; j >= 0 {
			m.out[j].Order = min(m.out[j].Order, m.out[i].Order)
		}
	}
	return nil
}

// impliedBy is the folder that e is in, where nobody described it.
func impliedBy(e Entry) Entry {
	why := e.Why
	if !e.implied { // else they share a string, of which there may be many long ones
		why = "the folder of " + e.Path
	}
	return Entry{Path: parent(e.Path), Mode: fs.ModeDir | 0o755, Why: why, Order: e.Order, implied: true}
}

// parent is the folder that path is in; "" is the root of the tree.
func parent(path string) string { return path[:max(0, strings.LastIndexByte(path, '/'))] }

func join(folder, name string) string {
	if folder == "" {
		return name
	}
	return folder + "/" + name
}

// resolver follows symbolic links as they will be when all is merged.
type resolver struct {
	lower Tree
	upper map[string]string // path → target, or "" for what is no link
	real  map[string]string // folders that were asked for → where they are
	ends  map[string]string // links that were followed → where they end; "" while they are
}

// link is the target of the symbolic link at path; "" where there is none.
func (r *resolver) link(path string) string {
	if to, there := r.upper[path]; there {
		return to
	}
	if i, found := r.lower.index(path); found {
		return r.lower[i].Link
	}
	return ""
}

// file is where path is when the links to its folder are followed.
func (r *resolver) file(path string) (string, error) {
	dir, err := r.folder(parent(path))
	if dir == parent(path) {
		return path, err // and no more memory for it
	}
	return join(dir, path[len(parent(path))+1:]), err
}

// folder is where the folder at path is when all links are followed.
func (r *resolver) folder(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	if to, known := r.real[path]; known {
		return to, nil
	}
	if len(r.real) > maxEntries {
		return "", fmt.Errorf("there are more than %d files and folders", maxEntries)
	}
	to, err := r.file(path)
	if err == nil {
		to, err = r.follow(to, 0)
	}
	if err != nil {
		return "", err
	}
	r.real[path] = to
	return to, nil
}

// maxLinks is how many links on the way to a file the kernel follows
// (path_resolution(7)).
const maxLinks = 40

// follow is where path ends, of which only the last name may be a link.
func (r *resolver) follow(path string, links int) (string, error) {
	if len(path) > maxPath {
		return "", errors.New("symbolic links make the path too long")
	}
	link := r.link(path)
	if link == "" {
		return path, nil
	}
	if end, known := r.ends[path]; known && end != "" {
		return end[1:], nil
	} else if known || links == maxLinks {
		return "", fmt.Errorf("the symbolic link %s leads in a circle", path)
	}
	r.ends[path] = ""
	to := parent(path)
	if strings.HasPrefix(link, "/") {
		to = ""
	}
	for name := range strings.SplitSeq(link, "/") {
		var err error
		switch name {
		case "", ".":
			continue
		case "..":
			if to == "" {
				return "", fmt.Errorf("the symbolic link %s to %s leads out of the tree", path, link)
			}
			to = parent(to)
		default:
			if to, err = r.follow(join(to, name), links+1); err != nil {
				return "", err
			}
		}
	}
	r.ends[path] = "/" + to
	return to, nil
}
