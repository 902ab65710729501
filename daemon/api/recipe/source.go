package recipe

import (
	"errors"
	"fmt"
	"math"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
)

// Kind is the way by which a kernel or a busybox is found.
type Kind string

// The ways. What Value of a [Source] is stands beside each.
const (
	KindAuto         Kind = "auto"          // nothing: what is best here
	KindHost         Kind = "host"          // nothing: this machine's kernel or busybox, or an error
	KindDebian       Kind = "debian"        // of a kernel: the name of a binary package
	KindDebianSource Kind = "debian-source" // of a kernel: the version, such as 6.1
	KindSourcePath   Kind = "source-path"   // a tar or an unpacked tree
	KindSourceURL    Kind = "source-url"    // an http or https URL of a tar
	KindFile         Kind = "file"          // the ready file
)

// Source says where a kernel or a busybox comes from.
type Source struct {
	Kind  Kind
	Value string
}

// Built reports whether it is compiled from source.
func (s Source) Built() bool {
	return s.Kind == KindDebianSource || s.Kind == KindSourcePath || s.Kind == KindSourceURL
}

// String is the source as a recipe writes it.
func (s Source) String() string {
	switch s.Kind {
	case KindFile:
		return s.Value
	case KindSourcePath, KindSourceURL:
		return "source:" + s.Value
	}
	if s.Value != "" {
		return string(s.Kind) + ":" + s.Value
	}
	return string(s.Kind)
}

// KernelSource is one of auto, host, debian:PACKAGE, debian-source:VERSION,
// source:PATH, source:URL and the path of a bzImage.
type KernelSource struct{ Source }

// BusyboxSource is one of auto, host, debian, debian-source, source:PATH,
// source:URL and the path of a static busybox.
type BusyboxSource struct{ Source }

// What Debian calls a package (Debian policy, 5.6.1), the series of a
// linux-source package, and how a URL or a prefix of ours begins.
var (
	packageName   = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	sourceVersion = regexp.MustCompile(`^[0-9]{1,2}\.[0-9]{1,3}$`)
	prefix        = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9+-]*:`)
)

// UnmarshalText reads a kernel's source. The --kernel flag has the same form.
func (s *KernelSource) UnmarshalText(text []byte) error {
	t := string(text)
	if k := Kind(t); k == KindAuto || k == KindHost {
		s.Source = Source{Kind: k}
		return nil
	}
	if name, ok := strings.CutPrefix(t, "debian:"); ok {
		if !packageName.MatchString(name) {
			return fmt.Errorf("%q is no name of a package; write it like debian:linux-image-amd64", name)
		}
		s.Source = Source{KindDebian, name}
		return nil
	}
	if version, ok := strings.CutPrefix(t, "debian-source:"); ok {
		if !sourceVersion.MatchString(version) {
			return fmt.Errorf("%q is no version of Debian's linux-source packages; write it like debian-source:6.1", version)
		}
		s.Source = Source{KindDebianSource, version}
		return nil
	}
	switch t {
	case "debian", "debian-source", "source":
		return fmt.Errorf("%q lacks what; write debian:PACKAGE, debian-source:VERSION, source:PATH or source:URL", t)
	}
	var err error
	s.Source, err = fileOrSource(t, "auto, host, debian:PACKAGE, debian-source:VERSION, source:PATH, source:URL or a file")
	return err
}

// UnmarshalText reads a busybox's source. The --busybox flag has the same form.
func (s *BusyboxSource) UnmarshalText(text []byte) error {
	t := string(text)
	switch k := Kind(t); k {
	case KindAuto, KindHost, KindDebian, KindDebianSource:
		s.Source = Source{Kind: k}
		return nil
	}
	if t == "source" {
		return errors.New(`"source" lacks what; write source:PATH or source:URL`)
	}
	var err error
	s.Source, err = fileOrSource(t, "auto, host, debian, debian-source, source:PATH, source:URL or a file")
	return err
}

func fileOrSource(t, forms string) (Source, error) {
	source, isSource := strings.CutPrefix(t, "source:")
	switch {
	case t == "":
		return Source{}, fmt.Errorf("it is empty; it can be %s", forms)
	case isSource && source == "":
		return Source{}, errors.New("source: lacks what; write source:PATH or source:URL")
	case isSource && strings.Contains(source, "://"):
		u, err := url.Parse(source)
		if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
			return Source{}, fmt.Errorf("%q is no https or http URL", source)
		}
		return Source{KindSourceURL, source}, nil
	case isSource:
		return Source{KindSourcePath, source}, nil
	case strings.Contains(t, "://"):
		return Source{}, fmt.Errorf("a URL of a source begins with source:, as in %q", "source:"+t)
	case prefix.MatchString(t):
		return Source{}, fmt.Errorf("%q is not known; it can be %s (a file whose name has a colon is written ./%s)", t, forms, t)
	}
	return Source{KindFile, t}, nil
}

// Owner is a file's owner and group. A recipe writes USER:GROUP in numbers, or
// root: the system knows no other name.
type Owner struct{ UID, GID int }

// UnmarshalText reads USER:GROUP.
func (o *Owner) UnmarshalText(text []byte) error {
	user, group, ok := strings.Cut(string(text), ":")
	uid, err1 := ownerID(user)
	gid, err2 := ownerID(group)
	if !ok || err1 != nil || err2 != nil {
		return fmt.Errorf(`%q is no owner; write USER:GROUP in numbers, or root, like "1000:1000" or "root:root"`, text)
	}
	*o = Owner{uid, gid}
	return nil
}

// ownerID leaves out the highest number, which chown(2) takes for none.
func ownerID(s string) (int, error) {
	if s == "root" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == math.MaxUint32 {
		return 0, strconv.ErrRange
	}
	return int(n), nil
}

// Size is an amount of memory in bytes. A recipe writes it with its unit:
// "512MiB".
type Size int64

// Beyond these, in bytes, it is the unit that is wrong.
const (
	minRAM = 16 << 20
	maxRAM = 64 << 40
)

// UnmarshalText reads a size; the empty text is 0.
func (s *Size) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*s = 0
		return nil
	}
	n, err := humanize.ParseBytes(string(text))
	if err != nil {
		return fmt.Errorf(`%q is no size; write it like "512MiB" or "2GiB"`, text)
	}
	if n < minRAM || n > maxRAM {
		return fmt.Errorf(`%q is %d bytes, which is no PC's RAM; write it with its unit, like "512MiB"`, text, n)
	}
	*s = Size(n)
	return nil
}
