package apitest

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"

	"github.com/tinevm/tine/internal/api"
)

// Serve serves the interface with b behind it, on loopback, and fails the test
// for every answer that is not as the document at spec says.
func (b *Backend) Serve(spec string) *httptest.Server {
	b.tb.Helper()
	srv := httptest.NewServer(Checked(b.tb, spec, api.New(b.Config())))
	b.tb.Cleanup(srv.Close)
	return srv
}

// checker compares what a handler answers with an OpenAPI document.
type checker struct {
	tb     testing.TB
	doc    *openapi3.T
	router routers.Router
	next   http.Handler
}

// Checked returns next with every answer checked.
func Checked(tb testing.TB, spec string, next http.Handler) http.Handler {
	tb.Helper()
	data, err := os.ReadFile(spec)
	if err != nil {
		tb.Fatal(err)
	}
	doc, err := openapi3.NewLoader().LoadFromData(data)
	if err != nil {
		tb.Fatal(err)
	}
	if err = doc.Validate(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	router, err := legacy.NewRouter(doc)
	if err != nil {
		tb.Fatal(err)
	}
	return &checker{tb: tb, doc: doc, router: router, next: next}
}

// ofGuest reports whether a path is for a web server in a sandbox.
func ofGuest(path string) bool {
	parts := strings.Split(path, "/")
	return len(parts) > 6 && parts[2] == "sandboxes" && parts[4] == "ports"
}

// ServeHTTP checks what next answers. WebSockets, and guests' own answers, pass
// unseen.
func (c *checker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != "" || ofGuest(r.URL.EscapedPath()) {
		c.next.ServeHTTP(w, r)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		c.tb.Errorf("%s %s: read body: %v", r.Method, r.URL, err)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	if wantsStream(r) {
		c.stream(w, r, body)
		return
	}
	rec := httptest.NewRecorder()
	c.next.ServeHTTP(rec, r)
	c.check(r, body, rec)
	maps.Copy(w.Header(), rec.Header())
	w.WriteHeader(rec.Code)
	_, _ = w.Write(rec.Body.Bytes()) // the client is this test
}

func (c *checker) check(r *http.Request, body []byte, rec *httptest.ResponseRecorder) {
	if rec.Header().Get("X-Request-Id") == "" {
		c.tb.Errorf("%s %s: no X-Request-Id", r.Method, r.URL)
	}
	media, _, _ := mime.ParseMediaType(rec.Header().Get("Content-Type"))
	switch {
	case rec.Code >= 400:
		if media != "application/json" {
			c.tb.Errorf("%s %s: status %d with Content-Type %q", r.Method, r.URL, rec.Code, media)
		}
		c.checkSchema(r, "Error", rec.Body.Bytes())
	case media == eventStream:
		c.checkEvents(r, rec.Body.Bytes())
	case media == "application/x-ndjson" && r.URL.Path == eventsPath:
		for line := range bytes.Lines(rec.Body.Bytes()) {
			if len(bytes.TrimSpace(line)) > 0 {
				c.checkSchema(r, "Event", line)
			}
		}
	case media == "application/x-ndjson":
		for line := range bytes.Lines(rec.Body.Bytes()) {
			c.checkSchema(r, "ProgressLine", line)
		}
	default:
		c.checkAnswer(r, body, rec)
	}
}

func (c *checker) checkSchema(r *http.Request, name string, data []byte) {
	var v any
	err := json.Unmarshal(data, &v)
	if err == nil {
		err = c.doc.Components.Schemas[name].Value.VisitJSON(v)
	}
	if err != nil {
		c.tb.Errorf("%s %s: %q is no %s: %v", r.Method, r.URL, data, name, err)
	}
}

func (c *checker) checkAnswer(r *http.Request, body []byte, rec *httptest.ResponseRecorder) {
	r.Body = io.NopCloser(bytes.NewReader(body))
	route, params, err := c.router.FindRoute(r)
	if err != nil {
		c.tb.Errorf("%s %s: status %d for a route that the document does not have: %v", r.Method, r.URL, rec.Code, err)
		return
	}
	in := &openapi3filter.RequestValidationInput{Request: r, PathParams: params, Route: route}
	if err = openapi3filter.ValidateRequest(r.Context(), in); err != nil && len(body) > 0 {
		c.tb.Errorf("%s %s: status %d for a request that is not as the document says: %v", r.Method, r.URL, rec.Code, err)
	}
	out := &openapi3filter.ResponseValidationInput{RequestValidationInput: in, Status: rec.Code, Header: rec.Header()}
	out.SetBodyBytes(rec.Body.Bytes())
	if err = openapi3filter.ValidateResponse(r.Context(), out); err != nil {
		c.tb.Errorf("%s %s: status %d: %v", r.Method, r.URL, rec.Code, err)
	}
}
