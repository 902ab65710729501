package download

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// get is what a download gives.
func get(t *testing.T, q Request) (string, Answer, error) {
	t.Helper()
	if q.Limit == 0 {
		q.Limit = 1 << 20
	}
	var got []byte
	a, err := Get(t.Context(), q, func(_ Answer, body io.Reader) (err error) {
		got, err = io.ReadAll(body)
		return err
	})
	return string(got), a, err
}

func server(t *testing.T, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

func TestGet(t *testing.T) {
	s := server(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/file":
			w.Header().Set("ETag", `"1"`)
			w.Header().Set("Last-Modified", "Sun, 22 Nov 2026 21:00:00 GMT")
			if r.Header.Get("If-None-Match") == `"1"` || r.Header.Get("If-Modified-Since") != "" {
				w.WriteHeader(http.StatusNotModified)
				return
			}
			_, _ = io.WriteString(w, "all of it")
		case "/nothing":
		case "/unsized":
			for range 100 {
				_, _ = w.Write(bytes.Repeat([]byte("x"), 1000))
				w.(http.Flusher).Flush()
			}
		case "/moved":
			http.Redirect(w, r, "/file", http.StatusFound)
		case "/round":
			http.Redirect(w, r, "/round", http.StatusFound)
		case "/half":
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, "half")
		case "/unasked":
			w.WriteHeader(http.StatusNotModified)
		default:
			http.NotFound(w, r)
		}
	})
	for _, c := range []struct {
		name    string
		request Request
		want    string
		answer  Answer
		err     string
	}{
		{name: "a file, and what the server says of it", request: Request{URL: "/file"}, want: "all of it", answer: Answer{Size: 9, ETag: `"1"`, LastModified: "Sun, 22 Nov 2026 21:00:00 GMT"}},
		{name: "an empty file", request: Request{URL: "/nothing"}},
		{name: "one of which the server does not say the size", request: Request{URL: "/unsized"}, want: strings.Repeat("x", 100000)},
		{name: "one that is elsewhere", request: Request{URL: "/moved"}, want: "all of it", answer: Answer{Size: 9, ETag: `"1"`, LastModified: "Sun, 22 Nov 2026 21:00:00 GMT"}},
		{name: "one that is had already", request: Request{URL: "/file", ETag: `"1"`}, answer: Answer{Unchanged: true, ETag: `"1"`, LastModified: "Sun, 22 Nov 2026 21:00:00 GMT"}},
		{name: "one of the same time", request: Request{URL: "/file", LastModified: "Sun, 22 Nov 2026 21:00:00 GMT"}, answer: Answer{Unchanged: true, ETag: `"1"`, LastModified: "Sun, 22 Nov 2026 21:00:00 GMT"}},
		{name: "one that is as large as may be", request: Request{URL: "/file", Limit: 9}, want: "all of it", answer: Answer{Size: 9, ETag: `"1"`, LastModified: "Sun, 22 Nov 2026 21:00:00 GMT"}},
		{name: "one that says that it is too large", request: Request{URL: "/file", Limit: 8}, err: "no more than 0 are taken"},
		{name: "one that is too large and does not say so", request: Request{URL: "/unsized", Limit: 50000}, err: "no more than 0 MiB are taken"},
		{name: "one that is not there", request: Request{URL: "/none"}, err: "the server answers 404 Not Found"},
		{name: "one that leads to itself", request: Request{URL: "/round"}, err: "it leads on and on"},
		{name: "one that breaks off", request: Request{URL: "/half"}, err: "unexpected EOF"},
		{name: "a file that should be had and is not", request: Request{URL: "/unasked"}, err: "the server answers 304 Not Modified"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.request.URL = s.URL + c.request.URL
			got, a, err := get(t, c.request)
			if c.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), "fetch "+c.request.URL+": ") || !strings.HasSuffix(err.Error(), c.err) {
					t.Errorf("%v, not %q", err, c.err)
				}
				return
			}
			if got != c.want || a != c.answer || err != nil {
				t.Errorf("%d bytes, %+v, %v", len(got), a, err)
			}
		})
	}
}

func TestNobodyListens(t *testing.T) {
	s := server(t, nil)
	address := s.URL
	s.Close()
	if _, _, err := get(t, Request{URL: address}); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Error(err)
	}
}

func TestEncryptionIsNotLost(t *testing.T) {
	plain := server(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "from anybody") })
	s := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
	defer s.Close()
	if _, _, err := get(t, Request{URL: s.URL}); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a server that nobody vouches for: %v", err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	// What testing makes is its owner's only, and the download is another user's.
	if err := errors.Join(os.WriteFile(file, certificate, 0o644), os.Chmod(filepath.Dir(filepath.Dir(file)), 0o755), os.Chmod(filepath.Dir(file), 0o755)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_FILE", file)
	if _, _, err := get(t, Request{URL: s.URL}); err == nil || !strings.HasSuffix(err.Error(), "it leads to "+plain.URL+", which is not encrypted") {
		t.Error(err)
	}
}

// The proxy of the environment, which knows an address that nobody else does.
func TestProxy(t *testing.T) {
	s := server(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s for you", r.URL) })
	t.Setenv("http_proxy", s.URL)
	t.Setenv("no_proxy", "")
	if got, _, err := get(t, Request{URL: "http://memlinux.invalid/x.tar"}); got != "http://memlinux.invalid/x.tar for you" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

func TestEnvironment(t *testing.T) {
	got := environment([]string{"HTTP_PROXY=a", "https_proxy=b", "NO_PROXY=c", "SSL_CERT_FILE=d", "SECRET=e", "HTTP_PROXYX=f", "REQUEST_METHOD=g"})
	if fmt.Sprint(got) != "[HTTP_PROXY=a https_proxy=b NO_PROXY=c SSL_CERT_FILE=d]" {
		t.Error(got)
	}
}

// A server that falls silent, before or within its answer, must not hold us.
func TestSilence(t *testing.T) {
	old := stall
	stall = 2 * time.Second
	defer func() { stall = old }()
	quiet := make(chan struct{})
	s := server(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/half" {
			_, _ = io.WriteString(w, "half")
			w.(http.Flusher).Flush()
		}
		<-quiet
	})
	defer close(quiet)
	for _, path := range []string{"/half", "/none"} {
		if _, _, err := get(t, Request{URL: s.URL + path}); err == nil || !strings.HasSuffix(err.Error(), "the server sent nothing for 2s") {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan struct{})
	s := server(t, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		cancel()
		<-r.Context().Done() // the connection has ended
		close(gone)
	})
	_, err := Get(ctx, Request{URL: s.URL, Limit: 10}, func(_ Answer, body io.Reader) error {
		_, err := io.ReadAll(body)
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-gone
}

// What takes the bytes may stop.
func TestTakeFails(t *testing.T) {
	s := server(t, func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < 1<<20; i += 1000 {
			_, _ = w.Write(make([]byte, 1000))
		}
	})
	full := errors.New("disk full")
	_, err := Get(t.Context(), Request{URL: s.URL, Limit: 1 << 30}, func(Answer, io.Reader) error { return full })
	if !errors.Is(err, full) {
		t.Error(err)
	}
	_, err = Get(t.Context(), Request{URL: s.URL, Limit: 1 << 30}, func(Answer, io.Reader) error { return nil })
	if err == nil || !strings.HasSuffix(err.Error(), "not all of it was taken") {
		t.Error(err)
	}
}

// The receiver trusts neither the server nor the child that met it.
func TestReceiveRefuses(t *testing.T) {
	for name, said := range map[string]string{
		"nothing":                     "",
		"a line without end":          strings.Repeat("x", 2*maxHead),
		"no JSON":                     "panic: x\n",
		"a negative size":             `{"Answer":{"Size":-1}}` + "\n0\r\n{}\n",
		"a tag without measure":       `{"Answer":{"ETag":"` + strings.Repeat("x", maxHead/2) + `"}}` + "\n0\r\n{}\n",
		"chunks that break off":       "{}\n5\r\nabc",
		"an end that is not told":     "{}\n3\r\nabc\r\n0\r\n",
		"an end that is told wrongly": "{}\n3\r\nabc\r\n0\r\n\r\n\r\n",
	} {
		_, err := receive(strings.NewReader(said), 1000, func() {}, readAll)
		if !errors.Is(err, errBroken) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func readAll(_ Answer, body io.Reader) error {
	_, err := io.Copy(io.Discard, body)
	return err
}

func FuzzReceive(f *testing.F) {
	for _, said := range []string{"{}\n3\r\nabc\r\n0\r\n{}\n", `{"Answer":{"Size":3,"Unchanged":true}}` + "\n", `{"Error":"x"}` + "\n", "{}\nffffffffffffffff\r\n", "{}\n1;x=y\r\na\r\n0\r\n{\"Error\":\"x\"}\n"} {
		f.Add(said)
	}
	f.Fuzz(func(t *testing.T, said string) {
		taken := 0
		a, err := receive(strings.NewReader(said), 10, func() {}, func(_ Answer, body io.Reader) error {
			b, err := io.ReadAll(body)
			taken = len(b)
			return err
		})
		if taken > 10 || a.Size < 0 || err == nil && a.Size > 10 && !a.Unchanged {
			t.Errorf("%d bytes of %+v, %v", taken, a, err)
		}
	})
}

// serve's other end is receive.
func TestServeAndReceive(t *testing.T) {
	var out bytes.Buffer
	if err := serve(strings.NewReader("{"), &out); err != nil {
		t.Fatal(err)
	}
	if _, err := receive(&out, 1, func() {}, readAll); err == nil || !strings.HasPrefix(err.Error(), "read what to fetch: ") {
		t.Error(err)
	}
}
