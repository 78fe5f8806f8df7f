package api_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/coder/websocket"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
)

// limited is the interface with limits of its own, and one sandbox, sb-1.
func limited(t *testing.T, change func(*api.Config)) string {
	t.Helper()
	cfg := apitest.New(t).Config()
	change(&cfg)
	srv := httptest.NewServer(apitest.Checked(t, spec, api.New(cfg)))
	t.Cleanup(srv.Close)
	if status, body := do(t, "POST", srv.URL+"/v1/sandboxes", `{"snapshot_tag":"py"}`); status != http.StatusCreated {
		t.Fatalf("fork: %d %s", status, body)
	}
	return srv.URL
}

func TestMaxBody(t *testing.T) {
	t.Parallel()
	url := limited(t, func(c *api.Config) { c.MaxBody = 100 })
	body := `{"snapshot_tag":"py","labels":{"a":"` + strings.Repeat("x", 100) + `"}}`
	a := send(t, "POST", url+"/v1/sandboxes", "application/json", body)
	if a.status != http.StatusRequestEntityTooLarge || !strings.Contains(a.body, `"too_large"`) || !strings.Contains(a.body, "100 bytes") {
		t.Errorf("%d %s, want 413", a.status, a.body)
	}
}

func TestMaxStreams(t *testing.T) {
	t.Parallel()
	url := limited(t, func(c *api.Config) { c.MaxStreams = 1 })
	stream := url + "/v1/sandboxes/sb-1/exec/stream"
	first, resp, err := websocket.Dial(t.Context(), stream, nil) //nolint:bodyclose // it is the connection
	if err != nil {
		t.Fatalf("%v, %+v", err, resp)
	}
	defer func() { _ = first.CloseNow() }()
	second, resp, err := websocket.Dial(t.Context(), stream, nil) //nolint:bodyclose // it is in memory
	if err == nil {
		_ = second.CloseNow()
		t.Fatal("a second stream is open")
	}
	body, readErr := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") == "" || !strings.Contains(string(body), `"exhausted"`) {
		t.Errorf("%d %s, %v, want 429", resp.StatusCode, body, readErr)
	}
}

func TestNotUTF8(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, body := range []string{"{\"snapshot_tag\":\"py\xff\"}", "\xff\xfe{\x00}\x00"} {
		if status, text := do(t, "POST", url+"/v1/sandboxes", body); status != http.StatusBadRequest {
			t.Errorf("%q: %d %s", body, status, text)
		}
	}
}
