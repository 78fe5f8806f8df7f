package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	// toldVersion is that of the file of what was told, which
	// docs/formats/tokens.md describes.
	toldVersion = 1
	// maxTold bounds it.
	maxTold = 1 << 20
)

// tokenWatch finds credentials that were added, changed or removed, by whatever
// means, also while there was no daemon: which the audit log has told of is kept
// in a file.
type tokenWatch struct {
	guard *auth.Guard
	path  string
	told  map[string]string // digests, by name
}

// toldTokens is the content of the file.
type toldTokens struct {
	Version int               `json:"version"`
	Tokens  map[string]string `json:"tokens"`
}

// openTokenWatch reads what was told. What cannot be read is told again.
func openTokenWatch(guard *auth.Guard, path string, log *slog.Logger) *tokenWatch {
	told, err := readTold(path)
	if err != nil {
		log.Warn("the audit log tells of all tokens again: of which it has told is not known", slog.Any("error", err))
	}
	return &tokenWatch{guard: guard, path: path, told: told}
}

func readTold(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	data, err := io.ReadAll(io.LimitReader(f, maxTold))
	if err != nil {
		return nil, err
	}
	told, err := decodeTold(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return told, nil
}

func decodeTold(data []byte) (map[string]string, error) {
	var told toldTokens
	if err := json.Unmarshal(data, &told); err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if told.Version != toldVersion {
		return nil, fmt.Errorf("%w: version %d", errdef.ErrUnsupported, told.Version)
	}
	return told.Tokens, nil
}

// tokenChange is a line for the audit log.
type tokenChange struct{ action, name, about string }

// changes are what is new since the log was told, by name.
func (t *tokenWatch) changes(known map[string]auth.Known) []tokenChange {
	var all []tokenChange
	for _, name := range slices.Sorted(maps.Keys(known)) {
		switch before, there := t.told[name]; {
		case !there:
			all = append(all, tokenChange{"token.added", name, known[name].About})
		case before != known[name].Digest:
			all = append(all, tokenChange{"token.changed", name, known[name].About})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.told)) {
		if _, there := known[name]; !there {
			all = append(all, tokenChange{"token.removed", name, ""})
		}
	}
	return all
}

// settle notes that the log was told of what is known.
func (t *tokenWatch) settle(known map[string]auth.Known) error {
	t.told = make(map[string]string, len(known))
	for name, k := range known {
		t.told[name] = k.Digest
	}
	data, err := json.Marshal(toldTokens{Version: toldVersion, Tokens: t.told})
	if err != nil {
		return fmt.Errorf("encode told tokens: %w", err)
	}
	return durable.WriteFile(t.path, append(data, '\n'), 0o600)
}

// tellTokens writes what has become of the credentials. The lines come before
// the note that they are there: a daemon that is killed in between rather says
// it twice.
func (w *witness) tellTokens(ctx context.Context) {
	known, ok := w.tokens.guard.Known()
	if !ok {
		return
	}
	changes := w.tokens.changes(known)
	if len(changes) == 0 {
		return
	}
	for _, c := range changes {
		w.write(ctx, c.action, c.name, c.about)
	}
	if err := w.tokens.settle(known); err != nil {
		w.logger.WarnContext(ctx, "tokens will be told of again after a restart", slog.Any("error", err))
	}
}
