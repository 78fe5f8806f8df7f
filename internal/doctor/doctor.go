// Package doctor examines a host: what of all that Tine needs is there, and
// what to do about the rest.
//
// It only looks. It changes nothing but one thing: the survey of engines that
// it is given may keep a verdict on KVM.
package doctor

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/engines"
	"github.com/tinevm/tine/internal/image"
)

// Status is how an examination went.
type Status string

// The statuses. A host on which any check fails cannot do Tine's main job.
const (
	OK   Status = "ok"
	Warn Status = "warn" // something works less well, or not yet
	Fail Status = "fail"
	Skip Status = "skip" // there was nothing to examine
)

// Check is one thing that was examined.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	Detail string `json:"detail"`
	// Hint is what to do about it, where possible a command to run.
	Hint string `json:"hint,omitempty"`
}

// Config says what to examine.
type Config struct {
	// StateDir is the daemon's state directory, which need not exist.
	StateDir string
	// Socket is the daemon's unix socket; empty means StateDir/tine.sock.
	Socket string
	// Agent is the path of the guest agent's binary; empty skips it.
	Agent string
	// Engine is the engine that is wanted; empty means engines.Auto.
	Engine string
	// Engines surveys the engines; nil skips them.
	Engines func(context.Context) []engines.Report
	// Tools looks for the programs that image builds run; nil means
	// image.HostTools.
	Tools func() []image.ToolStatus
	// Root is put in front of /proc and /sys; empty means the host's own.
	Root string
}

// Run does all the checks at once and returns them in a fixed order. One that
// has not ended within its bound, or when ctx ends, fails.
func Run(ctx context.Context, cfg Config) []Check {
	x := newExaminer(cfg)
	all := x.examinations()
	found := make([][]Check, len(all))
	var wg sync.WaitGroup
	for i, e := range all {
		wg.Go(func() { found[i] = e.perform(ctx) })
	}
	wg.Wait()
	var checks []Check
	for _, some := range found {
		checks = append(checks, some...)
	}
	return checks
}

// Failed says whether any check failed.
func Failed(checks []Check) bool {
	for _, c := range checks {
		if c.Status == Fail {
			return true
		}
	}
	return false
}

const (
	checkBound = 2 * time.Second
	// surveyBound has room for two probes of a KVM, of 20 s and a minute.
	surveyBound = 2 * time.Minute
)

// examination is one row of the table of checks.
type examination struct {
	name  string
	bound time.Duration
	// run returns what it found; a check without a name gets the row's.
	run func(context.Context) []Check
}

func (x *examiner) examinations() []examination {
	return []examination{
		{"engine", surveyBound, x.engines},
		{"image tools", checkBound, x.tools},
		{"agent", checkBound, one(x.agent)},
		{"state directory", checkBound, one(x.state)},
		{"socket path", checkBound, one(x.socketPath)},
		{"daemon", checkBound, one(x.daemon)},
		{"disk", checkBound, one(x.disk)},
		{"memory", checkBound, one(x.memory)},
		{"open files", checkBound, one(x.openFiles)},
		{"processes", checkBound, one(x.processes)},
		{"memory maps", checkBound, one(x.memoryMaps)},
		{"user namespaces", checkBound, one(x.userNamespaces)},
		{"cgroups", checkBound, one(x.cgroups)},
		{"pidfd", checkBound, one(x.pidfd)},
		{"memfd", checkBound, one(x.memfd)},
		{"pagemap scan", checkBound, one(x.pagemapScan)},
		{"userfaultfd", checkBound, one(x.userfaultfd)},
	}
}

func one(run func(context.Context) Check) func(context.Context) []Check {
	return func(ctx context.Context) []Check { return []Check{run(ctx)} }
}

// perform runs one examination within its bound. A system call on a dead
// network filesystem cannot be called off: what is stuck in one is left behind,
// and its answer, should one ever come, is dropped.
func (e examination) perform(ctx context.Context) []Check {
	ctx, cancel := context.WithTimeout(ctx, e.bound)
	defer cancel()
	answer := make(chan []Check, 1)
	go func() { answer <- e.run(ctx) }()
	var checks []Check
	select {
	case checks = <-answer:
	case <-ctx.Done():
		checks = []Check{{Status: Fail, Detail: fmt.Sprintf("no answer: %v", context.Cause(ctx))}}
	}
	for i := range checks {
		if checks[i].Name == "" {
			checks[i].Name = e.name
		}
	}
	return checks
}

// examiner is the host that is examined.
type examiner struct {
	cfg  Config
	euid int
}

func newExaminer(cfg Config) *examiner {
	if cfg.Engine == "" {
		cfg.Engine = engines.Auto
	}
	if cfg.Socket == "" {
		cfg.Socket = filepath.Join(cfg.StateDir, "tine.sock")
	}
	if cfg.Tools == nil {
		cfg.Tools = image.HostTools
	}
	if dir, err := filepath.Abs(cfg.StateDir); err == nil {
		cfg.StateDir = dir
	}
	return &examiner{cfg: cfg, euid: os.Geteuid()}
}

// maxRead bounds what is read of a file of the kernel's.
const maxRead = 64 << 10

// read returns a file under /proc or /sys.
func (x *examiner) read(path string) (string, error) {
	f, err := os.Open(filepath.Join(x.cfg.Root, path))
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // only read
	data, err := io.ReadAll(io.LimitReader(f, maxRead))
	return string(data), err
}

// grade says how good a value is.
func grade(value, ok, warn int64) Status {
	switch {
	case value >= ok:
		return OK
	case value >= warn:
		return Warn
	default:
		return Fail
	}
}

// hinted returns c, with the hint unless all is well.
func hinted(c Check, hint string) Check {
	if c.Status != OK {
		c.Hint = hint
	}
	return c
}

// size is bytes as people write them.
func size(bytes int64) string {
	if bytes < 1<<30 {
		return fmt.Sprintf("%d MiB", bytes>>20)
	}
	return fmt.Sprintf("%.1f GiB", float64(bytes)/(1<<30))
}
