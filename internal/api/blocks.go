package api

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/block"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/wire"
)

const (
	blockRunPattern  = "POST /v1/blocks/{ref}/run"
	blockFilePattern = "POST /v1/blocks/run"
)

// levelOf is how far who makes ctx's request is trusted with blocks: it follows
// from the scope. Whoever has scope read runs nothing, so what it is given here
// does not matter.
func levelOf(ctx context.Context) block.TrustLevel {
	switch auth.From(ctx).Scope {
	case auth.Admin:
		return block.Three
	case auth.Fork:
		return block.One
	default:
		return block.Zero
	}
}

// callerKey matches what can stand as a key in evidence.
var callerKey = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.:-]{0,127}$`)

// callerOf stands for a caller where a key would: in audits, and as publisher.
// It is the audit log's name, or a hash of one that is too odd.
func callerOf(ctx context.Context) string {
	name := actorOf(auth.From(ctx))
	if callerKey.MatchString(name) {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return "caller:" + hex.EncodeToString(sum[:16])
}

// registry is where blocks are.
func (s *server) registry(ctx context.Context) (*block.Registry, error) {
	if s.Attestor == nil {
		return nil, fmt.Errorf("%w: this daemon has no blocks", errdef.ErrUnsupported)
	}
	return s.Attestor.Blocks(ctx)
}

// blockNamed finds a block by NAME, NAME@VERSION, NAME@VERSION#DIGEST or DIGEST.
func (s *server) blockNamed(ctx context.Context, ref string) (*block.Registry, block.Entry, error) {
	r, err := s.registry(ctx)
	if err != nil {
		return nil, block.Entry{}, err
	}
	if !strings.HasPrefix(ref, "sha256:") {
		e, err := r.Get(ref)
		return r, e, err
	}
	for _, e := range r.List() {
		if e.Ref.Digest == ref {
			return r, e, nil
		}
	}
	return nil, block.Entry{}, fmt.Errorf("%w: block %.80s", errdef.ErrNotFound, ref)
}

func blockOrder() order[block.Entry] {
	// Versions do not sort as texts do.
	const digits = "%s@%010d.%010d.%010d"
	return order[block.Entry]{
		path: "/v1/blocks",
		key: func(e block.Entry) string {
			v := e.Ref.Version
			return fmt.Sprintf(digits, e.Ref.Name, v.Major, v.Minor, v.Patch)
		},
		name:  func(e block.Entry) string { return e.Ref.Name + "@" + e.Ref.Version.String() },
		stale: func(string) bool { return false },
	}
}

// ListBlocks answers GET /v1/blocks.
func (s *server) ListBlocks(ctx context.Context, r wire.ListBlocksRequestObject) (wire.ListBlocksResponseObject, error) {
	blocks, err := s.registry(ctx)
	if err != nil {
		return nil, err
	}
	by := blockOrder()
	entries, next, err := by.cut(blocks.List(), r.Params.Limit, r.Params.After)
	if err != nil {
		return nil, err
	}
	out := make([]wire.Block, 0, len(entries))
	for _, e := range entries {
		b, err := blockOf(blocks, e)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return page[wire.Block]{items: out, path: by.path, limit: r.Params.Limit, next: next}, nil
}

// blockOf is what is known of a block that is published. Evidence that is
// damaged makes it neither unknown nor trusted.
func blockOf(blocks *block.Registry, e block.Entry) (wire.Block, error) {
	trust, err := blocks.Trust(e.Ref.Digest)
	if err != nil {
		return wire.Block{}, err
	}
	s := e.Spec
	out := wire.Block{
		Name: s.Name, Version: s.Version.String(), Digest: e.Ref.Digest, ID: e.ID().String(), Description: s.Description, Author: s.Author,
		CognitiveLoad: wire.BlockCognitiveLoad(s.CognitiveLoad), MinimumTrustLevel: wire.BlockMinimumTrustLevel(s.MinimumTrustLevel.String()),
		Provides: []wire.BlockCapability{}, Requires: []wire.BlockRequirement{}, ComposedOf: []string{},
		Source: s.Run.Source, Image: s.Run.Image, Snapshot: s.Run.Snapshot, Command: list(s.Run.Command),
		Published: true, AddedAt: rfc3339(e.AddedAt), Publisher: e.Publisher,
		Score: trust.Score.Value(), Status: wire.BlockStatus(trust.Status),
	}
	for _, p := range s.Provides {
		out.Provides = append(out.Provides, wire.BlockCapability{Name: p.Name, Version: p.Version.String()})
	}
	for _, q := range s.Requires {
		out.Requires = append(out.Requires, wire.BlockRequirement{Name: q.Name, Version: q.Version.String(), Kind: wire.BlockRequirementKind(q.Kind)})
	}
	for _, ref := range s.ComposedOf {
		out.ComposedOf = append(out.ComposedOf, ref.String())
	}
	return out, nil
}

// AddBlock answers POST /v1/blocks.
func (s *server) AddBlock(ctx context.Context, r wire.AddBlockRequestObject) (wire.AddBlockResponseObject, error) {
	blocks, err := s.registry(ctx)
	if err != nil {
		return nil, err
	}
	e, err := blocks.Add(block.AddRequest{
		File: []byte(r.Body.File), Level: levelOf(ctx), Publisher: actorOf(auth.From(ctx)), PublisherKey: callerOf(ctx),
	})
	if err != nil {
		return nil, err
	}
	audit.Made(ctx, e.Ref.String())
	out, err := blockOf(blocks, e)
	return wire.AddBlock201JSONResponse(out), err
}

// answered is a JSON answer whose type the generated code does not know.
type answered struct{ value any }

// VisitGetBlockResponse makes answered an answer to getBlock.
func (a answered) VisitGetBlockResponse(w http.ResponseWriter) error {
	body, err := json.Marshal(a.value)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, err = w.Write(append(body, '\n'))
	return err
}

// GetBlock answers GET /v1/blocks/{ref}.
func (s *server) GetBlock(ctx context.Context, r wire.GetBlockRequestObject) (wire.GetBlockResponseObject, error) {
	blocks, e, err := s.blockNamed(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	switch r.Params.Format {
	case "forge":
		return forgeForm(blocks, e)
	case "":
	default:
		return nil, fmt.Errorf("%w: format %.80q: forge, or none", errdef.ErrInvalid, r.Params.Format)
	}
	b, err := blockOf(blocks, e)
	if err != nil {
		return nil, err
	}
	file, err := blocks.File(e.Ref)
	return answered{struct {
		wire.Block
		File string `json:"file"`
	}{b, string(file)}}, err
}

func forgeForm(blocks *block.Registry, e block.Entry) (wire.GetBlockResponseObject, error) {
	b, err := blocks.Forge(e)
	return answered{b}, err
}

// DeleteBlock answers DELETE /v1/blocks/{ref}.
func (s *server) DeleteBlock(ctx context.Context, r wire.DeleteBlockRequestObject) (wire.DeleteBlockResponseObject, error) {
	blocks, e, err := s.blockNamed(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	versions := 0
	for _, other := range blocks.List() {
		if other.Ref.Name == e.Ref.Name {
			versions++
		}
	}
	if r.Ref == e.Ref.Name && versions > 1 {
		err = fmt.Errorf("%w: block %s has %d versions", errdef.ErrConflict, e.Ref.Name, versions)
		return nil, errdef.WithHint(err, "name one of them, as in "+e.Ref.Name+"@"+e.Ref.Version.String())
	}
	return wire.DeleteBlock204Response{}, blocks.Remove(e.Ref.String(), levelOf(ctx))
}

// RunBlock answers POST /v1/blocks/{ref}/run.
func (s *server) RunBlock(ctx context.Context, r wire.RunBlockRequestObject) (wire.RunBlockResponseObject, error) {
	_, e, err := s.blockNamed(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	req, err := blockRequest(ctx, e, or(r.Body, wire.RunBlockRequest{}))
	if err != nil {
		return nil, err
	}
	return blockRun{s, ctx, req}, nil
}

// RunBlockFile answers POST /v1/blocks/run.
func (s *server) RunBlockFile(ctx context.Context, r wire.RunBlockFileRequestObject) (wire.RunBlockFileResponseObject, error) {
	if _, err := s.registry(ctx); err != nil {
		return nil, err
	}
	e, err := block.NewEntry([]byte(r.Body.File), attest.CheckRule)
	if err != nil {
		return nil, err
	}
	b := r.Body
	req, err := blockRequest(ctx, e, wire.RunBlockRequest{Stdin: b.Stdin, StdinBase64: b.StdinBase64, Seed: b.Seed, Start: b.Start})
	if err != nil {
		return nil, err
	}
	return blockRun{s, ctx, req}, nil
}

// blockRun is an answer that runs a block while it is written. It may be large.
type blockRun struct {
	s   *server
	ctx context.Context
	req block.RunRequest
}

// VisitRunBlockResponse makes blockRun an answer to runBlock.
func (b blockRun) VisitRunBlockResponse(w http.ResponseWriter) error { return b.visit(w) }

// VisitRunBlockFileResponse makes blockRun an answer to runBlockFile.
func (b blockRun) VisitRunBlockFileResponse(w http.ResponseWriter) error { return b.visit(w) }

func (b blockRun) visit(w http.ResponseWriter) error {
	if wantsLines(b.ctx) {
		return writeLines(b.ctx, w, func(ctx context.Context, out *lineWriter) (any, error) {
			out.patience = answerTime
			return b.s.runBlock(ctx, b.req)
		})
	}
	run, err := b.s.runBlock(b.ctx, b.req)
	if err != nil {
		return err
	}
	return answerLarge(w, run)
}

// blockRequest checks how a block is to be run.
func blockRequest(ctx context.Context, e block.Entry, b wire.RunBlockRequest) (block.RunRequest, error) {
	req := block.RunRequest{Block: e, Level: levelOf(ctx), User: auth.From(ctx).Name, Quarantined: b.Quarantined}
	switch {
	case b.Stdin != nil && b.StdinBase64 != nil:
		return req, fmt.Errorf("%w: stdin and stdin_base64 exclude each other", errdef.ErrInvalid)
	case b.Stdin != nil:
		req.Stdin = append([]byte{}, *b.Stdin...) // not nil
	case b.StdinBase64 != nil:
		data, err := base64.StdEncoding.DecodeString(*b.StdinBase64)
		if err != nil {
			return req, fmt.Errorf("%w: stdin_base64 is not base64", errdef.ErrInvalid)
		}
		req.Stdin = append([]byte{}, data...)
	}
	if b.Seed != nil {
		if *b.Seed < 0 {
			return req, fmt.Errorf("%w: seed must be 0 to %d", errdef.ErrInvalid, math.MaxInt64)
		}
		seed := uint64(*b.Seed)
		req.Seed = &seed
	}
	if b.Start != "" {
		var at block.Moment
		if err := at.UnmarshalText([]byte(b.Start)); err != nil {
			return req, fmt.Errorf("start: %w", err)
		}
		start := time.Time(at)
		req.Start = &start
		// Before anything is made that takes long.
		if _, err := deterministic.Prepare(record.Input{Argv: e.Spec.Run.Command, Start: start}); err != nil {
			return req, err
		}
	}
	return req, nil
}

// runBlock runs a block, and says what its record says.
func (s *server) runBlock(ctx context.Context, req block.RunRequest) (wire.BlockRun, error) {
	leave, err := s.enterRun()
	if err != nil {
		return wire.BlockRun{}, err
	}
	defer leave()
	release, err := s.reserve(ctx, 1, "")
	if err != nil {
		return wire.BlockRun{}, err
	}
	defer release()
	res, err := s.Attestor.RunBlock(ctx, req)
	s.Metrics.Run(string(record.Deterministic), outcomeOf(res.Output, err))
	if err != nil {
		return wire.BlockRun{}, err
	}
	audit.Made(ctx, res.RecordID)
	store, err := s.Attestor.Records(ctx)
	if err != nil {
		return wire.BlockRun{}, err
	}
	kept, err := store.Get(res.RecordID)
	if err != nil {
		return wire.BlockRun{}, err
	}
	return blockRunOf(res, kept.Record)
}

func blockRunOf(res block.Result, r record.Record) (wire.BlockRun, error) {
	forge, err := json.Marshal(res.Forge)
	if err != nil {
		return wire.BlockRun{}, fmt.Errorf("encode record %s: %w", res.RecordID, err)
	}
	out := res.Output
	run := wire.BlockRun{
		RecordID: res.RecordID, Block: r.Block, Snapshot: r.Environment.Snapshot,
		Status: wire.BlockRunStatusSucceeded, Reason: res.Status.Reason,
		ExitCode: out.Exit, Signal: out.Signal, Failure: out.Failure,
		Stdout: bytesOf(out.Stdout), Stderr: bytesOf(out.Stderr), Files: []wire.BlockRunFile{}, Requires: []wire.BlockProvider{},
		VirtualMS: millis(out.Virtual), WallMS: millis(out.Wall),
		InputHash: r.Hashes.Tine.Input, OutputHash: r.Hashes.Tine.Output, CanonicalHash: r.Hashes.Tine.Canonical,
		ForgeInputHash: r.Hashes.Forge.Input, ForgeOutputHash: r.Hashes.Forge.Output, Forge: forge,
	}
	if res.Status.Word == block.Failed {
		run.Status = wire.BlockRunStatusFailed
	}
	for _, f := range out.Files {
		run.Files = append(run.Files, wire.BlockRunFile{Path: f.Path, Mode: int(f.Mode), Data: bytesOf(f.Data)})
	}
	for _, m := range res.Requires {
		run.Requires = append(run.Requires, wire.BlockProvider{Capability: m.Capability, Provider: m.Provider.String()})
	}
	return run, nil
}

// bytesOf makes absent bytes none, which JSON tells apart.
func bytesOf(data []byte) []byte {
	if data == nil {
		return []byte{}
	}
	return data
}

// GetBlockTrust answers GET /v1/blocks/{ref}/trust.
func (s *server) GetBlockTrust(ctx context.Context, r wire.GetBlockTrustRequestObject) (wire.GetBlockTrustResponseObject, error) {
	blocks, e, err := s.blockNamed(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	trust, err := trustOf(blocks, e)
	return wire.GetBlockTrust200JSONResponse(trust), err
}

func trustOf(blocks *block.Registry, e block.Entry) (wire.BlockTrust, error) {
	t, err := blocks.Trust(e.Ref.Digest)
	if err != nil {
		return wire.BlockTrust{}, err
	}
	out := wire.BlockTrust{
		Block: e.Ref.String(), Score: t.Score.Value(), Status: wire.BlockTrustStatus(t.Status), For: t.For, Against: t.Against,
		Evidence: make([]wire.BlockEvidence, 0, len(t.Evidence)),
	}
	for _, w := range t.Evidence {
		out.Evidence = append(out.Evidence, wire.BlockEvidence{
			ID: w.ID, At: rfc3339(time.Time(w.At)), Kind: wire.BlockEvidenceKind(w.Kind), Key: w.Key,
			Verdict: wire.BlockEvidenceVerdict(w.Verdict), Weight: w.Weight, Why: w.Why, Record: w.Record, Signer: w.Signer,
			Runs: w.Runs, Note: w.Note, Lift: w.Lift,
		})
	}
	return out, nil
}

// AuditBlock answers POST /v1/blocks/{ref}/audits.
func (s *server) AuditBlock(ctx context.Context, r wire.AuditBlockRequestObject) (wire.AuditBlockResponseObject, error) {
	blocks, e, err := s.blockNamed(ctx, r.Ref)
	if err != nil {
		return nil, err
	}
	said, err := blocks.AddAudit(e.Ref.Digest, levelOf(ctx), block.Audit{
		Auditor: callerOf(ctx), Verdict: string(r.Body.Verdict), Note: r.Body.Note, Lift: r.Body.Lift, At: time.Now(),
	})
	if err != nil {
		return nil, err
	}
	audit.Made(ctx, said.ID())
	trust, err := trustOf(blocks, e)
	return wire.AuditBlock201JSONResponse(trust), err
}
