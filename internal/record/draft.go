package record

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"
)

// Draft is what a run's caller knows of it: a store makes a record of it.
type Draft struct {
	Parent, Block, User string
	Mode                Mode
	Environment         Environment
	Input               Input
	Output              Output
	Rules               Rules
	// Started is when the run began by the clock of the host.
	Started time.Time
}

// build returns the record without what only the store knows, and the contents
// of its blobs. What cannot be recorded is errdef.ErrInvalid.
func (d Draft) build() (Record, map[string][]byte, error) {
	contents := map[string][]byte{}
	r := Record{
		Parent: d.Parent, Block: d.Block, User: d.User, Mode: d.Mode, Environment: d.Environment,
		Rules: d.Rules.plain(), Started: d.Started.Round(0).UTC(),
		Input:  recordInput(d.Input, contents),
		Output: recordOutput(d.Output, contents),
	}
	if err := r.checkRun(); err != nil {
		return Record{}, nil, fmt.Errorf("record run: %w", err)
	}
	var err error
	if r.Hashes, err = hashesOf(d.Environment.Snapshot, d.Input, d.Output, d.Rules, r.ClockStart()); err != nil {
		return Record{}, nil, fmt.Errorf("record run: %w", err)
	}
	return r, contents, nil
}

func recordInput(in Input, contents map[string][]byte) RecordedInput {
	start := in.Start
	if !start.IsZero() {
		start = start.Round(0).UTC()
	}
	return RecordedInput{
		Argv: in.Argv, Env: in.Env, Cwd: in.Cwd, Stdin: keep(in.Stdin, contents),
		Files: keepFiles(in.Files, contents), Collect: in.Collect,
		Seed: in.Seed, Start: start, Limits: in.Limits,
	}
}

func recordOutput(out Output, contents map[string][]byte) RecordedOutput {
	return RecordedOutput{
		Stdout: keep(out.Stdout, contents), Stderr: keep(out.Stderr, contents),
		Exit: out.Exit, Signal: out.Signal, Failure: out.Failure, Files: keepFiles(out.Files, contents),
		Virtual: out.Virtual, Wall: out.Wall, Memory: out.Memory,
	}
}

func keep(data []byte, contents map[string][]byte) Blob {
	b := blobOf(data)
	contents[b.Digest] = data
	return b
}

func keepFiles(files []File, contents map[string][]byte) []RecordedFile {
	var kept []RecordedFile
	for _, f := range files {
		kept = append(kept, RecordedFile{f.Path, f.Mode, keep(f.Data, contents)})
	}
	return kept
}

// Source has the contents of blobs, by their digests. What it returns has that
// digest; what it does not have is errdef.ErrNotFound.
type Source interface {
	Blob(b Blob) ([]byte, error)
}

// LoadInput returns what a record's run was given, so that it can be run again.
func LoadInput(r Record, from Source) (Input, error) {
	in := Input{
		Argv: r.Input.Argv, Env: r.Input.Env, Cwd: r.Input.Cwd, Collect: r.Input.Collect,
		Seed: r.Input.Seed, Start: r.Input.Start, Limits: r.Input.Limits,
	}
	var err error
	if in.Stdin, err = from.Blob(r.Input.Stdin); err != nil {
		return Input{}, fmt.Errorf("load stdin of record %s: %w", r.ID, err)
	}
	in.Files, err = loadFiles(r, r.Input.Files, from)
	return in, err
}

// LoadOutput returns what a record's run came to.
func LoadOutput(r Record, from Source) (Output, error) {
	out := Output{
		Exit: r.Output.Exit, Signal: r.Output.Signal, Failure: r.Output.Failure,
		Virtual: r.Output.Virtual, Wall: r.Output.Wall, Memory: r.Output.Memory,
	}
	var err error
	if out.Stdout, err = from.Blob(r.Output.Stdout); err != nil {
		return Output{}, fmt.Errorf("load stdout of record %s: %w", r.ID, err)
	}
	if out.Stderr, err = from.Blob(r.Output.Stderr); err != nil {
		return Output{}, fmt.Errorf("load stderr of record %s: %w", r.ID, err)
	}
	out.Files, err = loadFiles(r, r.Output.Files, from)
	return out, err
}

func loadFiles(r Record, files []RecordedFile, from Source) ([]File, error) {
	var loaded []File
	for _, f := range files {
		data, err := from.Blob(f.Blob)
		if err != nil {
			return nil, fmt.Errorf("load file %s of record %s: %w", f.Path, r.ID, err)
		}
		loaded = append(loaded, File{f.Path, f.Mode, data})
	}
	return loaded, nil
}

// newID returns a random UUID, which Forge's clients can read as an execution id.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it does not fail: crypto/rand ends the program instead
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	s := hex.EncodeToString(b[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
