// Package client talks to a Tine daemon: it forks sandboxes from snapshots,
// runs commands and code in them, and moves files in and out.
//
//	c, err := client.New(client.Config{URL: "http://127.0.0.1:8889"})
//	boxes, err := c.Fork(ctx, client.ForkRequest{Snapshot: "py", N: 2})
//	out, err := c.Exec(ctx, boxes[0].ID, client.ExecRequest{Args: []string{"uname", "-a"}})
//
// A Client is safe for concurrent use. Every failure that the daemon reports is
// an *Error; contexts bound each call. It starts no daemon and keeps no state.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/wire"
)

// maxAnswer bounds a JSON answer: the largest is the output of a command.
const maxAnswer = 256 << 20

// DefaultURL is where a daemon listens unless it was told otherwise.
const DefaultURL = "http://127.0.0.1:8889"

// Config says where the daemon is.
type Config struct {
	// URL is the daemon's address, as in DefaultURL, or unix:// and the path of
	// a socket. DefaultURL is used when both URL and Socket are empty.
	URL string
	// Socket is the path of the daemon's unix socket. It goes before URL.
	Socket string
	// Token is sent as bearer token when it is not empty. One that begins with
	// tinesign_ is never sent: every request is signed with it.
	Token string
	// TLS is what an https URL is reached with; nil means the host's defaults.
	// It is not for use with HTTPClient.
	TLS *tls.Config
	// HTTPClient is used instead of one of the Client's own. With Socket, its
	// Transport must be nil.
	HTTPClient *http.Client
}

// Client talks to one daemon.
type Client struct {
	base  string
	token string
	http  *http.Client
	key   string // of idempotent requests
}

// New returns a client of the daemon that cfg names. It does not connect yet.
func New(cfg Config) (*Client, error) {
	c := &Client{base: strings.TrimRight(cfg.URL, "/"), token: cfg.Token, http: cfg.HTTPClient}
	if c.http == nil {
		c.http = &http.Client{}
	}
	if path, ok := strings.CutPrefix(cfg.URL, "unix://"); ok && cfg.Socket == "" {
		cfg.Socket = path
	}
	if cfg.Socket != "" {
		if c.http.Transport != nil {
			return nil, fmt.Errorf("%w: a socket and an HTTP client with a transport", errdef.ErrInvalid)
		}
		c.base = "http://tine"
		c.http = overSocket(*c.http, cfg.Socket)
		return c, nil
	}
	if c.base == "" {
		c.base = DefaultURL
	}
	if cfg.TLS != nil {
		if c.http.Transport != nil {
			return nil, fmt.Errorf("%w: a TLS configuration and an HTTP client with a transport", errdef.ErrInvalid)
		}
		c.http = overTLS(*c.http, cfg.TLS)
	}
	u, err := url.Parse(c.base)
	if err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
		return nil, fmt.Errorf("%w: daemon URL %q", errdef.ErrInvalid, cfg.URL)
	}
	return c, nil
}

func overSocket(c http.Client, socket string) *http.Client {
	var dialer net.Dialer
	c.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
	}
	return &c
}

func overTLS(c http.Client, cfg *tls.Config) *http.Client {
	c.Transport = &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: cfg.Clone()}
	return &c
}

// Close closes the connections that are idle.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Error is a failure that the daemon reported. errors.Is finds the category
// that its code names.
type Error struct {
	// Status is the HTTP status, or 0 where the failure came within a stream.
	Status int
	// Code is a stable word, as in "not_found".
	Code string
	// Message is a sentence for a person.
	Message string
	// Hint says what to do about it, or is empty.
	Hint string
	// RequestID names the request in the daemon's log, or is empty.
	RequestID string
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the category that the code names.
func (e *Error) Unwrap() error { return errdef.FromCode(e.Code) }

// UnreachableError says that no daemon answered.
type UnreachableError struct {
	// Err is why.
	Err error
}

// Error says so.
func (e *UnreachableError) Error() string { return "daemon unreachable: " + e.Err.Error() }

// Unwrap returns why.
func (e *UnreachableError) Unwrap() []error { return []error{errdef.ErrUnavailable, e.Err} }

// unreachable tells a connection that was never made from one that broke.
func unreachable(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		return &UnreachableError{Err: op}
	}
	return err
}

// request describes one call.
type request struct {
	method string
	path   string // escaped
	query  url.Values
	body   io.Reader
	header http.Header
}

// segments makes a path of parts, each escaped.
func segments(parts ...string) string {
	var b strings.Builder
	for _, p := range parts {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(p))
	}
	return b.String()
}

// send makes the call and returns an answer of status 2xx, whose body the
// caller must close.
func (c *Client) send(ctx context.Context, r request) (*http.Response, error) {
	target := c.base + r.path
	if len(r.query) > 0 {
		target += "?" + r.query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, r.method, target, r.body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	maps.Copy(req.Header, r.header)
	if c.key != "" && r.method == http.MethodPost {
		req.Header.Set("Idempotency-Key", c.key)
	}
	if err = c.authorize(req, r.body); err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, unreachable(err)
	}
	if resp.StatusCode/100 != 2 {
		defer func() { _ = resp.Body.Close() }()
		return nil, readError(resp)
	}
	return resp, nil
}

func readError(resp *http.Response) error {
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	var w wire.Error
	if err != nil || json.Unmarshal(body, &w) != nil || w.Error == "" {
		return &Error{Status: resp.StatusCode, Code: "internal", Message: "daemon answered " + resp.Status}
	}
	return &Error{Status: resp.StatusCode, Code: w.Code, Message: w.Error, Hint: w.Hint, RequestID: w.RequestID}
}

// call sends in, unless it is nil, as JSON and decodes the answer into out,
// unless that is nil.
func (c *Client) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	r := request{method: method, path: path, query: query}
	if err := r.encode(in); err != nil {
		return err
	}
	resp, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return fmt.Errorf("read the answer of %s %s: %w", method, path, err)
	}
	return nil
}

func (r *request) encode(in any) error {
	if in == nil {
		return nil
	}
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	r.body = bytes.NewReader(body)
	r.header = http.Header{"Content-Type": {"application/json"}}
	return nil
}

func get[T any](ctx context.Context, c *Client, path string, query url.Values) (T, error) {
	var out T
	err := c.call(ctx, http.MethodGet, path, query, nil, &out)
	return out, err
}

func post[T any](ctx context.Context, c *Client, path string, in any) (T, error) {
	var out T
	err := c.call(ctx, http.MethodPost, path, nil, in, &out)
	return out, err
}
