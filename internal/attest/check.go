package attest

import (
	"context"
	"time"

	"github.com/tinevm/tine/internal/record"
)

// Check walks along the chain of records, and says where it is broken. With
// contents it reads all of them. Anchors are digests that records had at an
// earlier time, by number.
func (a *Attestor) Check(ctx context.Context, contents bool, anchors map[uint64]string) (record.Report, error) {
	store, err := a.Records(ctx)
	if err != nil {
		return record.Report{}, err
	}
	return record.Check(ctx, record.CheckOptions{
		Dir: a.cfg.Records, Contents: contents, Anchors: anchors,
		Trust: record.Trust{Keys: []record.Public{store.Public()}, Now: time.Now()},
	})
}
