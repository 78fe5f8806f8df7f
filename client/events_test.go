package client_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

func TestEvents(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	errEnough := errors.New("enough")
	var got []client.Event
	take := func(e client.Event) error {
		got = append(got, e)
		return errEnough
	}
	if err := c.Events(ctx, "another-0", take); !errors.Is(err, errEnough) || got[0].Type != "gap" {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := c.Events(ctx, got[0].ID, take); !errors.Is(err, errEnough) || got[1].Type != "created" || got[1].Sandbox != id {
		t.Errorf("%+v, %v", got, err)
	}
	if err := c.Events(ctx, "nonsense", take); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("nonsense: %v", err)
	}
}

func TestIdempotent(t *testing.T) {
	t.Parallel()
	c, _ := connect(t)
	once := c.Idempotent("key-1")
	first, err := once.Fork(t.Context(), client.ForkRequest{Snapshot: "py"})
	if err != nil {
		t.Fatal(err)
	}
	again, err := once.Fork(t.Context(), client.ForkRequest{Snapshot: "py"})
	if diff := cmp.Diff(first, again); diff != "" || err != nil {
		t.Errorf("%v (-first +again):\n%s", err, diff)
	}
	_, err = once.Fork(t.Context(), client.ForkRequest{Snapshot: "py", N: 2})
	if e, ok := errors.AsType[*client.Error](err); !ok || e.Code != "key_reused" || e.RequestID == "" {
		t.Errorf("another request with the key: %v", err)
	}
}

func TestPages(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	ctx := t.Context()
	if _, err := c.Fork(ctx, client.ForkRequest{Snapshot: "py", N: 2}); err != nil {
		t.Fatal(err)
	}
	first, next, err := c.SandboxPage(ctx, 2, "")
	if err != nil || len(first) != 2 || first[0].ID != id || next == "" {
		t.Fatalf("%d sandboxes, next %q, %v", len(first), next, err)
	}
	if rest, end, restErr := c.SandboxPage(ctx, 2, next); restErr != nil || len(rest) != 1 || end != "" {
		t.Errorf("%d sandboxes, next %q, %v", len(rest), end, restErr)
	}
	if snaps, _, snapErr := c.SnapshotPage(ctx, 5, ""); snapErr != nil || len(snaps) != 1 {
		t.Errorf("%d snapshots, %v", len(snaps), snapErr)
	}
	if images, _, imageErr := c.ImagePage(ctx, 5, ""); imageErr != nil || len(images) != 1 {
		t.Errorf("%d images, %v", len(images), imageErr)
	}
	if workspaces, _, spaceErr := c.WorkspacePage(ctx, 5, ""); spaceErr != nil || len(workspaces) != 0 {
		t.Errorf("%d workspaces, %v", len(workspaces), spaceErr)
	}
	if _, _, err = c.SandboxPage(ctx, 0, ""); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("limit 0: %v", err)
	}
}
