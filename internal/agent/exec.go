package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// exec answers VerbExec.
func (a *Agent) exec(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.ExecRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	pr, err := a.run(&req)
	if err != nil {
		return nil, err
	}
	return a.follow(ctx, st, pr)
}

// attach answers VerbAttach.
func (a *Agent) attach(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.ProcessRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	pr, err := a.procs.find(req.PID)
	if err != nil {
		return nil, err
	}
	return a.follow(ctx, st, pr)
}

// follow connects a stream to a process until one of them ends.
func (a *Agent) follow(ctx context.Context, st *guestproto.Stream, pr *process) (guestproto.Message, error) {
	att, backlog := pr.join(st)
	defer pr.detach(att)
	err := replay(ctx, st, pr.info.PID, &backlog)
	if err != nil {
		return nil, pr.abandon(err)
	}
	close(att.ready)
	if pr.stdin != nil {
		a.work.Go(func() { pr.feed(ctx, st) })
	}
	select {
	case <-pr.done:
		a.procs.told(pr)
		exit := pr.exit
		return &exit, nil
	case <-ctx.Done():
		return nil, pr.abandon(context.Cause(ctx))
	}
}

// replay says which process it is and sends what it wrote meanwhile.
func replay(ctx context.Context, st *guestproto.Stream, pid int, backlog *ring) error {
	err := st.SendMessage(ctx, &guestproto.Started{PID: pid, Dropped: backlog.dropped})
	for _, piece := range backlog.pieces {
		if err != nil {
			return err
		}
		_, err = st.Send(ctx, piece.Channel, piece.Data)
	}
	return err
}

// abandon deals with a process whose stream has ended before it: one that the
// host gave up is killed, unless it is a background process; one whose host
// went away goes on and waits for another.
func (pr *process) abandon(err error) error {
	var reset *guestproto.ResetError
	if errors.As(err, &reset) && reset.Code == guestproto.CodeCanceled && !pr.info.Background {
		pr.kill()
	}
	return err
}

// feed hands a stream's input to the process. Input that nobody takes is read
// all the same: a host that waits for credit would not hear why.
//
// One stream at a time: what an earlier one sent goes first, even if that has
// ended and the process reads nothing. Then those after it wait for no longer
// than they last, so that hosts which come and go leave nobody behind.
func (pr *process) feed(ctx context.Context, st *guestproto.Stream) {
	if !pr.takeInput(ctx) {
		return
	}
	defer func() { pr.input <- struct{}{} }()
	var failed error
	for {
		c, err := st.Recv(ctx)
		if errors.Is(err, io.EOF) && pr.tty == nil {
			_ = pr.stdin.Close() // closed twice is closed
		}
		if err != nil {
			return
		}
		if c.Channel == guestproto.ChanStdin && failed == nil {
			_, failed = pr.stdin.Write(c.Data)
		}
	}
}

// takeInput waits for the turn to write to the process.
func (pr *process) takeInput(ctx context.Context) bool {
	select {
	case <-pr.input:
		return true
	default:
	}
	select {
	case <-pr.input:
		return true
	case <-ctx.Done():
		return false
	}
}

// run starts the process that a request describes.
func (a *Agent) run(req *guestproto.ExecRequest) (*process, error) {
	if len(req.Argv) == 0 || strings.ContainsRune(strings.Join(append(req.Argv, req.Env...), ""), 0) {
		return nil, fmt.Errorf("%w: exec: argv is empty or holds a zero byte", errdef.ErrInvalid)
	}
	who, err := a.account(req.User)
	if err != nil {
		return nil, fmt.Errorf("exec %s: %w", req.Argv[0], err)
	}
	if err = a.procs.admit(); err != nil {
		return nil, fmt.Errorf("exec %s: %w", req.Argv[0], err)
	}
	pr, err := a.launch(req, who)
	if err != nil {
		a.procs.dismiss()
		return nil, err
	}
	return pr, nil
}

func (a *Agent) launch(req *guestproto.ExecRequest, who *account) (*process, error) {
	c := &command{argv: req.Argv, env: a.environ(req, who), dir: workDir(req.Dir, who.home), user: who, tty: req.PTY}
	if len(req.SecretEnv) > 0 {
		var err error
		if c.env, err = a.secretEnv(c.env, req.SecretEnv); err != nil {
			return nil, fmt.Errorf("exec %s: %w", req.Argv[0], err)
		}
	}
	ends, err := openStdio(req)
	if err != nil {
		return nil, fmt.Errorf("exec %s: %w", req.Argv[0], categorize(err))
	}
	c.files = ends.child
	pr := &process{
		agent: a, begun: time.Now(), stdin: ends.stdin, tty: ends.tty, done: make(chan struct{}), input: make(chan struct{}, 1),
		info: guestproto.ProcessInfo{
			Argv: shorten(req.Argv), User: who.name, Dir: c.dir, Started: time.Now().UnixNano(),
			PTY: req.PTY, Background: req.Background,
		},
	}
	pr.input <- struct{}{}
	if pr.child, err = a.procs.start(c); err != nil {
		ends.closeParent()
		return nil, err
	}
	pr.info.PID = pr.child.pid
	a.procs.add(pr)
	pr.pumps.Add(len(ends.outputs))
	for i, f := range ends.outputs {
		ch := guestproto.ChanStdout + guestproto.Channel(i)
		a.work.Go(func() { pr.pump(f, ch) })
	}
	a.work.Go(func() { pr.watch(req.Timeout, ends.outputs) })
	return pr, nil
}

// stdio is both ends of a process's first three descriptors.
type stdio struct {
	child   []*os.File
	stdin   *os.File   // nil without input
	outputs []*os.File // stdout and stderr, or the terminal
	tty     *os.File
}

func (s *stdio) closeParent() {
	closeAll(s.outputs)
	if s.stdin != nil && s.stdin != s.tty {
		_ = s.stdin.Close()
	}
}

func openStdio(req *guestproto.ExecRequest) (*stdio, error) {
	if req.PTY {
		return openTerminal(req.Rows, req.Cols)
	}
	var s stdio
	err := s.open(req.Stdin)
	if err != nil {
		closeAll(s.child)
		s.closeParent()
		return nil, err
	}
	return &s, nil
}

func (s *stdio) open(stdin bool) error {
	if !stdin {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return err
		}
		s.child = append(s.child, null)
	} else {
		r, w, err := pipe(writeEnd)
		if err != nil {
			return err
		}
		s.child, s.stdin = append(s.child, r), w
	}
	for range 2 {
		r, w, err := pipe(readEnd)
		if err != nil {
			return err
		}
		s.child, s.outputs = append(s.child, w), append(s.outputs, r)
	}
	return nil
}

const (
	readEnd  = 0
	writeEnd = 1
)

// pipe makes a pipe of which the agent keeps one end. The other stays blocking,
// as programs expect.
func pipe(ours int) (r, w *os.File, err error) {
	var fds [2]int
	if err = unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	if err = unix.SetNonblock(fds[ours], true); err != nil {
		_, _ = unix.Close(fds[0]), unix.Close(fds[1])
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe"), nil
}

// openTerminal makes a pseudo-terminal by hand.
func openTerminal(rows, cols int) (*stdio, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	slave, err := openSlave(master, rows, cols)
	if err != nil {
		_ = master.Close()
		return nil, err
	}
	child := []*os.File{slave}
	for range 2 {
		fd, err := unix.FcntlInt(slave.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			closeAll(append(child, master))
			return nil, os.NewSyscallError("dup", err)
		}
		child = append(child, os.NewFile(uintptr(fd), slave.Name()))
	}
	return &stdio{child: child, stdin: master, outputs: []*os.File{master}, tty: master}, nil
}

func openSlave(master *os.File, rows, cols int) (*os.File, error) {
	number, err := control(master, func(fd int) (int, error) {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return 0, err
		}
		return unix.IoctlGetInt(fd, unix.TIOCGPTN)
	})
	if err != nil {
		return nil, os.NewSyscallError("ioctl ptmx", err)
	}
	if rows > 0 && cols > 0 {
		if err = setSize(master, rows, cols); err != nil {
			return nil, err
		}
	}
	fd, err := unix.Open(fmt.Sprintf("/dev/pts/%d", number), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("open pts", err)
	}
	return os.NewFile(uintptr(fd), "pts"), nil
}

// control calls f with the file's descriptor, without making it blocking.
func control(file *os.File, f func(fd int) (int, error)) (n int, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) { n, err = f(int(fd)) })
	return n, errors.Join(cerr, err)
}

func setSize(tty *os.File, rows, cols int) error {
	const most = 1<<16 - 1
	if rows < 1 || cols < 1 || rows > most || cols > most {
		return fmt.Errorf("%w: terminal of %d rows and %d columns", errdef.ErrInvalid, rows, cols)
	}
	_, err := control(tty, func(fd int) (int, error) {
		return 0, unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(rows), Col: uint16(cols)})
	})
	return err
}

// environ is the environment that a request asks for.
func (a *Agent) environ(req *guestproto.ExecRequest, who *account) []string {
	if req.ReplaceEnv {
		return req.Env
	}
	env := []string{
		"PATH=" + defaultPath, "HOME=" + who.home, "USER=" + who.name, "LOGNAME=" + who.name,
		"SHELL=" + who.shell, "LANG=C.UTF-8",
	}
	if req.PTY {
		env = append(env, "TERM=xterm-256color")
	}
	return mergeEnv(mergeEnv(env, a.env), req.Env)
}

// mergeEnv returns env with more's values in place of its own.
func mergeEnv(env, more []string) []string {
	for _, kv := range more {
		name, _, _ := strings.Cut(kv, "=")
		i := slices.IndexFunc(env, func(have string) bool { return strings.HasPrefix(have, name+"=") })
		if i >= 0 {
			env[i] = kv
		} else {
			env = append(env, kv)
		}
	}
	return env
}

func lookupEnv(env []string, name string) string {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// workDir is where a command starts: in dir, or at home, or at the root where
// the user has no home, as nobody has none.
func workDir(dir, home string) string {
	if dir == "" {
		if st, err := os.Stat(home); err != nil || !st.IsDir() {
			return "/"
		}
	}
	return absolute(dir, home)
}

// absolute is path, starting at home if it is relative.
func absolute(path, home string) string {
	if strings.HasPrefix(path, "/") {
		return filepath.Clean(path)
	}
	return filepath.Join(home, path)
}

// shorten cuts what is shown of a command line.
func shorten(argv []string) []string {
	var out []string
	left := maxArgvShown
	for _, arg := range argv {
		if len(arg) > left {
			return append(out, arg[:left]+"...")
		}
		out = append(out, arg)
		left -= len(arg) + 1
		if left <= 0 {
			return out
		}
	}
	return out
}
