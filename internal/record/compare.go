package record

import (
	"fmt"
	"strconv"
	"time"
)

// Result of running a recorded run again.
type Result string

// The results.
const (
	// Verified: what counts is the same.
	Verified Result = "verified"
	// Mismatch: it is not, though it was run the same way.
	Mismatch Result = "mismatch"
	// CannotCompare: it was not, or could not be, run the same way.
	CannotCompare Result = "cannot compare"
)

// Fresh is a run that was done again.
type Fresh struct {
	Environment Environment
	Input       Input
	Output      Output
	// Started is when it began by the clock of the host.
	Started time.Time
}

// Verdict says what running again has shown.
type Verdict struct {
	Result Result `json:"result"`
	// Hashes are those that were compared.
	Hashes []HashPair `json:"hashes"`
	// Differences say where the outputs differ.
	Differences []Difference `json:"differences,omitempty"`
	// Missing is what it takes to compare, and is not there.
	Missing []string `json:"missing,omitempty"`
	// Notes are what else there is to know.
	Notes []string `json:"notes,omitempty"`
	// Worth says what such a result proves.
	Worth string `json:"worth"`
}

// HashPair is a hash that was recorded and the one of the fresh run.
type HashPair struct {
	Name     string `json:"name"`
	Recorded string `json:"recorded"`
	Fresh    string `json:"fresh"`
	Equal    bool   `json:"equal"`
	// Counts: the result goes by it.
	Counts bool `json:"counts"`
}

// Compare says whether a fresh run came to what r recorded. Of a deterministic
// run the raw output counts, and the memory if both have its digest; of a normal
// one the canonical output. old has the recorded contents, for diffs; it may be
// nil, and may lack them. The error is about r's rules.
func Compare(r Record, old Source, fresh Fresh) (Verdict, error) {
	start := fresh.Started
	if r.Mode == Deterministic {
		start = fresh.Input.Start
	}
	hashes, err := hashesOf(fresh.Environment.Snapshot, fresh.Input, fresh.Output, r.Rules, start)
	if err != nil {
		return Verdict{}, fmt.Errorf("compare with record %s: %w", r.ID, err)
	}
	v := Verdict{Hashes: pairs(r, hashes, fresh.Output), Worth: worth(r.Mode)}
	same := true
	for _, p := range v.Hashes {
		same = same && (p.Equal || !p.Counts)
	}
	v.Missing = missing(r, hashes, fresh)
	others := otherEngine(r.Environment, fresh.Environment)
	switch {
	case len(v.Missing) > 0:
		v.Result = CannotCompare
	case same:
		v.Result, v.Notes = Verified, others
	case len(others) > 0:
		v.Result, v.Missing = CannotCompare, others
	default:
		v.Result = Mismatch
	}
	if r.Hashes.Tine.Output != hashes.Tine.Output || !same {
		v.Differences = differences(r, old, fresh.Output)
	}
	if v.Result == Verified && len(v.Differences) > 0 {
		v.Notes = append(v.Notes, "the raw outputs differ, the canonical ones do not")
	}
	return v, nil
}

func pairs(r Record, fresh Hashes, out Output) []HashPair {
	exact := r.Mode == Deterministic
	of := func(name, a, b string, counts bool) HashPair { return HashPair{name, a, b, a == b, counts} }
	all := []HashPair{
		of("tine-v1 output", r.Hashes.Tine.Output, fresh.Tine.Output, exact),
		of("tine-v1 canonical output", r.Hashes.Tine.Canonical, fresh.Tine.Canonical, !exact),
		of("forge-v1 output", r.Hashes.Forge.Output, fresh.Forge.Output, exact),
		of("forge-v1 canonical output", r.Hashes.Forge.Canonical, fresh.Forge.Canonical, !exact),
	}
	if r.Output.Memory != "" && out.Memory != "" {
		all = append(all, of("guest memory", r.Output.Memory, out.Memory, exact))
	}
	return all
}

// missing is what it takes to do the same, and was not there.
func missing(r Record, hashes Hashes, fresh Fresh) []string {
	var all []string
	if r.Environment.Snapshot != fresh.Environment.Snapshot {
		all = append(all, fmt.Sprintf("snapshot %s: this ran in %s", r.Environment.Snapshot, fresh.Environment.Snapshot))
	} else if r.Hashes.Tine.Input != hashes.Tine.Input {
		all = append(all, "the recorded input: this ran with another")
	}
	return all
}

// otherEngine are the differences between two environments that outputs may
// depend on though the snapshot is the same.
func otherEngine(was, is Environment) []string {
	var all []string
	for _, f := range []struct{ what, was, is string }{
		{"engine", was.Engine + " " + was.EngineVersion, is.Engine + " " + is.EngineVersion},
		{"machine", was.Machine, is.Machine},
		{"cpu", was.CPU, is.CPU},
		{"icount shift", shift(was), shift(is)},
		{"processors", strconv.Itoa(was.VCPUs), strconv.Itoa(is.VCPUs)},
		{"memory", strconv.Itoa(was.MemoryMiB) + " MiB", strconv.Itoa(is.MemoryMiB) + " MiB"},
	} {
		if f.was != f.is {
			all = append(all, fmt.Sprintf("%s %s: this ran with %s", f.what, f.was, f.is))
		}
	}
	return all
}

func shift(e Environment) string {
	if e.Icount == nil {
		return "none"
	}
	return strconv.Itoa(*e.Icount)
}

func worth(mode Mode) string {
	if mode == Deterministic {
		return "a deterministic run is a function of its snapshot and input: one mismatch on the same engine refutes the record, " +
			"and a match shows that this output is what that input comes to"
	}
	return "a normal run depends on time, randomness and scheduling that no record holds: a match is evidence and no proof, " +
		"and a mismatch refutes nothing"
}
