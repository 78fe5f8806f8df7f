// Package audit keeps a log of who has done what, in which each line holds the
// hash of the line before it: nothing can be changed, removed, moved or cut off
// without Verify telling where.
//
// An act that changes something has a line before it, its intent, and one
// after it, its outcome. The log holds digests, never what they are digests of.
// When the disk does not take an intent, the act must not happen; what has
// happened is kept until the disk takes it again. One process writes a log, any
// may read it. The chain has no key: it finds what was changed by whoever does
// not write all of it anew. docs/formats/audit.md describes the files.
package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// Sync says when the disk is waited for.
type Sync string

// The policies. What was written survives a killed process under each; they
// differ in what a power cut takes with it.
const (
	// SyncAlways: nothing. A line is on disk before its act begins.
	SyncAlways Sync = "always"
	// SyncInterval: the last fifth of a second.
	SyncInterval Sync = "interval"
	// SyncNever: what the kernel had not written yet.
	SyncNever Sync = "never"
)

const (
	defaultMaxSize = 16 << 20
	// tickTime is how often SyncInterval syncs, and how often what a full disk
	// did not take is tried again.
	tickTime = 200 * time.Millisecond
	// maxBatch is how many lines share a write and a sync.
	maxBatch = 256
	// maxBacklog bounds what is kept while the disk takes nothing. It has room
	// for every act under way; more is counted.
	maxBacklog = 8192
)

// Config says where a log is and how it is kept.
type Config struct {
	// Dir is made when it is missing.
	Dir string
	// Sync is SyncInterval when it is "".
	Sync Sync
	// MaxSize is how large a file grows before the next is begun; zero means 16
	// MiB.
	MaxSize int64
	// Logger is told when the disk stops to take lines and when it takes them
	// again; it may be nil.
	Logger *slog.Logger

	// Tests have other clocks, and disks that fail.
	now  func() time.Time
	wrap func(file) file
}

// Validate finds what is wrong with c.
func (c Config) Validate() error {
	switch c.Sync {
	case "", SyncAlways, SyncInterval, SyncNever:
	default:
		return fmt.Errorf("%w: audit sync policy %q is not always, interval or never", errdef.ErrInvalid, c.Sync)
	}
	if c.Dir == "" || c.MaxSize < 0 {
		return fmt.Errorf("%w: audit log in %q of at most %d bytes", errdef.ErrInvalid, c.Dir, c.MaxSize)
	}
	return nil
}

// Log is an audit log that is written to. It is safe for concurrent use.
type Log struct {
	entries chan *entry
	rotates chan *rotation
	stop    func()
	stopped chan struct{} // Close was called
	done    chan struct{} // the writer has ended, with err
	err     error
	lock    *os.File
	trouble atomic.Pointer[error]
}

// entry is a line on its way to the disk.
type entry struct {
	rec Record
	// keep: it says what has happened, and is written sooner or later.
	keep bool
	done chan error
}

// Sealed is a file that nothing is added to any more.
type Sealed struct {
	File        string // its name
	First, Last uint64 // its lines
}

// rotation is a wish to begin a new file.
type rotation struct {
	sealed Sealed
	done   chan error
}

// Open opens the log in cfg.Dir, or begins one. What a killed process has left
// is put in order first: half a line goes to a file of its own, and intents
// without an outcome get one, Unknown. It returns errdef.ErrConflict when
// somebody else writes to the log. On a full disk the log opens all the same: it
// is put in order, and takes lines, once there is room.
func Open(cfg Config) (_ *Log, err error) {
	if err = cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Sync == "" {
		cfg.Sync = SyncInterval
	}
	if cfg.MaxSize == 0 {
		cfg.MaxSize = defaultMaxSize
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.now == nil {
		cfg.now = time.Now
	}
	if cfg.wrap == nil {
		cfg.wrap = func(f file) file { return f }
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if err = os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make audit directory: %w", err)
	}
	lock, err := durable.TryLock(filepath.Join(cfg.Dir, lockName), false)
	if err != nil {
		return nil, errdef.WithHint(err, "another daemon writes this audit log: choose another --audit-log")
	}
	u.Add(lock.Close)
	w, err := recoverWriter(cfg)
	if isFull(err) {
		w, err = laterWriter(cfg, err), nil
	}
	if err != nil {
		return nil, err
	}
	l := &Log{entries: make(chan *entry), rotates: make(chan *rotation), stopped: make(chan struct{}), done: make(chan struct{}), lock: lock}
	l.stop = sync.OnceFunc(func() { close(l.stopped) })
	l.note(w)
	go func() {
		defer close(l.done)
		l.err = l.run(w)
	}()
	return l, nil
}

// Append writes a line and returns its number. When it fails the line is not
// there, and what it announces must not be done: it returns
// errdef.ErrUnavailable, with a hint.
func (l *Log) Append(ctx context.Context, r Record) (uint64, error) {
	e := &entry{rec: r, done: make(chan error, 1)}
	if err := l.send(ctx, e); err != nil {
		return 0, err
	}
	return e.rec.Seq, nil
}

// Keep writes a line about what has happened already. When the disk does not
// take it the log keeps it, and writes it before all others as soon as it can;
// that is no error.
func (l *Log) Keep(ctx context.Context, r Record) error {
	return l.send(context.WithoutCancel(ctx), &entry{rec: r, keep: true, done: make(chan error, 1)})
}

// Event writes what has happened without a request: action, to object. Why says
// more, or is "".
func (l *Log) Event(ctx context.Context, action, object, why string) error {
	return l.Keep(ctx, Record{Phase: Event, Actor: Daemon, Action: action, Object: object, Note: why})
}

// Rotate seals the active file, whatever its size, and goes on in the next.
func (l *Log) Rotate(ctx context.Context) (Sealed, error) {
	r := &rotation{done: make(chan error, 1)}
	select {
	case l.rotates <- r:
		err := <-r.done
		return r.sealed, err
	case <-l.done:
		return Sealed{}, fmt.Errorf("%w: the audit log is closed", errdef.ErrUnavailable)
	case <-ctx.Done():
		return Sealed{}, context.Cause(ctx)
	}
}

func (l *Log) send(ctx context.Context, e *entry) error {
	select {
	case l.entries <- e:
		return <-e.done
	case <-l.done:
		return fmt.Errorf("%w: the audit log is closed", errdef.ErrUnavailable)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close writes what is left and closes the log.
func (l *Log) Close() error {
	l.stop()
	<-l.done
	return errors.Join(l.err, l.lock.Close())
}

// Trouble is why no line can be written now, and so no act can be done; nil when
// they can.
func (l *Log) Trouble() error {
	if err := l.trouble.Load(); err != nil {
		return *err
	}
	return nil
}

// note has Trouble tell what w meets.
func (l *Log) note(w *writer) {
	switch told := l.trouble.Load() != nil; {
	case w.broken != nil && !told:
		err := refusal(w.broken)
		l.trouble.Store(&err)
	case w.broken == nil && told:
		l.trouble.Store(nil)
	}
}

// run is the goroutine that owns the files.
func (l *Log) run(w *writer) error {
	tick := time.NewTicker(tickTime)
	defer tick.Stop()
	for {
		l.note(w)
		select {
		case e := <-l.entries:
			w.commit(l.gather(e))
		case r := <-l.rotates:
			r.done <- w.rotateNow(&r.sealed)
		case <-tick.C:
			w.tick()
		case <-l.stopped:
			return w.close()
		}
	}
}

// gather takes along who else waits, so that they share a write and a sync.
func (l *Log) gather(first *entry) []*entry {
	batch := []*entry{first}
	for len(batch) < maxBatch {
		select {
		case e := <-l.entries:
			batch = append(batch, e)
		default:
			return batch
		}
	}
	return batch
}

// file is what a writer asks of an *os.File.
type file interface {
	io.Writer
	Sync() error
	Truncate(size int64) error
	Close() error
}

// isFull reports whether err says that a disk has no room, which may change.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// refusal is what a caller is told whose line the disk does not take: why, but
// not where, which is nobody's business who is not on this host.
func refusal(err error) error {
	why := errors.New("its disk fails")
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		why = errno
	}
	return errdef.WithHint(fmt.Errorf("%w: the audit log cannot be written: %w", errdef.ErrUnavailable, why),
		"make room on the disk of the audit log; nothing is done that it cannot record")
}
