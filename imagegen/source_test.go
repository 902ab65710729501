package imagegen

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/memlinux/memlinux/imagegen/cache"
)

func testBuild(t *testing.T) *build {
	t.Helper()
	store, err := cache.Open(t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	return &build{store: store, progress: func(string, int64, int64) {}}
}

func TestSourceByAddress(t *testing.T) {
	served, requests, down := "source one", 0, false
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		if down || r.URL.Path != "/x.tar" {
			http.Error(w, "gone", http.StatusNotFound)
			return
		}
		tag := `"` + served + `"`
		w.Header().Set("ETag", tag)
		if r.Header.Get("If-None-Match") == tag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		_, _ = w.Write([]byte(served))
	}))
	defer server.Close()
	b := testBuild(t)
	get := func(sum string) (string, error) {
		src, err := b.source(t.Context(), "kernel", SourceCode{URL: server.URL + "/x.tar", SHA256: sum})
		if err != nil {
			return "", err
		}
		defer src.close()
		text := make([]byte, src.size)
		if _, err := src.f.ReadAt(text, 0); err != nil {
			t.Fatal(err)
		}
		return string(text), nil
	}
	if got, err := get(""); got != "source one" || err != nil {
		t.Fatalf("first: %q, %v", got, err)
	}
	if _, err := get(strings.Repeat("0", 64)); err == nil || !strings.Contains(err.Error(), "x.tar has the SHA-256 ") {
		t.Errorf("another digest than wanted: %v", err)
	}
	if got, err := get(""); got != "source one" || err != nil {
		t.Errorf("unchanged: %q, %v", got, err)
	}
	if got, err := get("2FD7C3A1D7EBAE62E5A8F4A5C2CA9A3B4D8CD6B5D0D3D1F8C9CDB1B1D2C5F9AA"); err == nil {
		t.Errorf("a wrong digest in capitals passed: %q", got)
	}
	src, err := b.source(t.Context(), "kernel", SourceCode{URL: server.URL + "/x.tar"})
	if err != nil {
		t.Fatal(err)
	}
	sum := src.sha256 // the cache's own, so that the network is not asked
	src.close()
	before := requests
	if got, err := get(strings.ToUpper(sum)); got != "source one" || err != nil || requests != before {
		t.Errorf("what is in the cache with the right digest: %q, %v, %d requests", got, err, requests-before)
	}
	served = "source two"
	if got, err := get(""); got != "source two" || err != nil {
		t.Errorf("changed: %q, %v", got, err)
	}
	down = true
	if got, err := get(""); got != "source two" || err != nil || !strings.Contains(strings.Join(b.warnings, "\n"), "the cached one is used") {
		t.Errorf("the server is down: %q, %v, %q", got, err, b.warnings)
	}
	if _, err := b.source(t.Context(), "kernel", SourceCode{URL: server.URL + "/y.tar"}); err == nil || !strings.Contains(err.Error(), "404 Not Found") {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestSourceIsRefused(t *testing.T) {
	keyring := file(t, "keyring", "")
	for _, tc := range []struct {
		name   string
		source SourceCode
		want   string
	}{
		{"an unencrypted address without a proof", SourceCode{URL: "http://example.org/linux.tar.xz"}, "name its SHA-256 or the keyring"},
		{"a file name as address", SourceCode{URL: "/etc/passwd", SHA256: strings.Repeat("0", 64)}, "not an http or https address"},
		{"another protocol", SourceCode{URL: "file:///etc/passwd", SHA256: strings.Repeat("0", 64)}, "not an http or https address"},
		{"half a digest", SourceCode{File: keyring, SHA256: "abcd"}, "64 hex digits"},
		{"a digest for what apt checks", SourceCode{Debian: "linux-source-6.1", SHA256: strings.Repeat("0", 64)}, "leave the SHA-256"},
		{"an option as package", SourceCode{Debian: "-oX"}, "not a Debian package name"},
		{"a signature without keys", SourceCode{File: keyring, Signature: keyring}, "only with a keyring"},
	} {
		if err := tc.source.validate("kernel"); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestSignatureLiesBesideTheTar(t *testing.T) {
	for address, want := range map[string]string{
		"https://example.org/v6.x/linux-6.1.tar.xz":     "https://example.org/v6.x/linux-6.1.tar.sign",
		"https://example.org/linux-6.1.tar":             "https://example.org/linux-6.1.tar.sign",
		"https://example.org/linux-6.1.tar.gz?mirror=1": "https://example.org/linux-6.1.tar.sign?mirror=1",
	} {
		if got := signatureBeside(address); got != want {
			t.Errorf("%s: %s", address, got)
		}
	}
}
