package guest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/tinevm/tine/internal/guestproto"
)

// Changes tells what the guest's files hold beyond its image, in order of their
// paths as bytes. An error of yield ends it and is returned. truncated says that
// there is more than is told. The guest goes on meanwhile: what changes during
// the call may be told as it was before, after, or in between.
func (c *Client) Changes(ctx context.Context, yield func(Change) error) (truncated bool, err error) {
	st, err := c.session.Open(ctx, guestproto.VerbChanges, &guestproto.ChangesRequest{}, true)
	if err != nil {
		return false, c.explain(err)
	}
	list := changeList{yield: yield}
	for {
		chunk, err := c.recv(ctx, st)
		if err != nil {
			return false, err
		}
		if chunk.Final {
			var done guestproto.ChangesDone
			err = c.decode(st, chunk, &done)
			return done.Truncated, err
		}
		var part guestproto.Changes
		if err = c.decode(st, chunk, &part); err != nil {
			return false, err
		}
		wrong, err := list.take(part.Changes)
		if wrong != "" {
			return false, c.broke(st, wrong)
		}
		if err != nil {
			st.Reset(guestproto.CodeCanceled, "not taken")
			return false, err
		}
	}
}

// changeList is a list of changes on its way out of a guest.
type changeList struct {
	yield func(Change) error
	last  string
	count int
}

// take hands changes on. wrong says how the guest broke the protocol.
func (l *changeList) take(changes []Change) (wrong string, err error) {
	for i := range changes {
		ch := &changes[i]
		if l.count++; l.count > guestproto.MaxChanges {
			return "too many changes", nil
		}
		if wrong = wrongChange(ch, l.last); wrong != "" {
			return wrong, nil
		}
		l.last = ch.Path
		if err = l.yield(*ch); err != nil {
			return "", err
		}
	}
	return "", nil
}

// wrongChange says what a guest must not say of a change that comes after last.
func wrongChange(ch *Change, last string) string {
	switch {
	case !strings.HasPrefix(ch.Path, "/") || len(ch.Path) > guestproto.MaxChangePath || len(ch.Target) > guestproto.MaxChangePath:
		return "change with a bad path"
	case ch.Path <= last:
		return "changes out of order"
	case ch.Kind > guestproto.ChangeDeleted:
		return fmt.Sprintf("change of kind %d", ch.Kind)
	case ch.Size < 0 || len(ch.Hash) != 0 && len(ch.Hash) != sha256.Size:
		return "change with a bad size or hash"
	default:
		return ""
	}
}
