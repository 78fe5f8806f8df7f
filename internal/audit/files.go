package audit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	activeName = "audit.jsonl"
	// nextName is what the next active file is called until the present one is
	// sealed.
	nextName = "audit.next"
	headName = "audit.head"
	lockName = "audit.lock"
	// seqDigits makes names of sealed files sort as their numbers do.
	seqDigits = 16
	// The group may read: nobody gets past the directory, unless its owner gives
	// somebody who ships logs an entry in its access control list, and there the
	// group's bits are what an entry may give at most.
	activeMode = 0o640
	sealedMode = 0o440
	// maxHead bounds a head file.
	maxHead = 1024
)

// sealed is a file that nothing is added to any more.
type sealed struct {
	name        string
	first, last uint64
}

func sealedName(first, last uint64) string {
	return fmt.Sprintf("audit-%0*d-%0*d.jsonl", seqDigits, first, seqDigits, last)
}

func parseSealed(name string) (sealed, bool) {
	rest, isOurs := strings.CutPrefix(name, "audit-")
	rest, isLines := strings.CutSuffix(rest, ".jsonl")
	from, to, isRange := strings.Cut(rest, "-")
	first, err1 := strconv.ParseUint(from, 10, 64)
	last, err2 := strconv.ParseUint(to, 10, 64)
	s := sealed{name, first, last}
	return s, isOurs && isLines && isRange && err1 == nil && err2 == nil && sealedName(first, last) == name
}

// list returns the sealed files of dir in order, and whether there is an active
// one.
func list(dir string) (files []sealed, active bool, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, false, fmt.Errorf("read audit directory: %w", err)
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		if s, ok := parseSealed(e.Name()); ok {
			files = append(files, s)
		}
		active = active || e.Name() == activeName
	}
	slices.SortFunc(files, func(a, b sealed) int { return strings.Compare(a.name, b.name) })
	return files, active, nil
}

// names are the files of a log in order, the active one last.
func names(dir string) ([]string, error) {
	files, active, err := list(dir)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, s := range files {
		all = append(all, s.name)
	}
	if active {
		all = append(all, activeName)
	}
	return all, nil
}

// view is the files of a log at one instant, also while they are rotated: a
// sealed file stays what it is, and the active one is held open.
type view struct {
	dir    string
	names  []string
	active *os.File // nil when there was none
}

// maxLooks is how often a view is tried: a rotation falls into one of them, or
// into two.
const maxLooks = 100

func openView(dir string) (*view, error) {
	for range maxLooks {
		before, err := names(dir)
		if err != nil {
			return nil, err
		}
		v := &view{dir: dir, names: before}
		if v.active, err = os.Open(filepath.Join(dir, activeName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("read audit log: %w", err)
		}
		after, err := names(dir)
		if err == nil && slices.Equal(before, after) && (v.active != nil) == slices.Contains(after, activeName) {
			return v, nil
		}
		if err = errors.Join(err, v.close()); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: audit log %s does not hold still", errdef.ErrConflict, dir)
}

func (v *view) close() error {
	if v.active == nil {
		return nil
	}
	return v.active.Close()
}

// read calls f with the lines of a file.
func (v *view) read(ctx context.Context, name string, f func(*scanner) error) error {
	file := v.active
	if name != activeName {
		var err error
		if file, err = os.Open(filepath.Join(v.dir, name)); err != nil {
			return fmt.Errorf("read audit log: %w", err)
		}
		defer file.Close() //nolint:errcheck // it was only read
	}
	s := newScanner(file)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err := s.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = f(s)
		}
		if err != nil {
			return err
		}
	}
}

// head says which line was the last: without it a log that was cut short would
// look whole.
type head struct {
	Hash string `json:"hash"`
	Seq  uint64 `json:"seq"`
	V    int    `json:"v"`
}

func encodeHead(h head) ([]byte, error) {
	data, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encode audit head: %w", err)
	}
	return append(data, '\n'), nil
}

func decodeHead(data []byte) (head, error) {
	var h head
	if err := json.Unmarshal(data, &h); err != nil {
		return head{}, fmt.Errorf("%w: audit head: %w", errdef.ErrInvalid, err)
	}
	if h.V != version {
		return head{}, fmt.Errorf("%w: audit head of version %d", errdef.ErrUnsupported, h.V)
	}
	if again, err := encodeHead(h); err != nil || !bytes.Equal(again, data) || len(h.Hash) != len(noHash) || (h.Seq == 0 && h.Hash != noHash) {
		return head{}, fmt.Errorf("%w: audit head is not in its canonical form", errdef.ErrInvalid)
	}
	return h, nil
}

func readHead(dir string) (head, error) {
	f, err := os.Open(filepath.Join(dir, headName))
	if errors.Is(err, fs.ErrNotExist) {
		return head{}, fmt.Errorf("%w: audit head", errdef.ErrNotFound)
	}
	if err != nil {
		return head{}, fmt.Errorf("read audit head: %w", err)
	}
	defer f.Close() //nolint:errcheck // it was only read
	data, err := io.ReadAll(io.LimitReader(f, maxHead+1))
	if err != nil {
		return head{}, fmt.Errorf("read audit head: %w", err)
	}
	return decodeHead(data)
}

func writeHead(dir string, h head, sync bool) error {
	data, err := encodeHead(h)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, headName)
	if sync {
		return durable.WriteFile(path, data, 0o600)
	}
	return durable.Replace(path, data, 0o600)
}

// scanner reads lines, and holds no more of a file than one.
type scanner struct {
	r *bufio.Reader
	// line is the last line, without its end; n is its number, from 1 on.
	line []byte
	n    int
	// offset is where the line after it begins.
	offset int64
	// whole: the line has its end. The last one of a file may not.
	whole bool
}

func newScanner(r io.Reader) *scanner { return &scanner{r: bufio.NewReaderSize(r, 2*maxLine)} }

// next reads a line, and returns io.EOF after the last. Of a line that is too
// long to be one it keeps what is enough to see that.
func (s *scanner) next() error {
	line, err := s.r.ReadSlice('\n')
	size := int64(len(line))
	s.line = slices.Clone(line)
	for errors.Is(err, bufio.ErrBufferFull) {
		line, err = s.r.ReadSlice('\n')
		size += int64(len(line))
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read audit log: %w", err)
	}
	if size == 0 {
		return io.EOF
	}
	s.n++
	s.offset += size
	s.whole = err == nil
	if s.whole {
		s.line = bytes.TrimSuffix(s.line, []byte("\n"))
	}
	return nil
}
