package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	version = 1
	// maxLine bounds one line, its end not counted.
	maxLine = 64 << 10
	// timeFormat is RFC 3339 with all nine digits, so that times sort as text.
	timeFormat = "2006-01-02T15:04:05.000000000Z"
)

// Phases of what is remembered.
const (
	// Intent is written before an act, and an act that it cannot be written for
	// does not happen.
	Intent = "intent"
	// Outcome says how an act, or a request that was none, has ended.
	Outcome = "outcome"
	// Event is what happened without a request.
	Event = "event"
	// Note is what the log says of itself.
	Note = "note"
)

// Results of an outcome.
const (
	OK    = "ok"
	Error = "error"
	// Unknown is the result of an act during which the daemon was killed.
	Unknown = "unknown"
)

// Record is one line. The fields are in the order of their names, which is the
// order of the line; docs/formats/audit.md says what each means. V, Seq, TS and
// Prev are the log's own to fill in.
type Record struct {
	Action      string   `json:"action,omitempty"`
	Actor       string   `json:"actor,omitempty"`
	ClockBackUS int64    `json:"clock_back_us,omitempty"`
	Code        string   `json:"code,omitempty"`
	Digest      string   `json:"digest,omitempty"`
	Intent      uint64   `json:"intent,omitempty"`
	LatencyUS   int64    `json:"latency_us,omitempty"`
	Made        []string `json:"made,omitempty"`
	Method      string   `json:"method,omitempty"`
	Note        string   `json:"note,omitempty"`
	Object      string   `json:"object,omitempty"`
	Open        []uint64 `json:"open,omitempty"`
	Path        string   `json:"path,omitempty"`
	Phase       string   `json:"phase"`
	Prev        string   `json:"prev"`
	Remote      string   `json:"remote,omitempty"`
	RequestID   string   `json:"request_id,omitempty"`
	Result      string   `json:"result,omitempty"`
	Route       string   `json:"route,omitempty"`
	Seq         uint64   `json:"seq"`
	Status      int      `json:"status,omitempty"`
	TS          string   `json:"ts"`
	UA          string   `json:"ua,omitempty"`
	V           int      `json:"v"`
}

// Time is when the line was written.
func (r Record) Time() time.Time {
	t, err := time.Parse(timeFormat, r.TS)
	if err != nil {
		return time.Time{} // lines are checked when they are read
	}
	return t
}

// Digest is how the log names content that it does not hold.
func Digest(content []byte) string {
	sum := sha256.Sum256(content)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// hashOf is what the next line has as its prev.
func hashOf(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

// noHash is the prev of the first line of all.
var noHash = strings.Repeat("0", hex.EncodedLen(sha256.Size))

// Bounds of what comes from outside, in bytes.
const (
	maxText  = 1024
	maxShort = 256
	maxMade  = 24 << 10
	// maxOpen is how many intents without an outcome a note lists.
	maxOpen = 1024
)

// bound cuts what came from outside to what a line has room for.
func (r *Record) bound() {
	for _, s := range []*string{&r.Note, &r.Object, &r.Path, &r.Route} {
		*s = clean(*s, maxText)
	}
	for _, s := range []*string{&r.Action, &r.Actor, &r.Code, &r.Digest, &r.Method, &r.Remote, &r.RequestID, &r.UA} {
		*s = clean(*s, maxShort)
	}
	r.Made = boundMade(r.Made)
}

func boundMade(names []string) []string {
	var made []string
	room := maxMade
	for i, name := range names {
		name = clean(name, maxShort)
		if room -= len(name) + len(`"",`); room < 0 {
			return append(made, fmt.Sprintf("... and %d more", len(names)-i))
		}
		made = append(made, name)
	}
	return made
}

// clean makes s printable and at most limit bytes long. What is left has one
// form only in JSON.
func clean(s string, limit int) string {
	plain := func(r rune) bool { return r < unicode.MaxASCII && unicode.IsPrint(r) }
	if len(s) <= limit && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	s = strings.ToValidUTF8(s[:min(len(s), limit)], "")
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, s)
}

// encode returns the canonical form of r, without the end of the line.
func encode(r Record) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(r); err != nil {
		return nil, fmt.Errorf("encode audit line: %w", err)
	}
	line := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	if len(line) > maxLine {
		return nil, fmt.Errorf("%w: audit line of %d bytes", errdef.ErrInvalid, len(line))
	}
	return line, nil
}

// decode reads a line, which must be in its canonical form.
func decode(line []byte) (Record, error) {
	if len(line) > maxLine {
		return Record{}, fmt.Errorf("%w: audit line is longer than %d bytes", errdef.ErrInvalid, maxLine)
	}
	var r Record
	if err := json.Unmarshal(line, &r); err != nil {
		return Record{}, fmt.Errorf("%w: audit line: %w", errdef.ErrInvalid, err)
	}
	if r.V != version {
		return Record{}, fmt.Errorf("%w: audit line of version %d", errdef.ErrUnsupported, r.V)
	}
	if again, err := encode(r); err != nil || !bytes.Equal(again, line) {
		return Record{}, fmt.Errorf("%w: audit line is not in its canonical form", errdef.ErrInvalid)
	}
	return r, r.check()
}

// check sees that what every line has is there.
func (r Record) check() error {
	if _, err := hex.DecodeString(r.Prev); err != nil || len(r.Prev) != len(noHash) || strings.ToLower(r.Prev) != r.Prev {
		return fmt.Errorf("%w: audit line: prev is not a hash", errdef.ErrInvalid)
	}
	if t, err := time.Parse(timeFormat, r.TS); err != nil || t.Format(timeFormat) != r.TS {
		return fmt.Errorf("%w: audit line: ts is not a time", errdef.ErrInvalid)
	}
	if r.Seq == 0 {
		return fmt.Errorf("%w: audit line: no seq", errdef.ErrInvalid)
	}
	switch r.Phase {
	case Intent, Outcome, Event, Note:
		return nil
	}
	return fmt.Errorf("%w: audit line: phase %q", errdef.ErrInvalid, r.Phase)
}
