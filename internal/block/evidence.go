package block

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// The kinds of evidence.
const (
	KindStatement = "statement"
	KindAudit     = "audit"
)

// The verdicts: the first two are of statements, the others of audits.
const (
	Verified = "verified"
	Mismatch = "mismatch"
	Passed   = "passed"
	Rejected = "rejected"
)

const (
	maxLine     = 4096
	maxNote     = 1024
	maxRecordID = 128
	maxRuns     = 1000
	// maxEvidence bounds what is kept of one block. Past maxAgreeing nothing is
	// taken that speaks for it, so that there is always room for what speaks
	// against it; nor more than maxPerKey from one key, of which most weighs
	// nothing anyway.
	maxEvidence = 10_000
	maxAgreeing = 9_000
	maxPerKey   = 100
)

// Evidence is one line of what is known of a block: docs/formats/block.md.
type Evidence struct {
	V   int    `json:"v"`
	Seq int    `json:"seq"`
	At  Moment `json:"at"`
	// Prev is the SHA-256 of the line before; empty in the first.
	Prev string `json:"prev"`
	// Block is the digest of the block's file.
	Block string `json:"block"`
	Kind  string `json:"kind"`
	// Key is the id of the key that says it.
	Key     string `json:"key"`
	Verdict string `json:"verdict"`
	// Of a statement: which record was executed again, who had signed that, and
	// how many executions came to this verdict.
	Record string `json:"record,omitempty"`
	Signer string `json:"signer,omitempty"`
	Runs   int    `json:"runs,omitempty"`
	// Of an audit: what was found, and whether it lifts the quarantine.
	Note string `json:"note,omitempty"`
	Lift bool   `json:"lift,omitempty"`
}

// Statement says what came of executing a deterministic record again; of
// another, a mismatch means nothing. Whoever hands it in has checked the
// signatures of statement and record, and that the record is of this block.
type Statement struct {
	Verifier string // id of the key that signed the statement
	Record   string
	// Signer is the id of the key that signed the record.
	Signer  string
	Verdict string // Verified or Mismatch
	// Runs is how many executions came to the verdict; zero is one.
	Runs int
	At   time.Time
}

// Audit is the verdict of somebody who has looked at a block.
type Audit struct {
	Auditor string // id of a key
	Verdict string // Passed or Rejected
	Note    string
	// Lift says that the mismatches so far are explained.
	Lift bool
	At   time.Time
}

// ID names a piece of evidence among all of a registry.
func (e Evidence) ID() string {
	return fmt.Sprintf("%.12s-%d", strings.TrimPrefix(e.Block, "sha256:"), e.Seq)
}

// AddStatement keeps a statement on the block of that digest. One that is there
// already is not kept again. One for which there is no room, and which would
// change nothing, is not kept either: what is returned then has no Seq.
func (r *Registry) AddStatement(digest string, s Statement) (Evidence, error) {
	return r.addEvidence(Evidence{
		V: format, At: Moment(s.At.UTC()), Block: digest, Kind: KindStatement, Key: s.Verifier, Verdict: s.Verdict,
		Record: s.Record, Signer: s.Signer, Runs: max(1, s.Runs),
	})
}

// AddAudit keeps an audit of the block of that digest. The caller must be at
// level Three.
func (r *Registry) AddAudit(digest string, level TrustLevel, a Audit) (Evidence, error) {
	e, err := r.byDigest(digest)
	if err != nil {
		return Evidence{}, err
	}
	if err = Allow(level, ActAudit, e.Ref.Name, e.Spec.MinimumTrustLevel); err != nil {
		return Evidence{}, err
	}
	return r.addEvidence(Evidence{
		V: format, At: Moment(a.At.UTC()), Block: digest, Kind: KindAudit, Key: a.Auditor, Verdict: a.Verdict, Note: a.Note, Lift: a.Lift,
	})
}

// Trust computes what the evidence of the block of that digest comes to.
func (r *Registry) Trust(digest string) (Trust, error) {
	e, err := r.byDigest(digest)
	if err != nil {
		return Trust{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	log, err := r.readLog(digest)
	if err != nil {
		return Trust{}, err
	}
	return Score(log.lines, Policy{Known: r.known, Own: []string{e.Spec.AuthorKey, e.PublisherKey}}), nil
}

func (r *Registry) byDigest(digest string) (Entry, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.entries {
		if e.Ref.Digest == digest {
			return e, nil
		}
	}
	return Entry{}, fmt.Errorf("%w: block with digest %.80q", errdef.ErrNotFound, digest)
}

func (r *Registry) addEvidence(e Evidence) (Evidence, error) {
	if _, err := r.byDigest(e.Block); err != nil {
		return Evidence{}, err
	}
	if err := e.validate(); err != nil {
		return Evidence{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	log, err := r.readLog(e.Block)
	if err != nil {
		return Evidence{}, err
	}
	if old, ok := log.find(e); ok {
		return old, nil
	}
	if err = log.room(e); errors.Is(err, errWeightless) {
		return e, nil
	}
	if err != nil {
		return Evidence{}, err
	}
	e.Seq, e.Prev = len(log.lines)+1, log.last
	if err = r.appendLine(log, e); err != nil {
		return Evidence{}, fmt.Errorf("keep evidence of block %s: %w", e.Block, err)
	}
	return e, nil
}

// validate finds what is wrong with a piece of evidence, but for its place.
func (e Evidence) validate() error {
	wrong := func(format string, args ...any) error {
		return fmt.Errorf("%w: evidence: %s", errdef.ErrInvalid, fmt.Sprintf(format, args...))
	}
	at := time.Time(e.At)
	switch {
	case e.V != format:
		return wrong("version %d", e.V)
	case !digestRE.MatchString(e.Block):
		return wrong("block digest %.80q", e.Block)
	case !keyRE.MatchString(e.Key):
		return wrong("key %.80q is not the id of a key", e.Key)
	case at.Unix() < 0 || at.Year() > 2200:
		return wrong("time %s", at)
	}
	switch e.Kind {
	case KindStatement:
		switch {
		case e.Verdict != Verified && e.Verdict != Mismatch:
			return wrong("verdict %.80q is not %s or %s", e.Verdict, Verified, Mismatch)
		case e.Record == "" || len(e.Record) > maxRecordID || checkText("record", e.Record, maxRecordID) != nil:
			return wrong("record %.80q is not the id of one", e.Record)
		case !keyRE.MatchString(e.Signer):
			return wrong("signer %.80q is not the id of a key", e.Signer)
		case e.Runs < 1 || e.Runs > maxRuns:
			return wrong("%d runs: want 1 to %d", e.Runs, maxRuns)
		case e.Note != "" || e.Lift:
			return wrong("a statement has no note and lifts nothing")
		}
	case KindAudit:
		switch {
		case e.Verdict != Passed && e.Verdict != Rejected:
			return wrong("verdict %.80q is not %s or %s", e.Verdict, Passed, Rejected)
		case e.Record != "" || e.Signer != "" || e.Runs != 0:
			return wrong("an audit is of no record")
		case checkText("note", e.Note, maxNote) != nil:
			return wrong("a note is one line of at most %d bytes", maxNote)
		case e.Lift && e.Verdict != Passed:
			return wrong("an audit that rejects lifts nothing")
		}
	default:
		return wrong("kind %.80q", e.Kind)
	}
	return nil
}

// evidenceLog is the content of a block's file of evidence.
type evidenceLog struct {
	lines []Evidence
	last  string // the hash of the last line
	size  int64  // of the lines that are whole
}

// find returns the line that says the same.
func (l evidenceLog) find(e Evidence) (Evidence, bool) {
	for _, old := range l.lines {
		same := old
		same.Seq, same.Prev = e.Seq, e.Prev
		if sameEvidence(same, e) {
			return old, true
		}
	}
	return Evidence{}, false
}

func sameEvidence(a, b Evidence) bool {
	equal := time.Time(a.At).Equal(time.Time(b.At))
	a.At = b.At
	return equal && a == b
}

// errWeightless says that there is no room for what would change nothing.
var errWeightless = errors.New("it would change nothing")

// room refuses what there is no room for. After so many statements that agree
// another one of the same key weighs nothing, and of any key next to nothing. A
// mismatch changes nothing only while the block is in quarantine already.
func (l evidenceLog) room(e Evidence) error {
	ofKey := 0
	for _, old := range l.lines {
		if old.Key == e.Key && old.Verdict == e.Verdict {
			ofKey++
		}
	}
	agreeing := e.Verdict == Verified || e.Verdict == Passed && !e.Lift
	full := len(l.lines) >= maxEvidence || agreeing && len(l.lines) >= maxAgreeing
	switch {
	case e.Verdict == Verified && (ofKey >= maxPerKey || full):
		return errWeightless
	case e.Verdict == Mismatch && ofKey >= maxPerKey && Score(l.lines, Policy{}).Status == Quarantined:
		return errWeightless
	case full:
		return fmt.Errorf("%w: evidence of block %s: there are %d pieces", errdef.ErrExhausted, e.Block, len(l.lines))
	case e.Kind == KindAudit && ofKey >= maxPerKey:
		return fmt.Errorf("%w: evidence of block %s: key %s has said %q %d times", errdef.ErrExhausted, e.Block, e.Key, e.Verdict, ofKey)
	}
	return nil
}

// logPath is where a digest becomes a path. It is for digests that validate or
// the registry has seen.
func (r *Registry) logPath(digest string) string {
	return filepath.Join(r.dir, evidenceDir, strings.TrimPrefix(digest, "sha256:")+".jsonl")
}

// readLog reads the evidence of a block. A line without an end was never said to
// be kept, and is passed over.
func (r *Registry) readLog(digest string) (evidenceLog, error) {
	path := r.logPath(digest)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return evidenceLog{}, nil
	}
	if err == nil && info.Size() > maxEvidence*maxLine {
		err = fmt.Errorf("%w: it has %d bytes", errDamaged, info.Size())
	}
	var data []byte
	if err == nil {
		data, err = readBounded(path, maxEvidence*maxLine)
	}
	var log evidenceLog
	if err == nil {
		log, err = decodeLog(data, digest)
	}
	if err != nil {
		return evidenceLog{}, fmt.Errorf("read evidence of block %s: %w", digest, err)
	}
	return log, nil
}

// decodeLog reads lines, each of which names the one before it.
func decodeLog(data []byte, digest string) (evidenceLog, error) {
	var log evidenceLog
	for len(data) > 0 {
		line, rest, whole := bytes.Cut(data, []byte("\n"))
		if !whole {
			break
		}
		e, err := decodeLine(line)
		if err != nil {
			return evidenceLog{}, fmt.Errorf("line %d: %w", len(log.lines)+1, err)
		}
		if e.Seq != len(log.lines)+1 || e.Prev != log.last || e.Block != digest || e.Seq > maxEvidence {
			return evidenceLog{}, fmt.Errorf("line %d: %w: it does not follow the one before", len(log.lines)+1, errDamaged)
		}
		log.lines, log.last, log.size = append(log.lines, e), hashLine(line), log.size+int64(len(line))+1
		data = rest
	}
	return log, nil
}

// decodeLine reads a line, which must be just as encodeLine writes it.
func decodeLine(line []byte) (Evidence, error) {
	if len(line) > maxLine {
		return Evidence{}, fmt.Errorf("%w: it is longer than %d bytes", errDamaged, maxLine)
	}
	var head struct {
		V int `json:"v"`
	}
	if json.Unmarshal(line, &head) == nil && head.V > format {
		return Evidence{}, fmt.Errorf("%w: evidence of version %d", errdef.ErrUnsupported, head.V)
	}
	var e Evidence
	err := json.Unmarshal(line, &e)
	if err == nil {
		err = e.validate()
	}
	if err != nil {
		return Evidence{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if again, err := encodeLine(e); err != nil || !bytes.Equal(again, line) {
		return Evidence{}, fmt.Errorf("%w: it is not in its canonical form", errDamaged)
	}
	return e, nil
}

func encodeLine(e Evidence) ([]byte, error) {
	line, err := marshal(e)
	if err == nil && len(line) > maxLine {
		err = fmt.Errorf("%w: evidence of %d bytes", errdef.ErrInvalid, len(line))
	}
	return line, err
}

func hashLine(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

// appendLine adds a line and waits for the disk. When it fails, the file is as
// it was, or has half a line, which the next one overwrites.
func (r *Registry) appendLine(log evidenceLog, e Evidence) (err error) {
	line, err := encodeLine(e)
	if err != nil {
		return err
	}
	path := r.logPath(e.Block)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return durable.Describe("open", path, err)
	}
	defer func() { err = errors.Join(durable.Describe("write", path, err), f.Close()) }()
	if err = f.Truncate(log.size); err != nil {
		return err
	}
	if _, err = f.WriteAt(append(line, '\n'), log.size); err == nil {
		err = f.Sync()
	}
	if err != nil {
		return errors.Join(err, f.Truncate(log.size))
	}
	if log.size == 0 {
		return durable.SyncDir(filepath.Dir(path))
	}
	return nil
}
