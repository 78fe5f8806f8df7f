package workspace

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	// version is the version of a record on disk.
	version = 1
	// maxRecord bounds what is read of one.
	maxRecord = 64 << 10

	maxName = 64
	letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"

	suffix   = ".json"
	lockFile = "lock"
)

// record is the content of NAME.json: docs/formats/workspace.md.
type record struct {
	Version        int       `json:"version"`
	Name           string    `json:"name"`
	Snapshot       string    `json:"snapshot"`
	MemoryLimitMiB int       `json:"memory_limit_mib,omitempty"`
	CreatedAt      time.Time `json:"created_at"`
	// Claim is the value of Label that the sandbox has, which no other has.
	Claim string `json:"claim"`
	// SandboxID is empty until the sandbox is there: until then nobody has been
	// told of the workspace.
	SandboxID string `json:"sandbox_id,omitempty"`
}

// errDamaged is in the category errdef.ErrUnavailable.
var errDamaged = fmt.Errorf("%w: it is damaged", errdef.ErrUnavailable)

// CheckName returns errdef.ErrInvalid unless name can be a workspace's.
func CheckName(name string) error {
	if name == "" || len(name) > maxName || strings.Trim(name, letters) != "" {
		return fmt.Errorf("%w: workspace name must be 1-64 chars, ASCII alnum or dash/underscore", errdef.ErrInvalid)
	}
	return nil
}

// path is where a name becomes a path, and the only place. It is for names
// that CheckName has seen.
func (s *Store) path(name string) string { return filepath.Join(s.dir, name+suffix) }

// names returns the names that have a record.
func (s *Store) names() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list workspaces: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), suffix); ok && CheckName(name) == nil {
			names = append(names, name)
		}
	}
	return names, nil
}

// write brings a record to the disk, as a whole.
func (s *Store) write(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err == nil && len(data) >= maxRecord {
		err = fmt.Errorf("%w: record of %d bytes", errdef.ErrInvalid, len(data))
	}
	if err == nil {
		err = durable.WriteFile(s.path(r.Name), append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write workspace %s: %w", r.Name, err)
	}
	return nil
}

// read reads a record. It returns fs.ErrNotExist when there is none.
func (s *Store) read(name string) (record, error) {
	f, err := os.Open(s.path(name))
	if err != nil {
		return record{}, fmt.Errorf("read workspace %s: %w", name, err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	_ = f.Close() // only read
	if err != nil {
		return record{}, fmt.Errorf("read workspace %s: %w: %w", name, errDamaged, err)
	}
	return decodeRecord(data, name)
}

// remove removes a record that may be gone already, for good.
func (s *Store) remove(name string) error {
	err := os.Remove(s.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = durable.SyncDir(s.dir)
	}
	if err != nil {
		return fmt.Errorf("remove workspace %s: %w", name, err)
	}
	return nil
}

// decodeRecord reads the record of the workspace name. It returns
// errdef.ErrUnsupported for one that another version of Tine wrote, and
// errdef.ErrUnavailable for one that is damaged.
func decodeRecord(data []byte, name string) (record, error) {
	var head struct {
		Version int `json:"version"`
	}
	if len(data) > maxRecord {
		return record{}, fmt.Errorf("record of workspace %s: %w: it is too large", name, errDamaged)
	}
	if err := json.Unmarshal(data, &head); err == nil && head.Version > version {
		return record{}, fmt.Errorf("%w: record of workspace %s: version %d", errdef.ErrUnsupported, name, head.Version)
	}
	var r record
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	err := d.Decode(&r)
	if err == nil && d.More() {
		err = errors.New("something follows it")
	}
	if err == nil && (r.Version != version || r.Name != name || r.Claim == "" || r.MemoryLimitMiB < 0) {
		err = fmt.Errorf("version %d, name %q, claim %q, limit %d", r.Version, r.Name, r.Claim, r.MemoryLimitMiB)
	}
	if err != nil {
		return record{}, fmt.Errorf("record of workspace %s: %w: %w", name, errDamaged, err)
	}
	return r, nil
}
