package jail

import (
	"errors"
	"os"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
)

// There are as many networks as there may be, and one that is given up makes
// room, whatever became of its cell.
func TestLinks(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: not root, so /dev/net/tun may be closed to us")
	}
	j := openJail(t, func(c *Config) { c.Links = 2 })
	take := func() *Cell {
		t.Helper()
		c, err := j.Take(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	exhausted := func() {
		t.Helper()
		if c, err := j.Take(t.Context(), true); !errors.Is(err, errdef.ErrUnavailable) || errdef.Hint(err) == "" {
			t.Errorf("one more network: %v, %v", c, err)
		}
	}
	one, two := take(), take()
	exhausted()
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	one = take()
	exhausted()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	p, err := one.Start(t.Context(), Job{Output: null, Env: []string{"TINE_TEST_HOSTILE=1"}, FileBytes: 1})
	if err != nil {
		t.Fatal(err)
	}
	exhausted()
	_ = p.Wait() // how it ends is its own business
	if err := p.Started(); err != nil {
		t.Error(err)
	}
	one = take()
	if err := errors.Join(one.Close(), two.Close()); err != nil {
		t.Fatal(err)
	}
	// What an earlier daemon started counts, even when there are too many.
	var release []func()
	for range 3 {
		release = append(release, j.Adopt())
	}
	exhausted()
	for _, f := range release {
		f()
	}
	if err := take().Close(); err != nil {
		t.Error(err)
	}
	if j.links != 0 {
		t.Errorf("%d networks are left", j.links)
	}
}
