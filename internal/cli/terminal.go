package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

var errNoTerminal = fmt.Errorf("%w: -t needs a terminal on standard input", errdef.ErrInvalid)

// terminal is the one that this process runs in.
type terminal struct{ fd int }

func openTerminal(f *os.File) (terminal, error) {
	t := terminal{fd: int(f.Fd())}
	if !term.IsTerminal(t.fd) {
		return t, errNoTerminal
	}
	return t, nil
}

func (t terminal) size() (client.TerminalSize, error) {
	cols, rows, err := term.GetSize(t.fd)
	if err != nil {
		return client.TerminalSize{}, fmt.Errorf("read terminal size: %w", err)
	}
	return client.TerminalSize{Cols: max(cols, 1), Rows: max(rows, 1)}, nil
}

// raw passes every key on as it is, until restore is called.
func (t terminal) raw() (restore func() error, err error) {
	state, err := term.MakeRaw(t.fd)
	if err != nil {
		return nil, fmt.Errorf("set terminal: %w", err)
	}
	return func() error { return term.Restore(t.fd, state) }, nil
}

// onResize calls f with every new size, until stop is called.
func (t terminal) onResize(f func(client.TerminalSize)) (stop func()) {
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, unix.SIGWINCH)
	var wait sync.WaitGroup
	wait.Go(func() {
		for range changes {
			if size, err := t.size(); err == nil {
				f(size)
			}
		}
	})
	return func() {
		signal.Stop(changes)
		close(changes)
		wait.Wait()
	}
}

// interruptible returns a reader of r that ends when interrupt is called. Only
// a file's Read can be interrupted while it waits; other readers are taken not
// to wait.
func interruptible(r io.Reader) (in io.Reader, interrupt func()) {
	f, ok := r.(*os.File)
	if !ok {
		return r, func() {}
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return r, func() {}
	}
	p := &polledFile{file: f, wake: os.NewFile(uintptr(wake), "wake")}
	return p, func() {
		_, _ = p.wake.Write([]byte{1, 0, 0, 0, 0, 0, 0, 0}) // an eventfd takes it
	}
}

// polledFile reads from file until wake has something to read.
type polledFile struct {
	file *os.File
	wake *os.File
}

// Read waits until there is something to read.
func (p *polledFile) Read(b []byte) (int, error) {
	fds := []unix.PollFd{
		{Fd: int32(p.file.Fd()), Events: unix.POLLIN},
		{Fd: int32(p.wake.Fd()), Events: unix.POLLIN},
	}
	for {
		_, err := unix.Poll(fds, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, os.NewSyscallError("poll", err)
		}
		if fds[1].Revents != 0 {
			_ = p.wake.Close() // nothing was written to it that could be lost
			return 0, io.EOF
		}
		return p.file.Read(b)
	}
}
