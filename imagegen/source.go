package imagegen

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/imagegen/cache"
	"github.com/memlinux/memlinux/imagegen/debian"
	"github.com/memlinux/memlinux/imagegen/download"
	"github.com/memlinux/memlinux/imagegen/kbuild"
	"github.com/memlinux/memlinux/imagegen/tarball"
)

// SourceCode says where the source code of a program comes from: one of File,
// URL and Debian.
type SourceCode struct {
	File   *os.File // a tar, also compressed
	URL    string   // of a tar, by https, or by http where SHA256 or Keyring are there
	Debian string   // a package that has the tar in usr/src, such as linux-source-6.1

	SHA256    string   // that the file must have, hex; "" for any
	Keyring   *os.File // of OpenPGP: one of its keys must have signed the plain tar; nil for none
	Signature *os.File // by which it was signed; nil: beside URL
}

// maxSource bounds a tar of source code, in bytes: that of an unpacked Linux
// with its history left out has 1.5 GiB.
const maxSource = 4 << 30

func (s SourceCode) isZero() bool { return s.File == nil && s.URL == "" && s.Debian == "" }

func (s SourceCode) validate(what string) error {
	if s.SHA256 != "" {
		if b, err := hex.DecodeString(s.SHA256); err != nil || len(b) != sha256.Size {
			return fmt.Errorf("%q is no SHA-256, which has 64 hex digits", s.SHA256)
		}
	}
	if s.Signature != nil && s.Keyring == nil {
		return fmt.Errorf("a signature of the %s's source proves something only with a keyring; name that, too", what)
	}
	switch {
	case s.Debian != "":
		if !debian.ValidName(s.Debian) {
			return fmt.Errorf("%q is not a Debian package name", s.Debian)
		}
		if s.SHA256 != "" || s.Keyring != nil {
			return fmt.Errorf("apt checks Debian's source of the %s by Debian's own signatures; leave the SHA-256 and the keyring out", what)
		}
	case s.URL != "":
		u, err := url.Parse(s.URL)
		if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
			return fmt.Errorf("%q is not an http or https address", s.URL)
		}
		if u.Scheme == "http" && s.SHA256 == "" && s.Keyring == nil {
			return fmt.Errorf("the source of the %s comes by http, where anybody on the way can change it: name its SHA-256 or the keyring that it is signed with, or use https", what)
		}
	}
	return nil
}

// sourceFile is source code in the cache, verified as far as was asked for.
type sourceFile struct {
	f      *os.File
	size   int64
	sha256 string
	name   string // for the manifest
	close  func()
}

// source brings source code into the cache's folder and verifies it.
func (b *build) source(ctx context.Context, phase string, s SourceCode) (src sourceFile, err error) {
	switch {
	case s.Debian != "":
		src, err = b.debianSource(ctx, phase, s.Debian)
	case s.URL != "":
		src, err = b.downloadURL(ctx, phase, s)
	default:
		src, err = b.sourceOf(ctx, phase, s)
	}
	if err != nil {
		return sourceFile{}, err
	}
	defer func() {
		if err != nil {
			src.close()
		}
	}()
	if s.SHA256 != "" && !strings.EqualFold(s.SHA256, src.sha256) {
		what := src.name
		if s.File != nil {
			what = "the source" // its name is its digest
		}
		return src, fmt.Errorf("%s has the SHA-256 %s, not %s; it is damaged, or another file", what, src.sha256, strings.ToLower(s.SHA256))
	}
	if s.URL != "" && s.SHA256 == "" && s.Keyring == nil {
		b.warn("%s is what the server gave; to be sure that it stays that, name its SHA-256: %s", src.name, src.sha256)
	}
	if s.Keyring == nil {
		return src, nil
	}
	return src, b.checkSignature(ctx, s, src)
}

// sourceOf takes the caller's file. It does not stay in the cache: a tree that
// somebody works on would fill it.
func (b *build) sourceOf(ctx context.Context, phase string, s SourceCode) (sourceFile, error) {
	staged, err := b.take(ctx, s.File, maxSource, func(done, total int64) { b.progress(phase, done, total) })
	if err != nil {
		return sourceFile{}, fmt.Errorf("the source: %w", err)
	}
	sum := staged.SHA256()
	// A path would tell of the machine, and two copies are the same source.
	return sourceFile{f: staged.File(), size: staged.Size(), sha256: sum, name: "sha256:" + sum, close: staged.Discard}, nil
}

// openSource opens a file of the cache, which verify has not read.
func openSource(file File, name string) (sourceFile, error) {
	f, err := os.Open(file.Path)
	if err != nil {
		return sourceFile{}, err
	}
	return sourceFile{f: f, size: file.Size, sha256: file.SHA256, name: name, close: func() { _ = f.Close() }}, nil
}

func (b *build) debianSource(ctx context.Context, phase, name string) (sourceFile, error) {
	got, err := b.fetch(ctx, phase, name, nil, false, "usr/src/*.tar.*")
	if err != nil {
		return sourceFile{}, err
	}
	for at, file := range got.files {
		return openSource(file, path.Base(at)+" of Debian's "+got.from.Name+" "+got.from.Version)
	}
	return sourceFile{}, fmt.Errorf("Debian's package %s has no source in usr/src", name) //nolint:staticcheck // a proper noun
}

// verify reads source code that is in the cache and finds out whether it is
// still what it was.
func (b *build) verify(ctx context.Context, s SourceCode, src sourceFile) error {
	if s.File != nil {
		return nil // it was hashed as it came
	}
	if _, err := b.store.Lookup(ctx, src.sha256); errors.Is(err, os.ErrNotExist) {
		if rerr := os.Remove(src.f.Name()); rerr != nil {
			return rerr
		}
		return fmt.Errorf("%s was damaged in the cache and is removed; run it again", src.name)
	} else if err != nil {
		return err
	}
	return nil
}

// downloaded is the cache's record of what an address gave.
type downloaded struct {
	SHA256       string
	Size         int64
	LastModified string
	ETag         string
}

// downloadURL fetches the file at s.URL, unless the cache has it and the server
// knows no newer one.
func (b *build) downloadURL(ctx context.Context, phase string, s SourceCode) (sourceFile, error) {
	name := path.Base(s.URL)
	sum := sha256.Sum256([]byte(s.URL))
	record, recordName := downloaded{}, "url-"+hex.EncodeToString(sum[:16])
	var old File
	have := false
	if b.store.Record(recordName, &record) == nil {
		var err error
		if old, err = b.store.Find(record.SHA256); err == nil {
			have = true
			if strings.EqualFold(s.SHA256, record.SHA256) {
				return openSource(old, name)
			}
		}
	}
	if !have {
		record = downloaded{}
	}
	staged, err := b.get(ctx, phase, s.URL, maxSource, &record)
	if err != nil {
		if have && ctx.Err() == nil {
			b.warn("%s could not be fetched (%v); the cached one is used", s.URL, err)
			return openSource(old, name)
		}
		return sourceFile{}, err
	}
	if staged == nil {
		return openSource(old, name)
	}
	defer staged.Discard()
	file, err := staged.Commit(ctx)
	if err != nil {
		return sourceFile{}, err
	}
	record.SHA256, record.Size = file.SHA256, file.Size
	if err := b.store.SetRecord(recordName, record); err != nil {
		return sourceFile{}, err
	}
	return openSource(file, name)
}

// get fetches what is at address into the cache; nil where the server says that
// what known describes is still right, else known is brought up to date.
func (b *build) get(ctx context.Context, phase, address string, limit int64, known *downloaded) (staged *cache.Staged, err error) {
	q := download.Request{URL: address, Limit: limit, ETag: known.ETag, LastModified: known.LastModified}
	a, err := download.Get(ctx, q, func(a download.Answer, body io.Reader) error {
		if staged, err = b.store.Stage(); err != nil {
			return err
		}
		return staged.Fill(ctx, body, func(done int64) { b.progress(phase, done, a.Size) })
	})
	if err != nil {
		if staged != nil {
			staged.Discard()
		}
		return nil, err
	}
	if !a.Unchanged {
		known.ETag, known.LastModified = a.ETag, a.LastModified
	}
	return staged, nil
}

// maxSignature bounds a signature, in bytes.
const maxSignature = 1 << 20

// checkSignature wants the plain tar signed, as kernel.org does it.
func (b *build) checkSignature(ctx context.Context, s SourceCode, src sourceFile) error {
	var signature io.Reader
	switch {
	case s.Signature != nil:
		signature = io.NewSectionReader(s.Signature, 0, maxSignature)
	case s.URL != "":
		staged, err := b.get(ctx, PhaseKernel, signatureBeside(s.URL), maxSignature, &downloaded{})
		if err != nil {
			return fmt.Errorf("the signature of %s: %w", src.name, err)
		}
		defer staged.Discard()
		signature = io.NewSectionReader(staged, 0, staged.Size())
	default:
		return fmt.Errorf("%s: there is a keyring and no signature; name that, too", src.name)
	}
	plain, err := tarball.NewReader(io.NewSectionReader(src.f, 0, src.size))
	if err != nil {
		return fmt.Errorf("%s: %w", src.name, err)
	}
	defer plain.Close()
	if _, err := kbuild.VerifySignature(ctx, plain, signature, io.NewSectionReader(s.Keyring, 0, 64<<20)); err != nil {
		return fmt.Errorf("%s: %w", src.name, err)
	}
	return nil
}

// signatureBeside is the address of the signature of the tar at address:
// linux-6.1.tar.xz has linux-6.1.tar.sign.
func signatureBeside(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return address + ".sign"
	}
	if slices.Contains([]string{".xz", ".gz", ".bz2", ".zst"}, path.Ext(u.Path)) {
		u.Path = strings.TrimSuffix(u.Path, path.Ext(u.Path))
	}
	u.Path += ".sign"
	return u.String()
}
