package block

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

// The words of an ExecutionStatus.
const (
	Pending   = "Pending"
	Running   = "Running"
	Succeeded = "Succeeded"
	Failed    = "Failed"
)

// ExecutionStatus says how far an execution is. Its JSON is a word, or, for one
// that failed, an object with the reason.
type ExecutionStatus struct {
	Word   string
	Reason string // of Failed
}

// StatusOf is the status of a run that has ended.
func StatusOf(out record.Output) ExecutionStatus {
	switch {
	case out.Failure != "":
		return ExecutionStatus{Failed, out.Failure}
	case out.Signal != "":
		return ExecutionStatus{Failed, "killed by " + out.Signal}
	case out.Exit != 0:
		return ExecutionStatus{Failed, fmt.Sprintf("exit code %d", out.Exit)}
	default:
		return ExecutionStatus{Word: Succeeded}
	}
}

type failure struct {
	Reason string `json:"reason"`
}

// MarshalJSON writes the word, or the object.
func (s ExecutionStatus) MarshalJSON() ([]byte, error) {
	switch s.Word {
	case Pending, Running, Succeeded:
		return json.Marshal(s.Word)
	case Failed:
		return marshal(map[string]failure{Failed: {s.Reason}})
	default:
		return nil, fmt.Errorf("%w: execution status %q", errdef.ErrInvalid, s.Word)
	}
}

// UnmarshalJSON reads the word, or the object, and refuses every other.
func (s *ExecutionStatus) UnmarshalJSON(data []byte) error {
	var word string
	if json.Unmarshal(data, &word) == nil && string(data) != "null" {
		switch word {
		case Pending, Running, Succeeded:
			*s = ExecutionStatus{Word: word}
			return nil
		}
		return fmt.Errorf("%w: execution status %.80q", errdef.ErrInvalid, word)
	}
	raw, err := members(data)
	if err != nil {
		return fmt.Errorf("%w: execution status: %w", errdef.ErrInvalid, err)
	}
	inner, ok := raw[Failed]
	if !ok || len(raw) != 1 {
		return fmt.Errorf("%w: execution status: want one field, %s", errdef.ErrInvalid, Failed)
	}
	var reason string
	if err = decodeObject(inner, "execution status", fields{"reason": &reason}, nil); err != nil {
		return err
	}
	*s = ExecutionStatus{Failed, reason}
	return nil
}

// Duration is a time.Duration whose JSON is Forge's: {"secs":1,"nanos":5}.
type Duration time.Duration

type duration struct {
	Secs  uint64 `json:"secs"`
	Nanos uint32 `json:"nanos"`
}

// MarshalJSON refuses a negative duration, for which there is no form.
func (d Duration) MarshalJSON() ([]byte, error) {
	if d < 0 {
		return nil, fmt.Errorf("%w: duration %s", errdef.ErrInvalid, time.Duration(d))
	}
	return json.Marshal(duration{uint64(d) / uint64(time.Second), uint32(uint64(d) % uint64(time.Second))})
}

// UnmarshalJSON refuses what is longer than a time.Duration can be.
func (d *Duration) UnmarshalJSON(data []byte) error {
	var v duration
	if err := decodeObject(data, "duration", fields{"secs": &v.Secs, "nanos": &v.Nanos}, nil); err != nil {
		return err
	}
	const most = uint64(1<<63-1) / uint64(time.Second)
	if v.Nanos >= uint32(time.Second) || v.Secs >= most {
		return fmt.Errorf("%w: duration of %d s and %d ns", errdef.ErrInvalid, v.Secs, v.Nanos)
	}
	*d = Duration(v.Secs)*Duration(time.Second) + Duration(v.Nanos)
	return nil
}

// ForgeRecord is an execution in the form that Forge exchanges. It is a view: it
// has no exit code, no command and no signature; those are in the record that it
// was made of.
type ForgeRecord struct {
	ID           ExecutionID     `json:"id"`
	BlockID      ID              `json:"block_id"`
	UserID       string          `json:"user_id"`
	InputHash    ContentHash     `json:"input_hash"`
	OutputHash   ContentHash     `json:"output_hash"`
	StartedAt    time.Time       `json:"started_at"`
	Duration     Duration        `json:"duration"`
	VMSnapshotID *SnapshotID     `json:"vm_snapshot_id"`
	Status       ExecutionStatus `json:"status"`
}

// Facts are what a ForgeRecord is made of.
type Facts struct {
	RecordID string
	Block    ID
	User     string
	Stdin    []byte
	Output   record.Output
	// Started is when the run began on the host.
	Started time.Time
	// Snapshot is the digest of what it ran on; empty when it is not known.
	Snapshot string
}

// NewForgeRecord gives facts of ours Forge's form. An id of ours that is no UUID
// becomes UUIDOf it.
func NewForgeRecord(f Facts) ForgeRecord {
	r := ForgeRecord{
		ID: ExecutionID{idOf(f.RecordID)}, BlockID: f.Block, UserID: f.User,
		InputHash: ForgeHash(f.Stdin, nil), OutputHash: ForgeHash(f.Output.Stdout, f.Output.Stderr),
		StartedAt: f.Started.UTC(), Duration: Duration(max(0, f.Output.Wall)), Status: StatusOf(f.Output),
	}
	if f.Snapshot != "" {
		r.VMSnapshotID = &SnapshotID{idOf(f.Snapshot)}
	}
	return r
}

func idOf(name string) UUID {
	if u, err := ParseUUID(name); err == nil {
		return u
	}
	return UUIDOf(name)
}

// UnmarshalJSON reads a record and refuses what is not one.
func (r *ForgeRecord) UnmarshalJSON(data []byte) error {
	var v ForgeRecord
	err := decodeObject(data, "execution record", fields{
		"id": &v.ID, "block_id": &v.BlockID, "user_id": &v.UserID, "input_hash": &v.InputHash, "output_hash": &v.OutputHash,
		"started_at": &v.StartedAt, "duration": &v.Duration, "status": &v.Status,
	}, fields{"vm_snapshot_id": &v.VMSnapshotID})
	if err == nil {
		*r = v
	}
	return err
}
