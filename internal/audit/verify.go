package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
)

// Kinds of problem.
const (
	// Changed: a line is not what was written.
	Changed = "changed"
	// Removed: lines are missing, at the beginning or between two.
	Removed = "removed"
	// Inserted: a line is there twice, or was there before.
	Inserted = "inserted"
	// Truncated: lines are missing at the end.
	Truncated = "truncated"
	// Torn: the last line is not complete. The next daemon sets it aside.
	Torn = "torn"
	// Misnamed: a sealed file does not hold the lines that its name says.
	Misnamed = "misnamed"
	// Headless: the head is missing, or is not one.
	Headless = "headless"
)

// maxProblems is how many a report holds; where one line is out of its place
// there soon are many.
const maxProblems = 100

// Problem is a place where a log is not what was written.
type Problem struct {
	Kind string `json:"kind"`
	File string `json:"file"`
	// Line is counted from 1; 0 where it is not about a line.
	Line int `json:"line,omitempty"`
	// Seq is the line's number in the log; for lines that are missing that of
	// the first of them.
	Seq    uint64 `json:"seq,omitempty"`
	Detail string `json:"detail"`
}

// Report says what a log holds, and what is wrong with it.
type Report struct {
	OK    bool   `json:"ok"`
	Files int    `json:"files"`
	Lines uint64 `json:"lines"`
	First uint64 `json:"first_seq"`
	Last  uint64 `json:"last_seq"`
	// Hash is that of the last line. Kept elsewhere, with Last, it proves
	// later that everything up to here was left alone.
	Hash string `json:"last_hash"`
	// Ahead are the lines after the one that the head names: those that were
	// not synced yet.
	Ahead    uint64    `json:"ahead_of_head"`
	From     string    `json:"from,omitempty"`
	To       string    `json:"to,omitempty"`
	Problems []Problem `json:"problems"`
}

// VerifyOptions say what else is known of a log.
type VerifyOptions struct {
	// Trimmed: the oldest files were moved elsewhere.
	Trimmed bool
	// Anchors are the hashes that lines had at an earlier time.
	Anchors map[uint64]string
}

// Verify reads a log and finds where it is not what was written. Its error is
// about reading; what is wrong with the log is in the report. A log may be
// written to meanwhile. There must be one: errdef.ErrNotFound.
func Verify(ctx context.Context, dir string, opts VerifyOptions) (Report, error) {
	for try := 1; ; try++ {
		before, err := glance(dir)
		if err != nil {
			return Report{}, err
		}
		report, err := verify(ctx, dir, opts)
		after, glanceErr := glance(dir)
		moved := glanceErr != nil || before != after
		if (err == nil && report.OK) || try == 3 || !moved {
			return report, err
		}
	}
}

// glance is something that changes when the files do.
func glance(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: audit log %s", errdef.ErrNotFound, dir)
	}
	if err != nil {
		return "", fmt.Errorf("read audit directory: %w", err)
	}
	var b bytes.Buffer
	ours := false
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("read audit directory: %w", err)
		}
		_, isSealed := parseSealed(e.Name())
		ours = ours || isSealed || e.Name() == activeName || e.Name() == headName
		fmt.Fprintln(&b, e.Name(), info.Size(), info.ModTime().UnixNano())
	}
	if !ours {
		return "", fmt.Errorf("%w: audit log %s", errdef.ErrNotFound, dir)
	}
	return b.String(), nil
}

// verifier walks along the chain.
type verifier struct {
	report Report
	opts   VerifyOptions
	head   head
	// next is the number that comes next; hash is what it must have as prev, or
	// "" where that is not known.
	next uint64
	hash string
	ts   string
	// at is where the line before is.
	file string
	line int
}

func verify(ctx context.Context, dir string, opts VerifyOptions) (Report, error) {
	v := &verifier{next: 1, hash: noHash, opts: opts, report: Report{Problems: []Problem{}}}
	h, err := readHead(dir) // before the lines: they may only become more
	switch {
	case err == nil:
		v.head = h
	case errdef.Code(err) == "internal":
		return v.report, err
	default:
		v.problem(Problem{Kind: Headless, File: headName, Detail: err.Error()})
	}
	files, err := openView(dir)
	if err != nil {
		return v.report, err
	}
	defer files.close() //nolint:errcheck // it was only read
	for _, name := range files.names {
		if err = v.readFile(ctx, files, name); err != nil {
			return v.report, err
		}
	}
	v.end()
	v.report.Files, v.report.OK = len(files.names), len(v.report.Problems) == 0
	return v.report, nil
}

func (v *verifier) problem(p Problem) {
	if len(v.report.Problems) < maxProblems {
		v.report.Problems = append(v.report.Problems, p)
	}
}

func (v *verifier) readFile(ctx context.Context, files *view, name string) error {
	var first, last uint64
	err := files.read(ctx, name, func(s *scanner) error {
		if seq := v.readLine(name, s); seq > 0 {
			if first == 0 {
				first = seq
			}
			last = seq
		}
		return nil
	})
	if err != nil {
		return err
	}
	if sealed, ok := parseSealed(name); ok && (sealed.first != first || sealed.last != last) {
		v.problem(Problem{Kind: Misnamed, File: name, Seq: first, Detail: fmt.Sprintf("it holds lines %d to %d", first, last)})
	}
	return nil
}

// readLine looks at a line, and returns its number, or 0 if it is none.
func (v *verifier) readLine(name string, s *scanner) uint64 {
	here := Problem{Kind: Changed, File: name, Line: s.n, Seq: v.next}
	v.report.Lines++
	r, err := decode(s.line)
	if err != nil || !s.whole {
		if !s.whole {
			here.Kind, err = Torn, errors.New("the last line has no end")
		}
		here.Detail = err.Error()
		v.problem(here)
		v.next, v.hash, v.file, v.line = v.next+1, "", name, s.n
		return 0
	}
	here.Seq = r.Seq
	if v.place(r, here) {
		v.step(r, s.line, here)
	}
	return r.Seq
}

// place sees whether a line belongs where it is, and reports false for one that
// does not belong to the chain at all.
func (v *verifier) place(r Record, here Problem) bool {
	switch {
	case v.report.First == 0 && v.opts.Trimmed && r.Seq >= v.next:
		v.next, v.hash = r.Seq, ""
	case r.Seq > v.next:
		here.Kind, here.Seq = Removed, v.next
		here.Detail = fmt.Sprintf("lines %d to %d are missing before this one", v.next, r.Seq-1)
		v.problem(here)
		v.hash = ""
	case r.Seq < v.next:
		here.Kind = Inserted
		here.Detail = fmt.Sprintf("line %d should be here", v.next)
		v.problem(here)
		return false
	case v.hash != "" && r.Prev != v.hash:
		before := Problem{Kind: Changed, File: v.file, Line: v.line, Seq: r.Seq - 1, Detail: "the line after it holds another hash"}
		if r.Seq == 1 {
			before = here
			before.Detail = "the first line of all has a line before it"
		}
		v.problem(before)
	}
	return true
}

// step goes on from a line.
func (v *verifier) step(r Record, line []byte, here Problem) {
	if r.TS < v.ts {
		here.Kind, here.Detail = Changed, "its time is before that of the line before it"
		v.problem(here)
	}
	hash := hashOf(line)
	want, known := v.opts.Anchors[r.Seq]
	if (known && want != hash) || (r.Seq == v.head.Seq && v.head.Hash != hash) {
		here.Kind, here.Detail = Changed, "its hash is another than the head or the anchor says"
		v.problem(here)
	}
	if v.report.First == 0 {
		v.report.First, v.report.From = r.Seq, r.TS
	}
	v.next, v.hash, v.ts, v.file, v.line = r.Seq+1, hash, r.TS, here.File, here.Line
	v.report.Last, v.report.Hash, v.report.To = r.Seq, hash, r.TS
}

// end compares the end with the head and the anchors.
func (v *verifier) end() {
	if v.head.Seq > v.report.Last {
		v.problem(Problem{Kind: Truncated, File: headName, Seq: v.report.Last + 1, Detail: fmt.Sprintf("the head names line %d, the last one there is %d", v.head.Seq, v.report.Last)})
	}
	if v.head.Hash != "" && v.report.Last > v.head.Seq {
		v.report.Ahead = v.report.Last - v.head.Seq
	}
	for seq := range v.opts.Anchors {
		if seq > v.report.Last || seq < v.report.First {
			v.problem(Problem{Kind: Removed, File: headName, Seq: seq, Detail: "there is an anchor for this line, and no line"})
		}
	}
	slices.SortStableFunc(v.report.Problems, func(a, b Problem) int {
		return int(min(1, max(-1, int64(a.Seq)-int64(b.Seq))))
	})
}
