package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/wire"
)

// maxAnchors bounds the anchors of one check.
const maxAnchors = 256

func (s *server) records(ctx context.Context) (*record.Store, error) {
	if s.Attestor == nil {
		return nil, errNoRecords
	}
	return s.Attestor.Records(ctx)
}

// recordOf finds a record that who makes ctx's request sees.
func (s *server) recordOf(ctx context.Context, id string) (record.Envelope, error) {
	store, err := s.records(ctx)
	if err != nil {
		return record.Envelope{}, err
	}
	e, err := store.Get(id)
	if err == nil && s.bounded(ctx) && e.Record.User != auth.From(ctx).Name {
		return record.Envelope{}, fmt.Errorf("%w: record %s", errdef.ErrNotFound, strings.ToLower(id))
	}
	return e, err
}

// ListRecords answers GET /v1/records.
func (s *server) ListRecords(ctx context.Context, r wire.ListRecordsRequestObject) (wire.ListRecordsResponseObject, error) {
	store, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	p := r.Params
	if p.Before < 0 {
		return nil, fmt.Errorf("%w: before %d", errdef.ErrInvalid, p.Before)
	}
	filter := record.Filter{
		Block: p.Block, User: p.User, Snapshot: p.Snapshot, Mode: record.Mode(p.Mode), Before: uint64(p.Before), Limit: p.Limit,
	}
	if filter.Since, err = parseInstant("since", p.Since); err != nil {
		return nil, err
	}
	out := wire.ListRecords200JSONResponse{Records: []wire.Record{}}
	if who := auth.From(ctx).Name; s.bounded(ctx) {
		if p.User != "" && p.User != who {
			return out, nil // they are not there for this caller
		}
		filter.User = who
	}
	page, err := store.List(ctx, filter)
	if err != nil {
		return nil, err
	}
	for _, e := range page.Records {
		out.Records = append(out.Records, describeRecord(ctx, e))
	}
	out.NextBefore, out.Unreadable = int64(page.Next), page.Unreadable
	return out, nil
}

// GetRecord answers GET /v1/records/{id}.
func (s *server) GetRecord(ctx context.Context, r wire.GetRecordRequestObject) (wire.GetRecordResponseObject, error) {
	e, err := s.recordOf(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	out := describeRecord(ctx, e)
	if seesCommands(ctx) {
		out.Envelope = json.RawMessage(e.Bytes)
	}
	return wire.GetRecord200JSONResponse(out), nil
}

// seesCommands reports whether who makes ctx's request may see what was run, as
// with the processes of a sandbox.
func seesCommands(ctx context.Context) bool { return auth.From(ctx).Scope.Includes(auth.Fork) }

func describeRecord(ctx context.Context, e record.Envelope) wire.Record {
	r := e.Record
	out := wire.Record{
		ID: r.ID, Seq: int64(r.Chain.Seq), Digest: e.Digest, Parent: r.Parent, Block: r.Block, User: r.User, Mode: string(r.Mode),
		Snapshot: r.Environment.Snapshot, SnapshotTag: r.Environment.SnapshotTag, Engine: r.Environment.Engine, EngineVersion: r.Environment.EngineVersion,
		Start: instant(r.Input.Start), ExitCode: exitCodeOf(r.Output), Signal: r.Output.Signal, Failure: r.Output.Failure,
		StdoutBytes: r.Output.Stdout.Size, StderrBytes: r.Output.Stderr.Size, MemoryDigest: r.Output.Memory,
		InputHash: r.Hashes.Tine.Input, OutputHash: r.Hashes.Tine.Output, CanonicalOutputHash: r.Hashes.Tine.Canonical, ForgeOutputHash: r.Hashes.Forge.Output,
		VirtualNS: int64(r.Output.Virtual), WallMS: millis(r.Output.Wall),
		StartedAt: instant(r.Started), CreatedAt: instant(r.Created), KeyID: r.KeyID,
	}
	if r.Mode == record.Deterministic {
		out.Seed = strconv.FormatUint(r.Input.Seed, 10)
	}
	if !seesCommands(ctx) {
		return out
	}
	out.Args = r.Input.Argv
	for _, f := range r.Output.Files {
		out.Files = append(out.Files, f.Path)
	}
	return out
}

// GetRecordBundle answers GET /v1/records/{id}/bundle.
func (s *server) GetRecordBundle(ctx context.Context, r wire.GetRecordBundleRequestObject) (wire.GetRecordBundleResponseObject, error) {
	store, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	e, err := s.recordOf(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	return bundle(func(w http.ResponseWriter) error {
		w.Header().Set("Content-Type", "application/x-tar")
		w.Header().Set("Content-Disposition", "attachment; filename=record-"+e.Record.ID+".tar")
		w.WriteHeader(http.StatusOK) // what fails from here on cuts the answer short
		berr := record.WriteBundle(patientWriter{w}, e, store.Public(), store)
		if errors.Is(berr, errdef.ErrNotFound) {
			s.logger.ErrorContext(ctx, "the contents of a record are not all there", "record", e.Record.ID, "error", berr)
		}
		return berr
	}), nil
}

// bundle is an answer that reads a record's contents while it is written.
type bundle func(w http.ResponseWriter) error

// VisitGetRecordBundleResponse makes bundle an answer to getRecordBundle.
func (b bundle) VisitGetRecordBundleResponse(w http.ResponseWriter) error { return b(w) }

// GetRecordKey answers GET /v1/records/key.
func (s *server) GetRecordKey(ctx context.Context, _ wire.GetRecordKeyRequestObject) (wire.GetRecordKeyResponseObject, error) {
	store, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	key := store.Public()
	return wire.GetRecordKey200JSONResponse{ID: key.ID(), Pem: string(key.PEM())}, nil
}

// CheckRecords answers GET /v1/records/check.
func (s *server) CheckRecords(ctx context.Context, r wire.CheckRecordsRequestObject) (wire.CheckRecordsResponseObject, error) {
	if s.Attestor == nil {
		return nil, errNoRecords
	}
	if id := auth.From(ctx); r.Params.Contents && !id.Scope.Includes(auth.Admin) {
		return nil, fmt.Errorf("%w: %s has scope %s, and contents needs %s", errdef.ErrDenied, id.Name, id.Scope, auth.Admin)
	}
	anchors, err := parseAnchors(r.Params.Anchor)
	if err != nil {
		return nil, err
	}
	select {
	case s.checks <- struct{}{}:
		defer func() { <-s.checks }()
	default:
		return nil, fmt.Errorf("%w: the records are being checked", errdef.ErrExhausted)
	}
	rep, err := s.Attestor.Check(ctx, r.Params.Contents, anchors)
	if err != nil {
		return nil, err
	}
	out := wire.CheckRecords200JSONResponse{
		OK: rep.OK, Records: int64(rep.Records), LastSeq: int64(rep.Last), LastDigest: rep.Digest, Problems: []wire.RecordProblem{},
	}
	for _, p := range rep.Problems {
		out.Problems = append(out.Problems, wire.RecordProblem{Kind: p.Kind, File: p.File, Seq: int64(p.Seq), Detail: conceal(ctx, p.Detail)})
	}
	return out, nil
}

// parseAnchors reads SEQ:sha256:HEX.
func parseAnchors(texts []string) (map[uint64]string, error) {
	if len(texts) > maxAnchors {
		return nil, fmt.Errorf("%w: %d anchors, at most %d", errdef.ErrInvalid, len(texts), maxAnchors)
	}
	anchors := make(map[uint64]string, len(texts))
	for _, text := range texts {
		number, digest, _ := strings.Cut(text, ":")
		seq, err := strconv.ParseUint(number, 10, 63)
		hex, isDigest := strings.CutPrefix(digest, "sha256:")
		if err != nil || !isDigest || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
			return nil, fmt.Errorf("%w: anchor %.120q is not SEQ:sha256:HEX", errdef.ErrInvalid, text)
		}
		anchors[seq] = digest
	}
	return anchors, nil
}
