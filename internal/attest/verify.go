package attest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tinevm/tine/internal/block"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/record"
)

// MaxRuns bounds how often a record is run again at once.
const MaxRuns = 1000

// AtOnce is how many runs of one record are under way: more than one, so that
// they run under each other's load.
const AtOnce = 4

// VerifyRequest asks whether a record is true.
type VerifyRequest struct {
	// ID is that of a record of the store, or the beginning of it. Bundle is a
	// record from elsewhere: what record.WriteBundle has written, or an
	// envelope. It is one of the two.
	ID     string
	Bundle []byte
	// Keys are trusted beside the store's own, and those of Config.Trusted.
	Keys []record.Public
	// Runs is how often to run it; 0 is once.
	Runs int
	// Believe keeps what is found out as evidence for or against the block also
	// when one of Keys has signed the record: whoever chose them is believed.
	Believe bool
	// Offline looks at signature, contents and chain, and runs nothing.
	Offline bool
}

// Report says what has become of a verification.
type Report struct {
	// Result is Mismatch for a record that is refuted, or is not what was
	// signed; CannotCompare where something is missing to say so.
	Result record.Result `json:"result"`
	ID     string        `json:"id,omitempty"`
	Block  string        `json:"block,omitempty"`
	Mode   record.Mode   `json:"mode,omitempty"`
	// KeyID is who says to have signed it, and Chain whether it stands in the
	// chain of this store: "linked", "broken", or "elsewhere".
	KeyID    string           `json:"key_id,omitempty"`
	Chain    string           `json:"chain,omitempty"`
	Findings []record.Finding `json:"findings"`
	// Missing is what it takes to compare, and is not there.
	Missing []string `json:"missing"`
	// Runs is how often it was run, Agreed how often it came to the same.
	Runs   int `json:"runs"`
	Agreed int `json:"agreed"`
	// Verdict is of the first run that did not agree, or of the last.
	Verdict *record.Verdict `json:"verdict,omitempty"`
}

// What Report.Chain says.
const (
	Linked    = "linked"
	Broken    = "broken"
	Elsewhere = "elsewhere"
)

// Verify looks at a record, runs it again and compares. Whatever is wrong with
// the record is in the report, also that there is none; errors are about the
// host. What it finds out about the run of a block is kept as evidence.
func (a *Attestor) Verify(ctx context.Context, req VerifyRequest) (Report, error) {
	if req.Runs < 0 || req.Runs > MaxRuns {
		return Report{}, fmt.Errorf("%w: %d runs: 1 to %d", errdef.ErrInvalid, req.Runs, MaxRuns)
	}
	store, err := a.Records(ctx)
	if err != nil {
		return Report{}, err
	}
	data, from, err := find(store, req)
	if flaw, ok := errors.AsType[*flaw](err); ok {
		return flaw.report(), nil
	}
	if err != nil {
		return Report{}, err
	}
	trusted, err := a.trusted()
	if err != nil {
		return Report{}, err
	}
	keys := slices.Concat([]record.Public{store.Public()}, trusted, req.Keys)
	v := record.Verify(data, record.Trust{Keys: keys, Now: time.Now()}, from)
	rep := examine(store, v)
	if !v.OK || rep.Chain == Broken || req.Offline {
		return rep, nil
	}
	err = a.runAgain(ctx, &rep, v.Envelope.Record, from, max(req.Runs, 1))
	if err == nil && (req.Believe || rep.Chain == Linked || holds(trusted, rep.KeyID)) {
		err = a.keepEvidence(ctx, store, rep, v.Envelope.Record)
	}
	return rep, err
}

// flaw is what is wrong with a record from elsewhere that is none.
type flaw struct{ error }

func (f *flaw) report() Report {
	kind := record.Malformed
	if errors.Is(f.error, errdef.ErrUnsupported) {
		kind = record.Unsupported
	}
	rep := Report{Result: record.CannotCompare, Findings: []record.Finding{{Kind: kind, Detail: f.Error()}}, Missing: []string{}}
	if refutes(rep.Findings[0]) {
		rep.Result = record.Mismatch
	}
	return rep
}

// find returns an envelope's bytes, and what has the contents. Its error may be
// a flaw.
func find(store *record.Store, req VerifyRequest) ([]byte, record.Source, error) {
	if (req.ID == "") == (req.Bundle == nil) {
		return nil, nil, fmt.Errorf("%w: name a record, or hand one over", errdef.ErrInvalid)
	}
	if req.ID != "" {
		e, err := store.Get(req.ID)
		return e.Bytes, store, err
	}
	b, err := record.ReadBundle(bytes.NewReader(req.Bundle))
	if err != nil { // memory can always be read
		return nil, nil, &flaw{err}
	}
	if !b.Whole() {
		return b.Envelope.Bytes, store, nil // it may be one of ours
	}
	if err = asWritten(b, req.Bundle); err != nil {
		return nil, nil, &flaw{err}
	}
	return b.Envelope.Bytes, b, nil
}

// asWritten sees that a bundle is in its one form: what lies between its files
// must say nothing either.
func asWritten(b *record.Bundle, data []byte) error {
	if id := b.Key.ID(); id != b.Envelope.Record.KeyID {
		return fmt.Errorf("%w: the bundle's key %s is not the one that the record names", errdef.ErrInvalid, id)
	}
	c := &comparer{rest: data}
	if err := record.WriteBundle(c, b.Envelope, *b.Key, b); err != nil {
		return err
	}
	if len(c.rest) > 0 {
		return fmt.Errorf("%w: %d bytes follow the bundle", errdef.ErrInvalid, len(c.rest))
	}
	return nil
}

// comparer takes only what it holds.
type comparer struct {
	rest []byte
	at   int
}

// Write fails at the first byte that differs.
func (c *comparer) Write(p []byte) (int, error) {
	for i := range p {
		if i >= len(c.rest) || c.rest[i] != p[i] {
			return i, fmt.Errorf("%w: byte %d of the bundle is not what it was written with", errdef.ErrInvalid, c.at+i)
		}
	}
	c.rest, c.at = c.rest[len(p):], c.at+len(p)
	return len(p), nil
}

// examine says what can be said without running anything.
func examine(store *record.Store, v record.Verification) Report {
	rep := Report{Result: record.CannotCompare, Findings: v.Findings, Missing: []string{}}
	for _, b := range v.Missing {
		rep.Missing = append(rep.Missing, fmt.Sprintf("content %s of %d bytes", b.Digest, b.Size))
	}
	if v.Envelope != nil {
		r := v.Envelope.Record
		rep.ID, rep.Block, rep.Mode, rep.KeyID, rep.Chain = r.ID, r.Block, r.Mode, r.KeyID, Elsewhere
		if r.KeyID == store.Public().ID() {
			rep.Chain = Linked
			if err := store.Linked(*v.Envelope); err != nil {
				rep.Chain = Broken
				rep.Findings = append(rep.Findings, record.Finding{Kind: "chain", Detail: err.Error()})
			}
		}
	}
	if slices.ContainsFunc(rep.Findings, refutes) {
		rep.Result = record.Mismatch
	}
	return rep
}

// refutes reports whether a finding says that a record is not what was signed,
// rather than that it cannot be judged here.
func refutes(f record.Finding) bool {
	return !slices.Contains([]string{record.UnknownKey, record.Future, record.Unsupported}, f.Kind)
}

// runAgain runs a record again, and completes the report.
func (a *Attestor) runAgain(ctx context.Context, rep *Report, r record.Record, from record.Source, runs int) error {
	in, err := record.LoadInput(r, from)
	if errors.Is(err, errdef.ErrNotFound) {
		return nil // rep.Missing has it
	}
	if err != nil {
		return err
	}
	w, missing, err := a.planAgain(ctx, r, in)
	if err != nil || missing != "" {
		rep.Missing = append(rep.Missing, missing)
		return err
	}
	verdicts := make([]record.Verdict, runs)
	work, ctx := errgroup.WithContext(ctx)
	work.SetLimit(AtOnce)
	done := 0
	for i := range verdicts {
		work.Go(func() (err error) {
			fresh, err := w.run(ctx)
			if err == nil {
				verdicts[i], err = record.Compare(r, from, fresh)
			}
			return err
		})
		done++
		progress.Report(ctx, "verify", fmt.Sprintf("run %d of %d", done, runs))
	}
	if err = work.Wait(); errors.Is(err, errdef.ErrTimeout) || errors.Is(err, errdef.ErrConflict) {
		rep.Missing = append(rep.Missing, err.Error())
		return nil
	} else if err != nil {
		return err
	}
	rep.judge(verdicts)
	return nil
}

// planAgain makes ready to run a record again. missing says why it cannot be.
func (a *Attestor) planAgain(ctx context.Context, r record.Record, in record.Input) (w *work, missing string, err error) {
	// A twin would be another snapshot than the record's.
	if _, err = a.cfg.Snapshots.Resolve(r.Environment.Snapshot); errors.Is(err, errdef.ErrNotFound) {
		return nil, fmt.Sprintf("snapshot %s (%s), of image %s", r.Environment.Snapshot, r.Environment.SnapshotTag, r.Environment.Image), nil
	} else if err != nil {
		return nil, "", err
	}
	req := Request{Snapshot: r.Environment.Snapshot, Mode: r.Mode, Input: in, MemoryDigest: r.Output.Memory != ""}
	w, err = a.plan(ctx, req)
	// Invalid: another version of this program may have allowed more.
	if errors.Is(err, errdef.ErrUnsupported) || errors.Is(err, errdef.ErrConflict) || errors.Is(err, errdef.ErrInvalid) {
		return nil, err.Error(), nil
	}
	return w, "", err
}

// judge sums up the verdicts of all runs.
func (rep *Report) judge(verdicts []record.Verdict) {
	rep.Runs = len(verdicts)
	rep.Result = record.Verified
	for _, v := range verdicts {
		if v.Result == record.Verified {
			rep.Agreed++
		}
		if rep.Verdict == nil || rep.Result == record.Verified {
			rep.Verdict, rep.Result = &v, v.Result
		}
	}
	rep.Missing = append(rep.Missing, rep.Verdict.Missing...)
}

// keepEvidence says to the registry what the runs of a block's record have
// shown.
func (a *Attestor) keepEvidence(ctx context.Context, store *record.Store, rep Report, r record.Record) error {
	ref, err := block.ParseRef(r.Block)
	if err != nil || r.Mode != record.Deterministic || rep.Result == record.CannotCompare {
		return nil //nolint:nilerr // a bare command is no block, and no evidence of one
	}
	blocks, err := a.Blocks(ctx)
	if err != nil {
		return err
	}
	verdict, runs := block.Verified, rep.Agreed
	if rep.Result == record.Mismatch {
		verdict, runs = block.Mismatch, rep.Runs-rep.Agreed
	}
	_, err = blocks.AddStatement(ref.Digest, block.Statement{
		Verifier: store.Public().ID(), Record: r.ID, Signer: r.KeyID, Verdict: verdict, Runs: runs, At: time.Now(),
	})
	if errors.Is(err, errdef.ErrNotFound) {
		return nil // it is not registered here
	}
	return err
}
