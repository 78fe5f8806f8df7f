package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strconv"
	"time"

	"github.com/tinevm/tine/internal/wire"
)

// Runs for the record.
type (
	// RunResult says what a command came to, and has the record of it.
	RunResult = wire.RunResult
	// VerifyRequest names a record to look at, or holds one.
	VerifyRequest = wire.VerifyRequest
	// VerifyReport says what has become of a record.
	VerifyReport = wire.VerifyReport
	// VerifyDifference is one between a recorded output and a fresh one.
	VerifyDifference = wire.VerifyDifference
)

// What a record is run in.
const (
	RunDeterministic = "deterministic"
	RunNormal        = "normal"
)

// What VerifyReport.Result says.
const (
	Verified      = "verified"
	Mismatch      = "mismatch"
	CannotCompare = "cannot compare"
)

// What VerifyReport.Chain says.
const (
	ChainLinked    = "linked"
	ChainBroken    = "broken"
	ChainElsewhere = "elsewhere"
)

// RunRequest is a command, and all that its outcome is a function of.
type RunRequest struct {
	// Snapshot is a tag or a digest.
	Snapshot string
	// Mode is RunDeterministic unless it says otherwise.
	Mode string
	Args []string
	Env  map[string]string
	// Dir is the working directory.
	Dir string
	// Stdin is what the command reads: at most 64 MiB.
	Stdin []byte
	// Files are written before the command starts: at most 64 MiB together.
	Files []RunFile
	// Collect are the paths of files to be read when the command has ended.
	Collect []string
	// Seed is what the guest's random numbers are made of.
	Seed uint64
	// Start is the guest's clock when the command starts; zero is the default.
	Start  time.Time
	Limits RunLimits
	// StreamRules and FileRules say what of the output does not count.
	StreamRules, FileRules []string
	// MemoryDigest asks for the digest of the guest's memory at the end.
	MemoryDigest bool
	// Stdout and Stderr are given the output as it comes; where both are nil it
	// is in the result. Report is told how it goes. Any may be nil. All are
	// called from the calling goroutine.
	Stdout, Stderr io.Writer
	Report         func(Progress)
}

// RunFile is a file that goes into a guest.
type RunFile struct {
	Path string
	// Mode is 0644 where it is 0.
	Mode fs.FileMode
	Data []byte
}

// RunLimits end a run that goes too far. Zero is the daemon's default.
type RunLimits struct {
	// Virtual is by the guest's clock, Wall by the host's; both in whole
	// milliseconds.
	Virtual, Wall time.Duration
	// Output is of stdout and stderr together, in bytes.
	Output int64
}

// Run runs a command in a machine of its own and returns when a signed record of
// it is kept. That the command fails is said in the result, not as an error.
// When ctx ends the run does, and there is no record.
func (c *Client) Run(ctx context.Context, req RunRequest) (RunResult, error) {
	w := wire.RunRequest{
		Snapshot: req.Snapshot, Mode: req.Mode, Args: req.Args, Env: req.Env, Cwd: req.Dir, StdinBase64: req.Stdin, Collect: req.Collect,
		Seed:         json.RawMessage(`"` + strconv.FormatUint(req.Seed, 10) + `"`),
		Limits:       wire.RunLimits{VirtualMS: req.Limits.Virtual.Milliseconds(), WallMS: req.Limits.Wall.Milliseconds(), OutputBytes: req.Limits.Output},
		Rules:        wire.RunRules{Streams: req.StreamRules, Files: req.FileRules},
		MemoryDigest: req.MemoryDigest,
	}
	if !req.Start.IsZero() {
		w.Start = req.Start.UTC().Format(time.RFC3339Nano)
	}
	for _, f := range req.Files {
		file := wire.RunFile{Path: f.Path, Data: f.Data}
		if f.Mode != 0 {
			file.Mode = octal(f.Mode)
		}
		w.Files = append(w.Files, file)
	}
	if req.Stdout == nil && req.Stderr == nil {
		return longCall[RunResult](ctx, c, "/v1/runs", w, nil)
	}
	return c.runAlong(ctx, w, req)
}

// maxStream bounds all lines of a run: its output, mostly in base64, and files.
const maxStream = 1 << 30

func (c *Client) runAlong(ctx context.Context, w wire.RunRequest, req RunRequest) (RunResult, error) {
	var out RunResult
	r := request{method: http.MethodPost, path: "/v1/runs"}
	if err := r.encode(w); err != nil {
		return out, err
	}
	r.header.Set("Accept", ndjson)
	resp, err := c.send(ctx, r)
	if err != nil {
		return out, err
	}
	defer func() { _ = resp.Body.Close() }()
	result, err := readLines(io.LimitReader(resp.Body, maxStream), func(line wire.ProgressLine) error {
		switch {
		case line.Progress != nil && req.Report != nil:
			req.Report(*line.Progress)
		case line.Output != nil:
			return req.show(*line.Output)
		}
		return nil
	})
	if err != nil {
		return out, err
	}
	return out, json.Unmarshal(result, &out)
}

// show passes output on.
func (req *RunRequest) show(piece wire.RunOutput) error {
	to := req.Stdout
	if piece.Stream == "stderr" {
		to = req.Stderr
	}
	if to == nil {
		return nil
	}
	data := piece.Base64
	if piece.Text != "" {
		data = []byte(piece.Text)
	}
	if _, err := to.Write(data); err != nil {
		return fmt.Errorf("pass %s on: %w", piece.Stream, err)
	}
	return nil
}

// Verify looks at a record, runs it again and compares. Whatever is wrong with
// the record is in the report. report, which may be nil, is told how it goes.
func (c *Client) Verify(ctx context.Context, req VerifyRequest, report func(Progress)) (VerifyReport, error) {
	return longCall[VerifyReport](ctx, c, "/v1/verify", req, report)
}
