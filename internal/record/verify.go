package record

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// defaultSkew is how far another host's clock may be ahead of this one's.
const defaultSkew = 5 * time.Minute

// Trust is what a verifier believes in.
type Trust struct {
	// Keys are those whose signature counts.
	Keys []Public
	// Now is the present, and Skew how far a record's times may be after it;
	// zero is five minutes.
	Now  time.Time
	Skew time.Duration
}

// Kinds of finding.
const (
	// Malformed: it is no record, or not in its one form.
	Malformed = "malformed"
	// Unsupported: a record of a version that this one does not know.
	Unsupported = "unsupported"
	// BadSignature: it is not what the key has signed that it names.
	BadSignature = "signature"
	// UnknownKey: no trusted key has signed it.
	UnknownKey = "unknown-key"
	// Future: it says that it was made later than now.
	Future = "future"
	// BadContent: bytes beside it are not those that it names.
	BadContent = "content"
	// BadHash: its hashes are not those of its own contents.
	BadHash = "hash"
)

// Finding is what is wrong with a record.
type Finding struct {
	Kind   string `json:"kind"`
	Detail string `json:"detail"`
}

// Verification says what can be said of a record without running it again.
type Verification struct {
	// OK: a trusted key has signed it, and there are no findings. Missing
	// contents are none.
	OK       bool      `json:"ok"`
	Findings []Finding `json:"findings"`
	// Missing are the contents that are not at hand: without those of its input
	// it cannot be run again, without those of its output there is no diff.
	Missing []Blob `json:"missing,omitempty"`
	// Envelope is the record; nil when there is none to be read.
	Envelope *Envelope `json:"-"`
}

// Verify judges an envelope, and with from the contents beside it; from may be
// nil. It runs nothing, and it does not see the chain: see Store.Linked.
func Verify(data []byte, trust Trust, from Source) Verification {
	v := Verification{Findings: []Finding{}}
	e, err := Parse(data)
	if err != nil {
		kind := Malformed
		if errors.Is(err, errdef.ErrUnsupported) {
			kind = Unsupported
		}
		v.add(kind, err)
		return v
	}
	v.Envelope = &e
	v.judgeSignature(e, trust)
	v.judgeTimes(e.Record, trust)
	if from != nil {
		v.judgeContents(e.Record, from)
	}
	v.OK = len(v.Findings) == 0
	return v
}

func (v *Verification) add(kind string, err error) {
	v.Findings = append(v.Findings, Finding{kind, err.Error()})
}

func (v *Verification) judgeSignature(e Envelope, trust Trust) {
	i := slices.IndexFunc(trust.Keys, func(k Public) bool { return k.ID() == e.Record.KeyID })
	if i < 0 {
		v.add(UnknownKey, fmt.Errorf("record %s is signed by key %s, which is not trusted here", e.Record.ID, e.Record.KeyID))
		return
	}
	if err := e.verifySignature(trust.Keys[i]); err != nil {
		v.add(BadSignature, err)
	}
}

func (v *Verification) judgeTimes(r Record, trust Trust) {
	skew := trust.Skew
	if skew == 0 {
		skew = defaultSkew
	}
	for _, t := range []time.Time{r.Started, r.Created} {
		if ahead := t.Sub(trust.Now); ahead > skew {
			v.add(Future, fmt.Errorf("record %s is of %s, which is %s after now", r.ID, t.Format(time.RFC3339), ahead.Round(time.Second)))
			return
		}
	}
}

// judgeContents reads all contents, and where all are there hashes them as they
// were hashed.
func (v *Verification) judgeContents(r Record, from Source) {
	before := len(v.Findings)
	for _, b := range r.Blobs() {
		switch _, err := from.Blob(b); {
		case errors.Is(err, errdef.ErrNotFound):
			v.Missing = append(v.Missing, b)
		case err != nil:
			v.add(BadContent, err)
		}
	}
	if len(v.Missing) > 0 || len(v.Findings) > before {
		return
	}
	if err := rehash(r, from); err != nil {
		v.add(BadHash, err)
	}
}

// rehash sees that a record's hashes are those of its contents.
func rehash(r Record, from Source) error {
	in, err := LoadInput(r, from)
	if err != nil {
		return err
	}
	out, err := LoadOutput(r, from)
	if err != nil {
		return err
	}
	hashes, err := hashesOf(r.Environment.Snapshot, in, out, r.Rules, r.ClockStart())
	if err != nil {
		return err
	}
	if hashes != r.Hashes {
		return invalid("%s has other hashes than its contents", r.ID)
	}
	return nil
}

// Linked sees that e is in this store's chain, and that the records before and
// after it agree. It returns errdef.ErrNotFound when it is no record of this
// store, and errdef.ErrConflict when the chain does not hold it as it is.
func (s *Store) Linked(e Envelope) error {
	s.mu.Lock()
	all := slices.Clip(s.places)
	s.mu.Unlock()
	i := slices.IndexFunc(all, func(p place) bool { return p.id == e.Record.ID })
	if i < 0 {
		return fmt.Errorf("%w: record %s in this store", errdef.ErrNotFound, e.Record.ID)
	}
	if here, err := readPlace(s.cfg.Dir, all[i]); err != nil || here.Digest != e.Digest {
		return conflict(e, "is another record in this store", err)
	}
	before := firstDigest
	if i > 0 {
		prev, err := readPlace(s.cfg.Dir, all[i-1])
		if err != nil || all[i-1].seq+1 != e.Record.Chain.Seq {
			return conflict(e, "lacks the one before it", err)
		}
		before = prev.Digest
	}
	if e.Record.Chain.Previous != before {
		return conflict(e, "names another record as the one before it", nil)
	}
	if i+1 == len(all) {
		return nil
	}
	next, err := readPlace(s.cfg.Dir, all[i+1])
	if err != nil || next.Record.Chain.Previous != e.Digest {
		return conflict(e, "is not the one that the next names", err)
	}
	return nil
}

func conflict(e Envelope, what string, cause error) error {
	err := fmt.Errorf("%w: record %s, number %d, %s", errdef.ErrConflict, e.Record.ID, e.Record.Chain.Seq, what)
	if cause != nil {
		return fmt.Errorf("%w: %w", err, plain(cause))
	}
	return err
}
