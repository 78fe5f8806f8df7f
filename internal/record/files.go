package record

import (
	"bytes"
	"crypto/ed25519"
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

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// What a store's directory holds.
const (
	chainDir = "chain"
	blobDir  = "blobs"
	keyDir   = "key"
	headName = "head.json"
	lockName = "records.lock"

	// seqDigits makes names of records sort as their numbers do.
	seqDigits = 16
	headType  = "application/vnd.tine.record-head+json"
	maxHead   = 4096
)

// place is a record's number and id: its file's name.
type place struct {
	seq uint64
	id  string
}

func (p place) name() string { return fmt.Sprintf("%0*d-%s.json", seqDigits, p.seq, p.id) }

func parsePlace(name string) (place, bool) {
	rest, ok := strings.CutSuffix(name, ".json")
	digits, id, isPair := strings.Cut(rest, "-")
	seq, err := strconv.ParseUint(digits, 10, 64)
	p := place{seq, id}
	return p, ok && isPair && err == nil && seq > 0 && idForm.MatchString(id) && p.name() == name
}

// places lists the records of a store in their order.
func places(dir string) ([]place, error) {
	entries, err := os.ReadDir(filepath.Join(dir, chainDir)) // sorted by name
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	var all []place
	for _, e := range entries {
		if p, ok := parsePlace(e.Name()); ok && e.Type().IsRegular() {
			all = append(all, p)
		}
	}
	slices.SortStableFunc(all, func(a, b place) int { return min(1, max(-1, int(int64(a.seq)-int64(b.seq)))) })
	return all, nil
}

// readPlace reads the record that lies in a place, and sees that it belongs
// there and is whole.
func readPlace(dir string, p place) (Envelope, error) {
	data, err := readBounded(filepath.Join(dir, chainDir, p.name()), maxEnvelope+1)
	if err != nil {
		return Envelope{}, err
	}
	if !bytes.HasSuffix(data, []byte("\n")) {
		return Envelope{}, invalid("%s has no end", p.name())
	}
	e, err := Parse(data)
	if err != nil {
		return Envelope{}, fmt.Errorf("read record %s: %w", p.name(), err)
	}
	if e.Record.ID != p.id || e.Record.Chain.Seq != p.seq {
		return Envelope{}, invalid("%s holds record %d, %s", p.name(), e.Record.Chain.Seq, e.Record.ID)
	}
	return e, nil
}

// readBounded reads a file that has at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", errdef.ErrNotFound, filepath.Base(path))
	}
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	defer f.Close() //nolint:errcheck // it was only read
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	if int64(len(data)) > limit {
		return nil, invalid("%s has more than %d bytes", filepath.Base(path), limit)
	}
	return data, nil
}

// head says which record is the last, signed: without it a chain that was cut
// short would look whole.
type head struct {
	Seq    uint64 `json:"seq"`
	Digest string `json:"digest"`
}

func writeHead(dir string, h head, key *Key) error {
	payload, err := encodeJSON(h)
	if err != nil {
		return err
	}
	data, err := seal(headType, payload, key)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, headName), append(data, '\n'), 0o600)
}

// readHead returns the head that one of the keys has signed: errdef.ErrNotFound
// when there is no file, errdef.ErrInvalid when it is not one, and
// errdef.ErrDenied when another has signed it.
func readHead(dir string, keys []Public) (head, error) {
	data, err := readBounded(filepath.Join(dir, headName), maxHead)
	if err != nil {
		return head{}, err
	}
	if !bytes.HasSuffix(data, []byte("\n")) {
		return head{}, invalid("head has no end")
	}
	payload, sig, keyID, err := unseal(data, headType)
	if err != nil {
		return head{}, fmt.Errorf("read head: %w", err)
	}
	var h head
	if err = json.Unmarshal(payload, &h); err != nil {
		return head{}, invalid("head: %w", err)
	}
	if again, encErr := encodeJSON(h); encErr != nil || !bytes.Equal(again, payload) || checkDigest(h.Digest) != nil {
		return head{}, invalid("head is not in its one form")
	}
	for _, key := range keys {
		if key.ID() == keyID && ed25519.Verify(key.key, PAE(headType, payload), sig) {
			return h, nil
		}
	}
	return head{}, fmt.Errorf("%w: the head of the records is signed by a key that is not trusted", errdef.ErrDenied)
}
