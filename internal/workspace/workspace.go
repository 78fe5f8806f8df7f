// Package workspace gives sandboxes names under which they are suspended and
// resumed.
//
// A workspace has a record on disk before it has a sandbox, and the record
// never says less than what is there: whenever the process is killed, the next
// one finds each workspace as it was last answered, and no sandbox without its
// workspace. docs/formats/workspace.md describes the files.
//
// It suspends nothing itself: see sandbox. What a workspace's state is, is for
// its sandbox to say.
package workspace

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm"
)

// Status says what has become of a workspace's sandbox.
type Status string

// A stale workspace has lost its sandbox, or that is dead: it can only be
// deleted.
const (
	Running   Status = "running"
	Suspended Status = "suspended"
	Stale     Status = "stale"
)

// Label is the label of a workspace's sandbox: it holds what the record's
// maker has made up for it.
const Label = "tine.workspace"

// cleanup bounds what is taken back after a caller has left.
const cleanup = time.Minute

// Workspace is one workspace as it was found.
type Workspace struct {
	Name           string
	Snapshot       string // what it was forked from, as its maker named it
	MemoryLimitMiB int
	SandboxID      string
	CreatedAt      time.Time
	Status         Status
	// Sandbox is what is known of the sandbox; zero when that is gone.
	Sandbox sandbox.Info
}

// CreateRequest asks for a workspace.
type CreateRequest struct {
	Name           string
	Snapshot       string // tag or digest
	MemoryLimitMiB int
}

// Sandboxes is what a Store asks of a sandbox.Manager.
type Sandboxes interface {
	Fork(ctx context.Context, req sandbox.ForkRequest) ([]sandbox.ForkResult, error)
	Get(id string) (sandbox.Info, error)
	List() []sandbox.Info
	Kill(ctx context.Context, id string) error
	Suspend(ctx context.Context, id string) (sandbox.Info, error)
	Resume(ctx context.Context, id string) (sandbox.Info, error)
}

// Store keeps the workspaces of one daemon. Its methods are safe for
// concurrent use.
type Store struct {
	dir    string
	boxes  Sandboxes
	logger *slog.Logger
	lock   *os.File

	mu   sync.Mutex
	busy map[string]bool // names that are being made, changed or deleted
}

// Open opens the store in dir, which it makes when it is missing, and takes
// back what was being made when the process before was killed. The sandboxes
// must have been recovered before. It returns errdef.ErrConflict while another
// process has the store open. A nil logger discards.
func Open(ctx context.Context, dir string, boxes Sandboxes, logger *slog.Logger) (s *Store, err error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	s = &Store{dir: dir, boxes: boxes, logger: logger, busy: map[string]bool{}}
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open workspaces: %w", durable.Describe("make", dir, err))
	}
	if s.lock, err = durable.TryLock(filepath.Join(dir, lockFile), false); err != nil {
		return nil, fmt.Errorf("open workspaces: %w", err)
	}
	if err = s.recover(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open workspaces: %w", err), s.Close())
	}
	return s, nil
}

// Close lets another process open the store. It ends no sandbox.
func (s *Store) Close() error { return durable.Unlock(s.lock) }

// recover takes back the workspaces that nobody was told of. One that resists
// stays as it is: its name is taken back again when somebody wants it.
func (s *Store) recover(ctx context.Context) error {
	if err := durable.RemoveTemp(s.dir); err != nil {
		return err
	}
	names, err := s.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		r, readErr := s.read(name)
		if readErr == nil && r.SandboxID == "" {
			readErr = s.takeBack(ctx, r)
		}
		if errors.Is(readErr, errDamaged) {
			readErr = s.setAside(ctx, name, readErr)
		}
		if readErr != nil {
			s.logger.WarnContext(ctx, "workspace not recovered", slog.String("workspace", name), slog.Any("error", readErr))
		}
	}
	return nil
}

// setAside takes a record that says nothing out of the way, so that its name is
// free again. The sandbox stays: its label has the name.
func (s *Store) setAside(ctx context.Context, name string, why error) error {
	aside, err := durable.SetAside(s.path(name), time.Now())
	if err != nil {
		return errors.Join(why, err)
	}
	s.logger.WarnContext(ctx, "workspace set aside: its record cannot be understood", slog.String("workspace", name),
		slog.String("path", aside), slog.Any("error", why))
	return nil
}

// takeBack removes a workspace that was being made, and its sandbox, if there
// is one: the record comes first and goes last.
func (s *Store) takeBack(ctx context.Context, r record) error {
	for _, box := range s.boxes.List() {
		if box.Labels[Label] != r.Claim {
			continue
		}
		if err := s.kill(ctx, box.ID); err != nil {
			return fmt.Errorf("take back workspace %s: %w", r.Name, err)
		}
	}
	return s.remove(r.Name)
}

// kill removes a sandbox that may be gone already.
func (s *Store) kill(ctx context.Context, id string) error {
	err := s.boxes.Kill(ctx, id)
	if errors.Is(err, errdef.ErrNotFound) {
		return nil
	}
	return err
}

// claim makes the caller the only one who changes the workspace, until it
// calls release.
func (s *Store) claim(name string) (release func(), err error) {
	if err = CheckName(name); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[name] {
		return nil, errdef.WithHint(fmt.Errorf("%w: workspace %s is being changed", errdef.ErrConflict, name), "try again when that is done")
	}
	s.busy[name] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.busy, name)
	}, nil
}

// Create makes a workspace. It returns errdef.ErrExists when there is one of
// that name, and errdef.ErrConflict while one is being made or deleted.
func (s *Store) Create(ctx context.Context, req CreateRequest) (Workspace, error) {
	release, err := s.claim(req.Name)
	if err != nil {
		return Workspace{}, err
	}
	defer release()
	if err = s.vacate(ctx, req.Name); err != nil {
		return Workspace{}, err
	}
	r := record{
		Version: version, Name: req.Name, Snapshot: req.Snapshot, MemoryLimitMiB: req.MemoryLimitMiB,
		Claim: req.Name + "/" + rand.Text(), CreatedAt: time.Now().UTC().Truncate(time.Millisecond),
	}
	if err = s.write(r); err != nil {
		return Workspace{}, err
	}
	info, err := s.populate(ctx, &r)
	if err != nil {
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		return Workspace{}, errors.Join(err, s.takeBack(after, r))
	}
	return r.workspace(info, nil), nil
}

// vacate sees that there is no workspace of that name, and takes back one that
// was never finished.
func (s *Store) vacate(ctx context.Context, name string) error {
	r, err := s.read(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil: // it may be anything: removing it is for somebody to decide
		return err
	case r.SandboxID == "":
		return s.takeBack(ctx, r)
	}
	return errdef.WithHint(fmt.Errorf("workspace %s %w; DELETE first", name, errdef.ErrExists), "remove it with tine workspace rm "+name)
}

// populate forks the sandbox of a workspace that has its record.
func (s *Store) populate(ctx context.Context, r *record) (sandbox.Info, error) {
	results, err := s.boxes.Fork(ctx, sandbox.ForkRequest{
		Snapshot: r.Snapshot, N: 1, AllOrNothing: true, Limits: vmm.Limits{MemoryMiB: r.MemoryLimitMiB},
		Labels: map[string]string{Label: r.Claim},
	})
	if err == nil && len(results) == 1 {
		err = results[0].Err
	}
	if err == nil && len(results) != 1 {
		err = fmt.Errorf("%d sandboxes instead of one", len(results))
	}
	if err == nil {
		err = context.Cause(ctx) // a caller who has left learns of no sandbox
	}
	if err != nil {
		return sandbox.Info{}, fmt.Errorf("create workspace %s: %w", r.Name, err)
	}
	info := results[0].Sandbox
	done := *r
	done.SandboxID = info.ID
	if err = s.write(done); err != nil {
		return sandbox.Info{}, err
	}
	*r = done
	return info, nil
}

// Get describes a workspace.
func (s *Store) Get(name string) (Workspace, error) {
	if err := CheckName(name); err != nil {
		return Workspace{}, err
	}
	r, err := s.read(name)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && r.SandboxID == "") {
		return Workspace{}, fmt.Errorf("workspace %s %w", name, errdef.ErrNotFound)
	}
	if err != nil {
		return Workspace{}, err
	}
	return r.workspace(s.boxes.Get(r.SandboxID)), nil
}

// List lists the workspaces by name. One whose record cannot be read is stale.
func (s *Store) List() ([]Workspace, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	var all []Workspace
	for _, name := range names {
		w, getErr := s.Get(name)
		if errors.Is(getErr, errdef.ErrNotFound) { // it is being made, or was removed just now
			continue
		}
		if getErr != nil { // Get says how
			w = Workspace{Name: name, Status: Stale}
		}
		all = append(all, w)
	}
	slices.SortFunc(all, func(a, b Workspace) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// Suspend suspends a workspace that runs.
func (s *Store) Suspend(ctx context.Context, name string) (Workspace, error) {
	return s.change(name, func(w Workspace) (sandbox.Info, error) {
		if w.Status != Running {
			return sandbox.Info{}, fmt.Errorf("%w: workspace %s is Suspended, not Running — suspend requires a live sandbox", errdef.ErrInvalid, name)
		}
		return s.boxes.Suspend(ctx, w.SandboxID)
	})
}

// Resume resumes a workspace that is suspended. Its sandbox has the limits
// that it had before.
func (s *Store) Resume(ctx context.Context, name string) (Workspace, error) {
	return s.change(name, func(w Workspace) (sandbox.Info, error) {
		if w.Status == Running {
			return sandbox.Info{}, fmt.Errorf("%w: workspace %s is already Running (sandbox %s)", errdef.ErrInvalid, name, w.SandboxID)
		}
		return s.boxes.Resume(ctx, w.SandboxID)
	})
}

// change does something to the sandbox of a workspace that has one.
func (s *Store) change(name string, do func(Workspace) (sandbox.Info, error)) (Workspace, error) {
	release, err := s.claim(name)
	if err != nil {
		return Workspace{}, err
	}
	defer release()
	w, err := s.Get(name)
	if err != nil {
		return Workspace{}, err
	}
	if w.Status == Stale {
		return Workspace{}, errdef.WithHint(fmt.Errorf("workspace %s is stale: sandbox %s %w", name, w.SandboxID, errdef.ErrNotFound),
			"its state is lost: remove it with tine workspace rm "+name)
	}
	if w.Sandbox, err = do(w); err != nil {
		return Workspace{}, err
	}
	w.Status = statusOf(w.Sandbox)
	return w, nil
}

// Delete removes a workspace and its sandbox. What that was forked from stays.
// The record goes last, so that a sandbox that could not be removed is found
// again.
func (s *Store) Delete(ctx context.Context, name string) error {
	release, err := s.claim(name)
	if err != nil {
		return err
	}
	defer release()
	r, err := s.read(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("workspace %s %w", name, errdef.ErrNotFound)
	case errors.Is(err, errdef.ErrUnsupported): // a newer version's: not ours to lose
		return err
	case err != nil: // a record that cannot be read names nothing
		return s.remove(name)
	case r.SandboxID == "":
		return errors.Join(s.takeBack(ctx, r), fmt.Errorf("workspace %s %w", name, errdef.ErrNotFound))
	}
	if err = s.kill(ctx, r.SandboxID); err != nil {
		return fmt.Errorf("delete workspace %s: %w", name, err)
	}
	return s.remove(name)
}

// workspace is the record's, with what is known of its sandbox.
func (r *record) workspace(info sandbox.Info, err error) Workspace {
	w := Workspace{
		Name: r.Name, Snapshot: r.Snapshot, MemoryLimitMiB: r.MemoryLimitMiB, SandboxID: r.SandboxID,
		CreatedAt: r.CreatedAt, Status: Stale,
	}
	if err == nil {
		w.Sandbox, w.Status = info, statusOf(info)
	}
	return w
}

func statusOf(info sandbox.Info) Status {
	switch info.State {
	case sandbox.Running:
		return Running
	case sandbox.Suspended:
		return Suspended
	case sandbox.Creating, sandbox.Dead:
	}
	return Stale
}
