package record

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/tinevm/tine/internal/errdef"
)

// open finds or makes the key and finds where the chain ends.
func (s *Store) open(ctx context.Context) error {
	found, err := places(s.cfg.Dir)
	if err != nil {
		return err
	}
	if err = s.openKey(ctx, len(found) > 0); err != nil {
		return err
	}
	if s.usage.Contents, s.usage.ContentBytes, err = s.blobs.measure(); err != nil {
		return err
	}
	return s.recover()
}

func (s *Store) openKey(ctx context.Context, hasRecords bool) error {
	dir := filepath.Join(s.cfg.Dir, keyDir)
	key, err := LoadKey(dir)
	if errors.Is(err, errdef.ErrNotFound) {
		if _, headErr := readHead(s.cfg.Dir, nil); hasRecords || !errors.Is(headErr, errdef.ErrNotFound) {
			return errdef.WithHint(fmt.Errorf("%w: there are records, and not the key that has signed them", errdef.ErrConflict),
				"put the key back to "+filepath.Join(dir, keyName)+", or move the directory of records away")
		}
		key, err = makeKey(ctx, dir)
	}
	s.key = key
	return err
}

// recover finds where the chain ends, and brings up to date the head that a
// killed process has left behind. A chain that is not as it was left goes on
// after all that is there: Check finds the gap for ever.
func (s *Store) recover() error {
	found, err := places(s.cfg.Dir)
	if err != nil {
		return err
	}
	keys := []Public{s.key.Public()}
	h, err := readHead(s.cfg.Dir, keys)
	switch {
	case errors.Is(err, errdef.ErrNotFound) && len(found) == 0: // before the first record
		h = head{0, firstDigest}
		err = writeHead(s.cfg.Dir, h, s.key)
	case err != nil:
		err = errdef.WithHint(fmt.Errorf("%w: the head of the chain of records: %w", errdef.ErrConflict, plain(err)),
			"check the records, and move their directory away to begin anew")
	}
	if err != nil {
		return err
	}
	end := s.follow(found, h, keys)
	if end != h {
		if err = writeHead(s.cfg.Dir, end, s.key); err != nil {
			return err
		}
	}
	s.places, s.next, s.stale = found, Chain{end.Seq + 1, end.Digest}, false
	if n := len(found); n > 0 && found[n-1].seq > end.Seq {
		s.next.Seq = found[n-1].seq + 1
		s.cfg.Logger.Warn("records are not as they were left", slog.Uint64("head", end.Seq), slog.Uint64("last", found[n-1].seq))
	}
	return nil
}

// plain is an error without its category, for one that gets another.
func plain(err error) error { return errors.New(err.Error()) }

// follow goes on from the head along the records that it does not name yet.
func (s *Store) follow(found []place, h head, keys []Public) head {
	for _, p := range found {
		if p.seq < h.Seq {
			continue
		}
		e, err := readPlace(s.cfg.Dir, p)
		switch {
		case err != nil:
			s.cfg.Logger.Warn("record cannot be read", slog.String("file", p.name()), slog.Any("error", err))
			return h
		case p.seq == h.Seq:
			if e.Digest != h.Digest {
				s.cfg.Logger.Warn("record is not the one that the head names", slog.String("file", p.name()))
			}
			continue
		case p.seq != h.Seq+1 || e.Record.Chain.Previous != h.Digest || e.verifySignature(keys[0]) != nil:
			return h
		}
		h = head{p.seq, e.Digest}
	}
	return h
}
