package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// recordVersion is the version of a record on disk; docs/formats/sandbox.md.
const recordVersion = 1

// recordFile is its name in the sandbox's directory.
const recordFile = "sandbox.json"

// maxRecord bounds what is read of one.
const maxRecord = 4 << 20

// record is what another process needs to take over, or clear away, a
// sandbox: docs/formats/sandbox.md. It is there before the machine is, and is
// written again when the sandbox is handed out and when it dies. A power cut
// ends the machines too, so nothing waits for the disk.
type record struct {
	Version int `json:"version"`
	Info
	Handle vmm.Handle `json:"handle,omitzero"`
	// Origin is the digest of the snapshot that its machine was raised from:
	// pages that are not the machine's own have that one's content.
	Origin string `json:"origin,omitempty"`
	// Net is what it may reach, less the secrets; see secretsFile.
	Net *Net `json:"net,omitempty"`
	// Owner is the process whose end is this sandbox's; zero for none.
	Owner process `json:"owner,omitzero"`
}

// process names a process for ever.
type process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`
	BootID    string `json:"boot_id"`
}

// newSuffix ends the name of a directory whose record is not there yet. Nothing
// runs in it.
const newSuffix = ".new"

// unborn is the name of such a directory: it says who makes it.
func unborn(id string, maker process) string {
	return fmt.Sprintf("%s.%d-%d%s", id, maker.PID, maker.StartTime, newSuffix)
}

// makerOf reads a name that unborn made in this boot.
func makerOf(name, boot string) (maker process, ok bool) {
	name, isNew := strings.CutSuffix(name, newSuffix)
	id, numbers, found := strings.Cut(name, ".")
	pid, start, both := strings.Cut(numbers, "-")
	if !isNew || !found || !both || !isID(id) {
		return process{}, false
	}
	maker.BootID = boot
	var pidErr, startErr error
	maker.PID, pidErr = strconv.Atoi(pid)
	maker.StartTime, startErr = strconv.ParseUint(start, 10, 64)
	return maker, pidErr == nil && startErr == nil
}

// create makes the sandbox's directory under dir, with the record in it from
// the first instant: a directory without one belongs to nobody.
func (r *record) create(dir string, maker process) (err error) {
	path, made := filepath.Join(dir, r.ID), filepath.Join(dir, unborn(r.ID, maker))
	defer func() { err = durable.Describe("create", path, err) }()
	if err = os.Mkdir(made, 0o700); err != nil {
		return err
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(func() error { return os.RemoveAll(made) })
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err = os.WriteFile(filepath.Join(made, recordFile), data, 0o600); err != nil {
		return err
	}
	return os.Rename(made, path)
}

// save writes the record into its directory under dir.
func (r *record) save(dir string) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record of sandbox %s: %w", r.ID, err)
	}
	if err := durable.Replace(filepath.Join(dir, r.ID, recordFile), data, 0o600); err != nil {
		return fmt.Errorf("write record of sandbox %s: %w", r.ID, err)
	}
	return nil
}

// readRecord reads the record in the directory dir.
func readRecord(dir string) (record, error) {
	f, err := os.Open(filepath.Join(dir, recordFile))
	if err != nil {
		return record{}, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err = errors.Join(err, f.Close()); err != nil {
		return record{}, err
	}
	return decodeRecord(data, filepath.Base(dir))
}

// decodeRecord reads the record of the sandbox id. It returns
// errdef.ErrUnsupported for one that another version of Tine wrote.
func decodeRecord(data []byte, id string) (record, error) {
	var head struct {
		Version int `json:"version"`
	}
	var r record
	err := json.Unmarshal(data, &head)
	if err == nil && head.Version != recordVersion && head.Version > 0 {
		return record{}, fmt.Errorf("%w: record of sandbox %s: version %d", errdef.ErrUnsupported, id, head.Version)
	}
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err == nil && (r.Version != recordVersion || r.ID != id) {
		err = fmt.Errorf("version %d, id %q", r.Version, r.ID)
	}
	if err != nil {
		return record{}, fmt.Errorf("%w: record of sandbox %s: %w", errdef.ErrInvalid, id, err)
	}
	return r, nil
}
