package attest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

const (
	// maxTrusted bounds how many keys are trusted.
	maxTrusted = 1024
	// maxPEM bounds a file with one key.
	maxPEM = 16 << 10
)

// trusted reads the keys that the operator believes. They are few, and read each
// time, so that a file that is put there or taken away counts at once.
func (a *Attestor) trusted() ([]record.Public, error) {
	root, err := os.OpenRoot(a.cfg.Trusted)
	if a.cfg.Trusted == "" || errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read trusted keys: %w", err)
	}
	defer root.Close() //nolint:errcheck // it was only read
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, fmt.Errorf("read trusted keys: %w", err)
	}
	if len(entries) > maxTrusted {
		return nil, fmt.Errorf("%w: %d trusted keys, %d allowed", errdef.ErrExhausted, len(entries), maxTrusted)
	}
	var keys []record.Public
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".pem") {
			continue
		}
		key, err := readKey(root, e.Name())
		if err != nil {
			return nil, fmt.Errorf("trusted key %s: %w", e.Name(), err)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

func readKey(root *os.Root, name string) (record.Public, error) {
	f, err := root.Open(name)
	if err != nil {
		return record.Public{}, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxPEM))
	if err = errors.Join(err, f.Close()); err != nil {
		return record.Public{}, err
	}
	return record.ParsePublic(data)
}

func (a *Attestor) isTrusted(id string) bool {
	keys, err := a.trusted()
	return err == nil && holds(keys, id) // whoever verifies is told of the error
}

func holds(keys []record.Public, id string) bool {
	return slices.ContainsFunc(keys, func(k record.Public) bool { return k.ID() == id })
}
