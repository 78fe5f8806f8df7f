package bench

import (
	"fmt"
	"time"

	"github.com/tinevm/tine/internal/vmm"
)

// Version is the version of Result as JSON; docs/bench.md describes it.
const Version = 1

// The end points.
const (
	Ping = "ping" // first answer: the agent
	Eval = "eval" // first answer: the warm interpreter
	Exec = "exec" // first exec: /bin/true
)

// The units.
const (
	Milliseconds = "ms"
	MiB          = "MiB"
)

// The targets.
const (
	floorLimit = 1.10 // times the floor
	forkFactor = 20   // times faster than a cold boot
	poolLimit  = 5    // ms
)

// Result is what a bench saw.
type Result struct {
	Version       int         `json:"version"`
	At            time.Time   `json:"at"`
	Snapshot      string      `json:"snapshot"`
	Digest        string      `json:"digest"`
	Engine        string      `json:"engine"`
	EngineVersion string      `json:"engine_version"`
	Machine       vmm.Machine `json:"machine"`
	CPUs          int         `json:"cpus"` // of the host
	Rounds        int         `json:"rounds"`
	// NoFloor is why nothing has a floor; empty when there is one.
	NoFloor string `json:"no_floor,omitempty"`
	// NotMeasured is what the engine has not, and why there is nothing about it.
	NotMeasured []string   `json:"not_measured,omitempty"`
	Rows        []Row      `json:"rows"`
	Parallel    []Parallel `json:"parallel"`
	// Branches is all that there is when branches were measured.
	Branches []BranchRow `json:"branches,omitempty"`
	// Isolation is all that there is when isolation was measured.
	Isolation []IsolationRow `json:"isolation,omitempty"`
}

// Row is one thing that was measured on one machine at a time.
type Row struct {
	Step  string  `json:"step"`
	Point string  `json:"point,omitempty"` // where the measurement ends
	Unit  string  `json:"unit"`
	Tine  Summary `json:"tine"`
	// Floor is missing where there is nothing by hand to compare with.
	Floor   *Summary `json:"floor,omitempty"`
	Ratio   float64  `json:"ratio,omitempty"` // of the medians
	Targets []Target `json:"targets,omitempty"`
}

// Parallel is a number of forks made side by side.
type Parallel struct {
	Forks   int      `json:"forks"`
	Point   string   `json:"point"`
	Tine    Group    `json:"tine"`
	Floor   *Group   `json:"floor,omitempty"`
	Ratio   float64  `json:"ratio,omitempty"` // of the medians of Wall
	Targets []Target `json:"targets,omitempty"`
}

// Group is what became of parallel forks. Times are in ms from the request.
type Group struct {
	Answered int     `json:"answered"` // in the worst round
	Wall     Summary `json:"wall_ms"`  // until the last had answered
	Each     Summary `json:"each_ms"`  // until each had answered
	Error    string  `json:"error,omitempty"`
}

// Target is what a measurement should come to.
type Target struct {
	Goal  string  `json:"goal"`
	Value float64 `json:"value"` // what it came to
	Met   bool    `json:"met"`
}

// The steps that have rows of their own.
const (
	stepRoundTrip = "round trip"
	stepPrivate   = "private memory, idle"
	stepShared    = "shared memory, idle"
	stepFreeze    = "snapshot: freeze"
	stepCommit    = "snapshot: commit"
	stepLogical   = "snapshot: logical size"
	stepDisk      = "snapshot: size on disk"
)

// addRow adds a row of samples: Tine's, and the floor's where there are any.
func (r *Result) addRow(name, point, unit string, samples [][]float64) {
	row := Row{Step: name, Point: point, Unit: unit, Tine: summarize(samples[0])}
	if len(samples) > 1 && len(samples[1]) > 0 {
		floor := summarize(samples[1])
		row.Floor, row.Ratio = &floor, ratio(row.Tine.Median, floor.Median)
	}
	r.Rows = append(r.Rows, row)
}

// judge fills in the targets.
func (r *Result) judge() {
	cold := map[string]float64{}
	for _, row := range r.Rows {
		if row.Step == string(coldBoot) {
			cold[row.Point] = row.Tine.Median
		}
	}
	for i := range r.Rows {
		row := &r.Rows[i]
		row.Targets = append(floorTarget(row.Floor != nil && row.Step != stepShared, row.Ratio), row.own(cold)...)
	}
	for i := range r.Parallel {
		p := &r.Parallel[i]
		p.Targets = append(floorTarget(p.Floor != nil, p.Ratio), Target{
			Goal:  fmt.Sprintf("%d of %d answered", p.Forks, p.Forks),
			Value: float64(p.Tine.Answered), Met: p.Tine.Answered == p.Forks,
		})
	}
}

// own returns the targets that are the row's own: those of a first answer.
func (r *Row) own(cold map[string]float64) []Target {
	if r.Point != Ping && r.Point != Eval {
		return nil
	}
	switch start(r.Step) {
	case coldFork:
		faster := ratio(cold[r.Point], r.Tine.Median)
		return []Target{{Goal: fmt.Sprintf("%dx faster than cold boot", forkFactor), Value: faster, Met: faster >= forkFactor}}
	case poolFork:
		return []Target{{Goal: fmt.Sprintf("at most %d ms", poolLimit), Value: r.Tine.Median, Met: r.Tine.Median <= poolLimit}}
	}
	return nil
}

// floorTarget is the target of all that has a floor.
func floorTarget(has bool, ratio float64) []Target {
	if !has {
		return nil
	}
	return []Target{{Goal: "within 10% of the floor", Value: ratio, Met: ratio > 0 && ratio <= floorLimit}}
}
