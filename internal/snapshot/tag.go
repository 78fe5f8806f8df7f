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
	// BranchedFrom is the sandbox that it was taken of, or "compact:" and the
	// snapshot that it was made whole from.
	BranchedFrom string `json:"branched_from,omitempty"`
	// Follows is the digest of the snapshot that this one comes after in the
	// history of its sandbox. It keeps nothing: that one may be gone.
	Follows string `json:"follows,omitempty"`
	// Mode is how memory was taken: "full", "diff" or "live".
	Mode string `json:"mode,omitempty"`
	// PauseMS is how long the source stood still, DiffMS how long it took to
	// find and write what differs. Logical bytes are those of the pages that
	// differ, physical ones those of the disk that they take.
	PauseMS           float64 `json:"pause_ms,omitempty"`
	DiffMS            int64   `json:"diff_ms,omitempty"`
	DiffPhysicalBytes int64   `json:"diff_physical_bytes,omitempty"`
	DiffLogicalBytes  int64   `json:"diff_logical_bytes,omitempty"`
	// Owner is the token that took it of its sandbox, and whose it is alone;
	// empty: anybody's. To heed it is for whoever knows tokens.
	Owner string `json:"owner,omitempty"`
	// Auto says that nobody chose the tag: Prune may remove it.
	Auto bool `json:"auto,omitempty"`
	// Warning is something to know before forking it.
	Warning string `json:"warning,omitempty"`
}

// check is for what is read and for what is written alike.
func (f *Facts) check() error {
	if f.Follows == "" {
		return nil
	}
	return checkDigest(f.Follows)
}

// tagFile is the content of tags/TAG.json, and of held/NAME.json.
type tagFile struct {
	Version int    `json:"version"`
	Digest  string `json:"digest"`
	Facts
}

func (t *tagFile) encode() ([]byte, error) {
	if err := t.check(); err != nil {
		return nil, fmt.Errorf("encode tag: %w", err)
	}
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
	if err == nil {
		err = t.check()
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
