package audit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// found is what the newest file of a log holds.
type found struct {
	name  string
	first uint64
	link  link
	// size is where the last line ends; there may be more in the file, which is
	// no line.
	size, torn int64
	// badLine is the first line that does not follow the one before it; 0: none.
	badLine int
	// atHead is the hash of the line that the head names, if it is here.
	atHead string
	// open are the intents without an outcome; of those of earlier files only
	// Seq is known.
	open map[uint64]Record
}

// recoverWriter puts in order what the last writer has left, and begins a file.
func recoverWriter(cfg Config) (*writer, error) {
	notes, err := clearWay(cfg)
	if err != nil {
		return nil, err
	}
	if err = errors.Join(finishRotation(cfg.Dir), durable.RemoveTemp(cfg.Dir)); err != nil {
		return nil, err
	}
	h, headErr := readHead(cfg.Dir)
	if headErr != nil && errdef.Code(headErr) == "internal" {
		return nil, headErr
	}
	last, err := findLast(cfg.Dir, h.Seq)
	if err != nil {
		return nil, err
	}
	fresh := last.name == "" && errors.Is(headErr, errdef.ErrNotFound) && len(notes) == 0
	w := &writer{cfg: cfg, open: map[uint64]bool{}, link: last.link}
	if !fresh {
		notes = append(notes, w.compare(last, h, headErr)...)
	}
	if last.name == activeName {
		w.first, w.size = last.first, last.size
	}
	if err = w.openActive(last, &notes); err != nil {
		return nil, err
	}
	for _, n := range notes {
		cfg.Logger.Warn("audit log is not as it was left", slog.String("action", n.Action), slog.String("found", n.Note))
	}
	if err = w.resume(fresh, append(notes, unknown(last.open)...)); err != nil {
		return nil, errdef.WithHint(errors.Join(fmt.Errorf("open audit log: %w", err), w.f.Close()),
			"make room on its disk, or choose another --audit-log")
	}
	return w, nil
}

// clearWay sets aside what is no file and has the name of one.
func clearWay(cfg Config) ([]Record, error) {
	var notes []Record
	for _, name := range []string{activeName, headName, nextName} {
		info, err := os.Lstat(filepath.Join(cfg.Dir, name))
		if errors.Is(err, fs.ErrNotExist) || (err == nil && info.Mode().IsRegular()) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open audit log: %w", err)
		}
		aside, err := durable.SetAside(filepath.Join(cfg.Dir, name), cfg.now())
		if err != nil {
			return nil, err
		}
		notes = append(notes, Record{Phase: Note, Action: "log.damaged", Object: filepath.Base(aside), Note: name + " is no file"})
	}
	return notes, nil
}

// resume writes what there is to say of the last run, and seals its file.
func (w *writer) resume(fresh bool, recs []Record) error {
	if fresh { // before the first line: a log without a head is one whose head was removed
		if err := w.syncTo(w.link); err != nil {
			return err
		}
	}
	if err := w.write(recs); err != nil {
		return err
	}
	clear(w.open)
	if w.size > 0 {
		return w.rotate()
	}
	return w.syncTo(w.link)
}

// findLast reads the newest file that holds a line.
func findLast(dir string, headSeq uint64) (found, error) {
	all, err := names(dir)
	if err != nil {
		return found{}, err
	}
	last := found{link: link{hash: noHash}}
	for _, name := range slices.Backward(all) {
		f, err := scan(dir, name, headSeq)
		if err != nil {
			return found{}, err
		}
		if last.name == "" {
			last.name, last.torn = f.name, f.torn
		}
		if f.link.seq > 0 {
			f.name, f.torn = last.name, last.torn
			if last.name != name { // the active file is there, and empty
				f.first, f.size = 0, 0
			}
			return f, nil
		}
	}
	return last, nil
}

// scan reads a file as far as it has lines.
func scan(dir, name string, headSeq uint64) (found, error) {
	f := found{name: name, link: link{hash: noHash}, open: map[uint64]Record{}}
	file, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return f, fmt.Errorf("read audit log: %w", err)
	}
	defer file.Close() //nolint:errcheck // it was only read
	odd := false       // there was something else since the last line
	s := newScanner(file)
	for err = s.next(); err == nil; err = s.next() {
		r, bad := decode(s.line)
		if bad != nil || !s.whole {
			odd = true
			continue
		}
		follows := f.first == 0 || (r.Seq == f.link.seq+1 && r.Prev == f.link.hash)
		if f.badLine == 0 && (odd || !follows) {
			f.badLine = s.n
		}
		odd = false
		f.take(r, hashOf(s.line), headSeq)
		f.size = s.offset
	}
	if !errors.Is(err, io.EOF) {
		return f, err
	}
	f.torn = s.offset - f.size
	return f, nil
}

// take notes a line.
func (f *found) take(r Record, hash string, headSeq uint64) {
	if f.first == 0 {
		f.first = r.Seq
	}
	f.link = link{seq: r.Seq, hash: hash, time: r.Time()}
	if r.Seq == headSeq {
		f.atHead = hash
	}
	switch {
	case r.Phase == Intent && r.Intent == 0:
		f.open[r.Seq] = r
	case r.Phase == Outcome:
		delete(f.open, r.Intent)
	}
	for _, seq := range r.Open {
		f.open[seq] = Record{Seq: seq}
	}
}

// compare says where what is there is not what the head says, and what does
// not hang together. What is missing stays missing: the chain goes on from the
// line that the head names, so that Verify finds the gap for ever.
func (w *writer) compare(last found, h head, headErr error) []Record {
	var notes []Record
	say := func(format string, args ...any) {
		notes = append(notes, Record{Phase: Note, Action: "log.damaged", Note: fmt.Sprintf(format, args...)})
	}
	if last.badLine > 0 {
		say("line %d of the last file does not follow the one before it", last.badLine)
	}
	switch {
	case headErr != nil:
		say("the head is missing or damaged")
	case h.Seq > w.link.seq:
		say("the head names line %d, the last one there is %d", h.Seq, w.link.seq)
		w.link.seq, w.link.hash = h.Seq, h.Hash
	case h.Seq == w.link.seq && h.Hash != w.link.hash:
		say("the last line is not the one that the head names")
		w.link.hash = h.Hash
	case last.atHead != "" && last.atHead != h.Hash:
		say("line %d is not the one that the head names", h.Seq)
	}
	return notes
}

// openActive opens the active file, and cuts off what is no line. A sealed file
// is left as it is, whatever it ends with.
func (w *writer) openActive(last found, notes *[]Record) error {
	f, err := openAppend(w.path(activeName))
	if err != nil {
		return err
	}
	w.f = w.cfg.wrap(f)
	if last.name != activeName || last.torn == 0 {
		return nil
	}
	name, err := setAside(w.cfg.Dir, w.link.seq+1, io.NewSectionReader(f, last.size, last.torn))
	if err == nil {
		err = w.f.Truncate(last.size)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("cut off half a line of the audit log: %w", err), w.f.Close())
	}
	*notes = append(*notes, Record{
		Phase: Note, Action: "log.torn", Object: name,
		Note: fmt.Sprintf("%d bytes at the end were no line", last.torn),
	})
	return nil
}

// setAside writes what is no line to a file of its own, for whoever wants to
// know what it was.
func setAside(dir string, seq uint64, r io.Reader) (string, error) {
	for n := 0; ; n++ {
		name := fmt.Sprintf("audit-%0*d.%d.torn", seqDigits, seq, n)
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		_, err = io.Copy(f, r)
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil { // it is tried again: half of it is of no use
			err = errors.Join(err, os.Remove(f.Name()))
		}
		return name, err
	}
}

// unknown are the outcomes of acts during which a daemon was killed.
func unknown(open map[uint64]Record) []Record {
	seqs := slices.Sorted(maps.Keys(open))
	var recs []Record
	if more := len(seqs) - maxOpen; more > 0 {
		seqs = seqs[more:]
		recs = append(recs, Record{Phase: Note, Action: "log.unknown", Note: fmt.Sprintf("of %d older acts the outcome is unknown too", more)})
	}
	for _, seq := range seqs {
		r := open[seq]
		recs = append(recs, Record{
			Phase: Outcome, Result: Unknown, Intent: seq,
			Action: r.Action, Actor: r.Actor, Object: r.Object, RequestID: r.RequestID,
			Method: r.Method, Route: r.Route, Remote: r.Remote,
		})
	}
	return recs
}
