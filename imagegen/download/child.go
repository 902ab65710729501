package download

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"

	"github.com/memlinux/memlinux/imagegen/sandbox"
)

// childName is the argument by which this program downloads.
const childName = "memlinux-download"

// Before main, which every program with this package has another of. What comes
// of the environment here is the sandbox's.
func init() {
	if len(os.Args) != 2 || os.Args[0] != sandbox.Self || os.Args[1] != childName {
		return
	}
	if err := serve(os.Stdin, os.Stdout); err != nil {
		os.Exit(1) // nobody listens any more
	}
	os.Exit(0)
}

// serve does the one request on in. Its error is that of writing to out.
func serve(in io.Reader, out io.Writer) error {
	say := json.NewEncoder(out) // ends with a newline
	var q Request
	if err := json.NewDecoder(io.LimitReader(in, maxHead)).Decode(&q); err != nil {
		return say.Encode(head{Error: fmt.Sprintf("read what to fetch: %v", err)})
	}
	answer, err := request(q)
	if err != nil {
		return say.Encode(head{Error: err.Error()})
	}
	defer answer.Body.Close()
	a := Answer{Size: max(answer.ContentLength, 0), ETag: answer.Header.Get("ETag"), LastModified: answer.Header.Get("Last-Modified"),
		Unchanged: answer.StatusCode == http.StatusNotModified}
	if err := say.Encode(head{Answer: a}); err != nil || a.Unchanged {
		return err
	}
	chunks := httputil.NewChunkedWriter(out)
	body := &failing{r: answer.Body}
	// The receiver stops at its limit, which a server's word does not keep.
	if _, err := io.CopyBuffer(chunks, body, make([]byte, 256<<10)); err != nil && body.err == nil {
		return err
	}
	if err := chunks.Close(); err != nil {
		return err
	}
	var end head
	if body.err != nil {
		end.Error = body.err.Error()
	}
	return say.Encode(end)
}

// failing remembers why reading failed, which [io.Copy] mixes with why writing did.
type failing struct {
	r   io.Reader
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		f.err = err
	}
	return n, err
}

// request asks the server. The answer has the file, or says that it is
// unchanged. Its proxies are those of the environment.
func request(q Request) (*http.Response, error) {
	r, err := http.NewRequest(http.MethodGet, q.URL, nil) //nolint:noctx // the end of this process ends it
	if err != nil {
		return nil, err
	}
	if q.ETag != "" {
		r.Header.Set("If-None-Match", q.ETag)
	}
	if q.LastModified != "" {
		r.Header.Set("If-Modified-Since", q.LastModified)
	}
	client := http.Client{CheckRedirect: func(next *http.Request, via []*http.Request) error {
		if len(via) > 10 {
			return errors.New("it leads on and on")
		}
		if via[0].URL.Scheme == "https" && next.URL.Scheme != "https" {
			return fmt.Errorf("it leads to %s, which is not encrypted", next.URL)
		}
		return nil
	}}
	a, err := client.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // the address is said already
		}
		return nil, err
	}
	unchanged := a.StatusCode == http.StatusNotModified && q.ETag+q.LastModified != ""
	if a.StatusCode != http.StatusOK && !unchanged {
		_ = a.Body.Close() // nothing of it is wanted
		return nil, fmt.Errorf("the server answers %s", a.Status)
	}
	return a, nil
}
