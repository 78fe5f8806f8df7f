package agent

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

//go:embed warm.py
var warmPython []byte

const (
	maxInterpreters = 8
	maxReply        = 16 << 20
	readyTime       = 60 * time.Second
	interruptGrace  = 2 * time.Second // from SIGINT to SIGKILL
	defaultEvalTime = 10 * time.Minute
)

// interpreters holds the warm interpreters, one for each language.
type interpreters struct {
	agent *Agent

	mu     sync.Mutex
	byLang map[string]*interpreter
}

// interpreter is one warm interpreter, or the memory of one. Only who holds
// the turn may touch the fields below it.
type interpreter struct {
	agent    *Agent
	language string

	// These are for those, too, who come while another has the turn.
	running atomic.Pointer[interpProcess] // proc, once it is ready
	owed    atomic.Pointer[[]byte]        // the forked request that it gets before anything else

	turn  chan struct{} // holds a token while nobody uses the interpreter
	argv  []string
	proc  *interpProcess // nil when none runs
	ready []byte         // its first line
	died  bool           // one ran before, with state that is now lost
	still bool           // it can run no code before the next request
}

func (s *interpreters) init(a *Agent) {
	s.agent = a
	s.byLang = map[string]*interpreter{}
}

// get returns the interpreter of a language, started or not.
func (s *interpreters) get(language string) (*interpreter, error) {
	if !plain(language, 32) {
		return nil, fmt.Errorf("%w: language %q", errdef.ErrInvalid, language)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if in := s.byLang[language]; in != nil {
		return in, nil
	}
	if len(s.byLang) >= maxInterpreters {
		return nil, fmt.Errorf("%w: %d interpreters exist already", errdef.ErrExhausted, maxInterpreters)
	}
	in := &interpreter{agent: s.agent, language: language, turn: make(chan struct{}, 1)}
	in.turn <- struct{}{}
	s.byLang[language] = in
	return in, nil
}

// all returns the interpreters that there are.
func (s *interpreters) all() []*interpreter {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ins []*interpreter
	for _, in := range s.byLang {
		ins = append(ins, in)
	}
	return ins
}

// close ends all interpreters. Nobody may be using one.
func (s *interpreters) close() {
	for _, in := range s.all() {
		if in.proc != nil {
			in.bury()
		}
	}
}

// acquire waits for the interpreter's turn.
func (in *interpreter) acquire(ctx context.Context) error {
	select {
	case <-in.turn:
		return nil
	default:
	}
	select {
	case <-in.turn:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for %s interpreter: %w", in.language, context.Cause(ctx))
	}
}

func (in *interpreter) release() { in.turn <- struct{}{} }

// forkSignal tells an interpreter in the middle of an evaluation to reseed.
const forkSignal = unix.SIGUSR2

// forked sees to it that no running interpreter goes on as its parent would.
// One that can run nothing before the next request reseeds then, before it does
// anything else: under emulation that takes longer than all the rest, and many
// forks never evaluate. One that evaluates is signalled, as its code may run
// for ever, and reseeds before that goes on; forked returns how many were. Any
// other has to confirm now.
func (s *interpreters) forked(ctx context.Context, generation string) (signaled int, err error) {
	line := []byte(`{"id":0,"op":"forked","generation":"` + generation + `"}`)
	for _, in := range s.all() {
		sent, err := in.forked(ctx, line)
		if err != nil {
			return signaled, fmt.Errorf("%s: %w", in.language, err)
		}
		if sent {
			signaled++
		}
	}
	return signaled, nil
}

// errJustBusy: the identity was taken to be quick; it must not wait now.
var errJustBusy = failf(errdef.ErrConflict, "it has just begun to evaluate")

func (in *interpreter) forked(ctx context.Context, line []byte) (signaled bool, err error) {
	_, bounded := ctx.Deadline()
	select {
	case <-in.turn:
	default:
		if signaled, err = in.forkedBusy(line); signaled || err == nil {
			return signaled, err
		}
		// It knows no such signal: its code has to come to an end.
		if !bounded {
			return false, errJustBusy
		}
		if err = in.acquire(ctx); err != nil {
			return false, err
		}
	}
	defer in.release()
	if in.proc == nil || in.proc.over() {
		return false, nil // what does not run has no state to share
	}
	in.owed.Store(&line)
	switch {
	case in.isStill():
		return false, nil
	case bounded:
		return false, in.settle(ctx)
	case in.proc.reseed() == nil:
		return true, nil
	default:
		return false, errJustBusy
	}
}

// forkedBusy tells an interpreter that another has the turn of. It is owed the
// request in any case, from before it is looked at: so one that is only being
// started gets it before its first.
func (in *interpreter) forkedBusy(line []byte) (signaled bool, err error) {
	in.owed.Store(&line)
	proc := in.running.Load()
	if proc == nil || proc.over() {
		return false, nil
	}
	err = proc.reseed()
	return err == nil, err
}

// reseed sends the process the signal to reseed, if it has a handler: without
// one the signal would end it.
func (p *interpProcess) reseed() error {
	const longest = 16 << 10
	pid := p.child.pid
	status, err := readSmall(fmt.Sprintf("/proc/%d/status", pid), longest)
	if err != nil {
		return err
	}
	if !catches(status, forkSignal) {
		return failf(errdef.ErrUnsupported, "it has no handler for signal %d", forkSignal)
	}
	return os.NewSyscallError("kill", syscall.Kill(pid, forkSignal))
}

// catches reports whether a process with this /proc/PID/status has a handler.
func catches(status []byte, sig syscall.Signal) bool {
	_, mask, _ := bytes.Cut(status, []byte("\nSigCgt:"))
	mask, _, _ = bytes.Cut(mask, []byte("\n"))
	bits, err := strconv.ParseUint(string(bytes.TrimSpace(mask)), 16, 64)
	return err == nil && bits&(1<<(sig-1)) != 0
}

// settle has the interpreter do what it owes, which may be more by the time
// that it has.
func (in *interpreter) settle(ctx context.Context) error {
	for line := in.owed.Load(); line != nil; line = in.owed.Load() {
		if err := in.proc.request(ctx, *line); err != nil {
			return err
		}
		reply, err := in.proc.reply(ctx, answers(0), nil)
		if err != nil {
			return err
		}
		if !bytes.Equal(reply, []byte(`{"id":0,"forked":true}`)) {
			return fmt.Errorf("interpreter answered %.100q", reply)
		}
		in.owed.CompareAndSwap(line, nil)
	}
	return nil
}

// isStill reports whether a running interpreter can run no code before the next
// request: nobody uses it, so it waits for one, and it has no thread but the
// one that waits.
func (in *interpreter) isStill() bool {
	if !in.still {
		in.still = threads(in.proc.child.pid) == 1
	}
	return in.still
}

// quiesce notes which interpreters are still, so that no fork has to look.
func (s *interpreters) quiesce() {
	for _, in := range s.all() {
		select {
		case <-in.turn:
			in.still = in.proc != nil && threads(in.proc.child.pid) == 1
			in.release()
		default: // it evaluates
		}
	}
}

// still reports whether every interpreter is still, or does not run.
func (s *interpreters) still() bool {
	for _, in := range s.all() {
		select {
		case <-in.turn:
			still := in.proc == nil || in.proc.over() || in.isStill()
			in.release()
			if !still {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// threads counts the threads of a process, 0 if it cannot.
func threads(pid int) int {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return 0
	}
	return len(tasks)
}

// warm answers VerbWarm.
func (a *Agent) warm(ctx context.Context, _ *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.WarmRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	in, err := a.interps.get(req.Language)
	if err != nil {
		return nil, err
	}
	if err = in.acquire(ctx); err != nil {
		return nil, err
	}
	defer in.release()
	if len(req.Argv) > 0 {
		in.argv = req.Argv
	}
	if err = in.ensure(ctx); err != nil {
		return nil, err
	}
	in.died = false
	return &guestproto.WarmDone{PID: in.proc.child.pid, Line: in.ready}, nil
}

// eval answers VerbEval.
func (a *Agent) eval(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.EvalRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	if bytes.IndexByte(req.Line, '\n') >= 0 {
		return nil, fmt.Errorf("%w: eval: the request is not one line", errdef.ErrInvalid)
	}
	in, err := a.interps.get(req.Language)
	if err != nil {
		return nil, err
	}
	if err = in.acquire(ctx); err != nil {
		return nil, err
	}
	defer in.release()
	if err = in.ensure(ctx); err != nil {
		return nil, err
	}
	return in.eval(ctx, st, &req)
}

// eval has the turn and a running interpreter.
func (in *interpreter) eval(ctx context.Context, st *guestproto.Stream, req *guestproto.EvalRequest) (guestproto.Message, error) {
	done := &guestproto.EvalDone{Restarted: in.died}
	in.died = false
	limit := req.Timeout
	if limit <= 0 {
		limit = defaultEvalTime
	}
	run := in.begin(ctx, limit)
	defer run.end()
	in.still = false
	err := in.settle(run.ctx)
	if err == nil {
		err = in.proc.request(run.ctx, req.Line)
	}
	var reply []byte
	if err == nil {
		reply, err = in.proc.reply(run.ctx, answers(req.ID), func(ch guestproto.Channel, p []byte) error {
			_, serr := st.Send(run.ctx, ch, p)
			if ctx.Err() != nil {
				return nil // nobody listens, but the code runs on
			}
			return serr
		})
	}
	done.TimedOut = run.timedOut()
	if err != nil {
		err = in.proc.autopsy(err)
		in.bury()
		done.Killed = true
		if done.TimedOut {
			return done, nil
		}
		return nil, fmt.Errorf("%w: %s interpreter: %w", errdef.ErrUnavailable, in.language, err)
	}
	if _, err = st.Send(ctx, guestproto.ChanReply, reply); err != nil {
		return nil, err
	}
	return done, nil
}

// errEvalTimeout is the cause of an evaluation's end by its own time limit.
var errEvalTimeout = fmt.Errorf("%w: evaluation", errdef.ErrTimeout)

// evaluation bounds one use of an interpreter: when its time is up, or when the
// host gives up, the code is interrupted, and after a grace ctx ends too.
type evaluation struct {
	ctx  context.Context
	end  func()
	soft context.Context
}

func (e *evaluation) timedOut() bool { return errors.Is(context.Cause(e.soft), errEvalTimeout) }

func (in *interpreter) begin(ctx context.Context, limit time.Duration) *evaluation {
	// A host that merely went away leaves the code running: only a reset ends it.
	soft, cancelSoft := context.WithTimeoutCause(in.agent.ctx, limit, errEvalTimeout)
	soft, give := context.WithCancelCause(soft)
	stopWatch := context.AfterFunc(ctx, func() {
		var reset *guestproto.ResetError
		if cause := context.Cause(ctx); errors.As(cause, &reset) {
			give(cause)
		}
	})
	hard, cancelHard := context.WithCancelCause(context.WithoutCancel(soft))
	pid := in.proc.child.pid
	var timer *time.Timer
	var mu sync.Mutex
	stopSoft := context.AfterFunc(soft, func() {
		_ = syscall.Kill(pid, syscall.SIGINT) // the hard end follows
		mu.Lock()
		defer mu.Unlock()
		timer = time.AfterFunc(interruptGrace, func() { cancelHard(context.Cause(soft)) })
	})
	return &evaluation{ctx: hard, soft: soft, end: func() {
		stopWatch()
		stopSoft()
		mu.Lock()
		if timer != nil {
			timer.Stop()
		}
		mu.Unlock()
		cancelHard(nil)
		give(nil)
		cancelSoft()
	}}
}

// ensure starts the interpreter unless it runs.
func (in *interpreter) ensure(ctx context.Context) error {
	if in.proc != nil && in.proc.over() {
		in.bury()
	}
	if in.proc != nil {
		return nil
	}
	argv, err := in.command()
	if err != nil {
		return err
	}
	in.owed.Store(nil) // it begins after whatever was owed
	proc, err := in.agent.startInterpreter(argv)
	if err != nil {
		return fmt.Errorf("start %s interpreter: %w", in.language, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, readyTime, fmt.Errorf("%w: not ready after %s", errdef.ErrTimeout, readyTime))
	defer cancel()
	var said ring
	line, err := proc.reply(ctx, isLine, func(ch guestproto.Channel, p []byte) error {
		said.add(ch, p)
		return nil
	})
	if err == nil && !bytes.HasPrefix(bytes.ReplaceAll(line, []byte(" "), nil), []byte(`{"ready":true`)) {
		err = fmt.Errorf("%w: first line is %.100q", errdef.ErrUnavailable, line)
	}
	if err != nil {
		proc.end()
		return fmt.Errorf("start %s interpreter: %w: %s", in.language, err, said.tail(maxHookOutput))
	}
	in.proc, in.ready, in.still = proc, line, false
	in.running.Store(proc)
	return nil
}

// command is how the interpreter is started.
func (in *interpreter) command() ([]string, error) {
	if len(in.argv) > 0 {
		return in.argv, nil
	}
	if in.language != "python" {
		return nil, fmt.Errorf("%w: no interpreter for %s is known or was warmed", errdef.ErrUnsupported, in.language)
	}
	script := runDir + "/warm.py"
	if err := in.agent.own.put(script, string(warmPython)); err != nil {
		return nil, err
	}
	return []string{"python3", "-u", in.agent.path(script)}, nil
}

// bury ends the process; the next evaluation starts another.
func (in *interpreter) bury() {
	in.running.Store(nil)
	in.proc.end()
	in.proc, in.died, in.still = nil, true, false
	in.owed.Store(nil)
}

// interpProcess is a running interpreter and the agent's ends of its pipes.
type interpProcess struct {
	child   *child
	record  *process // as others see it
	in      *os.File // requests
	outputs [3]*os.File
	events  *os.File // an epoll descriptor over outputs
	rest    []byte   // bytes of replies after the last line taken
}

// outputs of an interpreter, in the order in which epoll events name them.
const (
	outReplies = iota
	outStdout
	outStderr
)

func (p *interpProcess) over() bool { return p.record.over() }

// startInterpreter starts argv with the pipes that the protocol wants.
func (a *Agent) startInterpreter(argv []string) (*interpProcess, error) {
	who, err := a.account("")
	if err != nil {
		return nil, err
	}
	if err = a.procs.admit(); err != nil {
		return nil, err
	}
	p, err := a.launchInterpreter(argv, who)
	if err != nil {
		a.procs.dismiss()
		return nil, err
	}
	return p, nil
}

func (a *Agent) launchInterpreter(argv []string, who *account) (_ *interpProcess, err error) {
	c := &command{argv: argv, env: a.environ(&guestproto.ExecRequest{}, who), dir: who.home, user: who}
	p := &interpProcess{}
	defer func() {
		if err != nil {
			p.closeFiles()
		}
	}()
	if c.files, err = p.open(); err != nil {
		closeAll(c.files)
		return nil, categorize(err)
	}
	if p.child, err = a.procs.start(c); err != nil {
		return nil, err
	}
	p.record = &process{
		agent: a, child: p.child, begun: time.Now(), done: make(chan struct{}),
		info: guestproto.ProcessInfo{
			PID: p.child.pid, Argv: shorten(argv), User: who.name, Dir: c.dir,
			Started: time.Now().UnixNano(), Background: true, Tag: "interpreter",
		},
	}
	a.procs.add(p.record)
	a.work.Go(func() { p.record.watch(0, nil) })
	return p, nil
}

// open makes the pipes and returns the child's descriptors, from 0 to 4.
func (p *interpProcess) open() ([]*os.File, error) {
	files := make([]*os.File, 5)
	var err error
	if files[0], err = os.Open(os.DevNull); err != nil {
		return files, err
	}
	if files[3], p.in, err = pipe(writeEnd); err != nil {
		return files, err
	}
	for i, fd := range []int{outReplies: 4, outStdout: 1, outStderr: 2} {
		if p.outputs[i], files[fd], err = pipe(readEnd); err != nil {
			return files, err
		}
	}
	p.events, err = watchReadable(p.outputs[:])
	return files, err
}

// watchReadable returns an epoll descriptor that tells which files have bytes.
func watchReadable(files []*os.File) (*os.File, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	for i, f := range files {
		_, err = control(f, func(target int) (int, error) {
			return 0, unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, target, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)})
		})
		if err != nil {
			_ = unix.Close(fd)
			return nil, os.NewSyscallError("epoll_ctl", err)
		}
	}
	if err = unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), "epoll"), nil
}

func (p *interpProcess) closeFiles() {
	closeAll(p.outputs[:])
	_ = p.in.Close()
	_ = p.events.Close()
}

// end kills the interpreter and lets go of its pipes.
func (p *interpProcess) end() {
	p.record.kill()
	p.closeFiles()
}

// request sends a line. Replies that nobody asked for are dropped first, so
// that one stray line does not shift all later answers.
func (p *interpProcess) request(ctx context.Context, line []byte) error {
	p.rest = nil
	buf := make([]byte, guestproto.MaxData)
	for taken := 0; taken < pipeMost; {
		n := readNow(p.outputs[outReplies], buf)
		if n <= 0 {
			break
		}
		taken += n
	}
	defer expire(ctx, p.in.SetWriteDeadline)()
	_, err := p.in.Write(append(line, '\n'))
	return p.explain(ctx, err)
}

// expire makes a file's deadline pass when ctx ends.
func expire(ctx context.Context, set func(time.Time) error) (stop func()) {
	_ = set(time.Time{}) // files of this kind know deadlines
	cancel := context.AfterFunc(ctx, func() { _ = set(time.Unix(1, 0)) })
	return func() { cancel() }
}

// explain turns an error of a pipe into what it means.
func (p *interpProcess) explain(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, unix.EPIPE), errors.Is(err, io.EOF):
		return errGone
	default:
		return err
	}
}

// errGone is what a broken pipe of the protocol means.
var errGone = errors.New("it closed its end of the protocol")

// autopsy says how the interpreter ended, if that is why err happened.
func (p *interpProcess) autopsy(err error) error {
	if !errors.Is(err, errGone) {
		return err
	}
	select {
	case <-p.record.done:
		exit := p.record.exit
		if exit.Signal != 0 {
			return fmt.Errorf("it was ended by signal %d (%s)", exit.Signal, unix.SignalName(syscall.Signal(exit.Signal)))
		}
		return fmt.Errorf("it ended with status %d", exit.Code)
	case <-time.After(outputGrace):
		return err
	}
}

// answers tells which lines are the reply to a request. Others were written by
// the user's code, and mean nothing.
func answers(id int64) func(line []byte) bool {
	want := strconv.AppendInt(nil, id, 10)
	return func(line []byte) bool {
		rest, isReply := bytes.CutPrefix(line, []byte(`{"id":`))
		rest, isOurs := bytes.CutPrefix(bytes.TrimLeft(rest, " "), want)
		return isReply && isOurs && len(rest) > 0 && (rest[0] == ',' || rest[0] == '}')
	}
}

// isLine takes the first line that is not empty.
func isLine(line []byte) bool { return len(line) > 0 }

// reply waits for a line that is wanted, and hands all output that comes before
// it to output.
func (p *interpProcess) reply(ctx context.Context, wanted func([]byte) bool, output func(guestproto.Channel, []byte) error) ([]byte, error) {
	raw, err := p.events.SyscallConn()
	if err != nil {
		return nil, err
	}
	defer expire(ctx, p.events.SetReadDeadline)()
	buf := make([]byte, guestproto.MaxData)
	for {
		if line, ok := p.cut(wanted); ok {
			return line, p.drainOutput(buf, output)
		}
		var ready [3]unix.EpollEvent
		n := 0
		err = raw.Read(func(fd uintptr) bool {
			n, _ = unix.EpollWait(int(fd), ready[:], 0)
			return n > 0
		})
		if err != nil {
			return nil, p.explain(ctx, err)
		}
		for _, e := range ready[:n] {
			if err = p.take(int(e.Fd), buf, output); err != nil {
				return nil, p.explain(ctx, err)
			}
		}
	}
}

// cut takes lines off what came as replies, up to the first that is wanted.
func (p *interpProcess) cut(wanted func([]byte) bool) ([]byte, bool) {
	for {
		line, rest, ok := bytes.Cut(p.rest, []byte("\n"))
		if !ok {
			return nil, false
		}
		p.rest = rest
		if wanted(line) {
			return line, true
		}
	}
}

// take reads once from the output that has bytes.
func (p *interpProcess) take(which int, buf []byte, output func(guestproto.Channel, []byte) error) error {
	n := readNow(p.outputs[which], buf)
	switch {
	case n < 0:
		return nil
	case which == outReplies && n == 0:
		return io.EOF
	case which == outReplies:
		if len(p.rest)+n > maxReply {
			return fmt.Errorf("its reply is longer than %d bytes", maxReply)
		}
		p.rest = append(p.rest, buf[:n]...)
		return nil
	case n == 0: // user code closed it: no more of it is to be had
		return p.ignore(which)
	case output == nil:
		return nil
	default:
		return output(guestproto.ChanStdout+guestproto.Channel(which-outStdout), buf[:n])
	}
}

// drainOutput takes what was written before the reply.
func (p *interpProcess) drainOutput(buf []byte, output func(guestproto.Channel, []byte) error) error {
	for _, which := range []int{outStdout, outStderr} {
		for taken := 0; taken < pipeMost; {
			n := readNow(p.outputs[which], buf)
			if n <= 0 {
				break
			}
			taken += n
			if output == nil {
				continue
			}
			if err := output(guestproto.ChanStdout+guestproto.Channel(which-outStdout), buf[:n]); err != nil {
				return err
			}
		}
	}
	return nil
}

// ignore stops an output at its end from being reported for ever.
func (p *interpProcess) ignore(which int) error {
	_, err := control(p.outputs[which], func(target int) (int, error) {
		return control(p.events, func(fd int) (int, error) {
			return 0, unix.EpollCtl(fd, unix.EPOLL_CTL_DEL, target, nil)
		})
	})
	return err
}

// readNow reads what is there: -1 if nothing is.
func readNow(f *os.File, buf []byte) int {
	n, err := control(f, func(fd int) (int, error) { return unix.Read(fd, buf) })
	if err != nil {
		return -1
	}
	return n
}
