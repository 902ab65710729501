package collect

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// store has the files of an image.
type store interface {
	open(name string) (io.ReadCloser, error)
}

// dirStore is the folder of an OCI layout.
type dirStore struct{ *os.Root }

func (s dirStore) open(name string) (io.ReadCloser, error) { return s.Open(filepath.FromSlash(name)) }

// tarStore is a plain tar that holds an image.
type tarStore struct {
	file  *os.File
	files map[string]extent
}

// extent is where in the tar a file is, or the one that it links to.
type extent struct {
	offset, size int64
	link         string
}

// readTarStore finds what is where in the plain tar f.
func readTarStore(f *os.File) (*tarStore, error) {
	s := &tarStore{f, map[string]extent{}}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	in := tar.NewReader(f)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return s, nil
		}
		if err != nil {
			return nil, err
		}
		name, err := clean(h.Name)
		if err != nil {
			return nil, err
		}
		switch h.Typeflag {
		case tar.TypeReg:
			// The reader takes whole blocks and none ahead: here the content begins.
			offset, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			s.files[name] = extent{offset: offset, size: h.Size}
		case tar.TypeSymlink: // docker save has had one layer in two folders so
			s.files[name] = extent{link: path.Join(path.Dir(name), h.Linkname)} //nolint:gosec // a key of files, no path
		case tar.TypeLink:
			s.files[name] = extent{link: path.Clean(h.Linkname)}
		}
		if len(s.files) > maxEntries {
			return nil, fmt.Errorf("it has more than %d entries", maxEntries)
		}
	}
}

func (s *tarStore) open(name string) (io.ReadCloser, error) {
	for range maxLinks {
		e, ok := s.files[path.Clean(name)]
		if !ok {
			break
		}
		if e.link == "" {
			return io.NopCloser(io.NewSectionReader(s.file, e.offset, e.size)), nil
		}
		name = e.link
	}
	return nil, fmt.Errorf("it has no file %s", name)
}

// maxDocument bounds the JSON files of an image, in bytes, as registries do.
const maxDocument = 4 << 20

func document(s store, name string) ([]byte, error) {
	r, err := s.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > maxDocument {
		return nil, fmt.Errorf("%s has more than %d MiB", name, maxDocument>>20)
	}
	return b, nil
}

func blobName(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

// blob reads a document by its digest.
func blob(s store, h v1.Hash) ([]byte, error) {
	b, err := document(s, blobName(h))
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(b); h.Algorithm != "sha256" || hex.EncodeToString(sum[:]) != h.Hex {
		return nil, fmt.Errorf("%s does not have that digest: get the image once more", blobName(h))
	}
	return b, nil
}

// image sends an image that is in a store.
func (w *rootWriter) image(s store, from string) error {
	w.info.Kind = "image"
	wrap := func(err error) error { return fmt.Errorf("the image %s: %w", from, err) }
	index, err := document(s, "index.json")
	var names []string
	var config *v1.ConfigFile
	if err == nil {
		names, config, err = w.oci(s, index)
	} else if index, err = document(s, "manifest.json"); err == nil {
		names, config, err = w.docker(s, index)
	}
	if err != nil {
		return wrap(err)
	}
	if a, o := config.Architecture, config.OS; a != "" && a != "amd64" || o != "" && o != "linux" {
		return wrap(fmt.Errorf("it is for %s/%s, and the system is linux/amd64: get that one", o, a))
	}
	if len(names) != len(config.RootFS.DiffIDs) {
		return wrap(fmt.Errorf("it has %d layers, and its configuration speaks of %d", len(names), len(config.RootFS.DiffIDs)))
	}
	c := config.Config
	w.info.Entrypoint, w.info.Cmd, w.info.Env, w.info.WorkingDir, w.info.User = c.Entrypoint, c.Cmd, c.Env, c.WorkingDir, c.User
	var layers []layer
	for i, name := range names {
		layers = append(layers, layer{
			name: fmt.Sprintf("the image %s, layer %d of %d", from, i+1, len(names)),
			open: func() (io.ReadCloser, error) {
				r, err := s.open(name)
				if err != nil {
					return nil, err
				}
				plain, err := decompress(r)
				if err != nil {
					return nil, err
				}
				return &verified{plain, sha256.New(), config.RootFS.DiffIDs[i]}, nil
			},
		})
	}
	return w.layers(layers, true)
}

// oci reads an index.json and all below it: the files with the layers of the one
// image that fits.
func (w *rootWriter) oci(s store, index []byte) ([]string, *v1.ConfigFile, error) {
	all, err := images(s, index, 0)
	if err != nil {
		return nil, nil, err
	}
	var fit, silent []v1.Descriptor
	for _, d := range all {
		switch p := platform(s, d); {
		case p == nil:
			silent = append(silent, d)
		case p.OS == "linux" && p.Architecture == "amd64":
			fit = append(fit, d)
		}
	}
	if len(fit) == 0 {
		fit = silent
	}
	switch {
	case len(all) == 0:
		return nil, nil, errors.New("it is empty")
	case len(fit) == 0:
		return nil, nil, fmt.Errorf("it is for %s, and the system is linux/amd64: get that one", platform(s, all[0]))
	case len(fit) > 1:
		return nil, nil, fmt.Errorf("it holds %d images for linux/amd64%s: copy one of them to a layout of its own (skopeo copy oci:FROM:NAME oci:TO)", len(fit), refNames(fit))
	}
	manifest, config, err := manifestOf(s, fit[0].Digest)
	if err != nil {
		return nil, nil, err
	}
	var names []string
	for _, l := range manifest.Layers {
		names = append(names, blobName(l.Digest))
	}
	w.info.Image = fit[0].Digest.String()
	return names, config, nil
}

func manifestOf(s store, digest v1.Hash) (*v1.Manifest, *v1.ConfigFile, error) {
	b, err := blob(s, digest)
	if err != nil {
		return nil, nil, err
	}
	manifest, err := v1.ParseManifest(bytes.NewReader(b))
	if err != nil {
		return nil, nil, fmt.Errorf("read its manifest: %w", err)
	}
	if b, err = blob(s, manifest.Config.Digest); err != nil {
		return nil, nil, err
	}
	config, err := v1.ParseConfigFile(bytes.NewReader(b))
	if err != nil {
		return nil, nil, fmt.Errorf("read its configuration: %w", err)
	}
	return manifest, config, nil
}

// platform is what an image is for, as its descriptor says or its configuration;
// nil if neither does.
func platform(s store, d v1.Descriptor) *v1.Platform {
	if d.Platform != nil {
		return d.Platform
	}
	_, config, err := manifestOf(s, d.Digest)
	if err != nil || config.OS == "" || config.Architecture == "" {
		return nil
	}
	return &v1.Platform{OS: config.OS, Architecture: config.Architecture}
}

func refNames(all []v1.Descriptor) string {
	var names []string
	for _, d := range all {
		if name := d.Annotations["org.opencontainers.image.ref.name"]; name != "" {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return " (" + strings.Join(names, ", ") + ")"
}

// images lists the images of an index and of the indexes in it, each digest once.
func images(s store, index []byte, depth int) ([]v1.Descriptor, error) {
	parsed, err := v1.ParseIndexManifest(bytes.NewReader(index))
	if err != nil {
		return nil, fmt.Errorf("read its index: %w", err)
	}
	if depth > 4 {
		return nil, errors.New("its indexes are in each other too often")
	}
	var all []v1.Descriptor
	for _, d := range parsed.Manifests {
		found := []v1.Descriptor{d}
		switch {
		case d.MediaType.IsIndex():
			b, err := blob(s, d.Digest)
			if err != nil {
				return nil, err
			}
			if found, err = images(s, b, depth+1); err != nil {
				return nil, err
			}
		// What signs or attests an image is beside it (BuildKit's attestation storage).
		case d.Annotations["vnd.docker.reference.type"] != "", d.Platform != nil && d.Platform.OS == "unknown":
			continue
		// What is no image may name its kind; go-containerregistry so names images, too.
		case d.ArtifactType != "" && !types.MediaType(d.ArtifactType).IsConfig():
			continue
		}
		for _, f := range found {
			known := false
			for _, a := range all {
				known = known || a.Digest == f.Digest
			}
			if !known {
				all = append(all, f)
			}
		}
	}
	return all, nil
}

// docker reads the manifest.json of docker save.
func (w *rootWriter) docker(s store, manifest []byte) ([]string, *v1.ConfigFile, error) {
	var all []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(manifest, &all); err != nil {
		return nil, nil, fmt.Errorf("read its manifest.json: %w", err)
	}
	if len(all) != 1 {
		return nil, nil, fmt.Errorf("it holds %d images: docker save one alone", len(all))
	}
	b, err := document(s, all[0].Config)
	if err != nil {
		return nil, nil, err
	}
	config, err := v1.ParseConfigFile(bytes.NewReader(b))
	if err != nil {
		return nil, nil, fmt.Errorf("read its configuration: %w", err)
	}
	sum := sha256.Sum256(b)
	w.info.Image = "sha256:" + hex.EncodeToString(sum[:])
	return all[0].Layers, config, nil
}

// layout sends the image of an OCI layout.
func (w *rootWriter) layout(from string) error {
	root, err := os.OpenRoot(from)
	if err != nil {
		return reading(from, err)
	}
	defer root.Close()
	return w.image(dirStore{root}, from)
}

// archive sends what is in a file: the root tree, or the image that it holds.
func (w *rootWriter) archive(from string) error {
	f, err := os.Open(from)
	if err != nil {
		return reading(from, err)
	}
	defer f.Close()
	open := func() (io.ReadCloser, error) {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		return decompress(io.NopCloser(f))
	}
	if w.holdsImage(open) {
		s, err := w.plainStore(f, open)
		if err != nil {
			return fmt.Errorf("%s: %w", from, broken(err))
		}
		defer s.file.Close()
		_, layout := s.files["oci-layout"]
		_, index := s.files["index.json"]
		_, docker := s.files["manifest.json"]
		if layout && index || docker {
			return w.image(s, from)
		}
	}
	w.info.Kind = "tar"
	return w.layers([]layer{{from, open}}, false)
}

// ofImage are the names at the top of an image's tar.
var ofImage = regexp.MustCompile(`^(blobs|oci-layout|index\.json|manifest\.json|repositories|(sha256:)?[0-9a-f]{64}(\.json|\.tar|\.tar\.gz)?)(/|$)`)

// holdsImage tells by its first entry whether a tar may hold an image.
func (w *rootWriter) holdsImage(open func() (io.ReadCloser, error)) bool {
	r, err := open()
	if err != nil {
		return false
	}
	defer r.Close()
	in := tar.NewReader(r)
	for range 4 { // ./ may come before it
		h, err := in.Next()
		if err != nil {
			return false
		}
		if name, err := clean(h.Name); err != nil || name != "" {
			return ofImage.MatchString(name)
		}
	}
	return false
}

// plainStore makes a store of a tar. One that is compressed, where nothing can be
// found by its place, is decompressed into a file without a name first.
func (w *rootWriter) plainStore(f *os.File, open func() (io.ReadCloser, error)) (*tarStore, error) {
	r, err := open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if r, ok := r.(stream); ok && r.plain {
		return readTarStore(f)
	}
	spool, err := os.CreateTemp("", "memlinux-image-")
	if err != nil {
		return nil, err
	}
	err = os.Remove(spool.Name())
	if err == nil {
		_, err = io.Copy(spool, contextReader{w.ctx, r})
	}
	var s *tarStore
	if err == nil {
		s, err = readTarStore(spool)
	}
	if err != nil {
		spool.Close()
	}
	return s, err
}

// stream is what decompress makes.
type stream struct {
	io.Reader
	close func() error
	plain bool // nothing was to be decompressed
}

func (s stream) Close() error { return s.close() }

// maxWindow bounds what a zstd stream may ask for, in bytes: zstd -19 has 8 MiB,
// --long 128 MiB.
const maxWindow = 128 << 20

// decompress gives the plain bytes of a stream that is compressed by what its
// first bytes say, or not. It closes r if it fails.
func decompress(r io.ReadCloser) (io.ReadCloser, error) {
	in := bufio.NewReaderSize(r, 256<<10)
	magic, _ := in.Peek(6) // of fewer bytes, none fits
	var out io.Reader
	var err error
	end := r.Close
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		out, err = gzip.NewReader(in)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var z *zstd.Decoder
		if z, err = zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow)); err == nil {
			out, end = z, func() error { z.Close(); return r.Close() }
		}
	case bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		out, err = xz.NewReader(in)
	case bytes.HasPrefix(magic, []byte("BZh")):
		out = bzip2.NewReader(in)
	default:
		return stream{in, end, true}, nil
	}
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("decompress: %w", err)
	}
	return stream{out, end, false}, nil
}

// verified gives an error in place of the end if the bytes do not have a digest.
type verified struct {
	io.ReadCloser
	sum  hash.Hash
	want v1.Hash
}

func (v *verified) Read(b []byte) (int, error) {
	n, err := v.ReadCloser.Read(b)
	v.sum.Write(b[:n])
	if errors.Is(err, io.EOF) && (v.want.Algorithm != "sha256" || hex.EncodeToString(v.sum.Sum(nil)) != v.want.Hex) {
		return n, fmt.Errorf("its content does not have the digest %s: get the image once more", v.want)
	}
	return n, err
}

// contextReader ends when its context does.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(b)
}
