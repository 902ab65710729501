package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2+dfsg-7"}, "capabilities": ["oob"]}}`

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		line string
		want message
		bad  bool
	}{
		"greeting":                  {line: greeting, want: message{kind: kindGreeting, version: Version{7, 2, 22, "Debian 1:7.2+dfsg-7"}}},
		"empty result":              {line: `{"return": {}, "id": 3}`, want: message{kind: kindReturn, id: 3, result: json.RawMessage("{}")}},
		"error with class":          {line: `{"id": 4, "error": {"class": "GenericError", "desc": "no"}}`, want: message{kind: kindError, id: 4, err: Error{"GenericError", "no"}}},
		"event without data":        {line: `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}`, want: message{kind: kindEvent, event: Event{Name: "STOP"}}},
		"event with data":           {line: `{"event": "SHUTDOWN", "data": {"guest": true}}`, want: message{kind: kindEvent, event: Event{"SHUTDOWN", json.RawMessage(`{"guest": true}`)}}},
		"not JSON":                  {line: `{"return": `, bad: true},
		"not an object":             {line: `[]`, bad: true},
		"no kind":                   {line: `{"id": 1}`, bad: true},
		"two kinds":                 {line: `{"return": {}, "event": "STOP"}`, bad: true},
		"an id that we did not set": {line: `{"return": {}, "id": "x"}`, bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := parse([]byte(c.line))
			if (err != nil) != c.bad {
				t.Fatalf("error %v, want one: %v", err, c.bad)
			}
			if d := cmp.Diff(c.want, m, cmp.AllowUnexported(message{})); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{greeting, `{"return": {}, "id": 1}`, `{"error": {"class": "C", "desc": "d"}}`, `{"event": "E", "data": {}}`, `{}`, `null`, ``} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := parse(line)
		if err == nil && m.kind == kindReturn && !json.Valid(m.result) {
			t.Errorf("result %q is not JSON", m.result)
		}
	})
}

// peer plays QEMU's side: it greets, then answers each command by answer.
func peer(t *testing.T, answer func(command string, id uint64) string) Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { theirs.Close() })
	go func() {
		defer theirs.Close()
		if _, err := theirs.Write([]byte(greeting + "\r\n")); err != nil {
			return
		}
		lines := bufio.NewScanner(theirs)
		for lines.Scan() {
			var c struct {
				Execute string
				ID      uint64
			}
			if json.Unmarshal(lines.Bytes(), &c) != nil {
				return
			}
			a := `{"return": {}, "id": 1}`
			if c.Execute != "qmp_capabilities" {
				a = answer(c.Execute, c.ID)
			}
			if a == "hang up" {
				return
			}
			if _, err := theirs.Write([]byte(a + "\r\n")); err != nil {
				return
			}
		}
	}()
	return ours
}

func TestRun(t *testing.T) {
	for name, c := range map[string]struct {
		answer string
		want   string // result, or the error's text
	}{
		"an event before the answer is not the answer": {`{"event": "RESUME"}` + "\r\n" + `{"return": {"a": 1}, "id": 2}`, `{"a": 1}`},
		"another command's answer is not the answer":   {`{"return": {"a": 1}, "id": 77}` + "\r\n" + `{"return": {"a": 2}, "id": 2}`, `{"a": 2}`},
		"a refusal is QEMU's sentence":                 {`{"error": {"class": "GenericError", "desc": "not now"}, "id": 2}`, "QMP cmd: not now"},
		"a closed connection ends the wait":            {"hang up", "QMP cmd: the QMP connection is closed"},
		"garbage ends the connection":                  {"garbage", "QMP cmd: the QMP connection is closed: QMP line \"garbage\": invalid character 'g' looking for beginning of value"},
		"an endless line ends the connection":          {strings.Repeat("x", MaxLine+1), "QMP cmd: the QMP connection is closed: bufio.Scanner: token too long"},
	} {
		t.Run(name, func(t *testing.T) {
			client, err := Open(t.Context(), peer(t, func(string, uint64) string { return c.answer }), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			result, err := client.Run(t.Context(), "cmd", map[string]string{"k": "v"})
			got := string(result)
			if err != nil {
				got = err.Error()
			}
			if got != c.want {
				t.Errorf("got %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestEventsAreDeliveredInOrder(t *testing.T) {
	var got []string
	client, err := Open(t.Context(), peer(t, func(string, uint64) string {
		return `{"event": "A"}` + "\n" + `{"event": "B", "data": {"reason": "guest-reset"}}` + "\n" + `{"return": {}, "id": 2}`
	}), func(e Event) { got = append(got, e.Name+string(e.Data)) })
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Run(t.Context(), "x", nil); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"A", `B{"reason": "guest-reset"}`}, got); d != "" {
		t.Error(d)
	}
}

func TestCancel(t *testing.T) {
	t.Run("while QEMU does not greet", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := Open(ctx, ours, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("while QEMU does not read, and the client works again later", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		go func() {
			_, _ = theirs.Write([]byte(greeting + "\n"))
			_, _ = theirs.Read(make([]byte, 4096))
			_, _ = theirs.Write([]byte(`{"return": {}, "id": 1}` + "\n"))
		}()
		client, err := Open(t.Context(), ours, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := client.Run(ctx, "quit", nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		go func() {
			_, _ = theirs.Read(make([]byte, 4096))
			_, _ = theirs.Write([]byte(`{"return": {"n": 1}, "id": 3}` + "\n"))
		}()
		if r, err := client.Run(t.Context(), "again", nil); err != nil || string(r) != `{"n": 1}` {
			t.Errorf("result %s, error %v", r, err)
		}
	})
}
