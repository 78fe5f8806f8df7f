package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/publish"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

const (
	tunnelPattern = "GET /v1/sandboxes/{id}/ports/{port}"
	// dialTime is what a guest has to connect to one of its ports, beside the
	// graceTime to say so.
	dialTime = 10 * time.Second
	// tunnelChunk is how much goes into one message.
	tunnelChunk = 32 << 10
)

var errNoPorts = fmt.Errorf("%w: this daemon publishes no ports", errdef.ErrUnsupported)

// ListPorts answers GET /v1/sandboxes/{id}/ports.
func (s *server) ListPorts(_ context.Context, r wire.ListPortsRequestObject) (wire.ListPortsResponseObject, error) {
	if s.Ports == nil {
		return nil, errNoPorts
	}
	if _, err := s.Sandboxes.Get(r.ID); err != nil {
		return nil, err
	}
	out := wire.ListPorts200JSONResponse{}
	for _, p := range s.Ports.List(r.ID) {
		out = append(out, publishedPort(p))
	}
	return out, nil
}

// PublishPort answers POST /v1/sandboxes/{id}/ports.
func (s *server) PublishPort(ctx context.Context, r wire.PublishPortRequestObject) (wire.PublishPortResponseObject, error) {
	if s.Ports == nil {
		return nil, errNoPorts
	}
	if err := s.lives(r.ID); err != nil {
		return nil, err
	}
	p, err := s.Ports.Publish(ctx, r.ID, r.Body.GuestPort, r.Body.HostPort, s.connectTo(r.ID, r.Body.GuestPort))
	if err != nil {
		return nil, err
	}
	if err = s.lives(r.ID); err != nil {
		s.Ports.End(r.ID) // it ended meanwhile, and that was told before there was anything to end
		return nil, err
	}
	return wire.PublishPort201JSONResponse(publishedPort(p)), nil
}

func publishedPort(p publish.Publication) wire.PublishedPort {
	return wire.PublishedPort{GuestPort: p.GuestPort, HostPort: p.HostPort, Address: p.Address}
}

// lives refuses a sandbox that will never answer again.
func (s *server) lives(id string) error {
	box, err := s.Sandboxes.Get(id)
	if err == nil && box.State == sandbox.Dead {
		err = fmt.Errorf("%w: sandbox %s is dead", errdef.ErrConflict, id)
	}
	return err
}

// UnpublishPort answers DELETE /v1/sandboxes/{id}/ports/{port}.
func (s *server) UnpublishPort(_ context.Context, r wire.UnpublishPortRequestObject) (wire.UnpublishPortResponseObject, error) {
	if s.Ports == nil {
		return nil, errNoPorts
	}
	if _, err := s.Sandboxes.Get(r.ID); err != nil {
		return nil, err
	}
	return wire.UnpublishPort204Response{}, s.Ports.Remove(r.ID, r.Port)
}

// connectTo connects to a port of a sandbox, which is in use for as long.
func (s *server) connectTo(id string, port int) publish.Connect {
	return func(ctx context.Context, use func(context.Context, net.Conn) error) error {
		return s.Sandboxes.With(ctx, id, func(ctx context.Context, g *guest.Client) error {
			conn, err := dialGuest(ctx, g, port)
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close() }() // use may have closed it
			return use(ctx, conn)
		})
	}
}

// dialGuest connects to a port of a guest. That nothing listens there, or that
// what the guest says of it makes no sense, is 502.
func dialGuest(parent context.Context, g *guest.Client, port int) (net.Conn, error) {
	ctx, cancel := within(parent, dialTime)
	defer cancel()
	conn, err := g.DialPort(ctx, port)
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil, g.Err() != nil:
		return nil, err
	}
	switch errdef.Code(err) {
	case "invalid", "exhausted", "unsupported", "timeout":
		return nil, err
	}
	// The other categories are not for a guest to choose: no words of its make
	// the sandbox another's, or a thing that is not there.
	err = fmt.Errorf("%w: sandbox: %w", errdef.ErrUnavailable, errors.New(err.Error()))
	return nil, withStatus(errdef.WithHint(err, "start a program that listens on that port of 127.0.0.1, or of all addresses, in the sandbox"), http.StatusBadGateway)
}

// parsePort reads a port in a path.
func parsePort(text string) (int, error) {
	port, err := strconv.Atoi(text)
	if err != nil || port < 1 || port > 65535 || strconv.Itoa(port) != text {
		return 0, fmt.Errorf("%w: port %q is none of 1 to 65535", errdef.ErrInvalid, text)
	}
	return port, nil
}

// checkOrigin refuses what a browser sends on behalf of another site's page. To
// Go's own protection an upgrade is a GET, and that is harmless.
func checkOrigin(r *http.Request) error {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return nil
	}
	if u, err := url.Parse(origin); err != nil || !strings.EqualFold(u.Host, r.Host) {
		return fmt.Errorf("%w: request from another origin", errdef.ErrDenied)
	}
	return nil
}

// tunnel answers GET /v1/sandboxes/{id}/ports/{port}.
func (s *server) tunnel(w http.ResponseWriter, r *http.Request) {
	noteStream(w)
	port, err := s.checkTunnel(r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	leave, err := s.enterStream()
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer leave()
	accepted := false
	err = s.connectTo(r.PathValue("id"), port)(r.Context(), func(ctx context.Context, far net.Conn) error {
		accepted = true
		conn, aerr := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true}) // checkTunnel has verified
		if aerr != nil {
			return errClientGone // Accept has answered
		}
		conn.SetReadLimit(maxMessage)
		t := &tunnel{execStream: execStream{conn: conn}, far: far, heard: make(chan struct{})}
		return t.run(ctx)
	})
	switch {
	case err == nil, errors.Is(err, errClientGone):
	case accepted:
		s.note(r, err)
	default:
		s.fail(w, r, err)
	}
}

func (s *server) checkTunnel(r *http.Request) (port int, err error) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return 0, errdef.WithHint(fmt.Errorf("%w: a connection to a port is a WebSocket", errdef.ErrInvalid),
			"for HTTP end the path with a slash")
	}
	if err = checkOrigin(r); err != nil {
		return 0, err
	}
	return parsePort(r.PathValue("port"))
}

// tunnel is a connection to a port on one WebSocket.
type tunnel struct {
	execStream
	far   net.Conn
	heard chan struct{} // closed when the client has said all
}

// run passes bytes both ways until both ends have said all, or one has left.
func (t *tunnel) run(parent context.Context) error {
	ctx, cancel := context.WithCancelCause(parent)
	stop := context.AfterFunc(ctx, func() { _ = t.far.Close() }) // which may be closed
	defer stop()
	var work sync.WaitGroup
	work.Go(func() { t.hear(context.WithoutCancel(parent), cancel) }) // it ends with the connection
	work.Go(func() { t.beat(ctx, cancel) })
	err := t.say(ctx)
	if err == nil {
		select {
		case <-t.heard:
		case <-ctx.Done():
		}
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	t.finish(parent, err)
	_ = t.conn.CloseNow() // a good end has closed it already
	cancel(errClientGone)
	work.Wait()
	return err
}

// say passes on what comes from the guest.
func (t *tunnel) say(ctx context.Context) error {
	buf := make([]byte, tunnelChunk)
	for {
		n, err := t.far.Read(buf)
		if n == 0 && err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n > 0 || err != nil { // an empty message is the end
			if werr := t.conn.Write(ctx, websocket.MessageBinary, buf[:n]); werr != nil {
				return errClientGone
			}
		}
		if err != nil {
			return nil //nolint:nilerr // it is the end, or comes again with the next Read
		}
	}
}

// hear passes on what the client sends, until it leaves.
func (t *tunnel) hear(ctx context.Context, cancel context.CancelCauseFunc) {
	over := sync.OnceFunc(func() { close(t.heard) })
	for {
		kind, data, err := t.conn.Read(ctx)
		switch {
		case err != nil:
			cancel(errClientGone)
			return
		case kind != websocket.MessageBinary:
			cancel(fmt.Errorf("%w: a client sends binary messages only", errdef.ErrInvalid))
			return
		case len(data) > 0:
			// A program that reads no more may still have something to say.
			_, err = t.far.Write(data)
		default:
			if half, ok := t.far.(interface{ CloseWrite() error }); ok {
				err = half.CloseWrite()
			}
			over()
		}
		if err != nil {
			over()
		}
	}
}
