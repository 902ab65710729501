package api

import (
	"io"

	"github.com/memlinux/memlinux/imagegen/manifest"
)

// Manifest describes a generated system: what Build writes into [FileManifest],
// and what lies on a stick under that name.
type Manifest = manifest.Manifest

// Account is what a system or a part of it takes, as [Manifest.Explain] gives it.
type Account = manifest.Account

// Item is a line of an [Account].
type Item = manifest.Item

// ManifestChange is something in which two systems differ.
type ManifestChange = manifest.Change

// ParseManifest reads a manifest.
func ParseManifest(r io.Reader) (Manifest, error) { return manifest.Parse(r) }

// DiffManifests lists the differences from a to b.
func DiffManifests(a, b Manifest) []ManifestChange { return manifest.Diff(a, b) }
