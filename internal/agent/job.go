package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

// errBox is wrapped by what went wrong with the mailbox, rather than with a job.
var errBox = errors.New("mailbox")

const (
	outputPiece = 256 << 10              // output kept back at most
	outputDelay = 100 * time.Millisecond // for at most so long
	longestWait = time.Second
)

// run is one job on its way. One thread does it all, so that what comes first
// does not depend on the Go scheduler.
type run struct {
	agent *Agent
	box   *mailbox
	job   *guestproto.Job

	child *child
	pidfd int // or -1, when it ended before one could be had
	begun time.Time
	took  time.Duration

	stdin    int // our end of the pipe, or -1
	input    []byte
	inputEnd bool

	outputs []*output
	fds     []unix.PollFd // kept, as garbage is not collected while a job runs
	left    int64         // how much output is allowed yet
	since   time.Time     // when the oldest output was kept back, or zero
	end     guestproto.JobEnd
}

// output is one of the command's.
type output struct {
	fd     int // or -1 when it has ended
	stream uint32
	kept   []byte
}

// do does the job. An error that wraps errBox is the mailbox's.
func (r *run) do() (*guestproto.JobDone, error) {
	a := r.agent
	if len(r.job.Argv) == 0 || strings.ContainsRune(strings.Join(slices.Concat(r.job.Argv, r.job.Env), ""), 0) {
		return nil, fmt.Errorf("%w: argv is empty or holds a zero byte", errdef.ErrInvalid)
	}
	dir := workDir(r.job.Dir, a.home)
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return nil, fmt.Errorf("%w: working directory %s: no such directory", errdef.ErrInvalid, dir)
	}
	for i := range r.job.Files {
		if err := r.writeFile(i); err != nil {
			return nil, err
		}
	}
	if err := r.seed(); err != nil {
		return nil, err
	}
	before := oomKills()
	if err := r.start(dir); err != nil {
		return notStarted(err)
	}
	err := errors.Join(r.follow(), r.finish(before))
	r.close()
	if err != nil {
		return nil, err
	}
	done := r.outcome()
	done.Files, err = r.collect(dir)
	return done, err
}

// writeFile fetches a file of the job's. It is as old as the command.
func (r *run) writeFile(i int) error {
	file := r.job.Files[i]
	if !filepath.IsAbs(file.Path) || filepath.Clean(file.Path) != file.Path {
		return fmt.Errorf("%w: path of file %q", errdef.ErrInvalid, file.Path)
	}
	if err := os.MkdirAll(filepath.Dir(file.Path), 0o755); err != nil {
		return categorize(err)
	}
	f, err := os.OpenFile(file.Path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return categorize(err)
	}
	err = r.fill(f, guestproto.StreamFiles+uint32(i), file.Size)
	err = errors.Join(err, f.Chmod(os.FileMode(file.Mode&0o777)))
	if r.job.Clock > 0 {
		at := []unix.Timespec{unix.NsecToTimespec(r.job.Clock), unix.NsecToTimespec(r.job.Clock)}
		err = errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, file.Path, at, 0))
	}
	return errors.Join(err, f.Close())
}

// fill writes an input of the job's to a file.
func (r *run) fill(f *os.File, stream uint32, size int64) error {
	for last := size == 0; !last; {
		data, end, err := r.box.want(stream)
		if err != nil {
			return fmt.Errorf("%w: %w", errBox, err)
		}
		if _, err = f.Write(data); err != nil {
			return categorize(err)
		}
		last = end
	}
	return nil
}

// seed makes the guest's random numbers and its wall clock a function of the
// job.
func (r *run) seed() error {
	if len(r.job.Entropy) == 0 {
		return nil
	}
	if err := r.agent.sys.addEntropy(r.job.Entropy); err != nil {
		return err
	}
	return r.agent.sys.setClock(time.Unix(0, r.job.Clock))
}

// notStarted makes an outcome of the errors that are the command's.
func notStarted(err error) (*guestproto.JobDone, error) {
	switch {
	case errors.Is(err, errdef.ErrNotFound):
		return &guestproto.JobDone{End: guestproto.JobNotFound, Code: -1}, nil
	case errors.Is(err, errdef.ErrDenied), errors.Is(err, errdef.ErrInvalid):
		return &guestproto.JobDone{End: guestproto.JobNotExecutable, Code: -1}, nil
	}
	return nil, err
}

// start starts the command.
func (r *run) start(dir string) error {
	a := r.agent
	who, err := a.account("")
	if err != nil {
		return err
	}
	c := &command{
		argv: r.job.Argv, dir: dir, user: who,
		env: a.environ(&guestproto.ExecRequest{Env: r.job.Env}, who),
	}
	r.stdin, r.pidfd, r.left = -1, -1, r.job.Output
	if err = r.plumb(c); err != nil {
		closeAll(c.files)
		r.close()
		return categorize(err)
	}
	r.begun = time.Now()
	if r.child, err = a.procs.start(c); err != nil {
		r.close()
		return err
	}
	if r.pidfd, err = unix.PidfdOpen(r.child.pid, 0); err != nil {
		r.pidfd = -1 // it has ended and been waited for
	}
	return nil
}

// plumb makes the command's first three descriptors, and our ends of them.
func (r *run) plumb(c *command) error {
	if r.job.Stdin {
		theirs, ours, err := pipe(writeEnd)
		if err != nil {
			return err
		}
		c.files = append(c.files, theirs)
		if r.stdin, err = keep(ours); err != nil {
			return err
		}
	} else {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return err
		}
		c.files = append(c.files, null)
	}
	for _, stream := range []uint32{guestproto.StreamStdout, guestproto.StreamStderr} {
		ours, theirs, err := pipe(readEnd)
		if err != nil {
			return err
		}
		c.files = append(c.files, theirs)
		fd, err := keep(ours)
		if err != nil {
			return err
		}
		r.outputs = append(r.outputs, &output{fd: fd, stream: stream})
	}
	return nil
}

// keep takes the descriptor out of a file, and out of the runtime's hands: the
// run waits for all of them itself. The pipe's end was made non-blocking.
func keep(f *os.File) (int, error) {
	defer f.Close() //nolint:errcheck // its copy is kept
	return control(f, func(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3) })
}

// follow feeds the command and takes its output until it ends, or has to.
func (r *run) follow() error {
	for r.pidfd >= 0 {
		ready, err := r.wait()
		if err != nil {
			return err
		}
		if time.Since(r.begun) >= r.job.Time {
			r.took, r.end = r.job.Time, guestproto.JobTimedOut
			return nil
		}
		if ready.input {
			if err = r.feed(); err != nil {
				return err
			}
		}
		for _, o := range r.outputs {
			if _, err = r.take(o); err != nil || r.end != guestproto.JobExited {
				r.took = time.Since(r.begun)
				return err
			}
		}
		if ready.exit {
			break
		}
		if !r.since.IsZero() && time.Since(r.since) >= outputDelay {
			if err = r.flush(); err != nil {
				return err
			}
		}
	}
	r.took = time.Since(r.begun)
	return nil
}

// readiness is what wait has seen, beside output.
type readiness struct {
	exit, input bool
}

// wait waits until there is something to do, or time has come for it.
func (r *run) wait() (readiness, error) {
	r.fds = append(r.fds[:0], unix.PollFd{Fd: int32(r.pidfd), Events: unix.POLLIN}, unix.PollFd{Fd: int32(r.stdin), Events: unix.POLLOUT})
	for _, o := range r.outputs {
		r.fds = append(r.fds, unix.PollFd{Fd: int32(o.fd), Events: unix.POLLIN})
	}
	pause := min(r.job.Time-time.Since(r.begun), longestWait)
	if !r.since.IsZero() {
		pause = min(pause, outputDelay-time.Since(r.since))
	}
	ts := unix.NsecToTimespec(int64(max(pause, 0)))
	_, err := unix.Ppoll(r.fds, &ts, nil)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return readiness{}, os.NewSyscallError("ppoll", err)
	}
	return readiness{exit: r.fds[0].Revents != 0, input: r.fds[1].Revents != 0}, nil
}

// feed writes to the command's standard input what it takes now.
func (r *run) feed() error {
	if len(r.input) == 0 && !r.inputEnd {
		data, last, err := r.box.want(guestproto.StreamStdin)
		if err != nil {
			return fmt.Errorf("%w: %w", errBox, err)
		}
		r.input, r.inputEnd = append(r.input[:0:0], data...), last
	}
	for len(r.input) > 0 {
		n, err := unix.Write(r.stdin, r.input)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil: // nobody reads any more
			r.input, r.inputEnd = nil, true
		default:
			r.input = r.input[n:]
		}
	}
	if r.inputEnd {
		closeFD(&r.stdin)
	}
	return nil
}

// take reads what there is of an output now, up to the limit, and reports
// whether there was something.
func (r *run) take(o *output) (some bool, err error) {
	if o.fd < 0 {
		return false, nil
	}
	if cap(o.kept) == 0 {
		o.kept = make([]byte, 0, outputPiece)
	}
	n, err := unix.Read(o.fd, o.kept[len(o.kept):cap(o.kept)])
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return false, nil
	case err != nil || n == 0:
		closeFD(&o.fd)
		return false, nil
	}
	if int64(n) > r.left {
		n, r.end = int(r.left), guestproto.JobOutputLimit
	}
	r.left -= int64(n)
	o.kept = o.kept[:len(o.kept)+n]
	if r.since.IsZero() {
		r.since = time.Now()
	}
	if len(o.kept) == cap(o.kept) {
		err = r.flush()
	} else {
		err = nil
	}
	return true, err
}

// flush sends the output that was kept back.
func (r *run) flush() error {
	r.since = time.Time{}
	for _, o := range r.outputs {
		if err := r.box.send(guestproto.LetterOutput, o.stream, o.kept); err != nil {
			return fmt.Errorf("%w: %w", errBox, err)
		}
		o.kept = o.kept[:0]
	}
	return nil
}

// finish ends all that the command has left behind and takes the rest of the
// output.
func (r *run) finish(killsBefore int64) error {
	r.agent.sys.endAll(r.child.pid)
	<-r.child.exited
	if r.end == guestproto.JobExited && r.child.status.Signal() == unix.SIGKILL && oomKills() > killsBefore {
		r.end = guestproto.JobOutOfMemory
	}
	for _, o := range r.outputs {
		for r.end != guestproto.JobOutputLimit {
			if some, err := r.take(o); err != nil || !some {
				if err != nil {
					return err
				}
				break
			}
		}
	}
	return r.flush()
}

func (r *run) outcome() *guestproto.JobDone {
	done := &guestproto.JobDone{End: r.end, Virtual: r.took}
	if r.end == guestproto.JobExited {
		exit := exitOf(r.child.status)
		done.Code, done.Signal = exit.Code, exit.Signal
	} else { // whatever it would have done in the instant before
		done.Code, done.Signal = -1, int(unix.SIGKILL)
	}
	return done
}

// collect sends the files that the job asks for and that are there.
func (r *run) collect(dir string) ([]guestproto.JobCollected, error) {
	var sent []guestproto.JobCollected
	left := r.job.CollectSize
	for i, path := range r.job.Collect {
		file, err := r.sendFile(uint32(i), absolute(path, dir), left)
		if err != nil {
			return nil, err
		}
		if file != nil {
			left -= file.Size
			sent = append(sent, *file)
		}
	}
	return sent, nil
}

// sendFile sends a file, if it is one.
func (r *run) sendFile(index uint32, path string, left int64) (*guestproto.JobCollected, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // a file that cannot be read is as if it were not there
	}
	defer f.Close() //nolint:errcheck // only read from
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return nil, nil //nolint:nilerr,nilnil // as above
	}
	sent := &guestproto.JobCollected{Index: int(index), Mode: uint32(st.Mode().Perm())}
	buf := make([]byte, outputPiece)
	for {
		n, err := f.Read(buf)
		if sent.Size += int64(n); sent.Size > left {
			return nil, failf(errdef.ErrExhausted, "the files to be collected hold more than %d bytes", r.job.CollectSize)
		}
		if boxErr := r.box.send(guestproto.LetterFile, index, buf[:n]); boxErr != nil {
			return nil, fmt.Errorf("%w: %w", errBox, boxErr)
		}
		if errors.Is(err, io.EOF) {
			return sent, nil
		}
		if err != nil {
			return nil, categorize(err)
		}
	}
}

// close gives back all descriptors.
func (r *run) close() {
	closeFD(&r.stdin)
	closeFD(&r.pidfd)
	for _, o := range r.outputs {
		closeFD(&o.fd)
	}
}

// closeFD closes a descriptor, if there is one.
func closeFD(fd *int) {
	if *fd >= 0 {
		_ = unix.Close(*fd) // all of it was read or written
		*fd = -1
	}
}

// oomKills is how many processes the kernel has ended for want of memory.
func oomKills() int64 {
	const longest = 4 << 10
	text, err := readSmall(childrenCgroup+"/memory.events", longest)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			return n
		}
	}
	return 0
}
