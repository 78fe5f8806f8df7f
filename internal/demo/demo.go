// Package demo does Tine's main job once, for people to watch: it builds an
// image, freezes a warm template of it, forks it, and shows what the forks
// answered and how long that took.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/tinevm/tine/internal/daemon"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
)

// What the demo runs on. The image and the snapshot have the same name, and
// stay for others to use.
const (
	Name   = "py"
	Source = "debian:bookworm+python3"
)

// Imports are the modules that the template's interpreter has loaded.
func Imports() []string { return []string{"json", "math", "random", "hashlib"} }

// Options say how to run the demo.
type Options struct {
	N    int // how many sandboxes to fork
	Out  io.Writer
	JSON bool // one JSON object instead of text
}

// Result is what the demo saw.
type Result struct {
	Snapshot  string  `json:"snapshot"`
	Digest    string  `json:"digest"`
	Engine    string  `json:"engine"`
	ColdMS    float64 `json:"cold_boot_ms"`
	FirstMS   float64 `json:"fork_first_ms"`   // the fastest fork's first result
	SlowestMS float64 `json:"fork_slowest_ms"` // the slowest's, all side by side
	Forks     []Fork  `json:"forks"`
	Answered  int     `json:"answered"`
}

// Fork is what one sandbox did.
type Fork struct {
	Sandbox    string  `json:"sandbox"`
	FirstMS    float64 `json:"first_result_ms"` // from the fork request
	PrivateMiB float64 `json:"private_mib"`
	Result     string  `json:"result"`
	Error      string  `json:"error,omitempty"`
}

// Run runs the demo on an ephemeral daemon. It fails unless every fork
// answered.
func Run(ctx context.Context, d *daemon.Daemon, opts Options) error {
	snap, err := Template(ctx, d)
	if err != nil {
		return err
	}
	res := &Result{Snapshot: snap.Tag, Digest: snap.Digest, Engine: snap.Manifest.Engine, ColdMS: float64(snap.BootMS)}
	if err := fork(ctx, d, opts, res); err != nil {
		return err
	}
	if err := show(opts, res); err != nil {
		return err
	}
	if res.Answered != opts.N {
		return fmt.Errorf("%w: %d of %d forks did not answer", errdef.ErrUnavailable, opts.N-res.Answered, opts.N)
	}
	return nil
}

// Template returns the snapshot that the demo forks, made anew if there is
// none or if it is of another image or engine.
func Template(ctx context.Context, d *daemon.Daemon) (snapshot.Snapshot, error) {
	img, hit, err := d.Images.Build(ctx, image.BuildRequest{Name: Name, Source: Source, Imports: Imports()})
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	if hit {
		progress.Report(ctx, "image", "image "+Name+" is up to date")
	}
	snap, err := d.Snapshots.Resolve(Name)
	if err == nil && snap.Manifest.Image == img.Digest && d.Sandboxes.CanFork(ctx, Name) == nil {
		progress.Report(ctx, "snapshot", "snapshot "+Name+" is up to date")
		return snap, nil
	}
	if err != nil && !errors.Is(err, errdef.ErrNotFound) && !errors.Is(err, errdef.ErrUnavailable) {
		return snapshot.Snapshot{}, err
	}
	return d.Sandboxes.CreateSnapshot(ctx, sandbox.SnapshotRequest{Tag: Name, Image: Name, Replace: true})
}

// program has each sandbox compute something of its own, and show that its
// random numbers are not its siblings'.
const program = `import os
n = %d
value = sum(i * i for i in range(n * 1000))
print(f"fork {n:2d} on {os.uname().nodename}: sum of squares below {n * 1000} is {value}, urandom {os.urandom(6).hex()}")
value`

// fork forks opts.N sandboxes at once, has each run the program, and removes
// them.
func fork(ctx context.Context, d *daemon.Daemon, opts Options, res *Result) (err error) {
	progress.Report(ctx, "fork", fmt.Sprintf("forking %d sandboxes", opts.N))
	res.Forks = make([]Fork, opts.N)
	start := time.Now()
	var mu sync.Mutex // for opts.Out
	say := func(text []byte) {
		mu.Lock()
		defer mu.Unlock()
		if !opts.JSON {
			_, _ = opts.Out.Write(text) // a closed terminal does not stop the demo
		}
	}
	results, err := d.Sandboxes.Fork(ctx, sandbox.ForkRequest{Snapshot: Name, N: opts.N, Each: func(r sandbox.ForkResult) {
		res.Forks[r.Index] = one(ctx, d, r, start, say)
	}})
	if err != nil {
		return err
	}
	for i, f := range res.Forks {
		if f.Error == "" {
			res.Answered++
			res.SlowestMS = max(res.SlowestMS, f.FirstMS)
			if res.FirstMS == 0 || f.FirstMS < res.FirstMS {
				res.FirstMS = f.FirstMS
			}
		}
		if results[i].Err == nil {
			err = errors.Join(err, d.Sandboxes.Kill(context.WithoutCancel(ctx), f.Sandbox))
		}
	}
	return err
}

// one has a sandbox run the program.
func one(ctx context.Context, d *daemon.Daemon, r sandbox.ForkResult, start time.Time, say func([]byte)) Fork {
	if r.Err != nil {
		return Fork{Sandbox: "-", Error: r.Err.Error()}
	}
	f := Fork{Sandbox: r.Sandbox.ID}
	err := d.Sandboxes.With(ctx, r.Sandbox.ID, func(ctx context.Context, c *guest.Client) error {
		out, err := c.Eval(ctx, guest.EvalRequest{Code: fmt.Sprintf(program, r.Index+1)})
		if err != nil {
			return err
		}
		f.FirstMS = float64(time.Since(start).Microseconds()) / 1000
		if out.Error != nil {
			return out.Error
		}
		f.Result = out.Value
		say(out.Stdout)
		return nil
	})
	if err == nil {
		var private int64
		private, _, err = d.Sandboxes.Memory(r.Sandbox.ID)
		f.PrivateMiB = float64(private) / (1 << 20)
	}
	if err != nil {
		f.Error = err.Error()
	}
	return f
}

// show writes the result for people, or as JSON.
func show(opts Options, res *Result) error {
	if opts.JSON {
		return json.NewEncoder(opts.Out).Encode(res)
	}
	w := tabwriter.NewWriter(opts.Out, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprint(w, "\nSANDBOX\tFIRST RESULT ms\tPRIVATE MiB\tRESULT\t\n") // errors show at Flush
	for _, f := range res.Forks {
		result := f.Result
		if f.Error != "" {
			result = "failed: " + f.Error
		}
		_, _ = fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%s\t\n", f.Sandbox, f.FirstMS, f.PrivateMiB, result)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(opts.Out, "\ncold boot to a warm interpreter %.0f ms; fork to first result %.0f ms for the first, %.0f ms for the last of %d side by side (%s)\n"+
		"demo: %d/%d forks answered\n", res.ColdMS, res.FirstMS, res.SlowestMS, opts.N, res.Engine, res.Answered, opts.N)
	return err
}
