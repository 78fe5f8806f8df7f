package api

import (
	"testing"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/sandbox"
)

// TestSees is who sees a sandbox that the token ci has made.
func TestSees(t *testing.T) {
	t.Parallel()
	box := sandbox.Info{Labels: map[string]string{TokenLabel: "ci"}}
	for name, tt := range map[string]struct {
		id    auth.Identity
		share bool
		want  bool
	}{
		"itself":     {auth.Identity{Name: "ci", Scope: auth.Fork}, false, true},
		"another":    {auth.Identity{Name: "cd", Scope: auth.Fork}, false, false},
		"shared":     {auth.Identity{Name: "cd", Scope: auth.Fork}, true, true},
		"certified":  {auth.Identity{Name: "cert:ci", Scope: auth.Fork}, false, false},
		"admin":      {auth.Identity{Name: "cd", Scope: auth.Admin}, false, true},
		"watcher":    {auth.Identity{Name: "cd", Scope: auth.Read}, false, true},
		"the-socket": {auth.Identity{Name: "uid:0", Scope: auth.Admin, Ambient: true}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &server{Config: Config{ShareSandboxes: tt.share}}
			if got := s.sees(auth.With(t.Context(), tt.id), box); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
