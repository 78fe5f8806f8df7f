package guestmem

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// Space is where a process maps a memory image, privately: pages that the
// process has written to are its own, and all others are the image's. Its
// methods take offsets in the image. It holds nothing; whoever uses it sees to
// it that PID stays the same process.
type Space struct {
	PID    int
	Ranges []linux.Mapping // ascending by Offset, no two of the same offset
}

// FindSpace returns where the process pid maps the image path, which is as the
// kernel prints it: absolute, with no links. It returns errdef.ErrNotFound when
// the process or the mapping is not there, and errdef.ErrUnsupported when the
// mapping is shared, for then writes go to the image.
func FindSpace(pid int, path string) (Space, error) {
	found, err := linux.FindPrivateMapping(pid, path)
	if err != nil {
		return Space{}, fmt.Errorf("find memory: %w", err)
	}
	s := Space{PID: pid}
	slices.SortFunc(found, func(a, b linux.Mapping) int { return cmp.Compare(a.Offset, b.Offset) })
	for _, m := range found {
		if err := s.add(m); err != nil {
			return Space{}, fmt.Errorf("find memory %s of process %d: %w", path, pid, err)
		}
	}
	return s, nil
}

// add puts m behind the other ranges, or makes one of it and the last.
func (s *Space) add(m linux.Mapping) error {
	if len(s.Ranges) > 0 {
		last := &s.Ranges[len(s.Ranges)-1]
		end := last.Offset + last.End - last.Start
		if m.Offset < end {
			return fmt.Errorf("%w: offset %#x is mapped twice", errdef.ErrUnsupported, m.Offset)
		}
		if m.Offset == end && m.Start == last.End {
			last.End = m.End
			return nil
		}
	}
	s.Ranges = append(s.Ranges, m)
	return nil
}

// Private calls yield with each run of pages of the image that are the
// process's own, ascending; yield returns false to stop. The answer is of one
// instant only for a process that does not run.
func (s Space) Private(yield func(first, count uint64) bool) error {
	j := runJoiner{yield: yield}
	for _, m := range s.Ranges {
		err := linux.PrivatePages(s.PID, m.Start, m.End, func(start, end uint64) bool {
			return j.add((start-m.Start+m.Offset)/PageSize, (end-start)/PageSize)
		})
		if err != nil {
			return fmt.Errorf("find private pages: %w", err)
		}
	}
	if !j.flush() {
		return nil
	}
	if err := linux.CheckAlive(s.PID); err != nil { // else it had no pages because it had ended
		return fmt.Errorf("find private pages: %w", err)
	}
	return nil
}

// ReadAt reads what the process has in place of the image's bytes from off.
func (s Space) ReadAt(p []byte, off int64) (int, error) {
	return s.move(linux.ReadMemory, p, off)
}

// WriteAt writes to the process's memory and leaves the image alone.
func (s Space) WriteAt(p []byte, off int64) (int, error) {
	return s.move(linux.WriteMemory, p, off)
}

func (s Space) move(call func(int, []byte, []linux.Extent) error, p []byte, off int64) (int, error) {
	extents, err := s.extents(nil, uint64(off), uint64(len(p)))
	if err == nil && len(p) > 0 {
		err = call(s.PID, p, extents)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// extents appends the addresses of size bytes of the image from off.
func (s Space) extents(to []linux.Extent, off, size uint64) ([]linux.Extent, error) {
	for _, m := range s.Ranges {
		if size == 0 {
			break
		}
		if length := m.End - m.Start; off >= m.Offset && off-m.Offset < length {
			n := min(size, length-(off-m.Offset))
			to = append(to, linux.Extent{Addr: m.Start + off - m.Offset, Size: n})
			off, size = off+n, size-n
		}
	}
	if size > 0 {
		return nil, fmt.Errorf("%w: process %d does not map offset %#x of its memory", errdef.ErrInvalid, s.PID, off)
	}
	return to, nil
}

// moveRuns moves whole pages between p, where they lie one after the other, and
// the process, in as few calls as can be.
func (s Space) moveRuns(call func(int, []byte, []linux.Extent) error, p []byte, runs []pageRun) error {
	extents := make([]linux.Extent, 0, len(runs))
	var err error
	for _, r := range runs {
		if extents, err = s.extents(extents, r.first*PageSize, r.count*PageSize); err != nil {
			return err
		}
	}
	return call(s.PID, p, extents)
}

func (s Space) readRuns(p []byte, runs []pageRun) error { return s.moveRuns(linux.ReadMemory, p, runs) }

// Fill writes every page that img's layers hold into the process, so that its
// memory reads as img does if what it maps is img's base. The process must not
// read its memory meanwhile.
func (s Space) Fill(ctx context.Context, img *Image) error {
	err := parallel(ctx, split(imageRuns(img), batchPages), func() func(batch) error {
		buf := make([]byte, batchPages*PageSize)
		return func(b batch) error {
			p := buf[:b.pages*PageSize]
			if err := readEach(img, p, b.runs); err != nil {
				return err
			}
			return s.moveRuns(linux.WriteMemory, p, b.runs)
		}
	})
	if err != nil {
		return fmt.Errorf("fill memory of process %d: %w", s.PID, err)
	}
	return nil
}

// Copy copies the private pages into memory of this process. The process must
// not run meanwhile; it may once Copy has returned.
func (s Space) Copy(ctx context.Context) (*Copy, error) {
	r, err := s.reserve()
	if err != nil {
		return nil, err
	}
	c, err := r.Copy(ctx)
	return c, errors.Join(err, r.Close())
}

// Reserve makes room for a copy while the process still runs, so that Copy need
// not wait for memory: that takes longer than the copying.
func (s Space) Reserve(ctx context.Context) (*Reservation, error) {
	r, err := s.reserve()
	if err != nil {
		return nil, err
	}
	runs, err := privateRuns(s)
	if err == nil {
		err = r.populate(ctx, runs)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("reserve memory for process %d: %w", s.PID, err), r.Close())
	}
	return r, nil
}

// Reservation is room for a copy of a process's private pages, however many
// they become.
type Reservation struct {
	space Space
	room  *Copy // nil once it is handed out
}

func (s Space) reserve() (*Reservation, error) {
	var size uint64
	for _, m := range s.Ranges {
		size += m.End - m.Start
	}
	room, err := newCopy(size)
	if err != nil {
		return nil, fmt.Errorf("reserve memory for process %d: %w", s.PID, err)
	}
	return &Reservation{space: s, room: room}, nil
}

// populate has the kernel find memory for the pages that there are now, and
// some for those that are written until the process stops.
func (r *Reservation) populate(ctx context.Context, runs []pageRun) error {
	var pages uint64
	for _, run := range runs {
		pages += run.count
	}
	pages = min(pages+pages/16+copyBatchPages/4, uint64(len(r.room.mem))/PageSize)
	return parallel(ctx, split([]pageRun{{0, pages}}, copyBatchPages), func() func(batch) error {
		return func(b batch) error {
			// It may be refused, and before Linux 5.14 there is no such thing.
			_ = unix.Madvise(r.room.mem[b.at*PageSize:][:b.pages*PageSize], unix.MADV_POPULATE_WRITE)
			return nil
		}
	})
}

// Copy is Space.Copy, and uses the reservation up. The process must not run
// meanwhile.
func (r *Reservation) Copy(ctx context.Context) (*Copy, error) {
	c := r.room
	if c == nil {
		return nil, fmt.Errorf("%w: room for process %d was used before", errdef.ErrConflict, r.space.PID)
	}
	runs, err := privateRuns(r.space)
	if err != nil {
		return nil, err
	}
	c.place(runs)
	err = parallel(ctx, split(runs, copyBatchPages), func() func(batch) error {
		return func(b batch) error {
			return r.space.readRuns(c.mem[b.at*PageSize:][:b.pages*PageSize], b.runs)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("copy memory of process %d: %w", r.space.PID, err)
	}
	r.room = nil
	return c, nil
}

// Close frees the room, if Copy has not handed it out.
func (r *Reservation) Close() error {
	room := r.room
	r.room = nil
	if room == nil {
		return nil
	}
	return room.Close()
}
