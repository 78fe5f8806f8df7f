package agent

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// reaper starts children and waits for them. Where the agent is PID 1 it waits
// for every process that loses its parent, too.
type reaper struct {
	sys system

	mu       sync.Mutex // held from before a fork until the child is known
	children map[int]*child
}

// child is a process that the agent started.
type child struct {
	pid    int
	exited chan struct{}      // closed when status is set
	status syscall.WaitStatus // how it ended
}

// start starts a process. wait is called in a goroutine for each child that
// nobody else waits for.
func (r *reaper) start(path string, argv []string, attr *syscall.ProcAttr, work *sync.WaitGroup) (*child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := r.sys.spawn(path, argv, attr)
	if err != nil {
		return nil, err
	}
	c := &child{pid: pid, exited: make(chan struct{})}
	r.children[pid] = c
	if !r.sys.reapsAll() {
		work.Go(func() { r.waitFor(pid) })
	}
	return c, nil
}

// waitFor waits for one child.
func (r *reaper) waitFor(pid int) {
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(pid, &status, 0, nil)
		if err != syscall.EINTR {
			break
		}
	}
	r.ended(pid, status)
}

// run waits for all children of this process until ctx ends.
func (r *reaper) run(ctx context.Context) {
	sigs := make(chan os.Signal, 1)
	signal.Notify(sigs, unix.SIGCHLD)
	defer signal.Stop(sigs)
	for {
		r.reap()
		select {
		case <-sigs:
		case <-ctx.Done():
			return
		}
	}
}

// reap collects what has ended by now.
func (r *reaper) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		r.ended(pid, status)
	}
}

func (r *reaper) ended(pid int, status syscall.WaitStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.children[pid]
	if c == nil {
		return // an orphan of somebody else's
	}
	delete(r.children, pid)
	c.status = status
	close(c.exited)
}
