package jail

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/network"
)

// badLauncher is a launcher that fails in the way that its name says.
func badLauncher(name string) func() error {
	return func() error {
		switch name {
		case "hangs":
			return pauseForever()
		case "hangs-with-job":
			return hangWithJob()
		case "sends-files":
			return sendMessage(socketFD, answer{}, 0, 1, 2)
		case "leaves-with-job":
			_, _ = answerSetup()
			return raw(unix.SYS_EXIT_GROUP, 1) // at once, which the race detector would not
		case "answers-at-length":
			_ = unix.Sendmsg(socketFD, make([]byte, maxMessage+1), nil, nil, 0)
			return pauseForever()
		}
		return fmt.Errorf("launcher %s", name)
	}
}

func pauseForever() error {
	for {
		_ = unix.Pause() // until a signal ends it
	}
}

func answerSetup() (fds []int, err error) {
	var s setup
	if fds, err = receiveMessage(socketFD, &s); err != nil {
		return nil, err
	}
	closeAll(fds)
	if err = sendMessage(socketFD, answer{}); err != nil {
		return nil, err
	}
	var j job
	return receiveMessage(socketFD, &j)
}

// hangWithJob writes to the job's output when it has the job.
func hangWithJob() error {
	fds, err := answerSetup()
	if err != nil {
		return err
	}
	for _, fd := range fds {
		_, _ = unix.Write(fd, []byte("x")) // fails for all but one
	}
	return pauseForever()
}

// like is a jail like another, but for what change does, and without spares.
func like(j *Jail, change func(*Config)) *Jail {
	other := &Jail{maker: j.maker, cfg: j.cfg, tree: j.tree, level: j.level, log: j.log}
	change(&other.cfg)
	return other
}

// held is what this process holds of the kernel's.
type held struct {
	files    []string
	children bool
	groups   []string
	leases   []string
}

func whatIsHeld(t *testing.T, j *Jail) held {
	t.Helper()
	var h held
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, linkErr := os.Readlink("/proc/self/fd/" + e.Name()); linkErr == nil { // not that of the directory itself
			h.files = append(h.files, target)
		}
	}
	h.children = !errors.Is(unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil), unix.ECHILD)
	if j.cfg.Groups != nil {
		if h.groups, err = j.cfg.Groups.Names(); err != nil {
			t.Fatal(err)
		}
	}
	leases, err := filepath.Glob(filepath.Join(j.cfg.UIDs, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range leases {
		lock, err := durable.TryLock(path, false)
		if err != nil {
			h.leases = append(h.leases, path)
			continue
		}
		_ = lock.Close()
	}
	return h
}

// checkNothingHeld: no process, no group, no lease, and as many files as there were.
func checkNothingHeld(t *testing.T, j *Jail, before held) {
	t.Helper()
	now := whatIsHeld(t, j)
	if now.children || len(now.groups) > 0 || len(now.leases) > 0 || len(now.files) != len(before.files) {
		t.Errorf("before: %+v\nnow: %+v", before, now)
	}
}

// A launcher that is bad in any way is an error at once, which says what the
// launcher had to say, and leaves nothing behind. Not parallel: it counts what
// this process has.
func TestBadLaunchers(t *testing.T) {
	usual := openJail(t, withGroups(t))
	self := usual.cfg.Command[0]
	tests := map[string]struct {
		command []string
		want    string // in the error
		link    bool
		cancel  bool
	}{
		"missing":           {command: []string{"/nonexistent"}, want: "no such file"},
		"no-program":        {command: []string{"/dev/null"}, want: "permission denied"},
		"true":              {command: []string{"/bin/true"}, want: errHungUp.Error()},
		"cat":               {command: []string{"/bin/cat"}, want: errHungUp.Error()},
		"fails":             {command: []string{"/bin/sh", "-c", "echo no luck today >&2; exit 3"}, want: "no luck today"},
		"much-to-say":       {command: []string{"/bin/sh", "-c", "while echo no luck; do :; done >&2 & exec 3>&-; sleep 0.05; exit 1"}, want: "no luck"},
		"garbage":           {command: []string{"/bin/sh", "-c", "echo garbage >&3; exec cat <&3 >&2"}, want: "invalid character"},
		"refuses":           {command: []string{"/bin/sh", "-c", `printf '{"error":"too hot","code":"denied"}' >&3; exec cat <&3 >&2`}, want: "too hot"},
		"answers-at-length": {command: []string{self, "answers-at-length"}, want: "message of more than"},
		"hangs":             {command: []string{self, "hangs"}, want: "cancelled by the test", cancel: true},
		"hangs-with-link":   {command: []string{self, "hangs"}, want: "cancelled by the test", cancel: true, link: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.link && !usual.level.OwnUser {
				t.Skip("NOT TESTED: not root")
			}
			j := like(usual, func(c *Config) { c.Command = tt.command })
			before := whatIsHeld(t, j)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if tt.cancel {
				go func() {
					for !whatIsHeld(t, j).children {
					}
					cancel(errors.New("cancelled by the test"))
				}()
			}
			begin := time.Now()
			cell, err := j.Take(ctx, tt.link)
			if err == nil {
				t.Fatal("there is a cell", cell.Close())
			}
			if !strings.Contains(err.Error(), tt.want) || len(err.Error()) > 2*maxTail {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
			if errors.Is(err, errdef.ErrTimeout) || time.Since(begin) >= prepareTime {
				t.Errorf("it took %s to notice", time.Since(begin))
			}
			checkNothingHeld(t, j, before)
			if j.links != 0 {
				t.Errorf("%d networks are counted", j.links)
			}
		})
	}
}

// A program that does not start is an error that says why, and nothing is left.
func TestStartFails(t *testing.T) {
	usual := openJail(t, withGroups(t))
	tests := map[string]struct {
		launcher string
		program  string
		change   func(t *testing.T, c *Cell, job *Job)
		is       error
		want     string
		cancel   bool
		link     bool
	}{
		"launcher-killed": {change: func(t *testing.T, c *Cell, _ *Job) {
			if err := c.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			for c.waits() { // its end of the socket closes
			}
		}, is: errHungUp},
		"no-program":   {program: "/nonexistent", want: "execute /nonexistent: no such file"},
		"no-program-2": {program: "/nonexistent", want: "execute /nonexistent: no such file", link: true},
		"job-too-large": {change: func(_ *testing.T, _ *Cell, job *Job) {
			job.Args = []string{strings.Repeat("x", maxMessage)}
		}, is: errdef.ErrInvalid},
		"too-many-files": {change: func(_ *testing.T, _ *Cell, job *Job) {
			for range maxRights {
				job.Files = append(job.Files, job.Output)
			}
		}, is: errdef.ErrInvalid},
		"closed-output": {change: func(t *testing.T, _ *Cell, job *Job) {
			if err := job.Output.Close(); err != nil {
				t.Fatal(err)
			}
		}, is: unix.EBADF},
		"zero-in-argument": {change: func(_ *testing.T, _ *Cell, job *Job) { job.Args = []string{"a\x00b"} }, want: "invalid argument"},
		"bad-limit":        {change: func(_ *testing.T, _ *Cell, job *Job) { job.Limits.PIDs = -1 }, is: errdef.ErrInvalid},
		"leaves":           {launcher: "leaves-with-job", is: errHungUp},
		"hangs":            {launcher: "hangs-with-job", want: "cancelled by the test", cancel: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.link && !usual.level.OwnUser {
				t.Skip("NOT TESTED: not root")
			}
			if name == "bad-limit" && usual.cfg.Groups == nil {
				t.Skipf("NOT TESTED: %v", usual.cfg.NoGroups)
			}
			j := like(usual, func(c *Config) {
				c.Program = cmp.Or(tt.program, c.Program)
				if tt.launcher != "" {
					c.Command = []string{c.Command[0], tt.launcher}
				}
			})
			before := whatIsHeld(t, j)
			cell, err := j.Take(t.Context(), tt.link)
			if err != nil {
				t.Fatal(err)
			}
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			job := Job{Output: w}
			if tt.change != nil {
				tt.change(t, cell, &job)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			done := make(chan struct{})
			go func() {
				defer close(done)
				if tt.cancel {
					_, _ = r.Read(make([]byte, 1))
					cancel(errors.New("cancelled by the test"))
				}
			}()
			_, err = cell.Start(ctx, job)
			if err == nil || (tt.is != nil && !errors.Is(err, tt.is)) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %v, or one with %q", err, tt.is, tt.want)
			}
			<-done
			_ = errors.Join(r.Close(), w.Close())
			checkNothingHeld(t, j, before)
			if j.links != 0 {
				t.Errorf("%d networks are counted", j.links)
			}
		})
	}
}

// A program and a cell that were used as they should be leave nothing either,
// with a network and without.
func TestNothingIsLeft(t *testing.T) {
	for _, own := range []bool{false, true} {
		j := openJail(t, withGroups(t), func(c *Config) { c.Links, c.OwnFiles = 1, own })
		for _, link := range []bool{false, true} {
			t.Run(fmt.Sprintf("own-%t-link-%t", own, link), func(t *testing.T) { nothingIsLeft(t, j, link) })
		}
	}
}

func nothingIsLeft(t *testing.T, j *Jail, link bool) {
	t.Helper()
	if link && !j.level.OwnUser {
		t.Skip("NOT TESTED: not root")
	}
	warmUp(t)
	before := whatIsHeld(t, j)
	cell, err := j.Take(t.Context(), link)
	if err != nil {
		t.Fatal(err)
	}
	if link {
		checkLink(t, j, cell)
	}
	t.Run("program", func(t *testing.T) { startIn(t, cell, "idle", Job{}).end(t) })
	checkNothingHeld(t, j, before)
	if cell, err = j.Take(t.Context(), link); err != nil {
		t.Fatal(err)
	}
	if err = cell.Close(); err != nil {
		t.Error(err)
	}
	checkNothingHeld(t, j, before)
}

// warmUp has Go open what it keeps for polling.
func warmUp(t *testing.T) {
	t.Helper()
	r, w, err := os.Pipe()
	if err = errors.Join(err, r.Close(), w.Close()); err != nil {
		t.Fatal(err)
	}
}

// checkLink opens the network of a cell, and finds that it is the only one that
// there may be.
func checkLink(t *testing.T, j *Jail, cell *Cell) {
	t.Helper()
	if _, err := j.Take(t.Context(), true); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("second network: %v", err)
	}
	var copies []*os.File
	for _, f := range cell.Link()[1:] {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		copies = append(copies, os.NewFile(uintptr(fd), "link"))
	}
	link, err := network.Open(copies)
	if err != nil {
		t.Fatal(err)
	}
	if err = link.Close(); err != nil {
		t.Error(err)
	}
}

// Spares are taken first, those that have ended are not handed out, and more are
// made also after that has failed.
func TestSpares(t *testing.T) {
	t.Parallel()
	j := openJail(t, func(c *Config) { c.Spare = 2 })
	fill := func() []*Cell {
		for {
			j.mu.Lock()
			spare := append([]*Cell{}, j.spare...)
			j.mu.Unlock()
			if len(spare) == 2 {
				return spare
			}
		}
	}
	spare := fill()
	if err := spare[1].cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for spare[1].waits() {
	}
	cell := take(t, j)
	if cell != spare[0] {
		t.Error("not the spare cell that waits")
	}
	startIn(t, cell, "idle", Job{}).end(t)
	if !j.level.OwnUser {
		return
	}
	fill()
	if err := os.Rename(j.cfg.UIDs, j.cfg.UIDs+"-away"); err != nil { // no user id, no cell
		t.Fatal(err)
	}
	for {
		cell, err := j.Take(t.Context(), false)
		if err != nil {
			break
		}
		if err = cell.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := os.Rename(j.cfg.UIDs+"-away", j.cfg.UIDs); err != nil {
		t.Fatal(err)
	}
	if err := take(t, j).Close(); err != nil {
		t.Error(err)
	}
	fill()
}

// TestCloseWhileTaken: whoever takes a cell has it, and all others are gone.
func TestCloseWhileTaken(t *testing.T) {
	j := openJail(t, func(c *Config) { c.Spare = 3 })
	warmUp(t)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for range 3 {
				cell, err := j.Take(t.Context(), false)
				if err == nil {
					err = cell.Close()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		if err := errors.Join(j.Close(), j.Close()); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	if now := whatIsHeld(t, j); now.children || len(now.leases) > 0 {
		t.Errorf("left: %+v", now)
	}
}
