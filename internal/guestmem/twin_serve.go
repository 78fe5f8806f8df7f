package guestmem

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// The language of daemon and helper is one line of JSON each: a twinRequest, a
// twinAnswer when the helper is ready, an empty line for go, a twinAnswer. The
// end of the helper's input is the end of the twin.
const (
	maxTwinRequest = 64 << 10
	maxTwinAnswer  = 4 << 10
	maxTwinError   = 1 << 10 // escapes triple it at worst
)

// stopTimeout bounds how long the process may take to stop. Until it has, it
// can be let go at any moment.
const stopTimeout = 2 * time.Second

type twinRequest struct {
	PID    int             `json:"pid"`
	Ranges []linux.Mapping `json:"ranges"`
}

type twinAnswer struct {
	Twin  int    `json:"twin,omitempty"`
	Error string `json:"error,omitempty"`
	Code  string `json:"code,omitempty"` // of errdef
}

// ServeTwin is the helper process of a Freezer. It is a process of its own for
// two reasons: a tracer that died in the middle of its work would take the
// machine along, and the daemon may die at any moment; and the twin must end
// when nobody reads it any more, which the kernel sees to when its tracer ends.
func ServeTwin(stdin, stdout *os.File) error {
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE) // the end of stdin is the end
	in := bufio.NewReaderSize(stdin, maxTwinRequest)
	x, err := readTwinRequest(in)
	if answerErr := answerTwin(stdout, 0, err); err != nil || answerErr != nil {
		return errors.Join(err, answerErr)
	}
	if _, err = readLine(in); err != nil {
		return nil // never told to go
	}
	return serveTwin(x, in, stdout)
}

func readTwinRequest(in *bufio.Reader) (*injector, error) {
	line, err := readLine(in)
	if err != nil {
		return nil, fmt.Errorf("%w: read request: %w", errdef.ErrInvalid, err)
	}
	req, err := decodeTwinRequest(line)
	if err != nil {
		return nil, err
	}
	return newInjector(req)
}

func decodeTwinRequest(line []byte) (twinRequest, error) {
	var req twinRequest
	if err := json.Unmarshal(line, &req); err != nil {
		return req, fmt.Errorf("%w: request: %w", errdef.ErrInvalid, err)
	}
	if req.PID <= 1 || len(req.Ranges) == 0 {
		return req, fmt.Errorf("%w: request for process %d with %d ranges", errdef.ErrInvalid, req.PID, len(req.Ranges))
	}
	for _, m := range req.Ranges {
		if m.Start%PageSize != 0 || m.End%PageSize != 0 || m.Start >= m.End {
			return req, fmt.Errorf("%w: range %#x-%#x", errdef.ErrInvalid, m.Start, m.End)
		}
	}
	return req, nil
}

// readLine returns a line that fits in the reader's buffer.
func readLine(in *bufio.Reader) ([]byte, error) {
	line, err := in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return nil, fmt.Errorf("%w: line of more than %d bytes", errdef.ErrInvalid, in.Size())
	}
	return line, err
}

func answerTwin(out io.Writer, twin int, err error) error {
	a := twinAnswer{Twin: twin}
	if err != nil {
		a.Error, a.Code = err.Error(), errdef.Code(err)
		a.Error = a.Error[:min(len(a.Error), maxTwinError)]
	}
	data, err := json.Marshal(a)
	if err == nil {
		_, err = out.Write(append(data, '\n'))
	}
	if err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	return nil
}

// serveTwin makes the twin and keeps it until the input ends.
func serveTwin(x *injector, in io.Reader, out io.Writer) error {
	t := tracer{made: make(chan twinResult, 1), end: make(chan struct{}), done: make(chan error, 1)}
	go t.run(x)
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	var r twinResult
	select {
	case r = <-t.made:
	case <-timer.C:
		if t.state.CompareAndSwap(0, abandoned) { // ending lets go of the process, which is as it was
			err := fmt.Errorf("%w: process did not stop in %v", errdef.ErrTimeout, stopTimeout)
			return errors.Join(err, answerTwin(out, 0, err))
		}
		r = <-t.made // there is no way but on
	}
	if err := answerTwin(out, r.pid, r.err); err != nil || r.err != nil {
		close(t.end)
		return errors.Join(err, r.err, <-t.done)
	}
	_, err := io.Copy(io.Discard, in)
	close(t.end)
	return errors.Join(err, <-t.done)
}

// tracer is the one thread that traces.
type tracer struct {
	state atomic.Int32 // claimed or abandoned, whoever is first
	made  chan twinResult
	end   chan struct{}
	done  chan error
}

const (
	claimed   = 1
	abandoned = 2
)

type twinResult struct {
	pid int
	err error
}

func (t *tracer) run(x *injector) {
	runtime.LockOSThread() // for good: the kernel ties tracing to the thread
	twin, err := x.twin(func() bool { return t.state.CompareAndSwap(0, claimed) })
	if err != nil {
		t.made <- twinResult{err: err}
		t.done <- nil
		return
	}
	t.made <- twinResult{pid: twin.TID}
	<-t.end
	t.done <- killTwin(twin)
}

// killTwin kills a twin and collects its end, so that its parent can.
func killTwin(twin *linux.Tracee) error {
	if err := unix.Kill(twin.TID, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill twin %d: %w", twin.TID, err)
	}
	for {
		_, err := twin.Wait()
		if errors.Is(err, errdef.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
