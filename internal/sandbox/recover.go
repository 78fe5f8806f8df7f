package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/vmm"
)

// recover goes through what earlier processes left. A sandbox whose machine
// still runs is adopted, unless it belongs to a process: then it stays with
// that one, or goes if that one is gone. What has no machine any more is
// listed as dead if it had been handed out, and cleared away if not. What
// cannot be understood is set aside or left alone: whatever one sandbox is
// like, the others are served.
func (m *Manager) recover(ctx context.Context) error {
	entries, err := os.ReadDir(m.Dir)
	if err != nil {
		return fmt.Errorf("read sandbox directory: %w", err)
	}
	machines, err := findMachines()
	if err != nil {
		return fmt.Errorf("recover sandboxes: %w", err)
	}
	for _, e := range entries {
		name := e.Name()
		maker, unborn := makerOf(name, m.self.BootID)
		err = nil
		switch {
		case !e.IsDir():
		case isID(name):
			err = m.recoverOne(ctx, name, machines[name])
		case unborn:
			err = m.clearUnborn(name, maker)
		}
		if err != nil {
			m.Logger.ErrorContext(ctx, "sandbox not recovered: it is left alone", "sandbox", name, "error", err)
		}
	}
	return nil
}

func (m *Manager) recoverOne(ctx context.Context, id string, machines []process) error {
	r, err := readRecord(m.dir(id))
	switch {
	case errors.Is(err, errdef.ErrUnsupported):
		m.Logger.WarnContext(ctx, "sandbox of another version left alone", "sandbox", id, "error", err)
		return nil
	case err != nil && m.Ephemeral:
		return nil // another process may be removing it, or the daemon will
	case errors.Is(err, fs.ErrNotExist):
		return m.clear(id, machines) // its removal was cut off
	case err != nil:
		return m.setAside(ctx, id, machines, err)
	case r.Owner != process{}:
		alive, aliveErr := r.Owner.alive()
		if alive || aliveErr != nil {
			return aliveErr
		}
		return m.clear(id, machines)
	case m.Ephemeral:
		return nil // the daemon's
	case r.State == Creating:
		return m.clear(id, machines)
	}
	return m.adopt(ctx, r, machines)
}

// adopt lists a sandbox again, with its machine if that still runs. It takes
// a place even where there is none: limits are for what is to come. A machine
// that its record does not name is what a change of machines left behind.
func (m *Manager) adopt(ctx context.Context, r record, machines []process) error {
	strays := slices.DeleteFunc(machines, func(p process) bool {
		return p.PID == r.Handle.PID && p.StartTime == r.Handle.StartTime
	})
	err := endAll(strays)
	if r.State != Suspended {
		err = errors.Join(err, m.dropHeld(r.ID)) // the suspension was cut off, or is over
	}
	if err != nil {
		return err
	}
	vm := m.takeOver(ctx, &r)
	r.LastActive = time.Now() // its clients could not use it
	m.Logger.InfoContext(ctx, "sandbox adopted", "sandbox", r.ID, "state", r.State, "pid", r.PID)
	m.Events.adopted(r.Info)
	err = m.recallSecrets(&r)
	b := newBox(m, vm, r)
	if vm != nil && err == nil {
		err = b.connect(vm)
	}
	if err != nil {
		m.Logger.WarnContext(ctx, "adopted sandbox has no network", "sandbox", r.ID, "error", err)
	}
	m.mu.Lock()
	m.held++
	m.boxes[b.id] = b
	m.lives.Go(b.live)
	m.mu.Unlock()
	return nil
}

// takeOver adopts the machine of a sandbox, if there is one, and puts into the
// record how that went. A machine that was paused for a branch that was cut
// off runs on.
func (m *Manager) takeOver(ctx context.Context, r *record) vmm.VM {
	if r.State == Suspended {
		return nil
	}
	vm, err := m.Engine.Adopt(ctx, r.Handle)
	if err == nil {
		if err = vm.Resume(ctx); err != nil {
			err = errors.Join(err, m.kill(vm))
		}
	}
	switch {
	case err == nil:
		r.State, r.Reason = Running, ""
		return vm
	case r.State == Dead:
	case r.Engine != m.Engine.Name():
		r.State, r.Reason = Dead, fmt.Sprintf("it runs on %s, and the daemon now uses %s", r.Engine, m.Engine.Name())
	case errors.Is(err, errdef.ErrNotFound):
		r.State, r.Reason = Dead, "its machine ended while no daemon ran"
	default:
		r.State, r.Reason = Dead, "its machine could not be adopted: "+err.Error()
	}
	return nil
}

// clear kills whatever runs in the directory of sandbox id and removes it.
func (m *Manager) clear(id string, machines []process) error {
	if err := endAll(machines); err != nil {
		return err
	}
	if err := m.dropHeld(id); err != nil {
		return err
	}
	m.Logger.Info("sandbox cleared", "sandbox", id, "processes", len(machines))
	return os.RemoveAll(m.dir(id))
}

// setAside takes a sandbox whose record cannot be understood out of the way. Its
// machine is ended: nobody knows any more whose it is, how long it may live and
// what its memory stands on. Its files stay for somebody to look at, under
// another name, and so does what it was suspended in, if it was.
func (m *Manager) setAside(ctx context.Context, id string, machines []process, why error) error {
	if err := endAll(machines); err != nil {
		return err
	}
	aside, err := durable.SetAside(m.dir(id), time.Now())
	if err != nil {
		return errors.Join(why, err)
	}
	m.Logger.WarnContext(ctx, "sandbox set aside: its record cannot be understood", "sandbox", id, "path", aside,
		"processes", len(machines), "error", why)
	return nil
}

// disown notes in the sandbox's record that nobody has it any more: should we
// be killed before the last of it is gone, whoever recovers it clears the rest
// away. A disk that does not take the note must not keep it from being removed.
func (b *box) disown() {
	b.mu.Lock()
	r := b.record
	b.mu.Unlock()
	r.State = Creating
	if err := r.save(b.m.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.m.Logger.Warn("removal not recorded", "sandbox", b.id, "error", err)
	}
}

// clearUnborn removes what a process left that died before the record was
// there.
func (m *Manager) clearUnborn(name string, maker process) error {
	alive, err := maker.alive()
	if alive || err != nil {
		return err
	}
	return os.RemoveAll(m.dir(name))
}

// thisProcess names the process that we are.
func thisProcess() (process, error) {
	boot, err := linux.BootID()
	if err != nil {
		return process{}, err
	}
	pid := os.Getpid()
	start, err := linux.StartTime(pid)
	return process{PID: pid, StartTime: start, BootID: boot}, err
}

func (p process) alive() (bool, error) {
	boot, err := linux.BootID()
	if err != nil || boot != p.BootID {
		return false, err
	}
	open, err := linux.OpenProcess(p.PID, p.StartTime)
	if errors.Is(err, errdef.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, open.Close()
}

// machineName is the argument that every machine's process has, whatever its
// record says of it.
const machineName = "tine-"

// findMachines returns the processes that are machines, by the sandbox's id.
func findMachines() (map[string][]process, error) {
	found := map[string][]process{}
	_, err := linux.FindProcesses(func(pid int, argv []string) bool {
		for _, arg := range argv {
			id, ok := strings.CutPrefix(arg, machineName)
			if !ok || !isID(id) {
				continue
			}
			// Now, while the pid is still the one with these arguments.
			if start, startErr := linux.StartTime(pid); startErr == nil {
				found[id] = append(found[id], process{PID: pid, StartTime: start})
			}
			break
		}
		return false
	})
	return found, err
}

// endAll kills processes and waits for their end.
func endAll(processes []process) error {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	var errs []error
	for _, p := range processes {
		errs = append(errs, p.end(ctx))
	}
	return errors.Join(errs...)
}

func (p process) end(ctx context.Context) error {
	open, err := linux.OpenProcess(p.PID, p.StartTime)
	if errors.Is(err, errdef.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	err = open.Signal(unix.SIGKILL)
	if errors.Is(err, errdef.ErrNotFound) {
		err = nil // it was faster
	}
	if err == nil {
		err = open.Wait(ctx)
	}
	return errors.Join(err, open.Close())
}
