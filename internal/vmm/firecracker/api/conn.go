package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// maxPayload is what a request's body may have, in bytes: the default of
// Firecracker's --http-api-max-payload-size. It is kept here because Firecracker
// does not just refuse more: it leaves the rest in the socket, so that both ends
// can wait for the other to read, and takes what it does read for more requests.
const maxPayload = 51200

// What an answer may be long. The longest true one is the configuration of a
// machine, of some KiB.
const (
	maxHeader = 16 << 10 // status line and headers, bytes
	maxBody   = 1 << 20  // bytes
)

// conn is one connection, for one request at a time.
type conn struct {
	net.Conn
	end   *end
	limit *io.LimitedReader // above end, bounds what an answer may take of it
	in    *bufio.Reader     // above limit
}

func newConn(c net.Conn) *conn {
	end := &end{r: c}
	limit := &io.LimitedReader{R: end}
	return &conn{Conn: c, end: end, limit: limit, in: bufio.NewReaderSize(limit, 4<<10)}
}

// end notes that a connection has ended. Those who read lines from it take what
// came before for a line.
type end struct {
	r       io.Reader
	reached bool
}

func (e *end) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.reached = e.reached || errors.Is(err, io.EOF)
	return n, err
}

// answer is what came back for a request.
type answer struct {
	status int
	body   []byte
	// last: the connection is not fit for another request.
	last bool
}

// exchange sends a request and reads its answer. When it fails, or the answer
// says so, the connection is for nothing but to be closed.
func (c *conn) exchange(ctx context.Context, method, path string, body []byte) (answer, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	a, err := c.send(ctx, method, path, body)
	if !stop() { // the deadline that it has set stays
		a.last = true
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return a, err
}

func (c *conn) send(ctx context.Context, method, path string, body []byte) (answer, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://localhost"+path, bytes.NewReader(body))
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", "") // none
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	var message bytes.Buffer
	if err = request.Write(&message); err != nil {
		return answer{}, err
	}
	_, sent := c.Write(message.Bytes())
	// A Firecracker that has too many connections says so and hangs up before it
	// has read anything: its answer says more than that the request did not fit.
	a, err := c.receive(request)
	if sent != nil && err != nil {
		return answer{}, gone(sent)
	}
	a.last = a.last || sent != nil
	return a, err
}

// receive reads one answer, and no more of the connection than that may take.
func (c *conn) receive(request *http.Request) (answer, error) {
	c.limit.N = maxHeader
	response, err := http.ReadResponse(c.in, request)
	switch {
	case err == nil:
	case c.limit.N <= 0:
		return answer{}, fmt.Errorf("the headers of the answer are longer than %d bytes", maxHeader)
	case c.end.reached:
		return answer{}, gone(io.ErrUnexpectedEOF)
	default:
		return answer{}, gone(err)
	}
	defer response.Body.Close() //nolint:errcheck // it closes nothing
	length, err := bodyLength(response)
	if err != nil {
		return answer{}, err
	}
	c.limit.N = length
	body := make([]byte, length)
	if _, err = io.ReadFull(response.Body, body); err != nil {
		return answer{}, gone(err)
	}
	return answer{
		status: response.StatusCode,
		body:   body,
		last:   response.Close || c.in.Buffered() > 0,
	}, nil
}

// bodyLength is how many bytes follow the headers. An answer that does not say
// so, as one in chunks, or up to the end of the connection, is none that
// Firecracker gives.
func bodyLength(response *http.Response) (int64, error) {
	switch {
	case response.StatusCode < 200:
		return 0, fmt.Errorf("the answer has status %d, which nobody asked for", response.StatusCode)
	case len(response.TransferEncoding) > 0:
		return 0, errors.New("the answer comes in chunks")
	case response.ContentLength < 0:
		return 0, errors.New("the answer does not say how long it is")
	case response.ContentLength > maxBody:
		return 0, fmt.Errorf("the answer has %d bytes, more than %d", response.ContentLength, maxBody)
	case response.StatusCode == http.StatusNoContent && strings.Trim(response.Header.Get("Content-Length"), "0") != "":
		return 0, errors.New("the answer is to have no content, and has some")
	}
	return response.ContentLength, nil
}

// gone puts the ends of connections into their category.
func gone(err error) error {
	var network *net.OpError
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: the connection ended", errdef.ErrUnavailable)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
		return err
	case errors.As(err, &network):
		return fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
	}
	// What net/http says of an answer that is none can quote it.
	return fmt.Errorf("the answer is not HTTP as Firecracker speaks it: %s", clean(err.Error(), maxMessage))
}

// fault reads the message of a refusal, as far as there is one. known is false
// for one that has not Firecracker's form: its server gives such ones to
// requests that it could not read, and may then take the rest of the request for
// the next.
func fault(body []byte) (message string, known bool) {
	var refusal struct {
		Message *string `json:"fault_message"`
	}
	if err := json.Unmarshal(body, &refusal); err != nil || refusal.Message == nil {
		return clean(string(body[:min(len(body), maxMessage)]), maxMessage), false
	}
	return clean(*refusal.Message, maxMessage), true
}
