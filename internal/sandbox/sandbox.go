package sandbox

import (
	"time"

	"github.com/tinevm/tine/internal/vmm"
)

// State is where a sandbox is in its life.
type State string

// The states. A sandbox is listed from Running on and until it is removed.
const (
	Creating State = "creating" // nobody has been given it yet; never listed
	Running  State = "running"
	Dead     State = "dead" // its machine ended by itself; Info.Reason says how
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
	ExpiresAt      time.Time         `json:"expires_at,omitzero"` // zero: never
	IdleTTL        time.Duration     `json:"idle_ttl,omitempty"`  // zero: never
	Labels         map[string]string `json:"labels,omitempty"`
	ForkMS         float64           `json:"fork_ms"` // from the request to a confirmed, unique guest
	FromPool       bool              `json:"from_pool"`
	MemoryLimitMiB int               `json:"memory_limit_mib,omitempty"`
}

// ForkRequest asks for N sandboxes from a snapshot.
type ForkRequest struct {
	Snapshot string // tag or digest
	N        int    // 1 to Limits.MaxFork
	// AllOrNothing ends the siblings of a fork that failed, also those that
	// Each has been told of.
	AllOrNothing   bool
	IdleTTL        time.Duration // removed when unused for so long; zero: never
	Lifetime       time.Duration // removed when so old; zero: never
	Labels         map[string]string
	MemoryLimitMiB int
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
}
