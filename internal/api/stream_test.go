package api

import (
	"testing"
)

func FuzzStreamRequest(f *testing.F) {
	for _, seed := range []string{
		`{"args":["ls"],"env":{"A":"b"},"pty":{"cols":80,"rows":24},"stdin":true,"timeout_secs":1.5,"background":true}`,
		`{"attach":7}`, `{"attach":-7}`, `{}`, `null`, `[]`, `{"args":["x"],"timeout_secs":1e300}`, `{"args":["x"],"pty":{}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		req, err := decodeStreamRequest(data)
		if err != nil {
			return
		}
		if len(req.Args) == 0 && req.Attach <= 0 {
			t.Errorf("%q asks for nothing", data)
		}
		if req.PTY != nil && checkSize(*req.PTY) != nil {
			t.Errorf("%q has a terminal of %+v", data, req.PTY)
		}
		if d, derr := duration("timeout_secs", req.TimeoutSecs); derr != nil || d < 0 {
			t.Errorf("%q has a timeout of %v, %v", data, d, derr)
		}
	})
}

func FuzzStreamControl(f *testing.F) {
	for _, seed := range []string{`{"resize":{"cols":80,"rows":24}}`, `{"signal":"SIGTERM"}`, `{"signal":"64"}`, `{"signal":"-1"}`, `{"stdin_eof":true}`, `{}`, `1`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := decodeStreamControl(data)
		if err == nil && (c.signal < 0 || c.signal > maxSignal) {
			t.Errorf("%q is signal %d", data, c.signal)
		}
	})
}

func TestParseSignal(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]int{"SIGTERM": 15, "term": 15, "15": 15, "KILL": 9, "64": 64, "0": 0, "65": 0, "": 0, "NOPE": 0, "SIG": 0} {
		got, err := parseSignal(in)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("parseSignal(%q) = %d, %v", in, got, err)
		}
	}
}
