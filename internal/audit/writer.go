package audit

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// link is where the chain ends: its last line.
type link struct {
	seq  uint64
	hash string
	time time.Time
}

// writer owns the active file. It belongs to one goroutine.
type writer struct {
	cfg Config
	// f is nil until the log could be put in order.
	f    file
	size int64
	// first is the first line of the active file; 0 when it has none.
	first uint64
	link  link
	// synced is the line that the head names.
	synced uint64
	// open are the intents without an outcome.
	open map[uint64]bool
	// backlog is what has happened and is not written yet; lost counts what it
	// had no room for.
	backlog []Record
	lost    int
	// broken is why the file cannot be written to; nil when it can. refused
	// counts the lines that it did not take meanwhile.
	broken  error
	refused int
	// tried is when the log was last put in order, in vain.
	tried time.Time
}

// retryTime is how often it is tried: that reads a file.
const retryTime = time.Second

// laterWriter is the writer of a log that cannot be put in order yet.
func laterWriter(cfg Config, why error) *writer {
	cfg.Logger.Error("audit log cannot be opened: acts are refused", slog.Any("error", why))
	return &writer{cfg: cfg, broken: why, tried: cfg.now()}
}

// reopen puts the log in order, at last.
func (w *writer) reopen() error {
	if since := w.cfg.now().Sub(w.tried); since >= 0 && since < retryTime {
		return w.broken
	}
	w.tried = w.cfg.now()
	opened, err := recoverWriter(w.cfg)
	if err != nil {
		w.broken = err
		return err
	}
	opened.backlog, opened.lost, opened.refused = w.backlog, w.lost, w.refused
	*w = *opened
	return nil
}

// commit writes a batch, and tells each how it went.
func (w *writer) commit(batch []*entry) {
	recs := slices.Clone(w.backlog)
	for _, e := range batch {
		recs = append(recs, e.rec)
	}
	err := w.write(recs)
	before := len(w.backlog)
	if err == nil {
		w.backlog = nil
	}
	for i, e := range batch {
		switch {
		case err == nil:
			e.rec.Seq = recs[before+i].Seq
			e.done <- nil
		case e.keep:
			w.keep(e.rec)
			e.done <- nil
		default:
			w.refused++
			e.done <- refusal(err)
		}
	}
	w.rotateIfLarge()
}

func (w *writer) keep(r Record) {
	if len(w.backlog) >= maxBacklog {
		w.lost++
		return
	}
	w.backlog = append(w.backlog, r)
}

// write appends recs as one, and fills in what the log adds to them. When it
// fails none of them is in the file.
func (w *writer) write(recs []Record) error {
	if w.broken != nil {
		if err := w.repair(); err != nil {
			return err
		}
	}
	if w.refused+w.lost > 0 {
		note := Record{Phase: Note, Action: "log.recovered", Note: fmt.Sprintf("the disk did not take %d lines, whose acts were refused; %d of others are lost", w.refused, w.lost)}
		if err := w.append([]Record{note}); err != nil {
			return err
		}
		w.refused, w.lost = 0, 0
	}
	return w.append(recs)
}

func (w *writer) append(recs []Record) error {
	if len(recs) == 0 {
		return nil
	}
	data, end, err := w.chain(recs)
	if err != nil {
		return err // a line that cannot be: the file is as it was
	}
	if _, err = w.f.Write(data); err == nil && w.cfg.Sync == SyncAlways {
		err = w.f.Sync() // the head follows with the next tick, as it does under SyncInterval
	}
	if err != nil {
		w.breakOff(err)
		return err
	}
	w.size += int64(len(data))
	w.link = end
	if w.first == 0 {
		w.first = recs[0].Seq
	}
	for _, r := range recs {
		w.noteOpen(r)
	}
	return nil
}

// chain gives recs their places in the chain, and returns them as lines and
// where the chain then ends.
func (w *writer) chain(recs []Record) ([]byte, link, error) {
	var data []byte
	end := w.link
	for i := range recs {
		r := &recs[i]
		r.bound()
		now := w.cfg.now().UTC()
		if back := end.time.Sub(now); back > 0 {
			r.ClockBackUS = max(1, back.Microseconds())
			now = end.time
		}
		r.V, r.Seq, r.Prev, r.TS = version, end.seq+1, end.hash, now.Format(timeFormat)
		line, err := encode(*r)
		if err != nil {
			return nil, link{}, err
		}
		end = link{seq: r.Seq, hash: hashOf(line), time: now}
		data = append(append(data, line...), '\n')
	}
	return data, end, nil
}

func (w *writer) noteOpen(r Record) {
	switch {
	case r.Phase == Intent && r.Intent == 0:
		w.open[r.Seq] = true
	case r.Phase == Outcome:
		delete(w.open, r.Intent)
	}
}

// syncTo puts the file on disk, and then the head that says so: the head never
// names a line that a power cut could take.
func (w *writer) syncTo(end link) error {
	if w.cfg.Sync != SyncNever {
		if err := w.f.Sync(); err != nil {
			return err
		}
	}
	if err := writeHead(w.cfg.Dir, head{V: version, Seq: end.seq, Hash: end.hash}, w.cfg.Sync != SyncNever); err != nil {
		return err
	}
	w.synced = end.seq
	return nil
}

// breakOff takes back what a failed write has left, now or, if that fails too,
// before the next one.
func (w *writer) breakOff(err error) {
	if w.broken == nil {
		w.cfg.Logger.Error("audit log cannot be written: acts are refused", slog.Any("error", err))
	}
	w.broken = errors.Join(err, w.f.Truncate(w.size))
}

// repair makes the file end with the last line that counts.
func (w *writer) repair() error {
	if w.f == nil {
		if err := w.reopen(); err != nil {
			return err
		}
		w.cfg.Logger.Info("audit log can be written", slog.Int("refused", w.refused))
		return nil
	}
	if err := w.f.Truncate(w.size); err != nil {
		return fmt.Errorf("take back half a line: %w", err)
	}
	if err := w.syncTo(w.link); err != nil {
		return err
	}
	w.broken = nil
	w.cfg.Logger.Info("audit log can be written again", slog.Int("refused", w.refused))
	return nil
}

// tick writes what was kept, and syncs.
func (w *writer) tick() {
	if len(w.backlog) > 0 || w.broken != nil {
		w.commit(nil)
	}
	if w.broken != nil || w.synced == w.link.seq {
		return
	}
	if err := w.syncTo(w.link); err != nil {
		w.breakOff(err)
	}
}

// close writes what is left.
func (w *writer) close() error {
	w.tick()
	var err error
	if w.broken != nil {
		err = fmt.Errorf("%d audit lines are lost: %w", len(w.backlog)+w.lost, w.broken)
	}
	if w.f == nil {
		return err
	}
	return errors.Join(err, w.f.Close())
}

func (w *writer) path(name string) string { return filepath.Join(w.cfg.Dir, name) }

// rotateIfLarge begins the next file when this one is full. When that fails the
// file goes on growing.
func (w *writer) rotateIfLarge() {
	if w.size < w.cfg.MaxSize || w.broken != nil {
		return
	}
	if err := w.rotate(); err != nil {
		w.cfg.Logger.Error("audit log cannot be rotated", slog.Any("error", err))
		// It is tried again when as much has been written once more.
		w.cfg.MaxSize += w.size
	}
}

// rotateNow begins the next file because somebody wants it.
func (w *writer) rotateNow(sealed *Sealed) error {
	if err := w.write(nil); err != nil { // it is broken, and stays so
		return refusal(err)
	}
	if w.first == 0 {
		return fmt.Errorf("%w: the active file has no line yet", errdef.ErrConflict)
	}
	first, last := w.first, w.link.seq
	if err := w.rotate(); err != nil {
		w.cfg.Logger.Error("audit log cannot be rotated", slog.Any("error", err))
		return refusal(err)
	}
	*sealed = Sealed{File: sealedName(first, last), First: first, Last: last}
	return nil
}

// rotate seals the active file and begins the next, whose first line carries
// the chain on. That file is whole before it gets its name.
func (w *writer) rotate() error {
	first := Record{Phase: Note, Action: "log.rotate", Open: slices.Sorted(maps.Keys(w.open))}
	if more := len(first.Open) - maxOpen; more > 0 {
		first.Open, first.Note = first.Open[more:], fmt.Sprintf("%d older intents are open too", more)
	}
	recs := []Record{first}
	data, end, err := w.chain(recs)
	if err != nil {
		return err
	}
	if err = w.f.Sync(); err != nil { // also where the policy does not: it is for good
		return err
	}
	if err = durable.WriteFile(w.path(nextName), data, activeMode); err != nil {
		return err
	}
	f, err := w.moveOn(sealedName(w.first, w.link.seq))
	if err != nil {
		return err
	}
	old := w.f
	w.f, w.first, w.size, w.link = f, end.seq, int64(len(data)), end
	return errors.Join(old.Close(), durable.SyncDir(w.cfg.Dir), w.syncTo(end))
}

// moveOn gives the active file its last name, and the next one that of the
// active.
func (w *writer) moveOn(sealed string) (file, error) {
	f, err := openAppend(w.path(nextName))
	if err != nil {
		return nil, err
	}
	if err = os.Rename(w.path(activeName), w.path(sealed)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if err = os.Rename(w.path(nextName), w.path(activeName)); err != nil {
		return nil, errors.Join(err, os.Rename(w.path(sealed), w.path(activeName)), f.Close())
	}
	if err = os.Chmod(w.path(sealed), sealedMode); err != nil {
		w.cfg.Logger.Warn("sealed audit log stays writable", slog.Any("error", err))
	}
	return w.cfg.wrap(f), nil
}

func openAppend(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, activeMode)
	if err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	return f, nil
}

// finishRotation completes one that was cut off, or takes it back.
func finishRotation(dir string) error {
	_, active, err := list(dir)
	if err != nil {
		return err
	}
	next := filepath.Join(dir, nextName)
	if active {
		if err = os.Remove(next); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if err = os.Rename(next, filepath.Join(dir, activeName)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
