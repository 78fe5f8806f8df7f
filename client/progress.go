package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"

	"github.com/tinevm/tine/internal/wire"
)

const ndjson = "application/x-ndjson"

// Progress is a piece of news of long work.
type Progress = wire.ProgressEvent

// longCall posts in and returns the result, handing every piece of news on the
// way to report, from the calling goroutine. A nil report asks for no news.
func longCall[T any](ctx context.Context, c *Client, path string, in any, report func(Progress)) (T, error) {
	var out T
	if report == nil {
		return post[T](ctx, c, path, in)
	}
	r := request{method: http.MethodPost, path: path}
	if err := r.encode(in); err != nil {
		return out, err
	}
	if r.header == nil {
		r.header = http.Header{}
	}
	r.header.Set("Accept", ndjson+", application/json")
	resp, err := c.send(ctx, r)
	if err != nil {
		return out, err
	}
	defer func() { _ = resp.Body.Close() }()
	body := io.LimitReader(resp.Body, maxAnswer)
	if media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); media != ndjson {
		return out, json.NewDecoder(body).Decode(&out)
	}
	result, err := readLines(body, func(line wire.ProgressLine) error {
		if line.Progress != nil {
			report(*line.Progress)
		}
		return nil
	})
	if err != nil {
		return out, err
	}
	return out, json.Unmarshal(result, &out)
}

// readLines reads up to the line that ends the stream, and hands the others on.
func readLines(r io.Reader, f func(wire.ProgressLine) error) (json.RawMessage, error) {
	dec := json.NewDecoder(bufio.NewReader(r))
	for {
		var line wire.ProgressLine
		if err := dec.Decode(&line); errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read progress: %w", io.ErrUnexpectedEOF)
		} else if err != nil {
			return nil, fmt.Errorf("read progress: %w", err)
		}
		switch {
		case line.Error != "":
			return nil, &Error{Code: line.Code, Message: line.Error, Hint: line.Hint}
		case line.Result != nil:
			return line.Result, nil
		}
		if err := f(line); err != nil {
			return nil, err
		}
	}
}
