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

	spawn sync.Mutex // held while a process is started

	mu       sync.Mutex
	children map[int]*child
	starting bool                       // a child may end before it is known
	early    map[int]syscall.WaitStatus // those who ended meanwhile and were not known
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
	r.spawn.Lock()
	defer r.spawn.Unlock()
	r.expect(true)
	defer r.expect(false)
	// No lock that the reaper needs is held here: in a guest out of memory this
	// can take long.
	pid, err := r.sys.spawn(path, argv, attr)
	if err != nil {
		return nil, err
	}
	c := r.known(pid)
	if !r.sys.reapsAll() {
		work.Go(func() { r.waitFor(pid) })
	}
	return c, nil
}

// expect begins or ends the time in which a child may end before it is known.
func (r *reaper) expect(starting bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.starting, r.early = starting, map[int]syscall.WaitStatus{}
}

// known enters a child, which may have ended already.
func (r *reaper) known(pid int) *child {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := &child{pid: pid, exited: make(chan struct{})}
	if status, ended := r.early[pid]; ended {
		c.status = status
		close(c.exited)
	} else {
		r.children[pid] = c
	}
	return c
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
		if r.starting {
			r.early[pid] = status
		}
		return // else it is an orphan of somebody else's
	}
	delete(r.children, pid)
	c.status = status
	close(c.exited)
}
