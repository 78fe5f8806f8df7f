//go:build vm

package doctor

import (
	"context"
	"testing"

	"github.com/tinevm/tine/internal/engines"
	"github.com/tinevm/tine/internal/vmtest"
)

// A host that can run the other tests of machines passes.
func TestRunWithEngines(t *testing.T) {
	dir := t.TempDir()
	checks := Run(t.Context(), Config{
		StateDir: dir, Agent: vmtest.Program(t, "tine-agent"),
		Engines: func(ctx context.Context) []engines.Report {
			return engines.Survey(ctx, engines.Config{StateDir: dir})
		},
	})
	for _, c := range checks {
		t.Logf("%-4s  %s: %s  %s", c.Status, c.Name, c.Detail, c.Hint)
	}
	if Failed(checks) {
		t.Error("a check failed")
	}
}
