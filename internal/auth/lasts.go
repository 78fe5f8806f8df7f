package auth

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	// lastsVersion is that of the file that docs/formats/signing.md describes.
	lastsVersion = 1
	// maxLasts bounds it, and maxLastNames how many tokens it knows, also of
	// those that are gone.
	maxLasts     = 1 << 20
	maxLastNames = 4096
)

// SignedPath is where a state directory keeps what outlives the memory of signed
// requests.
func SignedPath(stateDir string) string { return filepath.Join(stateDir, "signed.last") }

// lasts keeps of each token when the latest request was signed that came in. It
// is on disk before that request comes in: whoever starts next lets in only what
// was signed later, whatever the clock says by then.
type lasts struct {
	path string // "" keeps nothing
	at   map[string]int64
}

type lastsContent struct {
	Version int              `json:"version"`
	Last    map[string]int64 `json:"last"`
}

// openLasts reads the file. With an error it returns lasts that can be used,
// and of which nothing is known.
func openLasts(path string) (*lasts, error) {
	l := &lasts{path: path, at: map[string]int64{}}
	if path == "" {
		return l, nil
	}
	data, err := readBounded(path, maxLasts)
	if errors.Is(err, errdef.ErrNotFound) {
		return l, nil
	}
	if err != nil {
		return l, fmt.Errorf("read %s: %w", path, err)
	}
	at, err := decodeLasts(data)
	if err != nil {
		return l, fmt.Errorf("%s: %w", path, err)
	}
	l.at = at
	return l, nil
}

// maxSecond is later than all requests, as parseSigned has it.
const maxSecond = 1 << 40

func decodeLasts(data []byte) (map[string]int64, error) {
	var c lastsContent
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if c.Version != lastsVersion || c.Last == nil || len(c.Last) > maxLastNames || dec.More() {
		return nil, fmt.Errorf("%w: version %d, of %d tokens", errdef.ErrInvalid, c.Version, len(c.Last))
	}
	for name, at := range c.Last {
		if at < 0 || at > maxSecond {
			return nil, fmt.Errorf("%w: token %.64q: second %d", errdef.ErrInvalid, name, at)
		}
	}
	return c.Last, nil
}

// floors are the earliest moments of signing that are let in after a start.
func (l *lasts) floors() map[string]time.Time {
	floors := make(map[string]time.Time, len(l.at))
	for name, at := range l.at {
		floors[name] = time.Unix(at+1, 0)
	}
	return floors
}

// note keeps that a request comes in that was signed then. It writes at most
// once for each second and token.
func (l *lasts) note(token string, at time.Time) error {
	before, there := l.at[token]
	if l.path == "" || there && at.Unix() <= before {
		return nil
	}
	if !there && len(l.at) >= maxLastNames {
		return fmt.Errorf("%w: %s knows %d tokens already", errdef.ErrUnavailable, filepath.Base(l.path), len(l.at))
	}
	l.at[token] = at.Unix()
	err := l.write()
	if err != nil {
		delete(l.at, token)
		if there {
			l.at[token] = before
		}
		return errdef.WithHint(fmt.Errorf("%w: the disk does not take when the request was signed: %w", errdef.ErrUnavailable, err),
			"make room on the disk of the state directory")
	}
	return nil
}

func (l *lasts) write() error {
	data, err := json.Marshal(lastsContent{Version: lastsVersion, Last: l.at})
	if err != nil {
		return err
	}
	return durable.WriteFile(l.path, append(data, '\n'), 0o600)
}
