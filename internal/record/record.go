// Package record keeps signed records of runs, and says what they are worth.
//
// A Record holds what a run was a function of and what came out, as digests;
// the bytes lie beside it under those digests, so that a run can be done again
// and compared. A record is an in-toto statement in a DSSE envelope, signed with
// the store's Ed25519 key, and names the record before it: one that is changed,
// removed or moved is found, and where. Nothing here runs anything.
//
// One process writes a store, any may check it. docs/formats/record.md describes
// the files, docs/records.md what a record proves and what it does not.
package record

import (
	"time"
)

// Mode says what running it again can show.
type Mode string

// The modes of a run.
const (
	// Deterministic runs are a function of snapshot and input: another outcome
	// means that the record, or this host, is wrong.
	Deterministic Mode = "deterministic"
	// Normal runs saw real time, randomness and scheduling: the same outcome
	// again is evidence, another is none.
	Normal Mode = "normal"
)

// Record is what is signed of one run: the predicate of the statement. All times
// are in UTC. ID, Chain, Hashes, Created and KeyID are the store's to fill in.
type Record struct {
	// ID is a UUID.
	ID string `json:"id"`
	// Chain is the record's place among those of its store.
	Chain Chain `json:"chain"`
	// Parent is the id of the record that this run repeats or follows, or "".
	Parent string `json:"parent,omitempty"`
	// Block is the block that was run, or "" for a bare command.
	Block string `json:"block,omitempty"`
	// User is who asked for the run.
	User string `json:"user,omitempty"`
	Mode Mode   `json:"mode"`

	Environment Environment    `json:"environment"`
	Input       RecordedInput  `json:"input"`
	Output      RecordedOutput `json:"output"`
	// Rules are those that Hashes' canonical ones were made with.
	Rules  Rules  `json:"rules,omitzero"`
	Hashes Hashes `json:"hashes"`

	// Started is when the run began by the clock of the host.
	Started time.Time `json:"started"`
	// Created is when the record was signed.
	Created time.Time `json:"created"`
	// KeyID is the digest of the key that signs, as Public.ID has it.
	KeyID string `json:"key_id"`
}

// Chain is a place in a store. The first record has number 1, and 64 zeros as
// the digest of the one before it.
type Chain struct {
	Seq      uint64 `json:"seq"`
	Previous string `json:"previous"`
}

// Environment is what a run ran in.
type Environment struct {
	// SnapshotTag is what the snapshot was called then. Only its digest counts.
	SnapshotTag string `json:"snapshot_tag,omitempty"`
	// Snapshot is the digest of the snapshot's manifest. It pins memory and the
	// state of devices, and with them the kernel, the agent, the root filesystem
	// and the warm-up, which are in that memory or named by that manifest.
	Snapshot string `json:"snapshot"`
	// Image, Kernel and Agent name parts of what Snapshot pins, where they are
	// known: for people, and for finding the same snapshot elsewhere.
	Image  string `json:"image,omitempty"`
	Kernel string `json:"kernel,omitempty"`
	Agent  string `json:"agent,omitempty"`

	Engine        string `json:"engine"`
	EngineVersion string `json:"engine_version"`
	// Machine and CPU are the models that the engine was asked for.
	Machine   string `json:"machine,omitempty"`
	CPU       string `json:"cpu,omitempty"`
	VCPUs     int    `json:"vcpus,omitempty"`
	MemoryMiB int    `json:"memory_mib,omitempty"`
	// Icount is the shift of the clock that counts instructions: one takes
	// 2^shift nanoseconds. It is nil for a machine whose clock is the host's.
	Icount *int `json:"icount_shift,omitempty"`
}

// Blob names bytes that lie beside a record.
type Blob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

func blobOf(data []byte) Blob { return Blob{Digest(data), int64(len(data))} }

// RecordedFile is a File whose content is a blob.
type RecordedFile struct {
	Path string `json:"path"`
	Mode uint32 `json:"mode"`
	Blob
}

// RecordedInput is an Input whose contents are blobs.
type RecordedInput struct {
	Argv    []string       `json:"argv"`
	Env     []string       `json:"env,omitempty"`
	Cwd     string         `json:"cwd,omitempty"`
	Stdin   Blob           `json:"stdin"`
	Files   []RecordedFile `json:"files,omitempty"`
	Collect []string       `json:"collect,omitempty"`
	// Seed is text in JSON, since many readers of JSON round such numbers.
	Seed   uint64    `json:"seed,string"`
	Start  time.Time `json:"start,omitzero"`
	Limits Limits    `json:"limits"`
}

// RecordedOutput is an Output whose contents are blobs.
type RecordedOutput struct {
	Stdout  Blob           `json:"stdout"`
	Stderr  Blob           `json:"stderr"`
	Exit    int            `json:"exit_code"`
	Signal  string         `json:"signal,omitempty"`
	Failure string         `json:"failure,omitempty"`
	Files   []RecordedFile `json:"files,omitempty"`
	Virtual time.Duration  `json:"virtual_ns"`
	Wall    time.Duration  `json:"wall_ns"`
	Memory  string         `json:"memory_digest,omitempty"`
}

// Hashes are those of a run in both schemes.
type Hashes struct {
	Tine  SchemeHashes `json:"tine-v1"`
	Forge SchemeHashes `json:"forge-v1"`
}

// SchemeHashes are the hashes of one scheme.
type SchemeHashes struct {
	Input string `json:"input"`
	// Output is of the output as it was, Canonical of what the rules make of it.
	// Without rules they are equal.
	Output    string `json:"output"`
	Canonical string `json:"canonical_output"`
}

// Blobs are the contents that the record names, without repetition.
func (r Record) Blobs() []Blob {
	all := []Blob{r.Input.Stdin, r.Output.Stdout, r.Output.Stderr}
	for _, files := range [][]RecordedFile{r.Input.Files, r.Output.Files} {
		for _, f := range files {
			all = append(all, f.Blob)
		}
	}
	seen := map[Blob]bool{}
	var once []Blob
	for _, b := range all {
		if !seen[b] {
			seen[b] = true
			once = append(once, b)
		}
	}
	return once
}

// ClockStart is when the run began by the clock that it saw itself.
func (r Record) ClockStart() time.Time {
	if r.Mode == Deterministic {
		return r.Input.Start
	}
	return r.Started
}

// hashesOf hashes a run in both schemes.
func hashesOf(snapshot string, in Input, out Output, rules Rules, start time.Time) (Hashes, error) {
	canonical, err := rules.Apply(out, start)
	if err != nil {
		return Hashes{}, err
	}
	return Hashes{
		Tine: SchemeHashes{
			Input: HashInput(snapshot, in), Output: HashOutput(out), Canonical: HashOutput(canonical),
		},
		Forge: SchemeHashes{
			Input:     ForgeHash(in.Stdin, nil),
			Output:    ForgeHash(out.Stdout, out.Stderr),
			Canonical: ForgeHash(canonical.Stdout, canonical.Stderr),
		},
	}, nil
}
