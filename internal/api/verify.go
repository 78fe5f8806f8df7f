package api

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/wire"
)

// maxTrusted bounds the keys that a request brings.
const maxTrusted = 64

// verify answers POST /v1/verify. When the client goes away its context ends,
// and the runs with it.
func (s *server) verify(w http.ResponseWriter, r *http.Request) {
	leave, err := s.enterRun()
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer leave()
	var body wire.VerifyRequest
	if err = decodeBody(r, &body); err != nil {
		s.failRequest(w, r, err)
		return
	}
	req, err := s.verifyRequest(r.Context(), body)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	look := func(ctx context.Context) (json.RawMessage, error) {
		if !req.Offline {
			release, rerr := s.reserve(ctx, min(max(req.Runs, 1), attest.AtOnce), "")
			if rerr != nil {
				return nil, rerr
			}
			defer release()
		}
		rep, verr := s.Attestor.Verify(ctx, req)
		if verr != nil {
			return nil, verr
		}
		s.Metrics.Verified(strings.ReplaceAll(string(rep.Result), " ", "_"))
		audit.Made(ctx, rep.ID)
		data, verr := json.Marshal(rep)
		return json.RawMessage(conceal(ctx, string(data))), verr
	}
	if strings.Contains(r.Header.Get("Accept"), ndjson) {
		err = writeLines(r.Context(), w, func(ctx context.Context, _ *lineWriter) (any, error) { return look(ctx) })
	} else {
		var report json.RawMessage
		if report, err = look(r.Context()); err == nil {
			err = answerLarge(w, report)
		}
	}
	if err != nil {
		s.fail(w, r, err)
	}
}

func (s *server) verifyRequest(ctx context.Context, b wire.VerifyRequest) (attest.VerifyRequest, error) {
	req := attest.VerifyRequest{ID: b.ID, Bundle: b.Bundle, Runs: b.Runs, Offline: b.Offline, Believe: b.Believe}
	if id := auth.From(ctx); b.Believe && !id.Scope.Includes(auth.Admin) {
		return req, fmt.Errorf("%w: %s has scope %s, and believe needs %s", errdef.ErrDenied, id.Name, id.Scope, auth.Admin)
	}
	named := 0
	for _, there := range []bool{b.ID != "", b.Bundle != nil, b.Envelope != nil} {
		if there {
			named++
		}
	}
	if named != 1 {
		return req, fmt.Errorf("%w: name a record by one of id, bundle_base64 and envelope", errdef.ErrInvalid)
	}
	if b.Envelope != nil {
		var line bytes.Buffer // an envelope has one form, and JSON within JSON may have been laid out
		if err := json.Compact(&line, b.Envelope); err != nil {
			return req, fmt.Errorf("%w: envelope: %w", errdef.ErrInvalid, err)
		}
		req.Bundle = line.Bytes()
	}
	if len(b.Keys) > maxTrusted {
		return req, fmt.Errorf("%w: %d keys, at most %d", errdef.ErrInvalid, len(b.Keys), maxTrusted)
	}
	for _, text := range b.Keys {
		key, err := record.ParsePublic([]byte(text))
		if err != nil {
			return req, err
		}
		req.Keys = append(req.Keys, key)
	}
	if b.ID == "" {
		return req, nil
	}
	e, err := s.recordOf(ctx, b.ID)
	req.ID = e.Record.ID
	return req, err
}
