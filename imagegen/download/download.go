// Package download fetches a file by http or https. All that meets the server is
// this program once more, as a sandboxed one with a network: an unprivileged
// user, bounded in time. What comes back is bytes on a pipe.
//
// So a process that has itself no network can download, too, where it leaves
// programs to a [sandbox.Launcher].
package download

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http/httputil"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/memlinux/memlinux/imagegen/sandbox"
)

// Request is what to fetch.
type Request struct {
	URL   string // by http or https; what leads from https to http is not followed
	Limit int64  // bytes, of which no more are taken

	// ETag and LastModified are those of an earlier answer, "" for none: the file
	// is wanted only if it is another now.
	ETag, LastModified string
}

// Answer is what the server said of the file.
type Answer struct {
	Size               int64 // bytes, or 0 where it does not say
	ETag, LastModified string
	Unchanged          bool // the file is the one of the earlier answer
}

// stall is how long a server may send nothing; tests have less.
var stall = time.Minute

// limit is the longest that a download may take: 4 GiB at 200 kB/s.
const limit = 6 * time.Hour

// Get fetches q and calls take with its bytes, unless they are Unchanged. The
// body's end is only then [io.EOF] when all of the file came; take must read it to
// there, or return an error, which is then Get's. Its errors begin with the
// address.
func Get(ctx context.Context, q Request, take func(a Answer, body io.Reader) error) (a Answer, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("fetch %s: %w", q.URL, err)
		}
	}()
	request, err := json.Marshal(q)
	if err != nil {
		return Answer{}, err
	}
	watched, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := time.AfterFunc(stall, func() { cancel(fmt.Errorf("the server sent nothing for %v", stall)) })
	defer silent.Stop()
	answer, pipe := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := sandbox.Run(watched, sandbox.Command{
			Argv:    []string{sandbox.Self, childName},
			Env:     environment(os.Environ()),
			Stdin:   strings.NewReader(string(request)),
			Output:  pipe,
			Limit:   limit,
			Network: true,
		})
		_ = pipe.Close() // never fails
		ended <- err
	}()
	a, err = receive(answer, q.Limit, func() { silent.Reset(stall) }, take)
	_ = answer.CloseWithError(errors.New("nobody reads on")) // never fails
	// Before anything else: nothing of it runs any more then.
	died := <-ended
	switch {
	case err == nil:
		return a, nil
	case ctx.Err() != nil:
		return Answer{}, ctx.Err()
	case watched.Err() != nil:
		return Answer{}, context.Cause(watched)
	case errors.Is(err, errBroken) && died != nil:
		return Answer{}, died
	}
	return Answer{}, err
}

// environment is what a download needs to know of ours: the way to the network,
// and whom it trusts there.
func environment(ours []string) []string {
	return slices.DeleteFunc(ours, func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		switch strings.ToLower(name) {
		case "http_proxy", "https_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir":
			return false
		}
		return true
	})
}

// What the child says is a line of JSON, a head; if that has an Answer with a
// changed file, its bytes in HTTP's chunks (RFC 9112 §7.1), which have an end;
// and behind them another line, which says whether that is the end of the file.
type head struct {
	Answer Answer
	Error  string // why there is nothing, or no more
}

// errBroken is a child that did not say all that it should.
var errBroken = errors.New("the download broke off")

// maxHead bounds a head, in bytes.
const maxHead = 64 << 10

// receive reads what a child says. It calls alive when there was something.
func receive(from io.Reader, limit int64, alive func(), take func(a Answer, body io.Reader) error) (Answer, error) {
	in := bufio.NewReaderSize(readerFunc(func(p []byte) (int, error) {
		n, err := from.Read(p)
		alive()
		return n, err
	}), maxHead)
	first, err := readHead(in)
	if err != nil {
		return Answer{}, err
	}
	a := first.Answer
	switch {
	case a.Size < 0 || len(a.ETag)+len(a.LastModified) > maxHead/4:
		return Answer{}, errBroken
	case a.Unchanged:
		return a, nil
	case a.Size > limit:
		return Answer{}, fmt.Errorf("it has %d MiB, and no more than %d are taken", a.Size>>20, limit>>20)
	}
	chunks, taken, whole := httputil.NewChunkedReader(in), int64(0), false
	err = take(a, readerFunc(func(p []byte) (int, error) {
		if whole {
			return 0, io.EOF
		}
		n, err := chunks.Read(p)
		if taken += int64(n); taken > limit {
			return 0, fmt.Errorf("no more than %d MiB are taken", limit>>20)
		}
		switch {
		case err == nil:
			return n, nil
		case !errors.Is(err, io.EOF):
			return n, errBroken
		}
		if _, err := readHead(in); err != nil {
			return n, err
		}
		whole = true
		return n, io.EOF
	}))
	if err == nil && !whole {
		err = errors.New("not all of it was taken")
	}
	return a, err
}

// readHead reads a line; a head's Error is its error.
func readHead(in *bufio.Reader) (h head, err error) {
	line, err := in.ReadSlice('\n')
	if err != nil || json.Unmarshal(line, &h) != nil {
		return head{}, errBroken
	}
	if h.Error != "" {
		return head{}, errors.New(h.Error)
	}
	return h, nil
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
