package block

import (
	"math"
	"slices"
)

// The statuses of a block.
const (
	// Unproven: nothing that weighs anything is known.
	Unproven = "unproven"
	// Scored: all that is known speaks for the block.
	Scored = "scored"
	// Disputed: something speaks against it.
	Disputed = "disputed"
	// Quarantined: a mismatch was reproduced, and no audit has lifted that.
	Quarantined = "quarantined"
)

// The numbers of the formula: docs/blocks.md.
const (
	z = 1.96 // 95 %
	// perKey is how many observations of one key weigh something: the first 1,
	// the second 1/2, the third 1/4.
	perKey = 3
	// ownFactor is for those who check what they made themselves, strangerFactor
	// for keys that the operator does not know, which share the place of one.
	ownFactor      = 0.25
	strangerFactor = 0.5
	// auditWeight is how many observations an audit is worth; maxAuditors how
	// many auditors count.
	auditWeight = 2
	maxAuditors = 3
	// reproduced is how many executions of one record make a mismatch a
	// reproducible one.
	reproduced = 2
	// stranger stands for all unknown keys; no key's id begins so.
	stranger = "?"
)

// Policy says whose word counts for what.
type Policy struct {
	// Known are keys of which the operator knows that they belong to different
	// people; nil: none are.
	Known func(key string) bool
	// Own are the keys of whoever made or published the block.
	Own []string
}

// Trust is what evidence comes to.
type Trust struct {
	Score  TrustScore `json:"score"`
	Status string     `json:"status"`
	// For and Against are the sums of the weights.
	For     float64 `json:"for"`
	Against float64 `json:"against"`
	// Evidence has every piece, in the order in which it came.
	Evidence []Weighed `json:"evidence"`
}

// Weighed is a piece of evidence, what it weighs, and why that is not more.
type Weighed struct {
	ID string `json:"id"`
	Evidence
	Weight float64 `json:"weight"`
	Why    string  `json:"why,omitempty"`
}

// Score weighs evidence. It is a function of the evidence, in its order, and of
// the policy, and of nothing else.
func Score(evidence []Evidence, p Policy) Trust {
	s := scorer{
		policy: p, count: map[string]int{}, seen: map[string]bool{}, lifted: lastLift(evidence), final: lastAudits(evidence),
		mismatches: map[string]int{},
	}
	t := Trust{Status: Unproven, Evidence: make([]Weighed, 0, len(evidence))}
	for i, e := range evidence {
		w := Weighed{ID: e.ID(), Evidence: e}
		w.Weight, w.Why = s.weigh(i, e)
		if e.Verdict == Verified || e.Verdict == Passed {
			t.For += w.Weight
		} else {
			t.Against += w.Weight
		}
		t.Evidence = append(t.Evidence, w)
	}
	switch {
	case s.quarantined:
		t.Status = Quarantined
		return t
	case t.Against > 0:
		t.Status = Disputed
	case t.For > 0:
		t.Status = Scored
	}
	t.Score = TrustScore{wilson(t.For, t.Against)}
	return t
}

// wilson is the lower bound of the 95 % interval for the share of what agrees,
// rounded down to four decimals. The conversions keep the compiler from fusing
// operations, which would change the last digit on some machines.
func wilson(agree, against float64) float64 {
	n := agree + against
	if n == 0 {
		return 0
	}
	root := math.Sqrt(float64(float64(agree*against)/n) + float64(z*z)/4)
	low := (agree + float64(z*z)/2 - float64(z*root)) / (n + float64(z*z))
	const digits = 10_000
	// A value that is a multiple but for the last bit stays that multiple.
	return min(1, max(0, math.Floor(float64(low*digits)+1e-9)/digits))
}

// scorer has what the pieces before have used up.
type scorer struct {
	policy      Policy
	count       map[string]int  // of weighted observations, by key and side
	seen        map[string]bool // key and record that have weighed something
	lifted      int             // index of the last lift, or -1
	final       map[string]int  // by auditor: the index of what they said last
	auditors    int
	mismatches  map[string]int // executions by record, since the last lift
	quarantined bool
}

func lastLift(evidence []Evidence) int {
	for i, e := range slices.Backward(evidence) {
		if e.Lift {
			return i
		}
	}
	return -1
}

// lastAudits finds what each auditor has said last.
func lastAudits(evidence []Evidence) map[string]int {
	last := map[string]int{}
	for i, e := range evidence {
		if e.Kind == KindAudit {
			last[e.Key] = i
		}
	}
	return last
}

func (s *scorer) weigh(i int, e Evidence) (weight float64, why string) {
	switch {
	case e.Kind == KindAudit:
		return s.weighAudit(i, e)
	case e.Verdict == Mismatch:
		return s.weighMismatch(i, e)
	}
	key, factor, why := e.Key, 1.0, ""
	switch {
	case e.Key == e.Signer || slices.Contains(s.policy.Own, e.Key):
		factor, why = ownFactor, "checks their own work"
	case s.policy.Known == nil || !s.policy.Known(e.Key):
		key, factor, why = stranger, strangerFactor, "unknown key: all of them count as one"
	}
	share, used := s.share(key, e)
	if share == 0 {
		return 0, used
	}
	return share * factor, why
}

// weighMismatch takes every key's word in full, known or not: a mismatch that is
// false costs an audit, one that is passed over costs the trust.
func (s *scorer) weighMismatch(i int, e Evidence) (weight float64, why string) {
	if i < s.lifted {
		why = "lifted by an audit"
	} else if s.mismatches[e.Record] += e.Runs; s.mismatches[e.Record] >= reproduced {
		s.quarantined = true
		why = "reproduced"
	}
	weight, used := s.share(e.Key, e)
	if weight == 0 && why == "" {
		why = used
	}
	return weight, why
}

// share is what the next observation of a key weighs: half of the one before,
// and nothing after perKey of them. The same record counts once.
func (s *scorer) share(key string, e Evidence) (weight float64, why string) {
	side := key + "\n" + e.Verdict
	again := side + "\n" + e.Record
	n := s.count[side]
	switch {
	case s.seen[again]:
		return 0, "the same record again"
	case n >= perKey:
		return 0, "the key has said enough"
	}
	s.seen[again] = true
	s.count[side]++
	return 1 / float64(int(1)<<n), ""
}

// weighAudit counts the last word of each of the first auditors.
func (s *scorer) weighAudit(i int, e Evidence) (weight float64, why string) {
	switch {
	case slices.Contains(s.policy.Own, e.Key):
		return 0, "audits their own work"
	case s.final[e.Key] != i:
		return 0, "replaced by a later audit"
	case s.auditors >= maxAuditors:
		return 0, "enough auditors"
	}
	s.auditors++
	return auditWeight, ""
}
