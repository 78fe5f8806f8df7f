package audit

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strconv"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// followTime is how often Follow looks whether there is more.
const followTime = 200 * time.Millisecond

// Line is a line as it is in the log, and what it says.
type Line struct {
	Record
	// Text has no end of line.
	Text []byte
}

// Read calls f with each line that comes after the one numbered after, in
// order, and returns the number of the last. What is no line it leaves out:
// that is Verify's to tell. There must be a log: errdef.ErrNotFound.
func Read(ctx context.Context, dir string, after uint64, f func(Line) error) (uint64, error) {
	if _, err := glance(dir); err != nil {
		return after, err
	}
	v, err := openView(dir)
	if err != nil {
		return after, err
	}
	defer v.close() //nolint:errcheck // it was only read
	for _, name := range v.names {
		if s, ok := parseSealed(name); ok && s.last <= after {
			continue
		}
		err = v.read(ctx, name, func(s *scanner) error {
			if !s.whole || seqOf(s.line) <= after { // seen already: no need to read all of it again
				return nil
			}
			r, bad := decode(s.line)
			if bad != nil {
				return nil
			}
			after = r.Seq
			return f(Line{r, s.line})
		})
		if err != nil {
			return after, err
		}
	}
	return after, nil
}

// seqOf is the number that a line says it has, or 0. The quotes of a string's
// content are escaped, so only a name can look like this one.
func seqOf(line []byte) uint64 {
	_, rest, _ := bytes.Cut(line, []byte(`"seq":`))
	digits, _, _ := bytes.Cut(rest, []byte(","))
	seq, err := strconv.ParseUint(string(digits), 10, 64)
	if err != nil {
		return 0
	}
	return seq
}

// Tail returns the last n lines.
func Tail(ctx context.Context, dir string, n int) ([]Line, error) {
	if _, err := glance(dir); err != nil {
		return nil, err
	}
	v, err := openView(dir)
	if err != nil {
		return nil, err
	}
	defer v.close() //nolint:errcheck // it was only read
	var lines []Line
	for _, name := range slices.Backward(v.names) {
		var of []Line
		err = v.read(ctx, name, func(s *scanner) error {
			if r, bad := decode(s.line); bad == nil && s.whole {
				of = append(of, Line{r, s.line})
			}
			if len(of) > 2*n+1 {
				of = slices.Clone(of[len(of)-n:])
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		if lines = append(of, lines...); len(lines) >= n {
			break
		}
	}
	return lines[max(0, len(lines)-n):], nil
}

// Follow is Read, and goes on with what is written meanwhile, until ctx ends.
func Follow(ctx context.Context, dir string, after uint64, f func(Line) error) error {
	tick := time.NewTicker(followTime)
	defer tick.Stop()
	seen := ""
	for {
		now, err := glance(dir)
		if err != nil && !errors.Is(err, errdef.ErrNotFound) {
			return err
		}
		if now != seen {
			if after, err = Read(ctx, dir, after, f); err != nil {
				return err
			}
			seen = now
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
