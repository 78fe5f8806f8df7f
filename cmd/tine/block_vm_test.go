//go:build vm

package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tinevm/tine/client"
)

// forgeHash is Forge's hash of "git-env\n", which its first example prints.
const forgeHash = "sha256:3ceeb51d137868b2babb0b1c7ab153cc493b6e2b68e69507afbb416888344da0"

// runBlock runs a block. The first time what it runs on is made, which takes
// longer than other commands.
func (h *host) runBlock(ref string) client.BlockRun {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 5*time.Minute)
	defer cancel()
	cmd := h.command(ctx, "block", "run", ref, "--json")
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		h.t.Fatalf("tine block run %s: %v: %s", ref, err, errOut.String())
	}
	var run client.BlockRun
	if err := json.Unmarshal(out.Bytes(), &run); err != nil {
		h.t.Fatalf("%v: %q", err, out.String())
	}
	return run
}

// TestGitBlock: Forge's first example, with a git that is really there, comes to
// the same five times, to what Forge's own hash of it is, and its record can be
// verified. What it runs in is for nothing else.
func TestGitBlock(t *testing.T) {
	h := newHost(t)
	h.serve()
	h.want("git-env@2.39.5\n", "block", "add", "-q", filepath.Join("..", "..", "examples", "blocks", "git-env"))
	var first, last client.BlockRun
	for i := range 5 {
		last = h.runBlock("git-env")
		if i == 0 {
			first = last
		}
		if string(last.Stdout) != "git-env\n" || last.Status != "succeeded" || last.ForgeOutputHash != forgeHash {
			t.Errorf("run %d: %+v", i, last)
		}
		if last.OutputHash != first.OutputHash || last.VirtualMS != first.VirtualMS || last.Snapshot != first.Snapshot || i > 0 && last.RecordID == first.RecordID {
			t.Errorf("run %d: %+v, the first was %+v", i, last, first)
		}
	}
	if out, errOut, code := h.tine("verify", last.RecordID, "--runs", "2"); code != 0 {
		t.Errorf("exit code %d: %s%s", code, out, errOut)
	}
	h.fails(4, "fork", "--snapshot", first.Snapshot)
	if left, err := os.ReadDir(filepath.Join(h.dir, "runs")); err != nil || len(left) != 0 {
		t.Errorf("left by runs: %v, %v", left, err)
	}
}
