package api

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
)

const (
	runPattern    = "POST /v1/runs"
	verifyPattern = "POST /v1/verify"
	bundlePattern = "GET /v1/records/{id}/bundle"

	// maxRunBody has room for all of an input in base64, and maxVerifyBody for
	// the record of a run of which input and output are large.
	maxRunBody    = 176 << 20
	maxVerifyBody = 192 << 20
	// maxRuns is how many runs and verifications may be under way or wait.
	maxRuns = 64
	// answerTime is how long a client may take to accept an answer that may be
	// large.
	answerTime = 2 * time.Minute
	// maxMillis is the most milliseconds that nanoseconds can tell.
	maxMillis = int64(1<<63-1) / int64(time.Millisecond)

	defaultFileMode = 0o644
)

var errNoRecords = fmt.Errorf("%w: this daemon keeps no records", errdef.ErrUnsupported)

// enterRun takes a place among the runs and verifications.
func (s *server) enterRun() (leave func(), err error) {
	if s.Attestor == nil {
		return nil, errNoRecords
	}
	select {
	case s.runs <- struct{}{}:
		return func() { <-s.runs }, nil
	default:
		return nil, fmt.Errorf("%w: %d runs and verifications are under way", errdef.ErrExhausted, cap(s.runs))
	}
}

// reserve takes places for n machines within the bounds of who makes ctx's
// request. A sandbox counts by itself; a machine that runs something for the
// record is none, and must not be the way around those bounds. It counts as what
// a fork of the snapshot would have, and without one as a small machine.
func (s *server) reserve(ctx context.Context, n int, ref string) (release func(), err error) {
	id := auth.From(ctx)
	if s.Auth == nil || id.Ambient {
		return func() {}, nil
	}
	shape := vmm.Machine{MemoryMiB: runMemoryMiB, VCPUs: 1}
	if snap, err := s.Snapshots.Resolve(ref); ref != "" && err == nil { // else the run is refused
		shape = snap.Manifest.Machine
	}
	one := shareOf(s.Sandboxes.LimitsOf(vmm.Limits{}, shape), shape)
	return s.Auth.Reserve(id, one.Times(n), func() auth.Share { return shareOfToken(s.Sandboxes.List(), id.Name, "") })
}

// runMemoryMiB is the memory of templates that do not ask for another.
const runMemoryMiB = 256

// createRun answers POST /v1/runs. When the client goes away its context ends,
// and the run with it.
func (s *server) createRun(w http.ResponseWriter, r *http.Request) {
	leave, err := s.enterRun()
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer leave()
	var body wire.RunRequest
	if err = decodeBody(r, &body); err != nil {
		s.failRequest(w, r, err)
		return
	}
	req, err := runRequest(body)
	if err == nil {
		err = mayUse(r.Context(), s.Snapshots, req.Snapshot, s.ShareSandboxes)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	req.User = auth.From(r.Context()).Name
	if strings.Contains(r.Header.Get("Accept"), ndjson) {
		err = writeLines(r.Context(), w, func(ctx context.Context, out *lineWriter) (any, error) { return s.runAlong(ctx, req, out) })
	} else {
		err = s.runBuffered(w, r, req)
	}
	if err != nil {
		s.fail(w, r, err)
	}
}

// runBuffered runs, and answers with all that came of it.
func (s *server) runBuffered(w http.ResponseWriter, r *http.Request, req attest.Request) error {
	if most := max(s.maxOutput, deterministic.DefaultOutput); req.Input.Limits.Output > most {
		return errdef.WithHint(fmt.Errorf("%w: output of up to %d bytes in one answer: at most %d", errdef.ErrInvalid, req.Input.Limits.Output, most),
			"have it streamed: Accept: "+ndjson)
	}
	result, err := s.run(r.Context(), req)
	if err != nil {
		return err
	}
	out := runResult(result)
	out.Stdout, out.StdoutBase64 = asText(result.Output.Stdout)
	out.Stderr, out.StderrBase64 = asText(result.Output.Stderr)
	return answerLarge(w, out)
}

// runAlong runs, and passes on what the command writes. The command does not
// wait for a client that is slow to read it.
func (s *server) runAlong(ctx context.Context, req attest.Request, out *lineWriter) (any, error) {
	out.patience = answerTime
	q := newSpool(out)
	req.Stdout, req.Stderr = q.stream("stdout"), q.stream("stderr")
	result, err := s.run(ctx, req)
	if err = errors.Join(err, q.end()); err != nil {
		return nil, err
	}
	return runResult(result), nil
}

// run runs and counts.
func (s *server) run(ctx context.Context, req attest.Request) (attest.Result, error) {
	if req.Mode != record.Normal {
		release, err := s.reserve(ctx, 1, req.Snapshot)
		if err != nil {
			return attest.Result{}, err
		}
		defer release()
	}
	result, err := s.Attestor.Run(ctx, req)
	s.Metrics.Run(modeOf(req.Mode), outcomeOf(result.Output, err))
	if err == nil {
		audit.Made(ctx, result.Record.Record.ID)
	}
	return result, err
}

// modeOf keeps what a client makes up out of the labels.
func modeOf(mode record.Mode) string {
	switch mode {
	case "":
		return string(record.Deterministic)
	case record.Deterministic, record.Normal:
		return string(mode)
	}
	return "other"
}

// outcomeOf is a run's, in one of few words.
func outcomeOf(out record.Output, err error) string {
	switch {
	case err != nil:
		return "error"
	case out.Failure != "":
		return strings.ReplaceAll(out.Failure, " ", "_")
	case out.Exit != 0:
		return "failed"
	}
	return "ok"
}

// decodeBody reads a body of JSON, and gives its memory back.
func decodeBody(r *http.Request, into any) error {
	data, err := takeBody(r)
	if err != nil {
		return err
	}
	if len(data) == 0 {
		return io.EOF
	}
	if err = json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("decode JSON body: %w", err)
	}
	return nil
}

// runRequest is what a body asks for. What it leaves out, and most of what is
// wrong with it, is the attestor's to find.
func runRequest(b wire.RunRequest) (attest.Request, error) {
	req := attest.Request{Snapshot: b.Snapshot, Mode: record.Mode(b.Mode), MemoryDigest: b.MemoryDigest}
	req.Rules = record.Rules{Streams: b.Rules.Streams, Files: b.Rules.Files}
	req.Input = record.Input{Argv: b.Args, Cwd: b.Cwd, Stdin: b.StdinBase64, Collect: b.Collect}
	in := &req.Input
	if b.Snapshot == "" {
		return req, fmt.Errorf("%w: snapshot is missing", errdef.ErrInvalid)
	}
	if b.Stdin != "" {
		if b.StdinBase64 != nil {
			return req, fmt.Errorf("%w: set either stdin or stdin_base64, not both", errdef.ErrInvalid)
		}
		in.Stdin = []byte(b.Stdin)
	}
	var err error
	if in.Env, err = environ(b.Env); err != nil {
		return req, err
	}
	if in.Seed, err = parseSeed(b.Seed); err != nil {
		return req, err
	}
	if in.Start, err = parseInstant("start", b.Start); err != nil {
		return req, err
	}
	if in.Limits, err = runLimits(b.Limits); err != nil {
		return req, err
	}
	for _, f := range b.Files {
		mode, modeErr := parseMode(f.Mode)
		if modeErr != nil {
			return req, modeErr
		}
		in.Files = append(in.Files, record.File{Path: f.Path, Mode: cmp.Or(mode, defaultFileMode), Data: f.Data})
	}
	return req, nil
}

// parseSeed reads a number, or text with one.
func parseSeed(raw json.RawMessage) (uint64, error) {
	text := string(raw)
	if text == "" || text == "null" {
		return 0, nil
	}
	if strings.HasPrefix(text, `"`) {
		if err := json.Unmarshal(raw, &text); err != nil {
			return 0, fmt.Errorf("%w: seed: %w", errdef.ErrInvalid, err)
		}
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: seed %.40q is no number from 0 to 2^64-1", errdef.ErrInvalid, text)
	}
	return seed, nil
}

// parseInstant reads a time; "" is the zero one.
func parseInstant(what, text string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return t, fmt.Errorf("%w: %s %.60q is no time as in 2025-01-31T12:00:00Z", errdef.ErrInvalid, what, text)
	}
	return t.UTC(), nil
}

func runLimits(l wire.RunLimits) (record.Limits, error) {
	for _, ms := range []int64{l.VirtualMS, l.WallMS} {
		if ms < 0 || ms > maxMillis {
			return record.Limits{}, fmt.Errorf("%w: limit of %d ms", errdef.ErrInvalid, ms)
		}
	}
	return record.Limits{
		Virtual: time.Duration(l.VirtualMS) * time.Millisecond, Wall: time.Duration(l.WallMS) * time.Millisecond, Output: l.OutputBytes,
	}, nil
}

// runResult is all of a result but the output.
func runResult(res attest.Result) wire.RunResult {
	r := res.Record.Record
	out := wire.RunResult{
		ID: r.ID, Digest: res.Record.Digest, Mode: string(r.Mode), Snapshot: r.Environment.Snapshot, SnapshotTag: r.Environment.SnapshotTag,
		Seed: strconv.FormatUint(r.Input.Seed, 10), Start: instant(r.Input.Start),
		InputHash: r.Hashes.Tine.Input, OutputHash: r.Hashes.Tine.Output, CanonicalOutputHash: r.Hashes.Tine.Canonical,
		ExitCode: exitCodeOf(r.Output), Signal: r.Output.Signal, Failure: r.Output.Failure,
		VirtualNS: int64(r.Output.Virtual), WallMS: millis(r.Output.Wall), MemoryDigest: r.Output.Memory,
		Record: json.RawMessage(res.Record.Bytes),
	}
	for _, f := range res.Output.Files {
		out.Files = append(out.Files, wire.RunFile{Path: f.Path, Mode: fmt.Sprintf("%04o", f.Mode), Data: f.Data})
	}
	return out
}

// instant is a time as JSON has it; "" for none.
func instant(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// exitCodeOf is an exit code as exec tells it.
func exitCodeOf(out record.RecordedOutput) int64 {
	switch out.Failure {
	case record.NotFound:
		return exitNoCommand
	case record.NotExecutable:
		return exitNotExec
	case record.TimedOut:
		return exitTimeout
	}
	if n, err := parseSignal(strings.TrimPrefix(out.Signal, "SIG")); out.Signal != "" && err == nil {
		return -int64(n)
	}
	return int64(out.Exit)
}

// asText is data as text; or as it is, for base64, where it is not UTF-8 or
// would take more than twice its room in JSON.
func asText(data []byte) (text string, binary []byte) {
	if !utf8.Valid(data) {
		return "", data
	}
	const escape = 6 // bytes of \u0001
	room := len(data)
	for _, c := range data {
		if c < ' ' && !bytes.Contains([]byte("\n\r\t"), []byte{c}) {
			room += escape - 1
		}
	}
	if room > 2*len(data) {
		return "", data
	}
	return string(data), nil
}

// answerLarge answers with JSON that may be large.
func answerLarge(w http.ResponseWriter, v any) error {
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false) // it is no page, and < takes six bytes otherwise
	if err := enc.Encode(v); err != nil {
		return err
	}
	// A writer without deadlines is a test's: it does not stall.
	control := http.NewResponseController(w)
	_ = control.SetWriteDeadline(time.Now().Add(answerTime))
	defer func() { _ = control.SetWriteDeadline(time.Time{}) }()
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(body.Bytes()) // the client went away: the record is kept
	return nil
}
