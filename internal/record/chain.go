package record

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// Kinds of problem that only a chain has; those of its records are the kinds of
// finding.
const (
	// Changed: a record or the head is not what was written.
	Changed = "changed"
	// Removed: records are missing, at the beginning or between two.
	Removed = "removed"
	// Inserted: there are two records of one number.
	Inserted = "inserted"
	// Truncated: records are missing at the end.
	Truncated = "truncated"
	// Headless: the head is missing, or is not one that the key has signed.
	Headless = "headless"
	// MissingContent: bytes that a record names are not there.
	MissingContent = "missing-content"
)

// maxProblems is how many a report holds.
const maxProblems = 100

// CheckOptions say what a check goes by.
type CheckOptions struct {
	Dir   string
	Trust Trust
	// Contents reads them all, and hashes them as they were hashed.
	Contents bool
	// Anchors are the digests that records had at an earlier time, by number.
	Anchors map[uint64]string
}

// Problem is a place where a store is not what was written.
type Problem struct {
	Kind string `json:"kind"`
	File string `json:"file"`
	// Seq is the record's number; of several that are missing that of the first.
	Seq    uint64 `json:"seq,omitempty"`
	Detail string `json:"detail"`
}

// Report says what a store holds, and what is wrong with it.
type Report struct {
	OK      bool   `json:"ok"`
	Records uint64 `json:"records"`
	Last    uint64 `json:"last_seq"`
	// Digest is that of the last record. Kept elsewhere, with Last, it proves
	// later that everything up to here was left alone.
	Digest   string    `json:"last_digest"`
	Problems []Problem `json:"problems"`
}

// Check walks along the whole chain of a store, which may be written to
// meanwhile, and says where it is broken. Its error is about reading; what is
// wrong with the store is in the report. There must be one: errdef.ErrNotFound.
func Check(ctx context.Context, opts CheckOptions) (Report, error) {
	if _, err := os.Lstat(filepath.Join(opts.Dir, chainDir)); errors.Is(err, os.ErrNotExist) {
		return Report{}, fmt.Errorf("%w: records in %s", errdef.ErrNotFound, opts.Dir)
	}
	c := &checker{opts: opts, previous: firstDigest, report: Report{Problems: []Problem{}, Digest: firstDigest}}
	h, err := readHead(opts.Dir, opts.Trust.Keys) // before the records: they only become more
	switch {
	case err == nil:
		c.head = h
	case errdef.Code(err) == "internal":
		return Report{}, err
	default:
		c.problem(Headless, headName, 0, err.Error())
	}
	all, err := places(opts.Dir)
	if err != nil {
		return Report{}, err
	}
	if opts.Trust.Now.IsZero() {
		c.opts.Trust.Now = time.Now()
	}
	for _, p := range all {
		if ctx.Err() != nil {
			return Report{}, context.Cause(ctx)
		}
		c.step(p)
	}
	c.end()
	return c.report, nil
}

type checker struct {
	opts   CheckOptions
	head   head
	report Report
	// previous is the digest of the record before, or "" when it is not known.
	previous string
}

func (c *checker) problem(kind, file string, seq uint64, detail string) {
	if len(c.report.Problems) < maxProblems {
		c.report.Problems = append(c.report.Problems, Problem{kind, file, seq, detail})
	}
}

func (c *checker) step(p place) {
	c.report.Records++
	want := c.report.Last + 1
	switch {
	case p.seq < want:
		c.problem(Inserted, p.name(), p.seq, "there is another record of this number")
		return
	case p.seq > want:
		c.problem(Removed, p.name(), want, fmt.Sprintf("records %d to %d are missing before this one", want, p.seq-1))
		if want == c.head.Seq+1 && c.head.Digest != "" {
			c.previous = c.head.Digest // what a store went on from that had lost its end
		} else {
			c.previous = ""
		}
	}
	c.report.Last, c.report.Digest = p.seq, ""
	e, err := readPlace(c.opts.Dir, p)
	if err != nil {
		kind := Changed
		if errors.Is(err, errdef.ErrUnsupported) {
			kind = Unsupported
		}
		c.problem(kind, p.name(), p.seq, err.Error())
		c.previous = ""
		return
	}
	if c.previous != "" && e.Record.Chain.Previous != c.previous {
		c.problem(Changed, p.name(), p.seq, "it names another record as the one before it than is there")
	}
	c.previous, c.report.Digest = e.Digest, e.Digest
	c.judge(p, e)
}

// judge looks at a record by itself.
func (c *checker) judge(p place, e Envelope) {
	var from Source
	if c.opts.Contents {
		from = blobs{filepath.Join(c.opts.Dir, blobDir)}
	}
	v := Verify(e.Bytes, c.opts.Trust, from)
	for _, f := range v.Findings {
		c.problem(f.Kind, p.name(), p.seq, f.Detail)
	}
	for _, b := range v.Missing {
		c.problem(MissingContent, p.name(), p.seq, fmt.Sprintf("content %s of %d bytes is not there", b.Digest, b.Size))
	}
	if p.seq == c.head.Seq && c.head.Digest != e.Digest {
		c.problem(Changed, p.name(), p.seq, "the head names another record of this number")
	}
	if want, known := c.opts.Anchors[p.seq]; known && want != e.Digest {
		c.problem(Changed, p.name(), p.seq, "the anchor names another record of this number")
	}
}

// end compares the end with the head and the anchors.
func (c *checker) end() {
	if c.head.Seq > c.report.Last {
		c.problem(Truncated, headName, c.report.Last+1, fmt.Sprintf("the head names record %d, the last one there is %d", c.head.Seq, c.report.Last))
	}
	for seq := range c.opts.Anchors {
		if seq > c.report.Last {
			c.problem(Truncated, headName, seq, "there is an anchor for this record, and no record")
		}
	}
	slices.SortStableFunc(c.report.Problems, func(a, b Problem) int { return int(min(1, max(-1, int64(a.Seq)-int64(b.Seq)))) })
	c.report.OK = len(c.report.Problems) == 0
}
