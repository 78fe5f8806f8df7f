package forge_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/api/forge"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
)

// empty has no sandboxes and no snapshots.
type empty struct{}

func (empty) Fork(context.Context, sandbox.ForkRequest) ([]sandbox.ForkResult, error) {
	return nil, errdef.ErrNotFound
}

func (empty) Kill(context.Context, string) error { return errdef.ErrNotFound }

func (empty) With(context.Context, string, func(context.Context, *guest.Client) error) error {
	return errdef.ErrNotFound
}

func (empty) List() ([]snapshot.Snapshot, error) { return nil, nil }

// FuzzRequest sees that whatever comes is refused by the client's fault or for
// what is missing, and never by the daemon's.
func FuzzRequest(f *testing.F) {
	mux := http.NewServeMux()
	forge.Mount(mux, forge.Config{
		Sandboxes: empty{}, Snapshots: empty{}, MaxBody: 1 << 10, MaxOutput: 1,
		Fail: func(w http.ResponseWriter, _ *http.Request, err error) {
			if errdef.Code(err) == "internal" || strings.ContainsRune(err.Error(), '\n') {
				panic(fmt.Sprintf("%q is nobody's fault", err))
			}
			w.WriteHeader(http.StatusTeapot)
		},
	})
	for i, body := range []string{
		"", "{}", `{"runtime":"node"}`, `{"command":"ls"}`, `{"code":"1","runtime":"python"}`, `{"data":"YQ==","path":"/x"}`, "[", "null",
	} {
		f.Add(uint8(i), body)
	}
	routes := []string{"", "/id/shell", "/id/execute", "/id/upload"}
	f.Fuzz(func(t *testing.T, route uint8, body string) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/sandbox"+routes[int(route)%len(routes)], strings.NewReader(body))
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		if w.Code != http.StatusTeapot {
			t.Fatalf("%s %q: %d", r.URL, body, w.Code)
		}
	})
}
