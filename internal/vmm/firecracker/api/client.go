// Package api is a client of the HTTP interface by which Firecracker is
// controlled, of the versions 1.10 to 1.16, and of the greeting by which
// connections enter its guests.
//
// It takes care of what a version has and what not: a request that the
// Firecracker at the other end does not know is refused here, with
// ErrUnsupported, before anything is sent.
//
// Facts are from Firecracker's OpenAPI documents and sources, and from those of
// its HTTP server (github.com/firecracker-microvm/micro-http). That server takes
// at most 10 connections and 51200 bytes per request, never closes a connection
// of its own accord but when it has too many, ignores "Connection: close", and
// answers without a length only when there is no content. So a client keeps one
// connection, and sends one request at a time.
//
// Requests are written and answers read by net/http, which knows the format
// well, but without its Transport: that would read from an idle connection and
// log what comes, sends a request again when it believes that nobody has seen
// it, accepts bodies of any form, and needs two goroutines for a connection. What
// is left to do here is to bound what is read and how long it takes.
//
// What Firecracker answers is not trusted: a guest may have taken it over.
package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"github.com/tinevm/tine/internal/errdef"
)

// Client controls one Firecracker process. Dial makes one. It is safe for
// concurrent use; requests are sent one after the other, and one that waits for
// its turn stops waiting when its context ends.
//
// Every method that sends a request is bound by its context, and by nothing
// else: give it a deadline. When the context ends in the middle of a request,
// it is not known whether that was carried out; the connection is closed, and
// the next request dials anew. No request is ever sent twice.
//
// Errors are those of *Error; ErrUnavailable when Firecracker is not there or
// hangs up; the context's; and, when the answer is not one of Firecracker's, in
// no category.
type Client struct {
	dial    Dialer
	version Version

	turn   chan struct{} // holds one token, when nobody has the connection
	conn   *conn         // of whoever has the token; nil: dial
	closed context.Context
	close  context.CancelFunc
}

var errClosed = fmt.Errorf("client of Firecracker: %w", net.ErrClosed)

// Dialer connects to the socket of Firecracker's interface. It may be called at
// any time until the client is closed.
type Dialer func(ctx context.Context) (net.Conn, error)

// Dial waits until Firecracker listens on the unix socket at path, asks for its
// version, and returns a client. The socket may not exist yet, but its directory
// must. Dial gives up when ctx ends, and with ErrUnavailable when died is closed,
// which says that the process has ended (nil: not known). A version that Check
// refuses is ErrUnsupported.
//
// The path can be of any length. It must not change its meaning while the
// client is used. Close the client when it is no longer needed.
func Dial(ctx context.Context, path string, died <-chan struct{}) (*Client, error) {
	c, err := await(ctx, path, died)
	if err != nil {
		return nil, fmt.Errorf("dial Firecracker at %s: %w", path, err)
	}
	return newClient(ctx, c, func(ctx context.Context) (net.Conn, error) { return dialUnix(ctx, path) }, died)
}

// New is Dial for a Firecracker that listens already, and is reached by dial.
func New(ctx context.Context, dial Dialer, died <-chan struct{}) (*Client, error) {
	c, err := dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial Firecracker: %w", err)
	}
	return newClient(ctx, c, dial, died)
}

func newClient(ctx context.Context, c net.Conn, dial Dialer, died <-chan struct{}) (_ *Client, err error) {
	closed, cancel := context.WithCancel(context.Background())
	client := &Client{dial: dial, turn: make(chan struct{}, 1), conn: newConn(c), closed: closed, close: cancel}
	client.turn <- struct{}{}
	if client.version, err = client.askVersion(ctx, died); err != nil {
		_ = client.Close()
		return nil, fmt.Errorf("ask Firecracker for its version: %w", err)
	}
	return client, nil
}

// askVersion is the first request: its answer can be waited for in vain, if the
// process dies now.
func (c *Client) askVersion(ctx context.Context, died <-chan struct{}) (Version, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-died:
			cancel(errDied)
		case <-ctx.Done():
		}
	}()
	defer func() { <-done }()
	defer cancel(nil)
	version, err := c.FetchVersion(ctx)
	if err != nil {
		return Version{}, err
	}
	return version, version.Check()
}

// Version is the version that Firecracker gave when it was dialled.
func (c *Client) Version() Version { return c.version }

// Close ends a request that is under way, and the connection. Firecracker goes
// on. Requests that come later fail. It may be called more than once.
func (c *Client) Close() error {
	c.close()
	<-c.turn // whoever has it gives it back soon now
	defer func() { c.turn <- struct{}{} }()
	c.drop()
	return nil
}

// drop closes the connection, for whoever has the turn.
func (c *Client) drop() {
	if c.conn != nil {
		_ = c.conn.Close()
		c.conn = nil
	}
}

// get asks for something and decodes it into v.
func (c *Client) get(ctx context.Context, path string, v any) error {
	return c.do(ctx, http.MethodGet, path, nil, v)
}

// put sends body, which only versions with all of features know.
func (c *Client) put(ctx context.Context, path string, body any, features ...Feature) error {
	return c.change(ctx, http.MethodPut, path, body, features...)
}

func (c *Client) patch(ctx context.Context, path string, body any, features ...Feature) error {
	return c.change(ctx, http.MethodPatch, path, body, features...)
}

func (c *Client) change(ctx context.Context, method, path string, body any, features ...Feature) error {
	if err := c.version.need(features...); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	data, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("%s %s: %w: %w", method, path, errdef.ErrInvalid, err)
	}
	if len(data) > maxPayload {
		return fmt.Errorf("%s %s: %w: %d bytes are more than the %d of a request", method, path, errdef.ErrInvalid, len(data), maxPayload)
	}
	return c.do(ctx, method, path, data, nil)
}

// do sends one request when it is its turn. With v the answer has to have
// content, and is decoded; without, it must have none.
func (c *Client) do(ctx context.Context, method, path string, body []byte, v any) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.closed, func() { cancel(errClosed) })() //nolint:contextcheck // the client ends by itself, and requests with it
	select {
	case <-c.turn:
	case <-ctx.Done():
		return fmt.Errorf("%s %s: wait for the request before: %w", method, path, context.Cause(ctx))
	}
	defer func() { c.turn <- struct{}{} }()
	if c.closed.Err() != nil {
		return fmt.Errorf("%s %s: %w", method, path, errClosed)
	}
	a, err := c.exchange(ctx, method, path, body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if err = c.check(a, method, path, v); err != nil {
		if _, refused := errors.AsType[*Error](err); refused {
			return err
		}
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

// exchange sends a request on the connection that there is, or a new one.
func (c *Client) exchange(ctx context.Context, method, path string, body []byte) (answer, error) {
	if c.conn == nil {
		raw, err := c.dial(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return answer{}, context.Cause(ctx)
			}
			return answer{}, fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
		}
		c.conn = newConn(raw)
	}
	a, err := c.conn.exchange(ctx, method, path, body)
	if err != nil || a.last {
		c.drop()
	}
	return a, err
}

// check reads an answer. What Firecracker would not have said costs it the
// connection.
func (c *Client) check(a answer, method, path string, v any) error {
	switch {
	case a.status >= 400:
		message, known := fault(a.body)
		if !known {
			c.drop()
		}
		return &Error{Method: method, Path: path, Status: a.status, Message: message}
	case v == nil && a.status == http.StatusNoContent:
		return nil
	case v == nil || a.status != http.StatusOK:
		c.drop()
		return fmt.Errorf("the answer has status %d, and was to have another", a.status)
	}
	err := decode(a.body, v)
	if a, ok := v.(interface{ settle() error }); ok && err == nil {
		err = a.settle()
	}
	if err != nil {
		c.drop()
	}
	return err
}

// decode reads one JSON value. Fields that are not known are left out: answers
// may grow within 1.x.
func decode(data []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("the answer is not the JSON it was to be: %s", clean(err.Error(), maxMessage))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("the answer is more than one JSON value")
	}
	return nil
}
