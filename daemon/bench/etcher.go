package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// etcherFiles are a package for npm that has etcher-sdk as its one dependency, and a
// program that writes by it. etcher-sdk wants unbzip2-stream out of a git
// repository, and gets npm's: nothing here is compressed.
//
//go:embed etcher/package.json etcher/write.js
var etcherFiles embed.FS

// etcherTime is how long npm may take to fetch a hundred packages.
const etcherTime = 5 * time.Minute

// etcherSDK installs etcher-sdk by npm into a cache of its own, once, and returns
// the beginning of a command that writes by it. The error says why it can't be had.
func etcherSDK() (argv []string, err error) {
	for _, tool := range []string{"node", "npm"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%s is not here (apt-get install nodejs npm)", tool)
		}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "memlinux-bench", "etcher")
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // nothing of it is secret
		return nil, err
	}
	same := true
	for _, name := range []string{"write.js", "package.json"} {
		b, err := etcherFiles.ReadFile("etcher/" + name)
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, name)
		if had, err := os.ReadFile(path); err == nil && bytes.Equal(had, b) {
			continue
		}
		same = same && name != "package.json"
		if err := os.WriteFile(path, b, 0o644); err != nil { //nolint:gosec // the same
			return nil, err
		}
	}
	argv = []string{"node", filepath.Join(dir, "write.js")}
	loads := func() error {
		check := exec.Command("node", "-e", "require('etcher-sdk')")
		check.Dir = dir
		return said(check)
	}
	if same && loads() == nil {
		return argv, nil
	}
	ctx, stop := context.WithTimeout(context.Background(), etcherTime)
	defer stop()
	npm := exec.CommandContext(ctx, "npm", "install", "--no-audit", "--no-fund", "--loglevel=error")
	npm.Dir = dir
	if err := said(npm); err != nil {
		return nil, fmt.Errorf("npm does not install it: %w", err)
	}
	if err := loads(); err != nil {
		return nil, fmt.Errorf("it does not load: %w", err)
	}
	return argv, nil
}

// said runs a command, whose error has the last line of what it said.
func said(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if lines := strings.Split(strings.TrimSpace(string(out)), "\n"); err != nil {
		err = errors.Join(err, errors.New(lines[len(lines)-1]))
	}
	return err
}
