package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

const (
	maxProcesses = 512 // running, that the agent started
	maxFinished  = 64  // ended, and nobody has asked yet
	maxArgvShown = 4 << 10

	// outputGrace is how long output is awaited after a process has ended but
	// others hold its pipes open.
	outputGrace = 250 * time.Millisecond
)

// processes holds what the agent has started.
type processes struct {
	agent  *Agent
	reaper reaper

	mu       sync.Mutex
	byPID    map[int]*process
	running  int
	finished []*process // in order of their ends
}

// process is one started command and its output.
type process struct {
	agent *Agent
	info  guestproto.ProcessInfo // as it was started
	child *child
	begun time.Time
	stdin *os.File      // nil without one
	tty   *os.File      // nil without a terminal
	input chan struct{} // holds a token while no stream writes to stdin

	timedOut atomic.Bool
	pumps    sync.WaitGroup
	exit     guestproto.Exit // set before done is closed
	done     chan struct{}   // closed when it has ended and its output is taken
	told     bool            // its end was sent to a host; guarded by processes.mu

	mu       sync.Mutex
	ring     ring        // output that came while nobody was attached
	attached *attachment // who gets output now
}

// attachment is a stream that gets a process's output.
type attachment struct {
	stream *guestproto.Stream
	ready  chan struct{} // closed when earlier output has been sent
}

func (p *processes) init(a *Agent) {
	p.agent = a
	p.byPID = map[int]*process{}
	p.reaper = reaper{sys: a.sys, children: map[int]*child{}}
	if a.sys.reapsAll() {
		a.work.Go(func() { p.reaper.run(a.ctx) })
	}
}

// command is a process about to be started.
type command struct {
	argv  []string
	env   []string
	dir   string
	user  *account
	files []*os.File // its descriptors from 0 on, closed by start
	tty   bool       // descriptor 0 becomes its controlling terminal
}

// start starts c as the leader of a session of its own.
func (p *processes) start(c *command) (*child, error) {
	defer closeAll(c.files)
	path, err := lookPath(c.argv[0], c.dir, c.env)
	if err != nil {
		return nil, fmt.Errorf("exec %s: %w", c.argv[0], err)
	}
	attr := &syscall.ProcAttr{
		Dir: c.dir, Env: c.env,
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: c.tty, Credential: c.user.credential()},
	}
	for _, f := range c.files {
		attr.Files = append(attr.Files, f.Fd())
	}
	ch, err := p.reaper.start(path, c.argv, attr, &p.agent.work)
	if err != nil {
		return nil, spawnError(c, path, err)
	}
	return ch, nil
}

// spawnError says in words why a process could not be started.
func spawnError(c *command, path string, err error) error {
	if st, serr := os.Stat(c.dir); serr != nil || !st.IsDir() {
		return failf(errdef.ErrNotFound, "exec %s: working directory %s: no such directory", c.argv[0], c.dir)
	}
	if errors.Is(err, unix.ENOENT) {
		return failf(errdef.ErrNotFound, "exec %s: its interpreter does not exist", path)
	}
	if isOneOf(err, unix.EAGAIN, unix.ENOMEM, unix.EMFILE, unix.ENFILE) {
		return failf(errdef.ErrUnavailable, "exec %s: the guest cannot start another process: %w", path, err)
	}
	return fmt.Errorf("exec %s: %w", path, categorize(err))
}

// lookPath finds the file that a command's name means.
func lookPath(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		full := name
		if !strings.HasPrefix(name, "/") {
			full = dir + "/" + name
		}
		return full, executable(full)
	}
	found := failf(errdef.ErrNotFound, "no such file or directory in $PATH")
	if name == "" {
		return "", found
	}
	for d := range strings.SplitSeq(lookupEnv(env, "PATH"), ":") {
		if !strings.HasPrefix(d, "/") {
			d = dir + "/" + d
		}
		err := executable(d + "/" + name)
		if err == nil {
			return d + "/" + name, nil
		}
		if errors.Is(err, errdef.ErrDenied) {
			found = err
		}
	}
	return "", found
}

// executable reports why path cannot be run, as far as its mode tells.
func executable(path string) error {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case errors.Is(err, os.ErrPermission):
		return failf(errdef.ErrDenied, "permission denied")
	case err != nil:
		return failf(errdef.ErrNotFound, "no such file or directory")
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return failf(errdef.ErrDenied, "is a directory")
	case st.Mode&0o111 == 0:
		return failf(errdef.ErrDenied, "permission denied")
	}
	return nil
}

// admit makes room for one more process, or says why there is none.
func (p *processes) admit() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.agent.ctx.Err() != nil {
		return errClosed
	}
	if p.running >= maxProcesses {
		return failf(errdef.ErrExhausted, "%d processes are running already", p.running)
	}
	p.running++
	return nil
}

// dismiss gives back what admit took.
func (p *processes) dismiss() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running--
}

// add lists a process that runs.
func (p *processes) add(pr *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.byPID[pr.info.PID] = pr
	if p.agent.ctx.Err() != nil {
		killSession(pr.info.PID) // it started while killAll looked
	}
}

// ended moves a process to those that wait for someone to ask.
func (p *processes) ended(pr *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running--
	p.finished = append(p.finished, pr)
	if len(p.finished) > maxFinished {
		p.dropLocked(p.finished[0])
	}
}

// told notes that somebody was sent a process's end. It is not listed any more,
// but can still be attached to for a while: a host that went away at that
// moment has not heard.
func (p *processes) told(pr *process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pr.told = true
}

func (p *processes) dropLocked(pr *process) {
	p.finished = slices.DeleteFunc(p.finished, func(o *process) bool { return o == pr })
	if p.byPID[pr.info.PID] == pr {
		delete(p.byPID, pr.info.PID)
	}
}

// find returns the process that has, or had, this pid.
func (p *processes) find(pid int) (*process, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pr := p.byPID[pid]
	if pr == nil {
		return nil, failf(errdef.ErrNotFound, "process %d: no such process of the agent's", pid)
	}
	return pr, nil
}

func (p *processes) killAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for pid, pr := range p.byPID {
		if !pr.over() {
			killSession(pid)
		}
	}
}

// list returns all processes, by pid.
func (p *processes) list() []guestproto.ProcessInfo {
	p.mu.Lock()
	all := make([]*process, 0, len(p.byPID))
	for _, pr := range p.byPID {
		if !pr.told {
			all = append(all, pr)
		}
	}
	p.mu.Unlock()
	infos := make([]guestproto.ProcessInfo, len(all))
	for i, pr := range all {
		infos[i] = pr.describe()
	}
	slices.SortFunc(infos, func(a, b guestproto.ProcessInfo) int { return a.PID - b.PID })
	return infos
}

// over reports whether the process itself has ended.
func (pr *process) over() bool {
	select {
	case <-pr.child.exited:
		return true
	default:
		return false
	}
}

func (pr *process) describe() guestproto.ProcessInfo {
	info := pr.info
	pr.mu.Lock()
	info.Attached = pr.attached != nil
	pr.mu.Unlock()
	select {
	case <-pr.done:
		info.Exit = pr.exit
	default:
		info.Running = true
	}
	return info
}

// watch waits for the process's end and takes the rest of its output. It owns
// the process's files.
func (pr *process) watch(timeout time.Duration, outputs []*os.File) {
	if timeout > 0 {
		timer := time.AfterFunc(timeout, func() {
			pr.timedOut.Store(true)
			pr.kill()
		})
		defer timer.Stop()
	}
	<-pr.child.exited
	for _, f := range outputs {
		// A pipe that knows no deadline ends with its last writer.
		_ = f.SetReadDeadline(time.Now().Add(outputGrace))
	}
	pr.pumps.Wait()
	pr.exit = exitOf(pr.child.status)
	pr.exit.TimedOut = pr.timedOut.Load()
	pr.exit.Duration = time.Since(pr.begun)
	if pr.stdin != nil {
		_ = pr.stdin.Close()
	}
	pr.agent.procs.ended(pr)
	close(pr.done)
}

func exitOf(s syscall.WaitStatus) guestproto.Exit {
	if s.Signaled() {
		return guestproto.Exit{Code: -1, Signal: int(s.Signal())}
	}
	return guestproto.Exit{Code: s.ExitStatus()}
}

// kill ends the process and what it started, unless it has ended.
func (pr *process) kill() {
	if !pr.over() {
		killSession(pr.info.PID)
	}
}

// killSession kills a process group, and the other groups of the session that
// it leads: a shell gives each of its jobs a group of its own.
func killSession(sid int) {
	members := sessionMembers(sid)
	_ = syscall.Kill(-sid, syscall.SIGKILL) // gone already is as good
	for _, pid := range members {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// sessionMembers lists the processes of a session.
func sessionMembers(sid int) []int {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close() //nolint:errcheck // a directory that was read
	names, _ := dir.Readdirnames(-1)
	var pids []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if got, err := unix.Getsid(pid); err == nil && got == sid {
			pids = append(pids, pid)
		}
	}
	return pids
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// listProcesses answers VerbProcesses.
func (a *Agent) listProcesses(ctx context.Context, st *guestproto.Stream, _ []byte) (guestproto.Message, error) {
	for part := range slices.Chunk(a.procs.list(), 4) {
		if err := st.SendMessage(ctx, &guestproto.Processes{Processes: part}); err != nil {
			return nil, err
		}
	}
	return &guestproto.Empty{}, nil
}

// signal answers VerbSignal.
func (a *Agent) signal(_ context.Context, _ *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.SignalRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	pr, err := a.procs.find(req.PID)
	if err != nil {
		return nil, err
	}
	if pr.over() {
		return nil, failf(errdef.ErrNotFound, "process %d has ended", req.PID)
	}
	pid := req.PID
	if req.Group {
		pid = -pid
	}
	if err := syscall.Kill(pid, syscall.Signal(req.Signal)); err != nil {
		return nil, fmt.Errorf("signal %d to process %d: %w", req.Signal, req.PID, categorize(err))
	}
	return &guestproto.Empty{}, nil
}

// resize answers VerbResize.
func (a *Agent) resize(_ context.Context, _ *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.ResizeRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	pr, err := a.procs.find(req.PID)
	if err != nil {
		return nil, err
	}
	if pr.tty == nil {
		return nil, failf(errdef.ErrInvalid, "process %d has no terminal", req.PID)
	}
	if err := setSize(pr.tty, req.Rows, req.Cols); err != nil {
		return nil, fmt.Errorf("resize terminal of process %d: %w", req.PID, err)
	}
	return &guestproto.Empty{}, nil
}
