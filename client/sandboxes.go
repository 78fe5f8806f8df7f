package client

import (
	"context"
	"net/http"
	"time"

	"github.com/tinevm/tine/internal/wire"
)

// Sandboxes and what runs in them.
type (
	// Sandbox is a running fork. Where a fork may fail alone, one that did has
	// no ID and says why in Error.
	Sandbox = wire.Sandbox
	// ExecResult says how a command ended.
	ExecResult = wire.ExecResult
	// EvalResult says what came of code.
	EvalResult = wire.EvalResult
	// Pong is a sandbox's sign of life.
	Pong = wire.Pong
	// Process is a process that was started through the daemon.
	Process = wire.Process
)

// SandboxRunning is the state of a sandbox that runs.
const SandboxRunning = wire.SandboxStateRunning

// ForkRequest says what to fork.
type ForkRequest struct {
	// Snapshot is a tag or a digest.
	Snapshot string
	// N is how many sandboxes to make; 0 means 1.
	N int
	// Partial lets a child fail without its siblings.
	Partial bool
	// Cold forks from the snapshot even where warm forks are parked.
	Cold bool
	// IdleTTL and Lifetime end a sandbox that is unused for so long, or that
	// is so old. Zero means never.
	IdleTTL, Lifetime time.Duration
	// IdleSuspend suspends a sandbox after IdleTTL instead of ending it.
	IdleSuspend bool
	// Secrets are files under /run/tine/secrets of the sandbox, by name. Its
	// forks do not have them, unless KeepSecrets says so.
	Secrets     map[string]string
	KeepSecrets bool
	// MemoryLimitMiB is what its machine may have of the host's memory, the
	// monitor included: it is ended when it has more. CPULimit is how many cores
	// it may use, 0.5 being half of one, PIDsLimit how many threads its monitor
	// may have, IOLimitBytes how much it may read from disk in a second, and
	// write. 0 is the daemon's default, which bounds all but the last. A limit
	// that the daemon's host cannot enforce is an error.
	MemoryLimitMiB int64
	CPULimit       float64
	PIDsLimit      int
	IOLimitBytes   int64
	// Net is what forks of a snapshot with a network card may reach; nil is
	// nothing.
	Net *Net
	// Labels are kept with the sandbox.
	Labels map[string]string
}

// ExecRequest is a command to run.
type ExecRequest struct {
	Args []string
	// Timeout ends the command and all it has started; 0 means 30 seconds.
	Timeout time.Duration
	Env     map[string]string
	// Dir is the working directory.
	Dir string
	// User is a name or an id.
	User string
	// Stdin is what the command reads.
	Stdin string
}

// EvalRequest is code for a warm interpreter.
type EvalRequest struct {
	Code string
	// Language names the interpreter; empty means the image's first.
	Language string
	// Timeout interrupts the code; 0 means 30 seconds.
	Timeout time.Duration
}

// Fork makes sandboxes from a snapshot.
func (c *Client) Fork(ctx context.Context, req ForkRequest) ([]Sandbox, error) {
	n, all, pool := max(req.N, 1), !req.Partial, !req.Cold
	if req.N < 0 {
		n = req.N
	}
	w := wire.CreateSandboxesRequest{
		SnapshotTag: req.Snapshot, N: &n, AllOrNothing: &all, Pool: &pool, Labels: req.Labels,
		IdleTTLSecs: req.IdleTTL.Seconds(), LifetimeSecs: req.Lifetime.Seconds(), Secrets: req.Secrets, KeepSecrets: req.KeepSecrets,
		CPULimit: req.CPULimit, PIDsLimit: req.PIDsLimit, IOLimitBytes: req.IOLimitBytes, Net: req.Net.request(),
	}
	if req.IdleSuspend {
		w.IdleAction = wire.CreateSandboxesRequestIdleActionSuspend
	}
	if req.MemoryLimitMiB != 0 {
		w.MemoryLimitMiB = &req.MemoryLimitMiB
	}
	return post[[]Sandbox](ctx, c, "/v1/sandboxes", w)
}

// Sandboxes lists the sandboxes, oldest first.
func (c *Client) Sandboxes(ctx context.Context) ([]Sandbox, error) {
	return get[[]Sandbox](ctx, c, "/v1/sandboxes", nil)
}

// Sandbox describes a sandbox and what its memory costs.
func (c *Client) Sandbox(ctx context.Context, id string) (Sandbox, error) {
	return get[Sandbox](ctx, c, box(id), nil)
}

// RemoveSandbox ends a sandbox.
func (c *Client) RemoveSandbox(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, box(id), nil, nil, nil)
}

// Ping asks a sandbox's agent for a sign of life.
func (c *Client) Ping(ctx context.Context, id string) (Pong, error) {
	return post[Pong](ctx, c, box(id, "ping"), nil)
}

// Exec runs a command and collects its output. That a command could not be
// started, or did not end in time, is said in the result, not as an error.
func (c *Client) Exec(ctx context.Context, id string, req ExecRequest) (ExecResult, error) {
	return post[ExecResult](ctx, c, box(id, "exec"), wire.ExecRequest{
		Args: req.Args, TimeoutSecs: seconds(req.Timeout), Env: req.Env, Cwd: req.Dir, User: req.User, Stdin: req.Stdin,
	})
}

// Eval runs code in a sandbox's warm interpreter. An exception is said in the
// result, not as an error.
func (c *Client) Eval(ctx context.Context, id string, req EvalRequest) (EvalResult, error) {
	return post[EvalResult](ctx, c, box(id, "eval"), wire.EvalRequest{
		Code: req.Code, Language: req.Language, TimeoutSecs: seconds(req.Timeout),
	})
}

// Processes lists the processes that were started through the daemon.
func (c *Client) Processes(ctx context.Context, id string) ([]Process, error) {
	return get[[]Process](ctx, c, box(id, "processes"), nil)
}

// Signal sends a signal, by name or number, to a process and its group.
func (c *Client) Signal(ctx context.Context, id string, pid int, signal string) error {
	return c.call(ctx, http.MethodPost, box(id, "processes", itoa(pid), "signal"), nil, wire.SignalRequest{Signal: signal}, nil)
}

// box is the path of a sandbox and what is under it.
func box(id string, more ...string) string {
	return "/v1/sandboxes" + segments(append([]string{id}, more...)...)
}

func seconds(d time.Duration) *float64 {
	if d == 0 {
		return nil
	}
	s := d.Seconds()
	return &s
}
