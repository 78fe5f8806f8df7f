package record

import "time"

// Input is all that a run is a function of, beside its snapshot and engine. A
// hash of it covers every field.
type Input struct {
	// Argv is the command: at least its name, which is looked up in PATH.
	Argv []string `json:"argv"`
	// Env are the variables NAME=VALUE beside those that every command has, in
	// the order given.
	Env []string `json:"env,omitempty"`
	// Cwd is the working directory; empty is /root.
	Cwd string `json:"cwd,omitempty"`
	// Stdin is read by the command, and then ends.
	Stdin []byte `json:"stdin,omitempty"`
	// Files are written into the guest before the command starts, in the order
	// given.
	Files []File `json:"files,omitempty"`
	// Collect are the paths of files that are read when the command has ended.
	// One that is not there is left out of Output.Files.
	Collect []string `json:"collect,omitempty"`
	// Seed is what the guest's random numbers are made of.
	Seed uint64 `json:"seed"`
	// Start is the guest's wall clock when the command starts, to the
	// nanosecond.
	Start time.Time `json:"start"`
	// Limits end a run that goes too far.
	Limits Limits `json:"limits"`
}

// File is a regular file of a guest.
type File struct {
	Path string `json:"path"` // absolute and clean
	Mode uint32 `json:"mode"` // permission bits
	Data []byte `json:"data"`
}

// Limits bound a run. Zero is the default of whoever runs it, who puts the
// value that was in force here.
type Limits struct {
	// Virtual is how much of the guest's own time the command may take. It is
	// exact: a run that is ended by it is as reproducible as any other.
	Virtual time.Duration `json:"virtual_ns"`
	// Wall bounds the host's time. A run that is ended by it has no output.
	Wall time.Duration `json:"wall_ns"`
	// Output bounds the bytes of stdout and stderr together. What is above it
	// is cut off, and the command is killed, at the same byte every time.
	Output int64 `json:"output_bytes"`
}

// Output is what a run comes to.
type Output struct {
	Stdout []byte `json:"stdout"`
	Stderr []byte `json:"stderr"`
	// Exit is the exit code, or -1 for a command that a signal ended or that
	// did not start.
	Exit int `json:"exit_code"`
	// Signal is the name of the signal that ended the command ("SIGSEGV").
	Signal string `json:"signal,omitempty"`
	// Failure says why the command did not start or was ended from outside: one
	// of the failures, or nothing.
	Failure string `json:"failure,omitempty"`
	// Files are those of Input.Collect that are there, in that order.
	Files []File `json:"files,omitempty"`
	// Virtual is the time that the command took by the guest's clock.
	Virtual time.Duration `json:"virtual_ns"`
	// Wall is the time that the run took on the host. No hash covers it.
	Wall time.Duration `json:"wall_ns"`
	// Memory is the digest of guest RAM when the command had ended, if it was
	// asked for: "sha256:HEX".
	Memory string `json:"memory_digest,omitempty"`
}

// The failures.
const (
	NotFound      = "not found"
	NotExecutable = "not executable"
	TimedOut      = "timed out"
	OutputLimit   = "output limit"
	OutOfMemory   = "out of memory"
)
