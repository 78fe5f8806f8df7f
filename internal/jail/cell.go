package jail

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// Cell is a launcher that waits in its namespaces. It is not safe for concurrent
// use.
type Cell struct {
	jail   *Jail
	cmd    *exec.Cmd
	socket *os.File
	stderr *tail
	uid    *uidLease     // nil when the daemon's own user is all there is
	group  *cgroup.Group // nil when there are no control groups
	link   []*os.File
	linked bool // it counts among the networks
}

// prepareTime bounds how long a launcher may take to get ready.
const prepareTime = 10 * time.Second

// newCell starts a launcher and waits until it is ready.
func (j *Jail) newCell(ctx context.Context, link bool) (_ *Cell, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	c := &Cell{jail: j, stderr: &tail{}}
	if j.level.OwnUser {
		if c.uid, err = leaseUID(j.cfg.UIDs); err != nil {
			return nil, err
		}
		u.Add(c.uid.Close)
	}
	if c.group, err = j.makeGroup(); err != nil {
		return nil, err
	}
	if c.group != nil {
		u.Add(c.leaveGroup)
	}
	theirs, err := c.pair()
	if err != nil {
		return nil, err
	}
	u.Add(c.socket.Close)
	err = c.start(theirs)
	_ = theirs.Close() // the launcher has its own, and when it is gone nobody may have one
	if err != nil {
		return nil, err
	}
	u.Add(c.end)
	if err = c.setUp(ctx, link); err != nil {
		return nil, c.failed(err)
	}
	return c, nil
}

// pair makes the two ends of the launcher's socket.
func (c *Cell) pair() (theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	c.socket = os.NewFile(uintptr(fds[0]), "launcher")
	return os.NewFile(uintptr(fds[1]), "launcher"), nil
}

// isolated are the namespaces that every program has of its own.
const isolated = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// start starts the launcher by a descriptor of this program: the user that it is
// may have no way to the file by its path.
func (c *Cell) start(theirs *os.File) error {
	command := c.jail.cfg.Command
	self, err := os.Open(command[0])
	if err != nil {
		return err
	}
	defer func() { _ = self.Close() }() // only executed
	//nolint:noctx // the launcher, and what it becomes, outlive the call
	c.cmd = exec.Command("/proc/self/fd/"+strconv.Itoa(selfFD), command[1:]...)
	c.cmd.Args[0] = command[0]
	c.cmd.Env = []string{"GOMAXPROCS=1", "GOTRACEBACK=none", launcherEnv + "=1"}
	c.cmd.ExtraFiles = []*os.File{theirs, self}
	c.cmd.Stderr = c.stderr
	c.cmd.Dir = "/"
	attr := &syscall.SysProcAttr{Setsid: true, Cloneflags: isolated}
	if c.jail.level.UserNamespace {
		uid, gid := os.Geteuid(), os.Getegid()
		if c.uid != nil {
			uid, gid = c.uid.id, c.uid.id
		}
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}}
		// It has to become that user, or it has none in its namespace, and with it
		// no capability. Only root may leave its groups on the way.
		attr.Credential = &syscall.Credential{NoSetGroups: c.uid == nil}
		attr.GidMappingsEnableSetgroups = c.uid != nil
	}
	c.cmd.SysProcAttr = attr
	return c.cmd.Start()
}

// launcherEnv is set for launchers, so that a test binary knows that it is one.
const launcherEnv = "TINE_LAUNCHER"

// setUp tells the launcher what to prepare, and waits for it.
func (c *Cell) setUp(ctx context.Context, link bool) error {
	s := setup{Link: link, Own: c.jail.cfg.OwnFiles}
	if c.uid != nil && !c.jail.level.UserNamespace {
		s.User = c.uid.id
	}
	var fds []int
	if c.group != nil {
		entrances, err := c.group.Entrances()
		if err != nil {
			return err
		}
		defer closeFiles(entrances)
		for _, f := range entrances {
			fds = append(fds, int(f.Fd()))
		}
		s.Entrances = len(fds)
	}
	if c.jail.level.OwnUser {
		tree, err := openTree(c.jail.tree)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(tree) }()
		fds = append(fds, tree)
	} else {
		s.Tree = c.jail.tree
	}
	if link && c.jail.level.OwnUser {
		s.Tuns = 1
		if s.Own { // one makes the tap, and is gone; the program takes it by the other
			s.Tuns = 2
		}
		for range s.Tuns {
			tun, err := openTun(c.cmd.Process.Pid)
			if err != nil {
				return err
			}
			defer func() { _ = tun.Close() }() // the launcher has its own
			fds = append(fds, int(tun.Fd()))
		}
	}
	if err := sendMessage(int(c.socket.Fd()), s, fds...); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTime, fmt.Errorf("%w: launcher is not ready after %s", errdef.ErrTimeout, prepareTime))
	defer cancel()
	_, made, err := c.hear(ctx)
	if err != nil {
		return err
	}
	for _, fd := range made {
		c.link = append(c.link, os.NewFile(uintptr(fd), "link"))
	}
	return nil
}

// failed ends the launcher and adds what it had to say to the error.
func (c *Cell) failed(err error) error {
	_ = c.end() // never fails
	return fmt.Errorf("launcher: %w%s", err, c.stderr.text())
}

// hear waits for an answer of the launcher. It takes a thread while it waits,
// which is not for long.
func (c *Cell) hear(ctx context.Context) (answer, []int, error) {
	stop := context.AfterFunc(ctx, c.hangUp)
	defer stop()
	var a answer
	fds, err := receiveMessage(int(c.socket.Fd()), &a)
	if ctx.Err() != nil {
		closeAll(fds)
		return a, nil, context.Cause(ctx)
	}
	if err == nil && a.err() != nil {
		closeAll(fds)
		return a, nil, a.err()
	}
	return a, fds, err
}

// hangUp ends the conversation with the launcher. It may come late, when the
// socket is closed and its number another file's.
func (c *Cell) hangUp() {
	if conn, err := c.socket.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) }) // it fails if closed
	}
}

// waits reports whether the launcher is there and has nothing to say.
func (c *Cell) waits() bool {
	fds := []unix.PollFd{{Fd: int32(c.socket.Fd()), Events: unix.POLLIN}}
	var n int
	err := ignoreInterrupts(func() (err error) { n, err = unix.Poll(fds, 0); return err })
	return err == nil && n == 0
}

// Link are the files of the cell's network, if it has one: the tap that the
// machine's network card is at, and then what network.Open takes. They are the
// cell's, and closed when a program has started: whoever wants to keep the
// network gives the program copies.
//
// A program with files of its own opens /dev/net/tun, and takes the tap
// network.TapName by it: what it is given for that is the first of these, and
// needs no place in Job.Opens.
func (c *Cell) Link() []*os.File { return c.link }

// Close sends the launcher away.
func (c *Cell) Close() error {
	err := errors.Join(c.socket.Close(), c.end())
	for _, f := range c.link {
		err = errors.Join(err, f.Close())
	}
	if c.uid != nil {
		err = errors.Join(err, c.uid.Close())
	}
	if c.linked {
		c.jail.dropLink()
	}
	return errors.Join(err, c.leaveGroup())
}

// leaveGroup removes the control group of a launcher that has ended.
func (c *Cell) leaveGroup() error {
	_, err := Release(context.Background(), c.group)
	return err
}

// end ends the launcher, whatever it is doing.
func (c *Cell) end() error {
	_ = c.cmd.Process.Kill() // it may be gone
	_ = c.cmd.Wait()         // and says that it was killed
	return nil
}

// Job is a program to be started.
type Job struct {
	Args []string // without the program's own name
	Env  []string
	// Output takes what it writes to its standard streams.
	Output *os.File
	// Files are handed down, from descriptor FirstFile on. The caller keeps its
	// own copies.
	Files []*os.File
	// Opens are files that the program opens by these names, for reading, or for
	// reading and writing, until Process.Started. They are the caller's, and must
	// stay open until then. What the program can do with one is what it was
	// opened for here. A device is handed over as it is; any other file is opened
	// again each time. With Config.OwnFiles a name may also be one that the program
	// opens to write and, if it is not there, to make (but not to cut off).
	Opens map[string]*os.File
	// Before are called when the program first opens one of Opens. It stands still
	// until they return, and so does any other of its threads that opens a file. An
	// error fails that opening and all later ones, and is what Process.Started
	// returns. The context ends when Started is called.
	Before map[string]func(context.Context) error
	// Copies are files whose content is to be in RunDir, under these names, before the
	// program starts. They are read from where they stand, are the caller's, and may
	// be closed when Start returns. Only with Config.OwnFiles.
	Copies map[string]*os.File
	// Limits are those of its control group; zero fields are no limits.
	Limits cgroup.Limits
	// FileBytes is how long the program may make any file.
	FileBytes int64
	// DieWithParent: it must not outlive this process.
	DieWithParent bool
}

// Start makes the launcher the program. It returns when the program runs, with
// files yet to open: call Process.Started when it has. The cell is used up,
// whatever Start returns.
func (c *Cell) Start(ctx context.Context, job Job) (_ *Process, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(c.Close)
	if c.group != nil {
		if err = c.group.Set(job.Limits); err != nil {
			return nil, fmt.Errorf("limit program: %w", err)
		}
	}
	if err = c.send(job); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTime, fmt.Errorf("%w: program has not started after %s", errdef.ErrTimeout, prepareTime))
	defer cancel()
	o, err := c.execute(ctx, job)
	if err != nil {
		return nil, c.failed(err)
	}
	u.Release()
	return c.process(o), nil
}

func (c *Cell) send(spec Job) error {
	all := append([]*os.File{spec.Output}, spec.Files...)
	if c.uid != nil {
		all = append(all, c.uid.lock) // it is held for as long as the program lives
	}
	count := len(all)
	var copies []string
	for name, f := range spec.Copies {
		copies, all = append(copies, name), append(all, f)
	}
	fds := make([]int, len(all))
	for i, f := range all {
		fds[i] = int(f.Fd())
	}
	program := c.jail.cfg.Program
	j := job{
		Path: program, Args: append([]string{program}, spec.Args...), Env: spec.Env,
		Files: count, Copies: copies, FileBytes: uint64(spec.FileBytes), DieWithParent: spec.DieWithParent, Landlock: c.jail.level.Landlock,
	}
	return sendMessage(int(c.socket.Fd()), j, fds...)
}

// execute waits until the launcher is the program, and opens files for it from
// then on.
func (c *Cell) execute(ctx context.Context, job Job) (_ *opener, err error) {
	_, fds, err := c.hear(ctx)
	if err != nil {
		return nil, err
	}
	if len(fds) != 1 {
		closeAll(fds)
		return nil, fmt.Errorf("%w: launcher sent %d files", errdef.ErrInvalid, len(fds))
	}
	opens := map[string]*os.File{}
	maps.Copy(opens, job.Opens)
	if c.jail.cfg.OwnFiles && len(c.link) > 0 {
		opens[tunDevice] = c.link[0]
	}
	o, err := newOpener(ctx, os.NewFile(uintptr(fds[0]), "seccomp"), c.cmd.Process.Pid, opens, job.Before)
	if err != nil {
		return nil, err
	}
	_, fds, err = c.hear(ctx)
	if errors.Is(err, errHungUp) { // as it should
		o.executed.Store(true)
		return o, nil
	}
	closeAll(fds)
	if err == nil {
		err = fmt.Errorf("%w: launcher answered twice", errdef.ErrInvalid)
	}
	return nil, errors.Join(err, o.close())
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // never written to by us
	}
}

// tail keeps the first of what a launcher has to say when it fails.
type tail struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

const maxTail = 4 << 10

// Write keeps what there is room for.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p[:min(len(p), maxTail-t.buf.Len())])
	return len(p), nil
}

func (t *tail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if text := bytes.TrimSpace(t.buf.Bytes()); len(text) > 0 {
		return ": " + string(text)
	}
	return ""
}
