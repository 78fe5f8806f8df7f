package assemble

import (
	"errors"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/errdef"
)

func TestTokens(t *testing.T) {
	t.Parallel()
	deps, dir := tokens(), filepath.Join(t.TempDir(), "state")
	made, secret, err := deps.Create(t.Context(), dir, cli.Token{Name: "ci", Scope: "fork", MaxSandboxes: 3, Sign: true})
	if err != nil || !strings.HasPrefix(secret, "tinesign_ci_") {
		t.Fatalf("%q, %v", secret, err)
	}
	list, err := deps.List(dir)
	if diff := cmp.Diff([]cli.Token{made}, list); diff != "" || err != nil || made.MaxSandboxes != 3 || !made.Sign {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if _, _, err = deps.Create(t.Context(), dir, cli.Token{Name: "CI", Scope: "fork"}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a bad name: %v", err)
	}
	if err = deps.Remove(t.Context(), dir, "ci"); err != nil {
		t.Error(err)
	}
	if err = deps.Remove(t.Context(), dir, "ci"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("again: %v", err)
	}
}

// TestOnHangUp is not parallel: the signal is for the whole process.
func TestOnHangUp(t *testing.T) {
	came := make(chan struct{})
	stop := onHangUp(t.Context(), func() { came <- struct{}{} })
	for range 2 {
		if err := syscall.Kill(syscall.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		<-came
	}
	stop()
}
