package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestParagraph(t *testing.T) {
	const mit = "MIT License\n\nCopyright (c) 2020 A. Person\n\nPermission is hereby granted, free of charge, to any person\n"
	const bsd = "Copyright 2009 The Go Authors.\n\nRedistribution and use in source and binary forms\n * Neither the name of Google\n"
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string // "" is an error
	}{
		{"its holder and text", map[string]string{"LICENSE": mit},
			"Files: m@v1/*\nCopyright: Copyright (c) 2020 A. Person\nLicense: Expat\n MIT License\n .\n Copyright (c) 2020 A. Person\n .\n Permission is hereby granted, free of charge, to any person\n"},
		{"three clauses are not two", map[string]string{"LICENSE": bsd},
			"Files: m@v1/*\nCopyright: Copyright 2009 The Go Authors.\nLicense: BSD-3-clause\n Copyright 2009 The Go Authors.\n .\n Redistribution and use in source and binary forms\n  * Neither the name of Google\n"},
		{"the Apache License is Debian's, its NOTICE is told", map[string]string{"LICENSE.txt": "  Apache License\n  Version 2.0, January 2004\n", "NOTICE": "By us.\n"},
			"Files: m@v1/*\nCopyright: The authors of m\nComment: Its NOTICE says:\n By us.\nLicense: Apache-2.0\n"},
		{"a licence that nobody has looked at stops", map[string]string{"LICENSE": "All rights reserved.\n"}, ""},
		{"no licence stops", nil, ""},
	} {
		dir := t.TempDir()
		for name, text := range c.files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got, err := paragraph("m@v1", dir)
		if got != c.want || (err != nil) != (c.want == "") {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
	}
}
