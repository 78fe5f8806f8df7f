package record

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// What a record is as an in-toto statement.
const (
	StatementType = "https://in-toto.io/Statement/v1"
	PredicateType = "https://tine.dev/ExecutionRecord/v1"

	predicateFamily = "https://tine.dev/ExecutionRecord/"
	payloadType     = "application/vnd.in-toto+json"
)

// maxPayload bounds a statement. Text has at most six bytes for one in JSON.
const maxPayload = 8 * MaxText

// statement is what is signed. Its subjects follow from its predicate.
type statement struct {
	Type          string    `json:"_type"`
	Subject       []subject `json:"subject"`
	PredicateType string    `json:"predicateType"`
	Predicate     Record    `json:"predicate"`
}

// subject is something that the record speaks of: bytes that have this digest.
type subject struct {
	Name   string         `json:"name"`
	Digest subjectDigests `json:"digest"`
}

type subjectDigests struct {
	SHA256 string `json:"sha256"`
}

// subjects are the output as a whole, under its tine-v1 hash, and then each
// stream and file, so that tools that know nothing of records find them.
func subjects(r Record) []subject {
	of := func(name, digest string) subject {
		return subject{name, subjectDigests{strings.TrimPrefix(digest, digestPrefix)}}
	}
	all := []subject{
		of("output", r.Hashes.Tine.Output),
		of("stdout", r.Output.Stdout.Digest),
		of("stderr", r.Output.Stderr.Digest),
	}
	for _, f := range r.Output.Files {
		all = append(all, of("file:"+f.Path, f.Digest))
	}
	return all
}

// encodeStatement returns the one form of a record.
func encodeStatement(r Record) ([]byte, error) {
	return encodeJSON(statement{StatementType, subjects(r), PredicateType, r})
}

// decodeStatement reads a record, which must be in its one form: of another
// version of ours it says errdef.ErrUnsupported, of anything else
// errdef.ErrInvalid.
func decodeStatement(payload []byte) (Record, error) {
	if len(payload) > maxPayload {
		return Record{}, invalid("%d bytes, at most %d", len(payload), maxPayload)
	}
	var kind struct {
		Type          string `json:"_type"`
		PredicateType string `json:"predicateType"`
	}
	if err := json.Unmarshal(payload, &kind); err != nil {
		return Record{}, invalid("statement: %w", err)
	}
	switch ours := strings.HasPrefix(kind.PredicateType, predicateFamily); {
	case kind.Type != StatementType || !ours:
		return Record{}, invalid("a %.100q about %.100q is no record", kind.Type, kind.PredicateType)
	case kind.PredicateType != PredicateType:
		return Record{}, fmt.Errorf("%w: record of type %.100q: this version reads %s", errdef.ErrUnsupported, kind.PredicateType, PredicateType)
	}
	var s statement
	if err := json.Unmarshal(payload, &s); err != nil {
		return Record{}, invalid("statement: %w", err)
	}
	if again, err := encodeStatement(s.Predicate); err != nil || !bytes.Equal(again, payload) {
		return Record{}, invalid("statement is not in its one form")
	}
	return s.Predicate, s.Predicate.check()
}

// encodeJSON writes v without white space and without escapes for HTML.
func encodeJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
