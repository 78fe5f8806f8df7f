// Package jail starts monitors where they can do no harm. Each is a process of
// its own user, in namespaces of its own, that sees a root of a few read-only
// files, has no capability and no way to one, may make few system calls, and
// takes no more of the host than its control group allows. What a machine needs
// of the host is handed to its monitor as open files; files that it insists on
// opening by name are opened for it.
//
// A monitor is started by a launcher: this program in another role, which waits
// in its namespaces until it is told what to become. So the way into the jail is
// behind a machine before anyone asks for it.
//
// SECURITY.md says what each boundary is for, and docs/isolation.md what a host
// must have. The system calls are described in namespaces(7), pivot_root(2),
// capabilities(7), seccomp_unotify(2) and landlock(7).
package jail

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
)

// Config is what a Jail is made of.
type Config struct {
	// Command is the command line of a program that calls Serve; its first word
	// is the path of its file.
	Command []string
	// Dir keeps the roots that programs see. It must be on a filesystem that
	// programs may be executed from.
	Dir string
	// Program is the path of the program to run in the jail, and Others are files
	// that it opens by name: firmware, modules. What they are linked with is
	// found.
	Program string
	Others  []string
	// OwnFiles is for a program that makes files and sockets by itself: it has a
	// directory of its own for them, RunDir (see Dir), and a filter that lets it
	// listen there. It asks for more of the files that it opens: see Job.Opens.
	OwnFiles bool
	// Groups limits what programs take; nil: nothing does, for the reason NoGroups.
	Groups   *cgroup.Hierarchy
	NoGroups error
	// Total limits all programs together; zero fields are no limits. The zero Total
	// leaves what is in force as it is.
	Total cgroup.Limits
	// Spare is how many launchers wait for work.
	Spare int
	// Links is how many programs may have a network at once; 0: DefaultLinks.
	Links int
	// UIDs is a directory of lock files, one for each user id that is in use on
	// this host: all daemons of the host share it. It is used by root only.
	UIDs string
	// Logger may be nil.
	Logger *slog.Logger
}

// Level says what is in force in a jail, for people.
type Level struct {
	OwnUser       bool // each program is a user of its own
	UserNamespace bool
	Landlock      int // the kernel's version of it; 0: none
	Groups        cgroup.Support
	NoLink        error    // why no program can have a network; nil: they can
	Missing       []string // what a host could have and this one has not, with the reason
}

// Jail starts programs of one kind. It is safe for concurrent use.
type Jail struct {
	cfg   Config
	tree  string
	maker string // this process, in the names of control groups
	level Level
	log   *slog.Logger

	mu     sync.Mutex
	closed bool
	links  int     // networks that there are
	spare  []*Cell // without a network
	fill   chan struct{}
	done   chan struct{} // closed when the filler has ended
	ctx    context.Context
	stop   context.CancelFunc
}

// Open finds out what this host can do, by doing it. It returns
// errdef.ErrUnsupported when there can be no jail here, and says why.
func Open(ctx context.Context, cfg Config) (*Jail, error) {
	j := &Jail{cfg: cfg, log: cfg.Logger, fill: make(chan struct{}, 1), done: make(chan struct{})}
	if j.log == nil {
		j.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if os.Geteuid() == 0 {
		if err = os.MkdirAll(cfg.UIDs, 0o700); err == nil {
			err = sweepUIDs(cfg.UIDs)
		}
		if err != nil {
			return nil, fmt.Errorf("user ids of jail: %w", err)
		}
	}
	if j.maker, err = makerName(); err != nil {
		return nil, err
	}
	if j.tree, err = makeTree(ctx, cfg.Dir, cfg.Program, cfg.Others, cfg.mountPoints()...); err != nil {
		return nil, fmt.Errorf("make root of jail: %w", err)
	}
	if err = j.probe(ctx); err != nil {
		err = fmt.Errorf("%w: no jail on this host: %w", errdef.ErrUnsupported, err)
		return nil, errdef.WithHint(err, "tine doctor says what is missing; as root, or with unprivileged user namespaces, it would work")
	}
	j.ctx, j.stop = context.WithCancel(context.WithoutCancel(ctx))
	go j.filler()
	return j, nil
}

// probe makes a cell as it will be, and one without a user namespace if that
// fails.
func (j *Jail) probe(ctx context.Context) error {
	j.level = Level{OwnUser: os.Geteuid() == 0, UserNamespace: true, Landlock: landlockVersion()}
	cell, err := j.newCell(ctx, false)
	if err != nil && j.level.OwnUser {
		j.level.UserNamespace = false
		j.level.Missing = append(j.level.Missing, "user namespaces: "+err.Error())
		cell, err = j.newCell(ctx, false)
	}
	if err != nil {
		return err
	}
	if !j.level.OwnUser {
		j.level.Missing = append(j.level.Missing, "a user of its own for each machine: the daemon is not root")
	}
	if j.level.Landlock == 0 {
		j.level.Missing = append(j.level.Missing, "Landlock: the kernel has none, or it is off")
	}
	if j.cfg.Groups == nil {
		j.level.Missing = append(j.level.Missing, fmt.Sprintf("limits on memory, processors and processes: %v", j.cfg.NoGroups))
	} else {
		j.level.Groups = j.cfg.Groups.Support()
		j.level.Missing = append(j.level.Missing, j.level.Groups.Missing...)
		j.limitAll()
	}
	return errors.Join(cell.Close(), j.probeLink(ctx))
}

// limitAll sets the limits on all programs together. That they cannot be set is no
// reason not to start: what runs already may be over them.
func (j *Jail) limitAll() {
	if j.cfg.Total == (cgroup.Limits{}) {
		return
	}
	if err := j.cfg.Groups.SetTotal(j.cfg.Total); err != nil {
		j.level.Missing = append(j.level.Missing, fmt.Sprintf("a limit on all machines together: %v", err))
	}
}

// probeLink makes a cell with a network, if it can.
func (j *Jail) probeLink(ctx context.Context) error {
	cell, err := j.newCell(ctx, true)
	if err != nil {
		j.level.NoLink = err
		return nil
	}
	return cell.Close()
}

// Level says what is in force.
func (j *Jail) Level() Level {
	l := j.level
	l.Missing = slices.Clone(l.Missing)
	return l
}

// Close sends away the launchers that wait. Programs go on.
func (j *Jail) Close() error {
	j.mu.Lock()
	spare := j.spare
	j.spare, j.closed = nil, true
	j.mu.Unlock()
	j.stop()
	<-j.done
	var errs []error
	for _, c := range spare {
		errs = append(errs, c.Close())
	}
	if j.cfg.Groups != nil {
		errs = append(errs, j.cfg.Groups.Close())
	}
	return errors.Join(errs...)
}

// Take returns a cell to start a program in, with a network if link says so. The
// caller starts a program in it, or closes it. It returns errdef.ErrUnavailable
// when there are as many networks as there may be.
func (j *Jail) Take(ctx context.Context, link bool) (*Cell, error) {
	if !link {
		if c := j.takeSpare(); c != nil {
			return c, nil
		}
	}
	if link {
		if err := j.holdLink(); err != nil {
			return nil, err
		}
	}
	c, err := j.newCell(ctx, link)
	if err != nil {
		if link {
			j.dropLink()
		}
		return nil, fmt.Errorf("make cell: %w", err)
	}
	c.linked = link
	return c, nil
}

// DefaultLinks is how many networks there may be if Config does not say.
const DefaultLinks = 4096

func (j *Jail) holdLink() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if most := cmp.Or(j.cfg.Links, DefaultLinks); j.links >= most {
		err := fmt.Errorf("%w: all %d networks are in use", errdef.ErrUnavailable, most)
		return errdef.WithHint(err, "remove sandboxes that have one, or raise --max-networks")
	}
	j.links++
	return nil
}

func (j *Jail) dropLink() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.links--
}

// Adopt counts the network of a program that an earlier process started, also
// when there are more than there may be; the function that it returns is called
// when the program has ended.
func (j *Jail) Adopt() (release func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.links++
	return j.dropLink
}

// takeSpare takes a cell that waits, or none. A launcher may have ended while
// nobody looked.
func (j *Jail) takeSpare() *Cell {
	for {
		c := j.popSpare()
		if c == nil || c.waits() {
			return c
		}
		j.log.WarnContext(j.ctx, "spare launcher has ended", "error", c.failed(errHungUp))
		_ = c.Close() // it is gone
	}
}

func (j *Jail) popSpare() *Cell {
	j.mu.Lock()
	defer j.mu.Unlock()
	select { // also when there is none: the filler may have failed to make one
	case j.fill <- struct{}{}:
	default:
	}
	if len(j.spare) == 0 {
		return nil
	}
	last := len(j.spare) - 1
	c := j.spare[last]
	j.spare = j.spare[:last]
	return c
}

// yieldTime is how long the filler waits after a cell was taken: whoever took it
// is about to start a machine, and a launcher would take a processor from it.
const yieldTime = 50 * time.Millisecond

// filler keeps cells ready.
func (j *Jail) filler() {
	defer close(j.done)
	for {
		j.mu.Lock()
		short := len(j.spare) < j.cfg.Spare && !j.closed
		j.mu.Unlock()
		if short {
			c, err := j.newCell(j.ctx, false)
			if err != nil {
				j.log.WarnContext(j.ctx, "no spare launcher", "error", err)
			} else {
				j.keep(c)
				continue
			}
		}
		if !j.rest() {
			return
		}
	}
}

// rest waits until a cell was asked for, and nobody has taken another for yieldTime.
func (j *Jail) rest() bool {
	select {
	case <-j.fill:
	case <-j.ctx.Done():
		return false
	}
	for {
		timer := time.NewTimer(yieldTime)
		select {
		case <-j.fill:
			timer.Stop()
		case <-timer.C:
			return true
		case <-j.ctx.Done():
			timer.Stop()
			return false
		}
	}
}

func (j *Jail) keep(c *Cell) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		_ = c.Close() // it only waited
		return
	}
	j.spare = append(j.spare, c)
}

// DefaultUIDs is the directory that daemons of one host share; see Config.UIDs.
const DefaultUIDs = "/run/tine/uids"
