package client

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/tinevm/tine/internal/wire"
)

// Records.
type (
	// Record is what a record says.
	Record = wire.Record
	// RecordPage is a part of the list of records.
	RecordPage = wire.RecordPage
	// RecordKey is the public key that records are verified with.
	RecordKey = wire.RecordKey
	// RecordCheck says what is in a store of records, and what is wrong with it.
	RecordCheck = wire.RecordCheck
)

// RecordFilter says which records to list; what is zero leaves all in.
type RecordFilter struct {
	Block, User string
	// Snapshot is a digest, or a tag that it had when the run began.
	Snapshot string
	Mode     string
	// Since leaves out what was signed before.
	Since time.Time
	// Before is the NextBefore of the page before, or 0 for the newest.
	Before int64
	// Limit is how many to list at most: up to 1000, and 100 where it is 0.
	Limit int
}

// Records lists records, the newest first.
func (c *Client) Records(ctx context.Context, f RecordFilter) (RecordPage, error) {
	query := url.Values{}
	for name, value := range map[string]string{"block": f.Block, "user": f.User, "snapshot": f.Snapshot, "mode": f.Mode} {
		if value != "" {
			query.Set(name, value)
		}
	}
	if !f.Since.IsZero() {
		query.Set("since", f.Since.UTC().Format(time.RFC3339Nano))
	}
	if f.Before != 0 {
		query.Set("before", strconv.FormatInt(f.Before, 10))
	}
	if f.Limit != 0 {
		query.Set("limit", itoa(f.Limit))
	}
	return get[RecordPage](ctx, c, "/v1/records", query)
}

// Record describes a record. id may be 4 or more characters that it begins with.
func (c *Client) Record(ctx context.Context, id string) (Record, error) {
	return get[Record](ctx, c, "/v1/records"+segments(id), nil)
}

// RecordBundle opens a record with its contents and key, a tar file. The caller
// closes it.
func (c *Client) RecordBundle(ctx context.Context, id string) (io.ReadCloser, error) {
	resp, err := c.send(ctx, request{method: http.MethodGet, path: "/v1/records" + segments(id, "bundle")})
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// RecordKey is the public key that the daemon's records are verified with.
func (c *Client) RecordKey(ctx context.Context) (RecordKey, error) {
	return get[RecordKey](ctx, c, "/v1/records/key", nil)
}

// CheckRecords walks along the chain of records; with contents it reads all of
// them. anchors are digests that records had, as SEQ:sha256:HEX.
func (c *Client) CheckRecords(ctx context.Context, contents bool, anchors ...string) (RecordCheck, error) {
	query := url.Values{}
	if contents {
		query.Set("contents", "true")
	}
	if len(anchors) > 0 {
		query["anchor"] = anchors
	}
	return get[RecordCheck](ctx, c, "/v1/records/check", query)
}
