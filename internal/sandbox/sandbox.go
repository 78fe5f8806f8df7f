package sandbox

import (
	"time"

	"github.com/tinevm/tine/internal/vmm"
)

// State is where a sandbox is in its life.
type State string

// The states. A sandbox is listed from Running on and until it is removed.
const (
	Creating  State = "creating" // nobody has been given it yet; never listed
	Running   State = "running"
	Suspended State = "suspended" // its memory is on disk; whoever uses it resumes it
	Dead      State = "dead"      // its machine ended by itself; Info.Reason says how
)

// Info is what is known of one sandbox.
type Info struct {
	ID             string            `json:"id"`
	SnapshotTag    string            `json:"snapshot_tag"`
	SnapshotDigest string            `json:"snapshot_digest"`
	State          State             `json:"state"`
	Reason         string            `json:"reason,omitempty"`
	Engine         string            `json:"engine"`
	Machine        vmm.Machine       `json:"machine"`
	PID            int               `json:"pid"`
	CreatedAt      time.Time         `json:"created_at"`
	LastActive     time.Time         `json:"last_active"`
	ExpiresAt      time.Time         `json:"expires_at,omitzero"`    // zero: never
	IdleTTL        time.Duration     `json:"idle_ttl,omitempty"`     // zero: never
	IdleSuspend    bool              `json:"idle_suspend,omitempty"` // suspended, not removed, after IdleTTL
	Labels         map[string]string `json:"labels,omitempty"`
	ForkMS         float64           `json:"fork_ms"` // from the request to a confirmed, unique guest
	FromPool       bool              `json:"from_pool"`
	// MemoryLimitMiB is what was asked for; Limits are in force.
	MemoryLimitMiB int        `json:"memory_limit_mib,omitempty"`
	Limits         vmm.Limits `json:"limits,omitzero"`
	// OutOfMemory: it is dead because it went over its memory limit.
	OutOfMemory bool `json:"out_of_memory,omitempty"`
	// Head is the digest of the node that it is after in the tree: its last
	// branch, or what it was forked from or rolled back to.
	Head string `json:"head,omitempty"`
	// Branches is how often it was branched.
	Branches int `json:"branches,omitempty"`
}

// ForkRequest asks for N sandboxes from a snapshot.
type ForkRequest struct {
	Snapshot string // tag or digest
	N        int    // 1 to Limits.MaxFork
	// AllOrNothing ends the siblings of a fork that failed, also those that
	// Each has been told of.
	AllOrNothing bool
	IdleTTL      time.Duration // removed when unused for so long; zero: never
	IdleSuspend  bool          // suspended then, not removed
	Lifetime     time.Duration // removed when so old; zero: never
	Labels       map[string]string
	Limits       vmm.Limits // zero fields: the usual
	Net          *Net       // of forks of a snapshot with a network card; nil: nothing can be reached
	// Secrets are files under /run/tine/secrets of the sandbox. Its own forks do
	// not inherit them, unless KeepSecrets says so for theirs.
	Secrets     map[string]string
	KeepSecrets bool
	// NoPool forks from the snapshot even where a warm fork is parked.
	NoPool bool
	// Each, when set, is called with every fork as soon as it has ended,
	// in the order in which they end, from several goroutines.
	Each func(ForkResult)
}

// ForkResult is one child of a fork: a sandbox, or the reason there is none.
type ForkResult struct {
	Index   int // 0 to N-1
	Sandbox Info
	Err     error
}

// SnapshotRequest asks for a template: boot an image, warm it up, freeze it.
type SnapshotRequest struct {
	Tag     string
	Image   string      // name or digest
	Machine vmm.Machine // zero fields: the manager's defaults
	Warmup  []string    // after the image's own; each is run by sh -c
	Imports []string    // modules that the warm interpreters load
	Replace bool        // move the tag if it exists
	Net     *Net        // what the warm-up may reach, if the machine has a network card
}

// Mode is how the memory of a branch is taken.
type Mode string

// The modes. In all of them the sandbox is paused for one instant, to which
// all of the branch belongs.
const (
	// Full makes a snapshot that stands alone: the whole memory.
	Full Mode = "full"
	// Diff copies what has changed while the sandbox is paused.
	Diff Mode = "diff"
	// Live pauses only for the device state and a copy-on-write twin of the
	// memory, which is read while the sandbox runs. Where the host does not
	// allow a twin it is Diff, and the snapshot's warning says so.
	Live Mode = "live"
)

// BranchRequest asks for a snapshot of a sandbox as it is at this instant.
type BranchRequest struct {
	// Tag is the new snapshot's; empty: one is made up, and Prune may remove it.
	Tag string
	// Mode is Live unless it says otherwise.
	Mode Mode
	// Owner is the snapshot's; see snapshot.Facts.
	Owner string
	// Replace moves the tag if it exists.
	Replace bool
	// NoWait returns as soon as the sandbox runs on. The snapshot is listed as
	// being written until it is ready; see Manager.Branches.
	NoWait bool
}

// BranchState is a branch that is being written, or one that failed after its
// caller was let go.
type BranchState struct {
	Tag     string
	Sandbox string
	Owner   string // as it is to be in snapshot.Facts
	PauseMS float64
	At      time.Time
	Err     error // nil while it is being written
}

// DiffEntry is a path that differs between two nodes.
type DiffEntry struct {
	Path   string `json:"path"`
	Change string `json:"change"`         // added, removed, changed
	What   string `json:"what,omitempty"` // of a change: content, mode, owner, kind, target
	Before int64  `json:"before"`         // size in bytes
	After  int64  `json:"after"`
}

// DiffResult is how two nodes of a tree, or sandboxes, differ.
type DiffResult struct {
	A, B      string
	Files     []DiffEntry
	Truncated bool // there are more files than were looked at
	// Pages is how many pages of memory differ, of TotalPages.
	Pages, TotalPages int64
}
