package recipe

import _ "embed" // for Sample

// Sample is a recipe that says nothing: each key is a comment with its standard
// value and an example.
//
//go:embed sample.toml
var Sample string
