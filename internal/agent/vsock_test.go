package agent_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/relink"
)

// cable is what vsock is to a machine, made of pairs of unix sockets: hosts dial
// and the agent accepts.
type cable struct {
	conns   chan io.ReadWriteCloser
	over    chan struct{}
	once    sync.Once
	refuses atomic.Bool
	dials   atomic.Int64

	mu    sync.Mutex
	pairs []net.Conn // both ends of all connections
}

// cable has the agent serve the hosts that dial.
func (m *machine) cable(grace time.Duration) *cable {
	c := &cable{conns: make(chan io.ReadWriteCloser), over: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	m.work.Go(func() {
		if err := m.agent.ServeHosts(ctx, c, grace); !errors.Is(err, context.Canceled) {
			m.t.Errorf("serve hosts: %v", err)
		}
	})
	m.t.Cleanup(cancel)
	return c
}

func (c *cable) Accept() (io.ReadWriteCloser, error) {
	select {
	case conn := <-c.conns:
		return conn, nil
	case <-c.over:
		return nil, net.ErrClosed
	}
}

func (c *cable) Close() error {
	c.once.Do(func() { close(c.over) })
	return nil
}

func (c *cable) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	if c.refuses.Load() {
		return nil, unix.ECONNREFUSED
	}
	c.dials.Add(1)
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		conn, cerr := net.FileConn(f)
		if cerr = errors.Join(cerr, f.Close()); cerr != nil {
			return nil, cerr
		}
		ends[i] = conn
	}
	c.mu.Lock()
	c.pairs = append(c.pairs, ends[:]...)
	c.mu.Unlock()
	select {
	case c.conns <- ends[1]:
		return ends[0], nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// cut ends all connections there are, in the middle of whatever they carry.
func (c *cable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.pairs {
		_ = conn.Close()
	}
	c.pairs = nil
}

func (c *cable) open(t *testing.T) *relink.Stream {
	t.Helper()
	s, err := relink.Open(within(t), c.dial)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func (c *cable) client(t *testing.T) (*guest.Client, *relink.Stream) {
	t.Helper()
	s := c.open(t)
	client, err := guest.Dial(within(t), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client, s
}

// An exec does not notice that the connections under it come and go.
func TestExecOutlivesItsConnections(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	line := m.cable(relink.Grace)
	c, stream := line.client(t)
	ctx := within(t)
	p, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"/bin/sh", "-c", "cat; " + counting}, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	input := strings.Repeat("a line that is as long as this\n", 40_000)
	sent := make(chan error, 1)
	go func() {
		_, serr := io.WriteString(p.Stdin(), input)
		sent <- errors.Join(serr, p.Stdin().Close())
	}()
	var text strings.Builder
	breaks := 0
	for exited := false; !exited; {
		out, nerr := p.Next(ctx)
		if nerr != nil {
			t.Fatal(nerr)
		}
		text.Write(out.Data)
		exited = out.Exit != nil
		if text.Len() < (breaks+1)*200_000 {
			continue
		}
		if breaks++; breaks%2 == 0 {
			line.cut()
		} else if err = stream.Reconnect(ctx); err != nil {
			t.Fatal(err)
		}
		if breaks == 12 {
			m.write("stop", "", 0o644)
		}
	}
	if err = <-sent; err != nil {
		t.Error(err)
	}
	echoed, counted, _ := strings.Cut(text.String(), "\n1\n")
	if echoed+"\n" != input {
		t.Errorf("%d bytes came back, want %d", len(echoed)+1, len(input))
	}
	if err = gapless("0\n1\n" + counted); err != nil {
		t.Error(err)
	}
	if n := line.dials.Load(); breaks < 12 || n < 7 { // a cut and a Reconnect can be mended by one
		t.Errorf("%d breaks, %d connections", breaks, n)
	}
	if _, err = c.Ping(ctx); err != nil {
		t.Error(err)
	}
}

// A process that has much to say to a host that is gone stands still no longer
// than the grace, and the agent serves the next.
func TestHostIsGoneForGood(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	line := m.cable(300 * time.Millisecond)
	c, _ := line.client(t)
	p := flood(t, c)
	line.refuses.Store(true)
	line.cut()
	m.write("go", "", 0o644)
	eventually(t, "the process to go on", m.exists("finished"))
	line.refuses.Store(false)
	if _, err := p.Wait(within(t)); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("the host that comes back: %v", err)
	}
	next, _ := line.client(t)
	if _, err := next.Ping(within(t)); err != nil {
		t.Error(err)
	}
}

// While the agent has more to say than it keeps for a host that may come back, it
// is there for another, and that ends the wait.
func TestNextHostNeedNotWait(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	line := m.cable(time.Hour)
	c, stream := line.client(t)
	line.refuses.Store(true)
	for range 3 {
		flood(t, c)
	}
	line.cut()
	m.write("go", "", 0o644)
	line.refuses.Store(false)
	next, _ := line.client(t)
	if _, err := next.Ping(within(t)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the process to go on", m.exists("finished"))
	out, err := next.Run(within(t), sh("echo still here"), nil, 100)
	if err != nil || string(out.Stdout) != "still here\n" {
		t.Errorf("%q, %v", out.Stdout, err)
	}
	if err = stream.Reconnect(within(t)); !errors.Is(err, relink.ErrUnknown) {
		t.Errorf("the old host: %v", err)
	}
}

// flood runs a process that has more to say than fits anywhere, to a host that
// does not read it.
func flood(t *testing.T, c *guest.Client) *guest.Process {
	t.Helper()
	p, err := c.Exec(within(t), sh("echo begun; while [ ! -e go ]; do sleep 0.01; done; head -c 8388608 /dev/zero; : > finished"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	if _, err = p.Next(within(t)); err != nil { // it runs, before anybody cuts the line
		t.Fatal(err)
	}
	return p
}

// An exec that is quiet goes on too, and a host that says nothing.
func TestQuietExecOutlivesItsConnection(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	line := m.cable(relink.Grace)
	c, _ := line.client(t)
	ctx := within(t)
	p, err := c.Exec(ctx, sh("echo begun; while [ ! -e stop ]; do sleep 0.01; done; echo done"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if out, nerr := p.Next(ctx); nerr != nil || string(out.Data) != "begun\n" {
		t.Fatalf("%q, %v", out.Data, nerr)
	}
	line.cut()
	m.write("stop", "", 0o644)
	if out, nerr := p.Next(ctx); nerr != nil || string(out.Data) != "done\n" {
		t.Errorf("%q, %v", out.Data, nerr)
	}
	if exit, werr := p.Wait(ctx); werr != nil || exit.Code != 0 {
		t.Errorf("%+v, %v", exit, werr)
	}
}
