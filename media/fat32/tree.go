package fat32

import (
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"
	"time"
)

const (
	maxFileSize   = 1<<32 - 1 // bytes: DIR_FileSize has 32 bits
	maxDirEntries = 65536     // a folder has at most 2 MiB (fatgen103, "FAT Directories")
)

// node is a file or folder in the tree.
type node struct {
	path    string // "" for the root
	name    string // the last part of path
	dir     bool
	modTime time.Time
	size    int64
	content io.ReaderAt

	parent   *node
	children []*node          // sorted by name
	byName   map[string]*node // children by folded name
	listed   bool             // it is a File, not only the parent of one

	short   [11]byte
	long    []uint16 // nil where the short name says all
	cluster int64    // the first one; 0 for an empty file
}

// tree holds the nodes in the order in which they lie on the volume: folders
// first, the root foremost, then files. A folder comes before what is in it.
type tree struct {
	dirs  []*node
	files []*node
}

// newTree checks the files and gives every one its place and its short name.
func newTree(files []File, parentTime time.Time) (*tree, error) {
	root := &node{dir: true}
	for i := range files {
		if err := root.add(&files[i], parentTime); err != nil {
			return nil, err
		}
	}
	t := &tree{dirs: []*node{root}}
	for i := 0; i < len(t.dirs); i++ {
		d := t.dirs[i]
		sort.Slice(d.children, func(i, j int) bool { return d.children[i].name < d.children[j].name })
		setShortNames(d.children)
		if n := d.slots(); n > maxDirEntries {
			return nil, fmt.Errorf("folder %q: its names need %d directory entries and FAT32 allows %d: spread the files over several folders",
				"/"+d.path, n, maxDirEntries)
		}
		for _, c := range d.children {
			if c.dir {
				t.dirs = append(t.dirs, c)
			} else {
				t.files = append(t.files, c)
			}
		}
	}
	return t, nil
}

// add puts f in the tree below the root n, with the folders that lead to it.
func (n *node) add(f *File, parentTime time.Time) error {
	if err := f.check(); err != nil {
		return fmt.Errorf("file %q: %w", f.Path, err)
	}
	for start := 0; ; {
		end, last := len(f.Path), true
		if i := strings.IndexByte(f.Path[start:], '/'); i >= 0 {
			end, last = start+i, false
		}
		name, path := f.Path[start:end], f.Path[:end]
		key := fold(name)
		child := n.byName[key]
		switch {
		case child == nil:
			if err := checkName(name); err != nil {
				return fmt.Errorf("file %q: %w", f.Path, err)
			}
			child = &node{path: path, name: name, dir: true, modTime: parentTime, parent: n}
			if n.byName == nil {
				n.byName = make(map[string]*node)
			}
			n.byName[key] = child
			n.children = append(n.children, child)
		case child.name != name:
			return fmt.Errorf("files %q and %q: FAT takes the names for the same, as they differ only in upper and lower case: rename one", child.path, path)
		case last && child.listed:
			return fmt.Errorf("file %q is listed twice: leave one out", path)
		case !child.dir:
			return fmt.Errorf("files %q and %q: the first is a file and can't hold the second: leave one out", child.path, f.Path)
		case last && !f.Dir:
			return fmt.Errorf("files %q and %q: the first is a folder that holds the second, so it can't be a file as well: leave one out",
				path, child.children[0].path)
		}
		if last {
			child.listed, child.dir, child.modTime = true, f.Dir, f.ModTime
			child.size, child.content = f.Size, f.Content
			return nil
		}
		n, start = child, end+1
	}
}

func (f *File) check() error {
	switch {
	case f.Dir && f.Size != 0:
		return errors.New("a folder has no size of its own")
	case f.Size < 0:
		return fmt.Errorf("its size is negative (%d)", f.Size)
	case f.Size > maxFileSize:
		return fmt.Errorf("it has %d bytes, and a file on FAT32 must be smaller than 4 GiB: split or compress it", f.Size)
	case f.Size > 0 && f.Content == nil:
		return errors.New("it has a size but no content")
	}
	return nil
}

// slots is the number of 32-byte directory entries that a folder holds. The
// root has none for itself and its parent but one for the label, which counts
// even where there is none, so that the label does not change what fits.
func (n *node) slots() int64 {
	count := int64(2)
	if n.parent == nil {
		count = 1
	}
	for _, c := range n.children {
		count += 1 + ceil(int64(len(c.long)), longUnits)
	}
	return count
}

// clustersOf is how many clusters of the given size in bytes the node takes.
func (n *node) clustersOf(cluster int64) int64 {
	if n.dir {
		return ceil(n.slots()*entrySize, cluster)
	}
	return ceil(n.size, cluster)
}

// clusters is how many clusters of the given size in bytes the tree takes.
func (t *tree) clusters(cluster int64) int64 {
	var sum int64
	for _, list := range [][]*node{t.dirs, t.files} {
		for _, n := range list {
			sum += n.clustersOf(cluster)
		}
	}
	return sum
}

// run is a file's or folder's chain of clusters, which follow one another.
type run struct{ first, clusters int64 }

// place gives every node its clusters and returns the runs in order.
func (t *tree) place(g geometry) []run {
	var runs []run
	next := int64(firstData)
	for _, list := range [][]*node{t.dirs, t.files} {
		for _, n := range list {
			count := n.clustersOf(g.cluster)
			if count == 0 {
				continue
			}
			n.cluster = next
			runs = append(runs, run{first: next, clusters: count})
			next += count
		}
	}
	return runs
}
