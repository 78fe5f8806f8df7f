package relink

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

// pipes is a guest's Acceptor and a host's dial function.
type pipes struct {
	conns chan io.ReadWriteCloser
	over  chan struct{}
	once  sync.Once

	mu    sync.Mutex
	dials int
	ends  []net.Conn // the guest's ends of all connections, in order
	cuts  []int      // how many bytes each connection carries; then all
	fail  func(dial int) error
}

func newPipes() *pipes {
	return &pipes{conns: make(chan io.ReadWriteCloser), over: make(chan struct{}), fail: func(int) error { return nil }}
}

func (p *pipes) Accept() (io.ReadWriteCloser, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.over:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.over) })
	return nil
}

func (p *pipes) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	p.mu.Lock()
	host, guest := net.Pipe()
	n := p.dials
	p.dials++
	p.ends = append(p.ends, guest)
	left := -1
	if n < len(p.cuts) {
		left = p.cuts[n]
	}
	err := p.fail(n)
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}
	line := &cut{left: left, close: func() { _, _ = host.Close(), guest.Close() }}
	select {
	case p.conns <- &cutConn{guest, line}:
		return &cutConn{host, line}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *pipes) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dials
}

func (p *pipes) end(n int) net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ends[n]
}

// cut ends a connection after so many bytes, in both directions together.
type cut struct {
	mu    sync.Mutex
	left  int // negative: no end
	close func()
}

func (c *cut) take(n int) (int, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left < 0 {
		return n, true
	}
	n = min(n, c.left)
	c.left -= n
	return n, c.left > 0
}

type cutConn struct {
	net.Conn
	line *cut
}

func (c *cutConn) Write(b []byte) (int, error) {
	n, goesOn := c.line.take(len(b))
	n, err := c.Conn.Write(b[:n])
	if !goesOn {
		c.line.close()
		err = errors.Join(err, io.ErrClosedPipe)
	}
	return n, err
}

func openBoth(t *testing.T, p *pipes, l *Listener) (host, guest *Stream) {
	t.Helper()
	host, err := Open(t.Context(), p.dial)
	if err != nil {
		t.Fatal(err)
	}
	if guest, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return host, guest
}

func closeAll(t *testing.T, all ...io.Closer) {
	t.Helper()
	for _, c := range all {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

func say(t *testing.T, from io.Writer, to io.Reader, text string) {
	t.Helper()
	if _, err := io.WriteString(from, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(to, got); err != nil || string(got) != text {
		t.Fatalf("read %q, %v; want %q", got, err, text)
	}
}

func readFails(t *testing.T, s io.Reader, want error) {
	t.Helper()
	if n, err := s.Read(make([]byte, 1)); n != 0 || !errors.Is(err, want) {
		t.Errorf("read %d, %v; want %v", n, err, want)
	}
}

// plan is what happens to one stream.
type plan struct {
	cuts       []int
	up, down   []int // sizes of writes
	readSize   int
	reconnects []time.Duration
}

func drawPlan(t *rapid.T) plan {
	sizes := rapid.SliceOfN(rapid.OneOf(rapid.IntRange(1, 40), rapid.IntRange(1, 2*Window)), 0, 12)
	return plan{
		cuts: rapid.SliceOfN(rapid.OneOf(rapid.IntRange(0, 120), rapid.IntRange(0, 3*Window)), 0, 8).Draw(t, "cuts"),
		up:   sizes.Draw(t, "up"), down: sizes.Draw(t, "down"),
		readSize: rapid.OneOf(rapid.IntRange(1, 100), rapid.IntRange(1, Window)).Draw(t, "read"),
		reconnects: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) time.Duration {
			return time.Duration(rapid.IntRange(0, 100).Draw(t, "ms")) * time.Millisecond
		}), 0, 3).Draw(t, "reconnects"),
	}
}

func TestAnyBreaks(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		p := drawPlan(rt)
		synctest.Test(t, func(t *testing.T) { p.run(t) })
		if t.Failed() {
			rt.Fatalf("failed with %+v", p)
		}
	})
}

func (p plan) run(t *testing.T) {
	line := newPipes()
	line.cuts = p.cuts
	l := Listen(line, Grace)
	host, err := Open(t.Context(), line.dial)
	if err != nil {
		t.Fatal(err)
	}
	// A try of Open may have got as far as a stream of its own.
	var guest *Stream
	for guest == nil || guest.id != host.id {
		if guest != nil {
			closeAll(t, guest)
		}
		if guest, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
	}
	var work sync.WaitGroup
	for _, dir := range []struct {
		from, to *Stream
		sizes    []int
	}{{host, guest, p.up}, {guest, host, p.down}} {
		text := random(dir.sizes)
		work.Go(func() { writeAll(t, dir.from, text, dir.sizes) })
		work.Go(func() { readAll(t, dir.to, text, p.readSize) })
	}
	for _, d := range p.reconnects {
		time.Sleep(d)
		if err = host.Reconnect(t.Context()); err != nil {
			t.Error(err)
		}
	}
	work.Wait()
	closeAll(t, host, guest, l)
}

func random(sizes []int) []byte {
	n := 0
	for _, size := range sizes {
		n += size
	}
	text := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(text)
	return text
}

func writeAll(t *testing.T, s io.Writer, text []byte, sizes []int) {
	for _, size := range sizes {
		if n, err := s.Write(text[:size]); n != size || err != nil {
			t.Errorf("write: %d of %d, %v", n, size, err)
			return
		}
		text = text[size:]
	}
}

func readAll(t *testing.T, s io.Reader, want []byte, size int) {
	buf := make([]byte, size)
	for len(want) > 0 {
		n, err := s.Read(buf)
		if err != nil || !bytes.HasPrefix(want, buf[:n]) {
			t.Errorf("read %d bytes, right: %t, %v; %d were to come", n, bytes.HasPrefix(want, buf[:n]), err, len(want))
			return
		}
		want = want[n:]
	}
}

func TestCloseIsTheEndOfAll(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"host", "guest"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPipes()
				l := Listen(p, Grace)
				one, other := openBoth(t, p, l)
				if name == "guest" {
					one, other = other, one
				}
				text := random([]int{Window})
				writeAll(t, one, text, []int{Window})
				closeAll(t, one)
				got, err := io.ReadAll(other)
				if err != nil || !bytes.Equal(got, text) {
					t.Errorf("read %d bytes, %v", len(got), err)
				}
				if _, err = other.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("write to a closed stream: %v", err)
				}
				closeAll(t, other, l)
			})
		})
	}
}

func TestCloseWithDeafOther(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, conn := rawGuest(t, place{})
		writeAll(t, s, random([]int{Window}), []int{Window})
		begin := time.Now()
		closeAll(t, s)
		if d := time.Since(begin); d != linger {
			t.Errorf("close took %s", d)
		}
		_ = conn.Close()
	})
}

func TestGrace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		p.fail = func(int) error { return errors.New("refused") }
		_ = p.end(0).Close()
		begin := time.Now()
		for _, s := range []*Stream{host, guest} {
			readFails(t, s, ErrNoConnection)
			readFails(t, s, errdef.ErrUnavailable)
			if d := time.Since(begin); d != Grace {
				t.Errorf("ended after %s", d)
			}
		}
		if err := host.Reconnect(t.Context()); !errors.Is(err, ErrNoConnection) {
			t.Errorf("reconnect: %v", err)
		}
		closeAll(t, host, guest, l)
	})
}

func TestGraceBeginsAnew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		for range 3 {
			begin := time.Now()
			p.mu.Lock()
			p.fail = func(int) error {
				if time.Since(begin) < Grace-2*maxPause {
					return errors.New("refused")
				}
				return nil
			}
			p.mu.Unlock()
			_ = p.end(p.count() - 1).Close()
			say(t, host, guest, "up")
			say(t, guest, host, "down")
		}
		closeAll(t, host, guest, l)
	})
}

func TestGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		p.fail = func(int) error { return ErrGone }
		_ = p.end(0).Close()
		begin := time.Now()
		readFails(t, host, ErrGone)
		if _, err := Open(t.Context(), p.dial); !errors.Is(err, ErrGone) {
			t.Errorf("open: %v", err)
		}
		if time.Since(begin) != 0 {
			t.Error("it has waited")
		}
		closeAll(t, host, guest, l)
	})
}

func TestOpenWaitsForGuest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		begin := time.Now()
		p.fail = func(int) error {
			if time.Since(begin) < time.Minute {
				return errors.New("refused")
			}
			return nil
		}
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		say(t, host, guest, "there")
		if n := p.count(); n > 80 {
			t.Errorf("dialed %d times", n)
		}
		closeAll(t, host, guest, l)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		begin = time.Now()
		if _, err := Open(ctx, p.dial); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("open: %v", err)
		}
	})
}

func TestNewStreamTakesThePlace(t *testing.T) {
	t.Parallel()
	for name, lost := range map[string]bool{"connected": false, "lost": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPipes()
				l := Listen(p, Grace)
				old, oldGuest := openBoth(t, p, l)
				if _, err := oldGuest.Write([]byte("lost")); err != nil {
					t.Fatal(err)
				}
				if _, err := old.Write([]byte("lost")); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if lost {
					p.fail = func(int) error { return errors.New("refused") }
					_ = p.end(0).Close()
					synctest.Wait()
					p.fail = func(int) error { return nil }
				}
				begin := time.Now()
				host, guest := openBoth(t, p, l)
				say(t, host, guest, "up")
				say(t, guest, host, "down")
				if time.Since(begin) != 0 {
					t.Error("it has waited")
				}
				readFails(t, oldGuest, io.EOF)
				closeAll(t, oldGuest)
				if n, err := old.Read(make([]byte, 9)); n == 0 && !errors.Is(err, ErrUnknown) {
					t.Errorf("read %d, %v", n, err)
				}
				for range 2 {
					_, _ = io.Copy(io.Discard, old)
				}
				readFails(t, old, ErrUnknown)
				readFails(t, old, errdef.ErrUnavailable)
				say(t, host, guest, "up")
				closeAll(t, old, host, guest, l)
			})
		})
	}
}

func TestGarbageDisturbsNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		begin := time.Now()
		for name, said := range map[string]string{
			"nothing":     "",
			"other":       "GET / HTTP/1.1\r\nHost: here\r\nAccept: everything\r\n\r\n"[:helloSize],
			"part":        string(hello{want: wantNew}.encode()[:helloSize-1]),
			"wants":       string(hello{want: 7}.encode()),
			"begins_late": string(hello{want: wantNew, place: place{received: 1}}.encode()),
			"other_id":    string(hello{want: wantResume}.encode()),
			"ahead":       string(hello{want: wantResume, id: host.id, place: place{received: 1}}.encode()),
			"backwards":   string(hello{want: wantResume, id: host.id, place: place{read: 1}}.encode()),
			"version":     magic + "\x02" + string(make([]byte, helloSize-5)),
		} {
			conn, err := p.dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err = io.WriteString(conn, said); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(conn)
			t.Logf("%s: %x %v", name, got, err)
			answered := name == "other_id" || name == "ahead" || name == "backwards" || name == "version"
			if _, aerr := parseAnswer(append(got, make([]byte, answerSize)...)); (len(got) > 0) != answered || answered && aerr == nil {
				t.Errorf("%s: answered %x", name, got)
			}
			if name == "version" && !bytes.HasPrefix(got, []byte(magic+"\x01\x03")) {
				t.Errorf("version: answered %x", got)
			}
		}
		if d := time.Since(begin); d != 2*helloTime {
			t.Errorf("took %s", d)
		}
		say(t, host, guest, "up")
		say(t, guest, host, "down")
		if n := p.count(); n != 10 {
			t.Errorf("dialed %d times", n)
		}
		closeAll(t, host, guest, l)
	})
}

func TestStrangersAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		var all []io.Closer
		for range 2 * maxStrangers {
			conn, err := p.dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, conn)
		}
		synctest.Wait()
		if n := len(l.strangers); n != maxStrangers {
			t.Errorf("%d strangers", n)
		}
		say(t, host, guest, "up")
		if err := host.Reconnect(t.Context()); err != nil { // they have their time, and then it is heard
			t.Error(err)
		}
		say(t, host, guest, "up")
		closeAll(t, l, host, guest)
		closeAll(t, all...)
	})
}

// A connection that its host gave up is not to take the place of the one that it
// dialed then, however late it is heard.
func TestOlderConnectionIsLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		late, err := p.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		host, guest := openBoth(t, p, l)
		if _, err = late.Write(hello{want: wantNew}.encode()); err != nil {
			t.Fatal(err)
		}
		if got, rerr := io.ReadAll(late); len(got) > 0 || rerr != nil {
			t.Errorf("answered %x, %v", got, rerr)
		}
		say(t, host, guest, "up")
		closeAll(t, late, host, guest, l)
	})
}

// deadConn is the host's end of a connection that its guest has dropped: nothing
// comes, and only who sends something hears of it.
type deadConn struct {
	net.Conn
	dead chan struct{}
}

func (d *deadConn) Read(b []byte) (int, error) {
	n, err := d.Conn.Read(b)
	if errors.Is(err, io.EOF) {
		<-d.dead
	}
	return n, err
}

func (d *deadConn) Write(b []byte) (int, error) {
	n, err := d.Conn.Write(b)
	if err != nil {
		_ = d.Close()
	}
	return n, err
}

func (d *deadConn) Close() error {
	select {
	case <-d.dead:
	default:
		close(d.dead)
	}
	return d.Conn.Close()
}

func TestGuestDropsWhatItHasTaken(t *testing.T) {
	t.Parallel()
	for _, after := range []time.Duration{0, 10 * time.Millisecond, 500 * time.Millisecond, 3 * time.Second} {
		t.Run(after.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPipes()
				l := Listen(p, Grace)
				host, err := Open(t.Context(), func(ctx context.Context) (io.ReadWriteCloser, error) {
					conn, derr := p.dial(ctx)
					if derr != nil {
						return nil, derr
					}
					return &deadConn{Conn: conn.(*cutConn), dead: make(chan struct{})}, nil
				})
				if err != nil {
					t.Fatal(err)
				}
				guest, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(after)
				_ = p.end(0).Close()
				say(t, guest, host, "the host only listens")
				closeAll(t, host, guest, l)
			})
		})
	}
}

func TestReconnectIsAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		begin := time.Now()
		for i := range 5 {
			if err := host.Reconnect(t.Context()); err != nil {
				t.Fatal(err)
			}
			say(t, host, guest, "up")
			say(t, guest, host, "down")
			if n := p.count(); n != i+2 {
				t.Errorf("%d connections", n)
			}
		}
		// Also in the middle of a long pause between tries.
		p.mu.Lock()
		p.fail = func(int) error { return errors.New("refused") }
		p.mu.Unlock()
		_ = p.end(5).Close()
		time.Sleep(Grace / 2)
		p.mu.Lock()
		p.fail = func(int) error { return nil }
		p.mu.Unlock()
		if err := host.Reconnect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d != Grace/2 {
			t.Errorf("took %s", d)
		}
		if err := guest.Reconnect(t.Context()); !errors.Is(err, errdef.ErrUnsupported) {
			t.Errorf("a guest's: %v", err)
		}
		closeAll(t, host)
		if err := host.Reconnect(t.Context()); err == nil {
			t.Error("reconnected a closed stream")
		}
		closeAll(t, guest, l)
	})
}

func TestGuestThatEndsEachConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		begin := time.Now()
		for time.Since(begin) < time.Minute {
			n := p.count()
			_ = p.end(n - 1).Close()
			for p.count() == n {
				time.Sleep(time.Millisecond)
			}
			synctest.Wait()
		}
		if n := p.count(); n > 75 {
			t.Errorf("%d dials in a minute", n)
		}
		say(t, host, guest, "up")
		closeAll(t, host, guest, l)
	})
}

// rawGuest is a host's stream, and the connection as its guest has it.
func rawGuest(t *testing.T, p place) (*Stream, net.Conn) {
	t.Helper()
	host, guest := net.Pipe()
	dials := 0
	go func() {
		_, _ = io.ReadFull(guest, make([]byte, helloSize))
		_, _ = guest.Write(answer{said: saidYes, place: p}.encode())
	}()
	s, err := Open(t.Context(), func(context.Context) (io.ReadWriteCloser, error) {
		if dials++; dials > 1 {
			return nil, ErrGone
		}
		return host, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, guest
}

func TestHostileGuest(t *testing.T) {
	t.Parallel()
	flood := bytes.Repeat(appendData(nil, make([]byte, MaxData)), Window/MaxData)
	for name, says := range map[string][]byte{
		"unknown":      {9},
		"zero":         {0},
		"empty_data":   {1, 0, 0},
		"long_data":    {1, 0x80, 1},
		"ack_unsent":   appendAck(nil, 6),
		"ack_huge":     appendAck(nil, 1<<64-1),
		"ack_less":     appendAck(appendAck(nil, 5), 4),
		"over_window":  append(bytes.Clone(flood), appendData(nil, []byte("x"))...),
		"after_window": append(bytes.Clone(flood), appendData(appendAck(nil, 0), []byte("x"))...),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, conn := rawGuest(t, place{})
				if _, err := s.Write([]byte("hello")); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(conn, make([]byte, 3+5)); err != nil {
					t.Fatal(err)
				}
				if n, err := conn.Write(says); err != nil {
					t.Fatalf("wrote %d of %d: %v", n, len(says), err)
				}
				synctest.Wait()
				readFails(t, s, ErrProtocol)
				if _, err := s.Write([]byte("x")); !errors.Is(err, ErrProtocol) {
					t.Errorf("write: %v", err)
				}
				closeAll(t, s)
				if s.in.len() > Window || len(s.in.buf) > 4*Window {
					t.Errorf("%d bytes kept in %d", s.in.len(), len(s.in.buf))
				}
			})
		})
	}
}

func TestHostileAnswers(t *testing.T) {
	t.Parallel()
	for name, says := range map[string]struct {
		answer []byte
		want   error
	}{
		"other":    {[]byte("HTTP/1.1 400 Bad Request\r\n")[:answerSize], ErrProtocol},
		"version":  {[]byte(magic + "\x02" + string(make([]byte, answerSize-5))), errdef.ErrUnsupported},
		"refused":  {answer{said: saidVersion}.encode(), ErrProtocol},
		"nothing":  {answer{}.encode(), ErrProtocol},
		"unknown":  {answer{said: saidUnknown}.encode(), ErrUnknown},
		"ahead":    {answer{said: saidYes, place: place{received: 1}}.encode(), ErrProtocol},
		"too_much": {answer{said: saidYes, place: place{1 << 63, 1 << 63}}.encode(), ErrProtocol},
		"reversed": {answer{said: saidYes, place: place{read: 1}}.encode(), ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				_, err := Open(t.Context(), func(context.Context) (io.ReadWriteCloser, error) {
					host, guest := net.Pipe()
					go func() {
						_, _ = io.ReadFull(guest, make([]byte, helloSize))
						_, _ = guest.Write(says.answer)
					}()
					return host, nil
				})
				if !errors.Is(err, says.want) {
					t.Errorf("%v, want %v", err, says.want)
				}
			})
		})
	}
}

// A guest that comes back having lost what it had said it read is caught.
func TestGuestGoesBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		answers := []place{{}, {received: 5, read: 5}, {received: 5, read: 4}}
		s, err := Open(t.Context(), func(context.Context) (io.ReadWriteCloser, error) {
			host, guest := net.Pipe()
			p := answers[0]
			answers = answers[1:]
			go func() {
				_, _ = io.ReadFull(guest, make([]byte, helloSize))
				_, _ = guest.Write(answer{said: saidYes, place: p}.encode())
				_, _ = io.Copy(io.Discard, guest)
			}()
			return host, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err = s.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err = s.Reconnect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err = s.Reconnect(t.Context()); !errors.Is(err, ErrProtocol) {
			t.Errorf("reconnect: %v", err)
		}
		closeAll(t, s)
	})
}

func TestWriteWaitsForReader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		text := random([]int{3 * Window})
		done := false
		var work sync.WaitGroup
		work.Go(func() { writeAll(t, host, text, []int{3 * Window}); done = true })
		synctest.Wait()
		if done || guest.in.len() != Window {
			t.Errorf("%d bytes are buffered, done: %t", guest.in.len(), done)
		}
		readAll(t, guest, text, 5000)
		work.Wait()
		if n := cap(guest.in.buf); n > 4*Window {
			t.Errorf("buffer of %d bytes", n)
		}
		closeAll(t, host, guest, l)
	})
}

func TestReadBytesAreCleared(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var f fifo
		var want []byte
		seen := [][]byte{}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			if rapid.Bool().Draw(t, "push") {
				p := bytes.Repeat([]byte{byte(len(want) + 1)}, rapid.IntRange(0, 5000).Draw(t, "n"))
				f.push(p)
				want = append(want, p...)
			} else {
				n := rapid.IntRange(0, f.len()).Draw(t, "n")
				f.drop(n)
				want = want[n:]
			}
			if !bytes.Equal(f.bytes(), want) {
				t.Fatal("other bytes")
			}
			seen = append(seen, f.buf)
			for _, buf := range seen {
				if len(buf) > 0 && &buf[0] == &f.buf[0] {
					if bytes.Count(buf[:f.start], []byte{0}) != f.start || bytes.Count(buf[f.end:], []byte{0}) != len(buf)-f.end {
						t.Fatal("bytes outside are not cleared")
					}
				} else if bytes.Count(buf, []byte{0}) != len(buf) {
					t.Fatal("an old buffer is not cleared")
				}
			}
		}
	})
}

// What a connection had to say when it was given up comes too late, and so does
// whatever was to happen without it.
func TestLateForTheStream(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := Listen(p, Grace)
		host, guest := openBoth(t, p, l)
		old := guest.carrier
		if err := host.Reconnect(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if guest.take(old, &decoder{}, appendData(nil, []byte("again"))) {
			t.Error("an old connection goes on")
		}
		guest.lose(old)
		guest.tooLate(guest.losses)
		guest.tooLate(guest.losses - 1)
		late, cancel := context.WithCancel(t.Context())
		cancel()
		conn, other := net.Pipe()
		if err := host.connect(late, conn, place{}, place{}); !errors.Is(err, context.Canceled) {
			t.Errorf("connect: %v", err)
		}
		say(t, host, guest, "up")
		closeAll(t, conn, other, host, guest, l)
	})
}
