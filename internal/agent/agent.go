// Package agent is the guest's side of guestproto: it does what the host asks,
// inside the machine, and never dies of what it is asked.
//
// As PID 1 it also brings the machine up (Init) and reaps its orphans. All it
// does to the machine as a whole goes through one small interface, so the same
// agent runs off a machine too, in tests and in the fake engine, where it
// touches nothing but its own files and its own children.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

// Version is the agent's own version, said in HelloAck and Pong.
const Version = "0.2.0"

// Config says where the agent runs and what it may touch.
type Config struct {
	// Fake, if not nil, is what the agent touches instead of the machine.
	Fake *Fake
	// Home is root's home directory, where relative paths and commands without
	// a directory start. Empty means /root, or the Fake's directory.
	Home string
	// Env is added to every process's default environment: NAME=value.
	Env []string
	// Upper is the directory that holds what the machine's files are beyond
	// its image. Without it, and without a Fake, changes cannot be told.
	Upper *os.File
	// card is the machine's network card, if it has one.
	card *card
	// Log takes what cannot be told to the host. Nil discards it.
	Log *slog.Logger
}

// Agent serves hosts, one session at a time.
type Agent struct {
	sys     system
	own     *ownFiles
	home    string
	env     []string
	log     *slog.Logger
	started time.Time

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup

	mu     sync.Mutex
	closed bool // no handler may begin

	procs      processes
	interps    interpreters
	generation atomic.Pointer[string]
	temps      atomic.Uint64 // numbers temporary files
	identity   sync.Mutex    // held while an identity is put on
	dials      chan struct{} // a token for each connection to a port
}

// errClosed is the cause of everything that Close ends.
var errClosed = fmt.Errorf("%w: the agent is stopping", errdef.ErrUnavailable)

// New returns an agent that serves nobody yet.
func New(cfg Config) *Agent {
	ctx, cancel := context.WithCancelCause(context.Background())
	a := &Agent{
		home: cfg.Home, env: cfg.Env, log: cfg.Log,
		started: time.Now(), ctx: ctx, cancel: cancel,
		dials: make(chan struct{}, guestproto.MaxDials),
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	home := "/root"
	if cfg.Fake != nil {
		a.sys, a.own, home = cfg.Fake, newOwnFiles(cfg.Fake.dir), cfg.Fake.dir
	} else {
		a.sys, a.own = newMachine(cfg.Upper, cfg.card), newOwnFiles("")
	}
	if a.home == "" {
		a.home = home
	}
	a.procs.init(a)
	a.interps.init(a)
	return a
}

// Close ends all processes and waits for all that the agent started. A Serve
// that still runs refuses all further requests.
func (a *Agent) Close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.cancel(errClosed)
	a.procs.killAll()
	a.work.Wait()
	a.interps.close()
	a.own.close()
}

// path is the place of one of the machine's own files.
func (a *Agent) path(p string) string { return a.own.path(p) }

// errHostGone is what reading a link says, once, when its host has gone away
// and another may come.
var errHostGone = errors.New("the host is gone")

// Serve speaks with the host on rw until rw ends or ctx does. Each Hello on it
// starts a new session. Processes outlive both. When ctx ends, the caller must
// also close rw, which alone ends a blocked read.
func (a *Agent) Serve(ctx context.Context, rw io.ReadWriter) error {
	l := &link{w: rw}
	var session *guestproto.Session
	defer func() {
		if session != nil {
			session.Fail(guestproto.ErrSessionOver)
		}
	}()
	frames := guestproto.NewReader(rw)
	for ctx.Err() == nil {
		f, err := frames.Next()
		switch {
		case errors.Is(err, guestproto.ErrBadFrame):
			continue // whoever wrote garbage gets no answer
		case errors.Is(err, errHostGone):
			if session != nil {
				session.Fail(guestproto.ErrSessionOver)
			}
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("read from host: %w", err)
		case f.Type == guestproto.TypeHello:
			session = a.hello(l, session, f.Payload)
		case session != nil:
			// The stream that broke the protocol has been reset; that is all
			// there is to do about it.
			_ = session.Deliver(f)
			if f.Type == guestproto.TypeData && len(f.Payload) > 0 && guestproto.Channel(f.Payload[0]) == guestproto.ChanRequest {
				clear(f.Payload) // as in accept
			}
		}
	}
	return context.Cause(ctx)
}

// hello ends the old session and begins the one that a Hello asks for. Bad
// input changes nothing.
func (a *Agent) hello(l *link, old *guestproto.Session, payload []byte) *guestproto.Session {
	var h guestproto.Hello
	if err := guestproto.Decode(payload, &h); err != nil || len(h.Nonce) != guestproto.NonceSize {
		return old
	}
	if old != nil {
		old.Fail(guestproto.ErrSessionOver)
	}
	ack := guestproto.HelloAck{Version: guestproto.Version, Nonce: h.Nonce, Agent: Version}
	return guestproto.NewAgent(l.adopt(&ack), a.accept)
}

// accept starts the work that a new stream asks for. What a fresh fork is asked
// first, and waits for nothing, is answered at once: it is the shortest path
// there is.
func (a *Agent) accept(st *guestproto.Stream, request []byte) {
	if st.Verb() == guestproto.VerbPing {
		_ = st.End(a.ctx, a.pong()) // a failed link shows in Serve
		return
	}
	h := a.handler(st.Verb())
	if h == nil {
		st.Reset(errdef.Code(errdef.ErrUnsupported), fmt.Sprintf("agent %s does not know verb %d", Version, st.Verb()))
		return
	}
	if st.Verb() == guestproto.VerbIdentity && !st.More() && a.identity.TryLock() {
		quick := a.identityIsQuick()
		a.identity.Unlock()
		if quick {
			a.handle(st, h, request)
			return
		}
	}
	first := append([]byte(nil), request...)
	if st.Verb() == guestproto.VerbIdentity {
		clear(request) // it may hold secrets, and what was read stays in memory
	}
	if !a.begin(func() { a.handle(st, h, first) }) {
		st.Reset(errdef.Code(errClosed), errClosed.Error())
	}
}

// begin runs f in a goroutine that Close waits for, unless Close was called.
func (a *Agent) begin(f func()) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.closed {
		a.work.Go(f)
	}
	return !a.closed
}

// handler does one verb: it returns the stream's last message, or an error.
type handler func(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error)

func (a *Agent) handler(v guestproto.Verb) handler {
	switch v {
	case guestproto.VerbIdentity:
		return a.putOnIdentity
	case guestproto.VerbExec:
		return a.exec
	case guestproto.VerbAttach:
		return a.attach
	case guestproto.VerbProcesses:
		return a.listProcesses
	case guestproto.VerbSignal:
		return a.signal
	case guestproto.VerbResize:
		return a.resize
	case guestproto.VerbEval:
		return a.eval
	case guestproto.VerbWarm:
		return a.warm
	case guestproto.VerbQuiesce:
		return a.quiesce
	case guestproto.VerbResume:
		return a.resume
	case guestproto.VerbPowerOff:
		return a.powerOff
	case guestproto.VerbChanges:
		return a.changes
	case guestproto.VerbDial:
		return a.dial
	default:
		return a.fileHandler(v)
	}
}

// handle runs a handler and tells the host how it went.
func (a *Agent) handle(st *guestproto.Stream, h handler, first []byte) {
	defer func() {
		if r := recover(); r != nil {
			a.log.Error("handler panicked", "verb", int(st.Verb()), "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			st.Reset("internal", fmt.Sprintf("agent panicked: %v", r))
		}
	}()
	ctx := st.Context()
	request, err := st.Request(ctx, first)
	if st.Verb() == guestproto.VerbIdentity {
		clear(first)
		defer clear(request)
	}
	var last guestproto.Message
	if err == nil {
		last, err = h(ctx, st, request)
	}
	if err != nil {
		st.Reset(errdef.Code(err), err.Error())
		return
	}
	_ = st.End(ctx, last) // the host has gone; a new one will start over
}

// decode reads a request; what is wrong with it is the host's mistake.
func decode(request []byte, m guestproto.Message) error {
	if err := guestproto.Decode(request, m); err != nil {
		return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	return nil
}

func (a *Agent) pong() *guestproto.Pong {
	p := &guestproto.Pong{Agent: Version, PID: os.Getpid(), Uptime: time.Since(a.started)}
	if g := a.generation.Load(); g != nil {
		p.Generation = *g
	}
	return p
}

// quiesce makes the machine ready to be frozen: dirty pages written, memory
// that nobody needs given back.
func (a *Agent) quiesce(context.Context, *guestproto.Stream, []byte) (guestproto.Message, error) {
	a.interps.quiesce()
	a.sys.sync()
	debug.FreeOSMemory()
	return &guestproto.Empty{}, nil
}

// resume undoes quiesce, which at present leaves nothing to undo.
func (a *Agent) resume(context.Context, *guestproto.Stream, []byte) (guestproto.Message, error) {
	return &guestproto.Empty{}, nil
}

// powerOff ends the machine. The answer goes out first.
func (a *Agent) powerOff(ctx context.Context, st *guestproto.Stream, _ []byte) (guestproto.Message, error) {
	a.sys.sync()
	if err := st.End(ctx, &guestproto.Empty{}); err != nil {
		return nil, err
	}
	if err := a.sys.powerOff(); err != nil {
		a.log.ErrorContext(ctx, "power off", "error", err)
	}
	return nil, nil
}
