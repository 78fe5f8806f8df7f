package record

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	defaultLimit = 100
	maxLimit     = 1000
)

// Filter says which records to list; what is zero leaves all in.
type Filter struct {
	Block, User string
	// Snapshot is a digest, or a tag that it had when the run began.
	Snapshot string
	Mode     Mode
	// Since leaves out what was signed before.
	Since time.Time
	// Before leaves out numbers from this one on: the Next of the page before.
	Before uint64
	// Limit is 100 when it is 0, and at most 1000.
	Limit int
}

func (f Filter) validate() error {
	if f.Mode != "" && f.Mode != Normal && f.Mode != Deterministic {
		return fmt.Errorf("%w: mode %.40q is not normal or deterministic", errdef.ErrInvalid, f.Mode)
	}
	if f.Limit < 0 || f.Limit > maxLimit {
		return fmt.Errorf("%w: limit %d is not 1 to %d", errdef.ErrInvalid, f.Limit, maxLimit)
	}
	return nil
}

func (f Filter) admits(r Record) bool {
	return (f.Block == "" || f.Block == r.Block) &&
		(f.User == "" || f.User == r.User) &&
		(f.Snapshot == "" || f.Snapshot == r.Environment.Snapshot || f.Snapshot == r.Environment.SnapshotTag) &&
		(f.Mode == "" || f.Mode == r.Mode) &&
		!r.Created.Before(f.Since)
}

// Page is a part of a list, the newest first.
type Page struct {
	Records []Envelope
	// Next is the Before of the page that follows, or 0 after the last.
	Next uint64
	// Unreadable are the files of records that cannot be read: Check says why.
	Unreadable []string
}

// List returns records, the newest first. It judges no signature.
func (s *Store) List(ctx context.Context, f Filter) (Page, error) {
	if err := f.validate(); err != nil {
		return Page{}, err
	}
	if f.Limit == 0 {
		f.Limit = defaultLimit
	}
	s.mu.Lock()
	all := slices.Clip(s.places) // it only grows, behind this
	s.mu.Unlock()
	var page Page
	for _, p := range slices.Backward(all) {
		if f.Before != 0 && p.seq >= f.Before {
			continue
		}
		if ctx.Err() != nil {
			return Page{}, context.Cause(ctx)
		}
		e, err := readPlace(s.cfg.Dir, p)
		switch {
		case err != nil:
			page.Unreadable = append(page.Unreadable, p.name())
		case f.admits(e.Record):
			if len(page.Records) == f.Limit {
				page.Next = page.Records[f.Limit-1].Record.Chain.Seq
				return page, nil
			}
			page.Records = append(page.Records, e)
		}
	}
	return page, nil
}
