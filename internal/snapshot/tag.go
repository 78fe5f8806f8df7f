package snapshot

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// Facts are what is known of one making of a snapshot, and what its digest
// does not depend on.
type Facts struct {
	// CreatedAt is set by Commit when it is zero.
	CreatedAt time.Time `json:"created_at"`
	// BootMS is how long boot and warm-up took, SnapshotMS how long the freeze.
	BootMS     int64 `json:"boot_ms,omitempty"`
	SnapshotMS int64 `json:"snapshot_ms,omitempty"`
	// BranchedFrom is the sandbox that it was taken of.
	BranchedFrom string `json:"branched_from,omitempty"`
	// Warning is something to know before forking it.
	Warning string `json:"warning,omitempty"`
}

// tagFile is the content of tags/TAG.json.
type tagFile struct {
	Version int    `json:"version"`
	Digest  string `json:"digest"`
	Facts
}

func (t *tagFile) encode() ([]byte, error) {
	data, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("%w: encode tag: %w", errdef.ErrInvalid, err)
	}
	if len(data) >= maxJSON {
		return nil, fmt.Errorf("%w: tag of %d bytes, %d allowed", errdef.ErrInvalid, len(data), maxJSON)
	}
	return append(data, '\n'), nil
}

func decodeTag(data []byte) (tagFile, error) {
	var t tagFile
	err := decodeStrict(data, &t, &t.Version)
	if err == nil {
		err = checkDigest(t.Digest)
	}
	if err != nil {
		return tagFile{}, fmt.Errorf("read tag: %w", err)
	}
	return t, nil
}

const (
	maxTag     = 64
	tagLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_"
)

// CheckTag returns errdef.ErrInvalid unless tag can name a snapshot: it must
// match [A-Za-z0-9_][A-Za-z0-9._-]{0,63}.
func CheckTag(tag string) error {
	if tag == "" || len(tag) > maxTag || !strings.Contains(tagLetters, tag[:1]) || strings.Trim(tag, tagLetters+".-") != "" {
		return errdef.WithHint(fmt.Errorf("%w: tag %q", errdef.ErrInvalid, tag),
			"a tag has up to 64 letters, digits, dots, dashes and underscores, and begins with none of . and -")
	}
	return nil
}
