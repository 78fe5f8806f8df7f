package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"

	"github.com/tinevm/tine/internal/wire"
)

// maxEvent bounds one event.
const maxEvent = 1 << 20

// Event is something that has happened to a sandbox or a snapshot.
type Event = wire.Event

// Idempotent returns a client whose requests for sandboxes, branches, snapshots
// and workspaces carry the key, so that one whose answer was lost can be sent
// again: the daemon then answers as it did, and makes nothing new. Every
// request needs a key of its own.
func (c *Client) Idempotent(key string) *Client {
	with := *c
	with.key = key
	return &with
}

// Events calls f with each event after the one that has the id after, or from
// now on if that is empty, until ctx ends or f fails; f runs on the calling
// goroutine. It returns nil when the daemon ends the stream, which it does when
// it stops and when f is too slow: go on with the last event's ID. An event of
// type gap says that some are lost.
func (c *Client) Events(ctx context.Context, after string, f func(Event) error) error {
	r := request{method: http.MethodGet, path: "/v1/events", header: http.Header{"Accept": {ndjson}}}
	if after != "" {
		r.query = url.Values{"after": {after}}
	}
	resp, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxEvent)
	for lines.Scan() {
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 {
			continue // it only shows that the connection lives
		}
		var e Event
		if err = json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("read events: %w", err)
		}
		if err = f(e); err != nil {
			return err
		}
	}
	if err = lines.Err(); err != nil {
		return fmt.Errorf("read events: %w", err)
	}
	return nil
}
