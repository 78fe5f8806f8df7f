// Package forge serves the routes of Forge's HTTP gateway, so that programs
// written for it run their code in sandboxes without a change.
//
// Every command runs in a virtual machine, never on the host, and ends when its
// client goes away. The sandboxes are the daemon's own: the package keeps no
// state, and what it cannot do it leaves to the native interface.
package forge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/wire"
)

const (
	// UploadPattern is the route whose bodies may have MaxUpload bytes.
	UploadPattern = "POST /v1/sandbox/{id}/upload"
	// MaxUpload bounds the body of an upload, which is held in memory.
	MaxUpload = 32 << 20
	// maxPath bounds a path.
	maxPath = 4096

	// idleTTL removes the sandboxes of clients that have gone without saying
	// so: the gateway's own client forgets a sandbox also when DELETE fails.
	idleTTL = 15 * time.Minute
	// discardTime bounds the removal of a sandbox that nobody waits for.
	discardTime = time.Minute
	// killedExit is the exit code of what a signal has ended.
	killedExit = -1
)

// Sandboxes is what the gateway asks of a sandbox.Manager.
type Sandboxes interface {
	Fork(ctx context.Context, req sandbox.ForkRequest) ([]sandbox.ForkResult, error)
	Kill(ctx context.Context, id string) error
	With(ctx context.Context, id string, f func(context.Context, *guest.Client) error) error
}

// Snapshots is what the gateway asks of a snapshot.Store.
type Snapshots interface {
	List() ([]snapshot.Snapshot, error)
}

// Config is what the gateway serves.
type Config struct {
	Sandboxes Sandboxes
	Snapshots Snapshots
	// Snapshot is what sandboxes are forked from. When it is "" that is the
	// snapshot py or, where there is none, the only one.
	Snapshot string
	// MaxBody bounds a body that is no upload, MaxOutput what a command may
	// write.
	MaxBody, MaxOutput int64
	// Fail answers a request with an error.
	Fail func(w http.ResponseWriter, r *http.Request, err error)
}

type gateway struct{ Config }

// Mount adds the gateway's routes to mux.
func Mount(mux *http.ServeMux, cfg Config) {
	g := &gateway{cfg}
	for pattern, serve := range map[string]func(http.ResponseWriter, *http.Request) error{
		"GET /health":                   g.health,
		"POST /v1/sandbox":              g.create,
		"DELETE /v1/sandbox/{id}":       g.remove,
		"POST /v1/sandbox/{id}/shell":   g.shell,
		"POST /v1/sandbox/{id}/execute": g.execute,
		"GET /v1/sandbox/{id}/download": g.download,
		UploadPattern:                   g.upload,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := serve(w, r); err != nil {
				g.Fail(w, r, err)
			}
		})
	}
}

func (g *gateway) health(w http.ResponseWriter, _ *http.Request) error {
	return write(w, http.StatusOK, wire.ForgeHealth{Status: wire.ForgeHealthStatusOK})
}

func (g *gateway) create(w http.ResponseWriter, r *http.Request) error {
	req, err := read[wire.ForgeCreate](w, r, g.MaxBody)
	if err != nil {
		return err
	}
	if req.Runtime != "" {
		if _, err = command(req.Runtime, ""); err != nil {
			return err
		}
	}
	id, err := g.fork(r.Context())
	if err != nil {
		return err
	}
	return write(w, http.StatusCreated, wire.ForgeSandbox{ID: id})
}

// fork makes a sandbox for a client, if that is still there to learn of it.
func (g *gateway) fork(ctx context.Context) (string, error) {
	tag, err := g.snapshot()
	if err != nil {
		return "", err
	}
	forks, err := g.Sandboxes.Fork(ctx, sandbox.ForkRequest{Snapshot: tag, N: 1, AllOrNothing: true, IdleTTL: idleTTL})
	if err == nil {
		err = forks[0].Err
	}
	if errors.Is(err, errdef.ErrNotFound) { // the client did not name what is missing
		return "", errdef.WithHint(errdef.Remote(errdef.Code(errdef.ErrUnavailable), err.Error()), "make that snapshot, or start the daemon with another --forge-snapshot")
	}
	if err != nil {
		return "", err
	}
	if ctx.Err() == nil {
		return forks[0].Sandbox.ID, nil
	}
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), discardTime)
	defer cancel()
	return "", errors.Join(context.Cause(ctx), g.Sandboxes.Kill(late, forks[0].Sandbox.ID))
}

// snapshot is the tag to fork from.
func (g *gateway) snapshot() (string, error) {
	if g.Snapshot != "" {
		return g.Snapshot, nil
	}
	all, err := g.Snapshots.List()
	if err != nil {
		return "", err
	}
	var ready []string
	for _, s := range all {
		if s.Status != snapshot.StatusReady || s.Manifest.Machine.Deterministic { // that one has no forks
			continue
		}
		if s.Tag == "py" {
			return s.Tag, nil
		}
		ready = append(ready, s.Tag)
	}
	if len(ready) == 1 {
		return ready[0], nil
	}
	err = fmt.Errorf("%w: there are %d snapshots to fork from, and none is called py", errdef.ErrUnavailable, len(ready))
	return "", errdef.WithHint(err, "start the daemon with --forge-snapshot TAG")
}

func (g *gateway) remove(w http.ResponseWriter, r *http.Request) error {
	id := r.PathValue("id")
	if err := g.Sandboxes.Kill(r.Context(), id); err != nil {
		return unknown(id, err)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (g *gateway) shell(w http.ResponseWriter, r *http.Request) error {
	req, err := read[wire.ForgeShell](w, r, g.MaxBody)
	if err != nil {
		return err
	}
	if req.Command == "" {
		return invalid("command is missing")
	}
	return g.run(w, r, []string{"sh", "-c", req.Command})
}

func (g *gateway) execute(w http.ResponseWriter, r *http.Request) error {
	req, err := read[wire.ForgeExecute](w, r, g.MaxBody)
	if err != nil {
		return err
	}
	argv, err := command(req.Runtime, req.Code)
	if err != nil {
		return err
	}
	return g.run(w, r, argv)
}

// command is how a runtime runs code.
func command(runtime, code string) ([]string, error) {
	switch runtime {
	case "node":
		return []string{"node", "-e", code}, nil
	case "python":
		return []string{"python3", "-c", code}, nil
	case "shell":
		return []string{"sh", "-c", code}, nil
	}
	return nil, invalid("unsupported runtime '%.64s'; expected 'node', 'python' or 'shell'", runtime)
}

// run runs a command for as long as its client waits.
func (g *gateway) run(w http.ResponseWriter, r *http.Request, argv []string) error {
	var out wire.ForgeResult
	err := g.with(r, func(ctx context.Context, c *guest.Client) error {
		start := time.Now()
		result, err := c.Run(ctx, guest.ExecSpec{Argv: argv}, nil, g.MaxOutput)
		if notStarted(err) {
			return invalid("failed to spawn %s: %v", argv[0], err)
		}
		out = g.outcome(result, time.Since(start))
		return err
	})
	if err != nil {
		return err
	}
	return write(w, http.StatusOK, out)
}

// notStarted says whether err is about the command, not the sandbox.
func notStarted(err error) bool {
	return errors.Is(err, errdef.ErrNotFound) || errors.Is(err, errdef.ErrDenied) || errors.Is(err, errdef.ErrInvalid)
}

func (g *gateway) outcome(r guest.Result, took time.Duration) wire.ForgeResult {
	code, ms := r.Exit.Code, took.Milliseconds()
	if r.Exit.Signal != 0 {
		code = killedExit
	}
	out := wire.ForgeResult{
		Success: code == 0, Stdout: text(r.Stdout), Stderr: text(r.Stderr),
		ExitCode: code, ExitCodeCamel: code, ExecutionTimeMS: ms, ExecutionTimeCamel: ms,
	}
	if r.Truncated {
		out.Error = fmt.Sprintf("the command wrote more than %d bytes and was ended", g.MaxOutput)
	}
	return out
}

// text is what a command wrote, with a mark for each byte that is no UTF-8.
func text(b []byte) string { return strings.ToValidUTF8(string(b), "\uFFFD") }

func (g *gateway) upload(w http.ResponseWriter, r *http.Request) error {
	req, err := read[wire.ForgeUpload](w, r, MaxUpload)
	if err == nil {
		err = checkPath(req.Path)
	}
	if err != nil {
		return err
	}
	err = g.with(r, func(ctx context.Context, c *guest.Client) error {
		_, werr := c.WriteFile(ctx, req.Path, guest.WriteOptions{Parents: true}, bytes.NewReader(req.Data))
		return werr
	})
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (g *gateway) download(w http.ResponseWriter, r *http.Request) error {
	path := r.URL.Query().Get("path")
	if err := checkPath(path); err != nil {
		return err
	}
	return g.with(r, func(ctx context.Context, c *guest.Client) error {
		f, err := c.ReadFile(ctx, path, guest.ReadOptions{})
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }() //nolint:contextcheck // a file knows its own; it was only read
		w.Header().Set("Content-Type", "application/octet-stream")
		w.WriteHeader(http.StatusOK) // what fails from here on cuts the answer short
		_, err = io.Copy(w, f)
		return err
	})
}

// checkPath bounds a path. Where it leads is the guest's affair.
func checkPath(path string) error {
	if path == "" || len(path) > maxPath || strings.ContainsRune(path, 0) {
		return invalid("path must have 1 to %d bytes, none of them zero", maxPath)
	}
	return nil
}

// with runs f with a session to the sandbox's agent.
func (g *gateway) with(r *http.Request, f func(context.Context, *guest.Client) error) error {
	id, ran := r.PathValue("id"), false
	err := g.Sandboxes.With(r.Context(), id, func(ctx context.Context, c *guest.Client) error {
		ran = true
		return f(ctx, c)
	})
	if ran { // what is not found then is in the sandbox
		return err
	}
	return unknown(id, err)
}

// unknown says in the gateway's words that there is no such sandbox.
func unknown(id string, err error) error {
	if !errors.Is(err, errdef.ErrNotFound) {
		return err
	}
	return errdef.Remote(errdef.Code(errdef.ErrNotFound), "sandbox not found: "+id)
}

// invalid is an error in the gateway's words for a request that is wrong.
func invalid(format string, args ...any) error {
	return errdef.Remote(errdef.Code(errdef.ErrInvalid), "invalid request: "+fmt.Sprintf(format, args...))
}

// read decodes a body of at most limit bytes; an empty one is the zero value.
func read[T any](w http.ResponseWriter, r *http.Request, limit int64) (T, error) {
	var v T
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if err != nil {
		return v, fmt.Errorf("%w: read the body: %w", errdef.ErrInvalid, err)
	}
	if len(body) == 0 {
		return v, nil
	}
	if err = json.Unmarshal(body, &v); err != nil {
		return v, invalid("%v", err)
	}
	return v, nil
}

func write(w http.ResponseWriter, status int, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(data) // the client went away: nobody is left to tell
	return nil
}
