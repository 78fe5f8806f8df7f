package api

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/tinevm/tine/internal/errdef"
)

// script is a connection that answers what it was made with, and then ends.
type script struct {
	io.Reader
	read int
}

func (s *script) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	s.read += n
	return n, err
}
func (*script) Write(p []byte) (int, error)      { return len(p), nil }
func (*script) Close() error                     { return nil }
func (*script) LocalAddr() net.Addr              { return nil }
func (*script) RemoteAddr() net.Addr             { return nil }
func (*script) SetDeadline(time.Time) error      { return nil }
func (*script) SetReadDeadline(time.Time) error  { return nil }
func (*script) SetWriteDeadline(time.Time) error { return nil }

func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{
		"HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: 32\r\n\r\n{\"firecracker_version\":\"1.16.1\"}",
		"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n",
		"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: 38\r\n\r\n{\"fault_message\":\"Empty PUT request.\"}",
		"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }",
		"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
		"HTTP/1.1 100 \r\n\r\n",
		"HTTP/1.0 200 OK\r\n\r\n{}",
		"HTTP/1.1 200 \r\nContent-Length: 1048577\r\n\r\n",
		"\r\n\r\n", "",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &script{Reader: bytes.NewReader(data)}
		c := newConn(s)
		a, err := c.exchange(t.Context(), "GET", "/version", nil)
		if s.read > maxHeader+maxBody {
			t.Errorf("%d bytes were read", s.read)
		}
		if err != nil {
			return
		}
		if a.status < 200 || len(a.body) > maxBody || a.status == 204 && len(a.body) > 0 {
			t.Errorf("status %d with %d bytes", a.status, len(a.body))
		}
		if !a.last && len(data) < 4<<10 && s.read != len(data) {
			t.Errorf("bytes are left of %q", data)
		}
		message, _ := fault(a.body)
		for _, r := range message {
			if !unicode.IsPrint(r) {
				t.Errorf("%q is not to be printed", message)
			}
		}
		if len(message) > maxMessage {
			t.Errorf("the message has %d bytes", len(message))
		}
	})
}

func FuzzGreeting(f *testing.F) {
	for _, seed := range []string{"OK 1073741824\nhello", "OK 0\n", "OK \n", "NO 1\n", "OK 1", "\n", "", "OK 00000000000000000000000000001\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		err := readGreeting(r)
		read := len(data) - r.Len()
		if read > maxGreeting {
			t.Errorf("%d bytes were read", read)
		}
		if err == nil && (data[read-1] != '\n' || bytes.IndexByte(data, '\n') != read-1 || !bytes.HasPrefix(data, []byte("OK "))) {
			t.Errorf("%q was taken, and of it %d bytes", data, read)
		}
		if errors.Is(err, errdef.ErrUnavailable) && bytes.IndexByte(data, '\n') >= 0 {
			t.Errorf("%q: %v", data, err)
		}
	})
}

func FuzzParseVersion(f *testing.F) {
	for _, seed := range []string{"1.16.1", "v1.10.0", "1.17.0-dev", "1.16.1+fuzzing", "1.2", "", "1..1", "-1.0.0", "1.0.0-", "1.0.0-a.b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseVersion(s)
		if err != nil {
			return
		}
		again, err := ParseVersion(v.String())
		if err != nil || again != v || v.Compare(again) != 0 {
			t.Errorf("%q is %v, and that is %v, %v", s, v, again, err)
		}
	})
}

// late is a connection over which an answer comes when the context has just ended.
type late struct {
	script
	end   context.CancelFunc
	moved chan struct{}
}

func (l *late) Read(p []byte) (int, error) {
	l.end()
	<-l.moved // by what the end of the context does
	return l.script.Read(p)
}

func (l *late) SetDeadline(time.Time) error {
	close(l.moved)
	return nil
}

// The deadline of a request that has ended would end the next one.
func TestLateEndCostsTheConnection(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l := &late{script{Reader: strings.NewReader("HTTP/1.1 204 \r\n\r\n")}, cancel, make(chan struct{})}
	a, err := newConn(l).exchange(ctx, "GET", "/", nil)
	if err != nil || a.status != 204 || !a.last {
		t.Errorf("%+v, %v", a, err)
	}
}

// full is a server that has said that it is full, and hung up.
type full struct{ script }

func (full) Write([]byte) (int, error) {
	return 0, &net.OpError{Op: "write", Err: syscall.EPIPE}
}

// What a server says before it hangs up counts more than that it does.
func TestAnswerOfAServerThatHungUp(t *testing.T) {
	t.Parallel()
	answers := map[string]int{"HTTP/1.1 503\r\nContent-Length: 2\r\n\r\n{}": 503, "": 0}
	for said, want := range answers {
		a, err := newConn(&full{script{Reader: strings.NewReader(said)}}).exchange(t.Context(), "GET", "/", nil)
		if a.status != want || want != 0 && !a.last || (err == nil) != (want != 0) {
			t.Errorf("%q: %+v, %v", said, a, err)
		}
		if err != nil && (!errors.Is(err, syscall.EPIPE) || !errors.Is(err, errdef.ErrUnavailable)) {
			t.Errorf("got %v", err)
		}
	}
}
