package apitest

import (
	"bytes"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
)

const (
	eventStream = "text/event-stream"
	eventsPath  = "/v1/events"
)

// wantsStream reports whether the answer has to reach the client while it is
// written.
func wantsStream(r *http.Request) bool {
	return r.URL.Path == eventsPath || strings.Contains(r.Header.Get("Accept"), eventStream)
}

// stream passes the answer on as it comes, and checks it when it is over.
func (c *checker) stream(w http.ResponseWriter, r *http.Request, body []byte) {
	t := &tee{ResponseWriter: w, rec: httptest.NewRecorder()}
	c.next.ServeHTTP(t, r)
	if t.rec.Code != http.StatusOK || t.rec.Body.Len() > 0 {
		maps.Copy(t.rec.Header(), w.Header())
		c.check(r, body, t.rec)
	}
}

// tee keeps a copy of what is written.
type tee struct {
	http.ResponseWriter
	rec *httptest.ResponseRecorder
}

// WriteHeader keeps the status.
func (t *tee) WriteHeader(status int) {
	t.rec.Code = status
	t.ResponseWriter.WriteHeader(status)
}

// Write keeps b.
func (t *tee) Write(b []byte) (int, error) {
	_, _ = t.rec.Body.Write(b) // a buffer takes all
	return t.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController reach the connection.
func (t *tee) Unwrap() http.ResponseWriter { return t.ResponseWriter }

// checkEvents checks server-sent events: each must be of the schema that its
// name, or its route, calls for.
func (c *checker) checkEvents(r *http.Request, stream []byte) {
	schemas := map[string]string{
		"started": "StreamStarted", "stdout": "ExecChunk", "stderr": "ExecChunk", "exit": "ExecEnd", "error": "Error",
	}
	name := ""
	for line := range bytes.Lines(stream) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		if value, ok := bytes.CutPrefix(line, []byte("event: ")); ok {
			name = string(value)
		}
		data, ok := bytes.CutPrefix(line, []byte("data: "))
		if !ok {
			continue
		}
		schema := schemas[name]
		if r.URL.Path == eventsPath {
			schema = "Event"
		}
		if schema == "" {
			c.tb.Errorf("%s %s: event %q is not known", r.Method, r.URL, name)
			continue
		}
		c.checkSchema(r, schema, data)
	}
}
