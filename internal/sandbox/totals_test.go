package sandbox

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/errdef"
)

// TestNetTotals: what a network has counted is still counted when it has ended.
func TestNetTotals(t *testing.T) {
	t.Parallel()
	w, m := netWorld(t)
	id := netFork(t, m, allowing("203.0.113.7"))
	if !w.reaches(t, m, id, outside) {
		t.Fatal("not reached")
	}
	other := netFork(t, m, nil)
	if w.reaches(t, m, other, outside) {
		t.Fatal("reached")
	}
	before := m.Load().Net
	if before.Networks != 2 || before.BytesUp == 0 || before.Denied == 0 {
		t.Errorf("totals %+v", before)
	}
	for _, id := range []string{id, other} {
		if err := m.Kill(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	after := m.Load().Net
	if after.Networks != 0 || after.Connections != 0 || after.BytesUp < before.BytesUp || after.Denied < before.Denied {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// TestEditNet: edits at once are all made, and one that fails changes nothing.
func TestEditNet(t *testing.T) {
	t.Parallel()
	w, m := netWorld(t)
	w.template(t, m)
	id := netFork(t, m, nil)
	var work sync.WaitGroup
	names := []string{"a.example", "b.example", "c.example", "d.example"}
	for _, name := range names {
		work.Go(func() {
			_, err := m.EditNet(t.Context(), id, func(r egress.Rules) (egress.Rules, error) {
				r.Allow = append(slices.Clone(r.Allow), egress.Rule{Domain: name})
				return r, nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	state, err := m.NetState(id)
	if err != nil || len(state.Rules.Allow) != len(names) {
		t.Fatalf("%+v, %v", state.Rules, err)
	}
	no := errors.New("no")
	if _, err = m.EditNet(t.Context(), id, func(egress.Rules) (egress.Rules, error) { return egress.Rules{}, no }); !errors.Is(err, no) {
		t.Errorf("an edit that fails: %v", err)
	}
	huge := strings.Repeat(strings.Repeat("x", 60)+".", 4)
	_, err = m.SetNet(t.Context(), id, egress.Rules{Allow: slices.Repeat([]egress.Rule{{Domain: huge + "example"}}, egress.MaxRules)})
	if !errors.Is(err, errdef.ErrInvalid) || errdef.Hint(err) == "" {
		t.Errorf("rules that a record cannot hold: %.200v", err)
	}
	every := slices.Repeat([]string{"1"}, 64)
	_, err = m.SetNet(t.Context(), id, egress.Rules{Allow: slices.Repeat([]egress.Rule{{Domain: "a.example", Ports: every}}, 2000)})
	if !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("rules with too many ports: %.200v", err)
	}
	if state, err = m.NetState(id); err != nil || len(state.Rules.Allow) != len(names) {
		t.Errorf("%+v, %v", state.Rules, err)
	}
	plain := fork(t, m, 1)[0]
	if _, err = m.SetNet(t.Context(), plain, egress.Rules{}); !errors.Is(err, errdef.ErrUnsupported) || !strings.Contains(errdef.Hint(err), "--net") {
		t.Errorf("without a card: %v", err)
	}
}
